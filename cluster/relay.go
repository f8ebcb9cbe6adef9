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
	// Messages that wait here while NATS is away, 4 MB, before their senders are
	// slowed.
	outboxSize = 8 << 10

	// Messages that may be on their way to NATS and back before their senders are
	// slowed, and those that wait for the hub count, too. They can be lost when the
	// connection breaks. With more, everybody would hear later when many talk; with
	// fewer, a distant NATS would slow those who do.
	windowSize = 32

	// Messages from NATS that wait here for the hub before more are lost. As every
	// node has a window, only a hub that is slower than theirs gets that far behind.
	inboxSize = 8 << 10

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

	// Time between two hellos of a node.
	helloPeriod = 5 * time.Second

	// Time allowed to NATS to bring back what a node has said. One that takes longer
	// is as good as away.
	answerWait = 10 * time.Second

	// Time allowed to NATS to take what is left when the node ends.
	drainWait = 5 * time.Second

	// Time between two reports of what went wrong: whoever can make things go
	// wrong must not be able to fill the log.
	reportPeriod = time.Second

	// Maximum size in bytes of a subject. NATS closes the connection over one that
	// does not fit into its line of 4 KiB.
	maxSubjectSize = 255

	// The most that a node's header takes, in bytes, and so what NATS has to accept.
	headerSize  = 128
	payloadSize = headerSize + maxMessageSize

	// Nodes that are remembered before all are forgotten: a node that restarts is a
	// new one, and other software can make nodes up.
	mostNodes = 1 << 10
)

// notBack is what is reported of a node's own messages that it has not heard: NATS
// may have them or not. To say them again could deliver them twice.
const notBack = "may have lost a message: it has not come back from NATS"

// refused is what is reported of messages that no node can have said.
const refused = "refused a message from NATS: it was too long, or not valid UTF-8"

// A Relay makes the hubs of several nodes one room. What a node's clients say
// goes to NATS, and what NATS says, this node's own messages among it, goes to
// the node's clients: each message takes the same way once, wherever its sender
// is.
//
// A node's own messages come back to it. So it knows that it can say and hear
// something. While windowSize of them are on their way it says no more: when the
// hub is behind, those who talk have to wait. Hello is a message without text,
// which is said only to hear it come back.
type Relay struct {
	// The node's hub, which tells the clients.
	hub *Hub

	// What clients take for their hub: to join and leave it is to join and leave
	// hub, but what they broadcast comes here.
	front *Hub

	nc  *nats.Conn
	sub *nats.Subscription
	log *log.Logger

	// From NATS to run.
	inbox    chan *nats.Msg
	statuses chan nats.Status

	// Closed by leave: the clients have left, and nobody says anything any more.
	over chan struct{}

	running sync.WaitGroup // run

	// From run to load balancers and newcomers: what this node says comes back to it;
	// the outbox is full.
	ready, full atomic.Bool

	// Owned by run, and before that by join:
	outbox  [][]byte          // what clients have said, for NATS
	settled bool              // NATS is there, and has been for settleWait
	inRoom  bool              // this node has heard itself since it settled
	silent  int               // reports since it last did, or NATS went or came
	name    string            // what it calls itself in what it says
	said    uint64            // how many messages it has said under that name
	heard   map[string]uint64 // how many each name has said, as far as this node knows

	mu       sync.Mutex
	troubles map[string]uint64 // since the last report
}

// join makes hub part of the room that is called subject. When it returns, hub
// will be told what anybody says in the room from then on. It returns an error
// if the subject cannot name a room, or NATS does not let this node say and hear
// something there. What goes wrong later, logger says.
//
// Whoever calls join runs hub, gives the relay's front to clients, and in the
// end calls leave.
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
		inbox:    make(chan *nats.Msg, inboxSize),
		statuses: nc.StatusChanged(nats.CONNECTED, nats.RECONNECTING),
		over:     make(chan struct{}),
		settled:  true,
		name:     rand.Text(),
		heard:    make(map[string]uint64),
		troubles: make(map[string]uint64),
	}
	nc.SetErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { r.note(err.Error(), 1) })
	nc.SetDisconnectErrHandler(func(_ *nats.Conn, err error) {
		if !nc.IsClosed() { // otherwise serve says why
			// Without an error it is check that has given up.
			logger.Printf("NATS is away: %v; what is said meanwhile waits", cmp.Or(err, nats.ErrTimeout))
		}
	})
	nc.SetReconnectHandler(func(*nats.Conn) {
		// Flush, so that NATS knows again that this node listens. If NATS has gone again,
		// there is no address, or the flush fails.
		if address := nc.ConnectedAddr(); address != "" && nc.FlushTimeout(answerWait) == nil {
			logger.Printf("NATS is back: %s; this node has missed what others said meanwhile", address)
			if err := accepts(nc); err != nil {
				logger.Printf("NATS: %v: what is longer is lost", err)
			}
		}
	})
	var err error
	if r.sub, err = nc.Subscribe(subject, r.receive); err != nil {
		return nil, err
	}
	// Before NATS answers the flush, it says what it does not allow, and what it
	// accepts of this node, and brings back the hello.
	if err := cmp.Or(r.say(nil), nc.FlushTimeout(answerWait), nc.LastError(), accepts(nc)); err != nil {
		return nil, err
	}
	for late := time.After(answerWait); !r.inRoom; {
		select {
		case message := <-r.inbox:
			r.count(message) // there are no clients yet who could hear it
		case <-late:
			return nil, errors.New("NATS does not bring back what this node says")
		}
	}
	time.Sleep(spreadWait)
	r.ready.Store(true)
	r.running.Go(r.run)
	return r, nil
}

// accepts returns an error if NATS does not accept the longest message of a node.
// It knows that when NATS has answered a flush: an account can have a limit of its
// own.
func accepts(nc *nats.Conn) error {
	if most := nc.MaxPayload(); most < payloadSize {
		return fmt.Errorf("NATS accepts messages of at most %d bytes, and has to accept %d", most, payloadSize)
	}
	return nil
}

// leave sees what clients have said taken to NATS, for drainWait at most, and
// closes the connection. Call it once, when they have all left the hub: one
// that has not is left behind, and what it says is lost.
func (r *Relay) leave() {
	close(r.over)
	defer time.AfterFunc(drainWait, r.nc.Close).Stop()
	r.running.Wait()
	r.nc.Close()
}

// run is the relay's one goroutine. It ends when the clients have left and all
// that they have said has come back. Once the connection is closed, what has not
// come back is lost.
func (r *Relay) run() {
	ticks, hello := time.Tick(reportPeriod), time.After(helloPeriod)
	stopped, over := r.front.stopped, r.over
	for over != nil || len(r.outbox)+r.onTheWay() > 0 && !r.nc.IsClosed() {
		// Clients wait while the outbox is full. While the node is in the room, one
		// message, which waits for the window, is enough for that.
		in := r.front.broadcast
		if stopped != nil && (len(r.outbox) >= outboxSize || len(r.outbox) > 0 && r.inRoom) {
			in = nil // a nil channel is never ready
		}
		select {
		case message := <-in:
			r.outbox = append(r.outbox, message)
		case message := <-r.inbox:
			r.deliver(message)
		case <-r.statuses: // NATS has gone or come
			r.settled, r.inRoom, r.silent = false, false, 0
			hello = time.After(settleWait)
		case <-hello:
			r.settled, hello = r.nc.IsConnected(), time.After(helloPeriod)
			r.say(nil)
		case <-ticks:
			r.check()
			r.report()
		case <-stopped:
			stopped = nil // Each client has at most one more message to say before it can leave.
		case <-over:
			over = nil
		}
		// The hub may be behind with what others say: then the window is smaller, but a
		// node that is slower than the others can still say one message after the other.
		window := max(1, windowSize-len(r.inbox))
		for len(r.outbox) > 0 && r.inRoom && r.onTheWay() < window {
			if err := r.say(r.outbox[0]); err == nats.ErrMaxPayload {
				r.note("lost a message: it is longer than NATS accepts", 1)
			} else if err != nil {
				break
			}
			r.outbox = r.outbox[1:]
		}
		r.full.Store(len(r.outbox) >= outboxSize)
	}
	r.note(notBack, r.said-r.heard[r.name])
	r.note("lost a message: NATS had not taken it when this node ended", uint64(len(r.outbox)))
	r.report()
}

// say says message in the room; without text it is hello. The header says which
// node says it, and how many messages this has said before, so that others can
// count what they miss. An error means that NATS has not got all of it.
func (r *Relay) say(message []byte) error {
	header := nats.Header{"Node": {r.name}, "Said": {fmt.Sprint(r.said)}}
	err := r.nc.PublishMsg(&nats.Msg{Subject: r.sub.Subject, Header: header, Data: message})
	if err == nil && len(message) > 0 {
		r.said++
	}
	return err
}

// onTheWay returns how many of this node's messages have not come back.
func (r *Relay) onTheWay() int {
	return int(r.said - r.heard[r.name])
}

// check gives up a connection on which nothing comes back: NATS may be gone
// without a word, or no longer let this node say or hear anything. run calls it
// every reportPeriod, and it counts its calls instead of asking the clock: a node
// that has been paused first gets to hear what NATS has kept for it.
func (r *Relay) check() {
	r.silent++
	late := r.silent > int(answerWait/reportPeriod)
	r.ready.Store(r.inRoom && !late && accepts(r.nc) == nil)
	if late && r.settled && len(r.inbox) == 0 { // what is late may be in the inbox
		r.nc.ForceReconnect()
	}
}

// receive takes one message from NATS to run. nats.go calls it, in a goroutine of
// its own. What is longer than a node's messages does not get into the inbox, so
// that the inbox is bounded in bytes, too.
func (r *Relay) receive(message *nats.Msg) {
	if len(message.Data) > maxMessageSize || message.Size() > maxSubjectSize+payloadSize {
		r.note(refused, 1)
		return
	}
	select {
	case r.inbox <- message:
	default:
		r.note("lost a message from NATS: too many waited for the hub", 1)
	}
}

// deliver takes one message from NATS to the hub. Other software may talk on
// the subject, so that what clients may not say is refused here again.
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
	case <-r.over: // nobody is left to hear it
	}
}

// count reports whether message is new: one that a NATS server has kept back may
// come after later ones. It notes how many messages of the same node have not
// come: those between the last one that came and this one. Other software does
// not number its messages, or makes numbers up.
func (r *Relay) count(message *nats.Msg) (isNew bool) {
	name := message.Header.Get("Node")
	// A node takes twenty years to say 2^40 messages, and what is made up below that
	// adds up to a number that can be read.
	before, err := strconv.ParseUint(message.Header.Get("Said"), 10, 40)
	if err != nil || len(name) > headerSize {
		return true
	}
	already, known := r.heard[name]
	if known && before < already {
		return false
	}
	after := before + uint64(min(1, len(message.Data)))
	missed := "missed a message"
	if name == r.name {
		if after > r.said {
			// Somebody else speaks under this name. The others take what this node says
			// next for old, and what is on its way, too: so it takes another.
			r.note("took another name: somebody else spoke under this node's", 1)
			r.note(notBack, r.said-already)
			r.name, r.said = rand.Text(), 0
			r.heard[r.name] = 0
			return true
		}
		missed = notBack
		r.inRoom, r.silent = r.settled, 0 // it may have waited here since NATS went
	}
	if known {
		r.note(missed, before-already)
	} else if len(r.heard) > mostNodes {
		maps.DeleteFunc(r.heard, func(name string, _ uint64) bool { return name != r.name })
	}
	r.heard[name] = after
	return true
}

// note has the next report say that what happened n times. Any goroutine may
// call it.
func (r *Relay) note(what string, n uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if n > 0 {
		r.troubles[what] += n
	}
}

// report logs what went wrong since it was last called.
func (r *Relay) report() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for what, n := range r.troubles {
		r.log.Printf("NATS: %d × %s", n, what)
	}
	clear(r.troubles)
}
