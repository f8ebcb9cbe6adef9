package e2e

import (
	"encoding/json"
	"fmt"
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
		name, file, isFile := strings.Cut(text, "\n")
		name, isFile = strings.CutPrefix(name, "// ")
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
	return "\n--- " + name + "\n+" + strings.ReplaceAll(strings.TrimSuffix(content, "\n"), "\n", "\n+") + "\n"
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
	mux.HandleFunc("/reading", func(w http.ResponseWriter, r *http.Request) { readings <- r.FormValue("text") })
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
	"## Change a client later":           `mux.HandleFunc("/mute", func(w http.ResponseWriter, r *http.Request) { mute(r.FormValue("user")) })`,
	"## Close with a code of your own":   `mux.HandleFunc("/kick", func(w http.ResponseWriter, r *http.Request) { kick(r.FormValue("user")) })`,
	"## Slow clients that miss messages": `mux.HandleFunc("/state", func(w http.ResponseWriter, r *http.Request) { send([]byte(strings.Repeat("x", 32<<10))) })`,
	"## Allowed origins":                 "log.Print()", // It needs no more.
}

// withRecipes returns the changes that build a program with these recipes, in this order,
// and its own main, which ends with the graceful shutdown.
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
			code, end, _ = strings.Cut(code, "close(hub.saves)\n")
			end = "close(hub.saves)\n" + end
		}
		all = append(all, changes)
		main += code + inMain[heading] + "\n"
	}
	_, shutdown := recipe(t, "## Graceful shutdown")
	return append(all, newFile("own.go", `package main

func serveOwn(listener net.Listener) error {
	mux := http.NewServeMux()
	hub := newHub()
	handlers(mux, hub)
`+main+`
	go hub.run()
`+shutdown+end+`
	return nil
}
`))
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
	places := regexp.MustCompile(`^( type (Hub|Client) struct \{| \t\t\t// APPLICATION: .*…|@@|\+.*|-\tc\.hub\.broadcast <- line)$`)
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
		if _, response, err := websocket.DefaultDialer.Dial("ws://"+s.addr+"/ws?user="+user, nil); err == nil || response.StatusCode != http.StatusUnauthorized {
			t.Errorf("with the user %q the handshake gives %v, %v, want status 401", user, response, err)
		}
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
	s.wantNoRace(t, 15*time.Second)
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
+	mux.HandleFunc("/dinner", func(w http.ResponseWriter, r *http.Request) { room.Broadcast("Dinner\nis ready.") })
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
	s.wantExit(t, time.Now(), patience)
}
