// SPDX-License-Identifier: 0BSD

package main

import (
	"sync"
	"time"

	"github.com/gorilla/websocket"
)

// A Hub broadcasts messages to its clients. One goroutine, run, owns its state, so there is no
// mutex: others use do, tell and the channels below. (The application is the program that you
// build from copies of hub.go and client.go. Its code goes where it says APPLICATION.)
type Hub struct {
	// Owned by run, as the application's state is: add its fields here.
	clients map[*Client]bool // registered, and not dropped
	open    map[*Client]bool // run waits for these: registered or readPump started, not done
	dropped []*Client        // these were registered; to be cleaned up after

	// From other goroutines to run. Select on ended too, except in handle: nothing receives once
	// run has returned. A send from run's own goroutine deadlocks: call deliver, queue or drop.
	broadcast  chan []byte  // a message for every client, already cleaned; do not change it later
	register   chan *Client // a client to add
	unregister chan *Client // a client to drop
	calls      chan func()  // from do
	opened     chan *Client // a client whose readPump has started
	done       chan *Client // a client whose connection writePump has closed

	// stop starts a graceful shutdown: run drops every client, and returns when all are done.
	// It does not wait. Any goroutine may call it, any number of times.
	stop    func()
	stopped <-chan struct{} // closed by stop
	ended   chan struct{}   // closed by run
}

func newHub() *Hub {
	stopped := make(chan struct{})
	return &Hub{
		clients:    make(map[*Client]bool),
		open:       make(map[*Client]bool),
		broadcast:  make(chan []byte),
		register:   make(chan *Client),
		unregister: make(chan *Client),
		calls:      make(chan func()),
		opened:     make(chan *Client),
		done:       make(chan *Client),
		stop:       sync.OnceFunc(func() { close(stopped) }),
		stopped:    stopped,
		ended:      make(chan struct{}),
	}
}

// run is the hub's goroutine. After stop it returns when every client is done: within
// writeWait + closeWait, or when the last handle returns.
func (h *Hub) run() {
	defer close(h.ended)
	calls, stopped := h.calls, h.stopped // nil once the hub stops
	for stopped != nil || len(h.open) > 0 {
		select {
		case client := <-h.register:
			if client.registered {
				break // It has been registered before, or ended before it was.
			}
			client.registered = true
			h.clients[client] = true
			h.open[client] = true
			// APPLICATION: client has been registered. Welcome it, send it a history (well below
			// sendQueueSize messages), or announce it: with queue, deliver and deliverTo.
			if stopped == nil {
				h.drop(client, errShuttingDown)
			}
		case client := <-h.unregister:
			h.drop(client, errUnregistered)
		case message := <-h.broadcast:
			h.deliver(message)
		case call := <-calls:
			call()
		case client := <-h.opened:
			h.open[client] = true
			if stopped == nil || client.reason.Load() != nil { // end may have come first.
				h.drop(client, errShuttingDown)
			}
		case client := <-h.done:
			h.drop(client, errUnregistered) // in case the application has not unregistered it
			delete(h.open, client)
		case <-stopped:
			calls, stopped = nil, nil // A nil channel is never ready: these cases are disabled.
			for client := range h.open {
				h.drop(client, errShuttingDown)
			}
		}
		for ; len(h.dropped) > 0; h.dropped[0], h.dropped = nil, h.dropped[1:] {
			// APPLICATION: h.dropped[0], which was registered, has been dropped for its reason.
			// Clean up after it, and announce it. Clients that this drops come next.
		}
	}
}

// do runs f on run's goroutine, and returns true after that. Once the hub stops, it returns
// false without running f. f blocks the hub, and may use clients, deliver, deliverTo, queue
// and drop. It deadlocks if it calls do, tell or end, or waits for a goroutine that does.
func (h *Hub) do(f func()) bool {
	returned := make(chan struct{})
	select {
	case h.calls <- func() { f(); close(returned) }:
		<-returned
		return true
	case <-h.stopped:
		return false
	}
}

// passToRun sends client on one of the channels to run. It returns false if run has returned.
// (Inlined, its select would be on the stack of each readPump, which must stay small.)
//
//go:noinline
func (h *Hub) passToRun(channel chan *Client, client *Client) bool {
	select {
	case channel <- client:
		return true
	case <-h.ended:
		return false
	}
}

// Only run's goroutine may call the methods below: others use do, tell or broadcast.

// backpressureDelay is how long the hub waits when a queue is more than half full: a slow
// client still leaves the others a thousand messages a second. Senders block meanwhile, and
// TCP backpressure delays their peers.
const backpressureDelay = time.Millisecond

// deliver queues message for every client.
func (h *Hub) deliver(message []byte) {
	h.deliverTo(message, func(*Client) bool { return true })
}

// deliverTo queues message for each client that to accepts, then waits if one is crowded.
func (h *Hub) deliverTo(message []byte, to func(*Client) bool) {
	var delay time.Duration
	for client := range h.clients {
		if to(client) && h.queue(client, message) && len(client.send) > cap(client.send)/2 {
			delay = backpressureDelay
		}
	}
	time.Sleep(delay)
}

// queue queues message for client, or drops client if its queue is full. It never blocks, and
// ignores a client that is nil or dropped. True means queued, not delivered.
func (h *Hub) queue(client *Client, message []byte) bool {
	if h.clients[client] {
		select {
		case client.send <- message:
			return true
		default:
			h.drop(client, errSlowClient)
		}
	}
	return false
}

// drop removes client from the hub and closes its queue: writePump then writes what is queued,
// and a close frame for reason. It ignores a client that is nil, dropped or another hub's.
func (h *Hub) drop(client *Client, reason *websocket.CloseError) {
	if h.clients[client] {
		delete(h.clients, client)
		h.dropped = append(h.dropped, client)
	} else if !h.open[client] || client.registered {
		return
	}
	client.registered = true // One that ends before it is registered stays out.
	client.reason.CompareAndSwap(nil, sendable(reason))
	close(client.send)
}
