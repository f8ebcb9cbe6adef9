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

	// Time between two pings to the peer; below pongWait, so that a live peer has
	// something to answer in time. One that takes nothing for the rest of pongWait
	// is dropped before its ping arrives.
	pingPeriod = pongWait * 9 / 10

	// Time allowed to the peer to answer our close frame with its own.
	closeWait = time.Second

	// Maximum size in bytes of a message from the peer. If you raise it, raise
	// maxBatchSize to a multiple of it, and tell home.html.
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

// The server's own goodbyes.
var (
	shuttingDown = &goodbye{Code: websocket.CloseGoingAway, Text: "the server is shutting down"}
	unregistered = &goodbye{Code: websocket.CloseNormalClosure, Text: "the server has ended this connection"}
	notText      = &goodbye{Code: websocket.CloseUnsupportedData, Text: "send text messages, not binary ones"}
	notUTF8      = &goodbye{Code: websocket.CloseInvalidFramePayloadData, Text: "send text as valid UTF-8"}
	tooBig       = &goodbye{Code: websocket.CloseMessageTooBig, Text: "send at most " + strconv.Itoa(maxMessageSize) + " bytes in a message"}
	tooSlow      = &goodbye{Code: websocket.ClosePolicyViolation, Text: "answer pings, and complete each message, within " + pongWait.String()}
	fellBehind   = &goodbye{Code: websocket.CloseTryAgainLater, Text: "read as fast as the others write"}
)

// Each connection keeps its read buffer: a small one, as longer messages pass
// through it in parts. They share write buffers, as only those need one that are
// being written to. A write buffer holds a whole batch, which thus is one frame.
var upgrader = websocket.Upgrader{
	HandshakeTimeout: writeWait,
	ReadBufferSize:   512,
	WriteBufferSize:  maxBatchSize,
	WriteBufferPool:  new(sync.Pool),
	Subprotocols:     []string{heartbeat},
}

// A Client stands between one WebSocket connection and the hub.
type Client struct {
	hub *Hub
	who Identity // not what the peer says, but what the server knows

	// Nil until the handshake has been answered, which is after the client has
	// registered: run must not use it.
	conn *websocket.Conn

	// From run, through its method queue, to writePump. Run closes it when the client
	// has to go: after that, a send panics, so nothing else should send here.
	send chan []byte

	// Owned by run: the client has been dropped, for good.
	dropped bool

	// Why the client has to go. Whoever finds a reason sets it; the first counts.
	goodbye atomic.Pointer[goodbye]

	// Runs writePump, so that readPump can wait for its end.
	writing sync.WaitGroup

	// Owned by readPump:
	due       time.Time // when the peer is no longer ahead of its rate
	receiving bool      // a message has begun and is not complete
}

// readPump takes what the peer says to the hub. It does all reads on conn. Once
// there is a goodbye it reads on until the peer has answered it, but takes nothing
// to the hub any more. It ends when nothing can be read: as a rule after the peer's
// close frame, and at the latest when writePump has conn closed.
//
// An idle client waits in NextReader, within a stack of 2 KiB as long as this
// frame is small: what else there is to do is done in methods.
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
		if err != nil {
			c.leave(err)
			return
		}
		c.receive(messageType, r)
	}
}

// pace takes note of a message that begins, or of a control frame. It gives the
// peer pongWait for what comes next, and sleeps if the peer is ahead of its rate
// by more than a burst, so that TCP slows it down.
func (c *Client) pace() {
	if c.goodbye.Load() != nil {
		return // Read on at full speed: the answer comes behind what is being sent.
	}
	if !c.receiving { // A ping in the middle of a message gives it no more time.
		c.conn.SetReadDeadline(time.Now().Add(pongWait))
	}
	ahead := max(0, time.Until(c.due)) + rateInterval
	c.due = time.Now().Add(ahead)
	time.Sleep(ahead - rateBurst*rateInterval)
}

// receive takes the message in r to the hub as one clean line, unless it is
// blank, or comes after the goodbye. One that breaks a rule ends the client.
func (c *Client) receive(messageType int, r io.Reader) {
	c.pace()
	c.receiving = true
	message, err := io.ReadAll(io.LimitReader(r, maxMessageSize+1))
	c.receiving = false
	line := clean(message)
	switch {
	case err != nil || c.goodbye.Load() != nil: // If it is err, NextReader returns it, too.
	case len(message) > maxMessageSize:
		c.unregister(tooBig)
	case messageType != websocket.TextMessage:
		c.unregister(notText)
	case !utf8.Valid(message):
		c.unregister(notUTF8)
	case len(line) > 0:
		c.hub.broadcast <- append([]byte(c.who.Name+": "), line...)
	}
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

// unregister has run drop the client, whose peer is told why. It waits for run, so
// run must not call it. Nor may anybody else once readPump has ended, as run may
// have ended, too.
func (c *Client) unregister(why *goodbye) {
	c.goodbye.CompareAndSwap(nil, why)
	c.hub.unregister <- c
}

// leave ends the client after reading has failed with err. It closes conn when
// writePump has said goodbye.
func (c *Client) leave(err error) {
	why, gone := err.(*goodbye) // the peer's own, or 1006 if the connection ended without one
	if network, ok := err.(net.Error); ok && network.Timeout() {
		why = tooSlow
	} else if ok {
		why, gone = &goodbye{Code: websocket.CloseAbnormalClosure, Text: err.Error()}, true
	} else if !gone {
		why = &goodbye{Code: websocket.CloseProtocolError, Text: err.Error()}
	}
	ended := "dropped"
	if c.goodbye.CompareAndSwap(nil, why) && gone {
		ended = "left"
	}
	c.hub.unregister <- c
	if why := c.goodbye.Load(); websocket.IsUnexpectedCloseError(why, websocket.CloseNormalClosure,
		websocket.CloseGoingAway, websocket.CloseNoStatusReceived) {
		log.Printf("%v: %s with %q", c.conn.RemoteAddr(), ended, why) // quoted, as the peer may have chosen the words
	}
	c.writing.Wait()
	if !gone {
		// The peer may still be sending. To close a TCP connection with input
		// unread is to reset it, and the reset can destroy the close frame. The
		// input can no longer be parsed: wait until the peer closes its side, too.
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
// writes of messages on conn. It says goodbye when run has closed send and what
// was queued is written, and gives up when a write fails. After that readPump has
// closeWait to read the peer's answer; then conn is closed in any case, which ends
// readPump, too. (A TLS connection may take five seconds more to close.)
func (c *Client) writePump() {
	defer c.discard()
	defer time.AfterFunc(closeWait, func() { c.conn.Close() })
	pings := time.NewTicker(pingPeriod)
	defer pings.Stop()
	var err error
	for err == nil {
		select {
		case message, ok := <-c.send:
			c.conn.SetWriteDeadline(time.Now().Add(writeWait))
			if !ok {
				c.goodbye.CompareAndSwap(nil, unregistered) // if somebody has closed send by hand
				// 1006 is no code to send. RFC 6455 section 7.4.1.
				if why := c.goodbye.Load(); why.Code != websocket.CloseAbnormalClosure {
					c.conn.WriteMessage(websocket.CloseMessage, websocket.FormatCloseMessage(why.Code, why.Text))
				}
				return
			}
			err = c.writeBatch(message)
		case <-pings.C:
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

// discard empties send until run closes it, so that nobody waits who sends to a
// client that takes nothing any more.
func (c *Client) discard() {
	for range c.send {
	}
}

// writeBatch sends message, and what has queued up behind it, in one frame.
func (c *Client) writeBatch(message []byte) error {
	w, err := c.conn.NextWriter(websocket.TextMessage)
	if err != nil {
		return err
	}
	w.Write(message)
	for room := maxBatchSize - len(message); len(c.send) > 0 && room >= len(newline)+maxLineSize; {
		message = <-c.send
		w.Write(newline)
		w.Write(message)
		room -= len(newline) + len(message)
	}
	return w.Close()
}

// serveWs makes the request a WebSocket connection and its peer a client of
// hub. It returns once the handshake is answered: the pumps go on in goroutines
// of their own, so that what the request holds can be freed.
func serveWs(hub *Hub, who Identity, w http.ResponseWriter, r *http.Request) {
	// The client joins before the handshake is answered, so that its peer
	// misses nothing that is said once it knows that it is connected.
	client := &Client{hub: hub, who: who, send: make(chan []byte, sendQueueSize)}
	select {
	case hub.register <- client:
	case <-hub.stopped:
		http.Error(w, shuttingDown.Text, http.StatusServiceUnavailable)
		return
	}
	conn, err := upgrader.Upgrade(w, r, nil)
	if err != nil {
		log.Printf("%s: %q", r.RemoteAddr, err)
		go client.discard()
		hub.unregister <- client
		hub.left <- client
		return
	}
	client.conn = conn
	client.writing.Go(client.writePump)
	go client.readPump()
}
