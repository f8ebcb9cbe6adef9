package main

import (
	"cmp"
	"crypto/rand"
	"database/sql"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"github.com/gofrs/flock"
	"github.com/gorilla/websocket"
	_ "modernc.org/sqlite"
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

var errUnreadable = &websocket.CloseError{Code: websocket.CloseInternalServerErr, Text: "the room cannot be read"}
var errTooManyRooms = &websocket.CloseError{Code: 4503, Text: "the server keeps too many rooms"}

//go:embed schema.sql
var schema string

var migrations = regexp.MustCompile(`(?m)^-- From version.*`).Split(schema, -1)[1:]

// A crash loses the lines since the last commit, whose numbers clients may know. So the
// numbers go on beyond any that the room can have reached.
const skipLost = `UPDATE rooms SET last = last + ?1, forgotten = last + ?1, lost = last + ?1, open = 0 WHERE open`

const saveRoom = `INSERT INTO rooms (id, name, fold, owner, used, last, forgotten, lost, open) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
	ON CONFLICT (id) DO UPDATE SET owner = excluded.owner, used = excluded.used,
	last = excluded.last, forgotten = excluded.forgotten, lost = excluded.lost, open = excluded.open`

// These change only the rows that differ from a JSON array of arrays.
const deleteUsers = `DELETE FROM users WHERE room = ?1
	AND (id, name, kicked) NOT IN (SELECT value ->> 0, value ->> 1, value ->> 2 FROM json_each(?2))`
const insertUsers = `INSERT OR IGNORE INTO users (room, id, name, kicked)
	SELECT ?1, value ->> 0, value ->> 1, value ->> 2 FROM json_each(?2)`

// What users.kicked means.
const inRoom, isKicked, isKickedByStandIn = 0, 1, 2

// A Store keeps rooms in a SQLite database. One goroutine, run, owns the database.
type Store struct {
	db         *sql.DB
	file       string
	lock       *flock.Flock // keeps other servers out
	key        string       // for signing cookies
	occupied   []string     // names of the rooms that had users when the server last ran
	operations chan func()  // from hubs to run, which executes them in order, until nil

	// Owned by run:
	unsaved map[string]Record // by fold of the name: rooms that have changed since the last commit
	due     <-chan time.Time  // when to commit; nil if nothing is unsaved
	failing bool              // the last commit has failed
}

// openStore opens the database in file, or creates it, and brings it up to date. It returns
// an error if another server has opened it.
func openStore(file string) (s *Store, err error) {
	if file == ":memory:" {
		return nil, errors.New("-db :memory: a restart would lose everything: name a file")
	}
	// SQLite would let other users of the machine read the file, which holds the cookie
	// key and private messages.
	f, err := os.OpenFile(file, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	f.Close()
	if err != nil {
		return nil, err
	}
	// A server that has the file by another name uses the same lock.
	if file, err = filepath.EvalSymlinks(file); err != nil {
		return nil, err
	}
	lock := flock.New(file+".lock", flock.SetPermissions(0o600))
	if locked, err := lock.TryLock(); err != nil || !locked {
		return nil, cmp.Or(err, fmt.Errorf("%s: another server uses this database", file))
	}
	dsn := url.URL{Scheme: "file", Opaque: (&url.URL{Path: file}).EscapedPath(), RawQuery: url.Values{"_txlock": {"immediate"}, "_pragma": {
		"busy_timeout(5000)", "journal_mode(WAL)", "synchronous(FULL)", "foreign_keys(1)", "secure_delete(1)"}}.Encode()}
	db, _ := sql.Open("sqlite", dsn.String()) // It fails for unknown drivers only.
	db.SetMaxOpenConns(1)                     // The pragmas of transactions and tests are those of a connection.
	s = &Store{db: db, file: file, lock: lock, operations: make(chan func(), storeQueueSize), unsaved: make(map[string]Record)}
	if err := s.setUp(); err != nil {
		db.Close()
		lock.Unlock()
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	if info.Mode().Perm()&0o077 != 0 {
		logSoon("%s: its mode, %v, lets other users of this machine open it", file, info.Mode())
	}
	go s.run()
	return s, nil
}

// setUp brings the schema up to date, and creates the key if there is none.
func (s *Store) setUp() error {
	var version int
	if err := s.db.QueryRow(`PRAGMA user_version`).Scan(&version); err != nil {
		return err
	}
	if version > len(migrations) {
		return fmt.Errorf("the database is of a later version of this program (user_version %d)", version)
	}
	if version < len(migrations) { // Version 0 and 1 have left deleted text in the file.
		if _, err := s.db.Exec(`VACUUM`); err != nil {
			return err
		}
	}
	return s.transaction(func(t *tx) {
		for _, step := range migrations[version:] {
			t.exec(step)
		}
		t.exec(fmt.Sprint(`PRAGMA user_version = `, len(migrations)))
		t.exec(`INSERT INTO server (cookie_key) SELECT ? WHERE NOT EXISTS (SELECT * FROM server)`, rand.Text())
		t.query(`SELECT cookie_key FROM server`, nil, []any{&s.key}, nil)
		t.exec(skipLost, maxUncommitted)
		var id, name string
		folds := make(map[string]string)
		t.query(`SELECT id, name FROM rooms`, nil, []any{&id, &name}, func() { folds[id] = fold(name) })
		for id, fold := range folds {
			t.exec(`UPDATE OR IGNORE rooms SET fold = ? WHERE id = ? AND fold <> ?1`, fold, id)
		}
		t.query(`SELECT name FROM rooms WHERE id IN (SELECT room FROM users WHERE kicked = ?)`, []any{inRoom}, []any{&name},
			func() { s.occupied = append(s.occupied, name) })
	})
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
	defer s.lock.Unlock()
	committed := make(chan error, 1)
	s.operations <- func() {
		s.due = nil // Else run might use the database while it is closed.
		var cause error
		err := s.transaction(func(t *tx) {
			if _, cause = s.write(t); cause == nil {
				t.exec(`UPDATE rooms SET open = 0`)
			}
		})
		committed <- cmp.Or(err, cause)
	}
	s.operations <- nil
	return cmp.Or(<-committed, s.db.Close())
}

// commit writes what is unsaved. What fails stays unsaved, and run tries again after
// retryDelay.
func (s *Store) commit() {
	var failed map[string]Record
	var cause error
	if err := s.transaction(func(t *tx) { failed, cause = s.write(t) }); err != nil {
		failed, cause = s.unsaved, err
	}
	for key, record := range s.unsaved {
		if _, isFailed := failed[key]; !isFailed {
			record.committed.Store(record.last)
		}
	}
	s.unsaved = failed
	if cause != nil {
		s.due, s.failing = time.After(retryDelay), true
		logSoon("%s: cannot save %d rooms: %v", s.file, len(failed), cause)
		return
	}
	if s.failing {
		logSoon("%s: saved all changes since the error", s.file)
	}
	s.due, s.failing = nil, false
}

// write writes what is unsaved, and returns the rooms that cannot be written, with one of
// the errors. These do not keep the others from being written.
func (s *Store) write(t *tx) (failed map[string]Record, cause error) {
	failed = make(map[string]Record)
	for key, record := range s.unsaved {
		t.exec(`SAVEPOINT room`)
		if t.write(record); t.err != nil {
			failed[key], cause = record, t.err
			if _, err := t.Exec(`ROLLBACK TO room`); err != nil {
				break // The error has rolled back the transaction.
			}
			t.err = nil
		}
		t.exec(`RELEASE room`)
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
	var saved int64
	t.query(`SELECT coalesce(max(n), 0) FROM lines WHERE room = ?`, []any{record.id}, []any{&saved}, nil)
	for _, line := range slices.Concat(record.history, record.private) {
		if numbers = append(numbers, line.N); line.N > saved {
			t.exec(`INSERT INTO lines VALUES (?, ?, ?, ?)`, record.id, line.N, strings.Join(line.only, " "), string(line.message))
		}
	}
	t.exec(`DELETE FROM lines WHERE room = ? AND n NOT IN (SELECT value FROM json_each(?))`, record.id, list(numbers))
}

// list returns a slice as JSON.
func list(values any) string {
	text, _ := json.Marshal(values) // No ID and no name can fail to encode.
	return string(text)
}

// deleteUnused deletes rooms that have not been used for keepTime.
func (s *Store) deleteUnused() {
	deleted := 0
	var id string
	err := s.transaction(func(t *tx) {
		t.query(`DELETE FROM rooms WHERE used < ? AND NOT open RETURNING id`, []any{time.Now().Add(-keepTime).Unix()}, []any{&id},
			func() { deleted++ })
	})
	if err != nil {
		logSoon("%s: cannot delete rooms: %v", s.file, err)
	} else if deleted > 0 {
		logSoon("%s: deleted %d rooms that have not been used for %v", s.file, deleted, keepTime)
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
			s.unsaved[fold(name)] = record
			s.commit()
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
	err := s.transaction(func(t *tx) {
		t.query(`SELECT count(*) FROM rooms WHERE used >= ?`, []any{time.Now().Add(-keepTime).Unix()}, []any{&kept}, nil)
		t.query(`SELECT id, owner, used, last, forgotten, lost FROM rooms WHERE fold = ?`, []any{fold(name)},
			[]any{&record.id, &record.owner, &used, &record.last, &record.forgotten, &record.lost},
			func() { record.used = time.Unix(used, 0) })
		t.query(`SELECT id, name, kicked FROM users WHERE room = ? ORDER BY n`, []any{record.id}, []any{&user.ID, &user.Name, &kicked}, func() {
			if kicked == inRoom {
				record.present = append(record.present, user)
			} else {
				record.kicks = append(record.kicks, Kick{user, kicked == isKickedByStandIn})
			}
		})
		t.query(`SELECT n, recipients, line FROM lines WHERE room = ? ORDER BY n`, []any{record.id}, []any{&n, &recipients, &message},
			func() { s.readLine(&record, n, recipients, message) })
	})
	switch {
	case err != nil:
		logSoon("%s: cannot read a room: %v", s.file, err)
		return Record{name: name}, errUnreadable
	case record.id == "" && kept+int64(len(s.unsaved)) >= maxKeptRooms:
		return record, errTooManyRooms
	}
	record.id = cmp.Or(record.id, rand.Text())
	return record, nil
}

// readLine adds a line to record. It skips and logs a line that is damaged: a page would not
// show the room.
func (s *Store) readLine(record *Record, n int64, recipients, message string) {
	line := Line{}
	err := json.Unmarshal([]byte(message), &line)
	if err != nil || !utf8.ValidString(message) || line.N != n || (line.Kind == "private") != (recipients != "") {
		logSoon("%s: line %d of the room %q is damaged", s.file, n, record.name)
		record.forgotten = max(record.forgotten, n)
		return
	}
	line = Line{N: n, message: []byte(message)}
	if recipients == "" {
		record.history = append(record.history, line)
	} else {
		line.only = strings.Fields(recipients)
		record.private = append(record.private, line)
	}
}

// transaction commits what f writes, or nothing of it.
func (s *Store) transaction(f func(t *tx)) (err error) {
	var t tx
	if t.Tx, err = s.db.Begin(); err != nil {
		return err
	}
	if f(&t); t.err == nil {
		return t.Commit()
	}
	t.Rollback()
	return t.err
}

// A tx is a transaction that remembers its first error, and then does nothing more.
type tx struct {
	*sql.Tx
	err error
}

func (t *tx) exec(query string, args ...any) {
	if t.err == nil {
		_, t.err = t.Exec(query, args...)
	}
}

// query scans each row into dest, and then calls row, unless it is nil.
func (t *tx) query(query string, args, dest []any, row func()) {
	if t.err != nil {
		return
	}
	rows, err := t.Query(query, args...)
	if t.err = err; err != nil {
		return
	}
	defer rows.Close()
	for t.err == nil && rows.Next() {
		if t.err = rows.Scan(dest...); row != nil {
			row()
		}
	}
	t.err = cmp.Or(t.err, rows.Err())
}
