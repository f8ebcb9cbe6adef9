package main

import (
	"cmp"
	"context"
	"crypto/rand"
	_ "embed"
	"flag"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
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

var addr = flag.String("addr", "localhost:8080", "listen on `host:port`")

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
// listener fails. Then it has the hubs send everybody away, and returns when they
// have gone, after shutdownWait at the latest.
func serve(ctx context.Context, listener net.Listener) error {
	rooms := newRooms(cmp.Or(os.Getenv("CHAT_KEY"), rand.Text()))
	server := &http.Server{
		Handler:        rooms.handler(),
		ReadTimeout:    pageTimeout,
		WriteTimeout:   pageTimeout,
		MaxHeaderBytes: maxHeaderSize,
	}
	context.AfterFunc(ctx, func() { server.Close() }) // WebSockets are the hubs' to close.
	err := server.Serve(listener)
	if err == http.ErrServerClosed {
		err = nil
	}

	empty := make(chan struct{})
	go func() { rooms.stop(); close(empty) }()
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
