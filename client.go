package main

import (
	"bytes"
	"fmt"
	"io"
	"log"
	"net/http"
	"sync"
	"sync/atomic"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/gorilla/websocket"
)

const (
	// Time allowed to write one batch to the peer.
	writeWait = 10 * time.Second

	// Time allowed between two frames from the peer, of whatever kind.
	pongWait = 60 * time.Second

	// Time between pings to the peer; below pongWait, so that a live peer
	// always has something to answer in time.
	pingPeriod = pongWait * 9 / 10

	// Time allowed, after our close frame, for the peer to read it and close.
	closeWait = time.Second

	// Maximum size in bytes of a message from the peer.
	maxMessageSize = 512

	// Size in bytes that nobody means: gorilla/websocket refuses it by the frame's
	// header, but without a reason, so that it must not be the one for the limit.
	absurdSize = 1 << 30

	// Maximum size in bytes of a WebSocket message to the peer: what common
	// client libraries read by default.
	maxBatchSize = 32<<10 - 1

	// Messages that wait for a peer before it is dropped: what a busy room says
	// while a peer's network stalls for a moment.
	sendQueueSize = 256

	// Frames taken from a peer at once, and the time for each one after that. A
	// burst leaves the queues of the others half empty, and the rate is more than
	// people type or read.
	rateBurst    = sendQueueSize / 2
	rateInterval = 10 * time.Millisecond
)

// The subprotocol with which a client asks for an empty text message beside each
// ping. A browser's script cannot see pings: this is how it can tell a quiet room
// from a dead line.
const heartbeat = "heartbeat"

var newline = []byte{'\n'}

// A goodbye is the close code and reason with which the server ends a
// connection. RFC 6455 section 7.4.
type goodbye struct {
	code   int
	reason string
}

var (
	shuttingDown = &goodbye{websocket.CloseGoingAway, "the server is shutting down"}
	notText      = &goodbye{websocket.CloseUnsupportedData, "only text messages are accepted"}
	notUTF8      = &goodbye{websocket.CloseInvalidFramePayloadData, "the message is not valid UTF-8"}
	tooBig       = &goodbye{websocket.CloseMessageTooBig, fmt.Sprintf("the message is longer than %d bytes", maxMessageSize)}
	unregistered = &goodbye{websocket.CloseNormalClosure, ""}
	fellBehind   = &goodbye{websocket.CloseTryAgainLater, "you do not read as fast as the others write"}
)

func (g *goodbye) Error() string { return fmt.Sprintf("close %d: %s", g.code, g.reason) }

// A message fits into the write buffer, so that a lone one is written at once
// and without allocating, which a WriteBufferPool would have to.
var upgrader = websocket.Upgrader{
	ReadBufferSize:  512,
	WriteBufferSize: 512,
	Subprotocols:    []string{heartbeat},
}

// A Client stands between one WebSocket connection and the hub.
type Client struct {
	hub  *Hub
	conn *websocket.Conn

	// From the hub to writePump. Closed by the hub when the client is to go.
	send chan []byte

	// Why the client is to go: the word of whoever finds out first.
	goodbye atomic.Pointer[goodbye]

	// Owned by readPump: when the next frame is due at the allowed rate.
	due time.Time
}

// readPump takes what the peer says to the hub. It does all reads on conn. It
// ends when the peer closes conn, falls silent for pongWait or breaks a rule,
// and otherwise with conn, which is closed at most closeWait after writePump.
//
// An idle client waits in NextReader, for which a stack of 2 KiB just suffices:
// what else there is to do is done in methods, to keep this frame small.
func (c *Client) readPump() {
	c.conn.SetReadLimit(absurdSize)
	pong := c.conn.PingHandler()
	c.conn.SetPingHandler(func(data string) error { c.heard(); return pong(data) })
	c.conn.SetPongHandler(func(string) error { c.heard(); return nil })
	for {
		c.conn.SetReadDeadline(time.Now().Add(pongWait)) // the room's time is not the peer's
		messageType, r, err := c.conn.NextReader()
		if err == nil && c.heard() {
			err = c.hear(messageType, r)
		}
		if err != nil {
			c.leave(err)
			return
		}
	}
}

// heard notes that the peer lives, and keeps it to the allowed rate: it sleeps
// until the frame just read is due, so that TCP slows the peer down. It reports
// false when the client is to go: nothing counts then, and nothing is slowed.
func (c *Client) heard() bool {
	if c.goodbye.Load() != nil {
		return false
	}
	now := time.Now()
	c.conn.SetReadDeadline(now.Add(pongWait))
	if earliest := now.Add(-rateBurst * rateInterval); c.due.Before(earliest) {
		c.due = earliest
	}
	c.due = c.due.Add(rateInterval)
	time.Sleep(c.due.Sub(now))
	return true
}

// hear hands the message in r to the hub as one clean line, unless nothing is
// left of it. It returns the goodbye that the message deserves, or what broke
// conn.
func (c *Client) hear(messageType int, r io.Reader) error {
	message := make([]byte, 0, maxMessageSize+1) // one more, to find the end or what is too big
	for len(message) <= maxMessageSize {
		n, err := r.Read(message[len(message):cap(message)])
		message = message[:len(message)+n]
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		c.conn.SetReadDeadline(time.Now().Add(pongWait)) // each fragment is a frame
	}
	if len(message) > maxMessageSize {
		return tooBig
	}
	if messageType != websocket.TextMessage {
		return notText
	}
	if !utf8.Valid(message) {
		return notUTF8
	}
	if message = clean(message); len(message) > 0 {
		c.hub.broadcast <- message
	}
	return nil
}

// clean makes one line of message: control characters, which end lines and
// drive terminals, become spaces, and white space around it goes.
func clean(message []byte) []byte {
	return bytes.TrimSpace(bytes.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, message))
}

// leave takes the client out of the hub because of err, and sees conn closed.
func (c *Client) leave(err error) {
	_, closed := err.(*websocket.CloseError)
	if err == websocket.ErrReadLimit {
		err = tooBig
	}
	fault, _ := err.(*goodbye)
	c.goodbye.CompareAndSwap(nil, fault)
	if why := c.goodbye.Load(); why != nil {
		err = why
	}
	if err != shuttingDown && !websocket.IsCloseError(err, websocket.CloseNormalClosure,
		websocket.CloseGoingAway, websocket.CloseNoStatusReceived) {
		log.Printf("%v: %v", c.conn.RemoteAddr(), err)
	}
	c.hub.unregister <- c

	// To close conn with input unread is to reset it, and the reset can destroy
	// the close frame: the peer may go on, unheard, until it or writePump closes.
	if !closed {
		io.Copy(io.Discard, c.conn.NetConn())
	}
	if fault == nil { // or writePump has yet to tell the peer, and closes conn
		c.conn.Close()
	}
	c.hub.left <- c
}

// writePump takes what the hub says to the peer, and pings it. It does all
// writes of messages on conn. It ends when the hub closes send, after what is
// queued and the goodbye, or when a write fails; readPump then has closeWait to
// read what the peer still has to say, before conn is closed under it.
func (c *Client) writePump() {
	ticker := time.NewTicker(pingPeriod)
	defer func() {
		ticker.Stop()
		time.AfterFunc(closeWait, func() {
			// If there was no goodbye, and readPump has found nothing wrong with
			// conn either, then a write took too long: the peer is stuck.
			c.goodbye.CompareAndSwap(nil, fellBehind)
			c.conn.Close()
		})
	}()
	var err error
	for err == nil {
		select {
		case message, ok := <-c.send:
			c.conn.SetWriteDeadline(time.Now().Add(writeWait))
			if !ok {
				c.goodbye.CompareAndSwap(nil, unregistered)
				why := c.goodbye.Load()
				c.conn.WriteMessage(websocket.CloseMessage, websocket.FormatCloseMessage(why.code, why.reason))
				return
			}
			err = c.write(message)
		case <-ticker.C:
			c.conn.SetWriteDeadline(time.Now().Add(writeWait))
			err = c.conn.WriteMessage(websocket.PingMessage, nil)
			if err == nil && c.conn.Subprotocol() == heartbeat {
				err = c.conn.WriteMessage(websocket.TextMessage, nil)
			}
		}
	}
}

// batches holds the memory in which write joins messages.
var batches = sync.Pool{New: func() any { return new([maxBatchSize]byte) }}

// write sends message, and what has queued up behind it, in one frame.
func (c *Client) write(message []byte) error {
	if len(c.send) == 0 {
		return c.conn.WriteMessage(websocket.TextMessage, message)
	}
	memory := batches.Get().(*[maxBatchSize]byte)
	defer batches.Put(memory)
	batch := append(memory[:0], message...)
	for len(c.send) > 0 && len(batch)+len(newline)+maxMessageSize <= maxBatchSize {
		batch = append(batch, newline...)
		batch = append(batch, <-c.send...)
	}
	return c.conn.WriteMessage(websocket.TextMessage, batch)
}

// serveWs makes the request a WebSocket connection and its peer a client of
// hub. It returns at once: the pumps go on in goroutines of their own, so that
// what the request holds can be freed.
func serveWs(hub *Hub, w http.ResponseWriter, r *http.Request) {
	// The client joins before the handshake is answered, so that its peer
	// misses nothing that is said once it knows that it is connected.
	client := &Client{hub: hub, send: make(chan []byte, sendQueueSize)}
	select {
	case hub.register <- client:
	case <-hub.stop:
		http.Error(w, shuttingDown.reason, http.StatusServiceUnavailable)
		return
	}
	conn, err := upgrader.Upgrade(w, r, nil)
	if err != nil {
		log.Printf("%s: %v", r.RemoteAddr, err)
		hub.unregister <- client
		hub.left <- client
		return
	}
	client.conn = conn
	go client.writePump()
	go client.readPump()
}
