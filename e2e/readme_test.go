package e2e

import (
	"bytes"
	"cmp"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/evanw/esbuild/pkg/api"
	"github.com/gorilla/websocket"
)

// clone makes a fresh clone of the repository, with git's options.
func clone(t *testing.T, dir string, options ...string) {
	t.Helper()
	args := append([]string{"clone", "--quiet"}, append(options, "..", dir)...)
	if out, err := exec.Command("git", args...).CombinedOutput(); err != nil {
		t.Fatalf("git clone: %v\n%s", err, out)
	}
}

// example matches a command in a README, and the output shown below it.
var example = regexp.MustCompile(`(?m)^    \$ (.*)\n((?:    [^$\n].*\n)*)`)

// On a fresh clone, the commands of each README, in order, have the output that it shows,
// except for the ports. CI runs those that take long.
func TestCommandsOfTheREADMEsHaveTheOutputShown(t *testing.T) {
	t.Parallel()
	root := filepath.Join(t.TempDir(), "chat")
	clone(t, root)
	readmes, err := filepath.Glob(filepath.Join(root, "*", "README.md"))
	if err != nil || len(readmes) == 0 {
		t.Fatal("no README.md in a folder", err)
	}
	for _, readme := range append(readmes, filepath.Join(root, "README.md")) {
		folder, _ := filepath.Rel(root, filepath.Dir(readme))
		t.Run(folder, func(t *testing.T) {
			t.Parallel()
			text, err := os.ReadFile(readme)
			if err != nil {
				t.Fatal(err)
			}
			ports := make(map[string]string) // by those in the README
			for _, match := range example.FindAllStringSubmatch(string(text), -1) {
				command, shown := match[1], match[2]
				t.Log("$ " + command)
				switch {
				case strings.Contains(command, "//nats-1:"): // a host that does not exist here
				case strings.HasPrefix(command, "go run ."):
					runServer(t, filepath.Dir(readme), command, shown, ports)
				case strings.HasPrefix(command, "npx -y wscat "):
					runWscat(t, command, shown, ports)
				case folder == "e2e" && strings.Contains(command, " -bench="):
					wantBenchmark(t, command)
				default:
					wantInCI(t, root, folder, command)
				}
			}
		})
	}
}

// runServer runs a command that starts a server, at an address of its own. It waits for
// the output shown, and adds the ports in it to ports.
func runServer(t *testing.T, dir, command, shown string, ports map[string]string) {
	t.Helper()
	compile := exec.Command("go", "run", ".", "-h") // may take long, which is not the server's time
	compile.Dir = dir
	if out, err := compile.CombinedOutput(); err != nil {
		t.Fatalf("go run . -h: %v\n%s", err, out)
	}
	cmd := exec.Command("sh", "-c", withPorts(command, ports)+" -addr localhost:0")
	cmd.Dir = dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.WaitDelay = time.Millisecond // for the server, which outlives the go command
	t.Cleanup(func() { syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) })
	s := startCommand(t, cmd)

	for line := range strings.Lines(shown) {
		line = strings.TrimSpace(line)
		line = strings.TrimSuffix(line, " (all interfaces)") // These tests listen on one.
		pattern := date.ReplaceAllString(regexp.QuoteMeta(line), date.String())
		pattern = port.ReplaceAllString(pattern, `:(\d+)`)
		pattern = strings.ReplaceAll(pattern, "localhost", `127\.0\.0\.1`)
		got := regexp.MustCompile(pattern).FindStringSubmatch(s.log.String())
		if got == nil {
			t.Fatalf("%s prints\n%s\nwant in it\n%s", command, s.log, line)
		}
		for i, documented := range port.FindAllString(line, -1) {
			ports[documented] = ":" + got[i+1]
		}
	}
}

var (
	date = regexp.MustCompile(`\d{4}/\d\d/\d\d \d\d:\d\d:\d\d`)
	port = regexp.MustCompile(`:\d{4,5}`)
)

// withPorts replaces the ports of the README by the actual ones.
func withPorts(command string, ports map[string]string) string {
	return port.ReplaceAllStringFunc(command, func(documented string) string {
		return cmp.Or(ports[documented], documented)
	})
}

// runWscat runs a command that starts wscat, and types the lines of shown after "> ".
func runWscat(t *testing.T, command, shown string, ports map[string]string) {
	t.Helper()
	// wscat prints these lines only on a terminal, which script provides.
	wscat := exec.Command("script", "--quiet", "--return", "--command", withPorts(command, ports), "/dev/null")
	screen := &output{grown: make(chan struct{}, 1)}
	wscat.Stdout, wscat.Stderr = screen, screen
	keyboard, err := wscat.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := wscat.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { wscat.Process.Kill(); wscat.Wait() })
	for line := range strings.Lines(shown) {
		line = strings.TrimSpace(line)
		if typed, found := strings.CutPrefix(line, "> "); found {
			io.WriteString(keyboard, typed+"\n")
			continue
		}
		timeout := time.After(patience)
		for !strings.Contains(screen.String(), line) {
			select {
			case <-screen.grown:
			case <-timeout:
				t.Fatalf("wscat shows %q, want %q in it", screen, line)
			}
		}
	}
}

// wantInCI checks that .ci/run, or a make target that it calls, runs a command of the
// README in folder. It may add packages, options that answer questions, and -count=1.
func wantInCI(t *testing.T, root, folder, command string) {
	t.Helper()
	script, err := os.ReadFile(filepath.Join(root, ".ci", "run"))
	if err != nil {
		t.Fatal(err)
	}
	run := string(script)
	for _, targets := range regexp.MustCompile(`(?m)^\t*make (.*)$`).FindAllStringSubmatch(run, -1) {
		make := exec.Command("sh", "-c", "make --dry-run "+targets[1])
		make.Dir = root
		out, err := make.CombinedOutput()
		if err != nil {
			t.Fatalf("make --dry-run %s: %v\n%s", targets[1], err, out)
		}
		run += string(out)
	}
	run = strings.NewReplacer("\\\n\t\t", "", "\\\n\t", "", " -y --no-install-recommends", "", " -count=1", "").Replace(run)
	for line := range strings.Lines(run) {
		line = strings.TrimLeft(line, "\t") // of a function
		if (folder == "." || strings.HasPrefix(command, "apt-get ")) && strings.HasPrefix(line, command) {
			return
		}
		for part := range strings.SplitSeq(line, " && ") {
			if strings.HasPrefix(line, "cd "+folder+" && ") && strings.HasPrefix(part, command) {
				return
			}
		}
	}
	t.Errorf("nothing runs %q of %s/README.md: run it in .ci/run, or here", command, folder)
}

// wantBenchmark checks that this module has a benchmark that command would run. It does not run
// it, as that takes minutes and an idle machine.
func wantBenchmark(t *testing.T, command string) {
	t.Helper()
	own, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	list := strings.NewReplacer("go test -run='^$' -bench=", own+" -test.list=", " .", "").Replace(command)
	list = regexp.MustCompile(` -benchtime=\S+`).ReplaceAllString(list, "")
	out, err := exec.Command("sh", "-c", list).CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte("Benchmark")) {
		t.Errorf("%s prints %q, %v, want the name of a benchmark", list, out, err)
	}
}

// make build is reproducible: it makes the same binary from each clone, with the commit
// in it, also if git converts line endings for Windows.
func TestBuildIsReproducible(t *testing.T) {
	t.Parallel()
	var binaries [][]byte
	for _, options := range [][]string{nil, {"--config", "core.autocrlf=true"}} {
		dir := filepath.Join(t.TempDir(), "chat")
		clone(t, dir, options...)
		build := exec.Command("make", "build")
		build.Dir = dir
		build.Env = append(os.Environ(), "GOFLAGS=-buildvcs=true")
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("make build: %v\n%s", err, out)
		}
		binary, err := os.ReadFile(filepath.Join(dir, "chat"))
		if err != nil {
			t.Fatal(err)
		}
		binaries = append(binaries, binary)
	}
	if !bytes.Equal(binaries[0], binaries[1]) {
		t.Error("two clones of one commit make two binaries")
	}
	if !bytes.Contains(binaries[0], []byte("vcs.revision=")) {
		t.Error("the binary does not name its commit")
	}
}

// section returns the code under a heading in file, until the next heading: the changes to
// the server's files, and the other code.
func section(t *testing.T, file, heading string) (changes, code string) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, file))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, found := strings.Cut(string(text), "\n"+heading+"\n")
	if !found {
		t.Fatalf("%s has no heading %q", file, heading)
	}
	rest, _, _ = strings.Cut(rest, "\n#")
	for _, block := range regexp.MustCompile(`(?m)(?:^    .*\n)+`).FindAllString(rest+"\n", -1) {
		block = regexp.MustCompile(`(?m)^    `).ReplaceAllString(block, "")
		if strings.HasPrefix(block, "--- ") {
			changes += "\n" + block
		} else {
			code += block
		}
	}
	if changes+code == "" {
		t.Fatalf("%s has no code under %q", file, heading)
	}
	return changes, code
}

// added returns code as the lines of a change.
func added(code string) string {
	return "+" + strings.ReplaceAll(strings.TrimSuffix(code, "\n"), "\n", "\n+") + "\n"
}

// The setup and the stop of README.md make a program, which ends although a client has sent
// half a request, and after it has answered a whole one.
func TestSetupAndStopOfTheREADME(t *testing.T) {
	t.Parallel()
	_, setup := section(t, "README.md", "## Use it in your project")
	_, stop := section(t, "README.md", "### Graceful shutdown")
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
`+added(setup)+`+	mux.HandleFunc("/slow", func(w http.ResponseWriter, r *http.Request) {
+		log.Print("a slow request")
+		<-hub.stopped
+		io.WriteString(w, "answered")
+	})
+	mux.HandleFunc("/upload", func(w http.ResponseWriter, r *http.Request) {
+		log.Print("an upload")
+		io.Copy(io.Discard, r.Body)
+	})
+	server := &http.Server{Handler: mux}
+	go server.Serve(listener)
`+added(stop)+`+	return nil
+}
`)
	conn := s.dial(t)
	send(t, conn, "hello")
	wantLines(t, conn, "hello")
	half, err := net.Dial("tcp", s.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer half.Close()
	io.WriteString(half, "POST /upload HTTP/1.1\r\nHost: chat\r\nContent-Length: 8\r\n\r\nhalf")
	s.waitForLog(t, "an (upload)")
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

// readmeLogIn is the part of README.md's login that is the application's.
const readmeLogIn = `
--- users.go
+package main
+
+func userOf(r *http.Request) string {
+	if cookie, err := r.Cookie("user"); err == nil {
+		return cookie.Value
+	}
+	return r.FormValue("user")
+}
`

// withREADMERecipes returns the changes of README.md for a login, and for messages that are
// handled.
func withREADMERecipes(t *testing.T) (changes []string) {
	t.Helper()
	handles, toSome := section(t, "README.md", "### Handle messages, reply, and send to some")
	field, logIn := section(t, "README.md", "### Log in")
	return []string{handles, field, readmeLogIn, `
--- main.go
-	mux.HandleFunc("/ws", func(w http.ResponseWriter, r *http.Request) { serveWs(hub, w, r) })
` + added(logIn) + `+	mux.HandleFunc("/taxi", func(w http.ResponseWriter, r *http.Request) {
+		message := []byte("Your taxi is here.")
` + added(toSome) + `+	})
`}
}

// Messages are documents with the sender's name, which no message and no name can forge.
// What is none gets an error, which nobody else sees.
func TestHandleAndLogInOfTheREADME(t *testing.T) {
	t.Parallel()
	s := startCopy(t, withREADMERecipes(t)...)
	url := "ws://" + s.addr + "/ws"
	_, response, err := websocket.DefaultDialer.Dial(url, nil)
	if response == nil || response.StatusCode != 401 {
		t.Errorf("without a login the handshake gets %v, %v, want status 401", response, err)
	}
	hans := s.dialTo(t, "/ws?user=hans")
	grete, _, err := websocket.DefaultDialer.Dial(url, http.Header{"Cookie": {"user=grete"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { grete.Close() })
	const refused = `{"type":"error","text":"send a chat with a text"}`
	for _, message := range []string{
		"hello", `{"text":"a"}`, `{"type":"chat","text":7}`, `{"type":"chat","text":""}`,
		`["chat"]`, `{"type":"chat","text":"a"} {"type":"chat","text":"b"}`,
	} {
		send(t, hans, message)
		wantLines(t, hans, refused)
	}
	s.get(t, "/taxi")
	const want = `{"text":"a\nb","type":"chat","user":"hans"}`
	for _, message := range []string{
		`{"type":"chat","text":"a\nb"}`,
		`{"user":"grete","type":"admin","text":"a","USER":"grete","Type":"chat","Text":"a\nb"}`,
	} {
		send(t, hans, message)
		wantLines(t, hans, want)
	}
	wantLines(t, grete, "Your taxi is here.", want, want)

	forged := s.dialTo(t, "/ws?user=%ff%fe%0a%1b")
	send(t, forged, `{"type":"chat","text":"x"}`)
	wantLines(t, grete, `{"text":"x","type":"chat","user":"\ufffd\ufffd\n\u001b"}`)
}

// The test of README.md passes in a copy, with the race detector, and fails if the copy does
// not broadcast.
func TestTestOfTheREADME(t *testing.T) {
	t.Parallel()
	_, block := section(t, "README.md", "### Test your own code")
	for name, changes := range map[string][]string{
		"unchanged": nil,
		"handle":    withREADMERecipes(t),
		"broken": {`
--- client.go
-	c.hub.broadcast <- line
+	c.tell([]byte("no"))
`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := copyOf(t, root, append(changes, "\n--- chat_test.go\n+package main\n+\n"+added(block))...)
			cmd := exec.Command("go", "test", "-race", ".")
			cmd.Dir = dir
			if out, err := cmd.CombinedOutput(); err == nil == (name == "broken") {
				t.Errorf("go test ends with %v:\n%s", err, out)
			}
		})
	}
}

// A copy of main.go serves TLS, with the call that README.md names, instead of the one there.
func TestTLSOfTheREADME(t *testing.T) {
	t.Parallel()
	calls := regexp.MustCompile("`(server.ServeTLS\\([^`]*\\))` instead of\\s" +
		"`(server.Serve\\([^`]*\\))`").FindStringSubmatch(readme(t))
	if calls == nil {
		t.Fatal("README.md does not say how a copy serves TLS")
	}
	file := certificate(t)
	tls := strings.NewReplacer("cert.pem", file, "key.pem", file).Replace(calls[1])
	s := startCopy(t, "\n--- main.go\n-\terr := "+calls[2]+"\n+\terr := "+tls+"\n")
	conn := dial(t, anyCertificate, "wss://"+s.addr+"/ws")
	send(t, conn, "hello")
	wantLines(t, conn, "hello")
	s.signal(t, syscall.SIGTERM)
	wantEnd(t, conn, websocket.CloseGoingAway)
	s.wantExit(t, time.Now(), exitTime)
}

// HAProxy serves TLS with the directive that README.md names.
func TestTLSOfHAProxyOfTheREADME(t *testing.T) {
	t.Parallel()
	directive := regexp.MustCompile("for TLS, `bind :443( .*) chat.pem`").FindStringSubmatch(readme(t))
	if directive == nil {
		t.Fatal("README.md does not say how HAProxy serves TLS")
	}
	addr := freeAddr(t)
	startHAProxyAlone(t, addr, startServer(t, "localhost:0").addr,
		"bind "+addr, "bind "+addr+directive[1]+" "+certificate(t))
	conn := dial(t, anyCertificate, "wss://"+addr+"/ws")
	send(t, conn, "hello")
	wantLines(t, conn, "hello")
}

// mistakes are the common mistakes of README.md: tests that fail inside a copy.
const mistakes = `package main

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/gorilla/websocket"
)

func start() (*Hub, *Client) {
	hub := newHub()
	go hub.run()
	client := &Client{hub: hub, send: make(chan []byte, 256)}
	hub.register <- client
	return hub, client
}

var reason = &websocket.CloseError{Code: 4000}

func TestSendToTheChannelOfADroppedClient(t *testing.T) {
	hub, client := start()
	hub.do(func() { hub.drop(client, reason) })
	if client.tell([]byte("x")) {
		t.Error("tell returns true")
	}
	client.send <- []byte("x")
}

func TestWriteBesideWritePump(t *testing.T) {
	hub := newHub()
	go hub.run()
	clients := make(chan *Client, 1)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		client := &Client{hub: hub}
		client.serve(w, r)
		clients <- client
	}))
	conn, _, err := websocket.DefaultDialer.Dial(strings.Replace(server.URL, "http", "ws", 1), nil)
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for err == nil {
			_, _, err = conn.NextReader()
		}
	}()
	for client := <-clients; ; {
		hub.broadcast <- []byte("x")
		client.conn.WriteJSON("x")
	}
}

func onHub(t *testing.T, f func(*Hub, *Client)) {
	synctest.Test(t, func(t *testing.T) {
		hub, client := start()
		hub.do(func() { f(hub, client) })
	})
}

func TestDoOnTheHub(t *testing.T) { onHub(t, func(h *Hub, _ *Client) { h.do(func() {}) }) }
func TestDoOfAClientOnTheHub(t *testing.T) { onHub(t, func(_ *Hub, c *Client) { c.do(func() {}) }) }
func TestTellOnTheHub(t *testing.T) { onHub(t, func(_ *Hub, c *Client) { c.tell(nil) }) }
func TestEndOnTheHub(t *testing.T)  { onHub(t, func(_ *Hub, c *Client) { c.end(reason) }) }
func TestSendOnTheHub(t *testing.T) { onHub(t, func(h *Hub, _ *Client) { h.broadcast <- nil }) }

func TestDoInAGoroutineForWhichTheHubWaits(t *testing.T) {
	onHub(t, func(h *Hub, _ *Client) {
		saves := make(chan []byte, 1)
		go func() {
			for range saves {
				h.do(func() {})
			}
		}()
		for range 3 {
			saves <- nil
		}
	})
}

func TestStateOutsideOfDo(t *testing.T) {
	hub, _ := start()
	go func() { hub.register <- &Client{hub: hub, send: make(chan []byte, 1)} }()
	for range 1000 {
		for range hub.clients {
		}
		hub.do(func() {})
	}
}
`

func TestCommonMistakesOfTheREADME(t *testing.T) {
	t.Parallel()
	dir := copyOf(t, root)
	write(t, filepath.Join(dir, "mistakes_test.go"), mistakes)
	build := exec.Command("go", "test", "-race", "-c", "-o", "mistakes.test", ".")
	build.Dir = dir
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	const deadlock = "all goroutines in bubble are blocked"
	for name, want := range map[string]string{
		"TestSendToTheChannelOfADroppedClient":  "panic: send on closed channel",
		"TestWriteBesideWritePump":              "DATA RACE|concurrent write to websocket connection",
		"TestDoOnTheHub":                        deadlock,
		"TestDoOfAClientOnTheHub":               deadlock,
		"TestTellOnTheHub":                      deadlock,
		"TestEndOnTheHub":                       deadlock,
		"TestSendOnTheHub":                      deadlock,
		"TestDoInAGoroutineForWhichTheHubWaits": deadlock,
		"TestStateOutsideOfDo":                  "DATA RACE",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cmd := exec.CommandContext(t.Context(), filepath.Join(dir, "mistakes.test"),
				"-test.run=^"+name+"$", "-test.timeout=60s")
			cmd.Env = append(os.Environ(), "GORACE=halt_on_error=1")
			out, err := cmd.CombinedOutput()
			if err == nil || !regexp.MustCompile(want).Match(out) ||
				bytes.Contains(out, []byte("tell returns true")) {
				t.Errorf("the test ends with %v, want %q in its output:\n%s", err, want, out)
			}
		})
	}
}

// What a reader looks for is in README.md by its usual word.
func TestWordsAreFoundInTheREADME(t *testing.T) {
	t.Parallel()
	text := strings.ToLower(strings.Join(strings.Fields(readme(t)), " "))
	for _, word := range []string{
		"CORS", "origin", "TLS", "wss", "certificate", "flag", "configuration", "message size",
		"rate limit", "compression", "health check", "Safari 15", "Chrome", "Firefox", "phone",
		"mobile", "native", "JWT", "cookie", "Prometheus", "X-Forwarded-For", "connection limits",
		"1006", "security", "contribut", "test your own", "login", "nginx", "Caddy", "HAProxy",
		"systemd", "Docker", "Kubernetes", "ports below 1024", "DNS rebinding", "history",
		"presence", "rooms", "JSON", "binary", "database", "gin", "echo", "chi",
		"graceful shutdown", "backpressure", "slow client", "half-open", "exponential backoff",
		"slowloris", "heartbeat", "Sec-WebSocket-Protocol", "license", "licence", "Dockerfile",
		"502", "HTTP/2", "log format", "Windows", "IPv6", "benchmark", "reverse proxy",
		"behind a proxy", "broadcast from another goroutine",
	} {
		if !strings.Contains(text, strings.ToLower(word)) {
			t.Errorf("README.md does not have %q", word)
		}
	}
}

// A reader can skim README.md.
func TestREADMEIsShort(t *testing.T) {
	t.Parallel()
	text := readme(t)
	if got := strings.Count(text, "\n"); got > 260 {
		t.Errorf("it has %d lines, want at most 260", got)
	}
	first, _, _ := strings.Cut(text, "\n## Features\n")
	if got := len(strings.Fields(first)); got > 190 {
		t.Errorf("it has %d words before its features, want at most 190", got)
	}
	lines, paragraph := strings.Split(text, "\n"), 0
	for i, line := range lines {
		if strings.HasPrefix(line, "#") && lines[i+1] != "" {
			t.Errorf("no blank line follows %q", line)
		}
		paragraph++
		if line == "" || strings.HasPrefix(line, "    ") || strings.HasPrefix(line, "|") {
			paragraph = 0
		} else if strings.HasPrefix(line, "- ") {
			paragraph = 1
		}
		if paragraph > 5 {
			t.Errorf("a paragraph has more than five lines, to %q", line)
		}
		if strings.HasPrefix(line, "|") || strings.HasPrefix(line, "![") {
			continue // a table, which is shown in other lines; the pictures
		}
		shown := regexp.MustCompile(`\]\([^)]*\)`).ReplaceAllString(line, "]")
		if got := len([]rune(shown)); got > 124 {
			t.Errorf("a line has %d columns: %q", got, line)
		}
	}
}

// anchor returns GitHub's anchor of a heading.
func anchor(heading string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == ' ':
			return '-'
		case unicode.IsLetter(r), unicode.IsDigit(r), r == '-', r == '_':
			return unicode.ToLower(r)
		}
		return -1
	}, strings.TrimLeft(heading, "# "))
}

// Each link in a Markdown file to another, or to a heading, has its target.
func TestLinksHaveTargets(t *testing.T) {
	t.Parallel()
	files := []string{filepath.Join(root, "README.md")}
	for _, pattern := range []string{"*/README.md", ".github/*.md"} {
		matches, err := filepath.Glob(filepath.Join(root, pattern))
		if err != nil || len(matches) == 0 {
			t.Fatalf("no files %s: %v", pattern, err)
		}
		files = append(files, matches...)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		links := regexp.MustCompile(`\]\(([^)\s]+)\)`).FindAllStringSubmatch(string(text), -1)
		for _, link := range links {
			if strings.Contains(link[1], "://") {
				continue
			}
			path, fragment, _ := strings.Cut(link[1], "#")
			target := file
			if path != "" {
				target = filepath.Join(filepath.Dir(file), path)
			}
			info, err := os.Stat(target)
			if err != nil {
				t.Errorf("%s: the link to %s: %v", file, link[1], err)
				continue
			}
			if fragment == "" {
				continue
			}
			if info.IsDir() {
				target = filepath.Join(target, "README.md")
			}
			content, err := os.ReadFile(target)
			if err != nil {
				t.Fatal(err)
			}
			found := false
			for _, heading := range regexp.MustCompile(`(?m)^#+ .*$`).FindAllString(string(content), -1) {
				found = found || anchor(heading) == fragment
			}
			if !found {
				t.Errorf("%s: %s has no heading for the link to %s", file, target, link[1])
			}
		}
	}
}

// Readers copy the page, so its script stays one that can be read in one sitting.
func TestScriptOfThePageIsShort(t *testing.T) {
	t.Parallel()
	home, err := os.ReadFile(filepath.Join(root, "home.html"))
	if err != nil {
		t.Fatal(err)
	}
	_, script, _ := strings.Cut(string(home), "<script")
	code := 0 // lines that are neither blank nor a comment
	for line := range strings.Lines(script) {
		line = strings.TrimRight(line, "\n")
		if trimmed := strings.TrimSpace(line); trimmed != "" && !strings.HasPrefix(trimmed, "//") {
			code++
		}
		if n := utf8.RuneCountInString(line); n > 100 {
			t.Errorf("a line has %d columns, want at most 100: %s", n, line)
		}
	}
	const most = 250 + 4 // with the lines of <script>, </script>, </body> and </html>
	if code > most || code < 100 {
		t.Errorf("the script has %d lines of code, want at most %d", code-4, most-4)
	}
}

// The page's script and style need nothing newer than the browsers of README.md, as far as
// syntax goes: esbuild would rewrite what is newer.
func TestPageHasNoSyntaxNewerThanTheBrowsersOfTheREADME(t *testing.T) {
	t.Parallel()
	named := regexp.MustCompile(`Chrome and Edge (\d+), Firefox\s+(\d+), Safari\s+(\d+), and later`)
	browsers := named.FindStringSubmatch(readme(t))
	if browsers == nil {
		t.Fatal("README.md does not name the browsers")
	}
	home, err := os.ReadFile(filepath.Join(root, "home.html"))
	if err != nil {
		t.Fatal(err)
	}
	elements := map[string]api.Loader{"script": api.LoaderJS, "style": api.LoaderCSS}
	for element, loader := range elements {
		content := regexp.MustCompile("(?s)<" + element + "[^>]*>(.*)</" + element + ">")
		source := content.FindSubmatch(home)
		if source == nil {
			t.Fatalf("the page has no %s", element)
		}
		print := func(engines ...api.Engine) string {
			result := api.Transform(string(source[1]), api.TransformOptions{
				Loader: loader, Engines: engines,
				// esbuild knows none of their names.
				Supported: map[string]bool{"regexp-unicode-property-escapes": true},
			})
			if len(result.Errors) > 0 {
				t.Errorf("esbuild cannot rewrite the %s for %v: %v", element, engines, result.Errors)
			}
			return string(result.Code)
		}
		asIs := strings.Split(print(), "\n")
		for i, name := range []api.EngineName{api.EngineChrome, api.EngineFirefox, api.EngineSafari} {
			for n, line := range strings.Split(print(api.Engine{Name: name, Version: browsers[i+1]}), "\n") {
				if n >= len(asIs) || line != asIs[n] {
					t.Errorf("esbuild rewrites the %s for version %s of engine %d: %s",
						element, browsers[i+1], name, line)
					break
				}
			}
		}
	}
}
