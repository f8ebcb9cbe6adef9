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

// These tests check the essentials of the page in Firefox and WebKit. The other files test
// the rest, in Chromium, or in all three engines where they differ.

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
		w.until(fmt.Sprintf(`$("msg").value == "%sx" && $("counter").textContent == "Not sent. Characters too many: about 1"`, limit))
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
		w.until(`$("counter").textContent == "Not sent. Try again once connected"`)
		s = startQuick(t, s.addr)
		w.until(connected)
		w.until(`$("msg").value == "patience"`)
		w.press(enter)
		w.until(lastLine + ` == "patience" && $("msg").value == ""`)

		// After each failed handshake, Firefox delays the next WebSocket by more.
		s.signal(t, syscall.SIGKILL)
		s.wait(t)
		awaitRequests(t, s.addr, 8)
		startQuick(t, s.addr)
		start := time.Now()
		w.until(connected)
		if took := time.Since(start); took > 20*time.Second {
			t.Errorf("the page reconnected %v after the server started, want soon: the maximum backoff is 1 s", took)
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
		w.insert("a draft")
		w.open(s.addr)
		w.until(`$("msg").value == "a draft"`)
		w.must(w.engine.visit("about:blank"))
		w.must(w.engine.back())
		w.until(connected + ` && $("msg").value == "a draft"`)
		w.press(enter)
		w.until(lastLine + ` == "a draft" && $("msg").value == ""`)
	})
}

func TestFirefoxAndWebKitDetectAHalfOpenConnection(t *testing.T) {
	t.Parallel()
	inFirefoxAndWebKit(t, func(t *testing.T, w *window) {
		s := startQuick(t, "localhost:0")
		addr, cut := silentProxy(t, s.addr)
		w.open(addr)
		heartbeats := dial(t, &websocket.Dialer{Subprotocols: []string{"heartbeat"}}, "ws://"+s.addr+"/ws")
		for range 2 {
			if _, _, err := heartbeats.ReadMessage(); err != nil {
				t.Fatal(err)
			}
		}
		if got := get[int](w, `$("log").childElementCount`); got != 0 {
			t.Errorf("the log has %d lines, want none: heartbeats keep an idle connection", got)
		}
		cut()
		start := time.Now()
		w.send("lost")
		w.until(`$("log").lastChild?.className == "message mine pending" && $("msg").value == ""`)
		w.until(`$("log").textContent.includes("This may not have been delivered: lost")`)
		t.Logf("the page detected the half-open connection after %v", time.Since(start))
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
		w.wantReadPosition(want, "as the oldest lines were removed")
	})
}

// sendVaried sends n lines of various lengths, and then the line "That is all."
func sendVaried(t *testing.T, s *server, n int) {
	t.Helper()
	reader := s.dial(t)
	received := make(chan struct{}) // closed when reader has received the n lines
	go func() {
		defer close(received)
		for lines := 0; lines < n; {
			_, message, err := reader.ReadMessage()
			if err != nil {
				t.Error(err)
				return
			}
			lines += 1 + bytes.Count(message, []byte("\n"))
		}
	}()
	var sender *websocket.Conn
	for i := range n {
		if i%100 == 0 { // the burst of the rate limit
			sender = s.dial(t)
			go discard(sender)
		}
		send(t, sender, fmt.Sprintf("Line %d,%s", i, strings.Repeat(" and so it goes on", i%20)))
	}
	<-received
	send(t, reader, "That is all.")
}

// rest waits for two frames. The browser has then handled the last change, and accepts keys.
func (w *window) rest() {
	w.t.Helper()
	get[bool](w, "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))")
}

// wantReadPosition checks the read position, after two frames.
func (w *window) wantReadPosition(want, when string) {
	w.t.Helper()
	w.rest()
	if got := get[string](w, readPosition); got != want {
		w.t.Errorf("%s, the read position moved from %q to %q", when, want, got)
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
		t.Logf("the page showed the last line %v after it was sent", time.Since(sent))
		// This delay depends on the machine, but the number of layouts does not.
		if got, most := get[int](w, "flushes"), int(time.Since(start)/(100*time.Millisecond))+1; got > most {
			t.Errorf("the page flushed 5,000 lines in %d batches, want at most %d", got, most)
		}
		if got := get[string](w, `[$("log").childElementCount, document.querySelectorAll(".notice").length].join()`); got != "1000,0" {
			t.Errorf("the log's numbers of lines and notices are %s, want 1000,0", got)
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
		check := func(scheme string) {
			t.Helper()
			for _, violation := range get[[]string](w, `axe.run().then((result) => result.violations.map((v) =>
				v.id + ": " + v.help + " " + v.nodes.map((n) => n.html + " " + n.failureSummary)))`) {
				t.Errorf("%s: %s", scheme, violation)
			}
		}
		check("light")
		// The engines' protocols cannot set a media feature. WebKit has no forced colors.
		if got := get[string](w, `(() => {
			const isDark = (rule) => rule.media?.mediaText === "(prefers-color-scheme: dark)";
			[...document.styleSheets[0].cssRules].find(isDark).media.mediaText = "all";
			document.documentElement.style.colorScheme = "dark";
			return getComputedStyle(document.documentElement).backgroundColor;
		})()`); got != "rgb(22, 25, 29)" {
			t.Errorf("the dark background is %s, want --paper's", got)
		}
		check("dark")
	})
}

func TestFirefoxAndWebKitLogNothingToTheConsole(t *testing.T) {
	t.Parallel()
	inFirefoxAndWebKit(t, func(t *testing.T, w *window) {
		s := startServer(t, "localhost:0")
		switch e := w.engine.(type) {
		case *firefox:
			w.must(e.visit("about:blank")) // The previous test's page logs no more.
			e.console = nil
			w.open(s.addr)
			w.send("hello")
			w.until(lastLine + ` == "hello"`)
			get[bool](w, `!console.log("end")`)
			if want := []string{"info: end"}; !slices.Equal(e.console, want) {
				t.Errorf("the console shows %q, want %q", e.console, want)
			}
		case *webkit:
			// WebKit prints no console messages under WebDriver, so this runs its browser
			// without. The error about the lost connection has to be the first message, except
			// for a warning about a viewport key that WebKit does not know.
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
			printed, end, err := launch("(?s)^(.*)CONSOLE NETWORK ERROR WebSocket connection", []string{"DISPLAY=:" + e.display},
				browsers[0], "--enable-write-console-messages-to-stdout=true", url)
			w.must(err)
			end()
			for line := range strings.Lines(printed) {
				if strings.Contains(line, "CONSOLE") && !strings.Contains(line, `"interactive-widget" not recognized`) {
					t.Errorf("the console shows %q", line)
				}
			}
		}
	})
}

// startQuick starts a server with shorter timeouts: a tenth of pongWait in the server, and of
// responseTimeout and maxBackoff in the page, with pings more often than that. A heartbeat may
// come 2.8 s late.
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
	replace := make(map[string]string) // for go build -overlay: from a file to its edited copy
	for _, edit := range []struct{ file, old, new string }{
		{"client.go", "pongWait = 60 * time.Second", "pongWait = 6 * time.Second"},
		{"client.go", "pingPeriod = pongWait * 9 / 10", "pingPeriod = pongWait * 3 / 10"}, // so that a busy browser can answer in time
		{"home.html", "responseTimeout = 10_000, maxBackoff = 10_000;",
			"responseTimeout = 1_000, maxBackoff = 1_000;"},
		{"home.html", "pingPeriod = 54_000;", "pingPeriod = 3_600;"},
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

// awaitRequests listens on addr until n requests have arrived, and responds to each with
// status 502, like a proxy whose server is down. None may be a handshake.
func awaitRequests(t *testing.T, addr string, n int32) {
	t.Helper()
	listener, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	var requests atomic.Int32
	enough := make(chan struct{})
	server := http.Server{Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		rw.WriteHeader(http.StatusBadGateway)
		if r.URL.Path == "/ws" {
			t.Error("the page tries a handshake although its probes fail")
		}
		if requests.Add(1) == n {
			close(enough)
		}
	})}
	defer server.Close()
	go server.Serve(listener)
	select {
	case <-enough:
	case <-time.After(patience):
		t.Fatalf("the page sent %d requests within %v, want %d", requests.Load(), patience, n)
	}
}
