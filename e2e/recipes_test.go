package e2e

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unicode"

	"github.com/chromedp/chromedp"
	"github.com/gorilla/websocket"
	// These keep frameworks in go.mod, for the copies that use them.
	_ "github.com/gin-gonic/gin"
	_ "github.com/go-chi/chi/v5"
	_ "github.com/labstack/echo/v4"
	_ "github.com/labstack/echo/v5"
	_ "github.com/prometheus/client_golang/prometheus/promhttp"
)

// These tests run each block of recipes/README.md.

// recipes returns the text of recipes/README.md.
func recipes(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, "recipes", "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

var fenced = regexp.MustCompile("(?ms)^```([a-z]+)\n(.*?)^```$")

// recipe returns what the blocks under a heading say: the changes of files, new ones
// included, and the other code.
func recipe(t *testing.T, heading string) (changes, code string) {
	t.Helper()
	_, section, found := strings.Cut(recipes(t), "\n"+heading+"\n")
	if !found {
		t.Fatalf("recipes/README.md has no heading %q", heading)
	}
	section, _, _ = strings.Cut(section, "\n## ")
	section, _, _ = strings.Cut(section, "\n### ")
	for _, block := range fenced.FindAllStringSubmatch(section, -1) {
		text := block[2]
		name, file, _ := strings.Cut(text, "\n")
		name, isFile := strings.CutPrefix(name, "// ")
		switch {
		case block[1] == "diff":
			changes += "\n" + text
		case isFile && strings.HasSuffix(name, ".go"):
			if !strings.Contains("\n"+file, "\npackage ") {
				file = "package main\n\n" + file
			}
			changes += newFile(name, file)
		default:
			code += text
		}
	}
	if changes+code == "" {
		t.Fatalf("recipes/README.md has no block under %q", heading)
	}
	return changes, code
}

// newFile returns a change that makes a file.
func newFile(name, content string) string {
	lines := strings.Split(strings.TrimSuffix(content, "\n"), "\n")
	return "\n--- " + name + "\n+" + strings.Join(lines, "\n+") + "\n"
}

// In recipes/README.md, a test names each heading that has a block. The list of contents has
// each recipe.
func TestEachRecipeHasATest(t *testing.T) {
	t.Parallel()
	var tests []byte
	for _, name := range []string{"recipes_test.go", "copy_test.go"} {
		content, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		tests = append(tests, content...)
	}
	headings := regexp.MustCompile(`(?m)^(##+) (.*)$`).FindAllStringSubmatch(recipes(t), -1)
	for _, heading := range headings {
		if !strings.Contains(string(tests), strconv.Quote(heading[0])) {
			t.Errorf("no test runs the recipe %q", heading[0])
		}
		if heading[1] == "##" && !strings.Contains(recipes(t), "["+heading[2]+"](#") {
			t.Errorf("the list of contents lacks %q", heading[2])
		}
	}
	if len(headings) < 25 {
		t.Errorf("recipes/README.md has %d recipes", len(headings))
	}
}

// oneProgram are the recipes that build on each other: a chat in JSON. They change hub.go
// and client.go only at the places for an application.
var oneProgram = []string{
	"## Handle messages",
	"## Send to some",
	"## Welcome and history",
	"## Change a client later",
	"## Log in",
	"### By a first message",
	"## Joins, leaves and presence",
	"## Listen-only clients",
	"## Feeds from other goroutines",
	"## A database or an RPC",
	"## Close with a code of your own",
}

// allRecipes are those that can stand together, in the order of recipes/README.md. (The end
// is that of the graceful shutdown.)
var allRecipes = append(slices.Clip(oneProgram),
	"### Ignore all that a client sends",
	"## Allowed origins",
	"## Message sizes",
	"## Rate limit",
	"## One message a frame",
	"## Compression",
	"## Slow clients that miss messages",
	"## Metrics",
)

// yours is what the recipes leave to the application.
const yours = `package main

func userOf(r *http.Request) string { return r.FormValue("user") }

func userOfToken(token string) string {
	user, _ := strings.CutPrefix(token, "token of ")
	return user
}

func lookUp(ctx context.Context, question string) (string, error) {
	if question == "no answer" {
		<-ctx.Done()
		return "", ctx.Err()
	}
	return "the answer to " + question, nil
}

var readings = make(chan string)

var database struct {
	sync.Mutex
	state string
	lines []string
}

func save(out Out) error {
	database.Lock()
	defer database.Unlock()
	switch database.state {
	case "fails":
		return errors.New("the database fails")
	case "hangs":
		select {}
	}
	database.lines = append(database.lines, out.User+": "+out.Text)
	return nil
}

func handlers(mux *http.ServeMux, hub *Hub) {
	mux.HandleFunc("/reading", func(w http.ResponseWriter, r *http.Request) {
		readings <- r.FormValue("text")
	})
	mux.HandleFunc("/database", func(w http.ResponseWriter, r *http.Request) {
		database.Lock()
		defer database.Unlock()
		database.state = r.FormValue("state")
		fmt.Fprint(w, strings.Join(database.lines, "\n"))
	})
	mux.HandleFunc("/slow", func(w http.ResponseWriter, r *http.Request) {
		log.Print("a slow request")
		<-hub.stopped
		io.WriteString(w, "answered")
	})
}
`

// inMain is the code of a test beside that of a recipe in main.
var inMain = map[string]string{
	"## Change a client later": `
	mux.HandleFunc("/mute", func(w http.ResponseWriter, r *http.Request) {
		mute(r.FormValue("user"))
	})`,
	"## Close with a code of your own": `
	mux.HandleFunc("/kick", func(w http.ResponseWriter, r *http.Request) {
		kick(r.FormValue("user"))
	})`,
	"## Slow clients that miss messages": `
	mux.HandleFunc("/state", func(w http.ResponseWriter, r *http.Request) {
		send([]byte(strings.Repeat("x", 32<<10)))
	})`,
}

// withRecipes returns the changes that build a program with these recipes, in this order, in
// the main of the first recipe, which ends with the graceful shutdown.
func withRecipes(t *testing.T, headings ...string) []string {
	t.Helper()
	all := []string{`
--- main.go
-	return serve(ctx, listener)
+	return serveOwn(listener)
 }
`, newFile("yours.go", yours)}
	var main, end string
	if !slices.Contains(headings, "## A database or an RPC") {
		all[1] = strings.Replace(all[1], "out Out", "out struct{ User, Text string }", 1)
	}
	for _, heading := range headings {
		changes, code := recipe(t, heading)
		if heading == "## A database or an RPC" {
			const first = "go func() { <-hub.ended; close"
			code, end, _ = strings.Cut(code, first)
			end = first + end
		}
		all = append(all, changes)
		main += code + inMain[heading] + "\n"
	}
	_, shutdown := recipe(t, "## Graceful shutdown")
	copied, _ := recipe(t, "## Copy it")
	_, copied, _ = strings.Cut(strings.ReplaceAll(copied, "\n+", "\n"), "--- main.go\n")
	own, _, _ := strings.Cut(copied, "\tlistener, err := ")
	own = replace(t, own, "func main() {", "func serveOwn(listener net.Listener) error {")
	const ws = "\tmux.HandleFunc(\"/ws\", " +
		"func(w http.ResponseWriter, r *http.Request) { serveWs(hub, w, r) })\n"
	if strings.Contains(main, `mux.HandleFunc("/ws",`) {
		own = replace(t, own, ws, "") // A recipe replaces it.
	}
	const hub = "\thub := newHub()\n"
	own = replace(t, own, hub, hub+"\thandlers(mux, hub)\n"+main)
	return append(all, newFile("own.go", own+shutdown+end+"\treturn nil\n}\n"))
}

// Each recipe needs only those before it.
func TestEachPrefixOfTheRecipesBuilds(t *testing.T) {
	t.Parallel()
	for i := range oneProgram {
		vet(t, copyOf(t, root, withRecipes(t, oneProgram[:i+1]...)...))
	}
}

func vet(t *testing.T, dir string) {
	t.Helper()
	cmd := exec.Command("go", "vet", ".")
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go vet: %v\n%s", err, out)
	}
}

// Of hub.go and client.go, the program replaces the body of handle, and nothing else. It adds
// fields, and lines at the marked places.
func TestRecipesChangeOnlyThePlacesOfTheApplication(t *testing.T) {
	t.Parallel()
	places := regexp.MustCompile(`^( type (Hub|Client) struct \{| \t\t\t// APPLICATION: .*…|` +
		`@@|\+.*|-\tc\.hub\.broadcast <- line)$`)
	n := 0
	for _, heading := range oneProgram {
		changes, _ := recipe(t, heading)
		for _, file := range strings.Split(changes, "\n--- ")[1:] {
			name, lines, _ := strings.Cut(file, "\n")
			for line := range strings.SplitSeq(strings.Trim(lines, "\n"), "\n") {
				if name != "hub.go" && name != "client.go" {
					continue
				}
				if n++; !places.MatchString(" "+line) && !places.MatchString(line) {
					t.Errorf("%s changes %s: %q", heading, name, line)
				}
			}
		}
	}
	if n < 20 {
		t.Errorf("%d lines", n)
	}
}

// An out is a document that a client of the recipes' program receives.
type out struct {
	Type     string   `json:"type"`
	Text     string   `json:"text,omitempty"`
	User     string   `json:"user,omitempty"`
	Room     string   `json:"room,omitempty"`
	Users    []string `json:"users,omitempty"`
	Joined   []string `json:"joined,omitempty"`
	Left     []string `json:"left,omitempty"`
	Messages []out    `json:"messages,omitempty"`
}

// A jsonClient reads documents, one a line.
type jsonClient struct {
	*websocket.Conn
	lines []string
}

func (s *server) dialJSON(t *testing.T, path string) *jsonClient {
	t.Helper()
	return &jsonClient{Conn: s.dialTo(t, path)}
}

// next returns the next document. It has exactly the fields above, each of them once.
func (c *jsonClient) next() (next out, err error) {
	for len(c.lines) == 0 {
		c.SetReadDeadline(time.Now().Add(patience))
		_, message, err := c.ReadMessage()
		if err != nil {
			return next, err
		}
		c.lines = strings.Split(string(message), "\n")
	}
	line := c.lines[0]
	c.lines = c.lines[1:]
	if err := json.Unmarshal([]byte(line), &next); err != nil {
		return next, fmt.Errorf("%q: %v", line, err)
	}
	if again, _ := json.Marshal(next); !sameJSON(line, string(again)) {
		return next, fmt.Errorf("got %s, want a document like %s", line, again)
	}
	return next, nil
}

// sameJSON returns whether two documents have the same bytes, in any order.
func sameJSON(a, b string) bool {
	sorted := func(s string) []byte { return slices.Sorted(slices.Values([]byte(s))) }
	return slices.Equal(sorted(a), sorted(b))
}

// want checks the next documents, apart from presence and history, unless they are wanted.
func (c *jsonClient) want(t *testing.T, want ...out) {
	t.Helper()
	for len(want) > 0 {
		got, err := c.next()
		if err != nil {
			t.Fatalf("a client reads %v, want %+v", err, want[0])
		}
		switch {
		case fmt.Sprint(got) == fmt.Sprint(want[0]):
			want = want[1:]
		case got.Type != "presence" && got.Type != "history":
			t.Fatalf("a client reads\n%+v, want\n%+v", got, want[0])
		}
	}
}

// wantError checks that the next document is an error with text in it.
func (c *jsonClient) wantError(t *testing.T, text string) {
	t.Helper()
	for {
		got, err := c.next()
		switch {
		case err != nil || got.Type == "error" && !strings.Contains(got.Text, text):
			t.Fatalf("a client reads %+v, %v, want an error with %q", got, err, text)
		case got.Type == "error":
			return
		case got.Type != "presence" && got.Type != "history":
			t.Fatalf("a client reads %+v, want an error with %q", got, text)
		}
	}
}

// wantPresence reads until a notice says that these users are there.
func (c *jsonClient) wantPresence(t *testing.T, users ...string) (notice out) {
	t.Helper()
	for notice.Type != "presence" || !slices.Equal(notice.Users, users) {
		var err error
		if notice, err = c.next(); err != nil {
			t.Fatalf("a client reads %v, want the users %q", err, users)
		}
	}
	return notice
}

// wantNoRace stops the server, and checks that the race detector has found nothing.
func (s *server) wantNoRace(t *testing.T, limit time.Duration) {
	t.Helper()
	s.signal(t, syscall.SIGTERM)
	s.wantExit(t, time.Now(), limit)
	if log := s.log.String(); strings.Contains(log, "DATA RACE") {
		t.Errorf("a data race:\n%s", log)
	}
}

// wantStatus checks the status of the response to a handshake.
func (s *server) wantStatus(t *testing.T, path string, header http.Header, want int) {
	t.Helper()
	conn, response, err := websocket.DefaultDialer.Dial("ws://"+s.addr+path, header)
	if err == nil {
		conn.Close()
	}
	if response == nil || response.StatusCode != want {
		t.Errorf("%s, %v: got %v, %v, want status %d", path, header, response, err, want)
	}
}

func startRecipes(t *testing.T, headings ...string) *server {
	t.Helper()
	dir := copyOf(t, root, withRecipes(t, headings...)...)
	return startCommand(t, exec.Command(buildIn(t, dir, "-race"), "-addr", ownHost("localhost:0")))
}

// The recipes that build on each other, one after the other.
func TestRecipesThatBuildOnEachOther(t *testing.T) {
	t.Parallel()
	s := startRecipes(t, oneProgram...)
	late := s.dialJSON(t, "/login/ws") // It does not log in.

	// Without a name, or with one that forges, a handshake is refused.
	for _, user := range []string{"", "%ff%fe", "a%0Ab", "%20a", strings.Repeat("x", 33)} {
		s.wantStatus(t, "/ws?user="+user, nil, http.StatusUnauthorized)
	}

	grete := s.dialJSON(t, "/ws?user=grete")
	grete.want(t, out{Type: "history", Room: "lobby"})
	hans := s.dialJSON(t, "/ws?user=hans")
	if notice := grete.wantPresence(t, "grete", "hans"); !slices.Contains(notice.Joined, "hans") {
		t.Errorf("got the notice %+v, want hans in joined", notice)
	}

	// Messages: what the server sends is its own, and errors reach their sender alone.
	for message, problem := range map[string]string{
		"hello":            "invalid character",
		`["chat"]`:         "cannot unmarshal",
		`{"type":7}`:       "cannot unmarshal",
		`{"type":"shout"}`: "unknown type",
		`{"type":"chat","text":"x","user":"uwe"}`: "unknown field",
		`{"type":"chat"} {"type":"chat"}`:         "one JSON value",
		`{"type":"chat"`:                          "EOF",
	} {
		send(t, hans.Conn, message)
		hans.wantError(t, problem)
	}
	send(t, hans.Conn, `{"type":"private","TYPE":"chat","text":"a\nb\u001b"}`)
	chat := out{Type: "chat", Text: "a b", User: "hans", Room: "lobby"}
	hans.want(t, chat)
	grete.want(t, chat)

	// To one user, in each tab; to all but the sender; to a room.
	tab := s.dialJSON(t, "/ws?user=grete")
	tab.want(t, out{Type: "history", Room: "lobby", Messages: []out{chat}})
	send(t, hans.Conn, `{"type":"private","to":"grete","text":"psst"}`)
	psst := out{Type: "private", Text: "psst", User: "hans"}
	for _, c := range []*jsonClient{hans, grete, tab} {
		c.want(t, psst)
	}
	for _, to := range []string{"uwe", ""} {
		send(t, hans.Conn, `{"type":"private","to":"`+to+`","text":"psst"}`)
		hans.want(t, out{Type: "private", Text: "psst", User: "hans"})
		hans.wantError(t, "not connected")
	}
	send(t, hans.Conn, `{"type":"typing"}`)
	grete.want(t, out{Type: "typing", User: "hans", Room: "lobby"})
	send(t, hans.Conn, `{"type":"join","text":"\n"}`)
	hans.wantError(t, "invalid room")
	send(t, hans.Conn, `{"type":"join","text":"garden"}`)
	hans.want(t, out{Type: "history", Room: "garden"})
	if notice := grete.wantPresence(t, "grete"); !slices.Equal(notice.Left, []string{"hans"}) {
		t.Errorf("got the notice %+v, want hans in left", notice)
	}
	send(t, hans.Conn, `{"type":"chat","text":"roses"}`)
	hans.want(t, out{Type: "chat", Text: "roses", User: "hans", Room: "garden"})
	send(t, tab.Conn, `{"type":"chat","text":"soup"}`)
	soup := out{Type: "chat", Text: "soup", User: "grete", Room: "lobby"}
	grete.want(t, soup)
	tab.want(t, out{Type: "typing", User: "hans", Room: "lobby"}, soup)

	// A login by a first message. A tab that goes is no news.
	uwe := s.dialJSON(t, "/login/ws")
	send(t, uwe.Conn, `{"type":"chat","text":"let me in"}`)
	uwe.wantError(t, "log in first")
	send(t, uwe.Conn, `{"type":"login","text":"token of uwe"}`)
	uwe.want(t, out{Type: "history", Room: "lobby", Messages: []out{chat, soup}})
	send(t, uwe.Conn, `{"type":"login","text":"token of grete"}`)
	uwe.wantError(t, "logged in already")
	leave(t, tab.Conn)
	if notice := grete.wantPresence(t, "grete", "uwe"); len(notice.Left) > 0 {
		t.Errorf("got the notice %+v, want nobody in left", notice)
	}
	refused := s.dialJSON(t, "/login/ws")
	send(t, refused.Conn, `{"type":"login","text":"token of `+strings.Repeat("x", 33)+`"}`)
	wantEnd(t, refused.Conn, 4401)

	// A client that listens.
	listener := s.dialJSON(t, "/listen/ws")
	listener.want(t, out{Type: "history", Room: "lobby", Messages: []out{chat, soup}})
	send(t, listener.Conn, `{"type":"chat","text":"x"}`)
	listener.wantError(t, "only listen")

	// A feed, and a slow answer, which delays others by nothing.
	send(t, uwe.Conn, `{"type":"ask","text":"no answer"}`)
	send(t, uwe.Conn, `{"type":"ask","text":"life"}`)
	s.get(t, "/reading?text=20+degrees")
	for _, c := range []*jsonClient{grete, uwe, listener} {
		c.want(t, out{Type: "reading", Text: "20 degrees", Room: "lobby"})
	}
	uwe.wantError(t, "try again later")
	uwe.want(t, out{Type: "answer", Text: "the answer to life"})

	// Chat is saved, and nothing else.
	if got := s.get(t, "/database"); got != "hans: a b\nhans: roses\ngrete: soup" {
		t.Errorf("the database has %q", got)
	}
	s.get(t, "/database?state=fails")
	send(t, uwe.Conn, `{"type":"chat","text":"lost"}`)
	grete.want(t, out{Type: "chat", Text: "lost", User: "uwe", Room: "lobby"})
	s.waitForLog(t, "not (saved): the database fails")
	s.get(t, "/database?state=works")

	s.get(t, "/mute?user=uwe")
	send(t, uwe.Conn, `{"type":"chat","text":"x"}`)
	uwe.want(t, out{Type: "chat", Text: "lost", User: "uwe", Room: "lobby"})
	uwe.wantError(t, "muted")
	s.get(t, "/kick?user=uwe")
	wantEnd(t, uwe.Conn, 4003)
	grete.wantPresence(t, "grete")

	wantEnd(t, late.Conn, 4401)
	s.wantNoRace(t, exitTime)
}

// hub.go and client.go in a package of their own: only the package's name changes. One more
// file exports what other packages may call.
func TestRecipeForAPackage(t *testing.T) {
	t.Parallel()
	exported, _ := recipe(t, "## Your own package")
	dir := copyOf(t, root, exported, `
--- go.mod
-module chat
+module example.com/game
--- hub.go
-package main
+package chat
--- client.go
-package main
+package chat
--- main.go
-	hub := newHub()
-	go hub.run()
+	room := chat.New()
@@
-	mux.HandleFunc("/ws", func(w http.ResponseWriter, r *http.Request) { serveWs(hub, w, r) })
+	mux.Handle("/ws", room)
+	mux.HandleFunc("/dinner", func(w http.ResponseWriter, r *http.Request) {
+		room.Broadcast("Dinner\nis ready.")
+	})
@@
-	hub.stop()
 	logSoon("shutting down")
-	select {
-	case <-hub.ended:
-	case <-time.After(shutdownWait):
-		logSoon("exiting: some clients are still connected after %v", shutdownWait)
-	}
+	timeout, cancel := context.WithTimeout(context.Background(), shutdownWait)
+	defer cancel()
+	room.Stop(timeout)
@@
-	log.Printf("%s: %s %q", r.RemoteAddr, excerpt(r.Method), excerpt(r.URL.String()))
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
	s.get(t, "/dinner")
	wantLines(t, conn, "Dinner is ready.")
	s.signal(t, syscall.SIGTERM)
	wantEnd(t, conn, websocket.CloseGoingAway)
	s.wantExit(t, time.Now(), exitTime)
}

// The programs of the recipes are attacked: users with forged names, requests with duplicate
// keys, a flood, one that reconnects without end, peers that do not read, a database that
// fails. Two users chat meanwhile, and notice nothing. The end comes in the middle of it,
// with half a request under way and a database that hangs.
func TestAttackOnTheRecipes(t *testing.T) {
	t.Parallel()
	t.Run("places of the application", func(t *testing.T) { t.Parallel(); attack(t, oneProgram...) })
	t.Run("all", func(t *testing.T) { t.Parallel(); attack(t, allRecipes...) })
}

func attack(t *testing.T, headings ...string) {
	s := startRecipes(t, headings...)
	s.get(t, "/database?state=fails")
	grete, hans := s.dialJSON(t, "/ws?user=grete"), s.dialJSON(t, "/ws?user=hans")

	var attackers sync.WaitGroup
	var ended atomic.Bool
	repeat := func(f func()) {
		attackers.Go(func() {
			for !ended.Load() {
				f()
			}
		})
	}
	slow := websocket.Dialer{NetDial: func(network, addr string) (net.Conn, error) {
		conn, err := net.Dial(network, addr)
		if err == nil {
			conn.(*net.TCPConn).SetReadBuffer(4096) // so that it fills up soon
		}
		return conn, err
	}}
	stalled, _, err := slow.Dial("ws://"+s.addr+"/ws?user=stalled", nil) // It reads nothing.
	if err != nil {
		t.Fatal(err)
	}
	defer stalled.Close()
	grete.wantPresence(t, "grete", "hans", "stalled")
	// Some send without end.
	long := `{"type":"chat","text":"` + strings.Repeat("x", 400) + `"}`
	for i := range 6 {
		repeat(func() {
			url := fmt.Sprintf("ws://%s/ws?user=flood%d", s.addr, i)
			conn, _, err := websocket.DefaultDialer.Dial(url, nil)
			if err != nil {
				return
			}
			defer conn.Close()
			go discard(conn)
			for err == nil && !ended.Load() {
				err = conn.WriteMessage(websocket.TextMessage, []byte(long))
			}
		})
	}
	// Names, and requests that say two things.
	requests := []string{
		`{"type":"private","TYPE":"chat","text":"x\u0000\n\ud800","Text":"y\u2028\u009b"}`,
		`{"type":"join","text":"lobby\u0000"}`, `{"type":"join","text":"lobby"}`,
		`{"type":"join","text":"` + strings.Repeat("r", 100) + `"}`,
		`{"type":"login","text":"token of \n"}`, `{"type":"chat"`, `[]`, `null`,
		`{"type":"typing"}`, `{"type":"ask","text":"no answer"}`,
	}
	reconnects := atomic.Int32{}
	repeat(func() {
		n := reconnects.Add(1)
		user := []string{"%ff%fe", "a%0Ab", fmt.Sprint("come", n), "go"}[n%4]
		path := []string{"/ws?user=" + user, "/login/ws", "/listen/ws"}[n%3]
		conn, _, err := websocket.DefaultDialer.Dial("ws://"+s.addr+path, nil)
		if err != nil {
			return
		}
		defer conn.Close()
		for i := range n % 4 {
			conn.WriteMessage(websocket.TextMessage, []byte(requests[(n+i)%int32(len(requests))]))
		}
		if n%5 == 0 {
			conn.WriteMessage(websocket.TextMessage, []byte("\xff"))
		}
	})

	// Hans sends, and Grete receives, until the stalled client has been dropped.
	const least = 200
	presence, sent, dropped := 0, 0, false
	start := time.Now()
	for received := 0; received < least || !dropped; received++ {
		if time.Since(start) > 2*patience {
			t.Fatalf("after %d messages the stalled client is not dropped:\n%s", received, s.lastLog())
		}
		send(t, hans.Conn, fmt.Sprintf(`{"type":"chat","text":"%d"}`, sent))
		sent++
		for _, c := range []*jsonClient{hans, grete} {
			for {
				got, err := c.next()
				if err != nil || got.Type == "error" {
					t.Fatalf("a user reads %+v, %v, in the attack:\n%s", got, err, s.lastLog())
				}
				if got.Type == "presence" && c == grete {
					presence++
					dropped = dropped || slices.Contains(got.Left, "stalled")
				}
				if strings.ContainsFunc(got.Text+got.User+got.Room, unicode.IsControl) {
					t.Errorf("a user reads %+v", got)
				}
				if got.User == "hans" && got.Type == "chat" {
					if got.Text != fmt.Sprint(sent-1) {
						t.Fatalf("got message %s of hans, want %d", got.Text, sent-1)
					}
					break
				}
			}
		}
	}
	took := time.Since(start)
	t.Logf("%d messages in %v, %d reconnects, %d presence notices",
		sent, took, reconnects.Load(), presence)
	if limit := int(took/time.Second) + 2; presence > limit {
		t.Errorf("got %d presence notices in %v, want at most %d", presence, took, limit)
	}

	// The end.
	s.get(t, "/database?state=hangs")
	for _, half := range []string{
		"GET / HTTP/1.1\r\nHost: x",
		"POST /database HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nstate=",
	} {
		conn, err := net.Dial("tcp", s.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		io.WriteString(conn, half)
	}
	ends := make(chan error, 2)
	for _, c := range []*jsonClient{hans, grete} {
		c.SetReadDeadline(time.Now().Add(patience))
		go func() { ends <- discard(c.Conn) }()
	}
	s.signal(t, syscall.SIGTERM)
	start = time.Now()
	for range 2 {
		wantClose(t, <-ends, websocket.CloseGoingAway)
	}
	s.wantExit(t, start, exitTime) // 8 s for clients and requests, 5 s for the database
	ended.Store(true)
	attackers.Wait()
	if log := s.log.String(); strings.Contains(log, "DATA RACE") || strings.Contains(log, "panic") {
		t.Errorf("the log has\n%s", log)
	}
}

// lastLog returns the end of the log.
func (s *server) lastLog() string {
	log := s.log.String()
	return log[max(0, len(log)-2000):]
}

// The commands and the main of the first recipe make a program, also in a module of the
// oldest Go that the recipe names.
func TestRecipeToCopy(t *testing.T) {
	t.Parallel()
	main, commands := recipe(t, "## Copy it")
	dir := t.TempDir()
	for _, name := range []string{"hub.go", "client.go"} {
		content, err := os.ReadFile(filepath.Join(root, name))
		if err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(dir, "chat", name), string(content))
	}
	cache, err := exec.Command("go", "env", "GOMODCACHE").Output()
	if err != nil {
		t.Fatal(err)
	}
	run := func(dir, commands string) {
		t.Helper()
		cmd := exec.Command("sh", "-euc", commands)
		cmd.Dir = dir
		// Modules come from the cache.
		proxy := "GOPROXY=file://" + strings.TrimSpace(string(cache)) + "/cache/download"
		cmd.Env = append(os.Environ(), "GONOSUMDB=*", "GOFLAGS=-mod=mod", proxy)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", commands, err, out)
		}
	}
	run(dir, commands)
	app := filepath.Join(dir, "app")
	main = strings.Replace(main, "--- main.go", "--- own.go", 1)
	text, err := os.ReadFile(filepath.Join(copyOf(t, root, main), "own.go"))
	if err != nil {
		t.Fatal(err)
	}
	addr := freeAddr(t)
	write(t, filepath.Join(app, "main.go"), replace(t, string(text), "localhost:8080", addr))
	oldest := regexp.MustCompile(`line of your .go\.mod. may say (1\.\d+)`).
		FindStringSubmatch(recipes(t))
	if oldest == nil {
		t.Fatal("recipes/README.md names no oldest Go")
	}
	run(app, "go mod edit -go="+oldest[1]+" && go mod tidy && go vet .")
	_, shutdown := recipe(t, "## Graceful shutdown")
	last := "+\tlog.Fatal(http.Serve(listener, mux)) // Graceful shutdown replaces this line.\n"
	vet(t, copyOf(t, root, "\n--- main.go\n-func main() {\n+func chat() {\n",
		replace(t, main, last, added(shutdown))))
	s := start(t, exec.Command(buildIn(t, app)))
	s.addr = addr
	awaitListener(t, addr)
	conn := s.dial(t)
	send(t, conn, "hello")
	wantLines(t, conn, "hello")
}

func TestRecipeForRoomsOnDemand(t *testing.T) {
	t.Parallel()
	rooms, open := recipe(t, "## Rooms on demand")
	s := startCopy(t, rooms, `
--- main.go
 	mux.HandleFunc("/", serveHome)
+	`+strings.ReplaceAll(strings.TrimSpace(open), "\n", "\n+")+`
@@
 	hub.stop()
+	rooms.stop()
--- rooms.go
-const maxRooms = 100
+const maxRooms = 2
`)
	kitchen := s.dialTo(t, "/kitchen/ws")
	s.get(t, "/attic/ws") // It is no handshake, and opens no room.
	garden := s.dialTo(t, "/garden/ws")
	send(t, kitchen, "soup")
	wantLines(t, kitchen, "soup")
	send(t, garden, "roses")
	wantLines(t, garden, "roses")
	for _, room := range []string{"attic", strings.Repeat("x", 33)} {
		s.wantStatus(t, "/"+room+"/ws", nil, http.StatusNotFound)
	}
	s.signal(t, syscall.SIGTERM)
	wantEnd(t, kitchen, websocket.CloseGoingAway)
	wantEnd(t, garden, websocket.CloseGoingAway)
	s.wantExit(t, time.Now(), exitTime)
}

// serveAt returns a change that serves clients with a field set at another path.
func serveAt(path, field string) string {
	return handle(path, "(&Client{hub: hub, "+field+"}).serve(w, r)")
}

func TestRecipeToIgnoreWhatAClientSends(t *testing.T) {
	t.Parallel()
	changes, _ := recipe(t, "### Ignore all that a client sends")
	s := startCopy(t, changes, serveAt("/deaf", "ignoreInput: true"))
	deaf, sender := s.dialTo(t, "/deaf"), s.dial(t)
	send(t, deaf, "hello")
	send(t, deaf, "\xff")
	send(t, deaf, strings.Repeat("x", 1<<20))
	sendBinary(t, deaf, []byte("binary"))
	deaf.SetPongHandler(func(string) error { send(t, sender, "it is alive"); return nil })
	if err := deaf.WriteMessage(websocket.PingMessage, nil); err != nil {
		t.Fatal(err)
	}
	wantLines(t, deaf, "it is alive") // once all of that has been read
	wantLines(t, sender, "it is alive")
}

// The last case is DNS rebinding: Host and Origin are both the name of the attacker's site.
func TestRecipeForAllowedOrigins(t *testing.T) {
	t.Parallel()
	_, check := recipe(t, "## Allowed origins")
	s := startCopy(t, add(check))
	for _, tt := range []struct {
		origin, host string
		want         int
	}{
		{"", "", 101},
		{"https://chat.example", "", 101},
		{"http://localhost:8080", "", 101},
		{"http://chat.example", "", 403},
		{"https://evil.example", "", 403},
		{"null", "", 403},
		{"http://rebinding.example:8080", "rebinding.example:8080", 403},
	} {
		header := http.Header{}
		if tt.origin != "" {
			header.Set("Origin", tt.origin)
		}
		if tt.host != "" {
			header.Set("Host", tt.host)
		}
		s.wantStatus(t, "/ws", header, tt.want)
	}
}

func TestRecipesForSizesAndRates(t *testing.T) {
	t.Parallel()
	sizes, _ := recipe(t, "## Message sizes")
	rates, _ := recipe(t, "## Rate limit")
	s := startCopy(t, sizes, rates)
	sender, reader := s.dial(t), s.dial(t)
	message := strings.Repeat("x", 64<<10)
	send(t, sender, message)
	wantLines(t, sender, message)
	wantLines(t, reader, message)
	send(t, sender, message+"x")
	wantEnd(t, sender, websocket.CloseMessageTooBig)

	flood := s.dial(t)
	go discard(flood)
	go func() {
		for flood.WriteMessage(websocket.PingMessage, nil) == nil { // until the test ends
		}
	}()
	if got := s.waitForLog(t, `rate limited: 1/(\S+)`); got != "1ms" {
		t.Errorf("the log says a message per %s, want 1ms", got)
	}
}

// A client that does not read misses states, and stays connected; it receives what all do.
func TestRecipeForSlowClientsThatMissMessages(t *testing.T) {
	t.Parallel()
	_, latest := recipe(t, "## Slow clients that miss messages")
	s := startCopy(t, add(latest+inMain["## Slow clients that miss messages"]))
	slow, reader := s.dial(t), s.dial(t)
	const n = 400 // more than the slow client's queue and TCP take
	for range n {
		s.get(t, "/state")
		wantLines(t, reader, strings.Repeat("x", 32<<10))
	}
	send(t, reader, "an announcement")
	wantLines(t, reader, "an announcement")
	for states := 0; ; states++ {
		slow.SetReadDeadline(time.Now().Add(patience))
		_, message, err := slow.ReadMessage()
		if err != nil {
			t.Fatalf("the slow client reads %v after %d states", err, states)
		}
		if string(message) == "an announcement" {
			if states == n {
				t.Error("the slow client has missed no state: the test has to send more")
			}
			break
		}
	}
}

// The shutdown waits for a request that has begun, and not for one of which half is missing.
func TestRecipeForAGracefulShutdown(t *testing.T) {
	t.Parallel()
	dir := copyOf(t, root, withRecipes(t)...)
	s := startCommand(t, exec.Command(buildIn(t, dir), "-addr", ownHost("localhost:0")))
	conn := s.dial(t)
	send(t, conn, "hello")
	wantLines(t, conn, "hello")
	half, err := net.Dial("tcp", s.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer half.Close()
	io.WriteString(half, "POST /slow HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n")
	answer := make(chan string)
	go func() { answer <- s.get(t, "/slow") }()
	s.waitForLog(t, "a slow (request)")
	start := time.Now()
	s.signal(t, syscall.SIGTERM)
	wantEnd(t, conn, websocket.CloseGoingAway)
	if got := <-answer; got != "answered" {
		t.Errorf("the slow request gets %q, want %q", got, "answered")
	}
	s.wantExit(t, start, 15*time.Second)
}

// withModules copies e2e's go.mod, which has more modules, to dir.
func withModules(t *testing.T, dir string) string {
	t.Helper()
	for _, name := range []string{"go.mod", "go.sum"} {
		content, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(dir, name), string(content))
	}
	return dir
}

func TestRecipesForFrameworks(t *testing.T) {
	t.Parallel()
	_, code := recipe(t, "## gin, echo, chi and middleware")
	routes := strings.Split(strings.TrimSpace(code), "\n")
	frameworks := []struct{ name, path, router string }{
		{"gin", "github.com/gin-gonic/gin", "gin.New()"},
		{"echo v4", "github.com/labstack/echo/v4", "echo.New()"},
		{"echo v5", "github.com/labstack/echo/v5", "echo.New()"},
		{"chi", "github.com/go-chi/chi/v5", "chi.NewRouter()"},
	}
	if len(routes) != len(frameworks) {
		t.Fatalf("got the routes %q", routes)
	}
	for i, framework := range frameworks {
		t.Run(framework.name, func(t *testing.T) {
			t.Parallel()
			dir := withModules(t, copyOf(t, root, `
--- main.go
-	mux := http.NewServeMux()
+	router := `+framework.router+`
@@
-	mux.HandleFunc("/", serveHome)
-	mux.HandleFunc("/ws", func(w http.ResponseWriter, r *http.Request) { serveWs(hub, w, r) })
+	`+routes[i]+`
@@
-		Handler:        mux,
+		Handler:        router,
@@
 	"time"
+
+	"`+framework.path+`"
 )
`))
			s := startCommand(t, exec.Command(buildIn(t, dir), "-addr", ownHost("localhost:0")))
			conn := s.dial(t)
			send(t, conn, "hello")
			wantLines(t, conn, "hello")
			if got := s.get(t, "/ws"); !strings.Contains(got, "Bad Request") {
				t.Errorf("without an upgrade the response is %q, want Bad Request", got)
			}
			s.stop(t)
		})
	}
}

func TestRecipeForMiddleware(t *testing.T) {
	t.Parallel()
	middleware, _ := recipe(t, "## gin, echo, chi and middleware")
	s := startCopy(t, middleware, `
--- main.go
-	mux.HandleFunc("/ws", func(w http.ResponseWriter, r *http.Request) { serveWs(hub, w, r) })
+	ws := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { serveWs(hub, w, r) })
+	mux.HandleFunc("/ws", func(w http.ResponseWriter, r *http.Request) {
+		ws(&statusWriter{ResponseWriter: w}, r)
+	})
+	mux.HandleFunc("/opaque", func(w http.ResponseWriter, r *http.Request) {
+		ws(struct{ http.ResponseWriter }{w}, r)
+	})
+	mux.Handle("/timeout", http.TimeoutHandler(ws, time.Minute, ""))
`)
	conn := s.dial(t)
	send(t, conn, "hello")
	wantLines(t, conn, "hello")
	pattern := "the handshake gets status (\\d+), and the log says `(handshake refused: [^`]*)`"
	symptom := regexp.MustCompile(pattern).FindStringSubmatch(recipes(t))
	if symptom == nil {
		t.Fatal("recipes/README.md does not say what middleware without Unwrap does")
	}
	status, _ := strconv.Atoi(symptom[1])
	for _, path := range []string{"/opaque", "/timeout"} {
		s.wantStatus(t, path, nil, status)
	}
	s.waitForLog(t, "("+regexp.QuoteMeta(symptom[2])+")")
}

// The tests of the recipe pass in a copy, and fail in one that is broken.
func TestRecipeToTestYourOwnCode(t *testing.T) {
	t.Parallel()
	tests, _ := recipe(t, "## Test your own code")
	for name, change := range map[string]string{
		"": "",
		"TestChat": `
--- client.go
-	c.hub.broadcast <- line
+	c.tell([]byte("no"))
`,
		"TestSlowClientIsDropped": `
--- hub.go
-			h.drop(client, errSlowClient)
+			return true
`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cmd := exec.Command("go", "test", ".")
			cmd.Dir = copyOf(t, root, tests, change)
			out, err := cmd.CombinedOutput()
			if name == "" && err != nil || name != "" && !strings.Contains(string(out), "--- FAIL: "+name) {
				t.Errorf("go test ends with %v:\n%s", err, out)
			}
		})
	}
}

// The page shows what arrives, sends, and reconnects when the server restarts. It has no
// heartbeat when the connection is half-open, and connects anew.
func TestRecipeForAPage(t *testing.T) {
	t.Parallel()
	_, page := recipe(t, "## A page of your own")
	dir := copyOf(t, root)
	write(t, filepath.Join(dir, "home.html"), page)
	program := buildIn(t, dir)
	s := startCommand(t, exec.Command(program, "-addr", ownHost("localhost:0")))
	p := newTab(t)
	p.beforePage(fast)
	do(p, chromedp.Navigate("http://"+s.addr+"/"))
	p.until(`sockets.length == 1 && sockets[0].readyState == WebSocket.OPEN`)
	const sendHello = `input.value = "<b>hello</b>"; form.requestSubmit(); true`
	eval[bool](p, sendHello)
	p.until(`log.lastChild?.textContent == "<b>hello</b>"`)
	other := s.dial(t)
	send(t, other, "one")
	send(t, other, "two")
	p.until(`log.childElementCount == 3 && log.lastChild.textContent == "two"`)

	s.stop(t)
	p.until(`sockets.length > 2`) // It tries again.
	eval[bool](p, `input.value = "a draft"; form.requestSubmit(); true`)
	startCommand(t, exec.Command(program, "-addr", s.addr))
	p.until(`sockets.at(-1).readyState == WebSocket.OPEN && input.value == "a draft"`)
	n := eval[int](p, `sockets.length`)
	eval[bool](p, `form.requestSubmit(); true`)
	p.until(`log.lastChild.textContent == "a draft"`)
	// No heartbeat comes in time.
	p.until(fmt.Sprintf(`sockets.length > %d && sockets.at(-1).readyState == WebSocket.OPEN`, n))
}

// With the two changes for JSON, the page speaks with the recipe's server.
func TestRecipeForAPageInJSON(t *testing.T) {
	t.Parallel()
	handles, _ := recipe(t, "## Handle messages")
	_, page := recipe(t, "## A page of your own")
	forJSON := regexp.MustCompile("- For JSON, send `([^`]*)`, and show `([^`]*)`").
		FindStringSubmatch(recipes(t))
	if forJSON == nil {
		t.Fatal("recipes/README.md does not say how a page sends JSON")
	}
	page = replace(t, page, "socket.send(input.value)", "socket.send("+forJSON[1]+")")
	page = replace(t, page, "textContent = line", "textContent = "+forJSON[2])
	dir := copyOf(t, root, handles)
	write(t, filepath.Join(dir, "home.html"), page)
	s := startCommand(t, exec.Command(buildIn(t, dir), "-addr", ownHost("localhost:0")))
	p := newTab(t)
	do(p, chromedp.Navigate("http://"+s.addr+"/"))
	p.until(`socket.readyState == WebSocket.OPEN`)
	eval[bool](p, `input.value = "<b>hello</b>"; form.requestSubmit(); true`)
	p.until(`log.lastChild?.textContent == "<b>hello</b>"`)
}

func TestRecipesForMetrics(t *testing.T) {
	t.Parallel()
	change, expvar := recipe(t, "## Metrics")
	metrics, prometheus := recipe(t, "### With Prometheus")
	hub, _, _ := strings.Cut(change, "\n--- metrics.go")
	for name, tt := range map[string]struct {
		changes []string
		path    string
		want    []string
	}{
		"expvar": {
			[]string{change, add(expvar)}, "/debug/vars",
			[]string{`"clients": 1`, `"drops": {"1003": 1, "3000": 1}`},
		},
		"Prometheus": {
			[]string{hub, metrics, add(prometheus)}, "/metrics",
			[]string{
				"chat_clients 1",
				`chat_drops_total{code="1003"} 1`, `chat_drops_total{code="3000"} 1`,
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := withModules(t, copyOf(t, root, tt.changes...))
			s := startCommand(t, exec.Command(buildIn(t, dir), "-addr", ownHost("localhost:0")))
			s.dial(t)
			binary, odd := s.dial(t), s.dial(t)
			sendBinary(t, binary, []byte("binary"))
			wantEnd(t, binary, websocket.CloseUnsupportedData)
			odd.WriteMessage(websocket.CloseMessage, websocket.FormatCloseMessage(4321, ""))
			discard(odd)
			got := s.get(t, tt.path)
			for _, want := range tt.want {
				if !strings.Contains(got, want) {
					t.Errorf("%s lacks %q", tt.path, want)
				}
			}
			if t.Failed() {
				t.Log(got)
			}
		})
	}
}
