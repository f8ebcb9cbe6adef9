package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/gorilla/websocket"
)

// A room is a running server, and how to reach it.
type room struct {
	hub    *Hub
	dialer websocket.Dialer
	url    string
}

// newRoom starts a hub and, on listener, its server; the test's end stops both.
func newRoom(t testing.TB, listener net.Listener) *room {
	t.Helper()
	r := &room{hub: newHub(), url: "ws://" + listener.Addr().String() + "/ws"}
	mux := http.NewServeMux()
	mux.HandleFunc("/", serveHome)
	mux.HandleFunc("/ws", func(w http.ResponseWriter, req *http.Request) { serveWs(r.hub, w, req) })
	server := &httptest.Server{Listener: listener, Config: &http.Server{Handler: mux}}
	server.Start()
	ended := make(chan bool)
	go func() { r.hub.run(); close(ended) }()
	t.Cleanup(func() {
		if !isClosed(r.hub.stop) {
			close(r.hub.stop)
		}
		<-ended
		server.Close()
	})
	return r
}

func isClosed(c chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// tcpRoom starts a server on a loopback port.
func tcpRoom(t testing.TB) *room {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return newRoom(t, listener)
}

// pipeRoom starts a server whose connections are net.Pipes: they buffer
// nothing, and a synctest bubble's clock runs while all wait for them.
func pipeRoom(t testing.TB) *room {
	t.Helper()
	listener := newPipeListener()
	r := newRoom(t, listener)
	r.dialer = listener.room().dialer
	return r
}

// A pipeListener accepts net.Pipes.
type pipeListener struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func newPipeListener() *pipeListener {
	return &pipeListener{conns: make(chan net.Conn), closed: make(chan struct{})}
}

// room returns how to reach a server that listens on l.
func (l *pipeListener) room() *room {
	r := &room{url: "ws://pipe/ws"}
	r.dialer.NetDialContext = func(context.Context, string, string) (net.Conn, error) {
		client, server := net.Pipe()
		l.conns <- server
		return client, nil
	}
	return r
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case conn := <-l.conns:
		return conn, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Close() error   { l.once.Do(func() { close(l.closed) }); return nil }
func (l *pipeListener) Addr() net.Addr { return pipeAddr{} }

type pipeAddr struct{}

func (pipeAddr) Network() string { return "pipe" }
func (pipeAddr) String() string  { return "pipe" }

// dial connects a client that closes when the test ends.
func (r *room) dial(t testing.TB) *websocket.Conn {
	t.Helper()
	conn, _, err := r.dialer.Dial(r.url, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func send(t testing.TB, conn *websocket.Conn, messageType int, message string) {
	t.Helper()
	if err := conn.WriteMessage(messageType, []byte(message)); err != nil {
		t.Fatal(err)
	}
}

// wantLines reads lines of chat from conn until it has as many as are wanted.
func wantLines(t testing.TB, conn *websocket.Conn, want ...string) {
	t.Helper()
	var got []string
	for len(got) < len(want) {
		_, message, err := conn.ReadMessage()
		if err != nil {
			t.Fatalf("got %q and then %v, want %q", got, err, want)
		}
		got = append(got, strings.Split(string(message), "\n")...)
	}
	if !slices.Equal(got, want) {
		t.Fatalf("got %q, want %q", got, want)
	}
}

// wantClose reads from conn until it ends, which must be with this code. It
// returns the lines that came before, and the reason.
func wantClose(t testing.TB, conn *websocket.Conn, code int) (lines []string, reason string) {
	t.Helper()
	for {
		_, message, err := conn.ReadMessage()
		if err == nil {
			lines = append(lines, strings.Split(string(message), "\n")...)
			continue
		}
		var closed *websocket.CloseError
		if !errors.As(err, &closed) || closed.Code != code {
			t.Fatalf("connection ended with %v, want close %d", err, code)
		}
		return lines, closed.Text
	}
}

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

func (l *logBook) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// captureLog collects what is logged until the test ends.
func captureLog(t testing.TB) *logBook {
	t.Helper()
	book := new(logBook)
	log.SetOutput(book)
	t.Cleanup(func() { log.SetOutput(io.Discard) })
	return book
}

func TestEverybodyHearsWhatAnybodySaysTheSenderIncluded(t *testing.T) {
	r := tcpRoom(t)
	alice, bob := r.dial(t), r.dial(t)
	send(t, alice, websocket.TextMessage, "hello")
	wantLines(t, alice, "hello")
	wantLines(t, bob, "hello")
}

func TestMessageBecomesOneCleanLine(t *testing.T) {
	r := tcpRoom(t)
	conn := r.dial(t)
	tests := []struct{ sent, want string }{
		{"plain", "plain"},
		{"  around\t\r\n", "around"},
		{"one\ntwo\r\nthree", "one two  three"},
		{"\x1b[2J\x07bell\x00\x7f", "[2J bell"},
		{"C1 \u009b31m and \u0085 next line", "C1  31m and   next line"},
		{"\u00a0\u3000grüße, 世界 👋🏽\u2003", "grüße, 世界 👋🏽"},
		{"<b>not markup</b>", "<b>not markup</b>"},
		{strings.Repeat("x", maxMessageSize), strings.Repeat("x", maxMessageSize)},
	}
	for _, test := range tests {
		send(t, conn, websocket.TextMessage, test.sent)
		wantLines(t, conn, test.want)
	}
}

func TestEmptyMessageIsNotBroadcast(t *testing.T) {
	r := tcpRoom(t)
	conn := r.dial(t)
	for _, blank := range []string{"", " ", "\n", "\x00\x1b\u0085", "\u00a0\u2003"} {
		send(t, conn, websocket.TextMessage, blank)
	}
	send(t, conn, websocket.TextMessage, "something")
	wantLines(t, conn, "something")
}

func TestFragmentedMessageIsOneMessage(t *testing.T) {
	r := tcpRoom(t)
	conn := r.dial(t)
	conn.NetConn().Write(frame(websocket.TextMessage, "one "))
	conn.NetConn().Write(frame(0, ""))
	conn.NetConn().Write(frame(0x80, "line"))
	wantLines(t, conn, "one line")
}

// frame returns a masked frame. RFC 6455 section 5.2. The key is zero, so that
// the payload stands there as it is.
func frame(first byte, payload string) []byte {
	return append([]byte{first, 0x80 | byte(len(payload)), 0, 0, 0, 0}, payload...)
}

// badMessages are the messages that end their sender's connection.
var badMessages = []struct {
	name        string
	messageType int
	message     string
	code        int
}{
	{"binary", websocket.BinaryMessage, "text all the same", websocket.CloseUnsupportedData},
	{"not UTF-8", websocket.TextMessage, "abc\xff\xfe\xfd", websocket.CloseInvalidFramePayloadData},
	{"a surrogate", websocket.TextMessage, "\xed\xa0\x80", websocket.CloseInvalidFramePayloadData},
	{"one byte too long", websocket.TextMessage, strings.Repeat("x", maxMessageSize+1), websocket.CloseMessageTooBig},
	{"2 MB", websocket.TextMessage, strings.Repeat("x", 2<<20), websocket.CloseMessageTooBig},
}

func TestBadMessageEndsItsSenderAlone(t *testing.T) {
	for _, test := range badMessages {
		t.Run(test.name, func(t *testing.T) {
			r := tcpRoom(t)
			sender, other := r.dial(t), r.dial(t)
			send(t, sender, test.messageType, test.message)
			if _, reason := wantClose(t, sender, test.code); reason == "" {
				t.Errorf("close %d came without a reason", test.code)
			}
			r.hub.broadcast <- []byte("still here")
			wantLines(t, other, "still here")
		})
	}
}

func TestBadMessageIsLoggedWithThePeersAddress(t *testing.T) {
	for _, test := range badMessages {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				book := captureLog(t)
				r := pipeRoom(t)
				conn := r.dial(t)
				mute(conn)
				conn.WriteMessage(test.messageType, []byte(test.message)) // cut short if it is long
				synctest.Wait()
				if got, want := book.String(), fmt.Sprintf("pipe: close %d: ", test.code); !strings.Contains(got, want) {
					t.Errorf("log is %q, want %q in it", got, want)
				}
			})
		})
	}
}

func TestBadSenderReadsTheCloseCodeAlsoWhileItSends(t *testing.T) {
	for _, test := range badMessages {
		t.Run(test.name, func(t *testing.T) {
			r := tcpRoom(t)
			for range 20 {
				sender := r.dial(t)
				send(t, sender, test.messageType, test.message)
				send2MB(t, sender)
				wantClose(t, sender, test.code)
				sender.Close()
			}
		})
	}
}

// send2MB sends 2 MB in many messages, and reads nothing meanwhile.
func send2MB(t *testing.T, conn *websocket.Conn) {
	t.Helper()
	message := frame(0x81, strings.Repeat("x", 122))
	if _, err := conn.NetConn().Write(bytes.Repeat(message, 2<<20/len(message))); err != nil {
		t.Fatal(err)
	}
}

func TestBadSenderReadsTheCloseCodeAlsoIfItHasStoppedWriting(t *testing.T) {
	r := tcpRoom(t)
	for range 20 {
		sender := r.dial(t)
		send(t, sender, websocket.BinaryMessage, "")
		sender.NetConn().(*net.TCPConn).CloseWrite()
		wantClose(t, sender, websocket.CloseUnsupportedData)
	}
}

func TestCloseFramesCarryTheirReason(t *testing.T) {
	for _, why := range []*goodbye{shuttingDown, notText, notUTF8, tooBig, fellBehind} {
		if len(why.reason) == 0 || len(why.reason) > 123 {
			t.Errorf("close %d has a reason of %d bytes, want 1 to 123", why.code, len(why.reason))
		}
	}
}

func TestGarbageEndsItsSenderAlone(t *testing.T) {
	tests := []struct {
		name  string
		bytes []byte
		code  int
	}{
		{"unmasked frame", []byte{0x81, 0x01, 'x'}, websocket.CloseProtocolError},
		{"reserved bit", frame(0xc1, "x"), websocket.CloseProtocolError},
		{"reserved opcode", frame(0x83, "x"), websocket.CloseProtocolError},
		{"reserved control opcode", frame(0x8b, "x"), websocket.CloseProtocolError},
		{"fragmented ping", frame(0x09, "x"), websocket.CloseProtocolError},
		{"long ping", []byte{0x89, 0xfe, 0x00, 0x7e}, websocket.CloseProtocolError},
		{"continuation of nothing", frame(0x80, "x"), websocket.CloseProtocolError},
		{"text within a fragmented text", append(frame(0x01, "x"), frame(0x81, "x")...), websocket.CloseProtocolError},
		{"close with a bad code", frame(0x88, "\x00\x01"), websocket.CloseProtocolError},
		{"close with a bad reason", frame(0x88, "\x03\xe8\xff"), websocket.CloseProtocolError},
		{"absurd length", []byte{0x81, 0xff, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0}, websocket.CloseMessageTooBig},
		{"negative length", []byte{0x81, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0}, websocket.CloseMessageTooBig},
		{"fragments too long together", slices.Concat(frame(0x01, strings.Repeat("x", 125)), bytes.Repeat(frame(0, strings.Repeat("x", 125)), 4)), websocket.CloseMessageTooBig},
		{"HTTP", []byte("GET / HTTP/1.1\r\n\r\n"), websocket.CloseProtocolError},
	}
	r := tcpRoom(t)
	other := r.dial(t)
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			sender := r.dial(t)
			sender.NetConn().Write(test.bytes)
			wantClose(t, sender, test.code)
			r.hub.broadcast <- []byte("still here")
			wantLines(t, other, "still here")
		})
	}
}

func TestClientIsInTheRoomBeforeItsHandshakeSucceeds(t *testing.T) {
	hub := newHub()
	go hub.run()
	t.Cleanup(func() { close(hub.stop) })
	var welcome sync.Once
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// What is said at the moment at which the handshake is answered has to
		// reach the client.
		serveWs(hub, onWrite{w, func() {
			welcome.Do(func() { hub.broadcast <- []byte("welcome") })
		}}, r)
	}))
	t.Cleanup(server.Close)
	r := &room{url: "ws" + strings.TrimPrefix(server.URL, "http")}
	wantLines(t, r.dial(t), "welcome")
}

// onWrite makes a ResponseWriter call do before each write on the connection
// that is hijacked from it.
type onWrite struct {
	http.ResponseWriter
	do func()
}

func (w onWrite) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, rw, err := w.ResponseWriter.(http.Hijacker).Hijack()
	return onWriteConn{conn, w.do}, rw, err
}

type onWriteConn struct {
	net.Conn
	do func()
}

func (c onWriteConn) Write(p []byte) (int, error) {
	c.do()
	return c.Conn.Write(p)
}

func TestEveryClientSeesTheSameMessagesInTheSameOrder(t *testing.T) {
	const senders, each = 8, 50
	r := tcpRoom(t)
	seen := make([][]string, senders)
	var clients []*websocket.Conn
	for range senders {
		clients = append(clients, r.dial(t))
	}
	var wg sync.WaitGroup
	for i, conn := range clients {
		wg.Go(func() {
			for n := range each {
				send(t, conn, websocket.TextMessage, fmt.Sprintf("%d says %d", i, n))
			}
		})
		wg.Go(func() {
			for len(seen[i]) < senders*each {
				_, message, err := conn.ReadMessage()
				if err != nil {
					t.Errorf("client %d got %d lines and then %v", i, len(seen[i]), err)
					return
				}
				seen[i] = append(seen[i], strings.Split(string(message), "\n")...)
			}
		})
	}
	wg.Wait()
	for i := range seen {
		if !slices.Equal(seen[i], seen[0]) {
			t.Errorf("client %d saw %q, client 0 saw %q", i, seen[i], seen[0])
		}
	}
	slices.Sort(seen[0])
	if got := len(slices.Compact(seen[0])); got != senders*each {
		t.Errorf("%d different lines, want %d", got, senders*each)
	}
}

func TestClientThatDoesNotReadIsToldToTryAgainLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		book := captureLog(t)
		r := pipeRoom(t)
		stuck := r.dial(t)
		var want []string
		for n := range 1 + sendQueueSize { // one is with writePump
			want = append(want, fmt.Sprint("message ", n))
			r.hub.broadcast <- []byte(want[n])
			synctest.Wait()
		}
		r.hub.broadcast <- []byte("one too many")
		if got, _ := wantClose(t, stuck, websocket.CloseTryAgainLater); !slices.Equal(got, want) {
			t.Errorf("got %q, want %q", got, want)
		}
		synctest.Wait()
		if got, want := book.String(), fellBehind.Error(); !strings.Contains(got, want) {
			t.Errorf("log is %q, want %q in it", got, want)
		}
	})
}

func TestClientThatNeverReadsIsCutOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		book := captureLog(t)
		r := pipeRoom(t)
		r.dial(t)
		r.hub.broadcast <- []byte("nobody takes this")
		time.Sleep(writeWait + closeWait - time.Nanosecond)
		synctest.Wait()
		if got := pumps(); got == 0 {
			t.Error("cut off too early")
		}
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		if got := pumps(); got != 0 {
			t.Errorf("%d pumps still run after writeWait and closeWait", got)
		}
		if got, want := book.String(), fellBehind.Error(); !strings.Contains(got, want) {
			t.Errorf("log is %q, want %q in it", got, want)
		}
	})
}

// pumps counts the pumps that run in synctest bubbles: those of other tests
// may be about to end.
func pumps() (n int) {
	stacks := make([]byte, 1<<20)
	stacks = stacks[:runtime.Stack(stacks, true)]
	for stack := range bytes.SplitSeq(stacks, []byte("\n\n")) {
		if bytes.Contains(stack, []byte("synctest bubble")) && bytes.Contains(stack, []byte("Pump(")) {
			n++
		}
	}
	return n
}

// mute makes conn read, but answer no ping, until it ends.
func mute(conn *websocket.Conn) {
	conn.SetPingHandler(func(string) error { return nil })
	go readAll(conn)
}

// readAll reads from conn until it ends.
func readAll(conn *websocket.Conn) {
	for {
		if _, _, err := conn.NextReader(); err != nil {
			return
		}
	}
}

func TestPeerIsPingedEachPingPeriod(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := pipeRoom(t)
		conn := r.dial(t)
		start := time.Now()
		pings := make(chan time.Duration)
		pong := conn.PingHandler()
		conn.SetPingHandler(func(data string) error { pings <- time.Since(start); return pong(data) })
		go conn.ReadMessage()
		for n := range 5 {
			if got, want := <-pings, pingPeriod*time.Duration(n+1); got != want {
				t.Errorf("ping %d came after %v, want %v", n+1, got, want)
			}
		}
	})
}

func TestWhoAsksForHeartbeatsGetsAnEmptyMessageWithEachPing(t *testing.T) {
	for subprotocol, want := range map[string][]string{
		"":          {`10s "hello"`},
		"other":     {`10s "hello"`},
		"heartbeat": {`10s "hello"`, `54s ""`, `1m48s ""`},
	} {
		t.Run(subprotocol, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := pipeRoom(t)
				r.dialer.Subprotocols = []string{subprotocol}
				conn := r.dial(t)
				start := time.Now()
				conn.SetReadDeadline(start.Add(3*pingPeriod - 1))
				time.AfterFunc(10*time.Second, func() { r.hub.broadcast <- []byte("hello") })
				var got []string
				for {
					_, message, err := conn.ReadMessage()
					if err != nil {
						break
					}
					got = append(got, fmt.Sprintf("%v %q", time.Since(start), message))
				}
				if !slices.Equal(got, want) {
					t.Errorf("got %q, want %q", got, want)
				}
			})
		})
	}
}

func TestSilentPeerIsDroppedAfterPongWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		book := captureLog(t)
		r := pipeRoom(t)
		mute(r.dial(t))
		time.Sleep(pongWait - time.Nanosecond)
		synctest.Wait()
		if got := pumps(); got != 2 {
			t.Errorf("%d pumps run just before pongWait, want 2", got)
		}
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		if got := pumps(); got != 0 {
			t.Errorf("%d pumps run after pongWait, want none", got)
		}
		if got := book.String(); !strings.Contains(got, "timeout") {
			t.Errorf("log is %q, want a timeout in it", got)
		}
	})
}

func TestAnyFrameShowsThatThePeerLives(t *testing.T) {
	tests := []struct {
		name        string
		first, then []byte
	}{
		{"text", frame(0x81, "x"), frame(0x81, "x")},
		{"blank text", frame(0x81, ""), frame(0x81, "")},
		{"ping", frame(0x89, ""), frame(0x89, "")},
		{"pong", frame(0x8a, ""), frame(0x8a, "")},
		{"fragment", frame(0x01, "x"), frame(0x00, "x")},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := pipeRoom(t)
				conn := r.dial(t)
				mute(conn)
				for n := range 5 {
					time.Sleep(pongWait - time.Nanosecond)
					synctest.Wait()
					if pumps() != 2 {
						t.Fatalf("dropped after %d frames", n)
					}
					conn.NetConn().Write(test.first)
					test.first = test.then
				}
				time.Sleep(pongWait)
				synctest.Wait()
				if got := pumps(); got != 0 {
					t.Errorf("%d pumps run pongWait after the last frame, want none", got)
				}
			})
		})
	}
}

func TestClientThatTheRoomHoldsUpIsNotTakenForSilent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := pipeRoom(t)
		front := *r.hub // takes what clients say, and passes nothing on
		front.broadcast = make(chan []byte)
		listener := newPipeListener()
		server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			serveWs(&front, w, r)
		})}
		go server.Serve(listener)
		t.Cleanup(func() { server.Close() })
		conn := listener.room().dial(t)
		mute(conn)
		for range 3 {
			send(t, conn, websocket.TextMessage, "hello")
			time.Sleep(2 * pongWait)
			<-front.broadcast
		}
		synctest.Wait()
		if got := pumps(); got != 2 {
			t.Errorf("%d pumps run, want 2", got)
		}
	})
}

func TestClientIsSlowedToItsRateAndNeverDropped(t *testing.T) {
	tests := []struct {
		name  string
		frame []byte
	}{
		{"messages", frame(0x81, "flood")},
		{"blank messages", frame(0x81, "")},
		{"pings", frame(0x89, "flood")},
		{"pongs", frame(0x8a, "flood")},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := pipeRoom(t)
				conn := r.dial(t)
				mute(conn)
				start := time.Now()
				for n := range 1000 {
					// A pipe buffers nothing: this returns when readPump has read.
					conn.NetConn().Write(test.frame)
					synctest.Wait()
					// After the burst, the pump sleeps before it reads the next.
					want := rateInterval * time.Duration(max(0, n-rateBurst))
					if got := time.Since(start); got != want {
						t.Fatalf("frame %d was read after %v, want %v", n+1, got, want)
					}
				}
				if got := pumps(); got != 2 {
					t.Errorf("%d pumps run, want 2", got)
				}
			})
		})
	}
}

func TestBurstComesBackAfterSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := pipeRoom(t)
		conn := r.dial(t)
		mute(conn)
		burst := func() time.Duration {
			start := time.Now()
			for range rateBurst {
				conn.NetConn().Write(frame(0x81, "x"))
			}
			return time.Since(start)
		}
		for range 3 {
			if got := burst(); got != 0 {
				t.Errorf("a burst took %v, want no time", got)
			}
			time.Sleep(rateBurst * rateInterval)
		}
		burst()
		time.Sleep(rateBurst * rateInterval / 2)
		if got, want := burst(), rateBurst*rateInterval/2-rateInterval; got != want {
			t.Errorf("a burst after half the silence took %v, want %v", got, want)
		}
	})
}

func TestFloodDropsNobody(t *testing.T) {
	const floods, each = 4, 2 * rateBurst
	r := tcpRoom(t)
	var clients []*websocket.Conn
	for range 2 * floods {
		clients = append(clients, r.dial(t))
	}
	var wg sync.WaitGroup
	for i, conn := range clients {
		if i < floods {
			wg.Go(func() {
				for range each {
					send(t, conn, websocket.TextMessage, strings.Repeat("x", maxMessageSize))
				}
			})
		}
		wg.Go(func() {
			for n := 0; n < floods*each; {
				_, message, err := conn.ReadMessage()
				if err != nil {
					t.Errorf("client %d got %d messages and then %v", i, n, err)
					return
				}
				n += 1 + bytes.Count(message, newline)
			}
		})
	}
	wg.Wait()
}

func TestBatchesAreWholeInOneFrameAndBelow32KiB(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := pipeRoom(t)
		conn := r.dial(t)
		var want []string
		for n := range 1 + sendQueueSize {
			want = append(want, fmt.Sprintf("%0*d", maxMessageSize, n))
			r.hub.broadcast <- []byte(want[n])
			synctest.Wait()
		}
		var got []string
		messages := 0
		for ; len(got) < len(want); messages++ {
			header := make([]byte, 4)
			io.ReadFull(conn.NetConn(), header)
			size := int(header[2])<<8 | int(header[3])
			if header[0] != 0x81 || header[1] != 126 || size >= 32<<10 {
				t.Fatalf("message %d starts with % x, want one frame of text below 32 KiB", messages, header)
			}
			text := make([]byte, size)
			io.ReadFull(conn.NetConn(), text)
			got = append(got, strings.Split(string(text), "\n")...)
		}
		if !slices.Equal(got, want) {
			t.Errorf("got %d lines that differ from the %d sent", len(got), len(want))
		}
		if want := 1 + (sendQueueSize*(maxMessageSize+1)+maxBatchSize-1)/maxBatchSize; messages != want {
			t.Errorf("they came in %d messages, want %d", messages, want)
		}
	})
}

func TestLoneMessageIsWrittenWithoutAllocating(t *testing.T) {
	conns := make(chan *websocket.Conn, 1)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		conn, err := upgrader.Upgrade(w, r, nil)
		if err != nil {
			t.Error(err)
		}
		conns <- conn
	}))
	t.Cleanup(server.Close)
	r := &room{url: "ws" + strings.TrimPrefix(server.URL, "http")}
	peer := r.dial(t)
	go io.Copy(io.Discard, peer.NetConn())
	client := &Client{conn: <-conns, send: make(chan []byte, sendQueueSize)}
	t.Cleanup(func() { client.conn.Close() })
	message := make([]byte, maxMessageSize)
	if got := testing.AllocsPerRun(100, func() { client.write(message) }); got != 0 {
		t.Errorf("a message costs %v allocations, want none", got)
	}
}

func TestEveryPumpEndsWithItsClient(t *testing.T) {
	tests := []struct {
		name string
		end  func(*room, *websocket.Conn)
	}{
		{"peer says goodbye", func(r *room, conn *websocket.Conn) {
			conn.WriteMessage(websocket.CloseMessage, websocket.FormatCloseMessage(websocket.CloseNormalClosure, ""))
		}},
		{"peer vanishes", func(r *room, conn *websocket.Conn) { conn.Close() }},
		{"peer is silent", func(r *room, conn *websocket.Conn) { time.Sleep(pongWait) }},
		{"peer breaks a rule", func(r *room, conn *websocket.Conn) {
			conn.WriteMessage(websocket.BinaryMessage, nil)
		}},
		{"peer breaks a rule and goes on", func(r *room, conn *websocket.Conn) {
			for conn.WriteMessage(websocket.BinaryMessage, nil) == nil {
			}
		}},
		{"peer breaks the protocol", func(r *room, conn *websocket.Conn) {
			conn.NetConn().Write(frame(0x8f, ""))
		}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := pipeRoom(t)
				conn := r.dial(t)
				mute(conn)
				synctest.Wait()
				test.end(r, conn)
				time.Sleep(closeWait)
				synctest.Wait()
				if got := pumps(); got != 0 {
					t.Errorf("%d pumps still run", got)
				}
			})
		})
	}
}

func TestNormalCloseIsAnsweredAtOnceAndNotLogged(t *testing.T) {
	for _, code := range []int{websocket.CloseNormalClosure, websocket.CloseGoingAway, websocket.CloseNoStatusReceived} {
		synctest.Test(t, func(t *testing.T) {
			book := captureLog(t)
			r := pipeRoom(t)
			conn := r.dial(t)
			start := time.Now()
			conn.WriteMessage(websocket.CloseMessage, websocket.FormatCloseMessage(code, ""))
			wantClose(t, conn, code)
			if _, err := conn.NetConn().Read(make([]byte, 1)); err != io.EOF {
				t.Errorf("after close %d came %v, want %v", code, err, io.EOF)
			}
			if got := time.Since(start); got != 0 {
				t.Errorf("close %d took %v, want no time", code, got)
			}
			if got := book.String(); got != "" {
				t.Errorf("close %d is logged: %q", code, got)
			}
		})
	}
}

func TestUnregisteredClientIsSentAwayNormally(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := pipeRoom(t)
		conn := r.dial(t)
		synctest.Wait()
		for _, client := range slices.Collect(maps.Keys(r.hub.clients)) {
			r.hub.unregister <- client
		}
		wantClose(t, conn, websocket.CloseNormalClosure)
	})
}

func TestAbnormalCloseIsLoggedWithThePeersAddress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		book := captureLog(t)
		r := pipeRoom(t)
		r.dial(t).Close()
		synctest.Wait()
		if got, want := book.String(), "pipe: websocket: close 1006"; !strings.Contains(got, want) {
			t.Errorf("log is %q, want %q in it", got, want)
		}
	})
}

func TestShutdownDeliversWhatIsQueuedAndThenSaysGoingAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		book := captureLog(t)
		r := pipeRoom(t)
		conn := r.dial(t)
		want := []string{"one", "two", "three"}
		for _, message := range want {
			r.hub.broadcast <- []byte(message)
			synctest.Wait()
		}
		close(r.hub.stop)
		if got, _ := wantClose(t, conn, websocket.CloseGoingAway); !slices.Equal(got, want) {
			t.Errorf("got %q, want %q", got, want)
		}
		synctest.Wait()
		if got := pumps(); got != 0 {
			t.Errorf("%d pumps still run", got)
		}
		if got := book.String(); got != "" {
			t.Errorf("log is %q, want nothing in it for each client", got)
		}
	})
}

func TestShutdownIsReadByIdleAndByBusyClients(t *testing.T) {
	r := tcpRoom(t)
	var clients []*websocket.Conn
	for range 30 {
		clients = append(clients, r.dial(t))
	}
	var wg sync.WaitGroup
	for i, conn := range clients {
		if i < 10 { // these send without pause
			wg.Go(func() {
				for conn.WriteMessage(websocket.TextMessage, []byte("and another thing")) == nil {
				}
			})
		}
		wg.Go(func() { wantClose(t, conn, websocket.CloseGoingAway) })
	}
	close(r.hub.stop)
	wg.Wait()
}

func TestShutdownIsReadByAClientThatSendsBeforeItReads(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := pipeRoom(t)
		sender := r.dial(t)
		close(r.hub.stop)
		synctest.Wait()
		start := time.Now()
		for range 10 * rateBurst {
			sender.NetConn().Write(frame(0x81, "what is sent now is no longer heard"))
			sender.NetConn().Write(frame(0x8a, ""))
		}
		if got := time.Since(start); got != 0 {
			t.Errorf("the client is held up for %v, want it let go", got)
		}
		wantClose(t, sender, websocket.CloseGoingAway)
	})
}

func TestHandshakeDuringShutdownIsRefused(t *testing.T) {
	r := tcpRoom(t)
	last := join(r.hub, 0)
	close(r.hub.stop)
	for range 20 {
		_, response, err := r.dialer.Dial(r.url, nil)
		if err == nil || response.StatusCode != http.StatusServiceUnavailable {
			t.Errorf("dial returned %v, %v; want status 503", response, err)
		}
	}
	r.hub.left <- last
}

func TestRequestThatIsNoHandshakeIsRefused(t *testing.T) {
	r := tcpRoom(t)
	other := r.dial(t)
	handshake := func(edit func(*http.Request)) *http.Request {
		request, _ := http.NewRequest("GET", "http"+strings.TrimPrefix(r.url, "ws"), nil)
		request.Header = http.Header{
			"Connection":            {"Upgrade"},
			"Upgrade":               {"websocket"},
			"Sec-Websocket-Version": {"13"},
			"Sec-Websocket-Key":     {"dGhlIHNhbXBsZSBub25jZQ=="},
		}
		edit(request)
		return request
	}
	tests := []struct {
		name string
		edit func(*http.Request)
		want int
	}{
		{"handshake", func(r *http.Request) {}, http.StatusSwitchingProtocols},
		{"own origin", func(r *http.Request) { r.Header.Set("Origin", "http://"+r.URL.Host) }, http.StatusSwitchingProtocols},
		{"foreign origin", func(r *http.Request) { r.Header.Set("Origin", "http://example.com") }, http.StatusForbidden},
		{"no upgrade", func(r *http.Request) { r.Header = http.Header{} }, http.StatusBadRequest},
		{"no key", func(r *http.Request) { r.Header.Del("Sec-Websocket-Key") }, http.StatusBadRequest},
		{"POST", func(r *http.Request) { r.Method = "POST" }, http.StatusMethodNotAllowed},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			response, err := http.DefaultTransport.RoundTrip(handshake(test.edit))
			if err != nil {
				t.Fatal(err)
			}
			response.Body.Close()
			if response.StatusCode != test.want {
				t.Errorf("got status %d, want %d", response.StatusCode, test.want)
			}
		})
	}
	r.hub.broadcast <- []byte("still here")
	wantLines(t, other, "still here")
}

func TestFailedHandshakeLeavesNothingInTheHub(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hub, _ := startHub(t)
		serveWs(hub, httptest.NewRecorder(), httptest.NewRequest("GET", "/ws", nil))
		synctest.Wait()
		if got := len(hub.clients); got != 0 {
			t.Errorf("the hub has %d clients, want none", got)
		}
	})
}

func TestHomePage(t *testing.T) {
	tests := []struct {
		method, path string
		status       int
		contentType  string
		allow        string
	}{
		{"GET", "/", http.StatusOK, "text/html; charset=utf-8", ""},
		{"HEAD", "/", http.StatusOK, "text/html; charset=utf-8", ""},
		{"GET", "/favicon.ico", http.StatusNotFound, "text/plain; charset=utf-8", ""},
		{"GET", "/index.html", http.StatusNotFound, "text/plain; charset=utf-8", ""},
		{"POST", "/", http.StatusMethodNotAllowed, "text/plain; charset=utf-8", "GET, HEAD"},
		{"DELETE", "/", http.StatusMethodNotAllowed, "text/plain; charset=utf-8", "GET, HEAD"},
	}
	for _, test := range tests {
		t.Run(test.method+" "+test.path, func(t *testing.T) {
			book := captureLog(t)
			rec := httptest.NewRecorder()
			serveHome(rec, httptest.NewRequest(test.method, test.path, nil))
			if rec.Code != test.status {
				t.Errorf("got status %d, want %d", rec.Code, test.status)
			}
			for name, want := range map[string]string{
				"Content-Type": test.contentType, "Allow": test.allow, "X-Content-Type-Options": "nosniff",
			} {
				if got := rec.Header().Get(name); got != want {
					t.Errorf("got %s %q, want %q", name, got, want)
				}
			}
			if got, want := book.String(), test.method+" "+test.path; !strings.Contains(got, want) {
				t.Errorf("log is %q, want %q in it", got, want)
			}
		})
	}
}

func TestContentSecurityPolicyAllowsThePageItsOwnScriptAndStyleAlone(t *testing.T) {
	rec := httptest.NewRecorder()
	serveHome(rec, httptest.NewRequest("GET", "/", nil))
	policy := rec.Header().Get("Content-Security-Policy")
	for _, element := range []string{"script", "style"} {
		found := regexp.MustCompile("(?s)<"+element+"\\b[^>]*>(.*?)</"+element+">").FindAllStringSubmatch(rec.Body.String(), -1)
		if len(found) != 1 {
			t.Fatalf("the page has %d elements %s, want 1", len(found), element)
		}
		hash := sha256.Sum256([]byte(found[0][1]))
		want := element + "-src 'sha256-" + base64.StdEncoding.EncodeToString(hash[:]) + "';"
		if !strings.Contains(policy, want) {
			t.Errorf("policy is %q, want %q in it", policy, want)
		}
	}
	for _, want := range []string{"default-src 'none'", "connect-src 'self'", "frame-ancestors 'none'"} {
		if !strings.Contains(policy, want) {
			t.Errorf("policy is %q, want %q in it", policy, want)
		}
	}
	if strings.Contains(policy, "unsafe") {
		t.Errorf("policy is %q, want nothing unsafe in it", policy)
	}
}

// startRun calls run with a free port and returns the page's address as logged,
// how to end it, and what it returns.
func startRun(t *testing.T) (url string, cancel func(), result chan error) {
	t.Helper()
	logged, w := io.Pipe()
	log.SetOutput(w)
	t.Cleanup(func() { log.SetOutput(io.Discard) })
	ctx, cancel := context.WithCancel(t.Context())
	result = make(chan error, 1)
	go func() { result <- run(ctx, "127.0.0.1:0") }()
	line, err := bufio.NewReader(logged).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	go io.Copy(io.Discard, logged)
	return regexp.MustCompile("http://.*/").FindString(line), cancel, result
}

func TestRunServesUntilItIsToldToStop(t *testing.T) {
	url, cancel, result := startRun(t)
	response, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	response.Body.Close()
	if response.StatusCode != http.StatusOK {
		t.Errorf("got status %d, want 200", response.StatusCode)
	}
	r := &room{url: "ws" + strings.TrimPrefix(url, "http") + "ws"}
	conn := r.dial(t)
	send(t, conn, websocket.TextMessage, "hello")
	wantLines(t, conn, "hello")
	cancel()
	wantClose(t, conn, websocket.CloseGoingAway)
	if err := <-result; err != nil {
		t.Errorf("run returned %v, want nil", err)
	}
	if _, err := http.Get(url); err == nil {
		t.Error("the server still listens after run has returned")
	}
}

func TestRunReturnsWhyItCannotListen(t *testing.T) {
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	for addr, want := range map[string]string{
		busy.Addr().String(): "address already in use",
		"nonsense":           "missing port",
		":99999":             "invalid port",
	} {
		if err := run(t.Context(), addr); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("run on %q returned %v, want %q in it", addr, err, want)
		}
	}
}

func TestServeReturnsInTimeEvenIfAClientIsStuck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		book := captureLog(t)
		listener := newPipeListener()
		ctx, cancel := context.WithCancel(t.Context())
		result := make(chan error, 1)
		go func() { result <- serve(ctx, listener) }()
		r := listener.room()
		stuck, sender := r.dial(t), r.dial(t)
		send(t, sender, websocket.TextMessage, "the stuck one does not take this")
		synctest.Wait()
		start := time.Now()
		cancel()
		wantClose(t, sender, websocket.CloseGoingAway)
		if err := <-result; err != nil {
			t.Errorf("serve returned %v, want nil", err)
		}
		if got := time.Since(start); got != shutdownWait {
			t.Errorf("serve returned after %v, want %v", got, shutdownWait)
		}
		if got, want := book.String(), "leaving clients behind"; !strings.Contains(got, want) {
			t.Errorf("log is %q, want %q in it", got, want)
		}
		stuck.Close()
	})
}

func TestServeReturnsAtOnceIfEverybodyLeaves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		listener := newPipeListener()
		ctx, cancel := context.WithCancel(t.Context())
		result := make(chan error, 1)
		go func() { result <- serve(ctx, listener) }()
		r := listener.room()
		for range 10 {
			mute(r.dial(t))
		}
		start := time.Now()
		cancel()
		if err := <-result; err != nil {
			t.Errorf("serve returned %v, want nil", err)
		}
		if got := time.Since(start); got != 0 {
			t.Errorf("serve returned after %v, want at once", got)
		}
	})
}

func TestServeReturnsWhyItNoLongerListens(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		listener := newPipeListener()
		listener.Close()
		if err := serve(t.Context(), listener); !errors.Is(err, net.ErrClosed) {
			t.Errorf("serve returned %v, want %v", err, net.ErrClosed)
		}
	})
}

// wantCleanLines reads what the room sees until the line end, and checks it.
func wantCleanLines(t *testing.T, conn *websocket.Conn, end string) {
	t.Helper()
	for {
		_, message, err := conn.ReadMessage()
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.SplitSeq(string(message), "\n") {
			if line == end {
				return
			}
			if !utf8.ValidString(line) || line == "" || line != strings.TrimSpace(line) ||
				len(line) > maxMessageSize || strings.ContainsFunc(line, unicode.IsControl) {
				t.Errorf("the room sees %q", line)
			}
		}
	}
}

// end is longer than what any client may say.
var end = strings.Repeat("end", maxMessageSize)

func FuzzMessage(f *testing.F) {
	f.Add(true, []byte("hello"))
	f.Add(false, []byte("hello"))
	f.Add(true, []byte(" \x00\u0085\u00a0\n\xff"))
	f.Add(true, bytes.Repeat([]byte("x"), maxMessageSize+1))
	r := tcpRoom(f)
	other := r.dial(f)
	f.Fuzz(func(t *testing.T, text bool, message []byte) {
		conn := r.dial(t)
		messageType := websocket.BinaryMessage
		if text {
			messageType = websocket.TextMessage
		}
		send(t, conn, messageType, string(message))
		conn.WriteMessage(websocket.CloseMessage, nil)
		readAll(conn)
		r.hub.broadcast <- []byte(end)
		wantCleanLines(t, other, end)
	})
}

func FuzzBytes(f *testing.F) {
	f.Add(frame(0x81, "hello"))
	f.Add(append(frame(0x01, "hel"), frame(0x80, "lo")...))
	f.Add(append(frame(0x89, "ping"), frame(0x88, "\x03\xe8bye")...))
	f.Add([]byte{0x81, 0xff, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0})
	r := tcpRoom(f)
	other := r.dial(f)
	f.Fuzz(func(t *testing.T, sent []byte) {
		conn := r.dial(t)
		conn.NetConn().Write(sent)
		conn.NetConn().(*net.TCPConn).CloseWrite()
		readAll(conn)
		r.hub.broadcast <- []byte(end)
		wantCleanLines(t, other, end)
	})
}

func BenchmarkBroadcast(b *testing.B) {
	for _, n := range []int{1, 100, 1000} {
		b.Run(fmt.Sprintf("clients=%d", n), func(b *testing.B) {
			r := tcpRoom(b)
			message := []byte("a line of chat, about as long as people write them")
			var received sync.WaitGroup
			for range n {
				conn := r.dial(b).NetConn() // reads bytes, so as to cost little itself
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

func TestThePageKnowsThePingPeriod(t *testing.T) {
	ms := pingPeriod.Milliseconds()
	if want := fmt.Sprintf("const pingPeriod = %d_%03d;", ms/1000, ms%1000); !strings.Contains(home, want) {
		t.Errorf("home.html does not say %q", want)
	}
}

func TestThePageHasTheLimitOnce(t *testing.T) {
	want := fmt.Sprintf("const maxMessageSize = %d;", maxMessageSize)
	if !strings.Contains(home, want) {
		t.Errorf("home.html does not say %q", want)
	}
	if got := len(regexp.MustCompile(fmt.Sprintf(`\b%d\b`, maxMessageSize)).FindAllString(home, -1)); got != 1 {
		t.Errorf("home.html states the limit %d times, want once", got)
	}
}
