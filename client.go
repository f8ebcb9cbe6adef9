package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"strconv"
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

	// Time allowed for the next message or control frame from the peer, and for a
	// message to finish once it has begun.
	pongWait = 60 * time.Second

	// Time between two pings to the peer. Must be less than pongWait.
	pingPeriod = pongWait * 9 / 10

	// Time allowed for the peer to answer the server's close frame. A busy peer must
	// first read what precedes it: with one second, some peers lost it during shutdown.
	closeWait = 5 * time.Second

	// Maximum size in bytes of a message from the peer. If you raise it, keep
	// maxBatchSize several times as large, and change the figure in home.html.
	maxMessageSize = 512

	// Maximum size in bytes of a batch of messages to the peer: below 32 KiB, the
	// default read limit of common client libraries.
	maxBatchSize = 32<<10 - 1

	// Number of messages that may be queued for a peer. One more, and the hub drops it as
	// a slow client.
	sendQueueSize = 256

	// The rate limit for messages and control frames from a peer is a token bucket: a
	// burst of rateBurst, then one per rateInterval. A burst fills at most half of the
	// other clients' queues, and 100 a second is more than people type. Shorten
	// rateInterval if your clients are programs, such as games.
	rateBurst    = sendQueueSize / 2
	rateInterval = 10 * time.Millisecond

	// A client that asks for this subprotocol also gets an empty text message with each
	// ping. A browser's script cannot see pings, and so could not tell an idle connection
	// from a half-open one.
	heartbeat = "heartbeat"
)

var newline = []byte{'\n'}

// Reasons for which the server closes connections: a close code (RFC 6455 section 7.4) and a text.
// Codes from 4000 to 4999 are free for applications.
var (
	errShuttingDown = &websocket.CloseError{Code: websocket.CloseGoingAway, Text: "server shutting down"}
	errUnregistered = &websocket.CloseError{Code: websocket.CloseNormalClosure, Text: "closed by the server"}
	errBinary       = &websocket.CloseError{Code: websocket.CloseUnsupportedData, Text: "binary messages are not supported"}
	errInvalidUTF8  = &websocket.CloseError{Code: websocket.CloseInvalidFramePayloadData, Text: "message is not valid UTF-8"}
	errTooBig       = &websocket.CloseError{Code: websocket.CloseMessageTooBig, Text: "message exceeds " + strconv.Itoa(maxMessageSize) + " bytes"}
	errTimeout      = &websocket.CloseError{Code: websocket.ClosePolicyViolation, Text: "no pong, or no complete message, for " + pongWait.String()}
	errSlowClient   = &websocket.CloseError{Code: websocket.CloseTryAgainLater, Text: "slow client: " + strconv.Itoa(sendQueueSize) + " messages queued"}
)

// The read buffer is small because every connection keeps one; longer messages are read
// in pieces. Write buffers come from a pool, and hold a whole batch, so that a batch is
// one frame. Add your own subprotocols here: with Subprotocols set, Upgrade ignores its
// responseHeader argument's. A peer gets one of them: yours, or heartbeat.
var upgrader = websocket.Upgrader{
	ReadBufferSize:  512,
	WriteBufferSize: maxBatchSize,
	WriteBufferPool: new(sync.Pool),
	Subprotocols:    []string{heartbeat},
}

// A Client connects one WebSocket peer to the hub. Its life:
//
//  1. serveWs upgrades the connection, registers the client, and starts both pumps.
//  2. The hub or a pump finds a reason to end the client. The first reason wins.
//  3. run removes the client from the hub and closes send.
//  4. writePump writes the queued messages, then the close frame. (To a protocol
//     violation, gorilla/websocket itself has already written one.)
//  5. readPump reads on until the peer has answered, for at most closeWait. Then it
//     closes conn and tells run that the client is done.
//
// If a write fails, the client stays registered for closeWait, so that readPump can still
// read what the peer has sent, such as a close frame. Then steps 2, 3 and 5 follow.
type Client struct {
	hub  *Hub
	conn *websocket.Conn

	// From run to writePump. To send to this client, call tell, or queue on run's
	// goroutine: sending on the channel directly panics, and ends the process, if the hub
	// has closed it. Only run may close it, and must delete the client from hub.clients
	// at the same time.
	send chan []byte

	// Owned by run: drop has closed send, so the client must not be registered again.
	dropped bool

	// The reason for closing the connection. The first one set wins.
	reason atomic.Pointer[websocket.CloseError]

	// readPump waits on this for writePump to return.
	writing sync.WaitGroup

	// Owned by readPump:
	bucketFullAt time.Time // when the token bucket of the rate limit is full again
	limited      bool      // the log already says that the rate limit delays this client
	receiving    bool      // a message has begun and is not complete
}

// serveWs upgrades the request to a WebSocket connection and registers its peer with
// hub. It starts the pumps and returns, so that the request's memory can be freed.
//
// The handshake response is delayed until the client is registered: a peer that knows
// it is connected misses no message.
func serveWs(hub *Hub, w http.ResponseWriter, r *http.Request) {
	handshake := &delayedHandshake{ResponseWriter: w}
	conn, err := upgrader.Upgrade(handshake, r, nil)
	if err != nil {
		log.Printf("%s: handshake refused: %q (Origin %q, Host %q)", r.RemoteAddr, err, r.Header.Get("Origin"), r.Host)
		return
	}
	client := &Client{hub: hub, conn: conn, send: make(chan []byte, sendQueueSize)}
	select {
	case hub.register <- client:
	case <-hub.stopped:
		handshake.conn.reject(errShuttingDown.Text)
		return
	}
	// Nothing may return from here on: a registered client needs both pumps.
	handshake.conn.respond()            // If this fails, the pumps get the same error.
	client.writing.Go(client.writePump) // before readPump, which waits for it
	go client.readPump()
}

// tell queues message for this client alone. It returns false if the client has been
// dropped or the hub stopped. Any goroutine may call it except run's, which calls queue.
func (c *Client) tell(message []byte) bool {
	queued := false
	c.hub.do(func() {
		c.hub.queue(c, message)
		queued = c.hub.clients[c]
	})
	return queued
}

// readPump forwards the peer's messages to the hub. It does all reads on conn. It ends
// when reading fails: usually with the peer's close frame, or because writePump has
// closed conn. Once the client has a reason to end, readPump discards what it reads.
//
// It is kept small, so that the goroutine of an idle client keeps a stack of 2 KiB.
func (c *Client) readPump() {
	c.conn.SetPingHandler(func(data string) error {
		c.limitRate()
		// Ignore the error: after a failed write, writePump fails too.
		c.conn.WriteControl(websocket.PongMessage, []byte(data), time.Now().Add(writeWait))
		return nil
	})
	c.conn.SetPongHandler(func(string) error { c.limitRate(); return nil })
	// writePump answers a close frame, after what is queued.
	c.conn.SetCloseHandler(func(int, string) error { return nil })
	for {
		// The hub may have been slow to receive the last message: allow pongWait from now.
		c.conn.SetReadDeadline(time.Now().Add(pongWait))
		messageType, r, err := c.conn.NextReader()
		if err == nil {
			err = c.receive(messageType, r)
		}
		if err != nil {
			c.finish(err)
			return
		}
	}
}

// limitRate takes a token for the start of a message, or a control frame. If the bucket
// is empty it sleeps until the next token, so that TCP backpressure delays the peer. It
// also extends the read deadline.
func (c *Client) limitRate() {
	if c.reason.Load() != nil {
		return // No delay: the peer's close frame may follow what it has already sent.
	}
	if !c.receiving { // Control frames within a message do not give it more time.
		c.conn.SetReadDeadline(time.Now().Add(pongWait))
	}
	if now := time.Now(); c.bucketFullAt.Before(now) {
		c.bucketFullAt = now
	}
	c.bucketFullAt = c.bucketFullAt.Add(rateInterval)
	wait := time.Until(c.bucketFullAt) - rateBurst*rateInterval
	if wait > 0 && !c.limited {
		c.limited = true
		// In a goroutine, as writes to a log can block.
		go log.Printf("%v: rate limited to %d messages a second", c.conn.RemoteAddr(), time.Second/rateInterval)
	}
	time.Sleep(wait)
}

// receive broadcasts the message in r as one clean line. It ignores blank messages, and
// all messages once the client has a reason to end; an invalid message is one. It returns
// read errors only. (SetReadLimit would close the connection without a text.)
func (c *Client) receive(messageType int, r io.Reader) error {
	c.limitRate()
	c.receiving = true
	message, err := io.ReadAll(io.LimitReader(r, maxMessageSize+1))
	c.receiving = false
	if err != nil {
		return err
	}
	line := clean(message)
	switch {
	case c.reason.Load() != nil:
	case len(message) > maxMessageSize:
		c.end(errTooBig)
	case messageType != websocket.TextMessage:
		c.end(errBinary)
	case !utf8.Valid(message):
		c.end(errInvalidUTF8)
	case len(line) > 0:
		c.hub.broadcast <- line
	}
	return nil
}

// clean returns message as one line of valid UTF-8. Control characters, which end lines and
// drive terminals, become spaces; invalid UTF-8 becomes U+FFFD; surrounding white space
// is trimmed. Clean the application's own messages too: browsers close the connection
// on invalid UTF-8.
func clean(message []byte) []byte {
	return bytes.TrimSpace(bytes.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, message))
}

// writePump writes queued messages and pings to the peer. It does all writes on conn
// except pongs. It ends after the close frame, or when a write fails. closeWait later a
// timer closes conn, which ends readPump if the peer has not.
func (c *Client) writePump() {
	ticker := time.NewTicker(pingPeriod)
	defer ticker.Stop()
	var err error
	for err == nil {
		select {
		case message, ok := <-c.send:
			if ok {
				err = c.writeBatch(message)
			} else {
				err = c.writeClose()
			}
		case <-ticker.C:
			err = c.ping()
		}
	}
	time.AfterFunc(closeWait, func() {
		c.reason.CompareAndSwap(nil, abnormal(err)) // unless the peer has sent a close frame
		c.conn.Close()
	})
	// Drain send until run closes it, so that an application that sends to it without a
	// default case does not block run.
	for range c.send {
	}
}

// writeBatch writes message, and those that have queued up behind it, in one frame: the
// peer must split it at newlines. Remove the loop for one message a frame.
func (c *Client) writeBatch(message []byte) error {
	c.conn.SetWriteDeadline(time.Now().Add(writeWait))
	w, err := c.conn.NextWriter(websocket.TextMessage)
	if err != nil {
		return err
	}
	w.Write(message)
	for free := maxBatchSize - len(message); len(c.send) > 0 && free >= len(newline)+maxMessageSize; {
		message = <-c.send
		w.Write(newline)
		w.Write(message)
		free -= len(newline) + len(message)
	}
	return w.Close()
}

// ping writes a ping, and a heartbeat if the peer has asked for the subprotocol.
func (c *Client) ping() error {
	c.conn.SetWriteDeadline(time.Now().Add(writeWait))
	err := c.conn.WriteMessage(websocket.PingMessage, nil)
	if err == nil && c.conn.Subprotocol() == heartbeat {
		err = c.conn.WriteMessage(websocket.TextMessage, nil)
	}
	return err
}

// writeClose writes the close frame. It always returns an error, as nothing may follow.
func (c *Client) writeClose() error {
	c.reason.CompareAndSwap(nil, errUnregistered) // if the application has closed send itself
	reason := c.reason.Load()
	if reason.Code != websocket.CloseAbnormalClosure { // 1006 is never sent: RFC 6455 section 7.4.1.
		// The text has at most 123 bytes: RFC 6455 section 5.5.
		text := strings.ToValidUTF8(reason.Text[:min(len(reason.Text), 123)], "")
		c.conn.SetWriteDeadline(time.Now().Add(writeWait))
		c.conn.WriteMessage(websocket.CloseMessage, websocket.FormatCloseMessage(reason.Code, text))
	}
	return websocket.ErrCloseSent
}

// end asks run to drop the client. Only readPump may call it: run keeps receiving until it
// has received readPump's done. Other goroutines call drop through do.
func (c *Client) end(reason *websocket.CloseError) {
	c.reason.CompareAndSwap(nil, reason)
	c.hub.unregister <- c
}

// finish ends the client when reading has failed with err.
func (c *Client) finish(err error) {
	reason, closed := readError(err)
	c.end(reason)
	c.writing.Wait() // until the close frame has been written
	if !closed {
		c.linger()
	}
	c.conn.Close()
	c.hub.done <- c
	c.logEnd(reason, closed) // last, as writes to a log can block
}

// readError turns a read error into a reason, and reports whether the peer or the network
// has closed the connection.
func readError(err error) (reason *websocket.CloseError, closed bool) {
	switch err := err.(type) {
	case *websocket.CloseError: // the peer's, or 1006 if there was no close frame
		return err, true
	case net.Error:
		if err.Timeout() {
			return errTimeout, false
		}
		return abnormal(err), true
	}
	if err == io.ErrUnexpectedEOF { // a TLS connection cut within a record
		return abnormal(err), true
	}
	return &websocket.CloseError{Code: websocket.CloseProtocolError, Text: err.Error()}, false
}

// abnormal returns the reason of a connection that has failed.
func abnormal(err error) *websocket.CloseError {
	return &websocket.CloseError{Code: websocket.CloseAbnormalClosure, Text: err.Error()}
}

// linger does a lingering close after a timeout or an invalid frame: it discards input
// until the peer closes its side, or writePump's timer closes conn. Closing a TCP
// connection with unread input resets it, and the peer may lose the close frame.
func (c *Client) linger() {
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

// logEnd logs why the client has ended, unless it ended normally. It quotes the reason,
// as the peer may have chosen the text. It says "disconnected" if the peer or the network
// ended the connection, and "dropped" if the server did.
func (c *Client) logEnd(reason *websocket.CloseError, closed bool) {
	first := c.reason.Load()
	if !websocket.IsUnexpectedCloseError(first, websocket.CloseNormalClosure,
		websocket.CloseGoingAway, websocket.CloseNoStatusReceived) {
		return
	}
	ended := "dropped"
	if first == reason && closed {
		ended = "disconnected"
	}
	log.Printf("%v: %s: %q", c.conn.RemoteAddr(), ended, first)
}

// A delayedHandshake is the ResponseWriter for Upgrade, which hijacks conn from it.
type delayedHandshake struct {
	http.ResponseWriter
	conn *delayedConn
}

func (h *delayedHandshake) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, buffered, err := http.NewResponseController(h.ResponseWriter).Hijack()
	h.conn = &delayedConn{Conn: conn}
	return h.conn, buffered, err
}

// A delayedConn holds back the first write, which is Upgrade's handshake response, until
// respond or the next Read or Write: an application may exchange messages with the peer
// before it registers the client.
type delayedConn struct {
	net.Conn
	respond func() error // writes the response once; returns the same error each time
}

func (c *delayedConn) Write(p []byte) (int, error) {
	if c.respond == nil {
		response := bytes.Clone(p)
		c.respond = sync.OnceValue(func() error {
			c.Conn.SetWriteDeadline(time.Now().Add(writeWait))
			if _, err := c.Conn.Write(response); err != nil {
				return abnormal(fmt.Errorf("handshake response: %w", err))
			}
			return nil
		})
		return len(p), nil
	}
	if err := c.respond(); err != nil {
		return 0, err
	}
	return c.Conn.Write(p)
}

func (c *delayedConn) Read(p []byte) (int, error) {
	if err := c.respond(); err != nil {
		return 0, err
	}
	return c.Conn.Read(p)
}

// reject answers the handshake with status 503 instead of 101, and closes the connection.
func (c *delayedConn) reject(text string) {
	c.Conn.SetWriteDeadline(time.Now().Add(writeWait))
	io.WriteString(c.Conn, "HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\n\r\n"+text+"\n")
	c.Conn.Close()
}
