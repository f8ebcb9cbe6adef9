// From ../main.go by go generate. If you edit this copy, run make diffs.

package main

import (
	"cmp"
	"context"
	_ "embed"
	"errors"
	"flag"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
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

var addr = flag.String("addr", "localhost:8080", "listen on `host:port`")
var dbFile = flag.String("db", "rooms.db", "keep rooms, history and the cookie key in `file`")
var secure = flag.Bool("secure", false, "set cookies that browsers send over HTTPS only")

//go:embed login.html
var login string

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

// run opens the database, listens on addr and serves until ctx is done, or until the
// database's file is deleted or replaced. It returns http.ErrServerClosed, or the error if
// one of these fails, or if it cannot save what is queued for the database.
func run(ctx context.Context, addr string) (err error) {
	key := os.Getenv("CHAT_KEY")
	if key != "" && len(key) < 32 {
		return errors.New("CHAT_KEY has fewer than 32 bytes, so cookies could be forged")
	}
	store, err := openStore(*dbFile)
	if err != nil {
		return err
	}
	defer func() { err = cmp.Or(store.close(), err) }()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go store.db.watch(ctx, cancel)
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
	return serve(ctx, listener, newRooms(cmp.Or(key, store.key), store))
}

// serve accepts connections on listener until ctx is done or listener fails. Then it
// stops the hubs, and waits up to shutdownWait for all clients to disconnect. It returns
// http.ErrServerClosed, or the listener's error.
func serve(ctx context.Context, listener net.Listener, rooms *Rooms) error {
	server := &http.Server{
		Handler:        rooms.handler(),
		ReadTimeout:    httpTimeout,
		WriteTimeout:   httpTimeout,
		IdleTimeout:    idleTimeout,
		MaxHeaderBytes: 16 << 10, // net/http allows 4 KiB more.
	}
	// This does not close WebSockets: the hubs do.
	context.AfterFunc(ctx, func() { server.Close() })
	err := server.Serve(listener)

	disconnected := make(chan struct{})
	go func() { rooms.stop(); close(disconnected) }()
	logSoon("shutting down")
	select {
	case <-disconnected:
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
