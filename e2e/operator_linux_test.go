package e2e

import (
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/gorilla/websocket"
)

// These tests are of what README.md tells operators, apart from proxies.

// inline returns the commands between backquotes in README.md, a line for each, without
// line breaks.
func inline(t *testing.T) string {
	t.Helper()
	var commands []string
	for _, match := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(readme(t), -1) {
		commands = append(commands, strings.Join(strings.Fields(match[1]), " "))
	}
	return strings.Join(commands, "\n") + "\n"
}

// systemd rates the unit of README.md, also with the capability for ports below 1024, as
// README.md says, and loads it as the commands there install it.
func TestSystemdUnitOfTheREADME(t *testing.T) {
	t.Parallel()
	unit := codeFrom(t, "../README.md", "[Service]")
	const capability = "CAP_NET_BIND_SERVICE"
	commands := inline(t)
	if !strings.Contains(commands, capability) {
		t.Fatalf("README.md does not name %s", capability)
	}
	if !strings.Contains(readme(t), "`systemd-analyze security` rates 3 or lower:") {
		t.Fatal("README.md does not say how systemd rates the unit")
	}
	for name, unit := range map[string]string{
		"as it is": unit,
		"for ports below 1024": replace(t, unit, "CapabilityBoundingSet=\n",
			"CapabilityBoundingSet="+capability+"\nAmbientCapabilities="+capability+"\n"),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			file := filepath.Join(t.TempDir(), "chat.service")
			write(t, file, unit)
			out, err := exec.Command("systemd-analyze", "security", "--offline=yes", file).CombinedOutput()
			if err != nil {
				t.Fatalf("systemd-analyze: %v\n%s\nOn Debian: apt-get install systemd", err, out)
			}
			exposure := regexp.MustCompile(`exposure level for chat.service: (\d\.\d)`).FindSubmatch(out)
			if exposure == nil {
				t.Fatalf("systemd-analyze prints no rating:\n%s", out)
			}
			rating, _ := strconv.ParseFloat(string(exposure[1]), 64)
			if rating == 0 || rating > 3 {
				t.Errorf("systemd rates the unit %.1f, want at most 3", rating)
			}
		})
	}

	// In a folder instead of the root of the file system, where no systemd runs.
	dir := t.TempDir()
	for _, path := range []string{"/usr/local/bin", "/etc/systemd/system"} {
		if err := os.MkdirAll(dir+path, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	write(t, dir+"/chat.service", unit)
	run := func(t *testing.T, command string) {
		t.Helper()
		if !strings.Contains(commands, "sudo "+command+"\n") {
			t.Fatalf("README.md has no command %q in\n%s", "sudo "+command, commands)
		}
		command = strings.NewReplacer(" /usr/", " ./usr/", " /etc/", " ./etc/",
			"install chat", "install "+binary,
			"systemctl", "systemctl --root="+dir, " --now", "").Replace(command)
		sh := exec.Command("sh", "-c", command)
		sh.Dir = dir
		if out, err := sh.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", command, err, out)
		}
	}
	run(t, "install chat /usr/local/bin/")
	run(t, "cp chat.service /etc/systemd/system/")
	run(t, "systemctl enable --now chat")
	enabled := dir + "/etc/systemd/system/multi-user.target.wants/chat.service"
	if _, err := os.Lstat(enabled); err != nil {
		t.Error(err)
	}
	starts := regexp.MustCompile(`(?m)^ExecStart=(\S+) -addr localhost:8080$`)
	program := starts.FindStringSubmatch(unit)
	if program == nil {
		t.Fatalf("the unit does not start the program:\n%s", unit)
	}
	if info, err := os.Stat(dir + program[1]); err != nil || info.Mode()&0o111 == 0 {
		t.Errorf("the unit's program is %v, %v, want an executable file", info, err)
	}
	if !strings.Contains(commands, "journalctl -u chat\n") {
		t.Error("README.md does not say how to read the log")
	}
}

// The Dockerfile of README.md, without Docker: its program, built with the command beside it,
// runs as its user in a folder that has nothing else.
func TestDockerfileOfTheREADME(t *testing.T) {
	t.Parallel()
	const build = "CGO_ENABLED=0 GOOS=linux go build -o chat"
	if !strings.Contains(inline(t), build+"\n") {
		t.Fatalf("README.md does not say %q", build)
	}
	context, root := t.TempDir(), t.TempDir()
	command := exec.Command("sh", "-c", strings.Replace(build, "-o chat", "-o "+context+"/chat", 1))
	command.Dir = ".."
	if out, err := command.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", build, err, out)
	}
	var user uint64
	var entrypoint string
	for line := range strings.Lines(codeFrom(t, "../README.md", "FROM scratch")) {
		instruction, argument, _ := strings.Cut(strings.TrimSpace(line), " ")
		switch instruction {
		case "COPY":
			from, to, _ := strings.Cut(argument, " ")
			if err := os.Link(filepath.Join(context, from), filepath.Join(root, to, from)); err != nil {
				t.Fatal(err)
			}
		case "USER":
			name, _, _ := strings.Cut(argument, ":")
			user, _ = strconv.ParseUint(name, 10, 32)
		case "ENTRYPOINT":
			entrypoint = strings.Trim(argument, `[]"`)
		}
	}
	if user == 0 {
		t.Error("the Dockerfile names no user, or root")
	}
	if err := os.Chmod(root, 0o555); err != nil {
		t.Fatal(err)
	}
	for dir := root; dir != "/"; dir = filepath.Dir(dir) { // The user must reach the folder.
		if info, err := os.Stat(dir); err == nil && info.Mode()&0o001 == 0 {
			os.Chmod(dir, info.Mode()|0o001)
		}
	}
	container := exec.Command(entrypoint, "-addr", ownHost("localhost:0"))
	container.Dir = "/"
	container.Err = nil // as exec looks for the program outside of Chroot
	container.Env = []string{}
	container.SysProcAttr = &syscall.SysProcAttr{Chroot: root}
	if os.Getuid() == 0 {
		container.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(user), Gid: uint32(user)}
	} else { // In a user namespace, anybody may change the root.
		container.SysProcAttr.Cloneflags = syscall.CLONE_NEWUSER
		container.SysProcAttr.UidMappings = []syscall.SysProcIDMap{
			{ContainerID: int(user), HostID: os.Getuid(), Size: 1}}
	}
	s := startCommand(t, container)
	conn := s.dial(t)
	send(t, conn, "from a container")
	wantLines(t, conn, "from a container")
	s.stop(t)
}

// As README.md says, the program raises its limit of files itself.
func TestServerRaisesItsLimitOfFiles(t *testing.T) {
	t.Parallel()
	s := startCommand(t, exec.Command("sh", "-c", `ulimit -S -n 40; exec "$0" "$@"`,
		binary, "-addr", ownHost("localhost:0")))
	limits, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", s.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	match := regexp.MustCompile(`Max open files +(\d+) +(\d+)`).FindSubmatch(limits)
	if match == nil {
		t.Fatalf("no limits in %s", limits)
	}
	soft, _ := strconv.Atoi(string(match[1]))
	if hard, _ := strconv.Atoi(string(match[2])); soft < hard-1 { // Go leaves one.
		t.Errorf("the server's soft limit is %d, want the hard one, %d", soft, hard)
	}
}

// The health check of README.md.
func TestHealthCheckAnswers200AndIsOneLineInTheLog(t *testing.T) {
	t.Parallel()
	s := startServer(t, "localhost:0")
	before := strings.Count(s.log.String(), "\n")
	response, err := http.Head("http://" + s.addr + "/")
	if err != nil || response.StatusCode != 200 {
		t.Fatalf("HEAD / gets %v, %v, want status 200", response, err)
	}
	s.waitForLog(t, `(HEAD) "/"\n`)
	if got := strings.Count(s.log.String(), "\n") - before; got != 1 {
		t.Errorf("it makes %d lines in the log, want 1:\n%s", got, s.log)
	}
}

// A page that reaches the server by DNS rebinding has its own name as Origin and as Host, and
// connects. The list of origins to which README.md links keeps it out, and lets the
// operator's own page in.
func TestListOfOriginsStopsDNSRebinding(t *testing.T) {
	t.Parallel()
	_, list := recipe(t, "## Allowed origins")
	for _, tt := range []struct {
		name   string
		s      *server
		host   string
		status int
	}{
		{"rebound, without a list", startServer(t, "localhost:0"), "evil.example:8080", 101},
		{"rebound", startCopy(t, add(list)), "evil.example:8080", 403},
		{"the operator's own", startCopy(t, add(list)), "localhost:8080", 101},
	} {
		header := http.Header{"Host": {tt.host}, "Origin": {"http://" + tt.host}}
		conn, response, err := websocket.DefaultDialer.Dial("ws://"+tt.s.addr+"/ws", header)
		if response == nil || response.StatusCode != tt.status {
			t.Errorf("%s: the handshake gets %v, %v, want status %d", tt.name, response, err, tt.status)
		}
		if err == nil {
			conn.Close()
		}
	}
}
