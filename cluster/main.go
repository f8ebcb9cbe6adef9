// Chat/cluster is the chat server for more than one machine: nodes that are
// joined by NATS are one room, and what anybody says, everybody hears.
//
// Usage:
//
//	cluster [-addr host:port] [-nats url,...] [-creds file] [-subject name]
//
// Each node serves a page for browsers at /, the WebSocket endpoint at /ws, and
// at /ready what a load balancer asks: whether the node can take clients. It
// listens once it has joined the others. Without -nats it starts a NATS server
// of its own, on a loopback port, and logs how a second node joins; that is for
// trying it, as the room then lives no longer than this node. SIGINT or SIGTERM
// sends the node's clients away, hands what they have said to NATS, and ends the
// node with status 0; a second one ends it at once.
//
// hub.go, client.go and home.html are those of the chat server for one machine,
// to the byte; relay.go is what joins its hub to NATS, and nats.go what reaches
// NATS. This file repeats much of that server's main.go, because a package main
// cannot be imported, and what a Relay needs stands in the midst of main, run and
// serve. A test fails when the part about the page, at the end, is not the same.
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
	ctx, cancel := context.WithCancel(context.Background())
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	go func() {
		<-signals
		cancel()
		<-signals // A second one ends the process at once.
		os.Exit(1)
	}()
	if err := run(ctx, *addr, *urls, *creds, *subject); err != nil {
		log.Fatal(err)
	}
}

// run serves chat on addr, in the room that is called subject, until ctx is
// done. It returns an error if it cannot join the room, and if it cannot listen
// there, or no longer can.
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
	// Listen only now: whoever is connected can say and hear something.
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

// serve serves chat to those who connect to listener, until ctx is done, listener
// fails, or NATS sends the node away for good. Then it has the hub send everybody
// away, and when they have gone, after shutdownWait at the latest, it has the relay
// leave.
func serve(ctx context.Context, listener net.Listener, relay *Relay) error {
	hub := relay.hub
	empty := make(chan struct{})
	go func() { hub.run(); close(empty) }()

	mux := http.NewServeMux()
	mux.HandleFunc("/", serveHome)
	mux.HandleFunc("/ws", func(w http.ResponseWriter, r *http.Request) {
		if relay.full.Load() { // What they say would have to wait here, also when they have gone.
			http.Error(w, "too much waits for NATS", http.StatusServiceUnavailable)
			return
		}
		serveWs(relay.front, w, r)
	})
	mux.HandleFunc("/ready", func(w http.ResponseWriter, r *http.Request) { serveReady(relay, w) })
	server := &http.Server{
		Handler:        mux,
		ReadTimeout:    pageTimeout,
		WriteTimeout:   pageTimeout,
		MaxHeaderBytes: maxHeaderSize,
	}
	context.AfterFunc(ctx, func() { server.Close() }) // WebSockets are the hub's to close.
	// NATS is sought without end, but for a few errors after which nats.go gives up.
	relay.nc.SetClosedHandler(func(*nats.Conn) { server.Close() })
	if relay.nc.IsClosed() { // before the handler was set
		server.Close()
	}
	err := server.Serve(listener)
	if err == http.ErrServerClosed {
		err = nil
		if relay.nc.IsClosed() {
			err = fmt.Errorf("NATS has sent this node away for good: %w", relay.nc.LastError())
		}
	}

	hub.stop()
	logSoon("shutting down")
	select {
	case <-empty:
	case <-time.After(shutdownWait):
		logSoon("leaving clients behind that do not close within %v", shutdownWait)
	}
	relay.leave()
	return err
}

// serveReady tells a load balancer whether this node can take clients: not while
// they would hear nothing. Load balancers ask often, so that it logs nothing.
func serveReady(relay *Relay, w http.ResponseWriter) {
	if relay.ready.Load() {
		io.WriteString(w, "ready\n")
	} else {
		http.Error(w, "NATS is away, does not bring back what this node says, or accepts only what is shorter", http.StatusServiceUnavailable)
	}
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
