package e2e

import (
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/chromedp/cdproto/network"
	"github.com/chromedp/chromedp"
	"github.com/gorilla/websocket"
)

// logged is the class and the text of each line of the log, as JavaScript.
const logged = `[...$("log").children].map((line) => line.className + ": " + (line.querySelector(".words") ?? line.lastChild).textContent)`

// silentProxy forwards TCP connections to the server at to. cut leaves those that are
// open half-open: the proxy forwards nothing more, and closes neither end.
func silentProxy(t *testing.T, to string) (addr string, cut func()) {
	t.Helper()
	listener, err := net.Listen("tcp", "localhost:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	var cuts atomic.Int32
	forward := func(dst, src net.Conn, openedAt int32) {
		buf := make([]byte, 4096)
		for {
			n, err := src.Read(buf)
			if cuts.Load() != openedAt {
				return
			}
			if err != nil {
				dst.Close()
				return
			}
			dst.Write(buf[:n])
		}
	}
	go func() {
		for {
			near, err := listener.Accept()
			if err != nil {
				return
			}
			far, err := net.Dial("tcp", to)
			if err != nil {
				near.Close()
				continue
			}
			t.Cleanup(func() { near.Close(); far.Close() })
			go forward(near, far, cuts.Load())
			go forward(far, near, cuts.Load())
		}
	}()
	return listener.Addr().String(), func() { cuts.Add(1) }
}

// silentServer serves the page of a server, with WebSockets that read all messages and broadcast
// none. The test sends what it likes on the connections from conns.
func silentServer(t *testing.T) (url string, conns chan *websocket.Conn) {
	t.Helper()
	s := startServer(t, "localhost:0")
	t.Helper()
	conns = make(chan *websocket.Conn, 100)
	return fakeServer(t, s, func(n int, upgrade func() *websocket.Conn) {
		if conn := upgrade(); conn != nil {
			conns <- conn
			discard(conn)
		}
	}), conns
}

// wantLog waits until the log has these lines, each with its class.
func (p *tab) wantLog(want ...string) {
	p.t.Helper()
	for start := time.Now(); ; time.Sleep(pollInterval) {
		got := eval[[]string](p, logged)
		if slices.Equal(got, want) {
			return
		}
		if time.Since(start) > patience {
			p.t.Fatalf("the log shows\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
	}
}

// longTimers runs before the page's script. It holds timers of 10 s and more until the test
// fires them with end, which takes their milliseconds; others run 20 times as fast.
const longTimers = `
	const realTimeout = setTimeout, realClear = clearTimeout, waits = new Map();
	var id = 0, holds = (ms) => ms >= 10_000;
	setTimeout = (f, ms, ...args) => {
		if (!holds(ms)) return realTimeout(f, ms / 20, ...args);
		waits.set(--id, { f, ms });
		return id;
	};
	clearTimeout = (id) => { if (!waits.delete(id)) realClear(id); };
	const waitsFor = (ms) => [...waits].filter((wait) => wait[1].ms == ms);
	const end = (ms) => waitsFor(ms).forEach(([id, { f }]) => { waits.delete(id); f(); });`

func TestHalfOpenConnectionIsDetectedInAboutAMinute(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"while receiving", "while sending"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := startServer(t, "localhost:0")
			addr, cut := silentProxy(t, s.addr)
			p := newTab(t)
			p.beforePage(longTimers)
			p.open("http://" + addr + "/")
			cut()
			want := []string{"notice: No connection to the server.", "notice: Reconnected. You may have missed messages."}
			if name == "while sending" {
				p.send("lost")
				p.wantLog("message mine pending: lost")
				want = slices.Insert(want, 1, "notice: This may not have been delivered: lost")
			}
			if got := eval[string](p, `end(54_000); $("status").textContent`); got != "Connected" {
				t.Errorf("after 54 s the status is %q, want Connected: the heartbeat may be late", got)
			}
			eval[bool](p, `holds = (ms) => ms === 54_000; true`) // The probe has a time limit, too.
			if got := eval[string](p, `end(10_000); $("status").textContent`); got == "Connected" {
				t.Error("after 64 s the page has not detected the half-open connection")
			}
			p.until(`$("status").textContent == "Connected"`)
			p.wantLog(want...)
			p.send("hello again")
			p.wantLog(append(want, "message mine: hello again")...)
		})
	}
}

func TestHeartbeatsKeepAnIdleConnection(t *testing.T) {
	t.Parallel()
	url, conns := silentServer(t)
	p := newTab(t)
	p.beforePage(fast)
	p.open(url)
	eval[bool](p, `var heartbeats = 0; sockets[0].addEventListener("message", () => heartbeats++);
		Object.defineProperty(document, "hidden", { value: true }); true`)
	p.send("pending") // The server sends nothing back, like a node that is disconnected from NATS.
	conn := <-conns
	go func() {
		for conn.WriteMessage(websocket.TextMessage, nil) == nil {
			time.Sleep(200 * time.Millisecond) // 4 s to the page, which allows 64
		}
	}()
	p.until("heartbeats >= 40")
	if got := eval[int](p, "sockets.length"); got != 1 {
		t.Errorf("the page opened %d connections, want it to keep the first", got)
	}
	p.wantLog("message mine pending: pending")
	if got := eval[string](p, "document.title"); got != "Chat" {
		t.Errorf("title %q, want Chat: a heartbeat is not an unread message", got)
	}
}

// After a sleep, timers may fire before the browser delivers queued messages.
func TestQueuedHeartbeatKeepsTheConnectionAfterASleep(t *testing.T) {
	t.Parallel()
	url, conns := silentServer(t)
	p := newTab(t)
	p.beforePage(longTimers) // The test fires them, as a browser does after a sleep.
	p.open(url)
	eval[bool](p, "end(54_000); waitsFor(54_000).length == 0")
	(<-conns).WriteMessage(websocket.TextMessage, nil)
	p.until("waitsFor(54_000).length == 1") // The heartbeat has restarted the timer.
	eval[bool](p, "end(10_000); true")
	if got := eval[int](p, "sockets.length"); got != 1 {
		t.Errorf("the page opened %d connections, want it to keep the first", got)
	}
	p.until(connected)
	eval[bool](p, "end(54_000); end(10_000); true") // Now no heartbeat is queued.
	p.until(`sockets.length == 2 && ` + connected)
}

// Proxies that drop Sec-WebSocket-Protocol kept Chromium out, and heartbeats from others.
func TestHeartbeatsSurviveAProxyThatDropsSubprotocols(t *testing.T) {
	t.Parallel()
	inAllEngines(t, func(t *testing.T, w *window) {
		s := startQuick(t, "localhost:0")
		proxy := &httputil.ReverseProxy{
			Rewrite: func(r *httputil.ProxyRequest) {
				r.SetURL(&url.URL{Scheme: "http", Host: s.addr})
				r.Out.Host = r.In.Host
				r.Out.Header.Del("Sec-WebSocket-Protocol")
			},
			ModifyResponse: func(r *http.Response) error { r.Header.Del("Sec-WebSocket-Protocol"); return nil },
		}
		front := httptest.NewServer(proxy)
		t.Cleanup(front.Close)
		w.open(strings.TrimPrefix(front.URL, "http://"))
		get[bool](w, `(window.heartbeats = 0, socket.addEventListener("message", () => heartbeats++), true)`)
		w.until("heartbeats >= 2")
		if got := get[int](w, `$("log").childElementCount`); got != 0 {
			t.Errorf("the log has %d lines, want none: the first connection lasts", got)
		}
	})
}

func TestPendingMessageIsShownUntilTheServerSendsItBack(t *testing.T) {
	t.Parallel()
	url, conns := silentServer(t)
	p := newTab(t)
	p.open(url)
	conn := <-conns
	p.send("important")
	p.send("ok")
	p.wantLog("message mine pending: important", "message mine pending: ok")
	send(t, conn, "ok")
	p.wantLog("message mine: ok", "message mine pending: important")
	send(t, conn, "Ilse: ok\nok")
	p.wantLog("message mine: ok", "message: Ilse: ok", "message: ok", "message mine pending: important")
	send(t, conn, "important")
	p.wantLog("message mine: ok", "message: Ilse: ok", "message: ok", "message mine: important")

	p.send("twice")
	p.send("twice")
	send(t, conn, "twice")
	p.until(`$("log").querySelectorAll(".pending").length == 1`)
	conn.Close()
	p.until(`$("log").textContent.includes("may not have been delivered")`)
	p.until(`$("log").innerText.includes("Reconnected")`)
	p.wantLog("message mine: ok", "message: Ilse: ok", "message: ok", "message mine: important", "message mine: twice",
		"notice: No connection to the server.", "notice: This may not have been delivered: twice",
		"notice: Reconnected. You may have missed messages.")
}

func TestPendingMessageStaysInViewAtTheEnd(t *testing.T) {
	t.Parallel()
	url, conns := silentServer(t)
	p := newTab(t)
	p.open(url)
	conn := <-conns
	send(t, conn, strings.Repeat("One of many lines\n", 299)+"the last")
	p.untilShown(300)
	p.scroll("-1000")
	p.send("wait for me")
	p.until(lastLine + ` == "wait for me" && ` + atEnd)
	for range 5 {
		send(t, conn, strings.Repeat("One of many more lines\n", 299)+"the last")
	}
	p.untilShown(1800)
	p.until(lastLine + ` == "wait for me" && ` + atEnd)
	if got := eval[int](p, `$("log").childElementCount`); got != 1001 {
		t.Errorf("the log has %d lines, want 1000 and the pending one", got)
	}
	send(t, conn, "wait for me")
	p.until(`!$("log").querySelector(".pending") && $("log").lastChild.className == "message mine"`)
}

// stored is the tab's stored undelivered messages, as JavaScript.
const stored = `sessionStorage["chat / undelivered"]`

func TestUndeliveredMessagesAreStoredUntilDeliveredOrDiscarded(t *testing.T) {
	t.Parallel()
	inAllEngines(t, func(t *testing.T, w *window) {
		url, conns := silentServer(t)
		open := func() *websocket.Conn {
			t.Helper()
			w.open(strings.TrimPrefix(url, "http://"))
			return <-conns
		}
		wantLost := func(want ...string) {
			t.Helper()
			w.until("!batch.hasChildNodes()")
			got := get[[]string](w, logged)
			for i := range want {
				want[i] = "notice: This may not have been delivered: " + want[i]
			}
			got = slices.DeleteFunc(got, func(line string) bool { return !strings.Contains(line, "delivered") })
			if !slices.Equal(got, want) {
				t.Errorf("the log shows as undelivered %q, want %q", got, want)
			}
		}

		// A reload with a pending message. Messages are stored before that, as a crash fires no event.
		conn := open()
		w.send("arrives")
		w.send("does not")
		w.until(stored + ` == "arrives\ndoes not"`)
		send(t, conn, "arrives")
		w.until(stored + ` == "does not"`)
		conn = open()
		wantLost("does not")

		// A lost connection, and two reloads.
		w.send("is lost")
		w.until(stored + ` == "does not\nis lost"`)
		conn.Close()
		w.until(`$("log").textContent.includes("delivered: is lost")`)
		w.until(connected)
		<-conns
		for range 2 {
			conn = open()
			wantLost("does not", "is lost")
		}

		// "Send again" makes the message pending. Once the server sends it back, it is not stored any more.
		w.click(`document.querySelector(".notice button")`)
		w.until(`document.querySelector(".pending")`)
		wantLost("is lost")
		w.until(stored + ` == "is lost\ndoes not"`)
		send(t, conn, "does not")
		w.until(stored + ` == "is lost" && $("log").lastChild.className == "message mine"`)

		// The same text is sent once more: the first copy to arrive resolves the pending
		// message, and the second the undelivered one.
		w.send("is lost")
		w.until(stored + ` == "is lost\nis lost"`)
		send(t, conn, "is lost")
		w.until(stored + ` == "is lost" && !document.querySelector(".pending")`)
		wantLost("is lost")
		send(t, conn, "is lost")
		w.until(stored + ` == "" && $("log").textContent.endsWith("is lost")`)
		wantLost()

		// A discarded message is not stored, either.
		w.send("is discarded")
		w.until(`document.querySelector(".pending")`)
		open()
		wantLost("is discarded")
		w.click(`document.querySelectorAll(".notice button")[1]`)
		w.until(stored + ` == "" && !$("log").hasChildNodes() && document.activeElement == $("log")`)
		open()
		wantLost()
	})
}

func TestOnlyALastingConnectionResetsTheBackoff(t *testing.T) {
	t.Parallel()
	url, conns := silentServer(t)
	p := newTab(t)
	p.beforePage(recordBackoffs + "var clock = 1; performance.now = () => clock;")
	do(p, chromedp.Navigate(url))
	for range 6 {
		(<-conns).Close()
	}
	conn := <-conns
	p.until(`$("status").textContent == "Connected"`)
	if got := eval[float64](p, "waits.at(-1)"); got < 5000 {
		t.Errorf("the backoff after six connections that were closed at once is %v ms, want at least 5000", got)
	}
	p.wantLog("notice: No connection to the server.", "notice: Reconnected. You may have missed messages.")
	eval[bool](p, "clock += 10_001; true")
	conn.Close()
	<-conns
	p.until(`$("status").textContent == "Connected"`)
	if got := eval[float64](p, "waits.at(-1)"); got > 1000 {
		t.Errorf("the backoff after a connection that lasted is %v ms, want at most 1000", got)
	}
}

func TestJitterSpreadsReconnectsAfterARestart(t *testing.T) {
	t.Parallel()
	p := openTab(t, startServer(t, "localhost:0"))
	waits := eval[[]float64](p, `
		const waits = [], realTimeout = setTimeout;
		setTimeout = (f, ms) => waits.push(ms);
		for (let i = 0; i < 1000; i++) {
			failures = 0;
			reconnectLater(shutdown);
		}
		setTimeout = realTimeout;
		waits.filter((ms) => ms > 400)`) // Shorter timers are for frames.
	perSecond := make(map[int]int) // reconnects
	for _, ms := range waits {
		perSecond[int(ms/1000)]++
	}
	for second, n := range perSecond {
		if n > 400 {
			t.Errorf("%d of %d pages reconnect in second %d: %v, want them spread", n, len(waits), second, perSecond)
		}
	}
	if got := slices.Max(waits); got > 6000 {
		t.Errorf("a page waits for %v ms, want at most 6000", got)
	}
}

// After failed handshakes, Firefox delays further WebSockets to the server.
func TestProbesReplaceHandshakesWhileTheServerIsDown(t *testing.T) {
	t.Parallel()
	s := startServer(t, "localhost:0")
	p := newTab(t)
	p.beforePage(recordBackoffs)
	p.open("http://" + s.addr + "/")
	s.stop(t)
	eval[bool](p, "var before = sockets.length, waited = waits.length; true")
	p.until("waits.length >= waited + 6")
	if got := eval[int](p, "sockets.length - before"); got > 1 { // after a probe that just succeeded
		t.Errorf("while the server was down, the page opened %d WebSockets, want at most 1", got)
	}
	startServer(t, s.addr)
	p.until(`$("status").textContent == "Connected"`)
}

// A browser may be offline and still reach a server on its own computer.
func TestLocalConnectionIsKeptWhileOffline(t *testing.T) {
	t.Parallel()
	s := startServer(t, "localhost:0")
	p := newTab(t)
	p.beforePage(`
		var probes = 0, realFetch = fetch;
		fetch = (...args) => realFetch(...args).finally(() => probes++);`)
	p.open("http://" + s.addr + "/")
	call(p, network.OverrideNetworkState, network.OverrideNetworkStateParams{Offline: true, DownloadThroughput: -1, UploadThroughput: -1})
	p.until("!navigator.onLine && probes == 1")
	p.send("still here")
	p.wantLog("message mine: still here")
	if got := eval[string](p, `$("status").textContent + sockets.length`); got != "Connected1" {
		t.Errorf("status and number of connections are %q, want Connected and 1", got)
	}
}

// Browsers close the connection of a page in the back/forward cache, and some fire no close
// event.
func TestMissedCloseEventIsDetectedOnPageshow(t *testing.T) {
	t.Parallel()
	p := newTab(t)
	p.beforePage(`
		const realAdd = EventTarget.prototype.addEventListener;
		WebSocket.prototype.addEventListener = function (type, f) {
			if (type != "close") realAdd.call(this, type, f);
		};`)
	p.open("http://" + startServer(t, "localhost:0").addr + "/")
	eval[bool](p, "sockets[0].close(); true")
	p.until("sockets[0].readyState == WebSocket.CLOSED")
	p.send("kept") // The status is still Connected.
	p.wantDraft("kept")
	eval[bool](p, `dispatchEvent(new Event("pageshow"))`)
	p.until(`sockets.length == 2 && $("status").textContent == "Connected"`)
	p.wantDraft("kept")
}

func TestOnlyALostConnectionShowsTheAlarmColor(t *testing.T) {
	t.Parallel()
	s := startServer(t, "localhost:0")
	p := newTab(t)
	proceed := make(chan struct{})
	do(p, chromedp.Navigate(fakeServer(t, s, func(n int, upgrade func() *websocket.Conn) {
		<-proceed
		if n == 1 {
			upgrade()
		}
	})))
	const color = `getComputedStyle($("status")).color`
	p.until(`$("status").textContent == "Connecting…"`)
	connecting := eval[string](p, color)
	close(proceed)
	p.until(`$("status").textContent == "Connected"`)
	connected := eval[string](p, color)
	eval[bool](p, "reconnectLater(); true")
	p.until(`$("status").textContent.includes("Retrying")`)
	if lost := eval[string](p, color); connecting != connected || lost == connected {
		t.Errorf("colors %s while connecting, %s when connected, %s when lost, want only the third to differ", connecting, connected, lost)
	}
}

func TestSendAgainSendsTheMessage(t *testing.T) {
	t.Parallel()
	inAllEngines(t, func(t *testing.T, w *window) {
		url, conns := silentServer(t)
		w.open(strings.TrimPrefix(url, "http://"))
		get[bool](w, `$("name").focus() ?? true`)
		w.typeText("Grete")
		w.press(enter)
		const button = `document.querySelector(".notice button")`
		wantSent := func(draft string) {
			t.Helper()
			w.until(`document.querySelector(".pending .words")?.textContent == "Grete: first" && document.activeElement == $("log")`)
			if got := get[int](w, `document.querySelectorAll(".notice button, .pending").length`); got != 1 {
				t.Errorf("the log has %d pending messages and buttons, want only the message that was sent again", got)
			}
			if got := get[string](w, `$("msg").value`); got != draft {
				t.Errorf("the input has %q, want %q", got, draft)
			}
		}

		// By mouse, with an empty input.
		w.send("first")
		w.until(`document.querySelector(".pending")`)
		(<-conns).Close()
		w.until(connected + ` && !document.querySelector(".pending")`)
		// A click is ignored right after a line has gone, and the button moves until this notice.
		w.until(`performance.now() - forgotAt > 1000 && $("log").textContent.includes("Reconnected")`)
		w.click(button)
		wantSent("")

		// By keyboard, with a draft in the input.
		(<-conns).Close()
		w.until(connected + " && " + button)
		w.insert("a draft")
		get[bool](w, `$("log").focus() ?? true`)
		w.press(tabKey)
		w.until("document.activeElement == " + button)
		if get[bool](w, "document.hasFocus()") {
			w.press(enter)
		} else { // Headless Firefox never has the focus, and without it keys press no button.
			get[bool](w, "document.activeElement.click() ?? true")
		}
		wantSent("a draft")
	})
}

// The first click removes the notice, and moves the next one's buttons under the pointer.
func TestDoubleClickActsOnOneMessage(t *testing.T) {
	t.Parallel()
	inAllEngines(t, func(t *testing.T, w *window) {
		url, _ := silentServer(t)
		w.open(strings.TrimPrefix(url, "http://"))
		get[bool](w, `(["one", "two", "three"].forEach(showUndelivered), true)`)
		w.until(`document.querySelectorAll(".notice").length == 3`)
		// A browser's translation changes the text of the buttons, and puts elements into them.
		get[bool](w, `document.querySelectorAll(".notice button").forEach((button) => {
			button.innerHTML = "<font>" + button.textContent.toUpperCase() + "</font>";
		}) ?? true`)
		// The page's clock stands still during a double click, however busy the machine is.
		get[bool](w, `(window.clock = performance.now(), performance.now = () => clock,
			!!Object.defineProperty(Event.prototype, "timeStamp", { get: () => clock }))`)
		doubleClick := func(button string) {
			t.Helper()
			get[bool](w, "(clock += 700, true)")
			w.mouse(w.moveTo(`document.querySelector("`+button+`")`, 0.5), pointerDown, pointerUp, pointerDown, pointerUp)
		}
		doubleClick(".notice button:last-child")
		w.until(`document.querySelectorAll(".notice").length < 3`)
		w.rest()
		if got := get[string](w, stored); got != "two\nthree" {
			t.Errorf("after a double click on Discard, the page keeps %q, want two and three", got)
		}
		doubleClick(".notice button")
		w.until(`document.querySelector(".pending")`)
		w.rest()
		if got := get[string](w, `[...document.querySelectorAll(".pending .words")].map((e) => e.textContent).join()`); got != "two" {
			t.Errorf("a double click on Send again sends %q, want two", got)
		}
		if got := get[string](w, stored); got != "three\ntwo" {
			t.Errorf("after it, the page keeps %q, want three and two", got)
		}
	})
}

func TestRemovedLineLeavesItsFocusToTheLog(t *testing.T) {
	t.Parallel()
	inAllEngines(t, func(t *testing.T, w *window) {
		url, conns := silentServer(t)
		w.open(strings.TrimPrefix(url, "http://"))
		conn := <-conns
		send(t, conn, "see https://example.org/")
		get[bool](w, `showUndelivered("late") ?? true`)
		w.until(`document.querySelector(".notice button") && document.querySelector("#log a")`)
		get[bool](w, `document.querySelector(".notice button").focus() ?? true`)
		send(t, conn, "late") // It has been delivered after all.
		w.until(`!document.querySelector(".notice")`)
		if got := get[string](w, "document.activeElement.outerHTML.slice(0, 50)"); !strings.Contains(got, `id="log"`) {
			t.Errorf("after a notice with the focus has disappeared, %s has the focus, want the log", got)
		}
		get[bool](w, `document.querySelector("#log a").focus() ?? true`)
		send(t, conn, strings.Repeat("One of many lines\n", 999)+"the last")
		w.until(`!document.querySelector("#log a")`)
		if got := get[string](w, "document.activeElement.outerHTML.slice(0, 50)"); !strings.Contains(got, `id="log"`) {
			t.Errorf("after an old line with the focus was removed, %s has the focus, want the log", got)
		}
	})
}

func TestUndeliveredMessagesAreNeverRemovedAsOld(t *testing.T) {
	t.Parallel()
	url, conns := silentServer(t)
	p := newTab(t)
	p.open(url)
	conn := <-conns
	send(t, conn, "old")
	p.untilShown(1)
	eval[bool](p, `showUndelivered("first"); showUndelivered("second"); true`)
	for range 5 {
		send(t, conn, strings.Repeat("One of many lines\n", 299)+"the last")
	}
	p.untilShown(1501)
	if got, want := eval[[]string](p, logged)[:3], []string{"notice: This may not have been delivered: first",
		"notice: This may not have been delivered: second", "message: One of many lines"}; !slices.Equal(got, want) {
		t.Errorf("the log begins with %q, want %q", got, want)
	}
	if got := eval[string](p, `[$("log").childElementCount, document.querySelectorAll(".notice button").length].join()`); got != "1002,4" {
		t.Errorf("numbers of lines and buttons are %s, want 1002,4", got)
	}
	eval[bool](p, `document.querySelector(".notice button:last-child").click() ?? true`)
	p.until(stored + ` == "second"`)
}

func TestSendAgainIsRefusedUntilReconnected(t *testing.T) {
	t.Parallel()
	inAllEngines(t, func(t *testing.T, w *window) {
		s := startServer(t, "localhost:0")
		w.open(s.addr)
		s.stop(t)
		w.until(`$("status").textContent.includes("restarting")`)
		get[bool](w, `showUndelivered("Grete: hello") ?? true`)
		draft := strings.Repeat("x", 600) // It is too long, which must not be said of the message.
		w.insert(draft)
		w.until(`document.querySelector(".notice button")`)
		w.click(`document.querySelector(".notice button")`)
		w.until(`$("counter").textContent == "Not sent. Try again once connected"`)
		startServer(t, s.addr)
		w.until(connected)
		w.click(`document.querySelector(".notice button")`)
		w.until(lastLine + ` == "Grete: hello" && !document.querySelector(".notice button") && $("msg").value == "` + draft + `"`)
	})
}

// announced records what a screen reader announces: text that is added to, or changes in, a
// live region.
const announced = `(window.announcements ??= (new MutationObserver((changes) => {
	for (const { target, addedNodes } of changes) for (const node of addedNodes) {
		const element = node.nodeType == Node.ELEMENT_NODE ? node : target;
		const region = element.closest("[aria-live], [role=status], [role=log], [role=alert]");
		if (region && region.getAttribute("aria-live") != "off") announcements.push(node.textContent);
	}
}).observe(document.body, { childList: true, subtree: true }), []))`

func TestLostConnectionIsAnnouncedOnce(t *testing.T) {
	t.Parallel()
	inAllEngines(t, func(t *testing.T, w *window) {
		s := startServer(t, "localhost:0")
		w.open(s.addr)
		get[[]string](w, announced)
		get[bool](w, `(window.bubbles = 0, HTMLInputElement.prototype.reportValidity = () => bubbles++, true)`)
		s.stop(t)
		w.until(lastLine + ` == "The server is stopping or restarting."`)
		w.send("a draft")
		w.until(`$("counter").textContent == "Not sent. Try again once connected" && $("msg").getAttribute("aria-invalid") == "true" && $("msg").value == "a draft"`)
		startServer(t, s.addr)
		w.until(connected)
		w.until(`$("counter").textContent == "" && $("msg").getAttribute("aria-invalid") == "false"`)
		w.until(lastLine + `.startsWith("Reconnected")`)
		spoken := get[[]string](w, `announcements.map((text) => text.replace(/^\d+:\d\d [AP]M /, ""))`)
		if want := []string{"Notice, The server is stopping or restarting.", "Not sent. Try again once connected", "Notice, Reconnected. You may have missed messages."}; !slices.Equal(spoken, want) {
			t.Errorf("a screen reader announces %q, want %q", spoken, want)
		}
		if got := get[int](w, "bubbles"); got != 0 {
			t.Errorf("the page shows %d validation bubbles, want none", got)
		}
	})
}

func TestStatusIsAnnouncedWithoutANotice(t *testing.T) {
	t.Parallel()
	inAllEngines(t, func(t *testing.T, w *window) {
		s := startServer(t, "localhost:0")
		w.open(s.addr)
		get[[]string](w, announced)
		get[bool](w, `(connectedAt = 0, state = "connecting", failures = 3, reconnectLater(), true)`)
		w.until(`$("status").textContent.includes("Retrying…")`)
		w.until(connected)
		if got, want := get[[]string](w, `announcements.map((text) => text)`), []string{"No connection to the server. Retrying…", "Connected"}; !slices.Equal(got, want) {
			t.Errorf("a screen reader announces %q, want %q", got, want)
		}
	})
}

// otherPage is the status while a login or a captive portal responds.
const otherPage = "Another page responds. Open the chat in a new tab: you may have to log in. Retrying…"

// blocked is true while the status says that WebSocket connections are blocked.
const blocked = `$("status").textContent == "The server responds, but the chat cannot connect. Try another network. Retrying…"`

func TestBlockedWebSocketIsDistinguishedFromAServerThatIsDown(t *testing.T) {
	t.Parallel()
	location := func(t *testing.T, server string) string {
		return replace(t, codeFrom(t, "../README.md", "location /chat/ {"), "127.0.0.1:8080", server)
	}
	nginx := func(t *testing.T, location string) string {
		addr := freeAddr(t)
		startProxy(t, "nginx-light", fmt.Sprintf(nginxConfig, addr, location), "/usr/sbin/nginx", "-e", "stderr", "-p", ".", "-c")
		awaitListener(t, addr)
		return addr + "/chat"
	}
	for _, test := range []struct {
		name  string
		block func(t *testing.T, server string) (addr string)
		log   string // of the server
	}{
		{"nginx without Upgrade", func(t *testing.T, server string) string {
			return nginx(t, replace(t, location(t, server), `proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection "upgrade";`, ""))
		}, `handshake refused: .*('upgrade' token not found)`},
		{"nginx with another Host", func(t *testing.T, server string) string {
			return nginx(t, replace(t, location(t, server), "$http_host", "$host"))
		}, `handshake refused: .*(request origin not allowed).* \(Origin "http://127\.0\.\d\.\d+:\d+", Host "127\.0\.\d\.\d+"\)`},
		{"a TCP proxy that cuts handshakes", func(t *testing.T, server string) string {
			return breakHandshakes(t, server, func() { panic(http.ErrAbortHandler) }) // without a response
		}, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			inAllEngines(t, func(t *testing.T, w *window) {
				s := startServer(t, "localhost:0")
				w.must(w.engine.visit("http://" + test.block(t, s.addr) + "/"))
				get[bool](w, `!!(window.warnings = [], console.warn = (text) => warnings.push(text))`)
				w.until(blocked)
				if test.log != "" {
					s.waitForLog(t, test.log)
				}
				w.until("failures > 4") // The page keeps reconnecting, and the status stays.
				if !get[bool](w, blocked) {
					t.Errorf("after more attempts the status is %q, want that WebSockets are blocked", get[string](w, `$("status").textContent`))
				}
				w.until("warnings.length")
				warnings := get[[]string](w, "warnings")
				if len(warnings) != 1 || !strings.Contains(warnings[0], "/ws") || !strings.Contains(warnings[0], "Upgrade and Connection") || !strings.Contains(warnings[0], "Host") {
					t.Errorf("the console shows the warnings %q, want one with the URL and what to check", warnings)
				}
				s.stop(t)
				w.until(`$("status").textContent == "No connection to the server. Retrying…"`)
			})
		})
	}
}

// A proxy accepts the connection, and never responds to the handshake.
func TestSwallowedHandshakesAreReportedAsBlocked(t *testing.T) {
	t.Parallel()
	inAllEngines(t, func(t *testing.T, w *window) {
		s := startQuick(t, "localhost:0")
		front := breakHandshakes(t, s.addr, func() { <-t.Context().Done() })
		w.must(w.engine.visit("http://" + front + "/"))
		get[bool](w, `!!(window.warnings = [], console.warn = (text) => warnings.push(text))`)
		w.until(blocked)
		w.until("warnings.length")
	})
}

// breakHandshakes is a proxy to the server at to that calls respond for a request of /ws.
func breakHandshakes(t *testing.T, to string, respond func()) (addr string) {
	t.Helper()
	proxy := &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(&url.URL{Scheme: "http", Host: to}) }}
	front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/ws" {
			respond()
			return
		}
		proxy.ServeHTTP(w, r)
	}))
	t.Cleanup(front.Close)
	return front.Listener.Addr().String()
}

// The page does not blame a proxy for a server that is down, and it connects once
// WebSockets are no longer blocked.
func TestOnlyABlockedWebSocketIsReportedAsBlocked(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name   string
		handle func(http.ResponseWriter, *http.Request, http.Handler)
		want   string // the status
	}{
		{"a server that is down", func(http.ResponseWriter, *http.Request, http.Handler) { panic(http.ErrAbortHandler) },
			"No connection to the server. Retrying…"},
		{"a proxy whose server is down", func(w http.ResponseWriter, _ *http.Request, _ http.Handler) { w.WriteHeader(http.StatusBadGateway) },
			"No connection to the server. Retrying…"},
		{"a proxy that limits requests", func(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
			w.WriteHeader(http.StatusTooManyRequests)
		},
			"No connection to the server. Retrying…"},
		{"a captive portal that redirects", func(w http.ResponseWriter, r *http.Request, _ http.Handler) {
			http.Redirect(w, r, "http://portal.invalid/", http.StatusFound)
		}, otherPage},
		{"a captive portal with a page of its own", func(w http.ResponseWriter, _ *http.Request, _ http.Handler) { fmt.Fprint(w, "Welcome to the hotel") },
			otherPage},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			w := &window{t, &chrome{tab: newTab(t)}}
			s := startQuick(t, "localhost:0")
			server := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: s.addr})
			var broken, cut, cutOnce atomic.Bool
			cuts := make(chan struct{}, 2) // a value for each handshake cut by cutOnce
			front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				switch {
				case broken.Load():
					test.handle(w, r, server)
				case r.URL.Path == "/ws" && cutOnce.Swap(false):
					broken.Store(true)
					cuts <- struct{}{}
					panic(http.ErrAbortHandler)
				case r.URL.Path == "/ws" && cut.Load():
					panic(http.ErrAbortHandler)
				default:
					server.ServeHTTP(w, r)
				}
			}))
			t.Cleanup(front.Close)
			w.open(front.Listener.Addr().String())
			get[bool](w, `(window.statuses = [], new MutationObserver(() => statuses.push($("status").textContent)).observe($("status"), { childList: true }), true)`)
			// One handshake fails before the failed probes, and one after them, so no two in a row.
			cutOnce.Store(true)
			get[bool](w, "socket.close() ?? true")
			w.until("failures > 5")
			if got, want := get[string](w, `$("status").textContent`), test.want; got != want {
				t.Errorf("the status is %q, want %q", got, want)
			}
			<-cuts
			cutOnce.Store(true)
			broken.Store(false)
			<-cuts // Not earlier: the handshake would break it again.
			broken.Store(false)
			w.until(connected)
			if got := get[[]string](w, "statuses"); slices.ContainsFunc(got, func(text string) bool { return strings.Contains(text, "cannot connect") }) {
				t.Errorf("the statuses were %q, want none about WebSockets", got)
			}

			cut.Store(true)
			get[bool](w, "socket.close() ?? true")
			w.until(blocked)
			cut.Store(false)
			w.until(connected)
		})
	}
}

// Some firewalls let through only GET. They respond to other methods with these statuses, or
// close the connection.
func TestPageReconnectsThroughAFirewallThatBarsHEAD(t *testing.T) {
	t.Parallel()
	for _, status := range []int{http.StatusForbidden, http.StatusMethodNotAllowed, 0} {
		t.Run(fmt.Sprint(status), func(t *testing.T) {
			t.Parallel()
			s := startServer(t, "localhost:0")
			server := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: s.addr})
			front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				switch {
				case r.Method == http.MethodGet:
					server.ServeHTTP(w, r)
				case status == 0:
					panic(http.ErrAbortHandler)
				default:
					w.WriteHeader(status)
				}
			}))
			t.Cleanup(front.Close)
			p := newTab(t)
			p.open(front.URL)
			eval[bool](p, "socket.close(); true")
			p.until("sockets.length == 2 && " + connected)
		})
	}
}

func TestOfflineStatusBlamesNoProxy(t *testing.T) {
	t.Parallel()
	s := startServer(t, "localhost:0")
	p := newTab(t)
	front := breakHandshakes(t, s.addr, func() { panic(http.ErrAbortHandler) })
	do(p, chromedp.Navigate("http://"+front+"/"))
	p.until(blocked)
	p.setOffline(true)
	p.until(`$("status").textContent == "You are offline. Retrying…"`)
	eval[bool](p, `connectNow(); true`) // as when the tab becomes visible
	p.until(`$("status").textContent == "You are offline. Retrying…"`)
	p.setOffline(false)
	p.until(blocked)
}
