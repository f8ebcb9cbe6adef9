package main

import (
	"bytes"
	"fmt"
	"sync"
	"testing"
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
