// Cluster is the chat server for more than one machine: several nodes, joined by NATS, are
// one room.
//
// Usage:
//
//	cluster [-addr host:port] [-nats url,...] [-creds file] [-subject name]
//
// Each node serves a page for browsers at /, the WebSocket endpoint at /ws, and a readiness
// probe at /ready. It listens once it has joined the room. Without -nats it starts a NATS
// server of its own on a loopback port, for trying it out, and logs how a second node joins.
// SIGINT or SIGTERM starts a graceful shutdown: the node closes its clients' connections,
// publishes what they have sent, and exits with status 0; a second signal forces it to exit.
//
// hub.go, client.go and home.html are copies of the chat server's; relay.go joins the hub to
// NATS, and nats.go connects to NATS. This file repeats much of that server's main.go, as a
// package main cannot be imported. Tests fail if the copies differ.
package main

//go:generate cp ../hub.go ../client.go ../home.html .

import (
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/nats-io/nats.go"
)

const (
	// Time allowed to read a request, to write its response, and between two requests. It
	// does not apply to WebSocket connections.
	httpTimeout = 10 * time.Second

	// Maximum size in bytes of a request header, which also bounds the URLs in the log.
	// (net/http allows 4 KiB more.)
	maxHeaderSize = 16 << 10

	// Time allowed for all clients to disconnect during a graceful shutdown: less than the
	// ten seconds that docker stop allows by default.
	shutdownWait = 8 * time.Second

	// Longest time that startup and shutdown wait for a write to the log.
	logWait = 100 * time.Millisecond
)

var (
	addr    = flag.String("addr", ":8080", "listen on `host:port`")
	urls    = flag.String("nats", "", "join the room at the NATS servers `url,...` (default: an embedded server)")
	creds   = flag.String("creds", "", "authenticate to NATS with the credentials `file`")
	subject = flag.String("subject", "chat", "the room's `name`: the NATS subject it talks on")
)

//go:embed home.html
var home string

func main() {
	if flag.Parse(); flag.NArg() > 0 {
		flag.Usage()
		os.Exit(2)
	}
	// Otherwise a write to stderr after its reader has exited would end the process.
	signal.Ignore(syscall.SIGPIPE)
	ctx, cancel := context.WithCancel(context.Background())
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	go func() {
		<-signals
		cancel()
		<-signals
		os.Exit(1)
	}()
	if err := run(ctx, *addr, *urls, *creds, *subject); err != nil {
		log.Fatal(err)
	}
}

// run joins the room of that subject and serves it on addr until ctx is done. It returns an
// error if it cannot join the room, or if listening fails, at once or later.
func run(ctx context.Context, addr, urls, creds, subject string) error {
	embedded := urls == ""
	if embedded {
		nats, err := startNATS()
		if err != nil {
			return err
		}
		defer nats.Shutdown()
		urls = nats.ClientURL()
	}
	nc, err := connect(urls, creds)
	if err != nil {
		return err
	}
	defer nc.Close()
	relay, err := join(newHub(), nc, subject, log.Default())
	if err != nil {
		return err
	}
	// Listen only now, when clients can send and receive.
	listener, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	if embedded {
		log.Printf("started a NATS server; a second node joins with: go run . -addr :%d -nats %s -subject %s",
			listener.Addr().(*net.TCPAddr).Port+1, urls, subject)
	}
	host, port, _ := net.SplitHostPort(listener.Addr().String())
	if net.ParseIP(host).IsUnspecified() {
		host = "localhost"
	}
	logSoon("listening on http://%s/", net.JoinHostPort(host, port))
	return serve(ctx, listener, relay)
}

// serve accepts connections on listener until ctx is done, listener fails, or the
// connection to NATS is closed for good. Then it stops the hub, waits up to shutdownWait
// for all clients to disconnect, and stops the relay.
func serve(ctx context.Context, listener net.Listener, relay *Relay) error {
	hub := relay.hub
	disconnected := make(chan struct{})
	go func() { hub.run(); close(disconnected) }()

	mux := http.NewServeMux()
	mux.HandleFunc("/", serveHome)
	mux.HandleFunc("/ws", func(w http.ResponseWriter, r *http.Request) {
		if relay.full.Load() { // Their messages would be queued here, too.
			http.Error(w, "too many messages are queued for NATS", http.StatusServiceUnavailable)
			return
		}
		serveWs(relay.front, w, r)
	})
	mux.HandleFunc("/ready", func(w http.ResponseWriter, r *http.Request) { serveReady(relay, w) })
	server := &http.Server{
		Handler:        mux,
		ReadTimeout:    httpTimeout,
		WriteTimeout:   httpTimeout,
		MaxHeaderBytes: maxHeaderSize,
	}
	context.AfterFunc(ctx, func() { server.Close() }) // This does not close WebSockets: the hub does.
	// nats.go reconnects without limit, except after a few fatal errors.
	relay.nc.SetClosedHandler(func(*nats.Conn) { server.Close() })
	if relay.nc.IsClosed() { // before the handler was set
		server.Close()
	}
	err := server.Serve(listener)
	if err == http.ErrServerClosed {
		err = nil
		if relay.nc.IsClosed() {
			err = fmt.Errorf("NATS has closed the connection for good: %w", relay.nc.LastError())
		}
	}

	hub.stop()
	logSoon("shutting down")
	select {
	case <-disconnected:
	case <-time.After(shutdownWait):
		logSoon("exiting: some clients are still connected after %v", shutdownWait)
	}
	relay.leave()
	return err
}

// serveReady is the readiness probe: 200 while this node receives its own messages from
// NATS. It logs nothing, as load balancers call it often.
func serveReady(relay *Relay, w http.ResponseWriter) {
	if relay.ready.Load() {
		io.WriteString(w, "ready\n")
	} else {
		http.Error(w, "disconnected from NATS, no echo of this node's messages, or max_payload too small", http.StatusServiceUnavailable)
	}
}

// logSoon logs like log.Printf, but waits at most logWait. Writes to a log can block: in a
// Windows console, for example, while text is selected.
func logSoon(format string, args ...any) {
	logged := make(chan struct{})
	go func() { log.Printf(format, args...); close(logged) }()
	select {
	case <-logged:
	case <-time.After(logWait):
	}
}

// contentSecurityPolicy allows the page its own script and style, by their hashes, its
// icon, and connections to its own server. In Safari before 16, 'self' does not include
// WebSockets, so the policy also lists ws: and wss:. https://www.w3.org/TR/CSP3/
var contentSecurityPolicy = "default-src 'none'; script-src " + hashSource("script") +
	"; style-src " + hashSource("style") + "; img-src data:; connect-src 'self' ws: wss:" +
	"; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

// hashSource returns the CSP hash source for the content of the only element of that
// name in home. Browsers normalize \r\n, which git may have made, to \n before hashing.
func hashSource(element string) string {
	_, content, _ := strings.Cut(strings.ReplaceAll(home, "\r\n", "\n"), "<"+element)
	_, content, _ = strings.Cut(content, ">")
	content, _, _ = strings.Cut(content, "</"+element+">")
	hash := sha256.Sum256([]byte(content))
	return "'sha256-" + base64.StdEncoding.EncodeToString(hash[:]) + "'"
}

// serveHome serves the page at /, and an error at every other path.
func serveHome(w http.ResponseWriter, r *http.Request) {
	log.Printf("%s: %s %q", r.RemoteAddr, excerpt(r.Method), excerpt(r.URL.String()))
	switch {
	case r.URL.Path != "/":
		http.NotFound(w, r)
	case r.Method != http.MethodGet && r.Method != http.MethodHead:
		w.Header().Set("Allow", "GET, HEAD")
		http.Error(w, "method not allowed", http.StatusMethodNotAllowed)
	default:
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		w.Header().Set("X-Content-Type-Options", "nosniff")
		w.Header().Set("Content-Security-Policy", contentSecurityPolicy)
		w.Write([]byte(home))
	}
}
