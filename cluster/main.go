// Cluster is the chat server for more than one machine: several nodes, joined by NATS, are
// one room.
//
// Usage:
//
//	cluster [-addr host:port] [-nats url,...] [-creds file] [-password file] [-subject name]
//
// Each node serves a page for browsers at /, the WebSocket endpoint at /ws, a readiness probe
// at /ready, and metrics for Prometheus at /metrics. It accepts clients once it has joined the
// room, and retries until then. Without -nats it starts a NATS server of its own on a loopback
// port, for trying it out, and logs how a second node joins.
// SIGINT, SIGTERM or SIGHUP starts a graceful shutdown: the node closes its clients'
// connections, publishes what it has read from them, and exits with status 0; a second signal
// ends it at once.
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
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"
)

// embedded is the value of -nats for which the node starts a NATS server of its own.
const embedded = "embedded"

const (
	// Time allowed to read a request, and to write its response. It does not apply to
	// WebSocket connections.
	httpTimeout = 10 * time.Second

	// Time allowed between two requests on a connection: longer than the idle timeout of load
	// balancers, which answer 502 if the server closes first (60 s in AWS).
	idleTimeout = 75 * time.Second

	// Time allowed for all clients to disconnect during a graceful shutdown: less than the
	// ten seconds that docker stop allows by default.
	shutdownWait = 8 * time.Second

	// Time from the first signal until the next one ends the process by its default action:
	// coreutils' timeout sends SIGTERM twice at the same moment.
	forceAfter = time.Second

	// Longest time that startup and shutdown wait for a write to the log.
	logWait = 100 * time.Millisecond
)

var (
	addr     = flag.String("addr", ":8080", "listen on `host:port`")
	urls     = flag.String("nats", embedded, "join the room at the NATS servers `url,...`")
	creds    = flag.String("creds", "", "authenticate to NATS with the credentials `file`")
	password = flag.String("password", "", "log in as the URLs' user with the password `file`")
	subject  = flag.String("subject", "chat", "the room's `name`: the NATS subject it talks on")
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
	signals := []os.Signal{os.Interrupt, syscall.SIGTERM}
	if !signal.Ignored(syscall.SIGHUP) { // as under nohup
		signals = append(signals, syscall.SIGHUP)
	}
	ctx, restore := signal.NotifyContext(context.Background(), signals...)
	context.AfterFunc(ctx, func() { time.Sleep(forceAfter); restore() })
	err := run(ctx, *addr, *urls, *creds, *password, *subject)
	if err != nil && err != http.ErrServerClosed {
		log.Fatal(err)
	}
}

// run listens on addr, joins the room of that subject, and serves it until ctx is done. It
// returns http.ErrServerClosed, or the error if a flag is wrong, or if listening fails, at once
// or later.
func run(ctx context.Context, addr, urls, creds, password, subject string) error {
	listener, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	isEmbedded := urls == embedded
	if isEmbedded {
		nats, err := startNATS()
		if err != nil {
			return err
		}
		defer nats.Shutdown()
		urls = nats.ClientURL()
	}
	options, err := natsOptions(urls, creds, password)
	if err != nil {
		return err
	}
	relay, err := join(newHub(), options, subject, log.Default())
	if err != nil {
		return err
	}
	if isEmbedded {
		logSoon("started a NATS server; a second node joins with: "+
			"go run . -addr :%d -nats %s -subject %s",
			listener.Addr().(*net.TCPAddr).Port+1, urls, subject)
	}
	return serve(ctx, listener, relay)
}

// serve accepts connections on listener until ctx is done or listener fails. Then it stops
// the hub, waits up to shutdownWait for all clients to disconnect, and stops the relay. It
// returns http.ErrServerClosed, or the listener's error.
func serve(ctx context.Context, listener net.Listener, relay *Relay) error {
	hub := relay.hub
	// The hub that clients use shares its channels and maps, except for broadcast, and no other
	// fields. So in an application clients use the hub itself: README.md shows how.
	proxyHub := *hub
	proxyHub.broadcast = relay.broadcast

	go hub.run()
	go func() {
		select {
		case <-relay.joined:
			host, port, _ := net.SplitHostPort(listener.Addr().String())
			scope := ""
			if net.ParseIP(host).IsUnspecified() {
				host, scope = "localhost", " (all interfaces)"
			}
			log.Printf("listening on http://%s/%s", net.JoinHostPort(host, port), scope)
		case <-hub.stopped:
		}
	}()

	mux := http.NewServeMux()
	mux.HandleFunc("/", serveHome)
	mux.HandleFunc("/ws", func(w http.ResponseWriter, r *http.Request) {
		if !relay.hasJoined.Load() {
			http.Error(w, "this node has not joined the room yet", http.StatusServiceUnavailable)
			return
		}
		if relay.queued.Load() >= outgoingSize { // Their messages would be queued here, too.
			http.Error(w, "too many messages are queued for NATS", http.StatusServiceUnavailable)
			return
		}
		serveWs(&proxyHub, w, r)
	})
	mux.HandleFunc("/ready", func(w http.ResponseWriter, r *http.Request) { serveReady(relay, w) })
	mux.Handle("/metrics", relay.metrics.handler)
	server := &http.Server{
		Handler:        mux,
		ReadTimeout:    httpTimeout,
		WriteTimeout:   httpTimeout,
		IdleTimeout:    idleTimeout,
		MaxHeaderBytes: 16 << 10, // net/http allows 4 KiB more.
	}
	context.AfterFunc(ctx, func() { server.Close() }) // The hub closes WebSockets, Close does not.
	err := server.Serve(listener)

	hub.stop()
	logSoon("shutting down")
	select {
	case <-hub.ended:
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
		fmt.Fprintf(w, "ready: messages of %d nodes arrive, this one included\n",
			relay.heard.Load())
	} else {
		http.Error(w, "this node's messages do not come back from NATS: the log has the reason",
			http.StatusServiceUnavailable)
	}
}

// logSoon logs like log.Printf, but waits at most logWait. Writes to a log can block: in a
// Windows console, for example, while text is selected.
func logSoon(format string, args ...any) {
	ctx, cancel := context.WithTimeout(context.Background(), logWait)
	go func() { log.Printf(format, args...); cancel() }()
	<-ctx.Done()
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
