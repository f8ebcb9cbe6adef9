package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/nats-io/nats-server/v2/server"
)

// A process is the program, run as from a shell.
type process struct {
	*exec.Cmd
	log   *bufio.Reader
	ended bool
}

// start runs the program with args, until the test ends.
func start(t *testing.T, args ...string) *process {
	t.Helper()
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return startProgram(t, program, args...)
}

func startProgram(t *testing.T, program string, args ...string) *process {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	p := &process{Cmd: exec.CommandContext(ctx, program, args...)}
	p.Env = append(os.Environ(), "RUN_MAIN=1")
	stderr, err := p.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.log = bufio.NewReader(stderr)
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cancel(); p.wait() })
	return p
}

// logged reads the log up to a line that matches expression, and returns its first group.
func (p *process) logged(t *testing.T, expression string) string {
	t.Helper()
	pattern := regexp.MustCompile(expression)
	for {
		line, err := p.log.ReadString('\n')
		if match := pattern.FindStringSubmatch(line); match != nil {
			return match[1]
		}
		if err != nil {
			t.Fatalf("the log ends without %q: %v", expression, err)
		}
	}
}

// wait returns the exit status and the rest of the log when the program has ended.
func (p *process) wait() (status int, log string) {
	if !p.ended {
		var rest bytes.Buffer
		rest.ReadFrom(p.log)
		log = rest.String()
		p.Wait()
		p.ended = true
	}
	return p.ProcessState.ExitCode(), log
}

func TestSecondNodeJoinsWithTheLoggedCommand(t *testing.T) {
	t.Parallel()
	first := start(t, "-addr", "127.0.0.1:0", "-subject", "chat.test")
	command := first.logged(t, `a second node joins with: go run \. (.*)`)
	url := "ws" + first.logged(t, `http(://.*/)`) + "ws"
	arguments := strings.Fields(command)
	arguments[1] = "127.0.0.1:0" // The port that it names may be in use.
	second := start(t, arguments...)
	alice, bob := dial(t, url), dial(t, "ws"+second.logged(t, `http(://.*/)`)+"ws")
	alice.send(t, "hello")
	alice.want(t, "hello")
	bob.want(t, "hello")
	bob.send(t, "hello yourself")
	alice.want(t, "hello yourself")
}

func TestNodesJoinOverTLS(t *testing.T) {
	authority := httptest.NewTLSServer(nil) // for its certificate
	defer authority.Close()
	nats := natsWith(t, &server.Options{TLSConfig: authority.TLS, TLSTimeout: patience.Seconds()})
	url := strings.Replace(nats.ClientURL(), "nats:", "tls:", 1)
	start(t, "-addr", "127.0.0.1:0", "-nats", url).logged(t, "cannot join NATS, .*(certificate)")
	file := filepath.Join(t.TempDir(), "ca.pem")
	block := &pem.Block{Type: "CERTIFICATE", Bytes: authority.Certificate().Raw}
	if err := os.WriteFile(file, pem.EncodeToMemory(block), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SSL_CERT_FILE", file)
	p := start(t, "-addr", "127.0.0.1:0", "-nats", url)
	c := dial(t, "ws"+p.logged(t, `http(://.*/)`)+"ws")
	c.send(t, "hello")
	c.want(t, "hello")
}

func TestSignalsCloseConnectionsAndEndWithStatus0(t *testing.T) {
	t.Parallel()
	nats := natsServer(t)
	for _, test := range []struct {
		name, url string
		signal    os.Signal
	}{
		{"SIGTERM", nats.ClientURL(), syscall.SIGTERM},
		{"SIGTERM, with the embedded server", embedded, syscall.SIGTERM},
		{"SIGINT", nats.ClientURL(), syscall.SIGINT},
		{"SIGHUP", nats.ClientURL(), syscall.SIGHUP},
	} {
		t.Run(test.name, func(t *testing.T) {
			p := start(t, "-addr", "127.0.0.1:0", "-nats", test.url)
			c := dial(t, "ws"+p.logged(t, `http(://.*/)`)+"ws")
			c.send(t, "hello")
			c.want(t, "hello")
			p.Process.Signal(test.signal)
			p.Process.Signal(test.signal) // as coreutils' timeout does
			c.wantClose(t, websocket.CloseGoingAway)
			c.Close()
			if status, log := p.wait(); status != 0 {
				t.Errorf("got status %d and log %q, want status 0", status, log)
			}
		})
	}
}

func TestSIGTERMDuringAnOutageExitsWithStatus0(t *testing.T) {
	t.Parallel()
	nats := natsServer(t)
	p := start(t, "-addr", "127.0.0.1:0", "-nats", nats.ClientURL())
	c := dial(t, "ws"+p.logged(t, `http(://.*/)`)+"ws")
	stopNATS(t, nats)
	p.logged(t, `disconnected from NATS(:)`)
	c.send(t, "lost")
	p.Process.Signal(syscall.SIGTERM)
	c.wantClose(t, websocket.CloseGoingAway)
	c.Close()
	if status, log := p.wait(); status != 0 {
		t.Errorf("got status %d and log %q, want status 0", status, log)
	}
}

func TestFatalErrorOfNATSIsAReconnect(t *testing.T) {
	t.Parallel()
	proxy := newProxy(t, natsServer(t).Addr().String())
	node := startNode(t, "nats://"+proxy.Addr().String(), "chat")
	c := node.dial(t)
	for n := range 2 {
		proxy.mu.Lock()
		fmt.Fprint(proxy.conns[len(proxy.conns)-2], "-ERR 'fatal test error'\r\n")
		proxy.mu.Unlock()
		node.log.wait(t, "disconnected from NATS: nats: fatal test error; messages of", n+1)
		c.send(t, "still here")
		c.want(t, "still here")
	}
}

func TestPausedNodeReceivesWhatNATSBuffered(t *testing.T) {
	t.Parallel()
	const each = 100
	nats := natsServer(t)
	node := startNode(t, nats.ClientURL(), "chat")
	sender := node.dial(t)
	var paused []*process
	var listeners []*client
	for range 3 {
		p := start(t, "-addr", "127.0.0.1:0", "-nats", nats.ClientURL())
		paused = append(paused, p)
		listeners = append(listeners, dial(t, "ws"+p.logged(t, `http(://.*/)`)+"ws"))
	}
	for _, p := range paused {
		p.Process.Signal(syscall.SIGSTOP)
		// Until it has stopped, it may be writing, and the write times out during the pause.
		if _, err := syscall.Wait4(p.Process.Pid, nil, syscall.WUNTRACED, nil); err != nil {
			t.Fatal(err)
		}
	}
	lines := numbered("during the pause", each)
	for _, line := range lines {
		node.broadcast <- []byte(line)
		sender.want(t, line)
	}
	over := time.After(answerWait + 3*time.Second)
	<-over
	for _, p := range paused {
		p.Process.Signal(syscall.SIGCONT)
	}
	for _, c := range listeners {
		c.want(t, lines...)
		c.Close()
	}
	node.broadcast <- []byte("afterwards")
	for _, p := range paused {
		p.Process.Signal(syscall.SIGTERM)
		status, log := p.wait()
		lost := strings.Contains(log, "disconnected from NATS") || strings.Contains(log, "missed")
		if status != 0 || lost {
			t.Errorf("got status %d and log %q, want no disconnect and nothing missed", status, log)
		}
	}
}

func TestFlagThatCannotWorkIsOneLineAndStatus1(t *testing.T) {
	t.Parallel()
	nats := natsServer(t)
	busy := natsServer(t).Addr().String()
	empty := filepath.Join(t.TempDir(), "empty")
	if err := os.WriteFile(empty, []byte("\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	long := strings.Repeat("x", 5000)
	type test struct {
		name  string
		nats  string   // the value of -nats
		flags []string // others
		want  string
	}
	const server, missing = "127.0.0.1:1", "/nonexistent"
	tests := []test{
		{"no server", "", nil, "-nats is empty"},
		{"no port", "nats://bob:hunter2@nonsense:port", nil, "malformed"},
		{"no scheme", "bob:hunter2@localhost:4222", nil, "malformed"},
		{"nothing between two commas", nats.ClientURL() + ",,", nil, "malformed"},
		{"a password like a port", "nats://" + server + "/hunter2@localhost", nil, "malformed"},
		{"an empty password", "nats://bob:@" + server, nil, "the password in a URL"},
		{"no such credentials", nats.ClientURL(), []string{"-creds", missing}, "open " + missing},
		{"no key", nats.ClientURL(), []string{"-creds", empty}, "unable to extract key pair"},
		{"no such password", "nats://a@x", []string{"-password", missing}, "open " + missing},
		{"no password", "nats://a@x", []string{"-password", empty}, "empty is empty"},
		{"no user", nats.ClientURL(), []string{"-password", empty}, "has the same user"},
		{"two passwords", "nats://bob:hunter2@x", []string{"-password", empty}, "and no password"},
		{"two users", "nats://a@x,nats://b@x", []string{"-password", empty}, "has the same user"},
		{"wildcards", nats.ClientURL(), []string{"-subject", "chat.*"}, `"chat.*" cannot name`},
		{"a space", nats.ClientURL(), []string{"-subject", "two words"}, `"two words" cannot name`},
		{"a tab", embedded, []string{"-subject", "chat\t"}, `"chat\t" cannot name a room`},
		{"5,000 characters", nats.ClientURL(), []string{"-subject", long}, "at most 255 bytes"},
		{"a port in use", nats.ClientURL(), []string{"-addr", busy}, "address already in use"},
	}
	for _, special := range "/#?, \"%[]\\\n" {
		for _, user := range []string{"bob:", ""} { // without a user it is a token
			url := "nats://" + user + "hun" + string(special) + "ter2@" + nats.Addr().String()
			name := fmt.Sprintf("%s and %q", user, special)
			tests = append(tests, test{name, url, nil, "malformed"})
		}
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			args := append([]string{"-addr", "127.0.0.1:0", "-nats", test.nats}, test.flags...)
			status, log := start(t, args...).wait()
			isOneLine := strings.Count(log, "\n") == 1 && len(log) <= 250
			if status != 1 || !isOneLine || !strings.Contains(log, test.want) {
				t.Errorf("got status %d and log %q, want status 1 and one line with %q",
					status, log, test.want)
			}
			for _, secret := range []string{"bob", "hun", "ter2"} {
				if strings.Contains(log, secret) {
					t.Errorf("log is %q, want no part of a URL in it", log)
				}
			}
		})
	}
}

func TestStartDuringAnOutageRetries(t *testing.T) {
	t.Parallel()
	gone := natsServer(t)
	restart := stopNATS(t, gone)
	guarded := natsWith(t, &server.Options{Username: "bob", Password: "hunter2"})
	login := func(s *server.Server, password string) string {
		return strings.Replace(s.ClientURL(), "//", "//bob:"+password+"@", 1)
	}
	const down = "no servers available for connection"
	withoutTLS := strings.Replace(natsServer(t).ClientURL(), "nats:", "tls:", 1)
	tests := []struct{ name, urls, want string }{
		{"the NATS server is down", login(gone, "hunter3"), down},
		{"all NATS servers are down", gone.ClientURL() + "," + gone.ClientURL(), down},
		{"no such host", "nats://bob:hunter3@nats..svc:4222", "lookup nats..svc: no such host"},
		{"no TLS there", withoutTLS, "secure connection not available"},
		{"a wrong password", login(guarded, "hunter3"), "Authorization Violation"},
	}
	var nodes []*process
	var addrs []string
	for _, test := range tests {
		addr := fmt.Sprint("127.0.0.1:", port(t))
		p := start(t, "-addr", addr, "-nats", test.urls)
		begun := time.Now()
		const lines = 3
		for n := range lines {
			log := p.logged(t, "(.*)")
			if !strings.Contains(log, test.want) || strings.Contains(log, "hunter") {
				t.Errorf("%s: line %d of the log is %q, want %q", test.name, n, log, test.want)
			}
		}
		if took := time.Since(begun); took < (lines-1)*reportPeriod {
			t.Errorf("%s: %d lines in the log after %v", test.name, lines, took)
		}
		if got := ready(t, "http://"+addr+"/ready"); got != http.StatusServiceUnavailable {
			t.Errorf("%s: /ready answers %d, want 503", test.name, got)
		}
		_, response, err := websocket.DefaultDialer.Dial("ws://"+addr+"/ws", nil)
		if response == nil || response.StatusCode != http.StatusServiceUnavailable {
			t.Errorf("%s: /ws answers %v, want 503", test.name, err)
		}
		nodes, addrs = append(nodes, p), append(addrs, addr)
	}
	restart()
	nodes[0].logged(t, "(listening on)")
	if got := ready(t, "http://"+addrs[0]+"/ready"); got != http.StatusOK {
		t.Errorf("/ready answers %d when NATS is back, want 200", got)
	}
	for n, p := range nodes {
		p.Process.Signal(syscall.SIGTERM)
		if status, log := p.wait(); status != 0 {
			t.Errorf("%s: got status %d and log %q, want status 0", tests[n].name, status, log)
		}
	}
}

func TestUnknownArgumentIsRefused(t *testing.T) {
	t.Parallel()
	p := start(t, "-addr", "127.0.0.1:0", "nats://127.0.0.1:4222")
	if status, log := p.wait(); status != 2 || !strings.Contains(log, "-nats url") {
		t.Errorf("got status %d and log %q, want status 2 and the usage", status, log)
	}
}

func TestEscapedPasswordMayContainAnyCharacter(t *testing.T) {
	t.Parallel()
	const password = `p/a#s?s, "w%o@r:d`
	guarded := natsWith(t, &server.Options{Username: "bob", Password: password})
	escaped := strings.ReplaceAll(url.UserPassword("bob", password).String(), ",", "%2C")
	relay, _ := startRelay(t, "nats://"+escaped+"@"+guarded.Addr().String(), "chat")
	relay.leave()
}

func TestPasswordFileIsReadForEachConnection(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "password")
	write := func(password string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(password+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("hunter2")
	s := natsWith(t, &server.Options{Username: "bob", Password: "hunter2"})
	url := "nats://bob@" + s.Addr().String()
	p := start(t, "-addr", "127.0.0.1:0", "-nats", url, "-password", file)
	c := dial(t, "ws"+p.logged(t, `http(://.*/)`)+"ws")
	write("hunter3")
	reload(t, s, &server.Options{Username: "bob", Password: "hunter3"}) // disconnects the node
	p.logged(t, "(reconnected to NATS)")
	c.send(t, "hello")
	c.want(t, "hello")
}

func TestReadinessProbe(t *testing.T) {
	t.Parallel()
	s := natsServer(t)
	p := start(t, "-addr", "127.0.0.1:0", "-nats", s.ClientURL())
	url := "http" + p.logged(t, `http(://.*/)`) + "ready"
	eventuallyReady := func(want int) {
		t.Helper()
		what := fmt.Sprintf("/ready answers %d", want)
		eventually(t, what, func() bool { return ready(t, url) == want })
	}
	for _, method := range []string{http.MethodGet, http.MethodHead} {
		request, err := http.NewRequestWithContext(t.Context(), method, url, nil)
		if err != nil {
			t.Fatal(err)
		}
		response, err := http.DefaultClient.Do(request)
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
		if response.StatusCode != http.StatusOK {
			t.Errorf("%s: got %s, want 200", method, response.Status)
		}
	}
	restart := stopNATS(t, s)
	eventuallyReady(http.StatusServiceUnavailable)
	restart()
	eventuallyReady(http.StatusOK)
	p.Process.Signal(syscall.SIGTERM)
	if status, log := p.wait(); status != 0 || strings.Contains(log, "/ready") {
		t.Errorf("got status %d and log %q, want status 0 and no line about /ready", status, log)
	}
}

// ready returns the status of /ready, and checks that an error has a reason.
func ready(t *testing.T, url string) int {
	t.Helper()
	response, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	body, _ := io.ReadAll(response.Body)
	if response.StatusCode != http.StatusOK && !strings.Contains(string(body), "NATS") {
		t.Errorf("got %s and %q, want a reason", response.Status, body)
	}
	return response.StatusCode
}

func TestNodeServesThePage(t *testing.T) {
	t.Parallel()
	_, nodes := startRoom(t, 1)
	base := strings.TrimSuffix(strings.Replace(nodes[0].url, "ws", "http", 1), "/ws")
	for path, want := range map[string]int{
		"/":            http.StatusOK,
		"/favicon.ico": http.StatusNotFound,
		"/ws":          http.StatusBadRequest,
	} {
		response, err := http.Get(base + path)
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
		if response.StatusCode != want {
			t.Errorf("%s: got status %d, want %d", path, response.StatusCode, want)
		}
	}
}
