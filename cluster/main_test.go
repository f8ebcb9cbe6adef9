package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/pem"
	"fmt"
	"io"
	"net"
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

// A process is the program, run as it would be from a shell.
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

// logged reads the log up to a line that matches, and returns what its first
// group matches.
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

func TestSecondNodeJoinsWithWhatTheFirstLogs(t *testing.T) {
	t.Parallel()
	first := start(t, "-addr", "127.0.0.1:0", "-subject", "chat.test")
	command := first.logged(t, `a second node joins with: go run \. (.*)`)
	url := "ws" + first.logged(t, `http(://.*/)`) + "ws"
	arguments := strings.Fields(command)
	arguments[1] = "127.0.0.1:0" // the port that it names may be in use on this machine
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
	stranger := start(t, "-addr", "127.0.0.1:0", "-nats", url)
	if status, log := stranger.wait(); status != 1 || !strings.Contains(log, "certificate") {
		t.Errorf("got status %d and log %q, want status 1 as nobody knows the certificate", status, log)
	}
	file := filepath.Join(t.TempDir(), "ca.pem")
	certificate := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: authority.Certificate().Raw})
	if err := os.WriteFile(file, certificate, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SSL_CERT_FILE", file)
	p := start(t, "-addr", "127.0.0.1:0", "-nats", url)
	c := dial(t, "ws"+p.logged(t, `http(://.*/)`)+"ws")
	c.send(t, "hello")
	c.want(t, "hello")
}

func TestSIGTERMSendsClientsAwayAndEndsWithStatus0(t *testing.T) {
	t.Parallel()
	nats := natsServer(t)
	for name, url := range map[string]string{"joined": nats.ClientURL(), "embedded": ""} {
		t.Run(name, func(t *testing.T) {
			p := start(t, "-addr", "127.0.0.1:0", "-nats", url)
			c := dial(t, "ws"+p.logged(t, `http(://.*/)`)+"ws")
			c.send(t, "hello")
			c.want(t, "hello")
			p.Process.Signal(syscall.SIGTERM)
			c.wantClose(t, websocket.CloseGoingAway)
			c.Close()
			if status, log := p.wait(); status != 0 {
				t.Errorf("got status %d and log %q, want status 0", status, log)
			}
		})
	}
}

func TestSIGTERMWhileNATSIsAwayEndsWithStatus0(t *testing.T) {
	t.Parallel()
	nats := natsServer(t)
	p := start(t, "-addr", "127.0.0.1:0", "-nats", nats.ClientURL())
	c := dial(t, "ws"+p.logged(t, `http(://.*/)`)+"ws")
	stopNATS(t, nats)
	p.logged(t, `disconnected from NATS(:)`)
	c.send(t, "nobody hears this")
	p.Process.Signal(syscall.SIGTERM)
	c.wantClose(t, websocket.CloseGoingAway)
	c.Close()
	if status, log := p.wait(); status != 0 {
		t.Errorf("got status %d and log %q, want status 0", status, log)
	}
}

func TestNodeThatNATSSendsAwayForGoodEndsWithStatus1(t *testing.T) {
	t.Parallel()
	wire := newWire(t, natsServer(t).Addr().String())
	p := start(t, "-addr", "127.0.0.1:0", "-nats", "nats://"+wire.Addr().String())
	c := dial(t, "ws"+p.logged(t, `http(://.*/)`)+"ws")
	wire.mu.Lock()
	fmt.Fprint(wire.conns[0], "-ERR 'this is the end'\r\n")
	wire.mu.Unlock()
	c.wantClose(t, websocket.CloseGoingAway)
	c.Close()
	if status, log := p.wait(); status != 1 || !strings.Contains(log, "this is the end") {
		t.Errorf("got status %d and log %q, want status 1 and why", status, log)
	}
}

func TestNodeThatNATSSentAwayBeforeItServedEnds(t *testing.T) {
	t.Parallel()
	wire := newWire(t, natsServer(t).Addr().String())
	relay, _ := startRelay(t, "nats://"+wire.Addr().String(), "chat")
	wire.mu.Lock()
	fmt.Fprint(wire.conns[0], "-ERR 'this is the end'\r\n")
	wire.mu.Unlock()
	eventually(t, "the connection is closed", relay.nc.IsClosed)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	err = serve(ctx, listener, relay)
	if err == nil || !strings.Contains(err.Error(), "this is the end") || ctx.Err() != nil {
		t.Errorf("serve returned %v (%v), want at once why NATS has sent the node away", err, ctx.Err())
	}
}

func TestNodeThatSaysMoreThanNATSAcceptsEndsAndSaysSo(t *testing.T) {
	t.Parallel()
	nats := natsServer(t)
	p := start(t, "-addr", "127.0.0.1:0", "-nats", nats.ClientURL())
	c := dial(t, "ws"+p.logged(t, `http(://.*/)`)+"ws")
	reload(t, nats, &server.Options{MaxPayload: maxMessageSize}) // of which NATS tells nobody
	c.send(t, strings.Repeat("x", maxMessageSize))
	c.wantClose(t, websocket.CloseGoingAway)
	c.Close()
	status, log := p.wait()
	if want := "NATS has closed the connection for good: nats: Maximum Payload Violation"; status != 1 || !strings.Contains(log, want) {
		t.Errorf("got status %d and log %q, want status 1 and %q", status, log, want)
	}
	if strings.Contains(log, "disconnected from NATS") {
		t.Errorf("log is %q, want not that anything waits", log)
	}
}

func TestNodeThatWasPausedHearsWhatNATSKeptForIt(t *testing.T) {
	t.Parallel()
	const each = 100
	nats := natsServer(t)
	speaker := startNode(t, nats.ClientURL(), "chat")
	talker := speaker.dial(t)
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
	lines := numbered("while they are paused", each)
	for _, line := range lines {
		speaker.front.broadcast <- []byte(line)
		talker.want(t, line)
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
	speaker.front.broadcast <- []byte("afterwards")
	for _, p := range paused {
		p.Process.Signal(syscall.SIGTERM)
		if status, log := p.wait(); status != 0 || strings.Contains(log, "disconnected from NATS") || strings.Contains(log, "missed") {
			t.Errorf("got status %d and log %q, want that nothing was missed", status, log)
		}
	}
}

func TestWhatPreventsTheStartIsOneLineAndStatus1(t *testing.T) {
	t.Parallel()
	nats := natsServer(t)
	busy := natsServer(t).Addr().String()
	gone := natsServer(t)
	stopNATS(t, gone)
	type test struct {
		name string
		args []string
		want string
	}
	unreachable := "no servers available for connection"
	guarded := natsWith(t, &server.Options{Username: "bob", Password: "hunter2"})
	deaf, mute := natsWith(t, allowed("chat", "nothing")), natsWith(t, allowed("nothing", "chat"))
	tests := []test{
		{"nobody at the NATS URL", []string{"-nats", strings.Replace(gone.ClientURL(), "//", "//bob:hunter2@", 1)}, unreachable},
		{"nobody at any of the NATS URLs", []string{"-nats", gone.ClientURL() + "," + gone.ClientURL()}, unreachable},
		{"no port", []string{"-nats", "nats://bob:hunter2@nonsense:port"}, "malformed"},
		{"no scheme", []string{"-nats", "bob:hunter2@localhost:4222"}, "malformed"},
		{"nothing between two commas", []string{"-nats", nats.ClientURL() + ",,"}, "malformed"},
		{"no such host", []string{"-nats", "nats://bob:hunter2@nats..svc:4222"}, "lookup nats..svc: no such host"},
		{"no TLS there", []string{"-nats", strings.Replace(nats.ClientURL(), "nats:", "tls:", 1)}, "secure connection not available"},
		{"a wrong password", []string{"-nats", strings.Replace(guarded.ClientURL(), "//", "//bob:hunter3@", 1)}, "Authorization Violation"},
		{"a password that could be a port", []string{"-nats", "nats://127.0.0.1:1/hunter2@localhost"}, "malformed"},
		{"no such credentials", []string{"-nats", nats.ClientURL(), "-creds", "/nonexistent"}, "open /nonexistent:"},
		{"wildcards", []string{"-nats", nats.ClientURL(), "-subject", "chat.*"}, `"chat.*" cannot name a room`},
		{"a space", []string{"-nats", nats.ClientURL(), "-subject", "two words"}, `"two words" cannot name a room`},
		{"a tab, at a server of its own", []string{"-subject", "chat\t"}, `"chat\t" cannot name a room`},
		{"5,000 characters", []string{"-nats", nats.ClientURL(), "-subject", strings.Repeat("x", 5000)}, "at most 255 bytes"},
		{"leave to publish only", []string{"-nats", deaf.ClientURL()}, `Permissions Violation for Subscription to "chat"`},
		{"leave to subscribe only", []string{"-nats", mute.ClientURL()}, `Permissions Violation for Publish to "chat"`},
		{"a port in use", []string{"-addr", busy, "-nats", nats.ClientURL()}, "address already in use"},
	}
	for _, special := range "/#?, \"%[]\\\n" {
		for _, user := range []string{"bob:", ""} { // without one it is a token
			url := "nats://" + user + "hun" + string(special) + "ter2@" + nats.Addr().String()
			tests = append(tests, test{fmt.Sprintf("%s and %q", user, special), []string{"-nats", url}, "malformed"})
		}
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			p := start(t, append([]string{"-addr", "127.0.0.1:0"}, test.args...)...)
			status, log := p.wait()
			if status != 1 || strings.Count(log, "\n") != 1 || len(log) > 250 || !strings.Contains(log, test.want) {
				t.Errorf("got status %d and log %q, want status 1 and one line with %q", status, log, test.want)
			}
			for _, secret := range []string{"bob", "hun", "ter"} {
				if strings.Contains(log, secret) {
					t.Errorf("log is %q, want nothing of a URL in it", log)
				}
			}
		})
	}
}

func TestArgumentThatIsNoFlagIsRefused(t *testing.T) {
	t.Parallel()
	p := start(t, "-addr", "127.0.0.1:0", "nats://127.0.0.1:4222")
	if status, log := p.wait(); status != 2 || !strings.Contains(log, "-nats url") {
		t.Errorf("got status %d and log %q, want status 2 and how to call it", status, log)
	}
}

func TestAPasswordMayHoldAnythingIfItIsEscaped(t *testing.T) {
	const password = `p/a#s?s, "w%o@r:d`
	guarded := natsWith(t, &server.Options{Username: "bob", Password: password})
	escaped := strings.ReplaceAll(url.UserPassword("bob", password).String(), ",", "%2C")
	nc, err := connect("nats://"+escaped+"@"+guarded.Addr().String(), "")
	if err != nil {
		t.Fatal(err)
	}
	nc.Close()
}

func TestLoadBalancerIsToldWhetherTheNodeCanTakeClients(t *testing.T) {
	t.Parallel()
	s := natsServer(t)
	p := start(t, "-addr", "127.0.0.1:0", "-nats", s.ClientURL())
	url := "http" + p.logged(t, `http(://.*/)`) + "ready"
	eventuallyReady := func(want int) {
		t.Helper()
		eventually(t, fmt.Sprintf("/ready answers %d", want), func() bool { return ready(t, url) == want })
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
		t.Errorf("got status %d and log %q, want status 0 and no word of what was asked", status, log)
	}
}

// ready asks a node whether it is ready, and returns the status of the answer,
// which has to give a reason if it is not.
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

func TestPortAnswersOnlyWhenTheNodeHasJoined(t *testing.T) {
	t.Parallel()
	silent, err := net.Listen("tcp", "127.0.0.1:0") // takes connections, and says nothing
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	addr := fmt.Sprint("127.0.0.1:", port(t))
	p := start(t, "-addr", addr, "-nats", "nats://"+silent.Addr().String())
	conn, err := silent.Accept() // The node is about to join, for two seconds to come.
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := net.Dial("tcp", addr); err == nil {
		t.Error("the port answers, want that it is refused")
	}
	if status, log := p.wait(); status != 1 || !strings.Contains(log, "cannot join NATS") {
		t.Errorf("got status %d and log %q, want status 1 and that it cannot join", status, log)
	}
}

func TestNodeServesThePage(t *testing.T) {
	t.Parallel()
	_, nodes := startRoom(t, 1)
	for path, want := range map[string]int{"/": http.StatusOK, "/favicon.ico": http.StatusNotFound, "/ws": http.StatusBadRequest} {
		response, err := http.Get(strings.TrimSuffix(strings.Replace(nodes[0].url, "ws", "http", 1), "/ws") + path)
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
		if response.StatusCode != want {
			t.Errorf("%s: got status %d, want %d", path, response.StatusCode, want)
		}
	}
}
