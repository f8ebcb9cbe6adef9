package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"go/format"
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
	"golang.org/x/tools/imports"
)

// These tests change a copy of the server as an application would, and run it. Changes are
// diffs without line numbers. recipes_test.go has the recipes.

func readme(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// add returns a change that adds code to main.go's serve, before it listens.
func add(code string) string {
	lines := strings.Split(strings.TrimSuffix(code, "\n"), "\n")
	return "\n--- main.go\n \tmux.HandleFunc(\"/\", serveHome)\n+" + strings.Join(lines, "\n+") + "\n"
}

// handle returns a change that adds a handler for path, which runs code.
func handle(path, code string) string {
	return add(`mux.HandleFunc("` + path + "\", func(w http.ResponseWriter, r *http.Request) {\n" + code + "\n})")
}

// countClients adds a handler that returns how many clients there are.
const countClients = `
--- main.go
 	mux.HandleFunc("/", serveHome)
+	mux.HandleFunc("/clients", func(w http.ResponseWriter, r *http.Request) {
+		connected := 0
+		hub.do(func() { connected = len(hub.clients) })
+		fmt.Fprint(w, connected)
+	})
`

// Rooms as a map in the hub: run adds a client where it has been registered, and deletes it
// where it has been dropped.
func TestCopyWithRoomsInOneHub(t *testing.T) {
	t.Parallel()
	s := startCopy(t, `
--- hub.go
 type Hub struct {
+	rooms map[string]map[*Client]bool // none of them empty
@@
 			// APPLICATION: client has been registered. …
+			if h.rooms[client.room] == nil {
+				h.rooms[client.room] = make(map[*Client]bool)
+			}
+			h.rooms[client.room][client] = true
@@
 			// APPLICATION: h.dropped[0], …
+			room := h.dropped[0].room
+			delete(h.rooms[room], h.dropped[0])
+			if len(h.rooms[room]) == 0 {
+				delete(h.rooms, room)
+			}
--- client.go
 type Client struct {
+	room string
@@
-	c.hub.broadcast <- line
+	c.do(func() {
+		for client := range c.hub.rooms[c.room] {
+			c.hub.queue(client, line)
+		}
+	})
--- main.go
 	hub := newHub()
+	hub.rooms = make(map[string]map[*Client]bool)
@@
-	mux.HandleFunc("/ws", func(w http.ResponseWriter, r *http.Request) { serveWs(hub, w, r) })
+	mux.HandleFunc("/ws", func(w http.ResponseWriter, r *http.Request) {
+		(&Client{hub: hub, room: r.FormValue("room")}).serve(w, r)
+	})
`, strings.ReplaceAll(countClients, "clients", "rooms"))
	cook, guest, gardener := s.dialTo(t, "/ws?room=kitchen"), s.dialTo(t, "/ws?room=kitchen"), s.dialTo(t, "/ws?room=garden")
	send(t, cook, "soup")
	wantLines(t, cook, "soup")
	send(t, gardener, "roses")
	wantLines(t, gardener, "roses")
	leave(t, gardener)
	if got := s.get(t, "/rooms"); got != "1" {
		t.Errorf("there are %s rooms, want only the kitchen", got)
	}
	leave(t, cook)
	send(t, guest, "more soup")
	wantLines(t, guest, "soup", "more soup")
}

// users is a map from users to their clients, owned by run.
const users = `
--- hub.go
 type Hub struct {
+	users map[string]*Client // the newest client of each
@@
 			// APPLICATION: client has been registered. …
+			h.users[client.user] = client
@@
 			// APPLICATION: h.dropped[0], …
+			if user := h.dropped[0].user; h.users[user] == h.dropped[0] { // and not a newer one
+				delete(h.users, user)
+			}
--- client.go
 type Client struct {
+	user string
--- main.go
 	hub := newHub()
+	hub.users = make(map[string]*Client)
@@
-	mux.HandleFunc("/ws", func(w http.ResponseWriter, r *http.Request) { serveWs(hub, w, r) })
+	mux.HandleFunc("/ws", func(w http.ResponseWriter, r *http.Request) {
+		(&Client{hub: hub, user: r.FormValue("user")}).serve(w, r)
+	})
`

// Handlers send to one user, list the users, and disconnect one. For an unknown user the
// client is nil, which queue and drop ignore. Handlers may outlive the hub: do returns.
func TestCopyWithAMapOfUsers(t *testing.T) {
	t.Parallel()
	s := startCopy(t, users, `
--- main.go
 	mux.HandleFunc("/", serveHome)
+	mux.HandleFunc("/notify", func(w http.ResponseWriter, r *http.Request) {
+		user, line := r.FormValue("user"), clean([]byte(r.FormValue("line")))
+		hub.do(func() { hub.queue(hub.users[user], line) })
+	})
+	mux.HandleFunc("/users", func(w http.ResponseWriter, r *http.Request) {
+		var users []string
+		hub.do(func() { users = slices.Sorted(maps.Keys(hub.users)) })
+		fmt.Fprint(w, users)
+	})
+	mux.HandleFunc("/drop", func(w http.ResponseWriter, r *http.Request) {
+		user, reason := r.FormValue("user"), &websocket.CloseError{Code: 4000, Text: "come back with a ticket"}
+		hub.do(func() { hub.drop(hub.users[user], reason) })
+	})
+	mux.HandleFunc("/close", func(w http.ResponseWriter, r *http.Request) {
+		hub.stop()
+		<-hub.ended
+	})
`)
	hans, older, newer := s.dialTo(t, "/ws?user=hans"), s.dialTo(t, "/ws?user=grete"), s.dialTo(t, "/ws?user=grete")
	s.get(t, "/notify?user=unknown&line=dinner")
	s.get(t, "/drop?user=unknown")
	s.get(t, "/notify?user=grete&line=dinner")
	wantLines(t, newer, "dinner")
	leave(t, older)
	s.get(t, "/notify?user=grete&line=at%0Asix")
	wantLines(t, newer, "at six")
	if got := s.get(t, "/users"); got != "[grete hans]" {
		t.Errorf("got the users %s, want Grete and Hans", got)
	}
	s.get(t, "/drop?user=grete")
	wantEnd(t, newer, 4000)
	if got := s.get(t, "/users"); got != "[hans]" {
		t.Errorf("got the users %s, want Hans", got)
	}
	send(t, hans, "alone")
	wantLines(t, hans, "alone")

	go discard(hans)
	for _, path := range []string{"/close", "/notify?user=hans&line=late", "/users", "/drop?user=hans"} {
		s.get(t, path)
	}
}

// A new connection of a user replaces the previous one. A refused handshake does not.
func TestCopyWithOneConnectionForEachUser(t *testing.T) {
	t.Parallel()
	s := startCopy(t, users, `
--- hub.go
+			h.drop(h.users[client.user], elsewhere)
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
		t.Fatal("a foreign origin is accepted")
	}
	send(t, first, "still here")
	wantLines(t, first, "still here")

	second := s.dialTo(t, "/ws?user=grete")
	wantEnd(t, first, 4001)
	third := s.dialTo(t, "/ws?user=grete")
	wantEnd(t, second, 4001)
	send(t, third, "here")
	wantLines(t, third, "here")
}

// run receives from one more channel: what the operator types. The sender may outlive
// the hub.
func TestCopyWithASecondChannel(t *testing.T) {
	t.Parallel()
	cmd := exec.Command(buildIn(t, copyOf(t, root, `
--- hub.go
 type Hub struct {
+	console chan []byte // from the operator
@@
 			h.deliver(message)
+		case line := <-h.console:
+			h.deliver(append([]byte("Operator: "), line...))
--- main.go
-	go hub.run()
+	hub.console = make(chan []byte)
+	go hub.run()
+	go func() {
+		for typed := bufio.NewScanner(os.Stdin); typed.Scan(); {
+			select {
+			case hub.console <- clean(typed.Bytes()):
+			case <-hub.stopped:
+				return
+			}
+		}
+	}()
`)), "-addr", ownHost("localhost:0"))
	console, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	s := startCommand(t, cmd)
	grete, hans := s.dial(t), s.dial(t)
	io.WriteString(console, "We close at six.\n")
	wantLines(t, grete, "Operator: We close at six.")
	send(t, grete, "So soon?")
	wantLines(t, grete, "So soon?")
	wantLines(t, hans, "Operator: We close at six.", "So soon?")

	go io.Copy(console, strings.NewReader(strings.Repeat("Go home.\n", 1e6)))
	if _, _, err := hans.ReadMessage(); err != nil {
		t.Fatal(err)
	}
	go discard(hans)
	s.signal(t, syscall.SIGTERM)
	wantEnd(t, grete, websocket.CloseGoingAway)
	s.wantExit(t, time.Now(), exitTime)
}

// readPump calls tell, so a client that sends requests and reads no replies is dropped as a
// slow client, and the others are not affected.
func TestCopyThatRepliesDropsASlowClient(t *testing.T) {
	t.Parallel()
	s := startCopy(t, `
--- client.go
-	c.hub.broadcast <- line
+	if bytes.HasPrefix(line, []byte("?")) {
+		c.tell(bytes.Repeat([]byte("Yes. "), 100))
+		return
+	}
+	c.hub.broadcast <- line
@@
-	rateInterval = 10 * time.Millisecond
+	rateInterval = 10 * time.Microsecond
`, countClients)
	slow, sender := s.dial(t), s.dial(t)
	go ask(slow)
	for start := time.Now(); s.get(t, "/clients") != "1"; {
		send(t, sender, "Well?")
		wantLines(t, sender, "Well?")
		if time.Since(start) > patience {
			t.Fatal("the slow client is not dropped")
		}
	}
	send(t, sender, "?")
	wantLines(t, sender, strings.Repeat("Yes. ", 100))
	wantEnd(t, slow, websocket.CloseTryAgainLater)
}

// Upstream has no tell, so a copy of it sends replies to the channel send. The hub closes
// that for a slow client, and the process ends.
func TestCopyOfUpstreamThatRepliesPanicsForASlowClient(t *testing.T) {
	t.Parallel()
	s := startUpstream(t, `
--- client.go
+		if bytes.HasPrefix(message, []byte("?")) {
+			c.send <- bytes.Repeat([]byte("Yes. "), 100)
+			continue
+		}
 		c.hub.broadcast <- message
`)
	slow, sender := s.dial(t), s.dial(t)
	go ask(slow)
	for err := error(nil); err == nil; {
		if err = sender.WriteMessage(websocket.TextMessage, []byte("Well?")); err == nil {
			_, _, err = sender.ReadMessage()
		}
	}
	if state := s.wait(t); state.Success() || !strings.Contains(s.log.String(), "send on closed channel") {
		t.Errorf("upstream exited with %v, want a panic, send on closed channel:\n%s", state, s.log)
	}
}

// ask sends requests until the connection ends, and reads no replies.
func ask(conn *websocket.Conn) {
	for conn.WriteMessage(websocket.TextMessage, []byte("?")) == nil {
	}
}

// Each message is one JSON document, with the recipe for it. A subprotocol tells clients.
// The server broadcasts a document of several lines as one line.
func TestCopyWithOneJSONDocumentAMessage(t *testing.T) {
	t.Parallel()
	single, _ := recipe(t, "## One message a frame")
	s := startCopy(t, single, `
--- client.go
-	Subprotocols:    []string{heartbeat},
+	Subprotocols:    []string{heartbeat, "json"},
`)
	dialer := websocket.Dialer{Subprotocols: []string{"json"}}
	sender, reader := dial(t, &dialer, "ws://"+s.addr+"/ws"), dial(t, &dialer, "ws://"+s.addr+"/ws")
	if got := reader.Subprotocol(); got != "json" {
		t.Errorf("the subprotocol is %q, want json", got)
	}
	const n = 120
	for i := range n {
		send(t, sender, fmt.Sprintf("{\n\t\"n\": %d\n}", i))
	}
	for _, conn := range []*websocket.Conn{sender, reader} {
		for i := range n {
			var document struct{ N int }
			conn.SetReadDeadline(time.Now().Add(patience))
			if err := conn.ReadJSON(&document); err != nil || document.N != i {
				t.Fatalf("message %d is %v, %v", i, document, err)
			}
		}
	}
}

// Binary messages of 8 MiB, compressed if the peer supports it, with the recipes for both.
// At most 16 are queued for a client, as 256 would take 2 GiB. Text is sent as binary, too.
func TestCopyWithCompressedBinaryMessagesOf8MiB(t *testing.T) {
	t.Parallel()
	binary, _ := recipe(t, "## Binary messages")
	compression, _ := recipe(t, "## Compression")
	s := startCopy(t, binary, compression, `
--- client.go
-	maxMessageSize = 512
+	maxMessageSize = 8 << 20
@@
-	sendQueueSize = 256
+	sendQueueSize = 16
`)
	sender, reader := s.dialCompressing(t), s.dialCompressing(t)
	image := make([]byte, 8<<20)
	rand.NewChaCha8([32]byte{}).Read(image[:len(image)/2])
	sendBinary(t, sender, image)
	for _, conn := range []*websocket.Conn{sender, reader} {
		conn.SetReadDeadline(time.Now().Add(patience))
		if kind, got, err := conn.ReadMessage(); kind != websocket.BinaryMessage || !bytes.Equal(got, image) {
			t.Fatalf("a client reads a message of type %d and %d bytes, and %v, want the one that was sent", kind, len(got), err)
		}
	}
	// The limit applies to the uncompressed size.
	sendBinary(t, sender, make([]byte, len(image)+1))
	wantEnd(t, sender, websocket.CloseMessageTooBig)

	const n = 20
	for range n {
		sendBinary(t, reader, []byte("\xff\n"))
	}
	for range n {
		if _, got, err := reader.ReadMessage(); string(got) != "\xff\n" {
			t.Fatalf("a client reads %q, %v", got, err)
		}
	}
}

// Upstream's limit applies to the compressed size.
func TestCopyOfUpstreamWithCompressionAcceptsMessagesOfAnySize(t *testing.T) {
	t.Parallel()
	s := startUpstream(t, `
--- client.go
 	WriteBufferSize: 1024,
+	EnableCompression: true,
`)
	// The sender reads, as upstream may register another client after its handshake.
	conn := s.dialCompressing(t)
	const limit = 512
	sendBinary(t, conn, bytes.Repeat([]byte("x"), 100*limit))
	conn.SetReadDeadline(time.Now().Add(patience))
	if _, got, err := conn.ReadMessage(); len(got) <= limit {
		t.Errorf("upstream broadcasts %d bytes, %v, want more than the limit of %d", len(got), err, limit)
	}
}

// dialCompressing connects a client that compresses its messages.
func (s *server) dialCompressing(t *testing.T) *websocket.Conn {
	t.Helper()
	conn, response, err := (&websocket.Dialer{EnableCompression: true}).Dial("ws://"+s.addr+"/ws", nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if got := response.Header.Get("Sec-WebSocket-Extensions"); !strings.HasPrefix(got, "permessage-deflate") {
		t.Fatalf("the server accepts the extensions %q, want compression", got)
	}
	return conn
}

// sendBinary sends one binary message.
func sendBinary(t *testing.T, conn *websocket.Conn, message []byte) {
	t.Helper()
	if err := conn.WriteMessage(websocket.BinaryMessage, message); err != nil {
		t.Fatal(err)
	}
}

// inCopy is a test that runs inside a copy. It measures the heap of idle connections, and
// what is not freed after they are closed.
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

func TestConnectionsTakeLittleMemoryAndAreFreed(t *testing.T) {
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
		t.Errorf("an idle connection and its peer take %d bytes, want at most 24 KiB", got)
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
	// The timers that close connections reference them for closeWait. The runtime caches two
	// objects of each connection; a ticker that is not stopped is three more.
	for start := time.Now(); left() > 4*n; {
		if time.Since(start) > 20*closeWait {
			t.Fatalf("%d closed connections still take %d objects", n, left())
		}
	}
}
`

// In a module from before Go 1.23, a ticker that is not stopped is never freed.
func TestCopyInAnOldModuleWithLongMessagesFreesConnections(t *testing.T) {
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

// buildIn builds the server in dir with flags, and returns the binary's path. Without DWARF,
// which takes the linker a third of the time.
func buildIn(t *testing.T, dir string, flags ...string) string {
	t.Helper()
	build := exec.Command("go", append([]string{"build", "-ldflags=-w", "-o", "copy"}, flags...)...)
	build.Dir = dir
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	return filepath.Join(dir, "copy")
}

// copyOf copies a server's code from dir, changes the copy, and returns its folder. In
// changes, a line that starts with --- names the file, which may be new; @@ separates two
// changes; lines that start with a space or - must be in the file exactly once. A change
// below a comment that ends in … is made at the end of that place. It adds the imports that
// the changes need.
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
	changed := make(map[string]bool) // Go files
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
				if place, added, found := strings.Cut(hunk, "…\n"); found {
					before = placeIn(t, text, place[1:])
					hunk, after = added, before
				}
				for line := range strings.Lines(hunk) {
					if line[0] != '+' {
						before += line[1:]
					}
					if line[0] != '-' {
						after += line[1:]
					}
				}
				if n := strings.Count(text, before); n != 1 {
					t.Fatalf("%s: cannot apply the change, as this occurs %d times:%s", name, n, before)
				}
				text = strings.Replace(text, before, after, 1)
			}
			if strings.HasSuffix(name, ".go") {
				changed[path] = true
				formatted, err := format.Source([]byte(text[1:]))
				if err != nil {
					t.Fatal(err)
				}
				text = "\n" + string(formatted)
			}
			write(t, path, text[1:])
		}
	}
	for path := range changed {
		content, err := imports.Process(path, nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		write(t, path, string(content))
	}
	return made
}

// placeIn returns the text from the line that begins with mark, to the last one that is
// indented at least as much.
func placeIn(t *testing.T, text, mark string) string {
	t.Helper()
	if n := strings.Count(text, "\n"+mark); n != 1 {
		t.Fatalf("the place %q occurs %d times", mark, n)
	}
	indent := mark[:strings.IndexFunc(mark, func(r rune) bool { return r != '\t' })]
	start := strings.Index(text, "\n"+mark)
	return regexp.MustCompile(`^\n(?:` + indent + `.*\n)+`).FindString(text[start:])
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

// dialTo connects a client to a path of the server; the test's end closes it.
func (s *server) dialTo(t *testing.T, path string) *websocket.Conn {
	t.Helper()
	return dial(t, websocket.DefaultDialer, "ws://"+s.addr+path)
}

// get requests path, and returns the body of the response, whatever the status.
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

// wantLines checks the next lines that conn reads.
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

// wantEnd checks that conn ends with code and a reason, whatever lines come first.
func wantEnd(t *testing.T, conn *websocket.Conn, code int) {
	t.Helper()
	conn.SetReadDeadline(time.Now().Add(patience))
	wantClose(t, discard(conn), code)
}

// leave does the closing handshake.
func leave(t *testing.T, conn *websocket.Conn) {
	t.Helper()
	closeFrame := websocket.FormatCloseMessage(websocket.CloseNormalClosure, "")
	if err := conn.WriteMessage(websocket.CloseMessage, closeFrame); err != nil {
		t.Fatal(err)
	}
	conn.SetReadDeadline(time.Now().Add(patience))
	if err := discard(conn); !websocket.IsCloseError(err, websocket.CloseNormalClosure) {
		t.Fatal(err)
	}
}
