// From ../client.go by go generate. If you edit this copy, run make diffs.

// SPDX-License-Identifier: 0BSD

package main

import (
	"bufio"
	"bytes"
	"cmp"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/gorilla/websocket"
)

const (
	// Time allowed to write one frame to the peer.
	writeWait = 10 * time.Second

	// Time allowed for the next message or control frame from the peer, and for a message to
	// finish once it has begun.
	pongWait = 60 * time.Second

	// Time between two pings to the peer. Must be less than pongWait.
	pingPeriod = pongWait * 9 / 10

	// Time allowed for the peer to answer the close frame. With one second, busy peers lost it.
	closeWait = 5 * time.Second

	// Maximum size in bytes of a message from the peer, also stated in home.html.
	maxMessageSize = 512

	// Maximum size in bytes of a batch of messages to the peer: below 32 KiB, the default read
	// limit of common clients. A larger message is a frame of its own. 0 turns batching off.
	maxBatchSize = 32<<10 - 1

	// Number of messages that may be queued for a peer. One more, and the hub drops it.
	sendQueueSize = 256

	// The rate limit for messages and control frames from a peer is a token bucket: a burst of
	// rateBurst, then one per rateInterval. A burst fills at most half of a queue, and 100 a
	// second is more than people type. Shorten rateInterval for programs, such as games.
	rateBurst    = sendQueueSize / 2
	rateInterval = 10 * time.Millisecond

	// A client with this URL parameter or subprotocol also gets an empty text message with each
	// ping: a browser's script cannot see pings, and so could not notice a half-open connection.
	heartbeat = "heartbeat"
)

var newline = []byte{'\n'}

// Reasons for which the server closes connections: a close code (RFC 6455 section 7.4) and a
// text. Codes from 4000 to 4999 are free for applications.
var (
	errShuttingDown = closeError(1001, "server shutting down")
	errUnregistered = closeError(1000, "closed by the server")
	errBinary       = closeError(1003, "binary messages are not supported")
	errInvalidUTF8  = closeError(1007, "message is not valid UTF-8")
	errTooBig       = closeError(1009, "message exceeds %d bytes", maxMessageSize)
	errTimeout      = closeError(1008, "no pong, or no complete message, for %v", pongWait)
	errSlowClient   = closeError(1013, "slow client: %d messages queued", sendQueueSize)
)

func closeError(code int, format string, args ...any) *websocket.CloseError {
	return &websocket.CloseError{Code: code, Text: fmt.Sprintf(format, args...)}
}

// Each connection keeps a read buffer; write buffers are pooled, and hold a whole batch. Add
// your own subprotocols here, not to Upgrade's argument. A peer gets one: yours, or heartbeat.
var upgrader = websocket.Upgrader{
	ReadBufferSize:  512,
	WriteBufferSize: maxBatchSize,
	WriteBufferPool: new(sync.Pool),
	Subprotocols:    []string{heartbeat},
}

// A Client connects one WebSocket peer to the hub. Its life:
//
//  1. serve upgrades the connection, registers the client, and starts both pumps.
//  2. The hub (drop) or a pump finds a reason to end the client. The first one wins.
//  3. Hub.run removes the client from the hub and closes send (drop).
//  4. writePump writes the queued messages, then the close frame (writeClose). To a
//     protocol violation, gorilla/websocket itself has already written one.
//  5. readPump reads on until the peer has answered, for at most closeWait.
//  6. writePump closes conn, and tells Hub.run that the client is done (finish).
//
// If a write fails, the client stays registered for at most closeWait, as readPump may still
// read what the peer has sent, such as a close frame. Then steps 2, 3 and 6 follow.
type Client struct {
	request JoinRequest
	user    *User // owned by run: set when the client has joined

	// Set before the pumps start, by serve or by the application, whose fields may follow.
	hub  *Hub
	conn *websocket.Conn

	// From run to writePump; drop closes it. To send to this client, call tell, or queue on
	// run's goroutine: a direct send panics, and ends the process, once it is closed.
	send chan []byte

	heartbeat bool // the URL asks for it; set by serve

	// Owned by run: the client has been registered, or has ended before. It must not be
	// registered again, as send may be closed. (reason is set earlier, so it does not tell.)
	registered bool

	// The reason for closing the connection. The first one set wins.
	reason atomic.Pointer[websocket.CloseError]

	// Owned by readPump:
	bucketFullAt time.Time // when the token bucket of the rate limit is full again
	logged       sync.Once // to log once that the rate limit delays this client
	receiving    bool      // a message has begun and is not complete

	// Owned by writePump: reason was set when the last write returned.
	ending bool

	// For readEnd:
	readEndOnce sync.Once
	readEndChan chan *websocket.CloseError
}

// serveWs serves a WebSocket peer as a client of hub.
func serveWs(hub *Hub, w http.ResponseWriter, r *http.Request) {
	(&Client{hub: hub}).serve(w, r)
}

// serve upgrades the request to a WebSocket connection, registers the client, starts the pumps
// and returns. Set hub, and the application's fields, before. If the handshake fails, or the hub
// has been stopped, serve has answered that. The handshake response is delayed until the client
// is registered: a peer that knows it is connected misses no message.
func (c *Client) serve(w http.ResponseWriter, r *http.Request) {
	select {
	case <-c.hub.stopped:
		http.Error(w, "server shutting down", http.StatusServiceUnavailable)
		return
	default:
	}
	conn, err := upgrader.Upgrade(delayedHandshake{w}, r, nil)
	if err != nil {
		log.Printf("%s: handshake refused: %q (Origin %q, Host %q)", r.RemoteAddr, err,
			excerpt(r.Header.Get("Origin")), excerpt(r.Host))
		return
	}
	c.conn, c.send = conn, make(chan []byte, sendQueueSize)
	c.heartbeat = r.URL.Query().Has(heartbeat)
	c.hub.passToRun(c.hub.register, c)
	if delayed, ok := conn.NetConn().(*delayedConn); ok {
		delayed.answer() // Later, in readPump, it would take a larger stack.
	}
	go c.writePump()
	go c.readPump()
}

// handle does what the application does with a line from the peer. readPump calls it, so it
// may call tell, do, hub.do and end, and send to broadcast. It may block: that delays this
// client's input, and run's return after stop. It may keep line, and change it.
func (c *Client) handle(line []byte) {
	// APPLICATION: the peer has sent line. Replace what follows.
	c.do(func() { c.hub.receive(c, string(line)) })
}

// receive handles the message in r as one clean line, unless it is blank or the client has a
// reason to end. It returns read errors only. (SetReadLimit would close without a text.)
func (c *Client) receive(messageType int, r io.Reader) error {
	c.alive()
	c.limitRate()
	c.receiving = true
	message, err := io.ReadAll(io.LimitReader(r, maxMessageSize+1))
	c.receiving = err != nil
	line := clean(message)
	switch {
	case err != nil || c.reason.Load() != nil:
	case len(message) > maxMessageSize:
		c.end(errTooBig)
	case messageType != websocket.TextMessage:
		c.end(errBinary)
	case !utf8.Valid(message):
		c.end(errInvalidUTF8)
	case len(line) > 0:
		c.handle(line)
	}
	return err
}

// clean returns message as one line of valid UTF-8. Control characters, which end lines and
// drive terminals, become spaces; invalid UTF-8 becomes U+FFFD; white space around it is
// trimmed. Clean the application's own messages too: browsers close on invalid UTF-8.
func clean(message []byte) []byte {
	return bytes.TrimSpace(bytes.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, message))
}

// writeBatch writes message in one frame, with those queued behind it that fit into
// maxBatchSize: the peer splits it at newlines. The message that does not fit goes to next.
func (c *Client) writeBatch(message []byte, next chan []byte) error {
	if len(message) >= maxBatchSize {
		return c.conn.WriteMessage(websocket.TextMessage, message)
	}
	w, err := c.conn.NextWriter(websocket.TextMessage)
	if err != nil {
		return err
	}
	w.Write(message)
	for size := len(message); len(c.send) > 0; {
		message = <-c.send
		if size += len(newline) + len(message); size > maxBatchSize {
			next <- message
			break
		}
		w.Write(newline)
		w.Write(message)
	}
	return w.Close()
}

// An application need not change what follows.

// tell queues message for this client alone, as queue does. Any goroutine but run's may call it.
func (c *Client) tell(message []byte) (queued bool) {
	c.hub.do(func() { queued = c.hub.queue(c, message) })
	return queued
}

// do is hub.do for what concerns this client: it returns false, without running f, unless
// the client is registered. So f never runs after the cleanup of a client.
func (c *Client) do(f func()) (ran bool) {
	c.hub.do(func() {
		if ran = c.hub.clients[c]; ran {
			f()
		}
	})
	return ran
}

// end asks run to drop the client. Any goroutine may call it once the pumps have started,
// except run's, which calls drop.
func (c *Client) end(reason *websocket.CloseError) {
	c.reason.CompareAndSwap(nil, sendable(reason))
	c.hub.passToRun(c.hub.unregister, c)
}

// sendable replaces a reason whose close code must not be sent: RFC 6455 section 7.4.
func sendable(reason *websocket.CloseError) *websocket.CloseError {
	if reason == nil || reason.Code < 1000 || reason.Code > 4999 ||
		1004 <= reason.Code && reason.Code <= 1006 || 1015 <= reason.Code && reason.Code < 3000 {
		return closeError(1011, "%v", reason)
	}
	return reason
}

// readPump does all reads on conn, until one fails, as when finish has closed conn. It is kept
// small: an idle client's stack is 2 KiB. A client ends only if both pumps were started.
func (c *Client) readPump() {
	if !c.hub.passToRun(c.hub.opened, c) {
		c.reason.CompareAndSwap(nil, errShuttingDown)
		close(c.send) // No run is left to do it.
	}
	c.conn.SetPingHandler(func(data string) error {
		c.alive()
		c.limitRate()
		if c.reason.Load() == nil { // Later, its own deadline would prolong the end.
			// Ignore the error: after a failed write, writePump fails too.
			c.conn.WriteControl(websocket.PongMessage, []byte(data), time.Now().Add(writeWait))
		}
		return nil
	})
	c.conn.SetPongHandler(func(string) error { c.alive(); c.limitRate(); return nil })
	// writePump answers a close frame, after what is queued.
	c.conn.SetCloseHandler(func(int, string) error { return nil })
	for {
		c.alive() // The hub may have been slow to receive the last message.
		messageType, r, err := c.conn.NextReader()
		if err == nil {
			err = c.receive(messageType, r)
		}
		if err != nil {
			c.stopReading(err)
			return
		}
	}
}

// alive allows the peer pongWait from now, but not within a message, to which control frames
// would give more time.
func (c *Client) alive() {
	if !c.receiving {
		c.conn.SetReadDeadline(time.Now().Add(pongWait))
	}
}

// limitRate takes a token for the start of a message, or a control frame. If the bucket is
// empty it sleeps until the next token, so that TCP backpressure delays the peer.
func (c *Client) limitRate() {
	missing := max(0, time.Until(c.bucketFullAt)) + rateInterval
	c.bucketFullAt = time.Now().Add(missing)
	// No delay once there is a reason to end: the peer's close frame may be next.
	if wait := missing - rateBurst*rateInterval; wait > 0 && c.reason.Load() == nil {
		// In a goroutine, as writes to a log can block.
		c.logged.Do(func() { go log.Printf("%v: rate limited: 1/%v", c.conn.RemoteAddr(), rateInterval) })
		time.Sleep(wait)
	}
}

// stopReading asks run to drop the client, as reading has failed with err, and tells
// writePump that readPump ends.
func (c *Client) stopReading(err error) {
	c.conn.SetReadDeadline(time.Now())
	_, _, again := c.conn.NextReader() // err again, unless only a message was at fault
	reason := closeError(1002, "%v", err)
	if failed, ok := err.(net.Error); ok && failed.Timeout() {
		reason = errTimeout
	} else if ok || err == io.ErrUnexpectedEOF && again == err { // or TLS was cut within a record
		err = closeError(1006, "%v", err)
	}
	closed, _ := err.(*websocket.CloseError) // the peer's, 1006 without one, or nil
	c.reason.CompareAndSwap(nil, cmp.Or(closed, reason))
	c.hub.passToRun(c.hub.unregister, c)
	c.readEnd() <- closed
}

// readEnd returns the channel from readPump to finish, for the peer's close frame, 1006 without
// one, or nil after an invalid frame or a timeout. Either pump may start first, and makes it.
func (c *Client) readEnd() chan *websocket.CloseError {
	c.readEndOnce.Do(func() { c.readEndChan = make(chan *websocket.CloseError, 1) })
	return c.readEndChan
}

// writePump writes the queued messages, pings and the close frame; readPump writes the pongs.
// After the close frame, or when a write fails, it finishes the client.
func (c *Client) writePump() {
	ticker := time.NewTicker(pingPeriod)
	defer ticker.Stop()
	next := make(chan []byte, 1) // the message that did not fit into the last batch
	var err error
	for ; err == nil; c.ending = c.reason.Load() != nil {
		send := c.send
		if len(next) > 0 {
			send = next
		}
		select {
		case message, ok := <-send:
			c.setWriteDeadline()
			if ok {
				err = c.writeBatch(message, next)
			} else {
				err = c.writeClose()
			}
		case <-ticker.C:
			c.setWriteDeadline()
			err = c.conn.WriteMessage(websocket.PingMessage, nil)
			if err == nil && (c.heartbeat || c.conn.Subprotocol() == heartbeat) {
				err = c.conn.WriteMessage(websocket.TextMessage, nil)
			}
		}
	}
	c.finish(err)
}

// setWriteDeadline allows writeWait for a write. Once the client has a reason to end, all writes
// share one writeWait, the one under way included, so that a slow peer cannot prolong the end.
func (c *Client) setWriteDeadline() {
	if !c.ending {
		c.conn.SetWriteDeadline(time.Now().Add(writeWait))
	}
}

// writeClose writes the close frame. It always returns an error, as nothing may follow.
func (c *Client) writeClose() error {
	c.reason.CompareAndSwap(nil, errUnregistered) // if the application itself has closed send
	// 1006 is never sent: RFC 6455 section 7.4.1.
	if reason := c.reason.Load(); reason.Code != 1006 {
		// The text has at most 123 bytes: RFC 6455 section 5.5.
		text := strings.ToValidUTF8(reason.Text[:min(len(reason.Text), 123)], "")
		c.conn.WriteMessage(websocket.CloseMessage, websocket.FormatCloseMessage(reason.Code, text))
	}
	return websocket.ErrCloseSent
}

// finish ends the client: the close frame has been written, or a write failed with err.
func (c *Client) finish(err error) {
	// The peer has closeWait to answer. Then closing conn ends readPump.
	timer := time.AfterFunc(closeWait, func() {
		c.reason.CompareAndSwap(nil, closeError(1006, "%v", err))
		c.conn.Close()
	})
	// After a failed write, send is open until run closes it. Drain it meanwhile: otherwise the
	// queue fills, and the log says 1013, or a send in run blocks run.
	for range c.send {
	}
	closed := <-c.readEnd()
	if closed == nil {
		// Closing TCP with unread input resets it, and the peer may lose the close frame: so
		// close one direction, and discard input until the peer closes the other.
		conn := c.conn.NetConn()
		if delayed, ok := conn.(*delayedConn); ok {
			conn = delayed.Conn
		}
		if half, ok := conn.(interface{ CloseWrite() error }); ok { // TCP and TLS
			half.CloseWrite()
		}
		conn.SetReadDeadline(time.Time{})
		io.Copy(io.Discard, conn)
	}
	c.conn.Close()
	timer.Stop() // It would keep the client in memory.
	c.hub.passToRun(c.hub.done, c)

	// The log is last, as writes to it can block. %q: the peer may have chosen the text.
	reason, ended := c.reason.Load(), "dropped"
	if reason == closed {
		ended = "disconnected"
	}
	if websocket.IsUnexpectedCloseError(reason, 1000, 1001, 1005) {
		log.Printf("%v: %s: %q", c.conn.RemoteAddr(), ended, reason)
	}
}

// excerpt returns the first 200 bytes of s, which a peer has chosen, for the log.
func excerpt(s string) string { return s[:min(len(s), 200)] }

// A delayedHandshake is the ResponseWriter for Upgrade, which hijacks conn from it. (An
// http.ResponseController also finds Hijack behind middleware that has only Unwrap.)
type delayedHandshake struct{ http.ResponseWriter }

func (h delayedHandshake) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, buffered, err := http.NewResponseController(h.ResponseWriter).Hijack()
	return &delayedConn{Conn: conn}, buffered, err
}

// A delayedConn holds back the first write, Upgrade's response, until answer or the next Read
// or Write: an application may exchange messages with the peer before it registers the client.
type delayedConn struct {
	net.Conn
	answer func() error // writes the response at its first call; set by the first Write
}

func (c *delayedConn) Write(p []byte) (int, error) {
	if c.answer == nil {
		response := bytes.Clone(p)
		c.answer = sync.OnceValue(func() error {
			c.Conn.SetWriteDeadline(time.Now().Add(writeWait))
			if _, err := c.Conn.Write(response); err != nil {
				// stopReading would take an error of another type for a protocol violation.
				return closeError(1006, "handshake response: %v", err)
			}
			return nil
		})
		return len(p), nil
	}
	if err := c.answer(); err != nil {
		return 0, err
	}
	return c.Conn.Write(p)
}

// Read has a small frame, too: see readPump.
func (c *delayedConn) Read(p []byte) (int, error) {
	if err := c.answer(); err != nil {
		return 0, err
	}
	return c.Conn.Read(p)
}
