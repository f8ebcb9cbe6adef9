package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"database/sql"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"sync/atomic"
	"time"

	"github.com/gofrs/flock"
	_ "modernc.org/sqlite"
)

//go:embed schema.sql
var schema string

// The steps from each user_version to the next.
var migrations = regexp.MustCompile(`(?m)^-- From version .*`).Split(schema, -1)[1:]

// Time between two checks that the file is still the one at its path.
const watchInterval = 500 * time.Millisecond

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

// A Database is a SQLite database in a file that no other server uses: each keeps the lock
// beside the file. Other programs may read it, and copy it with SQLite's backup.
type Database struct {
	*sql.DB
	file  string
	lock  *flock.Flock
	files map[string]fs.FileInfo // as they were opened: the file, the lock, and SQLite's own two
}

// openDatabase opens the database in file, or creates it, and brings its schema up to date.
func openDatabase(file string) (_ *Database, err error) {
	if file == ":memory:" {
		return nil, errors.New("-db :memory: would keep nothing after a restart: name a file")
	}
	// SQLite would let other users of the machine read the file, which holds the cookie key
	// and private messages. Its own two files get the same mode.
	f, err := os.OpenFile(file, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	f.Close()
	// A server that has the file by another name takes the same lock.
	if file, err = filepath.EvalSymlinks(file); err != nil {
		return nil, err
	}
	d := &Database{file: file, files: make(map[string]fs.FileInfo)}
	d.lock = flock.New(file+".lock", flock.SetPermissions(0o600))
	if locked, err := d.lock.TryLock(); err != nil || !locked {
		return nil, cmp.Or(err, fmt.Errorf("%s: another server uses this database", file))
	}
	path := &url.URL{Path: file}
	dsn := url.URL{Scheme: "file", Opaque: path.EscapedPath(), RawQuery: url.Values{
		// Else a transaction that reads first fails if another program has written since.
		"_txlock": {"immediate"},
		"_pragma": {"busy_timeout(5000)", "journal_mode(WAL)", "synchronous(FULL)",
			"foreign_keys(1)", "secure_delete(1)"},
	}.Encode()}
	d.DB, _ = sql.Open("sqlite", dsn.String()) // It fails for unknown drivers only.
	d.SetMaxOpenConns(1)                       // Only the store's goroutine uses it.
	if err := d.migrate(); err != nil {
		d.DB.Close()
		d.lock.Unlock()
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	for _, suffix := range []string{"", ".lock", "-wal", "-shm"} {
		if d.files[suffix], err = os.Stat(file + suffix); err != nil {
			d.close()
			return nil, err
		}
	}
	if mode := d.files[""].Mode(); mode.Perm()&0o077 != 0 {
		logSoon("%s: its mode, %v, lets other users of this machine open it", file, mode)
	}
	return d, nil
}

// migrate takes the steps that the schema lacks.
func (d *Database) migrate() error {
	var version int
	if err := d.QueryRow(`PRAGMA user_version`).Scan(&version); err != nil {
		return err
	}
	if version > len(migrations) {
		return fmt.Errorf("it is of a later version of this program: user_version %d", version)
	}
	if version < len(migrations) { // Version 0 has left deleted text in the file.
		if _, err := d.Exec(`VACUUM`); err != nil {
			return err
		}
	}
	return d.transaction(func(t *tx) {
		for _, step := range migrations[version:] {
			t.exec(step)
		}
		t.exec(fmt.Sprint(`PRAGMA user_version = `, len(migrations)))
		t.exec(`INSERT INTO server (cookie_key)
			SELECT ? WHERE NOT EXISTS (SELECT * FROM server)`, rand.Text())
		t.refold()
	})
}

// refold updates the keys of all rooms: fold may have changed, with Unicode for example. Of
// rooms whose names have become confusable, the one that was used last keeps the name.
func (t *tx) refold() {
	var id, name, before string
	names, ids := make(map[string]string), make(map[string]string) // by fold
	isSame := true
	dest := []any{&id, &name, &before}
	t.query(`SELECT id, name, fold FROM rooms ORDER BY used DESC`, nil, dest, func() {
		key := fold(name)
		if names[key] != "" {
			logSoon("the room %q cannot be opened: %q looks like it", name, names[key])
			return
		}
		names[key], ids[key], isSame = name, id, isSame && key == before
	})
	if isSame {
		return
	}
	t.exec(`UPDATE rooms SET fold = id`)
	for key, id := range ids {
		t.exec(`UPDATE rooms SET fold = ? WHERE id = ?`, key, id)
	}
}

// check returns an error if the file, or the lock, is no longer the one at its path.
func (d *Database) check() error {
	for _, suffix := range []string{"", ".lock"} {
		if !d.isThere(suffix) {
			return fmt.Errorf("%s%s was deleted or replaced while the server ran", d.file, suffix)
		}
	}
	return nil
}

// isThere reports whether the file with that suffix is the one that was opened.
func (d *Database) isThere(suffix string) bool {
	info, err := os.Stat(d.file + suffix)
	if err != nil {
		return !errors.Is(err, fs.ErrNotExist)
	}
	return os.SameFile(info, d.files[suffix])
}

// watch calls stop once check returns an error, which it logs. It returns then, or when ctx
// is done.
func (d *Database) watch(ctx context.Context, stop func()) {
	for ticks := time.Tick(watchInterval); ; {
		select {
		case <-ctx.Done():
			return
		case <-ticks:
			if err := d.check(); err != nil {
				logSoon("%v: shutting down", err)
				stop()
				return
			}
		}
	}
}

// close closes the database. If the file has been deleted or replaced, it returns an error,
// and deletes SQLite's own files: SQLite would apply that log to the new database.
func (d *Database) close() error {
	defer d.lock.Unlock()
	err := cmp.Or(d.check(), d.DB.Close())
	if !d.isThere("") {
		for _, suffix := range []string{"-wal", "-shm"} {
			if d.isThere(suffix) {
				os.Remove(d.file + suffix)
			}
		}
	}
	return err
}

// transaction commits what f writes, or nothing of it.
func (d *Database) transaction(f func(t *tx)) (err error) {
	var t tx
	if t.Tx, err = d.Begin(); err != nil {
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

// savepoint runs f. If f fails, it takes back what f has written, so that the transaction can
// go on, and returns the error.
func (t *tx) savepoint(f func()) (err error) {
	t.exec(`SAVEPOINT part`)
	if f(); t.err != nil {
		err = t.err
		if _, failed := t.Exec(`ROLLBACK TO part`); failed != nil {
			return err // which has rolled back the transaction, as a full disk may
		}
		t.err = nil
	}
	t.exec(`RELEASE part`)
	return err
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

// list returns a slice as JSON.
func list(values any) string {
	text, _ := json.Marshal(values) // No ID and no name can fail to encode.
	return string(text)
}
