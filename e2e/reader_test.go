package e2e

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/chromedp/cdproto/accessibility"
	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"
	"github.com/gorilla/websocket"
)

// denied makes access to storage throw, as in a browser that denies it.
const denied = `
	for (const name of ["localStorage", "sessionStorage"]) {
		Object.defineProperty(window, name, { get() { throw new DOMException("denied", "SecurityError"); } });
	}`

// fill replaces the content of the input with this id.
func (p *tab) fill(id, text string) {
	p.t.Helper()
	do(p, chromedp.Focus(chromedp.ID(id)))
	eval[bool](p, `$("`+id+`").select(); true`)
	p.insert(text)
}

func TestNamePrefixesMessages(t *testing.T) {
	t.Parallel()
	s := startServer(t, "localhost:0")
	p := openTab(t, s)
	p.fill("name", "  Gre:te\u0085 ")
	p.press(kb.Enter)
	if got, want := eval[string](p, `$("name").value`), "Gre te"; got != want {
		t.Errorf("the name is %q, want %q: a colon ends a name", got, want)
	}
	p.send("hello") // Enter moved the focus to the message.
	p.wantLog("message mine: Gre te: hello")

	p.open("http://" + s.addr + "/")
	p.send("hello again")
	p.wantLog("message mine: Gre te: hello again")
	p.fill("name", "")
	p.press(kb.Enter)
	p.send("nobody: ")
	p.wantLog("message mine: Gre te: hello again", "message mine: nobody:")

	p.fill("name", strings.Repeat("x", 40))
	if got := eval[int](p, `$("name").value.length`); got != 32 {
		t.Errorf("a name can have %d characters, want 32", got)
	}
}

func TestNameCountsTowardsTheMessageLimit(t *testing.T) {
	t.Parallel()
	p := openTab(t, startServer(t, "localhost:0"))
	p.fill("msg", strings.Repeat("x", 505))
	p.fill("name", "שרה") // six bytes, and two for the colon and the space
	if got, want := eval[string](p, `$("counter").textContent`), "Characters too many: about 1"; got != want {
		t.Errorf("counter %q, want %q", got, want)
	}
	p.press(kb.Enter)
	p.wantLog()
	p.press(kb.Backspace)
	if got, want := eval[string](p, `$("counter").textContent`), "Characters left: about 0"; got != want {
		t.Errorf("counter %q, want %q", got, want)
	}
	p.press(kb.Enter)
	p.wantLog("message mine: שרה: " + strings.Repeat("x", 504))
}

func TestLeadingNameIsBold(t *testing.T) {
	t.Parallel()
	s := startServer(t, "localhost:0")
	p := openTab(t, s)
	long := strings.Repeat("x", 33)
	lines := []string{"Ilse: hello", "<i>Tom</i>: a: b", "שרה: שלום", "no name here", "http://localhost/", ": none", long + ": too long", "10:15 it is"}
	conn := s.dial(t)
	for _, line := range lines {
		send(t, conn, line)
	}
	p.untilShown(len(lines))
	if got, want := eval[string](p, `[...$("log").querySelectorAll("b")].map((b) => b.textContent).join()`), "Ilse,<i>Tom</i>,שרה"; got != want {
		t.Errorf("the bold names are %q, want %q", got, want)
	}
	s.stop(t)
	p.until(`$("log").querySelector(".notice")`)
	eval[bool](p, `showUndelivered("Ilse: hello"); true`)
	p.until(`$("log").textContent.includes("delivered")`)
	if got := eval[int](p, `$("log").querySelectorAll(".notice b").length`); got != 0 {
		t.Error("a notice has a bold name")
	}
}

func TestOwnMessagesAndNoticesDifferWithoutColors(t *testing.T) {
	t.Parallel()
	s := startServer(t, "localhost:0")
	p := openTab(t, s)
	conn := s.dial(t)
	send(t, conn, "Ilse: hello")
	send(t, conn, "Notice, The server is stopping or restarting.")
	p.untilShown(2)
	p.send("mine")
	p.wantLog("message: Ilse: hello", "message: Notice, The server is stopping or restarting.", "message mine: mine")
	s.stop(t)
	p.until(`$("log").querySelector(".notice")`)
	p.media("forced-colors", "active")
	borders := eval[[]string](p, `[...$("log").children].slice(1).map((line) => {
		const s = getComputedStyle(line);
		return [s.borderLeftStyle, parseInt(s.borderLeftWidth), s.borderTopStyle, s.borderTopColor == s.backgroundColor].join(" ");
	})`)
	if want := []string{"none 0 none false", "solid 4 none false", "solid 1 solid false"}; fmt.Sprint(borders) != fmt.Sprint(want) {
		t.Errorf("the borders of another user's message, one of mine and a notice are %q, want %q", borders, want)
	}

	var spoken []string
	call(p, accessibility.Enable, cdp.Empty{})
	nodes := call(p, accessibility.GetFullAXTree, accessibility.GetFullAXTreeParams{}).Nodes
	byID := make(map[accessibility.NodeID]*accessibility.Node)
	for _, node := range nodes {
		byID[node.NodeID] = node
	}
	word := func(v *accessibility.Value) (s string) {
		if v != nil {
			json.Unmarshal(v.Value, &s)
		}
		return s
	}
	var words func(node *accessibility.Node) string
	words = func(node *accessibility.Node) (s string) {
		if word(node.Role) == "StaticText" {
			return word(node.Name)
		}
		for _, id := range node.ChildIDs {
			s += words(byID[id]) + "|"
		}
		return strings.Trim(s, "|")
	}
	for _, node := range nodes {
		if word(node.Role) == "log" {
			for _, id := range node.ChildIDs {
				if role := word(byID[id].Role); byID[id].Ignored || role != "paragraph" {
					t.Errorf("a line has the role %s, ignored %v, want paragraph, not ignored", role, byID[id].Ignored)
				}
				spoken = append(spoken, words(byID[id]))
			}
		}
	}
	// Each line is one node, which contains the time if the line shows one. The page adds the
	// prefix, so no message can pass for a notice.
	time := regexp.MustCompile(`^\d+:\d\d [AP]M ?\|`)
	want := []string{"By |Ilse|: hello", "Anonymous: |Notice, The server is stopping or restarting.", "You, |mine", "Notice, |The server is stopping or restarting."}
	timed := 0
	for i := range spoken {
		if time.MatchString(spoken[i]) {
			timed++
		}
		spoken[i] = time.ReplaceAllString(spoken[i], "")
	}
	if !slices.Equal(spoken, want) || timed == 0 || timed == len(spoken) {
		t.Errorf("the accessibility tree has %q, %d with a time, want %q, some with a time", spoken, timed, want)
	}
	if got := eval[string](p, `[...document.querySelectorAll("*")].flatMap((e) => ["::before", "::after"].map((part) => getComputedStyle(e, part).content))
		.filter((content) => !["none", "normal", '""'].includes(content)).join()`); got != "" {
		t.Errorf("the style adds the text %s, which some screen readers do not announce", got)
	}
}

// Otherwise a line without a name would look like the next paragraph of the user before.
func TestUnnamedUsersPendingMessagesAndButtonsAreLabeled(t *testing.T) {
	t.Parallel()
	inAllEngines(t, func(t *testing.T, w *window) {
		url, conns := silentServer(t)
		w.open(strings.TrimPrefix(url, "http://"))
		conn := <-conns
		send(t, conn, "Hans: hello\none\ntwo")
		w.until(lastLine + ` == "two"`)
		w.send("mine")
		w.until(`document.querySelector(".pending")`)
		get[bool](w, `(["lost", "lost, too"].forEach(showUndelivered), true)`)
		w.until(`document.querySelectorAll(".notice").length == 2`)
		// What each line shows besides its words.
		if got, want := get[[]string](w, `[...$("log").children].map((line) => [...line.children].map((e) =>
			e.matches(".words, .visually-hidden, time") || e.offsetWidth < 20 ? "" : e.matches(".buttons") ?
				[...e.children].map((button) => button.firstChild.data).join("") : e.textContent.trim()).join(""))`),
			[]string{"", "Anonymous:", "Anonymous:", "Send againDiscard", "Send againDiscard", "Sending…"}; !slices.Equal(got, want) {
			t.Errorf("beside their words, the lines show %q, want %q", got, want)
		}
		if got, want := get[[]string](w, `[...document.querySelectorAll("#log button")].map((e) => e.textContent)`),
			[]string{"Send again: lost", "Discard: lost", "Send again: lost, too", "Discard: lost, too"}; !slices.Equal(got, want) {
			t.Errorf("the accessible names of the buttons are %q, want %q", got, want)
		}
		send(t, conn, "mine")
		w.until(`$("log").lastChild.className == "message mine" && !document.querySelector(".sending")`)
	})
}

func TestTimeIsShownWhenTheMinuteChanges(t *testing.T) {
	t.Parallel()
	s := startServer(t, "localhost:0")
	p := newTab(t)
	do(p, chromedp.EmulateViewport(360, 640))
	p.beforePage(fakeClock)
	call(p, emulation.SetTimezoneOverride, emulation.SetTimezoneOverrideParams{TimezoneID: "UTC"})
	p.open("http://" + s.addr + "/")
	conn := s.dial(t)
	for i, later := range []string{"0", "59_000", "60_000", "61_000", "24 * 3600_000", "24 * 3600_000 + 1000"} {
		eval[bool](p, "later = "+later+"; true")
		send(t, conn, fmt.Sprint("line ", i))
		p.untilShown(i + 1)
	}
	got := eval[[]string](p, `[...$("log").children].map((line) => line.textContent)`)
	want := []string{"9:40 AM Anonymous: line 0", "Anonymous: line 1", "9:41 AM Anonymous: line 2", "Anonymous: line 3",
		"Notice, Tuesday, November 24, 2026", "9:40 AM Anonymous: line 4", "Anonymous: line 5"}
	if fmt.Sprintf("%q", got) != fmt.Sprintf("%q", want) {
		t.Errorf("the log has %q, want %q", got, want)
	}
	if got := eval[string](p, `$("log").children[2].firstChild.dateTime`); got != "2026-11-23T09:41:00.000Z" {
		t.Errorf("datetime %q, want the time in UTC", got)
	}

	// The page follows a change of the time zone.
	call(p, emulation.SetTimezoneOverride, emulation.SetTimezoneOverrideParams{TimezoneID: "Asia/Tokyo"})
	send(t, conn, "arrived")
	p.untilShown(7)
	if got, want := eval[string](p, `$("log").lastChild.textContent`), "6:40 PM Anonymous: arrived"; got != want {
		t.Errorf("in another time zone, a line is %q, want %q", got, want)
	}

	// A notice has its time, also one that replaces another of the same minute.
	eval[bool](p, `showNotice("gone"); showNotice("gone"); true`)
	p.until(lastLine + ` == "gone"`)
	if got, want := eval[string](p, `$("log").lastChild.textContent`), "6:40 PM Notice, gone"; got != want {
		t.Errorf("a notice is %q, want %q", got, want)
	}
}

func TestCounterIsADescriptionNotALiveRegion(t *testing.T) {
	t.Parallel()
	p := openTab(t, startServer(t, "localhost:0"))
	if eval[bool](p, `!!$("counter").closest("output, [role], [aria-live]:not([aria-live=off])")`) {
		t.Error("the counter is a live region: a screen reader would announce each keystroke")
	}
	if got := eval[string](p, `$("msg").getAttribute("aria-describedby")`); got != "counter" {
		t.Errorf("the input is described by %q, want the counter", got)
	}
}

func TestEmptyRoomIsNotClaimedBeforeThePageJoins(t *testing.T) {
	t.Parallel()
	const display = `getComputedStyle($("empty")).display`
	s := startServer(t, "localhost:0")
	t.Run("handshake refused", func(t *testing.T) {
		p := newTab(t)
		do(p, chromedp.Navigate(fakeServer(t, s, func(int, func() *websocket.Conn) {})))
		p.until(`sockets[0]?.readyState == WebSocket.CLOSED`)
		if got := eval[string](p, display); got != "none" {
			t.Errorf("after a refused handshake, display of #empty is %q, want none", got)
		}
	})
	t.Run("without JavaScript", func(t *testing.T) {
		p := newTab(t)
		call(p, emulation.SetScriptExecutionDisabled, emulation.SetScriptExecutionDisabledParams{Value: true})
		do(p, chromedp.Navigate("http://"+s.addr+"/"))
		if got := eval[string](p, display); got != "none" {
			t.Errorf("without JavaScript, display of #empty is %q, want none", got)
		}
	})
}

func TestEmptyLogSaysNoMessagesSinceYouJoined(t *testing.T) {
	t.Parallel()
	p := openTab(t, startServer(t, "localhost:0"))
	const shown = `$("empty").offsetHeight ? $("empty").textContent : ""`
	if got, want := eval[string](p, shown), "No messages since you joined. Earlier ones are not kept."; got != want {
		t.Errorf("an empty log shows %q, want %q", got, want)
	}
	p.send("hello")
	p.until(lastLine + ` == "hello"`)
	if got := eval[string](p, shown); got != "" {
		t.Errorf("with a message in the log, the page still shows %q", got)
	}
}

// So the page recognizes the message that the server sends back.
func TestUnpairedSurrogateIsSentAsReplacementCharacter(t *testing.T) {
	t.Parallel()
	p := openTab(t, startServer(t, "localhost:0"))
	eval[bool](p, `$("msg").value = "\ud83d half"; $("form").requestSubmit(); true`)
	p.wantLog("message mine: \ufffd half")
}

func TestDraftSurvivesReloadAndBackNavigation(t *testing.T) {
	t.Parallel()
	s := startServer(t, "localhost:0")
	page := "http://" + s.addr + "/"
	p := openTab(t, s)
	p.insert("not yet")
	p.open(page)
	p.wantDraft("not yet")
	do(p, chromedp.Navigate(page+"nowhere"))
	eval[bool](p, "history.back(); true")
	p.until(`$("msg")?.value == "not yet" && socket?.readyState == WebSocket.OPEN && ` + focused)
	// WebKit empties the inputs of a page from its back/forward cache after pageshow.
	eval[bool](p, `dispatchEvent(new Event("pageshow")); $("msg").value = ""; true`)
	p.until(`$("msg").value == "not yet"`)
	p.press(kb.Enter)
	p.until(lastLine + ` == "not yet"`)
	p.open(page)
	p.wantDraft("")
	p.insert(strings.Repeat("x", 500))
	p.open(page)
	if got := eval[string](p, `$("counter").textContent`); got != "Characters left: about 12" {
		t.Errorf("counter %q after a reload, want %q", got, "Characters left: about 12")
	}
}

func TestPageWorksWhenStorageIsDenied(t *testing.T) {
	t.Parallel()
	p := newTab(t)
	p.beforePage(denied)
	p.open("http://" + startServer(t, "localhost:0").addr + "/")
	p.fill("name", "Grete")
	p.press(kb.Enter)
	p.send("hello")
	p.wantLog("message mine: Grete: hello")
	eval[bool](p, `dispatchEvent(new Event("pagehide"))`)
	p.wantEmptyConsole()
}

// readPosition is a line and its position: the first line that began in view when the test
// first evaluated this. After a resize, an earlier line may begin in view, too, depending on
// the fonts.
const readPosition = `(() => {
	const top = $("log").getBoundingClientRect().top;
	window.lineRead ??= [...$("log").children].find((line) => line.getBoundingClientRect().top >= top);
	return window.lineRead.textContent.slice(0, 20) + " at " + Math.round(window.lineRead.getBoundingClientRect().top - top);
})()`

func TestReadPositionSurvivesRotation(t *testing.T) {
	// Line breaks, and so which lines are in view, depend on the font.
	for _, font := range []string{"16px sans-serif", "15px serif", "20px serif"} {
		t.Run(font, func(t *testing.T) { t.Parallel(); testRotation(t, font) })
	}
}

func testRotation(t *testing.T, font string) {
	s := startServer(t, "localhost:0")
	p := newTab(t)
	do(p, chromedp.EmulateViewport(360, 640))
	p.open("http://" + s.addr + "/")
	eval[string](p, fmt.Sprintf(`$("log").style.font = %q`, font))
	for i := range 2 {
		conn := s.dial(t)
		for j := range 100 {
			send(t, conn, fmt.Sprintf("%d %s", i*100+j, strings.Repeat("and on it goes ", j%20)))
		}
	}
	p.untilShown(200)
	turn := func(width, height int64) {
		t.Helper()
		do(p, chromedp.EmulateViewport(width, height))
		p.until(fmt.Sprintf("innerWidth == %d", width))
		// After two frames, the browser has handled the resize.
		eval[bool](p, `new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))`, chromedp.EvalAwaitPromise)
	}
	turn(640, 360)
	p.until(atEnd)
	turn(360, 640)
	p.until(atEnd)
	p.scroll("-9000")
	want := eval[string](p, readPosition)
	for range 3 {
		turn(640, 360)
		if got := eval[string](p, readPosition); got != want {
			t.Errorf("rotated, the phone shows %q, want %q", got, want)
		}
		turn(360, 640)
		if got := eval[string](p, readPosition); got != want {
			t.Errorf("rotated back, the phone shows %q, want %q", got, want)
		}
	}
	if got := eval[string](p, `getComputedStyle($("log")).overflowAnchor`); got != "none" {
		t.Errorf("overflow-anchor is %q, want none: the script does the scroll anchoring, as Safari does none", got)
	}
}

func TestLogStaysAtTheEndWhenZoomed(t *testing.T) {
	t.Parallel()
	s := startServer(t, "localhost:0")
	p := openTab(t, s)
	sendLines(t, s, 100)
	p.untilShown(100)
	p.until(atEnd)
	for _, size := range []string{"18px", "20px", "32px", "16px"} {
		// Chromium fires the scroll event before the resize observer.
		eval[bool](p, `document.documentElement.style.fontSize = "`+size+`"; $("log").dispatchEvent(new Event("scroll"))`)
		p.until(atEnd)
		send(t, s.dial(t), "at "+size)
		p.until(lastLine + ` == "at ` + size + `" && ` + atEnd)
	}
}

func TestSendingScrollsToTheEnd(t *testing.T) {
	t.Parallel()
	s := startServer(t, "localhost:0")
	p := openTab(t, s)
	sendLines(t, s, 100)
	p.untilShown(100)
	p.scroll("-1000")
	p.send("here I am")
	p.until(lastLine + ` == "here I am" && ` + atEnd + ` && $("jump").hidden`)
}

func TestPrintShowsAllLinesAndNoForm(t *testing.T) {
	t.Parallel()
	s := startServer(t, "localhost:0")
	p := openTab(t, s)
	sendLines(t, s, 150)
	p.untilShown(150)
	eval[bool](p, `showUndelivered("lost"); true`)
	p.until(`$("log").textContent.includes("delivered: lost")`)
	call(p, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{Media: "print"})
	if got := eval[float64](p, `$("log").scrollHeight - document.body.getBoundingClientRect().height`); got > 0 {
		t.Errorf("in print, %v pixels of the log are cut off", got)
	}
	if got := eval[string](p, `getComputedStyle($("log")).overflow`); got != "visible" {
		t.Errorf("in print, the log's overflow is %s, want visible: browsers do not paginate what scrolls", got)
	}
	if got := eval[string](p, `[...document.querySelectorAll("input, button, label, #counter")].filter((e) => e.offsetParent).map((e) => e.outerHTML).join()`); got != "" {
		t.Errorf("in print, these elements are visible: %s", got)
	}
}

// The oldest supported browsers are Chrome 109, Safari 16 and Firefox 115. The test removes
// the features that they lack, or looks for them in the style.
func TestPageWorksInTheOldestSupportedBrowsers(t *testing.T) {
	t.Parallel()
	s := startServer(t, "localhost:0")
	p := newTab(t)
	p.beforePage(`for (const [of, names] of [
		[Array, ["fromAsync"]],
		[Array.prototype, ["findLast", "findLastIndex", "toReversed", "toSorted", "toSpliced", "with"]],
		[String.prototype, ["isWellFormed", "toWellFormed"]],
		[Map, ["groupBy"]], [Object, ["groupBy"]],
		[Promise, ["withResolvers", "try"]],
		[Set.prototype, ["difference", "intersection", "union"]],
		[AbortSignal, ["any", "timeout"]],
		[Element.prototype, ["checkVisibility", "setHTMLUnsafe"]],
		[window, ["navigation", "scheduler", "Temporal", "WebSocketStream"]],
	]) for (const name of names) delete of[name];`)
	p.open("http://" + s.addr + "/")
	p.send("hello")
	p.wantLog("message mine: hello")
	if !eval[bool](p, "findObstacle().then((obstacle) => obstacle === \"\")", chromedp.EvalAwaitPromise) {
		t.Error("the probe gets no response from the server")
	}
	p.wantEmptyConsole()
	style := eval[string](p, `document.querySelector("style").textContent`)
	if got := regexp.MustCompile(`anywhere|light-dark|color-mix|oklch|@layer|@container|@scope|@property|&|text-wrap|field-sizing`).FindString(style); got != "" {
		t.Errorf("the style uses %s, which the oldest browsers lack", got)
	}
	if !regexp.MustCompile(`height: 100%;.*\s+height: 100dvh;`).MatchString(style) {
		t.Error("the style sets no height for a browser without dvh")
	}
}

func TestNameAndDraftSurviveBackNavigation(t *testing.T) {
	t.Parallel()
	inAllEngines(t, func(t *testing.T, w *window) {
		s := startServer(t, "localhost:0")
		w.open(s.addr)
		get[bool](w, `$("name").focus() ?? true`)
		w.typeText("Grete")
		w.press(enter)
		w.insert("hello")
		w.press(enter)
		w.until(lastLine + ` == "Grete: hello"`)
		w.insert("not yet")
		w.must(w.engine.visit("about:blank"))
		w.must(w.engine.back())
		// A page from the back/forward cache shows its old status for a moment.
		w.until(connected + ` && socket.readyState == WebSocket.OPEN`)
		w.until(`$("msg").value == "not yet" && document.activeElement == $("msg")`)
		w.until(`$("name").value == "Grete"`)
		w.rest()
		w.press(enter)
		w.until(lastLine + ` == "Grete: not yet"`)
	})
}

func TestNameIsStoredAtEachKeystroke(t *testing.T) {
	t.Parallel()
	inAllEngines(t, func(t *testing.T, w *window) {
		s := startServer(t, "localhost:0")
		w.open(s.addr)
		get[bool](w, `$("name").focus() ?? true`)
		w.typeText("Gr")
		w.open(s.addr)
		w.until(`$("name").value == "Gr"`)
	})
}

func TestTabKeepsItsOwnName(t *testing.T) {
	t.Parallel()
	inAllEngines(t, func(t *testing.T, w *window) {
		s := startServer(t, "localhost:0")
		// Other tabs of the browser store the name in localStorage. This tab also has
		// sessionStorage.
		inAnotherTab := func(name string) {
			t.Helper()
			get[bool](w, fmt.Sprintf(`(localStorage["chat / name"] = %q, true)`, name))
		}
		newTab := func() {
			t.Helper()
			get[bool](w, `(sessionStorage.clear(), true)`)
			w.must(w.engine.visit("about:blank"))
			w.open(s.addr)
		}
		wantName := func(want string) {
			t.Helper()
			for range 2 { // before and after a reload
				if got := get[string](w, `$("name").value`); got != want {
					t.Errorf("the name is %q, want %q", got, want)
				}
				w.open(s.addr)
			}
		}
		w.open(s.addr)
		get[bool](w, `$("name").focus() ?? true`)
		w.typeText("Alice")
		newTab()
		wantName("Alice")
		inAnotherTab("Bob")
		wantName("Alice")
		newTab()
		wantName("Bob")
		inAnotherTab("Carol")
		wantName("Bob") // A tab stores the name with which it starts, too.
		get[bool](w, `$("name").focus() ?? true`)
		for range "Bob" {
			w.press(end)
			w.press(backspace)
		}
		inAnotherTab("Carol")
		wantName("") // The user of this tab has removed the name.
	})
}

func TestTwoChatsOnOneHostShareNoStorage(t *testing.T) {
	t.Parallel()
	inAllEngines(t, func(t *testing.T, w *window) {
		s := startServer(t, "localhost:0")
		mux := http.NewServeMux()
		for _, path := range []string{"/one", "/two"} {
			mux.Handle(path+"/", http.StripPrefix(path, httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: s.addr})))
		}
		proxy := httptest.NewServer(mux)
		t.Cleanup(proxy.Close)
		open := func(path string) {
			t.Helper()
			w.open(strings.TrimPrefix(proxy.URL, "http://") + path)
		}
		want := func(name, draft string, lost int) {
			t.Helper()
			w.until("!batch.hasChildNodes()")
			got := get[string](w, `[$("name").value, $("msg").value, document.querySelectorAll(".notice button").length].join()`)
			if want := fmt.Sprintf("%s,%s,%d", name, draft, 2*lost); got != want {
				t.Errorf("name, draft and buttons are %q, want %q", got, want)
			}
		}
		open("/one")
		get[bool](w, `$("name").focus() ?? true`)
		w.typeText("Grete")
		get[bool](w, `(WebSocket.prototype.send = () => {}, true)`)
		w.send("pending")
		w.insert("a draft")
		open("/two")
		want("", "", 0)
		open("/one")
		want("Grete", "a draft", 1)
	})
}

func TestInvalidStorageIsHarmless(t *testing.T) {
	t.Parallel()
	inAllEngines(t, func(t *testing.T, w *window) {
		s := startServer(t, "localhost:0")
		w.open(s.addr)
		for _, junk := range []string{"{", "null", `["x"]`, `[{"text":1}]`, "\x00", "\n\n\n", strings.Repeat("x", 100_000), "<b>"} {
			get[bool](w, fmt.Sprintf(`["name", "msg", "draft", "undelivered"].every((what) => [localStorage, sessionStorage].every((storage) =>
				["chat " + what, "chat / " + what].every((key) => storage[key] = %q)))`, junk))
			w.open(s.addr)
			get[bool](w, `($("name").value = "", $("msg").value = "", true)`)
			w.send("hello")
			w.until(lastLine + ` == "hello" && $("log").lastChild.className == "message mine"`)
		}
	})
}

func TestEnterInTheNameFocusesTheMessage(t *testing.T) {
	t.Parallel()
	inAllEngines(t, func(t *testing.T, w *window) {
		s := startServer(t, "localhost:0")
		w.open(s.addr)
		w.insert("a draft")
		get[bool](w, `$("name").focus() ?? true`)
		w.typeText("Il:se")
		w.press(enter)
		w.until(`document.activeElement == $("msg") && $("name").value == "Il se"`)
		if got := get[string](w, `$("msg").value + $("log").textContent`); got != "a draft" {
			t.Errorf("draft and log are %q, want the draft alone", got)
		}
		w.press(enter)
		w.until(lastLine + ` == "Il se: a draft"`)
	})
}

func TestTypingFocusesTheMessageAndKeysStillScroll(t *testing.T) {
	t.Parallel()
	inAllEngines(t, func(t *testing.T, w *window) {
		s := startServer(t, "localhost:0")
		w.resize(700, 500)
		w.open(s.addr)
		sendVaried(t, s, 100)
		w.until(lastLine + ` == "That is all." && ` + atEnd)
		w.scroll(-500)
		send(t, s.dial(t), "news")
		w.until(`!$("jump").hidden`)
		w.click(`$("jump")`)
		w.until(atEnd)

		for _, scrolling := range []struct{ key, until string }{
			{home, `$("log").scrollTop == 0`},
			{" ", `$("log").scrollTop > 100`},
			{end, atEnd},
			{pageUp, "!(" + atEnd + ")"},
		} {
			get[bool](w, `(window.scrolledAt = performance.now(), $("log").addEventListener("scroll", () => scrolledAt = performance.now())) ?? true`)
			w.press(scrolling.key)
			w.until(scrolling.until + " && performance.now() - scrolledAt > 200") // Browsers scroll smoothly.
		}
		w.pressWith(control, "x")
		if got := get[string](w, `document.activeElement.id + $("msg").value`); got != "log" {
			t.Errorf("after keys that scroll, and a shortcut, focus and draft are %q, want log and no draft", got)
		}
		// Autofill may dispatch the event without a key. If the page's script fails, so does the test.
		get[bool](w, `document.body.dispatchEvent(new Event("keydown", { bubbles: true }))`)
		w.typeText("hé 1")
		w.until(`document.activeElement == $("msg") && $("msg").value == "hé 1"`)
		w.press(enter)
		w.until(lastLine + ` == "hé 1"`)
		w.until(atEnd)
	})
}

func TestDirectionFollowsTheText(t *testing.T) {
	t.Parallel()
	inAllEngines(t, func(t *testing.T, w *window) {
		s := startServer(t, "localhost:0")
		w.open(s.addr)
		for _, id := range []string{"msg", "name"} {
			if got := get[string](w, fmt.Sprintf(`($(%[1]q).value = "שלום", getComputedStyle($(%[1]q)).direction)`, id)); got != "rtl" {
				t.Errorf("with Hebrew content, the direction of %s is %s, want rtl", id, got)
			}
			get[string](w, fmt.Sprintf(`$(%q).value = ""`, id))
		}
		conn := s.dial(t)
		for line, want := range map[string]string{
			"Grete: שלום לכולם": "right", "שרה: hello": "left", "שרה: שלום": "right", "hello, שלום": "left",
			"שלום https://example.org/ שלום": "right", "https://example.org/שלום": "left",
		} {
			send(t, conn, line)
			w.until(fmt.Sprintf(lastLine+" == %q", line))
			got := get[string](w, `(() => {
				const line = $("log").lastChild, box = line.getBoundingClientRect(), time = line.querySelector("time");
				const words = line.querySelector(".anonymous, b").getBoundingClientRect();
				const { left, right } = line.querySelector(".words").getBoundingClientRect();
				return [Math.min(left, words.left) - box.left < 14 && "left", (time?.getBoundingClientRect().left ?? box.right) - Math.max(right, words.right) < 14 && "right"].filter(Boolean).join();
			})()`)
			if got != want {
				t.Errorf("%q is aligned to the %s, want %s", line, got, want)
			}
		}
	})
}

func TestLongWordsAreBroken(t *testing.T) {
	t.Parallel()
	inAllEngines(t, func(t *testing.T, w *window) {
		s := startServer(t, "localhost:0")
		w.resize(500, 500)
		w.open(s.addr)
		conn := s.dial(t)
		send(t, conn, strings.Repeat("W", 120))
		send(t, conn, strings.Repeat("W", 30)+": https://example.org/"+strings.Repeat("W", 120))
		w.until(lastLine + `.includes("https")`)
		if got := get[int](w, `$("log").scrollWidth - $("log").clientWidth`); got != 0 {
			t.Errorf("a long word makes the log %d pixels too wide", got)
		}
	})
}

// lineBelowMarker is the text of the line below the marker, or "" if no marker is shown.
const lineBelowMarker = `(document.querySelector("#log .marker")?.offsetHeight ?
	document.querySelector("#log .marker").nextElementSibling.querySelector(".words").textContent : "")`

func TestMarkerIsAboveTheFirstUnreadLine(t *testing.T) {
	t.Parallel()
	inAllEngines(t, func(t *testing.T, w *window) {
		s := startServer(t, "localhost:0")
		w.open(s.addr)
		conn := s.dial(t)
		send(t, conn, "seen")
		w.until(lastLine + ` == "seen"`)
		send(t, conn, "seen, too")
		w.until(lastLine + ` == "seen, too"`)
		wantMarker := func(title, line string) {
			t.Helper()
			if got := get[string](w, "document.title"); got != title {
				t.Errorf("title %q, want %q", got, title)
			}
			if got := get[string](w, lineBelowMarker); got != line {
				t.Errorf("the marker is above %q, want %q", got, line)
			}
		}
		wantMarker("Chat", "")
		w.pretendHidden(true)
		w.pretendHidden(false)
		wantMarker("Chat", "")

		w.pretendHidden(true)
		for _, text := range []string{"one", "two", "three"} {
			send(t, conn, text)
		}
		w.until(lastLine + ` == "three"`)
		wantMarker("(3) Chat", "one")
		w.pretendHidden(false)
		wantMarker("Chat", "one")
		send(t, conn, "four")
		w.until(lastLine + ` == "four"`)
		wantMarker("Chat", "one")
		if got := get[float64](w, `document.querySelector("#log .marker").getBoundingClientRect().width / $("log").lastChild.getBoundingClientRect().width`); got != 1 {
			t.Errorf("the marker has %v of a line's width, want all of it", got)
		}

		w.pretendHidden(true)
		wantMarker("Chat", "")
		send(t, conn, "five")
		w.until(lastLine + ` == "five"`)
		wantMarker("(1) Chat", "five")
		w.pretendHidden(false)
		w.pretendHidden(true)
		w.pretendHidden(false)
		wantMarker("Chat", "")
	})
}

func TestMarkerCountsRemovedLines(t *testing.T) {
	t.Parallel()
	for _, lines := range []int{1100, 7000} { // With 7000, some are removed while the tab is hidden.
		t.Run(fmt.Sprint(lines), func(t *testing.T) {
			t.Parallel()
			s := startServer(t, "localhost:0")
			p := openTabIn(t, chromium, s)
			send(t, s.dial(t), "seen")
			p.untilShown(1)
			show := p.hide()
			sendLines(t, s, lines)
			p.until(fmt.Sprintf(`document.title == "(%d) Chat"`, lines))
			show()
			p.untilShown(1 + lines)
			wantMarker := func(removed int) {
				t.Helper()
				want := fmt.Sprintf("marker New messages (the first %d are no longer shown) 1001", removed)
				if got := eval[string](p, `[$("log").firstChild.className, $("log").firstChild.textContent, $("log").childElementCount].join(" ")`); got != want {
					t.Errorf("the first line's class and text, and the number of lines, are %q, want %q", got, want)
				}
			}
			wantMarker(lines - 1000)
			send(t, s.dial(t), "one more")
			p.until(lastLine + ` == "one more"`)
			wantMarker(lines - 999)
			p.hide()()
			sendLines(t, s, 100)
			p.until("arrived == " + fmt.Sprint(lines+102) + " && !batch.hasChildNodes()")
			if got := eval[int](p, `document.querySelectorAll(".marker").length`); got != 0 {
				t.Error("the marker is still there after the page was shown and hidden again")
			}
			show = p.hide()
			sendLines(t, s, 1100)
			p.until(`document.title == "(1100) Chat"`)
			show()
			p.until("!batch.hasChildNodes()")
			wantMarker(100)
		})
	}
}

func TestNoticesAreMarkedButNotCountedAsUnread(t *testing.T) {
	t.Parallel()
	inAllEngines(t, func(t *testing.T, w *window) {
		s := startServer(t, "localhost:0")
		w.open(s.addr)
		w.pretendHidden(true)
		s.stop(t)
		w.until(lastLine + ` == "The server is stopping or restarting."`)
		s = startServer(t, s.addr)
		w.until(connected)
		send(t, s.dial(t), "hello")
		w.until(lastLine + ` == "hello"`)
		if got := get[string](w, "document.title + ': ' + "+lineBelowMarker); got != "(1) Chat: The server is stopping or restarting." {
			t.Errorf("title and line below the marker are %q, want 1 unread message and the first notice", got)
		}
	})
}

// Browsers fire the scroll event with the next frame. Lines that arrive before must not undo the
// scrolling.
func TestLinesThatArriveAsTheUserScrollsDoNotUndoIt(t *testing.T) {
	t.Parallel()
	inAllEngines(t, func(t *testing.T, w *window) {
		s := startServer(t, "localhost:0")
		w.resize(700, 500)
		w.open(s.addr)
		sendVaried(t, s, 50)
		w.until(lastLine + ` == "That is all." && ` + atEnd)
		moved := get[float64](w, `(() => {
			showPending("mine");
			const top = log.scrollTop;
			log.scrollTop -= 100;
			receive(["mine"]);
			const moved = log.scrollTop - top;
			goToEnd();
			return moved;
		})()`)
		if moved != -100 {
			t.Errorf("the log scrolled by %v pixels as the user's own message arrived, want -100", moved)
		}
		for range 2 { // at first from the end
			moved := get[float64](w, `(() => {
				const top = log.scrollTop;
				log.scrollTop -= 100;
				receive(["new"]);
				flush();
				return log.scrollTop - top;
			})()`)
			if moved != -100 {
				t.Errorf("the log scrolled by %v pixels as lines arrived, want -100", moved)
			}
			w.rest()
		}
		w.until(`!$("jump").hidden`)
	})
}

func TestMarkerDoesNotMoveTheReadPosition(t *testing.T) {
	t.Parallel()
	inAllEngines(t, func(t *testing.T, w *window) {
		s := startServer(t, "localhost:0")
		w.resize(700, 500)
		w.open(s.addr)
		sendVaried(t, s, 100)
		w.until(lastLine + ` == "That is all." && ` + atEnd)
		w.pretendHidden(true)
		sendVaried(t, s, 50)
		w.until(lastLine + ` == "That is all." && document.querySelector("#log .marker") && ` + atEnd)
		w.pretendHidden(false)
		w.scroll(-100)
		want := get[string](w, readPosition)
		w.pretendHidden(true) // This removes the marker above.
		w.wantReadPosition(want, "as the marker was removed")
		sendVaried(t, s, 10)
		w.until(`document.querySelector("#log .marker") && !$("jump").hidden`)
		w.pretendHidden(false)
		w.wantReadPosition(want, "as the marker was added")
	})
}

func TestCopyingPicksUpOnlyTheText(t *testing.T) {
	t.Parallel()
	inAllEngines(t, func(t *testing.T, w *window) {
		s := startServer(t, "localhost:0")
		w.open(s.addr)
		conn := s.dial(t)
		for _, text := range []string{"Grete: hello", "Ilse: see https://example.org/.", "no name"} {
			send(t, conn, text)
		}
		w.send("mine")
		w.until(lastLine + ` == "mine"`)
		s.stop(t)
		w.until(lastLine + ` == "The server is stopping or restarting."`)
		get[bool](w, `showUndelivered("lost") ?? true`)
		w.until(lastLine + `.includes("lost")`)
		get[bool](w, `(document.body.append(window.paper = document.createElement("textarea")), true)`)
		textOf := func(n int) string { return fmt.Sprintf(`$("log").children[%d].querySelector(".words")`, n) }
		const all = "Grete: hello\nIlse: see https://example.org/.\nno name\nmine\nThe server is stopping or restarting.\nThis may not have been delivered: lost"
		for _, tt := range []struct{ name, from, to, want string }{
			{"all", `[$("log"), 0]`, `[$("log"), 6]`, all},
			{"parts of two", `[` + textOf(0) + `.lastChild, 2]`, `[` + textOf(1) + `.firstChild.firstChild, 2]`, "hello\nIl"},
			{"one, with its time", `[$("log").children[0], 0]`, `[$("log").children[0], $("log").children[0].childNodes.length]`, "Grete: hello"},
			{"a part of one", `[` + textOf(2) + `.firstChild, 0]`, `[` + textOf(2) + `.firstChild, 2]`, "no"},
		} {
			get[bool](w, fmt.Sprintf(`($("log").focus(), getSelection().setBaseAndExtent(...%s, ...%s)) ?? true`, tt.from, tt.to))
			w.pressWith(control, "c")
			get[bool](w, `(paper.value = "", paper.focus()) ?? true`)
			w.pressWith(control, "v")
			w.until(`paper.value`)
			if got := strings.TrimSpace(get[string](w, `paper.value`)); got != tt.want {
				t.Errorf("%s: copied %q, want %q", tt.name, got, tt.want)
			}
		}
	})
}

func TestLogDoesNotScrollWhileTextIsSelected(t *testing.T) {
	t.Parallel()
	inAllEngines(t, func(t *testing.T, w *window) {
		s := startServer(t, "localhost:0")
		w.resize(700, 500)
		w.open(s.addr)
		sendVaried(t, s, 50)
		w.until(lastLine + ` == "That is all." && ` + atEnd)
		line := func(n int) string { return fmt.Sprintf(`$("log").children[%d].lastChild.firstChild`, n) }
		const span = `$("log").children[50].lastChild`
		conn := s.dial(t)
		w.mouse(w.moveTo(span, 0.05), pointerDown, w.moveTo(span, 0.4))
		w.until("!getSelection().isCollapsed")
		want := get[string](w, readPosition)
		for i := range 20 {
			send(t, conn, fmt.Sprint("meanwhile ", i))
		}
		w.until(lastLine + ` == "meanwhile 19" && !$("jump").hidden`)
		w.wantReadPosition(want, "as lines arrived while text was selected")
		w.mouse(w.moveTo(span, 0.6), pointerUp)
		if got := get[string](w, "getSelection().toString()"); got == "" || !strings.Contains("That is all.", got) {
			t.Errorf("selected %q, want part of the line where the mouse button was pressed", got)
		}
		send(t, conn, "and now")
		w.until(lastLine + ` == "and now"`)
		w.wantReadPosition(want, "after the mouse button was released")

		// Without a selection, or with one in the input, the log follows the end.
		w.click(`$("jump")`)
		w.until(atEnd)
		send(t, conn, "on")
		w.until(lastLine + ` == "on" && ` + atEnd)
		get[bool](w, fmt.Sprintf("getSelection().setBaseAndExtent(%s, 0, %s, 3) ?? true", line(60), line(60)))
		send(t, conn, "held")
		w.until(lastLine + ` == "held" && !$("jump").hidden`)
		w.send("sending scrolls to the end")
		w.until(lastLine + ` == "sending scrolls to the end" && ` + atEnd)
		w.insert("draft")
		get[bool](w, `$("msg").select() ?? true`)
		send(t, conn, "further")
		w.until(lastLine + ` == "further" && ` + atEnd)
	})
}
