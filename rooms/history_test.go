package main

import (
	"bytes"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// What is kept.

func TestJoinsAndRestartsPushNoMessageOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		file := newFile(t)
		var want, cookies []string
		for restart := range 5 {
			w := startPipedOn(t, file)
			var users []*peer
			for n := range 25 {
				if restart == 0 {
					cookies = append(cookies, w.logIn(fmt.Sprint("User-", n)))
				}
				users = append(users, w.dial(cookies[n], "kitchen"))
			}
			for n := range 20 * (1 - min(restart, 1)) {
				users[n].send(fmt.Sprint("message ", n))
				synctest.Wait()
				want = append(want, fmt.Sprintf("message User-%d: message %d", n, n))
			}
			if restart > 0 {
				users[0].want(want...) // and that nobody has joined
			}
			for n := range 99 { // by one hostile user
				w.join(fmt.Sprint("Guest-", n), "kitchen").leave()
				time.Sleep(awayTime + time.Second)
			}
			w.join("Newcomer", "kitchen").want(append(slices.Clone(want), "join Newcomer")...)
			w.exit()
		}
	})
}

// A user can send any number of private messages to any user: the others keep theirs.
func TestPrivateMessagesPushOutTheirSendersOwn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		file := newFile(t)
		w := startPipedOn(t, file)
		cookie := w.logIn("Grete")
		grete, mallory := w.dial(cookie, "kitchen"), w.join("Mallory", "kitchen")
		private := func(p *peer, to, text string) {
			t.Helper()
			p.send("/to " + to + " " + text)
			time.Sleep(rateInterval)
			grete.received()
			mallory.received()
		}
		var want []string
		for n := range historySize * 2 / 5 {
			private(grete, "Mallory", fmt.Sprint("Grete's ", n))
			want = append(want, fmt.Sprint("private Grete > Mallory: Grete's ", n))
		}
		for n := range 3 * historySize {
			private(mallory, []string{"Grete", "Mallory"}[n%2], fmt.Sprint(n))
		}
		kept := func(w *world) (own, others []string) {
			for _, line := range w.dial(cookie, "kitchen").received() {
				if strings.HasPrefix(line, "private Grete") {
					own = append(own, line)
				} else if strings.HasPrefix(line, "private") {
					others = append(others, line)
				}
			}
			return own, others
		}
		for range 2 {
			own, others := kept(w)
			if !slices.Equal(own, want) {
				t.Errorf("of Grete's are kept %q, want %q", own, want)
			}
			// Half of Mallory's are for Grete.
			last := fmt.Sprint("private Mallory > Grete: ", 3*historySize-2)
			if n := len(others); n != historySize*3/5/2 || others[n-1] != last {
				t.Errorf("of Mallory's are kept %q, want the last", others)
			}
			w.exit()
			w = startPipedOn(t, file)
		}
		// But the user that has the most makes room for the others.
		mallory = w.join("Mallory", "kitchen")
		for n := range 10 {
			hans := w.join(fmt.Sprint("Hans-", n), "kitchen")
			hans.send("/to Grete Hans's")
			synctest.Wait()
		}
		if own, others := kept(w); !slices.Equal(own, want) || len(others) < 10 {
			t.Errorf("then %d of Grete's are kept, and of the others %q", len(own), others)
		}
	})
}

// Crashes.

// Only rooms that were open at a crash may have lost lines.
func TestOnlyOpenRoomsMissLinesAfterACrash(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		file := newFile(t)
		w := startPipedOn(t, file)
		cookies, before := make(map[string]string), make(map[string]*peer)
		for _, room := range []string{"closed", "open"} {
			cookies[room] = w.logIn("Grete")
			before[room] = w.dial(cookies[room], room)
			before[room].send("one")
			before[room].received()
			time.Sleep(2 * commitDelay)
			if room == "closed" {
				before[room].leave()
				time.Sleep(awayTime + 2*roomLife)
			}
		}
		w.crash()
		for restart := range 3 { // the second and third after a graceful shutdown
			w := startPipedOn(t, file)
			for _, room := range []string{"closed", "open"} {
				back := w.reconnect(cookies[room], room, before[room])
				back.received()
				if isMissed := room == "open" && restart == 0; back.welcome.Missed != isMissed {
					t.Errorf("after restart %d the welcome of the room %s is %+v, want missed %v",
						restart, room, back.welcome, isMissed)
				}
				back.send(fmt.Sprint("after restart ", restart))
				back.received()
				if back.welcome.RoomID != before[room].welcome.RoomID {
					t.Errorf("the room %s is another one", room)
				}
				jump := int64(1)
				if room == "open" && restart == 0 {
					jump += maxUncommitted
				}
				if back.last != before[room].last+jump {
					t.Errorf("after restart %d of the room %s number %d follows %d, want %d more",
						restart, room, back.last, before[room].last, jump)
				}
				before[room] = back
				newcomer := w.join(fmt.Sprint("Newcomer-", restart), room)
				if newcomer.received(); newcomer.welcome.Missed != (room == "open") {
					t.Errorf("after restart %d a newcomer to the room %s gets %+v",
						restart, room, newcomer.welcome)
				}
			}
			w.exit()
		}
	})
}

// A thousand crashes do not take numbers beyond what a 32-bit client has.
func TestNumbersFitInto32BitsAfterAThousandCrashes(t *testing.T) {
	if 1000*maxUncommitted >= 1<<31 {
		t.Errorf("numbers jump by %d", maxUncommitted)
	}
}

// A room that was opened and used for less time than a commit takes is known to miss lines, too.
func TestCrashRightAfterARoomOpensIsKnown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		file := newFile(t)
		w := startPipedOn(t, file)
		cookie := w.logIn("Grete")
		grete := w.dial(cookie, "kitchen")
		grete.send("one")
		grete.received()
		grete.leave()
		time.Sleep(awayTime + 2*roomLife)
		w.wantRooms()
		grete = w.dial(cookie, "kitchen")
		grete.send("lost")
		grete.received()
		w.crash()
		w = startPipedOn(t, file)
		back := w.reconnect(cookie, "kitchen", grete)
		back.send("two")
		back.received()
		if !back.welcome.Missed || back.last != 1+maxUncommitted+1 {
			t.Errorf("number %d follows, and the welcome is %+v", back.last, back.welcome)
		}
	})
}

// While commits fail, a room waits before its numbers go on beyond what a crash skips, and the
// other rooms do not.
func TestNumbersStayWithinWhatACrashSkips(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		grete, uwe := w.join("Grete", "kitchen"), w.join("Uwe", "garden")
		grete.received()
		time.Sleep(2 * commitDelay)
		fillDisk(t, w.store, true)
		hub := w.room("kitchen")
		hub.do(func() { hub.last += maxUncommitted - 10 })
		go func() {
			for n := range 20 {
				grete.send(fmt.Sprint(n, strings.Repeat("x", 400)))
			}
		}()
		time.Sleep(time.Minute)
		if got := grete.received(); len(got) != 10 {
			t.Errorf("while commits fail, Grete receives %d lines, want 10", len(got))
		}
		uwe.send("weeds")
		uwe.want("join Uwe", "message Uwe: weeds")
		fillDisk(t, w.store, false)
		time.Sleep(time.Minute)
		if got := grete.received(); len(got) != 10 {
			t.Errorf("then she receives %d lines, want 10", len(got))
		}
	})
}

// Rooms are deleted.

// A clock that is a month ahead for a while deletes nothing: the process has to be up for a day.
func TestWrongClockDeletesNoRoom(t *testing.T) {
	file := newFile(t)
	synctest.Test(t, func(t *testing.T) {
		var logged logBook
		log.SetOutput(&logged)
		defer log.SetOutput(io.Discard)
		w := startPipedOn(t, file)
		for _, room := range []string{"kitchen", "garden"} {
			grete := w.join("Grete", room)
			grete.send("dinner")
			grete.received()
			grete.leave()
		}
		time.Sleep(awayTime + 2*roomLife)
		w.exit()

		time.Sleep(keepTime + time.Hour)
		w = startPipedOn(t, file)
		uwe := w.join("Uwe", "cellar") // so that there is a commit
		time.Sleep(time.Second)
		w.crash()

		w = startPipedOn(t, file)
		hans := w.join("Hans", "kitchen")
		hans.want("message Grete: dinner", "join Hans")
		time.Sleep(deleteInterval - time.Hour)
		if len(logged.String()) > 0 {
			t.Errorf("within a day the log is %q", logged.String())
		}
		time.Sleep(2 * time.Hour)
		got := logged.String()
		if strings.Count(got, "\n") != 1 || !strings.Contains(got, "deleted 1 rooms") {
			t.Errorf("after a day the log is %q, want that the garden was deleted", got)
		}
		w.join("Ursel", "garden").want("join Ursel")
		w.join("Ursel", "kitchen").want("message Grete: dinner", "join Ursel")
		_ = uwe
	})
}

// What is deleted is in none of the files any more after a graceful shutdown: messages that are
// no longer kept, rooms, and what an earlier version has left.
func TestDeletedTextIsOverwritten(t *testing.T) {
	contains := func(t *testing.T, file, text string) (count int) {
		t.Helper()
		for _, suffix := range []string{"", "-wal", "-shm"} {
			content, err := os.ReadFile(file + suffix)
			if err != nil && (suffix == "" || !os.IsNotExist(err)) {
				t.Fatal(err)
			}
			count += bytes.Count(content, []byte(text))
		}
		return count
	}
	t.Run("of rooms", func(t *testing.T) {
		file := newFile(t)
		synctest.Test(t, func(t *testing.T) {
			w := startPipedOn(t, file)
			grete := w.join("Grete", "kitchen")
			text := "secret "
			for n := range 4 * historySize {
				if n == 3*historySize {
					text = "kept "
				}
				grete.send(fmt.Sprint(text, n, strings.Repeat("x", rand.N(maxMessageSize-20))))
				grete.send(fmt.Sprint("/to Grete ", text, n))
				grete.received()
				time.Sleep(2 * rateInterval)
			}
			w.exit()
			if got := contains(t, file, "secret"); got != 0 {
				t.Errorf("of messages that are no longer kept the file has %d copies", got)
			}
			if got := contains(t, file, "kept"); got < 2*historySize {
				t.Errorf("of messages that are kept the file has %d copies", got)
			}
			w = startPipedOn(t, file)
			time.Sleep(keepTime + 2*deleteInterval)
			w.exit()
			if got := contains(t, file, "kept"); got != 0 {
				t.Errorf("of a deleted room the file has %d copies", got)
			}
		})
	})
	t.Run("of an earlier version", func(t *testing.T) {
		file := version0(t)
		edit(t, file, `PRAGMA secure_delete = 0; CREATE TABLE old (text);
			INSERT INTO old SELECT 'secret' || hex(randomblob(1000)) FROM json_each('[1,2,3,4,5]');
			DROP TABLE old`)
		if contains(t, file, "secret") == 0 {
			t.Fatal("the file has none")
		}
		store, err := openStore(file)
		if err != nil {
			t.Fatal(err)
		}
		if err := store.close(); err != nil {
			t.Fatal(err)
		}
		if got := contains(t, file, "secret"); got != 0 {
			t.Errorf("the file has %d copies", got)
		}
	})
}

// Damage.

// A damaged line is skipped and logged, and the others of its room are received.
func TestDamagedLineIsSkippedAndLogged(t *testing.T) {
	for name, line := range map[string]string{
		"no JSON":               `'{"n":6,"kind":"message'`,
		"another type":          `'[6]'`,
		"empty":                 `''`,
		"another number":        `'{"n":5,"kind":"message","text":"x"}'`,
		"not UTF-8":             `'{"n":6,"kind":"message","text":"' || CAST(X'ff' AS TEXT) || '"}'`,
		"private without users": `'{"n":6,"kind":"private","user":"Hans","to":"Grete","text":"secret"}'`,
		"a BLOB":                `X'00ff'`,
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var logged logBook
				log.SetOutput(&logged)
				defer log.SetOutput(io.Discard)
				file := newFile(t)
				w := startPipedOn(t, file)
				cookie := w.logIn("Grete")
				grete := w.dial(cookie, "kitchen")
				for n := range 10 {
					grete.send(fmt.Sprint(n + 1))
				}
				grete.received()
				w.exit()
				edit(t, file, `UPDATE lines SET line = `+line+` WHERE n = 6`)
				w = startPipedOn(t, file)
				grete.last = 3
				back := w.reconnect(cookie, "kitchen", grete)
				back.send("11")
				want := []string{"4", "5", "7", "8", "9", "10", "11"}
				for i := range want {
					want[i] = "message Grete: " + want[i]
				}
				if back.want(want...); !back.welcome.Missed {
					t.Errorf("the welcome is %+v, want missed", back.welcome)
				}
				got, said := logged.String(), `line 6 of the room "kitchen" is damaged`
				if strings.Count(got, "\n") != 1 || !strings.Contains(got, said) {
					t.Errorf("the log is %q", got)
				}
			})
		})
	}
}

// A room that cannot be written does not keep the others from being saved. The log names the
// error, at most once a second, and the room is saved as soon as it can be.
func TestRoomThatCannotBeWrittenStopsNoOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var logged logBook
		log.SetOutput(&logged)
		defer log.SetOutput(io.Discard)
		file := newFile(t)
		w := startPipedOn(t, file)
		var peers []*peer
		cookie := w.logIn("Grete")
		for n := range 10 {
			peers = append(peers, w.dial(cookie, fmt.Sprint("room", n)))
		}
		time.Sleep(time.Second)
		execute(t, w.store, `CREATE TRIGGER fail BEFORE INSERT ON lines
			WHEN NEW.room = (SELECT id FROM rooms WHERE name = 'room5')
			BEGIN SELECT RAISE(FAIL, 'a damaged page'); END`)
		for n, p := range peers {
			p.send(fmt.Sprint("line of ", n))
		}
		time.Sleep(10 * time.Second)
		if got := logged.String(); strings.Count(got, "cannot save 1 rooms: ") < 8 ||
			strings.Count(got, "a damaged page") > 11 {
			t.Errorf("in ten seconds the log is %q", got)
		}
		saved := func() (rooms string) {
			done := make(chan error)
			w.store.operations <- func() {
				done <- w.store.db.QueryRow(`SELECT group_concat(name, ' ') FROM (SELECT name FROM rooms
					WHERE id IN (SELECT room FROM lines) ORDER BY name)`).Scan(&rooms)
			}
			if err := <-done; err != nil {
				t.Fatal(err)
			}
			return rooms
		}
		want := "room0 room1 room2 room3 room4 room6 room7 room8 room9"
		if got := saved(); got != want {
			t.Errorf("lines are saved of %s, want %s", got, want)
		}
		execute(t, w.store, `DROP TRIGGER fail`)
		time.Sleep(2 * retryDelay)
		if got := saved(); strings.Count(got, "room") != 10 {
			t.Errorf("then lines are saved of %s, want all ten rooms", got)
		}
		if !strings.Contains(logged.String(), "saved all changes") {
			t.Errorf("the log is %q", logged.String())
		}
	})
}

// A room that cannot be written at the shutdown is as after a crash, and the others are not.
func TestShutdownSavesTheRoomsThatCanBeSaved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		file := newFile(t)
		store, err := openStore(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"kitchen", "garden"} {
			record, _ := store.load(name)
			record.id, record.used = name, time.Now()
			store.save(record)
			time.Sleep(2 * commitDelay)
			execute(t, store, `CREATE TRIGGER IF NOT EXISTS fail BEFORE INSERT ON lines
				WHEN NEW.room = 'kitchen' BEGIN SELECT RAISE(FAIL, 'a damaged page'); END`)
			record.last, record.history = 1, []Line{{N: 1, message: []byte(`{"n":1,"kind":"message"}`)}}
			store.save(record)
		}
		if err := store.close(); err == nil || !strings.Contains(err.Error(), "a damaged page") {
			t.Errorf("close returns %v", err)
		}
		edit(t, file, `DROP TRIGGER fail`)
		if store, err = openStore(file); err != nil {
			t.Fatal(err)
		}
		defer store.close()
		kitchen, _ := store.load("kitchen")
		garden, _ := store.load("garden")
		if kitchen.last != maxUncommitted || len(garden.history) != 1 {
			t.Errorf("the kitchen is at %d, and the garden has %d lines", kitchen.last, len(garden.history))
		}
	})
}
