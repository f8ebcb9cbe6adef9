package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	_ "github.com/gin-gonic/gin" // keeps it in go.mod, for the copy that uses it
	"github.com/gorilla/websocket"
	"golang.org/x/tools/imports"
)

// These tests change a copy of the server as an application would, and run it: first
// each recipe of README.md, with the code from there, then more. Changes are diffs without
// line numbers.

// recipe returns the code under a heading in README.md: the changes to hub.go and
// client.go, and the Go code beside them.
func recipe(t *testing.T, heading string) (changes, code string) {
	t.Helper()
	_, section, found := strings.Cut(readme(t), "\n"+heading+"\n")
	if !found {
		t.Fatalf("README.md has no heading %q", heading)
	}
	section, _, _ = strings.Cut(section, "\n#")
	for _, block := range regexp.MustCompile(`(?m)(?:^    .*\n)+`).FindAllString(section+"\n", -1) {
		block = regexp.MustCompile(`(?m)^    `).ReplaceAllString(block, "")
		if strings.HasPrefix(block, "--- ") {
			changes += "\n" + block
		} else {
			code += block
		}
	}
	if changes+code == "" {
		t.Fatalf("README.md has no code under %q", heading)
	}
	return changes, code
}

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

func TestEachRecipeOfTheREADMEHasATest(t *testing.T) {
	t.Parallel()
	tests, err := os.ReadFile("copy_test.go")
	if err != nil {
		t.Fatal(err)
	}
	headings := regexp.MustCompile(`(?m)^### .*$`).FindAllString(readme(t), -1)
	for _, heading := range headings {
		if heading != "### Common mistakes" && !strings.Contains(string(tests), `recipe(t, "`+heading+`")`) {
			t.Errorf("no test runs the recipe %q", heading)
		}
	}
	if len(headings) < 10 {
		t.Errorf("README.md has %d recipes", len(headings))
	}
}

// The setup and the graceful shutdown make a program together. The shutdown also waits
// for a request that is not a WebSocket.
func TestCopyWithItsOwnMain(t *testing.T) {
	t.Parallel()
	_, setup := recipe(t, "## Use it in your project")
	_, shutdown := recipe(t, "### Graceful shutdown in your own main")
	run, shutdown, _ := strings.Cut(shutdown, "<-ctx.Done()")
	s := startCopy(t, `
--- main.go
-	return serve(ctx, listener)
+	return serveOwn(ctx, listener)
 }
--- own.go
+package main
+
+func serveOwn(ctx context.Context, listener net.Listener) error {
+	mux := http.NewServeMux()
+	`+strings.ReplaceAll(replace(t, setup, "go hub.run()", run), "\n", "\n+")+`
+	mux.HandleFunc("/slow", func(w http.ResponseWriter, r *http.Request) {
+		log.Print("a slow request")
+		<-hub.stopped
+		io.WriteString(w, "answered")
+	})
+	server := &http.Server{Handler: mux}
+	go server.Serve(listener)
+	<-ctx.Done()`+strings.ReplaceAll(shutdown, "\n", "\n+")+`
+	return nil
+}
`)
	conn := s.dial(t)
	send(t, conn, "hello")
	wantLines(t, conn, "hello")
	answer := make(chan string)
	go func() { answer <- s.get(t, "/slow") }()
	s.waitForLog(t, "a slow (request)")
	s.signal(t, syscall.SIGTERM)
	wantEnd(t, conn, websocket.CloseGoingAway)
	if got := <-answer; got != "answered" {
		t.Errorf("the slow request gets %q, want %q", got, "answered")
	}
	s.wantExit(t, time.Now(), patience)
}

// With a module of the oldest Go that README.md names. (With go 1.21 the two rooms would
// be one, as all rounds of a loop share their variables.)
func TestCopyWithAHubForEachRoom(t *testing.T) {
	t.Parallel()
	_, rooms := recipe(t, "### Rooms: a hub for each")
	_, broadcast := recipe(t, "### Broadcast from a handler or a service")
	s := startCopy(t, `
--- go.mod
-go 1.25
+go 1.22
--- main.go
-	return serve(ctx, listener)
+	return serveRooms(ctx, listener)
--- rooms.go
+package main
+
+func serveRooms(ctx context.Context, listener net.Listener) error {
+	mux := http.NewServeMux()
+	var running sync.WaitGroup
+	`+strings.ReplaceAll(rooms, "\n", "\n+")+`
+	server := &http.Server{Handler: mux}
+	context.AfterFunc(ctx, func() { server.Close() })
+	server.Serve(listener)
+	hub := hubs["/kitchen/ws"]
+	`+broadcast+`
+	for _, hub := range hubs {
+		hub.stop()
+	}
+	running.Wait()
+	return nil
+}
`)
	kitchen, garden := s.dialTo(t, "/kitchen/ws"), s.dialTo(t, "/garden/ws")
	send(t, kitchen, "soup")
	wantLines(t, kitchen, "soup")
	send(t, garden, "roses")
	wantLines(t, garden, "roses")

	s.signal(t, syscall.SIGTERM)
	wantLines(t, kitchen, "Dinner is ready.")
	wantEnd(t, kitchen, websocket.CloseGoingAway)
	wantEnd(t, garden, websocket.CloseGoingAway)
	s.wantExit(t, time.Now(), patience)
}

// A handler broadcasts, and so does a goroutine that outlives the hub, and ends when do
// returns false.
func TestCopyThatBroadcasts(t *testing.T) {
	t.Parallel()
	_, broadcast := recipe(t, "### Broadcast from a handler or a service")
	s := startCopy(t, handle("/dinner", broadcast), `
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
`)
	conn := s.dial(t)
	s.get(t, "/dinner")
	var lines []string
	for len(lines) < 5 || !slices.Contains(lines, "Dinner is ready.") {
		_, message, err := conn.ReadMessage()
		if err != nil {
			t.Fatalf("got %q, then %v, want the time and dinner", lines, err)
		}
		lines = append(lines, strings.Split(string(message), "\n")...)
	}
	s.signal(t, syscall.SIGTERM)
	wantEnd(t, conn, websocket.CloseGoingAway)
	s.wantExit(t, time.Now(), patience)
}

func TestCopyThatRepliesToOneClient(t *testing.T) {
	t.Parallel()
	reply, _ := recipe(t, "### Send to one client")
	s := startCopy(t, reply)
	asker, other := s.dial(t), s.dial(t)
	send(t, asker, "/time")
	_, message, err := asker.ReadMessage()
	if _, parseErr := time.Parse(time.TimeOnly, string(message)); err != nil || parseErr != nil {
		t.Errorf("the client reads %q, %v, want the time", message, err)
	}
	send(t, asker, "thanks")
	wantLines(t, other, "thanks")
}

// logIn is the part of the recipe for authentication that is the application's, with
// each of the three ways.
const logIn = `
--- users.go
+package main
+
+func userOf(r *http.Request) string {
+	if cookie, err := r.Cookie("user"); err == nil {
+		return cookie.Value
+	}
+	return cmp.Or(r.Header.Get("X-User"), r.FormValue("user"))
+}
`

func TestCopyWithLogIn(t *testing.T) {
	t.Parallel()
	auth, _ := recipe(t, "### Authentication: log in before the upgrade")
	s := startCopy(t, auth, logIn, `
--- client.go
-		c.hub.broadcast <- line
+		c.hub.broadcast <- append([]byte(c.user+": "), line...)
`)
	if _, response, err := websocket.DefaultDialer.Dial("ws://"+s.addr+"/ws", nil); err == nil || response.StatusCode != http.StatusUnauthorized {
		t.Errorf("without a login the handshake gives %v, %v, want status 401", response, err)
	}
	for name, tt := range map[string]struct {
		path   string
		header http.Header
	}{
		"cookie": {"/ws", http.Header{"Cookie": {"user=grete"}}},
		"header": {"/ws", http.Header{"X-User": {"grete"}}},
		"query":  {"/ws?user=grete", nil},
	} {
		conn, _, err := websocket.DefaultDialer.Dial("ws://"+s.addr+tt.path, tt.header)
		if err != nil {
			t.Fatalf("by %s: %v", name, err)
		}
		send(t, conn, "hello")
		wantLines(t, conn, "grete: hello")
		leave(t, conn)
	}
}

// The test runs each of the three filters of the recipe. Rooms are a field, as users are.
func TestCopyThatSendsToSomeClients(t *testing.T) {
	t.Parallel()
	auth, _ := recipe(t, "### Authentication: log in before the upgrade")
	filter, toUser := recipe(t, "### Send to one user, to a room or topic, to all but the sender")
	toUser, comment, _ := strings.Cut(toUser, " // or ")
	toRoom, notToSender, _ := strings.Cut(strings.TrimSpace(comment), ", ")
	const toGrete = `c.user == "grete"`
	s := startCopy(t, auth, logIn, filter,
		handle("/grete", `line := []byte("Your taxi is here.")`+"\n"+toUser),
		handle("/kitchen", `line, room := []byte("Soup is ready."), "kitchen"`+"\n"+replace(t, toUser, toGrete, toRoom)), `
--- client.go
 	user string
+	room string
@@
-	client := &Client{hub: hub, user: user, conn: conn, send: make(chan []byte, sendQueueSize)}
+	client := &Client{hub: hub, user: user, room: r.FormValue("room"), conn: conn, send: make(chan []byte, sendQueueSize)}
@@
-		c.hub.broadcast <- line
+		hub, sender := c.hub, c
+		`+replace(t, toUser, toGrete, notToSender)+`
`)
	tab1, tab2 := s.dialTo(t, "/ws?user=grete"), s.dialTo(t, "/ws?user=grete&room=kitchen")
	hans := s.dialTo(t, "/ws?user=hans&room=kitchen")
	s.get(t, "/grete")
	s.get(t, "/kitchen")
	send(t, tab1, "from tab 1")
	wantLines(t, tab2, "Your taxi is here.", "Soup is ready.", "from tab 1")
	wantLines(t, hans, "Soup is ready.", "from tab 1")
	send(t, hans, "from hans")
	wantLines(t, tab1, "Your taxi is here.", "from hans")
}

// The announcements are made where run receives from register and done: from then on,
// and until then, the client has its conn. (In drop they would change the order of
// messages, as deliver may call it.)
func TestCopyWithPresenceAndMetrics(t *testing.T) {
	t.Parallel()
	auth, _ := recipe(t, "### Authentication: log in before the upgrade")
	announce, list := recipe(t, "### Presence and metrics: count, list, announce joins and leaves")
	declare := regexp.MustCompile(`var drops = .*`).FindString(announce)
	s := startCopy(t, auth, logIn, announce, `
--- drops.go
+package main
+
+`+declare+`
`, add(`mux.Handle("/debug/vars", expvar.Handler())`), handle("/users", `
	connected, clients := 0, []*Client(nil)
	`+list+`
	fmt.Fprintln(w, connected)
	for _, client := range clients {
		fmt.Fprintln(w, client.user)
	}`))
	grete := s.dialTo(t, "/ws?user=grete")
	wantLines(t, grete, "grete joined")
	s.get(t, "/ws?user=uwe") // 400: no WebSocket, so no client joins
	hans := s.dialTo(t, "/ws?user=hans")
	wantLines(t, hans, "hans joined")
	users := strings.Fields(s.get(t, "/users"))
	slices.Sort(users)
	if got := strings.Join(users, " "); got != "2 grete hans" {
		t.Errorf("got the users %q, want 2 grete hans", got)
	}
	sendBinary(t, hans, []byte("binary"))
	wantEnd(t, hans, websocket.CloseUnsupportedData)
	wantLines(t, grete, "hans joined", "hans left")
	var vars struct{ Drops map[string]int }
	if text := s.get(t, "/debug/vars"); json.Unmarshal([]byte(text), &vars) != nil || len(vars.Drops) != 1 || vars.Drops["1003"] != 1 {
		t.Errorf("got the metrics %s, want one drop with code 1003", text)
	}
}

func TestCopyThatDisconnectsAClient(t *testing.T) {
	t.Parallel()
	_, drop := recipe(t, "### Disconnect a client with a close code of your own")
	s := startCopy(t, handle("/drop", `
	var client *Client
	hub.do(func() {
		for client = range hub.clients {
		}
	})
	`+drop))
	s.get(t, "/drop") // There is no client yet: drop ignores nil.
	conn := s.dial(t)
	s.get(t, "/drop")
	wantEnd(t, conn, 4000)
	s.dial(t)
}

func TestCopyWithAllowedOrigins(t *testing.T) {
	t.Parallel()
	_, check := recipe(t, "### Allowed origins: pages on other hosts")
	s := startCopy(t, add(check))
	for origin, want := range map[string]int{
		"":                         101,
		"https://chat.example":     101,
		"https://www.chat.example": 101,
		"http://chat.example":      403,
		"https://evil.example":     403,
		"null":                     403,
	} {
		header := http.Header{}
		if origin != "" {
			header.Set("Origin", origin)
		}
		conn, response, err := websocket.DefaultDialer.Dial("ws://"+s.addr+"/ws", header)
		if response == nil || response.StatusCode != want {
			t.Errorf("with the origin %q the handshake gives %v, %v, want status %d", origin, response, err, want)
		}
		if err == nil {
			conn.Close()
		}
	}
}

func TestCopyWithTypedJSON(t *testing.T) {
	t.Parallel()
	typed, _ := recipe(t, "### JSON with types")
	s := startCopy(t, typed)
	conn := s.dial(t)
	send(t, conn, "{\n\t\"type\": \"chat\",\n\t\"text\": \"a\\nb\"\n}")
	wantLines(t, conn, `{  "type": "chat",  "text": "a\nb" }`)
	send(t, conn, " ") // A blank message is ignored.
	send(t, conn, `{"type":"chat"}`)
	wantLines(t, conn, `{"type":"chat"}`)
	for _, message := range []string{`{"type": "shout"}`, `hello`} {
		conn := s.dial(t)
		send(t, conn, message)
		wantEnd(t, conn, 4400)
	}
}

// A client that reads nothing for a while misses messages, and stays connected.
func TestCopyWithOtherLimits(t *testing.T) {
	t.Parallel()
	limits, _ := recipe(t, "### Larger messages, higher rates, slow clients that are not dropped")
	s := startCopy(t, limits)
	slow, sender := s.dial(t), s.dial(t)
	message := strings.Repeat("x", 64<<10)
	const n = 500 // more than the slow client's queue and TCP take
	for range n {
		send(t, sender, message)
		wantLines(t, sender, message)
	}
	send(t, sender, message+"x")
	wantEnd(t, sender, websocket.CloseMessageTooBig)

	received := 0
	go func() {
		sender := s.dial(t)
		for sender.WriteMessage(websocket.TextMessage, []byte("end")) == nil { // until the test ends
			time.Sleep(time.Millisecond)
		}
	}()
	for slow.SetReadDeadline(time.Now().Add(patience)); ; received++ {
		_, got, err := slow.ReadMessage()
		if err != nil {
			t.Fatalf("the slow client reads %v after %d messages", err, received)
		}
		if bytes.HasPrefix(got, []byte("end")) {
			break
		}
	}
	if received == n {
		t.Errorf("the slow client missed no messages: the test has to send more")
	}
}

// run waits for the goroutine that saves lines, so that none is lost, and they are saved in
// the order in which clients receive them.
func TestCopyThatSavesMessages(t *testing.T) {
	t.Parallel()
	save, _ := recipe(t, "### Save messages in a database")
	file := filepath.Join(t.TempDir(), "lines")
	s := startCopy(t, save, `
--- saves.go
+package main
+
+var saves = make(chan []byte, 10)
--- main.go
 	go func() { hub.run(); close(disconnected) }()
+	database, err := os.Create("`+file+`")
+	if err != nil {
+		return err
+	}
+	saved := make(chan struct{})
+	go func() {
+		for line := range saves {
+			time.Sleep(time.Millisecond) // a slow disk
+			fmt.Fprintf(database, "%s\n", line)
+		}
+		close(saved)
+	}()
@@
-	err := server.Serve(listener)
+	err = server.Serve(listener)
@@
 		logSoon("exiting: some clients are still connected after %v", shutdownWait)
 	}
+	close(saves)
+	<-saved
`)
	const senders, lines = 3, 50
	reader := s.dial(t)
	for i := range senders {
		sender := s.dial(t)
		go discard(sender)
		go func() {
			for n := range lines {
				sender.WriteMessage(websocket.TextMessage, fmt.Appendf(nil, "%d from %d", n, i))
			}
		}()
	}
	var received []string
	for len(received) < senders*lines {
		reader.SetReadDeadline(time.Now().Add(patience))
		_, message, err := reader.ReadMessage()
		if err != nil {
			t.Fatalf("after %d lines: %v", len(received), err)
		}
		received = append(received, strings.Split(string(message), "\n")...)
	}
	s.stop(t)
	saved, err := os.ReadFile(file)
	if err != nil || string(saved) != strings.Join(received, "\n")+"\n" {
		t.Errorf("the lines in the file are not those received, in their order: %v\n%s\n%q", err, saved, received)
	}
}

func TestCopyWithGin(t *testing.T) {
	t.Parallel()
	_, route := recipe(t, "### gin, echo, chi")
	dir := copyOf(t, root, `
--- main.go
-	mux := http.NewServeMux()
+	router := gin.New()
@@
-	mux.HandleFunc("/", serveHome)
-	mux.HandleFunc("/ws", func(w http.ResponseWriter, r *http.Request) { serveWs(hub, w, r) })
+	`+route+`
@@
-		Handler:        mux,
+		Handler:        router,
@@
 	"time"
+
+	"github.com/gin-gonic/gin"
 )
`)
	for _, name := range []string{"go.mod", "go.sum"} {
		content, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(dir, name), string(content))
	}
	s := startCommand(t, exec.Command(buildIn(t, dir), "-addr", ownHost("localhost:0")))
	conn := s.dial(t)
	send(t, conn, "hello")
	wantLines(t, conn, "hello")
	if got := s.get(t, "/ws"); !strings.Contains(got, "Bad Request") {
		t.Errorf("without an upgrade the response is %q, want Bad Request", got)
	}
	s.stop(t)
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

// Rooms as a map in the hub, which the recipe with the filter names for many clients: run
// adds a client where it receives from register, and drop deletes it.
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
+		<-disconnected
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
	s.wantExit(t, time.Now(), patience)
}

// readPump calls tell, so a client that sends requests and reads no replies is dropped as a
// slow client, and the others are not affected.
func TestCopyThatRepliesDropsASlowClient(t *testing.T) {
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

// Each message is one JSON document, as writeBatch has no loop. A subprotocol tells clients.
// The server broadcasts a document of several lines as one line.
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

// Binary messages of 8 MiB, compressed if the peer supports it. At most 16 are queued for
// a client, as 256 would take 2 GiB. writeBatch batches none, as maxBatchSize has no space
// for a second one. Text is sent as binary, too.
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

// hub.go and client.go in a package of their own: only the package's name changes. One
// more file exports what other packages may call.
func TestCopyInItsOwnPackage(t *testing.T) {
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
	send(t, conn, "hello")
	wantLines(t, conn, "hello")
	s.signal(t, syscall.SIGTERM)
	wantEnd(t, conn, websocket.CloseGoingAway)
	s.wantExit(t, time.Now(), patience)
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
// changes, a line that starts with --- names the file, which may be new; @@ separates two
// changes; lines that start with a space or - must be in the file exactly once. It adds
// the imports that the changes need.
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
					t.Fatalf("%s: cannot apply the change, as this occurs %d times:%s", name, n, before)
				}
				text = strings.Replace(text, before, after, 1)
			}
			if strings.HasSuffix(name, ".go") {
				formatted, err := imports.Process(path, []byte(text[1:]), nil)
				if err != nil {
					t.Fatal(err)
				}
				text = "\n" + string(formatted)
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
