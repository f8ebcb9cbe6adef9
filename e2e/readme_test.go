package e2e

import (
	"bytes"
	"cmp"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

// clone makes a fresh clone of the repository, with git's options.
func clone(t *testing.T, dir string, options ...string) {
	t.Helper()
	args := append([]string{"clone", "--quiet"}, append(options, "..", dir)...)
	if out, err := exec.Command("git", args...).CombinedOutput(); err != nil {
		t.Fatalf("git clone: %v\n%s", err, out)
	}
}

// example matches a command in a README, and the output shown below it.
var example = regexp.MustCompile(`(?m)^    \$ (.*)\n((?:    [^$\n].*\n)*)`)

// On a fresh clone, the commands of each README, in order, have the output that it shows,
// except for the ports. CI runs those that take long.
func TestCommandsOfTheREADMEsHaveTheOutputShown(t *testing.T) {
	t.Parallel()
	root := filepath.Join(t.TempDir(), "chat")
	clone(t, root)
	readmes, err := filepath.Glob(filepath.Join(root, "*", "README.md"))
	if err != nil || len(readmes) == 0 {
		t.Fatal("no README.md in a folder", err)
	}
	for _, readme := range append(readmes, filepath.Join(root, "README.md")) {
		folder, _ := filepath.Rel(root, filepath.Dir(readme))
		t.Run(folder, func(t *testing.T) {
			t.Parallel()
			text, err := os.ReadFile(readme)
			if err != nil {
				t.Fatal(err)
			}
			ports := make(map[string]string) // by those in the README
			for _, match := range example.FindAllStringSubmatch(string(text), -1) {
				command, shown := match[1], match[2]
				t.Log("$ " + command)
				switch {
				case strings.Contains(command, "//nats-1:"): // a host that does not exist here
				case strings.HasPrefix(command, "go run ."):
					runServer(t, filepath.Dir(readme), command, shown, ports)
				case strings.HasPrefix(command, "npx wscat "):
					runWscat(t, command, shown, ports)
				case strings.Contains(command, " -bench="):
					wantBenchmark(t, command)
				default:
					wantInCI(t, root, folder, command)
				}
			}
		})
	}
}

// runServer runs a command that starts a server, at an address of its own. It waits for
// the output shown, and adds the ports in it to ports.
func runServer(t *testing.T, dir, command, shown string, ports map[string]string) {
	t.Helper()
	cmd := exec.Command("sh", "-c", withPorts(command, ports)+" -addr localhost:0")
	cmd.Dir = dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.WaitDelay = time.Millisecond // for the server, which outlives the go command
	t.Cleanup(func() { syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) })
	s := startCommand(t, cmd)

	for line := range strings.Lines(shown) {
		line = strings.TrimSpace(line)
		pattern := date.ReplaceAllString(regexp.QuoteMeta(line), date.String())
		pattern = port.ReplaceAllString(pattern, `:(\d+)`)
		pattern = strings.ReplaceAll(pattern, "localhost", `127\.0\.0\.1`)
		got := regexp.MustCompile(pattern).FindStringSubmatch(s.log.String())
		if got == nil {
			t.Fatalf("%s prints\n%s\nwant in it\n%s", command, s.log, line)
		}
		for i, documented := range port.FindAllString(line, -1) {
			ports[documented] = ":" + got[i+1]
		}
	}
}

var (
	date = regexp.MustCompile(`\d{4}/\d\d/\d\d \d\d:\d\d:\d\d`)
	port = regexp.MustCompile(`:\d{4,5}`)
)

// withPorts replaces the ports of the README by the actual ones.
func withPorts(command string, ports map[string]string) string {
	return port.ReplaceAllStringFunc(command, func(documented string) string {
		return cmp.Or(ports[documented], documented)
	})
}

// runWscat runs a command that starts wscat, and types the lines of shown after "> ".
func runWscat(t *testing.T, command, shown string, ports map[string]string) {
	t.Helper()
	// wscat prints these lines only on a terminal, which script provides.
	wscat := exec.Command("script", "--quiet", "--return", "--command", withPorts(command, ports), "/dev/null")
	screen := &output{grown: make(chan struct{}, 1)}
	wscat.Stdout, wscat.Stderr = screen, screen
	keyboard, err := wscat.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := wscat.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { wscat.Process.Kill(); wscat.Wait() })
	for line := range strings.Lines(shown) {
		line = strings.TrimSpace(line)
		if typed, found := strings.CutPrefix(line, "> "); found {
			io.WriteString(keyboard, typed+"\n")
			continue
		}
		timeout := time.After(patience)
		for !strings.Contains(screen.String(), line) {
			select {
			case <-screen.grown:
			case <-timeout:
				t.Fatalf("wscat shows %q, want %q in it", screen, line)
			}
		}
	}
}

// wantInCI checks that .ci/run, or a make target that it calls, runs a command of the
// README in folder. It may add packages, options that answer questions, and -count=1.
func wantInCI(t *testing.T, root, folder, command string) {
	t.Helper()
	script, err := os.ReadFile(filepath.Join(root, ".ci", "run"))
	if err != nil {
		t.Fatal(err)
	}
	run := string(script)
	for _, targets := range regexp.MustCompile(`(?m)^make (.*)$`).FindAllStringSubmatch(run, -1) {
		make := exec.Command("sh", "-c", "make --dry-run "+targets[1])
		make.Dir = root
		out, err := make.CombinedOutput()
		if err != nil {
			t.Fatalf("make --dry-run %s: %v\n%s", targets[1], err, out)
		}
		run += string(out)
	}
	run = strings.NewReplacer("\\\n\t", "", " -y --no-install-recommends", "", " -count=1", "").Replace(run)
	for line := range strings.Lines(run) {
		if (folder == "." || strings.HasPrefix(command, "apt-get ")) && strings.HasPrefix(line, command) {
			return
		}
		for part := range strings.SplitSeq(line, " && ") {
			if strings.HasPrefix(line, "cd "+folder+" && ") && strings.HasPrefix(part, command) {
				return
			}
		}
	}
	t.Errorf("nothing runs %q of %s/README.md: run it in .ci/run, or here", command, folder)
}

// wantBenchmark checks that a benchmark exists that command would run. It does not run it, as
// that takes minutes and an idle machine.
func wantBenchmark(t *testing.T, command string) {
	t.Helper()
	list := regexp.MustCompile(` -benchtime=\S+`).ReplaceAllString(strings.Replace(command, " -bench=", " -list=", 1), "")
	out, err := exec.Command("sh", "-c", list).CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte("Benchmark")) {
		t.Errorf("%s prints %q, %v, want the name of a benchmark", list, out, err)
	}
}

// make build is reproducible: it makes the same binary from each clone, with the commit
// in it, also if git converts line endings for Windows.
func TestBuildIsReproducible(t *testing.T) {
	t.Parallel()
	var binaries [][]byte
	for _, options := range [][]string{nil, {"--config", "core.autocrlf=true"}} {
		dir := filepath.Join(t.TempDir(), "chat")
		clone(t, dir, options...)
		build := exec.Command("make", "build")
		build.Dir = dir
		build.Env = append(os.Environ(), "GOFLAGS=-buildvcs=true")
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("make build: %v\n%s", err, out)
		}
		binary, err := os.ReadFile(filepath.Join(dir, "chat"))
		if err != nil {
			t.Fatal(err)
		}
		binaries = append(binaries, binary)
	}
	if !bytes.Equal(binaries[0], binaries[1]) {
		t.Error("two clones of one commit make two binaries")
	}
	if !bytes.Contains(binaries[0], []byte("vcs.revision=")) {
		t.Error("the binary does not name its commit")
	}
}
