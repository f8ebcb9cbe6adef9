package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// inCopy is a test that a copy of the server gets beside its code. It counts what
// connections that do nothing take, and what those leave behind that have ended.
const inCopy = `package main

import (
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"
)

func heap() (m runtime.MemStats) {
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return m
}

func TestConnectionsTakeLittleAndLeaveNothing(t *testing.T) {
	hub := newHub()
	ended := make(chan struct{})
	go func() { hub.run(); close(ended) }()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { serveWs(hub, w, r) }))
	defer server.Close()
	const n = 1000
	var conns []*websocket.Conn
	dial := func() {
		for range make([]struct{}, n) {
			conn, _, err := (&websocket.Dialer{ReadBufferSize: 16, WriteBufferSize: 16}).Dial("ws"+strings.TrimPrefix(server.URL, "http"), nil)
			if err != nil {
				t.Fatal(err)
			}
			conns = append(conns, conn)
		}
	}
	before := heap()
	dial()
	if got := (heap().HeapAlloc - before.HeapAlloc) / n; got > 24<<10 {
		t.Errorf("an idle connection takes %d bytes, its peer among them", got)
	}
	hub.stop()
	for _, conn := range conns {
		for err := error(nil); err == nil; {
			_, _, err = conn.ReadMessage()
		}
		conn.Close()
	}
	<-ended
	conns = nil
	left := func() int { return int(heap().HeapObjects) - int(before.HeapObjects) }
	// Timers that close connections hold these for closeWait. The runtime keeps two
	// objects of each for later use; a ticker that is not stopped is three more.
	for start := time.Now(); left() > 4*n; {
		if time.Since(start) > 20*closeWait {
			t.Fatalf("%d connections have left %d objects behind", n, left())
		}
	}
}
`

// Whoever copies the code puts it into an older module, and takes longer messages.
func TestCopyInAnOldModuleWithLongMessagesStaysSmall(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for _, name := range []string{"go.mod", "go.sum", "main.go", "hub.go", "client.go", "home.html"} {
		text, err := os.ReadFile(filepath.Join("..", name))
		if err != nil {
			t.Fatal(err)
		}
		changed := string(text)
		switch name {
		case "go.mod":
			changed = strings.Replace(changed, "go 1.25", "go 1.21", 1)
		case "client.go":
			changed = strings.Replace(changed, "maxMessageSize = 512", "maxMessageSize = 64 << 10", 1)
		}
		if (changed == string(text)) == (name == "go.mod" || name == "client.go") {
			t.Fatalf("%s: cannot make the change", name)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(changed), 0o666); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "copy_test.go"), []byte(inCopy), 0o666); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("go", "test", ".")
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}
