// Chat is a WebSocket chat server: each message goes to every connected client.
//
// Usage:
//
//	chat [-addr host:port]
//
// It serves a page for browsers at / and the WebSocket endpoint at /ws, where one text
// message is one line of chat. SIGINT, SIGTERM or SIGHUP starts a graceful shutdown, which
// ends the process with status 0; another one, a second later, ends it at once.
package main

import (
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"flag"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"
)

const (
	// Time allowed to read a request, and to write its response; not of a WebSocket.
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

var addr = flag.String("addr", ":8080", "listen on `host:port`")

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
	if err := run(ctx, *addr); err != nil && err != http.ErrServerClosed {
		log.Fatal(err)
	}
}

// run listens on addr and serves until ctx is done. It returns http.ErrServerClosed, or the
// error if listening fails, at once or later.
func run(ctx context.Context, addr string) error {
	listener, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	host, port, _ := net.SplitHostPort(listener.Addr().String())
	scope := ""
	if net.ParseIP(host).IsUnspecified() {
		host, scope = "localhost", " (all interfaces)"
	}
	logSoon("listening on http://%s/%s", net.JoinHostPort(host, port), scope)
	return serve(ctx, listener)
}

// serve accepts connections on listener until ctx is done or listener fails. Then it
// stops the hub, and waits up to shutdownWait for all clients to disconnect. It returns
// http.ErrServerClosed, or the listener's error.
func serve(ctx context.Context, listener net.Listener) error {
	hub := newHub()
	go hub.run()

	mux := http.NewServeMux()
	mux.HandleFunc("/", serveHome)
	mux.HandleFunc("/ws", func(w http.ResponseWriter, r *http.Request) { serveWs(hub, w, r) })
	server := &http.Server{
		Handler:        mux,
		ReadTimeout:    httpTimeout,
		WriteTimeout:   httpTimeout,
		IdleTimeout:    idleTimeout,
		MaxHeaderBytes: 16 << 10, // net/http allows 4 KiB more.
	}
	// This does not close WebSockets: the hub does.
	context.AfterFunc(ctx, func() { server.Close() })
	err := server.Serve(listener)

	hub.stop()
	logSoon("shutting down")
	select {
	case <-hub.ended:
	case <-time.After(shutdownWait):
		logSoon("exiting: some clients are still connected after %v", shutdownWait)
	}
	return err
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
