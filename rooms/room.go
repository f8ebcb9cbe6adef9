package main

import (
	"encoding/json"
	"maps"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/mtibben/confusables"
	"golang.org/x/text/cases"
	"golang.org/x/text/secure/precis"
	"golang.org/x/text/unicode/norm"
)

// Maximum number of people in a room, and of connections of each: a second tab is
// one more.
const maxPeople, maxTabs = 100, 10

// Somebody has left when all their connections have been gone for awayTime: a reload,
// or a bad line, is no news. A room closes when nobody has been here for roomLife.
const awayTime, roomLife = 10 * time.Second, time.Minute

// Lines to everybody, and as many to one person each, that a room keeps. They all wait
// in the queue of who comes: it has to hold more.
const historySize = 100

// Maximum size in bytes of a name, and of a Line as JSON. In that a message becomes at
// most six times as long, and may stand in two fields; a hello has maxPeople names.
const maxNameSize, maxLineSize = 32, 8 << 10

// The room's own goodbyes. RFC 6455 section 7.4.2 leaves their codes to applications.
// After one of these, the page does not come back by itself.
var sentAway = &goodbye{Code: 4403, Text: "you have been sent away from this room"}
var nameTaken = &goodbye{Code: 4409, Text: "somebody in this room has your name, or one that looks like it"}
var tooManyTabs = &goodbye{Code: 4429, Text: "you are in this room too many times"}
var roomFull = &goodbye{Code: 4503, Text: "this room is full"}

// A Line is what a client reads: one JSON document. Its kind says what it is:
//
//	said    Who says Text, or without a Who the server itself
//	to      Who says Text to To alone
//	came    Who has come
//	left    Who has left, or has been sent away, as Text says
//	answer  what the server says of a line that this connection has sent
//	hello   the first line of a connection: Who is the name that it has here
//
// N grows by one from line to line in the room. Whoever misses a number has missed
// nothing: that line was to somebody else. A hello and an answer have no number, as
// they are not kept.
type Line struct {
	N    int       `json:"n,omitempty"`
	Time time.Time `json:"time"`
	Kind string    `json:"kind"`
	Who  string    `json:"who,omitempty"`
	To   string    `json:"to,omitempty"`
	Text string    `json:"text,omitempty"`
	Line string    `json:"line,omitempty"` // of a command: as it was sent

	// Of a hello:
	Room   string   `json:"room,omitempty"`   // tells this room from others that had its name
	People []string `json:"people,omitempty"` // who is here
	Missed bool     `json:"missed,omitempty"` // the history no longer reaches back to Visit.After

	only []string // the IDs of those whom it is for, unless it is for everybody
}

// An Identity is what somebody's cookie says.
type Identity struct{ ID, Name string }

// A Visit is who comes into a room, and what they have read there already.
type Visit struct {
	Identity
	Room  string // that of the last hello
	After int    // the number of the last line
}

// A Person is somebody in a room: all connections with one ID. They have one name,
// which is the first one's, until the person has left.
type Person struct {
	Identity
	came    int // the number of the line that says so
	clients map[*Client]bool
	away    time.Time // when the last of them was dropped
}

// A Room is what a Hub has to be one of several. Its methods, which are the Hub's,
// are what run calls when somebody comes, leaves or says something.
type Room struct {
	rooms    *Rooms
	name, id string
	seconds  <-chan time.Time // for sweep

	// Guarded by Rooms.mu. run alone writes kicked, so it need not lock to read it.
	used   time.Time       // when somebody was last here or about to come
	kicked map[string]bool // by ID

	// Owned by run:
	people    map[string]*Person // by ID
	names     map[string]*Person // by what their names are when folded, and look like
	founder   string             // the ID of whoever came first
	last      int                // the number of the last line
	history   []Line             // those for everybody, oldest first
	whispers  []Line             // those for one person, apart, so that they displace nothing that all can read
	forgotten int                // the number of the last line that is no longer in these
}

// enter lets client in, and tells it what it has not read, and the others who comes.
// Or it drops client, with the reason, and the others hear nothing.
func (h *Hub) enter(client *Client) {
	id, name := client.visit.ID, client.visit.Name
	person := h.people[id]
	switch {
	case h.kicked[id]:
		h.drop(client, sentAway)
	case person != nil && len(person.clients) >= maxTabs:
		h.drop(client, tooManyTabs)
	case person != nil:
		h.welcome(client, person)
	case len(h.people) >= maxPeople:
		h.drop(client, roomFull)
	case h.names[fold(name)] != nil || h.names[looks(name)] != nil:
		h.drop(client, nameTaken)
	default:
		person = &Person{Identity: client.visit.Identity, came: h.last + 1, clients: make(map[*Client]bool)}
		h.people[id], h.names[fold(name)], h.names[looks(name)] = person, person, person
		if h.founder == "" {
			h.founder = id
		}
		h.welcome(client, person)
		h.tell(Line{Kind: "came", Who: name})
	}
}

// welcome makes client one of person's, and tells it what it has not read yet.
func (h *Hub) welcome(client *Client, person *Person) {
	client.person = person
	person.clients[client] = true
	after := client.visit.After
	if client.visit.Room != h.id {
		after = 0 // That was in a room that is gone.
	}
	hello := Line{Kind: "hello", Who: person.Name, Room: h.id, Missed: after < h.forgotten, Time: time.Now()}
	for _, other := range h.people {
		hello.People = append(hello.People, other.Name)
	}
	slices.Sort(hello.People)
	h.queue(client, hello.encode())
	lines := slices.Concat(h.history, h.whispers)
	slices.SortFunc(lines, func(a, b Line) int { return a.N - b.N })
	for _, line := range lines {
		if line.N > after && line.isFor(client) {
			h.queue(client, line.encode())
		}
	}
}

// exit is the end of client, which has just been dropped. The others do not hear of it
// until it is clear, in sweep, that its person has left.
func (h *Hub) exit(client *Client) {
	if client.person != nil { // else it was not let in
		delete(client.person.clients, client)
		client.person.away = time.Now()
	}
}

// remove takes person out of the room, as somebody who has left, or been sent away.
func (h *Hub) remove(person *Person, why string) {
	delete(h.people, person.ID)
	maps.DeleteFunc(h.names, func(_ string, other *Person) bool { return other == person })
	h.tell(Line{Kind: "left", Who: person.Name, Text: why})
}

// sweep removes who has been away for long enough, and closes the room if nobody has
// been here for long enough. Whoever admit has sent here comes in before that: so
// nobody meets a hub that is about to stop, or opens a second room of that name.
func (h *Hub) sweep() {
	for _, person := range h.people {
		if len(person.clients) == 0 && time.Since(person.away) >= awayTime {
			h.remove(person, "")
		}
	}
	h.rooms.mu.Lock()
	defer h.rooms.mu.Unlock()
	if len(h.people) > 0 {
		h.used = time.Now()
	} else if h.rooms.hubs[fold(h.name)] == h && time.Since(h.used) >= roomLife {
		delete(h.rooms.hubs, fold(h.name)) // once: run may go on, and another room have this name
		h.stop()
	}
}

// command matches what starts with a slash, or what an input method writes for one:
// "/to Hans meet me at six". What cannot be seen before the slash does not count, as
// else it would tell everybody what is for one.
var command = regexp.MustCompile(`^(?:[^\pL\pN\pP\pS]|[\x{115F}\x{1160}\x{2800}\x{3164}\x{FFA0}])*[/／∕⁄、]` +
	`[\s\pZ]*([^\s\pZ]*)[\s\pZ]*([^\s\pZ]*)[\s\pZ]*(.*)`)

// hear takes what client says. A command is for the server: of the others, only those
// hear it whom it concerns.
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
	other := h.names[fold(name)]
	if other != nil && !strings.EqualFold(other.Name, name) {
		other = nil // It only looks like the name: "/to Paul" is not for Pau1.
	}
	switch {
	case verb != "to" && verb != "kick":
		h.answer(client, line, "There are two commands, /to NAME text and /kick NAME.")
	case other == nil:
		h.answer(client, line, "Nobody of that name is here.")
	case verb == "to":
		h.tell(Line{Kind: "to", Who: speaker.Name, To: other.Name, Text: text, Line: line, only: []string{speaker.ID, other.ID}})
	case speaker != h.host():
		h.answer(client, line, "Only "+h.host().Name+" can send people away.")
	case other == speaker: // So nobody sends away who opened the room: while they are here, they are the host.
		h.answer(client, line, "You cannot send yourself away.")
	default:
		h.rooms.mu.Lock()
		h.kicked[other.ID] = true
		h.rooms.mu.Unlock()
		h.answer(client, line, "Done.")
		h.remove(other, "sent away by "+speaker.Name)
		for client := range other.clients {
			h.drop(client, sentAway)
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
	message, _ := json.Marshal(l) // No field can fail.
	return message
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

// fold returns what all names have in common that differ by capitals alone, or look
// alike in small letters. https://www.unicode.org/reports/tr39/#Confusable_Detection
func fold(name string) string {
	small := strings.ReplaceAll(cases.Fold().String(name), "i\u0307", "i") // It was a Turkish capital i.
	return cases.Fold().String(confusables.Skeleton(small))
}

// looks returns what all names have in common that look alike as they are written, or
// do so but for capitals: "* gretel" for Gretel and greteI. A capital L stays itself,
// as nobody takes it for the capital I that looks like an l: TalkerI and TalkerL are
// two. No name that is folded starts with a star.
func looks(name string) string {
	return "* " + cases.Fold().String(strings.ReplaceAll(confusables.Skeleton(name), "L", "*"))
}
