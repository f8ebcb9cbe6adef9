package main

import (
	"log"
	"net/http"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promauto"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// What happens to messages, in the words of the log and of the metrics.
const (
	missed      = "missed a message"
	notEchoed   = "may have lost a message: it has not come back from NATS"
	notAccepted = "lost a message: NATS had not accepted it when this node stopped"
	tooLong     = "lost a message: it is longer than NATS accepts"
	slow        = "lost a message from NATS: slow consumer, the hub is behind"
	late        = "discarded a message: it was late, or sent twice"
	refused     = "refused a message from NATS: it was too long, or not valid UTF-8"
	cleaned     = "cleaned a message from NATS: it was not one line of text"
)

const (
	// Time since the last message or probe of a node for which it counts as being in the
	// room: three probes.
	nodeWait = 3 * probePeriod

	// Time since then after which a node is forgotten, as a restarted node is a new one.
	forgetWait = 24 * time.Hour
)

// metrics count what happens on a node, for Prometheus and for the log. Any goroutine may use
// them.
type metrics struct {
	// Serves them at /metrics.
	handler http.Handler

	published, received, deliveries, reconnects, natsErrors prometheus.Counter

	// By the words of the log.
	lost map[string]prometheus.Counter

	mu       sync.Mutex
	counters map[string]uint64 // for the log, since the last report
}

func newMetrics(r *Relay) *metrics {
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector())
	registry.MustRegister(collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	factory := promauto.With(registry)
	counter := func(name, help string) prometheus.Counter {
		return factory.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
	}
	gauge := func(name, help string, value func() float64) {
		factory.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, value)
	}
	m := &metrics{
		handler: promhttp.HandlerFor(registry, promhttp.HandlerOpts{}),
		published: counter("chat_nats_published_messages_total",
			"Messages and probes of this node that it has published to NATS."),
		received: counter("chat_nats_received_messages_total",
			"Messages and probes that NATS has sent to this node, its own included."),
		deliveries: counter("chat_deliveries_total",
			"Messages queued for clients: each message counts once for each client."),
		reconnects: counter("chat_nats_reconnects_total",
			"Reconnects to NATS."),
		natsErrors: counter("chat_nats_errors_total",
			"Errors that NATS has reported, such as missing permissions and wrong credentials."),
		lost:     make(map[string]prometheus.Counter),
		counters: make(map[string]uint64),
	}
	lost := factory.NewCounterVec(prometheus.CounterOpts{
		Name: "chat_lost_messages_total",
		Help: "Messages lost, missed, discarded, refused or changed, by the words of the log.",
	}, []string{"reason"})
	reasons := []string{missed, notEchoed, notAccepted, tooLong, slow, late, refused, cleaned}
	for _, reason := range reasons {
		m.lost[reason] = lost.WithLabelValues(reason)
	}
	gauge("chat_clients", "Connected clients.", func() (clients float64) {
		r.hub.do(func() { clients = float64(len(r.hub.clients)) }) // 0 once it is stopped
		return clients
	})
	gauge("chat_nodes",
		"Nodes whose messages or probes have arrived in the last 15 s, this one included.",
		func() float64 { return float64(r.heard.Load()) })
	gauge("chat_outgoing_messages", "Messages of clients that wait for NATS, at most 8192.",
		func() float64 { return float64(r.queued.Load()) })
	gauge("chat_in_flight_messages", "Messages published and not echoed, at most 32.",
		func() float64 { return float64(r.unechoed.Load()) })
	gauge("chat_incoming_messages", "Messages from NATS that wait for the hub, at most 8192.",
		func() float64 { return float64(len(r.incoming)) })
	gauge("chat_ready", "1 if this node receives its own messages from NATS, else 0.",
		func() float64 {
			if r.ready.Load() {
				return 1
			}
			return 0
		})
	return m
}

// countNodes counts the nodes in the room, and logs when their number changes: the room may
// be split. run calls it every reportPeriod.
func (r *Relay) countNodes() {
	heard := int64(0)
	for id, node := range r.nodes {
		switch silence := time.Duration(r.ticks-node.lastHeard) * reportPeriod; {
		case silence <= nodeWait:
			heard++
		case silence > forgetWait:
			delete(r.nodes, id)
		}
	}
	if before := r.heard.Swap(heard); before != heard {
		const text = "NATS: messages of %d nodes arrive, this one included; before: %d"
		r.log.Printf(text, heard, before)
	}
}

// count adds n to the counter what, for the next report.
func (m *metrics) count(what string, n uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if n > 0 {
		m.counters[what] += n
		if counter := m.lost[what]; counter != nil { // else it is an error of NATS
			counter.Add(float64(n))
		}
	}
}

// report logs what has been counted since its last call.
func (m *metrics) report(logger *log.Logger) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for what, n := range m.counters {
		logger.Printf("NATS: %d × %s", n, what)
	}
	clear(m.counters)
}
