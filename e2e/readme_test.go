package e2e

import (
	"io"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// What README.md shows first happens on a fresh clone, at another address. (The
// third of its commands, go test ./..., is the first that CI runs.)
func TestTheFirstTwoCommandsOfREADMEDoWhatItShows(t *testing.T) {
	clone := filepath.Join(t.TempDir(), "chat")
	if out, err := exec.Command("git", "clone", "--quiet", "..", clone).CombinedOutput(); err != nil {
		t.Fatalf("git clone: %v\n%s", err, out)
	}
	server := codeFrom(t, "../README.md", "$ go run .")
	client := codeFrom(t, "../README.md", "$ npx wscat -c ws://localhost:8080/ws")
	if want := "$ go run .\n2026/11/23 10:00:00 listening on http://localhost:8080/\n\n" + client; server != want {
		t.Fatalf("README.md starts with\n%s\nwant\n%s", server, want)
	}

	addr := freeAddr(t)
	built := filepath.Join(clone, "chat") // as go run makes it, but in a process of our own
	build := exec.Command("go", "build", "-o", built, ".")
	build.Dir = clone
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	s := startCommand(t, exec.Command(built, "-addr", addr))
	if got, want := s.log.String(), regexp.MustCompile(`^\d{4}/\d\d/\d\d \d\d:\d\d:\d\d listening on http://`+addr+"/\n"); !want.MatchString(got) {
		t.Errorf("the server says %q, want %q", got, want)
	}

	// wscat shows what README.md shows to a terminal only, which script makes.
	command := strings.Replace(strings.TrimPrefix(strings.Split(client, "\n")[0], "$ "), "localhost:8080", addr, 1)
	wscat := exec.Command("script", "--quiet", "--return", "--command", command, "/dev/null")
	shown := &output{grown: make(chan struct{}, 1)}
	wscat.Stdout, wscat.Stderr = shown, shown
	typed, err := wscat.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := wscat.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { wscat.Process.Kill(); wscat.Wait() })
	for line := range strings.Lines(client[strings.Index(client, "\n")+1:]) {
		line = strings.TrimSpace(line)
		if said, mine := strings.CutPrefix(line, "> "); mine {
			io.WriteString(typed, said+"\n")
			continue
		}
		timeout := time.After(patience)
		for !strings.Contains(shown.String(), line) {
			select {
			case <-shown.grown:
			case <-timeout:
				t.Fatalf("wscat shows %q, want %q in it", shown, line)
			}
		}
	}
}
