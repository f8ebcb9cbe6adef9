package main

import (
	"sync"
	"time"

	"github.com/gorilla/websocket"
)

// A Hub broadcasts each message to all of its clients. One goroutine, run, owns the
// set of clients, so there is no mutex. Other goroutines reach it through do, tell and
// the channels below. (hub.go and client.go are meant to be copied: the application, in
// these comments, is the program that you build from them.)
type Hub struct {
	Room

	// Owned by run:
	clients map[*Client]bool

	// From other goroutines to run. After stop, run returns and nothing receives: a sender
	// that may outlive it, such as an HTTP handler, must also select on stopped, or use do.
	// A send from run's own goroutine deadlocks: call publish, queue or drop there.
	broadcast  chan []byte  // a message for every client, already cleaned; do not change it later
	register   chan *Client // a client to add
	unregister chan *Client // a client to drop
	calls      chan func()  // from do
	done       chan *Client // a client whose connection readPump has closed

	// stop starts a graceful shutdown: run drops every client, and returns when all of
	// them are done. stop closes stopped and does not wait. Any goroutine may call it,
	// any number of times.
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
		calls:      make(chan func()),
		done:       make(chan *Client),
		stop:       sync.OnceFunc(func() { close(stopped) }),
		stopped:    stopped,
	}
}

// run is the hub's goroutine. It returns once the hub has been stopped and every
// client is done: at once if all peers answer the close frame. A peer that reads nothing
// delays it by up to writeWait + closeWait, one that reads slowly by more.
func (h *Hub) run() {
	open := make(map[*Client]bool) // registered and not done, dropped or not
	register, stopped := h.register, h.stopped
	for stopped != nil || len(open) > 0 {
		select {
		case client := <-register:
			if !client.dropped { // Else send is closed: the application has registered it again.
				h.clients[client] = true
				open[client] = true
				h.join(client)
			}
		case client := <-h.unregister:
			h.drop(client, errUnregistered)
		case message := <-h.broadcast:
			h.publish(Line{Kind: "message", Text: string(message)})
		case call := <-h.calls:
			call()
		case <-h.ticks:
			h.expire()
		case client := <-h.done:
			h.drop(client, errUnregistered) // in case the application has not unregistered it
			delete(open, client)
		case <-stopped:
			register, stopped = nil, nil // A nil channel is never ready: both cases are disabled.
			for client := range h.clients {
				h.drop(client, errShuttingDown)
			}
		}
	}
}

// do runs f on run's goroutine, and returns true when f has returned. Once the hub
// has been stopped, it returns false without running f. The hub is blocked while f runs.
//
// f may use clients, publish, queue and drop. It must not call do or tell: they
// deadlock on run's goroutine.
func (h *Hub) do(f func()) bool {
	select {
	case <-h.stopped:
		return false // The select below could choose calls although stopped is closed.
	default:
	}
	returned := make(chan struct{})
	select {
	case h.calls <- func() { f(); close(returned) }:
		<-returned
		return true
	case <-h.stopped:
		return false
	}
}

// backpressureDelay is how long the hub waits when a queue is more than half full:
// long enough for the writePumps to catch up, short enough that a slow client still
// leaves the others a thousand messages a second. Meanwhile senders block, and TCP
// backpressure delays their peers.
const backpressureDelay = time.Millisecond

// deliver queues line for the clients that may read it, then waits for backpressureDelay
// if a queue is crowded. Only publish calls it.
func (h *Hub) deliver(line Line) {
	crowded := false
	for client := range h.clients {
		if !line.isFor(client) {
			continue
		}
		h.queue(client, line.message)
		if len(client.send) > cap(client.send)/2 && h.clients[client] { // A client just dropped needs no wait.
			crowded = true
		}
	}
	if crowded {
		time.Sleep(backpressureDelay)
	}
}

// queue queues message for client, or drops client if its queue is full. It never
// blocks, and ignores a client that is nil or dropped. Only run's goroutine may call
// it: others use tell.
func (h *Hub) queue(client *Client, message []byte) {
	if !h.clients[client] {
		return
	}
	select {
	case client.send <- message:
	default:
		h.drop(client, errSlowClient)
	}
}

// drop removes client from the hub and closes its queue: writePump then writes the
// queued messages, and a close frame with the code and text of reason. It ignores a client
// that is nil or dropped. Every removal goes through drop: if your application indexes
// its clients, by user for example, delete from the index here. Only run's goroutine
// may call it: others use do.
func (h *Hub) drop(client *Client, reason *websocket.CloseError) {
	if h.clients[client] {
		delete(h.clients, client)
		client.dropped = true
		client.reason.CompareAndSwap(nil, reason)
		close(client.send)
		h.leave(client)
	}
}
