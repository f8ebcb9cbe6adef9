package main

import (
	"cmp"
	"crypto/rand"
	"encoding/json"
	"fmt"
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

// A crash loses the lines since the last commit, whose numbers clients may know. So the
// numbers go on beyond any that the room can have reached.
const skipLost = `UPDATE rooms SET open = 0,
	last = last + ?1, forgotten = last + ?1, lost = last + ?1 WHERE open`

const saveRoom = `INSERT INTO rooms (id, name, fold, owner, used, last, forgotten, lost, open)
	VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET
	owner = excluded.owner, used = excluded.used, last = excluded.last,
	forgotten = excluded.forgotten, lost = excluded.lost, open = excluded.open`

// These change only the rows that differ from a JSON array, of numbers and of arrays.
const deleteLines = `DELETE FROM lines WHERE room = ?1
	AND n NOT IN (SELECT value FROM json_each(?2))`

const deleteUsers = `DELETE FROM users WHERE room = ?1
	AND (id, name, kicked) NOT IN (SELECT value ->> 0, value ->> 1, value ->> 2 FROM json_each(?2))`
const insertUsers = `INSERT OR IGNORE INTO users (room, id, name, kicked)
	SELECT ?1, value ->> 0, value ->> 1, value ->> 2 FROM json_each(?2)`

// What users.kicked means.
const inRoom, isKicked, isKickedByStandIn = 0, 1, 2

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
func openStore(file string) (*Store, error) {
	db, err := openDatabase(file)
	if err != nil {
		return nil, err
	}
	s := &Store{db: db, operations: make(chan func(), storeQueueSize), unsaved: map[string]Record{}}
	if err := db.transaction(s.setUp); err != nil {
		db.close()
		return nil, fmt.Errorf("%s: %w", db.file, err)
	}
	go s.run()
	return s, nil
}

// setUp reads what the server starts with.
func (s *Store) setUp(t *tx) {
	t.query(`SELECT cookie_key FROM server`, nil, []any{&s.key}, nil)
	t.exec(skipLost, maxUncommitted)
	var name string
	t.query(`SELECT name FROM rooms WHERE id IN (SELECT room FROM users WHERE kicked = 0)
		AND fold <> id`, nil, []any{&name}, func() { s.occupied = append(s.occupied, name) })
}

// run executes operations, commits commitDelay after the first change, and deletes rooms
// every deleteInterval.
func (s *Store) run() {
	daily := time.NewTicker(deleteInterval)
	defer daily.Stop()
	for {
		select {
		case operation := <-s.operations:
			if operation == nil {
				return
			}
			operation()
		case <-s.due:
			s.commit()
		case <-daily.C:
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
	if !record.open || record.used.IsZero() {
		return true // It could not be read, or was never saved.
	}
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
		s.due = nil // Else run might use the database while it is closed.
		_, err := s.write(true)
		committed <- err
	}
	s.operations <- nil
	return cmp.Or(<-committed, s.db.close())
}

// commit writes what is unsaved. What fails stays unsaved, and run tries again after
// retryDelay.
func (s *Store) commit() {
	failed, err := s.write(false)
	for key, record := range s.unsaved {
		if _, isFailed := failed[key]; !isFailed {
			record.committed.Store(record.last)
		}
	}
	s.unsaved = failed
	if err != nil {
		s.due, s.failing = time.After(retryDelay), true
		logSoon("%s: cannot save %d rooms: %v", s.db.file, len(failed), err)
		return
	}
	if s.failing {
		logSoon("%s: saved all changes since the error", s.db.file)
	}
	s.due, s.failing = nil, false
}

// write writes what is unsaved, and returns the rooms that cannot be written, with one of
// the errors: a damaged room does not keep the others from being written.
func (s *Store) write(closing bool) (failed map[string]Record, cause error) {
	failed = make(map[string]Record)
	err := s.db.transaction(func(t *tx) {
		for key, record := range s.unsaved {
			if err := t.savepoint(func() { t.write(record) }); err != nil {
				failed[key], cause = record, err
			}
		}
		if closing && cause == nil {
			t.exec(`UPDATE rooms SET open = 0`)
		}
	})
	if err != nil {
		return s.unsaved, err
	}
	return failed, cause
}

// write writes a room, and deletes what it no longer keeps.
func (t *tx) write(record Record) {
	t.exec(saveRoom, record.id, record.name, fold(record.name), record.owner, record.used.Unix(),
		record.last, record.forgotten, record.lost, record.open)
	users, numbers := [][3]any{}, []int64{}
	for _, user := range record.present {
		users = append(users, [3]any{user.ID, user.Name, inRoom})
	}
	for _, kick := range record.kicks {
		users = append(users, [3]any{kick.ID, kick.Name, isKicked})
		if kick.StandIn {
			users[len(users)-1][2] = isKickedByStandIn
		}
	}
	t.exec(deleteUsers, record.id, list(users))
	t.exec(insertUsers, record.id, list(users))
	room, saved := []any{record.id}, int64(0)
	t.query(`SELECT coalesce(max(n), 0) FROM lines WHERE room = ?`, room, []any{&saved}, nil)
	for _, line := range slices.Concat(record.history, record.private) {
		if numbers = append(numbers, line.N); line.N > saved {
			t.exec(`INSERT INTO lines VALUES (?, ?, ?, ?)`,
				record.id, line.N, strings.Join(line.only, " "), string(line.message))
		}
	}
	t.exec(deleteLines, record.id, list(numbers))
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
		room := []any{record.id}
		t.query(`SELECT id, name, kicked FROM users WHERE room = ? ORDER BY n`, room,
			[]any{&user.ID, &user.Name, &kicked}, func() {
				if kicked == inRoom {
					record.present = append(record.present, user)
				} else {
					record.kicks = append(record.kicks, Kick{user, kicked == isKickedByStandIn})
				}
			})
		t.query(`SELECT n, recipients, line FROM lines WHERE room = ? ORDER BY n`, room,
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
	} else if recipients == "" {
		record.history = append(record.history, Line{N: n, message: message})
	} else {
		line = Line{N: n, message: message, only: strings.Fields(recipients)}
		record.private = append(record.private, line)
	}
}
