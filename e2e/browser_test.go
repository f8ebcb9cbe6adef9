package e2e

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/input"
	"github.com/chromedp/cdproto/network"
	"github.com/chromedp/cdproto/page"
	// Chromedp uses the Chrome DevTools Protocol, through which a test can emulate being
	// offline or dark mode, and hide a tab. Its releases follow Chromium's. As for the
	// alternatives, Rod's last release is from 2024, and Playwright's Go client downloads
	// a driver and browsers of its own.
	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"
)

// shell and chromium are the browsers that the tests share, each started by the first test that
// uses it. Each test opens its own tabs. The shell is Chromium without its windows: the same
// engine, in which a tab takes a third of the CPU time to open. It never hides a tab.
var (
	shell    = sync.OnceValues(func() (context.Context, error) { return startChromium("chromium-headless-shell") })
	chromium = sync.OnceValues(func() (context.Context, error) { return startChromium("chromium") })
)

func startChromium(name string) (context.Context, error) {
	path, err := exec.LookPath(name)
	if err != nil {
		return nil, err
	}
	ctx, closeAllocator := chromedp.NewExecAllocator(context.Background(),
		chromedp.ExecPath(path), // in a new user data directory
		chromedp.NoSandbox,      // The sandbox does not work for root.
		chromedp.Headless,
		chromedp.DisableGPU,
		chromedp.NoFirstRun,
		chromedp.IgnoreCertErrors, // A test's proxy has a self-signed certificate.
		chromedp.Flag("disable-background-networking", true),
		chromedp.Flag("disable-component-update", true),
		chromedp.Flag("disable-sync", true),
		chromedp.Flag("disable-quic", true),
		chromedp.Flag("disable-smooth-scrolling", true), // whose end no event tells
	)
	ctx, _ = chromedp.NewContext(ctx)
	browsers.Lock()
	defer browsers.Unlock()
	browsers.close = append(browsers.close, func() { chromedp.Cancel(ctx); closeAllocator() })
	return ctx, chromedp.Do(ctx)
}

// browsers has the functions that close the browsers that have been started.
var browsers struct {
	sync.Mutex
	close []func()
}

func closeBrowsers() {
	for _, closeBrowser := range browsers.close {
		closeBrowser()
	}
}

// spy runs before the page's script. It records the page's WebSockets in sockets, and the
// maximum number of them that are open or connecting at once in atOnce.
const spy = `
	var sockets = [], atOnce = 0;
	WebSocket = class extends WebSocket {
		constructor(...args) {
			super(...args);
			sockets.push(this);
			atOnce = Math.max(atOnce, sockets.filter((s) => s.readyState <= WebSocket.OPEN).length);
		}
	};`

// fast runs before the page's script and makes timers run 20 times as fast.
const fast = `
	const realTimeout = setTimeout;
	setTimeout = (f, ms, ...args) => realTimeout(f, ms / 20, ...args);`

// A tab is a tab of the browser, with its own window and profile.
type tab struct {
	t   testing.TB
	ctx context.Context

	mu      sync.Mutex
	console []chromedp.ConsoleMessage
}

// newTab opens an empty tab in the shell; the test's end closes it.
func newTab(t testing.TB) *tab {
	t.Helper()
	return newTabIn(t, shell)
}

// newTabIn opens an empty tab in the shell or in Chromium; the test's end closes it.
func newTabIn(t testing.TB, browser func() (context.Context, error)) *tab {
	t.Helper()
	parent, err := browser()
	if err != nil {
		t.Fatalf("no browser: %v\nOn Debian: apt-get install chromium chromium-headless-shell", err)
	}
	ctx, cancel := chromedp.NewContext(parent, chromedp.WithNewBrowserContext())
	t.Cleanup(cancel)
	if err := chromedp.Do(ctx); err != nil { // not with do, whose timeout would close the tab
		t.Fatal(err)
	}
	p := &tab{t: t, ctx: ctx}
	do(p, chromedp.EmulateViewport(800, 600))
	p.beforePage(spy)
	console := chromedp.Console(ctx)
	go func() {
		for message, err := range console {
			if err != nil {
				return
			}
			p.mu.Lock()
			p.console = append(p.console, message)
			p.mu.Unlock()
		}
	}()
	return p
}

// open opens url and waits until the page is connected. From then on, arrived
// counts the lines that arrive.
func (p *tab) open(url string) {
	p.t.Helper()
	do(p, chromedp.Navigate(url))
	p.until(`$("status").textContent == "Connected"`)
	p.until(focused)
	eval[bool](p, `var arrived = 0, pageReceive = receive; receive = (lines) => { arrived += lines.length; pageReceive(lines); }; true`)
}

// openTab opens the server's page in a new tab of the shell and waits until it is connected.
func openTab(t testing.TB, s *server) *tab {
	t.Helper()
	return openTabIn(t, shell, s)
}

// openTabIn opens the server's page in a new tab and waits until it is connected.
func openTabIn(t testing.TB, browser func() (context.Context, error), s *server) *tab {
	t.Helper()
	p := newTabIn(t, browser)
	p.open("http://" + s.addr + "/")
	return p
}

// do does action in p, and fails the test if it fails or takes too long.
func do[T any](p *tab, action chromedp.Action[T]) T {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.ctx, patience)
	defer cancel()
	result, err := chromedp.Run(ctx, action)
	if err != nil {
		p.t.Fatal(err)
	}
	return result
}

// call runs a command of the Chrome DevTools Protocol in p.
func call[P, R any](p *tab, cmd cdp.Command[P, R], params P) R {
	p.t.Helper()
	return do(p, func(ctx context.Context, target *chromedp.Target) (R, error) {
		return cdp.Call(ctx, target, cmd, params)
	})
}

// eval returns the value of JavaScript, in which $ finds an element by its id.
func eval[T any](p *tab, js string, options ...chromedp.EvaluateOption) T {
	p.t.Helper()
	return do(p, evaluation[T](js, options...))
}

func evaluation[T any](js string, options ...chromedp.EvaluateOption) chromedp.Action[T] {
	return chromedp.Evaluate[T]("{ const $ = (id) => document.getElementById(id);\n"+js+"\n}", options...)
}

// until waits until a JavaScript expression is true.
func (p *tab) until(js string) {
	p.t.Helper()
	holds := func(ctx context.Context, target *chromedp.Target) (bool, error) {
		result, err := evaluation[bool]("!!("+js+")")(ctx, target)
		if err != nil && strings.Contains(err.Error(), "navigated or closed") {
			return false, nil // The next page is about to be there.
		}
		return result, err
	}
	start := time.Now()
	for checked := start; !do(p, holds); checked = time.Now() {
		if time.Since(start) > patience {
			p.t.Fatalf("not within %v: %s\npage:\n%.400s…", patience, js, eval[string](p, "document.body.innerText"))
		}
		time.Sleep(max(pollInterval, time.Since(checked)))
	}
}

// untilShown waits until n lines have arrived and are in the log.
func (p *tab) untilShown(n int) {
	p.t.Helper()
	p.until(fmt.Sprintf("arrived == %d && !batch.hasChildNodes()", n))
}

// beforePage has the tab run js before the script of each page.
func (p *tab) beforePage(js string) {
	p.t.Helper()
	call(p, page.AddScriptToEvaluateOnNewDocument, page.AddScriptToEvaluateOnNewDocumentParams{Source: js})
}

// focused is true once an element has the focus, which the browser sets with the first frame.
const focused = "document.activeElement != document.body"

// insert inserts text into the input that has the focus, as a paste does.
func (p *tab) insert(text string) {
	p.t.Helper()
	p.until(focused)
	call(p, input.InsertText, input.InsertTextParams{Text: text})
}

func (p *tab) press(key string) {
	p.t.Helper()
	do(p, chromedp.KeyEvent(key))
}

// send inserts text and presses Enter.
func (p *tab) send(text string) {
	p.t.Helper()
	p.insert(text)
	p.press(kb.Enter)
}

// wantDraft checks the content of the input for the message.
func (p *tab) wantDraft(want string) {
	p.t.Helper()
	if got := eval[string](p, `$("msg").value`); got != want {
		p.t.Errorf("draft %q, want %q", got, want)
	}
}

// scroll turns the mouse wheel over the log by a number of pixels, given as JavaScript, and
// waits until the log has stopped scrolling.
func (p *tab) scroll(by string) {
	p.t.Helper()
	delta := eval[float64](p, `var scrolledAt = Infinity; $("log").addEventListener("scroll", () => scrolledAt = performance.now()); `+by)
	// cdproto's parameters omit a deltaX of 0, which Chromium requires.
	wheel := cdp.Command[map[string]any, cdp.Empty]{Method: input.CommandDispatchMouseEvent}
	call(p, wheel, map[string]any{"type": "mouseWheel", "x": 100, "y": 200, "deltaX": 0, "deltaY": delta})
	p.until("performance.now() - scrolledAt > 300")
}

// setOffline makes the tab go offline, or online again.
func (p *tab) setOffline(offline bool) {
	p.t.Helper()
	call(p, network.EmulateNetworkConditionsByRule, network.EmulateNetworkConditionsByRuleParams{
		MatchedNetworkConditions: []*network.Conditions{{Offline: offline, DownloadThroughput: -1, UploadThroughput: -1}},
	})
	call(p, network.OverrideNetworkState, network.OverrideNetworkStateParams{
		Offline: offline, DownloadThroughput: -1, UploadThroughput: -1,
	})
}

// media sets a CSS media feature.
func (p *tab) media(name, value string) {
	p.t.Helper()
	call(p, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{
		Features: []*emulation.MediaFeature{{Name: name, Value: value}},
	})
}

// hide opens another tab in front of p, which is one of chromium. show brings p to the front again.
func (p *tab) hide() (show func()) {
	p.t.Helper()
	ctx, cancel := chromedp.NewContext(p.ctx, chromedp.WithNewWindow(false))
	p.t.Cleanup(cancel)
	if err := chromedp.Do(ctx); err != nil {
		p.t.Fatal(err)
	}
	p.until("document.hidden")
	return func() {
		p.t.Helper()
		call(p, page.BringToFront, cdp.Empty{})
		p.until("!document.hidden")
	}
}

// chrome makes a tab an engine, for tests that run in all three.
type chrome struct {
	*tab
	x, y      float64 // of the mouse
	buttons   int64   // pressed
	modifiers chromedp.Modifier
}

func (c *chrome) visit(url string) error {
	do(c.tab, chromedp.Navigate(url))
	return nil
}

func (c *chrome) back() error {
	eval[bool](c.tab, "history.back(); true")
	return nil
}

func (c *chrome) eval(js string, result any) error {
	value := eval[string](c.tab, "(async () => JSON.stringify(await ("+js+")))()", chromedp.EvalAwaitPromise)
	return json.Unmarshal([]byte(value), result)
}

func (c *chrome) act(source object) error {
	for _, action := range source["actions"].([]object) {
		switch typ := action["type"]; {
		case action["value"] == control && typ == "keyDown":
			c.modifiers = chromedp.ModifierCtrl
		case action["value"] == control:
			c.modifiers = 0
		case typ == "keyDown":
			key := action["value"].(string)
			do(c.tab, chromedp.KeyEvent(cmp.Or(chromeKeys[key], key), chromedp.KeyModifiers(c.modifiers)))
		case typ == "pointerMove":
			c.x, c.y = float64(action["x"].(int)), float64(action["y"].(int))
			c.mouse(chromedp.MouseMoved)
		case typ == "pointerDown":
			c.buttons = 1
			c.mouse(chromedp.MousePressed)
		case typ == "pointerUp":
			c.buttons = 0
			c.mouse(chromedp.MouseReleased)
		}
	}
	return nil
}

var chromeKeys = map[string]string{backspace: kb.Backspace, enter: kb.Enter, tabKey: kb.Tab, home: kb.Home, end: kb.End, pageUp: kb.PageUp}

func (c *chrome) mouse(event input.DispatchMouseEventType) {
	params := input.DispatchMouseEventParams{Type: event, X: c.x, Y: c.y, Buttons: c.buttons, ClickCount: 1}
	if event != chromedp.MouseMoved || c.buttons != 0 {
		params.Button = input.MouseButtonLeft
	}
	call(c.tab, input.DispatchMouseEvent, params)
}

func (c *chrome) resize(width, height int) error {
	do(c.tab, chromedp.EmulateViewport(int64(width), int64(height)))
	return nil
}

// wantEmptyConsole checks that the page has logged nothing to the console.
func (p *tab) wantEmptyConsole() {
	p.t.Helper()
	eval[bool](p, `console.log("end"); true`)
	for start := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		p.mu.Lock()
		console := slices.Clone(p.console)
		p.mu.Unlock()
		if n := len(console); n > 0 && console[n-1].Text == "end" {
			for _, message := range console[:n-1] {
				p.t.Errorf("the console shows %s %q", message.Type, message.Text)
			}
			return
		}
		if time.Since(start) > patience {
			p.t.Fatalf("the console has not logged a line within %v", patience)
		}
	}
}
