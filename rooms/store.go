package main

import (
	"cmp"
	"crypto/rand"
	"encoding/json"
	"maps"
	"slices"
	"strings"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"github.com/gorilla/websocket"
)

// Time from a change to the transaction that commits it, with all changes since; and from
// a transaction that fails to the next attempt.
const commitDelay, retryDelay = 100 * time.Millisecond, time.Second

// Number of operations queued for the store before hubs wait for it.
const storeQueueSize = 1024

// Maximum number of lines of a room that are not committed, so that after a crash it is
// known how far the numbers went. While commits fail, a room that has as many waits.
const maxUncommitted = 1 << 20

// Time for which a room is kept after its last user has left, and the maximum number of rooms
// kept. Up to maxRooms more can be opened at once, and a room with unsaved changes may count
// twice.
const keepTime, maxKeptRooms = 30 * 24 * time.Hour, 1000

// Time from the start to the first deletion of rooms that are no longer kept, and from one
// to the next: a clock that is wrong for a while deletes nothing.
const deleteInterval = 24 * time.Hour

var errUnreadable = &websocket.CloseError{Code: 1011, Text: "the room cannot be read"}
var errTooManyRooms = &websocket.CloseError{Code: 4503, Text: "the server keeps too many rooms"}

// At the start, of rooms whose names look alike, which depends on the version of Unicode, the one
// that was used last has the name. A crash has lost lines since the last commit, whose numbers
// clients may know: the numbers of open rooms go on beyond any that these can have reached.
const startRooms = `
	UPDATE rooms SET fold = id;
	UPDATE rooms SET fold = fold(name)
		FROM (SELECT id, max(used) FROM rooms GROUP BY fold(name)) AS latest WHERE rooms.id = latest.id;
	UPDATE rooms SET open = 0, last = last + ?1, forgotten = last + ?1, lost = last + ?1 WHERE open`

const saveRoom = `INSERT INTO rooms (id, name, fold, owner, used, last, forgotten, lost, open)
	VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET
	owner = excluded.owner, used = excluded.used, last = excluded.last,
	forgotten = excluded.forgotten, lost = excluded.lost, open = excluded.open`

// These change only the rows that differ from JSON: an array of numbers, or of an array of users
// and one of kicks.
const deleteLines = `DELETE FROM lines WHERE room = ?1
	AND n NOT IN (SELECT value FROM json_each(?2))`
const members = `SELECT member.value ->> 'ID', member.value ->> 'Name',
	coalesce(1 + (member.value ->> 'StandIn'), 0)
	FROM json_each(?2) AS list, json_each(list.value) AS member`
const deleteUsers = `DELETE FROM users WHERE room = ?1
	AND (id, name, kicked) NOT IN (` + members + `)`
const insertUsers = `INSERT OR IGNORE INTO users (room, id, name, kicked)
	SELECT ?1, * FROM (` + members + `)`

// A Record is what the store keeps of a room. The store gets copies that share the slices,
// so their elements must not change: append, or replace the slice.
type Record struct {
	id, name, owner string        // the owner is the ID of the user that opened the room
	present         []Identity    // the users in the room, in the order in which they joined
	kicks           []Kick        // oldest first
	used            time.Time     // when there was last a user: updated by each line, and once a day
	last            int64         // the number of the last line
	history         []Line        // for all users, oldest first
	private         []Line        // separate, so that they do not displace the history
	forgotten       int64         // the highest number of a line that was trimmed or lost
	lost            int64         // a crash may have lost lines up to this number
	open            bool          // a hub has the room: a crash may lose lines
	committed       *atomic.Int64 // set by the store: the last line that a crash cannot lose
}

// A Kick is a user that cannot join the room again.
type Kick struct {
	Identity
	StandIn bool // The owner was absent: the kick ends when the owner joins.
}

func isByStandIn(k Kick) bool { return k.StandIn }

// A Store keeps rooms in a database. One goroutine, run, owns it.
type Store struct {
	db         *Database
	key        string      // for signing cookies
	occupied   []string    // names of the rooms that had users when the server last ran
	operations chan func() // from hubs to run, which executes them in order, until nil

	// Owned by run:
	unsaved map[string]Record // by fold of the name: rooms that have changed since the last commit
	due     <-chan time.Time  // when to commit; nil if nothing is unsaved
	failing bool              // the last commit has failed
}

// openStore opens the database in file, or creates it.
func openStore(file string) (s *Store, err error) {
	s = &Store{operations: make(chan func(), storeQueueSize), unsaved: make(map[string]Record)}
	if s.db, err = openDatabase(file, s.setUp); err != nil {
		return nil, err
	}
	go s.run()
	return s, nil
}

// setUp changes and reads what the store starts with.
func (s *Store) setUp(t *tx) {
	t.exec(startRooms, maxUncommitted)
	t.exec(`INSERT INTO server SELECT ? WHERE NOT EXISTS (SELECT * FROM server)`, rand.Text())
	t.query(`SELECT cookie_key FROM server`, nil, []any{&s.key}, nil)
	var name, other string
	t.query(`SELECT name FROM rooms WHERE id IN (SELECT room FROM users WHERE kicked = 0)
		AND fold <> id`, nil, []any{&name}, func() { s.occupied = append(s.occupied, name) })
	t.query(`SELECT rooms.name, other.name FROM rooms JOIN rooms AS other
		ON other.fold = fold(rooms.name) WHERE rooms.fold = rooms.id`, nil, []any{&name, &other},
		func() { logSoon("the room %q cannot be opened: %q looks like it", name, other) })
}

// run executes operations, commits commitDelay after the first change, and deletes rooms
// every deleteInterval.
func (s *Store) run() {
	for daily := time.Tick(deleteInterval); ; {
		select {
		case operation := <-s.operations:
			if operation == nil {
				return
			}
			operation()
		case <-s.due:
			s.commit()
		case <-daily:
			s.deleteUnused()
		}
	}
}

// save has run commit record soon. It waits only while the queue is full, because the
// disk is slow: backpressure. After close it may wait for ever, as the process is about
// to exit.
func (s *Store) save(record Record) {
	s.operations <- func() { s.put(record) }
}

func (s *Store) put(record Record) {
	s.unsaved[fold(record.name)] = record
	if s.due == nil {
		s.due = time.After(commitDelay)
	}
}

// release saves record for a hub that is about to stop. It returns false if that would have to
// wait, because the queue is full.
func (s *Store) release(record Record) bool {
	record.open = false
	select {
	case s.operations <- func() { s.put(record) }:
		return true
	default:
		return false
	}
}

// close commits what is queued, and closes the database. If that fails, it returns an
// error, and the next start treats it as a crash.
func (s *Store) close() error {
	committed := make(chan error, 1)
	s.operations <- func() {
		err := s.commit()
		if err == nil {
			_, err = s.db.Exec(`UPDATE rooms SET open = 0`)
		}
		committed <- err
	}
	s.operations <- nil
	return cmp.Or(<-committed, s.db.close())
}

// commit writes what is unsaved in one transaction. A room that cannot be written keeps no other
// from being written: it stays unsaved, and run tries again after retryDelay.
func (s *Store) commit() (err error) {
	saved := maps.Clone(s.unsaved)
	failed := s.db.transaction(func(t *tx) {
		for key, record := range s.unsaved {
			if cause := t.savepoint(func() { t.write(record) }); cause != nil {
				delete(saved, key)
				err = cause
			}
		}
	})
	if failed == nil {
		for key, record := range saved {
			record.committed.Store(record.last)
			delete(s.unsaved, key)
		}
	}
	if err = cmp.Or(err, failed); err != nil {
		logSoon("%s: cannot save %d rooms: %v", s.db.file, len(s.unsaved), err)
		s.due, s.failing = time.After(retryDelay), true
		return err
	}
	if s.failing {
		logSoon("%s: saved all changes since the error", s.db.file)
	}
	s.due, s.failing = nil, false
	return nil
}

// write writes a room, and deletes what it no longer keeps.
func (t *tx) write(record Record) {
	t.exec(saveRoom, record.id, record.name, fold(record.name), record.owner, record.used.Unix(),
		record.last, record.forgotten, record.lost, record.open)
	users, _ := json.Marshal([]any{record.present, record.kicks}) // No name can fail to encode.
	t.exec(deleteUsers, record.id, string(users))
	t.exec(insertUsers, record.id, string(users))
	saved, numbers := int64(0), []int64{}
	t.query(`SELECT coalesce(max(n), 0) FROM lines WHERE room = ?`,
		[]any{record.id}, []any{&saved}, nil)
	for _, line := range slices.Concat(record.history, record.private) {
		if numbers = append(numbers, line.N); line.N > saved {
			t.exec(`INSERT INTO lines VALUES (?, ?, ?, ?)`,
				record.id, line.N, strings.Join(line.only, " "), string(line.message))
		}
	}
	kept, _ := json.Marshal(numbers)
	t.exec(deleteLines, record.id, string(kept))
}

// deleteUnused deletes rooms that have not been used for keepTime.
func (s *Store) deleteUnused() {
	cutoff := time.Now().Add(-keepTime).Unix()
	result, err := s.db.Exec(`DELETE FROM rooms WHERE used < ? AND NOT open`, cutoff)
	if err != nil {
		logSoon("%s: cannot delete unused rooms: %v", s.db.file, err)
	} else if n, _ := result.RowsAffected(); n > 0 {
		logSoon("%s: deleted %d rooms that were not used for %v", s.db.file, n, keepTime)
	}
}

// load returns the room of that name, or of a confusable one, or else a new one. It marks it
// as open, so that a crash is known to lose lines of it.
func (s *Store) load(name string) (record Record, reason *websocket.CloseError) {
	loaded := make(chan struct{})
	s.operations <- func() {
		defer close(loaded)
		if record, reason = s.read(name); reason != nil {
			return
		}
		record.open, record.committed = true, new(atomic.Int64)
		record.committed.Store(record.last)
		if !record.used.IsZero() { // A new room is not in the database until it is saved.
			if s.put(record); !s.failing {
				s.commit()
			}
		}
	}
	<-loaded
	return record, reason
}

func (s *Store) read(name string) (Record, *websocket.CloseError) {
	if record, ok := s.unsaved[fold(name)]; ok {
		return record, nil
	}
	record := Record{name: name}
	var user Identity
	var kept, used, n, kicked int64
	var recipients, message string
	err := s.db.transaction(func(t *tx) {
		cutoff := time.Now().Add(-keepTime).Unix()
		t.query(`SELECT count(*) FROM rooms WHERE used >= ?`, []any{cutoff}, []any{&kept}, nil)
		t.query(`SELECT id, owner, used, last, forgotten, lost FROM rooms WHERE fold = ?`,
			[]any{fold(name)}, []any{&record.id, &record.owner, &used, &record.last,
				&record.forgotten, &record.lost}, func() { record.used = time.Unix(used, 0) })
		t.query(`SELECT id, name, kicked FROM users WHERE room = ? ORDER BY n`, []any{record.id},
			[]any{&user.ID, &user.Name, &kicked}, func() {
				if kicked == 0 {
					record.present = append(record.present, user)
				} else {
					record.kicks = append(record.kicks, Kick{user, kicked == 2})
				}
			})
		t.query(`SELECT n, recipients, line FROM lines WHERE room = ? ORDER BY n`, []any{record.id},
			[]any{&n, &recipients, &message},
			func() { s.readLine(&record, n, recipients, []byte(message)) })
	})
	switch {
	case err != nil:
		logSoon("%s: cannot read a room: %v", s.db.file, err)
		return Record{name: name}, errUnreadable
	case record.id == "" && kept+int64(len(s.unsaved)) >= maxKeptRooms:
		return record, errTooManyRooms
	}
	record.id = cmp.Or(record.id, rand.Text())
	return record, nil
}

// readLine adds a line to record. It skips and logs one that is damaged, which a page could
// not show, or which would show a private message to all.
func (s *Store) readLine(record *Record, n int64, recipients string, message []byte) {
	line, kind := Line{}, "message"
	if recipients != "" {
		kind = "private"
	}
	err := json.Unmarshal(message, &line)
	if err != nil || !utf8.Valid(message) || line.N != n || line.Kind != kind {
		logSoon("%s: line %d of the room %q is damaged", s.db.file, n, record.name)
		record.forgotten = max(record.forgotten, n)
		return
	}
	record.keep(Line{N: n, message: message, only: strings.Fields(recipients)})
}
