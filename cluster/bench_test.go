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

// message has the length of a typical message.
var message = []byte("a line of chat, about as long as people write them")

// BenchmarkLatency measures the latency of one message to one client: through the node's hub
// alone, as on one machine, and through NATS, to a client of the same node and of another.
func BenchmarkLatency(b *testing.B) {
	_, nodes := startRoom(b, 2)
	paths := []struct {
		name string
		from chan []byte
		to   *node
	}{
		{"way=hub", nodes[0].hub.broadcast, nodes[0]},
		{"way=NATS/to=same-node", nodes[0].broadcast, nodes[0]},
		{"way=NATS/to=other-node", nodes[0].broadcast, nodes[1]},
	}
	for _, path := range paths {
		b.Run(path.name, func(b *testing.B) {
			listener := path.to.dial(b)
			for b.Loop() {
				path.from <- message
				if _, err := listener.receive(); err != nil {
					b.Fatal(err)
				}
			}
			listener.Close()
		})
	}
}

// BenchmarkDeliveries measures the throughput to the clients of two nodes, which both publish:
// one message at a time, and bursts, as in a flood. The clients are in the same process, and
// share its CPU.
func BenchmarkDeliveries(b *testing.B) {
	rooms := []struct{ n, burst int }{{10, 1}, {100, 1}, {500, 1}, {10, 64}, {100, 64}, {500, 64}}
	for _, room := range rooms {
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
						node.broadcast <- message
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

// BenchmarkFlood measures the latency of one message at a time while other clients flood: with
// one hub, as on one machine, with one node, and with two. It must not grow: early-s is the
// maximum in the first third of a run, late-s in the last.
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
				sender, listener := conns[0], conns[1] // of different nodes if there are two
				for n, c := range slices.Concat(conns[:1], conns[2:]) {
					go io.Copy(io.Discard, c.NetConn())
					if c != sender && n <= room.flooders {
						go func() {
							for c.WriteMessage(websocket.TextMessage, message) == nil {
							}
						}()
					}
				}
				start := time.Now()
				var late [3]time.Duration // maximum latency in each third of the run
				received := 0
				for at := time.Duration(0); at < length; at = time.Since(start) {
					sender.send(b, fmt.Sprint("sent at ", at))
					received += 1 + len(listener.receiveUntil(b, fmt.Sprint("sent at ", at)))
					third := &late[3*at/length]
					*third = max(*third, time.Since(start)-at)
					time.Sleep(100 * time.Millisecond)
				}
				b.ReportMetric(late[0].Seconds(), "early-s")
				b.ReportMetric(late[2].Seconds(), "late-s")
				b.ReportMetric(float64(received)/time.Since(start).Seconds(), "messages/s")
				b.ReportMetric(0, "ns/op")
				for _, c := range conns {
					c.Close()
				}
			}
		})
	}
}

// handler serves WebSocket peers as clients of hub.
func handler(hub *Hub) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) { serveWs(hub, w, r) }
}

// serveHub serves a hub alone, as on one machine, until the test ends, and returns
// the URL for its clients.
func serveHub(b *testing.B) string {
	hub := newHub()
	go hub.run()
	server := httptest.NewServer(handler(hub))
	b.Cleanup(func() { hub.stop(); server.Close() })
	return strings.Replace(server.URL, "http", "ws", 1)
}

// BenchmarkLargeRoom measures the cost of a node whose clients receive five messages a second:
// CPU time a delivery, with the kernel's for both ends; how long the hub's goroutine takes for
// a message, which limits the messages a second; and the latency, at a hundred clients. The
// others do not read: the messages fit into their sockets' buffers.
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
						if _, err := listener.receive(); err != nil {
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
					nodes[0].broadcast <- message
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
				nodes[0].hub.unregister <- new(Client) // run receives it after the broadcast
				busy += time.Since(start)
				for range listeners {
					<-arrivals
				}
				time.Sleep(50 * time.Millisecond)
			}
			slices.Sort(late)
			deliveries := float64(b.N * rounds * clients)
			b.ReportMetric(float64(used.Microseconds())/deliveries, "CPU-µs/delivery")
			b.ReportMetric(float64(busy.Microseconds())/rounds/1000, "hub-ms/message")
			b.ReportMetric(float64(late[len(late)/2].Microseconds())/1000, "p50-ms")
			b.ReportMetric(float64(late[len(late)*99/100].Microseconds())/1000, "p99-ms")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// processorTime returns the CPU time of this process.
func processorTime(b *testing.B) time.Duration {
	b.Helper()
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		b.Fatal(err)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

// BenchmarkNATS counts the messages into and out of the NATS servers, to nodes and to each
// other, for each message that one of several nodes publishes, and measures the throughput.
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
			sent := 0
			for b.Loop() {
				for range maxInFlight {
					nodes[0].broadcast <- message
				}
				sent += maxInFlight
				for _, listener := range listeners {
					for range maxInFlight {
						if _, err := listener.receive(); err != nil {
							b.Fatal(err)
						}
					}
				}
			}
			took := time.Since(start)
			inAfter, outAfter := traffic(b, servers)
			b.ReportMetric(float64(inAfter-in)/float64(sent), "in/message")
			b.ReportMetric(float64(outAfter-out)/float64(sent), "out/message")
			b.ReportMetric(float64(sent)/took.Seconds(), "messages/s")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// BenchmarkDistance measures how many messages a second a node publishes, by the round-trip
// time to NATS: at most one window per round trip.
func BenchmarkDistance(b *testing.B) {
	for _, latency := range []time.Duration{0, 50 * time.Millisecond, 200 * time.Millisecond} {
		b.Run(fmt.Sprintf("round-trip=%v", 2*latency), func(b *testing.B) {
			proxy := newProxy(b, natsServer(b).Addr().String())
			node := startNode(b, "nats://"+proxy.Addr().String(), "chat")
			listener := node.dial(b)
			proxy.delay(latency)
			const each = 10 * maxInFlight
			for b.Loop() {
				go func() {
					for range each {
						node.broadcast <- message
					}
				}()
				for range each {
					if _, err := listener.receive(); err != nil {
						b.Fatal(err)
					}
				}
			}
			b.ReportMetric(float64(b.N*each)/b.Elapsed().Seconds(), "messages/s")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// traffic returns the number of messages that the servers have received and sent.
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
