package e2e

import (
	"io"
	"os"
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
	t.Parallel()
	clone := filepath.Join(t.TempDir(), "chat")
	if out, err := exec.Command("git", "clone", "--quiet", "..", clone).CombinedOutput(); err != nil {
		t.Fatalf("git clone: %v\n%s", err, out)
	}
	readme := filepath.Join(clone, "README.md") // of the commit that runs
	server := codeFrom(t, readme, "$ go run .")
	client := codeFrom(t, readme, "$ npx wscat -c ws://localhost:8080/ws")
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

// Each command that a README tells the reader to type is run somewhere, or
// cannot be.
func TestEveryCommandOfTheREADMEsIsAccountedFor(t *testing.T) {
	t.Parallel()
	for file, runs := range map[string]map[string]string{
		"../README.md": {
			"go run .":                            "the test above",
			"npx wscat -c ws://localhost:8080/ws": "the test above",
			"go test ./...":                       "the first that CI runs",
		},
		"../cluster/README.md": {
			"go run .": "TestSecondNodeJoinsWithWhatTheFirstLogs, there",
			"go run . -addr :8081 -nats nats://127.0.0.1:40097 -subject chat":         "the same, with the port that is logged",
			"go run . -nats nats://nats-1:4222,nats://nats-2:4222,nats://nats-3:4222": "nowhere: these are the reader's machines",
		},
	} {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, match := range regexp.MustCompile(`(?m)^    \$ (.*)$`).FindAllStringSubmatch(string(text), -1) {
			if runs[match[1]] == "" {
				t.Errorf("%s tells the reader to type %q: run it in a test, and say here in which", file, match[1])
			}
			delete(runs, match[1])
		}
		for command := range runs {
			t.Errorf("%s no longer has the command %q", file, command)
		}
	}
}
