package main

import (
	"cmp"
	"crypto/rand"
	"database/sql"
	"fmt"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/gorilla/websocket"
	_ "modernc.org/sqlite"
)

// Time from a change to the transaction that commits it, with all changes since; and from
// a transaction that fails to the next attempt.
const commitDelay, retryDelay = 100 * time.Millisecond, time.Second

// Number of operations queued for the store before hubs wait for it.
const storeQueueSize = 1024

// Time for which a room is kept after its last user has left, and the maximum number of rooms
// kept. Up to maxRooms more can be opened at once, and a room with unsaved changes may count
// twice.
const keepTime, maxKeptRooms = 30 * 24 * time.Hour, 1000

var errUnreadable = &websocket.CloseError{Code: websocket.CloseInternalServerErr, Text: "the room cannot be read"}
var errTooManyRooms = &websocket.CloseError{Code: 4503, Text: "the server keeps too many rooms"}

// Lists of user IDs are separated by spaces. A line without recipients is for all users.
const schema = `
CREATE TABLE IF NOT EXISTS server (cookie_key TEXT NOT NULL, clean INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS rooms (id TEXT PRIMARY KEY, name TEXT NOT NULL, fold TEXT NOT NULL UNIQUE,
	owner TEXT NOT NULL, kicked TEXT NOT NULL, used INTEGER NOT NULL,
	last INTEGER NOT NULL, forgotten INTEGER NOT NULL, lost INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS lines (room TEXT NOT NULL REFERENCES rooms ON DELETE CASCADE, n INTEGER NOT NULL,
	recipients TEXT NOT NULL, line TEXT NOT NULL, PRIMARY KEY (room, n)) WITHOUT ROWID`

// A crash loses the lines since the last commit, whose numbers clients may know. So the
// numbers go on beyond any that a room can have reached.
const skipLost = `UPDATE rooms SET last = last + (1<<30), forgotten = last + (1<<30), lost = last + (1<<30)
	WHERE (SELECT NOT clean FROM server)`

const saveRoom = `INSERT INTO rooms (id, name, fold, owner, kicked, used, last, forgotten, lost) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
	ON CONFLICT (id) DO UPDATE SET owner = excluded.owner, kicked = excluded.kicked, used = excluded.used,
	last = excluded.last, forgotten = excluded.forgotten, lost = excluded.lost`

// A Store keeps rooms in a SQLite database. One goroutine, run, owns the database.
type Store struct {
	db         *sql.DB
	file       string
	key        string      // for signing cookies
	operations chan func() // from hubs to run, which executes them in order, until nil

	// Owned by run:
	unsaved map[string]Record // by fold of the name: rooms that have changed since the last commit
	due     <-chan time.Time  // when to commit; nil if nothing is unsaved
	failing bool              // the last commit has failed
}

// openStore opens the database in file, or creates it. It returns an error if another
// process has opened it.
func openStore(file string) (*Store, error) {
	// SQLite would let other users of the machine read the file, which holds the cookie
	// key and private messages.
	f, err := os.OpenFile(file, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	f.Close()
	dsn := url.URL{Scheme: "file", Opaque: (&url.URL{Path: file}).EscapedPath(), RawQuery: url.Values{"_pragma": {
		"busy_timeout(1000)", "locking_mode(EXCLUSIVE)", "journal_mode(WAL)", "synchronous(FULL)", "foreign_keys(1)"}}.Encode()}
	db, _ := sql.Open("sqlite", dsn.String()) // It fails for unknown drivers only.
	db.SetMaxOpenConns(1)                     // A second connection would find the database locked.
	s := &Store{db: db, file: file, operations: make(chan func(), storeQueueSize), unsaved: make(map[string]Record)}
	if err := s.transaction(s.setUp); err != nil {
		db.Close()
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	go s.run()
	return s, nil
}

// setUp creates the tables and the key if they do not exist.
func (s *Store) setUp(t *tx) {
	t.exec(schema)
	t.exec(`INSERT INTO server SELECT ?, 0 WHERE NOT EXISTS (SELECT * FROM server)`, rand.Text())
	t.query(`SELECT cookie_key FROM server`, nil, []any{&s.key}, nil)
	t.exec(skipLost)
	t.exec(`UPDATE server SET clean = 0`)
}

// run executes operations, and commits commitDelay after the first change.
func (s *Store) run() {
	for {
		select {
		case operation := <-s.operations:
			if operation == nil {
				return
			}
			operation()
		case <-s.due:
			s.commit()
		}
	}
}

// save has run commit record soon. It waits only while the queue is full, because the
// disk is slow: backpressure. After close it may wait for ever, as the process is about
// to exit.
func (s *Store) save(record Record) {
	s.operations <- func() {
		s.unsaved[fold(record.name)] = record
		if s.due == nil {
			s.due = time.After(commitDelay)
		}
	}
}

// close commits what is queued, and closes the database. If that fails, it returns an
// error, and the next start treats it as a crash.
func (s *Store) close() error {
	committed := make(chan error, 1)
	s.operations <- func() {
		s.due = nil // Else run might use the database while it is closed.
		committed <- s.transaction(func(t *tx) { s.write(t); t.exec(`UPDATE server SET clean = 1`) })
	}
	s.operations <- nil
	return cmp.Or(<-committed, s.db.Close())
}

// commit writes what is unsaved. If that fails, it stays unsaved, and run tries again
// after retryDelay.
func (s *Store) commit() {
	if err := s.transaction(s.write); err != nil {
		s.due, s.failing = time.After(retryDelay), true
		logSoon("%s: %v", s.file, err)
		return
	}
	if s.failing {
		logSoon("%s: saved all changes since the error", s.file)
	}
	s.due, s.failing = nil, false
	clear(s.unsaved)
}

// write deletes rooms that have not been used for keepTime, and writes what is unsaved.
func (s *Store) write(t *tx) {
	t.exec(`DELETE FROM rooms WHERE used < ?`, time.Now().Add(-keepTime).Unix())
	for _, record := range s.unsaved {
		t.exec(saveRoom, record.id, record.name, fold(record.name), record.owner, strings.Join(record.kicked, " "),
			record.used.Unix(), record.last, record.forgotten, record.lost)
		var saved int64
		t.query(`SELECT coalesce(max(n), 0) FROM lines WHERE room = ?`, []any{record.id}, []any{&saved}, nil)
		for _, kept := range [][]Line{record.history, record.private} {
			for i, line := range kept {
				if i == 0 {
					t.exec(`DELETE FROM lines WHERE room = ? AND n < ? AND (recipients = '') = ?`, record.id, line.N, line.only == nil)
				}
				if line.N > saved {
					t.exec(`INSERT INTO lines VALUES (?, ?, ?, ?)`, record.id, line.N, strings.Join(line.only, " "), string(line.message))
				}
			}
		}
	}
}

// load returns the room of that name, or of a confusable one, or else a new one.
func (s *Store) load(name string) (record Record, reason *websocket.CloseError) {
	loaded := make(chan struct{})
	s.operations <- func() { record, reason = s.read(name); close(loaded) }
	<-loaded
	return record, reason
}

func (s *Store) read(name string) (Record, *websocket.CloseError) {
	if record, ok := s.unsaved[fold(name)]; ok {
		return record, nil
	}
	record := Record{name: name}
	var kept, used, n int64
	var kicked, recipients, message string
	cutoff := time.Now().Add(-keepTime).Unix()
	err := s.transaction(func(t *tx) {
		t.query(`SELECT count(*) FROM rooms WHERE used >= ?`, []any{cutoff}, []any{&kept}, nil)
		t.query(`SELECT id, owner, kicked, used, last, forgotten, lost FROM rooms WHERE fold = ? AND used >= ?`, []any{fold(name), cutoff},
			[]any{&record.id, &record.owner, &kicked, &used, &record.last, &record.forgotten, &record.lost},
			func() { record.kicked, record.used = strings.Fields(kicked), time.Unix(used, 0) })
		t.query(`SELECT n, recipients, line FROM lines WHERE room = ? ORDER BY n`, []any{record.id}, []any{&n, &recipients, &message}, func() {
			line, list := Line{N: n, message: []byte(message)}, &record.history
			if recipients != "" {
				line.only, list = strings.Fields(recipients), &record.private
			}
			*list = append(*list, line)
		})
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
