// Package e2e tests the chat server from the outside: the real binary, real
// processes and signals, and the page in a real browser.
//
// It needs browsers and proxies (apt-get install chromium chromium-headless-shell firefox-esr
// webkit2gtk-driver xvfb nginx-light haproxy caddy systemd) and, once, `npm ci` in this folder.
// It is a module of its own so that the server keeps a single dependency.
package e2e

import (
	"bytes"
	"flag"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/gorilla/websocket"
)

// Time after which a test gives up waiting. It only bounds a hang: a test that is about a time
// measures it.
const patience = time.Minute

// Time within which a server exits after a signal: 8 s for its clients, and on a busy machine.
const exitTime = 20 * time.Second

// Minimum time between two checks of a page. A check that takes longer waits as long as it took:
// on a busy machine, it takes CPU time from the page and from the tests that run in parallel.
const pollInterval = 30 * time.Millisecond

// binary is the path of the server that TestMain builds.
var binary string

func TestMain(m *testing.M) {
	// More tests than cores, as they mostly wait. The command line overrides this.
	flag.Set("test.parallel", strconv.Itoa(2*runtime.GOMAXPROCS(0)))
	flag.Parse()
	os.Exit(testMain(m))
}

func testMain(m *testing.M) int {
	if signal.Ignored(os.Interrupt) { // A shell's background job ignores it, and the server would inherit that.
		signal.Notify(make(chan os.Signal, 1), os.Interrupt)
	}
	dir, err := os.MkdirTemp("", "chat")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	binary = filepath.Join(dir, "chat")
	build := exec.Command("go", "build", "-o", binary, ".")
	build.Dir = ".."
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "go build: %v\n%s", err, out)
		return 1
	}
	defer closeBrowsers()
	defer closeEngines()
	defer reportLoads()
	return m.Run()
}

// A server is a running chat server.
type server struct {
	addr string // on which it listens
	cmd  *exec.Cmd
	log  *output
	done chan struct{} // closed when the process has exited
}

// startServer starts the server on addr and waits until it listens; the test's
// end kills it. Port 0 picks a free port.
func startServer(t testing.TB, addr string) *server {
	t.Helper()
	return startCommand(t, exec.Command(binary, "-addr", ownHost(addr)))
}

var hosts atomic.Int32

// ownHost replaces localhost by a loopback address of its own, so that no other server can
// get the port while this server restarts.
func ownHost(addr string) string {
	n := hosts.Add(1)
	return strings.Replace(addr, "localhost:", fmt.Sprintf("127.0.%d.%d:", 1+n/250, 1+n%250), 1)
}

// startCommand starts cmd, which runs a server, and waits until it listens.
func startCommand(t testing.TB, cmd *exec.Cmd) *server {
	t.Helper()
	s := start(t, cmd)
	s.addr = s.waitForLog(t, `listening on http://(\S+)/`)
	return s
}

// start starts cmd, which runs a server; the test's end kills it.
func start(t testing.TB, cmd *exec.Cmd) *server {
	t.Helper()
	s := &server{cmd: cmd, log: &output{grown: make(chan struct{}, 1)}, done: make(chan struct{})}
	cmd.Stderr = s.log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { cmd.Wait(); close(s.done) }()
	t.Cleanup(func() { cmd.Process.Kill(); <-s.done })
	return s
}

// waitForLog waits until the server's log matches pattern, and returns the pattern's group.
func (s *server) waitForLog(t testing.TB, pattern string) string {
	t.Helper()
	re := regexp.MustCompile(pattern)
	timeout := time.After(patience)
	for {
		if match := re.FindStringSubmatch(s.log.String()); match != nil {
			return match[len(match)-1]
		}
		select {
		case <-s.log.grown:
		case <-s.done:
			t.Fatalf("the server exited without logging %q:\n%s", pattern, s.log)
		case <-timeout:
			t.Fatalf("the server has not logged %q within %v:\n%s", pattern, patience, s.log)
		}
	}
}

func (s *server) signal(t testing.TB, sig os.Signal) {
	t.Helper()
	if err := s.cmd.Process.Signal(sig); err != nil {
		t.Fatal(err)
	}
}

// wait waits until the process has exited, and returns its state.
func (s *server) wait(t testing.TB) *os.ProcessState {
	t.Helper()
	select {
	case <-s.done:
	case <-time.After(patience):
		t.Fatalf("the server has not exited within %v:\n%s", patience, s.log)
	}
	return s.cmd.ProcessState
}

// stop sends SIGTERM to the server and waits until it has exited.
func (s *server) stop(t testing.TB) {
	t.Helper()
	s.signal(t, syscall.SIGTERM)
	if state := s.wait(t); !state.Success() {
		t.Fatalf("the server exited with %v:\n%s", state, s.log)
	}
}

// dial connects a client to the server; the test's end closes it.
func (s *server) dial(t testing.TB) *websocket.Conn {
	t.Helper()
	return dial(t, websocket.DefaultDialer, "ws://"+s.addr+"/ws")
}

func dial(t testing.TB, dialer *websocket.Dialer, url string) *websocket.Conn {
	t.Helper()
	conn, _, err := dialer.Dial(url, http.Header{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// send sends one text message.
func send(t testing.TB, conn *websocket.Conn, text string) {
	t.Helper()
	if err := conn.WriteMessage(websocket.TextMessage, []byte(text)); err != nil {
		t.Fatal(err)
	}
}

// discard reads until the connection ends, and returns the error.
func discard(conn *websocket.Conn) error {
	for {
		if _, _, err := conn.NextReader(); err != nil {
			return err
		}
	}
}

// An output stores what a process writes, and signals on grown when there is more.
type output struct {
	mu    sync.Mutex
	buf   bytes.Buffer
	grown chan struct{}
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	select {
	case o.grown <- struct{}{}:
	default:
	}
	return o.buf.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}
