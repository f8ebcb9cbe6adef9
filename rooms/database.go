package main

import (
	"cmp"
	"context"
	"database/sql"
	"database/sql/driver"
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"time"

	"github.com/gofrs/flock"
	"modernc.org/sqlite"
)

//go:embed schema.sql
var schema string

// The steps from each user_version to the next.
var migrations = regexp.MustCompile(`(?m)^-- From version .*`).Split(schema, -1)[1:]

// Time between two checks that the file is still the one at its path.
const watchInterval = 500 * time.Millisecond

// A Database is a SQLite database in a file that no other server uses: each keeps the lock
// beside the file. Other programs may read it, and copy it with SQLite's backup.
type Database struct {
	*sql.DB
	file  string
	lock  *flock.Flock
	files map[string]fs.FileInfo // as they were opened: the file, the lock, and SQLite's own two
}

// SQLite's settings. Without the first, a transaction that reads before it writes fails if
// another program has written since. Without the last, saving a full room fails where there is
// no directory for temporary files, as in an empty container.
const settings = "?_txlock=immediate&_pragma=busy_timeout(5000)&_pragma=journal_mode(WAL)" +
	"&_pragma=synchronous(FULL)&_pragma=foreign_keys(1)&_pragma=secure_delete(1)" +
	"&_pragma=temp_store(MEMORY)"

// In SQL, fold(name) is what fold returns.
func init() {
	sqlite.MustRegisterDeterministicScalarFunction("fold", 1,
		func(_ *sqlite.FunctionContext, args []driver.Value) (driver.Value, error) {
			name, _ := args[0].(string) // In a damaged file it can be of another type.
			return fold(name), nil
		})
}

// openDatabase opens the database in file, or creates it, and brings its schema up to date. Then
// it executes setUp, in the same transaction.
func openDatabase(file string, setUp func(t *tx)) (*Database, error) {
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
	// Open fails for unknown drivers only.
	d.DB, _ = sql.Open("sqlite", "file:"+(&url.URL{Path: file}).EscapedPath()+settings)
	d.SetMaxOpenConns(1) // Only the store's goroutine uses it.
	err = d.migrate(setUp)
	for _, suffix := range []string{"", ".lock", "-wal", "-shm"} {
		if err == nil {
			d.files[suffix], err = os.Stat(file + suffix)
		}
	}
	if err != nil {
		d.DB.Close()
		d.lock.Unlock()
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	if mode := d.files[""].Mode(); mode.Perm()&0o077 != 0 {
		logSoon("%s: its mode, %v, lets other users of this machine open it", file, mode)
	}
	return d, nil
}

// migrate takes the steps that the schema lacks, and then executes setUp.
func (d *Database) migrate(setUp func(t *tx)) error {
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
		setUp(t)
	})
}

// changed reports whether the file with that suffix is no longer the one that was opened.
func (d *Database) changed(suffix string) bool {
	info, err := os.Stat(d.file + suffix)
	return errors.Is(err, fs.ErrNotExist) || err == nil && !os.SameFile(info, d.files[suffix])
}

// check returns an error if the file, or the lock, is no longer the one at its path.
func (d *Database) check() error {
	for _, suffix := range []string{"", ".lock"} {
		if d.changed(suffix) {
			return fmt.Errorf("%s%s was deleted or replaced while the server ran", d.file, suffix)
		}
	}
	return nil
}

// watch calls stop once check returns an error, which it logs, or once ctx is done.
func (d *Database) watch(ctx context.Context, stop func()) {
	defer stop()
	for ; ctx.Err() == nil; time.Sleep(watchInterval) {
		if err := d.check(); err != nil {
			logSoon("%v: shutting down", err)
			return
		}
	}
}

// close closes the database. If the file has been deleted or replaced, it returns an error,
// and deletes SQLite's own files: SQLite would apply that log to the new database.
func (d *Database) close() error {
	defer d.lock.Unlock()
	err := cmp.Or(d.check(), d.DB.Close())
	for _, suffix := range []string{"-wal", "-shm"} {
		if d.changed("") && !d.changed(suffix) {
			os.Remove(d.file + suffix)
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
		err, t.err = t.err, nil
		t.exec(`ROLLBACK TO part`) // It fails if the error has ended the transaction.
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
