package main

import (
	"bufio"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"
)

// asProcess is the environment variable with which this binary is not a test, but
// the chat server: "sound", or one with what its value names.
const asProcess = "CHAT_TEST_PROCESS"

func TestMain(m *testing.M) {
	switch os.Getenv(asProcess) {
	case "":
		log.SetFlags(0)
		log.SetOutput(io.Discard)
		os.Exit(m.Run())
	case "blocked log": // after the first line
		log.SetOutput(&blockedAfterOne{})
	case "slow client": // whose writePump gets no buffer for the close frame
		upgrader.WriteBufferPool = blockedPool{}
	}
	go func() {
		io.Copy(io.Discard, os.Stdin)
		os.Exit(3) // The test has died.
	}()
	main()
	os.Exit(0)
}

type blockedAfterOne struct{ full bool }

func (s *blockedAfterOne) Write(line []byte) (int, error) {
	if s.full {
		select {}
	}
	s.full = true
	return os.Stderr.Write(line)
}

type blockedPool struct{}

func (blockedPool) Get() any { select {} }
func (blockedPool) Put(any)  {}

// A logBook is what the program has logged.
type logBook struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *logBook) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logBook) lines() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.FieldsFunc(l.text.String(), func(r rune) bool { return r == '\n' })
}

// captureLog collects what is logged until the test ends.
func captureLog(t testing.TB) *logBook {
	t.Helper()
	book := new(logBook)
	log.SetOutput(book)
	t.Cleanup(func() { log.SetOutput(io.Discard) })
	return book
}

// startHub runs a hub until the test ends, and joins bare clients with queues
// of the given sizes to it. Call it in a synctest bubble.
func startHub(t *testing.T, sizes ...int) (*Hub, []*Client) {
	t.Helper()
	hub := newHub()
	go hub.run()
	var clients []*Client
	for _, size := range sizes {
		clients = append(clients, join(hub, size))
	}
	t.Cleanup(func() {
		hub.stop()
		for _, client := range clients {
			hub.done <- client
		}
		synctest.Wait() // a hub that does not end here is a deadlock to synctest
	})
	return hub, clients
}

// join registers a bare client with a queue of the given size.
func join(hub *Hub, size int) *Client {
	client := &Client{hub: hub, send: make(chan []byte, size)}
	hub.register <- client
	return client
}

// queued takes what is in the client's queue, and reports whether it is closed.
func queued(client *Client) (messages []string, closed bool) {
	for {
		select {
		case message, ok := <-client.send:
			if !ok {
				return messages, true
			}
			messages = append(messages, string(message))
		default:
			return messages, false
		}
	}
}

func wantQueue(t *testing.T, client *Client, wantClosed bool, want ...string) {
	t.Helper()
	got, closed := queued(client)
	if fmt.Sprintf("%q", got) != fmt.Sprintf("%q", want) || closed != wantClosed {
		t.Errorf("got %q, closed %v; want %q, closed %v", got, closed, want, wantClosed)
	}
}

// A broadcast goes to every client. The hub never blocks on one: a client whose
// queue is full is dropped.

func TestEveryClientGetsEachBroadcastAsItsOwnItem(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		hub, clients := startHub(t, 4, 4)
		hub.broadcast <- []byte("one")
		hub.broadcast <- []byte("two")
		synctest.Wait()
		for _, client := range clients {
			wantQueue(t, client, false, "one", "two")
		}
	})
}

func TestFullQueueDropsItsClientAlone(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		hub, clients := startHub(t, 2, 3)
		for _, message := range []string{"1", "2", "3"} {
			hub.broadcast <- []byte(message)
		}
		synctest.Wait()
		wantQueue(t, clients[0], true, "1", "2")
		wantQueue(t, clients[1], false, "1", "2", "3")
		if hub.clients[clients[0]] || len(hub.clients) != 1 {
			t.Errorf("the hub has %d clients, want the healthy one alone", len(hub.clients))
		}
		if got := clients[0].reason.Load(); got != errSlowClient {
			t.Errorf("reason is %v, want %v", got, errSlowClient)
		}
	})
}

func TestUnregisterTwiceIsHarmless(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		hub, clients := startHub(t, 1, 1)
		hub.unregister <- clients[0]
		hub.unregister <- clients[0]
		hub.broadcast <- []byte("still here")
		synctest.Wait()
		wantQueue(t, clients[0], true)
		wantQueue(t, clients[1], false, "still here")
	})
}

func TestUnregisterOfAnUnknownClientIsHarmless(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		hub, clients := startHub(t, 1)
		hub.unregister <- &Client{hub: hub, send: make(chan []byte, 1)}
		hub.broadcast <- []byte("still here")
		synctest.Wait()
		wantQueue(t, clients[0], false, "still here")
	})
}

func TestClientThatEndsBeforeItIsRegisteredIsDropped(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		hub, _ := startHub(t)
		client := &Client{hub: hub, send: make(chan []byte, 1)}
		client.reason.Store(errBinary) // readPump may be that quick
		hub.register <- client
		hub.unregister <- client
		synctest.Wait()
		wantQueue(t, client, true)
		hub.done <- client
	})
}

func TestReasonIsSetBeforeTheQueueIsClosed(t *testing.T) {
	hub := newHub()
	client := &Client{} // without a queue: to close nil is a panic, so here drop gets no further
	hub.clients[client] = true
	func() {
		defer func() {
			if recover() == nil {
				t.Error("drop did not close the queue")
			}
		}()
		hub.drop(client, errSlowClient)
	}()
	if got := client.reason.Load(); got != errSlowClient || !client.registered || hub.clients[client] {
		t.Errorf("when the queue is closed the reason is %v, registered %v, and in the room %v; want %v, true and false",
			got, client.registered, hub.clients[client], errSlowClient)
	}
}

// Promise 3. A healthy client is never dropped because another one sends fast: when
// any queue is more than half full after a broadcast, the hub applies backpressure.

func TestHubAppliesBackpressureOnlyWhenAQueueIsPastHalf(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		hub, _ := startHub(t, 8, 8, 100)
		start := time.Now()
		for n := range 8 {
			hub.broadcast <- []byte("message")
			hub.do(func() {}) // returns when the hub has finished with the message
			// The first four fill half of the smaller queues; each of the others
			// leaves them more than half full, for which one pause is enough.
			want := backpressureDelay * time.Duration(max(0, n-3))
			if got := time.Since(start); got != want {
				t.Errorf("after %d messages the hub has paused for %v, want %v", n+1, got, want)
			}
		}
	})
}

// Promise 4. A slow client costs the others only that bounded wait until its queue is
// full, and nothing after.

func TestSlowClientCostsTheOthersNothingOnceItIsDropped(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		hub, _ := startHub(t, sendQueueSize)
		start := time.Now()
		for range sendQueueSize + 1 {
			hub.broadcast <- []byte("message")
		}
		hub.do(func() {})
		if got, most := time.Since(start), sendQueueSize/2*backpressureDelay; got > most {
			t.Errorf("the slow client cost the room %v, want at most %v", got, most)
		}
		dropped := time.Now()
		for range 1000 {
			hub.broadcast <- []byte("message")
		}
		hub.do(func() {})
		if got := time.Since(dropped); got != 0 {
			t.Errorf("the dropped client cost the room %v, want nothing", got)
		}
	})
}

// Promises 6 and 7. Every client gets what is queued and 1001, and run returns.

func TestStoppedHubDropsAllClientsAndWaitsForThem(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		hub := newHub()
		ended := false
		go func() { hub.run(); ended = true }()
		inside, dropped := join(hub, 2), join(hub, 0)
		hub.broadcast <- []byte("last words")
		hub.stop()
		synctest.Wait()
		wantQueue(t, inside, true, "last words")
		if got := inside.reason.Load(); got != errShuttingDown {
			t.Errorf("reason is %v, want %v", got, errShuttingDown)
		}
		if got := dropped.reason.Load(); got != errSlowClient {
			t.Errorf("reason is %v, want the first one, %v", got, errSlowClient)
		}

		// Until they are done, clients can send to the hub.
		hub.done <- inside
		hub.broadcast <- []byte("too late")
		hub.unregister <- dropped
		synctest.Wait()
		if ended {
			t.Error("run returned before its last client was done")
		}
		hub.done <- dropped
		synctest.Wait()
		if !ended {
			t.Error("run has not returned although its last client is done")
		}
	})
}

// Promise 8. A naive move of an application costs at most its own client.

func TestRegisteringAgainIsHarmless(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		hub, clients := startHub(t, 2, 2)
		hub.register <- clients[0]
		hub.broadcast <- []byte("to both")
		hub.unregister <- clients[0]
		hub.register <- clients[0] // Its queue is closed: it stays out.
		hub.broadcast <- []byte("to the other")
		synctest.Wait()
		wantQueue(t, clients[0], true, "to both")
		wantQueue(t, clients[1], false, "to both", "to the other")

		hub.done <- clients[0]
		hub.register <- clients[0] // as above, also when it is done
		hub.broadcast <- []byte("still here")
		synctest.Wait()
		wantQueue(t, clients[1], false, "still here")
	})
}

func TestDoneTwiceDoesNotEndTheHubEarly(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		hub, clients := startHub(t, 2, 2)
		hub.done <- clients[0]
		hub.done <- clients[0]
		hub.done <- &Client{hub: hub}
		hub.stop()
		synctest.Wait()                           // run would choose between the two.
		hub.broadcast <- []byte("one is present") // or this would wait for ever
		synctest.Wait()
		wantQueue(t, clients[0], true)
		wantQueue(t, clients[1], true)
	})
}

func TestDoneWithoutUnregisterIsEnough(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		hub, clients := startHub(t, 2, 2)
		hub.done <- clients[0]
		hub.broadcast <- []byte("still here")
		here := 0
		hub.do(func() { here = len(hub.clients) })
		wantQueue(t, clients[0], true)
		wantQueue(t, clients[1], false, "still here")
		if here != 1 {
			t.Errorf("the hub has %d clients, want the other one alone", here)
		}
	})
}

func TestAnyGoroutineMayStopTheHubAnyNumberOfTimes(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		hub, _ := startHub(t, 1)
		for range 3 {
			go hub.stop()
		}
		<-hub.stopped
		hub.stop()
	})
}

func TestMessageForOneClientReachesItAlone(t *testing.T) {
	watch(t, patience)
	hub := newHub()
	small, large, stranger := &Client{send: make(chan []byte, 1)}, &Client{send: make(chan []byte, 9)}, &Client{}
	hub.clients[small], hub.clients[large] = true, true
	hub.queue(small, []byte("fits"))
	hub.queue(small, []byte("does not fit"))
	hub.queue(small, []byte("too late"))
	hub.queue(stranger, []byte("goes nowhere"))
	wantQueue(t, small, true, "fits")
	wantQueue(t, large, false)
	if got := small.reason.Load(); got != errSlowClient {
		t.Errorf("reason is %v, want %v", got, errSlowClient)
	}
	if len(hub.clients) != 1 {
		t.Errorf("the hub has %d clients, want the other one alone", len(hub.clients))
	}
}

// copied returns a hub whose run is like the one in copies of upstream's example: it
// closes queues itself, without a reason. It calls joined for each client that registers
// and received for each message, to do what the application does.
func copied(t *testing.T, joined func(*Client), received func(*Hub, []byte)) *Hub {
	h := newHub()
	t.Cleanup(h.stop)
	go func() {
		stopped := h.stopped
		for present := 0; stopped != nil || present > 0; {
			select {
			case client := <-h.register:
				present++
				joined(client)
				h.clients[client] = true
			case client := <-h.unregister:
				if h.clients[client] {
					delete(h.clients, client)
					close(client.send)
				}
			case <-h.opened:
			case <-h.done:
				present--
			case message := <-h.broadcast:
				received(h, message)
			case <-stopped:
				stopped = nil
			}
		}
	}()
	return h
}

func TestQueueClosedByTheApplicationIsANormalClosure(t *testing.T) {
	inRoom(t, func(t *testing.T, r *room) {
		var first *Client
		hub := copied(t, func(client *Client) {
			if first == nil {
				first = client
			}
		}, func(h *Hub, message []byte) {
			if string(message) == "go" {
				delete(h.clients, first)
				close(first.send)
				return
			}
			for client := range h.clients {
				client.send <- message
			}
		})
		r.serve = func(w http.ResponseWriter, req *http.Request) { serveWs(hub, w, req) }
		sentAway, other := r.join(t), r.join(t)
		other.send("hello")
		sentAway.wantLines("hello")
		other.wantLines("hello")
		other.send("go")
		sentAway.wantClose(&websocket.CloseError{Code: 1000, Text: "closed by the server"})
		other.send("still here")
		other.wantLines("still here")
	})
}

func TestBlockingSendInRunEndsWithTheSlowClientsConnection(t *testing.T) {
	inRoom(t, func(t *testing.T, r *room) {
		hub := copied(t, func(*Client) {}, func(h *Hub, message []byte) {
			for client := range h.clients {
				client.send <- message // waits for room in the queue
			}
		})
		r.serve = func(w http.ResponseWriter, req *http.Request) { serveWs(hub, w, req) }
		r.join(t).unbuffered() // It reads nothing.
		other := r.join(t)
		start := time.Now()
		var want []string
		for n := range 2 * sendQueueSize {
			want = append(want, fmt.Sprint("line ", n))
		}
		go func() {
			for _, line := range want {
				hub.broadcast <- []byte(line)
			}
		}()
		other.SetReadDeadline(time.Now().Add(pongWait))
		other.wantLines(want...)
		if got := time.Since(start); got > writeWait {
			t.Errorf("the room stood still for %v, want at most %v", got, writeWait)
		}
	})
}

func TestRepliesToASlowClientCostItAlone(t *testing.T) {
	inRoom(t, func(t *testing.T, r *room) {
		front := *r.hub // Its client's messages come here, and go back to that client.
		front.register, front.broadcast = make(chan *Client), make(chan []byte)
		served := r.serve
		r.serve = func(w http.ResponseWriter, req *http.Request) { serveWs(&front, w, req) }
		over := make(chan struct{})
		defer close(over)
		go func() {
			client := <-front.register
			r.hub.register <- client
			for {
				select {
				case message := <-front.broadcast:
					r.hub.do(func() { r.hub.queue(client, message) })
				case <-over:
					return
				}
			}
		}()
		p := r.join(t).unbuffered()
		r.serve = served
		other := r.join(t)
		start := time.Now()
		var err error
		for err == nil && time.Since(start) < pongWait { // It reads nothing.
			time.Sleep(rateInterval)
			_, err = p.NetConn().Write(encode(0x81, "answer me"))
		}
		if got, most := time.Since(start), writeWait+closeWait+time.Second; got > most {
			t.Errorf("its connection ended after %v, want at most %v", got, most)
		}
		r.broadcast("still here")
		other.wantLines("still here")
	})
}

func TestHistoryMayExceedTheQueue(t *testing.T) {
	inRoom(t, func(t *testing.T, r *room) {
		history := make([]string, sendQueueSize+44)
		hub := copied(t, func(client *Client) {
			for n := range history {
				history[n] = fmt.Sprint("line ", n)
				client.send <- []byte(history[n])
			}
		}, nil)
		r.serve = func(w http.ResponseWriter, req *http.Request) { serveWs(hub, w, req) }
		r.join(t).wantLines(history...)
	})
}

func TestRunMayWriteToConnWhenItRegistersAClient(t *testing.T) {
	inRoom(t, func(t *testing.T, r *room) {
		hub := copied(t, func(client *Client) {
			welcome := "welcome, " + client.conn.RemoteAddr().String()
			client.conn.WriteMessage(websocket.TextMessage, []byte(welcome)) // upstream's run can, too
		}, nil)
		r.serve = func(w http.ResponseWriter, req *http.Request) { serveWs(hub, w, req) }
		r.join(t).wantLines("welcome, pipe")
	})
}

func TestPeerMayBeAskedForAPasswordBeforeItRegisters(t *testing.T) {
	inRoom(t, func(t *testing.T, r *room) {
		r.serve = func(w http.ResponseWriter, req *http.Request) {
			conn, err := upgrader.Upgrade(&delayedHandshake{ResponseWriter: w}, req, nil)
			if err != nil {
				t.Error(err)
				return
			}
			if _, password, err := conn.ReadMessage(); err != nil || string(password) != "sesame" {
				t.Errorf("the password is %q, %v", password, err)
			}
			client := &Client{hub: r.hub, conn: conn, send: make(chan []byte, sendQueueSize)}
			r.hub.register <- client
			go client.writePump()
			go client.readPump()
		}
		p := r.join(t)
		p.send("sesame")
		p.send("hello")
		p.wantLines("hello")
	})
}

func TestUpstreamsServeWsWorksWithThesePumps(t *testing.T) {
	inRoom(t, func(t *testing.T, r *room) {
		r.serve = func(w http.ResponseWriter, req *http.Request) {
			conn, err := upgrader.Upgrade(w, req, nil)
			if err != nil {
				t.Error(err)
				return
			}
			client := &Client{hub: r.hub, conn: conn, send: make(chan []byte, 256)}
			client.hub.register <- client
			go client.writePump()
			go client.readPump()
		}
		violator, other := r.join(t), r.join(t)
		violator.write(encode(0x8f, "")) // so that readPump has to close conn by halves
		violator.wantClose(&websocket.CloseError{Code: 1002, Text: "bad opcode 15"})
		violator.Close()
		synctest.Wait()
		other.send("hello")
		other.wantLines("hello")
	})
}

func TestDeliverToReachesTheClientsItSelects(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		hub, clients := startHub(t, 2, 2)
		hub.do(func() { hub.deliverTo([]byte("for one"), func(c *Client) bool { return c == clients[1] }) })
		wantQueue(t, clients[0], false)
		wantQueue(t, clients[1], false, "for one")
	})
}

func TestQueueReportsWhetherItQueued(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		hub, clients := startHub(t, 1)
		for _, want := range []bool{true, false, false} { // queued, full, dropped
			var got bool
			hub.do(func() { got = hub.queue(clients[0], []byte("message")) })
			if got != want {
				t.Errorf("got %v, want %v", got, want)
			}
		}
		hub.do(func() {
			if hub.queue(nil, []byte("message")) {
				t.Error("queued for no client")
			}
		})
	})
}

func TestFullQueueOfAClientThatIsNotDroppedCostsNoWait(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		hub, clients := startHub(t, 8, 8)
		hub.do(func() {
			for range 8 { // An application that skips messages for a slow client keeps such queues.
				clients[0].send <- []byte("x")
			}
		})
		start := time.Now()
		hub.do(func() { hub.deliverTo([]byte("y"), func(c *Client) bool { return len(c.send) < cap(c.send) }) })
		if got := time.Since(start); got != 0 {
			t.Errorf("it cost %v, want no time", got)
		}
		wantQueue(t, clients[1], false, "y")
	})
}

func TestDropOfAnotherHubsClientIsHarmless(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		hub, _ := startHub(t)
		_, clients := startHub(t, 1)
		hub.do(func() { hub.drop(clients[0], errBinary); hub.drop(nil, errBinary) })
		wantQueue(t, clients[0], false)
	})
}

func TestDropWithoutAReasonSendsOne(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		hub, clients := startHub(t, 1)
		hub.do(func() { hub.drop(clients[0], nil) })
		wantQueue(t, clients[0], true)
		if got := clients[0].reason.Load(); got == nil || got.Code != 1011 {
			t.Errorf("the reason is %v, want one with code 1011", got)
		}
	})
}

func TestRunListsADroppedClientOnceIfItWasRegistered(t *testing.T) {
	hub := newHub() // which does not run, so that the list stays
	registered, opened := &Client{send: make(chan []byte)}, &Client{send: make(chan []byte)}
	hub.clients[registered], hub.open[registered], hub.open[opened] = true, true, true
	for range 2 {
		hub.drop(registered, errBinary)
		hub.drop(opened, errBinary)
		hub.drop(&Client{}, errBinary)
	}
	if !slices.Equal(hub.dropped, list(registered)) {
		t.Errorf("the list has %d clients, want the registered one", len(hub.dropped))
	}
	if registered.reason.Load() != errBinary {
		t.Errorf("the reason is %v, want %v", registered.reason.Load(), errBinary)
	}
}

func TestClientDroppedByTheApplicationItselfCostsItAlone(t *testing.T) {
	inRoom(t, func(t *testing.T, r *room) {
		kicked := r.join(t)
		client := r.clients()[0]
		other := r.join(t)
		r.hub.do(func() { delete(r.hub.clients, client); close(client.send) })
		kicked.wantClose(errUnregistered)
		synctest.Wait()
		kicked.wantEnd()
		other.send("still here")
		other.wantLines("still here")
	})
}

func TestClientsDoRunsOnlyWhileTheClientIsRegistered(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		hub, clients := startHub(t, 1)
		stranger := &Client{hub: hub}
		ran := 0
		count := func() { ran++ }
		for _, test := range []struct {
			name string
			got  func() bool
			want bool
		}{
			{"registered", func() bool { return clients[0].do(count) }, true},
			{"not registered", func() bool { return stranger.do(count) }, false},
			{"dropped", func() bool {
				hub.do(func() { hub.drop(clients[0], errBinary) })
				return clients[0].do(count)
			}, false},
			{"stopped", func() bool { hub.stop(); return clients[0].do(count) }, false},
		} {
			if got := test.got(); got != test.want {
				t.Errorf("%s: got %v, want %v", test.name, got, test.want)
			}
		}
		if ran != 1 {
			t.Errorf("the function ran %d times, want once", ran)
		}
	})
}

// Promise 9. From any goroutine, at any time, an application can broadcast, send to one
// client, ask which clients are connected, and drop one: through do and tell.

func TestDoAndTellReachTheHubFromAnyGoroutine(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		hub, clients := startHub(t, 2, 2)
		connected := 0
		for _, test := range []struct {
			name string
			got  bool
			want bool
		}{
			{"broadcast", hub.do(func() { hub.deliver([]byte("for both")) }), true},
			{"send to one client", clients[0].tell([]byte("for one")), true},
			{"count the clients", hub.do(func() { connected = len(hub.clients) }), true},
			{"drop one", hub.do(func() { hub.drop(clients[1], errTooBig) }), true},
			{"send to a dropped client", clients[1].tell([]byte("too late")), false},
			{"fill a queue", clients[0].tell([]byte("one too many")), false},
		} {
			if test.got != test.want {
				t.Errorf("%s: got %v, want %v", test.name, test.got, test.want)
			}
		}
		wantQueue(t, clients[0], true, "for both", "for one")
		wantQueue(t, clients[1], true, "for both")
		if got := clients[1].reason.Load(); got != errTooBig || connected != 2 {
			t.Errorf("got reason %v and %d clients, want %v and 2", got, connected, errTooBig)
		}
	})
}

func TestDoReturnsWhenTheFunctionHasReturned(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		hub, _ := startHub(t)
		start := time.Now()
		hub.do(func() { time.Sleep(time.Second) })
		if got := time.Since(start); got != time.Second {
			t.Errorf("do returned after %v, want %v", got, time.Second)
		}
	})
}

func TestDoAndTellReturnFalseOnceTheHubIsStopped(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		hub := newHub()
		ended := make(chan bool)
		go func() { hub.run(); close(ended) }()
		slow := join(hub, 1)
		wantFalse := func() {
			t.Helper()
			for range 20 { // A select with two ready cases takes either.
				if hub.do(func() { t.Error("do called the function of a stopped hub") }) {
					t.Error("do returned true")
				}
				if slow.tell([]byte("too late")) {
					t.Error("tell returned true")
				}
			}
		}

		// A call that run has taken finishes.
		if !hub.do(hub.stop) {
			t.Error("do returned false, although it called the function")
		}
		wantFalse() // while the slow client keeps run from returning
		synctest.Wait()
		wantFalse()
		hub.done <- slow
		wait(t, ended, "hub.run")
		wantFalse()
		wantQueue(t, slow, true)
	})
}

func TestStopReleasesCallersOfDoThatRunHasNotTaken(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		hub, _ := startHub(t)
		busy, waiting := make(chan bool, 1), make(chan bool, 1)
		go func() { busy <- hub.do(func() { time.Sleep(time.Second) }) }()
		synctest.Wait()
		go func() { waiting <- hub.do(func() {}) }()
		synctest.Wait()
		start := time.Now()
		hub.stop()
		if got := wait(t, waiting, "do"); got || time.Since(start) != 0 {
			t.Errorf("the waiting call returned %v after %v, want false at once", got, time.Since(start))
		}
		if got := wait(t, busy, "do"); !got {
			t.Error("the call that run had taken returned false, want true")
		}
	})
}

func TestDoAndTellFromFiftyGoroutinesAgainstDropAndStop(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		const goroutines, each = 50, 100
		hub, clients := startHub(t, goroutines*each, goroutines*each)
		var told [2][goroutines][]string // the messages for which tell returned true
		var running sync.WaitGroup
		for i := range goroutines {
			running.Go(func() {
				for n := range each {
					for c, client := range clients {
						message := fmt.Sprintf("%d %d", i, n)
						if client.tell([]byte(message)) {
							told[c][i] = append(told[c][i], message)
						}
					}
					switch {
					case i == 0 && n == each/2:
						hub.do(func() { hub.drop(clients[0], errTooBig) })
					case i == 1 && n == each*3/4:
						hub.stop()
					}
				}
			})
		}
		running.Wait()
		synctest.Wait()
		for c, client := range clients {
			var got [goroutines][]string
			messages, _ := queued(client)
			for _, message := range messages {
				var i, n int
				fmt.Sscan(message, &i, &n)
				got[i] = append(got[i], message)
			}
			for i := range got {
				if !slices.Equal(got[i], told[c][i]) {
					t.Errorf("client %d received %s of goroutine %d, want %s", c, brief(got[i]), i, brief(told[c][i]))
				}
			}
		}
	})
}

func TestGoroutineThatOutlivesTheHubEnds(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		hub, clients := startHub(t, sendQueueSize)
		ended := make(chan bool)
		go func() {
			for range time.Tick(time.Second) {
				if !clients[0].tell([]byte("tick")) {
					close(ended)
					return
				}
			}
		}()
		time.Sleep(3*time.Second + 1)
		wantQueue(t, clients[0], false, "tick", "tick", "tick")
		hub.stop()
		wait(t, ended, "the ticker")
	})
}

func TestNewConnectionOfAUserReplacesTheOldOnlyAfterAValidHandshake(t *testing.T) {
	inRoom(t, func(t *testing.T, r *room) {
		front := *r.hub // It keeps one connection of a user, the newest.
		front.register = make(chan *Client)
		over := make(chan struct{})
		defer close(over)
		go func() {
			var newest *Client
			for {
				select {
				case client := <-front.register:
					r.hub.register <- client
					r.hub.do(func() { r.hub.drop(newest, &websocket.CloseError{Code: 4000, Text: "here elsewhere"}) })
					newest = client
				case <-over:
					return
				}
			}
		}()
		r.serve = func(w http.ResponseWriter, req *http.Request) { serveWs(&front, w, req) }
		first := r.join(t)
		for _, request := range []string{"GET /ws HTTP/1.1\r\nHost: pipe\r\n", handshake + "Origin: http://example.com\r\n"} {
			conn := r.connect(t)
			fmt.Fprintf(conn, "%s\r\n", request)
			synctest.Wait()
			conn.Close()
		}
		first.send("still here")
		first.wantLines("still here")
		second := r.join(t)
		first.wantClose(&websocket.CloseError{Code: 4000, Text: "here elsewhere"})
		second.send("me, too")
		second.wantLines("me, too")
	})
}

// The process: main. In these tests time is real, and nothing waits for it.

func TestProcessServesWhereItSays(t *testing.T) {
	url := startProcess(t, "sound", "-addr", ":0").url(t)
	if !regexp.MustCompile(`^http://localhost:\d+/$`).MatchString(url) {
		t.Errorf("the server logs that it listens on %s", url)
	}
	response, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	if body, _ := io.ReadAll(response.Body); string(body) != home {
		t.Errorf("got %s, want the page", brief(body))
	}
	p := joinProcess(t, url)
	p.send("hello")
	p.wantLines("hello")
}

func TestSignalShutsDownGracefullyWithStatus0(t *testing.T) {
	for _, sig := range signals(t) {
		process := startProcess(t, "sound", "-addr", "127.0.0.1:0")
		p := joinProcess(t, process.url(t))
		process.Process.Signal(sig)
		p.wantClose(errShuttingDown)
		process.wantEnd(t, "exit status 0", "shutting down")
	}
}

func TestSecondSignalForcesAnExitOneSecondAfterTheFirst(t *testing.T) {
	signals := signals(t)
	for i, first := range signals {
		second := signals[(i+1)%len(signals)]
		t.Run(fmt.Sprint(first, ", ", second), func(t *testing.T) {
			t.Parallel()
			process := startProcess(t, "slow client", "-addr", "127.0.0.1:0")
			joinProcess(t, process.url(t))
			start := time.Now()
			process.Process.Signal(first)
			process.next(t, "shutting down")
			ticker, ended := time.NewTicker(10*time.Millisecond), make(chan bool)
			go func() {
				defer close(ended)
				for err := error(nil); err == nil; <-ticker.C { // until it has ended
					err = process.Process.Signal(second)
				}
			}()
			process.wantEnd(t, "exit status 1")
			if got := time.Since(start); got < forceAfter || got > shutdownWait {
				t.Errorf("it exited after %v, want %v", got, forceAfter)
			}
			<-ended
		})
	}
}

func TestTwoSignalsAtOnceAreOne(t *testing.T) {
	for _, signal := range signals(t) {
		process := startProcess(t, "sound", "-addr", "127.0.0.1:0")
		p := joinProcess(t, process.url(t))
		process.Process.Signal(signal)
		process.Process.Signal(signal)
		process.next(t, "shutting down")
		p.wantClose(errShuttingDown) // The process has waited for this.
		process.wantEnd(t, "exit status 0")
	}
}

func TestHangupIsIgnoredIfItWasAtTheStart(t *testing.T) {
	signals(t)
	process := startProcess(t, "nohup", "-addr", "127.0.0.1:0")
	url := process.url(t)
	process.Process.Signal(syscall.SIGHUP)
	p := joinProcess(t, url)
	p.send("still here")
	p.wantLines("still here")
}

func TestSignalEndsTheProcessAlthoughItsLogBlocks(t *testing.T) {
	for _, sig := range signals(t) {
		process := startProcess(t, "blocked log", "-addr", "127.0.0.1:0")
		p := joinProcess(t, process.url(t))
		reset := joinProcess(t, "http://"+p.RemoteAddr().String()+"/")
		reset.NetConn().Close() // This is logged, but the log blocks.
		process.Process.Signal(sig)
		p.wantClose(errShuttingDown)
		process.wantEnd(t, "exit status 0")
	}
}

func TestProcessOutlivesTheReaderOfItsLog(t *testing.T) {
	process := startProcess(t, "sound", "-addr", "127.0.0.1:0")
	url := process.url(t)
	process.stderr.Close()
	for range 2 { // Each request is logged.
		response, err := http.Get(url)
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
	}
}

// signals returns what asks a process to end.
func signals(t *testing.T) []os.Signal {
	if runtime.GOOS == "windows" {
		t.Skip("on Windows no process can send another one an interrupt or SIGTERM")
	}
	return []os.Signal{os.Interrupt, syscall.SIGTERM, syscall.SIGHUP}
}

func TestProcessThatCannotListenExitsWithOneLine(t *testing.T) {
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	for args, want := range map[string]struct{ status, log string }{
		"-addr " + busy.Addr().String(): {"exit status 1", "listen tcp " + busy.Addr().String() + ": "},
		"-addr nonsense":                {"exit status 1", "listen tcp: address nonsense: missing port in address"},
		"-addr :99999":                  {"exit status 1", "listen tcp: address 99999: invalid port"},
		":9000":                         {"exit status 2", "-addr host:port"},
		"-addr 127.0.0.1:0 more":        {"exit status 2", "-addr host:port"},
		"-port 9000":                    {"exit status 2", "-addr host:port"},
	} {
		t.Run(args, func(t *testing.T) {
			lines := startProcess(t, "sound", strings.Fields(args)...).wantEnd(t, want.status)
			if text := strings.Join(lines, "\n"); !strings.Contains(text, want.log) || strings.Contains(text, "listening") {
				t.Errorf("it logs %s, want %q in it", brief(lines), want.log)
			}
			if want.status == "exit status 1" && len(lines) != 1 {
				t.Errorf("it logs %s, want one line", brief(lines))
			}
		})
	}
}

// A process is this test binary as the chat server: see TestMain.
type process struct {
	*exec.Cmd
	stderr io.Closer
	log    chan string // its lines; closed at the end
}

// startProcess starts the server as a process, which the test's end kills.
func startProcess(t *testing.T, mode string, args ...string) *process {
	t.Helper()
	watch(t, patience)
	args = append([]string{os.Args[0]}, args...)
	if mode == "nohup" {
		args = append([]string{"nohup"}, args...)
	}
	p := &process{Cmd: exec.Command(args[0], args[1:]...), log: make(chan string, 1000)}
	// The race detector would have each process end a second later.
	p.Env = append(os.Environ(), asProcess+"="+mode, "GORACE=atexit_sleep_ms=0")
	stderr, err := p.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.stderr = stderr
	if _, err := p.StdinPipe(); err != nil { // It ends when this process does.
		t.Fatal(err)
	}
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		for scanner := bufio.NewScanner(stderr); scanner.Scan(); {
			p.log <- scanner.Text()
		}
		close(p.log)
	}()
	t.Cleanup(func() { p.Process.Kill(); p.Wait() })
	return p
}

// next returns what follows want in the next line of its log.
func (p *process) next(t *testing.T, want string) string {
	t.Helper()
	line := <-p.log
	_, after, found := strings.Cut(line, want)
	if !found {
		t.Fatalf("the process logs %q, want %q", line, want)
	}
	return after
}

// url returns the URL in its log.
func (p *process) url(t *testing.T) string {
	t.Helper()
	url, _, _ := strings.Cut(p.next(t, "listening on "), " ")
	return url
}

// wantEnd waits until the process has ended as want says. It returns the rest of
// its log, which must be these lines if there are any.
func (p *process) wantEnd(t *testing.T, want string, log ...string) (lines []string) {
	t.Helper()
	for line := range p.log {
		lines = append(lines, line)
	}
	p.Wait()
	same := len(log) == 0 || slices.EqualFunc(lines, log, strings.Contains)
	if got := p.ProcessState.String(); got != want || !same {
		t.Fatalf("the process ended with %q and the log %s, want %q and %q", got, brief(lines), want, log)
	}
	return lines
}

// joinProcess connects a client to the server at url.
func joinProcess(t *testing.T, url string) *peer {
	t.Helper()
	conn, _, err := websocket.DefaultDialer.Dial("ws"+strings.TrimPrefix(url, "http")+"ws", nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return &peer{conn, t}
}

func BenchmarkHubBroadcast(b *testing.B) {
	for _, n := range []int{1, 100, 10_000} {
		b.Run(fmt.Sprintf("clients=%d", n), func(b *testing.B) {
			hub := newHub()
			go hub.run()
			clients := make([]*Client, n)
			for i := range clients {
				clients[i] = join(hub, sendQueueSize)
			}
			message := []byte("a line of chat, about as long as people write them")
			b.ReportAllocs()
			for b.Loop() {
				hub.broadcast <- message
				for _, client := range clients {
					<-client.send
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*n), "ns/delivery")
			hub.stop()
			for _, client := range clients {
				hub.done <- client
			}
		})
	}
}

// BenchmarkBroadcast measures the way of one message from the hub to n clients.
func BenchmarkBroadcast(b *testing.B) {
	for _, n := range []int{1, 100, 1000} {
		b.Run(fmt.Sprintf("clients=%d", n), func(b *testing.B) {
			r := tcpRoom(b)
			message := []byte("a line of chat, about as long as people write them")
			var received sync.WaitGroup
			for range n {
				conn := r.join(b).NetConn() // read as bytes, so as to cost little itself
				go func() {
					frame := make([]byte, 2+len(message))
					for {
						if _, err := io.ReadFull(conn, frame); err != nil {
							return
						}
						received.Done()
					}
				}()
			}
			b.ReportAllocs()
			for b.Loop() {
				received.Add(n)
				r.hub.broadcast <- message
				received.Wait()
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*n), "ns/delivery")
		})
	}
}
