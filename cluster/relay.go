package main

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"log"
	"math"
	"math/rand/v2"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
)

const (
	// Messages that wait here for NATS before their senders are slowed: 4 MB,
	// and as much again that publish has in hand.
	outboxSize = 8 << 10

	// Messages published before NATS has to say that it has them: what can be
	// lost when the connection breaks.
	batchSize = 256

	// Messages, and bytes, that wait here for the hub before more are lost: some
	// seconds of more chat than anybody can read.
	inboxSize  = 64 << 10
	inboxBytes = 64 << 20

	// Messages that wait here for the hub before publish gives it time to catch
	// up, in breathers, and how many of these it gives at most for each batch: a
	// flood from elsewhere must not silence this node.
	inboxCrowded  = 1 << 10
	mostBreathers = 1000

	// Time between two attempts to reach NATS again; as much again is added at
	// random, so that nodes do not come all at once.
	reconnectWait = 250 * time.Millisecond

	// Time for which a node that has NATS back keeps what it has to say, so that
	// the others have NATS back too and hear it.
	settleWait = 8 * reconnectWait

	// Time that the servers of a NATS cluster get to tell each other that a node has
	// joined, before the node takes clients: it sees only when its own server knows.
	// They took 26 ms at most, in 4,000 joins at three servers on one machine, half
	// of them with both cores kept busy.
	spreadWait = 250 * time.Millisecond

	// Time allowed to NATS to answer. One that takes longer is as good as away.
	answerWait = 10 * time.Second

	// Time allowed to NATS to take what is left when the node ends.
	drainWait = 5 * time.Second

	// Time between two reports of what went wrong: whoever can make things go
	// wrong must not be able to fill the log.
	reportPeriod = time.Second

	// Maximum size in bytes of a subject. NATS closes the connection over one that
	// does not fit into its line of 4 KiB.
	maxSubjectSize = 255

	// The most that a message's header takes, in bytes.
	headerSize = 128

	// Nodes whose last messages are remembered before all are forgotten: a node that
	// restarts is a new one, and other software can make nodes up.
	mostNodes = 1 << 10
)

// A Relay makes the hubs of several nodes one room. What a node's clients say
// goes to NATS, and what NATS says, this node's own messages among it, goes to
// the node's clients: each message takes the same way once, wherever its sender
// is.
type Relay struct {
	// The node's hub, which tells the clients.
	hub *Hub

	// What clients take for their hub: to join and leave it is to join and leave
	// hub, but what they broadcast is collected here.
	front *Hub

	nc      *nats.Conn
	sub     *nats.Subscription
	subject string

	// From collect to publish; closed by collect when it ends.
	batches chan [][]byte

	// Closed by leave: the clients have left, and nobody says anything any more.
	over chan struct{}

	goroutines sync.WaitGroup // collect and publish

	// The connection to NATS that publish may use, as settleWait has passed since it
	// was made. A connection is known by how many there were before it.
	settled atomic.Uint64

	// This node's name. A message's header holds it and the message's number, so
	// that other nodes can count what they miss.
	name uint64

	// Owned by publish: the number of this node's last message.
	number uint64

	// Owned by deliver: the number of the last message that came, by its node's name.
	latest map[uint64]uint64

	mu       sync.Mutex
	troubles map[string]int // since the last report
}

// connect connects to NATS, for as long as the connection is not closed here.
// It returns an error if none of the servers can be reached, or none accepts.
func connect(urls, creds string) (*nats.Conn, error) {
	options := []nats.Option{
		nats.Name("chat"),
		nats.NoCallbacksAfterClientClose(),

		// A server that is gone without a word is found out in three answerWaits.
		nats.PingInterval(answerWait),
		nats.FlusherTimeout(answerWait),
		nats.ReconnectOnFlusherError(),

		// Without end, also while NATS does not know this node's credentials.
		nats.MaxReconnects(-1),
		nats.IgnoreAuthErrorAbort(),
		nats.ReconnectWait(reconnectWait),
		nats.ReconnectJitter(reconnectWait, reconnectWait),

		// None: nats.go would send what it holds the moment it is connected,
		// before other nodes are, and forget it if the connection broke again.
		nats.ReconnectBufSize(-1),

		nats.DisconnectErrHandler(func(_ *nats.Conn, err error) {
			// Without an error it is send that has given up.
			log.Printf("NATS is away: %v; what is said meanwhile waits", cmp.Or(err, nats.ErrTimeout))
		}),
	}
	if creds != "" {
		options = append(options, nats.UserCredentials(creds))
	}
	nc, err := nats.Connect(urls, options...)
	if err == nil {
		return nc, nil
	}
	// The text of err may repeat a URL, and with it a password: say what is wrong
	// in words that cannot.
	why := "no server can be reached that accepts this node and its credentials"
	var malformed *url.Error
	var file *fs.PathError
	switch {
	case errors.As(err, &malformed):
		why = "a URL is malformed; in a name or password write %2F for /, %23 for #, %2C for a comma and so on"
	case errors.As(err, &file):
		why = file.Error()
	case errors.Is(err, nats.ErrAuthorization):
		why = "the credentials are not accepted"
	case errors.Is(err, nats.ErrTLS):
		why = "TLS fails; this machine may not know the authority of the server's certificate"
	}
	return nil, errors.New("cannot join NATS: " + why)
}

// join makes hub part of the room that is called subject. When it returns, hub
// will be told what anybody says in the room from then on. It returns an error
// if the subject cannot name a room, or NATS does not let this node use it.
//
// Whoever calls join runs hub, gives the relay's front to clients, and in the
// end calls leave.
func join(hub *Hub, nc *nats.Conn, subject string) (*Relay, error) {
	if len(subject) > maxSubjectSize || !server.IsValidLiteralSubject(subject) || strings.ContainsFunc(subject, unicode.IsSpace) {
		return nil, fmt.Errorf("%.40q cannot name a room: a NATS subject of at most %d bytes can, without white space and wildcards",
			subject, maxSubjectSize)
	}
	if most := nc.MaxPayload(); most < headerSize+maxMessageSize || !nc.HeadersSupported() {
		return nil, fmt.Errorf("NATS has to accept messages of %d bytes, with headers", headerSize+maxMessageSize)
	}
	front := *hub
	front.clients, front.broadcast = nil, make(chan []byte)
	r := &Relay{
		hub:      hub,
		front:    &front,
		nc:       nc,
		subject:  subject,
		batches:  make(chan [][]byte),
		over:     make(chan struct{}),
		name:     rand.Uint64(),
		latest:   make(map[uint64]uint64),
		troubles: make(map[string]int),
	}
	nc.SetErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { r.note(err.Error(), 1) })
	nc.SetReconnectHandler(r.back)
	r.settled.Store(nc.Stats().Reconnects)
	var err error
	if r.sub, err = nc.Subscribe(subject, r.deliver); err != nil {
		return nil, err
	}
	r.sub.SetPendingLimits(inboxSize, inboxBytes)
	if err := cmp.Or(nc.FlushTimeout(answerWait), nc.LastError()); err != nil {
		return nil, err
	}
	time.Sleep(spreadWait)
	r.goroutines.Go(r.collect)
	r.goroutines.Go(r.publish)
	return r, nil
}

// leave sees what clients have said taken to NATS, for drainWait at most, and
// closes the connection. Call it once, when they have all left the hub: one
// that has not is left behind, and what it says is lost.
func (r *Relay) leave() {
	close(r.over)
	defer time.AfterFunc(drainWait, r.nc.Close).Stop()
	r.goroutines.Wait()
	r.logTroubles()
	r.nc.Close()
}

// collect takes what clients say, and hands it to publish when that has time. A
// full outbox slows them: it takes no more until publish has taken it. It ends
// when the clients have left and publish has taken everything.
func (r *Relay) collect() {
	defer close(r.batches)
	var batch [][]byte
	size, stop, over := outboxSize, r.front.stop, r.over
	for over != nil || len(batch) > 0 {
		in, out := r.front.broadcast, r.batches
		if len(batch) >= size {
			in = nil // a nil channel is never ready
		}
		if len(batch) == 0 {
			out = nil
		}
		select {
		case message := <-in:
			batch = append(batch, message)
		case out <- batch:
			batch = nil
		case <-stop:
			// Each client has at most one more message to say before it can leave.
			size, stop = math.MaxInt, nil
		case <-over:
			over = nil
		}
	}
}

// publish takes to NATS what clients say, in their order. While NATS is away it
// waits. It ends when collect has ended and all is said; once the connection is
// closed, what is not said yet is lost.
func (r *Relay) publish() {
	for batch := range r.batches {
		for len(batch) > 0 && !r.nc.IsClosed() {
			for n := 0; n < mostBreathers && r.crowded(); n++ {
				time.Sleep(breather)
			}
			connection := r.nc.Stats().Reconnects
			if connection != r.settled.Load() {
				time.Sleep(breather) // the other nodes may not be back yet
				continue
			}
			n, err := r.send(batch[:min(len(batch), batchSize)])
			if err != nil || r.nc.Stats().Reconnects != connection {
				// To send them again could deliver them twice.
				r.note("may have lost a message: the connection broke while it was on its way", n)
			}
			batch = batch[n:]
		}
		r.note("lost a message: NATS was away, and this node has ended", len(batch))
	}
}

// back is called by nats.go when NATS is back. It has publish go on settleWait
// later, when the other nodes are back, too.
func (r *Relay) back(nc *nats.Conn) {
	connection := nc.Stats().Reconnects
	time.AfterFunc(settleWait, func() { r.settled.Store(connection) })
	nc.FlushTimeout(answerWait) // so that NATS knows again that this node listens
	log.Printf("NATS is back: %s; this node has missed what others said meanwhile", nc.ConnectedAddr())
}

// crowded reports whether the hub is behind with what NATS says. Other nodes'
// hubs hear the same and may be as far behind, and as NATS slows nobody down,
// the node that talks has to wait.
func (r *Relay) crowded() bool {
	pending, _, err := r.sub.Pending()
	return err == nil && pending > inboxCrowded
}

// send sends messages, as far as it can, and returns how many when NATS has
// answered that it has taken them, however long that takes. If the connection
// broke meanwhile, NATS may have missed any of these, and has seen nothing of
// the others. An error says that it broke, too, but not every break is an error.
func (r *Relay) send(messages [][]byte) (n int, err error) {
	for n < len(messages) && err == nil {
		// An error means that the message, at the end of what was to be written,
		// was not, or not completely.
		header := nats.Header{"Said": {fmt.Sprint(r.name, r.number+1)}}
		if err = r.nc.PublishMsg(&nats.Msg{Subject: r.subject, Header: header, Data: messages[n]}); err == nil {
			n++
			r.number++
		}
	}
	for {
		flushed := r.nc.FlushTimeout(answerWait)
		if flushed == nil {
			return n, err
		}
		if r.nc.IsClosed() {
			return n, flushed
		}
		if errors.Is(flushed, nats.ErrTimeout) {
			r.nc.ForceReconnect()
		}
	}
}

// deliver takes one message from NATS to the hub. Other software may talk on
// the subject, so that what clients may not say is refused here again. It is
// called by nats.go, for one message after the other.
func (r *Relay) deliver(message *nats.Msg) {
	r.count(message.Header)
	if len(message.Data) > maxMessageSize || !utf8.Valid(message.Data) {
		r.note("refused a message from NATS: it was too long, or not valid UTF-8", 1)
		return
	}
	line := clean(message.Data)
	if !bytes.Equal(line, message.Data) {
		r.note("cleaned a message from NATS: it was not one line of text", 1)
	}
	if len(line) == 0 {
		return
	}
	select {
	case r.hub.broadcast <- line:
	case <-r.over: // nobody is left to hear it
	}
}

// count notes how many messages of a node have not come: those whose numbers lie
// between the last one that came and this one. Other software does not number
// its messages.
func (r *Relay) count(header nats.Header) {
	var name, number uint64
	if _, err := fmt.Sscan(header.Get("Said"), &name, &number); err != nil {
		return
	}
	if last, known := r.latest[name]; known && number > last {
		r.note("missed a message", int(number-last-1))
	}
	if len(r.latest) == mostNodes {
		clear(r.latest)
	}
	r.latest[name] = number
}

// note has the log say, within reportPeriod, that what happened n times. Any
// goroutine may call it.
func (r *Relay) note(what string, n int) {
	if n > 0 {
		r.mu.Lock()
		defer r.mu.Unlock()
		if len(r.troubles) == 0 {
			time.AfterFunc(reportPeriod, r.logTroubles)
		}
		r.troubles[what] += n
	}
}

// logTroubles logs what went wrong since it was last called.
func (r *Relay) logTroubles() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for what, n := range r.troubles {
		log.Printf("NATS: %d × %s", n, what)
	}
	clear(r.troubles)
}
