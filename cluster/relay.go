package main

import (
	"crypto/rand"
	"fmt"
	"log"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"github.com/nats-io/nats.go"
)

const (
	// Maximum number of messages queued while NATS is unreachable, 4 MB. Then
	// backpressure delays their senders.
	outgoingSize = 8 << 10

	// Maximum number of this node's messages in flight, published and not echoed. Those
	// queued for the hub count as well. A connection that breaks can lose them. A larger
	// window would add latency under load; a smaller one limits throughput when NATS is far.
	maxInFlight = 32

	// Maximum number of messages from NATS queued for the hub. More are lost: as every node
	// has a window, only a hub that is slower than those of the senders falls so far behind.
	incomingSize = 8 << 10

	// Backoff before reconnecting to NATS; a random time of up to as much again is added.
	reconnectWait = 250 * time.Millisecond

	// Time from reconnecting to publishing, so that the other nodes have reconnected too.
	settleWait = 8 * reconnectWait

	// Time allowed for a subscription to propagate through the NATS cluster before a new
	// node accepts clients: it sees only that its own server has it. 26 ms was the maximum
	// in 4,000 joins at three servers on one machine, half of them with both cores busy.
	propagationWait = 250 * time.Millisecond

	// Time between two probes of a node.
	probePeriod = 5 * time.Second

	// Time allowed for an echo. Without one, the node reconnects to NATS.
	answerWait = 10 * time.Second

	// Time allowed for NATS to accept what is queued when the node stops.
	drainWait = 5 * time.Second

	// Time between two reports in the log, so that other publishers cannot fill it.
	reportPeriod = time.Second

	// Maximum size in bytes of a message with its header, which NATS must accept.
	payloadSize = 128 + maxMessageSize
)

// A Relay joins the hubs of several nodes to one room. It publishes what the node's clients
// send, and delivers to the hub what NATS sends, the node's own messages included: each
// message takes the same path once, wherever its sender is.
//
// The echo of a node's own messages proves that it can publish and receive. At most
// maxInFlight messages are without an echo; then senders wait, so a hub that is behind slows
// them down: NATS has no backpressure. A probe is a message without text, published for its
// echo, and so that other nodes know of this one.
type Relay struct {
	hub     *Hub // delivers to the node's clients
	options nats.Options
	subject string
	log     *log.Logger
	metrics *metrics

	// To run:
	broadcast chan []byte      // from clients: a message for every client of every node
	incoming  chan *nats.Msg   // from NATS
	conns     chan *nats.Conn  // from connect
	statuses  chan nats.Status // of nc
	denied    chan struct{}    // NATS has denied a publish or a subscription

	// Closed by run when this node has received an echo for the first time. Clients that
	// connect from then on miss nothing.
	joined chan struct{}

	// Closed by leave.
	clientsDone chan struct{}

	running sync.WaitGroup // run

	// From run to handlers:
	hasJoined atomic.Bool  // joined is closed
	ready     atomic.Bool  // this node receives its echoes
	queued    atomic.Int64 // number of messages in outgoing
	unechoed  atomic.Int64 // number of this node's messages in flight
	heard     atomic.Int64 // number of nodes whose messages arrive, this one included

	// Owned by run:
	nc        *nats.Conn       // nil until the first connection
	probe     <-chan time.Time // time of the next probe
	outgoing  [][]byte         // messages of clients, to publish
	state     state
	ticks     int                // reports since the start
	idleTicks int                // reports since the last echo, or change of the connection
	id        string             // this node, in the headers of its messages
	published uint64             // number of messages published
	echoed    uint64             // number of them that have come back, or are lost
	nodes     map[string]*sender // by ID, this one included
}

// A state is what run knows of the path from this node to NATS and back.
type state int

const (
	settling   state = iota // disconnected, or connected for less than settleWait
	mayProbe                // waiting for the echo of a probe
	mayPublish              // a probe has come back, so messages of clients are published
)

// A sender is a node of the room, as far as this one has received its messages.
type sender struct {
	nextSeq   uint64 // number of messages that it has published
	lastHeard int    // ticks when the last message or probe arrived
}

// join joins hub to the room of that subject, in the background, and retries until it has
// joined. It returns an error if the subject is invalid. Later errors go to logger.
//
// The caller runs hub, and finally calls leave. Clients that connect once joined is closed send
// on the relay's broadcast instead of the hub's.
func join(hub *Hub, options nats.Options, subject string, logger *log.Logger) (*Relay, error) {
	if !isLiteral(subject) {
		return nil, fmt.Errorf("%.40q cannot name a room: a NATS subject of at most %d bytes can, "+
			"without white space and wildcards", subject, maxSubjectSize)
	}
	r := &Relay{
		hub:         hub,
		options:     options,
		subject:     subject,
		log:         logger,
		broadcast:   make(chan []byte),
		incoming:    make(chan *nats.Msg, incomingSize),
		conns:       make(chan *nats.Conn),
		denied:      make(chan struct{}, 1),
		joined:      make(chan struct{}),
		clientsDone: make(chan struct{}),
		id:          rand.Text(),
		nodes:       make(map[string]*sender),
	}
	r.metrics = newMetrics(r)
	go r.connect()
	r.running.Go(r.run)
	return r, nil
}

// leave publishes what is queued, for at most drainWait, and closes the connection. Call it
// once, when all clients are done: messages of others are lost.
func (r *Relay) leave() {
	close(r.clientsDone)
	r.running.Wait()
}

// run is the relay's goroutine. It ends after leave, when all messages have been echoed, or
// drainWait has passed.
func (r *Relay) run() {
	var drained <-chan time.Time
	ticks := time.Tick(reportPeriod)
	stopped, clientsDone := r.hub.stopped, r.clientsDone
loop:
	for clientsDone != nil || len(r.outgoing)+r.inFlight() > 0 {
		// Backpressure: clients wait while outgoing is full. While messages come back, one that
		// waits for the window is enough.
		in, most := r.broadcast, outgoingSize
		if r.state == mayPublish {
			most = 1
		}
		if stopped != nil && len(r.outgoing) >= most {
			in = nil // a nil channel is never ready
		}
		select {
		case message := <-in:
			r.outgoing = append(r.outgoing, message)
		case message := <-r.incoming:
			r.deliver(message)
		case r.nc = <-r.conns:
			r.statuses = r.nc.StatusChanged(nats.CONNECTED, nats.RECONNECTING, nats.CLOSED)
			r.nc.Subscribe(r.subject, r.receive) // If it fails, no probe comes back.
			r.settle()
		case <-r.statuses: // connected, disconnected, or closed
			r.settle()
		case <-r.denied:
			r.state = min(r.state, mayProbe)
		case <-r.probe:
			r.probe = time.After(probePeriod)
			if r.nc.IsConnected() {
				r.state = max(r.state, mayProbe)
				if err := r.publish(nil); err != nil {
					r.metrics.count(err.Error(), 1)
				}
			}
		case <-ticks:
			r.check()
			r.countNodes()
			r.metrics.report(r.log)
		case <-stopped:
			stopped = nil // Each client may broadcast one more message before it is done.
		case <-clientsDone:
			clientsDone, drained = nil, time.After(drainWait)
		case <-drained:
			break loop
		}
		// The window shrinks while the hub is behind, but to no less than one message, so that
		// a slow node can still publish.
		window := max(1, maxInFlight-len(r.incoming))
		for len(r.outgoing) > 0 && r.state == mayPublish && r.inFlight() < window {
			if err := r.publish(r.outgoing[0]); err == nats.ErrMaxPayload {
				r.metrics.count(tooLong, 1)
			} else if err != nil {
				break
			}
			r.outgoing = r.outgoing[1:]
		}
		r.queued.Store(int64(len(r.outgoing)))
		r.unechoed.Store(int64(r.inFlight()))
		r.ready.Store(r.state == mayPublish && !r.isLate())
		if r.ready.Load() && r.hasJoined.CompareAndSwap(false, true) {
			close(r.joined)
		}
	}
	r.nc.Close() // does nothing if it is nil
	r.metrics.count(notEchoed, uint64(r.inFlight()))
	r.metrics.count(notAccepted, uint64(len(r.outgoing)))
	r.metrics.report(r.log)
}

// settle makes this node wait before it publishes again, as the connection has changed.
func (r *Relay) settle() {
	r.state, r.idleTicks = settling, 0
	r.probe = time.After(settleWait)
	if !r.hasJoined.Load() { // It has no clients, so it need not wait for other nodes.
		r.probe = time.After(propagationWait)
	}
	if r.nc.IsClosed() { // by nats.go, after an error that it does not handle
		r.logDisconnect(r.nc.LastError())
		r.statuses = nil
		go r.connect()
	}
}

// publish publishes message; without text it is a probe, which does not count. The header has
// the node's ID, and how many messages it has published before, so that others can count what
// they miss. After an error, NATS has not received all of it.
func (r *Relay) publish(message []byte) error {
	header := nats.Header{"Node": {r.id}, "Said": {strconv.FormatUint(r.published, 10)}}
	err := r.nc.PublishMsg(&nats.Msg{Subject: r.subject, Header: header, Data: message})
	if err == nil {
		r.metrics.published.Inc()
		r.published += min(1, uint64(len(message)))
	}
	return err
}

// inFlight returns how many of this node's messages have not been echoed.
func (r *Relay) inFlight() int {
	return int(r.published - r.echoed)
}

// isLate reports whether the last echo was answerWait ago. It counts reports instead of
// time, so that a node that was paused first receives what NATS has buffered for it.
func (r *Relay) isLate() bool {
	return r.idleTicks > int(answerWait/reportPeriod)
}

// check reconnects if no echo arrives: the connection may be half-open, or permissions
// withdrawn. run calls it every reportPeriod.
func (r *Relay) check() {
	r.ticks++
	r.idleTicks++
	if r.isLate() && r.state >= mayProbe && len(r.incoming) == 0 { // The echo may be in incoming.
		r.nc.ForceReconnect()
	}
}

// receive passes a message from NATS to run. nats.go calls it, in a goroutine of its own. It
// refuses longer messages than nodes publish, so that incoming is bounded in bytes, too.
func (r *Relay) receive(message *nats.Msg) {
	defer r.metrics.received.Inc()
	if len(message.Data) > maxMessageSize || message.Size() > maxSubjectSize+payloadSize {
		r.metrics.count(refused, 1)
		return
	}
	select {
	case r.incoming <- message:
	default:
		r.metrics.count(slow, 1)
	}
}

// deliver passes a message from NATS to the hub. Other software may publish on the subject,
// so it validates and cleans the message as readPump does.
func (r *Relay) deliver(message *nats.Msg) {
	if !r.isNew(message) {
		r.metrics.count(late, min(1, uint64(len(message.Data))))
		return
	}
	if !utf8.Valid(message.Data) {
		r.metrics.count(refused, 1)
		return
	}
	line := clean(message.Data)
	if string(line) != string(message.Data) {
		r.metrics.count(cleaned, 1)
	}
	if len(line) == 0 {
		return
	}
	select {
	case r.hub.calls <- func() { // as do, but the relay need not wait
		r.hub.deliver(line)
		r.metrics.deliveries.Add(float64(len(r.hub.clients)))
	}:
	case <-r.hub.stopped: // no clients are left
	}
}

// isNew reports whether message is new: one that a NATS server has delayed may arrive after
// later ones. It counts the messages of the same node that are missing between the last one
// and this one, and takes the echo of a probe as proof that this node is in the room. Other
// software publishes without these headers.
func (r *Relay) isNew(message *nats.Msg) bool {
	id := message.Header.Get("Node")
	seq, err := strconv.ParseUint(message.Header.Get("Said"), 10, 64)
	if err != nil {
		return true
	}
	node, known := r.nodes[id]
	if !known {
		node = &sender{nextSeq: seq}
		r.nodes[id] = node
	}
	if seq < node.nextSeq {
		return false
	}
	lost := seq - node.nextSeq
	node.nextSeq, node.lastHeard = seq+min(1, uint64(len(message.Data))), r.ticks
	if id != r.id {
		r.metrics.count(missed, lost)
		return true
	}
	r.metrics.count(notEchoed, lost)
	r.echoed, r.idleTicks = node.nextSeq, 0
	// Only a probe is certain not to have been queued since before a disconnect.
	if isProbe := len(message.Data) == 0; isProbe && r.state == mayProbe {
		r.state = mayPublish
		if most := r.nc.MaxPayload(); most < payloadSize {
			r.log.Printf("NATS accepts messages of at most %d bytes, and has to accept %d: "+
				"longer ones are lost", most, payloadSize)
		}
	}
	return true
}
