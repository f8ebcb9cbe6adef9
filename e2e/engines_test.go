package e2e

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/gorilla/websocket"
)

// The essentials, in Firefox and WebKit. The tests in other files look closer into
// Chromium, and into all three where they differ.

const connected = `$("status")?.textContent == "Connected"`

func TestFirefoxAndWebKitSendAndShowMessages(t *testing.T) {
	t.Parallel()
	inFirefoxAndWebKit(t, func(t *testing.T, w *window) {
		s := startServer(t, "localhost:0")
		w.open(s.addr)
		w.send("hello 🐢")
		w.until(lastLine + ` == "hello 🐢" && $("log").lastChild.className == "message mine"`)
		send(t, s.dial(t), "<b>hi</b>")
		w.until(lastLine + ` == "<b>hi</b>" && $("log").lastChild.className == "message"`)

		limit := strings.Repeat("🐢", 128)
		w.send(limit + "x")
		w.until(fmt.Sprintf(`$("msg").value == "%sx" && $("counter").textContent == "1 bytes too long"`, limit))
		w.press(backspace)
		w.press(enter)
		w.until(fmt.Sprintf(`$("msg").value == "" && %s == %q`, lastLine, limit))
	})
}

func TestFirefoxAndWebKitKeepTheDraftAndReconnect(t *testing.T) {
	t.Parallel()
	inFirefoxAndWebKit(t, func(t *testing.T, w *window) {
		s := startQuick(t, "localhost:0")
		w.open(s.addr)
		s.stop(t)
		w.until(`$("status").textContent.includes("restarting")`)
		w.send("patience")
		w.until(`$("counter").textContent == "Not sent: not connected"`)
		s = startQuick(t, s.addr)
		w.until(connected)
		w.until(`$("msg").value == "patience"`)
		w.press(enter)
		w.until(lastLine + ` == "patience" && $("msg").value == ""`)

		// Firefox makes a WebSocket wait longer each time that one has failed.
		s.signal(t, syscall.SIGKILL)
		s.wait(t)
		awaitRequests(t, s.addr, 8)
		startQuick(t, s.addr)
		start := time.Now()
		w.until(connected)
		if took := time.Since(start); took > 4*time.Second {
			t.Errorf("back %v after the server, want it within the second between two tries, or soon after", took)
		}
		w.send("again")
		w.until(lastLine + ` == "again"`)
	})
}

func TestFirefoxAndWebKitKeepTheDraftAcrossNavigation(t *testing.T) {
	t.Parallel()
	inFirefoxAndWebKit(t, func(t *testing.T, w *window) {
		s := startServer(t, "localhost:0")
		w.open(s.addr)
		w.insert("half a thought")
		w.open(s.addr)
		w.until(`$("msg").value == "half a thought"`)
		w.must(w.engine.visit("about:blank"))
		w.must(w.engine.back())
		w.until(connected + ` && $("msg").value == "half a thought"`)
		w.press(enter)
		w.until(lastLine + ` == "half a thought" && $("msg").value == ""`)
	})
}

func TestFirefoxAndWebKitDetectAHalfOpenConnection(t *testing.T) {
	t.Parallel()
	inFirefoxAndWebKit(t, func(t *testing.T, w *window) {
		s := startQuick(t, "localhost:0")
		addr, cut := silentProxy(t, s.addr)
		w.open(addr)
		beats := dial(t, &websocket.Dialer{Subprotocols: []string{"heartbeat"}}, "ws://"+s.addr+"/ws")
		for range 2 {
			if _, _, err := beats.ReadMessage(); err != nil {
				t.Fatal(err)
			}
		}
		if got := get[int](w, `$("log").childElementCount`); got != 0 {
			t.Errorf("the log has %d lines, want none: a line where only the heart beats is alive", got)
		}
		cut()
		start := time.Now()
		w.send("anybody there?")
		w.until(`$("log").lastChild?.className == "message mine pending" && $("msg").value == ""`)
		w.until(`$("log").textContent.includes("This may not have been delivered: anybody there?")`)
		t.Logf("noticed after %v", time.Since(start))
		w.until(connected + ` && !document.querySelector(".pending")`)
		w.send("hello again")
		w.until(lastLine + ` == "hello again" && $("log").textContent.includes("may have missed")`)
	})
}

func TestFirefoxAndWebKitKeepTheReadPosition(t *testing.T) {
	t.Parallel()
	inFirefoxAndWebKit(t, func(t *testing.T, w *window) {
		s := startServer(t, "localhost:0")
		w.open(s.addr)
		w.resize(700, 500)
		sendVaried(t, s, 1000)
		w.until(lastLine + ` == "That is all." && ` + atEnd)
		w.until(`$("log").childElementCount == 1000`)

		w.scroll(-1500)
		want := get[string](w, readPosition)
		for _, size := range [][2]int{{500, 700}, {700, 500}} {
			w.resize(size[0], size[1])
			w.wantReadPosition(want, fmt.Sprintf("in a window of %v", size))
		}
		sendVaried(t, s, 4500)
		w.until(lastLine + ` == "That is all." && $("log").childElementCount == 5000`)
		w.wantReadPosition(want, "as the oldest lines went")
	})
}

// sendVaried has clients say n lines of various lengths, and then one that that was
// all.
func sendVaried(t *testing.T, s *server, n int) {
	t.Helper()
	listener := s.dial(t)
	heard := make(chan struct{})
	go func() {
		defer close(heard)
		for lines := 0; lines < n; {
			_, message, err := listener.ReadMessage()
			if err != nil {
				t.Error(err)
				return
			}
			lines += 1 + bytes.Count(message, []byte("\n"))
		}
	}()
	var talker *websocket.Conn
	for i := range n {
		if i%100 == 0 { // so many can one client say at once
			talker = s.dial(t)
			go discard(talker)
		}
		send(t, talker, fmt.Sprintf("Line %d,%s", i, strings.Repeat(" and so it goes on", i%20)))
	}
	<-heard
	send(t, listener, "That is all.")
}

// rest waits for two frames: what a browser does after a change is done then, and it
// takes keys.
func (w *window) rest() {
	w.t.Helper()
	get[bool](w, "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))")
}

// wantReadPosition checks that the reader's place is want, once the page has come to
// rest.
func (w *window) wantReadPosition(want, when string) {
	w.t.Helper()
	w.rest()
	if got := get[string](w, readPosition); got != want {
		w.t.Errorf("%s, what is read moved from %q to %q", when, want, got)
	}
}

func TestFirefoxAndWebKitKeepUpWithAThousandLinesASecond(t *testing.T) {
	t.Parallel()
	inFirefoxAndWebKit(t, func(t *testing.T, w *window) {
		s := startServer(t, "localhost:0")
		w.open(s.addr)
		get[bool](w, `(window.flushes = 0, window.pageFlush = flush, flush = () => { flushes++; pageFlush(); }, true)`)
		start := time.Now()
		<-flood(t, s, 5000, 1000)
		sent := time.Now()
		w.until(`$("log").textContent.includes("line 4999 ")`)
		t.Logf("the last line was shown %v after it was sent", time.Since(sent))
		// How late that is depends on the machine. What has to be done for each line does
		// not: it is little if many lines are laid out at once.
		if got, most := get[int](w, "flushes"), int(time.Since(start)/(100*time.Millisecond))+1; got > most {
			t.Errorf("5,000 lines were laid out in %d parts, want at most %d", got, most)
		}
		if got := get[string](w, `[$("log").childElementCount, document.querySelectorAll(".notice").length].join()`); got != "1000,0" {
			t.Errorf("lines and notices are %s, want 1000 and none", got)
		}
	})
}

func TestAxeFindsNoViolationsInFirefoxAndWebKit(t *testing.T) {
	t.Parallel()
	axe, err := os.ReadFile("node_modules/axe-core/axe.min.js")
	if err != nil {
		t.Fatalf("no axe-core: %v\nRun npm ci in this folder", err)
	}
	inFirefoxAndWebKit(t, func(t *testing.T, w *window) {
		s := startServer(t, "localhost:0")
		w.open(s.addr)
		sendVaried(t, s, 100)
		w.until(lastLine + ` == "That is all."`)
		w.send("mine")
		w.until(lastLine + ` == "mine"`)
		s.stop(t)
		w.until(`document.querySelector(".notice")`)
		w.send(strings.Repeat("x", 513))
		get[bool](w, "(() => {"+string(axe)+"; return true })()")
		for _, violation := range get[[]string](w, `axe.run().then((result) => result.violations.map((v) =>
			v.id + ": " + v.help + " " + v.nodes.map((n) => n.html + " " + n.failureSummary)))`) {
			t.Error(violation)
		}
	})
}

func TestFirefoxAndWebKitLogNothingToTheConsole(t *testing.T) {
	t.Parallel()
	inFirefoxAndWebKit(t, func(t *testing.T, w *window) {
		s := startServer(t, "localhost:0")
		switch e := w.engine.(type) {
		case *firefox:
			w.must(e.visit("about:blank")) // the page before may have more to say
			e.console = nil
			w.open(s.addr)
			w.send("hello")
			w.until(lastLine + ` == "hello"`)
			get[bool](w, `!console.log("end")`)
			if want := []string{"info: end"}; !slices.Equal(e.console, want) {
				t.Errorf("the console says %q, want %q", e.console, want)
			}
		case *webkit:
			// When it is driven it prints no console. On its own, it is to complain of the
			// lost connection first, after a key that only others know.
			url := fakeServer(t, s, func(n int, upgrade func() *websocket.Conn) {
				if n == 1 {
					conn := upgrade()
					send(t, conn, "hello")
					conn.Close()
				}
			})
			browsers, _ := filepath.Glob("/usr/lib/*/webkit2gtk-*/MiniBrowser")
			if len(browsers) == 0 {
				t.Fatal("no MiniBrowser\nOn Debian: apt-get install webkit2gtk-driver")
			}
			complaints, end, err := launch("(?s)^(.*)CONSOLE NETWORK ERROR WebSocket connection", []string{"DISPLAY=:" + e.display},
				browsers[0], "--enable-write-console-messages-to-stdout=true", url)
			w.must(err)
			end()
			for line := range strings.Lines(complaints) {
				if strings.Contains(line, "CONSOLE") && !strings.Contains(line, `"interactive-widget" not recognized`) {
					t.Errorf("the console says %q", line)
				}
			}
		}
	})
}

// startQuick starts a server for which a minute takes six seconds, and whose page
// takes one for ten. All else is as it is.
func startQuick(t *testing.T, addr string) *server {
	t.Helper()
	path, err := quick()
	if err != nil {
		t.Fatal(err)
	}
	return startCommand(t, exec.Command(path, "-addr", ownHost(addr)))
}

// quick builds that server, and returns its path.
var quick = sync.OnceValues(func() (string, error) {
	dir := filepath.Dir(binary)
	replace := make(map[string]string) // files by other files
	for _, edit := range []struct{ file, old, new string }{
		{"client.go", "pongWait = 60 * time.Second", "pongWait = 6 * time.Second"},
		{"client.go", "pingPeriod = pongWait * 9 / 10", "pingPeriod = pongWait * 3 / 10"}, // a busy browser may be late
		{"home.html", "responseTimeout = 10_000;", "responseTimeout = 1_000;"},
		{"home.html", "maxBackoff = 10_000;", "maxBackoff = 1_000;"},
		{"home.html", "pingPeriod = 54_000;", "pingPeriod = 1_800;"},
	} {
		file, err := filepath.Abs(filepath.Join("..", edit.file))
		if err != nil {
			return "", err
		}
		content, err := os.ReadFile(cmp.Or(replace[file], file))
		if err != nil {
			return "", err
		}
		if !bytes.Contains(content, []byte(edit.old)) {
			return "", fmt.Errorf("%s has no %q", edit.file, edit.old)
		}
		replace[file] = filepath.Join(dir, edit.file)
		content = bytes.Replace(content, []byte(edit.old), []byte(edit.new), 1)
		if err := os.WriteFile(replace[file], content, 0o644); err != nil {
			return "", err
		}
	}
	overlay, err := json.Marshal(object{"Replace": replace})
	if err != nil {
		return "", err
	}
	if err := os.WriteFile(filepath.Join(dir, "overlay.json"), overlay, 0o644); err != nil {
		return "", err
	}
	path := filepath.Join(dir, "quick")
	build := exec.Command("go", "build", "-overlay", filepath.Join(dir, "overlay.json"), "-o", path, ".")
	build.Dir = ".."
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build: %w\n%s", err, out)
	}
	return path, nil
})

// awaitRequests listens at addr until n requests have come, and answers each like a
// proxy whose server is away.
func awaitRequests(t *testing.T, addr string, n int32) {
	t.Helper()
	listener, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	var tries atomic.Int32
	enough := make(chan struct{})
	server := http.Server{Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		rw.WriteHeader(http.StatusBadGateway)
		if tries.Add(1) == n {
			close(enough)
		}
	})}
	defer server.Close()
	go server.Serve(listener)
	select {
	case <-enough:
	case <-time.After(patience):
		t.Fatalf("%d tries to connect within %v, want %d", tries.Load(), patience, n)
	}
}
