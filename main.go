// Chat is a WebSocket chat server: what anybody says, everybody hears.
//
// Usage:
//
//	chat [-addr host:port]
//
// It serves a page for browsers at / and the WebSocket endpoint at /ws. One
// text message there is one line of chat. SIGINT or SIGTERM sends everybody
// home and ends it with status 0; a second one ends it at once.
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

// pageTimeout is the time allowed for each of these: to send a request, to take the
// answer, and to send the next request. Without it, who sends nothing would hold a
// connection for ever.
const pageTimeout = 10 * time.Second

// maxHeaderSize is the maximum size in bytes of a request's header, which includes
// its URL, which goes into the log. (net/http lets pass 4 KiB more.)
const maxHeaderSize = 16 << 10

// shutdownWait is the time allowed to everybody together to leave when the server
// shuts down.
const shutdownWait = 5 * time.Second

// logWait is the time allowed to the log when the server starts and shuts down.
const logWait = 100 * time.Millisecond

var addr = flag.String("addr", ":8080", "listen on `host:port`")

//go:embed home.html
var home string

func main() {
	if flag.Parse(); flag.NArg() > 0 {
		flag.Usage()
		os.Exit(2)
	}
	ctx, cancel := context.WithCancel(context.Background())
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	go func() {
		<-signals
		cancel()
		<-signals // A second one ends the process at once.
		os.Exit(1)
	}()
	if err := run(ctx, *addr); err != nil {
		log.Fatal(err)
	}
}

// run serves chat on addr until ctx is done. It returns an error if it cannot
// listen there, or no longer can.
func run(ctx context.Context, addr string) error {
	listener, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	host, port, _ := net.SplitHostPort(listener.Addr().String())
	if net.ParseIP(host).IsUnspecified() {
		host = "localhost"
	}
	logSoon("listening on http://%s/", net.JoinHostPort(host, port))
	return serve(ctx, listener)
}

// serve serves chat to those who connect to listener, until ctx is done or
// listener fails. Then it has the hub send everybody away, and returns when they
// have gone, after shutdownWait at the latest.
func serve(ctx context.Context, listener net.Listener) error {
	hub := newHub()
	empty := make(chan struct{})
	go func() { hub.run(); close(empty) }()

	mux := http.NewServeMux()
	mux.HandleFunc("/", serveHome)
	mux.HandleFunc("/ws", func(w http.ResponseWriter, r *http.Request) { serveWs(hub, w, r) })
	server := &http.Server{
		Handler:        mux,
		ReadTimeout:    pageTimeout,
		WriteTimeout:   pageTimeout,
		MaxHeaderBytes: maxHeaderSize,
	}
	context.AfterFunc(ctx, func() { server.Close() }) // WebSockets are the hub's to close.
	err := server.Serve(listener)
	if err == http.ErrServerClosed {
		err = nil
	}

	hub.stop()
	logSoon("shutting down")
	select {
	case <-empty:
	case <-time.After(shutdownWait):
		logSoon("leaving clients behind that do not close within %v", shutdownWait)
	}
	return err
}

// logSoon logs like log.Printf, but waits for that no longer than logWait. A log that
// nobody reads can be stuck: so is a Windows console in which text is selected.
func logSoon(format string, args ...any) {
	logged := make(chan struct{})
	go func() { log.Printf(format, args...); close(logged) }()
	select {
	case <-logged:
	case <-time.After(logWait):
	}
}

// contentSecurityPolicy allows the page its own script and style, by their hashes,
// the icon in it, its own server, and WebSockets to any server; nothing else. In
// Safari before 16, 'self' does not include WebSockets, so their schemes are named.
// Only the page's own script can open one. https://www.w3.org/TR/CSP3/
var contentSecurityPolicy = "default-src 'none'; script-src " + hashSource("script") +
	"; style-src " + hashSource("style") + "; img-src data:; connect-src 'self' ws: wss:" +
	"; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

// hashSource returns the CSP hash source of what stands in home's one element
// of that name. Browsers hash it with the line ends \n, also if git has made these
// \r\n.
func hashSource(element string) string {
	_, content, _ := strings.Cut(strings.ReplaceAll(home, "\r\n", "\n"), "<"+element+">")
	content, _, _ = strings.Cut(content, "</"+element+">")
	hash := sha256.Sum256([]byte(content))
	return "'sha256-" + base64.StdEncoding.EncodeToString(hash[:]) + "'"
}

// serveHome answers with the page at /, and with an error elsewhere.
func serveHome(w http.ResponseWriter, r *http.Request) {
	log.Printf("%s: %s %q", r.RemoteAddr, r.Method, r.URL)
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
