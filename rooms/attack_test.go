package main

import (
	"bufio"
	"bytes"
	"database/sql"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"
)

var attack = flag.Duration("attack", 0,
	"repeat attacks for this `duration` each, as in: go test -race -attack 10m -timeout 4h")

// repeat runs round as a subtest once, and again until the duration of -attack has passed.
func repeat(t *testing.T, round func(t *testing.T)) {
	for n, start := 0, time.Now(); n == 0 || time.Since(start) < *attack && !t.Failed(); n++ {
		t.Run(strconv.Itoa(n), round)
	}
}

// Names, rooms and messages are made of these.
var hostile = []string{"'", `"`, "`", ";", "--", "/*", "*/", "(", ")", "%", "_", "?", "?1", ":id",
	"@id", "$id", "\\", "\x00", " ", ",", "=",
	"DROP", "TABLE", "rooms", "lines", "server", "DELETE", "FROM", "UPDATE", "NULL", "OR", "1", "x",
	"é", "\u0301", "ſ", "İ", "K", "rn", "\U0001F600",
	"/to ", "/kick ", "[", "]", "X'00'", "\u2028", "char(0)", "ATTACH", "PRAGMA", "0x41", "1e999",
	"-1", "9223372036854775808", "{\"n\":1}", "%27", "+"}

func hostileText(n int) string {
	var text strings.Builder
	for range 1 + rand.N(n) {
		text.WriteString(hostile[rand.N(len(hostile))])
	}
	return text.String()
}

func TestSQLInNamesAndMessagesIsOnlyText(t *testing.T) {
	file := newFile(t)
	rooms := make(map[string]bool) // in the database, by fold of the name
	repeat(t, func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := startPipedOn(t, file)
			key := w.store.key
			var cookies []string
			for len(cookies) < 4 {
				name := hostileText(4)
				if response := w.post(name, "kitchen"); response.Code == http.StatusSeeOther {
					value, _, _ := strings.Cut(response.Header().Get("Set-Cookie"), ";")
					cookies = append(cookies, value)
				} else if response.Code != http.StatusBadRequest {
					t.Fatalf("%q gets status %d, want 400", name, response.Code)
				}
			}
			for range 3 {
				room := strings.ToLower(parseName(hostileText(4)))
				if room == "" || len(rooms) > maxKeptRooms/2 {
					room = "kitchen"
				}
				rooms[fold(room)] = true
				var peers []*peer
				for _, cookie := range cookies {
					p, _, err := w.try(cookie, room)
					if err != nil {
						t.Fatalf("the room %q is refused: %v", room, err)
					}
					peers = append(peers, p)
				}
				watcher := w.join("Watcher", room)
				watcher.receivedLines()
				for range 20 {
					for _, p := range peers {
						// It may have been kicked, or its name taken.
						p.WriteMessage(websocket.TextMessage, []byte(hostileText(12)))
					}
				}
				synctest.Wait()
				sent := watcher.receivedLines()
				for _, p := range append(peers, watcher) {
					p.Close()
				}
				time.Sleep(awayTime + 2*roomLife)
				w.wantRooms() // so what follows is from the database
				again := w.join("Reader", room)
				kept := again.receivedLines()
				public := func(lines []Line) (messages []string) {
					for _, line := range lines {
						if line.Kind == "message" {
							messages = append(messages, fmt.Sprint(line.N, line.User, line.Text))
						}
					}
					return messages
				}
				got, want := public(kept), public(sent)
				if len(want) > len(got) {
					want = want[len(want)-len(got):]
				}
				if len(got) == 0 || !slices.Equal(got[len(got)-len(want):], want) {
					t.Errorf("the room %q keeps\n%q, want\n%q", room, got, want)
				}
				again.Close()
				time.Sleep(awayTime + 2*roomLife)
			}
			done := make(chan bool)
			w.store.operations <- func() {
				defer close(done)
				for query, want := range map[string]string{
					`SELECT cookie_key FROM server`:                                       key,
					`SELECT count(*) FROM sqlite_schema WHERE type = 'table'`:             "4",
					`SELECT count(*) FROM rooms`:                                          fmt.Sprint(len(rooms)),
					`SELECT count(*) FROM lines WHERE room NOT IN (SELECT id FROM rooms)`: "0",
					`PRAGMA integrity_check`:                                              "ok",
				} {
					var got string
					if err := w.store.db.QueryRow(query).Scan(&got); err != nil || got != want {
						t.Errorf("%s gives %q, %v, want %q", query, got, err, want)
					}
				}
			}
			<-done
		})
	})
}

func TestDatabaseThatFailsUnderLoadLosesNothing(t *testing.T) {
	repeat(t, func(t *testing.T) {
		w := startTCP(t)
		var talk, watch sync.WaitGroup
		over := make(chan struct{})
		var watchers []*peer
		for room := range 5 {
			name := fmt.Sprint("room", room)
			for user := range 4 {
				p := w.join(fmt.Sprint("User-", user), name)
				if user == 0 {
					watchers = append(watchers, p)
					continue
				}
				talk.Go(func() {
					for n := 0; ; n++ {
						select {
						case <-over:
							return
						default:
							text := fmt.Sprint(n, strings.Repeat(" x", rand.N(200)))
							p.send(text)
							p.until(fmt.Sprintf("message User-%d: %s", user, text))
						}
					}
				})
			}
		}
		// Each room's lines arrive without a gap, whatever the database does.
		for _, p := range watchers {
			watch.Go(func() {
				last := int64(0)
				for p.more() {
					for _, line := range p.takeMessages() {
						if last > 0 && line.N != last+1 {
							t.Errorf("line %d follows %d", line.N, last)
						}
						if last = line.N; line.Text == "over" {
							return
						}
					}
				}
			})
		}
		pacer := w.join("Pacer", "room0")
		pace := func(messages int) {
			for n := range messages {
				text := fmt.Sprint("message ", n)
				pacer.send(text)
				pacer.until("message Pacer: " + text)
			}
		}
		failing := func() bool {
			got := make(chan bool)
			w.store.operations <- func() { got <- w.store.failing }
			return <-got
		}
		pace(rateBurst) // From now on each message takes rateInterval.
		for n := range 6 {
			isReadOnly := n%3 == 1
			fillDisk(t, w.store, n%2 == 0)
			readOnly(t, w.store, isReadOnly)
			pace(rand.N(40))
			for tries := 0; isReadOnly && !failing(); tries++ {
				if tries == 1000 {
					t.Fatal("no commit fails")
				}
				pace(1)
			}
		}
		fillDisk(t, w.store, false)
		readOnly(t, w.store, false)
		close(over)
		talk.Wait()
		for room := range 5 {
			w.room(fmt.Sprint("room", room)).broadcast <- []byte("over")
		}
		watch.Wait()
		for room := range 5 {
			hub := w.room(fmt.Sprint("room", room))
			var record Record
			hub.do(func() { record = hub.Record })
			saved := make(chan Record)
			w.store.operations <- func() {
				w.store.commit()
				got, _ := w.store.read(record.name)
				saved <- got
			}
			got := <-saved
			same := func(a, b Line) bool { return a.N == b.N && string(a.message) == string(b.message) }
			if got.last < record.last || got.last == record.last &&
				!slices.EqualFunc(got.history, record.history, same) {
				t.Errorf("room %d ends with %d lines up to %d in the database, and %d lines up to %d in memory",
					room, len(got.history), got.last, len(record.history), record.last)
			}
		}
	})
}

// readOnly has every commit of the store fail, or no longer.
func readOnly(t *testing.T, s *Store, on bool) {
	t.Helper()
	execute(t, s, fmt.Sprint("PRAGMA query_only = ", on))
}

func TestAtMostOneServerUsesADatabase(t *testing.T) {
	t.Parallel()
	file := newFile(t)
	var cookie string
	var before *peer
	rounds := 0
	repeat(t, func(t *testing.T) {
		type server struct {
			*exec.Cmd
			log  *bufio.Reader
			line string
		}
		var servers []*server
		var starting sync.WaitGroup
		for range 3 {
			s := &server{Cmd: program(t, "CHAT_KEY="+testKey, file)}
			s.log = startLogged(t, s.Cmd)
			servers = append(servers, s)
			starting.Go(func() { s.line, _ = s.log.ReadString('\n') })
		}
		starting.Wait()
		var running *server
		for _, s := range servers {
			if !strings.Contains(s.line, "listening on") {
				rest, _ := io.ReadAll(s.log)
				if err := s.Wait(); s.ProcessState.ExitCode() != 1 ||
					!strings.Contains(s.line, "another server") || len(rest) > 0 {
					t.Errorf("a server ends with %v and %q, want status 1 and that another server "+
						"uses the database", err, s.line+string(rest))
				}
				continue
			}
			if running != nil {
				t.Error("two servers use one database")
			}
			running = s
		}
		if running == nil {
			return // Two that start at the same moment may both exit.
		}
		w := startedProgram(t, running.line)
		if cookie == "" {
			cookie = w.logIn("Grete")
		}
		query := ""
		if before != nil {
			query = fmt.Sprintf("?room=%s&after=%d", before.welcome.RoomID, before.last)
		}
		p := w.dial(cookie, "kitchen", query)
		if p == nil {
			return
		}
		rounds++
		text := fmt.Sprint("round ", rounds)
		p.send(text)
		lines := p.until("message Grete: " + text)
		if before != nil && (p.welcome.RoomID != before.welcome.RoomID ||
			slices.Contains(lines, "message Grete: "+fmt.Sprint("round ", rounds-1))) {
			t.Errorf("after %q, %d in the room %q it receives %q", before.welcome.RoomID, before.last,
				p.welcome.RoomID, lines)
		}
		before = p
		// A second server does not disturb the first one.
		if output, status := runProgram(t, program(t, "CHAT_KEY="+testKey, file)); status != 1 {
			t.Errorf("a second server ends with %d and %q", status, output)
		}
		p.send("still here")
		p.until("message Grete: still here")
		running.Process.Signal([]syscall.Signal{syscall.SIGTERM, syscall.SIGKILL}[rand.N(2)])
		io.Copy(io.Discard, running.log)
		running.Wait()
	})
}

// talk has count users of a room send numbered messages until the connection ends or over is
// closed. Each checks that its messages come back in their order. wait returns then.
func (w *world) talk(room string, count int, over <-chan struct{}) (wait func()) {
	var talkers sync.WaitGroup
	for user := range count {
		p := w.join(fmt.Sprint("User-", user), room)
		if p == nil {
			break
		}
		talkers.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-over:
					return
				case <-p.ended:
					return
				default:
					if p.WriteMessage(websocket.TextMessage, fmt.Append(nil, n)) != nil {
						return
					}
				}
			}
		})
	}
	return talkers.Wait
}

// A process that is killed in the middle of a migration leaves a database that the next one
// brings up to date.
func TestKillDuringAMigration(t *testing.T) {
	t.Parallel()
	repeat(t, func(t *testing.T) {
		file := version0(t)
		for range 10 {
			cmd := program(t, "CHAT_KEY="+testKey, file)
			log := startLogged(t, cmd)
			timer := time.AfterFunc(rand.N(60*time.Millisecond), func() { cmd.Process.Kill() })
			out, _ := io.ReadAll(log)
			timer.Stop()
			cmd.Wait()
			if bytes.Contains(out, []byte("rooms.db")) {
				t.Fatalf("a start fails: %s", out)
			}
		}
		w, _, _ := startProgram(t, "CHAT_KEY="+testKey, file)
		got := w.join("Hans", "kitchen").until("join Hans")
		if len(got) != 4 || got[3] != "join Hans" {
			t.Errorf("then a user receives %q", got)
		}
		wantIntact(t, file)
	})
}

// A program that locks the database for a while delays commits, and nothing else.
func TestOtherProgramLocksTheDatabase(t *testing.T) {
	t.Parallel()
	repeat(t, func(t *testing.T) {
		w := startTCP(t)
		over := make(chan struct{})
		wait := w.talk("kitchen", 4, over)
		watcher := w.join("Watcher", "kitchen")
		for range 5 {
			db, err := sql.Open("sqlite", w.store.db.file+"?_txlock=immediate&_pragma=busy_timeout(5000)")
			if err != nil {
				t.Fatal(err)
			}
			tx, err := db.Begin()
			if err != nil {
				t.Fatal(err)
			}
			text := fmt.Sprint("while it is locked ", rand.N(1<<30))
			watcher.send(text)
			watcher.until("message Watcher: " + text)
			timer := time.NewTimer(rand.N(300 * time.Millisecond))
			<-timer.C
			tx.Rollback()
			db.Close()
			watcher.send(text + " no longer")
			watcher.until("message Watcher: " + text + " no longer")
		}
		close(over)
		wait()
		w.wantSaved("kitchen")
	})
}

// wantSaved checks that the database has what a room keeps.
func (w *world) wantSaved(room string) {
	w.t.Helper()
	var record, got Record
	w.room(room).do(func() { // Meanwhile the room publishes nothing.
		record = w.room(room).Record
		saved := make(chan Record)
		w.store.operations <- func() {
			w.store.commit()
			got, _ := w.store.read(record.name)
			saved <- got
		}
		got = <-saved
	})
	same := func(a, b Line) bool { return a.N == b.N && string(a.message) == string(b.message) }
	if got.last != record.last || !slices.EqualFunc(got.history, record.history, same) ||
		!slices.EqualFunc(got.private, record.private, same) ||
		!slices.Equal(got.present, record.present) || !slices.Equal(got.kicks, record.kicks) {
		w.t.Errorf("%s: saved up to %d are %d and %d lines, %d users, %d kicks; "+
			"want %d, %d and %d, %d, %d", room,
			got.last, len(got.history), len(got.private), len(got.present), len(got.kicks),
			record.last, len(record.history), len(record.private), len(record.present), len(record.kicks))
	}
}

// An operator's commands on the running database harm nothing.
func TestOperatorsCommandsOnARunningDatabase(t *testing.T) {
	t.Parallel()
	repeat(t, func(t *testing.T) {
		w := startTCP(t)
		over := make(chan struct{})
		wait := w.talk("kitchen", 4, over)
		watcher := w.join("Watcher", "kitchen")
		watcher.until("join Watcher")
		for _, command := range []string{
			"PRAGMA wal_checkpoint(TRUNCATE)", "VACUUM", "REINDEX", "ANALYZE", "PRAGMA optimize",
			"PRAGMA journal_mode = DELETE", "PRAGMA integrity_check", ".dump", "DELETE FROM lines",
			"PRAGMA locking_mode = EXCLUSIVE; SELECT count(*) FROM lines",
			"INSERT INTO users (room, id, name, kicked) SELECT id, 'x', 'x', 1 FROM rooms",
		} {
			cmd := exec.Command("sqlite3", "-cmd", ".timeout 2000", w.store.db.file, command)
			out, err := cmd.CombinedOutput()
			if err != nil && !bytes.Contains(out, []byte("locked")) {
				t.Errorf("%s: %v: %.99s", command, err, out)
			}
			watcher.send(command)
			watcher.until("message Watcher: " + command)
		}
		close(over)
		wait()
		// After DELETE FROM lines, only later lines are saved; after hundred more, all are.
		for n := range historySize {
			watcher.send(fmt.Sprint("again ", n))
			watcher.until(fmt.Sprint("message Watcher: again ", n))
		}
		w.wantSaved("kitchen")
		wantIntact(t, w.store.db.file)
	})
}

// Bytes that change in the file, on a bad disk, cost at most what is in their place: the server
// starts or says why not, and each client receives valid lines or a close code.
func TestDamagedFile(t *testing.T) {
	t.Parallel()
	repeat(t, func(t *testing.T) {
		file := newFile(t)
		synctest.Test(t, func(t *testing.T) {
			w := startPipedOn(t, file)
			for room := range 4 {
				grete := w.join("Grete", fmt.Sprint("room", room))
				for n := range 100 {
					grete.send(fmt.Sprint(n, hostileText(20)))
				}
				grete.received()
			}
			w.exit()
		})
		content, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for range 5 {
			damaged := bytes.Clone(content)
			for range 1 + rand.N(20) {
				damaged[rand.N(len(damaged))] = byte(rand.N(256))
			}
			if rand.N(4) == 0 {
				damaged = damaged[:rand.N(len(damaged))]
			}
			if err := os.WriteFile(file, damaged, 0o600); err != nil {
				t.Fatal(err)
			}
			os.Remove(file + "-wal")
			cmd := program(t, "CHAT_KEY="+testKey, file)
			log := startLogged(t, cmd)
			line, _ := log.ReadString('\n')
			if !strings.Contains(line, "listening") {
				if rest, _ := io.ReadAll(log); bytes.Contains(rest, []byte("goroutine")) {
					t.Errorf("it ends with %s%s", line, rest)
				}
				cmd.Wait()
				continue
			}
			w := startedProgram(t, line)
			rest := make(chan []byte)
			go func() { text, _ := io.ReadAll(log); rest <- text }()
			for room := range 4 {
				header := http.Header{"Cookie": {w.logIn("Hans")}}
				conn, _, err := w.dialer().Dial(fmt.Sprint("ws://pipe/room/room", room, "/ws"), header)
				if err != nil {
					t.Error(err)
					continue
				}
				conn.WriteMessage(websocket.TextMessage, []byte("hello"))
				for isOver := false; !isOver; {
					_, message, err := conn.ReadMessage()
					isOver = err != nil || bytes.Contains(message, []byte(`"text":"hello"`))
					for line := range bytes.SplitSeq(message, newline) {
						if err == nil && !json.Valid(line) {
							t.Errorf("a client receives %q", line)
						}
					}
				}
				conn.Close()
			}
			cmd.Process.Signal(syscall.SIGTERM)
			if text := <-rest; bytes.Contains(text, []byte("goroutine")) {
				t.Errorf("it logs %s", text)
			}
			cmd.Wait()
		}
	})
}

// Whoever sends private messages to whom, no user loses one while another has more kept.
func TestPrivateMessagesAreKeptFairly(t *testing.T) {
	repeat(t, func(t *testing.T) {
		hub := &Hub{Room: Room{Record: Record{name: "kitchen"}}}
		sent := make(map[string][]int64)
		users := 1 + rand.N(30)
		for n := range int64(1000) {
			sender := fmt.Sprint(min(rand.N(users), rand.N(users), rand.N(users))) // some send more
			before := make(map[string]int)
			for _, line := range hub.private {
				before[line.only[0]]++
			}
			before[sender]++
			sent[sender] = append(sent[sender], n)
			hub.keep(Line{N: n, only: []string{sender, "x"}})
			after := make(map[string]int)
			for i, line := range hub.private {
				after[line.only[0]]++
				if i > 0 && line.N <= hub.private[i-1].N {
					t.Fatalf("line %d follows %d", line.N, hub.private[i-1].N)
				}
			}
			for user, count := range before {
				if after[user] < count && count < slices.Max(slices.Collect(maps.Values(before))) {
					t.Fatalf("a user with %d lines loses one, and another has more: %v", count, before)
				}
			}
			if len(hub.private) != min(int(n)+1, historySize) {
				t.Fatalf("%d lines are kept", len(hub.private))
			}
		}
		for user, lines := range sent { // Of each, the latest are kept.
			var kept []int64
			for _, line := range hub.private {
				if line.only[0] == user {
					kept = append(kept, line.N)
				}
			}
			if !slices.Equal(kept, lines[len(lines)-len(kept):]) {
				t.Errorf("of %v are kept %v", lines, kept)
			}
		}
	})
}

// Rooms open and close while the server is killed again and again: no number is used twice.
func TestKillWhileRoomsOpenAndCloseUsesNoNumberTwice(t *testing.T) {
	repeat(t, func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			file := newFile(t)
			texts := make(map[string]string) // by the room's ID and the number
			for round := range 20 {
				w := startPipedOn(t, file)
				for range 1 + rand.N(20) {
					room := fmt.Sprint("room", rand.N(3))
					p := w.join(fmt.Sprint("User-", round, "-", rand.N(1<<30)), room)
					for n := range rand.N(5) {
						p.send(fmt.Sprint(round, n, rand.N(1<<30)))
					}
					lines := p.receivedLines()
					for _, line := range lines {
						key := fmt.Sprint(p.welcome.RoomID, line.N)
						if line.N > 0 && texts[key] != "" && texts[key] != line.Text {
							t.Errorf("%s is %q and %q", key, texts[key], line.Text)
						}
						texts[key] = line.Text
					}
					p.leave()
					waits := []time.Duration{0, 1, commitDelay, awayTime, awayTime + 2*roomLife}
					time.Sleep(waits[rand.N(len(waits))])
				}
				if rand.N(4) == 0 {
					w.exit()
				} else {
					w.crash()
				}
			}
		})
	})
}

// A server that is started after the lock was deleted, beside the one that runs, harms nothing:
// the first one stops within a second.
func TestDeletedLockAndASecondServer(t *testing.T) {
	t.Parallel()
	repeat(t, func(t *testing.T) {
		file := newFile(t)
		first, cmd, log := startProgram(t, "CHAT_KEY="+testKey, file)
		over := make(chan struct{})
		wait := first.talk("kitchen", 3, over)
		timer := time.NewTimer(rand.N(300 * time.Millisecond))
		<-timer.C
		os.Remove(file + ".lock")
		second, _, _ := startProgram(t, "CHAT_KEY="+testKey, file)
		io.Copy(io.Discard, log)
		if cmd.Wait(); cmd.ProcessState.ExitCode() != 1 {
			t.Errorf("the first server ends with %v", cmd.ProcessState)
		}
		close(over)
		wait()
		p := second.join("Hans", "garden")
		p.send("hello")
		p.until("message Hans: hello")
		if q := second.join("Hans", "kitchen"); q != nil {
			q.until("join Hans")
		}
		wantIntact(t, file)
	})
}

// Backups are renamed over the file of a server under load, again and again: each is intact, and
// is what the next server has.
func TestReplacedUnderLoad(t *testing.T) {
	t.Parallel()
	repeat(t, func(t *testing.T) {
		file := newFile(t)
		for n := range 3 { // The users that were there before a restart keep their names.
			w, cmd, log := startProgram(t, "CHAT_KEY="+testKey, file)
			over := make(chan struct{})
			wait := w.talk(fmt.Sprint("room", n), 3, over)
			watcher := w.join("Watcher", fmt.Sprint("room", n))
			watcher.until("join Watcher")
			backUp(t, file, file+".backup")
			timer := time.NewTimer(rand.N(200 * time.Millisecond))
			<-timer.C
			before := dump(t, file+".backup")
			if err := os.Rename(file+".backup", file); err != nil {
				t.Fatal(err)
			}
			io.Copy(io.Discard, log)
			if cmd.Wait(); cmd.ProcessState.ExitCode() != 1 {
				t.Errorf("it ends with %v", cmd.ProcessState)
			}
			close(over)
			wait()
			if after := dump(t, file); after != before {
				t.Errorf("the backup has changed from %d bytes to %d", len(before), len(after))
			}
			wantIntact(t, file)
		}
	})
}

// Whatever changes in the chat server's files, go generate applies the diffs or changes nothing.
func TestAnyChangeOfTheChatServersFiles(t *testing.T) {
	t.Parallel()
	repeat(t, func(t *testing.T) {
		root, here := copies(t)
		generate(t, here, "")
		for range 5 {
			for _, name := range []string{"hub.go", "client.go", "main.go"} {
				lines := strings.SplitAfter(read(t, root, name), "\n")
				lines[0] = "// \x00, which makes a file binary for diff\n" + lines[0]
				for range rand.N(4) {
					i := rand.N(len(lines))
					switch rand.N(3) {
					case 0:
						lines = slices.Delete(lines, i, i+1)
					case 1:
						lines = slices.Insert(lines, i, "// "+hostileText(3)+"\n")
					case 2:
						lines[i] = "// " + lines[i]
					}
				}
				os.WriteFile(filepath.Join(root, name), []byte(strings.Join(lines, "")), 0o644)
			}
			var before []string
			for _, name := range []string{"main.go", "hub.go", "client.go", "home.html"} {
				before = append(before, read(t, here, name))
			}
			cmd := exec.Command("sh", "copy.sh")
			cmd.Dir = here
			out, err := cmd.CombinedOutput()
			for i, name := range []string{"main.go", "hub.go", "client.go", "home.html"} {
				if err != nil && read(t, here, name) != before[i] {
					t.Errorf("go generate fails with %s, and has changed %s", out, name)
				}
			}
			if err == nil { // Then the diffs are the same, but for the numbers of lines.
				diffs := func() (text string) {
					for _, name := range []string{"README.md", "main.diff", "home.diff"} {
						text += withoutNumbers(read(t, here, name))
					}
					return text
				}
				want := diffs()
				generate(t, here, "diffs")
				if len(diffs()) < len(want)*9/10 {
					t.Errorf("make diffs has lost %d of %d bytes", len(want)-len(diffs()), len(want))
				}
			}
			if entries, _ := os.ReadDir(here); len(entries) != 8 {
				t.Fatalf("there are %d files, want 8", len(entries))
			}
			root, here = copies(t)
			generate(t, here, "")
		}
	})
}
