package main

import (
	"sync"
	"time"
)

// A Hub passes on to every client in the room what any of them says. ("A copy", in
// these comments, is a program that somebody has made from this one.)
type Hub struct {
	Room

	// Owned by run:
	clients map[*Client]bool

	// From other goroutines to run. After stop, run no longer receives from register,
	// and when the last client has left, from none: then a send waits for ever. So
	// whoever may outlive the hub, as a handler does, selects on stopped as well. A
	// function that run calls must not send here, as it would wait for itself: it calls
	// tell, answer and drop.
	broadcast  chan []byte  // for every client: what clean returns, of at most maxMessageSize bytes
	do         chan func()  // to be called by run: what only run may do; the room waits for it
	register   chan *Client // to be taken in
	unregister chan *Client // to be dropped
	left       chan *Client // readPump's last word: its client has ended

	// stop makes run send everybody away. Anybody may call it, any number of times.
	// It closes stopped at once; the hub has ended when run returns, which takes as
	// long as its slowest client.
	stop    func()
	stopped <-chan struct{}
}

func newHub() *Hub {
	stopped := make(chan struct{})
	return &Hub{
		clients:    make(map[*Client]bool),
		broadcast:  make(chan []byte),
		do:         make(chan func()),
		register:   make(chan *Client),
		unregister: make(chan *Client),
		left:       make(chan *Client),
		stop:       sync.OnceFunc(func() { close(stopped) }),
		stopped:    stopped,
	}
}

// run is the hub's one goroutine. After stop it sends everybody away, and it
// returns when the last of them has left.
func (h *Hub) run() {
	present := make(map[*Client]bool) // who has registered and not left, dropped or not
	register, stopped := h.register, h.stopped
	for stopped != nil || len(present) > 0 {
		select {
		case client := <-register:
			if !client.dropped { // A copy may register it again, but its queue is closed.
				h.clients[client] = true
				present[client] = true
				h.enter(client)
			}
		case client := <-h.unregister:
			h.drop(client, noReason)
		case client := <-h.left:
			h.drop(client, noReason) // if a copy has not done so
			delete(present, client)
		case message := <-h.broadcast:
			h.tell(Line{Kind: "said", Text: string(message)})
		case call := <-h.do:
			call()
		case <-h.seconds:
			h.sweep()
		case <-stopped:
			register, stopped = nil, nil // a nil channel is never ready
			for client := range h.clients {
				h.drop(client, shuttingDown)
			}
		}
	}
}

// breather is how long the hub pauses when a queue is more than half full: long
// enough for writePumps to catch up and for senders to feel the pressure, short
// enough that one stuck reader costs the room next to nothing. A reader that is
// always half behind holds the room to a thousand messages a second, which is
// more than anybody reads.
const breather = time.Millisecond

// deliver queues line for whom it is for, and pauses if one has fallen behind.
// Only tell calls it; others send to broadcast.
func (h *Hub) deliver(line Line) {
	crowded := false
	for client := range h.clients {
		if !line.isFor(client) {
			continue
		}
		h.queue(client, line.message)
		// A client that has just been dropped is no reason to pause.
		if len(client.send) > cap(client.send)/2 && h.clients[client] {
			crowded = true
		}
	}
	if crowded {
		time.Sleep(breather)
	}
}

// queue queues message, which encode has returned, for client. If client is
// nil, or has been dropped, it does nothing. It never blocks: a client whose queue is
// full is dead or stuck, and is dropped. Only run may call it, so others have run do it:
//
//	select {
//	case hub.do <- func() { hub.queue(client, message) }:
//	case <-hub.stopped:
//	}
func (h *Hub) queue(client *Client, message []byte) {
	if !h.clients[client] {
		return
	}
	select {
	case client.send <- message:
	default:
		h.drop(client, fellBehind)
	}
}

// drop takes client out of the room and closes its queue, which makes its
// writePump say goodbye. run drops clients of its own accord, so if you keep another
// map of clients, delete from it here, and not where run receives from unregister.
// Only run may call it, so others have run do it.
func (h *Hub) drop(client *Client, why *goodbye) {
	if h.clients[client] {
		delete(h.clients, client)
		client.dropped = true
		client.goodbye.CompareAndSwap(nil, why)
		close(client.send)
		h.exit(client)
	}
}
