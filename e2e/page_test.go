package e2e

import (
	"bytes"
	"flag"
	"fmt"
	"image"
	_ "image/png"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/css"
	"github.com/chromedp/cdproto/dom"
	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/input"
	"github.com/chromedp/cdproto/network"
	"github.com/chromedp/cdproto/page"
	"github.com/chromedp/cdproto/performance"
	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"
	"github.com/gorilla/websocket"
)

var screenshots = flag.Bool("screenshots", false, "keep the screenshots, in the folder of that name")

// JavaScript for what tests ask of the page's log.
const (
	atEnd    = `$("log").scrollHeight - $("log").clientHeight - $("log").scrollTop < 2`
	lastLine = `$("log").lastChild?.querySelector(".words")?.textContent`

	// A line in the middle of the log, and where it stands.
	middleLine = `(() => {
		const line = document.elementFromPoint(20, 200).closest("#log > div");
		return line.textContent + " at " + line.getBoundingClientRect().top;
	})()`
)

// recordBackoffs makes timers run 20 times as fast, and notes the waits for those that
// lead to a try, also if it begins by asking whether the server is there.
const recordBackoffs = `
	const realTimeout = setTimeout, realFetch = fetch;
	var waits = [], asked = 0;
	fetch = (...args) => { asked++; return realFetch(...args); };
	setTimeout = (f, ms, ...args) => realTimeout(() => {
		const before = sockets.length + asked;
		f(...args);
		if (sockets.length + asked > before) waits.push(ms);
	}, ms / 20);`

// fakeServer serves the page of s, but hands its WebSockets to talk, which gets
// to know how many there have been. It returns the page's URL.
func fakeServer(t testing.TB, s *server, talk func(n int, upgrade func() *websocket.Conn)) string {
	t.Helper()
	var n atomic.Int32
	mux := http.NewServeMux()
	mux.Handle("/", httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: s.addr}))
	mux.HandleFunc("/ws", func(w http.ResponseWriter, r *http.Request) {
		talk(int(n.Add(1)), func() *websocket.Conn {
			upgrader := websocket.Upgrader{Subprotocols: []string{"heartbeat"}}
			conn, err := upgrader.Upgrade(w, r, nil)
			if err != nil {
				t.Error(err)
				return nil
			}
			t.Cleanup(func() { conn.Close() })
			return conn
		})
	})
	fake := httptest.NewServer(mux)
	t.Cleanup(fake.Close)
	return fake.URL
}

// talk has clients say n lines at once: so many clients that none is slowed down.
func sendLines(t testing.TB, s *server, n int) {
	t.Helper()
	const burst = 100
	for i := 0; i < n; i += burst {
		conn := s.dial(t)
		go discard(conn)
		for j := i; j < min(i+burst, n); j++ {
			send(t, conn, fmt.Sprintf("One of many lines, number %d", j))
		}
	}
}

// flood has clients say lines, evenly spread over time. The channel is closed
// when they are sent.
func flood(t testing.TB, s *server, lines, perSecond int) (done chan struct{}) {
	t.Helper()
	conns := make([]*websocket.Conn, perSecond/90) // each may say 100 a second
	for i := range conns {
		conns[i] = s.dial(t)
		go discard(conns[i])
	}
	done = make(chan struct{})
	go func() {
		defer close(done)
		start := time.Now()
		for i := range lines {
			time.Sleep(time.Until(start.Add(time.Duration(i) * time.Second / time.Duration(perSecond))))
			text := fmt.Sprintf("line %d of a flood that is about as long as what people write", i)
			if err := conns[i%len(conns)].WriteMessage(websocket.TextMessage, []byte(text)); err != nil {
				t.Error(err)
				return
			}
		}
	}()
	return done
}

func TestPageReconnectsWhenTheServerRestarts(t *testing.T) {
	t.Parallel()
	s := startServer(t, "localhost:0")
	p := openTab(t, s)
	if got := eval[int](p, `$("log").childElementCount`); got != 0 {
		t.Errorf("a new page's log has %d lines, want none: there is no gap yet", got)
	}
	s.stop(t)
	p.until(`$("status").textContent.includes("The server is restarting")`)
	s = startServer(t, s.addr)
	p.until(`$("status").textContent == "Connected"`)
	p.until(`$("log").lastChild.className == "notice" && ` + lastLine + `.includes("may have missed")`)
	send(t, s.dial(t), "hello again")
	p.until(lastLine + ` == "hello again"`)
}

func TestStatusExplainsTheCloseCode(t *testing.T) {
	t.Parallel()
	s := startServer(t, "localhost:0")
	for code, want := range map[int]string{
		1001: "The server is restarting.",
		1003: "Disconnected: because.",
		1006: "No connection to the server.",
		1007: "Disconnected: because.",
		1009: "Disconnected: because.",
		1013: "Your connection was too slow. You missed messages.",
	} {
		t.Run(fmt.Sprint(code), func(t *testing.T) {
			t.Parallel()
			seen := make(chan struct{})
			p := newTab(t)
			p.open(fakeServer(t, s, func(n int, upgrade func() *websocket.Conn) {
				if n > 1 {
					<-seen
					discard(upgrade())
					return
				}
				conn := upgrade()
				conn.ReadMessage()
				if code != 1006 {
					conn.WriteMessage(websocket.CloseMessage, websocket.FormatCloseMessage(code, "because"))
				}
				conn.Close()
			}))
			defer close(seen)
			p.send("offend")
			p.until(fmt.Sprintf(`$("status").textContent == "%s Reconnecting…"`, want))
			p.until(fmt.Sprintf(`$("log").innerText.includes(%q)`, want))
			seen <- struct{}{}
			p.until(`$("status").textContent == "Connected"`)
			p.until(`$("log").innerText.includes("may have missed")`)
		})
	}
}

func TestReconnectsUseExponentialBackoffWithJitter(t *testing.T) {
	t.Parallel()
	s := startServer(t, "localhost:0")
	var firsts []float64
	for range 2 {
		p := newTab(t)
		p.beforePage(recordBackoffs)
		url := fakeServer(t, s, func(n int, upgrade func() *websocket.Conn) {
			if n == 1 {
				upgrade().Close()
			} // else the handshake fails
		})
		do(p, chromedp.Navigate(url))
		p.until("waits.length >= 8")
		waits := eval[[]float64](p, "waits")
		if waits[0] > 1000 {
			t.Errorf("the first try is after %v ms, want within 1000", waits[0])
		}
		if waits[7] < 5000 {
			t.Errorf("the eighth try is after %v ms, want the tries to become rare", waits[7])
		}
		if slices.Max(waits) > 11_000 {
			t.Errorf("waits of %v ms, want none above some 10000", waits)
		}
		firsts = append(firsts, waits[0])
	}
	if firsts[0] == firsts[1] {
		t.Errorf("two pages both wait %v ms, want jitter", firsts[0])
	}
}

func TestHangingHandshakeTimesOut(t *testing.T) {
	t.Parallel()
	s := startServer(t, "localhost:0")
	p := newTab(t)
	p.beforePage(fast)
	end := make(chan struct{})
	defer close(end)
	p.open(fakeServer(t, s, func(n int, upgrade func() *websocket.Conn) {
		if n == 1 {
			<-end
		} else {
			discard(upgrade())
		}
	}))
	if got := eval[int](p, "atOnce"); got != 1 {
		t.Errorf("%d connections at once, want 1", got)
	}
}

func TestPageHasOneConnectionAtATime(t *testing.T) {
	t.Parallel()
	s := startServer(t, "localhost:0")
	p := openTab(t, s)
	const events = `for (let i = 0; i < 20; i++) {
		if (i % 5 == 0) dispatchEvent(new Event("offline"));
		dispatchEvent(new Event("online"));
		document.dispatchEvent(new Event("visibilitychange"));
	} true`
	eval[bool](p, events)
	p.until(`$("status").textContent == "Connected"`)
	s.stop(t)
	p.until(`$("status").textContent != "Connected"`)
	eval[bool](p, events)
	startServer(t, s.addr)
	eval[bool](p, events)
	p.until(`$("status").textContent == "Connected"`)
	if got := eval[int](p, "atOnce"); got != 1 {
		t.Errorf("%d connections at once, want 1", got)
	}
}

func TestDraftIsKeptWhileOffline(t *testing.T) {
	t.Parallel()
	s := startServer(t, "localhost:0")
	p := openTab(t, s)
	p.setOffline(true)
	p.until(`$("status").textContent.includes("You are offline")`)
	p.send("kept")
	p.wantDraft("kept")
	if got := eval[string](p, `$("counter").textContent + " " + $("msg").getAttribute("aria-invalid")`); got != "Not sent: not connected true" {
		t.Errorf("above the input it says %q, want that nothing was sent", got)
	}
	p.setOffline(false)
	online := time.Now()
	p.until(`$("status").textContent == "Connected"`)
	if got := time.Since(online); got > 3*time.Second { // else the next try is 5 to 10 s away
		t.Errorf("connected %v after the browser was online, want at once", got)
	}
	p.wantDraft("kept")
	p.press(kb.Enter)
	p.until(lastLine + ` == "kept"`)
	p.wantDraft("")
}

func TestTabReconnectsAtOnceWhenItBecomesVisible(t *testing.T) {
	t.Parallel()
	s := startServer(t, "localhost:0")
	p := newTab(t)
	p.beforePage("setTimeout = () => 0") // without a try of its own
	p.open("http://" + s.addr + "/")
	show := p.hide()
	s.stop(t)
	p.until(`$("status").textContent != "Connected"`)
	startServer(t, s.addr)
	show()
	p.until(`$("status").textContent == "Connected"`)
}

func TestDraftIsKeptWhileTheServerIsDown(t *testing.T) {
	t.Parallel()
	s := startServer(t, "localhost:0")
	p := openTab(t, s)
	s.stop(t)
	p.until(`$("status").textContent != "Connected"`)
	p.send("patience")
	p.wantDraft("patience")
	startServer(t, s.addr)
	p.until(`$("status").textContent == "Connected"`)
	p.wantDraft("patience")
	p.press(kb.Enter)
	p.until(lastLine + ` == "patience"`)
	p.wantDraft("")
}

func TestUndeliveredMessagesAreShown(t *testing.T) {
	t.Parallel()
	s := startServer(t, "localhost:0")
	p := newTab(t)
	p.open(fakeServer(t, s, func(n int, upgrade func() *websocket.Conn) {
		conn := upgrade()
		if n > 1 {
			discard(conn)
			return
		}
		for _, echo := range []bool{true, false, true, false} {
			_, message, err := conn.ReadMessage()
			if err != nil {
				return
			}
			if echo {
				conn.WriteMessage(websocket.TextMessage, message)
			}
		}
		conn.Close()
	}))
	for _, text := range []string{"first", "second", "third", "lost"} {
		p.send(text)
	}
	p.until(`$("log").textContent.includes("may have missed")`)
	if got, want := eval[string](p, `[...document.querySelectorAll(".notice .words")].map((e) => e.textContent).filter((e) => e.includes("delivered")).join()`),
		"This may not have been delivered: second,This may not have been delivered: lost"; got != want {
		t.Errorf("the log says %q, want %q", got, want)
	}
}

func TestMessageLimitCountsBytes(t *testing.T) {
	t.Parallel()
	s := startServer(t, "localhost:0")
	p := openTab(t, s)
	for _, tt := range []struct {
		name, draft, counter string
	}{
		{"far from it", strings.Repeat("x", 400), ""},
		{"near it", strings.Repeat("x", 500), "12 bytes left"},
		{"at it, in ASCII", strings.Repeat("x", 512), "0 bytes left"},
		{"at it, in emoji", strings.Repeat("🐢", 128), "0 bytes left"},
		{"at it, between blanks", "  " + strings.Repeat("é", 256) + "  ", "0 bytes left"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p.insert(tt.draft)
			if got := eval[string](p, `$("counter").textContent`); got != tt.counter {
				t.Errorf("counter %q, want %q", got, tt.counter)
			}
			p.press(kb.Enter)
			p.until(fmt.Sprintf(lastLine+` == %q`, strings.TrimSpace(tt.draft)))
			p.wantDraft("")
			if got := eval[string](p, `$("counter").textContent`); got != "" {
				t.Errorf("counter after sending %q, want none", got)
			}
		})
	}
	for _, draft := range []string{strings.Repeat("x", 513), strings.Repeat("🐢", 128) + "x"} {
		p.insert(draft)
		if got, want := eval[string](p, `$("counter").textContent`), "1 bytes too long"; got != want {
			t.Errorf("counter %q, want %q", got, want)
		}
		p.press(kb.Enter)
		p.wantDraft(draft)
		if got := eval[string](p, `$("msg").getAttribute("aria-invalid")`); got != "true" {
			t.Errorf("aria-invalid is %q while the draft is too long, want true", got)
		}
		p.press(kb.Backspace)
		p.press(kb.Enter)
		p.wantDraft("")
	}
	p.until(`$("status").textContent == "Connected" && $("log").childElementCount == 7`)
}

func TestBlankDraftsAreNotSent(t *testing.T) {
	t.Parallel()
	s := startServer(t, "localhost:0")
	p := newTab(t)
	p.beforePage(`var sent = []; WebSocket.prototype.send = (text) => sent.push(text);`)
	p.open("http://" + s.addr + "/")
	for _, draft := range []string{"", "   ", "\t\u0085\u00a0"} {
		p.send(draft)
		eval[bool](p, `$("msg").value = ""; true`)
	}
	p.send("x")
	if got := eval[string](p, "sent.join()"); got != "x" {
		t.Errorf("sent %q, want only %q", got, "x")
	}
}

func TestMessagesAreShownAsTextWithinTheirLines(t *testing.T) {
	t.Parallel()
	s := startServer(t, "localhost:0")
	p := openTab(t, s)
	hostile := []string{
		"plain",
		`<b>bold</b><img src=x onerror=alert(1)>`,
		"\u202eright to left override",
		"\u2067isolate \u202b embedding",
		"two\u2028lines\u2029three",
		"Z" + strings.Repeat("\u0336\u0353\u0347", 80) + "algo",
		"שלום עולם",
		strings.Repeat("w", 512),
		"10:00 AM You are offline.",
		"plain",
	}
	conn := s.dial(t)
	for _, text := range hostile {
		send(t, conn, text)
	}
	p.until(fmt.Sprintf(`$("log").childElementCount == %d`, len(hostile)))
	texts := eval[[]string](p, `[...$("log").children].map((line) => line.lastChild.textContent)`)
	for i, got := range texts {
		if want := strings.NewReplacer("\u2028", " ", "\u2029", " ").Replace(hostile[i]); got != want {
			t.Errorf("line %q, want %q", got, want)
		}
	}
	if got := eval[int](p, `$("log").querySelectorAll("*:not(#log > div, time, span)").length`); got != 0 {
		t.Errorf("the log has %d elements that messages brought", got)
	}
	if got := eval[[]float64](p, `[...new Set([...$("log").querySelectorAll("time")].map((time) => time.getBoundingClientRect().right))]`); len(got) != 1 {
		t.Errorf("times stand at %v, want them in one column", got)
	}
	heights := eval[[]float64](p, `[...$("log").children].map((line) => line.getBoundingClientRect().height)`)
	for i, height := range heights {
		if long := len(hostile[i]) > 100; !long && height != heights[0] || long && i == 7 && height <= heights[0] {
			t.Errorf("%.20q is %v high, a line of plain text %v", hostile[i], height, heights[0])
		}
	}
	if got := eval[int](p, `[...$("log").children].filter((line) => getComputedStyle(line).contain != "content").length`); got != 0 {
		t.Errorf("%d lines do not contain what is piled up in them", got)
	}
	if got := eval[int](p, `$("log").scrollWidth - $("log").clientWidth`); got != 0 {
		t.Errorf("long words make the log %d pixels too wide", got)
	}

	s.stop(t)
	p.until(`$("log").querySelector(".notice")`)
	if eval[bool](p, `getComputedStyle($("log").lastChild).backgroundColor == getComputedStyle($("log").firstChild).backgroundColor`) {
		t.Error("a notice looks like a message")
	}
}

func TestURLsAreLinks(t *testing.T) {
	t.Parallel()
	inAllEngines(t, func(t *testing.T, w *window) {
		s := startServer(t, "localhost:0")
		w.open(s.addr)
		conn := s.dial(t)
		for _, tt := range []struct {
			line string
			want []string // the links
		}{
			{"http://example.org", []string{"http://example.org"}},
			{"Ilse: https://example.org/a?b=c&d=%20#e-f_g~h is it", []string{"https://example.org/a?b=c&d=%20#e-f_g~h"}},
			{"see https://example.org/, http://localhost:8080/x. Good?", []string{"https://example.org/", "http://localhost:8080/x"}},
			{"(https://example.org/a)", []string{"https://example.org/a"}},
			{"(https://example.org/A_(b))!", []string{"https://example.org/A_(b)"}},
			{"[https://example.org/a]: <https://example.org/b>;", []string{"https://example.org/a", "https://example.org/b"}},
			{`"https://example.org/a" 'https://example.org/b' “https://example.org/c”`, []string{"https://example.org/a", "https://example.org/b", "https://example.org/c"}},
			{"*https://example.org/a*… 《https://example.org/b》。", []string{"https://example.org/a", "https://example.org/b"}},
			{"https://example.org/it's,so:good?!", []string{"https://example.org/it's,so:good"}},
			{"http://[::1]:8080/x", []string{"http://[::1]:8080/x"}},
			{"HTTPS://EXAMPLE.ORG/X", []string{"HTTPS://EXAMPLE.ORG/X"}},
			{"https://he.wikipedia.org/wiki/שלום", []string{"https://he.wikipedia.org/wiki/שלום"}},
			{"ראו https://example.org/a, שלום", []string{"https://example.org/a"}},
			{"https://example.org/\u202egro.live//:sptth", []string{"https://example.org/"}},
			{"https://example.org/<img src=x onerror=alert(1)>", []string{"https://example.org/"}},
			{`https://example.org/"onclick="alert(1)`, []string{"https://example.org/"}},
			{"javascript:alert(1) ftp://example.org/ data:text/html,x file:///x //example.org/ www.example.org xhttp://example.org/", nil},
			{"http:// https://. http:/x https:x https://)", nil},
		} {
			send(t, conn, tt.line)
			w.until(fmt.Sprintf(lastLine+" == %q", tt.line))
			got := get[[]string](w, `[...$("log").lastChild.querySelectorAll("a")].map((a) => a.textContent)`)
			if !slices.Equal(got, tt.want) {
				t.Errorf("in %q the links are %q, want %q", tt.line, got, tt.want)
			}
		}
		if got := get[[]string](w, `[...new Set([...$("log").querySelectorAll("a")].map((a) => {
			const style = getComputedStyle(a);
			return [a.rel, a.target, a.getAttributeNames().sort(), style.direction, style.unicodeBidi, a.getAttribute("href") == a.textContent].join(" ");
		}))]`); !slices.Equal(got, []string{"noopener noreferrer nofollow _blank dir,href,rel,target ltr isolate true"}) {
			t.Errorf("the links have %q", got)
		}
		// In a line of Hebrew the address reads from left to right, in its place.
		if got := get[string](w, `(() => {
			const a = [...$("log").querySelectorAll("a")].find((a) => a.parentNode.textContent.startsWith("ראו")), text = a.firstChild;
			const at = (node, i) => { const range = document.createRange(); range.setStart(node, i); range.setEnd(node, i + 1); return range.getBoundingClientRect().left; };
			return [at(a.previousSibling, 0) > at(text, 20), at(text, 0) < at(text, 8), at(text, 8) < at(text, 20), at(a.nextSibling, 3) < at(text, 0)].join();
		})()`); got != "true,true,true,true" {
			t.Errorf("the address in a line of Hebrew: %s", got)
		}

		get[bool](w, `showUndelivered("https://example.org/") ?? true`)
		w.until(lastLine + `.includes("delivered: https://example.org/")`)
		if get[bool](w, `!!document.querySelector(".notice a")`) {
			t.Error("there is a link in a notice")
		}
	})
}

// In the test above nothing is followed.
func TestLinkOpensInANewTabWithoutAReferrer(t *testing.T) {
	t.Parallel()
	s := startServer(t, "localhost:0")
	asked := make(chan http.Header, 10)
	other := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { asked <- r.Header }))
	t.Cleanup(other.Close)
	p := openTab(t, s)
	send(t, s.dial(t), "see "+other.URL+"/x.")
	p.until(`$("log").querySelector("a")`)
	w := &window{t, &chrome{tab: p}}
	w.click(`document.querySelector("#log a")`)
	select {
	case header := <-asked:
		if got := header.Get("Referer"); got != "" {
			t.Errorf("the other server is told of %q, want nothing of us", got)
		}
	case <-time.After(patience):
		t.Fatal("the link was not followed")
	}
	p.until(`$("status").textContent == "Connected" && sockets.length == 1`)
	p.wantEmptyConsole()
}

func TestLogKeepsItsScrollPosition(t *testing.T) {
	t.Parallel()
	s := startServer(t, "localhost:0")
	p := openTab(t, s)
	sendLines(t, s, 300)
	p.untilShown(300)
	p.until(atEnd)

	p.scroll("-1000")
	want := eval[string](p, middleLine)
	if !eval[bool](p, `$("jump").hidden`) {
		t.Error("there is a button for new messages before there are any")
	}
	send(t, s.dial(t), "new")
	p.until(lastLine + ` == "new"`)
	p.until(`!$("jump").hidden`)
	if got := eval[string](p, middleLine); got != want {
		t.Errorf("what is read moved from %q to %q", want, got)
	}

	do(p, chromedp.Click(chromedp.ID("jump")))
	p.until(atEnd + ` && $("jump").hidden`)
	send(t, s.dial(t), "newer")
	p.until(lastLine + ` == "newer" && ` + atEnd)

	p.scroll("-1000")
	send(t, s.dial(t), "newest")
	p.until(`!$("jump").hidden`)
	p.press(kb.End) // the log has had the focus since the click
	p.until(atEnd + ` && $("jump").hidden`)
}

func TestNoticesAreNotNewMessages(t *testing.T) {
	t.Parallel()
	s := startServer(t, "localhost:0")
	p := openTab(t, s)
	sendLines(t, s, 100)
	p.untilShown(100)
	p.scroll("-500")
	want := eval[string](p, middleLine)
	s.stop(t)
	p.until(lastLine + ` == "The server is restarting."`)
	s = startServer(t, s.addr)
	p.until(lastLine + `.startsWith("Reconnected")`)
	if !eval[bool](p, `$("jump").hidden`) {
		t.Error("after two notices there is a button for new messages")
	}
	send(t, s.dial(t), "new")
	p.until(`!$("jump").hidden`)
	if got := eval[string](p, middleLine); got != want {
		t.Errorf("what is read moved from %q to %q", want, got)
	}
}

func TestLogDropsOldLinesButNotThoseInView(t *testing.T) {
	t.Parallel()
	s := startServer(t, "localhost:0")
	p := openTab(t, s)
	sendLines(t, s, 1500)
	p.untilShown(1500)
	wantLines := func(want int) {
		t.Helper()
		if got := eval[int](p, `$("log").childElementCount`); got != want {
			t.Errorf("the log has %d lines, want %d", got, want)
		}
	}
	wantLines(1000)

	p.scroll(`-$("log").scrollHeight`)
	want := eval[string](p, middleLine)
	sendLines(t, s, 1500)
	p.untilShown(3000)
	wantLines(2500)
	if got := eval[string](p, middleLine); got != want {
		t.Errorf("the oldest line, while it was read, moved from %s to %s", want, got)
	}

	do(p, chromedp.Click(chromedp.ID("jump")))
	p.until(atEnd)
	p.scroll("-1000")
	want = eval[string](p, middleLine)
	sendLines(t, s, 4100)
	p.untilShown(7100)
	wantLines(5000)
	if got := eval[string](p, middleLine); got != want {
		t.Errorf("as the oldest lines went, what was read moved from %s to %s", want, got)
	}

	do(p, chromedp.Click(chromedp.ID("jump")))
	p.until(atEnd)
	send(t, s.dial(t), "end")
	p.until(lastLine + ` == "end" && ` + atEnd)
	wantLines(1000)
}

func TestHiddenTabCountsAllMessagesAndLimitsItsLines(t *testing.T) {
	t.Parallel()
	s := startServer(t, "localhost:0")
	p := openTab(t, s)
	show := p.hide()
	sendLines(t, s, 7000)
	p.until("arrived == 7000")
	if got := eval[string](p, "document.title"); got != "(7000) Chat" {
		t.Errorf("title %q, want it to count what is new", got)
	}
	if got := eval[int](p, `batch.childElementCount + $("log").childElementCount`); got != 5000 {
		t.Errorf("the hidden tab keeps %d lines, want 5000", got)
	}
	last := eval[string](p, "batch.lastChild.textContent")
	show()
	p.untilShown(7000)
	if got := eval[string](p, `$("log").childElementCount + $("log").lastChild.textContent`); got != "1000"+last {
		t.Errorf("the log has %q, want the last 1000 lines", got)
	}
	if got := eval[string](p, "document.title"); got != "Chat" {
		t.Errorf("title %q, want Chat", got)
	}
}

func TestScrollPositionIsKeptUnderLoad(t *testing.T) {
	t.Parallel()
	s := startServer(t, "localhost:0")
	p := openTab(t, s)
	done := flood(t, s, 3000, 1000)
	p.until(`$("log").childElementCount > 500`)
	p.scroll("-300")
	want := eval[string](p, middleLine)
	<-done
	p.untilShown(3000)
	if got := eval[string](p, middleLine); got != want {
		t.Errorf("what is read moved from %s to %s", want, got)
	}
}

func TestPageKeepsUpWithAThousandLinesASecond(t *testing.T) {
	t.Parallel()
	p, used, late := showFlood(t)
	t.Logf("the last line was shown %v after it was sent", late)
	if got := used("LayoutCount"); got > 100 {
		t.Errorf("10,000 lines were laid out %.0f times, want it done in batches", got)
	}
	if got := used("TaskDuration"); got > 5 {
		t.Errorf("10,000 lines took %.1f s of the main thread's ten, want it to keep up with ease", got)
	}
	if got := eval[int](p, `$("log").childElementCount`); got != 1000 {
		t.Errorf("the log has %d lines, want 1000", got)
	}
}

func BenchmarkPageAtAThousandLinesASecond(b *testing.B) {
	for b.Loop() {
		_, used, late := showFlood(b)
		b.ReportMetric(used("TaskDuration"), "main-thread-s")
		b.ReportMetric(used("ScriptDuration"), "script-s")
		b.ReportMetric(used("LayoutDuration"), "layout-s")
		b.ReportMetric(used("LayoutCount"), "layouts")
		b.ReportMetric(late.Seconds(), "late-s")
	}
}

// showFlood has a page show 10,000 lines in ten seconds. It returns the page, how
// much its main thread has used of a metric of Chromium's meanwhile, in seconds
// of processor time where it is a duration, and how long after the last line was
// sent the page showed it.
func showFlood(t testing.TB) (p *tab, used func(metric string) float64, late time.Duration) {
	t.Helper()
	const lines = 10_000
	s := startServer(t, "localhost:0")
	p = openTab(t, s)
	// Processor time: what others do on this machine is not the page's fault.
	call(p, performance.Enable, performance.EnableParams{TimeDomain: performance.EnableTimeDomainThreadTicks})
	metrics := func() map[string]float64 {
		m := make(map[string]float64)
		for _, metric := range call(p, performance.GetMetrics, cdp.Empty{}).Metrics {
			m[metric.Name] = metric.Value
		}
		return m
	}
	call(p, network.Disable, cdp.Empty{}) // or Chromium tells us of each message
	call(p, css.Disable, cdp.Empty{})     // and of each element
	call(p, dom.Disable, cdp.Empty{})
	before := metrics()
	<-flood(t, s, lines, 1000)
	sent := time.Now()
	p.untilShown(lines)
	late = time.Since(sent)
	after := metrics()
	return p, func(metric string) float64 { return after[metric] - before[metric] }, late
}

func TestAxeFindsNoViolations(t *testing.T) {
	t.Parallel()
	axe, err := os.ReadFile("node_modules/axe-core/axe.min.js")
	if err != nil {
		t.Fatalf("no axe-core: %v\nRun npm ci in this folder", err)
	}
	s := startServer(t, "localhost:0")
	for _, scheme := range []string{"light", "dark"} {
		p := newTab(t)
		p.media("prefers-color-scheme", scheme)
		p.open("http://" + s.addr + "/")
		eval[bool](p, string(axe)+"; true")
		check := func(state string) {
			t.Helper()
			for _, violation := range eval[[]string](p, `axe.run().then((result) => result.violations.map((v) =>
				v.id + ": " + v.help + " " + v.nodes.map((n) => n.html + " " + n.failureSummary)))`, chromedp.EvalAwaitPromise) {
				t.Errorf("%s, %s: %s", scheme, state, violation)
			}
		}
		check("empty")
		eval[bool](p, `append(newLine("message", "Ilse: hello")); append(newLine("message mine", "Grete: hello")); showPending("Grete: on its way"); true`)
		p.until("!batch.hasChildNodes()")
		check("names, and a line under way")
		sendLines(t, s, 100)
		p.untilShown(100)
		p.scroll("-500")
		p.insert(strings.Repeat("x", 500))
		send(t, s.dial(t), "new")
		p.until(`!$("jump").hidden`)
		check("scrolled up, near the limit")
		p.insert(strings.Repeat("x", 500))
		p.press(kb.Enter)
		p.setOffline(true)
		p.until(`$("log").querySelector(".notice")`)
		p.scroll(`$("log").scrollHeight`)
		check("offline, above the limit")
	}
}

func TestPageIsUsableByKeyboardAlone(t *testing.T) {
	t.Parallel()
	s := startServer(t, "localhost:0")
	p := openTab(t, s)
	wantFocus := func(want string) {
		t.Helper()
		got := eval[string](p, `document.activeElement.id || document.activeElement.textContent`)
		outline := eval[string](p, `getComputedStyle(document.activeElement).outlineStyle`)
		if got != want || outline != "solid" {
			t.Errorf("focus on %q with outline %q, want %q with one", got, outline, want)
		}
	}
	wantFocus("msg")
	p.send("hello")
	p.until(lastLine + ` == "hello"`)
	p.press(kb.Tab)
	wantFocus("Send")
	sendLines(t, s, 100)
	p.untilShown(101)
	shiftTab := func() { do(p, chromedp.KeyEvent(kb.Tab, chromedp.KeyModifiers(chromedp.ModifierShift))) }
	shiftTab()
	shiftTab()
	wantFocus("log")
	p.press(kb.Home)
	p.until(`$("log").scrollTop == 0`)
	send(t, s.dial(t), "new")
	p.until(`!$("jump").hidden`)
	p.press(kb.Tab)
	wantFocus("jump")
	p.press(kb.Enter)
	p.until(atEnd)
	wantFocus("log")
	p.press(kb.Tab)
	wantFocus("msg")
}

func TestLayoutFitsScreensOfAnyWidth(t *testing.T) {
	t.Parallel()
	s := startServer(t, "localhost:0")
	p := openTab(t, s)
	send(t, s.dial(t), strings.Repeat("w", 500))
	sendLines(t, s, 100)
	p.untilShown(101)
	p.fill("name", strings.Repeat("W", 32))
	p.fill("msg", strings.Repeat("w", 520))
	for _, status := range []string{"Connected", "The server is restarting. Reconnecting…"} {
		if status != "Connected" {
			s.stop(t)
		}
		p.until(fmt.Sprintf(`$("status").textContent == %q`, status))
		for _, size := range [][2]int64{{320, 256}, {320, 568}, {360, 640}, {360, 300}, {640, 160}, {341, 156}, {580, 256}, {1280, 800}, {2560, 1440}} {
			do(p, chromedp.EmulateViewport(size[0], size[1]))
			p.until(fmt.Sprintf("innerWidth == %d && innerHeight == %d", size[0], size[1]))
			if got := eval[string](p, `[document.documentElement, ...document.querySelectorAll("*")]
				.filter((e) => !e.matches("input, .visually-hidden, #form label") && e.scrollWidth > e.clientWidth && getComputedStyle(e).display != "inline" && e.clientWidth)
				.map((e) => e.outerHTML.slice(0, 99)).join()`); got != "" {
				t.Errorf("%v: too wide: %s", size, got)
			}
			if got := eval[string](p, `[$("status"), $("name"), $("log"), ...$("form").children].filter((e) => {
				const r = e.getBoundingClientRect();
				return r.left < 0 || r.top < 0 || r.right > innerWidth || r.bottom > innerHeight;
			}).map((e) => e.outerHTML.slice(0, 99)).join()`); got != "" {
				t.Errorf("%v: not on the screen: %s", size, got)
			}
			width := 180
			if size[1] < 240 && size[0] < 400 { // the counter is beside it
				width = 100
			}
			if got := eval[string](p, fmt.Sprintf(`[
				[$("log"), "clientHeight", 64], [$("msg"), "clientWidth", %d], [$("name"), "clientWidth", 80],
			].filter(([e, side, least]) => e[side] < least).map(([e, side]) => e.id + "'s " + side + " " + e[side]).join()`, width)); got != "" {
				t.Errorf("%v: too small: %s", size, got)
			}
			p.until(atEnd) // also when a phone's keyboard takes half of the screen
		}
	}
}

func TestLogHasTwoLinesInTheSmallestWindow(t *testing.T) {
	t.Parallel()
	s := startServer(t, "localhost:0")
	p := openTab(t, s)
	sendLines(t, s, 100)
	p.untilShown(100)
	s.stop(t)
	p.until(`$("status").textContent == "The server is restarting. Reconnecting…"`)
	p.fill("msg", strings.Repeat("w", 520))
	for _, size := range [][2]int64{{341, 156}, {320, 120}, {200, 100}, {640, 80}} {
		for _, font := range []string{"16px", "32px"} {
			do(p, chromedp.EmulateViewport(size[0], size[1]))
			p.until(fmt.Sprintf("innerWidth == %d && innerHeight == %d", size[0], size[1]))
			lines := eval[float64](p, `document.documentElement.style.fontSize = "`+font+`"; scrollTo(0, 9999);
				const [log, line] = [$("log"), $("log").lastChild].map((e) => getComputedStyle(e));
				($("log").clientHeight - 2 * parseFloat(log.paddingTop)) / (parseFloat(line.lineHeight) + 2 * parseFloat(line.paddingTop))`)
			if lines < 2 {
				t.Errorf("%v at %s: room for %.1f lines, want two", size, font, lines)
			}
			if got := eval[float64](p, `$("msg").getBoundingClientRect().bottom - innerHeight`); got > 0 {
				t.Errorf("%v at %s: the input ends %v pixels below the window, as far as one can scroll", size, font, got)
			}
		}
	}
}

// A browser that does not know dvh gets the height of what it shows, not that which there
// would be without its bar.
func TestFormIsVisibleWithoutDvh(t *testing.T) {
	t.Parallel()
	s := startServer(t, "localhost:0")
	p := newTab(t)
	call(p, page.SetBypassCSP, page.SetBypassCSPParams{Enabled: true}) // the style is to be another
	p.open("http://" + s.addr + "/")
	// Chromium knows vh, so here it is as wrong as on a phone.
	eval[bool](p, `const style = document.querySelector("style");
		style.textContent = style.textContent.replaceAll(/\d+dvh/g, "none").replaceAll("100vh", "calc(100vh + 80px)"); true`)
	p.until(`$("form").getBoundingClientRect().bottom == innerHeight`)
	sendLines(t, s, 100)
	p.untilShown(100)
	if got := eval[string](p, `[$("form").getBoundingClientRect().bottom - innerHeight, document.documentElement.scrollHeight - innerHeight].join()`); got != "0,0" {
		t.Errorf("form and page end so many pixels below the window: %s, want 0,0", got)
	}
}

// Of the three engines none can be told to drop a file. What replaces the page is what a
// browser does if the page leaves the event to it.
func TestDroppedContentDoesNotReplaceThePage(t *testing.T) {
	t.Parallel()
	inAllEngines(t, func(t *testing.T, w *window) {
		s := startServer(t, "localhost:0")
		w.open(s.addr)
		for _, tt := range []struct {
			what, on string
			taken    bool
		}{
			{"file", `$("log")`, false}, {"file", `$("msg")`, false}, {"file", "document.body", false}, {"file", `$("jump")`, false},
			{"text", `$("log")`, false}, {"text", `$("msg")`, true}, {"text", `$("name")`, true},
		} {
			for _, event := range []string{"dragover", "drop"} {
				if got := get[bool](w, fmt.Sprintf(`(() => {
					const dataTransfer = new DataTransfer();
					if (%q == "file") dataTransfer.items.add(new File(["x"], "x.txt", { type: "text/plain" }));
					else dataTransfer.setData("text/plain", "x");
					return %s.dispatchEvent(new DragEvent(%q, { dataTransfer, bubbles: true, cancelable: true }));
				})()`, tt.what, tt.on, event)); got != tt.taken {
					t.Errorf("%s of a %s on %s is left to the browser: %v, want %v", event, tt.what, tt.on, got, tt.taken)
				}
			}
		}
	})
}

func TestTextDroppedOnTheInputIsInserted(t *testing.T) {
	t.Parallel()
	p := openTab(t, startServer(t, "localhost:0"))
	for _, id := range []string{"log", "msg"} {
		at := eval[[]float64](p, `const box = $("`+id+`").getBoundingClientRect(); [box.left + 50, box.top + 10]`)
		for _, event := range []input.DispatchDragEventType{"dragEnter", "dragOver", "drop"} {
			call(p, input.DispatchDragEvent, input.DispatchDragEventParams{Type: event, X: at[0], Y: at[1], Data: &input.DragData{
				Items:              []*input.DragDataItem{{MimeType: "text/plain", Data: "dropped on " + id}},
				DragOperationsMask: 1,
			}})
		}
	}
	p.until(`$("msg").value == "dropped on msg"`)
	p.press(kb.Enter)
	p.until(lastLine + ` == "dropped on msg" && sockets.length == 1`)
}

// A proxy wants a login again, here or somewhere else: what answers is not the chat.
func TestExpiredLoginAtAProxyAdvisesToReload(t *testing.T) {
	t.Parallel()
	for _, status := range []int{http.StatusFound, http.StatusUnauthorized} {
		t.Run(fmt.Sprint(status), func(t *testing.T) {
			t.Parallel()
			inAllEngines(t, func(t *testing.T, w *window) { testLogin(t, w, status) })
		})
	}
}

func testLogin(t *testing.T, w *window, status int) {
	s := startQuick(t, "localhost:0")
	login := httptest.NewServer(http.NotFoundHandler())
	t.Cleanup(login.Close)
	var expired atomic.Bool
	var asked atomic.Int32
	proxy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: s.addr})
	front := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if !expired.Load() {
			proxy.ServeHTTP(rw, r)
			return
		}
		asked.Add(1)
		rw.Header().Set("Location", login.URL)
		rw.WriteHeader(status)
	}))
	t.Cleanup(front.Close)
	w.open(strings.TrimPrefix(front.URL, "http://"))
	w.insert("a draft")
	expired.Store(true)
	get[bool](w, `socket.close() ?? true`)
	const advice = `$("status").textContent == "Another page is answering instead of the chat. Reload: you may have to log in. Reconnecting…"`
	w.until(advice)
	for n := asked.Load(); asked.Load() < n+3; time.Sleep(pollInterval) { // also as it goes on trying
		if !get[bool](w, advice) {
			t.Fatalf("the status is %q", get[string](w, `$("status").textContent`))
		}
	}
	expired.Store(false)
	w.until(connected)
	if got := get[string](w, `$("msg").value`); got != "a draft" {
		t.Errorf("the draft is %q", got)
	}
}

func TestReducedMotionStopsAllMotion(t *testing.T) {
	t.Parallel()
	s := startServer(t, "localhost:0")
	p := newTab(t)
	p.media("prefers-reduced-motion", "reduce")
	p.open("http://" + s.addr + "/")
	send(t, s.dial(t), "hello")
	p.until(`$("log").hasChildNodes()`)
	if got := eval[string](p, `[...document.querySelectorAll("*")].filter((e) => {
		const s = getComputedStyle(e);
		return s.animationName != "none" || s.transitionDuration != "0s" || s.scrollBehavior != "auto";
	}).map((e) => e.outerHTML.slice(0, 99)).join()`); got != "" {
		t.Errorf("with reduced motion these move: %s", got)
	}
}

func TestPageSaysThatItNeedsJavaScript(t *testing.T) {
	t.Parallel()
	s := startServer(t, "localhost:0")
	p := newTab(t)
	call(p, emulation.SetScriptExecutionDisabled, emulation.SetScriptExecutionDisabledParams{Value: true})
	do(p, chromedp.Navigate("http://"+s.addr+"/"))
	if got := do(p, chromedp.Text(chromedp.ID("status"))); !strings.Contains(got, "needs JavaScript") {
		t.Errorf("status %q, want that it needs JavaScript", got)
	}
}

func TestPageLogsNothingToTheConsole(t *testing.T) {
	t.Parallel()
	s := startServer(t, "localhost:0")
	p := openTab(t, s)
	p.send("hello")
	p.until(lastLine + ` == "hello"`)
	do(p, chromedp.Navigate("http://"+s.addr+"/?a#b"))
	p.until(`$("status").textContent == "Connected"`)
	p.wantEmptyConsole()
	// A headless browser asks for no icon, others would ask the server.
	if got := eval[string](p, `document.querySelector("link[rel=icon]").href`); !strings.HasPrefix(got, "data:") {
		t.Errorf("the icon is at %q, want it in the page", got)
	}
}

func TestPageWorksOverTLSUnderAPath(t *testing.T) {
	t.Parallel()
	s := startServer(t, "localhost:0")
	proxy := &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) {
		r.SetURL(&url.URL{Scheme: "http", Host: s.addr})
		r.Out.Host = r.In.Host
	}}
	mux := http.NewServeMux()
	mux.Handle("/team/chat/", http.StripPrefix("/team/chat", proxy))
	front := httptest.NewTLSServer(mux)
	t.Cleanup(front.Close)
	p := newTab(t)
	p.open(front.URL + "/team/chat/")
	p.send("over TLS")
	p.until(lastLine + ` == "over TLS"`)
	p.wantEmptyConsole()
}

func TestContentSecurityPolicyAllowsOnlyThePage(t *testing.T) {
	t.Parallel()
	s := startServer(t, "localhost:0")
	p := openTab(t, s) // its own script runs
	if got := eval[string](p, "getComputedStyle(document.body).display"); got != "grid" {
		t.Errorf("body is displayed as %q, want the page's own style", got)
	}
	for name, js := range map[string]string{
		"a script":          `const e = document.createElement("script"); e.textContent = "var ran = true"; document.body.append(e)`,
		"a script's URL":    `const e = document.createElement("script"); e.src = "/x.js"; document.body.append(e)`,
		"a style":           `const e = document.createElement("style"); e.textContent = "p { color: red }"; document.body.append(e)`,
		"a style attribute": `document.body.setAttribute("style", "color: red")`,
		"a handler":         `document.body.setAttribute("onclick", "1"); document.body.click()`,
		"an image":          `const e = document.createElement("img"); e.src = "/x.png"; document.body.append(e)`,
		"another server":    `fetch("http://127.0.0.1:1/").catch(() => {})`,
		"a frame":           `const e = document.createElement("iframe"); e.src = "/"; document.body.append(e)`,
		"another base":      `const e = document.createElement("base"); e.href = "/x/"; document.head.append(e)`,
	} {
		eval[bool](p, `var violated = false; document.addEventListener("securitypolicyviolation", () => violated = true); `+js+`; true`)
		p.until("violated // by " + name + "\n")
	}
	if eval[bool](p, `"ran" in window`) {
		t.Error("an injected script ran")
	}
}

// The screenshots are those that README.md shows, and others to look at.
func TestScreenshots(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if *screenshots {
		dir = "screenshots"
	}
	for scheme, sizes := range map[string][][2]int64{
		"light": {{640, 524}, {320, 480}, {1920, 1000}},
		"dark":  {{360, 716}, {640, 400}},
	} {
		if !*screenshots {
			sizes = sizes[:1]
		}
		for _, size := range sizes {
			s := startServer(t, "localhost:0")
			p := newTab(t)
			p.media("prefers-color-scheme", scheme)
			do(p, chromedp.EmulateViewport(size[0], size[1]))
			p.beforePage(fakeClock)
			p.open("http://" + s.addr + "/")
			shoot := func(state string) {
				t.Helper()
				picture := do(p, chromedp.CaptureScreenshot())
				name := fmt.Sprintf("%s-%d-%s.png", scheme, size[0], state)
				if err := os.WriteFile(filepath.Join(dir, name), picture, 0o644); err != nil {
					t.Fatal(err)
				}
				decoded, _, err := image.Decode(bytes.NewReader(picture))
				if err != nil {
					t.Fatal(err)
				}
				red, _, _, _ := decoded.At(int(size[0])-2, int(size[1])/2).RGBA()
				if light := red > 0x8000; light != (scheme == "light") {
					t.Errorf("%s: the background's red is %#x", name, red)
				}
			}
			shoot("empty")
			do(p, chromedp.Focus(chromedp.ID("name")))
			p.insert("Grete")
			p.press(kb.Enter)
			hold := func(lines []string) {
				t.Helper()
				conn := s.dial(t)
				for _, text := range lines {
					if mine, ok := strings.CutPrefix(text, "Grete: "); ok {
						p.send(mine)
					} else {
						send(t, conn, text)
					}
					p.until(fmt.Sprintf(lastLine+` == %q && !$("log").querySelector(".pending")`, text))
					eval[bool](p, "later += 25_000; true")
				}
			}
			hold(conversation)
			eval[bool](p, "sockets.at(-1).send = () => {}; true") // what is sent now gets lost
			p.send("Ready when you are.")
			p.until(`$("log").querySelector(".pending")`)
			s.signal(t, syscall.SIGKILL)
			s.wait(t)
			p.until(`$("log").textContent.includes("may not have been delivered")`)
			p.insert("Shall we do the next one on ")
			shoot("lost")
			s = startServer(t, s.addr)
			p.until(`$("status").textContent == "Connected" && !batch.hasChildNodes()`)
			show := p.hide()
			for _, text := range afterwards {
				send(t, s.dial(t), text)
				p.until(fmt.Sprintf("batch.lastChild?.lastChild?.textContent == %q", text))
				eval[bool](p, "later += 40_000; true")
			}
			show()
			p.until("!batch.hasChildNodes()")
			shoot("chat")

			eval[bool](p, `$("msg").value = ""; true`)
			p.setOffline(true)
			p.until(`$("status").textContent.includes("offline")`)
			p.insert(strings.Repeat("This is far too long to be sent in one go. ", 13))
			p.press(kb.Enter)
			shoot("offline-limit")

			p.setOffline(false)
			p.until(`$("status").textContent == "Connected"`)
			eval[bool](p, `$("msg").value = ""; showLength(); true`)
			sendLines(t, s, 60)
			p.until(lastLine + `.startsWith("One of many lines")`)
			p.until("!batch.hasChildNodes()")
			p.scroll("-400")
			send(t, s.dial(t), "news")
			p.until(`!$("jump").hidden`)
			shoot("jump")
		}
	}
}

// What is said in the screenshots; the reader is Grete.
var conversation = []string{
	"Ilse: Morning! The new server is up.",
	"Grete: Nice. How many clients did you try?",
	"Ilse: Hundreds, and none was dropped (https://example.org/42).",
	"And does it take <b>markup</b>?",
	"שרה: שלום לכולם!",
	"Ilse: Only as text. I'll pull its plug now, mind the gap.",
}

var afterwards = []string{
	"Tom O'Malley: Back already?",
	"Ilse: In two seconds. Are you ready for the next one?",
}

// fakeClock begins in the morning and goes on when a test changes later.
const fakeClock = `
	var later = 0;
	Date = class extends Date {
		constructor(...args) { super(...args.length ? args : [Date.UTC(2026, 10, 23, 9, 40) + later]); }
	};`
