package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/gorilla/websocket"
	"golang.org/x/text/unicode/norm"
)

// Maximum number of users in a room, and of connections of each user. The next
// connection of a user replaces the oldest, which may be dead.
const maxUsers, maxTabs = 100, 10

// Maximum number of users that a room remembers as kicked.
const maxKicked = 1000

// A user leaves when all their connections have been closed for awayTime, so a page
// reload or a brief disconnect is not announced. A room without users closes after
// roomLife: then only the database has it.
// After a start, users that were in the room have restartTime to return.
const awayTime, restartTime, roomLife = 10 * time.Second, 30 * time.Second, time.Minute

// Number of lines in a room's history, and of private messages beside them. A client
// that joins may get all of these at once: sendQueueSize must be larger.
const historySize = 100

// Maximum size in bytes of a name, and of a Line as JSON, which may contain a message
// twice, each byte escaped. A welcome with maxUsers names must fit as well.
const maxNameSize, maxLineSize = 32, 4 << 10

// The reasons for which a room closes connections. The page does not reconnect after
// codes from 4400 on, which are 4000 more than the HTTP status of the form with that reason.
var (
	errLoggedOut = closeError(4401, "you have logged out, or logged in with another name")
	errKicked    = closeError(4403, "you were removed from this room")
	errNameTaken = closeError(4409, "a user in this room has this name, or one that looks like it; "+
		"it may be free in ten seconds")
	errTooManyTabs = closeError(4429, "you have too many connections to this room")
	errRoomFull    = closeError(4503, "this room is full")
	errRoomClosed  = closeError(1001, "this room has closed")
)

// A Line is what the server sends: one JSON document. Its kind is one of these:
//
//	welcome  the first line of a connection: User is the client's own name
//	message  Text from User, or from the server if there is no User
//	private  Text from User to To; only they receive it
//	join     User has joined
//	leave    User has left; Text is "kicked by NAME" if NAME has kicked it
//	notice   Text is the server's answer to Line, which this connection has sent
//
// N increases by one with each message of a room, private ones included, so a client may see
// gaps. The other kinds have no number: they are not history.
type Line struct {
	N    int64     `json:"n,omitempty"`
	Time time.Time `json:"time"`
	Kind string    `json:"kind"`
	User string    `json:"user,omitempty"`
	To   string    `json:"to,omitempty"`
	Text string    `json:"text,omitempty"`
	Line string    `json:"line,omitempty"` // of a command: as it was sent

	// Of a welcome:
	RoomID string   `json:"room,omitempty"`   // which room the numbers belong to
	Users  []string `json:"users,omitempty"`  // the users in the room
	Missed bool     `json:"missed,omitempty"` // lines may be missing after JoinRequest.After

	only    []string // the IDs of the sender and of the recipients; nil for all users
	message []byte   // the line as JSON
}

// A JoinRequest is the user that connects, and the last line that its client has
// received before: the ID of the room and the number of the line, or 0.
type JoinRequest struct {
	Identity
	RoomID string
	After  int64
}

// A User is in a room with all connections that have its ID. It keeps the name of the
// first of them until it leaves.
type User struct {
	Identity
	keys    [2]string // of its name
	clients []*Client // oldest first
	away    time.Time // when the last of them was dropped
}

// A Room is what this program adds to a Hub. The methods of Hub in this file are for run's
// goroutine only: run calls them when a client is registered or dropped or sends a line,
// and every second.
type Room struct {
	rooms   *Rooms
	joining atomic.Int32 // number of clients that serveRoom is about to register

	// Owned by run:
	Record
	refusal *websocket.CloseError // if the Record cannot be read, or the room has closed
	users   map[string]*User      // by ID
}

// refuse returns the reason for which user cannot join, or nil. The owner always can.
func (h *Hub) refuse(user Identity) *websocket.CloseError {
	switch {
	case h.refusal != nil:
		return h.refusal
	case user.ID == h.owner || h.users[user.ID] != nil:
		return nil
	case slices.ContainsFunc(h.kicks, func(k Kick) bool { return k.ID == user.ID }):
		return errKicked
	case len(h.users) >= maxUsers:
		return errRoomFull
	case h.find(alike(user.Name)) != nil:
		return errNameTaken
	}
	return nil
}

// join adds client to the room, sends it the lines that it has not received, and
// announces a user that is new. Or it drops client, and the others see nothing.
func (h *Hub) join(client *Client) {
	identity := client.request.Identity
	if reason := h.refuse(identity); reason != nil {
		h.drop(client, reason)
		return
	}
	if user := h.users[identity.ID]; user != nil {
		if len(user.clients) >= maxTabs {
			h.drop(user.clients[0], errTooManyTabs)
		}
		h.welcome(client, user)
		return
	}
	h.owner = cmp.Or(h.owner, identity.ID)
	if identity.ID == h.owner { // Nobody keeps the owner out by taking its name.
		for is := alike(identity.Name); h.find(is) != nil; {
			h.remove(h.find(is), "", errNameTaken)
		}
		h.kicks = slices.DeleteFunc(slices.Clone(h.kicks), isByStandIn)
	}
	h.present = append(h.present, identity)
	h.welcome(client, h.add(identity))
	h.publish(Line{Kind: "join", User: identity.Name})
}

// add makes identity a user of the room. The caller adds it to present, and announces it.
func (h *Hub) add(identity Identity) *User {
	user := &User{Identity: identity, keys: keys(identity.Name)}
	h.users[user.ID] = user
	return user
}

// find returns the first user that is present and for which is returns true, or nil.
func (h *Hub) find(is func(*User) bool) *User {
	for _, identity := range h.present {
		if user := h.users[identity.ID]; is(user) {
			return user
		}
	}
	return nil
}

// welcome adds client to user's connections, and sends it what it has not received.
func (h *Hub) welcome(client *Client, user *User) {
	client.user = user
	user.clients = append(user.clients, client)
	after := client.request.After
	if client.request.RoomID != h.id {
		after = 0 // The number is from another room of that name.
	}
	isOld := func(l Line) bool { return l.N <= after || !l.isFor(client) }
	lines := slices.DeleteFunc(slices.Concat(h.history, h.private), isOld)
	slices.SortFunc(lines, func(a, b Line) int { return cmp.Compare(a.N, b.N) })
	welcome := Line{Kind: "welcome", User: user.Name, RoomID: h.id}
	welcome.Missed = 0 < after && after < h.forgotten || len(lines) > 0 && lines[0].N < h.lost
	for _, other := range h.users {
		welcome.Users = append(welcome.Users, other.Name)
	}
	slices.Sort(welcome.Users)
	h.queue(client, welcome.encode())
	for _, line := range lines {
		h.queue(client, line.message)
	}
}

// leave removes client, which has just been dropped, from its user's connections.
func (h *Hub) leave(client *Client) {
	if user := client.user; user != nil { // else it was not let in
		user.clients = slices.DeleteFunc(user.clients, func(c *Client) bool { return c == client })
		user.away = time.Now()
	}
}

// remove removes user from the room, and announces it, with text if it was kicked. It drops
// the user's clients.
func (h *Hub) remove(user *User, text string, reason *websocket.CloseError) {
	isUser := func(other Identity) bool { return other == user.Identity }
	h.present = slices.DeleteFunc(slices.Clone(h.present), isUser)
	h.publish(Line{Kind: "leave", User: user.Name, Text: text})
	delete(h.users, user.ID)
	for _, client := range user.clients {
		h.drop(client, reason)
	}
}

// expire removes users that have been away for awayTime. It closes the room when no user
// has been in it for roomLife, but not while a client is joining, which would meet a
// stopped hub. Once a day it saves that there are users, so that the store keeps the room.
// It calls itself every second, until the hub has been stopped.
func (h *Hub) expire() {
	time.AfterFunc(time.Second, func() { h.do(h.expire) })
	for _, user := range h.users {
		if len(user.clients) == 0 && time.Since(user.away) >= awayTime {
			h.remove(user, "", nil) // It has no clients.
		}
	}
	if len(h.users) > 0 && time.Since(h.used) >= 24*time.Hour {
		h.used = time.Now()
		h.rooms.store.save(h.Record)
	}
	h.rooms.mu.Lock()
	defer h.rooms.mu.Unlock()
	// run goes on until its last client is done. By then the room may have another hub. A room
	// that was not used could not be read, or has never been saved.
	if h.rooms.hubs[fold(h.name)] == h && len(h.users) == 0 && h.joining.Load() == 0 &&
		time.Since(h.used) >= roomLife && (h.used.IsZero() || h.rooms.store.release(h.Record)) {
		delete(h.rooms.hubs, fold(h.name))
		h.refusal = errRoomClosed
		h.stop()
	}
}

// command matches a line that starts with a slash, or with what an input method types
// for it: "/to Hans meet me at six". It skips invisible characters before the slash:
// else a private message that has one would go to all users.
var command = regexp.MustCompile(
	`^(?:[^\pL\pN\pP\pS]|[\x{115F}\x{1160}\x{2800}\x{3164}\x{FFA0}])*[/／∕⁄、]` +
		`[\s\pZ]*([^\s\pZ]*)[\s\pZ]*([^\s\pZ]*)[\s\pZ]*(.*)`)

var usages = map[string]string{"to": "/to NAME text", "kick": "/kick NAME", "allow": "/allow NAME"}

// receive publishes a line from client, or runs it if it is a command.
func (h *Hub) receive(client *Client, line string) {
	sender, parts := client.user, command.FindStringSubmatch(line)
	if parts == nil {
		h.publish(Line{Kind: "message", User: sender.Name, Text: line})
		return
	}
	verb, name, text := strings.ToLower(norm.NFKC.String(parts[1])), parseName(parts[2]), parts[3]
	// Not alike: else "/to Paul" would go to Pau1.
	user := h.find(func(user *User) bool { return strings.EqualFold(user.Name, name) })
	switch {
	case usages[verb] == "":
		h.notify(client, line, "Unknown command. There are /to NAME text, /kick NAME and /allow NAME.")
	case parts[2] == "" || verb == "to" && text == "":
		h.notify(client, line, "Write "+usages[verb]+".")
	case verb != "to" && sender != h.host():
		h.notify(client, line, "Only the host, "+h.host().Name+", can remove and allow users.")
	case verb == "allow":
		h.notify(client, line, h.allow(sender, name))
	case user == nil:
		h.notify(client, line, "There is no user with that name in this room.")
	case verb == "to":
		h.publish(Line{Kind: "private", User: sender.Name, To: user.Name, Text: text, Line: line,
			only: []string{sender.ID, user.ID}})
	case user == sender: // This protects the owner, who is the host while present.
		h.notify(client, line, "You cannot remove yourself.")
	default:
		h.kicks = append(h.kicks, Kick{user.Identity, sender.ID != h.owner})
		if len(h.kicks) > maxKicked { // A stand-in must not push out the owner's kicks.
			oldest := max(0, slices.IndexFunc(h.kicks, isByStandIn))
			h.kicks = slices.Delete(slices.Clone(h.kicks), oldest, oldest+1)
		}
		h.notify(client, line, "Done.")
		h.remove(user, "kicked by "+sender.Name, errKicked)
	}
}

// allow takes back the kicks of users of that name, but the owner's for the owner only. It
// returns the answer to the host.
func (h *Hub) allow(host *User, name string) string {
	kicks := slices.DeleteFunc(slices.Clone(h.kicks), func(k Kick) bool {
		return k.Name != "" && strings.EqualFold(k.Name, name) && (k.StandIn || host.ID == h.owner)
	})
	if len(kicks) == len(h.kicks) {
		return "There is no removed user with that name whom you can allow."
	}
	h.kicks = kicks
	h.rooms.store.save(h.Record)
	return "Done."
}

// host returns the user that may kick others: the owner, or, while the owner is absent,
// the user that joined first.
func (h *Hub) host() *User {
	return cmp.Or(h.users[h.owner], h.users[h.present[0].ID])
}

// publish delivers line to the users that may read it, and saves the room. It numbers and
// keeps messages.
func (h *Hub) publish(line Line) {
	if h.refusal != nil {
		return // Otherwise it could overwrite what the store has, or another hub.
	}
	if len(h.users) > 0 {
		h.used = time.Now()
	}
	if line.Kind == "message" || line.Kind == "private" {
		for h.last-h.committed.Load() >= maxUncommitted {
			time.Sleep(commitDelay) // Commits fail: backpressure.
		}
		h.last++
		line.N = h.last
	}
	if line.message = line.encode(); line.N > 0 {
		h.keep(line)
	}
	h.rooms.store.save(h.Record)
	h.deliverTo(line.message, line.isFor)
}

// keep adds line to the history or to the private messages, and forgets what is too much.
func (r *Record) keep(line Line) {
	if len(line.only) == 0 {
		r.history = append(r.history, line)
	} else {
		r.private = append(r.private, line)
	}
	if len(r.history) > historySize {
		r.forgotten = max(r.forgotten, r.history[0].N)
		r.history = r.history[1:]
	}
	if len(r.private) > historySize {
		i := oldestOfMost(r.private)
		r.forgotten = max(r.forgotten, r.private[i].N)
		r.private = slices.Delete(slices.Clone(r.private), i, i+1)
	}
}

// oldestOfMost returns the index of the oldest line of the sender that has the most, so that
// no user can push out the private messages of the others.
func oldestOfMost(lines []Line) int {
	counts, most := make(map[string]int), 0
	for _, line := range lines {
		counts[line.only[0]]++
		most = max(most, counts[line.only[0]])
	}
	return slices.IndexFunc(lines, func(l Line) bool { return counts[l.only[0]] == most })
}

// notify sends client a notice about a line that it has sent.
func (h *Hub) notify(client *Client, line, text string) {
	h.queue(client, Line{Kind: "notice", Text: text, Line: line}.encode())
}

// isFor reports whether client receives the line: if it has been let in, and may read it.
func (l Line) isFor(client *Client) bool {
	return client.user != nil && (len(l.only) == 0 || slices.Contains(l.only, client.request.ID))
}

// encode returns the line as JSON, with the time.
func (l Line) encode() []byte {
	l.Time = time.Now()
	var message bytes.Buffer
	encoder := json.NewEncoder(&message)
	encoder.SetEscapeHTML(false) // The page parses no text as HTML. An escaped < takes six bytes.
	encoder.Encode(l)            // No field can fail to encode.
	return bytes.TrimSpace(message.Bytes())
}
