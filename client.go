package main

import (
	"bufio"
	"bytes"
	"errors"
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

	// Time allowed between two messages or control frames from the peer, and for
	// a message to be complete once it has begun.
	pongWait = 60 * time.Second

	// Time between two pings to the peer; below pongWait, so that a live peer has
	// something to answer in time.
	pingPeriod = pongWait * 9 / 10

	// Time allowed to the peer to answer our close frame with its own, from the
	// moment at which the frame has gone into the network.
	closeWait = time.Second

	// Maximum size in bytes of a message from the peer. If you raise it, keep
	// maxBatchSize several times as large, and tell home.html.
	maxMessageSize = 512

	// Maximum size in bytes of a WebSocket message to the peer: less than 32 KiB,
	// which common client libraries read by default.
	maxBatchSize = 32<<10 - 1

	// Messages that wait for a peer before it is dropped: what a busy room says
	// while a peer's network stalls for a moment.
	sendQueueSize = 256

	// Messages and control frames taken from a peer at once, and the time for
	// each one after that. A burst leaves the queues of the others half empty, and
	// 100 a second are more than people type or read. Shorten rateInterval if your
	// clients are programs that send more, as a game's or a shared cursor's do: who
	// sends faster than this is read later and later.
	rateBurst    = sendQueueSize / 2
	rateInterval = 10 * time.Millisecond

	// The subprotocol with which a client asks for an empty text message with
	// each ping. A browser's script cannot see pings: this is how it can tell a
	// quiet room from a dead line.
	heartbeat = "heartbeat"
)

var newline = []byte{'\n'}

// A goodbye is the code and the reason with which a connection ends. Your own ones
// have codes from 4000 to 4999. RFC 6455 section 7.4.
type goodbye = websocket.CloseError

// The server's own goodbyes. A text longer than a close frame can hold is cut.
var (
	shuttingDown = &goodbye{Code: websocket.CloseGoingAway, Text: "the server is shutting down"}
	noReason     = &goodbye{Code: websocket.CloseNormalClosure, Text: "the server has ended this connection"}
	notText      = &goodbye{Code: websocket.CloseUnsupportedData, Text: "send text messages, not binary ones"}
	notUTF8      = &goodbye{Code: websocket.CloseInvalidFramePayloadData, Text: "send text as valid UTF-8"}
	tooBig       = &goodbye{Code: websocket.CloseMessageTooBig, Text: "send at most " + strconv.Itoa(maxMessageSize) + " bytes in a message"}
	tooSlow      = &goodbye{Code: websocket.ClosePolicyViolation, Text: "answer pings, and complete each message, within " + pongWait.String()}
	fellBehind   = &goodbye{Code: websocket.CloseTryAgainLater, Text: "read as fast as the others write"}
)

// Each connection keeps its read buffer: a small one, as longer messages pass
// through it in parts. Write buffers are pooled: only a connection that is being
// written to holds one. It holds a whole batch, which thus is one frame. Add a
// subprotocol of your own here, as Upgrade ignores one in its header: the first of
// these that the peer offers is chosen.
var upgrader = websocket.Upgrader{
	ReadBufferSize:  512,
	WriteBufferSize: maxBatchSize,
	WriteBufferPool: new(sync.Pool),
	Subprotocols:    []string{heartbeat},
}

// A Client stands between one WebSocket connection and the hub. This is its life:
//
//  1. serveWs registers it with the hub, and starts its two pumps.
//  2. Somebody finds a reason to end it: the hub, one of the pumps, or the peer.
//     The first reason is its goodbye.
//  3. run takes it out of the room and closes send.
//  4. writePump writes what is still queued, then the goodbye. (Frames that break
//     the protocol are answered by gorilla/websocket itself, ahead of the queue.)
//  5. readPump reads on until the peer has answered, closes conn, and tells run
//     that the client has left.
type Client struct {
	hub *Hub

	// Its NetConn is a *heldConn, whose Conn is the *net.TCPConn or *tls.Conn.
	conn *websocket.Conn

	// From run to writePump. Only queue and drop may send or close. A send after it is
	// closed is a panic, which ends the process: if a copy closes it, but leaves the
	// client in hub.clients, run will send. If a copy deletes the client there, but does
	// not close send, the client never ends.
	send chan []byte

	// Owned by run: the client has been dropped, for good. That there is a goodbye
	// does not tell that: readPump may set one while run still takes the client in.
	dropped bool

	// Why the client has to go. Whoever finds a reason sets it; the first counts.
	goodbye atomic.Pointer[goodbye]

	// Runs writePump, so that readPump can wait for its end.
	writing sync.WaitGroup

	// Owned by readPump:
	due       time.Time // when a peer at one message per rateInterval would have sent as many
	slowed    bool      // the log says that the peer sends faster
	receiving bool      // a message has begun and is not complete
}

// serveWs makes the request a WebSocket connection and its peer a client of
// hub. It returns once the handshake is answered: the pumps go on in goroutines
// of their own, so that what the request holds can be freed.
func serveWs(hub *Hub, w http.ResponseWriter, r *http.Request) {
	handshake := &holdAnswer{ResponseWriter: w}
	conn, err := upgrader.Upgrade(handshake, r, nil)
	if err != nil {
		log.Printf("%s: %q", r.RemoteAddr, err)
		return
	}
	client := &Client{hub: hub, conn: conn, send: make(chan []byte, sendQueueSize)}
	select {
	case hub.register <- client:
	case <-hub.stopped:
		handshake.conn.refuse(shuttingDown.Text)
		return
	}
	// Only now, so that the peer misses nothing that is said once it knows that it
	// is connected. If this fails, both pumps will get the same error.
	handshake.conn.answer()
	client.writing.Go(client.writePump) // first, as readPump waits for its end
	go client.readPump()
}

// holdAnswer is a ResponseWriter for Upgrade, which gets conn from it.
type holdAnswer struct {
	http.ResponseWriter
	conn *heldConn
}

func (h *holdAnswer) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, buffered, err := http.NewResponseController(h.ResponseWriter).Hijack()
	h.conn = &heldConn{Conn: conn}
	return h.conn, buffered, err
}

// A heldConn holds back what is first written to it, which is Upgrade's answer to
// the handshake. answer lets that go, and so does the next Read or Write: a copy may
// ask the peer for a password before it registers the client.
type heldConn struct {
	net.Conn
	answer func() error // It writes once, and returns the same error ever after.
}

func (c *heldConn) Write(p []byte) (int, error) {
	if c.answer == nil {
		held := bytes.Clone(p)
		c.answer = sync.OnceValue(func() error {
			c.Conn.SetWriteDeadline(time.Now().Add(writeWait))
			if _, err := c.Conn.Write(held); err != nil {
				return &goodbye{Code: websocket.CloseAbnormalClosure, Text: "answering the handshake: " + err.Error()}
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

func (c *heldConn) Read(p []byte) (int, error) {
	if err := c.answer(); err != nil {
		return 0, err
	}
	return c.Conn.Read(p)
}

// CloseWrite closes the writing side, if the connection can do that.
func (c *heldConn) CloseWrite() error {
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return errors.ErrUnsupported
}

// refuse answers the handshake with 503 instead, and closes the connection.
func (c *heldConn) refuse(why string) {
	c.Conn.SetWriteDeadline(time.Now().Add(writeWait))
	io.WriteString(c.Conn, "HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\n\r\n"+why+"\n")
	c.Conn.Close()
}

// readPump takes what the peer says to the hub. It does all reads on conn. It ends
// when nothing can be read any more: as a rule after the peer's close frame, and
// otherwise because writePump has closed conn. Once there is a goodbye, it still
// reads, but takes nothing to the hub.
//
// An idle client waits in NextReader, within a stack of 2 KiB as long as this
// function's part of it is small: what else there is to do is done in methods.
func (c *Client) readPump() {
	c.conn.SetPingHandler(func(data string) error {
		c.pace()
		// A pong may have to wait for a batch. If it fails, so will writePump.
		c.conn.WriteControl(websocket.PongMessage, []byte(data), time.Now().Add(writeWait))
		return nil
	})
	c.conn.SetPongHandler(func(string) error { c.pace(); return nil })
	// The answer to a close frame is writePump's, behind what is queued.
	c.conn.SetCloseHandler(func(int, string) error { return nil })
	for {
		// Reset the deadline here: handing the last message to the hub may have
		// taken long, and the peer is not to blame for that.
		c.conn.SetReadDeadline(time.Now().Add(pongWait))
		messageType, r, err := c.conn.NextReader()
		if err == nil {
			err = c.receive(messageType, r)
		}
		if err != nil {
			c.hangUp(err)
			return
		}
	}
}

// pace takes note of a message that begins, or of a control frame. It gives the
// peer pongWait for what comes next, and sleeps if the peer is ahead of its rate
// by more than a burst, so that TCP slows it down.
func (c *Client) pace() {
	if c.goodbye.Load() != nil {
		return // Do not slow it now: its close frame comes behind what it has sent.
	}
	if !c.receiving { // A ping in the middle of a message gives it no more time.
		c.conn.SetReadDeadline(time.Now().Add(pongWait))
	}
	if now := time.Now(); c.due.Before(now) {
		c.due = now
	}
	c.due = c.due.Add(rateInterval)
	ahead := time.Until(c.due) - rateBurst*rateInterval
	if ahead > 0 && !c.slowed {
		c.slowed = true
		// In a goroutine, as nobody waits for a log that is stuck.
		go log.Printf("%v: slowed, as it sends more than %d messages a second", c.conn.RemoteAddr(), time.Second/rateInterval)
	}
	time.Sleep(ahead)
}

// receive takes the message in r to the hub as one clean line, unless it is
// blank, or comes after the goodbye. One that breaks a rule ends the client. It
// returns an error if the message cannot be read. (SetReadLimit would do for the
// limit, but it closes without a reason.)
func (c *Client) receive(messageType int, r io.Reader) error {
	c.pace()
	c.receiving = true
	message, err := io.ReadAll(io.LimitReader(r, maxMessageSize+1))
	c.receiving = false
	if err != nil {
		return err
	}
	line := clean(message)
	switch {
	case c.goodbye.Load() != nil:
	case len(message) > maxMessageSize:
		c.end(tooBig)
	case messageType != websocket.TextMessage:
		c.end(notText)
	case !utf8.Valid(message):
		c.end(notUTF8)
	case len(line) > 0:
		c.hub.broadcast <- line
	}
	return nil
}

// clean makes one line of UTF-8 of message: control characters, which end lines
// and drive terminals, become spaces, bytes that are not UTF-8 become U+FFFD, and
// white space around it goes. What the server says itself has to be clean, too,
// or browsers may disconnect.
func clean(message []byte) []byte {
	return bytes.TrimSpace(bytes.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, message))
}

// writePump takes what the hub says to the peer, and pings it. It does all writes
// of messages on conn. It ends after the goodbye, or when a write fails, and has
// conn closed soon after, which ends readPump if that still reads.
func (c *Client) writePump() {
	pings := time.NewTicker(pingPeriod)
	var err error
	for err == nil {
		select {
		case message, ok := <-c.send:
			if ok {
				err = c.writeBatch(message)
			} else {
				c.sayGoodbye()
				err = websocket.ErrCloseSent // Nothing may follow a close frame.
			}
		case <-pings.C:
			err = c.ping()
		}
	}
	pings.Stop()
	// readPump gets any other error as well, and handles it.
	if timeout, ok := err.(net.Error); ok && timeout.Timeout() {
		c.goodbye.CompareAndSwap(nil, fellBehind)
	}

	// readPump has closeWait to read the peer's answer. (A TLS connection may take
	// five seconds more to close.)
	time.AfterFunc(closeWait, func() { c.conn.Close() })

	// A copy's run may send here without a default: empty the queue until run closes
	// it, so that it does not block for ever.
	for range c.send {
	}
}

// writeBatch sends message, and what has queued up behind it, in one frame.
func (c *Client) writeBatch(message []byte) error {
	c.conn.SetWriteDeadline(time.Now().Add(writeWait))
	w, err := c.conn.NextWriter(websocket.TextMessage)
	if err != nil {
		return err
	}
	w.Write(message)
	for room := maxBatchSize - len(message); len(c.send) > 0 && room >= len(newline)+maxMessageSize; {
		message = <-c.send
		w.Write(newline)
		w.Write(message)
		room -= len(newline) + len(message)
	}
	return w.Close()
}

// ping sends a ping, and a heartbeat to who asked for it.
func (c *Client) ping() error {
	c.conn.SetWriteDeadline(time.Now().Add(writeWait))
	err := c.conn.WriteMessage(websocket.PingMessage, nil)
	if err == nil && c.conn.Subprotocol() == heartbeat {
		err = c.conn.WriteMessage(websocket.TextMessage, nil)
	}
	return err
}

// sayGoodbye sends the close frame. If that fails, nothing better can be done:
// conn is closed soon after.
func (c *Client) sayGoodbye() {
	c.goodbye.CompareAndSwap(nil, noReason) // if a copy has closed send by hand
	why := c.goodbye.Load()
	if why.Code == websocket.CloseAbnormalClosure {
		return // 1006 is no code to send. RFC 6455 section 7.4.1.
	}
	// A close frame holds a code and 123 bytes of text. RFC 6455 section 5.5.
	text := strings.ToValidUTF8(why.Text[:min(len(why.Text), 123)], "")
	c.conn.SetWriteDeadline(time.Now().Add(writeWait))
	c.conn.WriteMessage(websocket.CloseMessage, websocket.FormatCloseMessage(why.Code, text))
}

// end has run drop the client, whose peer is told why. Only readPump may call it:
// run is sure to receive until readPump sends to left. Others have run call drop.
func (c *Client) end(why *goodbye) {
	c.goodbye.CompareAndSwap(nil, why)
	c.hub.unregister <- c
}

// hangUp is the end of readPump, after reading has failed with err.
func (c *Client) hangUp(err error) {
	why, gone := whyItFailed(err)
	c.end(why)
	c.writing.Wait() // writePump says what is queued, and the goodbye.
	if !gone {
		c.drain()
	}
	c.conn.Close()
	c.hub.left <- c
	c.logEnd(why, gone) // last, so that nobody waits for a log that is stuck
}

// whyItFailed tells what err, from reading, means for the goodbye, and whether
// the peer has gone: then there is nothing more to read.
func whyItFailed(err error) (why *goodbye, gone bool) {
	switch err := err.(type) {
	case *goodbye: // the peer's own, or 1006 if the connection ended without one
		return err, true
	case net.Error:
		if err.Timeout() {
			return tooSlow, false
		}
		return &goodbye{Code: websocket.CloseAbnormalClosure, Text: err.Error()}, true
	}
	if err == io.ErrUnexpectedEOF { // A TLS connection ended within a record.
		return &goodbye{Code: websocket.CloseAbnormalClosure, Text: err.Error()}, true
	}
	return &goodbye{Code: websocket.CloseProtocolError, Text: err.Error()}, false
}

// drain reads until the peer has closed its side, or writePump closes conn. The
// peer may still be sending, and what it sends can no longer be parsed. But to close
// a TCP connection with input unread is to reset it, and the reset can destroy the
// close frame.
func (c *Client) drain() {
	conn := c.conn.NetConn()
	if half, ok := conn.(interface{ CloseWrite() error }); ok {
		half.CloseWrite()
	}
	conn.SetReadDeadline(time.Time{})
	io.Copy(io.Discard, conn)
}

// logEnd logs how the client has ended, unless that was a normal end. It quotes
// the reason, as the peer may have chosen the words.
func (c *Client) logEnd(why *goodbye, gone bool) {
	first := c.goodbye.Load()
	if !websocket.IsUnexpectedCloseError(first, websocket.CloseNormalClosure,
		websocket.CloseGoingAway, websocket.CloseNoStatusReceived) {
		return
	}
	ended := "dropped"
	if first == why && gone {
		ended = "left"
	}
	log.Printf("%v: %s with %q", c.conn.RemoteAddr(), ended, first)
}
