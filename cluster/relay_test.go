package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	cryptorand "crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"
	"github.com/nats-io/jwt/v2"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

// patience limits how long a test waits for something that must happen: only a failing test
// takes so long.
const patience = time.Minute

// TestMain runs the program instead of the tests if a test has started it as a process.
func TestMain(m *testing.M) {
	if os.Getenv("RUN_MAIN") != "" {
		main()
		os.Exit(0)
	}
	flag.Parse()
	// Parallel tests mostly wait for reconnects. Tests that use much CPU are not parallel.
	flag.Set("test.parallel", "16")
	log.SetOutput(io.Discard)
	os.Exit(m.Run())
}

// natsServer starts a NATS server that stops when the test ends.
func natsServer(t testing.TB) *server.Server {
	t.Helper()
	return natsWith(t, new(server.Options))
}

// port returns a loopback port that stays free until the test uses it, also after a restart:
// it is below the ephemeral ports, is returned once, and other test processes start elsewhere.
func port(t testing.TB) int {
	t.Helper()
	for range 1000 {
		n := 10_000 + (100*os.Getpid()+int(ports.Add(1)))%20_000
		if listener, err := net.Listen("tcp", fmt.Sprint("127.0.0.1:", n)); err == nil {
			listener.Close()
			return n
		}
	}
	t.Fatal("no port is free")
	return 0
}

var ports atomic.Int64

// stopNATS stops s, and returns a function that starts it again on the same port.
func stopNATS(t testing.TB, s *server.Server) (restart func()) {
	t.Helper()
	address, _ := s.Addr().(*net.TCPAddr)
	// A process that another test is starting has the listener too, until exec closes it.
	syscall.ForkLock.RLock()
	s.Shutdown()
	s.WaitForShutdown()
	syscall.ForkLock.RUnlock()
	return func() { natsWith(t, &server.Options{Port: address.Port}) }
}

// A node is a running node.
type node struct {
	*Relay
	listener net.Listener
	url      string // for its clients, unless it is in a bubble
	log      *logBook
	stop     func() // as SIGTERM does; returns when the node has stopped
	link     *link  // to NATS, in a bubble
}

// startRelay joins a hub that does not run to the room. The caller calls leave.
func startRelay(t testing.TB, natsURL, subject string) (*Relay, *logBook) {
	t.Helper()
	relay, book := startJoining(t, natsURL, "", subject)
	awaitJoined(t, relay, book)
	return relay, book
}

// startJoining is startRelay, but does not wait until the relay has joined.
func startJoining(t testing.TB, natsURL, creds, subject string) (*Relay, *logBook) {
	t.Helper()
	options, err := natsOptions(natsURL, creds, "")
	if err != nil {
		t.Fatal(err)
	}
	book := new(logBook)
	relay, err := join(newHub(), options, subject, log.New(book, "", 0))
	if err != nil {
		t.Fatal(err)
	}
	return relay, book
}

func awaitJoined(t testing.TB, relay *Relay, book *logBook) {
	t.Helper()
	select {
	case <-relay.joined:
	case <-time.After(patience):
		t.Fatalf("has not joined; log is %q", book)
	}
}

// startNode starts a node on a loopback port, until the test ends.
func startNode(t testing.TB, natsURL, subject string) *node {
	t.Helper()
	relay, book := startRelay(t, natsURL, subject)
	return serveRelay(t, relay, book)
}

// serveRelay serves relay on a loopback port, until the test ends.
func serveRelay(t testing.TB, relay *Relay, book *logBook) *node {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return serveOn(t, listener, relay, book)
}

func serveOn(t testing.TB, listener net.Listener, relay *Relay, book *logBook) *node {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- serve(ctx, listener, relay) }()
	stop := sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != http.ErrServerClosed {
			t.Errorf("serve returned %v, want %v", err, http.ErrServerClosed)
		}
	})
	t.Cleanup(stop)
	url := "ws://" + listener.Addr().String() + "/ws"
	return &node{Relay: relay, listener: listener, url: url, log: book, stop: stop}
}

// startRoom starts a NATS server and n nodes.
func startRoom(t testing.TB, n int) (*server.Server, []*node) {
	t.Helper()
	s := natsServer(t)
	var nodes []*node
	for range n {
		nodes = append(nodes, startNode(t, s.ClientURL(), "chat"))
	}
	return s, nodes
}

// awaitDisconnect waits until the nodes have noticed that NATS is down.
func awaitDisconnect(t testing.TB, nodes []*node) {
	t.Helper()
	for _, node := range nodes {
		eventually(t, "the node is disconnected", node.nc.IsReconnecting)
	}
}

// A client is a WebSocket connection, and the lines of its last message that receive has not
// returned yet.
type client struct {
	*websocket.Conn
	lines []string
}

func (n *node) dial(t testing.TB) *client {
	t.Helper()
	if pipes, inBubble := n.listener.(pipeListener); inBubble {
		return pipes.dial(t)
	}
	return dial(t, n.url)
}

func dial(t testing.TB, url string) *client {
	t.Helper()
	conn, _, err := websocket.DefaultDialer.Dial(url, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return &client{Conn: conn}
}

func (c *client) send(t testing.TB, message string) {
	t.Helper()
	if err := c.WriteMessage(websocket.TextMessage, []byte(message)); err != nil {
		t.Fatal(err)
	}
}

// receive returns the next line.
func (c *client) receive() (string, error) {
	for len(c.lines) == 0 {
		c.SetReadDeadline(time.Now().Add(patience))
		_, message, err := c.ReadMessage()
		if err != nil {
			return "", err
		}
		c.lines = strings.Split(string(message), "\n")
	}
	line := c.lines[0]
	c.lines = c.lines[1:]
	return line, nil
}

// want receives as many lines as are wanted, and checks them.
func (c *client) want(t testing.TB, want ...string) {
	t.Helper()
	for n, line := range want {
		if got, err := c.receive(); got != line || err != nil {
			t.Fatalf("line %d of %d is %q (%v), want %q", n+1, len(want), got, err, line)
		}
	}
}

// receiveUntil returns all lines before the line end.
func (c *client) receiveUntil(t testing.TB, end string) (lines []string) {
	t.Helper()
	for {
		line, err := c.receive()
		if err != nil {
			t.Errorf("after %d lines got %v, want %q", len(lines), err, end)
			return lines
		}
		if line == end {
			return lines
		}
		lines = append(lines, line)
	}
}

// wantClose receives lines until the connection is closed, and checks the close code.
func (c *client) wantClose(t testing.TB, code int) (lines []string) {
	t.Helper()
	for {
		line, err := c.receive()
		if err == nil {
			lines = append(lines, line)
			continue
		}
		if !websocket.IsCloseError(err, code) {
			t.Errorf("connection ended with %v, want close %d", err, code)
		}
		return lines
	}
}

// numbered returns n messages: the name of the sender, and a number from 0.
func numbered(sender string, n int) (lines []string) {
	for i := range n {
		lines = append(lines, fmt.Sprintf("%s %d", sender, i))
	}
	return lines
}

// from returns those lines from numbered that name this sender.
func from(sender string, lines []string) (theirs []string) {
	for _, line := range lines {
		if strings.HasPrefix(line, sender+" ") {
			theirs = append(theirs, line)
		}
	}
	return theirs
}

// eventually waits until done returns true, and fails after patience.
func eventually(t testing.TB, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !done(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", patience, what)
		}
	}
}

// A logBook is the log of a node.
type logBook struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *logBook) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logBook) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// wait waits until the log has text at least n times.
func (l *logBook) wait(t testing.TB, text string, n int) {
	t.Helper()
	eventually(t, fmt.Sprintf("%d × %q in the log", n, text), func() bool {
		return strings.Count(l.String(), text) >= n
	})
}

// wantNothingLost checks that no node has logged that it lost a message.
func wantNothingLost(t testing.TB, nodes []*node) {
	t.Helper()
	for _, node := range nodes {
		if got := node.log.String(); strings.Contains(got, "lost a message") {
			t.Errorf("log is %q, want nothing lost", got)
		}
	}
}

func TestCopiedFilesEqualTheRoots(t *testing.T) {
	for _, name := range []string{"hub.go", "client.go", "home.html"} {
		original, err := os.ReadFile("../" + name)
		if err != nil {
			t.Fatal(err)
		}
		if mine, err := os.ReadFile(name); err != nil || string(mine) != string(original) {
			t.Errorf("%s differs from ../%[1]s (%v): run go generate", name, err)
		}
	}
}

func TestMainServesThePageAndLogsAsTheRoot(t *testing.T) {
	var ends [2]string
	for i, name := range []string{"main.go", "../main.go"} {
		file, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		_, end, found := strings.Cut(string(file), "\n// logSoon ")
		if !found {
			t.Fatalf("%s has no logSoon", name)
		}
		ends[i] = end
	}
	if ends[0] != ends[1] {
		t.Error("from logSoon on, main.go differs from ../main.go: copy it")
	}
}

func TestMessageReachesEveryClientOfEveryNodeOnce(t *testing.T) {
	t.Parallel()
	_, nodes := startRoom(t, 3)
	var clients []*client
	for range 2 {
		for _, node := range nodes {
			clients = append(clients, node.dial(t))
		}
	}
	for n, sender := range clients {
		line := fmt.Sprint("from client ", n)
		sender.send(t, line)
		for _, listener := range clients {
			listener.want(t, line)
		}
	}
}

func TestConnectedClientReceivesMessagesOfOtherNodes(t *testing.T) {
	t.Parallel()
	_, nodes := startRoom(t, 2)
	for n := range 50 {
		listener := nodes[0].dial(t)
		line := fmt.Sprint("hello ", n)
		nodes[1].broadcast <- []byte(line)
		listener.want(t, line)
	}
}

func TestTellReachesAClientThroughTheProxyHub(t *testing.T) {
	_, nodes := startRoom(t, 1)
	conn := nodes[0].dial(t)
	var client *Client
	nodes[0].hub.do(func() {
		for client = range nodes[0].hub.clients {
		}
	})
	if !client.tell([]byte("for one client")) {
		t.Error("tell returned false for a connected client")
	}
	conn.want(t, "for one client")
	if !client.do(func() {}) {
		t.Error("do returned false for a connected client")
	}
}

func TestSubjectsAreSeparateRooms(t *testing.T) {
	t.Parallel()
	s := natsServer(t)
	here, there := startNode(t, s.ClientURL(), "chat"), startNode(t, s.ClientURL(), "chat.other")
	alice, bob := here.dial(t), there.dial(t)
	alice.send(t, "here")
	alice.want(t, "here")
	bob.send(t, "there")
	bob.want(t, "there")
	alice.send(t, "still here")
	alice.want(t, "still here")
}

func TestOneOrderPerNodeAndPerSender(t *testing.T) {
	t.Parallel()
	const each = 100
	_, nodes := startRoom(t, 3)
	var clients []*client
	for range 2 {
		for _, node := range nodes {
			clients = append(clients, node.dial(t))
		}
	}
	seen := make([][]string, len(clients))
	var group sync.WaitGroup
	for i, c := range clients {
		group.Go(func() {
			for _, line := range numbered(fmt.Sprint(i), each) {
				c.WriteMessage(websocket.TextMessage, []byte(line))
			}
		})
		group.Go(func() {
			for range len(clients) * each {
				line, err := c.receive()
				if err != nil {
					t.Errorf("client %d received %d lines and then %v", i, len(seen[i]), err)
					return
				}
				seen[i] = append(seen[i], line)
			}
		})
	}
	group.Wait()
	for i := range clients {
		if neighbour := i % len(nodes); !slices.Equal(seen[i], seen[neighbour]) {
			t.Errorf("client %d received %q, client %d of the same node received %q",
				i, seen[i], neighbour, seen[neighbour])
		}
		for n := range clients {
			sender := fmt.Sprint(n)
			got, want := from(sender, seen[i]), numbered(sender, each)
			if !slices.Equal(got, want) {
				t.Errorf("client %d received from client %s %q, want %q", i, sender, got, want)
			}
		}
	}
}

func TestReconnectsHaveNoLimitAlsoWithoutAuthorization(t *testing.T) {
	t.Parallel()
	s, nodes := startRoom(t, 1)
	listener := nodes[0].dial(t)
	port := s.Addr().(*net.TCPAddr).Port
	stopNATS(t, s)
	refusing := natsWith(t, &server.Options{Port: port, Authorization: "a token"})
	nodes[0].log.wait(t, "× "+nats.ErrAuthorization.Error(), 2) // a second apart: several attempts
	stopNATS(t, refusing)()
	listener.send(t, "back again")
	listener.want(t, "back again")
	if got := nodes[0].nc.Opts.MaxReconnect; got >= 0 {
		t.Errorf("nats.go makes at most %d attempts, want no limit", got)
	}
}

func TestNewClientsGet503WhileTheQueueIsFull(t *testing.T) {
	t.Parallel()
	s, nodes := startRoom(t, 1)
	restart := stopNATS(t, s)
	awaitDisconnect(t, nodes)
	nodes[0].dial(t) // The queue is not full yet.
	for range outgoingSize {
		nodes[0].broadcast <- message
	}
	isFull := func() bool { return nodes[0].queued.Load() == outgoingSize }
	eventually(t, "outgoing is full", isFull)

	// Otherwise each client that sends a message and disconnects would leave a connection
	// behind, whose readPump waits for NATS.
	for range 100 {
		_, response, err := websocket.DefaultDialer.Dial(nodes[0].url, nil)
		if response == nil || response.StatusCode != http.StatusServiceUnavailable {
			t.Fatalf("got %v, want status 503", err)
		}
	}
	restart()
	eventually(t, "outgoing has space", func() bool { return !isFull() })
	nodes[0].dial(t)
}

func TestPongsAreDelayedOnlyForAClientWhoseMessageTheFullQueueDelays(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		hub := newHub()
		options := nats.Options{Servers: []string{"nats://192.0.2.1"}, CustomDialer: noNetwork{}}
		relay, err := join(hub, options, "chat", log.Default())
		if err != nil {
			t.Fatal(err)
		}
		go hub.run()
		pipes := make(pipeListener)
		proxyHub := *hub
		proxyHub.broadcast = relay.broadcast
		server := &http.Server{Handler: handler(&proxyHub)}
		go server.Serve(pipes)
		defer server.Close()

		for range outgoingSize {
			relay.broadcast <- message
		}
		start := time.Now()
		idle, delayed := pipes.dial(t), pipes.dial(t)
		timedOut := make(chan time.Duration, 2)
		for _, c := range []*client{idle, delayed} {
			go func() {
				c.ping(20*time.Second, 20*time.Second)
				timedOut <- time.Since(start)
			}()
		}
		delayed.send(t, "delayed")
		time.Sleep(time.Hour)
		if len(timedOut) != 1 {
			t.Fatalf("%d clients timed out, want the one that is delayed", len(timedOut))
		}
		if got, want := <-timedOut, 40*time.Second; got != want {
			t.Errorf("a client timed out after %v, want the delayed one after %v", got, want)
		}

		// Its message stays queued after it has disconnected.
		idle.Close()
		<-timedOut
		hub.stop()
		relay.leave()
		if got := string(relay.outgoing[len(relay.outgoing)-1]); got != "delayed" {
			t.Errorf("the last queued message is %q, want the client's", got)
		}
	})
}

func TestNodeReconnectsOnlyWithoutAnEchoThatCouldBeLate(t *testing.T) {
	t.Parallel()
	options, err := natsOptions(natsServer(t).ClientURL(), "", "")
	if err != nil {
		t.Fatal(err)
	}
	nc, err := options.Connect()
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	const limit = int(answerWait / reportPeriod)
	tests := []struct {
		name       string
		state      state
		idleTicks  int
		queued     int
		isLate     bool
		reconnects bool
	}{
		{"echoes arrive", mayPublish, limit - 1, 0, false, false},
		{"the hub is behind", mayPublish, limit, 1, true, false},
		{"NATS has just reconnected", settling, limit, 0, true, false},
		{"no echo arrives", mayPublish, limit, 0, true, true},
		{"no echo arrives after a reconnect", mayProbe, limit, 0, true, true},
	}
	for _, test := range tests {
		before := nc.Stats().Reconnects
		r := &Relay{nc: nc, incoming: make(chan *nats.Msg, 1)}
		r.state, r.idleTicks = test.state, test.idleTicks
		for range test.queued {
			r.incoming <- new(nats.Msg)
		}
		r.check()
		if got := r.isLate(); got != test.isLate {
			t.Errorf("%s: late is %t, want %t", test.name, got, test.isLate)
		}
		if got := nc.IsReconnecting() || nc.Stats().Reconnects > before; got != test.reconnects {
			t.Errorf("%s: reconnects is %t, want %t", test.name, got, test.reconnects)
		}
		eventually(t, "it is connected", nc.IsConnected)
	}
}

// noNetwork is a dialer that always fails.
type noNetwork struct{}

func (noNetwork) Dial(_, _ string) (net.Conn, error) { return nil, errors.New("no network") }

// ping sends a ping every interval, as python's websockets does, and returns when the pong
// takes longer than timeout, or the connection is closed.
func (c *client) ping(interval, timeout time.Duration) {
	pongs := make(chan string, 1)
	c.SetPongHandler(func(string) error { pongs <- ""; return nil })
	// A net.Pipe has no buffer: if the reader wrote, both ends could block in a write.
	c.SetPingHandler(func(data string) error {
		go c.WriteControl(websocket.PongMessage, []byte(data), time.Now().Add(timeout))
		return nil
	})
	go c.ReadMessage()
	defer c.Close()
	for {
		time.Sleep(interval)
		late := time.After(timeout)
		go c.WriteControl(websocket.PingMessage, nil, time.Now().Add(timeout))
		select {
		case <-pongs:
		case <-late:
			return
		}
	}
}

// A pipeListener accepts net.Pipes, which a synctest bubble can wait for.
type pipeListener chan net.Conn

func (l pipeListener) Accept() (net.Conn, error) {
	conn, open := <-l
	if !open {
		return nil, net.ErrClosed
	}
	return conn, nil
}

func (l pipeListener) Close() error   { close(l); return nil }
func (l pipeListener) Addr() net.Addr { return new(net.TCPAddr) }

func (l pipeListener) dial(t testing.TB) *client {
	t.Helper()
	pipe := func(context.Context, string, string) (net.Conn, error) {
		near, far := net.Pipe()
		l <- far
		return near, nil
	}
	dialer := websocket.Dialer{NetDialContext: pipe}
	conn, _, err := dialer.Dial("ws://pipe/ws", nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return &client{Conn: conn}
}

// A proxy forwards connections to NATS. It can delay data. A test that locks blocked has it
// forward nothing.
type proxy struct {
	net.Listener
	blocked  [2]sync.RWMutex // by direction
	mu       sync.Mutex
	conns    []net.Conn
	latency  time.Duration
	failures int // number of next connections to close once NATS has accepted them
}

const (
	toNATS = iota
	fromNATS
)

func newProxy(t testing.TB, address string) *proxy {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{Listener: listener}
	t.Cleanup(func() { listener.Close(); p.restore() })
	go func() {
		for {
			near, err := listener.Accept()
			if err != nil {
				return
			}
			far, err := net.Dial("tcp", address)
			if err != nil {
				near.Close()
				continue
			}
			far.(*net.TCPConn).SetReadBuffer(64 << 10) // so that NATS soon notices a slow consumer
			p.mu.Lock()
			p.conns = append(p.conns, near, far)
			p.mu.Unlock()
			go p.forward(near, far, toNATS)
			go p.forward(far, near, fromNATS)
		}
	}()
	return p
}

// forward copies from one connection to the other, until one of them is closed.
func (p *proxy) forward(from, to net.Conn, direction int) {
	defer from.Close()
	defer to.Close()
	buffer := make([]byte, 64<<10)
	for {
		n, err := from.Read(buffer)
		if err != nil {
			return
		}
		p.mu.Lock()
		latency := p.latency
		isPong := direction == fromNATS && bytes.Contains(buffer[:n], []byte("PONG"))
		fails := isPong && p.failures > 0
		if fails {
			p.failures--
		}
		p.mu.Unlock()
		time.Sleep(latency)
		p.blocked[direction].RLock()
		to.Write(buffer[:n])
		p.blocked[direction].RUnlock()
		if fails {
			return
		}
	}
}

// delay delays data by latency from now on.
func (p *proxy) delay(latency time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.latency = latency
}

// restore closes all connections, and forwards new ones.
func (p *proxy) restore() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, conn := range p.conns {
		conn.Close()
	}
	p.conns = nil
}

func TestMissedMessagesAreCountedOnceOtherNodesPublishAgain(t *testing.T) {
	const total = 12_000
	s := natsWith(t, &server.Options{MaxPending: 1 << 20})
	proxy := newProxy(t, s.Addr().String())
	near := startNode(t, s.ClientURL(), "chat")
	far := startNode(t, "nats://"+proxy.Addr().String(), "chat")
	listener := far.dial(t)
	near.broadcast <- []byte("before")
	listener.want(t, "before")

	// The far node reads nothing until NATS disconnects it.
	proxy.blocked[fromNATS].Lock()
	for _, line := range numbered(strings.Repeat("x", maxMessageSize-10), total) {
		near.broadcast <- []byte(line)
	}
	eventually(t, "NATS disconnects the node", func() bool { return s.NumSlowConsumers() > 0 })
	proxy.blocked[fromNATS].Unlock()
	far.log.wait(t, "messages of other nodes were missed meanwhile", 1)
	near.broadcast <- []byte("end")
	received := listener.receiveUntil(t, "end")
	far.log.wait(t, fmt.Sprintf("NATS: %d × missed a message\n", total-len(received)), 1)
}

func TestRoomSurvivesTheFailoverOfANATSServer(t *testing.T) {
	t.Parallel()
	servers, _ := natsCluster(t, false)
	var urls []string
	for _, s := range servers {
		urls = append(urls, s.ClientURL())
	}
	var nodes []*node
	var clients []*client
	for range 3 {
		node := startNode(t, strings.Join(urls, ","), "chat")
		nodes = append(nodes, node)
		clients = append(clients, node.dial(t))
	}
	wantAtAll := func(line string) {
		t.Helper()
		clients[0].send(t, line)
		for _, c := range clients {
			c.want(t, line)
		}
	}
	wantAtAll("hello")
	stopNATS(t, servers[slices.Index(urls, nodes[0].nc.ConnectedUrl())])
	nodes[0].log.wait(t, "reconnected to NATS", 1)
	wantAtAll("still here")
}

func TestNewNodeOfANATSClusterMissesNothing(t *testing.T) {
	t.Parallel()
	servers, proxies := natsCluster(t, true)
	old := []*node{
		startNode(t, servers[0].ClientURL(), "chat"),
		startNode(t, servers[1].ClientURL(), "chat"),
	}

	// More latency than the servers of a cluster should have.
	for _, proxy := range proxies {
		proxy.delay(50 * time.Millisecond)
	}
	listener := startNode(t, servers[2].ClientURL(), "chat").dial(t)
	for n, sender := range old {
		line := fmt.Sprint("hello from ", n)
		sender.broadcast <- []byte(line)
		listener.want(t, line)
	}
}

// natsCluster starts a cluster of three NATS servers. If proxied, the last one is connected to
// the others through the proxies only.
func natsCluster(t testing.TB, proxied bool) (servers []*server.Server, proxies []*proxy) {
	t.Helper()
	var routes []string
	for n := range 3 {
		cluster := server.ClusterOpts{
			Name:        "test",
			Host:        "127.0.0.1",
			Port:        server.RANDOM_PORT,
			NoAdvertise: proxied,
		}
		if proxied && n == 2 {
			cluster.Advertise = "127.0.0.1:1" // so that the others do not connect to it
		}
		others := server.RoutesFromStr(strings.Join(routes, ","))
		s := natsWith(t, &server.Options{Cluster: cluster, Routes: others})
		servers = append(servers, s)
		routes = append(routes, "nats://"+s.ClusterAddr().String())
		if proxied && n == 1 {
			for i, other := range servers {
				proxies = append(proxies, newProxy(t, other.ClusterAddr().String()))
				routes[i] = "nats://" + proxies[i].Addr().String()
			}
		}
	}
	eventually(t, "a cluster", func() bool {
		return !slices.ContainsFunc(servers, func(s *server.Server) bool {
			return s.NumRoutes() < 2*routesToEach
		})
	})
	return servers, proxies
}

// routesToEach is the number of routes to each other server: one is for the system account.
const routesToEach = server.DEFAULT_ROUTE_POOL_SIZE + 1

// natsWith starts a NATS server with these options, on a loopback port, until the
// test ends.
func natsWith(t testing.TB, options *server.Options) *server.Server {
	t.Helper()
	if options.Port == 0 {
		options.Port = port(t)
	}
	options.Host = "127.0.0.1"
	options.NoLog, options.NoSigs = true, true
	s, err := server.NewServer(options)
	if err != nil {
		t.Fatal(err)
	}
	s.Start()
	t.Cleanup(func() { stopNATS(t, s) })
	if !s.ReadyForConnections(patience) {
		t.Fatal("the NATS server does not start")
	}
	return s
}

func TestRollingUpdateLosesNothingForClientsOfTheOtherNode(t *testing.T) {
	t.Parallel()
	s, nodes := startRoom(t, 2)
	for round := range 2 {
		stopping, staying := nodes[round%2], nodes[(round+1)%2]
		name := fmt.Sprint("sender", round)
		listener := staying.dial(t)

		// A client sends to the node that is about to stop, until it is disconnected.
		sender := stopping.dial(t)
		var group sync.WaitGroup
		group.Go(func() {
			var err error
			for n := 0; err == nil; n++ {
				line := fmt.Appendf(nil, "%s %d", name, n)
				err = sender.WriteMessage(websocket.TextMessage, line)
			}
		})
		var echoed []string
		for range 200 {
			line, err := sender.receive()
			if err != nil {
				t.Fatal(err)
			}
			echoed = append(echoed, line)
		}
		group.Go(stopping.stop)
		echoed = append(echoed, sender.wantClose(t, websocket.CloseGoingAway)...)
		group.Wait()
		nodes[round%2] = startNode(t, s.ClientURL(), "chat")
		again := nodes[round%2].dial(t)
		again.send(t, "back")
		again.want(t, "back")

		received := from(name, listener.receiveUntil(t, "back"))
		if want := numbered(name, len(received)); !slices.Equal(received, want) {
			t.Errorf("received %q, want no gap", received)
		}
		if len(received) < len(echoed) {
			t.Errorf("the client of the other node received %d messages, the one that was "+
				"disconnected %d", len(received), len(echoed))
		}
	}
}

func TestFloodOnOneNodeDropsNoClientOfAnother(t *testing.T) {
	const total = 30_000
	_, nodes := startRoom(t, 2)
	want := numbered("flood", total)
	var group sync.WaitGroup
	group.Go(func() {
		for _, line := range want {
			nodes[0].broadcast <- []byte(line)
		}
	})
	for _, node := range nodes {
		for range 5 {
			c := node.dial(t)
			group.Go(func() {
				received := 0
				for last := ""; last != want[total-1]; received++ {
					var err error
					if last, err = c.receive(); err != nil {
						t.Errorf("after %d lines got %v", received, err)
						return
					}
				}
			})
		}
	}
	group.Wait()
	wantNothingLost(t, nodes)
}

func TestConnectionThatBreaksAtOnceIsNotLoggedAsReconnect(t *testing.T) {
	t.Parallel()
	s := natsServer(t)
	proxy := newProxy(t, s.Addr().String())
	node := startNode(t, "nats://"+proxy.Addr().String(), "chat")
	c := node.dial(t)
	const failures = 3
	proxy.mu.Lock()
	proxy.failures = failures
	proxy.mu.Unlock()
	proxy.restore()
	node.log.wait(t, "reconnected to NATS: 127.0.0.1:", 1)
	c.send(t, "hello")
	c.want(t, "hello")
	if got := node.nc.Stats().Reconnects; got < failures+1 {
		t.Errorf("connected %d times, want %d that fail and one that lasts", got, failures)
	}
	log := node.log.String()
	// The handler of the last failure may run as late as that of the connection that lasts.
	if strings.Contains(log, "NATS: ;") || strings.Count(log, "reconnected to NATS") > 2 {
		t.Errorf("log is %q, want one reconnect, with an address", log)
	}
}

func TestSendersWaitWhileTheHubIsBehind(t *testing.T) {
	const others = incomingSize / 2
	s := natsServer(t)
	relay, listener, _ := joinWithoutHub(t, s.ClientURL())
	nc := otherPublisher(t, s)
	for _, line := range numbered("theirs", others) {
		nc.Publish("chat", []byte(line))
	}
	nc.Flush()
	awaitAll(t, relay) // They are in incoming.

	taken := 0
	for received := 0; received < others/2; {
		select {
		case relay.broadcast <- message:
			taken++
		case call := <-relay.hub.calls:
			call()
			got, want := string(<-listener.send), fmt.Sprint("theirs ", received)
			if got != want {
				t.Fatalf("the hub receives %q, want %q", got, want)
			}
			received++
		}
	}
	if taken != 2 { // one is published, and one waits for the window
		t.Errorf("the relay took %d messages while the hub was behind, want 2", taken)
	}
}

// joinWithoutHub returns a relay whose hub does not run, and that hub's only client.
func joinWithoutHub(t *testing.T, url string) (*Relay, *Client, *logBook) {
	t.Helper()
	relay, book := startRelay(t, url, "chat")
	t.Cleanup(func() { relay.hub.stop(); relay.leave() })
	listener := &Client{hub: relay.hub, send: make(chan []byte, sendQueueSize)}
	relay.hub.clients[listener] = true
	return relay, listener, book
}

// next runs the hub for one message, and returns it. The only client is listener.
func next(listener *Client) string {
	call := <-listener.hub.calls
	call()
	return string(<-listener.send)
}

// awaitAll waits until relay has received all messages that NATS has.
func awaitAll(t testing.TB, relay *Relay) {
	t.Helper()
	relay.nc.Flush()
	eventually(t, "all messages are received", func() bool {
		return testutil.ToFloat64(relay.metrics.received) >= float64(relay.nc.Stats().InMsgs)
	})
}

func TestSlowConsumerIsCountedInTheLog(t *testing.T) {
	const total = incomingSize + 1000
	s := natsServer(t)
	behind, slowListener, book := joinWithoutHub(t, s.ClientURL())
	fast := startNode(t, s.ClientURL(), "chat")
	listener := fast.dial(t)
	lines := numbered("flood", total)
	go func() {
		for _, line := range lines {
			fast.broadcast <- []byte(line)
		}
	}()
	listener.receiveUntil(t, lines[total-1])
	awaitAll(t, behind) // They are received, or dropped.
	dropped := testutil.ToFloat64(behind.metrics.lost[slow])
	if dropped == 0 {
		t.Fatal("nothing was dropped")
	}

	// Now the hub receives again.
	const some = 100 // so that incoming has space for the next messages
	for _, line := range lines[:some] {
		if got := next(slowListener); got != line {
			t.Fatalf("the hub receives %q, want %q", got, line)
		}
	}
	fast.broadcast <- []byte("end")
	received := some
	for line := ""; line != "end"; received++ {
		line = next(slowListener)
	}
	book.wait(t, fmt.Sprintf("NATS: %.0f × %s\n", dropped, slow), 1)
	book.wait(t, fmt.Sprintf("NATS: %d × missed a message\n", total+1-received), 1)
}

func TestLateMessagesAreDiscardedAndGapsCountedOnce(t *testing.T) {
	const probe = ""
	tests := []struct {
		name, node string
		said       int
		text       string
		isNew      bool
		missed     uint64
	}{
		{"the first message of a node that has published many", "a", 7, "seven", true, 0},
		{"the next message", "a", 8, "eight", true, 0},
		{"the same again", "a", 8, "eight", false, 0},
		{"a probe", "a", 9, probe, true, 0},
		{"after the probe", "a", 9, "nine", true, 0},
		{"two are missing", "a", 12, "twelve", true, 2},
		{"one of the two, late", "a", 10, "ten", false, 0},
		{"a late probe", "a", 8, probe, false, 0},
		{"a late message does not reset the number", "a", 13, "thirteen", true, 0},
		{"a probe after a missing message", "a", 15, probe, true, 1},
		{"the missing message, late", "a", 14, "fourteen", false, 0},
		{"the first message of another node", "b", 0, "zero", true, 0},
		{"its next message", "b", 1, "one", true, 0},
	}
	relay := countingRelay()
	for _, test := range tests {
		message := &nats.Msg{Header: numberedBy(test.node, test.said), Data: []byte(test.text)}
		if got := relay.isNew(message); got != test.isNew {
			t.Errorf("%s: new is %t, want %t", test.name, got, test.isNew)
		}
		if got := relay.metrics.counters[missed]; got != test.missed {
			t.Errorf("%s: %d missed, want %d", test.name, got, test.missed)
		}
		clear(relay.metrics.counters)
	}
}

func TestOnlyTheEchoOfAProbeLetsANodePublish(t *testing.T) {
	relay := countingRelay()
	relay.nc, relay.log = new(nats.Conn), log.Default()
	relay.published = 1
	for _, test := range []struct {
		name         string
		before, want state
		node, text   string
	}{
		{"a message, which may be older than the disconnect", mayProbe, mayProbe, "mine", "text"},
		{"the probe of another node", mayProbe, mayProbe, "other", ""},
		{"a probe from before the disconnect", settling, settling, "mine", ""},
		{"a probe", mayProbe, mayPublish, "mine", ""},
	} {
		relay.state = test.before
		relay.isNew(&nats.Msg{Header: numberedBy(test.node, relay.echoed), Data: []byte(test.text)})
		if relay.state != test.want {
			t.Errorf("%s: got state %d, want %d", test.name, relay.state, test.want)
		}
	}
}

// countingRelay returns a relay that can only count messages.
func countingRelay() *Relay {
	r := &Relay{id: "mine", nodes: make(map[string]*sender)}
	r.metrics = newMetrics(r)
	return r
}

// numberedBy returns the headers of a message of node, which has published that many before.
func numberedBy(node string, said any) nats.Header {
	return nats.Header{"Node": {node}, "Said": {fmt.Sprint(said)}}
}

func TestMessagesDelayedByANATSServerAreDiscarded(t *testing.T) {
	t.Parallel()
	const held = 100
	servers, proxies := natsCluster(t, true)
	near := startNode(t, servers[2].ClientURL(), "chat")
	far := startNode(t, servers[0].ClientURL(), "chat")
	sender, listener := near.dial(t), far.dial(t)
	sender.send(t, "before")
	listener.want(t, "before")
	sender.want(t, "before")

	// Their NATS servers are partitioned until near has reconnected to far's.
	for _, proxy := range proxies {
		proxy.blocked[fromNATS].Lock()
		proxy.blocked[toNATS].Lock()
	}
	for _, line := range numbered("delayed", held) {
		near.broadcast <- []byte(line)
		sender.want(t, line)
	}
	near.nc.SetServerPool([]string{servers[0].ClientURL()})
	near.nc.ForceReconnect()
	near.log.wait(t, "reconnected to NATS", 1)
	near.broadcast <- []byte("afterwards")
	listener.want(t, "afterwards")

	received := far.nc.Stats().InMsgs
	for _, proxy := range proxies {
		proxy.blocked[fromNATS].Unlock()
		proxy.blocked[toNATS].Unlock()
	}
	eventually(t, "the delayed messages arrive", func() bool {
		return far.nc.Stats().InMsgs >= received+held
	})
	near.broadcast <- []byte("end")
	listener.want(t, "end")
	far.stop()
	want := fmt.Sprintf("NATS: %d × %s\n", held, missed)
	if got := far.log.String(); !strings.Contains(got, want) || strings.Count(got, missed) != 1 {
		t.Errorf("log is %q, want %q in it, and no other message missed", got, want)
	}
}

func TestIncomingQueueIsBoundedInBytesAndHoldsNoLongMessages(t *testing.T) {
	s := natsServer(t)
	relay, listener, book := joinWithoutHub(t, s.ClientURL())
	nc := otherPublisher(t, s)
	memory := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := memory()
	const long, lines = incomingSize + 1000, incomingSize / 2
	for n := range long {
		nc.Publish("chat", make([]byte, 16<<10)) // 144 MiB in all
		if n%100 == 0 {
			nc.Flush()
			awaitAll(t, relay)
		}
	}
	for _, line := range numbered("after them", lines) {
		nc.Publish("chat", []byte(line))
	}
	nc.Flush()
	awaitAll(t, relay)
	if got, most := memory()-before, uint64(16<<20); got > most {
		t.Errorf("the relay takes %d bytes, want at most %d", got, most)
	}
	for _, want := range numbered("after them", lines) {
		if got := next(listener); got != want {
			t.Fatalf("the hub receives %q, want %q", got, want)
		}
	}
	eventually(t, "all refused messages are counted", func() bool {
		total := 0
		for line := range strings.Lines(book.String()) { // one report a second
			var n int
			if _, err := fmt.Sscanf(line, "NATS: %d × "+refused, &n); err == nil {
				total += n
			}
		}
		return total == long
	})
}

// otherPublisher returns a connection to s that is not a node.
func otherPublisher(t *testing.T, s *server.Server) *nats.Conn {
	t.Helper()
	nc, err := nats.Connect(s.ClientURL())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	return nc
}

func TestMessagesOfOtherPublishersAreCleanedOrRefused(t *testing.T) {
	t.Parallel()
	tests := []struct{ name, sent, want, logged string }{
		{"several lines", "one\ntwo\r\nthree", "one two  three", "cleaned a message from NATS"},
		{"escape sequences", "\x1b[2J\x07bell\x00", "[2J bell", "cleaned a message from NATS"},
		{"white space around", " \u2003around\t", "around", "cleaned a message from NATS"},
		{"nothing but white space", " \r\n", "", "cleaned a message from NATS"},
		{"binary", "\x00\xff\xfe\x80", "", "refused a message"},
		{"a surrogate", "\xed\xa0\x80", "", "refused a message"},
		{"one byte too long", strings.Repeat("x", maxMessageSize+1), "", "refused a message"},
		{"200 kB", strings.Repeat("x", 200<<10), "", "refused a message"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			s, nodes := startRoom(t, 1)
			listener := nodes[0].dial(t)
			nc := otherPublisher(t, s)
			nc.Publish("chat", []byte(test.sent))
			nc.Publish("chat", []byte("end"))
			if test.want != "" {
				listener.want(t, test.want)
			}
			listener.want(t, "end")
			nodes[0].stop()
			got, want := nodes[0].log.String(), "NATS: 1 × "+test.logged
			if !strings.Contains(got, want) || strings.Count(got, " × ") != 1 {
				t.Errorf("log is %q, want one problem: %q", got, test.logged)
			}
		})
	}
}

func TestOtherPublishersCannotFillTheLog(t *testing.T) {
	t.Parallel()
	s, nodes := startRoom(t, 1)
	listener := nodes[0].dial(t)
	nc := otherPublisher(t, s)
	start := time.Now()
	for range 1000 {
		nc.Publish("chat", []byte("\xff"))
	}
	nc.Publish("chat", []byte("end"))
	listener.want(t, "end")
	nodes[0].stop()
	most := 2 + int(time.Since(start)/reportPeriod)
	if got := strings.Count(nodes[0].log.String(), "refused a message"); got == 0 || got > most {
		t.Errorf("%d lines in the log, want 1 to %d", got, most)
	}
}

// guarded starts a NATS server with an account that can use the subject chat only, for
// messages of at most payload bytes, and returns the file with its credentials.
func guarded(t *testing.T, payload int64) (s *server.Server, file string) {
	t.Helper()
	key := func(pair nkeys.KeyPair, err error) (nkeys.KeyPair, string) {
		if err != nil {
			t.Fatal(err)
		}
		public, _ := pair.PublicKey()
		return pair, public
	}
	operator, operatorKey := key(nkeys.CreateOperator())
	account, accountKey := key(nkeys.CreateAccount())
	user, userKey := key(nkeys.CreateUser())
	accountToken, err := jwt.NewAccountClaims(accountKey).Encode(operator)
	if err != nil {
		t.Fatal(err)
	}
	claims := jwt.NewUserClaims(userKey)
	claims.Sub.Allow.Add("chat")
	claims.Limits.Payload = payload
	userToken, err := claims.Encode(account)
	if err != nil {
		t.Fatal(err)
	}
	seed, _ := user.Seed()
	credentials, err := jwt.FormatUserConfig(userToken, seed)
	if err != nil {
		t.Fatal(err)
	}
	file = filepath.Join(t.TempDir(), "user.creds")
	if err := os.WriteFile(file, credentials, 0o600); err != nil {
		t.Fatal(err)
	}
	accounts := new(server.MemAccResolver)
	accounts.Store(accountKey, accountToken)
	options := &server.Options{TrustedKeys: []string{operatorKey}, AccountResolver: accounts}
	return natsWith(t, options), file
}

func TestMessageTooLongForNATSIsLoggedAndBlocksNoOthers(t *testing.T) {
	t.Parallel()
	s := natsServer(t)
	node := startNode(t, s.ClientURL(), "chat")
	c := node.dial(t)
	address := s.Addr().(*net.TCPAddr)
	stopNATS(t, s)
	eventually(t, "the node is disconnected", node.nc.IsReconnecting)
	c.send(t, strings.Repeat("x", maxMessageSize))
	c.send(t, "short")
	natsWith(t, &server.Options{Port: address.Port, MaxPayload: maxMessageSize})
	c.want(t, "short")
	node.log.wait(t, "NATS accepts messages of at most 512 bytes, and has to accept 640: "+
		"longer ones are lost", 1)
	node.log.wait(t, "NATS: 1 × lost a message: it is longer than NATS accepts", 1)
	if !node.ready.Load() {
		t.Error("not ready, want that the node still serves short messages")
	}
}

func TestMaxPayloadLoweredByAReloadCostsLongMessagesOnly(t *testing.T) {
	t.Parallel()
	s := natsServer(t)
	node := startNode(t, s.ClientURL(), "chat")
	c := node.dial(t)
	reload(t, s, &server.Options{MaxPayload: maxMessageSize}) // NATS does not notify the node.
	long := strings.Repeat("x", maxMessageSize)
	c.send(t, long)
	node.log.wait(t, "disconnected from NATS: nats: Maximum Payload Violation", 1)
	c.send(t, "short")
	c.want(t, "short")
	node.log.wait(t, "NATS: 1 × may have lost a message", 1)
	c.send(t, long)
	c.send(t, "short again")
	c.want(t, "short again")
	node.log.wait(t, "NATS: 1 × lost a message: it is longer than NATS accepts", 1)
	if got := strings.Count(node.log.String(), "disconnected from NATS"); got != 1 {
		t.Errorf("disconnected %d times, want once", got)
	}
	restarted := startNode(t, s.ClientURL(), "chat")
	restarted.log.wait(t, "NATS accepts messages of at most 512 bytes", 1)
}

func TestAccountThatLimitsMessagesTooMuchIsLogged(t *testing.T) {
	t.Parallel()
	s, file := guarded(t, payloadSize-1)
	relay, book := startJoining(t, s.ClientURL(), file, "chat")
	awaitJoined(t, relay, book)
	defer relay.leave()
	book.wait(t, "NATS accepts messages of at most 639 bytes, and has to accept 640", 1)
}

func TestCredentialsAreForOneRoom(t *testing.T) {
	t.Parallel()
	s, file := guarded(t, payloadSize)
	tests := []struct{ name, creds, subject, want string }{
		{"without credentials", "", "chat", "Authorization Violation"},
		{"another room", file, "secrets", "permissions violation"},
	}
	for _, test := range tests {
		relay, book := startJoining(t, s.ClientURL(), test.creds, test.subject)
		book.wait(t, test.want, 1)
		if relay.hasJoined.Load() {
			t.Errorf("%s: has joined", test.name)
		}
		relay.leave()
	}
	relay, book := startJoining(t, s.ClientURL(), file, "chat")
	awaitJoined(t, relay, book)
	relay.leave()
}

// allowed returns the options of a NATS server that allows only these subjects.
func allowed(publish, subscribe string) *server.Options {
	return &server.Options{
		NoAuthUser: "any",
		Users: []*server.User{{Username: "any", Permissions: &server.Permissions{
			Publish:   &server.SubjectPermission{Allow: []string{publish}},
			Subscribe: &server.SubjectPermission{Allow: []string{subscribe}},
		}}},
	}
}

// reload changes the options of s.
func reload(t *testing.T, s *server.Server, options *server.Options) {
	t.Helper()
	options.Host, options.Port = "127.0.0.1", s.Addr().(*net.TCPAddr).Port
	options.NoLog, options.NoSigs = true, true
	if err := s.ReloadOptions(options); err != nil {
		t.Fatal(err)
	}
}

func TestNodeReceivesAgainAfterItsPermissionReturns(t *testing.T) {
	t.Parallel()
	s := natsWith(t, allowed("chat", "chat"))
	node := startNode(t, s.ClientURL(), "chat")
	c := node.dial(t)
	reload(t, s, allowed("chat", "nothing"))
	node.log.wait(t, "permissions violation", 1)
	reload(t, s, allowed("chat", "chat")) // NATS does not notify the node.
	eventually(t, "the node is not ready", func() bool { return !node.ready.Load() })
	eventually(t, "the node is ready", node.ready.Load)
	c.send(t, "hello")
	c.want(t, "hello")
}

func TestMessagesWithoutPermissionAreQueued(t *testing.T) {
	t.Parallel()
	s := natsWith(t, allowed("chat", "chat"))
	node := startNode(t, s.ClientURL(), "chat")
	c := node.dial(t)
	reload(t, s, allowed("nothing", "chat"))
	eventually(t, "the node is not ready", func() bool { return !node.ready.Load() })
	node.log.wait(t, "permissions violation", 1)
	c.send(t, "hello")
	reload(t, s, allowed("chat", "chat"))
	c.want(t, "hello")
	eventually(t, "the node is ready", node.ready.Load)
}

func TestInvalidSubjectIsRefused(t *testing.T) {
	long := strings.Repeat("x", maxSubjectSize+1)
	for _, subject := range []string{"", "chat.*", "chat.>", "two words", "chat..", "a\tb", long} {
		const want = "cannot name a room"
		_, err := join(newHub(), nats.Options{}, subject, log.Default())
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.40q: got %v, want an error with %q", subject, err, want)
		}
	}
}

func TestNodeThatNATSRefusesRetriesAndLogsTheReason(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name string
		nats *server.Options
		want string
	}{
		{"no headers", &server.Options{NoHeaderSupport: true}, "headers not supported"},
		{"no publishing", allowed("nothing", "chat"), "Permissions Violation for Publish"},
		{"no subscribing", allowed("chat", "nothing"), "Permissions Violation for Subscription"},
		{"another password", &server.Options{Authorization: "a token"}, "Authorization Violation"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			s := natsWith(t, test.nats)
			relay, book := startJoining(t, s.ClientURL(), "", "chat")
			defer relay.leave()
			book.wait(t, test.want, 1)
			if relay.hasJoined.Load() || relay.ready.Load() {
				t.Error("has joined")
			}
			port := s.Addr().(*net.TCPAddr).Port
			stopNATS(t, s)
			natsWith(t, &server.Options{Port: port})
			awaitJoined(t, relay, book)
		})
	}
}

func TestStartFailsAtNoServerThatOthersReplace(t *testing.T) {
	t.Parallel()
	const password = "hunter2"
	refusing := natsWith(t, &server.Options{Username: "bob", Password: "rotated"})
	accepting := natsWith(t, &server.Options{Username: "bob", Password: password})
	var urls []string
	for _, s := range []*server.Server{refusing, accepting} {
		urls = append(urls, "nats://bob:"+password+"@"+s.Addr().String())
	}
	for range 12 { // nats.go chooses a server at random
		relay, book := startRelay(t, strings.Join(urls, ","), "chat")
		relay.leave()
		if got := book.String(); strings.Contains(got, "violation") {
			t.Errorf("log is %q, want no error", got)
		}
	}
}

func TestNodeUsesNoServersThatItsURLsDoNotName(t *testing.T) {
	t.Parallel()
	servers, _ := natsCluster(t, false)
	near := servers[0].Addr().String()
	node := startNode(t, "nats://"+near, "chat")
	restart := stopNATS(t, servers[0])
	node.log.wait(t, "disconnected from NATS", 1)
	for range 12 { // Each makes nats.go try the next server of its list at once.
		node.nc.ForceReconnect()
		eventually(t, "no server is left", node.nc.IsReconnecting)
	}
	restart()
	node.log.wait(t, "reconnected to NATS: "+near, 1)
	if got := node.nc.Servers(); len(got) != 1 {
		t.Errorf("the node uses %q, want the one server that it was given", got)
	}
}

// natsConfigured starts a NATS server with nats.conf, as edit changes it, on loopback ports,
// and with routes to others.
func natsConfigured(t *testing.T, others string, edit *strings.Replacer) *server.Server {
	t.Helper()
	t.Setenv("CHAT_PASSWORD", "hunter2")
	text, err := os.ReadFile("nats.conf")
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "nats.conf")
	if err := os.WriteFile(file, []byte(edit.Replace(string(text))), 0o600); err != nil {
		t.Fatal(err)
	}
	options, err := server.ProcessConfigFile(file) // as nats-server -t does
	if err != nil {
		t.Fatal(err)
	}
	if options.HTTPPort == 0 {
		t.Error("the options lack the monitoring port")
	}
	routes := options.Cluster
	if routes.PingInterval != 5*time.Second || routes.MaxPingsOut != 2 {
		t.Errorf("pings of routes are %v apart, and %d may be unanswered, want 5 s and 2",
			routes.PingInterval, routes.MaxPingsOut)
	}
	options.Port, options.HTTPPort = 0, 0
	options.Cluster.Host, options.Cluster.Port = "127.0.0.1", server.RANDOM_PORT
	options.Routes = server.RoutesFromStr(others)
	return natsWith(t, options)
}

// natsPair starts two NATS servers with nats.conf, as edit changes it, that are a cluster.
func natsPair(t *testing.T, edit *strings.Replacer) (first, second *server.Server) {
	t.Helper()
	first = natsConfigured(t, "", edit)
	second = natsConfigured(t, "nats://"+first.ClusterAddr().String(), edit)
	eventually(t, "a cluster", func() bool {
		return first.NumRoutes() == routesToEach && second.NumRoutes() == routesToEach
	})
	return first, second
}

func TestTLSLinesOfTheNATSConfigurationAreForNodesAndRoutes(t *testing.T) {
	dir := t.TempDir()
	key, err := ecdsa.GenerateKey(elliptic.P256(), cryptorand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	usage := []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		NotAfter:              time.Now().Add(time.Hour),
		IPAddresses:           []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage:           usage,
		IsCA:                  true,
		BasicConstraintsValid: true,
	}
	signed, err := x509.CreateCertificate(cryptorand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	certificate := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: signed})
	keyBytes, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string][]byte{
		"server.pem":     certificate,
		"ca.pem":         certificate,
		"server-key.pem": pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyBytes}),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	first, second := natsPair(t, strings.NewReplacer("# tls {", "tls {", "/etc/nats", dir))
	varz, err := first.Varz(nil)
	if err != nil {
		t.Fatal(err)
	}
	if cluster := varz.Cluster; !cluster.TLSRequired || !cluster.TLSVerify {
		t.Errorf("TLS of routes: required %t, verified %t", cluster.TLSRequired, cluster.TLSVerify)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(certificate)
	var nodes []*node
	for _, s := range []*server.Server{first, second} {
		options, err := natsOptions("tls://chat:hunter2@"+s.Addr().String(), "", "")
		if err != nil {
			t.Fatal(err)
		}
		// As SSL_CERT_FILE, which a process reads once.
		options.TLSConfig = &tls.Config{RootCAs: roots}
		book := new(logBook)
		relay, err := join(newHub(), options, "chat", log.New(book, "", 0))
		if err != nil {
			t.Fatal(err)
		}
		awaitJoined(t, relay, book)
		if _, err := relay.nc.TLSConnectionState(); err != nil {
			t.Errorf("the node is connected without TLS: %v", err)
		}
		nodes = append(nodes, serveRelay(t, relay, book))
	}
	listener := nodes[1].dial(t)
	nodes[0].broadcast <- []byte("hello")
	listener.want(t, "hello")
}

func TestNATSConfigurationRefusesPasswordsThatItDoesNotReadAsAString(t *testing.T) {
	refused := []string{"123456", "10k", "true", "FALSE", "yes", "no", "On", "off", "$x"}
	// A Secret that kubectl makes of a file has the newline, too.
	for _, password := range append(refused, "x0123456789abcdef\n", "only") {
		t.Setenv("CHAT_PASSWORD", password)
		options, err := server.ProcessConfigFile("nats.conf")
		if slices.Contains(refused, password) {
			if err == nil {
				t.Errorf("%q is accepted, want an error", password)
			}
			continue
		}
		if err != nil {
			t.Errorf("%q: %v", password, err)
		} else if got := options.Users[0].Password; got != strings.TrimSpace(password) {
			t.Errorf("%q is the password %q", password, got)
		}
	}
}

func TestNATSConfigurationAdmitsNodesOnly(t *testing.T) {
	first, second := natsPair(t, strings.NewReplacer())
	if first.JetStreamEnabled() {
		t.Error("JetStream is on, want it off")
	}
	url := func(s *server.Server) string { return "nats://chat:hunter2@" + s.Addr().String() }
	sender, listener := startNode(t, url(first), "chat"), startNode(t, url(second), "chat").dial(t)
	long := strings.Repeat("x", maxMessageSize)
	sender.broadcast <- []byte(long)
	listener.want(t, long)

	tests := []struct{ name, url, subject, want string }{
		{"no password", first.ClientURL(), "chat", "Authorization Violation"},
		{"another room", url(first), "secrets", "permissions violation"},
	}
	for _, test := range tests {
		relay, book := startJoining(t, test.url, "", test.subject)
		book.wait(t, test.want, 1)
		if relay.hasJoined.Load() {
			t.Errorf("%s: has joined", test.name)
		}
		relay.leave()
	}
}
