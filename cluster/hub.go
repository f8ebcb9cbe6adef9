package main

import (
	"sync"
	"time"
)

// breather is how long run pauses when a queue is more than half full: long
// enough for writePumps to catch up and for senders to feel the pressure,
// short enough that one stuck reader costs the room next to nothing. A reader
// that is always half behind holds the room to a thousand messages a second,
// which is more than anybody reads.
const breather = time.Millisecond

// A Hub passes on to every client in the room what any of them says.
type Hub struct {
	// Owned by run:
	clients map[*Client]bool

	// To run from other goroutines. It receives until stop has been called and
	// every client that registered has left; after that, a send waits for ever.
	// So does run if it sends here itself: it uses deliver, queue and drop.
	broadcast  chan []byte  // what clean returns, of at most maxMessageSize bytes
	register   chan *Client // not after stop: whoever registers selects on stopped, too
	unregister chan *Client // to be dropped
	left       chan *Client // will send no more

	// stop makes run send everybody away and end. Anybody may call it, any number
	// of times. It closes stopped.
	stop    func()
	stopped <-chan struct{}
}

func newHub() *Hub {
	stopped := make(chan struct{})
	return &Hub{
		clients:    make(map[*Client]bool),
		broadcast:  make(chan []byte),
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
			if !client.dropped { // or its queue would be closed
				h.clients[client] = true
				present[client] = true
			}
		case client := <-h.unregister:
			h.drop(client, unregistered)
		case client := <-h.left:
			delete(present, client)
		case message := <-h.broadcast:
			h.deliver(message)
		case <-stopped:
			register, stopped = nil, nil // a nil channel is never ready
			for client := range h.clients {
				h.drop(client, shuttingDown)
			}
		}
	}
}

// deliver queues message for every client, and pauses if one has fallen behind.
func (h *Hub) deliver(message []byte) {
	crowded := false
	for client := range h.clients {
		h.queue(client, message)
		// One that has just been dropped does not count.
		crowded = crowded || len(client.send) > cap(client.send)/2 && h.clients[client]
	}
	if crowded {
		time.Sleep(breather)
	}
}

// queue queues message for one client, unless that has been dropped. It does not
// wait: a client whose queue is full is dead or stuck, and is dropped. Only run
// may call it.
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
// writePump say goodbye. Only run may call it; others send to unregister.
func (h *Hub) drop(client *Client, why *goodbye) {
	if h.clients[client] {
		delete(h.clients, client)
		client.dropped = true
		client.goodbye.CompareAndSwap(nil, why)
		close(client.send)
	}
}
