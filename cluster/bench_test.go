package main

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/nats-io/nats-server/v2/server"
)

// message is about as long as people write them.
var message = []byte("a line of chat, about as long as people write them")

// BenchmarkLatency measures the way of one message to one client: through the
// node's hub alone, as on one machine, and through NATS, to a client of the same
// node and of another.
func BenchmarkLatency(b *testing.B) {
	_, nodes := startRoom(b, 2)
	ways := []struct {
		name string
		from *Hub
		to   *node
	}{
		{"way=hub", nodes[0].hub, nodes[0]},
		{"way=NATS/to=same-node", nodes[0].front, nodes[0]},
		{"way=NATS/to=other-node", nodes[0].front, nodes[1]},
	}
	for _, way := range ways {
		b.Run(way.name, func(b *testing.B) {
			listener := way.to.dial(b)
			for b.Loop() {
				way.from.broadcast <- message
				if _, err := listener.hear(); err != nil {
					b.Fatal(err)
				}
			}
			listener.Close()
		})
	}
}

// BenchmarkDeliveries measures how many messages a second clients of two nodes
// get, with both nodes talking: one message at a time, as in a quiet room, and
// in bursts, as in a flood. The clients are in the same process, and take their
// part of the machine.
func BenchmarkDeliveries(b *testing.B) {
	for _, room := range []struct{ n, burst int }{{10, 1}, {100, 1}, {500, 1}, {10, 64}, {100, 64}, {500, 64}} {
		n, burst := room.n, room.burst
		b.Run(fmt.Sprintf("nodes=2/burst=%d/clients=%d", burst, 2*n), func(b *testing.B) {
			_, nodes := startRoom(b, 2)
			var missing sync.WaitGroup
			for _, node := range nodes {
				for range n {
					listener := node.dial(b)
					go func() {
						for {
							_, lines, err := listener.ReadMessage()
							if err != nil {
								return
							}
							missing.Add(-1 - bytes.Count(lines, newline))
						}
					}()
				}
			}
			for b.Loop() {
				missing.Add(len(nodes) * n * len(nodes) * burst)
				for range burst {
					for _, node := range nodes {
						node.front.broadcast <- message
					}
				}
				missing.Wait()
			}
			deliveries := float64(b.N * len(nodes) * n * len(nodes) * burst)
			b.ReportMetric(deliveries/b.Elapsed().Seconds(), "deliveries/s")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// BenchmarkFlood measures how late what somebody says now and then is heard while
// others send as fast as they are let: in a room of one hub, as on one machine,
// and in one of one and of two nodes. Lateness must not grow: early-s is the
// longest in the first third of a run, late-s in the last.
func BenchmarkFlood(b *testing.B) {
	const clients, length = 6000, 15 * time.Second
	for _, room := range []struct {
		name            string
		nodes, flooders int
	}{
		{"one-machine/flooders=3", 0, 3},
		{"nodes=1/flooders=3", 1, 3},
		{"one-machine/flooders=4", 0, 4},
		{"nodes=2/flooders=4", 2, 4},
	} {
		b.Run(room.name, func(b *testing.B) {
			for b.Loop() {
				var urls []string
				if room.nodes == 0 {
					urls = []string{serveHub(b)}
				} else {
					_, nodes := startRoom(b, room.nodes)
					for _, node := range nodes {
						urls = append(urls, node.url)
					}
				}
				var conns []*client
				for n := range clients {
					conns = append(conns, dial(b, urls[n%len(urls)]))
				}
				talker, listener := conns[0], conns[1] // of different nodes, if there are two
				for n, c := range slices.Concat(conns[:1], conns[2:]) {
					go io.Copy(io.Discard, c.NetConn())
					if c != talker && n <= room.flooders {
						go func() {
							for c.WriteMessage(websocket.TextMessage, message) == nil {
							}
						}()
					}
				}
				start := time.Now()
				listener.SetReadDeadline(start.Add(length + patience))
				var late [3]time.Duration // the longest, in each third of the time
				heard := 0
				for at := time.Duration(0); at < length; at = time.Since(start) {
					talker.send(b, fmt.Sprint("talk at ", at))
					heard += 1 + len(listener.hearUntil(b, fmt.Sprint("talk at ", at)))
					third := &late[3*at/length]
					*third = max(*third, time.Since(start)-at)
					time.Sleep(100 * time.Millisecond)
				}
				b.ReportMetric(late[0].Seconds(), "early-s")
				b.ReportMetric(late[2].Seconds(), "late-s")
				b.ReportMetric(float64(heard)/time.Since(start).Seconds(), "messages/s")
				b.ReportMetric(0, "ns/op")
				for _, c := range conns {
					c.Close()
				}
			}
		})
	}
}

// serveHub serves a hub alone, as on one machine, until the test ends, and returns
// the URL for its clients.
func serveHub(b *testing.B) string {
	hub := newHub()
	go hub.run()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { serveWs(hub, w, r) }))
	b.Cleanup(func() { hub.stop(); server.Close() })
	return strings.Replace(server.URL, "http", "ws", 1)
}

// BenchmarkLargeRoom measures what one node takes for many people who hear five
// messages a second: processor time for each delivery, the kernel's for both ends
// included; how long the hub's one goroutine is busy with a message, which bounds
// how many there can be; and the time from a message's being said to its arrival
// at a client, of which a hundred note it. The others do not read: what they are
// sent fits into their sockets.
func BenchmarkLargeRoom(b *testing.B) {
	for _, clients := range []int{1000, 4000, 8000} {
		b.Run(fmt.Sprintf("clients=%d", clients), func(b *testing.B) {
			_, nodes := startRoom(b, 1)
			const listeners, rounds = 100, 25
			for range clients - listeners {
				nodes[0].dial(b)
			}
			arrivals := make(chan time.Time, listeners)
			for range listeners {
				listener := nodes[0].dial(b)
				go func() {
					for {
						if _, err := listener.hear(); err != nil {
							return
						}
						arrivals <- time.Now()
					}
				}()
			}
			var late []time.Duration
			var busy time.Duration
			before := processorTime(b)
			for b.Loop() {
				for range rounds {
					start := time.Now()
					nodes[0].front.broadcast <- message
					for range listeners {
						late = append(late, (<-arrivals).Sub(start))
					}
					time.Sleep(200*time.Millisecond - time.Since(start))
				}
			}
			used := processorTime(b) - before
			for range rounds {
				nodes[0].hub.broadcast <- message
				start := time.Now()
				nodes[0].hub.unregister <- new(Client) // taken when the hub is done with message
				busy += time.Since(start)
				for range listeners {
					<-arrivals
				}
				time.Sleep(50 * time.Millisecond)
			}
			slices.Sort(late)
			b.ReportMetric(float64(used.Microseconds())/float64(b.N*rounds*clients), "CPU-µs/delivery")
			b.ReportMetric(float64(busy.Microseconds())/rounds/1000, "hub-ms/message")
			b.ReportMetric(float64(late[len(late)/2].Microseconds())/1000, "p50-ms")
			b.ReportMetric(float64(late[len(late)*99/100].Microseconds())/1000, "p99-ms")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// processorTime returns how much processor time this process has used.
func processorTime(b *testing.B) time.Duration {
	b.Helper()
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		b.Fatal(err)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

// BenchmarkNATS counts what NATS servers get and pass on, to nodes and to each
// other, for each message that is said on one of several nodes, and how many
// messages a second all nodes hear then.
func BenchmarkNATS(b *testing.B) {
	for _, room := range []struct{ servers, nodes int }{{1, 1}, {1, 4}, {1, 16}, {3, 4}, {3, 16}} {
		b.Run(fmt.Sprintf("servers=%d/nodes=%d", room.servers, room.nodes), func(b *testing.B) {
			var servers []*server.Server
			if room.servers == 1 {
				servers = append(servers, natsServer(b))
			} else {
				servers, _ = natsCluster(b, false)
			}
			var listeners []*client
			var nodes []*node
			for n := range room.nodes {
				node := startNode(b, servers[n%len(servers)].ClientURL(), "chat")
				nodes = append(nodes, node)
				listeners = append(listeners, node.dial(b))
			}
			in, out := traffic(b, servers)
			start := time.Now()
			said := 0
			for b.Loop() {
				for range maxInFlight {
					nodes[0].front.broadcast <- message
				}
				said += maxInFlight
				for _, listener := range listeners {
					for range maxInFlight {
						if _, err := listener.hear(); err != nil {
							b.Fatal(err)
						}
					}
				}
			}
			took := time.Since(start)
			inAfter, outAfter := traffic(b, servers)
			b.ReportMetric(float64(inAfter-in)/float64(said), "in/message")
			b.ReportMetric(float64(outAfter-out)/float64(said), "out/message")
			b.ReportMetric(float64(said)/took.Seconds(), "messages/s")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// BenchmarkDistance measures how many messages a second a node says while others
// wait, by the time to NATS and back: at most a window's in that time.
func BenchmarkDistance(b *testing.B) {
	for _, latency := range []time.Duration{0, 50 * time.Millisecond, 200 * time.Millisecond} {
		b.Run(fmt.Sprintf("there-and-back=%v", 2*latency), func(b *testing.B) {
			wire := newWire(b, natsServer(b).Addr().String())
			node := startNode(b, "nats://"+wire.Addr().String(), "chat")
			listener := node.dial(b)
			wire.lengthen(latency)
			const each = 10 * maxInFlight
			for b.Loop() {
				go func() {
					for range each {
						node.front.broadcast <- message
					}
				}()
				for range each {
					if _, err := listener.hear(); err != nil {
						b.Fatal(err)
					}
				}
			}
			b.ReportMetric(float64(b.N*each)/b.Elapsed().Seconds(), "messages/s")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// traffic returns how many messages servers have got, and sent, in all.
func traffic(b *testing.B, servers []*server.Server) (in, out int64) {
	b.Helper()
	for _, s := range servers {
		varz, err := s.Varz(nil)
		if err != nil {
			b.Fatal(err)
		}
		in, out = in+varz.InMsgs, out+varz.OutMsgs
	}
	return in, out
}
