package main

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gorilla/websocket"
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

// BenchmarkFlood measures how late what somebody says in a talk is heard while
// others send as fast as they are let: in a room of one hub, as on one machine,
// and of one and two nodes. Lateness must not grow: late-s is the longest time in
// the last third of a run, early-s in the first.
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
				flooders, silent := conns[2:2+room.flooders], conns[2+room.flooders:]
				for _, c := range append(silent, talker) {
					go io.Copy(io.Discard, c.NetConn())
				}
				var said atomic.Int64
				for _, c := range flooders {
					go io.Copy(io.Discard, c.NetConn())
					go func() {
						for c.WriteMessage(websocket.TextMessage, message) == nil {
							said.Add(1)
						}
					}()
				}
				start := time.Now()
				listener.SetReadDeadline(start.Add(length + patience))
				var late [3]time.Duration // the longest, in each third of the time
				go func() {
					for time.Since(start) < length {
						talker.WriteMessage(websocket.TextMessage, fmt.Appendf(nil, "talk %d", time.Since(start)))
						time.Sleep(100 * time.Millisecond)
					}
					talker.WriteMessage(websocket.TextMessage, []byte("talk is over"))
				}()
				heard := 0
				for {
					line, err := listener.hear()
					if err != nil {
						b.Fatal(err)
					}
					if line == "talk is over" {
						break
					}
					heard++
					var at time.Duration
					if _, err := fmt.Sscanf(line, "talk %d", &at); err == nil {
						third := &late[min(2, 3*at/length)]
						*third = max(*third, time.Since(start)-at)
					}
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
