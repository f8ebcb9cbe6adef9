package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/gorilla/websocket"
)

// These tests do to a copy of the server what people do to theirs, and run it. The
// changes are diffs without line numbers: to be read, and to be copied.

// Two rooms as README.md shows them, in a module of the oldest Go that it names.
// (With go 1.21 they would be one, as all rounds of a loop share their variables.)
func TestCopyWithTheTwoRoomsOfTheREADME(t *testing.T) {
	t.Parallel()
	readme, err := os.ReadFile(filepath.Join("..", "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, lines, _ := strings.Cut(string(readme), "\n    hubs := ")
	lines, _, _ = strings.Cut(lines, "\n\n")
	start, broadcast := "hubs := "+lines, regexp.MustCompile(`(?m)^    hub\.do\(.*$`).FindString(string(readme))
	if lines == "" || broadcast == "" {
		t.Fatal("README.md does not show two rooms and a broadcast")
	}
	s := startCopy(t, `
--- go.mod
-go 1.25
+go 1.22
--- main.go
-	return serve(ctx, listener)
+	return serveTwo(ctx, listener)
--- two.go
+package main
+import (
+	"context"
+	"net"
+	"net/http"
+	"sync"
+)
+func serveTwo(ctx context.Context, listener net.Listener) error {
+	mux := http.NewServeMux()
+	var running sync.WaitGroup
+	`+strings.ReplaceAll(start, "\n", "\n+")+`
+	server := &http.Server{Handler: mux}
+	context.AfterFunc(ctx, func() { server.Close() })
+	server.Serve(listener)
+	hub := hubs["/kitchen/ws"]
+`+broadcast+`
+	for _, hub := range hubs {
+		hub.stop()
+	}
+	running.Wait()
+	return nil
+}
`)
	kitchen, garden := s.dialTo(t, "/kitchen/ws"), s.dialTo(t, "/garden/ws")
	say(t, kitchen, "soup")
	wantLines(t, kitchen, "soup")
	say(t, garden, "roses")
	wantLines(t, garden, "roses")

	s.signal(t, syscall.SIGTERM)
	wantLines(t, kitchen, "Dinner is ready.")
	wantEnd(t, kitchen, websocket.CloseGoingAway)
	wantEnd(t, garden, websocket.CloseGoingAway)
	s.wantExit(t, time.Now(), patience)
}

// Each line of code in README.md's table of what people change stands in these tests,
// or in those beside the code, and so is known to work.
func TestCopiesDoWhatTheTableOfTheREADMESays(t *testing.T) {
	t.Parallel()
	var tests []string // their words
	for _, name := range []string{"copy_test.go", "../hub_test.go", "../client_test.go"} {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		tests = append(tests, strings.Fields(string(text))...)
	}
	readme, err := os.ReadFile(filepath.Join(root, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, table, found := strings.Cut(string(readme), "\n| To | Write |\n")
	table, _, _ = strings.Cut(table, "\n\n")
	lines := 0
	for _, code := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(table, -1) {
		if !strings.Contains(code[1], " ") {
			continue // a name
		}
		lines++
		if !strings.Contains(strings.Join(tests, " "), code[1]) {
			t.Errorf("no test has this line: %s", code[1])
		}
	}
	if !found || lines < 9 {
		t.Errorf("the table shows %d lines of code", lines)
	}
}

// whoIsHere has a handler ask run how many clients there are.
const whoIsHere = `
--- main.go
 	mux.HandleFunc("/", serveHome)
+	mux.HandleFunc("/clients", func(w http.ResponseWriter, r *http.Request) {
+		connected := 0
+		hub.do(func() { connected = len(hub.clients) })
+		fmt.Fprint(w, connected)
+	})
@@
 	"flag"
+	"fmt"
`

// Many rooms in one hub: the map is run's, which fills it where it receives from
// register, and cleans it in drop.
func TestCopyWithRoomsInOneHub(t *testing.T) {
	t.Parallel()
	s := startCopy(t, `
--- hub.go
 	clients map[*Client]bool
+	rooms   map[string]map[*Client]bool // none of them empty
@@
 		clients:    make(map[*Client]bool),
+		rooms:      make(map[string]map[*Client]bool),
@@
 				open[client] = true
+				if h.rooms[client.room] == nil {
+					h.rooms[client.room] = make(map[*Client]bool)
+				}
+				h.rooms[client.room][client] = true
@@
 		delete(h.clients, client)
+		delete(h.rooms[client.room], client)
+		if len(h.rooms[client.room]) == 0 {
+			delete(h.rooms, client.room)
+		}
@@
-			h.deliver(message)
+			h.deliver(h.clients, message) // to all rooms
@@
-func (h *Hub) deliver(message []byte) {
+func (h *Hub) deliver(room map[*Client]bool, message []byte) {
 	crowded := false
-	for client := range h.clients {
+	for client := range room {
--- client.go
 	conn *websocket.Conn
+	room string
@@
-	client := &Client{hub: hub, conn: conn, send: make(chan []byte, sendQueueSize)}
+	client := &Client{hub: hub, room: r.FormValue("room"), conn: conn, send: make(chan []byte, sendQueueSize)}
@@
-		c.hub.broadcast <- line
+		c.hub.do(func() { c.hub.deliver(c.hub.rooms[c.room], line) })
`, strings.ReplaceAll(whoIsHere, "clients", "rooms"))
	cook, eater, gardener := s.dialTo(t, "/ws?room=kitchen"), s.dialTo(t, "/ws?room=kitchen"), s.dialTo(t, "/ws?room=garden")
	say(t, cook, "soup")
	wantLines(t, cook, "soup")
	say(t, gardener, "roses")
	wantLines(t, gardener, "roses")
	leave(t, gardener)
	if got := s.get(t, "/rooms"); got != "1" {
		t.Errorf("there are %s rooms, want only the kitchen", got)
	}
	leave(t, cook)
	say(t, eater, "more soup")
	wantLines(t, eater, "soup", "more soup")
}

// users has run know its clients by the ID of their user. Here the peer says who it
// is; a server that has to be sure takes that from a login, as rooms/ does.
const users = `
--- hub.go
 	clients map[*Client]bool
+	users   map[string]*Client // the newest client of each
@@
 		clients:    make(map[*Client]bool),
+		users:      make(map[string]*Client),
@@
 				open[client] = true
+				h.users[client.user] = client
@@
 		delete(h.clients, client)
+		if h.users[client.user] == client { // and not a newer one
+			delete(h.users, client.user)
+		}
--- client.go
 	conn *websocket.Conn
+	user string
@@
-	client := &Client{hub: hub, conn: conn, send: make(chan []byte, sendQueueSize)}
+	client := &Client{hub: hub, user: r.FormValue("user"), conn: conn, send: make(chan []byte, sendQueueSize)}
`

// Handlers tell one user something, say who is here, and send one away. If there is
// no such user, the client is nil, and queue and drop do nothing. Handlers may outlive
// the hub, and do not wait for it then.
func TestCopyWithHandlersThatReachOneUser(t *testing.T) {
	t.Parallel()
	s := startCopy(t, users, `
--- main.go
 	mux.HandleFunc("/", serveHome)
+	mux.HandleFunc("/notify", func(w http.ResponseWriter, r *http.Request) {
+		user, line := r.FormValue("user"), clean([]byte(r.FormValue("line")))
+		hub.do(func() { hub.queue(hub.users[user], line) })
+	})
+	mux.HandleFunc("/here", func(w http.ResponseWriter, r *http.Request) {
+		var users []string
+		hub.do(func() { users = slices.Sorted(maps.Keys(hub.users)) })
+		fmt.Fprint(w, users)
+	})
+	mux.HandleFunc("/away", func(w http.ResponseWriter, r *http.Request) {
+		user, reason := r.FormValue("user"), &websocket.CloseError{Code: 4000, Text: "come back with a ticket"}
+		hub.do(func() { hub.drop(hub.users[user], reason) })
+	})
+	mux.HandleFunc("/close", func(w http.ResponseWriter, r *http.Request) {
+		hub.stop()
+		<-disconnected
+	})
@@
 	"flag"
+	"fmt"
 	"log"
+	"maps"
@@
 	"os/signal"
+	"slices"
@@
 	"time"
+
+	"github.com/gorilla/websocket"
`)
	hans, older, newer := s.dialTo(t, "/ws?user=hans"), s.dialTo(t, "/ws?user=grete"), s.dialTo(t, "/ws?user=grete")
	s.get(t, "/notify?user=nobody&line=dinner")
	s.get(t, "/away?user=nobody")
	s.get(t, "/notify?user=grete&line=dinner")
	wantLines(t, newer, "dinner")
	leave(t, older)
	s.get(t, "/notify?user=grete&line=at%0Asix")
	wantLines(t, newer, "at six")
	if got := s.get(t, "/here"); got != "[grete hans]" {
		t.Errorf("%s are here, want Grete and Hans", got)
	}
	s.get(t, "/away?user=grete")
	wantEnd(t, newer, 4000)
	if got := s.get(t, "/here"); got != "[hans]" {
		t.Errorf("%s are here, want Hans", got)
	}
	say(t, hans, "alone")
	wantLines(t, hans, "alone")

	go discard(hans)
	for _, path := range []string{"/close", "/notify?user=hans&line=late", "/here", "/away?user=hans"} {
		s.get(t, path)
	}
}

// A user has one connection, the last one. Only a peer that is let in registers, so
// nobody else can send the user's earlier connection away.
func TestCopyInWhichTheLastConnectionOfAUserWins(t *testing.T) {
	t.Parallel()
	s := startCopy(t, users, `
--- hub.go
+				h.drop(h.users[client.user], elsewhere)
 				h.users[client.user] = client
@@
+var elsewhere = &websocket.CloseError{Code: 4001, Text: "you have connected elsewhere"}
 func newHub() *Hub {
`)
	first := s.dialTo(t, "/ws?user=grete")
	s.get(t, "/ws?user=grete")
	foreign := http.Header{"Origin": {"http://elsewhere.example"}}
	if conn, _, err := websocket.DefaultDialer.Dial("ws://"+s.addr+"/ws?user=grete", foreign); err == nil {
		conn.Close()
		t.Fatal("a page of another site is let in")
	}
	say(t, first, "still here")
	wantLines(t, first, "still here")

	second := s.dialTo(t, "/ws?user=grete")
	wantEnd(t, first, 4001)
	third := s.dialTo(t, "/ws?user=grete")
	wantEnd(t, second, 4001)
	say(t, third, "here")
	wantLines(t, third, "here")
}

// run has a second source in its select: what the operator types. Who sends to it
// may outlive the hub.
func TestCopyWithASecondSource(t *testing.T) {
	t.Parallel()
	cmd := exec.Command(buildIn(t, copyOf(t, root, `
--- hub.go
 	clients map[*Client]bool
+	console chan []byte // from the operator
@@
 		clients:    make(map[*Client]bool),
+		console:    make(chan []byte),
@@
 			h.deliver(message)
+		case line := <-h.console:
+			h.deliver(append([]byte("Operator: "), line...))
--- main.go
 	go func() { hub.run(); close(disconnected) }()
+	go func() {
+		for typed := bufio.NewScanner(os.Stdin); typed.Scan(); {
+			select {
+			case hub.console <- clean(typed.Bytes()):
+			case <-hub.stopped:
+				return
+			}
+		}
+	}()
@@
 import (
+	"bufio"
`)), "-addr", ownHost("localhost:0"))
	console, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	s := startCommand(t, cmd)
	grete, hans := s.dial(t), s.dial(t)
	io.WriteString(console, "We close at six.\n")
	wantLines(t, grete, "Operator: We close at six.")
	say(t, grete, "So soon?")
	wantLines(t, grete, "So soon?")
	wantLines(t, hans, "Operator: We close at six.", "So soon?")

	go io.Copy(console, strings.NewReader(strings.Repeat("Go home.\n", 1e6)))
	if _, _, err := hans.ReadMessage(); err != nil {
		t.Fatal(err)
	}
	go discard(hans)
	s.signal(t, syscall.SIGTERM)
	wantEnd(t, grete, websocket.CloseGoingAway)
	s.wantExit(t, time.Now(), patience)
}

// A goroutine of a copy's own that outlives the hub ends all the same, as it looks at
// stopped.
func TestCopyWithAClockEnds(t *testing.T) {
	t.Parallel()
	s := startCopy(t, `
--- main.go
 	go func() { hub.run(); close(disconnected) }()
+	var clock sync.WaitGroup
+	clock.Go(func() {
+		for now := range time.Tick(10 * time.Millisecond) {
+			if !hub.do(func() { hub.deliver([]byte(now.Format("15:04:05.00"))) }) {
+				return
+			}
+		}
+	})
@@
 		logSoon("exiting: some clients are still connected after %v", shutdownWait)
 	}
+	clock.Wait()
@@
 	"strings"
+	"sync"
`)
	conn := s.dial(t)
	for range 3 {
		if _, line, err := conn.ReadMessage(); err != nil || !bytes.Contains(line, []byte(":")) {
			t.Fatalf("the clock says %q, %v", line, err)
		}
	}
	s.signal(t, syscall.SIGTERM)
	wantEnd(t, conn, websocket.CloseGoingAway)
	s.wantExit(t, time.Now(), patience)
}

// readPump has run queue its answer, and needs no select, as run receives until
// readPump has ended. Who asks and does not read falls behind, and nobody else
// notices.
func TestCopyThatAnswersDropsWhoDoesNotRead(t *testing.T) {
	t.Parallel()
	s := startCopy(t, `
--- client.go
+	case bytes.HasPrefix(line, []byte("?")):
+		reply := bytes.Repeat([]byte("Yes. "), 100)
+		c.tell(reply)
 	case len(line) > 0:
@@
-	rateInterval = 10 * time.Millisecond
+	rateInterval = 10 * time.Microsecond
`, whoIsHere)
	deaf, talker := s.dial(t), s.dial(t)
	go ask(deaf)
	for start := time.Now(); s.get(t, "/clients") != "1"; {
		say(t, talker, "Well?")
		wantLines(t, talker, "Well?")
		if time.Since(start) > patience {
			t.Fatal("nobody is dropped")
		}
	}
	say(t, talker, "?")
	wantLines(t, talker, strings.Repeat("Yes. ", 100))
	wantEnd(t, deaf, websocket.CloseTryAgainLater)
}

// Upstream has no door to run, and a copy of it sends its answers to send. The hub
// closes that when it is full, and the process ends for everybody.
func TestCopyOfUpstreamThatAnswersIsEndedByWhoDoesNotRead(t *testing.T) {
	t.Parallel()
	s := startUpstream(t, `
--- client.go
+		if bytes.HasPrefix(message, []byte("?")) {
+			c.send <- bytes.Repeat([]byte("Yes. "), 100)
+			continue
+		}
 		c.hub.broadcast <- message
`)
	deaf, talker := s.dial(t), s.dial(t)
	go ask(deaf)
	for err := error(nil); err == nil; {
		if err = talker.WriteMessage(websocket.TextMessage, []byte("Well?")); err == nil {
			_, _, err = talker.ReadMessage()
		}
	}
	if state := s.wait(t); state.Success() || !strings.Contains(s.log.String(), "send on closed channel") {
		t.Errorf("upstream ended with %v:\n%s", state, s.log)
	}
}

// ask asks without end, and reads no answer.
func ask(conn *websocket.Conn) {
	for conn.WriteMessage(websocket.TextMessage, []byte("?")) == nil {
	}
}

// Each message is one JSON document, as writePump joins none, and a subprotocol says so.
// What came in many lines goes out in one.
func TestCopyWithOneJSONDocumentAMessage(t *testing.T) {
	t.Parallel()
	s := startCopy(t, `
--- client.go
 	w.Write(message)
-	for free := maxBatchSize - len(message); len(c.send) > 0 && free >= len(newline)+maxMessageSize; {
-		message = <-c.send
-		w.Write(newline)
-		w.Write(message)
-		free -= len(newline) + len(message)
-	}
 	return w.Close()
@@
-	Subprotocols:    []string{heartbeat},
+	Subprotocols:    []string{heartbeat, "json"},
`)
	dialer := websocket.Dialer{Subprotocols: []string{"json"}}
	talker, reader := dial(t, &dialer, "ws://"+s.addr+"/ws"), dial(t, &dialer, "ws://"+s.addr+"/ws")
	if got := reader.Subprotocol(); got != "json" {
		t.Errorf("the subprotocol is %q, want json", got)
	}
	const n = 120
	for i := range n {
		say(t, talker, fmt.Sprintf("{\n\t\"n\": %d\n}", i))
	}
	for _, conn := range []*websocket.Conn{talker, reader} {
		for i := range n {
			var document struct{ N int }
			conn.SetReadDeadline(time.Now().Add(patience))
			if err := conn.ReadJSON(&document); err != nil || document.N != i {
				t.Fatalf("message %d is %v, %v", i, document, err)
			}
		}
	}
}

// Binary messages of 8 MiB, compressed if the peer can do that. Only 16 wait for a
// client, as 256 would be 2 GiB. writeBatch joins none, since maxBatchSize has no room
// for another one. Text comes out as binary, too.
func TestCopyWithCompressedBinaryMessagesOf8MiB(t *testing.T) {
	t.Parallel()
	s := startCopy(t, `
--- client.go
-	maxMessageSize = 512
+	maxMessageSize = 8 << 20
@@
-	sendQueueSize = 256
+	sendQueueSize = 16
@@
-	ReadBufferSize:  512,
+	ReadBufferSize:    512,
+	EnableCompression: true,
@@
-	case messageType != websocket.TextMessage:
-		c.end(errBinary)
+	case messageType == websocket.BinaryMessage:
+		c.hub.broadcast <- message
@@
-	w, err := c.conn.NextWriter(websocket.TextMessage)
+	w, err := c.conn.NextWriter(websocket.BinaryMessage)
`)
	talker, reader := s.dialCompressing(t), s.dialCompressing(t)
	image := make([]byte, 8<<20)
	rand.NewChaCha8([32]byte{}).Read(image[:len(image)/2])
	send(t, talker, image)
	for _, conn := range []*websocket.Conn{talker, reader} {
		conn.SetReadDeadline(time.Now().Add(patience))
		if kind, got, err := conn.ReadMessage(); kind != websocket.BinaryMessage || !bytes.Equal(got, image) {
			t.Fatalf("a message of kind %d and of %d bytes arrives, not the same: %v", kind, len(got), err)
		}
	}
	// It is its size that counts, not how small it can be made.
	send(t, talker, make([]byte, len(image)+1))
	wantEnd(t, talker, websocket.CloseMessageTooBig)

	const n = 20
	for range n {
		send(t, reader, []byte("\xff\n"))
	}
	for range n {
		if _, got, err := reader.ReadMessage(); string(got) != "\xff\n" {
			t.Fatalf("a client reads %q, %v", got, err)
		}
	}
}

// Upstream's limit is for what a message takes when it is compressed.
func TestCopyOfUpstreamWithCompressionLetsAnySizePass(t *testing.T) {
	t.Parallel()
	s := startUpstream(t, `
--- client.go
 	WriteBufferSize: 1024,
+	EnableCompression: true,
`)
	talker, reader := s.dialCompressing(t), s.dialCompressing(t)
	const limit = 512
	send(t, talker, bytes.Repeat([]byte("x"), 100*limit))
	if _, got, err := reader.ReadMessage(); len(got) <= limit {
		t.Errorf("upstream passes on %d bytes, %v", len(got), err)
	}
}

// dialCompressing connects a client that compresses what it sends.
func (s *server) dialCompressing(t *testing.T) *websocket.Conn {
	t.Helper()
	conn, answer, err := (&websocket.Dialer{EnableCompression: true}).Dial("ws://"+s.addr+"/ws", nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if got := answer.Header.Get("Sec-WebSocket-Extensions"); !strings.HasPrefix(got, "permessage-deflate") {
		t.Fatalf("the server agrees to %q, want compression", got)
	}
	return conn
}

// send sends one binary message.
func send(t *testing.T, conn *websocket.Conn, message []byte) {
	t.Helper()
	if err := conn.WriteMessage(websocket.BinaryMessage, message); err != nil {
		t.Fatal(err)
	}
}

// run says who comes and who leaves. When it receives from register, the client has
// its conn, and when it receives from left, it still has. (To say that in drop would
// change the order of messages, as drop can be called in the middle of one.)
func TestCopyThatSaysWhoComesAndLeaves(t *testing.T) {
	t.Parallel()
	s := startCopy(t, `
--- hub.go
 				open[client] = true
+				h.deliver([]byte(client.conn.RemoteAddr().String() + " has come"))
@@
 			delete(open, client)
+			h.deliver([]byte(client.conn.RemoteAddr().String() + " has left"))
`)
	grete := s.dial(t)
	wantLines(t, grete, grete.LocalAddr().String()+" has come")
	s.get(t, "/ws") // answered with 400, and nobody comes
	hans := s.dial(t)
	wantLines(t, hans, hans.LocalAddr().String()+" has come")
	leave(t, hans)
	wantLines(t, grete, hans.LocalAddr().String()+" has come", hans.LocalAddr().String()+" has left")
}

// hub.go and client.go are a package of their own. One more file says what others may
// call; nothing else changes in the two but the package's name.
func TestCopyInAPackageOfItsOwn(t *testing.T) {
	t.Parallel()
	dir := copyOf(t, root, `
--- go.mod
-module chat
+module example.com/game
--- hub.go
-package main
+package chat
--- client.go
-package main
+package chat
--- chat/chat.go
+package chat
+
+import "net/http"
+
+func NewHub() *Hub    { return newHub() }
+func (h *Hub) Run()  { h.run() }
+func (h *Hub) Stop() { h.stop() }
+
+func (h *Hub) ServeHTTP(w http.ResponseWriter, r *http.Request) { serveWs(h, w, r) }
--- main.go
-	hub := newHub()
+	hub := chat.NewHub()
@@
-	go func() { hub.run(); close(disconnected) }()
+	go func() { hub.Run(); close(disconnected) }()
@@
-	mux.HandleFunc("/ws", func(w http.ResponseWriter, r *http.Request) { serveWs(hub, w, r) })
+	mux.Handle("/ws", hub)
@@
-	hub.stop()
+	hub.Stop()
@@
 	"time"
+
+	"example.com/game/chat"
 )
`)
	for _, name := range []string{"hub.go", "client.go"} {
		if err := os.Rename(filepath.Join(dir, name), filepath.Join(dir, "chat", name)); err != nil {
			t.Fatal(err)
		}
	}
	s := startCommand(t, exec.Command(buildIn(t, dir), "-addr", ownHost("localhost:0")))
	conn := s.dial(t)
	say(t, conn, "hello")
	wantLines(t, conn, "hello")
	s.signal(t, syscall.SIGTERM)
	wantEnd(t, conn, websocket.CloseGoingAway)
	s.wantExit(t, time.Now(), patience)
}

// inCopy is a test that a copy gets beside its code. It counts what connections that
// do nothing take, and what those leave behind that have ended.
const inCopy = `package main

import (
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"
)

func heap() (m runtime.MemStats) {
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return m
}

func TestConnectionsTakeLittleAndLeaveNothing(t *testing.T) {
	hub := newHub()
	ended := make(chan struct{})
	go func() { hub.run(); close(ended) }()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { serveWs(hub, w, r) }))
	defer server.Close()
	const n = 1000
	var conns []*websocket.Conn
	dial := func() {
		for range n {
			conn, _, err := (&websocket.Dialer{ReadBufferSize: 16, WriteBufferSize: 16}).Dial("ws"+strings.TrimPrefix(server.URL, "http"), nil)
			if err != nil {
				t.Fatal(err)
			}
			conns = append(conns, conn)
		}
	}
	before := heap()
	dial()
	if got := (heap().HeapAlloc - before.HeapAlloc) / n; got > 24<<10 {
		t.Errorf("an idle connection takes %d bytes, its peer among them", got)
	}
	hub.stop()
	for _, conn := range conns {
		for err := error(nil); err == nil; {
			_, _, err = conn.ReadMessage()
		}
		conn.Close()
	}
	<-ended
	conns = nil
	left := func() int { return int(heap().HeapObjects) - int(before.HeapObjects) }
	// Timers that close connections hold these for closeWait. The runtime keeps two
	// objects of each for later use; a ticker that is not stopped is three more.
	for start := time.Now(); left() > 4*n; {
		if time.Since(start) > 20*closeWait {
			t.Fatalf("%d connections have left %d objects behind", n, left())
		}
	}
}
`

// In a module from before Go 1.23, a ticker that is not stopped stays for ever.
func TestCopyInAnOldModuleWithLongMessagesStaysSmall(t *testing.T) {
	t.Parallel()
	dir := copyOf(t, root, `
--- go.mod
-go 1.25
+go 1.22
--- client.go
-	maxMessageSize = 512
+	maxMessageSize = 64 << 10
`)
	if err := os.WriteFile(filepath.Join(dir, "copy_test.go"), []byte(inCopy), 0o666); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("go", "test", ".")
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

// root is the folder of the server's code.
const root = ".."

// startCopy starts a copy of the server with changes.
func startCopy(t *testing.T, changes ...string) *server {
	t.Helper()
	return startCommand(t, exec.Command(buildIn(t, copyOf(t, root, changes...)), "-addr", ownHost("localhost:0")))
}

// startUpstream starts a copy of upstream's example with changes.
func startUpstream(t *testing.T, changes ...string) *server {
	t.Helper()
	example, err := exec.Command("go", "list", "-f", "{{.Dir}}", "github.com/gorilla/websocket/examples/chat").Output()
	if err != nil {
		t.Fatal(err)
	}
	addr := freeAddr(t)
	s := start(t, exec.Command(buildIn(t, copyOf(t, string(bytes.TrimSpace(example)), changes...)), "-addr", addr))
	s.addr = addr
	awaitListener(t, addr)
	return s
}

// buildIn builds the server in dir, and returns the binary's path.
func buildIn(t *testing.T, dir string) string {
	t.Helper()
	build := exec.Command("go", "build", "-trimpath", "-o", "copy", ".")
	build.Dir = dir
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	return filepath.Join(dir, "copy")
}

// copyOf copies a server's code from dir, changes the copy, and returns its folder. In
// changes, a line behind --- names the file, @@ parts two changes, and the lines that
// start with a space or - have to stand in the file once. A file may be new.
func copyOf(t *testing.T, dir string, changes ...string) string {
	t.Helper()
	made := t.TempDir()
	for _, path := range []string{
		filepath.Join(root, "go.mod"), filepath.Join(root, "go.sum"),
		filepath.Join(dir, "main.go"), filepath.Join(dir, "hub.go"), filepath.Join(dir, "client.go"), filepath.Join(dir, "home.html"),
	} {
		content, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(made, filepath.Base(path)), string(content))
	}
	for _, change := range changes {
		for _, file := range strings.Split(change, "\n--- ")[1:] {
			name, hunks, _ := strings.Cut(file, "\n")
			path := filepath.Join(made, name)
			content, err := os.ReadFile(path)
			if err != nil && !errors.Is(err, os.ErrNotExist) {
				t.Fatal(err)
			}
			text := "\n" + string(content)
			for hunk := range strings.SplitSeq(hunks+"\n", "@@\n") {
				before, after := "\n", "\n"
				for line := range strings.Lines(hunk) {
					if line[0] != '+' {
						before += line[1:]
					}
					if line[0] != '-' {
						after += line[1:]
					}
				}
				if n := strings.Count(text, before); n != 1 {
					t.Fatalf("%s: cannot make the change, as this is there %d times:%s", name, n, before)
				}
				text = strings.Replace(text, before, after, 1)
			}
			write(t, path, text[1:])
		}
	}
	return made
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o777); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o666); err != nil {
		t.Fatal(err)
	}
}

// dialTo connects a client to the server's path; the test's end closes it.
func (s *server) dialTo(t *testing.T, path string) *websocket.Conn {
	t.Helper()
	return dial(t, websocket.DefaultDialer, "ws://"+s.addr+path)
}

// get requests path, and returns what it is answered with, whatever the status.
func (s *server) get(t *testing.T, path string) string {
	t.Helper()
	response, err := (&http.Client{Timeout: patience}).Get("http://" + s.addr + path)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(body)
}

// wantLines checks that these are the next lines that conn reads.
func wantLines(t *testing.T, conn *websocket.Conn, want ...string) {
	t.Helper()
	conn.SetReadDeadline(time.Now().Add(patience))
	for len(want) > 0 {
		_, message, err := conn.ReadMessage()
		if err != nil {
			t.Fatalf("a client reads %v, want %q", err, want)
		}
		for line := range strings.SplitSeq(string(message), "\n") {
			if len(want) == 0 || line != want[0] {
				t.Fatalf("a client reads %q, want %q", line, want)
			}
			want = want[1:]
		}
	}
}

// wantEnd checks that conn ends with code and a reason, whatever comes before that.
func wantEnd(t *testing.T, conn *websocket.Conn, code int) {
	t.Helper()
	conn.SetReadDeadline(time.Now().Add(patience))
	wantGoodbye(t, discard(conn), code)
}

// leave says goodbye, and waits for the answer.
func leave(t *testing.T, conn *websocket.Conn) {
	t.Helper()
	goodbye := websocket.FormatCloseMessage(websocket.CloseNormalClosure, "")
	if err := conn.WriteMessage(websocket.CloseMessage, goodbye); err != nil {
		t.Fatal(err)
	}
	conn.SetReadDeadline(time.Now().Add(patience))
	if err := discard(conn); !websocket.IsCloseError(err, websocket.CloseNormalClosure) {
		t.Fatal(err)
	}
}
