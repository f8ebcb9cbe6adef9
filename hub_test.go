package main

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"os/signal"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
	"weak"

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

// A logBook collects what is logged.
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

// startHub runs a hub until the test ends, and registers bare clients with queues of the
// given sizes. Call it in a synctest bubble.
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
		synctest.Wait() // If run does not return, synctest reports a deadlock.
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

func wantReason(t *testing.T, client *Client, want *websocket.CloseError) {
	t.Helper()
	if got := client.reason.Load(); got != want {
		t.Errorf("the reason is %v, want %v", got, want)
	}
}

func wantQueue(t *testing.T, client *Client, wantClosed bool, want ...string) {
	t.Helper()
	got, closed := queued(client)
	if fmt.Sprintf("%q", got) != fmt.Sprintf("%q", want) || closed != wantClosed {
		t.Errorf("got %q, closed %v; want %q, closed %v", got, closed, want, wantClosed)
	}
}

// A broadcast goes to every client. The hub never blocks on one: a client whose queue is
// full is dropped.

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
		for _, message := range list("1", "2", "3") {
			hub.broadcast <- []byte(message)
		}
		synctest.Wait()
		wantQueue(t, clients[0], true, "1", "2")
		wantQueue(t, clients[1], false, "1", "2", "3")
		wantReason(t, clients[0], errSlowClient)
		if hub.clients[clients[0]] || len(hub.clients) != 1 {
			t.Errorf("the hub has %d clients, want the healthy one alone", len(hub.clients))
		}
	})
}

func TestQueueReachesItsClientAloneAndReportsWhetherItQueued(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		hub, clients := startHub(t, 1, 9)
		small, large := clients[0], clients[1]
		for _, test := range []struct {
			name   string
			client *Client
			want   bool
		}{
			{"fits", small, true},
			{"does not fit", small, false},
			{"too late, as it is dropped", small, false},
			{"not registered", &Client{}, false},
			{"no client", nil, false},
		} {
			var got bool
			hub.do(func() { got = hub.queue(test.client, []byte(test.name)) })
			if got != test.want {
				t.Errorf("%s: got %v, want %v", test.name, got, test.want)
			}
		}
		wantQueue(t, small, true, "fits")
		wantQueue(t, large, false)
		wantReason(t, small, errSlowClient)
		if hub.clients[small] || len(hub.clients) != 1 {
			t.Errorf("the hub has %d clients, want the other one alone", len(hub.clients))
		}
	})
}

func TestDeliverToReachesTheClientsItSelects(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		hub, clients := startHub(t, 2, 2)
		second := func(c *Client) bool { return c == clients[1] }
		hub.do(func() { hub.deliverTo([]byte("for one"), second) })
		wantQueue(t, clients[0], false)
		wantQueue(t, clients[1], false, "for one")
	})
}

func TestReasonIsSetBeforeTheQueueIsClosed(t *testing.T) {
	hub := newHub()
	client := &Client{} // Closing its queue, which is nil, panics: drop gets no further.
	hub.clients[client] = true
	func() {
		defer func() {
			if recover() == nil {
				t.Error("drop did not close the queue")
			}
		}()
		hub.drop(client, errSlowClient)
	}()
	wantReason(t, client, errSlowClient)
	if !client.registered {
		t.Error("the client could be registered when its queue is closed")
	}
	if hub.clients[client] {
		t.Error("the hub has the client when its queue is closed")
	}
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
	hub := newHub() // It does not run, so that the list stays.
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
	wantReason(t, registered, errBinary)
	wantReason(t, opened, errBinary)
}

// Promise 3. A healthy client is never dropped because another one sends fast: when any
// queue is more than half full after a broadcast, the hub applies backpressure.

func TestHubAppliesBackpressureOnlyWhenAQueueIsPastHalf(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		hub, _ := startHub(t, 8, 8, 100)
		start := time.Now()
		for n := range 8 {
			hub.broadcast <- []byte("message")
			hub.do(func() {}) // returns when the hub has finished with the message
			// The first four messages fill half of the smaller queues. Each of the others
			// leaves both more than half full, for which the hub waits once.
			want := backpressureDelay * time.Duration(max(0, n-3))
			if got := time.Since(start); got != want {
				t.Errorf("after %d messages the hub has waited for %v, want %v", n+1, got, want)
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
			t.Errorf("the slow client cost the others %v, want at most %v", got, most)
		}
		dropped := time.Now()
		for range 1000 {
			hub.broadcast <- []byte("message")
		}
		hub.do(func() {})
		if got := time.Since(dropped); got != 0 {
			t.Errorf("the dropped client cost the others %v, want nothing", got)
		}
	})
}

func TestFullQueueOfAClientThatIsNotDroppedCostsNoWait(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		hub, clients := startHub(t, 8, 8)
		hub.do(func() {
			for range 8 { // The application skips messages for a slow client.
				clients[0].send <- []byte("x")
			}
		})
		hasRoom := func(c *Client) bool { return len(c.send) < cap(c.send) }
		start := time.Now()
		hub.do(func() { hub.deliverTo([]byte("y"), hasRoom) })
		if got := time.Since(start); got != 0 {
			t.Errorf("it cost %v, want no time", got)
		}
		wantQueue(t, clients[1], false, "y")
	})
}

// Promise 6. Graceful shutdown: no new connections, and every client gets what is queued
// and 1001. The process is further down.

func TestStoppedHubDropsAllClientsAndWaitsForThem(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		hub := newHub()
		ended := false
		go func() { hub.run(); ended = true }()
		healthy, dropped := join(hub, 2), join(hub, 0)
		hub.broadcast <- []byte("last message")
		hub.stop()
		synctest.Wait()
		wantQueue(t, healthy, true, "last message")
		wantReason(t, healthy, errShuttingDown)
		wantReason(t, dropped, errSlowClient) // the first one

		// Until they are done, clients can send to the hub.
		hub.done <- healthy
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

func TestShutdownIsReadByAClientThatSendsBeforeItReads(t *testing.T) {
	withServer(t, func(t *testing.T, s *server) {
		p := s.join(t)
		s.hub.stop()
		synctest.Wait()
		start := time.Now()
		for range 10 * rateBurst {
			p.write(encode(0x81, "sent after the reason, and ignored"))
			p.write(encode(0x89, ""))
			p.write(encode(0x8a, ""))
		}
		if got := time.Since(start); got != 0 {
			t.Errorf("the client is delayed by %v, want no rate limit", got)
		}
		p.wantClose(errShuttingDown)
	})
}

// stopDuringHandshakes stops the hub when serve has begun a handshake.
func (s *server) stopDuringHandshakes(t *testing.T) {
	old := upgrader
	t.Cleanup(func() { upgrader = old })
	upgrader.CheckOrigin = func(*http.Request) bool {
		s.hub.stop()
		time.Sleep(time.Nanosecond) // until run has dropped its clients
		return true
	}
}

func TestPeerWhoseHandshakeMeetsTheStopGets1001(t *testing.T) {
	for _, alone := range []bool{true, false} {
		runWithServer(t, fmt.Sprintf("alone=%v", alone), func(t *testing.T, s *server) {
			if !alone { // run has not returned yet.
				last := join(s.hub, 0)
				defer func() { s.hub.done <- last }()
			}
			s.stopDuringHandshakes(t)
			p := s.join(t)
			p.wantClose(errShuttingDown)
			synctest.Wait()
			p.wantEnd()
		})
	}
}

func TestPeerThatDoesNotTakeTheHandshakeResponseDuringTheStopIsClosedAfterWriteWait(t *testing.T) {
	withServer(t, func(t *testing.T, s *server) {
		s.stopDuringHandshakes(t)
		conn := s.connect(t).(*pipe)
		defer conn.Close()
		conn.unbuffer()
		fmt.Fprintf(conn, "%s\r\n", handshake)
		time.Sleep(time.Nanosecond)
		start := time.Now()
		for !conn.far.isClosed() && time.Since(start) < 2*writeWait {
			time.Sleep(time.Second)
			synctest.Wait()
		}
		if got := time.Since(start); got != writeWait {
			t.Errorf("TCP was closed after %v, want %v", got, writeWait)
		}
	})
}

func TestClientRegisteredAfterStopIsDroppedAtOnce(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		hub, _ := startHub(t, 1) // whose client keeps run from returning
		hub.stop()
		synctest.Wait()
		late := join(hub, 1) // without a select, as in handle
		if _, open := <-late.send; open || late.reason.Load() != errShuttingDown {
			t.Errorf("the late client's reason is %v, want %v", late.reason.Load(), errShuttingDown)
		}
		hub.done <- late
	})
}

func TestHandshakeDuringShutdownIsRejected(t *testing.T) {
	withServer(t, func(t *testing.T, s *server) {
		last := join(s.hub, 0)
		s.hub.stop()
		synctest.Wait()
		for range 20 {
			_, response, err := s.dialer(t).Dial(serverURL, nil)
			if err == nil || response == nil || response.StatusCode != 503 {
				t.Fatalf("dial returned %v, %v; want status 503", response, err)
			}
			if body, _ := io.ReadAll(response.Body); string(body) != "server shutting down\n" {
				t.Errorf("the response is %q, want the reason in it", body)
			}
		}
		s.hub.done <- last
	})
}

// Promise 7. No goroutine outlives its client, and none the hub: run returns, and the
// pumps end, after shutdown. At the end of each bubble, synctest checks that all other
// goroutines have ended.

func TestHubEndsSoonHoweverItsClientEnds(t *testing.T) {
	for _, test := range []struct {
		name string
		deaf bool // The peer does not even read.
		end  func(*server, *peer)
	}{
		{
			name: "the peer sends a close frame",
			end:  func(_ *server, p *peer) { p.write(encodeClose(1000, "")) },
		},
		{
			name: "the peer vanishes",
			end:  func(_ *server, p *peer) { p.Close() },
		},
		{
			name: "the peer answers no ping",
			end:  func(_ *server, p *peer) { time.Sleep(pongWait) },
		},
		{
			name: "the peer sends binary",
			end:  func(_ *server, p *peer) { p.write(encode(0x82, "")) },
		},
		{
			name: "the peer sends binary, and many messages",
			end: func(_ *server, p *peer) {
				p.write(encode(0x82, ""))
				p.write(manyMessages)
			},
		},
		{
			name: "the peer violates the protocol",
			end:  func(_ *server, p *peer) { p.write(encode(0x8f, "")) },
		},
		{
			name: "the peer does nothing",
			end:  func(*server, *peer) {},
		},
		{
			name: "the peer does not read",
			deaf: true,
			end: func(s *server, p *peer) {
				p.unbuffered()
				s.broadcast("this")
				time.Sleep(writeWait)
			},
		},
		{
			name: "the application unregisters it",
			end:  func(s *server, _ *peer) { s.hub.unregister <- s.clients()[0] },
		},
		{
			name: "the application unregistered it a minute ago",
			end: func(s *server, _ *peer) {
				s.hub.unregister <- s.clients()[0]
				time.Sleep(pongWait)
			},
		},
	} {
		runWithServer(t, test.name, func(t *testing.T, s *server) {
			p := s.join(t)
			p.pipe().far.onClose = func() {
				synctest.Wait()
				select {
				case <-s.ended:
					t.Error("the hub has ended before its client's connection has")
				default:
				}
			}
			if !test.deaf {
				go io.Copy(io.Discard, p.NetConn()) // It reads, but answers nothing.
			}
			test.end(s, p)
			start := time.Now()
			s.hub.stop()
			s.wantEnd(t)
			if got := time.Since(start); got > closeWait {
				t.Errorf("the hub ended %v after it was stopped, want at most %v", got, closeWait)
			}
		})
	}
}

// Promise 8. A naive move of an application costs at most its own client.

func TestNaiveMoveCostsAtMostItsOwnClient(t *testing.T) {
	for _, test := range []struct {
		name   string
		move   func(hub *Hub, client *Client)
		closed bool     // client's queue
		want   []string // in client's queue
	}{
		{
			name: "unregister twice",
			move: func(hub *Hub, client *Client) {
				hub.unregister <- client
				hub.unregister <- client
			},
			closed: true,
		},
		{
			name: "unregister an unknown client",
			move: func(hub *Hub, _ *Client) {
				hub.unregister <- &Client{hub: hub, send: make(chan []byte, 1)}
			},
			want: list("still here"),
		},
		{
			name: "register twice",
			move: func(hub *Hub, client *Client) { hub.register <- client },
			want: list("still here"),
		},
		{
			name: "register a dropped client",
			move: func(hub *Hub, client *Client) {
				hub.unregister <- client
				hub.register <- client
			},
			closed: true,
		},
		{
			name: "register a client that is done",
			move: func(hub *Hub, client *Client) {
				hub.unregister <- client
				hub.done <- client
				hub.register <- client
			},
			closed: true,
		},
		{
			name:   "done without unregister",
			move:   func(hub *Hub, client *Client) { hub.done <- client },
			closed: true,
		},
		{
			name: "end a client that is done",
			move: func(hub *Hub, client *Client) {
				hub.done <- client
				client.end(errBinary)
			},
			closed: true,
		},
		{
			name: "end a client that is not registered",
			move: func(hub *Hub, _ *Client) { (&Client{hub: hub}).end(errBinary) },
			want: list("still here"),
		},
		{
			name: "drop no client",
			move: func(hub *Hub, _ *Client) { hub.do(func() { hub.drop(nil, errBinary) }) },
			want: list("still here"),
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			inBubble(t, func(t *testing.T) {
				hub, clients := startHub(t, 2, 2)
				test.move(hub, clients[0])
				hub.broadcast <- []byte("still here")
				connected := 0
				hub.do(func() { connected = len(hub.clients) })
				wantQueue(t, clients[0], test.closed, test.want...)
				wantQueue(t, clients[1], false, "still here")
				if want := 1 + len(test.want); connected != want {
					t.Errorf("the hub has %d clients, want %d", connected, want)
				}
			})
		})
	}
}

func TestDoneTwiceDoesNotEndTheHubEarly(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		hub, clients := startHub(t, 2, 2)
		hub.done <- clients[0]
		hub.done <- clients[0]
		hub.done <- &Client{hub: hub}
		hub.stop()
		synctest.Wait()                               // so that run has seen stop
		hub.broadcast <- []byte("one client is open") // deadlocks if run has returned
		synctest.Wait()
		wantQueue(t, clients[0], true)
		wantQueue(t, clients[1], true)
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

func TestClientThatEndsBeforeItIsRegisteredIsDropped(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		hub, _ := startHub(t)
		client := &Client{hub: hub, send: make(chan []byte, 1)}
		client.reason.Store(errBinary) // as readPump does first
		hub.register <- client
		hub.unregister <- client
		synctest.Wait()
		wantQueue(t, client, true)
		hub.done <- client
	})
}

func TestDropOfAnotherHubsClientIsHarmless(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		hub, _ := startHub(t)
		_, clients := startHub(t, 1)
		hub.do(func() { hub.drop(clients[0], errBinary) })
		wantQueue(t, clients[0], false)
	})
}

// copied returns a hub whose run is like upstream's, as applications keep it: it closes
// queues itself, without a reason. It calls joined for each client that registers and
// received for each message.
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
	withServer(t, func(t *testing.T, s *server) {
		var first *Client
		joined := func(client *Client) {
			if first == nil {
				first = client
			}
		}
		received := func(h *Hub, message []byte) {
			if string(message) == "kick" {
				delete(h.clients, first)
				close(first.send)
				return
			}
			for client := range h.clients {
				client.send <- message
			}
		}
		s.serveFor(copied(t, joined, received))
		kicked, other := s.join(t), s.join(t)
		other.send("hello")
		kicked.wantLines("hello")
		other.wantLines("hello")
		other.send("kick")
		kicked.wantClose(&websocket.CloseError{Code: 1000, Text: "closed by the server"})
		other.send("still here")
		other.wantLines("still here")
	})
}

func TestClientDroppedByTheApplicationItselfCostsItAlone(t *testing.T) {
	withServer(t, func(t *testing.T, s *server) {
		kicked := s.join(t)
		client := s.clients()[0]
		other := s.join(t)
		s.hub.do(func() {
			delete(s.hub.clients, client)
			close(client.send)
		})
		kicked.wantClose(errUnregistered)
		synctest.Wait()
		kicked.wantEnd()
		other.send("still here")
		other.wantLines("still here")
	})
}

func TestBlockingSendInRunEndsWithTheSlowClientsConnection(t *testing.T) {
	withServer(t, func(t *testing.T, s *server) {
		hub := copied(t, func(*Client) {}, func(h *Hub, message []byte) {
			for client := range h.clients {
				client.send <- message // blocks while the queue is full
			}
		})
		s.serveFor(hub)
		s.join(t).unbuffered() // It reads nothing.
		other := s.join(t)
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
			t.Errorf("the slow client cost the others %v, want at most %v", got, writeWait)
		}
	})
}

func TestRepliesToASlowClientCostItAlone(t *testing.T) {
	withServer(t, func(t *testing.T, s *server) {
		front := *s.hub // It receives its client's messages, and sends them back.
		front.register, front.broadcast = make(chan *Client), make(chan []byte)
		s.serveFor(&front)
		over := make(chan struct{})
		defer close(over)
		go func() {
			client := <-front.register
			s.hub.register <- client
			for {
				select {
				case message := <-front.broadcast:
					s.hub.do(func() { s.hub.queue(client, message) })
				case <-over:
					return
				}
			}
		}()
		p := s.join(t).unbuffered()
		s.serveFor(s.hub)
		other := s.join(t)
		start := time.Now()
		var err error
		for err == nil && time.Since(start) < pongWait { // It reads nothing.
			time.Sleep(rateInterval)
			_, err = p.NetConn().Write(encode(0x81, "answer me"))
		}
		if got, most := time.Since(start), writeWait+closeWait+time.Second; got > most {
			t.Errorf("its connection ended after %v, want at most %v", got, most)
		}
		s.broadcast("still here")
		other.wantLines("still here")
	})
}

func TestHistoryMayExceedTheQueue(t *testing.T) {
	withServer(t, func(t *testing.T, s *server) {
		history := make([]string, sendQueueSize+44)
		s.serveFor(copied(t, func(client *Client) {
			for n := range history {
				history[n] = fmt.Sprint("line ", n)
				client.send <- []byte(history[n])
			}
		}, nil))
		s.join(t).wantLines(history...)
	})
}

func TestRunMayWriteToConnWhenItRegistersAClient(t *testing.T) {
	withServer(t, func(t *testing.T, s *server) {
		front := *s.hub
		front.register = make(chan *Client)
		client := &Client{hub: &front}
		s.serve = client.serve
		go func() {
			synctest.Wait() // until serve waits to register the client
			if client.conn == nil {
				t.Error("conn is not set when the client is registered")
			} else {
				welcome := "welcome, " + client.conn.RemoteAddr().String()
				client.conn.WriteMessage(websocket.TextMessage, []byte(welcome))
			}
			s.hub.register <- <-front.register
		}()
		s.join(t).wantLines("welcome, pipe")
		synctest.Wait() // until it is registered with the hub that the test's end stops
	})
}

func TestPeerMayBeAskedForAPasswordBeforeItRegisters(t *testing.T) {
	withServer(t, func(t *testing.T, s *server) {
		s.serve = func(w http.ResponseWriter, req *http.Request) {
			conn, err := upgrader.Upgrade(delayedHandshake{w}, req, nil)
			if err != nil {
				t.Error(err)
				return
			}
			_, password, err := conn.ReadMessage()
			if err != nil || string(password) != "sesame" {
				t.Errorf("the password is %q, %v", password, err)
			}
			client := newClient(s.hub, conn)
			s.hub.register <- client
			go client.writePump()
			go client.readPump()
		}
		p := s.join(t)
		p.send("sesame")
		p.send("hello")
		p.wantLines("hello")
	})
}

func TestDelayedHandshakeDoesNotKeepTheWritersBuffer(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		near, far := newPipes()
		conn, written := &delayedConn{Conn: near}, []byte("response")
		conn.Write(written)
		copy(written, "reused..")
		conn.answer()
		got := make([]byte, len(written))
		if io.ReadFull(far, got); string(got) != "response" {
			t.Errorf("the peer reads %q, want %q", got, "response")
		}
	})
}

func TestAnsweredHandshakeIsNotRejected(t *testing.T) {
	withServer(t, func(t *testing.T, s *server) {
		front := *s.hub
		front.register = make(chan *Client)
		client := &Client{hub: &front}
		s.serve = client.serve
		go func() {
			synctest.Wait() // until serve waits to register the client
			client.conn.WriteMessage(websocket.TextMessage, []byte("password?"))
			s.hub.stop()
		}()
		p := s.join(t)
		p.wantLines("password?")
		p.wantClose(errShuttingDown)
		synctest.Wait()
		p.wantEnd()
	})
}

func TestUpstreamsServeWsWorksWithThesePumps(t *testing.T) {
	withServer(t, func(t *testing.T, s *server) {
		s.serve = func(w http.ResponseWriter, req *http.Request) {
			conn, err := upgrader.Upgrade(w, req, nil)
			if err != nil {
				t.Error(err)
				return
			}
			client := &Client{hub: s.hub, conn: conn, send: make(chan []byte, 256)}
			client.hub.register <- client
			go client.writePump()
			go client.readPump()
		}
		violator, other := s.join(t), s.join(t)
		violator.write(encode(0x8f, "")) // finish has to half-close conn.
		violator.wantClose(&websocket.CloseError{Code: 1002, Text: "bad opcode 15"})
		violator.Close()
		synctest.Wait()
		other.send("hello")
		other.wantLines("hello")
	})
}

// An application may start the pumps of its own Client as upstream does, in either order,
// before it registers the client, or without ever registering it.

// A shape is how an application serves a peer without serve.
type shape struct {
	name  string
	serve func(*Hub, *websocket.Conn) *Client
}

func newClient(hub *Hub, conn *websocket.Conn) *Client {
	return &Client{hub: hub, conn: conn, send: make(chan []byte, sendQueueSize)}
}

// registerLater registers client, as an application does when it has logged in the peer.
func registerLater(client *Client, wait time.Duration) {
	if wait > 0 { // In a bubble, time.After(0) can crash the race detector: go.dev/issue/78156.
		select {
		case <-time.After(wait):
		case <-client.hub.ended:
		}
	}
	client.hub.passToRun(client.hub.register, client)
}

var shapes = []shape{
	{
		name: "register, then the pumps, as in upstream",
		serve: func(hub *Hub, conn *websocket.Conn) *Client {
			client := newClient(hub, conn)
			registerLater(client, 0)
			go client.writePump()
			go client.readPump()
			return client
		},
	},
	{
		name: "readPump first",
		serve: func(hub *Hub, conn *websocket.Conn) *Client {
			client := newClient(hub, conn)
			registerLater(client, 0)
			go client.readPump()
			time.Sleep(time.Nanosecond)
			go client.writePump()
			return client
		},
	},
	{
		name: "registered right after the pumps start",
		serve: func(hub *Hub, conn *websocket.Conn) *Client {
			client := newClient(hub, conn)
			go client.readPump()
			go client.writePump()
			registerLater(client, 0)
			return client
		},
	},
	{
		name: "registered a second later",
		serve: func(hub *Hub, conn *websocket.Conn) *Client {
			client := newClient(hub, conn)
			go client.writePump()
			go client.readPump()
			registerLater(client, time.Second)
			return client
		},
	},
	{
		name: "registered after it has timed out",
		serve: func(hub *Hub, conn *websocket.Conn) *Client {
			client := newClient(hub, conn)
			go client.writePump()
			go client.readPump()
			registerLater(client, 2*pongWait)
			return client
		},
	},
	{
		name: "never registered",
		serve: func(hub *Hub, conn *websocket.Conn) *Client {
			client := newClient(hub, conn)
			go client.writePump()
			go client.readPump()
			return client
		},
	},
}

// serveShape has the server serve peers in that shape. The channel receives the clients.
func (s *server) serveShape(t *testing.T, serve func(*Hub, *websocket.Conn) *Client) chan *Client {
	clients := make(chan *Client, 1000)
	s.serve = func(w http.ResponseWriter, req *http.Request) {
		conn, err := upgrader.Upgrade(w, req, nil)
		if err != nil {
			t.Error(err)
			return
		}
		clients <- serve(s.hub, conn)
	}
	return clients
}

// An ending is how a peer ends its connection.
type ending struct {
	name string
	end  func(*peer)
	want *websocket.CloseError // what the peer reads, unless it has closed TCP
}

var endings = []ending{
	{
		name: "close frame",
		end:  func(p *peer) { p.write(encodeClose(4000, "bye")) },
		want: &websocket.CloseError{Code: 4000, Text: "bye"},
	},
	{
		name: "a line, then a close frame",
		end:  func(p *peer) { p.write(append(encode(0x81, "hello"), encodeClose(1000, "")...)) },
		want: &websocket.CloseError{Code: 1000},
	},
	{
		name: "protocol violation",
		end:  func(p *peer) { p.write(encode(0x8f, "")) },
		want: &websocket.CloseError{Code: 1002, Text: "bad opcode 15"},
	},
	{
		name: "binary",
		end:  func(p *peer) { p.write(encode(0x82, "")) },
		want: errBinary,
	},
	{
		name: "silence",
		end:  func(p *peer) { p.SetPingHandler(func(string) error { return nil }) },
		want: errTimeout,
	},
	{
		name: "TCP closed",
		end:  func(p *peer) { p.Close() },
	},
}

func TestPumpsEndInEveryShapeHoweverThePeerEnds(t *testing.T) {
	for _, shape := range shapes {
		for _, ending := range endings {
			runWithServer(t, shape.name+","+ending.name, func(t *testing.T, s *server) {
				clients := s.serveShape(t, shape.serve)
				p := s.join(t)
				ending.end(p)
				if ending.want != nil {
					p.wantCloseWithin(2*pongWait, ending.want)
					p.pipe().CloseWrite()
				}
				client := <-clients
				synctest.Wait()
				if !p.pipe().far.isClosed() {
					t.Error("TCP is still open")
				}
				if got := len(s.clients()); got != 0 || client.tell([]byte("anyone?")) {
					t.Errorf("the hub has %d clients, want none", got)
				}
			})
		}
	}
}

func TestStoppedHubEndsThePumpsOfEveryShape(t *testing.T) {
	for _, shape := range shapes {
		runWithServer(t, shape.name, func(t *testing.T, s *server) {
			s.serveShape(t, shape.serve)
			p := s.join(t)
			p.send("a line")
			synctest.Wait()
			s.hub.stop()
			for err := error(nil); err == nil; { // The line may precede it.
				_, err = p.read(patience)
				if err != nil && !websocket.IsCloseError(err, websocket.CloseGoingAway) {
					t.Errorf("the connection ended with %v, want 1001", err)
				}
			}
			s.wantEnd(t)
		})
	}
}

func TestPumpsThatStartAfterTheHubHasEndedCloseTheConnection(t *testing.T) {
	for _, ending := range endings {
		runWithServer(t, ending.name, func(t *testing.T, s *server) {
			s.serveShape(t, func(hub *Hub, conn *websocket.Conn) *Client {
				hub.stop()
				<-hub.ended
				client := newClient(hub, conn)
				go client.writePump()
				go client.readPump()
				return client
			})
			p := s.join(t)
			p.wantClose(errShuttingDown)
			ending.end(p)
			p.Close()
			time.Sleep(closeWait)
			if synctest.Wait(); !p.pipe().far.isClosed() {
				t.Error("TCP is still open")
			}
		})
	}
}

func TestPumpsThatStartWhileTheHubStopsCloseTheConnection(t *testing.T) {
	withServer(t, func(t *testing.T, s *server) {
		last := join(s.hub, 0) // keeps run from returning
		s.serveShape(t, func(hub *Hub, conn *websocket.Conn) *Client {
			hub.stop()
			time.Sleep(time.Nanosecond) // until run has dropped its clients
			client := newClient(hub, conn)
			go client.writePump()
			go client.readPump()
			return client
		})
		p := s.join(t)
		p.wantClose(errShuttingDown)
		synctest.Wait()
		p.wantEnd()
		s.hub.done <- last
	})
}

func TestReasonOfAClientThatEndsBeforeItsPumpsStartIsSent(t *testing.T) {
	withServer(t, func(t *testing.T, s *server) {
		banned := closeError(4003, "banned")
		s.serveShape(t, func(hub *Hub, conn *websocket.Conn) *Client {
			client := newClient(hub, conn)
			client.end(banned)
			go client.writePump()
			go client.readPump()
			return client
		})
		s.join(t).wantClose(banned)
	})
}

func TestManyClientsLeaveNothingBehindInAnyShape(t *testing.T) {
	const n = 1000
	served := shape{name: "served"} // as serveWs does
	for _, shape := range append(shapes, served) {
		runWithServer(t, shape.name, func(t *testing.T, s *server) {
			if shape.serve != nil {
				s.serveShape(t, shape.serve)
			}
			var pipes []*pipe
			for i := range n {
				p := s.join(t)
				pipes = append(pipes, p.pipe().far)
				if i%2 == 0 {
					endings[i/2%len(endings)].end(p)
				}
			}
			s.hub.stop()
			time.Sleep(writeWait + closeWait)
			s.wantEnd(t) // synctest fails if a goroutine is left.
			for _, pipe := range pipes {
				if !pipe.isClosed() {
					t.Fatal("a connection is still open")
				}
			}
			if got := len(s.hub.clients) + len(s.hub.open) + len(s.hub.dropped); got != 0 {
				t.Errorf("the hub still has %d clients", got)
			}
		})
	}
}

func TestNoTimerKeepsEndedClientsInMemory(t *testing.T) {
	for _, ending := range endings {
		runWithServer(t, ending.name, func(t *testing.T, s *server) {
			var clients []weak.Pointer[Client]
			for range 40 {
				p := s.join(t)
				clients = append(clients, weak.Make(s.clients()[0]))
				ending.end(p)
				p.wantEndSoon()
				p.Close()
				synctest.Wait()
			}
			time.Sleep(closeWait / 2)
			runtime.GC()
			kept := 0
			for _, client := range clients {
				if client.Value() != nil {
					kept++
				}
			}
			if kept > len(clients)/2 { // The runtime removes some stopped timers later.
				t.Errorf("%d of %d clients are still in memory", kept, len(clients))
			}
		})
	}
}

// wantEndSoon reads until the connection ends.
func (p *peer) wantEndSoon() {
	for err := error(nil); err == nil; {
		_, err = p.read(2 * pongWait)
	}
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

func TestClientsDoRunsOnlyWhileTheClientIsRegistered(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		hub, clients := startHub(t, 1, 1)
		ran := 0
		for _, test := range []struct {
			name   string
			before func()
			client *Client
			want   bool
		}{
			{
				name:   "registered",
				before: func() {},
				client: clients[0],
				want:   true,
			},
			{
				name:   "not registered",
				before: func() {},
				client: &Client{hub: hub},
				want:   false,
			},
			{
				name:   "dropped",
				before: func() { hub.do(func() { hub.drop(clients[0], errBinary) }) },
				client: clients[0],
				want:   false,
			},
			{
				name:   "stopped",
				before: hub.stop,
				client: clients[1],
				want:   false,
			},
		} {
			test.before()
			if got := test.client.do(func() { ran++ }); got != test.want {
				t.Errorf("%s: got %v, want %v", test.name, got, test.want)
			}
		}
		if ran != 1 {
			t.Errorf("the function ran %d times, want once", ran)
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
				slow.end(errBinary) // returns, too
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
		if wait(t, waiting, "do") {
			t.Error("the waiting call returned true, want false")
		}
		if got := time.Since(start); got != 0 {
			t.Errorf("the waiting call returned after %v, want at once", got)
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
				if got, want := got[i], told[c][i]; !slices.Equal(got, want) {
					t.Errorf("client %d received %s from goroutine %d, want %s",
						c, brief(got), i, brief(want))
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
	withServer(t, func(t *testing.T, s *server) {
		elsewhere := &websocket.CloseError{Code: 4000, Text: "connected elsewhere"}
		front := *s.hub // It keeps one connection of a user, the newest.
		front.register = make(chan *Client)
		over := make(chan struct{})
		defer close(over)
		go func() {
			var newest *Client
			for {
				select {
				case client := <-front.register:
					s.hub.register <- client
					s.hub.do(func() { s.hub.drop(newest, elsewhere) })
					newest = client
				case <-over:
					return
				}
			}
		}()
		s.serveFor(&front)
		first := s.join(t)
		for _, request := range list(
			"GET /ws HTTP/1.1\r\nHost: pipe\r\n",
			handshake+"Origin: http://example.com\r\n",
		) {
			conn := s.connect(t)
			fmt.Fprintf(conn, "%s\r\n", request)
			synctest.Wait()
			conn.Close()
		}
		first.send("still here")
		first.wantLines("still here")
		second := s.join(t)
		first.wantClose(elsewhere)
		second.send("here, too")
		second.wantLines("here, too")
	})
}

// The server: run and serve.

// startServe calls serve, until the test ends. It returns a server without a hub, its
// listener, a function that stops it, and serve's result.
func startServe(t *testing.T) (s *server, listener net.Listener, cancel func(), result chan error) {
	t.Helper()
	pipes := newPipeListener()
	ctx, cancel := context.WithCancel(t.Context())
	result = make(chan error, 1)
	ended := make(chan struct{})
	s = &server{connect: pipes.connect, log: captureLog(t)}
	go func() { result <- serve(ctx, pipes); close(ended) }()
	t.Cleanup(func() { cancel(); wait(t, ended, "serve") })
	return s, pipes, cancel, result
}

func TestServerLogsAURLThatCanBeOpened(t *testing.T) {
	watch(t, patience)
	for addr, want := range map[string]string{
		":0":          `localhost:[1-9]\d*/ \(all interfaces\)`,
		"0.0.0.0:0":   `localhost:[1-9]\d*/ \(all interfaces\)`,
		"127.0.0.1:0": `127.0.0.1:[1-9]\d*/`,
	} {
		book := captureLog(t)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := run(ctx, addr); err != http.ErrServerClosed {
			t.Fatal(err)
		}
		if got := book.lines(); len(got) > 2 {
			t.Fatalf("the log is %q, although no client was connected", got)
		}
		pattern := regexp.MustCompile(`^listening on http://` + want + `$`)
		if got := book.lines()[0]; !pattern.MatchString(got) {
			t.Errorf("on %s the log is %q, want %s", addr, got, pattern)
		}
	}
}

func TestServeReturnsTheListenersError(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		s, listener, _, result := startServe(t)
		p := s.join(t)
		listener.Close()
		p.wantClose(errShuttingDown)
		if err := wait(t, result, "serve"); !errors.Is(err, net.ErrClosed) {
			t.Errorf("serve returned %v, want %v", err, net.ErrClosed)
		}
	})
}

func TestServeReturnsAtOnceIfAllClientsDisconnect(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		s, _, cancel, result := startServe(t)
		for range 10 {
			p := s.join(t)
			go p.wantClose(errShuttingDown)
		}
		idle := s.connect(t) // as browsers keep one ready
		defer idle.Close()
		synctest.Wait()
		start := time.Now()
		cancel()
		if err := wait(t, result, "serve"); err != http.ErrServerClosed {
			t.Errorf("serve returned %v, want %v", err, http.ErrServerClosed)
		}
		if _, err := idle.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("reading from the server gives %v, want %v", err, io.EOF)
		}
		if got := time.Since(start); got != 0 {
			t.Errorf("serve returned after %v, want at once", got)
		}
		s.wantLogged(t, "shutting down")
	})
}

func TestServeReturnsAfterShutdownWaitDespiteASlowClient(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		s, _, cancel, result := startServe(t)
		slow, p := s.join(t).unbuffered(), s.join(t)
		p.send("the slow client does not read this")
		synctest.Wait()
		start := time.Now()
		cancel()
		p.wantClose(errShuttingDown)
		if err := wait(t, result, "serve"); err != http.ErrServerClosed {
			t.Errorf("serve returned %v, want %v", err, http.ErrServerClosed)
		}
		if got := time.Since(start); got != shutdownWait {
			t.Errorf("serve returned after %v, want %v", got, shutdownWait)
		}
		s.wantLogged(t, "shutting down", "exiting: some clients are still connected after 8s")
		slow.Close()
	})
}

func TestServeClosesASlowHTTPConnection(t *testing.T) {
	const page = "GET / HTTP/1.1\r\nHost: pipe\r\n\r\n"
	for _, test := range []struct {
		name   string
		sent   string
		drip   string // sent after that, each second
		noRead bool   // The peer does not read.
		after  time.Duration
	}{
		{
			name:  "nothing sent",
			after: httpTimeout,
		},
		{
			name:  "header that never ends",
			sent:  "GET / HTTP/1.1\r\nX: ",
			drip:  "x",
			after: httpTimeout,
		},
		{
			name:  "body that never ends",
			sent:  "POST /ws HTTP/1.1\r\nHost: pipe\r\nContent-Length: 1000\r\n\r\n",
			drip:  "x",
			after: httpTimeout,
		},
		{
			name:   "page that the peer does not read",
			sent:   page,
			noRead: true,
			after:  httpTimeout,
		},
		{
			name:  "no second request",
			sent:  page,
			after: idleTimeout,
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			inBubble(t, func(t *testing.T) {
				s, _, _, _ := startServe(t)
				conn := s.connect(t).(*pipe)
				var dripping sync.WaitGroup
				defer dripping.Wait()
				defer conn.Close()
				conn.unbuffer()
				dripping.Go(func() {
					_, err := io.WriteString(conn, test.sent)
					for err == nil && test.drip != "" {
						time.Sleep(time.Second)
						_, err = io.WriteString(conn, test.drip)
					}
				})
				if !test.noRead {
					go io.Copy(io.Discard, conn)
				}
				time.Sleep(test.after - 1)
				if synctest.Wait(); conn.far.isClosed() {
					t.Errorf("the connection is closed before %v have passed", test.after)
				}
				time.Sleep(time.Second)
				if synctest.Wait(); !conn.far.isClosed() {
					t.Errorf("the connection is still open after %v", test.after)
				}
			})
		})
	}
}

func TestServeLimitsTheRequestHeader(t *testing.T) {
	over := strings.Repeat("x", (16+4)<<10) // with what net/http allows
	for _, header := range []string{
		"GET /?" + over + " HTTP/1.1\r\nHost: pipe\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: pipe\r\nCookie: " + over + "\r\n\r\n",
	} {
		inBubble(t, func(t *testing.T) {
			s, _, _, _ := startServe(t)
			conn := s.connect(t)
			defer conn.Close()
			go io.WriteString(conn, header)
			response, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil || response.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
				t.Errorf("got %v, %v, want status 431", response, err)
			}
			s.wantLogged(t)
			time.Sleep(time.Second) // net/http closes the connection meanwhile.
		})
	}
}

func TestLogHasAtMost200BytesOfWhatAPeerSends(t *testing.T) {
	withServer(t, func(t *testing.T, s *server) {
		long := strings.Repeat("x", 15_000)
		origin, path := "http://y"+long, "/"+long
		for _, request := range list(
			strings.Replace(handshake, "Host: pipe", "Host: "+long, 1)+"Origin: "+origin+"\r\n",
			"GET "+path+" HTTP/1.1\r\nHost: pipe\r\n",
			long+" / HTTP/1.1\r\nHost: pipe\r\n",
		) {
			conn := s.connect(t)
			fmt.Fprintf(conn, "%s\r\n", request)
			synctest.Wait()
			conn.Close()
		}
		s.wantLogged(t,
			fmt.Sprintf(`pipe: handshake refused: "websocket: request origin not allowed by `+
				`Upgrader.CheckOrigin" (Origin %q, Host %q)`, origin[:200], long[:200]),
			fmt.Sprintf("pipe: GET %q", path[:200]),
			fmt.Sprintf("pipe: %s %q", long[:200], "/"))
	})
}

// Promise 10. Nothing in the shutdown waits for the log.

// A blockedLog blocks each write until it is closed.
type blockedLog chan struct{}

func (l blockedLog) Write(p []byte) (int, error) { <-l; return len(p), nil }

func TestHubEndsAlthoughTheLogBlocks(t *testing.T) {
	withServer(t, func(t *testing.T, s *server) {
		blocked := make(blockedLog)
		defer close(blocked)
		log.SetOutput(blocked)
		p, other := s.join(t), s.join(t)
		p.Close() // which is logged
		synctest.Wait()
		s.hub.stop()
		other.wantClose(errShuttingDown)
		start := time.Now()
		s.wantEnd(t)
		if got := time.Since(start); got != 0 {
			t.Errorf("the hub waits %v for the log", got)
		}
	})
}

func TestRateLimitedClientDoesNotWaitForTheLog(t *testing.T) {
	withServer(t, func(t *testing.T, s *server) {
		blocked := make(blockedLog)
		defer close(blocked)
		log.SetOutput(blocked)
		p := s.join(t)
		for n := range 2 * rateBurst {
			p.send(fmt.Sprint("line ", n))
		}
		p.lines(2 * rateBurst)
	})
}

func TestServeReturnsAlthoughTheLogBlocks(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		s, _, cancel, result := startServe(t)
		blocked := make(blockedLog)
		defer close(blocked)
		log.SetOutput(blocked)
		p := s.join(t)
		start := time.Now()
		cancel()
		p.wantClose(errShuttingDown)
		if got := time.Since(start); got != 0 {
			t.Errorf("the clients wait %v for the log", got)
		}
		wait(t, result, "serve")
		if got := time.Since(start); got != logWait {
			t.Errorf("serve returned after %v, want %v", got, logWait)
		}
	})
}

// The page.

func TestHomeIsServedAtTheRootAlone(t *testing.T) {
	const html, plain = "text/html; charset=utf-8", "text/plain; charset=utf-8"
	defer func(old string) { home = old }(home)
	home = "a page whose content does not look like HTML"
	for _, test := range []struct {
		method, path string
		status       int
		body         string
		header       map[string]string
	}{
		{
			method: "GET",
			path:   "/",
			status: http.StatusOK,
			body:   home,
			header: map[string]string{"Content-Type": html, "Allow": ""},
		},
		{
			method: "HEAD",
			path:   "/",
			status: http.StatusOK,
			body:   home,
			header: map[string]string{"Content-Type": html, "Allow": ""},
		},
		{
			method: "GET",
			path:   "/?\u009b31m%0a%1b",
			status: http.StatusOK,
			body:   home,
			header: map[string]string{"Content-Type": html, "Allow": ""},
		},
		{
			method: "GET",
			path:   "/favicon.ico",
			status: http.StatusNotFound,
			body:   "404 page not found\n",
			header: map[string]string{"Content-Type": plain, "Allow": ""},
		},
		{
			method: "GET",
			path:   "/index.html",
			status: http.StatusNotFound,
			body:   "404 page not found\n",
			header: map[string]string{"Content-Type": plain, "Allow": ""},
		},
		{
			method: "POST",
			path:   "/index.html",
			status: http.StatusNotFound,
			body:   "404 page not found\n",
			header: map[string]string{"Content-Type": plain, "Allow": ""},
		},
		{
			method: "POST",
			path:   "/",
			status: http.StatusMethodNotAllowed,
			body:   "method not allowed\n",
			header: map[string]string{"Content-Type": plain, "Allow": "GET, HEAD"},
		},
		{
			method: "DELETE",
			path:   "/",
			status: http.StatusMethodNotAllowed,
			body:   "method not allowed\n",
			header: map[string]string{"Content-Type": plain, "Allow": "GET, HEAD"},
		},
	} {
		t.Run(test.method+" "+test.path, func(t *testing.T) {
			book := captureLog(t)
			rec := httptest.NewRecorder()
			serveHome(rec, httptest.NewRequest(test.method, test.path, nil))
			if rec.Code != test.status {
				t.Errorf("got status %d, want %d", rec.Code, test.status)
			}
			if got := rec.Body.String(); got != test.body {
				t.Errorf("got %s, want %q", brief(got), test.body)
			}
			test.header["X-Content-Type-Options"] = "nosniff"
			for name, want := range test.header {
				if got := rec.Result().Header.Get(name); got != want {
					t.Errorf("got %s %q, want %q", name, got, want)
				}
			}
			want := fmt.Sprintf("192.0.2.1:1234: %s %q", test.method, test.path)
			if got := book.lines(); !slices.Equal(got, list(want)) {
				t.Errorf("the log is %q, want %q", got, want)
			}
		})
	}
}

func TestContentSecurityPolicyAllowsThePageItsOwnScriptAndStyleAlone(t *testing.T) {
	rec := httptest.NewRecorder()
	serveHome(rec, httptest.NewRequest("GET", "/", nil))
	hash := func(element string) string {
		pattern := regexp.MustCompile("(?s)<" + element + "\\b[^>]*>(.*?)</" + element + ">")
		found := pattern.FindAllStringSubmatch(rec.Body.String(), -1)
		if len(found) != 1 {
			t.Fatalf("the page has %d elements %s, want 1", len(found), element)
		}
		// Browsers normalize line endings before hashing.
		sum := sha256.Sum256([]byte(strings.ReplaceAll(found[0][1], "\r\n", "\n")))
		return base64.StdEncoding.EncodeToString(sum[:])
	}
	want := "default-src 'none'; script-src 'sha256-" + hash("script") +
		"'; style-src 'sha256-" + hash("style") +
		"'; img-src data:; connect-src 'self' ws: wss:" +
		"; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
	if got := rec.Result().Header.Get("Content-Security-Policy"); got != want {
		t.Errorf("the policy is\n%s, want\n%s", got, want)
	}
}

func TestCSPHashesIgnoreCRLF(t *testing.T) {
	defer func(old string) { home = old }(home)
	for _, element := range []string{"script", "style"} {
		home = strings.ReplaceAll(home, "\r\n", "\n")
		want := hashSource(element)
		home = strings.ReplaceAll(home, "\n", "\r\n")
		if got := hashSource(element); got != want {
			t.Errorf("with CRLF the hash of %s is %s, want %s", element, got, want)
		}
		if !strings.Contains(contentSecurityPolicy, want) {
			t.Errorf("the policy %s does not contain %s", contentSecurityPolicy, want)
		}
	}
}

func TestThePageKnowsTheServersFigures(t *testing.T) {
	ms := pingPeriod.Milliseconds()
	for _, want := range []string{
		fmt.Sprintf("const pingPeriod = %d_%03d;", ms/1000, ms%1000),
		fmt.Sprintf("const maxMessageSize = %d;", maxMessageSize),
	} {
		if !strings.Contains(home, want) {
			t.Errorf("home.html does not contain %q", want)
		}
	}
	limit := regexp.MustCompile(fmt.Sprintf(`\b%d\b`, maxMessageSize))
	if got := len(limit.FindAllString(home, -1)); got != 1 {
		t.Errorf("home.html states the limit %d times, want once", got)
	}
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
		t.Run(sig.String(), func(t *testing.T) {
			process := startProcess(t, "sound", "-addr", "127.0.0.1:0")
			p := joinProcess(t, process.url(t))
			process.Process.Signal(sig)
			p.wantClose(errShuttingDown)
			process.wantEnd(t, "exit status 0", "shutting down")
		})
	}
}

func TestSecondSignalEndsTheProcessOneSecondAfterTheFirst(t *testing.T) {
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
			process.wantEnd(t, "signal: "+second.String())
			if got := time.Since(start); got < forceAfter || got > shutdownWait {
				t.Errorf("it exited after %v, want %v", got, forceAfter)
			}
			<-ended
		})
	}
}

func TestTwoSignalsAtOnceAreOne(t *testing.T) {
	for _, sig := range signals(t) {
		t.Run(sig.String(), func(t *testing.T) {
			process := startProcess(t, "sound", "-addr", "127.0.0.1:0")
			p := joinProcess(t, process.url(t))
			process.Process.Signal(sig)
			process.Process.Signal(sig)
			process.next(t, "shutting down")
			p.wantClose(errShuttingDown) // The process has waited for this.
			process.wantEnd(t, "exit status 0")
		})
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
		t.Run(sig.String(), func(t *testing.T) {
			process := startProcess(t, "blocked log", "-addr", "127.0.0.1:0")
			p := joinProcess(t, process.url(t))
			reset := joinProcess(t, "http://"+p.RemoteAddr().String()+"/")
			reset.NetConn().Close() // This is logged, but the log blocks.
			process.Process.Signal(sig)
			p.wantClose(errShuttingDown)
			process.wantEnd(t, "exit status 0")
		})
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

// signals returns what asks a process to end. Until the test ends, the processes that it
// starts do not ignore these, although this one may, as under nohup or in the background.
func signals(t *testing.T) []os.Signal {
	if runtime.GOOS == "windows" {
		t.Skip("on Windows no process can send another one an interrupt or SIGTERM")
	}
	all := []os.Signal{os.Interrupt, syscall.SIGTERM, syscall.SIGHUP}
	caught := make(chan os.Signal, 1)
	signal.Notify(caught, all...)
	t.Cleanup(func() { signal.Stop(caught) })
	return all
}

func TestProcessThatCannotListenExitsWithOneLine(t *testing.T) {
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	for _, test := range []struct{ args, status, log string }{
		{
			args:   "-addr " + busy.Addr().String(),
			status: "exit status 1",
			log:    "listen tcp " + busy.Addr().String() + ": ",
		},
		{
			args:   "-addr nonsense",
			status: "exit status 1",
			log:    "listen tcp: address nonsense: missing port in address",
		},
		{
			args:   "-addr :99999",
			status: "exit status 1",
			log:    "listen tcp: address 99999: invalid port",
		},
		{
			args:   ":9000",
			status: "exit status 2",
			log:    "-addr host:port",
		},
		{
			args:   "-addr 127.0.0.1:0 more",
			status: "exit status 2",
			log:    "-addr host:port",
		},
		{
			args:   "-port 9000",
			status: "exit status 2",
			log:    "-addr host:port",
		},
	} {
		t.Run(test.args, func(t *testing.T) {
			lines := startProcess(t, "sound", strings.Fields(test.args)...).wantEnd(t, test.status)
			text := strings.Join(lines, "\n")
			if !strings.Contains(text, test.log) || strings.Contains(text, "listening") {
				t.Errorf("it logs %s, want %q", brief(lines), test.log)
			}
			if test.status == "exit status 1" && len(lines) != 1 {
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
	watch(t, 2*patience) // A process starts slowly on a busy machine.
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
	if got := p.ProcessState.String(); got != want {
		t.Fatalf("the process ended with %q and the log %s, want %q", got, brief(lines), want)
	}
	if len(log) > 0 && !slices.EqualFunc(lines, log, strings.Contains) {
		t.Fatalf("the process ended with the log %s, want %q", brief(lines), log)
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

// BenchmarkBroadcast measures the delivery of one message from the hub to n peers.
func BenchmarkBroadcast(b *testing.B) {
	for _, n := range []int{1, 100, 1000} {
		b.Run(fmt.Sprintf("clients=%d", n), func(b *testing.B) {
			s := tcpServer(b)
			message := []byte("a line of chat, about as long as people write them")
			var received sync.WaitGroup
			for range n {
				conn := s.join(b).NetConn() // read as bytes, so as to cost little itself
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
				s.hub.broadcast <- message
				received.Wait()
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*n), "ns/delivery")
		})
	}
}
