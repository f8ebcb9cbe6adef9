package main

import "time"

// breather is how long run pauses when a queue is more than half full: long
// enough for writePumps to catch up and for senders to feel the pressure,
// short enough that one stuck reader costs the room next to nothing.
const breather = time.Millisecond

// A Hub passes on to every client in the room what any of them says.
type Hub struct {
	// Owned by run:
	clients map[*Client]bool

	// From clients to run. A client that has registered sends left when it is done
	// with the hub. Until then run receives, so that none of its sends hangs.
	broadcast  chan []byte
	register   chan *Client
	unregister chan *Client
	left       chan *Client

	// Closed by whoever wants run to end. From then on nobody can register.
	stop chan struct{}
}

func newHub() *Hub {
	return &Hub{
		clients:    make(map[*Client]bool),
		broadcast:  make(chan []byte),
		register:   make(chan *Client),
		unregister: make(chan *Client),
		left:       make(chan *Client),
		stop:       make(chan struct{}),
	}
}

// run is the hub's one goroutine. When stop is closed it sends everybody away,
// and it returns when the last of them has left.
func (h *Hub) run() {
	present := 0 // clients that have registered and not left, dropped or not
	register, stop := h.register, h.stop
	for stop != nil || present > 0 {
		select {
		case client := <-register:
			h.clients[client] = true
			present++
		case client := <-h.unregister:
			h.drop(client, unregistered)
		case <-h.left:
			present--
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

// deliver queues message for every client. It waits for none of them: a client
// whose queue is full is dead or stuck, and is dropped.
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
		client.goodbye.CompareAndSwap(nil, why)
		close(client.send)
	}
}
