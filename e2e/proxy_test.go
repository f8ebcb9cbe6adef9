package e2e

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/gorilla/websocket"
)

// nginxHTTP is the rest of the configuration for README.md's.
const nginxHTTP = `
daemon off;
user root; # so that it can write to the folder; ignored for other users
pid nginx.pid;
error_log stderr;
events { worker_connections 400; }
http {
	access_log /dev/stderr;
	client_body_temp_path tmp;
	proxy_temp_path tmp;
	fastcgi_temp_path tmp;
	uwsgi_temp_path tmp;
	scgi_temp_path tmp;
`

// nginxConfig is the rest of the configuration for README.md's location alone, without TLS.
const nginxConfig = nginxHTTP + `
	limit_conn_zone $server_name zone=all:1m;
	limit_conn_zone $binary_remote_addr zone=address:1m;
	limit_req_zone $binary_remote_addr zone=requests:1m rate=100r/s;
	server {
		listen %s;
		%s
	}
}
`

// startNginx starts nginx on addr as README.md configures it, with changes, in pairs.
func startNginx(t *testing.T, addr, server string, changes ...string) *output {
	t.Helper()
	config := codeFrom(t, "../README.md",
		"limit_conn_zone $server_name zone=all:1m; limit_conn_zone $binary_remote_addr zone=address:10m;")
	wantTimeout(t, config, `proxy_read_timeout (\w+);`)
	cert := certificate(t)
	config = nginxHTTP + config + "}"
	changes = append(changes, "listen 443", "listen "+addr, "127.0.0.1:8080", server,
		"/etc/ssl/chat.pem", cert, "/etc/ssl/chat.key", cert)
	for pair := range slices.Chunk(changes, 2) {
		config = replace(t, config, pair[0], pair[1])
	}
	log := startProxy(t, "nginx-light", config, "/usr/sbin/nginx", "-e", "stderr", "-p", ".", "-c")
	awaitListener(t, addr)
	return log
}

// startHAProxyAlone starts HAProxy on addr for one server, as README.md configures it, with
// changes, in pairs.
func startHAProxyAlone(t *testing.T, addr, server string, changes ...string) *output {
	t.Helper()
	limits := codeFrom(t, "../README.md",
		"stick-table type ipv6 size 100k expire 1m store conn_cur,http_req_rate(10s)")
	lines := regexp.MustCompile("HAProxy needs `(timeout tunnel .*)` beside the usual timeouts, " +
		"and in its frontend `(maxconn .*)` and").FindStringSubmatch(readme(t))
	if lines == nil {
		t.Fatal("README.md does not say what HAProxy needs")
	}
	wantTimeout(t, lines[1], `timeout tunnel +(\w+)`)
	config := `
global
	log stderr format raw local0
defaults
	log global
	mode http
	timeout connect 1s
	timeout client 10s
	timeout server 10s
	` + lines[1] + `
frontend chat
	bind ` + addr + `
	` + lines[2] + "\n" + limits + `
	default_backend chat
backend chat
	server chat ` + server + "\n"
	for pair := range slices.Chunk(changes, 2) {
		config = replace(t, config, pair[0], pair[1])
	}
	log := startProxy(t, "haproxy", config, "/usr/sbin/haproxy", "-db", "-f")
	awaitListener(t, addr)
	return log
}

// certificate writes the certificate of httptest, and its key, to one file.
func certificate(t *testing.T) (path string) {
	t.Helper()
	issuer := httptest.NewTLSServer(nil)
	defer issuer.Close()
	cert := issuer.TLS.Certificates[0]
	key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	path = filepath.Join(t.TempDir(), "chat.pem")
	var content bytes.Buffer
	pem.Encode(&content, &pem.Block{Type: "CERTIFICATE", Bytes: cert.Certificate[0]})
	pem.Encode(&content, &pem.Block{Type: "PRIVATE KEY", Bytes: key})
	write(t, path, content.String())
	return path
}

// anyCertificate is a dialer for the tests' certificates.
var anyCertificate = &websocket.Dialer{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}

// caddyConfig is the rest of the configuration for the directive in README.md.
const caddyConfig = `
{
	admin off
	auto_https off
}
http://%s {
	%s
}
`

// pingPeriod is client.go's: the longest time without a frame on an idle connection.
const pingPeriod = 54 * time.Second

// The test uses the configurations of the READMEs verbatim, except for the addresses.
func TestProxyConfigurationsOfTheREADMEsWork(t *testing.T) {
	t.Parallel()
	for _, proxy := range []struct {
		name, scheme, prefix string
		balances             bool // connects new clients to the other server when one exits
		servers              func(t *testing.T) (one, two *server)
		start                func(t *testing.T, addr, one, two string)
	}{
		{"nginx", "https", "/chat/", false, func(t *testing.T) (one, two *server) {
			return startServer(t, "127.0.0.1:0"), startServer(t, "127.0.0.1:0")
		}, func(t *testing.T, addr, one, _ string) { startNginx(t, addr, one) }},
		{"HAProxy for one server", "http", "/", false, func(t *testing.T) (one, two *server) {
			return startServer(t, "127.0.0.1:0"), startServer(t, "127.0.0.1:0")
		}, func(t *testing.T, addr, one, _ string) { startHAProxyAlone(t, addr, one) }},
		{"Caddy", "http", "/", false, func(t *testing.T) (one, two *server) {
			return startServer(t, "127.0.0.1:0"), startServer(t, "127.0.0.1:0")
		}, func(t *testing.T, addr, one, _ string) {
			directive := regexp.MustCompile("`(reverse_proxy .*?)`").FindStringSubmatch(readme(t))
			if directive == nil {
				t.Fatal("README.md has no reverse_proxy for Caddy")
			}
			startProxy(t, "caddy", fmt.Sprintf(caddyConfig, addr, replace(t, directive[1], "127.0.0.1:8080", one)),
				"/usr/bin/env", "XDG_CONFIG_HOME=.", "XDG_DATA_HOME=.", "/usr/bin/caddy", "run", "--adapter", "caddyfile", "--config")
		}},
		{"HAProxy", "http", "/", true, func(t *testing.T) (one, two *server) {
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
			url := strings.Replace(proxy.scheme, "http", "ws", 1) + "://" + addr + proxy.prefix + "ws"
			join := func() *websocket.Conn {
				conn := dial(t, anyCertificate, url)
				conn.SetReadDeadline(time.Now().Add(patience))
				return conn
			}

			p := newTab(t)
			p.open(proxy.scheme + "://" + addr + proxy.prefix)
			p.send("through a proxy")
			p.until(lastLine + ` == "through a proxy"`)

			for _, violation := range []struct {
				kind int
				text string
				want int
			}{
				{websocket.BinaryMessage, "x", websocket.CloseUnsupportedData},
				{websocket.TextMessage, "\xff", websocket.CloseInvalidFramePayloadData},
				{websocket.TextMessage, strings.Repeat("x", 2<<20), websocket.CloseMessageTooBig},
			} {
				conn := join()
				conn.WriteMessage(violation.kind, []byte(violation.text))
				wantClose(t, discard(conn), violation.want)
			}

			for origin, want := range map[string]int{
				proxy.scheme + "://" + addr: 101,
				"http://example.com":        403,
			} {
				conn, response, err := anyCertificate.Dial(url, http.Header{"Origin": {origin}})
				if response == nil || response.StatusCode != want {
					t.Errorf("from the origin %s the handshake gives %v and %v, want status %d", origin, response, err, want)
				}
				if err == nil {
					conn.Close()
				}
			}

			idle, busy := join(), join()
			go func() {
				for busy.WriteMessage(websocket.TextMessage, []byte("a flood")) == nil {
				}
			}()
			one.stop(t)
			if proxy.balances {
				// The proxy has not detected the exit yet, and prefers the server with fewer clients.
				join()
			}
			two.stop(t)
			wantClose(t, discard(idle), websocket.CloseGoingAway)
			wantClose(t, discard(busy), websocket.CloseGoingAway)
		})
	}
}

// The limits of README.md, for the connections of one address: the next gets 503, and gets in
// when another has left. Neither counts for the requests of other addresses.
func TestProxiesLimitTheConnectionsOfAnAddress(t *testing.T) {
	t.Parallel()
	const limit = 50
	for _, proxy := range []struct {
		name, url string
		start     func(t *testing.T, addr, server string, changes ...string) *output
	}{
		{"nginx", "wss://%s/chat/ws", startNginx},
		{"HAProxy", "ws://%s/ws", startHAProxyAlone},
	} {
		t.Run(proxy.name, func(t *testing.T) {
			t.Parallel()
			addr := freeAddr(t)
			s := startServer(t, "localhost:0")
			proxy.start(t, addr, s.addr)
			url := fmt.Sprintf(proxy.url, addr)
			conns := make([]*websocket.Conn, limit)
			for i := range conns {
				conns[i] = dial(t, anyCertificate, url)
			}
			want503(t, url)
			dial(t, fromElsewhere(), url)

			leave(t, conns[0])
			for start := time.Now(); ; time.Sleep(100 * time.Millisecond) { // until the proxy has noticed
				conn, _, err := anyCertificate.Dial(url, nil)
				if err == nil {
					conn.Close()
					break
				}
				if time.Since(start) > patience {
					t.Fatalf("after a connection has ended, the next gets %v", err)
				}
			}
		})
	}
}

// want503 checks that a proxy answers a handshake with status 503.
func want503(t *testing.T, url string) {
	t.Helper()
	_, response, err := anyCertificate.Dial(url, nil)
	if response == nil || response.StatusCode != 503 {
		t.Errorf("the handshake gets %v, %v, want status 503", response, err)
	}
}

// fromElsewhere returns a dialer from another address than other clients have, 127.0.0.2.
func fromElsewhere() *websocket.Dialer {
	dialer := *anyCertificate
	local := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}}
	dialer.NetDialContext = local.DialContext
	return &dialer
}

// The limits of README.md, for all connections together and for requests.
func TestProxiesLimitConnectionsInTotalAndRequests(t *testing.T) {
	t.Parallel()
	join := func(t *testing.T, url string) { // and leave
		t.Helper()
		conn := dial(t, anyCertificate, url)
		leave(t, conn)
	}
	t.Run("nginx, in total", func(t *testing.T) {
		t.Parallel()
		addr := freeAddr(t)
		s := startServer(t, "localhost:0")
		startNginx(t, addr, s.addr, "limit_conn all 10000", "limit_conn all 3")
		for range 3 {
			dial(t, anyCertificate, "wss://"+addr+"/chat/ws")
		}
		want503(t, "wss://"+addr+"/chat/ws")
	})
	t.Run("nginx, requests", func(t *testing.T) {
		t.Parallel()
		addr := freeAddr(t)
		s := startServer(t, "localhost:0")
		startNginx(t, addr, s.addr, "rate=5r/s", "rate=1r/m", "burst=50", "burst=2")
		for range 3 {
			join(t, "wss://"+addr+"/chat/ws")
		}
		want503(t, "wss://"+addr+"/chat/ws")
	})
	t.Run("HAProxy, in total", func(t *testing.T) {
		t.Parallel()
		addr := freeAddr(t)
		s := startServer(t, "localhost:0")
		startHAProxyAlone(t, addr, s.addr, "maxconn 10000", "maxconn 3")
		var first *websocket.Conn
		for range 3 {
			first = dial(t, anyCertificate, "ws://"+addr+"/ws")
		}
		// HAProxy leaves further connections in the kernel's queue.
		next := &websocket.Dialer{HandshakeTimeout: 500 * time.Millisecond}
		if _, _, err := next.Dial("ws://"+addr+"/ws", nil); err == nil {
			t.Error("a fourth connection is accepted")
		}
		leave(t, first)
		dial(t, anyCertificate, "ws://"+addr+"/ws")
	})
	t.Run("HAProxy, requests", func(t *testing.T) {
		t.Parallel()
		addr := freeAddr(t)
		s := startServer(t, "localhost:0")
		startHAProxyAlone(t, addr, s.addr, "http_req_rate(0) gt 100", "http_req_rate(0) gt 3")
		for range 3 {
			join(t, "ws://"+addr+"/ws")
		}
		want503(t, "ws://"+addr+"/ws")
	})
}

// For each client nginx takes two of its worker_connections. Its log has the client, when the
// WebSocket ends.
func TestNginxTakesTwoConnectionsForEachClient(t *testing.T) {
	t.Parallel()
	const connections = 40
	addr := freeAddr(t)
	log := startNginx(t, addr, startServer(t, "localhost:0").addr,
		"worker_connections 400", fmt.Sprint("worker_connections ", connections))
	clients := 0
	for range connections {
		conn, _, err := anyCertificate.Dial("wss://"+addr+"/chat/ws", nil)
		if err != nil {
			break
		}
		defer conn.Close()
		clients++
	}
	if clients == 0 || clients > connections/2 {
		t.Errorf("%d clients connect, want at most half of %d", clients, connections)
	}
	log.wait(t, "worker_connections are not enough")
	if got := log.String(); strings.Contains(got, `"GET /chat/ws HTTP/1.1" 101`) {
		t.Errorf("nginx logs a WebSocket that has not ended:\n%s", got)
	}
}

// The server logs the proxy's address, whatever X-Forwarded-For says. HAProxy's log, in the
// format of README.md, has it beside the client's; nginx's has the client's.
func TestLogsOfProxiesTellTheClientsAddress(t *testing.T) {
	t.Parallel()
	for name, url := range map[string]string{"nginx": "wss://%s/chat/ws", "HAProxy": "ws://%s/ws"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			addr := freeAddr(t)
			s := startServer(t, "localhost:0")
			start := startHAProxyAlone
			if name == "nginx" {
				start = startNginx
			}
			log := start(t, addr, s.addr)
			forged := http.Header{"X-Forwarded-For": {"192.0.2.1"}}
			conn, _, err := fromElsewhere().Dial(fmt.Sprintf(url, addr), forged)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			sendBinary(t, conn, []byte("x"))
			wantEnd(t, conn, websocket.CloseUnsupportedData)
			conn.Close()
			logged := s.waitForLog(t, `(\S+): dropped`)
			if strings.Contains(s.log.String(), "192.0.2.1") || strings.HasPrefix(logged, "127.0.0.2:") {
				t.Errorf("the server logs %q, want the proxy's address", s.log)
			}
			if name == "nginx" {
				log.wait(t, `127.0.0.2 - - [`)
				log.wait(t, `"GET /chat/ws HTTP/1.1" 101`)
			} else {
				log.wait(t, conn.LocalAddr().String()+" is "+logged+": GET /ws HTTP/1.1 101 ")
			}
		})
	}
}

// HAProxy, with cluster/haproxy.cfg, takes a node out of rotation while it
// hangs or is disconnected from NATS.
func TestHAProxyBalancesOnlyToReadyNodes(t *testing.T) {
	t.Parallel()
	const clients = 20
	for _, trouble := range []struct {
		name             string
		breaks, restores func(t *testing.T, two *server, toNATS *forwarder)
	}{
		{"hangs",
			func(t *testing.T, two *server, _ *forwarder) { two.signal(t, syscall.SIGSTOP) },
			func(t *testing.T, two *server, _ *forwarder) { two.signal(t, syscall.SIGCONT) }},
		{"is disconnected from NATS",
			func(t *testing.T, two *server, toNATS *forwarder) {
				toNATS.cut()
				two.waitForLog(t, "disconnected from (NATS)")
			},
			func(_ *testing.T, _ *server, toNATS *forwarder) { toNATS.restore() }},
	} {
		t.Run(trouble.name, func(t *testing.T) {
			t.Parallel()
			nats := startNATS(t)
			toNATS := forward(t, nats)
			one, two := startNode(t, nats), startNode(t, toNATS.Addr().String())
			addr := freeAddr(t)
			haproxy := startHAProxy(t, addr, one.addr, two.addr)
			awaitListener(t, addr)
			reader := one.dial(t)
			reader.SetReadDeadline(time.Now().Add(patience))
			exchangeMessages := func() {
				t.Helper()
				for n := range clients {
					line := fmt.Sprint("from ", n)
					send(t, dial(t, websocket.DefaultDialer, "ws://"+addr+"/ws"), line)
					if _, got, err := reader.ReadMessage(); err != nil || string(got) != line {
						t.Fatalf("a client of the ready node reads %q and %v, want %q from a client behind the proxy", got, err, line)
					}
				}
			}
			trouble.breaks(t, two, toNATS)
			since := time.Now()
			haproxy.wait(t, "Server nodes/two is DOWN")
			t.Logf("HAProxy detected this after %v", time.Since(since))
			exchangeMessages()
			trouble.restores(t, two, toNATS)
			haproxy.wait(t, "Server nodes/two is UP")
			exchangeMessages()
			if got := two.log.String(); strings.Contains(got, "/ready") {
				t.Errorf("the node logs requests of /ready:\n%s", got)
			}
		})
	}
}

// buildCluster builds the program in cluster/, and returns its path.
var buildCluster = sync.OnceValues(func() (string, error) {
	path := binary + "-cluster"
	build := exec.Command("go", "build", "-o", path, ".")
	build.Dir = "../cluster"
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build: %v\n%s", err, out)
	}
	return path, nil
})

// startCluster starts the program in cluster/ with these arguments; the test's end kills
// it.
func startCluster(t *testing.T, args ...string) *server {
	t.Helper()
	path, err := buildCluster()
	if err != nil {
		t.Fatal(err)
	}
	return startCommand(t, exec.Command(path, append(args, "-addr", "127.0.0.1:0")...))
}

// startNATS starts a node with a NATS server of its own, and returns that server's
// address.
func startNATS(t *testing.T) (addr string) {
	t.Helper()
	return startCluster(t).waitForLog(t, `-nats nats://(\S+)`)
}

// startNode starts a node that connects to the NATS server at addr.
func startNode(t *testing.T, addr string) *server {
	t.Helper()
	return startCluster(t, "-nats", "nats://"+addr)
}

// startHAProxy starts HAProxy with cluster/haproxy.cfg, on addr, for two nodes.
func startHAProxy(t *testing.T, addr, one, two string) *output {
	t.Helper()
	text, err := os.ReadFile("../cluster/haproxy.cfg")
	if err != nil {
		t.Fatal(err)
	}
	config := replace(t, string(text), "bind :80", "bind "+addr)
	config = replace(t, config, "10.0.0.1:8080", one)
	config = replace(t, config, "10.0.0.2:8080", two)
	wantTimeout(t, config, `timeout tunnel +(\w+)`)
	return startProxy(t, "haproxy", config, "/usr/sbin/haproxy", "-db", "-f")
}

// A forwarder is a TCP proxy that a test can cut.
type forwarder struct {
	net.Listener
	mu    sync.Mutex
	isCut bool
	conns []net.Conn
}

// forward starts a forwarder to addr; the test's end stops it.
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

// cut closes all connections, and new ones until restore.
func (f *forwarder) cut() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.isCut = true
	for _, conn := range f.conns {
		conn.Close()
	}
	f.conns = nil
}

// restore forwards new connections again.
func (f *forwarder) restore() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.isCut = false
}

// wantTimeout checks that the timeout in config, the group of pattern, is longer than
// pingPeriod.
func wantTimeout(t *testing.T, config, pattern string) {
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
		t.Errorf("the proxy's timeout is %v, want more than the %v between two pings", limit, pingPeriod)
	}
}

// codeFrom returns the code in a Markdown file that starts with the line first, up to a line
// with less indentation.
func codeFrom(t *testing.T, file, first string) string {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	line := regexp.MustCompile(`(?m)^(    +)` + regexp.QuoteMeta(first) + "\n")
	match := line.FindSubmatchIndex(text)
	if match == nil {
		t.Fatalf("%s has no code that starts with %q", file, first)
	}
	indent, code := string(text[match[2]:match[3]]), string(text[match[1]:])
	var block strings.Builder
	block.WriteString(first + "\n")
	for line := range strings.Lines(code) {
		line, indented := strings.CutPrefix(line, indent)
		if !indented && line != "\n" {
			break
		}
		block.WriteString(line)
	}
	return block.String()
}

// replace replaces old, which text must contain once.
func replace(t *testing.T, text, old, new string) string {
	t.Helper()
	if got := strings.Count(text, old); got != 1 {
		t.Fatalf("got %q %d times, want once:\n%s", old, got, text)
	}
	return strings.Replace(text, old, new, 1)
}

// freeAddr returns an address on which no program listens.
func freeAddr(t testing.TB) string {
	t.Helper()
	listener, err := net.Listen("tcp", ownHost("localhost:0"))
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	return listener.Addr().String()
}

// startProxy runs a program of a Debian package in a temporary folder, until the test ends,
// and returns its output. The configuration file is its last argument.
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
		cmd.Process.Signal(os.Interrupt) // It then ends its workers, too.
		cmd.Wait()
		if t.Failed() {
			t.Logf("%s logs:\n%s", name, out)
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
			t.Fatalf("no output %q within %v:\n%s", text, patience, o)
		}
	}
}

// awaitListener waits until a program listens on addr.
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
