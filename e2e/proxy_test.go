package e2e

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/gorilla/websocket"
)

// nginxConfig is what README.md's part of a configuration stands in.
const nginxConfig = `
daemon off;
user root; # who may write to the folder; for anybody else it is ignored
pid nginx.pid;
error_log stderr;
events {}
http {
	access_log off;
	client_body_temp_path tmp;
	proxy_temp_path tmp;
	fastcgi_temp_path tmp;
	uwsgi_temp_path tmp;
	scgi_temp_path tmp;
	server {
		listen %s;
		%s
	}
}
`

// caddyConfig is what README.md's directive stands in.
const caddyConfig = `
{
	admin off
	auto_https off
}
http://%s {
	%s
}
`

// pingPeriod is client.go's: for so long nothing may pass between an idle client
// and the server.
const pingPeriod = 54 * time.Second

// The configurations of proxies in the READMEs work as they stand there, but for
// the addresses.
func TestItWorksBehindTheProxiesOfTheREADMEs(t *testing.T) {
	t.Parallel()
	for _, proxy := range []struct {
		name, prefix string
		oneIsEnough  bool // when the other server ends, clients get to this one
		servers      func(t *testing.T) (one, two *server)
		start        func(t *testing.T, addr, one, two string)
	}{
		{"nginx", "/chat/", false, func(t *testing.T) (one, two *server) {
			return startServer(t, "127.0.0.1:0"), startServer(t, "127.0.0.1:0")
		}, func(t *testing.T, addr, one, _ string) {
			config := codeFrom(t, "../README.md", "location /chat/ {")
			config = replace(t, config, "127.0.0.1:8080", one)
			wantPatience(t, config, `proxy_read_timeout (\w+);`)
			startProxy(t, "nginx-light", fmt.Sprintf(nginxConfig, addr, config), "/usr/sbin/nginx", "-e", "stderr", "-p", ".", "-c")
		}},
		{"Caddy", "/", false, func(t *testing.T) (one, two *server) {
			return startServer(t, "127.0.0.1:0"), startServer(t, "127.0.0.1:0")
		}, func(t *testing.T, addr, one, _ string) {
			directive := regexp.MustCompile("`(reverse_proxy .*?)`").FindStringSubmatch(readme(t))
			if directive == nil {
				t.Fatal("README.md has no reverse_proxy for Caddy")
			}
			startProxy(t, "caddy", fmt.Sprintf(caddyConfig, addr, replace(t, directive[1], "127.0.0.1:8080", one)),
				"/usr/bin/env", "XDG_CONFIG_HOME=.", "XDG_DATA_HOME=.", "/usr/bin/caddy", "run", "--adapter", "caddyfile", "--config")
		}},
		{"HAProxy", "/", true, func(t *testing.T) (one, two *server) {
			nats := startNATS(t)
			return startNode(t, nats), startNode(t, nats)
		}, func(t *testing.T, addr, one, two string) { startHAProxy(t, addr, one, two) }},
	} {
		t.Run(proxy.name, func(t *testing.T) {
			t.Parallel()
			one, two := proxy.servers(t)
			addr := freeAddr(t)
			proxy.start(t, addr, one.addr, two.addr)
			awaitListener(t, addr)
			url := "ws://" + addr + proxy.prefix + "ws"
			join := func() *websocket.Conn {
				conn := dial(t, websocket.DefaultDialer, url)
				conn.SetReadDeadline(time.Now().Add(patience))
				return conn
			}

			p := newTab(t)
			p.open("http://" + addr + proxy.prefix)
			p.send("through a proxy")
			p.until(lastLine + ` == "through a proxy"`)

			for _, offence := range []struct {
				kind int
				text string
				want int
			}{
				{websocket.BinaryMessage, "x", websocket.CloseUnsupportedData},
				{websocket.TextMessage, "\xff", websocket.CloseInvalidFramePayloadData},
				{websocket.TextMessage, strings.Repeat("x", 2<<20), websocket.CloseMessageTooBig},
			} {
				conn := join()
				conn.WriteMessage(offence.kind, []byte(offence.text))
				wantGoodbye(t, discard(conn), offence.want)
			}

			for origin, want := range map[string]int{"http://" + addr: 101, "http://example.com": 403} {
				conn, response, err := websocket.DefaultDialer.Dial(url, http.Header{"Origin": {origin}})
				if response == nil || response.StatusCode != want {
					t.Errorf("from the origin %s the handshake gives %v and %v, want status %d", origin, response, err, want)
				}
				if err == nil {
					conn.Close()
				}
			}

			idle, busy := join(), join()
			go func() {
				for busy.WriteMessage(websocket.TextMessage, []byte("and another thing")) == nil {
				}
			}()
			one.stop(t)
			if proxy.oneIsEnough {
				// The proxy has not noticed yet, and prefers the server without clients.
				join()
			}
			two.stop(t)
			wantGoodbye(t, discard(idle), websocket.CloseGoingAway)
			wantGoodbye(t, discard(busy), websocket.CloseGoingAway)
		})
	}
}

// HAProxy, as cluster/README.md sets it up, sends nobody to a node that hangs or
// that has lost NATS, and sends people there again when it is well.
func TestHAProxySendsPeopleOnlyToNodesThatHearTheOthers(t *testing.T) {
	t.Parallel()
	const people = 20
	for _, trouble := range []struct {
		name         string
		makes, mends func(t *testing.T, two *server, wire *forwarder)
	}{
		{"hangs",
			func(t *testing.T, two *server, _ *forwarder) { two.signal(t, syscall.SIGSTOP) },
			func(t *testing.T, two *server, _ *forwarder) { two.signal(t, syscall.SIGCONT) }},
		{"has lost NATS",
			func(t *testing.T, two *server, wire *forwarder) { wire.cut(); two.waitForLog(t, "NATS is (away)") },
			func(_ *testing.T, _ *server, wire *forwarder) { wire.mend() }},
	} {
		t.Run(trouble.name, func(t *testing.T) {
			t.Parallel()
			nats := startNATS(t)
			wire := forward(t, nats)
			one, two := startNode(t, nats), startNode(t, wire.Addr().String())
			addr := freeAddr(t)
			haproxy := startHAProxy(t, addr, one.addr, two.addr)
			awaitListener(t, addr)
			listener := one.dial(t)
			listener.SetReadDeadline(time.Now().Add(3 * patience))
			everybodyTalks := func() {
				t.Helper()
				for n := range people {
					line := fmt.Sprint("from ", n)
					say(t, dial(t, websocket.DefaultDialer, "ws://"+addr+"/ws"), line)
					if _, got, err := listener.ReadMessage(); err != nil || string(got) != line {
						t.Fatalf("a node hears %q and %v from those who come through the proxy, want %q", got, err, line)
					}
				}
			}
			trouble.makes(t, two, wire)
			since := time.Now()
			haproxy.wait(t, "Server nodes/two is DOWN")
			t.Logf("HAProxy has noticed after %v", time.Since(since))
			everybodyTalks()
			trouble.mends(t, two, wire)
			haproxy.wait(t, "Server nodes/two is UP")
			everybodyTalks()
			if got := two.log.String(); strings.Contains(got, "/ready") {
				t.Errorf("the node logs that it is asked whether it is ready:\n%s", got)
			}
		})
	}
}

// buildCluster builds the server for several machines, and returns its path.
var buildCluster = sync.OnceValues(func() (string, error) {
	path := binary + "-cluster"
	build := exec.Command("go", "build", "-o", path, ".")
	build.Dir = "../cluster"
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build: %v\n%s", err, out)
	}
	return path, nil
})

// startCluster starts the server for several machines with these arguments, until
// the test ends.
func startCluster(t *testing.T, args ...string) *server {
	t.Helper()
	path, err := buildCluster()
	if err != nil {
		t.Fatal(err)
	}
	return startCommand(t, exec.Command(path, append(args, "-addr", "127.0.0.1:0")...))
}

// startNATS starts a NATS server, that of a node of its own, and returns where it
// listens.
func startNATS(t *testing.T) (addr string) {
	t.Helper()
	return startCluster(t).waitForLog(t, `-nats nats://(\S+)`)
}

// startNode starts a node of the room at the NATS server that listens on addr.
func startNode(t *testing.T, addr string) *server {
	t.Helper()
	return startCluster(t, "-nats", "nats://"+addr)
}

// startHAProxy starts HAProxy as cluster/README.md sets it up, on addr, before two
// nodes.
func startHAProxy(t *testing.T, addr, one, two string) *output {
	t.Helper()
	config := codeFrom(t, "../cluster/README.md", "defaults")
	config = replace(t, config, "bind :80", "bind "+addr)
	config = replace(t, config, "10.0.0.1:8080", one)
	config = replace(t, config, "10.0.0.2:8080", two)
	wantPatience(t, config, `timeout tunnel +(\w+)`)
	return startProxy(t, "haproxy", config, "/usr/sbin/haproxy", "-db", "-f")
}

// A forwarder passes what it gets on to an address, until it is cut.
type forwarder struct {
	net.Listener
	mu    sync.Mutex
	isCut bool
	conns []net.Conn
}

// forward starts a forwarder to addr, which ends with the test.
func forward(t *testing.T, addr string) *forwarder {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f := &forwarder{Listener: listener}
	t.Cleanup(func() { listener.Close(); f.cut() })
	go func() {
		for {
			near, err := listener.Accept()
			if err != nil {
				return
			}
			far, err := net.Dial("tcp", addr)
			if err != nil {
				near.Close()
				continue
			}
			f.mu.Lock()
			f.conns = append(f.conns, near, far)
			if f.isCut {
				near.Close()
				far.Close()
			}
			f.mu.Unlock()
			go io.Copy(near, far)
			go io.Copy(far, near)
		}
	}()
	return f
}

// cut breaks what is connected, and what connects until it is mended.
func (f *forwarder) cut() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.isCut = true
	for _, conn := range f.conns {
		conn.Close()
	}
	f.conns = nil
}

// mend has new connections work.
func (f *forwarder) mend() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.isCut = false
}

// wantPatience checks that config has a time limit, the group of pattern, that a
// client who is pinged does not reach.
func wantPatience(t *testing.T, config, pattern string) {
	t.Helper()
	match := regexp.MustCompile(pattern).FindStringSubmatch(config)
	if match == nil {
		t.Fatalf("the configuration has no %q:\n%s", pattern, config)
	}
	limit, err := time.ParseDuration(match[1])
	if err != nil {
		t.Fatal(err)
	}
	if limit <= pingPeriod {
		t.Errorf("the proxy waits for %v, want more than the %v between two pings", limit, pingPeriod)
	}
}

// codeFrom returns the block of code in a file of Markdown that starts with the
// line first.
func codeFrom(t *testing.T, file, first string) string {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	const indent = "\n    "
	_, code, found := strings.Cut(string(text), indent+first+"\n")
	if !found {
		t.Fatalf("%s has no code that starts with %q", file, first)
	}
	var block strings.Builder
	block.WriteString(first + "\n")
	for line := range strings.Lines(code) {
		line, indented := strings.CutPrefix(line, "    ")
		if !indented && line != "\n" {
			break
		}
		block.WriteString(line)
	}
	return block.String()
}

// replace replaces old, which must be there once.
func replace(t *testing.T, text, old, new string) string {
	t.Helper()
	if got := strings.Count(text, old); got != 1 {
		t.Fatalf("the configuration has %q %d times, want once:\n%s", old, got, text)
	}
	return strings.Replace(text, old, new, 1)
}

// freeAddr returns an address on which nobody listens.
func freeAddr(t testing.TB) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	return listener.Addr().String()
}

// startProxy runs a program of a Debian package in a folder of its own, until the
// test ends, and returns what it says. The name of the file with its configuration
// is its last argument.
func startProxy(t *testing.T, pkg, config, name string, args ...string) *output {
	t.Helper()
	dir := t.TempDir()
	file := filepath.Join(dir, "config")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(name, append(args, file)...)
	cmd.Dir = dir
	out := &output{grown: make(chan struct{}, 1)}
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		t.Fatalf("%v\nOn Debian: apt-get install %s", err, pkg)
	}
	t.Cleanup(func() {
		cmd.Process.Signal(os.Interrupt) // so that it ends its workers, too
		cmd.Wait()
		if t.Failed() {
			t.Logf("%s says:\n%s", name, out)
		}
	})
	return out
}

// wait waits until a process has written text.
func (o *output) wait(t *testing.T, text string) {
	t.Helper()
	timeout := time.After(patience)
	for !strings.Contains(o.String(), text) {
		select {
		case <-o.grown:
		case <-timeout:
			t.Fatalf("it has not said %q in %v:\n%s", text, patience, o)
		}
	}
}

// awaitListener waits until somebody listens on addr.
func awaitListener(t testing.TB, addr string) {
	t.Helper()
	for start := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		conn, err := net.Dial("tcp", addr)
		if err == nil {
			conn.Close()
			return
		}
		if time.Since(start) > patience {
			t.Fatal(err)
		}
	}
}
