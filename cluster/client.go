package main

import (
	"bytes"
	"io"
	"log"
	"net"
	"net/http"
	"strconv"
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

	// Time between two pings to the peer; below pongWait, so that a live peer
	// always has something to answer in time.
	pingPeriod = pongWait * 9 / 10

	// Time allowed to the peer to answer our close frame with its own.
	closeWait = time.Second

	// Maximum size in bytes of a message from the peer.
	maxMessageSize = 512

	// Maximum size in bytes of a WebSocket message to the peer: what common
	// client libraries read by default.
	maxBatchSize = 32<<10 - 1

	// Messages that wait for a peer before it is dropped: what a busy room says
	// while a peer's network stalls for a moment.
	sendQueueSize = 256

	// Messages and control frames taken from a peer at once, and the time for
	// each one after that. A burst leaves the queues of the others half empty,
	// and the rate is more than people type or read.
	rateBurst    = sendQueueSize / 2
	rateInterval = 10 * time.Millisecond

	// The subprotocol with which a client asks for an empty text message with
	// each ping. A browser's script cannot see pings: this is how it can tell a
	// quiet room from a dead line.
	heartbeat = "heartbeat"
)

var newline = []byte{'\n'}

// A goodbye is the code and the reason with which a connection ends. RFC 6455
// section 7.4.
type goodbye = websocket.CloseError

var (
	shuttingDown = &goodbye{Code: websocket.CloseGoingAway, Text: "the server is shutting down"}
	unregistered = &goodbye{Code: websocket.CloseNormalClosure, Text: "the server has ended this connection"}
	notText      = &goodbye{Code: websocket.CloseUnsupportedData, Text: "send text messages, not binary ones"}
	notUTF8      = &goodbye{Code: websocket.CloseInvalidFramePayloadData, Text: "send text as valid UTF-8"}
	tooBig       = &goodbye{Code: websocket.CloseMessageTooBig, Text: "send at most " + strconv.Itoa(maxMessageSize) + " bytes in a message"}
	tooSlow      = &goodbye{Code: websocket.ClosePolicyViolation, Text: "answer pings, and complete each message, within " + pongWait.String()}
	fellBehind   = &goodbye{Code: websocket.CloseTryAgainLater, Text: "read as fast as the others write"}
)

// Connections share write buffers, as only those need one that are being written
// to. A buffer holds a whole batch, which thus is one frame.
var upgrader = websocket.Upgrader{
	HandshakeTimeout: writeWait,
	ReadBufferSize:   maxMessageSize,
	WriteBufferSize:  maxBatchSize,
	WriteBufferPool:  new(sync.Pool),
	Subprotocols:     []string{heartbeat},
}

// A Client stands between one WebSocket connection and the hub.
type Client struct {
	hub  *Hub
	conn *websocket.Conn

	// From the hub to writePump. Closed by the hub when the client has to go.
	send chan []byte

	// Why the client has to go. Whoever finds a reason sets it; the first counts.
	goodbye atomic.Pointer[goodbye]

	// Runs writePump, so that readPump can wait for its end.
	writing sync.WaitGroup

	// Owned by readPump:
	due       time.Time // when the next message or control frame is due
	receiving bool      // a message has begun and is not complete
}

// readPump takes what the peer says to the hub. It does all reads on conn. Once
// there is a goodbye it reads on until the peer has answered it, but takes nothing
// to the hub any more. It ends when nothing can be read: as a rule after the peer's
// close frame, and at the latest closeWait after writePump.
//
// An idle client waits in NextReader, for which a stack of 2 KiB just suffices:
// what else there is to do is done in methods, to keep this frame small.
func (c *Client) readPump() {
	c.conn.SetPingHandler(func(data string) error {
		c.pace()
		// A pong may have to wait for a batch. If it fails, so will writePump.
		c.conn.WriteControl(websocket.PongMessage, []byte(data), time.Now().Add(writeWait))
		return nil
	})
	c.conn.SetPongHandler(func(string) error { c.pace(); return nil })
	for {
		// Reset the deadline here: handing the last message to the hub may have
		// taken long, and the peer is not to blame for that.
		c.conn.SetReadDeadline(time.Now().Add(pongWait))
		messageType, r, err := c.conn.NextReader()
		if err != nil {
			c.leave(err)
			return
		}
		if c.goodbye.Load() == nil {
			c.receive(messageType, r)
		}
	}
}

// pace takes note of a message that begins, or of a control frame. It gives the
// peer pongWait for what comes next, and sleeps until this one is due at the
// allowed rate, so that TCP slows the peer down.
func (c *Client) pace() {
	if c.goodbye.Load() != nil {
		return // The answer comes behind what the peer is still sending.
	}
	now := time.Now()
	if !c.receiving { // A ping in the middle of a message gives it no more time.
		c.conn.SetReadDeadline(now.Add(pongWait))
	}
	if earliest := now.Add(-rateBurst * rateInterval); c.due.Before(earliest) {
		c.due = earliest
	}
	c.due = c.due.Add(rateInterval)
	time.Sleep(c.due.Sub(now))
}

// receive takes the message in r to the hub as one clean line, unless it is
// blank. A message that breaks a rule dismisses the client.
func (c *Client) receive(messageType int, r io.Reader) {
	c.pace()
	c.receiving = true
	message, err := io.ReadAll(io.LimitReader(r, maxMessageSize+1))
	c.receiving = false
	switch {
	case err != nil: // NextReader will return it, too.
	case len(message) > maxMessageSize:
		c.dismiss(tooBig)
	case messageType != websocket.TextMessage:
		c.dismiss(notText)
	case !utf8.Valid(message):
		c.dismiss(notUTF8)
	default:
		if line := clean(message); len(line) > 0 {
			c.hub.broadcast <- line
		}
	}
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

// dismiss takes the client out of the hub, which closes send, so that writePump
// says goodbye. Only readPump may call it, once or more often.
func (c *Client) dismiss(why *goodbye) {
	c.goodbye.CompareAndSwap(nil, why)
	c.hub.unregister <- c
}

// leave ends the client after reading has failed with err. It closes conn when
// writePump has said goodbye.
func (c *Client) leave(err error) {
	why, closed := err.(*websocket.CloseError) // the peer's own goodbye, or 1006 if it is gone without
	if timeout, ok := err.(net.Error); ok && timeout.Timeout() {
		why = tooSlow
	} else if !closed {
		why = &goodbye{Code: websocket.CloseProtocolError, Text: err.Error()}
	}
	c.dismiss(why)
	why = c.goodbye.Load()
	if websocket.IsUnexpectedCloseError(why, websocket.CloseNormalClosure,
		websocket.CloseGoingAway, websocket.CloseNoStatusReceived) {
		log.Printf("%v: %q", c.conn.RemoteAddr(), why) // quoted, as the peer may have chosen the words
	}
	c.writing.Wait()
	if !closed {
		// The peer may still be sending. To close a TCP connection with input
		// unread is to reset it, and the reset can destroy the close frame.
		if half, ok := c.conn.NetConn().(interface{ CloseWrite() error }); ok {
			half.CloseWrite()
		}
		c.conn.SetReadDeadline(time.Time{})
		io.Copy(io.Discard, c.conn.NetConn())
	}
	c.conn.Close()
	c.hub.left <- c
}

// writePump takes what the hub says to the peer, and pings it. It does all
// writes of messages on conn. It ends when the hub has closed send, after what is
// queued and the goodbye, or when a write fails. readPump then has closeWait to
// read the peer's answer and close conn. After that conn is closed in any case,
// which ends readPump too.
func (c *Client) writePump() {
	defer func() {
		time.AfterFunc(closeWait, func() { c.conn.Close() })
	}()
	pings := time.Tick(pingPeriod)
	var err error
	for err == nil {
		select {
		case message, ok := <-c.send:
			c.conn.SetWriteDeadline(time.Now().Add(writeWait))
			if !ok {
				// 1006 is no code to send. RFC 6455 section 7.4.1.
				if why := c.goodbye.Load(); why.Code != websocket.CloseAbnormalClosure {
					c.conn.WriteMessage(websocket.CloseMessage, websocket.FormatCloseMessage(why.Code, why.Text))
				}
				return
			}
			err = c.writeBatch(message)
		case <-pings:
			c.conn.SetWriteDeadline(time.Now().Add(writeWait))
			err = c.conn.WriteMessage(websocket.PingMessage, nil)
			if err == nil && c.conn.Subprotocol() == heartbeat {
				err = c.conn.WriteMessage(websocket.TextMessage, nil)
			}
		}
	}
	if timeout, ok := err.(net.Error); ok && timeout.Timeout() {
		c.goodbye.CompareAndSwap(nil, fellBehind)
	} // else readPump finds out what is wrong with conn
}

// writeBatch sends message, and what has queued up behind it, in one frame.
func (c *Client) writeBatch(message []byte) error {
	w, err := c.conn.NextWriter(websocket.TextMessage)
	if err != nil {
		return err
	}
	w.Write(message)
	for size := len(message); len(c.send) > 0 && size+len(newline)+maxMessageSize <= maxBatchSize; {
		message = <-c.send
		w.Write(newline)
		w.Write(message)
		size += len(newline) + len(message)
	}
	return w.Close()
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
		http.Error(w, shuttingDown.Text, http.StatusServiceUnavailable)
		return
	}
	conn, err := upgrader.Upgrade(w, r, nil)
	if err != nil {
		log.Printf("%s: %q", r.RemoteAddr, err)
		hub.unregister <- client
		hub.left <- client
		return
	}
	// The answer to a close frame is writePump's, behind what is queued.
	conn.SetCloseHandler(func(int, string) error { return nil })
	client.conn = conn
	client.writing.Go(client.writePump)
	go client.readPump()
}
