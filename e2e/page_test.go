package e2e

import (
	"bytes"
	"cmp"
	"flag"
	"fmt"
	"image"
	_ "image/png"
	"io"
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

// State of the page's log, as JavaScript.
const (
	atEnd    = `$("log").scrollHeight - $("log").clientHeight - $("log").scrollTop < 2`
	lastLine = `$("log").lastChild?.querySelector(".words")?.textContent`

	// A line in the middle of the log, and its position.
	middleLine = `(() => {
		const line = document.elementFromPoint(20, 200).closest("#log > div");
		return line.textContent + " at " + line.getBoundingClientRect().top;
	})()`
)

// recordBackoffs makes timers run 20 times as fast, and records in waits the delays of those
// that start a probe or a handshake.
const recordBackoffs = `
	const realTimeout = setTimeout, realFetch = fetch;
	var waits = [], probes = 0;
	fetch = (...args) => { probes++; return realFetch(...args); };
	setTimeout = (f, ms, ...args) => realTimeout(() => {
		const before = sockets.length + probes;
		f(...args);
		if (sockets.length + probes > before) waits.push(ms);
	}, ms / 20);`

// fakeServer serves the page of s, but calls serveWs for the nth request for a WebSocket.
// It returns the page's URL.
func fakeServer(t testing.TB, s *server, serveWs func(n int, upgrade func() *websocket.Conn)) string {
	t.Helper()
	var n atomic.Int32
	mux := http.NewServeMux()
	mux.Handle("/", httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: s.addr}))
	mux.HandleFunc("/ws", func(w http.ResponseWriter, r *http.Request) {
		serveWs(int(n.Add(1)), func() *websocket.Conn {
			var upgrader websocket.Upgrader
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

// sendLines sends n lines at once, from enough clients that no rate limit delays them.
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

// flood sends lines at an even rate. The channel is closed when all have been sent.
func flood(t testing.TB, s *server, lines, perSecond int) (done chan struct{}) {
	t.Helper()
	conns := make([]*websocket.Conn, perSecond/90) // The rate limit of each is 100 a second.
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
		t.Errorf("a new page's log has %d lines, want none: the page has missed no messages", got)
	}
	s.stop(t)
	p.until(`$("status").textContent.includes("restarting")`)
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
		1001: "The server is stopping or restarting.",
		1003: "You were disconnected.",
		1006: "No connection to the server.",
		1007: "You were disconnected.",
		1009: "You were disconnected.",
		1013: "Your connection was too slow.",
		4321: "Disconnected: because.",
		4322: "You were disconnected.", // without a reason
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
				reason := "because"
				if code == 4322 {
					reason = ""
				}
				if code != 1006 {
					conn.WriteMessage(websocket.CloseMessage, websocket.FormatCloseMessage(code, reason))
				}
				conn.Close()
			}))
			defer close(seen)
			p.send("offend")
			p.until(fmt.Sprintf(`$("status").textContent == "%s Retrying…"`, want))
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
			t.Errorf("the first backoff is %v ms, want at most 1000", waits[0])
		}
		if waits[7] < 5000 {
			t.Errorf("the eighth backoff is %v ms, want at least 5000", waits[7])
		}
		if slices.Max(waits) > 11_000 {
			t.Errorf("the backoffs are %v ms, want none above about 10000", waits)
		}
		firsts = append(firsts, waits[0])
	}
	if firsts[0] == firsts[1] {
		t.Errorf("the first backoff of two pages is %v ms, want jitter", firsts[0])
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

func TestPageRetriesWhenTheWebSocketConstructorThrows(t *testing.T) {
	t.Parallel()
	s := startServer(t, "localhost:0")
	p := newTab(t)
	p.beforePage(fast + `
		var attempts = 0;
		WebSocket = class extends WebSocket {
			constructor(...args) {
				if (++attempts === 1) throw new Error("no WebSocket");
				super(...args);
			}
		};`)
	p.open("http://" + s.addr + "/")
	p.until("attempts == 2 && " + connected)
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
	p := newTab(t)
	// The backoff never ends: it is 5 to 10 s while offline.
	p.beforePage(`
		const realTimeout = setTimeout;
		setTimeout = (f, ms, ...args) => ms < 5000 ? realTimeout(f, ms, ...args) : 0;`)
	p.open("http://" + s.addr + "/")
	p.setOffline(true)
	p.until(`$("status").textContent.includes("You are offline")`)
	p.send("kept")
	p.wantDraft("kept")
	if got := eval[string](p, `$("counter").textContent + " " + $("msg").getAttribute("aria-invalid")`); got != "Not sent. Try again once connected true" {
		t.Errorf("counter and aria-invalid are %q, want that the message was not sent", got)
	}
	p.setOffline(false)
	p.until(`$("status").textContent == "Connected"`)
	p.wantDraft("kept")
	p.press(kb.Enter)
	p.until(lastLine + ` == "kept"`)
	p.wantDraft("")
}

func TestTabReconnectsAtOnceWhenItBecomesVisible(t *testing.T) {
	t.Parallel()
	s := startServer(t, "localhost:0")
	p := newTabIn(t, chromium)
	p.beforePage("setTimeout = () => 0") // The backoff never ends.
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
		for _, sendBack := range []bool{true, false, true, false} {
			_, message, err := conn.ReadMessage()
			if err != nil {
				return
			}
			if sendBack {
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
		t.Errorf("the log shows as undelivered %q, want %q", got, want)
	}
}

func TestMessageLimitCountsBytes(t *testing.T) {
	t.Parallel()
	s := startServer(t, "localhost:0")
	p := openTab(t, s)
	for _, tt := range []struct {
		name, draft, counter string
	}{
		{"far below", strings.Repeat("x", 400), ""},
		{"just below", strings.Repeat("x", 500), "Characters left: about 12"},
		{"ASCII at the limit", strings.Repeat("x", 512), "Characters left: about 0"},
		{"emoji at the limit", strings.Repeat("🐢", 128), "Characters left: about 0"},
		{"surrounding spaces do not count", "  " + strings.Repeat("é", 256) + "  ", "Characters left: about 0"},
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
		if got, want := eval[string](p, `$("counter").textContent`), "Characters too many: about 1"; got != want {
			t.Errorf("counter %q, want %q", got, want)
		}
		p.press(kb.Enter)
		p.wantDraft(draft)
		if got, want := eval[string](p, `$("counter").textContent`), "Not sent. Characters too many: about 1"; got != want {
			t.Errorf("counter %q after Enter, want %q", got, want)
		}
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
		t.Errorf("messages added %d elements to the log, want none", got)
	}
	if got := eval[[]float64](p, `[...new Set([...$("log").querySelectorAll("time")].map((time) => time.getBoundingClientRect().right))]`); len(got) != 1 {
		t.Errorf("the times end at the positions %v, want one column", got)
	}
	heights := eval[[]float64](p, `[...$("log").children].map((line) => line.getBoundingClientRect().height)`)
	for i, height := range heights {
		if long := len(hostile[i]) > 100; !long && height != heights[0] || long && i == 7 && height <= heights[0] {
			t.Errorf("%.20q is %v pixels high, and a plain line %v", hostile[i], height, heights[0])
		}
	}
	if got := eval[int](p, `[...$("log").children].filter((line) => getComputedStyle(line).contain != "content").length`); got != 0 {
		t.Errorf("%d lines lack contain: content, so stacked accents can overlap other lines", got)
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
		}))]`); !slices.Equal(got, []string{"noopener noreferrer nofollow _blank dir,href,rel,target,title ltr isolate true"}) {
			t.Errorf("the links have %q", got)
		}
		// Within Hebrew text, a URL reads from left to right, in its place.
		if got := get[string](w, `(() => {
			const a = [...$("log").querySelectorAll("a")].find((a) => a.parentNode.textContent.startsWith("ראו")), text = a.firstChild;
			const at = (node, i) => { const range = document.createRange(); range.setStart(node, i); range.setEnd(node, i + 1); return range.getBoundingClientRect().left; };
			return [at(a.previousSibling, 0) > at(text, 20), at(text, 0) < at(text, 8), at(text, 8) < at(text, 20), at(a.nextSibling, 3) < at(text, 0)].join();
		})()`); got != "true,true,true,true" {
			t.Errorf("the order of Hebrew text around a URL is right: %s, want true in all four cases", got)
		}

		// The title names the host that the browser connects to.
		for link, want := range map[string]string{
			"https://example.org:8443/a":        "example.org:8443",
			"https://аррӏе.com/":                "xn--80ak6aa92e.com",
			"https://example.org@example.com/a": "example.com",
			"https://999.999.999.999/":          "",
		} {
			send(t, conn, link)
			w.until(fmt.Sprintf(lastLine+" == %q", link))
			if got := get[string](w, `$("log").lastChild.querySelector("a").title`); got != want {
				t.Errorf("the title of %s is %q, want %q", link, got, want)
			}
		}

		get[bool](w, `showUndelivered("https://example.org/") ?? true`)
		w.until(lastLine + `.includes("delivered: https://example.org/")`)
		if get[bool](w, `!!document.querySelector(".notice a")`) {
			t.Error("a notice contains a link")
		}
	})
}

// Otherwise what follows a line break could look like a line of another user.
func TestOnlyTheFirstLineOfAMessageStartsAtTheMargin(t *testing.T) {
	t.Parallel()
	inAllEngines(t, func(t *testing.T, w *window) {
		s := startServer(t, "localhost:0")
		w.open(s.addr)
		conn := s.dial(t)
		ltr := "Ilse: text" + strings.Repeat(" ", 200) + "Hans: " + strings.Repeat("I resign. ", 10)
		rtl := "שרה: שלום" + strings.Repeat(" ", 200) + "רות: " + strings.Repeat("שלום לכולם ", 10)
		send(t, conn, ltr)
		send(t, conn, strings.TrimPrefix(ltr, "Ilse: "))
		send(t, conn, rtl)
		w.send(ltr)
		w.until(lastLine + ` == ` + fmt.Sprintf("%q", strings.TrimSpace(ltr)) + ` && !document.querySelector(".pending")`)
		w.send(rtl)
		w.until(lastLine + ` == ` + fmt.Sprintf("%q", strings.TrimSpace(rtl)) + ` && !document.querySelector(".pending")`)
		get[bool](w, `showUndelivered("`+ltr+`") ?? true`)
		w.until(lastLine + `.startsWith("This may not")`)
		for _, width := range []int{500, 1000} {
			w.resize(width, 700)
			// The distance of the first line from the margin, and the least one of the others, in pixels.
			got := get[[][]float64](w, `[...$("log").children].map((line) => {
				const range = document.createRange(), box = line.getBoundingClientRect();
				range.selectNodeContents(line.querySelector(".words"));
				const isRTL = getComputedStyle(line).direction == "rtl";
				const prefix = line.querySelector(".anonymous")?.getBoundingClientRect().width ?? 0;
				const starts = new Map();
				for (const r of range.getClientRects()) {
					if (r.width < 1) continue;
					const start = isRTL ? box.right - r.right : r.left - box.left;
					const y = Math.round(r.top / 12);
					starts.set(y, Math.min(start, starts.get(y) ?? Infinity));
				}
				const [first, ...others] = [...starts].sort((a, b) => a[0] - b[0]).map(([, start]) => start);
				return [first - prefix, Math.min(...others)];
			})`)
			if len(got) != 6 {
				t.Fatalf("the log has %d lines, want 6", len(got))
			}
			for i, starts := range got {
				if starts[0] > 14 || starts[1] < starts[0]+20 {
					t.Errorf("in a window of %d pixels, line %d starts %v pixels from the margin, and continues at %v, want an indent", width, i, starts[0], starts[1])
				}
			}
		}
		// The bar of my messages is where they start.
		if got := get[[]string](w, `[...document.querySelectorAll("#log .mine")].map((line) => {
			const { borderLeftWidth, borderRightWidth } = getComputedStyle(line);
			return borderLeftWidth + " " + borderRightWidth;
		})`); !slices.Equal(got, []string{"4px 0px", "0px 4px"}) {
			t.Errorf("the left and right borders of my messages, LTR and RTL, are %q, want 4px 0px and 0px 4px", got)
		}
	})
}

func TestLinkOpensInANewTabWithoutAReferrer(t *testing.T) {
	t.Parallel()
	s := startServer(t, "localhost:0")
	requests := make(chan http.Header, 10)
	other := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { requests <- r.Header }))
	t.Cleanup(other.Close)
	p := openTab(t, s)
	send(t, s.dial(t), "see "+other.URL+"/x.")
	p.until(`$("log").querySelector("a")`)
	w := &window{t, &chrome{tab: p}}
	w.click(`document.querySelector("#log a")`)
	select {
	case header := <-requests:
		if got := header.Get("Referer"); got != "" {
			t.Errorf("the other server receives the Referer %q, want none", got)
		}
	case <-time.After(patience):
		t.Fatalf("the browser does not open the link within %v", patience)
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
		t.Error("the button for new messages is shown before any arrive")
	}
	send(t, s.dial(t), "new")
	p.until(lastLine + ` == "new"`)
	p.until(`!$("jump").hidden`)
	if got := eval[string](p, middleLine); got != want {
		t.Errorf("the line in view moved from %q to %q", want, got)
	}

	do(p, chromedp.Click(chromedp.ID("jump")))
	p.until(atEnd + ` && $("jump").hidden`)
	send(t, s.dial(t), "newer")
	p.until(lastLine + ` == "newer" && ` + atEnd)

	p.scroll("-1000")
	send(t, s.dial(t), "newest")
	p.until(`!$("jump").hidden`)
	p.press(kb.End) // The click moved the focus to the log.
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
	p.until(lastLine + ` == "The server is stopping or restarting."`)
	s = startServer(t, s.addr)
	p.until(lastLine + `.startsWith("Reconnected")`)
	if !eval[bool](p, `$("jump").hidden`) {
		t.Error("the button for new messages is shown after two notices")
	}
	send(t, s.dial(t), "new")
	p.until(`!$("jump").hidden`)
	if got := eval[string](p, middleLine); got != want {
		t.Errorf("the line in view moved from %q to %q", want, got)
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
		t.Errorf("the oldest line, while in view, moved from %s to %s", want, got)
	}

	do(p, chromedp.Click(chromedp.ID("jump")))
	p.until(atEnd)
	p.scroll("-1000")
	want = eval[string](p, middleLine)
	sendLines(t, s, 4100)
	p.untilShown(7100)
	wantLines(5000)
	if got := eval[string](p, middleLine); got != want {
		t.Errorf("as the oldest lines were removed, the line in view moved from %s to %s", want, got)
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
	p := openTabIn(t, chromium, s)
	show := p.hide()
	sendLines(t, s, 7000)
	p.until("arrived == 7000")
	// Chromium gives the timers of a hidden tab a hundredth of a core: on a busy machine, the
	// last ones fire minutes later.
	p.until(`$("log").hasChildNodes()`)
	eval[bool](p, "flush() ?? true")
	if got := eval[string](p, "document.title"); got != "(7000) Chat" {
		t.Errorf("title %q, want the number of unread messages", got)
	}
	p.untilShown(7000)
	if got := eval[string](p, `[$("log").childElementCount, $("log").firstChild.className, document.hidden].join()`); got != "1001,marker,true" {
		t.Errorf("number of lines, class of the first and hidden are %s, want the last 1000 messages below the marker in a hidden tab", got)
	}
	show()
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
		t.Errorf("the line in view moved from %s to %s", want, got)
	}
}

func TestPageKeepsUpWithAThousandLinesASecond(t *testing.T) {
	t.Parallel()
	p, used, late := showFlood(t)
	t.Logf("the page showed the last line %v after it was sent", late)
	if got := used("LayoutCount"); got > 100 {
		t.Errorf("10,000 lines took %.0f layouts, want at most 100: lines are batched", got)
	}
	if got := used("TaskDuration"); got > 5 {
		t.Errorf("10,000 lines in 10 s took %.1f s of the main thread, want at most 5", got)
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

// showFlood sends a page 10,000 lines in ten seconds. It returns the page; used, which
// returns how much one of Chromium's metrics grew meanwhile, durations in seconds of the
// main thread's CPU time; and how long after the last line was sent the page showed it.
func showFlood(t testing.TB) (p *tab, used func(metric string) float64, late time.Duration) {
	t.Helper()
	const lines = 10_000
	s := startServer(t, "localhost:0")
	p = openTabIn(t, chromium, s)
	// CPU time, so that other processes on this machine do not count.
	call(p, performance.Enable, performance.EnableParams{TimeDomain: performance.EnableTimeDomainThreadTicks})
	metrics := func() map[string]float64 {
		m := make(map[string]float64)
		for _, metric := range call(p, performance.GetMetrics, cdp.Empty{}).Metrics {
			m[metric.Name] = metric.Value
		}
		return m
	}
	// Otherwise Chromium sends an event for each message and each element.
	call(p, network.Disable, cdp.Empty{})
	call(p, css.Disable, cdp.Empty{})
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
	for _, scheme := range []string{"light", "dark", "forced"} {
		p := newTab(t)
		if scheme == "forced" {
			p.media("forced-colors", "active")
		} else {
			p.media("prefers-color-scheme", scheme)
		}
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
		eval[bool](p, `append(newMessage("Ilse: hello")); append(newMessage("hello")); append(newMessage("Grete: hello", "mine")); showPending("Grete: pending"); true`)
		p.until("!batch.hasChildNodes()")
		check("names, and a pending message")
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
			t.Errorf("focus on %q with outline %q, want on %q with a solid one", got, outline, want)
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
	eval[bool](p, `$("log").scrollTop = $("log").scrollHeight; true`)
	p.until(`$("jump").hidden`)
	wantFocus("log")
	p.press(kb.Home)
	p.until(`$("log").scrollTop == 0`)
	send(t, s.dial(t), "newer")
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
	for _, status := range []string{"Connected", "The server is stopping or restarting. Retrying…"} {
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
				t.Errorf("%v: outside of the window: %s", size, got)
			}
			width := 180
			if size[1] < 240 && size[0] < 400 { // The counter is beside the input.
				width = 100
			}
			if got := eval[string](p, fmt.Sprintf(`[
				[$("log"), "clientHeight", 64], [$("msg"), "clientWidth", %d], [$("name"), "clientWidth", 80],
			].filter(([e, side, least]) => e[side] < least).map(([e, side]) => e.id + "'s " + side + " " + e[side]).join()`, width)); got != "" {
				t.Errorf("%v: too small: %s", size, got)
			}
			p.until(atEnd) // even if a phone's keyboard covers half of the screen
		}
	}
}

// WCAG 1.4.4 asks for text at twice its size, and 1.4.10 for a zoom of 400 %. The fonts here are
// large system fonts. A window of 1280 by 1024 pixels that is zoomed by 200 or 400 % has 640 by
// 512 or 320 by 256 CSS pixels, each of 2 or 4 pixels. In the latter, the page may scroll.
func TestNothingOverlapsZoomedOrWithLargeFonts(t *testing.T) {
	t.Parallel()
	url, conns := silentServer(t)
	p := newTab(t)
	p.open(url)
	conn := <-conns
	send(t, conn, "Ilse: a message that is long enough to be wrapped in a narrow window\nשרה: שלום לכולם\nno name")
	p.untilShown(3)
	p.fill("name", "Grete")
	p.fill("msg", strings.Repeat("w", 520))
	eval[bool](p, `showPending("שרה: שלום"); showPending("Grete: this one is pending"); showUndelivered("lost"); true`)
	p.until("!batch.hasChildNodes()")
	for _, size := range []struct {
		width, height int64
		scale         float64
		font          string
	}{
		{360, 800, 1, "24px"}, {412, 1000, 1, "32px"}, {320, 480, 1, "16px"}, {1280, 1024, 1, "32px"},
		{640, 512, 2, "16px"}, {320, 256, 4, "16px"},
	} {
		do(p, chromedp.EmulateViewport(size.width, size.height, chromedp.EmulateScale(size.scale)))
		eval[bool](p, `document.documentElement.style.fontSize = "`+size.font+`"; true`)
		for _, status := range []string{"Connected", "The server responds, but the chat cannot connect. Try another network. Retrying…"} {
			eval[bool](p, fmt.Sprintf("$('status').textContent = %q; true", status))
			if got := eval[[]string](p, `(() => {
				const boxes = [];
				const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
				while (walker.nextNode()) {
					const { parentElement } = walker.currentNode, range = document.createRange();
					if (!walker.currentNode.data.trim() || parentElement.closest("script, .visually-hidden, #empty, [hidden]")) continue;
					range.selectNodeContents(walker.currentNode);
					for (const r of range.getClientRects()) boxes.push([parentElement, r]);
				}
				for (const e of document.querySelectorAll("#name, #msg, button:not([hidden])")) boxes.push([e, e.getBoundingClientRect()]);
				const bottom = innerHeight < 300 ? document.documentElement.scrollHeight : innerHeight, found = [];
				for (const [i, [e, a]] of boxes.entries()) {
					if (!e.closest("#log") && (a.left < 0 || a.right > innerWidth || a.top < 0 || a.bottom > bottom)) found.push("outside: " + e.outerHTML);
					for (const [f, b] of boxes.slice(i + 1)) {
						if (e == f || e.contains(f) || f.contains(e) || !e.closest("#log") != !f.closest("#log")) continue;
						const x = Math.min(a.right, b.right) - Math.max(a.left, b.left), y = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
						if (x > 1 && y > 4) found.push(e.outerHTML.slice(0, 80) + " and " + f.outerHTML.slice(0, 80));
					}
				}
				return found;
			})()`); len(got) > 0 {
				t.Errorf("%v, %s: overlapping or outside: %q", size, status, got)
			}
		}
	}
}

// On a touch screen, a finger covers a centimeter.
func TestButtonsOfNoticesAreLargeOnTouchScreens(t *testing.T) {
	t.Parallel()
	s := startServer(t, "localhost:0")
	p := newTab(t)
	p.open("http://" + s.addr + "/")
	eval[bool](p, `showUndelivered("lost"); showUndelivered("lost, too"); true`)
	p.until(`document.querySelectorAll("#log button").length == 4`)
	for _, width := range []int64{320, 800} {
		do(p, chromedp.EmulateViewport(width, 600)) // without a touch screen
		call(p, emulation.SetTouchEmulationEnabled, emulation.SetTouchEmulationEnabledParams{Enabled: true})
		p.until(`matchMedia("(pointer: coarse)").matches`)
		if got := eval[[]float64](p, `(() => {
			const boxes = [...document.querySelectorAll("#log button")].map((e) => e.getBoundingClientRect());
			const gaps = boxes.flatMap((a, i) => boxes.slice(i + 1).map((b) => Math.max(
				b.left - a.right, a.left - b.right, b.top - a.bottom, a.top - b.bottom)));
			return [Math.min(...boxes.map((b) => b.height)), Math.min(...gaps)];
		})()`); got[0] < 40 || got[1] < 8 {
			t.Errorf("in a window of %d pixels, the buttons are %v pixels high, and %v apart, want at least 40 and 8", width, got[0], got[1])
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
	p.until(`$("status").textContent == "The server is stopping or restarting. Retrying…"`)
	p.fill("msg", strings.Repeat("w", 520))
	for _, size := range [][2]int64{{341, 156}, {320, 120}, {200, 100}, {640, 80}} {
		for _, font := range []string{"16px", "32px"} {
			do(p, chromedp.EmulateViewport(size[0], size[1]))
			p.until(fmt.Sprintf("innerWidth == %d && innerHeight == %d", size[0], size[1]))
			lines := eval[float64](p, `document.documentElement.style.fontSize = "`+font+`"; scrollTo(0, 9999);
				const [log, line] = [$("log"), $("log").lastChild].map((e) => getComputedStyle(e));
				($("log").clientHeight - 2 * parseFloat(log.paddingTop)) / (parseFloat(line.lineHeight) + 2 * parseFloat(line.paddingTop))`)
			if lines < 2 {
				t.Errorf("%v at %s: the log has space for %.1f lines, want two", size, font, lines)
			}
			if got := eval[float64](p, `$("msg").getBoundingClientRect().bottom - innerHeight`); got > 0 {
				t.Errorf("%v at %s: scrolled to its end, the page still has %v pixels of the input below the window", size, font, got)
			}
		}
	}
}

// In a browser without dvh, the page has the height of the visible part of the window. 100vh
// would add the part that a phone's browser bar covers.
func TestFormIsVisibleWithoutDvh(t *testing.T) {
	t.Parallel()
	s := startServer(t, "localhost:0")
	p := newTab(t)
	call(p, page.SetBypassCSP, page.SetBypassCSPParams{Enabled: true}) // for the changed style
	p.open("http://" + s.addr + "/")
	// On a desktop, vh is right: make it too large, as on a phone.
	eval[bool](p, `const style = document.querySelector("style");
		style.textContent = style.textContent.replaceAll(/\d+dvh/g, "none").replaceAll("100vh", "calc(100vh + 80px)"); true`)
	p.until(`$("form").getBoundingClientRect().bottom == innerHeight`)
	sendLines(t, s, 100)
	p.untilShown(100)
	if got := eval[string](p, `[$("form").getBoundingClientRect().bottom - innerHeight, document.documentElement.scrollHeight - innerHeight].join()`); got != "0,0" {
		t.Errorf("form and page end %s pixels below the window, want 0,0", got)
	}
}

// No engine's protocol can drop a file, so the test dispatches the events. If the page does
// not cancel them, a browser opens the file in place of the page.
func TestDroppedContentDoesNotReplaceThePage(t *testing.T) {
	t.Parallel()
	inAllEngines(t, func(t *testing.T, w *window) {
		s := startServer(t, "localhost:0")
		w.open(s.addr)
		for _, tt := range []struct {
			what, on string
			allowed  bool
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
				})()`, tt.what, tt.on, event)); got != tt.allowed {
					t.Errorf("%s of a %s on %s: not canceled is %v, want %v", event, tt.what, tt.on, got, tt.allowed)
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

// A proxy in front of the chat responds with 401, or redirects to a login page.
func TestExpiredLoginAtAProxyAdvisesANewTab(t *testing.T) {
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
	var requests atomic.Int32 // after the login expired
	proxy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: s.addr})
	front := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if !expired.Load() {
			proxy.ServeHTTP(rw, r)
			return
		}
		requests.Add(1)
		rw.Header().Set("Location", login.URL)
		rw.WriteHeader(status)
	}))
	t.Cleanup(front.Close)
	w.open(strings.TrimPrefix(front.URL, "http://"))
	w.insert("a draft")
	expired.Store(true)
	get[bool](w, `socket.close() ?? true`)
	const advice = `$("status").textContent == "` + otherPage + `"`
	w.until(advice)
	for n := requests.Load(); requests.Load() < n+3; time.Sleep(pollInterval) { // also during further probes
		if !get[bool](w, advice) {
			t.Fatalf("the status is %q, want the advice to open a new tab", get[string](w, `$("status").textContent`))
		}
	}
	expired.Store(false)
	w.until(connected)
	if got := get[string](w, `$("msg").value`); got != "a draft" {
		t.Errorf("draft %q, want %q", got, "a draft")
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
		t.Errorf("with reduced motion, these elements move: %s", got)
	}
}

func TestPageSaysThatItNeedsJavaScript(t *testing.T) {
	t.Parallel()
	s := startServer(t, "localhost:0")
	p := newTab(t)
	call(p, emulation.SetScriptExecutionDisabled, emulation.SetScriptExecutionDisabledParams{Value: true})
	do(p, chromedp.Navigate("http://"+s.addr+"/"))
	if got := do(p, chromedp.Text(chromedp.ID("status"))); got != notStarted {
		t.Errorf("status %q, want %q", got, notStarted)
	}
}

// A proxy, or an extension, changes the script, so that the content security policy refuses it.
func TestPageSaysThatItsScriptDoesNotRun(t *testing.T) {
	t.Parallel()
	inAllEngines(t, func(t *testing.T, w *window) {
		s := startServer(t, "localhost:0")
		proxy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: s.addr})
		proxy.ModifyResponse = func(r *http.Response) error {
			page, err := io.ReadAll(r.Body)
			page = bytes.Replace(page, []byte(`"use strict";`), []byte(`"use strict"`), 1)
			r.Body = io.NopCloser(bytes.NewReader(page))
			r.Header.Del("Content-Length")
			return err
		}
		front := httptest.NewServer(proxy)
		t.Cleanup(front.Close)
		w.must(w.engine.visit(front.URL))
		w.until(`$("status")?.offsetHeight > 0`)
		if got := get[string](w, `$("status").textContent.trim()`); got != notStarted {
			t.Errorf("the status is %q, want %q", got, notStarted)
		}
		if got := get[string](w, `document.querySelector("script").dataset.cfasync`); got != "false" {
			t.Errorf("data-cfasync is %q, want false, which Rocket Loader respects", got)
		}
	})
}

const notStarted = "Loading… If this stays, allow JavaScript, update the browser, or try another network."

func TestPageLogsNothingToTheConsole(t *testing.T) {
	t.Parallel()
	s := startServer(t, "localhost:0")
	p := openTab(t, s)
	p.send("hello")
	p.until(lastLine + ` == "hello"`)
	do(p, chromedp.Navigate("http://"+s.addr+"/?a#b"))
	p.until(`$("status").textContent == "Connected"`)
	p.wantEmptyConsole()
	// Headless browsers do not request an icon. Others would, from the server.
	if got := eval[string](p, `document.querySelector("link[rel=icon]").href`); !strings.HasPrefix(got, "data:") {
		t.Errorf("the icon's URL is %q, want a data: URL", got)
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

// A proxy that removes the prefix /chat serves the page also at /chat, without a slash.
func TestPageWorksAtAPrefixWithoutASlash(t *testing.T) {
	t.Parallel()
	inAllEngines(t, func(t *testing.T, w *window) {
		s := startServer(t, "localhost:0")
		proxy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: s.addr})
		front := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			path, found := strings.CutPrefix(r.URL.Path, "/chat")
			if !found {
				http.NotFound(rw, r)
				return
			}
			r.URL.Path = cmp.Or(path, "/")
			proxy.ServeHTTP(rw, r)
		}))
		t.Cleanup(front.Close)
		w.must(w.engine.visit(front.URL + "/chat"))
		w.until(connected)
		w.insert("a draft")
		get[bool](w, "socket.close() ?? true") // The probe finds the page, too.
		w.until("connectedAt && failures == 1 && " + connected)
		w.open(strings.TrimPrefix(front.URL, "http://") + "/chat")
		w.until(`$("msg").value == "a draft"`)
	})
}

func TestContentSecurityPolicyAllowsOnlyThePage(t *testing.T) {
	t.Parallel()
	s := startServer(t, "localhost:0")
	p := openTab(t, s) // The page's own script runs.
	if got := eval[string](p, "getComputedStyle(document.body).display"); got != "grid" {
		t.Errorf("display of the body is %q, want grid, from the page's own style", got)
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

// README.md shows some of these screenshots. The others are for review.
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
			p := newTabIn(t, chromium)
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
					t.Errorf("%s: the red of the background is %#x, which is not %s", name, red, scheme)
				}
			}
			shoot("empty")
			do(p, chromedp.Focus(chromedp.ID("name")))
			p.insert("Grete")
			p.press(kb.Enter)
			sendAll := func(lines []string) {
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
			sendAll(conversation)
			eval[bool](p, "sockets.at(-1).send = () => {}; true") // Messages are lost from here on.
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
				p.until(fmt.Sprintf(lastLine+" == %q", text))
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
			eval[bool](p, `$("msg").value = ""; showCounter(); true`)
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

// The messages in the screenshots. The user of the page is Grete.
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

// fakeClock sets the page's clock to a fixed time plus later, in milliseconds.
const fakeClock = `
	var later = 0;
	Date = class extends Date {
		constructor(...args) { super(...args.length ? args : [Date.UTC(2026, 10, 23, 9, 40) + later]); }
	};`
