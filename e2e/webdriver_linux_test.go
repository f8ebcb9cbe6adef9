package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/gorilla/websocket"
)

// An engine is a browser with one window, controlled through a W3C protocol: Firefox
// implements WebDriver BiDi, and WebKit has a driver for classic WebDriver. The tests need
// too little of the two to justify a library.
type engine interface {
	visit(url string) error
	back() error
	eval(js string, result any) error // stores the value of an expression, or of its promise
	act(source object) error          // performs an input source's actions; both protocols have the same format
	resize(width, height int) error
}

type object = map[string]any // a JSON object

// Time after which a test gives up a command: a browser starts during its first one.
const commandPatience = 3 * patience

// engines are the engines besides Chromium. Tests reuse idle ones.
var engines = []struct {
	name  string
	start func() (engine, error)
	idle  *idleEngines
}{
	{"Firefox", startFirefox, new(idleEngines)},
	{"WebKit", startWebKit, new(idleEngines)},
}

// idleEngines are the engines of one kind in which no test runs.
type idleEngines struct {
	mu   sync.Mutex
	list []engine
}

// take returns an engine, or nil if there is none.
func (idle *idleEngines) take() (e engine) {
	idle.mu.Lock()
	defer idle.mu.Unlock()
	if n := len(idle.list); n > 0 {
		e, idle.list = idle.list[n-1], idle.list[:n-1]
	}
	return e
}

func (idle *idleEngines) put(e engine) {
	idle.mu.Lock()
	defer idle.mu.Unlock()
	idle.list = append(idle.list, e)
}

// A window is an engine's window while one test uses it.
type window struct {
	t      *testing.T
	engine engine
}

// inFirefoxAndWebKit runs a test in Firefox and in WebKit, in parallel.
func inFirefoxAndWebKit(t *testing.T, test func(t *testing.T, w *window)) {
	for _, engine := range engines {
		t.Run(engine.name, func(t *testing.T) {
			t.Parallel()
			e := engine.idle.take()
			if e == nil {
				var err error
				if e, err = engine.start(); err != nil {
					t.Fatal(err)
				}
			}
			t.Cleanup(func() { engine.idle.put(e) })
			test(t, &window{t, e})
		})
	}
}

// inAllEngines runs a test in Chromium, in a new tab, and in Firefox and WebKit.
func inAllEngines(t *testing.T, test func(t *testing.T, w *window)) {
	t.Run("Chromium", func(t *testing.T) {
		t.Parallel()
		test(t, &window{t, &chrome{tab: newTab(t)}})
	})
	inFirefoxAndWebKit(t, test)
}

// must fails the test if err is not nil.
func (w *window) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// open opens the page of the server at addr and waits until it is connected. If the page's
// script fails from then on, the test fails.
func (w *window) open(addr string) {
	w.t.Helper()
	w.must(w.engine.visit("http://" + addr + "/"))
	get[int](w, `(window.errors = [], ["error", "unhandledrejection"].map((type) =>
		addEventListener(type, (event) => errors.push(String(event.reason ?? event.message)))).length)`)
	w.t.Cleanup(func() {
		for _, message := range get[[]string](w, "window.errors ?? []") {
			w.t.Errorf("the page's script fails: %s", message)
		}
	})
	w.until(connected)
}

// get returns the value of a JavaScript expression, or of its promise; $ finds an
// element by its id.
func get[T any](w *window, js string) (result T) {
	w.t.Helper()
	w.must(w.engine.eval("(($) => "+js+")((id) => document.getElementById(id))", &result))
	return result
}

// until waits until a JavaScript expression is true.
func (w *window) until(js string) {
	w.t.Helper()
	start := time.Now()
	for checked := start; !get[bool](w, "!!("+js+")"); checked = time.Now() {
		if time.Since(start) > patience {
			w.t.Fatalf("not within %v: %s\npage:\n%.400s…", patience, js, get[string](w, "document.body.innerText"))
		}
		time.Sleep(max(pollInterval, time.Since(checked)))
	}
}

// insert inserts text into the input for the message, as a paste does.
func (w *window) insert(text string) {
	w.t.Helper()
	if !get[bool](w, fmt.Sprintf(`($("msg").focus(), document.execCommand("insertText", false, %q))`, text)) {
		w.t.Fatalf("cannot insert %q into the input", text)
	}
}

// Keys. https://www.w3.org/TR/webdriver2/#keyboard-actions
const (
	backspace = "\ue003"
	tabKey    = "\ue004"
	enter     = "\ue007"
	control   = "\ue009"
	pageUp    = "\ue00e"
	end       = "\ue010"
	home      = "\ue011"
)

func (w *window) press(key string) {
	w.t.Helper()
	w.must(w.engine.act(object{"type": "key", "id": "keyboard", "actions": []object{
		{"type": "keyDown", "value": key},
		{"type": "keyUp", "value": key},
	}}))
}

// pressWith presses a key while a modifier is down.
func (w *window) pressWith(modifier, key string) {
	w.t.Helper()
	w.must(w.engine.act(object{"type": "key", "id": "keyboard", "actions": []object{
		{"type": "keyDown", "value": modifier},
		{"type": "keyDown", "value": key},
		{"type": "keyUp", "value": key},
		{"type": "keyUp", "value": modifier},
	}}))
}

// typeText types text, a key for each character.
func (w *window) typeText(text string) {
	w.t.Helper()
	for _, char := range text {
		w.press(string(char))
	}
}

// Actions of a mouse.
var (
	pointerDown = object{"type": "pointerDown", "button": 0}
	pointerUp   = object{"type": "pointerUp", "button": 0}
)

// moveTo returns the action that moves the mouse onto an element, given as JavaScript, at
// this part of its width.
func (w *window) moveTo(element string, part float64) object {
	w.t.Helper()
	at := get[[2]int](w, fmt.Sprintf(`(({ left, top, width, height }) => [
		Math.round(left + %v * width), Math.round(top + height / 2)])(%s.getBoundingClientRect())`, part, element))
	return object{"type": "pointerMove", "x": at[0], "y": at[1]}
}

func (w *window) mouse(actions ...object) {
	w.t.Helper()
	w.must(w.engine.act(object{"type": "pointer", "id": "mouse", "parameters": object{"pointerType": "mouse"}, "actions": actions}))
}

// click clicks an element, given as JavaScript.
func (w *window) click(element string) {
	w.t.Helper()
	w.mouse(w.moveTo(element, 0.5), pointerDown, pointerUp)
}

// pretendHidden changes what the page reads as its tab's visibility. Only Chromium's protocol
// can hide a tab.
func (w *window) pretendHidden(hidden bool) {
	w.t.Helper()
	get[bool](w, fmt.Sprintf(`(Object.defineProperty(document, "hidden", { value: %v, configurable: true }),
		document.dispatchEvent(new Event("visibilitychange")))`, hidden))
}

// send inserts text and presses Enter.
func (w *window) send(text string) {
	w.t.Helper()
	w.insert(text)
	w.press(enter)
}

// scroll scrolls the log by this many pixels, and waits until the page has handled that. It
// turns no mouse wheel: WebKit scrolls on another thread than the page's, and forgets a turn of
// the wheel if the page is busy meanwhile.
func (w *window) scroll(by int) {
	w.t.Helper()
	get[bool](w, fmt.Sprintf(`new Promise((done) => {
		$("log").addEventListener("scroll", () => done(true), { once: true });
		$("log").scrollTop += %d;
	})`, by))
}

// resize resizes the window, and waits until the page has this size, except that the
// browser's own bar may take a part of the height.
func (w *window) resize(width, height int) {
	w.t.Helper()
	w.must(w.engine.resize(width, height))
	w.until(fmt.Sprintf("innerWidth == %d && innerHeight > %d", width, height-100))
}

// ends are functions that kill the launched processes.
var (
	endsMu sync.Mutex
	ends   []func()
)

// closeEngines kills the launched processes, the last one first.
func closeEngines() {
	for _, end := range slices.Backward(ends) {
		end()
	}
}

// launch starts a program, with a temporary home directory, and waits until its output
// matches pattern. It returns the pattern's group, and end, which kills the program before
// closeEngines does.
func launch(pattern string, env []string, name string, args ...string) (match string, end func(), err error) {
	home, err := os.MkdirTemp("", "engine")
	if err != nil {
		return "", nil, err
	}
	out := &output{grown: make(chan struct{}, 1)}
	cmd := exec.Command(name, args...)
	cmd.Dir = home
	cmd.Env = append(append(os.Environ(), "HOME="+home), env...)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setpgid:   true,            // so that its children can be killed with it
		Pdeathsig: syscall.SIGKILL, // in case this process dies first
	}
	if err := cmd.Start(); err != nil {
		os.RemoveAll(home)
		return "", nil, fmt.Errorf("%w\nOn Debian: apt-get install firefox-esr webkit2gtk-driver xvfb", err)
	}
	end = sync.OnceFunc(func() {
		syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		cmd.Wait()
		os.RemoveAll(home)
	})
	endsMu.Lock()
	ends = append(ends, end)
	endsMu.Unlock()
	re := regexp.MustCompile(pattern)
	timeout := time.After(commandPatience)
	for {
		if match := re.FindStringSubmatch(out.String()); match != nil {
			return match[1], end, nil
		}
		select {
		case <-out.grown:
		case <-timeout:
			return "", end, fmt.Errorf("%s printed no %q within %v, but:\n%s", name, pattern, commandPatience, out)
		}
	}
}

// Firefox implements WebDriver BiDi. https://www.w3.org/TR/webdriver-bidi/
type firefox struct {
	conn    *websocket.Conn
	id      int
	context string   // the ID of the window
	console []string // the page's console messages
}

func startFirefox() (engine, error) {
	url, _, err := launch(`WebDriver BiDi listening on (ws://\S+)\n`, nil,
		"firefox-esr", "--headless", "--remote-debugging-port=0", "--profile", ".")
	if err != nil {
		return nil, err
	}
	f := new(firefox)
	if f.conn, _, err = websocket.DefaultDialer.Dial(url+"/session", nil); err != nil {
		return nil, err
	}
	var tree struct{ Contexts []struct{ Context string } }
	if err := errors.Join(
		f.call("session.new", object{"capabilities": object{}}, nil),
		f.call("session.subscribe", object{"events": []string{"log.entryAdded"}}, nil),
		f.call("browsingContext.getTree", object{}, &tree),
	); err != nil {
		return nil, err
	}
	f.context = tree.Contexts[0].Context
	return f, nil
}

// call runs a command and waits for its result.
func (f *firefox) call(method string, params object, result any) error {
	f.id++
	f.conn.SetReadDeadline(time.Now().Add(commandPatience))
	if err := f.conn.WriteJSON(object{"id": f.id, "method": method, "params": params}); err != nil {
		return err
	}
	for {
		var response struct {
			ID             int
			Method         string
			Params         struct{ Level, Text string }
			Result         json.RawMessage
			Error, Message string
		}
		if err := f.conn.ReadJSON(&response); err != nil {
			return fmt.Errorf("%s: %w", method, err)
		}
		switch {
		case response.Method == "log.entryAdded":
			f.console = append(f.console, response.Params.Level+": "+response.Params.Text)
		case response.ID != f.id:
		case response.Error != "":
			return fmt.Errorf("%s: %s: %s", method, response.Error, response.Message)
		case result != nil:
			return json.Unmarshal(response.Result, result)
		default:
			return nil
		}
	}
}

func (f *firefox) visit(url string) error {
	return f.call("browsingContext.navigate", object{"context": f.context, "url": url, "wait": "complete"}, nil)
}

func (f *firefox) back() error {
	return f.call("browsingContext.traverseHistory", object{"context": f.context, "delta": -1}, nil)
}

func (f *firefox) eval(js string, result any) error {
	var response struct {
		Result           struct{ Value string }
		ExceptionDetails *struct{ Text string }
	}
	if err := f.call("script.evaluate", object{
		"expression":   "(async () => JSON.stringify(await (" + js + ")))()",
		"awaitPromise": true,
		"target":       object{"context": f.context},
	}, &response); err != nil {
		return err
	}
	if e := response.ExceptionDetails; e != nil {
		return errors.New(e.Text)
	}
	return json.Unmarshal([]byte(response.Result.Value), result)
}

func (f *firefox) act(source object) error {
	return f.call("input.performActions", object{"context": f.context, "actions": []object{source}}, nil)
}

func (f *firefox) resize(width, height int) error {
	return f.call("browsingContext.setViewport", object{
		"context": f.context, "viewport": object{"width": width, "height": height},
	}, nil)
}

// WebKit's driver implements WebDriver. https://www.w3.org/TR/webdriver2/
type webkit struct {
	display string // number
	session string // URL
}

func startWebKit() (engine, error) {
	// WebKitGTK needs a display.
	display, _, err := launch(`(\d+)\n`, nil, "Xvfb", "-displayfd", "1", "-nolisten", "tcp", "-screen", "0", "1280x1024x24")
	if err != nil {
		return nil, err
	}
	// The driver does not report when it listens, and cannot choose a free port itself.
	listener, err := net.Listen("tcp", ownHost("localhost:0"))
	if err != nil {
		return nil, err
	}
	listener.Close()
	host, port, _ := net.SplitHostPort(listener.Addr().String())
	if _, _, err := launch("()", []string{"DISPLAY=:" + display}, "WebKitWebDriver", "--host="+host, "--port="+port); err != nil {
		return nil, err
	}
	w := &webkit{display: display, session: "http://" + host + ":" + port + "/session"}
	var session struct{ SessionID string }
	for start := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		err := w.call("", object{"capabilities": object{}}, &session)
		if err == nil {
			break
		}
		if !errors.Is(err, syscall.ECONNREFUSED) || time.Since(start) > patience {
			return nil, err
		}
	}
	w.session += "/" + session.SessionID
	return w, nil
}

// call runs a command and waits for its result.
func (w *webkit) call(command string, params object, result any) error {
	body, err := json.Marshal(params)
	if err != nil {
		return err
	}
	client := http.Client{Timeout: commandPatience}
	response, err := client.Post(w.session+command, "application/json", bytes.NewReader(body))
	if err != nil {
		return err
	}
	defer response.Body.Close()
	answer, err := io.ReadAll(response.Body)
	if err != nil {
		return err
	}
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", command, answer)
	}
	return json.Unmarshal(answer, &struct{ Value any }{result})
}

func (w *webkit) visit(url string) error {
	return w.call("/url", object{"url": url}, nil)
}

func (w *webkit) back() error {
	return w.call("/back", object{}, nil)
}

func (w *webkit) eval(js string, result any) error {
	return w.call("/execute/sync", object{"script": "return (" + js + ")", "args": []any{}}, result)
}

func (w *webkit) act(source object) error {
	return w.call("/actions", object{"actions": []object{source}}, nil)
}

func (w *webkit) resize(width, height int) error {
	return w.call("/window/rect", object{"width": width, "height": height}, nil)
}
