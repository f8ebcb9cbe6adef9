package main

import (
	"cmp"
	"crypto/rand"
	"errors"
	"fmt"
	"log"
	"maps"
	"strconv"
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

	// Time allowed for a subscription to propagate through the NATS cluster before the node
	// accepts clients: it sees only that its own server has it. 26 ms was the maximum in
	// 4,000 joins at three servers on one machine, half of them with both cores busy.
	propagationWait = 250 * time.Millisecond

	// Time between two probes of a node.
	probePeriod = 5 * time.Second

	// Time allowed for an echo. Without one, the node reconnects to NATS.
	answerWait = 10 * time.Second

	// Time allowed for NATS to accept what is queued when the node stops.
	drainWait = 5 * time.Second

	// Time between two reports in the log, so that other publishers cannot fill it.
	reportPeriod = time.Second

	// Maximum size in bytes of a subject. NATS closes the connection if it does not fit
	// into its line of 4 KiB.
	maxSubjectSize = 255

	// Maximum size in bytes of a node's header, and of a message with it, which NATS must
	// accept.
	headerSize  = 128
	payloadSize = headerSize + maxMessageSize

	// Number of nodes remembered before all are forgotten: a restarted node is a new one, and
	// other publishers can invent nodes.
	maxNodes = 1 << 10
)

// notEchoed reports a node's own messages without an echo: NATS may have delivered them or
// not. Publishing them again could deliver them twice.
const notEchoed = "may have lost a message: it has not come back from NATS"

// refused reports messages that no node can have published.
const refused = "refused a message from NATS: it was too long, or not valid UTF-8"

// A Relay joins the hubs of several nodes to one room. It publishes what the node's clients
// send, and delivers to the hub what NATS sends, the node's own messages included: each
// message takes the same path once, wherever its sender is.
//
// The echo of a node's own messages proves that it can publish and receive. At most
// maxInFlight messages are without an echo; then senders wait, so a hub that is behind slows
// them down: NATS has no backpressure. A probe is a message without text, published only for
// its echo.
type Relay struct {
	// The node's hub, which broadcasts to the clients.
	hub *Hub

	// The hub that clients use: hub's channels, except for broadcast, which run receives
	// from.
	front *Hub

	nc  *nats.Conn
	sub *nats.Subscription
	log *log.Logger

	// From NATS to run.
	incoming chan *nats.Msg
	statuses chan nats.Status

	// Closed by leave: all clients are done.
	over chan struct{}

	running sync.WaitGroup // run

	// From run to handlers: this node receives its echoes; outgoing is full.
	ready, full atomic.Bool

	// Owned by run, and before that by join:
	outgoing  [][]byte          // messages of clients, to publish
	settled   bool              // connected to NATS for settleWait
	inRoom    bool              // an echo has arrived since it settled
	idleTicks int               // reports since the last echo, or change of the connection
	name      string            // the node's ID in the headers of its messages
	published uint64            // number of messages published under that name
	seen      map[string]uint64 // the same of each node, as far as this one has received

	mu       sync.Mutex
	problems map[string]uint64 // since the last report
}

// join joins hub to the room of that subject: it receives every message published after join
// returns. It returns an error if the subject is invalid, or if NATS does not let this node
// publish and subscribe. Later errors go to logger.
//
// The caller runs hub, passes the relay's front to clients, and finally calls leave.
func join(hub *Hub, nc *nats.Conn, subject string, logger *log.Logger) (*Relay, error) {
	if len(subject) > maxSubjectSize || !server.IsValidLiteralSubject(subject) || strings.ContainsFunc(subject, unicode.IsSpace) {
		return nil, fmt.Errorf("%.40q cannot name a room: a NATS subject of at most %d bytes can, without white space and wildcards",
			subject, maxSubjectSize)
	}
	front := *hub
	front.broadcast = make(chan []byte) // The rest is shared, so that do and tell work.
	r := &Relay{
		hub:      hub,
		front:    &front,
		nc:       nc,
		log:      logger,
		incoming: make(chan *nats.Msg, incomingSize),
		statuses: nc.StatusChanged(nats.CONNECTED, nats.RECONNECTING),
		over:     make(chan struct{}),
		settled:  true,
		name:     rand.Text(),
		seen:     make(map[string]uint64),
		problems: make(map[string]uint64),
	}
	nc.SetErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { r.note(err.Error(), 1) })
	nc.SetDisconnectErrHandler(func(_ *nats.Conn, err error) {
		if !nc.IsClosed() { // else serve logs why
			// Without an error, check has closed the connection.
			logger.Printf("disconnected from NATS: %v; messages of clients are queued", cmp.Or(err, nats.ErrTimeout))
		}
	})
	nc.SetReconnectHandler(func(*nats.Conn) {
		// Flush, so that NATS has the subscription again. If the connection has broken again,
		// there is no address, or the flush fails.
		if address := nc.ConnectedAddr(); address != "" && nc.FlushTimeout(answerWait) == nil {
			logger.Printf("reconnected to NATS: %s; messages of other nodes were missed meanwhile", address)
			if err := accepts(nc); err != nil {
				logger.Printf("NATS: %v: longer messages are lost", err)
			}
		}
	})
	var err error
	if r.sub, err = nc.Subscribe(subject, r.receive); err != nil {
		return nil, err
	}
	// Before NATS answers the flush, it reports missing permissions and limits, and echoes the
	// probe.
	if err := cmp.Or(r.publish(nil), nc.FlushTimeout(answerWait), nc.LastError(), accepts(nc)); err != nil {
		return nil, err
	}
	for late := time.After(answerWait); !r.inRoom; {
		select {
		case message := <-r.incoming:
			r.count(message) // There are no clients yet.
		case <-late:
			return nil, errors.New("NATS does not echo this node's messages")
		}
	}
	time.Sleep(propagationWait)
	r.ready.Store(true)
	r.running.Go(r.run)
	return r, nil
}

// accepts returns an error if NATS does not accept the longest message of a node. Call it
// after a flush, as an account can have a limit of its own.
func accepts(nc *nats.Conn) error {
	if most := nc.MaxPayload(); most < payloadSize {
		return fmt.Errorf("NATS accepts messages of at most %d bytes, and has to accept %d", most, payloadSize)
	}
	return nil
}

// leave publishes what is queued, for at most drainWait, and closes the connection. Call it
// once, when all clients are done: messages of others are lost.
func (r *Relay) leave() {
	close(r.over)
	defer time.AfterFunc(drainWait, r.nc.Close).Stop()
	r.running.Wait()
	r.nc.Close()
}

// run is the relay's goroutine. It ends after leave, when all messages have been echoed, or
// the connection is closed.
func (r *Relay) run() {
	ticks, probe := time.Tick(reportPeriod), time.After(probePeriod)
	stopped, over := r.front.stopped, r.over
	for over != nil || len(r.outgoing)+r.inFlight() > 0 && !r.nc.IsClosed() {
		// Backpressure: clients wait while outgoing is full. While the node is in the room, one
		// message that waits for the window is enough.
		in := r.front.broadcast
		if stopped != nil && (len(r.outgoing) >= outgoingSize || len(r.outgoing) > 0 && r.inRoom) {
			in = nil // a nil channel is never ready
		}
		select {
		case message := <-in:
			r.outgoing = append(r.outgoing, message)
		case message := <-r.incoming:
			r.deliver(message)
		case <-r.statuses: // disconnected or reconnected
			r.settled, r.inRoom, r.idleTicks = false, false, 0
			probe = time.After(settleWait)
		case <-probe:
			r.settled, probe = r.nc.IsConnected(), time.After(probePeriod)
			r.publish(nil)
		case <-ticks:
			r.check()
			r.report()
		case <-stopped:
			stopped = nil // Each client may broadcast one more message before it is done.
		case <-over:
			over = nil
		}
		// The window shrinks while the hub is behind, but to no less than one message, so that
		// a slow node can still publish.
		window := max(1, maxInFlight-len(r.incoming))
		for len(r.outgoing) > 0 && r.inRoom && r.inFlight() < window {
			if err := r.publish(r.outgoing[0]); err == nats.ErrMaxPayload {
				r.note("lost a message: it is longer than NATS accepts", 1)
			} else if err != nil {
				break
			}
			r.outgoing = r.outgoing[1:]
		}
		r.full.Store(len(r.outgoing) >= outgoingSize)
	}
	r.note(notEchoed, r.published-r.seen[r.name])
	r.note("lost a message: NATS had not accepted it when this node stopped", uint64(len(r.outgoing)))
	r.report()
}

// publish publishes message; without text it is a probe. The header has the node, and how
// many messages it has published before, so that others can count what they miss. After an
// error, NATS has not received all of it.
func (r *Relay) publish(message []byte) error {
	header := nats.Header{"Node": {r.name}, "Said": {fmt.Sprint(r.published)}}
	err := r.nc.PublishMsg(&nats.Msg{Subject: r.sub.Subject, Header: header, Data: message})
	if err == nil && len(message) > 0 {
		r.published++
	}
	return err
}

// inFlight returns how many of this node's messages have not been echoed.
func (r *Relay) inFlight() int {
	return int(r.published - r.seen[r.name])
}

// check reconnects if no echo arrives: the connection may be half-open, or permissions
// withdrawn. run calls it every reportPeriod. It counts calls instead of time, so that a node
// that was paused first receives what NATS has buffered for it.
func (r *Relay) check() {
	r.idleTicks++
	late := r.idleTicks > int(answerWait/reportPeriod)
	r.ready.Store(r.inRoom && !late && accepts(r.nc) == nil)
	if late && r.settled && len(r.incoming) == 0 { // The echo may be in incoming.
		r.nc.ForceReconnect()
	}
}

// receive passes a message from NATS to run. nats.go calls it, in a goroutine of its own. It
// refuses longer messages than nodes publish, so that incoming is bounded in bytes, too.
func (r *Relay) receive(message *nats.Msg) {
	if len(message.Data) > maxMessageSize || message.Size() > maxSubjectSize+payloadSize {
		r.note(refused, 1)
		return
	}
	select {
	case r.incoming <- message:
	default:
		r.note("lost a message from NATS: slow consumer, the hub is behind", 1)
	}
}

// deliver passes a message from NATS to the hub. Other software may publish on the subject,
// so it validates and cleans the message as readPump does.
func (r *Relay) deliver(message *nats.Msg) {
	if !r.count(message) {
		return
	}
	if !utf8.Valid(message.Data) {
		r.note(refused, 1)
		return
	}
	line := clean(message.Data)
	if string(line) != string(message.Data) {
		r.note("cleaned a message from NATS: it was not one line of text", 1)
	}
	if len(line) == 0 {
		return
	}
	select {
	case r.hub.broadcast <- line:
	case <-r.over: // no clients are left
	}
}

// count reports whether message is new: one that a NATS server has delayed may arrive after
// later ones. It notes how many messages of the same node are missing between the last one
// and this one. Other publishers may send no number, or a false one.
func (r *Relay) count(message *nats.Msg) (isNew bool) {
	name := message.Header.Get("Node")
	// A node takes twenty years to publish 2^40 messages, and sums of false numbers below
	// that stay readable.
	before, err := strconv.ParseUint(message.Header.Get("Said"), 10, 40)
	if err != nil || len(name) > headerSize {
		return true
	}
	already, known := r.seen[name]
	if known && before < already {
		return false
	}
	after := before + uint64(min(1, len(message.Data)))
	missed := "missed a message"
	if name == r.name {
		if after > r.published {
			// Another publisher uses this name. Other nodes would ignore this node's next
			// messages as old: so it takes another name.
			r.note("took another name: another publisher uses this node's", 1)
			r.note(notEchoed, r.published-already)
			r.name, r.published = rand.Text(), 0
			r.seen[r.name] = 0
			return true
		}
		missed = notEchoed
		r.inRoom, r.idleTicks = r.settled, 0 // It may have been queued since before a disconnect.
	}
	if known {
		r.note(missed, before-already)
	} else if len(r.seen) > maxNodes {
		maps.DeleteFunc(r.seen, func(name string, _ uint64) bool { return name != r.name })
	}
	r.seen[name] = after
	return true
}

// note adds n occurrences of what to the next report. Any goroutine may call it.
func (r *Relay) note(what string, n uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if n > 0 {
		r.problems[what] += n
	}
}

// report logs the problems since its last call.
func (r *Relay) report() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for what, n := range r.problems {
		r.log.Printf("NATS: %d × %s", n, what)
	}
	clear(r.problems)
}
