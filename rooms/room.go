package main

import (
	"cmp"
	"fmt"
	"regexp"
	"strings"

	"github.com/mtibben/confusables"
	"golang.org/x/text/secure/precis"
)

// Lines that a room remembers for those who come later. They wait in the queue of who
// comes, together with a line about each person in the room: it has to hold more.
const historySize = 50

// Maximum size in bytes of a name, and of a message behind a name.
const maxNameSize = 32
const maxLineSize = maxNameSize + len(": ") + maxMessageSize

// The room's own goodbyes. RFC 6455 section 7.4.2 leaves their codes to applications.
// After one of these, the page does not come back by itself.
var sentAway = &goodbye{Code: 4403, Text: "you have been sent away from this room"}
var nameTaken = &goodbye{Code: 4409, Text: "somebody in this room has your name, or one that looks like it"}

// An Identity is what somebody's cookie says.
type Identity struct{ ID, Name string }

// A Person is somebody in a room.
type Person struct {
	Identity
	clients map[*Client]bool
}

// A Room is what a Hub has to be one of several. Its methods, which are the Hub's,
// are what run calls when somebody comes, leaves or says something.
type Room struct {
	rooms       *Rooms
	name, owner string // the owner's is the ID of who has opened it
	seats       int    // guarded by Rooms.mu: the connections, from admit to exit

	// Owned by run:
	history [][]byte           // what was last said, oldest first
	people  map[string]*Person // by the skeletons of their names
	kicked  map[string]bool    // by ID
}

// enter tells client what was last said and who is here, and the others who comes.
func (h *Hub) enter(client *Client) {
	person := cmp.Or(h.people[skeleton(client.who.Name)], &Person{client.who, make(map[*Client]bool)})
	if h.kicked[client.who.ID] {
		h.drop(client, sentAway)
		return
	} else if person.ID != client.who.ID {
		h.drop(client, nameTaken)
		return
	}
	for _, line := range h.history {
		h.queue(client, line)
	}
	h.people[skeleton(person.Name)] = person
	if person.clients[client] = true; len(person.clients) == 1 {
		h.tell(h.clients, "%s has come.", person.Name)
	}
	for _, other := range h.people {
		h.queue(client, fmt.Appendf(nil, "* %s is here.", other.Name))
	}
}

// exit takes the seat of a client that has left, and tells the others. When the last
// has left the room is gone: who comes from then on opens a new one.
func (h *Hub) exit(client *Client) {
	person := cmp.Or(h.people[skeleton(client.who.Name)], new(Person))
	if person.clients[client] && len(person.clients) == 1 {
		delete(h.people, skeleton(person.Name))
		h.tell(h.clients, "%s has left.", person.Name)
	}
	delete(person.clients, client)
	h.rooms.mu.Lock()
	defer h.rooms.mu.Unlock()
	if h.seats--; h.seats == 0 {
		delete(h.rooms.hubs, h.name)
		h.stop()
	}
}

// hear takes a line that a person says. One that starts with a slash is for the
// server: of the others only those hear it whom it concerns.
func (h *Hub) hear(line []byte) {
	name, text, _ := strings.Cut(string(line), ": ")
	if !strings.HasPrefix(text, "/") {
		h.history = append(h.history[max(0, len(h.history)+1-historySize):], line)
		h.deliver(line, h.clients)
		return
	}
	words := append(strings.Fields(text), "")
	speaker, other := h.people[skeleton(name)], h.people[skeleton(words[1])]
	h.deliver(line, speaker.clients)
	switch {
	case words[0] != "/to" && words[0] != "/kick":
		h.tell(speaker.clients, "There are two commands, /to NAME text and /kick NAME.")
	case words[0] == "/kick" && speaker.ID != h.owner:
		h.tell(speaker.clients, "Only who has opened the room can send somebody away.")
	case other == nil:
		h.tell(speaker.clients, "%.32q is not here.", words[1])
	case words[0] == "/kick":
		h.kicked[other.ID] = true
		h.tell(h.clients, "%s has sent %s away.", speaker.Name, other.Name)
		for client := range other.clients {
			h.drop(client, sentAway)
		}
	case other != speaker:
		h.deliver(line, other.clients)
	}
}

// tell says something in the server's own words. What people say starts with a name,
// and no star can be in a name.
func (h *Hub) tell(clients map[*Client]bool, format string, args ...any) {
	h.deliver(fmt.Appendf(nil, "* "+format, args...), clients)
}

var word = regexp.MustCompile(`^[\p{L}\p{Nd}][\p{L}\p{M}\p{Nd}_-]*$`)

// parseName returns a name in its one form, that of RFC 8265 for user names, or "" if
// it is none. It allows one word, so that no name can hold what ends a name.
func parseName(text string) string {
	if name, err := precis.UsernameCasePreserved.String(text); err == nil && len(name) <= maxNameSize && word.MatchString(name) {
		return name
	}
	return ""
}

// skeleton returns what all names have in common that look like this one, or differ
// from it by capitals alone. https://www.unicode.org/reports/tr39/#Confusable_Detection
func skeleton(name string) string {
	return confusables.Skeleton(strings.ToLower(confusables.Skeleton(name)))
}
