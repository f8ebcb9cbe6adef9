package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/gorilla/websocket"
)

// readAll reads until the connection ends, and returns the lines and the error.
func readAll(conn *websocket.Conn) (lines []string, err error) {
	for {
		_, message, err := conn.ReadMessage()
		if err != nil {
			return lines, err
		}
		lines = append(lines, strings.Split(string(message), "\n")...)
	}
}

// wantClose checks that err is from a close frame with this code and a reason.
func wantClose(t *testing.T, err error, code int) {
	t.Helper()
	var closeErr *websocket.CloseError
	if !errors.As(err, &closeErr) || closeErr.Code != code || closeErr.Text == "" {
		t.Errorf("the client reads %v, want close code %d with a reason", err, code)
	}
}

// wantExit waits until the server has exited, and checks that its status is 0, and that it
// exited at most limit after start.
func (s *server) wantExit(t *testing.T, start time.Time, limit time.Duration) {
	t.Helper()
	state := s.wait(t)
	took := time.Since(start)
	t.Logf("exited after %v", took)
	if state.ExitCode() != 0 {
		t.Errorf("the server exited with %v, want exit status 0:\n%s", state, s.log)
	}
	if took > limit {
		t.Errorf("the server exited after %v, want within %v", took, limit)
	}
}

// Time within which a server exits if all clients answer its close frames, on a busy machine:
// less than closeWait, for which it waits for an answer.
const atOnce = 4 * time.Second

// The close codes are literal numbers here, as clients rely on their values.
func TestDroppedClientReadsTheCloseCode(t *testing.T) {
	t.Parallel()
	write := func(kind int, text string) func(*testing.T, *server, *websocket.Conn) {
		return func(t *testing.T, _ *server, conn *websocket.Conn) { conn.WriteMessage(kind, []byte(text)) }
	}
	for _, tt := range []struct {
		name      string
		code      int
		misbehave func(t *testing.T, s *server, conn *websocket.Conn)
	}{
		{"a frame without a mask", 1002, func(t *testing.T, _ *server, conn *websocket.Conn) {
			conn.NetConn().Write([]byte{0x81, 1, 'x'})
		}},
		{"a binary message", 1003, write(websocket.BinaryMessage, "x")},
		{"text that is not UTF-8", 1007, write(websocket.TextMessage, "\xff")},
		{"no answer to pings", 1008, func(t *testing.T, _ *server, conn *websocket.Conn) {
			conn.SetPingHandler(func(string) error { return nil })
		}},
		{"a message of 513 bytes", 1009, write(websocket.TextMessage, strings.Repeat("x", 513))},
		{"a slow client", 1013, func(t *testing.T, s *server, _ *websocket.Conn) {
			// At 2,000 messages a second, their rate limit, the senders fill the socket
			// buffers of conn, some 4 MiB, and then its queue.
			senders := make([]*websocket.Conn, 20)
			for i := range senders {
				senders[i] = s.dial(t)
			}
			for _, sender := range senders[1:] {
				go discard(sender)
			}
			for _, sender := range senders {
				go func() {
					for sender.WriteMessage(websocket.TextMessage, bytes.Repeat([]byte("x"), 500)) == nil {
					}
				}()
			}
			for received := 0; received < 6<<20; {
				_, message, err := senders[0].ReadMessage()
				if err != nil {
					t.Fatal(err)
				}
				received += len(message)
			}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			var s *server
			if tt.code == 1008 {
				s = startQuick(t, "localhost:0") // Its pongWait is six seconds.
			} else {
				s = startServer(t, "localhost:0")
			}
			conn := s.dial(t)
			tt.misbehave(t, s, conn)
			conn.SetReadDeadline(time.Now().Add(patience))
			wantClose(t, discard(conn), tt.code)
			s.waitForLog(t, fmt.Sprintf(`dropped: "websocket: close %d\b`, tt.code))
		})
	}
}

func TestGracefulShutdownSendsWhatIsQueuedAnd1001(t *testing.T) {
	t.Parallel()
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM} {
		t.Run(sig.String(), func(t *testing.T) {
			s := startServer(t, "localhost:0")
			reader, sender := s.dial(t), s.dial(t)
			for i := range 100 {
				send(t, sender, fmt.Sprint(i))
			}
			for n := 0; n < 100; { // Once sender has received all, they are queued for reader, too.
				_, message, err := sender.ReadMessage()
				if err != nil {
					t.Fatal(err)
				}
				n += 1 + strings.Count(string(message), "\n")
			}
			start := time.Now()
			s.signal(t, sig)
			_, err := readAll(sender)
			wantClose(t, err, 1001)
			lines, err := readAll(reader)
			wantClose(t, err, 1001)
			if len(lines) != 100 {
				t.Errorf("the client reads %d lines before the close frame, want 100", len(lines))
			}
			s.wantExit(t, start, atOnce)
		})
	}
}

func TestCloseFrameOfAShutdownReachesAllClients(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name                string
		idle, senders, slow int
		limit               time.Duration
	}{
		{"all idle", 150, 0, 0, atOnce},
		{"some send, some read nothing", 150, 30, 5, 12 * time.Second},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := startServer(t, "localhost:0")
			for range tt.slow {
				dialer := websocket.Dialer{NetDial: func(network, addr string) (net.Conn, error) {
					conn, err := net.Dial(network, addr)
					if err == nil {
						conn.(*net.TCPConn).SetReadBuffer(4096) // so that it fills up soon
					}
					return conn, err
				}}
				dial(t, &dialer, "ws://"+s.addr+"/ws")
			}
			conns := make([]*websocket.Conn, tt.idle+tt.senders)
			for i := range conns {
				conns[i] = s.dial(t)
			}
			ends := make(chan error)
			receiving := make(chan struct{}) // closed when the first client receives a message
			var once sync.Once
			for _, conn := range conns {
				go func() {
					if tt.senders > 0 {
						conn.NextReader()
						once.Do(func() { close(receiving) })
					}
					ends <- discard(conn)
				}()
			}
			for _, conn := range conns[tt.idle:] {
				go func() {
					for conn.WriteMessage(websocket.TextMessage, []byte("blah")) == nil {
					}
				}()
			}
			if tt.senders > 0 {
				<-receiving
			}
			start := time.Now()
			s.signal(t, syscall.SIGTERM)
			s.wantExit(t, start, tt.limit)
			for range conns {
				wantClose(t, <-ends, 1001)
			}
		})
	}
}

func TestSecondSignalEndsTheProcess(t *testing.T) {
	t.Parallel()
	s := startServer(t, "localhost:0")
	s.dial(t) // It never answers the close frame: the server waits for closeWait.
	s.signal(t, syscall.SIGTERM)
	s.waitForLog(t, "shutting down")
	go func() { // A second signal counts from a second after the first.
		for range time.Tick(100 * time.Millisecond) {
			if s.cmd.Process.Signal(syscall.SIGTERM) != nil {
				return // It has exited.
			}
		}
	}()
	if state := s.wait(t); state.String() != "signal: terminated" {
		t.Errorf("the server exited with %v, want the signal", state)
	}
}

func TestFailureToListenIsOneLineAndStatus1(t *testing.T) {
	t.Parallel()
	s := startServer(t, "localhost:0")
	for name, addr := range map[string]string{
		"busy": s.addr,
		"bad":  "localhost:nowhere",
		"none": "",
	} {
		t.Run(name, func(t *testing.T) {
			if addr == "" {
				addr = "256.0.0.1:1"
			}
			out, err := exec.Command(binary, "-addr", addr).CombinedOutput()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.ExitCode() != 1 {
				t.Errorf("the server exited with %v, want exit status 1", err)
			}
			if text := string(out); strings.Count(text, "\n") != 1 || !strings.Contains(text, addr[strings.Index(addr, ":")+1:]) {
				t.Errorf("the server logs %q, want one line with the address", text)
			}
		})
	}
}

func TestClientsStayConnectedWhenFileDescriptorsRunOut(t *testing.T) {
	t.Parallel()
	const limit = 40
	s := startCommand(t, exec.Command("sh", "-c", fmt.Sprintf(`ulimit -n %d; exec "$0" "$@"`, limit), binary, "-addr", "localhost:0"))
	client := s.dial(t)
	// The kernel queues connections that the server cannot accept.
	waiting := make([]net.Conn, limit)
	for i := range waiting {
		conn, err := net.Dial("tcp", s.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		waiting[i] = conn
	}
	s.waitForLog(t, "too many open files")

	send(t, client, "still here")
	client.SetReadDeadline(time.Now().Add(patience))
	if _, message, err := client.ReadMessage(); err != nil || string(message) != "still here" {
		t.Fatalf("a connected client reads %q and %v", message, err)
	}
	for _, conn := range waiting {
		conn.Close()
	}
	newClient := s.dial(t)
	send(t, newClient, "finally")
	if _, message, err := client.ReadMessage(); err != nil || string(message) != "finally" {
		t.Errorf("a connected client reads %q and %v from a new one", message, err)
	}
}

func TestEndlessHeaderTimesOut(t *testing.T) {
	t.Parallel()
	s := startServer(t, "localhost:0")
	conn, err := net.Dial("tcp", s.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	start := time.Now()
	fmt.Fprintf(conn, "GET / HTTP/1.1\r\nHost: %s\r\nX-Endless: ", s.addr)
	const most = 20 * time.Second
	conn.SetReadDeadline(start.Add(most))
	if _, err := io.ReadAll(conn); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("the server has not closed the connection within %v", most)
	}
	if got := time.Since(start); got < 9*time.Second {
		t.Errorf("the server closed the connection after %v, want about 10 s", got)
	}
}

func TestHTTPResponses(t *testing.T) {
	t.Parallel()
	s := startServer(t, "localhost:0")
	for _, tt := range []struct {
		method, path string
		status       int
		header       map[string]string
	}{
		{"GET", "/", 200, map[string]string{
			"Content-Type":            "text/html; charset=utf-8",
			"X-Content-Type-Options":  "nosniff",
			"Content-Security-Policy": "default-src 'none'; script-src 'sha256-",
		}},
		{"HEAD", "/", 200, map[string]string{"Content-Type": "text/html; charset=utf-8"}},
		{"POST", "/", 405, map[string]string{"Allow": "GET, HEAD"}},
		{"GET", "/favicon.ico", 404, nil},
		{"GET", "/ws", 400, nil},
	} {
		request, err := http.NewRequestWithContext(t.Context(), tt.method, "http://"+s.addr+tt.path, nil)
		if err != nil {
			t.Fatal(err)
		}
		response, err := http.DefaultClient.Do(request)
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
		if response.StatusCode != tt.status {
			t.Errorf("%s %s: %s, want %d", tt.method, tt.path, response.Status, tt.status)
		}
		for name, want := range tt.header {
			if got := response.Header.Get(name); !strings.HasPrefix(got, want) {
				t.Errorf("%s %s: %s %q, want %q", tt.method, tt.path, name, got, want)
			}
		}
		if csp := response.Header.Get("Content-Security-Policy"); strings.Contains(csp, "unsafe") {
			t.Errorf("%s %s: Content-Security-Policy %q, want nothing unsafe", tt.method, tt.path, csp)
		}
	}
}
