package e2e

import (
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"
	"github.com/gorilla/websocket"
)

// enterRoom logs in with the form that p shows, and waits until the room's page is
// connected.
func (p *tab) enterRoom(name, room string) {
	p.t.Helper()
	p.until(`document.querySelector("[name=room]")`)
	p.insert(name)
	p.press(kb.Tab)
	p.insert(room)
	p.press(kb.Enter)
	p.until(`$("status")?.textContent == "Connected"`)
}

// buildRooms returns the path of the program in rooms/, which it builds once.
func buildRooms(t *testing.T) string {
	t.Helper()
	program, err := builtRooms()
	if err != nil {
		t.Fatal(err)
	}
	return program
}

var builtRooms = sync.OnceValues(func() (string, error) {
	program := binary + "-rooms"
	build := exec.Command("go", "build", "-o", program, ".")
	build.Dir = "../rooms"
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build: %w\n%s", err, out)
	}
	return program, nil
})

// Two users are in one room, and a third in another.
func TestUsersChatInRoomsAcrossReconnectsKicksAndRestarts(t *testing.T) {
	t.Parallel()
	program, file := buildRooms(t), filepath.Join(t.TempDir(), "rooms.db")
	s := startCommand(t, exec.Command(program, "-addr", "127.0.0.1:0", "-db", file))
	var tabs []*tab
	for _, login := range [][2]string{{"Grete", "kitchen"}, {"Hans", "kitchen"}, {"Uwe", "garden"}} {
		p := newTab(t)
		do(p, chromedp.Navigate("http://"+s.addr+"/"))
		p.enterRoom(login[0], login[1])
		tabs = append(tabs, p)
	}
	grete, hans, uwe := tabs[0], tabs[1], tabs[2]

	// Senders' names are bold, and the page recognizes its own messages when the server sends
	// them back.
	hans.send("<b>dinner</b>: in the kitchen")
	grete.until(`batch.childElementCount == 0 && $("log").textContent.includes("dinner")`)
	grete.send("/to hans bring wine")
	grete.send("/tp Hans hush")
	grete.wantLog("presence: \u2068Grete\u2069 joined", "presence: In this room: \u2068Grete\u2069.", "presence: \u2068Hans\u2069 joined",
		"message: Hans: <b>dinner</b>: in the kitchen", "message mine: \u2068Grete\u2069 to \u2068Hans\u2069 (private): bring wine",
		"notice: \u2068/tp Hans hush\u2069: Unknown command. There are /to NAME text, /kick NAME and /allow NAME.")
	hans.until(`$("log").textContent.includes("wine")`)
	if got := eval[string](hans, `[...document.querySelectorAll("#log b")].map((b) => b.textContent).join()`); got != "Hans,\u2068Grete\u2069 to \u2068Hans\u2069 (private)" {
		t.Errorf("the names %q are bold, want Hans, and Grete to Hans", got)
	}
	// The direction of a name does not affect the text around it.
	if got := eval[string](hans, `[...document.querySelectorAll("#log .presence, #log b")].map((e) => e.dir).join()`); got != "ltr,ltr,auto,ltr" {
		t.Errorf("notices and names have the directions %q, want %q", got, "ltr,ltr,auto,ltr")
	}
	uwe.wantLog("presence: \u2068Uwe\u2069 joined", "presence: In this room: \u2068Uwe\u2069.")
	if got := eval[string](uwe, `document.title + ", " + $("log").ariaLive`); got != "garden, off" && got != "garden, polite" {
		t.Errorf("the page has the title and the live region %q, want the room's name", got)
	}

	// After each reconnect, the log has each line once, and only messages count as unread.
	lines := []string{"presence: \u2068Hans\u2069 joined", "presence: In this room: \u2068Grete\u2069, \u2068Hans\u2069.",
		"message mine: Hans: <b>dinner</b>: in the kitchen", "message: \u2068Grete\u2069 to \u2068Hans\u2069 (private): bring wine"}
	hans.wantLog(lines...)
	eval[bool](hans, `Object.defineProperty(document, "hidden", {get: () => true, configurable: true}); marker = document.createElement("div"); true`)
	for n := range 3 {
		eval[bool](hans, `reconnectLater(); true`)
		missed := fmt.Sprint("missed ", n)
		grete.send(missed)
		grete.until(`!document.querySelector(".pending")`)
		eval[bool](hans, `connectNow(); true`)
		hans.until(fmt.Sprintf(`$("log").textContent.includes(%q)`, missed))
	}
	ursel := newTab(t)
	do(ursel, chromedp.Navigate("http://"+s.addr+"/"))
	ursel.enterRoom("Ursel", "kitchen")
	grete.until(`$("log").textContent.includes("Ursel\u2069 joined")`)
	hans.until(`$("log").textContent.includes("Ursel\u2069 joined") || batch.textContent.includes("Ursel\u2069 joined")`)
	if got := eval[string](hans, `document.title`); got != "(3) kitchen" {
		t.Errorf("title %q, want 3 unread messages", got)
	}
	for _, text := range []string{"dinner", "wine", "missed 0", "missed 1", "missed 2", "Hans\u2069 joined"} {
		if n := eval[int](hans, fmt.Sprintf(`$("log").textContent.split(%q).length - 1`, text)); n != 1 {
			t.Errorf("the log has %q %d times, want once", text, n)
		}
	}
	if eval[bool](hans, `$("log").textContent.includes("may have missed")`) {
		t.Error("the log has a notice that messages may have been missed")
	}
	eval[bool](hans, `delete document.hidden; true`)

	// After a reload, the page gets the history. It shows the undelivered message, although the
	// history has an earlier one with the same text.
	eval[bool](hans, `showPending("<b>dinner</b>: in the kitchen"); true`)
	do(hans, chromedp.Reload())
	hans.until(`$("status")?.textContent == "Connected" && $("log").textContent.includes("missed 2") && $("log").lastChild.textContent.includes("This may not have been delivered: <b>dinner")`)

	// The page shows the user's name.
	if got := eval[string](hans, `$("name").value`); got != "Hans" {
		t.Errorf("the page shows the name %q, want Hans", got)
	}

	// Drafts and undelivered messages stay in their room.
	eval[bool](hans, `showPending("for the kitchen"); msg.value = "a draft"; changed(msg); true`)
	room := func(name string) {
		do(hans, chromedp.Navigate("http://"+s.addr+"/room/"+name+"/"))
		hans.until(`$("status")?.textContent == "Connected" && batch.childElementCount == 0`)
	}
	room("garden")
	if got := eval[string](hans, `msg.value + $("log").textContent`); strings.Contains(got, "draft") || strings.Contains(got, "for the kitchen") {
		t.Errorf("in the garden, draft and log are %q, want nothing from the kitchen", got)
	}
	hans.send("weeds")
	hans.until(`$("log").textContent.includes("Hans: weeds")`)
	room("kitchen")
	if got := eval[string](hans, `msg.value + ", " + $("log").textContent`); !strings.HasPrefix(got, "a draft, ") || !strings.Contains(got, "This may not have been delivered: for the kitchen") {
		t.Errorf("back in the kitchen, draft and log are %q, want the draft and the undelivered message", got)
	}

	// The page of a kicked user shows the reason, takes no input, and does not reconnect. A
	// reload leads to the form. When the host has allowed the user, the form leads back.
	const kicked = `$("status").textContent == "Disconnected: you were removed from this room. Reload to try again." && state == "ended" && $("msg").disabled`
	grete.send("/kick Hans")
	hans.until(kicked)
	eval[bool](hans, `connectNow(); document.dispatchEvent(new Event("visibilitychange")); dispatchEvent(new Event("online")); true`)
	hans.until(kicked + ` && !$("log").textContent.includes("Reconnected")`)
	do(hans, chromedp.Reload())
	hans.until(`$("reason")?.textContent == "You cannot join: you were removed from this room." && document.querySelector("[name=room]").value == "kitchen"`)
	grete.send("/allow Hans")
	grete.until(`$("log").textContent.includes("/allow Hans\u2069: Done.")`)
	eval[bool](hans, `document.querySelector("form button").focus(); true`)
	hans.press(kb.Enter)
	hans.until(`$("status")?.textContent == "Connected"`)

	// After a restart, the page reconnects, and the log has each line once, the undelivered
	// message included.
	eval[bool](grete, `showPending("last words"); msg.value = "a draft"; changed(msg); true`)
	addr := s.addr
	s.stop(t)
	s = startCommand(t, exec.Command(program, "-addr", addr, "-db", file))
	grete.until(`$("status").textContent == "Connected" && $("log").textContent.includes("Reconnected.") && batch.childElementCount == 0`)
	eval[bool](grete, `send("and on")`)
	grete.until(`$("log").textContent.includes("Grete: and on")`)
	for _, text := range []string{"dinner", "wine", "missed 0", "and on", "last words"} {
		if n := eval[int](grete, fmt.Sprintf(`[...document.querySelectorAll("#log .words")].filter((e) => e.textContent.includes(%q)).length`, text)); n != 1 {
			t.Errorf("after the restart, the log has %q %d times, want once", text, n)
		}
	}
	if eval[bool](grete, `$("log").textContent.includes("may have missed") || msg.value != "a draft"`) {
		t.Error("after the restart, the log has a notice that messages may have been missed, or the draft is lost")
	}

	// With a new database, the server knows no cookie. The page redirects to the login form,
	// which fits a phone and shows no error. Drafts and undelivered messages are kept.
	do(grete, chromedp.EmulateViewport(360, 640))
	s.stop(t)
	startCommand(t, exec.Command(program, "-addr", addr, "-db", file+"2"))
	grete.until(`document.querySelector("[name=name]")`)
	if !eval[bool](grete, `document.documentElement.scrollWidth <= innerWidth && [...document.querySelectorAll("input, button")].every((e) => e.getBoundingClientRect().height >= 30)`) {
		t.Error("the form does not fit a phone")
	}
	if got := eval[string](grete, `document.querySelector("[role=status]").textContent + getComputedStyle(document.querySelector("[role=status]")).borderLeftWidth + document.querySelector("button").textContent`); got != "Choose a name and a room.0pxJoin" {
		t.Errorf("the form has the status, border and button %q, want no error", got)
	}
	if got := eval[string](grete, `getComputedStyle(document.querySelector("button")).backgroundColor + $("rules").textContent`); !strings.HasPrefix(got, "rgb(11, 92, 173)Each is one word") {
		t.Errorf("the form's button and rules are %q, want the chat's accent", got)
	}
	grete.enterRoom("Grete ", "Kitchen ")
	if got := eval[string](grete, `$("name").textContent + " in " + document.querySelector("h1").textContent`); got != "Grete in kitchen" {
		t.Errorf("name and room are %q, want Grete in kitchen", got)
	}
	grete.until(`batch.childElementCount == 0`)
	if got := eval[string](grete, `msg.value + ", " + $("log").textContent`); !strings.HasPrefix(got, "a draft, ") || !strings.Contains(got, "This may not have been delivered: last words") {
		t.Errorf("with the new database, draft and log are %q, want the draft and the undelivered message", got)
	}
}

// A browser is one user at a time. Who logs out leaves nothing in it, and no tab as that user.
func TestLoggingOutLeavesNothingInTheBrowser(t *testing.T) {
	t.Parallel()
	s := startCommand(t, exec.Command(buildRooms(t), "-addr", "127.0.0.1:0", "-db", filepath.Join(t.TempDir(), "rooms.db")))
	login := func(name string) *tab {
		p := newTab(t)
		do(p, chromedp.Navigate("http://"+s.addr+"/"))
		p.enterRoom(name, "kitchen")
		return p
	}
	hans, grete := login("Hans"), login("Grete")
	hans.send("/to Grete for you alone")
	grete.until(`$("log").textContent.includes("for you alone")`)
	draft := func() { eval[bool](grete, `msg.value = "a draft"; changed(msg); showPending("/to Hans me too"); true`) }
	isForm := `location.pathname == "/" && document.querySelector("[name=room]")`

	// In this tab.
	draft()
	eval[bool](grete, `document.querySelector("header button").focus(); true`)
	grete.press(kb.Enter)
	grete.until(isForm + ` && sessionStorage.length == 0`)
	hans.until(`$("log").textContent.includes("Grete\u2069 left")`) // at once

	// In another tab, in which another user logs in.
	eval[bool](grete, `document.querySelector("[name=name]").value = ""; document.querySelector("[name=name]").focus(); true`)
	grete.enterRoom("Grete", "kitchen")
	draft()
	eval[bool](grete, `fetch("/", { method: "POST", body: new URLSearchParams({ name: "Ursel", room: "garden" }) }); true`)
	grete.until(isForm)
	do(grete, chromedp.Navigate("http://"+s.addr+"/room/kitchen/"))
	grete.until(`$("status")?.textContent == "Connected" && $("log").textContent.includes("Ursel\u2069 joined")`)
	if got := eval[string](grete, `$("name").textContent + ", " + msg.value + ", " + $("log").textContent`); !strings.HasPrefix(got, "Ursel, , ") || strings.Contains(got, "for you alone") || strings.Contains(got, "me too") {
		t.Errorf("the next user's page shows %q, want nothing of the user before", got)
	}

	// Lines that arrive as the user logs out are not stored, and a browser that returns to the
	// page from its back/forward cache shows none of it.
	if got := eval[int](grete, `window.isBefore = true; forgetUser(); dispatchEvent(new Event("pagehide")); flush(); sessionStorage.length`); got != 0 {
		t.Errorf("a page that is left after logging out stores %d items, want none", got)
	}
	eval[bool](grete, `dispatchEvent(new Event("pageshow"))`)
	grete.until(`!window.isBefore && $("status")?.textContent == "Connected"`)
}

// The history is not read aloud at each load, but what comes then is.
func TestScreenReadersDoNotReadTheHistoryOfARoom(t *testing.T) {
	t.Parallel()
	s := startCommand(t, exec.Command(buildRooms(t), "-addr", "127.0.0.1:0", "-db", filepath.Join(t.TempDir(), "rooms.db")))
	p := newTab(t)
	do(p, chromedp.Navigate("http://"+s.addr+"/"))
	p.enterRoom("Grete", "kitchen")
	for n := range 40 {
		p.send(fmt.Sprint("message ", n, strings.Repeat(" x", 200)))
	}
	p.until(`$("log").textContent.includes("message 39") && !document.querySelector(".pending")`)
	p.beforePage(`addEventListener("DOMContentLoaded", () => {
		window.heard = [];
		new MutationObserver((changes) => {
			if (log.getAttribute("aria-live") === "polite") heard.push(...changes.flatMap((change) => [...change.addedNodes]));
		}).observe(log, { childList: true });
	})`)
	do(p, chromedp.Reload())
	p.until(`$("log")?.getAttribute("aria-live") == "polite"`)
	if got := eval[string](p, `[$("log").textContent.includes("message 39"), $("log").lastChild.textContent, heard.length].join()`); got != "true,In this room: \u2068Grete\u2069.,0" {
		t.Errorf("after a reload: %q, want the history, the users below it, and nothing read aloud", got)
	}
	p.send("hello")
	p.until(`heard.some((line) => line.textContent.includes("hello") && !line.matches(".pending"))`)
}

func TestRoomsPageDistinguishesAMissingLoginAFullRoomAndTooManyRooms(t *testing.T) {
	t.Parallel()
	s := startCommand(t, exec.Command(buildRooms(t), "-addr", "127.0.0.1:0", "-db", filepath.Join(t.TempDir(), "rooms.db")))
	join := func(name, room string) {
		t.Helper()
		client := &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
		request, _ := http.NewRequest("POST", "http://"+s.addr+"/", strings.NewReader(url.Values{"name": {name}, "room": {room}}.Encode()))
		request.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		_, port, _ := net.SplitHostPort(s.addr)
		request.Header.Set("Cookie", "chat"+port+"=") // which the form has set
		response, err := client.Do(request)
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
		conn, _, err := websocket.DefaultDialer.Dial("ws://"+s.addr+"/room/"+room+"/ws", http.Header{"Cookie": {response.Header.Get("Set-Cookie")}})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
	}
	for n := range 100 {
		join(fmt.Sprint("User-", n), "crowd")
	}
	for n := range 99 {
		join("Hans", fmt.Sprint("room", n))
	}

	// form returns the login form's status, the width of its border, which marks an error, and
	// the room.
	form := func(p *tab) string {
		t.Helper()
		p.until(`document.querySelector("[name=name]")`)
		return eval[string](p, `(() => {
			const status = document.querySelector("[role=status]");
			return [status.textContent, getComputedStyle(status).borderLeftWidth, document.querySelector("[name=room]").value].join(", ");
		})()`)
	}
	p := newTab(t)
	do(p, chromedp.Navigate("http://"+s.addr+"/room/crowd/"))
	if got := form(p); got != "Choose a name and a room., 0px, crowd" {
		t.Errorf("without a login, the form has %q, want no error", got)
	}
	p.insert("Grete")
	p.press(kb.Enter)
	p.until(`$("reason")?.textContent == "You cannot join: this room is full."`)
	if got := form(p); got != "You cannot join: this room is full., 4px, crowd" {
		t.Errorf("for a full room, the form has %q, want the error and the room", got)
	}
	do(p, chromedp.Navigate("http://"+s.addr+"/room/onemore/"))
	if got := form(p); got != "The server has too many open rooms., 4px, onemore" {
		t.Errorf("for one room too many, the form has %q, want the error", got)
	}
}
