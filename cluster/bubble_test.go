package main

import (
	"errors"
	"fmt"
	"log"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
)

// The tests in this file run in synctest bubbles, together with their NATS server: waits take
// no time, and each takes exactly as long as it should, also on a busy machine.

// inBubble runs test in a bubble, in a process of its own: nats.go has a pool of timers, which
// must not pass from one bubble to another.
func inBubble(t *testing.T, test func(*testing.T)) {
	t.Helper()
	const bubble = "BUBBLE"
	if os.Getenv(bubble) != "" {
		synctest.Test(t, test)
		return
	}
	limit := "-test.timeout=" + patience.String()
	command := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", limit)
	command.Env = append(os.Environ(), bubble+"=1")
	if out, err := command.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

// A memoryNATS is a NATS server in a bubble. Nodes connect to it through links.
type memoryNATS struct {
	server atomic.Pointer[server.Server] // nil while it is stopped
}

func (n *memoryNATS) start(t *testing.T, options *server.Options) {
	t.Helper()
	if options == nil {
		options = new(server.Options)
	}
	options.DontListen, options.NoLog, options.NoSigs = true, true, true
	s, err := server.NewServer(options)
	if err != nil {
		t.Fatal(err)
	}
	s.Start()
	n.server.Store(s)
}

func (n *memoryNATS) stop() {
	if s := n.server.Swap(nil); s != nil {
		s.Shutdown()
		s.WaitForShutdown()
	}
}

// A link connects a node to a memoryNATS, by one connection at a time. It can delay data.
type link struct {
	nats    *memoryNATS
	mu      sync.Mutex
	conn    *linkConn
	latency time.Duration
	running sync.WaitGroup // forward
}

// A linkConn can lose data in one direction, while both ends stay connected.
type linkConn struct {
	near, far net.Conn
	isCut     [2]atomic.Bool // by direction
}

// nats.go calls Dial to connect. The new connection forwards data also if the last one was
// cut: nats.go holds a mutex until NATS has answered, and time stands still in a bubble while a
// goroutine waits for a mutex.
func (l *link) Dial(_, _ string) (net.Conn, error) {
	s := l.nats.server.Load()
	if s == nil {
		return nil, errors.New("connection refused")
	}
	far, err := s.InProcessConn()
	if err != nil {
		return nil, err
	}
	near, proxy := net.Pipe()
	conn := &linkConn{near: near, far: far}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.conn = conn
	l.running.Go(func() { l.forward(proxy, far, &conn.isCut[toNATS]) })
	l.running.Go(func() { l.forward(far, proxy, &conn.isCut[fromNATS]) })
	return near, nil
}

// forward copies from one connection to the other, until one of them is closed. A pipe has no
// buffer, so a goroutine of its own sleeps and writes: nats.go holds a mutex while it writes.
func (l *link) forward(from, to net.Conn, isCut *atomic.Bool) {
	type packet struct {
		data []byte
		due  time.Time
	}
	queue := make(chan packet, 1<<16)
	l.running.Go(func() {
		defer to.Close()
		for p := range queue {
			time.Sleep(time.Until(p.due))
			to.Write(p.data)
		}
	})
	defer from.Close()
	defer close(queue)
	for {
		buffer := make([]byte, 64<<10)
		n, err := from.Read(buffer)
		if err != nil {
			return
		}
		l.mu.Lock()
		due := time.Now().Add(l.latency)
		l.mu.Unlock()
		if !isCut.Load() {
			queue <- packet{buffer[:n], due}
		}
	}
}

// cut makes the connection lose data in that direction from now on.
func (l *link) cut(direction int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.conn.isCut[direction].Store(true)
}

// delay delays data by latency from now on.
func (l *link) delay(latency time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.latency = latency
}

// close closes the connection.
func (l *link) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.conn.near.Close()
	l.conn.far.Close()
}

// startMemoryRoom starts a NATS server and n nodes in a bubble.
func startMemoryRoom(t *testing.T, n int) (*memoryNATS, []*node) {
	t.Helper()
	s := new(memoryNATS)
	s.start(t, nil)
	var nodes []*node
	t.Cleanup(func() {
		s.stop()
		for _, node := range nodes {
			node.link.running.Wait()
		}
	})
	for range n {
		options, err := natsOptions("nats://192.0.2.1", "", "")
		if err != nil {
			t.Fatal(err)
		}
		link := &link{nats: s}
		options.CustomDialer = link
		book := new(logBook)
		relay, err := join(newHub(), options, "chat", log.New(book, "", 0))
		if err != nil {
			t.Fatal(err)
		}
		awaitJoined(t, relay, book)
		node := serveOn(t, make(pipeListener), relay, book)
		node.link = link
		nodes = append(nodes, node)
	}
	return s, nodes
}

func TestMessagesQueuedDuringAnOutageAreDeliveredAfterReconnect(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		const each = 100
		s, nodes := startMemoryRoom(t, 3)
		var clients []*client
		for _, node := range nodes {
			clients = append(clients, node.dial(t))
		}
		s.stop()
		awaitDisconnect(t, nodes)
		for i, c := range clients {
			for _, line := range numbered(fmt.Sprint(i), each) {
				c.send(t, line)
			}
		}
		s.start(t, nil)
		var group sync.WaitGroup
		for i, c := range clients {
			group.Go(func() {
				var received []string
				for range len(clients) * each {
					line, err := c.receive()
					if err != nil {
						t.Errorf("client %d received %d lines and then %v", i, len(received), err)
						return
					}
					received = append(received, line)
				}
				for n := range clients {
					sender := fmt.Sprint(n)
					got, want := from(sender, received), numbered(sender, each)
					if !slices.Equal(got, want) {
						t.Errorf("client %d received %q from client %s, want %q",
							i, got, sender, want)
					}
				}
			})
		}
		group.Wait()
		for _, node := range nodes {
			node.log.wait(t, "reconnected to NATS", 1)
		}
		wantNothingLost(t, nodes)
		clients[0].send(t, "as before")
		clients[1].want(t, "as before")
	})
}

func TestFullQueueDelaysSendersAndDropsNothing(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		const total = outgoingSize + 1000
		s, nodes := startMemoryRoom(t, 2)
		near, far := nodes[0].dial(t), nodes[1].dial(t)
		s.stop()
		awaitDisconnect(t, nodes)

		var taken atomic.Int64
		want := numbered("flood", total)
		go func() {
			for _, line := range want {
				nodes[0].broadcast <- []byte(line)
				taken.Add(1)
			}
		}()
		synctest.Wait()
		if got, want := taken.Load(), int64(outgoingSize); got != want {
			t.Errorf("%d messages are queued, want %d", got, want)
		}

		// The read loop of near blocks on this one, and its connection stays open.
		near.send(t, "delayed")
		s.start(t, nil)
		var group sync.WaitGroup
		for _, c := range []*client{near, far} {
			group.Go(func() {
				var received []string
				for range total + 1 {
					line, err := c.receive()
					if err != nil {
						t.Errorf("received %d lines and then %v", len(received), err)
						return
					}
					received = append(received, line)
				}
				if got := from("flood", received); !slices.Equal(got, want) {
					t.Errorf("received %d of %d messages in order", len(got), total)
				}
				if !slices.Contains(received, "delayed") {
					t.Error("did not receive the message that was delayed")
				}
			})
		}
		group.Wait()
		wantNothingLost(t, nodes)
	})
}

func TestIdleNodeStaysReady(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		_, nodes := startMemoryRoom(t, 1)
		for start := time.Now(); time.Since(start) < time.Hour; time.Sleep(reportPeriod) {
			if !nodes[0].ready.Load() {
				t.Fatalf("not ready after %v", time.Since(start))
			}
		}
		if got := nodes[0].log.String(); strings.Contains(got, "disconnected") {
			t.Errorf("log is %q, want no disconnect", got)
		}
	})
}

func TestMessagesInFlightAtADisconnectAreCountedAndNotPublishedAgain(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		_, nodes := startMemoryRoom(t, 2)
		near, link := nodes[0], nodes[0].link
		listener := nodes[1].dial(t)

		// A message that does not reach NATS, and one whose echo does not reach the node.
		link.cut(toNATS)
		near.broadcast <- []byte("lost")
		synctest.Wait()
		link.close()
		near.log.wait(t, "1 × may have lost a message", 1)
		link.cut(fromNATS)
		near.broadcast <- []byte("arrives")
		listener.want(t, "arrives")
		link.close()
		near.log.wait(t, "1 × may have lost a message", 2)

		near.broadcast <- []byte("end")
		listener.want(t, "end")
	})
}

func TestNodePublishesAfterSettleWait(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		s, nodes := startMemoryRoom(t, 2)
		listener := nodes[1].dial(t)
		s.stop()
		awaitDisconnect(t, nodes)
		nodes[0].broadcast <- []byte("sent during the outage")
		s.start(t, nil)
		eventually(t, "the node is connected", nodes[0].nc.IsConnected)
		back := time.Now()
		listener.want(t, "sent during the outage")
		if got := time.Since(back).Round(reconnectWait); got != settleWait {
			t.Errorf("a queued message took %v after the reconnect, want %v", got, settleWait)
		}
		before := time.Now()
		nodes[0].broadcast <- []byte("sent afterwards")
		listener.want(t, "sent afterwards")
		if got := time.Since(before); got > 0 {
			t.Errorf("a message after settleWait took %v, want no delay", got)
		}
	})
}

func TestHalfOpenConnectionToNATSIsDetected(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		_, nodes := startMemoryRoom(t, 3)
		sending, idle, listener := nodes[0], nodes[1], nodes[2].dial(t)
		sending.link.cut(toNATS)
		idle.link.cut(toNATS)
		begun := time.Now()
		sending.broadcast <- []byte("lost")
		for _, node := range []*node{sending, idle} {
			node.log.wait(t, "disconnected from NATS: "+nats.ErrTimeout.Error(), 1)
		}
		if took := time.Since(begun); took > answerWait+reportPeriod {
			t.Errorf("it took %v, want at most %v", took, answerWait+reportPeriod)
		}
		sending.broadcast <- []byte("arrives")
		listener.want(t, "arrives")
		sending.log.wait(t, "1 × may have lost a message", 1)
	})
}

func TestShutdownWaitsForMessagesInFlight(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		_, nodes := startMemoryRoom(t, 2)
		near, listener := nodes[0], nodes[1].dial(t)
		near.link.delay(drainWait/2 - reconnectWait) // each way
		near.broadcast <- []byte("in flight")
		near.stop()
		listener.want(t, "in flight")
		wantNothingLost(t, []*node{near})
	})
}

func TestShutdownWaitsForTheReconnectAndPublishesTheQueue(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		s, nodes := startMemoryRoom(t, 2)
		client, listener := nodes[0].dial(t), nodes[1].dial(t)
		s.stop()
		awaitDisconnect(t, nodes)
		want := numbered("queued", outgoingSize-1)
		for _, line := range append(want, "end") {
			nodes[0].broadcast <- []byte(line)
		}
		var group sync.WaitGroup
		group.Go(func() {
			got := listener.receiveUntil(t, "end")
			if !slices.Equal(got, want) {
				t.Errorf("received %d of %d messages in order", len(got), len(want))
			}
		})
		go nodes[0].stop()
		client.wantClose(t, websocket.CloseGoingAway)
		s.start(t, nil)
		group.Wait()
		nodes[0].stop()
		wantNothingLost(t, nodes)
	})
}

func TestShutdownDuringAnOutageDisconnectsSendersAndLogsTheLoss(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		s, nodes := startMemoryRoom(t, 1)
		client := nodes[0].dial(t)
		s.stop()
		awaitDisconnect(t, nodes)
		var taken atomic.Int64
		var group sync.WaitGroup
		group.Go(func() {
			for range 2*outgoingSize + 1 {
				nodes[0].broadcast <- []byte("lost")
				taken.Add(1)
			}
		})
		synctest.Wait()
		client.send(t, "lost, too")
		group.Go(func() { client.wantClose(t, websocket.CloseGoingAway) })
		stopping := time.Now()
		nodes[0].stop()
		if took := time.Since(stopping); took > drainWait+shutdownWait {
			t.Errorf("the node took %v to stop, want all clients disconnected", took)
		}
		group.Wait()
		got := nodes[0].log.String()
		lost := int(taken.Load())
		want := fmt.Sprintf("%d × %s", lost, notAccepted)
		withOneMore := fmt.Sprintf("%d × %s", lost+1, notAccepted) // if readPump had read it
		if !strings.Contains(got, want) && !strings.Contains(got, withOneMore) {
			t.Errorf("log is %q, want %q or one more in it", got, want)
		}
	})
}

func TestWindowLimitsMessagesInFlight(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		_, nodes := startMemoryRoom(t, 2)
		near, listener := nodes[0], nodes[1].dial(t)
		near.link.cut(fromNATS)
		lines := numbered("sent", 2*maxInFlight)
		for _, line := range lines[:maxInFlight+1] {
			near.broadcast <- []byte(line)
		}
		listener.want(t, lines[:maxInFlight]...)
		select {
		case near.broadcast <- []byte("more"):
			t.Error("the relay took a message beyond the window and the one that waits for it")
		case <-time.After(reportPeriod):
		}

		// Messages that were in flight are not published again.
		near.link.close()
		near.log.wait(t, fmt.Sprintf("%d × may have lost a message", maxInFlight), 1)
		listener.want(t, lines[maxInFlight])
	})
}

func TestNodeIsNotReadyAsSoonAsNATSDeniesAMessage(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		for name, options := range map[string]*server.Options{
			"publish":   allowed("nothing", "chat"),
			"subscribe": allowed("chat", "nothing"),
		} {
			s, nodes := startMemoryRoom(t, 1)
			c := nodes[0].dial(t)
			s.stop()
			awaitDisconnect(t, nodes)
			s.start(t, allowed("chat", "chat"))
			eventually(t, "the node is ready", nodes[0].ready.Load)
			options.DontListen, options.NoLog, options.NoSigs = true, true, true
			if err := s.server.Load().ReloadOptions(options); err != nil {
				t.Fatal(err)
			}
			begun := time.Now()
			c.send(t, "hello")
			eventually(t, "the node is not ready", func() bool { return !nodes[0].ready.Load() })
			if took := time.Since(begun); took > reportPeriod { // answerWait without an echo
				t.Errorf("%s: not ready after %v, want at once", name, took)
			}
			nodes[0].log.wait(t, "permissions violation", 1)
		}
	})
}
