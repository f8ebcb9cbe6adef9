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

// The quick start runs as it is pasted, in a copy of this folder. Only the ports differ, as
// those that it names may be in use.
func TestQuickStartWithThreeServersWorksAsPasted(t *testing.T) {
	dir := t.TempDir()
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
