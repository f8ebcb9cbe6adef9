package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/securecookie"
	"github.com/gorilla/websocket"
)

// The tests stand in the order of what README.md promises. The rig is at the end.

// Rooms: made when the first comes, removed when the last has left.

func TestRoomIsMadeForTheFirstAndRemovedAfterTheLast(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		grete, hans, uwe := w.join("Grete", "kitchen"), w.join("Hans", "kitchen"), w.join("Uwe", "garden")
		w.wantRooms("garden", "kitchen")
		grete.leave()
		w.wantRooms("garden", "kitchen")
		uwe.leave()
		w.wantRooms("kitchen")
		hans.leave()
		w.wantRooms()
	})
}

func TestRoomIsOneForAllWhoAreInIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		grete, hans, uwe := w.join("Grete", "kitchen"), w.join("Hans", "kitchen"), w.join("Uwe", "garden")
		for _, p := range []*peer{grete, hans, uwe} {
			p.heard()
		}
		grete.say("dinner")
		uwe.say("weeds")
		grete.want("Grete: dinner")
		hans.want("Grete: dinner")
		uwe.want("Uwe: weeds")
	})
}

// A room that is made anew while its last client leaves must be one for all who come,
// and nobody may be refused: what naive rooms get wrong in one of two hundred reloads.
func TestTwoThousandReloadsNeverMeetAnErrorOrAnEmptyTwin(t *testing.T) {
	before := runtime.NumGoroutine()
	w := startTCP(t)
	cookies := []string{w.logIn("Grete"), w.logIn("Hans")}
	last := w.dial(cookies[0], "kitchen")
	for n := range 1000 {
		var peers [2]*peer
		var both sync.WaitGroup
		both.Go(func() { last.leave() })
		for i := range peers {
			both.Go(func() { peers[i] = w.dial(cookies[i], "kitchen") })
		}
		both.Wait()
		if t.Failed() {
			return
		}
		text := fmt.Sprint("reload ", n)
		peers[0].say(text)
		for _, p := range peers {
			p.until("Grete: " + text)
		}
		peers[0].leave()
		last = peers[1]
	}
	last.leave()
	w.wantNoRoom()
	w.close()
	for start := time.Now(); runtime.NumGoroutine() > before; runtime.Gosched() {
		if time.Since(start) > patience {
			t.Fatalf("%d goroutines, %d before", runtime.NumGoroutine(), before)
		}
	}
}

// Limits count who is in the room, not who is at its door.
func TestRoomTakesNoMorePeopleThanItsLimit(t *testing.T) {
	w := startTCP(t)
	var in, full atomic.Int32
	var all sync.WaitGroup
	for n := range maxSeats + 50 {
		cookie := w.logIn(fmt.Sprint("Guest", n))
		all.Go(func() {
			_, response, err := w.try(cookie, "kitchen")
			switch {
			case err == nil:
				in.Add(1)
			case response != nil && response.StatusCode == http.StatusServiceUnavailable:
				if reason, _ := io.ReadAll(response.Body); strings.TrimSpace(string(reason)) != "This room is full." {
					t.Errorf("the reason is %q", reason)
				}
				full.Add(1)
			default:
				t.Error(err)
			}
		})
	}
	all.Wait()
	if in.Load() != maxSeats || full.Load() != 50 {
		t.Errorf("%d are in and %d got 503, want %d and 50", in.Load(), full.Load(), maxSeats)
	}
	if got := w.get(w.logIn("Late"), "/room/kitchen/"); got.Code != http.StatusServiceUnavailable || !strings.Contains(got.Body.String(), "This room is full.") {
		t.Errorf("the page has status %d, want 503 and the reason", got.Code)
	}
}

func TestThereAreNoMoreRoomsThanTheirLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		cookie := w.logIn("Grete")
		first := w.dial(cookie, "room0")
		for n := range maxRooms - 1 {
			w.dial(cookie, fmt.Sprint("room", n+1))
		}
		w.wantStatus(cookie, "onemore", http.StatusServiceUnavailable)
		w.dial(w.logIn("Hans"), "room1")
		first.leave()
		synctest.Wait()
		w.dial(cookie, "onemore")
	})
}

// Names: the server knows who speaks.

func TestWhoHasNotLoggedInGets401AndTheForm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		good := w.logIn("Grete")
		foreign := newRooms("another key").logInAs(t, "Grete", "")
		for _, cookie := range []string{"", "chat=", "chat=Grete", good[:len(good)-4] + "AAAA", foreign} {
			w.wantStatus(cookie, "kitchen", http.StatusUnauthorized)
			got := w.get(cookie, "/room/kitchen/")
			if got.Code != http.StatusUnauthorized || !strings.Contains(got.Body.String(), `name="name"`) {
				t.Errorf("with %q the page has status %d, want 401 and the form", cookie, got.Code)
			}
		}
		w.wantRooms()
	})
}

func TestFormSetsACookieThatScriptsAndOtherSitesCannotUse(t *testing.T) {
	request := httptest.NewRequest("POST", "/", strings.NewReader("name=Grete&room=K%C3%BCche"))
	request.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	got := httptest.NewRecorder()
	newRooms("key").handler().ServeHTTP(got, request)
	if got.Code != http.StatusSeeOther || !strings.EqualFold(got.Header().Get("Location"), "/room/K%C3%BCche/") {
		t.Errorf("got status %d and location %q, want 303 and the room's", got.Code, got.Header().Get("Location"))
	}
	cookie := got.Result().Cookies()[0]
	if !cookie.HttpOnly || cookie.SameSite != http.SameSiteLaxMode || cookie.Path != "/" {
		t.Errorf("the cookie is %v", cookie)
	}

	request.Header.Set("Sec-Fetch-Site", "cross-site")
	got = httptest.NewRecorder()
	newRooms("key").handler().ServeHTTP(got, request)
	if got.Code != http.StatusForbidden {
		t.Errorf("another site's form gets status %d, want 403", got.Code)
	}
}

func TestOnlyNamesThatCannotPassForSomethingElseAreTaken(t *testing.T) {
	for _, name := range []string{"Grete", "grete-2", "Jörg", "Ἀθηνᾶ", "Дмитрий", "世界", "مريم", strings.Repeat("x", 32)} {
		if got := parseName(name); got != name {
			t.Errorf("%q is taken as %q", name, got)
		}
	}
	for _, name := range []string{"", " ", "Grete ", "Grete Hans", "Grete:", "Grete: hi", "* Grete", "*", "/to", "_", "-x", "a/b", "a.b", "..",
		"\u3164", "Grete\u200b", "Grete\u202e", "\u0301", "Grete\u00a0", "🦊", "a\nb", "\xff", strings.Repeat("x", 33)} {
		if got := parseName(name); got != "" {
			t.Errorf("%q is taken as %q", name, got)
		}
	}
	for written, want := range map[string]string{"Jo\u0308rg": "Jörg", "\uff27rete": "Grete"} { // two ways to write the same
		if got := parseName(written); got != want {
			t.Errorf("%q is taken as %q, want %q", written, got, want)
		}
	}
}

func TestNameIsRefusedThatLooksLikeOneInTheRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		grete := w.join("Gretel", "kitchen")
		for n, name := range []string{"Gretel", "gretel", "GreteI", "Grete1", "Gr\u0435tel"} { // the last one's е is Cyrillic
			if lines := w.join(name, "kitchen").wantGoodbye(nameTaken); lines != nil {
				t.Errorf("%q hears %q", name, lines)
			}
			w.join(name, fmt.Sprint("garden", n))
		}
		grete.want("* Gretel has come.", "* Gretel is here.") // and nothing of them
		grete.leave()
		synctest.Wait()
		w.join("GreteI", "kitchen").want("* GreteI has come.", "* GreteI is here.")
	})
}

// Whatever somebody says, others read it as theirs: behind their name.
func TestNobodyCanSayALineOfSomebodyElseOrTheServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		mallory, hans := w.join("Mallory", "kitchen"), w.join("Hans", "kitchen")
		mallory.heard()
		hans.heard()
		for _, text := range []string{"hello", "Grete: hello", "* Grete has left.", "\nGrete: hello", "x\nGrete: hello", "x\r* Grete has left.",
			": ", "\x00Grete: hello", "Mallory: /to Hans x", "/to Hans * Grete has left.", "/to Hans \nGrete: hello", " /to Hans Grete: x"} {
			mallory.say(text)
			for _, line := range hans.heard() {
				if !strings.HasPrefix(line, "Mallory: ") {
					t.Errorf("Mallory says %q, and Hans hears %q", text, line)
				}
			}
		}
	})
}

func TestLongestMessageIsTakenBehindTheLongestName(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		name := strings.Repeat("n", maxNameSize)
		p := w.join(name, "kitchen")
		p.heard()
		text := strings.Repeat("x", maxMessageSize)
		p.say(text)
		p.want(name + ": " + text)
		p.say(text + "x")
		p.wantGoodbye(tooBig)
	})
}

// Batches are still one frame below 32 KiB each: lines are longer than messages here.
func TestBatchesOfLongLinesStayBelow32KiB(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		name := strings.Repeat("n", maxNameSize)
		conn, _, err := w.dialer().Dial("ws://pipe/room/kitchen/ws", http.Header{"Cookie": {w.logIn(name)}})
		if err != nil {
			t.Fatal(err)
		}
		room := w.room("kitchen")
		line := name + ": " + strings.Repeat("x", maxMessageSize)
		short := line[:500] // leaves its batch more room at the end than a message takes, and less than a line
		synctest.Wait()     // writePump is busy with the server's own words
		for n := range sendQueueSize - 1 {
			text := line
			if n == 0 {
				text = short
			}
			room.broadcast <- []byte(text)
			synctest.Wait()
		}
		largest, lines := 0, 0
		for lines < sendQueueSize-1 {
			_, message, err := conn.ReadMessage()
			if err != nil {
				t.Fatal(err)
			}
			largest = max(largest, len(message))
			lines += strings.Count(string(message), short)
		}
		if largest < 31<<10 || largest > maxBatchSize {
			t.Errorf("the largest batch has %d bytes, want nearly %d", largest, maxBatchSize)
		}
	})
}

// Comings and goings.

func TestServerSaysWhoComesWhoLeavesAndWhoIsHere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		grete := w.join("Grete", "kitchen")
		grete.want("* Grete has come.", "* Grete is here.")
		cookie := w.logIn("Hans")
		hans := w.dial(cookie, "kitchen")
		hans.wantAnyOrder("* Hans has come.", "* Grete is here.", "* Hans is here.")
		grete.want("* Hans has come.")
		tab := w.dial(cookie, "kitchen") // which is no news
		tab.wantAnyOrder("* Grete is here.", "* Hans is here.")
		hans.leave()
		synctest.Wait()
		tab.leave()
		grete.want("* Hans has left.")
		if more := grete.heard(); more != nil {
			t.Errorf("Grete hears %q, too", more)
		}
	})
}

func TestRequestThatIsNoHandshakeIsNotAnnounced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		hans := w.join("Hans", "kitchen")
		hans.heard()
		cookie := w.logIn("Grete")
		if got := w.get(cookie, "/room/kitchen/ws"); got.Code != http.StatusBadRequest {
			t.Errorf("without an upgrade the status is %d, want 400", got.Code)
		}
		for _, origin := range []string{"http://elsewhere", "null"} {
			dialer := w.dialer()
			_, response, err := dialer.Dial("ws://pipe/room/kitchen/ws", http.Header{"Cookie": {cookie}, "Origin": {origin}})
			if err == nil || response.StatusCode != http.StatusForbidden {
				t.Errorf("from origin %q: got %v, want status 403", origin, err)
			}
		}
		if more := hans.heard(); more != nil {
			t.Errorf("Hans hears %q, want nothing", more)
		}
	})
}

// History.

func TestNewcomerHearsTheLastLinesThatWereSaid(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		grete := w.join("Grete", "kitchen")
		grete.heard()
		var want []string
		for n := range historySize + 10 {
			grete.say(fmt.Sprint(n))
			want = append(want, fmt.Sprint("Grete: ", n))
		}
		grete.say("/to Grete a note to myself")
		hans := w.join("Hans", "kitchen")
		if got, want := hans.heard(), append(want[10:], "* Hans has come."); len(got) != len(want)+2 || !slices.Equal(got[:len(want)], want) {
			t.Errorf("Hans hears %q, want %q and who is here", got, want)
		}
	})
}

func TestHistoryGoesWithItsRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		grete := w.join("Grete", "kitchen")
		grete.say("a secret")
		grete.leave()
		synctest.Wait()
		w.join("Hans", "kitchen").want("* Hans has come.", "* Hans is here.")
	})
}

// Whenever one joins, the last lines and what is said from then on are one row.
func TestJoinsDuringAFloodMissNothingAndHearNothingTwice(t *testing.T) {
	const joins = 100
	w := startTCP(t)
	w.join("Grete", "kitchen")
	room := w.room("kitchen")
	over := make(chan struct{})
	var flood, newcomers sync.WaitGroup
	flood.Go(func() {
		for n := 0; ; n++ {
			select {
			case room.broadcast <- fmt.Appendf(nil, "Grete: %d", n):
			case <-over:
				return
			}
		}
	})
	for n := range 4 {
		newcomers.Go(func() {
			for i := range joins / 4 {
				p := w.join(fmt.Sprintf("Guest%d-%d", n, i), "kitchen")
				if p == nil {
					return
				}
				next, heard := -1, 0
				for heard < 2*historySize && !t.Failed() {
					for _, line := range p.next() {
						var number int
						if _, err := fmt.Sscanf(line, "Grete: %d", &number); err != nil {
							continue // the server's own
						}
						if next >= 0 && number != next {
							t.Errorf("%d comes where %d should, after %d lines", number, next, heard)
						}
						next, heard = number+1, heard+1
					}
				}
				p.Close()
			}
		})
	}
	newcomers.Wait()
	close(over)
	flood.Wait()
}

// Lines to one person.

func TestToReachesOnePersonAloneAndItsSender(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		cookie := w.logIn("Hans")
		grete, hans, tab, uwe := w.join("Grete", "kitchen"), w.dial(cookie, "kitchen"), w.dial(cookie, "kitchen"), w.join("Uwe", "kitchen")
		all := []*peer{grete, hans, tab, uwe}
		for _, p := range all {
			p.heard()
		}
		grete.say("/to Hans meet me at six")
		grete.say("/to hans bring wine") // by the name's skeleton
		grete.say("/to Grete a note to myself")
		grete.want("Grete: /to Hans meet me at six", "Grete: /to hans bring wine", "Grete: /to Grete a note to myself")
		for _, p := range []*peer{hans, tab} {
			p.want("Grete: /to Hans meet me at six", "Grete: /to hans bring wine")
		}
		for _, p := range all {
			if more := p.heard(); more != nil {
				t.Errorf("somebody hears %q, too", more)
			}
		}
	})
}

func TestToWhoIsNotHereIsAnsweredToItsSenderAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		grete, hans := w.join("Grete", "kitchen"), w.join("Hans", "kitchen")
		w.join("Uwe", "garden")
		grete.heard()
		hans.heard()
		for said, want := range map[string]string{
			"/to Uwe hello": `* "Uwe" is not here.`,
			"/to":           `* "" is not here.`,
			"/kick Uwe":     `* "Uwe" is not here.`,
			"/":             "* There are two commands, /to NAME text and /kick NAME.",
			"/tp Hans hush": "* There are two commands, /to NAME text and /kick NAME.",
		} {
			grete.say(said)
			grete.want("Grete: "+said, want)
		}
		grete.say("/to " + strings.Repeat("\u200b", 150))
		for _, line := range grete.heard() {
			if len(line) > maxLineSize {
				t.Errorf("the answer has %d bytes, want at most %d", len(line), maxLineSize)
			}
		}
		if more := hans.heard(); more != nil {
			t.Errorf("Hans hears %q, want nothing", more)
		}
	})
}

// Sending away.

func TestWhoOpenedTheRoomCanSendSomebodyAwayWhoCannotComeBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		cookie := w.logIn("Hans")
		grete, hans, tab, uwe := w.join("Grete", "kitchen"), w.dial(cookie, "kitchen"), w.dial(cookie, "kitchen"), w.join("Uwe", "kitchen")
		for _, p := range []*peer{grete, hans, tab, uwe} {
			p.heard()
		}
		grete.say("/kick Hans")
		for _, p := range []*peer{hans, tab} {
			if lines := p.wantGoodbye(sentAway); !slices.Equal(lines, []string{"* Grete has sent Hans away."}) {
				t.Errorf("Hans hears %q before he goes", lines)
			}
		}
		grete.want("Grete: /kick Hans", "* Grete has sent Hans away.", "* Hans has left.")
		uwe.want("* Grete has sent Hans away.", "* Hans has left.")
		for _, again := range []string{cookie, w.logInAs(t, "Ursel", cookie)} {
			if lines := w.dial(again, "kitchen").wantGoodbye(sentAway); lines != nil {
				t.Errorf("back again he hears %q", lines)
			}
		}
		w.dial(cookie, "garden")
		if more := uwe.heard(); more != nil {
			t.Errorf("Uwe hears %q, too", more)
		}
	})
}

func TestNobodyElseCanSendSomebodyAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		grete, hans := w.join("Grete", "kitchen"), w.join("Hans", "kitchen")
		grete.heard()
		hans.heard()
		hans.say("/kick Grete")
		hans.want("Hans: /kick Grete", "* Only who has opened the room can send somebody away.")
		if more := grete.heard(); more != nil {
			t.Errorf("Grete hears %q, want nothing", more)
		}
		// Nor does a name make one who opened the room.
		grete.leave()
		synctest.Wait()
		other := w.join("Grete", "kitchen")
		other.heard()
		other.say("/kick Hans")
		other.want("Grete: /kick Hans", "* Only who has opened the room can send somebody away.")
	})
}

// Rooms do not disturb each other.

func TestFloodInOneRoomLeavesTheOthersAsQuickAsBefore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		if _, _, err := w.dialer().Dial("ws://pipe/room/kitchen/ws", http.Header{"Cookie": {w.logIn("Stuck")}}); err != nil {
			t.Fatal(err)
		}
		grete, hans := w.join("Grete", "garden"), w.join("Hans", "garden")
		grete.heard()
		hans.heard()
		kitchen := w.room("kitchen")
		over := make(chan struct{})
		go func() {
			for range sendQueueSize { // from the half of it on, each costs the kitchen a breather
				kitchen.broadcast <- []byte("Stuck: x")
			}
			close(over)
		}()
		start := time.Now()
		for n := range 10 {
			grete.say(fmt.Sprint(n))
			hans.want(fmt.Sprint("Grete: ", n))
			w.join("Uwe", "garden").leave()
			hans.want("* Uwe has come.", "* Uwe has left.")
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

// The end.

func TestStopIsReadInEveryRoomBehindWhatIsQueued(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		var peers []*peer
		for _, room := range []string{"kitchen", "garden", "cellar"} {
			for _, name := range []string{"Grete", "Hans"} {
				peers = append(peers, w.join(name, room))
			}
			synctest.Wait()
			w.room(room).broadcast <- []byte("Grete: last words")
		}
		stopped := make(chan struct{})
		go func() { w.stop(); close(stopped) }()
		for _, p := range peers {
			if lines := p.wantGoodbye(shuttingDown); len(lines) == 0 || lines[len(lines)-1] != "Grete: last words" {
				t.Errorf("hears %q, want last words at the end", lines)
			}
		}
		<-stopped
		w.wantStatus(w.logIn("Late"), "kitchen", http.StatusServiceUnavailable)
	})
}

// The program, as it is run from a shell.
func TestSIGTERMIsReadInEveryRoomAndEndsItWithStatusZero(t *testing.T) {
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, "-addr", "127.0.0.1:0")
	cmd.Env = append(os.Environ(), "RUN_MAIN=1", "CHAT_KEY=key") // the rig's: so its cookies are good
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	log := bufio.NewReader(stderr)
	line, err := log.ReadString('\n')
	address := regexp.MustCompile(`listening on http://(.*)/`).FindStringSubmatch(line)
	if address == nil {
		t.Fatalf("it logs %q, %v, want where it listens", line, err)
	}
	w := &world{newRooms("key"), t, func() (net.Conn, error) { return net.Dial("tcp", address[1]) }, nil}
	peers := []*peer{w.join("Grete", "kitchen"), w.join("Hans", "kitchen"), w.join("Uwe", "garden")}
	for _, p := range peers {
		p.until("* Grete is here.", "* Hans is here.", "* Uwe is here.")
	}
	peers[0].say("last words")
	peers[0].until("Grete: last words")
	start := time.Now()
	cmd.Process.Signal(syscall.SIGTERM)
	for _, p := range peers {
		p.wantGoodbye(shuttingDown)
	}
	io.Copy(io.Discard, log)
	if err := cmd.Wait(); err != nil {
		t.Errorf("it ends with %v, want status 0", err)
	}
	if took := time.Since(start); took > 4*time.Second {
		t.Errorf("it ends after %v, although everybody goes at once", took)
	}
}

// What copiers run into.

func TestClientCanBeSentAwayFromAnywhereWithAReason(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		grete := w.join("Grete", "kitchen")
		synctest.Wait()
		why := &goodbye{Code: 4000, Text: strings.Repeat("x", 123)}
		clients := slices.Collect(maps.Keys(w.room("kitchen").clients))
		clients[0].unregister(why)
		grete.wantGoodbye(why)
	})
}

func TestHubThatHasEndedTakesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		grete := w.join("Grete", "kitchen")
		synctest.Wait()
		hub, client := w.room("kitchen"), new(Client)
		grete.leave()
		synctest.Wait()
		select {
		case <-hub.stopped: // which whoever sends selects on, too
		default:
			t.Error("it has not been stopped")
		}
		select {
		case hub.broadcast <- []byte("anybody there?"):
			t.Error("it has taken a line")
		case hub.register <- client:
			t.Error("it has taken a client")
		case hub.unregister <- client:
			t.Error("it has dropped a client")
		default:
		}
	})
}

func TestPageIsFoundWithASlashAtItsEnd(t *testing.T) {
	w := &world{Rooms: newRooms("key"), t: t}
	got := w.get(w.logIn("Grete"), "/room/kitchen")
	if got.Code != http.StatusTemporaryRedirect || got.Header().Get("Location") != "/room/kitchen/" {
		t.Errorf("without it the status is %d, and the location %q", got.Code, got.Header().Get("Location"))
	}
	if got := w.get(w.logIn("Grete"), "/room/kitchen/"); got.Code != http.StatusOK || !strings.Contains(got.Body.String(), `>Grete</output>`) {
		t.Errorf("with it the status is %d, want 200 and the page with the name", got.Code)
	}
}

// The copies.

// README.md shows the whole difference to the files they come from: patch applies
// it, and so does this test.
func TestREADMEShowsTheWholeDifference(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, diffs, _ := strings.Cut(string(readme), "```diff\n")
	diffs, _, _ = strings.Cut(diffs, "```\n")
	for _, name := range []string{"hub.go", "client.go", "home.html"} {
		root, err := os.ReadFile("../" + name)
		if err != nil {
			t.Fatal(err)
		}
		here, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		_, diff, found := strings.Cut(diffs, "+++ "+name+"\n")
		if !found {
			t.Fatalf("README.md has no difference of %s", name)
		}
		diff, _, _ = strings.Cut(diff, "--- ")
		want, rest := "", string(root)
		for _, hunk := range strings.Split(diff, "@@\n")[1:] {
			var old, new string
			for line := range strings.Lines(hunk) {
				if line[0] == ' ' || line[0] == '-' {
					old += line[1:]
				}
				if line[0] == ' ' || line[0] == '+' {
					new += line[1:]
				}
			}
			before, after, found := strings.Cut(rest, old)
			if !found {
				t.Fatalf("README.md changes what ../%s does not have: %q", name, old)
			}
			want, rest = want+before+new, after
		}
		if want+rest != string(here) {
			t.Errorf("%s is not ../%s with the difference in README.md: run go generate", name, name)
		}
	}
}

func TestItIsAnExample(t *testing.T) {
	lines := 0
	for _, name := range []string{"main.go", "room.go"} {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(text)) {
			if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "//") {
				lines++
			}
		}
	}
	if lines > 260 {
		t.Errorf("main.go and room.go have %d lines of code, want at most 260", lines)
	}
}

// The rig.

// patience only bounds how long a failing test takes.
const patience = 10 * time.Second

func TestMain(m *testing.M) {
	if os.Getenv("RUN_MAIN") != "" {
		main()
		os.Exit(0)
	}
	log.SetOutput(io.Discard)
	os.Exit(m.Run())
}

// A world is a running site.
type world struct {
	*Rooms
	t       *testing.T
	connect func() (net.Conn, error)
	close   func()
}

func startTCP(t *testing.T) *world {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return startOn(t, listener, func() (net.Conn, error) { return net.Dial("tcp", listener.Addr().String()) })
}

// startPiped starts a site whose connections are pipes, for a synctest bubble.
func startPiped(t *testing.T) *world {
	pipes := make(pipeListener)
	return startOn(t, pipes, func() (net.Conn, error) {
		here, there := net.Pipe()
		pipes <- there
		return here, nil
	})
}

func newRooms(key string) *Rooms {
	return &Rooms{cookies: securecookie.New([]byte(key), nil), hubs: make(map[string]*Hub)}
}

func startOn(t *testing.T, listener net.Listener, connect func() (net.Conn, error)) *world {
	s := newRooms("key")
	server := &http.Server{Handler: s.handler()}
	go server.Serve(listener)
	w := &world{s, t, connect, sync.OnceFunc(func() { s.stop(); server.Close() })}
	t.Cleanup(w.close)
	return w
}

type pipeListener chan net.Conn

func (l pipeListener) Accept() (net.Conn, error) {
	if conn, ok := <-l; ok {
		return conn, nil
	}
	return nil, net.ErrClosed
}
func (l pipeListener) Close() error   { close(l); return nil }
func (l pipeListener) Addr() net.Addr { return &net.IPAddr{} }

// logIn returns the cookie of a new person.
func (w *world) logIn(name string) string { w.t.Helper(); return w.logInAs(w.t, name, "") }

// logInAs sends the form, with a cookie, and returns the new one.
func (rs *Rooms) logInAs(t *testing.T, name, cookie string) string {
	t.Helper()
	request := httptest.NewRequest("POST", "/", strings.NewReader(url.Values{"name": {name}, "room": {"kitchen"}}.Encode()))
	request.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	request.Header.Set("Cookie", cookie)
	response := httptest.NewRecorder()
	rs.handler().ServeHTTP(response, request)
	value, _, _ := strings.Cut(response.Header().Get("Set-Cookie"), ";")
	if value == "" {
		t.Fatalf("%q cannot log in: status %d", name, response.Code)
	}
	return value
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

// try connects whoever has the cookie to a room.
func (w *world) try(cookie, room string) (*peer, *http.Response, error) {
	conn, response, err := w.dialer().Dial("ws://pipe/room/"+room+"/ws", http.Header{"Cookie": {cookie}})
	if err != nil {
		return nil, response, err
	}
	w.t.Cleanup(func() { conn.Close() })
	return newPeer(w.t, conn), response, nil
}

// dial does, too, and reports an error. Any goroutine may call it.
func (w *world) dial(cookie, room string) *peer {
	w.t.Helper()
	p, response, err := w.try(cookie, room)
	if err != nil {
		w.t.Errorf("no way into the %s: %v, %v", room, err, response)
	}
	return p
}

// join brings a new person into a room.
func (w *world) join(name, room string) *peer { w.t.Helper(); return w.dial(w.logIn(name), room) }

// wantStatus checks that the handshake is refused with a reason.
func (w *world) wantStatus(cookie, room string, want int) {
	w.t.Helper()
	_, response, err := w.try(cookie, room)
	if err == nil || response == nil || response.StatusCode != want {
		w.t.Errorf("the handshake gets %v, %v, want status %d", response, err, want)
		return
	}
	if reason, _ := io.ReadAll(response.Body); len(reason) == 0 {
		w.t.Errorf("status %d comes without a reason", want)
	}
}

func (w *world) room(name string) *Hub {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.hubs[name]
}

// wantRooms checks which rooms there are when nothing happens any more.
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

// wantNoRoom waits until there is none.
func (w *world) wantNoRoom() {
	w.t.Helper()
	for start := time.Now(); w.room("kitchen") != nil; runtime.Gosched() {
		if time.Since(start) > patience {
			w.t.Fatal("there is still a room")
		}
	}
	w.running.Wait()
}

// A peer is a client's side of a connection. It reads all the time, as a browser does.
type peer struct {
	*websocket.Conn
	t     *testing.T
	ended chan struct{} // closed when there is nothing more to read
	err   error         // why, once ended is closed

	mu    sync.Mutex
	lines []string
	more  chan struct{} // holds something when there are new lines
}

func newPeer(t *testing.T, conn *websocket.Conn) *peer {
	p := &peer{Conn: conn, t: t, ended: make(chan struct{}), more: make(chan struct{}, 1)}
	go func() {
		defer close(p.ended)
		for {
			_, message, err := conn.ReadMessage()
			if err != nil {
				p.err = err
				return
			}
			p.mu.Lock()
			p.lines = append(p.lines, strings.Split(string(message), "\n")...)
			p.mu.Unlock()
			select {
			case p.more <- struct{}{}:
			default:
			}
		}
	}()
	return p
}

// leave says goodbye and closes the connection, as a tab does.
func (p *peer) leave() {
	p.WriteControl(websocket.CloseMessage, websocket.FormatCloseMessage(websocket.CloseGoingAway, ""), time.Now().Add(patience))
	<-p.ended
	p.Close()
}

func (p *peer) say(text string) {
	p.t.Helper()
	if err := p.WriteMessage(websocket.TextMessage, []byte(text)); err != nil {
		p.t.Errorf("saying %.99q failed with %v", text, err)
	}
}

// take returns the lines that have come since it was last called.
func (p *peer) take() (lines []string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	lines, p.lines = p.lines, nil
	return lines
}

// heard does so when nothing happens any more, in a synctest bubble.
func (p *peer) heard() []string { synctest.Wait(); return p.take() }

// want checks that these lines have come, and no others.
func (p *peer) want(want ...string) {
	p.t.Helper()
	if got := p.heard(); !slices.Equal(got, want) {
		p.t.Errorf("hears %q, want %q", got, want)
	}
}

func (p *peer) wantAnyOrder(want ...string) {
	p.t.Helper()
	if got := p.heard(); !slices.Equal(slices.Sorted(slices.Values(got)), slices.Sorted(slices.Values(want))) {
		p.t.Errorf("hears %q, want %q in any order", got, want)
	}
}

// next waits for lines, if none have come yet. At the end there are none.
func (p *peer) next() []string {
	p.t.Helper()
	for {
		if lines := p.take(); lines != nil {
			return lines
		}
		select {
		case <-p.more:
		case <-p.ended:
			return p.take()
		case <-time.After(patience):
			p.t.Errorf("nothing comes within %v", patience)
			return nil
		}
	}
}

// until waits for a line: the first of these.
func (p *peer) until(want ...string) {
	p.t.Helper()
	for {
		lines := p.next()
		if lines == nil {
			p.t.Errorf("nothing comes any more before %q", want)
		}
		if lines == nil || slices.ContainsFunc(want, func(line string) bool { return slices.Contains(lines, line) }) {
			return
		}
	}
}

// wantGoodbye waits until the connection ends, and returns the lines before that.
func (p *peer) wantGoodbye(want *goodbye) (lines []string) {
	p.t.Helper()
	select {
	case <-p.ended:
	case <-time.After(patience):
		p.t.Errorf("the connection does not end within %v", patience)
		return nil
	}
	var got *goodbye
	if !errors.As(p.err, &got) || *got != *want {
		p.t.Errorf("the connection ends with %v, want %v", p.err, want)
	}
	return p.take()
}
