package main

import "time"

// breather is how long run pauses when a queue is more than half full: long
// enough for writePumps to catch up and for senders to feel the pressure,
// short enough that one stuck reader costs the room next to nothing.
const breather = time.Millisecond

// A Hub passes on to every client in the room what any of them says.
//
// Its methods and fields are for run's goroutine, its channels for anybody.
// Whoever registers a client owes one last unregister for it, also after the
// hub has closed its send: run ends when all are accounted for, and until then
// a client can talk to the hub without asking whether it is still there.
type Hub struct {
	// Owned by run:
	clients map[*Client]bool // in the room
	leaving map[*Client]bool // send closed by the hub, yet to unregister

	// From clients to run:
	broadcast  chan []byte
	register   chan *Client
	unregister chan *Client

	// Closed to end the hub, by whoever started it; from then on nobody registers.
	stop chan struct{}
}

func newHub() *Hub {
	return &Hub{
		clients:    make(map[*Client]bool),
		leaving:    make(map[*Client]bool),
		broadcast:  make(chan []byte),
		register:   make(chan *Client),
		unregister: make(chan *Client),
		stop:       make(chan struct{}),
	}
}

// run is the hub's one goroutine. After stop is closed it sends everybody
// away, and it returns when the last of them has unregistered.
func (h *Hub) run() {
	register, stop := h.register, h.stop
	for stop != nil || len(h.leaving) > 0 {
		select {
		case client := <-register:
			h.clients[client] = true
		case client := <-h.unregister:
			h.drop(client, nil)
			delete(h.leaving, client)
		case message := <-h.broadcast:
			h.deliver(message)
		case <-stop:
			register, stop = nil, nil // a nil channel is never ready
			for client := range h.clients {
				h.drop(client, shuttingDown)
			}
		}
	}
}

// deliver queues message for every client. It never blocks: who has let its
// queue fill up is dead or stuck, and is dropped.
func (h *Hub) deliver(message []byte) {
	crowded := false
	for client := range h.clients {
		select {
		case client.send <- message:
			crowded = crowded || len(client.send) > cap(client.send)/2
		default:
			h.drop(client, fellBehind)
		}
	}
	if crowded {
		time.Sleep(breather)
	}
}

// drop takes client out of the room and closes its queue, which makes its
// writePump say goodbye.
func (h *Hub) drop(client *Client, why *goodbye) {
	if h.clients[client] {
		delete(h.clients, client)
		h.leaving[client] = true
		client.goodbye.CompareAndSwap(nil, why)
		close(client.send)
	}
}
