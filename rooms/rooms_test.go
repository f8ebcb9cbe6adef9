package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"html"
	"io"
	"log"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/cookiejar"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"github.com/gorilla/securecookie"
	"github.com/gorilla/websocket"
	"go.mau.fi/util/confusable"
)

// The copy of client.go keeps serveWs, although rooms serve clients whose fields they set.
var _ = serveWs

// The attacks come first, then tests in the order of README.md, then the helpers.

// Attacks: a line right after the handshake, which reaches run before or while run refuses
// its client.

func TestRefusedClientCannotSend(t *testing.T) {
	tries := 2000
	if testing.Short() {
		tries = 200
	}
	for _, procs := range []int{runtime.NumCPU(), 1} {
		t.Run(fmt.Sprint("GOMAXPROCS=", procs), func(t *testing.T) {
			defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(procs))
			w := startTCP(t)
			grete, hans := w.join("Grete", "kitchen"), w.join("Hans", "kitchen")
			kicked := w.logIn("Mallory")
			mallory := w.dial(kicked, "kitchen")
			hans.until("join Mallory")
			grete.send("/kick Mallory")
			mallory.wantClose(errKicked)
			hans.until("leave Mallory: kicked by Grete")
			for _, attack := range []struct {
				name, cookie, line string
				want               *websocket.CloseError
			}{
				{"crash the server", kicked, "/x", errKicked},
				{"send although kicked", kicked, "I am still here", errKicked},
				{"send as another user", w.logIn("Grete"), "I resign", errNameTaken},
				{"kick as the owner", w.logIn("Grete"), "/kick Hans", errNameTaken},
			} {
				for range tries {
					p := w.dialAndSend(attack.cookie, "kitchen", attack.line)
					if lines := p.wantClose(attack.want); lines != nil {
						t.Errorf("%s: the attacker receives %q", attack.name, lines)
					}
					p.Close()
					if t.Failed() {
						return
					}
				}
				grete.send("and on")
				for _, p := range []*peer{grete, hans} {
					if lines := p.until("message Grete: and on"); attack.line != "/x" &&
						!slices.Equal(lines, []string{"message Grete: and on"}) {
						t.Errorf("%s: a user receives %q", attack.name, lines)
					}
				}
			}
		})
	}
}

// What an application sends to broadcast is the server's own, whatever it contains.
func TestBroadcastIsTheServersOwnMessage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		grete := w.join("Grete", "kitchen")
		grete.received()
		for _, text := range []string{"Dinner is ready.", "Grete: I resign", "/kick Grete", ": ", "",
			"\x00\xff\n{", strings.Repeat("<", 600)} {
			w.room("kitchen").broadcast <- []byte(text)
			lines := grete.receivedLines()
			if len(lines) != 1 || lines[0].Kind != "message" || lines[0].User != "" ||
				lines[0].Text != strings.ToValidUTF8(text, "\ufffd") {
				t.Errorf("of %q a user receives %+v", text, lines)
			}
		}
	})
}

// Logins, logouts, kicks and returns at the same time leave no user without its name, no name
// without its user, and no client of a user that has gone.
func TestRoomsStayConsistentWhileUsersComeAndGo(t *testing.T) { repeat(t, testUsersComeAndGo) }

func testUsersComeAndGo(t *testing.T) {
	w := startTCP(t)
	owner := w.logIn("Grete")
	grete := w.dial(owner, "kitchen")
	grete.until("join Grete")
	names := []string{"Gretel", "GreteI", "gretel", "Hans", "HANS", "H\u0430ns", "Uwe", "Ursel"}
	var writing sync.Mutex
	command := func(line string) {
		writing.Lock()
		defer writing.Unlock()
		grete.send(line)
	}
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			var cookie string
			for range 60 {
				switch name := names[rand.N(len(names))]; rand.N(8) {
				case 0, 1:
					cookie = w.logInAs(t, name, cookie)
				case 2:
					w.logOutAs(cookie)
				case 3:
					w.get(cookie, "/room/kitchen/")
				case 4:
					command("/kick " + name)
				case 5:
					command("/allow " + name)
				case 6:
					if p, _, _ := w.try(cookie, "kitchen"); p != nil {
						p.WriteMessage(websocket.TextMessage, []byte("/kick Hans"))
						p.Close()
					}
				case 7:
					if p, _, _ := w.try(cookie, "kitchen"); p != nil {
						defer p.Close()
						p.WriteMessage(websocket.TextMessage, []byte("/allow "+name))
					}
				}
			}
		})
	}
	all.Wait()
	grete.send("over")
	grete.until("message Grete: over")
	hub := w.room("kitchen")
	hub.do(func() {
		if len(hub.present) != len(hub.users) || hub.host().Name != "Grete" {
			t.Errorf("the room has %d users, the host %s, and %q",
				len(hub.users), hub.host().Name, hub.present)
		}
		for _, identity := range hub.present {
			user := hub.users[identity.ID]
			isKicked := slices.ContainsFunc(hub.kicks, func(k Kick) bool { return k.ID == identity.ID })
			if user == nil || hub.find(alike(user.Name)) != user || isKicked {
				t.Errorf("%v is present, and the user is %v", identity, user)
			}
		}
		for client := range hub.clients {
			if client.user == nil || hub.users[client.user.ID] != client.user ||
				!slices.Contains(client.user.clients, client) {
				t.Errorf("the client of %v belongs to nobody in the room", client.request.Identity)
			}
		}
	})
}

// Whatever two names consist of, they share a room only if UTS 39 tells them apart, and each is
// taken for itself.
func TestRoomHoldsNoConfusableNames(t *testing.T) { repeat(t, testConfusableNames) }

func testConfusableNames(t *testing.T) {
	letters := []string{"I", "l", "1", "L", "i", "ı", "İ", "O", "0", "o", "о", "О", "m", "rn", "M",
		"ß", "ss", "ẞ", "é", "e\u0301", "e", "ſ", "s", "S", "K", "k", "К", "w", "vv", "ω", "σ", "ς",
		"-", "_"}
	hub := &Hub{Room: Room{users: make(map[string]*User)}}
	for range 3000 {
		var text strings.Builder
		for range 1 + rand.N(4) {
			text.WriteString(letters[rand.N(len(letters))])
		}
		name := parseName(text.String())
		if name == "" || hub.find(alike(name)) != nil {
			continue
		}
		for _, other := range hub.users {
			if confusable.Confusable(other.Name, name) || strings.EqualFold(other.Name, name) {
				t.Fatalf("%q and %q are in one room", other.Name, name)
			}
		}
		identity := Identity{ID: fmt.Sprint(rand.Uint64()), Name: name}
		hub.present = append(hub.present, identity)
		user := hub.add(identity)
		if got := hub.find(alike(name)); got != user {
			t.Fatalf("%q is taken for %v", name, got)
		}
		if len(hub.users) > 20 {
			i := rand.N(len(hub.present))
			delete(hub.users, hub.present[i].ID)
			hub.present = slices.Delete(hub.present, i, i+1)
		}
	}
}

// Lines.

func TestLinesHaveTheirRoomsNumbersAndTheServersTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		grete := w.join("Grete", "kitchen")
		w.join("Uwe", "garden").send("weeds")
		grete.received()
		grete.send("one")
		time.Sleep(time.Minute)
		grete.send(`<b>"two"</b>`)
		grete.received()
		hans := w.join("Hans", "kitchen")
		time.Sleep(time.Minute)
		start := time.Now().Add(-2 * time.Minute)
		want := []Line{
			{N: 1, Time: start, Kind: "message", User: "Grete", Text: "one"},
			{N: 2, Time: start.Add(time.Minute), Kind: "message", User: "Grete", Text: `<b>"two"</b>`},
			{Time: start.Add(time.Minute), Kind: "join", User: "Hans"},
		}
		got := hans.receivedLines()
		for i := range got {
			got[i].Time = got[i].Time.Local()
		}
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("Hans receives %v, want %v", got, want)
		}
		if hans.welcome.User != "Hans" || fmt.Sprint(hans.welcome.Users) != "[Grete Hans]" ||
			hans.welcome.RoomID == "" {
			t.Errorf("Hans is told %+v", hans.welcome)
		}
	})
}

// A client that reconnects names the last line that it has.
func TestReconnectReceivesWhatItMissedOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		grete, uwe := w.join("Grete", "kitchen"), w.join("Uwe", "kitchen")
		cookie := w.logIn("Hans")
		hans := w.dial(cookie, "kitchen")
		hans.received()
		for n := range 100 {
			hans.Close()
			var want []string
			for i := range n {
				text := fmt.Sprintf("break %d, line %d", n, i)
				switch i % 3 {
				case 0:
					grete.send(text)
					want = append(want, "message Grete: "+text)
				case 1:
					grete.send("/to Hans " + text)
					want = append(want, "private Grete > Hans: "+text)
				case 2:
					grete.send("/to Uwe " + text)
					want = append(want, "private Grete > Uwe: "+text)
				}
				synctest.Wait()
				time.Sleep(rateInterval)
			}
			uwe.received()
			want = slices.DeleteFunc(want, func(line string) bool {
				return strings.HasPrefix(line,
					"private Grete > Uwe")
			})
			back := w.reconnect(cookie, "kitchen", hans)
			if got := back.received(); !slices.Equal(got, want) {
				t.Errorf("after break %d Hans receives %q, want %q", n, got, want)
			}
			if back.welcome.Missed || back.last < hans.last {
				t.Errorf("after disconnect %d the welcome is %+v", n, back.welcome)
			}
			hans = back
		}
		if lines := uwe.received(); lines != nil {
			t.Errorf("Uwe receives %q of it", lines)
		}
		grete.received()
	})
}

func TestWelcomeSaysMissedIfTheHistoryNoLongerReachesBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		grete := w.join("Grete", "kitchen")
		cookie := w.logIn("Hans")
		for _, command := range []string{"", "/to Hans "} {
			for _, lines := range []int{historySize, historySize + 1} {
				hans := w.dial(cookie, "kitchen")
				hans.received()
				hans.leave()
				for n := range lines {
					grete.send(fmt.Sprint(command, n))
					synctest.Wait()
					time.Sleep(rateInterval)
				}
				back := w.reconnect(cookie, "kitchen", hans)
				got := back.received()
				if missed := lines > historySize; len(got) != historySize || back.welcome.Missed != missed {
					t.Errorf("after %d lines %q, Hans receives %d, and missed is %v", lines, command, len(got),
						back.welcome.Missed)
				}
				back.leave()
			}
		}
	})
}

func TestNumbersOfADeletedRoomMeanNothingInTheNext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		cookie := w.logIn("Hans")
		hans := w.dial(cookie, "kitchen")
		hans.send("breakfast")
		hans.send("lunch")
		hans.received()
		hans.leave()
		time.Sleep(keepTime + deleteInterval + time.Hour)
		cookie = w.logIn("Hans") // as the old cookie has expired
		grete := w.join("Grete", "kitchen")
		grete.send("dinner")
		grete.received()
		back := w.reconnect(cookie, "kitchen", hans)
		back.want("message Grete: dinner", "join Hans")
		if back.welcome.Missed {
			t.Error("Hans is told that he missed something here")
		}
		if back.welcome.RoomID == hans.welcome.RoomID {
			t.Error("both rooms say that they are one")
		}
		for _, query := range []string{"?after=x", "?after=-1", "?after=99999999999999999999",
			"?room=x&after=1", "?after=" + fmt.Sprint(back.last)} {
			p := w.dial(cookie, "kitchen", query)
			p.want("message Grete: dinner")
			p.leave()
		}
	})
}

// Private messages do not displace the history, or any user could empty it.
func TestPrivateMessagesDoNotDisplaceTheHistory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		grete := w.join("Grete", "kitchen")
		grete.send("dinner")
		for range 2 * historySize {
			grete.send("/to Grete x")
			grete.send("/x")
			grete.received()
			time.Sleep(2 * rateInterval)
		}
		w.join("Hans", "kitchen").want("message Grete: dinner", "join Hans")
	})
}

// A queue holds the whole history, and more that is sent meanwhile.
func TestQueueHoldsTheWholeHistory(t *testing.T) {
	if waits := 1 + 2*historySize; waits > sendQueueSize*4/5 {
		t.Errorf("up to %d lines are queued for a client that joins, and the queue holds %d", waits,
			sendQueueSize)
	}
}

// Rooms.

func TestClosedRoomKeepsItsHistoryHostAndKicksForThirtyDays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		cookie, mallory := w.logIn("Grete"), w.logIn("Mallory")
		grete := w.dial(cookie, "kitchen")
		w.dial(mallory, "kitchen")
		grete.send("dinner")
		grete.send("/to Grete a note")
		grete.send("/kick Mallory")
		grete.received()
		for _, away := range []time.Duration{0, awayTime - time.Second, awayTime + time.Second, roomLife,
			2 * roomLife, keepTime * 2 / 3} {
			grete.leave()
			time.Sleep(away)
			if away > awayTime+roomLife {
				w.wantRooms()
			}
			if lines := w.dial(mallory, "kitchen").wantClose(errKicked); lines != nil {
				t.Errorf("Mallory receives %q", lines)
			}
			uwe := w.join("Uwe", "kitchen")
			back := w.reconnect(cookie, "kitchen", grete)
			if got := back.received(); slices.Contains(got, "message Grete: dinner") || back.welcome.Missed {
				t.Errorf("after %v Grete receives %q, welcome %+v", away, got, back.welcome)
			}
			back.leave()
			grete = w.dial(cookie, "kitchen")
			if got := grete.received(); !slices.Contains(got, "message Grete: dinner") ||
				!slices.Contains(got, "private Grete > Grete: a note") {
				t.Errorf("after %v Grete receives %q", away, got)
			}
			grete.send("/kick Uwe")
			uwe.wantClose(errKicked) // for Grete is still the host
			grete.received()
		}
		grete.leave()
		time.Sleep(keepTime + deleteInterval + time.Hour)
		w.join("Uwe", "kitchen").want("join Uwe")
	})
}

// A room is also used while its users send nothing.
func TestPresenceKeepsTheRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		w.join("Grete", "kitchen")
		time.Sleep(25 * time.Hour)
		done := make(chan error)
		var used int64
		w.store.operations <- func() { done <- w.store.db.QueryRow(`SELECT used FROM rooms`).Scan(&used) }
		if err := <-done; err != nil || time.Since(time.Unix(used, 0)) > 2*time.Hour {
			t.Errorf("the room was used %v ago, %v, want one hour", time.Since(time.Unix(used, 0)), err)
		}
	})
}

// An application that broadcasts to a hub whose room has closed cannot overwrite the room.
func TestClosedRoomSavesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		grete := w.join("Grete", "kitchen")
		grete.received()
		closed := w.room("kitchen")
		grete.leave()
		time.Sleep(awayTime + 2*roomLife)
		w.wantRooms()
		hans := w.join("Hans", "kitchen")
		hans.send("dinner")
		hans.want("join Hans", "message Hans: dinner")
		closed.publish(Line{Kind: "message", Text: "late"}) // Its run has ended.
		time.Sleep(2 * commitDelay)
		hans.leave()
		time.Sleep(awayTime + 2*roomLife)
		w.join("Ursel", "kitchen").want("message Hans: dinner", "join Ursel")
	})
}

// A refused client does not keep a room open.
func TestRefusedClientKeepsNoRoomOpen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		mallory := w.logIn("Mallory")
		grete := w.join("Grete", "kitchen")
		w.dial(mallory, "kitchen")
		grete.send("/kick Mallory")
		grete.received()
		grete.leave()
		for range 10 * int((awayTime+roomLife-2*time.Second)/time.Second) {
			w.dial(mallory, "kitchen").wantClose(errKicked)
			time.Sleep(time.Second / 10)
		}
		w.wantRooms("kitchen")
		time.Sleep(5 * time.Second)
		w.wantRooms()
	})
}

// The host of a full room is a puppet, or a puppet has the owner's name.
func TestOwnerAlwaysGetsIn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		cookie := w.logIn("GreteI")
		grete := w.dial(cookie, "kitchen")
		grete.received()
		grete.leave()
		time.Sleep(awayTime + time.Second)
		// one looks like it, the other differs in case
		puppets := []*peer{w.join("gretei", "kitchen"), w.join("Gretel", "kitchen")}
		for n := range maxUsers - 2 {
			puppets = append(puppets, w.join(fmt.Sprint("Puppet-", n), "kitchen"))
		}
		w.join("Late", "kitchen").wantClose(errRoomFull)
		for _, p := range puppets {
			p.received()
		}
		grete = w.dial(cookie, "kitchen")
		puppets[0].wantClose(errNameTaken)
		puppets[1].wantClose(errNameTaken)
		puppets[2].want("leave gretei", "leave Gretel", "join GreteI")
		w.join("Another", "kitchen").received()
		grete.received()
		grete.leave()
		time.Sleep(awayTime + time.Second)
		w.join("More", "kitchen").received() // which makes it full again
		grete = w.dial(cookie, "kitchen")
		if got := grete.received(); grete.welcome == nil || len(grete.welcome.Users) != maxUsers+1 ||
			len(grete.welcome.encode()) > maxLineSize {
			t.Errorf("the owner of a full room receives %q, and the welcome %+v", got, grete.welcome)
		}
		grete.send("/kick Puppet-0")
		puppets[2].wantClose(errKicked)
	})
}

// Browsers send the cookie with a link from another site.
func TestPlainGETOpensNoRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		cookie := w.logIn("Grete")
		for n := range 2 * maxRooms {
			if got := w.get(cookie, fmt.Sprintf("/room/room%d/ws", n)); got.Code != http.StatusBadRequest {
				t.Fatalf("a plain GET has status %d, want 400", got.Code)
			}
		}
		w.wantRooms()
		w.join("Hans", "kitchen").want("join Hans")
	})
}

func TestFailedHandshakeKeepsNoRoomOpen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		cookie := w.logIn("Grete")
		for n := range maxRooms {
			request := httptest.NewRequest("GET", fmt.Sprintf("/room/room%d/ws", n), nil)
			// and no key
			request.Header = http.Header{"Cookie": {cookie}, "Connection": {"Upgrade"},
				"Upgrade": {"websocket"}}
			got := httptest.NewRecorder()
			if w.handler().ServeHTTP(got, request); got.Code != http.StatusBadRequest {
				t.Errorf("a handshake without a key has status %d, want 400", got.Code)
			}
		}
		time.Sleep(time.Second)
		w.wantRooms()
	})
}

func TestConfusableRoomNamesAreOneRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		grete, hans, uwe := w.join("Grete", "kitchen"), w.join("Hans", "Kitchen"), w.join("Uwe", "garden")
		w.join("Ursel", "modem")
		w.join("Jens", "rnodem") // which looks like it
		w.wantRooms("garden", "kitchen", fold("modem"))
		for _, p := range []*peer{grete, hans, uwe} {
			p.received()
		}
		grete.send("dinner")
		uwe.send("weeds")
		grete.want("message Grete: dinner")
		hans.want("message Grete: dinner")
		uwe.want("message Uwe: weeds")
	})
}

// A room that closes while clients join must not refuse them, nor leave one of them in
// another hub than the next.
func TestClientCanJoinWhileTheRoomCloses(t *testing.T) {
	repeat(t, func(t *testing.T) { synctest.Test(t, testJoinWhileClosing) })
}

func testJoinWhileClosing(t *testing.T) {
	w := startPiped(t)
	cookies := []string{w.logIn("Grete"), w.logIn("Hans")}
	for range 200 {
		var peers [2]*peer
		var both sync.WaitGroup
		for i := range peers {
			both.Go(func() { peers[i] = w.dial(cookies[i], "kitchen") })
		}
		if rand.N(2) == 0 {
			both.Go(func() { w.get(cookies[0], "/room/kitchen/ws") }) // a handshake that fails
		}
		both.Wait()
		peers[0].received()
		peers[1].received()
		peers[0].send("here")
		peers[0].want("message Grete: here")
		peers[1].want("message Grete: here")
		peers[0].leave()
		peers[1].leave()
		// At the moment at which the room closes, before it or after it as it happens.
		time.Sleep(awayTime + roomLife + time.Duration(rand.N(3))*time.Second)
		if rand.N(2) == 0 {
			time.Sleep(rand.N(time.Second))
		}
		if t.Failed() {
			return
		}
	}
}

func TestStoppedHubDoesNotRemoveTheNextOfItsRoom(t *testing.T) {
	ending, next := newHub(), newHub()
	rooms := newRooms(testKey, new(Store))
	rooms.hubs["kitchen"] = next
	ending.Room = Room{rooms: rooms, Record: Record{name: "kitchen"}} // no user was ever in it
	ending.expire()
	if rooms.hubs["kitchen"] != next {
		t.Error("the stopped hub has removed the next one")
	}
}

func TestRoomStaysOpenForAClientThatIsJoining(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		grete := w.join("Grete", "kitchen")
		grete.received()
		grete.leave()
		time.Sleep(awayTime + roomLife - 2*time.Second)
		hub, _, _ := w.admit("kitchen", Identity{"an ID", "Hans"})
		time.Sleep(time.Hour)
		w.wantRooms("kitchen")
		select {
		case <-hub.stopped:
			t.Error("the hub has stopped")
		default:
		}
		hub.joining.Add(-1) // as serveRoom does
		time.Sleep(2 * time.Second)
		w.wantRooms()
	})
}

func TestRefusedClientsDoNotFillTheRoom(t *testing.T) {
	w := startTCP(t)
	grete := w.join("Grete", "kitchen")
	kicked := w.logIn("Mallory")
	w.dial(kicked, "kitchen")
	grete.until("join Mallory")
	grete.send("/kick Mallory")
	grete.until("leave Mallory: kicked by Grete")
	impostor := w.logIn("GRETE")
	for range maxUsers { // None of these answers the goodbye.
		w.dialSilent(kicked, "kitchen")
		w.dialSilent(impostor, "kitchen")
	}
	for n := range maxUsers - 1 {
		w.join(fmt.Sprint("Guest-", n), "kitchen").until(fmt.Sprint("join Guest-", n))
	}
	w.join("Late", "kitchen").wantClose(errRoomFull)
	if lines := grete.take(); slices.Contains(lines, "join Late") ||
		slices.Contains(lines, "join GRETE") {
		t.Errorf("Grete receives %q", lines)
	}
}

func TestEleventhConnectionOfAUserReplacesTheOldest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		cookie := w.logIn("Grete")
		var tabs []*peer
		for range 3 * maxTabs {
			tabs = append(tabs, w.dial(cookie, "kitchen"))
			synctest.Wait()
		}
		for _, tab := range tabs[:2*maxTabs] {
			tab.wantClose(errTooManyTabs)
		}
		for _, tab := range tabs[2*maxTabs:] {
			tab.want()
		}
		tabs[2*maxTabs+3].leave()
		synctest.Wait()
		w.dial(cookie, "kitchen").want()
		tabs[2*maxTabs].send("all ten are here")
		for i, tab := range tabs[2*maxTabs:] {
			if i != 3 {
				tab.want("message Grete: all ten are here")
			}
		}
	})
}

func TestOpenRoomsAreLimited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		cookie := w.logIn("Grete")
		first := w.dial(cookie, "room0")
		for n := range maxRooms - 1 {
			w.dial(cookie, fmt.Sprint("room", n+1))
		}
		w.wantStatus(cookie, "onemore", http.StatusServiceUnavailable)
		if got := w.get(cookie, "/room/onemore/"); got.Code != http.StatusServiceUnavailable ||
			!strings.Contains(got.Body.String(), "The server has too many open rooms.") {
			t.Errorf("the page has status %d, want 503 and the reason", got.Code)
		}
		w.dial(w.logIn("Hans"), "room1")
		first.leave()
		time.Sleep(awayTime + roomLife + 2*time.Second)
		w.dial(cookie, "onemore")
	})
}

// Names.

func TestRequestWithoutALoginGets401AndTheForm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		good := w.logIn("Grete")
		foreign := newRooms("another key", new(Store)).logInAs(t, "Grete", "")
		signed := func(who Identity) string { // as an application's own login might
			value, _ := w.cookies.Encode("chat", who)
			return "chat=" + value
		}
		for _, cookie := range []string{"", "chat=", "chat=Grete", good[:len(good)-4] + "AAAA", foreign,
			signed(Identity{ID: "1"}), signed(Identity{Name: "Grete"}), signed(Identity{"1",
				"two words"}), signed(Identity{"1", "Grete "})} {
			w.wantStatus(cookie, "kitchen", http.StatusUnauthorized)
			got := w.get(cookie, "/room/kitchen/")
			if got.Code != http.StatusUnauthorized || !strings.Contains(got.Body.String(), `name="name"`) {
				t.Errorf("with %q the page has status %d, want 401 and the form", cookie, got.Code)
			}
		}
		w.wantRooms()
	})
}

func TestScriptsAndOtherSitesCannotUseTheCookie(t *testing.T) {
	request := httptest.NewRequest("POST", "/", strings.NewReader("name=Grete&room=K%C3%BCche"))
	request.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	request.Header.Set("Cookie", "chat=")
	got := httptest.NewRecorder()
	newRooms(testKey, new(Store)).handler().ServeHTTP(got, request)
	if got.Code != http.StatusSeeOther || !strings.EqualFold(got.Header().Get("Location"),
		"/room/K%C3%BCche/") {
		t.Errorf("got status %d and location %q, want 303 and the room's", got.Code,
			got.Header().Get("Location"))
	}
	cookie := got.Result().Cookies()[0]
	if !cookie.HttpOnly || cookie.SameSite != http.SameSiteLaxMode || cookie.Path != "/" {
		t.Errorf("the cookie is %v", cookie)
	}

	request.Header.Set("Sec-Fetch-Site", "cross-site")
	got = httptest.NewRecorder()
	newRooms(testKey, new(Store)).handler().ServeHTTP(got, request)
	if got.Code != http.StatusForbidden {
		t.Errorf("another site's form gets status %d, want 403", got.Code)
	}
}

// Cookies ignore ports.
func TestServersOnOneHostKeepTheirLogins(t *testing.T) {
	jar, _ := cookiejar.New(nil)
	client := &http.Client{Jar: jar}
	var servers []*world
	for range 2 {
		w := startTCP(t)
		w.cookies = securecookie.New(fmt.Append(nil, "a key of 32 bytes, for server ", len(servers)), nil)
		servers = append(servers, w)
	}
	for _, w := range append(servers, servers...) {
		if response, err := client.Get(w.url); err == nil {
			response.Body.Close()
		}
		response, err := client.PostForm(w.url, url.Values{"name": {"Grete"}, "room": {"kitchen"}})
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
	}
	for _, w := range servers {
		response, err := client.Get(w.url + "/room/kitchen/")
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
		if response.StatusCode != http.StatusOK {
			t.Errorf("after logging in on two servers, one answers with status %d, want 200",
				response.StatusCode)
		}
	}
}

// Another path of this host, or of its domain, can set a cookie that the browser sends first.
func TestForeignCookieOfThatNameLocksNobodyOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		good, foreign := w.logIn("Grete"), newRooms("another key", new(Store)).logInAs(t, "Mallory", "")
		for _, cookies := range []string{foreign + "; " + good, good + "; " + foreign,
			"chat=; chat=x; " + foreign + "; " + good + "; chat"} {
			got := w.get(cookies, "/room/kitchen/")
			if got.Code != http.StatusOK || !strings.Contains(got.Body.String(), ">Grete</output>") {
				t.Errorf("with %q the page has status %d, want 200 and Grete's", cookies, got.Code)
			}
		}
	})
}

func TestSecureCookieIsThisHostsAlone(t *testing.T) {
	*secure = true
	defer func() { *secure = false }()
	rooms := newRooms(testKey, new(Store))
	cookie := rooms.post("Grete", "kitchen").Result().Cookies()[0]
	if cookie.Name != "__Host-chat" || !cookie.Secure || cookie.Path != "/" || cookie.Domain != "" ||
		!cookie.HttpOnly {
		t.Errorf("the cookie is %v", cookie)
	}
	w := &world{Rooms: rooms, t: t}
	for name, status := range map[string]int{"__Host-chat": http.StatusOK,
		"chat": http.StatusUnauthorized} {
		if got := w.get(name+"="+cookie.Value, "/room/kitchen/"); got.Code != status {
			t.Errorf("a cookie of the name %s gets status %d, want %d", name, got.Code, status)
		}
	}
}

// Otherwise the form would lead to the form, without end.
func TestLoginWhoseCookieDoesNotReturnSaysWhy(t *testing.T) {
	w := &world{Rooms: newRooms(testKey, new(Store)), t: t}
	for _, page := range []string{"/", "/room/kitchen/", "/room/a.b/"} {
		if cookies := w.get("", page).Result().Cookies(); len(cookies) != 1 ||
			cookies[0].String() != "chat=; Path=/; HttpOnly; SameSite=Lax" {
			t.Errorf("the form at %s sets the cookies %v, want an empty one", page, cookies)
		}
		for _, cookie := range []string{"chat=", w.logIn("Grete")} {
			if cookies := w.get(cookie, page).Result().Cookies(); len(cookies) != 0 {
				t.Errorf("with %q, the form at %s sets the cookies %v, want none", cookie, page, cookies)
			}
		}
	}
	// of another port, or before -secure was dropped
	for _, cookie := range []string{"other=x", "chat8080=", "__Host-chat="} {
		got := w.post("Grete", "kitchen", cookie)
		if got.Code != http.StatusUnauthorized || !strings.Contains(got.Body.String(),
			html.EscapeString(noCookie)) ||
			!strings.Contains(got.Body.String(), `value="Grete"`) ||
			!strings.Contains(got.Body.String(), `value="kitchen"`) {
			t.Errorf("with the cookie %q, the form has status %d and %s, "+
				"want 401, the reason, name and room", cookie, got.Code, got.Body)
		}
	}
	if got := w.post("Grete", "kitchen", "chat="); got.Code != http.StatusSeeOther {
		t.Errorf("with the cookie, the form has status %d, want 303", got.Code)
	}
}

// The lines that README.md has for passwords, in a build of their own.
func TestLoginWithAPassword(t *testing.T) {
	_, lines, _ := strings.Cut(read(t, ".", "README.md"), "```go\n")
	lines, _, _ = strings.Cut(lines, "```\n")
	before, rest, found := strings.Cut(read(t, ".", "login.go"), "\tuser := rs.identify(r)\n")
	_, after, foundEnd := strings.Cut(rest, "\tvalue, _ := rs.cookies.Encode")
	if !found || !foundEnd || lines == "" {
		t.Fatal("login.go or README.md has no lines that make the user")
	}
	dir := t.TempDir()
	before = strings.Replace(before, "\t\"crypto/rand\"\n", "", 1)
	code := before + lines + "\tvalue, _ := rs.cookies.Encode" + after +
		"\nfunc account(name, password string) string {\n" +
		"\tif password == \"of \"+name {\n\t\treturn \"ID-\" + name\n\t}\n\treturn \"\"\n}\n"
	here, _ := filepath.Abs("login.go")
	overlay, _ := json.Marshal(map[string]any{
		"Replace": map[string]string{here: filepath.Join(dir, "login.go")}})
	os.WriteFile(filepath.Join(dir, "login.go"), []byte(code), 0o644)
	os.WriteFile(filepath.Join(dir, "overlay.json"), overlay, 0o644)
	binary := filepath.Join(dir, "rooms")
	build := exec.Command("go", "build", "-overlay", filepath.Join(dir, "overlay.json"), "-o", binary)
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v: %s", err, out)
	}
	cmd := exec.Command(binary, "-addr", "localhost:0", "-db", newFile(t))
	cmd.Env = append(os.Environ(), "CHAT_KEY="+testKey)
	line, _ := startLogged(t, cmd).ReadString('\n')
	w := startedProgram(t, line)
	jar, _ := cookiejar.New(nil)
	client := &http.Client{Jar: jar}
	logIn := func(name, password string) (cookie string, status int) {
		t.Helper()
		if _, err := client.Get(w.url + "/"); err != nil {
			t.Fatal(err)
		}
		form := url.Values{"name": {name}, "room": {"kitchen"}, "password": {password}}
		response, err := client.PostForm(w.url+"/", form)
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
		return "chat=" + jar.Cookies(response.Request.URL)[0].Value, response.StatusCode
	}
	for password, want := range map[string]int{"": 401, "of hans": 401, "of Tom": 401, "of tom": 200} {
		if _, status := logIn("tom", password); status != want {
			t.Errorf("the password %q gets status %d, want %d", password, status, want)
		}
	}
	cookie, _ := logIn("tom", "of tom")
	tom := w.dial(cookie, "kitchen")
	tom.until("join tom")
	logIn("tom", "of tom") // the same user again
	logIn("Hans", "of tom")
	tom.send("I am still here")
	tom.until("message tom: I am still here")
	cookie, _ = logIn("Hans", "of Hans")
	tom.wantClose(errLoggedOut)
	w.dial(cookie, "kitchen").until("join Hans")
}

func TestFormIsAtTheRootAlsoWithALogin(t *testing.T) {
	var logged logBook
	log.SetOutput(&logged)
	defer log.SetOutput(io.Discard)
	w := &world{Rooms: newRooms(testKey, new(Store)), t: t}
	for _, cookie := range []string{"", w.logIn("Grete")} {
		got := w.get(cookie, "/")
		if got.Code != http.StatusOK || !strings.Contains(got.Body.String(), `name="room"`) {
			t.Errorf("with the cookie %q, / has status %d and %s", cookie, got.Code, got.Body)
		}
		if got := got.Header(); got.Get("Content-Type") != "text/html; charset=utf-8" ||
			got.Get("Cache-Control") != "no-store" {
			t.Errorf("got the headers %q", got)
		}
	}
	w.get("", "/room/kitchen/ws")
	for _, want := range []string{`GET "/"`,
		`handshake refused: "/room/kitchen/ws": This is not a WebSocket handshake.`} {
		if !strings.Contains(logged.String(), want) {
			t.Errorf("the log is %q, want %s", logged.String(), want)
		}
	}
	for invalid, status := range map[[2]string]int{{"two words", "kitchen"}: http.StatusBadRequest,
		{"Grete", "two words"}: http.StatusNotFound} {
		if got := w.post(invalid[0], invalid[1]); got.Code != status ||
			got.Header().Get("Set-Cookie")+got.Header().Get("Location") != "" {
			t.Errorf("with %q the form gets status %d and the headers %q, want %d and no cookie", invalid,
				got.Code, got.Header(), status)
		}
	}
}

func TestFormSaysTheRulesAndWhichFieldFailed(t *testing.T) {
	w := &world{Rooms: newRooms(testKey, new(Store)), t: t}
	grete := w.logIn("Grete")
	for name, test := range map[string]struct {
		page   *httptest.ResponseRecorder
		fails  string // the field
		reason string
		name   string
		room   string
	}{
		"at the root":     {w.get("", "/"), "", chooseRoom, "", ""},
		"without a login": {w.get("", "/room/kitchen/"), "", chooseRoom, "", "kitchen"},
		"invalid name": {w.post("a.b", "kitchen"), "name", "A user cannot have that name.", "a.b",
			"kitchen"},
		"invalid room": {w.post("Grete", "a.b"), "room", "A room cannot have that name.", "Grete",
			"a.b"},
		"invalid room's page": {w.get(grete, "/room/a.b/"), "room", "A room cannot have that name.",
			"Grete", "a.b"},
		"both invalid": {w.post("a.b", "a.b"), "name", "A user cannot have that name.", "a.b",
			"a.b"},
		"neither is a message": {w.post("{{room}}", "{{name}}"), "name", "A user cannot have that name.",
			"{{room}}", "{{name}}"},
	} {
		body := test.page.Body.String()
		field := regexp.MustCompile(
			`name="(name|room)" value="(.*?)" (.*?) *aria-describedby="reason rules"`)
		fields := field.FindAllStringSubmatch(body, -1)
		if len(fields) != 2 || fields[0][1] != "name" || fields[1][1] != "room" {
			t.Fatalf("%s: the form has the fields %q", name, fields)
		}
		var fails strings.Builder
		for _, field := range fields {
			if strings.Contains(field[3], "aria-invalid") {
				fails.WriteString(field[1])
			}
			if strings.Contains(field[3], "autofocus") != (field[1] == cmp.Or(test.fails, "name")) {
				t.Errorf("%s: the field %s has %q", name, field[1], field[3])
			}
		}
		class := ""
		if test.fails != "" {
			class = "error"
		}
		reason := `<p id="reason" class="` + class + `" role="status">` + test.reason + "</p>"
		if fails.String() != test.fails || fields[0][2] != test.name || fields[1][2] != test.room ||
			!strings.Contains(body, reason) || !strings.Contains(body, "of at most 32 bytes") {
			t.Errorf("%s: the field %q fails, and the form is %s", name, fails.String(), body)
		}
	}
}

// Without its nonce, the browser runs no script.
func TestPagesHaveTheNonceOfTheirPolicy(t *testing.T) {
	w := &world{Rooms: newRooms(testKey, new(Store)), t: t}
	for cookie, elements := range map[string]int{"": 1, w.logIn("Grete"): 2} {
		got := w.get(cookie, "/room/kitchen/")
		policy := got.Header().Get("Content-Security-Policy")
		nonce := regexp.MustCompile(`style-src 'nonce-(.*?)'`).FindStringSubmatch(policy)[1]
		element := regexp.MustCompile(`(?m)^<(style|script) nonce="` + nonce + `"`)
		found := element.FindAllString(got.Body.String(), -1)
		if len(found) != elements || strings.Count(got.Body.String(), nonce) != elements {
			t.Errorf("the page has the nonce in %q, want it in %d elements", found, elements)
		}
	}
}

func TestFormTrimsSpaceAroundNames(t *testing.T) {
	w := &world{Rooms: newRooms(testKey, new(Store)), t: t}
	got := w.post("Grete ", " Kitchen\u3000")
	if got.Code != http.StatusSeeOther || got.Header().Get("Location") != "/room/kitchen/" {
		t.Errorf("got status %d and location %q", got.Code, got.Header().Get("Location"))
	}
	got = w.post(" two words ", "kitchen ")
	if got.Code != http.StatusBadRequest || !strings.Contains(got.Body.String(),
		`value="two words"`) || !strings.Contains(got.Body.String(), `value="kitchen"`) {
		t.Errorf("got status %d and %s", got.Code, got.Body)
	}
	got = w.post(`"><script>`, "kitchen")
	if got.Code != http.StatusBadRequest || strings.Contains(got.Body.String(), "<script") {
		t.Errorf("got status %d and %s", got.Code, got.Body)
	}
}

func TestNameIsOneWordInItsNormalForm(t *testing.T) {
	for _, name := range []string{"Grete", "grete-2", "Jörg", "Ἀθηνᾶ", "Дмитрий", "世界", "مريم",
		"علی\u200cرضا", "ශ\u0dca\u200dරී", strings.Repeat("x", 32)} {
		if got := parseName(name); got != name {
			t.Errorf("%q is taken as %q", name, got)
		}
	}
	for _, name := range []string{"", " ", "Grete ", "Grete Hans", "Grete:", "Grete: hi", "* Grete",
		"*", "/to", "_", "-x", "a/b", "a.b", "..",
		"\u3164", "Grete\u200b", "Gre\u200cte", "\u200cGrete", "علی\u200c", "علی\u200c\u200cرضا",
		"Grete\u200d", "क\u094d\u200d", "Grete\u202e", "\u0301", "Grete\u00a0", "🦊", "a\nb", "\xff",
		strings.Repeat("x", 33)} {
		if got := parseName(name); got != "" {
			t.Errorf("%q is taken as %q", name, got)
		}
	}
	// two ways to write the same
	for written, want := range map[string]string{"Jo\u0308rg": "Jörg", "\uff27rete": "Grete"} {
		if got := parseName(written); got != want {
			t.Errorf("%q is taken as %q, want %q", written, got, want)
		}
	}
}

func TestConfusableNamesAreRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		for name, alike := range map[string]string{
			"Grete":  "Grete Gr\u0435te \ua4d6rete ꓖrete Ԍrete ԍrete Gгete Gгеtе", // е is Cyrillic
			"Gretel": "gretel GreteI greteI Grete1", "gretel": "GRETEI", "Bill": "biII",
			"Lisa": "LISA L\u0130SA l\u0131sa L\u0130sa", "L\u0130SA": "lisa", "lisa": "Iisa",
			"Ina": "ina", "Emil": "EMIL", "illi": "ILLI", "Weiss": "WEISS Weiß", "Weiß": "WEISS",
			"Дмитрий": "ДМИТРИЙ", "Νίκος": "ΝΊΚΟΣ", "Роза": "РОЗА", "ИВАН": "Иван", "АННА": "АHHА",
			"Bob": "B0B", "Oskar": "0skar", "modem": "rnodem", "hans": "Ｈａｎｓ", "Paul": "\u01bfaul",
			"علی\u200cرضا": "علیرضا", "ශ\u0dca\u200dරී": "ශ\u0dcaරී",
			"willi": "\u1d21illi wiIIi w\u0456lli wıllı ѡilli աilli ꮃilli",

			// Those that differ in accents, punctuation or small capitals, or in vv.
			"GRETE": "Greté Grète Ğrete Gretё Greţe Ɠrete GRETÉ Grete_ Grete- Gre-te ɢrete ɢʀᴇᴛᴇ",
			"Willi": "vvilli VVilli v-villi vᴠilli ννilli ѵѵilli wílli ẃilli wiʟʟi vv-ı-lli",
			"José":  "JOSÉ Jose", "Дмитрии": "Дмитрий",
		} {
			for other := range strings.FieldsSeq(alike) {
				w.wantAlike(name, other, true)
				w.wantAlike(other, name, true)
			}
		}
	})
}

// README.md says that these still pass, and why.
func TestNamesThatPass(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		text := strings.Join(strings.Fields(read(t, ".", "README.md")), " ")
		_, text, _ = strings.Cut(text, "What still passes")
		text, _, _ = strings.Cut(text, " - *")
		for name, others := range map[string]string{
			"Grete":   "Gr3te 6rete Gre7e Greʇe Grǝte Gɾete Gretɛ Gretэ Grette Gretel",
			"willi":   "w1lli uuilli ωilli พilli willy",
			"TalkerI": "TalkerL TALKER1",
		} {
			for other := range strings.FieldsSeq(others) {
				w.wantAlike(name, other, false)
				w.wantAlike(other, name, false)
				if !strings.Contains(text, other) {
					t.Errorf("README.md does not say that %s passes beside %s", other, name)
				}
			}
		}
		for _, pair := range []string{"Hans Hanna", "Guest-1 Guest-2", "Ina Lna", "Lisa Ilsa", "か が",
			"มี มา"} {
			name, other, _ := strings.Cut(pair, " ")
			w.wantAlike(name, other, false)
		}
	})
}

// wantAlike checks whether other is refused in a room in which there is a user called name.
func (w *world) wantAlike(name, other string, want bool) {
	w.t.Helper()
	room := fmt.Sprint("room", rand.Uint64())
	first, second := w.join(name, room), w.join(other, room)
	first.received()
	got := false
	select {
	case <-second.ended:
		second.wantClose(errNameTaken)
		got = true
	default:
	}
	if got != want {
		w.t.Errorf("%q beside %q: alike is %v", other, name, got)
	}
	first.leave()
	if !got {
		second.leave()
	}
	time.Sleep(2 * roomLife)
}

func TestNameIsFreeOnceItsUserHasLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		grete := w.join("Gretel", "kitchen")
		w.join("GreteI", "garden")
		grete.leave()
		synctest.Wait()
		w.join("GreteI", "kitchen").wantClose(errNameTaken)
		time.Sleep(awayTime + time.Second)
		w.join("GreteI", "kitchen").want("join GreteI")
	})
}

// A user is an ID, and keeps its name in a room, also if an application's login gives that ID
// another one.
func TestUserHasOneNameInARoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		signed := func(user Identity) string {
			value, _ := w.cookies.Encode("chat", user)
			return "chat=" + value
		}
		grete := w.join("Grete", "kitchen")
		hans, ursel := w.dial(signed(Identity{"1", "Hans"}), "kitchen"),
			w.dial(signed(Identity{"1", "Ursel"}), "kitchen")
		grete.want("join Grete", "join Hans")
		if ursel.received(); ursel.welcome.User != "Hans" {
			t.Errorf("the second is told that it is %q", ursel.welcome.User)
		}
		ursel.send("hello")
		grete.want("message Hans: hello")
		grete.send("/kick Hans")
		for _, p := range []*peer{hans, ursel} {
			p.wantClose(errKicked)
		}
		w.dial(signed(Identity{"1", "Ursel"}), "kitchen").wantClose(errKicked)
		ursel = w.dial(signed(Identity{"1", "Ursel"}), "garden")
		ursel.received()
		if ursel.welcome.User != "Ursel" {
			t.Errorf("in another room it is %q", ursel.welcome.User)
		}
	})
}

// A browser is one user at a time: whoever logs in next receives no private message of the
// user before, and is not the host of their rooms.
func TestLoggingOutOrInWithAnotherNameEndsTheUser(t *testing.T) {
	for _, name := range []string{"", "Greta", "grete", "Grete"} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := startPiped(t)
				cookie := w.logIn("Grete")
				grete, tab, garden := w.dial(cookie, "kitchen"), w.dial(cookie, "kitchen"),
					w.dial(cookie, "garden")
				hans := w.join("Hans", "kitchen")
				hans.send("/to Grete for you alone")
				hans.received()
				if name == "" {
					if got := w.logOutAs(cookie); got.Code != http.StatusSeeOther ||
						got.Header().Get("Location") != "/" || !strings.HasPrefix(got.Header().Get("Set-Cookie"),
						"chat=; ") {
						t.Errorf("logging out has status %d and the headers %q", got.Code, got.Header())
					}
					cookie = w.logIn("Grete")
				} else {
					cookie = w.logInAs(t, name, cookie)
				}
				if name == "Grete" { // the same user
					hans.want()
					w.dial(cookie, "kitchen").want("private Hans > Grete: for you alone")
					return
				}
				for _, p := range []*peer{grete, tab, garden} {
					p.wantClose(errLoggedOut)
				}
				hans.want("leave Grete")
				next := w.dial(cookie, "kitchen")
				for _, line := range next.received() {
					if strings.HasPrefix(line, "private ") {
						t.Errorf("the next user receives %q", line)
					}
				}
				next.send("/kick Hans")
				if lines := next.received(); len(lines) != 1 ||
					!strings.HasPrefix(lines[0], "notice /kick Hans: Only the host") {
					t.Errorf("the next user kicks as the owner, and receives %q", lines)
				}
				w.join("Uwe", "garden").received()
			})
		})
	}
}

func TestOnlyItsOwnCookieLogsAUserOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		cookie := w.logIn("Grete")
		grete := w.dial(cookie, "kitchen")
		foreign := newRooms("another key", new(Store)).logInAs(t, "Grete", "")
		for _, other := range []string{"", foreign, cookie[:len(cookie)-4] + "AAAA", w.logIn("Grete")} {
			w.logOutAs(other)
			w.post("Greta", "kitchen", other)
		}
		request := httptest.NewRequest("POST", "/logout", nil) // from another site
		request.Header.Set("Cookie", cookie)
		request.Header.Set("Sec-Fetch-Site", "cross-site")
		response := httptest.NewRecorder()
		if w.handler().ServeHTTP(response, request); response.Code != http.StatusForbidden {
			t.Errorf("another site's form has status %d, want 403", response.Code)
		}
		if got := w.get(cookie, "/logout"); got.Code != http.StatusMethodNotAllowed {
			t.Errorf("a link to /logout has status %d, want 405", got.Code)
		}
		grete.want("join Grete")
		grete.send("still here")
		grete.want("message Grete: still here")
	})
}

// Names that are refused lead back to the form, also those that only a hub knows.
func TestPageOfARoomThatRefusesTheUserIsTheForm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		grete, hans, kicked := w.logIn("Grete"), w.join("Hans", "kitchen"), w.logIn("Mallory")
		w.dial(kicked, "kitchen")
		hans.send("/kick Mallory")
		hans.received()
		impostor := w.logIn("HANS")
		wantPage := func(cookie string, status int, want ...string) {
			t.Helper()
			got := w.get(cookie, "/room/Kitchen/")
			for _, want := range want {
				if !strings.Contains(got.Body.String(), want) {
					t.Errorf("the page has no %q: %s", want, got.Body)
				}
			}
			if got.Code != status || (status == http.StatusOK) != strings.Contains(got.Body.String(),
				`id="log"`) {
				t.Errorf("the page has status %d, want %d: %s", got.Code, status, got.Body)
			}
		}
		wantPage(impostor, http.StatusConflict, "a user in this room has this name", `value="HANS"`,
			`value="kitchen"`)
		wantPage(kicked, http.StatusForbidden, "you were removed from this room", `value="Mallory"`,
			`value="kitchen"`)
		wantPage(grete, http.StatusOK)
		for n := range maxUsers - 1 {
			w.join(fmt.Sprint("Guest-", n), "kitchen")
		}
		synctest.Wait()
		wantPage(grete, http.StatusServiceUnavailable, "this room is full", `value="kitchen"`)
		hans.leave()
		time.Sleep(awayTime + time.Second)
		wantPage(impostor, http.StatusOK) // as the name is free now
		wantPage(grete, http.StatusOK)
	})
}

func TestNoTextPassesForALineOfAnotherUserOrTheServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		mallory, hans := w.join("Mallory", "kitchen"), w.join("Hans", "kitchen")
		mallory.received()
		hans.received()
		for _, text := range []string{"hello", "Grete: hello", "* Grete has left.", "\nGrete: hello",
			"x\nGrete: hello", "x\r* Grete has left.", ": ",
			"\x00Grete: hello", `{"n":1,"kind":"leave","user":"Grete"}`, "x\",\"user\":\"Grete\"",
			"x\u2028{\"kind\":\"leave\"}", "/to Hans * Grete has left.",
			"/to Hans \nGrete: hello", " /to Hans {\"kind\":\"leave\"}"} {
			mallory.send(text)
			if lines := hans.receivedLines(); len(lines) != 1 || lines[0].User != "Mallory" ||
				lines[0].Kind != "message" && lines[0].Kind != "private" {
				t.Errorf("Mallory sends %q, and Hans receives %+v", text, lines)
			}
		}
	})
}

// The longest lines are no longer than maxLineSize, and batches of them below 32 KiB.
func TestLongestLinesAreSentWhole(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		name := strings.Repeat("n", maxNameSize)
		cookie := w.logIn(name)
		p := w.dial(cookie, "kitchen")
		p.received()
		p.send(strings.Repeat("<", maxMessageSize))
		if p.received(); p.longest > maxMessageSize+200 {
			t.Errorf("a line of < has %d bytes", p.longest)
		}
		text := strings.Repeat(`"`, maxMessageSize) // which takes two bytes each
		p.send(text)
		p.want("message " + name + ": " + text)
		whisper := "/to " + name + " " + text
		p.send(whisper[:maxMessageSize])
		p.want("private " + name + " > " + name + ": " + text[:maxMessageSize-len("/to  ")-len(name)])
		p.send("/" + text[1:])
		if lines := p.received(); len(lines) != 1 || !strings.HasPrefix(lines[0], `notice /""""`) {
			t.Errorf("receives %q", lines)
		}
		for range 200 {
			w.room("kitchen").do(func() {
				w.room("kitchen").publish(Line{Kind: "message", User: name,
					Text: text, Line: text})
			})
		}
		if p.received(); p.longest < maxLineSize/2 || p.longest > maxLineSize ||
			p.largest < maxBatchSize/2 || p.largest > maxBatchSize {
			t.Errorf("the longest line has %d bytes, and the largest message %d", p.longest, p.largest)
		}
		for n := range maxUsers - 1 {
			w.join(fmt.Sprintf("%s%02d", name[2:], n), "kitchen").received()
		}
		w.join("Late", "kitchen").wantClose(errRoomFull)
		p = w.dial(cookie, "kitchen")
		if p.received(); len(p.welcome.Users) != maxUsers || !slices.IsSorted(p.welcome.Users) {
			t.Errorf("the welcome has %d names, want %d in order: %q", len(p.welcome.Users), maxUsers,
				p.welcome.Users)
		}
		if size := len(p.welcome.encode()); size > maxLineSize {
			t.Errorf("the welcome has %d bytes", size)
		}
		p.send(text + "x")
		p.wantClose(errTooBig)
	})
}

// An application sends to one client from any goroutine.

func TestTellReachesOneClientAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		grete, hans := w.join("Grete", "kitchen"), w.join("Hans", "kitchen")
		grete.received()
		hans.received()
		hub := w.room("kitchen")
		var client *Client
		hub.do(func() { client = hub.find(alike("Grete")).clients[0] })
		if !client.tell(Line{Kind: "notice", Text: "for you alone"}.encode()) {
			t.Error("tell returned false for a connected client")
		}
		if got := grete.receivedLines(); len(got) != 1 || got[0].Text != "for you alone" {
			t.Errorf("got %+v, want the one line", got)
		}
		if got := hans.receivedLines(); len(got) != 0 {
			t.Errorf("the other client got %+v, want nothing", got)
		}
	})
}

// Presence.

func TestJoinsAndLeavesAreAnnounced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		grete := w.join("Grete", "kitchen")
		grete.want("join Grete")
		cookie := w.logIn("Hans")
		hans := w.dial(cookie, "kitchen")
		hans.want("join Hans")
		grete.want("join Hans")
		tab := w.dial(cookie, "kitchen") // which is no news
		tab.received()
		hans.leave()
		time.Sleep(2 * awayTime)
		tab.leave()
		time.Sleep(awayTime - time.Second)
		grete.want()
		time.Sleep(2 * time.Second)
		grete.want("leave Hans")
	})
}

func TestBriefDisconnectIsNotAnnounced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		grete := w.join("Grete", "kitchen")
		cookies := []string{w.logIn("Hans"), w.logIn("Uwe"), w.logIn("Ursel"), w.logIn("Jens")}
		var churn sync.WaitGroup
		for _, cookie := range cookies {
			churn.Go(func() {
				for range 500 {
					w.dial(cookie, "kitchen").leave()
				}
				w.dial(cookie, "kitchen").leave()
				time.Sleep(awayTime - time.Second)
				w.dial(cookie, "kitchen")
			})
		}
		churn.Wait()
		got := grete.received()
		if slices.Sort(got); !slices.Equal(got, []string{"join Grete", "join Hans", "join Jens",
			"join Ursel", "join Uwe"}) {
			t.Errorf("Grete receives %q", got)
		}
	})
}

// After a restart, users that were there keep their names and roles, and have half a minute
// to return.
func TestRestartIsNoNews(t *testing.T) {
	for name, end := range map[string]func(*world){"crash": func(w *world) { w.crash() },
		"exit": func(w *world) { w.exit() }} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				file := newFile(t)
				w := startPipedOn(t, file)
				cookies := []string{w.logIn("Grete")}
				w.dial(cookies[0], "kitchen").wantJoined()
				for n := range 24 {
					cookies = append(cookies, w.logIn(fmt.Sprint("Guest-", n)))
					w.dial(cookies[n+1], "kitchen").wantJoined()
				}
				w.join("Uwe", "garden").wantJoined()
				time.Sleep(2 * commitDelay)
				end(w)
				time.Sleep(8 * time.Hour)

				w = startPipedOn(t, file)
				w.wantRooms("garden", "kitchen")
				// Whoever connects first gets neither a name nor the role.
				w.join("grete", "kitchen").wantClose(errNameTaken)
				w.join("Uwe", "garden").wantClose(errNameTaken)
				mallory := w.join("Mallory", "kitchen")
				if lines := mallory.received(); lines[len(lines)-1] != "join Mallory" {
					t.Errorf("Mallory receives %q", lines)
				}
				mallory.send("/kick Guest-1")
				mallory.want("notice /kick Guest-1: Only the host, Grete, can remove and allow users.")
				if got := mallory.welcome.Users; len(got) != 26 {
					t.Errorf("the room has the users %q, want the 25 of before and Mallory", got)
				}
				for _, cookie := range cookies[1:24] { // all but Grete and the last guest
					w.dial(cookie, "kitchen")
				}
				time.Sleep(restartTime - time.Second)
				w.join("grete", "kitchen").wantClose(errNameTaken)
				mallory.want()
				grete := w.dial(cookies[0], "kitchen")
				grete.received()
				time.Sleep(2 * time.Second)
				mallory.want("leave Guest-23")
				grete.send("/kick Mallory")
				mallory.wantClose(errKicked)
				grete.received()
				w.join("Guest-23", "kitchen").wantJoined()
				grete.want("join Guest-23")
				time.Sleep(roomLife)
				w.wantRooms("kitchen") // as nobody has returned to the garden
			})
		})
	}
}

// Without the owner, the host is the user that joined first, also after a restart.
func TestRestartKeepsTheStandIn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		file := newFile(t)
		w := startPipedOn(t, file)
		grete := w.join("Grete", "kitchen")
		grete.received()
		hans, uwe := w.logIn("Hans"), w.logIn("Uwe")
		w.dial(hans, "kitchen").wantJoined()
		w.dial(uwe, "kitchen").wantJoined()
		grete.leave()
		time.Sleep(awayTime + time.Second)
		w.exit()
		w = startPipedOn(t, file)
		back := w.dial(uwe, "kitchen")
		back.received()
		back.send("/kick Hans")
		back.want("notice /kick Hans: Only the host, Hans, can remove and allow users.")
		time.Sleep(restartTime + time.Second)
		back.want("leave Hans")
		late := w.dial(hans, "kitchen")
		late.received()
		late.send("/kick Uwe")
		late.want("notice /kick Uwe: Only the host, Uwe, can remove and allow users.")
	})
}

func TestInvalidHandshakeIsNotAnnounced(t *testing.T) {
	w := startTCP(t)
	hans := w.join("Hans", "kitchen")
	hans.until("join Hans")
	cookie := w.logIn("Grete")
	handshake := map[string]string{"Cookie": cookie, "Connection": "Upgrade", "Upgrade": "websocket",
		"Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="}
	for _, test := range []struct {
		method, header, value string
		want                  int
	}{
		{"HEAD", "", "", http.StatusMethodNotAllowed},
		{"POST", "", "", http.StatusMethodNotAllowed},
		{"GET", "Upgrade", "", http.StatusBadRequest},
		{"GET", "Connection", "close", http.StatusBadRequest},
		{"GET", "Sec-WebSocket-Key", "short", http.StatusBadRequest},
		{"GET", "Sec-WebSocket-Version", "12", http.StatusBadRequest},
		{"GET", "Origin", "http://elsewhere", http.StatusForbidden},
		{"GET", "Origin", "null", http.StatusForbidden},
		{"GET", "Cookie", "chat=x", http.StatusUnauthorized},
		{"GET", "", "", http.StatusSwitchingProtocols}, // so the others fail for the reason given
	} {
		request, _ := http.NewRequest(test.method, w.url+"/room/kitchen/ws", nil)
		request.Host = "pipe" // as the cookie's name has the port
		for name, value := range handshake {
			request.Header.Set(name, value)
		}
		if test.header != "" {
			request.Header.Set(test.header, test.value)
		}
		if test.want == http.StatusSwitchingProtocols {
			if lines := hans.take(); lines != nil {
				t.Errorf("Hans receives %q", lines)
			}
		}
		response, err := http.DefaultTransport.RoundTrip(request)
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
		if response.StatusCode != test.want {
			t.Errorf("%s with %s %q has status %d, want %d", test.method, test.header, test.value,
				response.StatusCode, test.want)
		}
	}
	hans.until("join Grete")
}

// History.

func TestNewClientReceivesTheHistory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		grete := w.join("Grete", "kitchen")
		var want []string
		for n := range historySize + 10 {
			grete.send(fmt.Sprint(n))
			grete.received()
			want = append(want, fmt.Sprint("message Grete: ", n))
		}
		grete.send("/to Grete a note to myself")
		hans := w.join("Hans", "kitchen")
		hans.want(append(want[10:], "join Hans")...)
		if hans.welcome.Missed {
			t.Error("the welcome says missed to a user that is new")
		}
	})
}

// Whenever a client joins, the history and what follows have consecutive numbers.
func TestJoinDuringAFloodReceivesEachLineOnce(t *testing.T) {
	const joins = 100
	w := startTCP(t)
	w.join("Grete", "kitchen")
	defer w.flood("kitchen")()
	var newcomers sync.WaitGroup
	for n := range 4 {
		cookie := w.logIn(fmt.Sprint("Guest-", n))
		newcomers.Go(func() {
			for range joins / 4 {
				p := w.dial(cookie, "kitchen")
				if p == nil || p.row(0, 2*historySize) == 0 {
					return
				}
				p.Close()
			}
		})
	}
	newcomers.Wait()
}

// The same for a client that reconnects, unless its welcome says missed.
func TestReconnectDuringAFloodReceivesEachLineOnce(t *testing.T) {
	const breaks = 100
	w := startTCP(t)
	w.join("Grete", "kitchen")
	defer w.flood("kitchen")()
	cookie := w.logIn("Hans")
	p := w.dial(cookie, "kitchen")
	last := p.row(0, historySize)
	for range breaks {
		p.Close()
		if p = w.reconnect(cookie, "kitchen", p); p == nil {
			return
		}
		if last = p.row(last, historySize/2); last == 0 {
			return
		}
	}
}

// Private messages.

func TestPrivateMessageReachesItsSenderAndRecipientOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		cookie := w.logIn("Hans")
		grete, hans, tab, uwe := w.join("Grete", "kitchen"), w.dial(cookie, "kitchen"),
			w.dial(cookie, "kitchen"), w.join("Uwe", "kitchen")
		all := []*peer{grete, hans, tab, uwe}
		for _, p := range all {
			p.received()
		}
		grete.send("/to Hans meet me  at six")
		grete.send("/to hAnS bring wine") // whatever the capitals
		grete.send("/to Grete a note to myself")
		want := []string{"private Grete > Hans: meet me  at six", "private Grete > Hans: bring wine"}
		grete.want(append(want, "private Grete > Grete: a note to myself")...)
		hans.want(want...)
		tab.want(want...)
		uwe.want()
		ursel := w.join("Ursel", "kitchen")
		for _, line := range ursel.received() {
			if strings.HasPrefix(line, "private ") {
				t.Errorf("Ursel receives %q", line)
			}
		}
		for _, p := range []*peer{hans, tab} {
			p.leave()
		}
		time.Sleep(awayTime + time.Second)
		for _, line := range w.join("Hans", "kitchen").received() {
			if strings.HasPrefix(line, "private ") {
				t.Errorf("another Hans receives %q", line)
			}
		}
	})
}

// What was meant as a command goes to no other user.
func TestCommandMayStartWithAnyKindOfSlash(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		grete, hans, uwe := w.join("Grete", "kitchen"), w.join("Hans", "kitchen"),
			w.join("Uwe", "kitchen")
		for _, p := range []*peer{grete, hans, uwe} {
			p.received()
		}
		for _, command := range []string{"/to Hans hush", "  /to Hans hush", "／to Hans hush",
			"、to Hans hush", "／ｔｏ　Ｈａｎｓ　hush", "/TO hans hush", "/ to Hans hush",
			"\u200b/to Hans hush", "\ufeff/to Hans hush", "\u200f/to Hans hush",
			"\u2060 \u202b/to Hans hush", "\u00ad／to Hans hush", "\u3164/to Hans hush",
			"\u034f/to Hans hush", "\ufe0f/to Hans hush", "\u2800/to Hans hush", "⁄to Hans hush",
			"/to\tHans\u00a0hush", "\u2028/to Hans hush"} {
			grete.send(command)
			hans.want("private Grete > Hans: hush")
			uwe.want()
		}
		grete.received()
		for sent, want := range map[string]string{
			"/to Ursel hello":   "There is no user with that name in this room.",
			"/to":               "Write /to NAME text.",
			"/kick":             "Write /kick NAME.",
			"／ALLOW":            "Write /allow NAME.",
			"/kick Ursel":       "There is no user with that name in this room.",
			"/to Ha\u200bns hi": "There is no user with that name in this room.",
			"/":                 "Unknown command. There are /to NAME text, /kick NAME and /allow NAME.",
			"//":                "Unknown command. There are /to NAME text, /kick NAME and /allow NAME.",
			"/to Hans":          "Write /to NAME text.",
			"/tp Hans hush":     "Unknown command. There are /to NAME text, /kick NAME and /allow NAME.",
			"\u200b／tp Hans":    "Unknown command. There are /to NAME text, /kick NAME and /allow NAME.",
		} {
			grete.send(sent)
			grete.want("notice " + sent + ": " + want)
		}
		for _, text := range []string{"1/2", "a /to Hans x", "./to", "«/to»", "\u200fשלום", "and/or"} {
			grete.send(text)
			hans.want("message Grete: " + text)
			uwe.want("message Grete: " + text)
		}
		hans.want()
	})
}

// Kicks.

func TestKickedUserCannotReturn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		cookie := w.logIn("Hans")
		grete, hans, tab, uwe := w.join("Grete", "kitchen"), w.dial(cookie, "kitchen"),
			w.dial(cookie, "kitchen"), w.join("Uwe", "kitchen")
		for _, p := range []*peer{grete, hans, tab, uwe} {
			p.received()
		}
		grete.send("/kick hans")
		for _, p := range []*peer{hans, tab} {
			if lines := p.wantClose(errKicked); !slices.Equal(lines,
				[]string{"leave Hans: kicked by Grete"}) {
				t.Errorf("Hans receives %q before he goes", lines)
			}
		}
		grete.want("notice /kick hans: Done.", "leave Hans: kicked by Grete")
		uwe.want("leave Hans: kicked by Grete")
		if lines := w.dial(cookie, "kitchen").wantClose(errKicked); lines != nil {
			t.Errorf("back again he receives %q", lines)
		}
		w.dial(cookie, "garden")
		time.Sleep(2 * awayTime)
		uwe.want()
		w.join("Hans", "kitchen").received() // whose name it may be now
		uwe.want("join Hans")
	})
}

func TestNothingFromAKickedUserFollowsTheKick(t *testing.T) {
	w := startTCP(t)
	grete, uwe := w.join("Grete", "kitchen"), w.join("Uwe", "kitchen")
	uwe.until("join Uwe")
	for n := range 50 {
		name := fmt.Sprint("Hans-", n)
		cookie := w.logIn(name)
		var talk sync.WaitGroup
		tabs := []*peer{w.dial(cookie, "kitchen"), w.dial(cookie, "kitchen"), w.dial(cookie, "kitchen")}
		for _, tab := range tabs {
			talk.Go(func() {
				for tab.WriteMessage(websocket.TextMessage, []byte("blah")) == nil {
				}
			})
		}
		uwe.until("message " + name + ": blah")
		grete.send("/kick " + name)
		uwe.until("leave " + name + ": kicked by Grete")
		for _, tab := range tabs {
			<-tab.ended
		}
		talk.Wait()
		grete.send("quiet")
		if lines := uwe.until("message Grete: quiet"); len(lines) != 1 {
			t.Errorf("after the kick Uwe receives %q", lines)
		}
	}
}

func TestHostCanAllowAKickedUser(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		file := newFile(t)
		w := startPipedOn(t, file)
		owner, kicked := w.logIn("Grete"), w.logIn("Hans")
		grete, hans, uwe := w.dial(owner, "kitchen"), w.dial(kicked, "kitchen"), w.join("Uwe", "kitchen")
		grete.send("/kick Hans")
		hans.wantClose(errKicked)
		const none = "There is no removed user with that name whom you can allow."
		hub := w.room("kitchen")
		hub.do(func() {
			hub.kicks = append(hub.kicks,
				Kick{Identity: Identity{ID: "from a database without names"}})
		})
		for _, name := range []string{"Uwe", "Ursel", "Han5", "H\u0430ns", ":"} { // one has a Cyrillic а
			grete.received()
			grete.send("/allow " + name)
			grete.want("notice /allow " + name + ": " + none)
		}
		w.dial(kicked, "kitchen").wantClose(errKicked)
		w.exit()

		w = startPipedOn(t, file)
		grete = w.dial(owner, "kitchen")
		grete.received()
		w.dial(kicked, "kitchen").wantClose(errKicked)
		grete.send("/ALLOW hans")
		grete.want("notice /ALLOW hans: Done.")
		grete.send("/allow hans")
		grete.want("notice /allow hans: " + none)
		w.exit()

		w = startPipedOn(t, file)
		w.dial(kicked, "kitchen").wantJoined()
		uwe.Close()
	})
}

// A user that stands in for an absent owner decides for that time only.
func TestKicksOfAStandInEndWhenTheOwnerJoins(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		file := newFile(t)
		w := startPipedOn(t, file)
		owner, jens, ursel := w.logIn("Grete"), w.logIn("Jens"), w.logIn("Ursel")
		grete, uwe := w.dial(owner, "kitchen"), w.join("Uwe", "kitchen")
		w.dial(jens, "kitchen")
		grete.send("/kick Jens")
		grete.received()
		grete.leave()
		time.Sleep(awayTime + time.Second)
		kick := func() {
			t.Helper()
			p := w.dial(ursel, "kitchen")
			p.received()
			uwe.send("/kick Ursel")
			p.wantClose(errKicked)
			w.dial(ursel, "kitchen").wantClose(errKicked)
			uwe.received()
		}
		kick()
		uwe.send("/allow Ursel")
		uwe.want("notice /allow Ursel: Done.")
		kick()
		uwe.send("/allow Jens") // whom the owner has kicked
		uwe.want("notice /allow Jens: There is no removed user with that name whom you can allow.")
		grete = w.dial(owner, "kitchen")
		grete.received()
		w.dial(ursel, "kitchen").wantJoined()
		w.dial(jens, "kitchen").wantClose(errKicked)
		grete.leave()
		time.Sleep(awayTime + time.Second)
		kick()
		w.exit()

		w = startPipedOn(t, file)
		w.dial(ursel, "kitchen").wantClose(errKicked)
		w.dial(owner, "kitchen").wantJoined()
		w.dial(ursel, "kitchen").wantJoined()
		w.dial(jens, "kitchen").wantClose(errKicked)
	})
}

func TestRoomForgetsTheOldestKicks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		first, last := w.logIn("Mallory"), w.logIn("Malory")
		grete := w.join("Grete", "kitchen")
		w.dial(first, "kitchen")
		grete.send("/kick Mallory")
		grete.received()
		hub := w.room("kitchen")
		hub.do(func() {
			for n := range maxKicked - 1 {
				hub.kicks = append(hub.kicks, Kick{Identity: Identity{ID: fmt.Sprint(n)}})
			}
		})
		w.dial(first, "kitchen").wantClose(errKicked)
		w.dial(last, "kitchen")
		grete.send("/kick Malory")
		w.dial(last, "kitchen").wantClose(errKicked)
		if w.dial(first, "kitchen").received(); len(hub.kicks) != maxKicked {
			t.Errorf("the room remembers %d kicks, want %d", len(hub.kicks), maxKicked)
		}
	})
}

// A stand-in whose puppets fill the list pushes out no kick of the owner.
func TestKicksOfAStandInAreForgottenFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		kicked, puppet := w.logIn("Mallory"), w.logIn("Puppet")
		grete, uwe := w.join("Grete", "kitchen"), w.join("Uwe", "kitchen")
		w.dial(kicked, "kitchen")
		grete.send("/kick Mallory")
		grete.received()
		grete.leave()
		time.Sleep(awayTime + time.Second)
		w.dial(puppet, "kitchen")
		uwe.send("/kick Puppet")
		uwe.received()
		hub := w.room("kitchen")
		hub.do(func() {
			for n := range maxKicked - 2 {
				hub.kicks = append(hub.kicks, Kick{Identity: Identity{ID: fmt.Sprint(n)}})
			}
		})
		last := w.logIn("Malory")
		w.dial(last, "kitchen")
		uwe.send("/kick Malory")
		uwe.received()
		w.dial(kicked, "kitchen").wantClose(errKicked)
		w.dial(last, "kitchen").wantClose(errKicked)
		w.dial(puppet, "kitchen").wantJoined()
	})
}

// The user that opened the room is the host, or, while absent, the user that joined first.
// The host cannot be kicked.
func TestOnlyTheHostCanKick(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		cookie := w.logIn("Grete")
		grete, hans, uwe := w.dial(cookie, "kitchen"), w.join("Hans", "kitchen"), w.join("Uwe", "kitchen")
		refused := func(p *peer, line, why string) {
			t.Helper()
			p.received()
			p.send(line)
			p.want("notice " + line + ": " + why)
		}
		const self = "You cannot remove yourself."
		refused(hans, "/kick Uwe", "Only the host, Grete, can remove and allow users.")
		refused(hans, "/kick Grete", "Only the host, Grete, can remove and allow users.")
		refused(grete, "/kick Grete", self)
		grete.leave()
		synctest.Wait()
		// for she has not left yet
		refused(hans, "/kick Uwe", "Only the host, Grete, can remove and allow users.")
		time.Sleep(awayTime + time.Second)
		refused(uwe, "/kick Hans", "Only the host, Hans, can remove and allow users.")
		refused(hans, "/kick Hans", self)
		w.join("Grete", "kitchen").leave() // The owner is known by ID, not by name.
		refused(hans, "/allow Grete", "There is no removed user with that name whom you can allow.")
		time.Sleep(awayTime + time.Second)
		refused(hans, "/kick nobody", "There is no user with that name in this room.")
		grete = w.dial(cookie, "kitchen")
		refused(hans, "/kick Grete", "Only the host, Grete, can remove and allow users.")
		grete.leave()
		time.Sleep(awayTime + time.Second)
		hans.received()
		hans.send("/kick Uwe")
		uwe.wantClose(errKicked)
		hans.leave()
		time.Sleep(awayTime + time.Second)
		ursel := w.join("Ursel", "kitchen")
		w.join("Jens", "kitchen")
		refused(ursel, "/kick Hans", "There is no user with that name in this room.")
		pau1 := w.join("Pau1", "kitchen")
		refused(ursel, "/kick Paul", "There is no user with that name in this room.") // a confusable name
		refused(ursel, "/to Paul for him alone", "There is no user with that name in this room.")
		pau1.leave()
		ursel.send("/kick JENS")
		ursel.want("notice /kick JENS: Done.", "leave Jens: kicked by Ursel")
	})
}

// Rooms are independent.

func TestFloodInOneRoomDoesNotDelayAnother(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		if _, _, err := w.dialer().Dial("ws://pipe/room/kitchen/ws",
			http.Header{"Cookie": {w.logIn("Stuck")}}); err != nil {
			t.Fatal(err)
		}
		grete, hans := w.join("Grete", "garden"), w.join("Hans", "garden")
		grete.received()
		hans.received()
		kitchen := w.room("kitchen")
		over := make(chan struct{})
		go func() {
			for range sendQueueSize { // from the half of it on, each costs the kitchen a backpressureDelay
				kitchen.broadcast <- []byte("x")
			}
			close(over)
		}()
		start := time.Now()
		for n := range 10 {
			grete.send(fmt.Sprint(n))
			hans.want(fmt.Sprint("message Grete: ", n))
			uwe := w.join(fmt.Sprint("Uwe", n), "garden")
			hans.want(fmt.Sprint("join Uwe", n))
			uwe.leave()
		}
		if took := time.Since(start); took > 0 {
			t.Errorf("ten lines and joins take %v, want no time", took)
		}
		select {
		case <-over:
			t.Error("the flood is over before that")
		default:
		}
		<-over
	})
}

// Shutdown.

func TestShutdownSendsWhatIsQueuedInEveryRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		var peers []*peer
		for _, room := range []string{"kitchen", "garden", "cellar"} {
			for _, name := range []string{"Grete", "Hans"} {
				peers = append(peers, w.join(name, room))
			}
			synctest.Wait()
			w.room(room).broadcast <- []byte("last words")
		}
		stopped := make(chan struct{})
		go func() { w.stop(); close(stopped) }()
		for _, p := range peers {
			if lines := p.wantClose(errShuttingDown); len(lines) == 0 ||
				lines[len(lines)-1] != "message: last words" {
				t.Errorf("receives %q, want last words at the end", lines)
			}
		}
		<-stopped
		w.wantStatus(w.logIn("Late"), "kitchen", http.StatusServiceUnavailable)
	})
}

// The program.

func TestSIGTERMClosesEveryRoomAndExitsWithStatusZero(t *testing.T) {
	w, cmd, log := startProgram(t, "CHAT_KEY="+testKey, newFile(t))
	peers := []*peer{w.join("Grete", "kitchen"), w.join("Hans", "kitchen"), w.join("Uwe", "garden")}
	for _, p := range peers {
		p.until("join Grete", "join Hans", "join Uwe")
	}
	peers[0].send("last words")
	peers[0].until("message Grete: last words")
	start := time.Now()
	cmd.Process.Signal(syscall.SIGTERM)
	for _, p := range peers {
		p.wantClose(errShuttingDown)
	}
	io.Copy(io.Discard, log)
	if err := cmd.Wait(); err != nil {
		t.Errorf("it ends with %v, want status 0", err)
	}
	if took := time.Since(start); took > 4*time.Second {
		t.Errorf("it ends after %v, although everybody goes at once", took)
	}
}

// It counts from a second after the first.
func TestSecondSignalForcesExit(t *testing.T) {
	w, cmd, log := startProgram(t, "CHAT_KEY="+testKey, newFile(t))
	w.dialSilent(w.logIn("Stuck"), "kitchen") // which does not answer: the server waits for it
	start := time.Now()
	cmd.Process.Signal(syscall.SIGTERM)
	ended := make(chan bool)
	go func() { io.Copy(io.Discard, log); close(ended) }()
	for tick := time.Tick(10 * time.Millisecond); ; <-tick {
		select {
		case <-ended:
			cmd.Wait()
			if took := time.Since(start); cmd.ProcessState.Success() || took < forceAfter {
				t.Errorf("it ends with %v after %v, want the signal after %v", cmd.ProcessState, took,
					forceAfter)
			}
			return
		default:
			cmd.Process.Signal(syscall.SIGTERM)
		}
	}
}

func TestLoginsSurviveARestart(t *testing.T) {
	var cookie string
	file := newFile(t)
	for _, test := range []struct {
		key  string
		want int
	}{{"CHAT_KEY=" + testKey, 101}, {"CHAT_KEY=" + testKey, 101}, {"CHAT_KEY=", 401}} {
		w, cmd, log := startProgram(t, test.key, file)
		if cookie == "" {
			cookie = w.logIn("Grete")
		}
		if _, response, _ := w.try(cookie, "kitchen"); response == nil ||
			response.StatusCode != test.want {
			t.Errorf("with %s the handshake gets %v, want %d", test.key, response, test.want)
		}
		cmd.Process.Kill()
		io.Copy(io.Discard, log)
		cmd.Wait()
	}
}

func TestDatabaseKeepsTheKeyWithoutCHAT_KEY(t *testing.T) {
	file, cookie := newFile(t), ""
	for range 2 {
		w, cmd, log := startProgram(t, "CHAT_KEY=", file)
		if cookie == "" {
			client := &http.Client{CheckRedirect: func(*http.Request,
				[]*http.Request) error {
				return http.ErrUseLastResponse
			}}
			request, _ := http.NewRequest("POST", w.url, strings.NewReader("name=Grete&room=kitchen"))
			request.Host = "pipe" // as the cookie's name has the port
			request.Header.Set("Cookie", "chat=")
			request.Header.Set("Content-Type", "application/x-www-form-urlencoded")
			response, err := client.Do(request)
			if err != nil {
				t.Fatal(err)
			}
			response.Body.Close()
			cookie, _, _ = strings.Cut(response.Header.Get("Set-Cookie"), ";")
		}
		grete := w.dial(cookie, "kitchen")
		grete.send("dinner")
		grete.until("message Grete: dinner")
		cmd.Process.Signal(syscall.SIGTERM)
		io.Copy(io.Discard, log)
		cmd.Wait()
	}
}

func TestShortKeyIsOneLineAndStatusOne(t *testing.T) {
	output, status := runProgram(t, program(t, "CHAT_KEY="+testKey[:31], newFile(t)))
	if status != 1 || strings.Count(output, "\n") != 1 || !strings.Contains(output, "CHAT_KEY") {
		t.Errorf("status %d and output %q, want 1 and one line", status, output)
	}
}

func TestRoomWithoutATrailingSlashRedirects(t *testing.T) {
	w := &world{Rooms: newRooms(testKey, new(Store)), t: t}
	got := w.get(w.logIn("Grete"), "/room/kitchen")
	if got.Code != http.StatusTemporaryRedirect || got.Header().Get("Location") != "/room/kitchen/" {
		t.Errorf("without it the status is %d, and the location %q", got.Code,
			got.Header().Get("Location"))
	}
	if got := w.get(w.logIn("Grete"), "/room/kitchen/"); got.Code != http.StatusOK ||
		!strings.Contains(got.Body.String(), `>Grete</output>`) {
		t.Errorf("with it the status is %d, want 200 and the page with the name", got.Code)
	}
}

// The copied files.

// README.md, main.diff and home.diff show the whole difference to the files they come from:
// copy.sh makes the copies with them, and from the copies the same diffs.
func TestDiffsAreTheWholeDifference(t *testing.T) {
	root, here := copies(t)
	generate(t, here, "")
	for _, name := range []string{"main.go", "hub.go", "client.go", "home.html"} {
		if read(t, here, name) != read(t, ".", name) {
			t.Errorf("%s is not ../%s with its diff: "+
				"if you have edited ../%s, run go generate; if %s, make diffs",
				name, name, name, name)
		}
		if first, _, _ := strings.Cut(read(t, here, name), "\n"); !strings.Contains(first,
			"From ../"+name) {
			t.Errorf("%s starts with %q, want where it is from", name, first)
		}
	}
	generate(t, here, "diffs")
	for _, name := range []string{"README.md", "main.diff", "home.diff"} {
		if withoutNumbers(read(t, here, name)) != withoutNumbers(read(t, ".", name)) {
			t.Errorf("make diffs would change %s: run it", name)
		}
	}

	// A change on either side finds its way: of the chat server's files by go generate, and of
	// the copies by make diffs.
	change := func(dir, name, from, to string) {
		t.Helper()
		text := read(t, dir, name)
		if strings.Count(text, from) != 1 {
			t.Fatalf("%s has %d times %q", name, strings.Count(text, from), from)
		}
		os.WriteFile(filepath.Join(dir, name), []byte(strings.Replace(text, from, to, 1)), 0o644)
	}
	change(root, "hub.go", "func newHub() *Hub {\n", "func newHub() *Hub {\n\t// changed there\n")
	change(here, "hub.go", "\th.publish(Line{", "\t// changed here\n\th.publish(Line{")
	text := read(t, here, "hub.go")
	change(here, "hub.go", "func newHub() *Hub {\n", "func newHub() *Hub {\n\t// changed there\n")
	generate(t, here, "diffs")
	generate(t, here, "")
	if got := read(t, here, "hub.go"); strings.Count(got, "// changed ") != 2 ||
		!strings.Contains(read(t, here, "README.md"), "+\t// changed here") {
		t.Errorf("after a change on either side hub.go is %q, from %q", got, text)
	}

	// If a diff no longer applies, nothing changes.
	change(root, "hub.go", "\th.deliverTo(message, func(*Client) bool { return true })\n", "")
	before := read(t, here, "hub.go")
	cmd := exec.Command("sh", "copy.sh")
	cmd.Dir = here
	if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "hub.go") ||
		!strings.Contains(string(out), "make diffs") {
		t.Errorf("go generate ends with %v and %q", err, out)
	}
	if left, _ := filepath.Glob(filepath.Join(here, "*.[ro][er][ij]*")); len(left) > 0 ||
		read(t, here, "hub.go") != before {
		t.Errorf("then hub.go is changed, or there are %q", left)
	}
}

// The diff of hub.go and client.go stays one that is read at a glance.
func TestDiffStaysSmall(t *testing.T) {
	_, diff, _ := strings.Cut(read(t, ".", "README.md"), "```diff\n")
	diff, _, _ = strings.Cut(diff, "```\n")
	changed := 0
	for line := range strings.Lines(diff) {
		if strings.HasPrefix(line, "+") && !strings.HasPrefix(line, "+++") ||
			strings.HasPrefix(line, "-") && !strings.HasPrefix(line, "---") {
			changed++
		}
	}
	if changed == 0 || changed > 16 {
		t.Errorf("README.md shows %d changed lines, want 16 at most", changed)
	}
}

// copies returns the root of a copy of the chat server's files, and the folder beside them with
// ours.
func copies(t *testing.T) (root, here string) {
	root = t.TempDir()
	here = filepath.Join(root, "rooms")
	if err := os.Mkdir(here, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"main.go", "hub.go", "client.go", "home.html"} {
		os.WriteFile(filepath.Join(root, name), []byte(read(t, "..", name)), 0o644)
	}
	for _, name := range []string{"copy.sh", "README.md", "main.diff", "home.diff"} {
		os.WriteFile(filepath.Join(here, name), []byte(read(t, ".", name)), 0o644)
	}
	return root, here
}

// withoutNumbers removes the numbers of lines, which patch does not need, from a diff.
func withoutNumbers(diff string) string {
	return regexp.MustCompile(`(?m)^@@.*@@`).ReplaceAllString(diff, "@@")
}

func read(t *testing.T, dir, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// generate runs copy.sh in dir.
func generate(t *testing.T, dir, argument string) {
	t.Helper()
	cmd := exec.Command("sh", "copy.sh", argument)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("copy.sh %s: %v: %s", argument, err, out)
	}
}

func TestCodeStaysSmall(t *testing.T) {
	for names, limit := range map[string]int{"rooms.go room.go": 420, "login.go": 87,
		"store.go": 250, "database.go": 170, "names.go": 40} {
		lines := 0
		for name := range strings.FieldsSeq(names) {
			for line := range strings.Lines(read(t, ".", name)) {
				if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "//") {
					lines++
				}
			}
		}
		if lines > limit {
			t.Errorf("%s: %d lines of code, want at most %d", names, lines, limit)
		}
	}
}

func TestLinesFitInto100Columns(t *testing.T) {
	names, err := filepath.Glob("*.go")
	if err != nil || len(names) == 0 {
		t.Fatal(names, err)
	}
	for _, name := range names {
		n := 0
		for line := range strings.Lines(read(t, ".", name)) {
			if n++; utf8.RuneCountInString(strings.TrimSuffix(line, "\n")) > 100 {
				t.Errorf("%s:%d is wider than 100 columns: %s", name, n, line)
			}
		}
	}
}

// Helpers.

// A logBook is what the program logs, from any goroutine.
type logBook struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *logBook) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logBook) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

func (l *logBook) Reset() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.text.Reset()
}

// patience only bounds how long a failing test takes.
const patience = 5 * time.Minute

const testKey = "a key of 32 bytes, as for CHAT_KEY"

func TestMain(m *testing.M) {
	if os.Getenv("RUN_MAIN") != "" {
		main()
		os.Exit(0)
	}
	log.SetOutput(io.Discard)
	os.Exit(m.Run())
}

// A world is a running server.
type world struct {
	*Rooms
	t       testing.TB
	url     string
	connect func() (net.Conn, error)
	crash   func() // as kill -9 does
	exit    func() // as SIGTERM does
}

func startTCP(t testing.TB) *world { t.Helper(); return startTCPOn(t, newFile(t)) }

// startTCPOn starts a server whose database is in file.
func startTCPOn(t testing.TB, file string) *world {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w := startOn(t, file, listener, func() (net.Conn,
		error) {
		return net.Dial("tcp", listener.Addr().String())
	})
	w.url = "http://" + listener.Addr().String()
	return w
}

// startPiped starts a server whose connections are pipes, for a synctest bubble.
func startPiped(t testing.TB) *world { t.Helper(); return startPipedOn(t, newFile(t)) }

func startPipedOn(t testing.TB, file string) *world {
	t.Helper()
	pipes := make(pipeListener)
	return startOn(t, file, pipes, func() (net.Conn, error) {
		here, there := net.Pipe()
		pipes <- there
		return here, nil
	})
}

func startOn(t testing.TB, file string, listener net.Listener,
	connect func() (net.Conn, error)) *world {
	t.Helper()
	store, err := openStore(file)
	if err != nil {
		t.Fatal(err)
	}
	rooms := newRooms(testKey, store)
	server := &http.Server{Handler: rooms.handler()}
	go server.Serve(listener)
	stop := sync.OnceFunc(func() { rooms.stop(); server.Close() })
	crashed := false
	t.Cleanup(func() {
		stop()
		if !crashed {
			if err := store.close(); err != nil {
				t.Error(err)
			}
		}
	})
	// The store ends without a last commit, as if the process was killed.
	crash := func() {
		crashed = true
		stop()
		store.operations <- nil
		synctest.Wait()
		store.db.DB.Close()
		store.db.lock.Unlock()
	}
	exit := func() {
		crashed = true
		stop()
		if err := store.close(); err != nil {
			t.Error(err)
		}
	}
	return &world{rooms, t, "http://pipe", connect, crash, exit}
}

// program returns the command that runs the program, with its database in file and one
// more variable in its environment.
func program(t *testing.T, variable, file string) *exec.Cmd {
	t.Helper()
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, program, "-addr", "127.0.0.1:0", "-db", file)
	cmd.Env = append(os.Environ(), "RUN_MAIN=1", variable)
	return cmd
}

// startProgram starts the program, and returns its log after the first line.
func startProgram(t *testing.T, variable, file string) (*world, *exec.Cmd, *bufio.Reader) {
	t.Helper()
	cmd := program(t, variable, file)
	log := startLogged(t, cmd)
	line, err := log.ReadString('\n')
	if !strings.Contains(line, "listening on") {
		t.Fatalf("it logs %q, %v, want where it listens", line, err)
	}
	return startedProgram(t, line), cmd, log
}

// startLogged starts cmd, and returns its log.
func startLogged(t *testing.T, cmd *exec.Cmd) *bufio.Reader {
	t.Helper()
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return bufio.NewReader(stderr)
}

// startedProgram returns the world of a program that has logged where it listens.
func startedProgram(t *testing.T, line string) *world {
	address := regexp.MustCompile(`listening on http://(.*)/`).FindStringSubmatch(line)[1]
	connect := func() (net.Conn, error) { return net.Dial("tcp", address) }
	return &world{newRooms(testKey, new(Store)), t, "http://" + address, connect, nil, nil}
}

// newFile returns the path of a file for a database.
func newFile(t testing.TB) string { return filepath.Join(t.TempDir(), "rooms.db") }

type pipeListener chan net.Conn

func (l pipeListener) Accept() (net.Conn, error) {
	if conn, ok := <-l; ok {
		return conn, nil
	}
	return nil, net.ErrClosed
}
func (l pipeListener) Close() error   { close(l); return nil }
func (l pipeListener) Addr() net.Addr { return &net.IPAddr{} }

// logIn returns the cookie of a new user.
func (w *world) logIn(name string) string { w.t.Helper(); return w.logInAs(w.t, name, "") }

// logInAs sends the form, with a cookie, and returns the new one.
func (rs *Rooms) logInAs(t testing.TB, name, cookie string) string {
	t.Helper()
	response := rs.post(name, "kitchen", cmp.Or(cookie, "chat="))
	value, _, _ := strings.Cut(response.Header().Get("Set-Cookie"), ";")
	if value == "" {
		t.Fatalf("%q cannot log in: status %d", name, response.Code)
	}
	return value
}

// post sends the form, with the empty cookie of the form or with another one.
func (rs *Rooms) post(name, room string, cookie ...string) *httptest.ResponseRecorder {
	request := httptest.NewRequest("POST", "/", strings.NewReader(url.Values{"name": {name},
		"room": {room}}.Encode()))
	request.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	request.Header.Set("Cookie", strings.Join(append(cookie, cookieName(request)+"=")[:1], ""))
	response := httptest.NewRecorder()
	rs.handler().ServeHTTP(response, request)
	return response
}

func (w *world) logOutAs(cookie string) *httptest.ResponseRecorder {
	request := httptest.NewRequest("POST", "/logout", nil)
	request.Header.Set("Cookie", cookie)
	response := httptest.NewRecorder()
	w.handler().ServeHTTP(response, request)
	return response
}

func (w *world) get(cookie, path string) *httptest.ResponseRecorder {
	request := httptest.NewRequest("GET", path, nil)
	request.Header.Set("Cookie", cookie)
	response := httptest.NewRecorder()
	w.handler().ServeHTTP(response, request)
	return response
}

func (w *world) dialer() *websocket.Dialer {
	return &websocket.Dialer{
		HandshakeTimeout: patience,
		NetDialContext:   func(context.Context, string, string) (net.Conn, error) { return w.connect() },
	}
}

// try connects the user with the cookie to a room.
func (w *world) try(cookie, room string, query ...string) (*peer, *http.Response, error) {
	conn, response, err := w.dialer().Dial("ws://pipe/room/"+room+"/ws"+strings.Join(query, ""),
		http.Header{"Cookie": {cookie}})
	if err != nil {
		return nil, response, err
	}
	w.t.Cleanup(func() { conn.Close() })
	return newPeer(w.t, conn), response, nil
}

// dial does the same, and reports an error. Any goroutine may call it.
func (w *world) dial(cookie, room string, query ...string) *peer {
	w.t.Helper()
	p, response, err := w.try(cookie, room, query...)
	if err != nil {
		w.t.Errorf("cannot join the room %s: %v, %v", room, err, response)
	}
	return p
}

// join connects a new user to a room.
func (w *world) join(name, room string) *peer { w.t.Helper(); return w.dial(w.logIn(name), room) }

// reconnect connects the user of p again, to receive what p has missed.
func (w *world) reconnect(cookie, room string, p *peer) *peer {
	w.t.Helper()
	back := w.dial(cookie, room, fmt.Sprintf("?room=%s&after=%d", p.welcome.RoomID, p.last))
	if back != nil {
		back.room, back.last = p.welcome.RoomID, p.last
	}
	return back
}

// dialAndSend connects, and sends text as soon as the handshake response arrives.
func (w *world) dialAndSend(cookie, room, text string) *peer {
	w.t.Helper()
	conn, response, err := w.dialer().Dial("ws://pipe/room/"+room+"/ws",
		http.Header{"Cookie": {cookie}})
	if err != nil {
		w.t.Fatalf("cannot join the room %s: %v, %v", room, err, response)
	}
	conn.WriteMessage(websocket.TextMessage, []byte(text))
	return newPeer(w.t, conn)
}

// dialSilent connects, reads one message, and then neither answers nor closes.
func (w *world) dialSilent(cookie, room string) {
	w.t.Helper()
	conn, response, err := w.dialer().Dial("ws://pipe/room/"+room+"/ws",
		http.Header{"Cookie": {cookie}})
	if err != nil {
		w.t.Fatalf("cannot join the room %s: %v, %v", room, err, response)
	}
	w.t.Cleanup(func() { conn.Close() })
	conn.SetCloseHandler(func(int, string) error { return nil })
	conn.ReadMessage()
}

// wantStatus checks that the handshake is refused with a reason.
func (w *world) wantStatus(cookie, room string, want int) {
	w.t.Helper()
	_, response, err := w.try(cookie, room)
	if err == nil || response == nil || response.StatusCode != want {
		w.t.Errorf("the handshake gets %v, %v, want status %d", response, err, want)
		return
	}
	if reason, _ := io.ReadAll(response.Body); len(reason) == 0 {
		w.t.Errorf("status %d has no reason", want)
	}
}

func (w *world) room(name string) *Hub {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.hubs[fold(name)]
}

// wantRooms checks which rooms are open once all goroutines are idle.
func (w *world) wantRooms(want ...string) {
	w.t.Helper()
	synctest.Wait()
	w.mu.Lock()
	defer w.mu.Unlock()
	var got []string
	for name := range w.hubs {
		got = append(got, name)
	}
	if slices.Sort(got); !slices.Equal(got, want) {
		w.t.Errorf("there are the rooms %q, want %q", got, want)
	}
}

// flood broadcasts in a room without end, until the function that it returns is called.
func (w *world) flood(room string) (stop func()) {
	hub, over := w.room(room), make(chan struct{})
	var flood sync.WaitGroup
	flood.Go(func() {
		for {
			select {
			case hub.broadcast <- []byte("x"):
			case <-over:
				return
			}
		}
	})
	return func() { close(over); flood.Wait() }
}

// A peer is the client's side of a connection. It always reads, as a browser does.
type peer struct {
	*websocket.Conn
	t     testing.TB
	ended chan struct{} // closed when a read has failed
	err   error         // of that read

	mu      sync.Mutex
	lines   []Line
	news    chan struct{} // receives when there are new lines
	welcome *Line         // set by takeLines
	room    string        // with last, of the previous connection
	last    int64         // the number of the last line that takeLines has returned
	largest int           // size of the largest message
	longest int           // size of the longest line
}

func newPeer(t testing.TB, conn *websocket.Conn) *peer {
	p := &peer{Conn: conn, t: t, ended: make(chan struct{}), news: make(chan struct{}, 1)}
	go func() {
		defer close(p.ended)
		for {
			_, message, err := conn.ReadMessage()
			if err != nil {
				p.err = err
				return
			}
			p.mu.Lock()
			p.largest = max(p.largest, len(message))
			for text := range bytes.SplitSeq(message, newline) {
				var line Line
				decoder := json.NewDecoder(bytes.NewReader(text))
				decoder.DisallowUnknownFields()
				if err := decoder.Decode(&line); err != nil || decoder.More() {
					t.Errorf("a line is %q: %v", text, err)
				}
				p.longest = max(p.longest, len(text))
				p.lines = append(p.lines, line)
			}
			p.mu.Unlock()
			select {
			case p.news <- struct{}{}:
			default:
			}
		}
	}()
	return p
}

// leave sends a close frame and closes the connection, as a tab does.
func (p *peer) leave() {
	p.WriteControl(websocket.CloseMessage, websocket.FormatCloseMessage(websocket.CloseGoingAway, ""),
		time.Now().Add(patience))
	<-p.ended
	p.Close()
}

func (p *peer) send(text string) {
	p.t.Helper()
	if err := p.WriteMessage(websocket.TextMessage, []byte(text)); err != nil {
		p.t.Errorf("sending %.99q fails with %v", text, err)
	}
}

// takeLines returns the lines received since its last call, without the welcome. It checks
// that the welcome is the first, and that each line has a time, and numbers increase.
func (p *peer) takeLines() (lines []Line) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, line := range p.lines {
		if (line.Kind == "welcome") != (p.welcome == nil) {
			p.t.Errorf("receives %v, want one welcome, as the first line", line)
		}
		switch numbered := line.Kind == "message" || line.Kind == "private"; {
		case line.Time.IsZero() || numbered != (line.N > 0) || numbered && line.N <= p.last:
			p.t.Errorf("receives %+v after number %d", line, p.last)
		case numbered:
			p.last = line.N
		}
		if line.Kind == "welcome" {
			p.welcome = &line
			if line.RoomID != p.room {
				p.last = 0
			}
		} else {
			lines = append(lines, line)
		}
	}
	p.lines = nil
	return lines
}

// take returns the same as text.
func (p *peer) take() (words []string) {
	for _, line := range p.takeLines() {
		text := line.Kind
		if line.User != "" {
			text += " " + line.User
		}
		if line.To != "" {
			text += " > " + line.To
		}
		if line.Kind == "notice" {
			text += " " + line.Line
		}
		if line.Text != "" {
			text += ": " + line.Text
		}
		words = append(words, text)
	}
	return words
}

// received does so once all goroutines of the synctest bubble are idle.
func (p *peer) received() []string { synctest.Wait(); return p.take() }

// receivedLines does the same, and returns lines.
func (p *peer) receivedLines() []Line { synctest.Wait(); return p.takeLines() }

// want checks that p has received these lines, and no others.
func (p *peer) want(want ...string) {
	p.t.Helper()
	if got := p.received(); !slices.Equal(got, want) {
		p.t.Errorf("receives %q, want %q", got, want)
	}
}

// wantJoined checks that p has been let in.
func (p *peer) wantJoined() {
	p.t.Helper()
	if p.received(); p.welcome == nil {
		p.t.Error("the client receives no welcome")
	}
}

// more waits for new lines, and reports whether there are any.
func (p *peer) more() bool {
	p.t.Helper()
	select {
	case <-p.news:
		return true
	case <-p.ended:
		p.mu.Lock()
		defer p.mu.Unlock()
		return len(p.lines) > 0
	case <-time.After(patience):
		p.t.Errorf("receives nothing within %v", patience)
		return false
	}
}

// until waits for the first of these lines, and returns all lines received until then.
func (p *peer) until(want ...string) (lines []string) {
	p.t.Helper()
	for p.more() {
		lines = append(lines, p.take()...)
		if slices.ContainsFunc(want, func(line string) bool { return slices.Contains(lines, line) }) {
			return lines
		}
	}
	p.t.Errorf("the connection has ended, want %q", want)
	return lines
}

// row waits for count lines, and returns the number of the last. It checks that they follow
// number after without a gap, unless the welcome says that some are missing.
func (p *peer) row(after int64, count int) int64 {
	p.t.Helper()
	for count > 0 {
		isNew := p.welcome == nil
		lines := p.takeLines()
		if isNew && p.welcome != nil && p.welcome.Missed {
			after = 0
		}
		lines = slices.DeleteFunc(lines, func(line Line) bool { return line.N == 0 })
		for _, line := range lines {
			if after > 0 && line.N != after+1 {
				p.t.Errorf("number %d follows %d", line.N, after)
				return 0
			}
			after = line.N
		}
		count -= len(lines)
		if count > 0 && !p.more() {
			return 0
		}
	}
	return after
}

// wantClose waits until the connection ends, and returns the lines before that.
func (p *peer) wantClose(want *websocket.CloseError) (lines []string) {
	p.t.Helper()
	select {
	case <-p.ended:
	case <-time.After(patience):
		p.t.Errorf("the connection does not end within %v", patience)
		return nil
	}
	var got *websocket.CloseError
	if !errors.As(p.err, &got) || *got != *want {
		p.t.Errorf("the connection ends with %v, want %v", p.err, want)
	}
	// A client that is refused receives no welcome.
	p.mu.Lock()
	none := len(p.lines) == 0
	p.mu.Unlock()
	if none {
		return nil
	}
	return p.take()
}
