package e2e

import (
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"
)

// enterRoom logs in on the page that p shows, or at / of a server, and waits until
// the room's page is connected.
func (p *tab) enterRoom(name, room string) {
	p.t.Helper()
	p.until(`document.querySelector("[name=room]")`)
	p.insert(name)
	p.press(kb.Tab)
	p.insert(room)
	p.press(kb.Enter)
	p.until(`$("status")?.textContent == "Connected"`)
}

// In rooms/: two people in one room, a third in another, a kick, and a restart.
func TestPeopleMeetInTheRoomsOfTheExample(t *testing.T) {
	t.Parallel()
	program := filepath.Join(t.TempDir(), "rooms")
	build := exec.Command("go", "build", "-o", program, ".")
	build.Dir = "../rooms"
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	s := startCommand(t, exec.Command(program, "-addr", "127.0.0.1:0"))
	var tabs []*tab
	for _, who := range [][2]string{{"Grete", "kitchen"}, {"Hans", "kitchen"}, {"Uwe", "garden"}} {
		p := newTab(t)
		do(p, chromedp.Navigate("http://"+s.addr+"/"))
		p.enterRoom(who[0], who[1])
		tabs = append(tabs, p)
	}
	grete, hans, uwe := tabs[0], tabs[1], tabs[2]

	// Names are set off, and what is mine is known as mine when it comes back.
	hans.send("<b>dinner</b>: in the kitchen")
	grete.until(`batch.childElementCount == 0 && $("log").textContent.includes("dinner")`)
	grete.send("/to hans bring wine")
	grete.wantLog("message: * Grete has come.", "message: * Grete is here.", "message: * Hans has come.",
		"message: Hans: <b>dinner</b>: in the kitchen", "message mine: Grete: /to hans bring wine")
	hans.until(`$("log").textContent.includes("wine")`)
	if got := eval[string](hans, `[...document.querySelectorAll("#log b")].map((b) => b.textContent).join()`); got != "Hans,Grete" {
		t.Errorf("the names %q are set off, want Hans and Grete", got)
	}
	if got := eval[string](hans, `[...document.querySelectorAll("#log .mine")].map((line) => line.lastChild.textContent).join()`); got != "Hans: <b>dinner</b>: in the kitchen" {
		t.Errorf("Hans has said %q", got)
	}
	uwe.wantLog("message: * Uwe has come.", "message: * Uwe is here.")

	// A reload hears what was said, and is told so.
	do(hans, chromedp.Reload())
	hans.until(`$("status")?.textContent == "Connected" && $("log").textContent.includes("dinner")`)

	// Who is sent away stays away, and reads why.
	grete.send("/kick Hans")
	hans.until(`$("status").textContent.startsWith("Disconnected: you have been sent away from this room.")`)
	hans.until(`socket === null`)
	do(hans, chromedp.Reload())
	hans.until(`$("status")?.textContent.startsWith("Disconnected: you have been sent away from this room.")`)

	// After a restart nobody is known any more: the page leads to the form.
	addr := s.addr
	s.stop(t)
	startCommand(t, exec.Command(program, "-addr", addr))
	grete.until(`document.querySelector("[name=name]")`)
	grete.enterRoom("Grete", "kitchen")
	if got := eval[string](grete, `$("name").textContent + " in " + document.querySelector("h1").textContent`); got != "Grete in kitchen" {
		t.Errorf("the page says %q", got)
	}
}
