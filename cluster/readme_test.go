package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

// block returns the first indented block of README.md that contains text.
func block(t *testing.T, text string) string {
	t.Helper()
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	blocks := regexp.MustCompile(`(?m)(?:^    .*\n|^\n)+`)
	for _, block := range blocks.FindAllString(string(readme), -1) {
		if strings.Contains(block, text) {
			return regexp.MustCompile(`(?m)^    `).ReplaceAllString(block, "")
		}
	}
	t.Fatalf("README.md has no block with %q", text)
	return ""
}

// copyProgram copies the program, and what its quick start needs, to a new folder.
func copyProgram(t *testing.T) (dir string) {
	t.Helper()
	dir = t.TempDir()
	for _, pattern := range []string{"*.go", "go.*", "*.html", "nats.conf"} {
		names, err := fs.Glob(os.DirFS("."), pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range names {
			text, err := os.ReadFile(name)
			if err == nil && !strings.HasSuffix(name, "_test.go") {
				err = os.WriteFile(dir+"/"+name, text, 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	return dir
}

// replace replaces the only occurrence of old in a file.
func replace(t *testing.T, file, old, new string) {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(string(text), old); n != 1 {
		t.Fatalf("%s has %d times %q, want once", file, n, old)
	}
	text = []byte(strings.Replace(string(text), old, new, 1))
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
}

// The application announces each client that has been dropped, and fills the queue of one that
// asks for it by tell, on its own node.
func TestApplicationAsInTheREADMECleansUpAfterAClientThatTellDrops(t *testing.T) {
	t.Parallel()
	dir := copyProgram(t)
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, diff, _ := strings.Cut(string(readme), "```diff\n")
	diff, _, _ = strings.Cut(diff, "```")
	for _, part := range strings.Split(diff, "--- ")[1:] {
		file, hunks, _ := strings.Cut(part, "\n")
		for hunk := range strings.SplitSeq(hunks, "@@\n") {
			var old, new string
			for line := range strings.Lines(hunk) {
				if line[0] != '+' {
					old += line[1:]
				}
				if line[0] != '-' {
					new += line[1:]
				}
			}
			replace(t, filepath.Join(dir, file), old, new)
		}
	}
	const place = "// Clean up after it, and announce it. Clients that this drops come next.\n"
	replace(t, dir+"/hub.go", place, place+`h.deliver([]byte("a client has been dropped"))`+"\n")
	replace(t, dir+"/client.go", "	c.hub.publish <- line\n", `
	long := bytes.Repeat([]byte("x"), maxBatchSize)
	for string(line) == "fill my queue" && c.tell(long) {
	}
	c.hub.publish <- line
`)
	program := filepath.Join(dir, "application")
	build := exec.Command("go", "build", "-o", program, ".")
	build.Dir = dir
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	s := natsServer(t)
	var urls []string
	for range 2 {
		p := startProgram(t, program, "-addr", "127.0.0.1:0", "-nats", s.ClientURL())
		urls = append(urls, "ws"+p.logged(t, `http(://.*/)`)+"ws")
	}
	near, far := dial(t, urls[0]), dial(t, urls[1])
	slow := dial(t, urls[0]) // It reads nothing.
	slow.send(t, "fill my queue")
	near.want(t, "a client has been dropped", "fill my queue")
	far.want(t, "fill my queue")
}

// The quick start runs as it is pasted, in a copy of this folder. Only the ports differ, as
// those that it names may be in use.
func TestQuickStartWithThreeServersWorksAsPasted(t *testing.T) {
	dir := copyProgram(t)
	script := block(t, "go tool nats-server")
	next := port(t) / 10
	freePorts := func(prefix string) string { // for example 1234, if 12340 to 12349 are free
		for {
			next++
			busy := false
			for n := range 10 {
				listener, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d%d", next, n))
				if err != nil {
					busy = true
					break
				}
				listener.Close()
			}
			if !busy {
				script = strings.ReplaceAll(script, prefix, fmt.Sprint(next))
				return fmt.Sprint(next)
			}
		}
	}
	monitoring := freePorts("822")
	freePorts("422")
	freePorts("622")
	nodes := freePorts("808")
	// Compiling may take long, which is not the script's time.
	for _, args := range [][]string{{"tool", "-n", "nats-server"}, {"run", ".", "-h"}} {
		compile := exec.Command("go", args...)
		compile.Dir = dir
		if out, err := compile.CombinedOutput(); err != nil {
			t.Fatalf("go %v: %v\n%s", args, err, out)
		}
	}
	bash := exec.Command("bash", "-c", script)
	bash.Dir = dir
	bash.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	stderr, err := bash.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := bash.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		syscall.Kill(-bash.Process.Pid, syscall.SIGTERM)
		bash.Wait()
	})
	late := time.AfterFunc(2*patience, func() { syscall.Kill(-bash.Process.Pid, syscall.SIGTERM) })
	defer late.Stop()
	log := bufio.NewScanner(stderr)
	listening := 0
	for listening < 2 && log.Scan() {
		if strings.Contains(log.Text(), "listening on http://localhost:"+nodes) {
			listening++
		}
		if strings.Contains(log.Text(), "iolation") {
			t.Errorf("the log has %q", log.Text())
		}
	}
	if listening < 2 {
		t.Fatalf("%d nodes listen, want 2", listening)
	}
	go func() {
		for log.Scan() {
		}
	}()
	one, two := dial(t, "ws://localhost:"+nodes+"0/ws"), dial(t, "ws://localhost:"+nodes+"1/ws")
	one.send(t, "hello")
	one.want(t, "hello")
	two.want(t, "hello")
	two.send(t, "hello yourself")
	one.want(t, "hello yourself")

	for n := 1; n <= 3; n++ {
		eventually(t, "the server has the number of routes that README.md names", func() bool {
			response, err := http.Get(fmt.Sprintf("http://127.0.0.1:%s%d/varz", monitoring, n))
			if err != nil {
				t.Fatal(err)
			}
			defer response.Body.Close()
			var varz struct{ Routes int }
			if err := json.NewDecoder(response.Body).Decode(&varz); err != nil {
				t.Fatal(err)
			}
			return varz.Routes == 8
		})
	}
}
