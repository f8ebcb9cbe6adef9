package main

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// scrape returns the metrics of n by their names, with labels.
func (n *node) scrape(t *testing.T) map[string]float64 {
	t.Helper()
	base := strings.Replace(strings.TrimSuffix(n.url, "ws"), "ws", "http", 1)
	response, err := http.Get(base + "metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	values := make(map[string]float64)
	for line := range strings.Lines(string(body)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), "} ")
		if value == "" {
			name, value, _ = strings.Cut(name, " ")
		} else {
			name += "}"
		}
		if number, err := strconv.ParseFloat(value, 64); err == nil {
			values[name] = number
		}
	}
	return values
}

// lostBy returns the name of the counter with these words of the log.
func lostBy(reason string) string {
	return fmt.Sprintf("chat_lost_messages_total{reason=%q}", reason)
}

func TestMetricsCountMessagesClientsAndNodes(t *testing.T) {
	t.Parallel()
	s, nodes := startRoom(t, 2)
	const each = 100
	listeners := []*client{nodes[0].dial(t), nodes[0].dial(t), nodes[1].dial(t)}
	for i, node := range nodes {
		eventually(t, "both nodes and all clients are counted", func() bool {
			values := node.scrape(t)
			return values["chat_nodes"] == 2 && values["chat_clients"] == float64(2-i)
		})
	}
	begun, before := time.Now(), nodes[0].scrape(t)
	for _, line := range numbered("sent", each) {
		nodes[0].broadcast <- []byte(line)
		for _, c := range listeners {
			c.want(t, line)
		}
	}
	nodes[0].hub.do(func() {}) // The last message has been counted.
	after := nodes[0].scrape(t)
	for _, test := range []struct {
		name         string
		want, probes float64 // a period
	}{
		{"chat_nats_published_messages_total", each, 1},
		{"chat_nats_received_messages_total", each, 2},
		{"chat_deliveries_total", 2 * each, 0},
	} {
		most := test.want + test.probes*(1+time.Since(begun).Seconds()/probePeriod.Seconds())
		if got := after[test.name] - before[test.name]; got < test.want || got > most {
			t.Errorf("%s rose by %v, want %v to %v", test.name, got, test.want, most)
		}
	}
	if after["chat_ready"] != 1 {
		t.Error("chat_ready is not 1")
	}

	otherPublisher(t, s).Publish("chat", []byte("\xff"))
	eventually(t, "a refused message is counted", func() bool {
		return nodes[0].scrape(t)[lostBy(refused)] == 1
	})
	restart := stopNATS(t, s)
	awaitDisconnect(t, nodes)
	nodes[0].broadcast <- []byte("queued")
	eventually(t, "the queue is counted", func() bool {
		values := nodes[0].scrape(t)
		return values["chat_outgoing_messages"] == 1 && values["chat_ready"] == 0
	})
	restart()
	listeners[2].want(t, "queued")
	eventually(t, "the reconnect is counted", func() bool {
		values := nodes[0].scrape(t)
		return values["chat_nats_reconnects_total"] == 1 && values["chat_outgoing_messages"] == 0
	})
}

func TestDeliveriesAreExactWhileClientsComeAndGo(t *testing.T) {
	t.Parallel()
	_, nodes := startRoom(t, 1)
	node := nodes[0]
	want := 0.0
	wantDeliveries := func(clients ...*client) {
		t.Helper()
		node.broadcast <- message
		for _, c := range clients {
			c.want(t, string(message))
		}
		want += float64(len(clients))
		node.hub.do(func() {}) // The message has been counted.
		if got := node.scrape(t)["chat_deliveries_total"]; got != want {
			t.Fatalf("with %d clients: got %v deliveries in all, want %v", len(clients), got, want)
		}
	}
	var clients []*client
	for range 10 {
		clients = append(clients, node.dial(t))
		wantDeliveries(clients...)
	}
	for n := range clients {
		clients[n].Close()
		eventually(t, "the client is not counted", func() bool {
			return node.scrape(t)["chat_clients"] == float64(len(clients)-n-1)
		})
		if n < len(clients)-1 {
			wantDeliveries(clients[n+1:]...)
		}
	}

	// A client whose queue is full does not get the message that drops it.
	listener := node.dial(t)
	full := &Client{hub: node.hub, send: make(chan []byte, 1)}
	full.send <- message
	node.hub.register <- full
	wantDeliveries(listener)
	node.hub.done <- full
}

func TestNodesThatDoNotHearOfEachOtherSaySo(t *testing.T) {
	t.Parallel()
	s := natsServer(t)
	here, there := startNode(t, s.ClientURL(), "chat"), startNode(t, s.ClientURL(), "chat.other")
	third := startNode(t, s.ClientURL(), "chat")
	for _, test := range []struct {
		node *node
		want float64
	}{{here, 2}, {third, 2}, {there, 1}} {
		eventually(t, "the nodes are counted", func() bool {
			return test.node.scrape(t)["chat_nodes"] == test.want
		})
	}
	here.log.wait(t, "NATS: messages of 2 nodes arrive, this one included; before: ", 1)
	there.log.wait(t, "NATS: messages of 1 nodes arrive, this one included; before: 0", 1)
	third.stop()
	here.log.wait(t, "NATS: messages of 1 nodes arrive, this one included; before: 2", 1)
	if got := there.scrape(t)["chat_nodes"]; got != 1 {
		t.Errorf("the node of another subject counts %v nodes, want itself", got)
	}
}

func TestPartitionBetweenNATSServersIsCounted(t *testing.T) {
	t.Parallel()
	servers, proxies := natsCluster(t, true)
	nodes := []*node{
		startNode(t, servers[0].ClientURL(), "chat"),
		startNode(t, servers[1].ClientURL(), "chat"),
		startNode(t, servers[2].ClientURL(), "chat"),
	}
	want := func(counts ...float64) {
		t.Helper()
		for i, node := range nodes {
			eventually(t, "the nodes are counted", func() bool {
				return node.scrape(t)["chat_nodes"] == counts[i]
			})
		}
	}
	want(3, 3, 3)
	for _, proxy := range proxies {
		for direction := range proxy.blocked {
			proxy.blocked[direction].Lock()
		}
	}
	want(2, 2, 1)
	for _, proxy := range proxies {
		for direction := range proxy.blocked {
			proxy.blocked[direction].Unlock()
		}
	}
	want(3, 3, 3)
}

func TestEachAlertUsesMetricsThatExistAndIsInTheREADME(t *testing.T) {
	rules, err := os.ReadFile("alerts.yaml")
	if err != nil {
		t.Fatal(err)
	}
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, nodes := startRoom(t, 1)
	values := nodes[0].scrape(t)
	names := regexp.MustCompile(`\b(?:chat|process)_\w+`)
	for _, name := range names.FindAllString(string(rules), -1) {
		if _, exists := values[name]; !exists && name != "chat_lost_messages_total" {
			t.Errorf("a rule uses %s, which is no metric", name)
		}
	}
	reasons := regexp.MustCompile(`reason=~?"([^"]*)"`).FindAllStringSubmatch(string(rules), -1)
	for _, reason := range reasons {
		matches := 0
		for name := range nodes[0].metrics.lost {
			if regexp.MustCompile("^(?:" + reason[1] + ")$").MatchString(name) {
				matches++
			}
		}
		if want := 1 + strings.Count(reason[1], "|"); matches != want {
			t.Errorf("a rule's reason %q matches %d reasons, want %d", reason[1], matches, want)
		}
	}
	var alerts, described []string
	for _, match := range regexp.MustCompile(`alert: (\w+)`).FindAllStringSubmatch(string(rules), -1) {
		alerts = append(alerts, match[1])
	}
	for _, cell := range regexp.MustCompile("(?m)^\\| `Chat[^|]*").FindAllString(string(readme), -1) {
		described = append(described, regexp.MustCompile(`Chat\w+`).FindAllString(cell, -1)...)
	}
	if !slices.Equal(alerts, described) || len(alerts) == 0 {
		t.Errorf("README.md describes the alerts %q, want %q", described, alerts)
	}
}
