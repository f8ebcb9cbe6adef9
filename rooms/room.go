package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"maps"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/gorilla/websocket"
	"github.com/mtibben/confusables"
	"golang.org/x/text/cases"
	"golang.org/x/text/secure/precis"
	"golang.org/x/text/unicode/norm"
)

// Maximum number of people in a room, and of connections of each: a second tab is
// one more. The next one takes the place of the oldest.
const maxPeople, maxTabs = 100, 10

// Somebody has left when all their connections have been gone for awayTime: a reload,
// or a bad line, is no news. A room closes when nobody has been here for roomLife.
const awayTime, roomLife = 10 * time.Second, time.Minute

// A room keeps so many lines to everybody, and as many more that were to one person.
// Whoever comes may get all of these at once: sendQueueSize has to be larger.
const historySize = 100

// Maximum size in bytes of a name, and of a Line as JSON. There a message can be twice as
// long, and stand in two fields. A hello with maxPeople names has to fit, too.
const maxNameSize, maxLineSize = 32, 4 << 10

// Why a room closes connections. RFC 6455 section 7.4.2 leaves these codes to applications.
// After a code from 4400 on, the page does not come back by itself.
var sentAway = &websocket.CloseError{Code: 4403, Text: "you have been sent away from this room"}
var nameTaken = &websocket.CloseError{Code: 4409, Text: "somebody in this room has your name, or one that looks like it"}
var tooManyTabs = &websocket.CloseError{Code: 4429, Text: "you are in this room too many times"}
var roomFull = &websocket.CloseError{Code: 4503, Text: "this room is full"}

// A Line is what a client reads: one JSON document. Its kind says what it is:
//
//	said    Text, by Who, or by the server if there is no Who
//	to      Text, by Who, to To alone
//	came    Who has come
//	left    Who has left; or Text says "sent away by" whom
//	answer  what the server says of a line that this connection has sent
//	hello   the first line of a connection: Who is the name that it has here
//
// N grows by one from line to line in the room. Between two lines that a connection
// gets, a number may be missing: that line was to somebody else. A hello and an answer
// have no number, as they are not kept.
type Line struct {
	N    int       `json:"n,omitempty"`
	Time time.Time `json:"time"`
	Kind string    `json:"kind"`
	Who  string    `json:"who,omitempty"`
	To   string    `json:"to,omitempty"`
	Text string    `json:"text,omitempty"`
	Line string    `json:"line,omitempty"` // of a command: as it was sent

	// Of a hello:
	RoomID string   `json:"room,omitempty"`   // tells this room from others that had its name
	People []string `json:"people,omitempty"` // who is here
	Missed bool     `json:"missed,omitempty"` // some of what came behind Visit.After may no longer be kept

	only    []string // the IDs of those whom it is for, unless it is for everybody
	message []byte   // the line as it is sent, which tell makes once for all
}

// An Identity is what somebody's cookie says.
type Identity struct{ ID, Name string }

// A Visit is who comes into a room, and the number of the last line that they say they
// have read there: 0 if they have read none.
type Visit struct {
	Identity
	After int
}

// A Person is somebody in a room: all connections with one ID. All have the name that
// the first of them came with, until the person has left.
type Person struct {
	Identity
	came    int       // the number of the line that says that they have come
	clients []*Client // oldest first
	away    time.Time // when one of them was last dropped
}

// A Room is what this copy adds to a Hub. The methods of Hub in this file are for run
// alone to call: when somebody comes, leaves or says something, and every second.
type Room struct {
	rooms    *Rooms
	name, id string
	coming   atomic.Int32     // how many serveRoom has sent here who have not registered yet
	seconds  <-chan time.Time // for sweep

	// Owned by run:
	used      time.Time          // when sweep last found somebody here; zero if nobody ever was
	kicked    map[string]bool    // by ID
	people    map[string]*Person // by ID
	names     directory[Person]  // the same people
	founder   string             // the ID of whoever came first
	last      int                // the number of the last line
	history   []Line             // those for everybody, oldest first
	whispers  []Line             // those for one person, apart, so that they displace nothing that all can read
	forgotten int                // the number of the last line that is no longer in these
}

// enter lets client in, tells it what it has not read, and tells the others of a person
// who is new. Or it drops client, with the reason, and the others hear nothing of it.
func (h *Hub) enter(client *Client) {
	id, name := client.visit.ID, client.visit.Name
	person := h.people[id]
	switch {
	case h.kicked[id]:
		h.drop(client, sentAway)
	case person != nil:
		if len(person.clients) >= maxTabs {
			h.drop(person.clients[0], tooManyTabs) // On a bad line the oldest may be dead.
		}
		h.welcome(client, person)
	case len(h.people) >= maxPeople:
		h.drop(client, roomFull)
	case h.names.find(name) != nil:
		h.drop(client, nameTaken)
	default:
		person = &Person{Identity: client.visit.Identity, came: h.last + 1}
		h.people[id] = person
		h.names.add(name, person)
		h.founder = cmp.Or(h.founder, id)
		h.welcome(client, person)
		h.tell(Line{Kind: "came", Who: name})
	}
}

// welcome makes client one of person's, and tells it what it has not read yet.
func (h *Hub) welcome(client *Client, person *Person) {
	client.person = person
	person.clients = append(person.clients, client)
	after := client.visit.After
	hello := Line{Kind: "hello", Who: person.Name, RoomID: h.id, Missed: 0 < after && after < h.forgotten, Time: time.Now()}
	for _, somebody := range h.people {
		hello.People = append(hello.People, somebody.Name)
	}
	slices.Sort(hello.People)
	h.queue(client, hello.encode())
	lines := slices.Concat(h.history, h.whispers)
	slices.SortFunc(lines, func(a, b Line) int { return a.N - b.N })
	for _, line := range lines {
		if line.N > after && line.isFor(client) {
			h.queue(client, line.message)
		}
	}
}

// exit takes client, which has just been dropped, from its person. The others hear
// nothing of that: sweep tells them when the person has left.
func (h *Hub) exit(client *Client) {
	if person := client.person; person != nil { // else it was not let in
		person.clients = slices.DeleteFunc(person.clients, func(other *Client) bool { return other == client })
		person.away = time.Now()
	}
}

// remove takes person out of the room, as somebody who has left, or been sent away.
func (h *Hub) remove(person *Person, why string) {
	delete(h.people, person.ID)
	h.names.remove(person.Name)
	h.tell(Line{Kind: "left", Who: person.Name, Text: why})
}

// sweep removes who has been away for awayTime. It closes the room when nobody has been
// in it for roomLife, or at once if nobody ever was; but never while somebody is coming,
// so nobody meets a hub that is about to stop.
func (h *Hub) sweep() {
	for _, person := range h.people {
		if len(person.clients) == 0 && time.Since(person.away) >= awayTime {
			h.remove(person, "")
		}
	}
	if len(h.people) > 0 {
		h.used = time.Now()
		return
	}
	h.rooms.mu.Lock()
	defer h.rooms.mu.Unlock()
	// A room closes once. run goes on until its last client has left, and by then another
	// room may have the name.
	if h.rooms.hubs.find(h.name) == h && h.coming.Load() == 0 && time.Since(h.used) >= roomLife {
		h.rooms.hubs.remove(h.name)
		h.stop()
	}
}

// command matches what starts with a slash, or what an input method writes for one:
// "/to Hans meet me at six". What cannot be seen before the slash does not count, as
// else it would tell everybody what is for one.
var command = regexp.MustCompile(`^(?:[^\pL\pN\pP\pS]|[\x{115F}\x{1160}\x{2800}\x{3164}\x{FFA0}])*[/／∕⁄、]` +
	`[\s\pZ]*([^\s\pZ]*)[\s\pZ]*([^\s\pZ]*)[\s\pZ]*(.*)`)

// hear takes what client says, and tells everybody, unless it is a command.
func (h *Hub) hear(client *Client, line string) {
	if !h.clients[client] {
		return // It was dropped while the line was on its way.
	}
	speaker, words := client.person, command.FindStringSubmatch(line)
	if words == nil {
		h.tell(Line{Kind: "said", Who: speaker.Name, Text: line})
		return
	}
	verb, name, text := strings.ToLower(norm.NFKC.String(words[1])), parseName(words[2]), words[3]
	other := h.names.find(name)
	switch {
	case verb != "to" && verb != "kick" || verb == "to" && text == "":
		h.answer(client, line, "There are two commands, /to NAME text and /kick NAME.")
	case other == nil || !strings.EqualFold(other.Name, name): // else "/to Paul" would go to Pau1
		h.answer(client, line, "Nobody of that name is here.")
	case verb == "to":
		h.tell(Line{Kind: "to", Who: speaker.Name, To: other.Name, Text: text, Line: line, only: []string{speaker.ID, other.ID}})
	case speaker != h.host():
		h.answer(client, line, "Only "+h.host().Name+" can send people away.")
	case other == speaker: // This protects whoever opened the room: while they are here, they are the host.
		h.answer(client, line, "You cannot send yourself away.")
	default:
		h.kicked[other.ID] = true
		h.answer(client, line, "Done.")
		h.remove(other, "sent away by "+speaker.Name)
		for _, theirs := range slices.Clone(other.clients) { // exit takes each from the list
			h.drop(theirs, sentAway)
		}
	}
}

// host returns who can send people away: who opened the room, or, while they are not
// here, who has been here longest.
func (h *Hub) host() *Person {
	if founder := h.people[h.founder]; founder != nil {
		return founder
	}
	return slices.MinFunc(slices.Collect(maps.Values(h.people)), func(a, b *Person) int { return a.came - b.came })
}

// tell gives line its number, keeps it, and delivers it to whom it is for.
func (h *Hub) tell(line Line) {
	h.last++
	line.N, line.Time = h.last, time.Now()
	line.message = line.encode()
	kept := &h.history
	if line.only != nil {
		kept = &h.whispers
	}
	*kept = append(*kept, line)
	if len(*kept) > historySize {
		h.forgotten = max(h.forgotten, (*kept)[0].N)
		*kept = (*kept)[1:]
	}
	h.deliver(line)
}

// answer tells client alone what has become of a line that it has sent.
func (h *Hub) answer(client *Client, line, text string) {
	h.queue(client, Line{Kind: "answer", Text: text, Line: line, Time: time.Now()}.encode())
}

func (l Line) isFor(client *Client) bool {
	return l.only == nil || slices.Contains(l.only, client.visit.ID)
}

func (l Line) encode() []byte {
	var message bytes.Buffer
	encoder := json.NewEncoder(&message)
	encoder.SetEscapeHTML(false) // Else a < is six bytes, and the page puts no text into HTML.
	encoder.Encode(l)            // No field can fail.
	return bytes.TrimSpace(message.Bytes())
}

var word = regexp.MustCompile(`^[\p{L}\p{Nd}][\p{L}\p{M}\p{Nd}_-]*$`)

// parseName returns a name in its one form, that of RFC 8265 for user names, or "" if
// it is none. It allows one word, so that a command can have text behind it.
func parseName(text string) string {
	if name, err := precis.UsernameCasePreserved.String(text); err == nil && len(name) <= maxNameSize && word.MatchString(name) {
		return name
	}
	return ""
}

// A directory finds things by name, and does not tell names apart that people take for
// the same: each thing stands in it twice, by fold and by looks.
type directory[T any] map[string]*T

func (d directory[T]) find(name string) *T       { return cmp.Or(d[fold(name)], d[looks(name)]) }
func (d directory[T]) add(name string, thing *T) { d[fold(name)], d[looks(name)] = thing, thing }
func (d directory[T]) remove(name string)        { delete(d, fold(name)); delete(d, looks(name)) }

// fold returns a key that is the same for two names that differ by capitals alone, as
// Lisa and LISA, or look alike in small letters. Weiß counts as Weiss.
// https://www.unicode.org/reports/tr39/#Confusable_Detection
func fold(name string) string {
	// A Turkish capital I with a dot folds to two characters.
	return cases.Fold().String(confusables.Skeleton(strings.ReplaceAll(cases.Fold().String(name), "i\u0307", "i")))
}

// looks returns a key that is the same for two names that look alike as they are
// written, as Gretel and GreteI, or do so but for capitals, as Gretel and greteI. A
// capital L stays itself, as nobody takes it for a capital I: TalkerI and TalkerL are
// two. The star is in no name, so it keeps these keys apart from fold's.
func looks(name string) string {
	return "* " + cases.Fold().String(strings.ReplaceAll(confusables.Skeleton(name), "L", "*"))
}
