package main

import (
	"bufio"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os/exec"
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

var attack = flag.Duration("attack", 0, "repeat attacks for this `duration` each, as in: go test -race -attack 10m -timeout 2h")

// repeat runs round as a subtest once, and again until the duration of -attack has passed.
func repeat(t *testing.T, round func(t *testing.T)) {
	for n, start := 0, time.Now(); n == 0 || time.Since(start) < *attack && !t.Failed(); n++ {
		t.Run(strconv.Itoa(n), round)
	}
}

// Names, rooms and messages are made of these.
var hostile = []string{"'", `"`, "`", ";", "--", "/*", "*/", "(", ")", "%", "_", "?", "?1", ":id", "@id", "$id", "\\", "\x00", " ", ",", "=",
	"DROP", "TABLE", "rooms", "lines", "server", "DELETE", "FROM", "UPDATE", "NULL", "OR", "1", "x", "é", "\u0301", "ſ", "İ", "K", "rn", "\U0001F600",
	"/to ", "/kick ", "[", "]", "X'00'", "\u2028", "char(0)", "ATTACH", "PRAGMA", "0x41", "1e999", "-1", "9223372036854775808", "{\"n\":1}", "%27", "+"}

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
						p.WriteMessage(websocket.TextMessage, []byte(hostileText(12))) // It may have been kicked, or its name taken.
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
			if got.last < record.last || got.last == record.last && !slices.EqualFunc(got.history, record.history, same) {
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
				if err := s.Wait(); s.ProcessState.ExitCode() != 1 || !strings.Contains(s.line, "another server") || len(rest) > 0 {
					t.Errorf("a server ends with %v and %q, want status 1 and that another server uses the database", err, s.line+string(rest))
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
		if before != nil && (p.welcome.RoomID != before.welcome.RoomID || slices.Contains(lines, "message Grete: "+fmt.Sprint("round ", rounds-1))) {
			t.Errorf("after %q, %d in the room %q it receives %q", before.welcome.RoomID, before.last, p.welcome.RoomID, lines)
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
