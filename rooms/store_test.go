package main

import (
	"database/sql"
	"flag"
	"fmt"
	"io"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"
)

// runProgram runs the program until it exits, and returns its output and status.
func runProgram(t *testing.T, cmd *exec.Cmd) (output string, status int) {
	t.Helper()
	out, _ := cmd.CombinedOutput()
	return string(out), cmd.ProcessState.ExitCode()
}

func TestDatabaseThatCannotBeUsedIsOneLineAndStatusOne(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := func(name, content string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o444); err != nil {
			t.Fatal(err)
		}
		return path
	}
	inUse := newFile(t)
	startProgram(t, "CHAT_KEY=", inUse)
	foreign := file("foreign.db", "")
	os.Chmod(foreign, 0o600)
	db, err := sql.Open("sqlite", foreign)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := db.Exec(`CREATE TABLE rooms (x)`); err != nil {
		t.Fatal(err)
	}
	db.Close()
	for _, test := range []struct {
		name, file, want string
	}{
		{"no database", file("text.db", strings.Repeat("not a database ", 1000)),
			"file is not a database"},
		{"truncated", file("short.db", "SQLite format 3\x00"), "file is not a database"},
		{"a directory", dir, "is a directory"},
		{"in no directory", filepath.Join(dir, "none", "rooms.db"), "no such file or directory"},
		{"of another program", foreign, "no such column"},
		{"in use", inUse, "another server uses this database"},
	} {
		output, status := runProgram(t, program(t, "CHAT_KEY=", test.file))
		if status != 1 || strings.Count(output, "\n") != 1 || !strings.Contains(output, test.want) ||
			!strings.Contains(output, test.file) {
			t.Errorf("%s: status %d and output %q, want 1 and one line with %q", test.name, status, output,
				test.want)
		}
	}
}

func TestReadOnlyDatabaseIsOneLineAndStatusOne(t *testing.T) {
	t.Parallel()
	dir, err := os.MkdirTemp("", "rooms") // which another user can reach, unlike t.TempDir
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	os.Chmod(dir, 0o755)
	file := filepath.Join(dir, "rooms.db")
	store, err := openStore(file)
	if err != nil {
		t.Fatal(err)
	}
	store.close()
	os.Chmod(file, 0o444)
	cmd := program(t, "CHAT_KEY=", file)
	if os.Geteuid() == 0 { // Root can write to every file.
		// Written by this process, it could not be executed while a parallel test forks.
		copied := filepath.Join(dir, "rooms")
		if out, err := exec.Command("cp", cmd.Path, copied).CombinedOutput(); err != nil {
			t.Fatalf("cp: %v: %s", err, out)
		}
		cmd.Path, cmd.Dir = copied, dir
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	}
	output, status := runProgram(t, cmd)
	if status != 1 || strings.Count(output, "\n") != 1 ||
		!strings.Contains(output, "permission denied") {
		t.Errorf("status %d and output %q, want 1 and one line", status, output)
	}
}

func TestOnlyItsOwnerCanReadTheDatabase(t *testing.T) {
	w := startTCP(t)
	w.join("Grete", "kitchen").until("join Grete")
	files, _ := filepath.Glob(w.store.db.file + "*")
	if len(files) < 2 {
		t.Errorf("there are %q, want the database and its log", files)
	}
	for _, file := range files {
		if info, err := os.Stat(file); err != nil || info.Mode() != 0o600 {
			t.Errorf("%s has mode %v, %v, want -rw-------", file, info.Mode(), err)
		}
	}
}

// Ten clients talk while the server is restarted again and again. Each sends on while the
// server goes down, and what it receives back is in the history.
func TestRestartLosesAndDoublesNoLine(t *testing.T) {
	t.Parallel()
	restart(t, *rounds, syscall.SIGTERM)
}

// A killed process loses the last second at most, and no line before one that it keeps.
func TestKillLosesTheLastSecondAtMost(t *testing.T) {
	t.Parallel()
	restart(t, *rounds*5/2, syscall.SIGKILL)
}

var rounds = flag.Int("rounds", 2,
	"restart the server this `number` of times, and kill it 5/2 times as often")

func restart(t *testing.T, rounds int, signal syscall.Signal) {
	file := newFile(t)
	var cookies []string
	var previous, watcher *peer
	var seen []Line // by the watcher, in all rounds
	for round := range rounds {
		w, cmd, log := startProgram(t, "CHAT_KEY="+testKey, file)
		if round == 0 {
			for n := range 10 {
				cookies = append(cookies, w.logIn(fmt.Sprint("User-", n)))
			}
			watcher = w.dial(cookies[0], "kitchen")
		} else {
			watcher = w.reconnect(cookies[0], "kitchen", previous)
		}
		var talk sync.WaitGroup
		for n, cookie := range cookies[1:] {
			p := w.dial(cookie, "kitchen")
			if p == nil {
				break
			}
			talk.Go(func() {
				for i := 0; p.WriteMessage(websocket.TextMessage,
					fmt.Appendf(nil, "%d %d %d", round, n, i)) == nil; i++ {
				}
				<-p.ended
			})
		}
		// At some moment within the commits.
		var lines []Line
		var received []time.Time
		start := time.Now()
		for time.Since(start) < time.Duration(20+round*37%180)*time.Millisecond {
			watcher.more()
			for _, line := range watcher.takeMessages() {
				lines, received = append(lines, line), append(received, time.Now())
			}
		}
		killed := time.Now() // and not when the watcher notices, which a busy machine delays
		cmd.Process.Signal(signal)
		<-watcher.ended
		for _, line := range watcher.takeMessages() {
			lines, received = append(lines, line), append(received, time.Now())
		}
		io.Copy(io.Discard, log)
		err := cmd.Wait()
		if signal == syscall.SIGTERM && err != nil {
			t.Errorf("round %d ends with %v", round, err)
		}
		talk.Wait()
		if t.Failed() {
			return
		}
		previous = watcher
		seen = append(seen, lines...)
		for i := 1; i < len(seen); i++ {
			if gap := seen[i].N - seen[i-1].N; gap <= 0 || gap > 1 &&
				(signal == syscall.SIGTERM || gap < maxUncommitted/2) {
				t.Fatalf("round %d: line %d after %d", round, seen[i].N, seen[i-1].N)
			}
		}

		// What the database has is the end of what was seen, but for the last second.
		store, err := openStore(file)
		if err != nil {
			t.Fatal(err)
		}
		record, _ := store.load("kitchen")
		if err := store.close(); err != nil {
			t.Fatal(err)
		}
		kept := record.history
		last := kept[len(kept)-1].N
		for i, line := range lines {
			isKept := slices.ContainsFunc(kept, func(k Line) bool { return k.N == line.N })
			switch {
			case line.N < kept[0].N:
			case line.N <= last && !isKept:
				t.Errorf("round %d: line %d is lost, and %d is kept", round, line.N, last)
			case line.N > last && (signal == syscall.SIGTERM || killed.Sub(received[i]) > time.Second):
				t.Errorf("round %d: line %d is lost, %v after it was received", round, line.N,
					killed.Sub(received[i]))
			}
		}
		for i := 1; i < len(kept); i++ {
			if gap := kept[i].N - kept[i-1].N; gap != 1 &&
				(signal == syscall.SIGTERM || gap < maxUncommitted/2) {
				t.Errorf("round %d: %d is kept after %d", round, kept[i].N, kept[i-1].N)
			}
		}
		if record.last < seen[len(seen)-1].N {
			t.Errorf("round %d: numbers go on at %d, although %d was seen", round, record.last,
				seen[len(seen)-1].N)
		}
	}
}

// takeMessages returns the numbered lines of takeLines.
func (p *peer) takeMessages() []Line {
	return slices.DeleteFunc(p.takeLines(), func(line Line) bool { return line.N == 0 })
}

// The database fails as on a full disk, in the middle of a commit.
func fillDisk(t *testing.T, s *Store, isFull bool) {
	t.Helper()
	pages := 1 << 30
	if isFull {
		pages = 1 // SQLite raises it to what there is.
	}
	execute(t, s, fmt.Sprint("PRAGMA max_page_count = ", pages))
}

// execute executes statement on the store's goroutine.
func execute(t *testing.T, s *Store, statement string) {
	t.Helper()
	done := make(chan error)
	s.operations <- func() {
		_, err := s.db.Exec(statement)
		done <- err
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

func TestChatGoesOnWhileTheDatabaseFailsAndAllIsSavedAfterwards(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var logged logBook
		log.SetOutput(&logged)
		defer log.SetOutput(io.Discard)
		w := startPiped(t)
		cookie := w.logIn("Grete")
		grete, uwe := w.dial(cookie, "kitchen"), w.join("Uwe", "garden")
		fillDisk(t, w.store, true)
		text := strings.Repeat("x", maxMessageSize)
		for n := range 2 * historySize { // more than the free pages hold
			grete.send(fmt.Sprint(n) + text[10:])
			time.Sleep(10 * rateInterval)
		}
		uwe.send("weeds")
		if got := grete.received(); len(got) != 1+2*historySize { // with her join
			t.Errorf("Grete receives %d lines", len(got))
		}
		synctest.Wait()
		if got := strings.Count(logged.String(), "full"); got < 10 || got > 21 {
			t.Errorf("in 20 seconds it logs %d times that the disk is full", got)
		}

		// Rooms close and open as ever, though only memory has them.
		w.join("Hans", "cellar").leave()
		uwe.leave()
		time.Sleep(awayTime + 2*roomLife)
		if got := w.join("Ursel", "garden").received(); !slices.Contains(got, "message Uwe: weeds") {
			t.Errorf("after the garden was closed Ursel receives %q", got)
		}

		synctest.Wait()
		logged.Reset()
		fillDisk(t, w.store, false)
		time.Sleep(2 * retryDelay)
		synctest.Wait()
		if got := logged.String(); strings.Count(got, "\n") != 1 ||
			!strings.Contains(got, "saved all changes") {
			t.Errorf("then it logs %q, want that all is saved", got)
		}
		grete.leave()
		time.Sleep(awayTime + 2*roomLife)
		back := w.reconnect(cookie, "kitchen", grete)
		if back.want("join Grete"); back.welcome.Missed {
			t.Error("Grete is told that she may have missed something")
		}
		if got := w.join("Hans", "kitchen").received(); len(got) != historySize+1 {
			t.Errorf("after the kitchen was closed Hans receives %d lines", len(got))
		}
	})
}

// On a disk that is full, which a limit on the size of files stands for, the chat goes on,
// and everything is saved as soon as there is space.
func TestFullDiskLosesNothing(t *testing.T) {
	t.Parallel()
	file := newFile(t)
	w, cmd, log := startProgram(t, "CHAT_KEY="+testKey, file)
	limit := func(bytes string) {
		t.Helper()
		if out, err := exec.Command("prlimit", "--pid", fmt.Sprint(cmd.Process.Pid),
			"--fsize="+bytes+":").CombinedOutput(); err != nil {
			t.Fatalf("prlimit: %v: %s", err, out)
		}
	}
	logged := func(want string) {
		t.Helper()
		for {
			if line, err := log.ReadString('\n'); err != nil {
				t.Fatalf("the log ends with %v, want %q", err, want)
			} else if strings.Contains(line, want) {
				return
			}
		}
	}
	cookie := w.logIn("Grete")
	grete := w.dial(cookie, "kitchen")
	grete.until("join Grete")
	limit("4096")
	for n := range historySize {
		grete.send(fmt.Sprint("while the disk is full ", n, strings.Repeat(" x", 100)))
	}
	logged("rooms.db: ")
	hans := w.join("Hans", "kitchen")
	hans.until("join Hans")
	uwe := w.join("Uwe", "garden")
	uwe.send("weeds")
	uwe.until("message Uwe: weeds")
	grete.send("dinner")
	hans.until("message Grete: dinner")
	limit("unlimited")
	logged("saved all changes")
	cmd.Process.Kill() // without another commit
	cmd.Wait()

	w, _, _ = startProgram(t, "CHAT_KEY="+testKey, file)
	lines := w.join("Ursel", "kitchen").until("join Ursel")
	if want := []string{"message Grete: dinner", "join Ursel"}; len(lines) != historySize+1 ||
		!slices.Equal(lines[len(lines)-2:], want) {
		t.Errorf("after a restart there are %d lines that end with %q, want %d and %q", len(lines),
			lines[len(lines)-2:], historySize+1, want)
	}
	w.join("Ursel", "garden").until("message Uwe: weeds")
}

func TestShutdownWhileTheDatabaseFailsIsAnErrorAndThenACrash(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		file := newFile(t)
		store, err := openStore(file)
		if err != nil {
			t.Fatal(err)
		}
		record, _ := store.load("kitchen")
		line := Line{N: 1, message: []byte(strings.Repeat("x", 1<<20))}
		record.used, record.last, record.history = time.Now(), 1, []Line{line}
		fillDisk(t, store, true)
		store.save(record)
		if err := store.close(); err == nil || !strings.Contains(err.Error(), "full") {
			t.Errorf("close returns %v, want that the disk is full", err)
		}
	})
}

// After a crash the numbers go on beyond those that clients may have, and the welcome says
// that lines may be missing.
func TestWelcomeTellsThatACrashMayHaveLostLines(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		file := newFile(t)
		w := startPipedOn(t, file)
		cookie := w.logIn("Grete")
		grete := w.dial(cookie, "kitchen")
		grete.send("/to Grete a note")
		grete.send("dinner")
		grete.received()
		time.Sleep(2 * commitDelay)
		fillDisk(t, w.store, true)
		for n := range historySize {
			grete.send(fmt.Sprint("lost ", n, strings.Repeat("x", 400)))
		}
		if got := grete.received(); len(got) != historySize {
			t.Errorf("Grete receives %d lines", len(got))
		}
		w.crash()

		w = startPipedOn(t, file)
		back := w.reconnect(cookie, "kitchen", grete)
		back.send("here again")
		back.want("message Grete: here again")
		if !back.welcome.Missed || back.welcome.RoomID != grete.welcome.RoomID ||
			back.last <= grete.last {
			t.Errorf("the welcome is %+v, and the number %d after %d", back.welcome, back.last, grete.last)
		}
		hans := w.join("Hans", "kitchen")
		if hans.want("message Grete: dinner", "message Grete: here again",
			"join Hans"); !hans.welcome.Missed {
			t.Error("a newcomer is not told that lines are missing between those")
		}
		for n := range historySize {
			back.send(fmt.Sprint(n))
			time.Sleep(rateInterval)
		}
		back.received()
		uwe := w.join("Uwe", "kitchen")
		if uwe.received(); uwe.welcome.Missed {
			t.Error("a newcomer is told of lines that are older than the history")
		}
		again := w.dial(cookie, "kitchen")
		if got := again.received(); got[0] != "private Grete > Grete: a note" || !again.welcome.Missed {
			t.Errorf("Grete receives %q first, and is not told that lines are missing after it", got[0])
		}
	})
}

func TestQuotesInTextAndNamesAreOnlyText(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		cookie := w.logIn("Grete")
		grete := w.dial(cookie, "kitchen")
		grete.received()
		texts := []string{"'); DROP TABLE lines; --", `"; DELETE FROM rooms WHERE 1=1; --`,
			"?1 :a @b $c %s", "x\x00y", "\\'", `{"n":1}`}
		for _, text := range texts {
			grete.send(text)
		}
		for _, room := range []string{"kitchen'--", "kitchen%27--", "kitchen%22", "a;b", "%00"} {
			w.wantStatus(cookie, room, 404)
		}
		grete.leave()
		time.Sleep(awayTime + 2*roomLife)
		got := w.dial(cookie, "kitchen").received()
		for _, text := range texts {
			if !slices.Contains(got, "message Grete: "+strings.ReplaceAll(text, "\x00", " ")) {
				t.Errorf("%q is not among %q", text, got)
			}
		}
	})
}

// The file holds no more than what rooms keep: what is new takes the place of what is old.
func TestFileDoesNotGrowWithoutEnd(t *testing.T) {
	w := startTCP(t)
	w.join("Grete", "kitchen").until("join Grete")
	size := func() (lines int) {
		done := make(chan error)
		w.store.operations <- func() {
			w.store.commit()
			done <- w.store.db.QueryRow(`SELECT count(*) FROM lines`).Scan(&lines)
		}
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		return lines
	}
	for range 10 {
		for n := range 150 {
			w.room("kitchen").do(func() {
				w.room("kitchen").publish(Line{Kind: "message", Text: fmt.Sprint(n)})
				w.room("kitchen").publish(Line{Kind: "private", Text: fmt.Sprint(n), only: []string{"ID"}})
			})
		}
		if got := size(); got > 2*historySize {
			t.Fatalf("the database has %d lines, want at most %d", got, 2*historySize)
		}
	}
	if got := size(); got != 2*historySize {
		t.Errorf("the database has %d lines, want %d", got, 2*historySize)
	}
}

// In an empty container there is no directory for temporary files, and SQLite would write one for
// a transaction that changes much.
func TestFullRoomIsSavedWithoutATemporaryFile(t *testing.T) {
	d, err := openDatabase(newFile(t), func(*tx) {})
	if err != nil {
		t.Fatal(err)
	}
	defer d.close()
	var before, opened []string
	record := Record{id: "ID", name: "kitchen"}
	for range 2 { // The second time, it replaces everything.
		record.history = nil
		for range 2 * historySize {
			record.last++
			record.history = append(record.history,
				Line{N: record.last, message: Line{Text: strings.Repeat("x", 2000)}.encode()})
		}
		if err := d.transaction(func(t *tx) {
			t.err = t.savepoint(func() {
				t.write(record)
				before, opened = opened, nil
				files, _ := filepath.Glob("/proc/self/fd/*")
				for _, link := range files {
					name, _ := os.Readlink(link)
					opened = append(opened, name)
				}
			})
		}); err != nil {
			t.Fatal(err)
		}
	}
	if !slices.Contains(opened, d.file) {
		t.Errorf("the open files are %q, want %s among them", opened, d.file)
	}
	for _, name := range opened { // SQLite deletes temporary files when it has opened them.
		if strings.HasSuffix(name, " (deleted)") && !slices.Contains(before, name) {
			t.Errorf("SQLite has opened %s", name)
		}
	}
}

func TestStoreKeepsNoMoreRoomsThanItsLimit(t *testing.T) {
	for _, full := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			w := startPiped(t)
			fillDisk(t, w.store, full) // Then the rooms wait to be saved.
			for n := range maxKeptRooms {
				w.store.save(Record{id: fmt.Sprint(n), name: fmt.Sprint("room", n), used: time.Now(), last: 1,
					committed: new(atomic.Int64)})
			}
			time.Sleep(2 * commitDelay)
			cookie := w.logIn("Grete")
			w.dial(cookie, "onemore").wantClose(errTooManyRooms)
			w.dial(cookie, "room7").want("join Grete")
			time.Sleep(time.Second)
			w.wantRooms(fold("room7"))
			fillDisk(t, w.store, false)
		})
	}
}

// While a room cannot be read its clients get 1011, nothing is overwritten, and the log has
// the error.
func TestUnreadableRoomIsRefusedAndKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var logged logBook
		log.SetOutput(&logged)
		defer log.SetOutput(io.Discard)
		w := startPiped(t)
		grete := w.join("Grete", "kitchen")
		grete.send("dinner")
		grete.received()
		grete.leave()
		time.Sleep(awayTime + 2*roomLife)
		execute(t, w.store, `ALTER TABLE lines RENAME TO hidden`)
		w.dial(w.logIn("Hans"), "kitchen").wantClose(errUnreadable)
		execute(t, w.store, `ALTER TABLE hidden RENAME TO lines`)
		time.Sleep(2 * time.Second) // The room closes.
		w.join("Ursel", "kitchen").want("message Grete: dinner", "join Ursel")
		if got := logged.String(); strings.Count(got, "cannot read a room: ") != 1 ||
			!strings.Contains(got, "no such table") {
			t.Errorf("the log is %q, want why the room could not be read", got)
		}
	})
}

// A transaction that fails in any of its steps returns the error, writes nothing, and leaves
// none open: the next one would fail.
func TestTransactionThatFailsWritesNothing(t *testing.T) {
	s, err := openStore(newFile(t))
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	var n int
	nothing := func() {}
	for _, test := range []struct {
		name, want string
		f          func(t *tx)
	}{
		{"a change", "syntax error", func(t *tx) {
			t.exec(`nonsense`)
			t.query(`SELECT 1`, nil, []any{&n},
				nothing)
		}},
		{"a query", "no such column", func(t *tx) {
			t.query(`SELECT nonsense`, nil, []any{&n},
				nothing)
			t.exec(`DELETE FROM lines`)
		}},
		{"a value", "converting", func(t *tx) {
			t.query(`SELECT 'text' UNION ALL SELECT 1`, nil,
				[]any{&n}, nothing)
		}},
		{"a later row", "overflow", func(t *tx) {
			t.query(`SELECT 1 UNION ALL SELECT abs(-9223372036854775807 - 1)`, nil, []any{&n}, nothing)
		}},
		{"the commit", "FOREIGN KEY", func(t *tx) {
			t.exec(`PRAGMA defer_foreign_keys = 1`)
			t.exec(`INSERT INTO lines VALUES ('no such room', 1, '', '')`)
		}},
	} {
		done := make(chan bool)
		s.operations <- func() {
			defer close(done)
			err := s.db.transaction(func(t *tx) { t.exec(`DELETE FROM server`); test.f(t) })
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("%s fails: transaction returns %v, want %q", test.name, err, test.want)
			}
			if err := s.db.transaction(func(t *tx) {
				t.query(`SELECT count(*) FROM server`, nil, []any{&n},
					nothing)
			}); err != nil || n != 1 {
				t.Errorf("%s fails: then there are %d rows, %v, want 1", test.name, n, err)
			}
		}
		<-done
	}
}

// While a slow disk keeps the store, hubs wait as soon as its queue is full, and nothing
// is skipped.
func TestFullQueueIsBackpressure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startPiped(t)
		grete := w.join("Grete", "kitchen")
		grete.received()
		hub, disk := w.room("kitchen"), make(chan bool)
		w.store.operations <- func() { <-disk }
		sent := 0
		flooded := make(chan bool)
		go func() {
			for range 3 * storeQueueSize {
				hub.broadcast <- []byte("x")
				sent++
			}
			close(flooded)
		}()
		time.Sleep(time.Second) // Until then it may only wait for grete's queue.
		got := len(grete.received())
		if got < storeQueueSize || got > storeQueueSize+2 {
			t.Errorf("%d lines are published while the store waits, want %d", got, storeQueueSize)
		}
		close(disk)
		<-flooded
		if got += len(grete.received()); got != 3*storeQueueSize {
			t.Errorf("%d lines are published, want %d", got, 3*storeQueueSize)
		}
	})
}

// The clients of 100 rooms, with 200 lines each, all join at once after a restart.
func TestAllRoomsOpenAtOnce(t *testing.T) { repeat(t, testAllRoomsOpenAtOnce) }

func testAllRoomsOpenAtOnce(t *testing.T) {
	file := newFile(t)
	store, err := openStore(file)
	if err != nil {
		t.Fatal(err)
	}
	for n := range maxRooms {
		record := Record{id: fmt.Sprint("ID", n), name: fmt.Sprint("room", n), used: time.Now(),
			last: 200, committed: new(atomic.Int64)}
		for i := range historySize {
			record.history = append(record.history, Line{N: int64(2*i + 1),
				message: Line{N: int64(2*i + 1), Kind: "message", Time: time.Now(),
					Text: fmt.Sprint(n)}.encode()})
			record.private = append(record.private, Line{N: int64(2*i + 2), only: []string{"x", "y"},
				message: Line{N: int64(2*i + 2), Kind: "private"}.encode()})
		}
		store.save(record)
	}
	if err := store.close(); err != nil {
		t.Fatal(err)
	}
	w := startTCPOn(t, file)
	var clients sync.WaitGroup
	for n := range maxRooms {
		for i := range 2 {
			cookie := w.logIn(fmt.Sprint("User-", i))
			clients.Go(func() {
				p := w.dial(cookie, fmt.Sprint("Room", n))
				if p == nil {
					return
				}
				got := p.until(fmt.Sprint("join User-", i))
				for k := range historySize - 1 { // Another user may have joined before.
					if k >= len(got) || got[k] != fmt.Sprint("message: ", n) {
						t.Errorf("a client of room %d receives %d lines, and as number %d not its history", n,
							len(got), k)
						return
					}
				}
			})
		}
	}
	clients.Wait()
}

func BenchmarkFlood(b *testing.B) {
	b.Run("flood=false", func(b *testing.B) { benchmarkFlood(b, false, true) })
	b.Run("database=false", func(b *testing.B) { benchmarkFlood(b, true, false) })
	b.Run("database=true", func(b *testing.B) { benchmarkFlood(b, true, true) })
}

// benchmarkFlood measures the lines a second of a flood in one room, and how long a line
// takes in another room, once a millisecond.
func benchmarkFlood(b *testing.B, flood, database bool) {
	w := startTCP(b)
	if !database {
		discard(w.store)
	}
	w.join("Grete", "kitchen").until("join Grete")
	uwe := w.join("Uwe", "garden")
	uwe.until("join Uwe")
	kitchen, garden := w.room("kitchen"), w.room("garden")
	over := make(chan struct{})
	var times []time.Duration
	var pings sync.WaitGroup
	pings.Go(func() {
		ticker := time.NewTicker(time.Millisecond)
		defer ticker.Stop()
		for n := 0; ; n++ {
			select {
			case <-over:
				return
			case <-ticker.C:
				start := time.Now()
				garden.broadcast <- fmt.Append(nil, n)
				uwe.until(fmt.Sprint("message: ", n))
				times = append(times, time.Since(start))
			}
		}
	})
	text := []byte(strings.Repeat("x", 100))
	for b.Loop() {
		if flood {
			kitchen.broadcast <- text
		} else {
			time.Sleep(time.Millisecond)
		}
	}
	close(over)
	pings.Wait()
	if flood {
		b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "lines/s")
	}
	b.ReportMetric(0, "ns/op")
	if slices.Sort(times); len(times) > 0 {
		b.ReportMetric(float64(times[len(times)/2].Microseconds()), "p50-µs")
		b.ReportMetric(float64(times[len(times)*99/100].Microseconds()), "p99-µs")
	}
}

// discard has the store execute operations as ever, but commit nothing.
func discard(s *Store) {
	s.operations <- func() {
		for operation := range s.operations {
			if operation == nil {
				s.operations <- nil // for run
				return
			}
			operation()
			s.due = nil
			clear(s.unsaved)
		}
	}
}
