package main

import (
	"database/sql"
	"fmt"
	"io"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// Its schema.

// version0 returns a database of a version that had no user_version. Its kitchen has Grete as
// the owner, Mallory and Trudy as kicked, joins, messages and private messages, up to line 11.
func version0(t *testing.T) string {
	t.Helper()
	dump, err := os.ReadFile("testdata/version0.sql")
	if err != nil {
		t.Fatal(err)
	}
	file := newFile(t)
	edit(t, file, string(dump))
	os.Chmod(file, 0o600)
	return file
}

// edit executes statements in a database that no server uses.
func edit(t *testing.T, file, statements string) {
	t.Helper()
	db, err := sql.Open("sqlite", file)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if _, err := db.Exec(statements); err != nil {
		t.Fatal(err)
	}
}

// as returns the cookie of a user with a known ID.
func (w *world) as(id, name string) string {
	value, err := w.cookies.Encode("chat", Identity{ID: id, Name: name})
	if err != nil {
		w.t.Fatal(err)
	}
	return "chat=" + value
}

func TestDatabaseOfAnEarlierVersionIsBroughtUpToDate(t *testing.T) {
	file := version0(t)
	for _, join := range []string{"0 join Grete ", ""} { // The second time, it is up to date.
		synctest.Test(t, func(t *testing.T) {
			w := startPipedOn(t, file)
			w.dial(w.as("MALLORYSID", "Mallory"), "kitchen").wantClose(errKicked)
			w.dial(w.as("TRUDYSID", "Trudy"), "kitchen").wantClose(errKicked)
			uwe := w.join("Uwe", "kitchen")
			grete := w.dial(w.as("GRETESID", "Grete"), "Kitchen")
			lines := grete.receivedLines()
			if grete.welcome.RoomID != "UIWSGGPTHAUQ7VGQGOFG6JOUEE" || grete.welcome.Missed {
				t.Errorf("the welcome is %+v", grete.welcome)
			}
			want := []string{
				`5 message Grete dinner is at six, <b>"promptly"</b>`,
				"6 private Grete bring wine", "7 private Hans red or white?",
				"8 message Mallory I was here", "11 message Hans schön & gut 😀",
			}
			if join != "" { // The second time, she is back from the restart.
				want = append(want, join)
			}
			var got []string
			for _, line := range lines {
				got = append(got, fmt.Sprint(line.N, " ", line.Kind, " ", line.User, " ", line.Text))
			}
			if !slices.Equal(got, want) {
				t.Errorf("Grete receives %q, want %q", got, want)
			}
			uwe.received()
			grete.send("/kick Uwe") // for she is the host
			uwe.want("leave Uwe: kicked by Grete")
			grete.received()
		})
	}
	synctest.Test(t, func(t *testing.T) {
		w := startPipedOn(t, file)
		grete := w.dial(w.as("GRETESID", "Grete"), "Kitchen")
		grete.send("/allow Trudy") // whose name was in her leave
		time.Sleep(2 * commitDelay)
		grete.received()
		w.dial(w.as("TRUDYSID", "Trudy"), "kitchen").received()
		w.dial(w.as("MALLORYSID", "Mallory"), "kitchen").wantClose(errKicked)
		w.join("Hans", "garden").want("message Uwe: weeds 0", "message Uwe: weeds 1",
			"message Uwe: weeds 2", "join Hans")
	})
}

// Whether it has crashed is known of the whole database, so each room may have lost lines.
func TestDatabaseOfAnEarlierVersionThatHasCrashed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		file := version0(t)
		edit(t, file, `UPDATE server SET clean = 0`)
		w := startPipedOn(t, file)
		hans := w.dial(w.as("HANSSID", "Hans"), "kitchen", "?room=UIWSGGPTHAUQ7VGQGOFG6JOUEE&after=12")
		hans.send("one")
		if got := hans.received(); !hans.welcome.Missed || hans.last != 11+maxUncommitted+1 {
			t.Errorf("Hans receives %q, number %d, welcome %+v", got, hans.last, hans.welcome)
		}
	})
}

// README.md says how an operator makes a user that is in a room its owner.
func TestOperatorNamesANewOwner(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		file := newFile(t)
		w := startPipedOn(t, file)
		hans := w.join("Hans", "kitchen")
		w.join("Grete", "kitchen").received()
		hans.send("/kick Grete")
		hans.received()
		cookie := w.logIn("Grete") // another user of that name
		w.dial(cookie, "kitchen").received()
		w.exit()

		_, statement, _ := strings.Cut(read(t, ".", "README.md"), "`UPDATE rooms SET owner = ")
		statement, _, _ = strings.Cut(statement, "`")
		edit(t, file, "UPDATE rooms SET owner = "+statement)
		w = startPipedOn(t, file)
		grete := w.dial(cookie, "kitchen")
		grete.send("/kick Hans")
		grete.want("notice /kick Hans: Done.", "leave Hans: kicked by Grete")
	})
}

func TestDatabaseOfALaterVersionIsOneLineAndStatusOne(t *testing.T) {
	file := newFile(t)
	store, err := openStore(file)
	if err != nil {
		t.Fatal(err)
	}
	store.close()
	edit(t, file, fmt.Sprint(`PRAGMA user_version = `, len(migrations)+1))
	output, status := runProgram(t, program(t, "CHAT_KEY=", file))
	if status != 1 || strings.Count(output, "\n") != 1 || !strings.Contains(output, "later version") {
		t.Errorf("status %d and output %q, want 1 and one line", status, output)
	}
}

// A migration that fails leaves the database as it was.
func TestFailedMigrationChangesNothing(t *testing.T) {
	file := version0(t)
	edit(t, file, `CREATE TABLE users (x)`)
	before := dump(t, file)
	if _, err := openStore(file); err == nil || !strings.Contains(err.Error(), "already exists") {
		t.Errorf("openStore returns %v", err)
	}
	if after := dump(t, file); after != before {
		t.Errorf("the database was %s and is %s", before, after)
	}
}

// dump returns all that is in a database which no server uses.
func dump(t *testing.T, file string) string {
	t.Helper()
	out, err := exec.Command("sqlite3", file, ".dump").CombinedOutput()
	if err != nil {
		t.Fatalf("sqlite3: %v: %s", err, out)
	}
	return string(out)
}

// When names.go has changed, rooms are found all the same, and of two whose names have become
// confusable the one that was used last.
func TestRoomsAreFoundWhenConfusableNamesHaveChanged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var logged logBook
		log.SetOutput(&logged)
		defer log.SetOutput(io.Discard)
		file := version0(t)
		edit(t, file, `UPDATE rooms SET fold = 'kitchen?' WHERE name = 'kitchen';
			INSERT INTO rooms VALUES ('ID', 'Kitchen', 'kitchen', '', '', 1, 0, 0, 0)`)
		w := startPipedOn(t, file)
		hans := w.join("Hans", "kitchen")
		if hans.received(); hans.welcome.RoomID != "UIWSGGPTHAUQ7VGQGOFG6JOUEE" {
			t.Errorf("the welcome is %+v", hans.welcome)
		}
		said := `the room "Kitchen" cannot be opened: "kitchen" looks like it`
		if !strings.Contains(logged.String(), said) {
			t.Errorf("the log is %q", logged.String())
		}
	})
}

// Its file.

func TestFileNamesAreNotURLs(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"/two.db", "/a?b#c%41 ö&x=y.db", "/file:x.db", "//x.db"} {
		name = "/" + dir + name
		store, err := openStore(name)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if err := store.close(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if info, err := os.Stat(name); err != nil || info.Size() == 0 {
			t.Errorf("%s: %v, %v, want a database", name, info, err)
		}
	}
	_, err := openStore(":memory:")
	if err == nil || !strings.Contains(err.Error(), "would keep nothing") {
		t.Errorf(":memory: returns %v", err)
	}
	if _, err := os.Stat(":memory:"); err == nil {
		t.Error("there is a file of that name")
	}
}

func TestModeOfAnExistingFileIsLeftAndLogged(t *testing.T) {
	file := newFile(t)
	for _, mode := range []os.FileMode{0o600, 0o640, 0o644} {
		var logged logBook
		log.SetOutput(&logged)
		if err := os.WriteFile(file, nil, mode); err != nil {
			t.Fatal(err)
		}
		os.Chmod(file, mode)
		store, err := openStore(file)
		if err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(file)
		store.close()
		log.SetOutput(io.Discard)
		if err != nil || info.Mode() != mode {
			t.Errorf("the mode is %v, %v, want %v", info.Mode(), err, mode)
		}
		if isSaid := strings.Contains(logged.String(), mode.String()); isSaid != (mode != 0o600) {
			t.Errorf("with mode %v it logs %q", mode, logged.String())
		}
	}
}

// A server that has the file by another name is kept out, too.
func TestLockIsOfTheFileNotOfItsName(t *testing.T) {
	file := newFile(t)
	startProgram(t, "CHAT_KEY=", file)
	link := filepath.Join(t.TempDir(), "link.db")
	if err := os.Symlink(file, link); err != nil {
		t.Fatal(err)
	}
	output, status := runProgram(t, program(t, "CHAT_KEY=", link))
	if status != 1 || !strings.Contains(output, "another server uses this database") {
		t.Errorf("status %d and output %q", status, output)
	}
}

// The server notices within a second that its file is no longer at its path, tells the clients
// that it shuts down, and leaves the new file as it is: its next start uses that.
func TestServerStopsWhenItsFileIsDeletedOrReplaced(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name, want string
		change     func(t *testing.T, file string)
		kept       []string // what is in the kitchen at the next start
	}{
		{"deleted", "rooms.db was deleted or replaced", func(t *testing.T, file string) {
			os.Remove(file)
		}, nil},
		{"deleted with all others", "rooms.db was deleted or replaced", func(t *testing.T, file string) {
			for _, suffix := range []string{"", "-wal", "-shm", ".lock"} {
				os.Remove(file + suffix)
			}
		}, nil},
		{"renamed", "rooms.db was deleted or replaced", func(t *testing.T, file string) {
			os.Rename(file, file+".old")
		}, nil},
		{"replaced by a backup", "rooms.db was deleted or replaced", func(t *testing.T, file string) {
			if err := os.Rename(file+".backup", file); err != nil {
				t.Fatal(err)
			}
		}, []string{"message Grete: before the backup"}},
		{"the lock deleted", "rooms.db.lock was deleted or replaced", func(t *testing.T, file string) {
			os.Remove(file + ".lock")
		}, []string{"message Grete: before the backup", "message Grete: after the backup"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			file := newFile(t)
			w, cmd, log := startProgram(t, "CHAT_KEY="+testKey, file)
			grete := w.join("Grete", "kitchen")
			grete.send("before the backup")
			grete.until("message Grete: before the backup")
			waitForLine(t, file, "before the backup")
			backUp(t, file, file+".backup")
			grete.send("after the backup")
			grete.until("message Grete: after the backup")
			waitForLine(t, file, "after the backup")

			test.change(t, file)
			start := time.Now()
			grete.wantClose(errShuttingDown)
			if took := time.Since(start); took > 5*time.Second {
				t.Errorf("clients are told after %v", took)
			}
			rest, _ := io.ReadAll(log)
			if cmd.Wait(); cmd.ProcessState.ExitCode() != 1 || strings.Count(string(rest), test.want) != 2 {
				t.Errorf("it ends with %v and %q, want status 1 and %q", cmd.ProcessState, rest, test.want)
			}

			w, _, _ = startProgram(t, "CHAT_KEY="+testKey, file)
			want := append(slices.Clone(test.kept), "join Hans")
			if got := w.join("Hans", "kitchen").until("join Hans"); !slices.Equal(got, want) {
				t.Errorf("then Hans receives %q, want %q", got, want)
			}
			wantIntact(t, file)
		})
	}
}

// waitForLine waits until the running server has committed a line with that text.
func waitForLine(t *testing.T, file, text string) {
	t.Helper()
	waitUntil(t, file, `SELECT count(*) FROM lines WHERE line ->> 'text' = '`+text+`'`)
}

// waitUntil waits until query gives 1 in the database of the running server.
func waitUntil(t *testing.T, file, query string) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; {
		out, err := exec.Command("sqlite3", "-cmd", ".timeout 5000", file, query).CombinedOutput()
		if err != nil || time.Now().After(deadline) {
			t.Fatalf("sqlite3: %v: %s", err, out)
		}
		if strings.TrimSpace(string(out)) == "1" {
			return
		}
	}
}

// backUp copies the database of a running server, as README.md says.
func backUp(t *testing.T, file, to string) {
	t.Helper()
	cmd := exec.Command("sh", "-c", `umask 077; sqlite3 "$1" ".backup '$2'"`, "", file, to)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("sqlite3 .backup: %v: %s", err, out)
	}
}

func wantIntact(t *testing.T, file string) {
	t.Helper()
	checks := "PRAGMA integrity_check; PRAGMA foreign_key_check"
	out, err := exec.Command("sqlite3", file, checks).CombinedOutput()
	if err != nil || string(out) != "ok\n" {
		t.Errorf("%s: %v, %q, want ok", file, err, out)
	}
}

// Backups of a server under load open in a second server, and have all lines up to one of
// those that were sent at that time.
func TestBackupOfARunningServer(t *testing.T) {
	t.Parallel()
	repeat(t, testBackup)
}

func testBackup(t *testing.T) {
	file := newFile(t)
	w, cmd, _ := startProgram(t, "CHAT_KEY="+testKey, file)
	grete := w.join("Grete", "kitchen")
	talker := w.join("Talker", "kitchen")
	over := make(chan struct{})
	go func() {
		defer close(over)
		for n := 0; talker.WriteMessage(1, fmt.Appendf(nil, "line %d", n)) == nil; n++ {
		}
	}()
	grete.until("message Talker: line 200") // From then on they are rate limited.
	waitUntil(t, file, `SELECT max(n) >= 200 FROM lines`)
	for n := range 5 {
		to := fmt.Sprint(file, ".", n)
		backUp(t, file, to)
		wantIntact(t, to)
		second, cmd, log := startProgram(t, "CHAT_KEY="+testKey, to)
		hans := second.join("Hans", "kitchen")
		lines := hans.until("join Hans")
		lines = lines[:len(lines)-1]
		if len(lines) != historySize {
			t.Errorf("backup %d has %d lines, want %d", n, len(lines), historySize)
		}
		var first int
		fmt.Sscanf(lines[0], "message Talker: line %d", &first)
		for i, line := range lines {
			if want := fmt.Sprint("message Talker: line ", first+i); line != want {
				t.Errorf("backup %d has %q, want %q", n, line, want)
			}
		}
		if !hans.welcome.Missed {
			t.Errorf("the welcome is %+v, want missed: the backup is as after a crash", hans.welcome)
		}
		cmd.Process.Signal(syscall.SIGTERM)
		io.Copy(io.Discard, log)
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	}
	cmd.Process.Signal(syscall.SIGTERM)
	<-over
}
