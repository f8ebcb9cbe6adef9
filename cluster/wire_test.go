package main

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
)

// The bytes between nodes are those that a node of commit 7f929da sent and received, so that
// a rolling update from it leaves one room. A change of these needs a new subject.
func TestWireIsThatOfEarlierVersions(t *testing.T) {
	t.Parallel()
	s := natsServer(t)
	older := dialNATS(t, s)
	n := startNode(t, s.ClientURL(), "chat")
	listener := n.dial(t)

	header := func(node string, said int) string {
		return fmt.Sprintf("NATS/1.0\r\nNode: %s\r\nSaid: %d\r\n\r\n", node, said)
	}

	// From this node: a probe, then messages, with the number of messages before them.
	for published, text := range []string{"", "hello", "hello again"} {
		if text != "" {
			published--
			n.broadcast <- []byte(text)
			listener.want(t, text)
		}
		want := fmt.Sprintf("HMSG chat 1 55 %d\r\n%s%s\r\n",
			55+len(text), header(n.id, published), text)
		if got := older.message(t, text == ""); got != want {
			t.Errorf("NATS sends %q, want %q", got, want)
		}
	}

	// To this node: the same, from a node that has published seven messages before.
	publish := func(said int, text string) {
		header := header("XXXXXXXXXXXXXXXXXXXXXXXXXX", said)
		fmt.Fprintf(older, "HPUB chat %d %d\r\n%s%s\r\n",
			len(header), len(header)+len(text), header, text)
	}
	publish(7, "")
	publish(7, "from an earlier version")
	publish(8, "and another")
	publish(8, "and another") // late: discarded
	publish(11, "")           // two are missing
	publish(11, "after a gap")
	listener.want(t, "from an earlier version", "and another", "after a gap")
	n.log.wait(t, "NATS: 2 × missed a message", 1)
}

// A natsConn is a connection to a NATS server without a library, subscribed to chat.
// https://docs.nats.io/reference/reference-protocols/nats-protocol
type natsConn struct {
	io.Writer
	*bufio.Reader
}

func dialNATS(t *testing.T, s *server.Server) natsConn {
	t.Helper()
	conn, err := net.Dial("tcp", s.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(patience))
	c := natsConn{conn, bufio.NewReader(conn)}
	fmt.Fprint(c, "CONNECT {\"verbose\":false,\"headers\":true}\r\nSUB chat 1\r\nPING\r\n")
	for line := ""; line != "PONG\r\n"; {
		if line, err = c.ReadString('\n'); err != nil {
			t.Fatal(err)
		}
	}
	return c
}

// message returns the bytes of the next message, its two headers in alphabetical order, as
// nats.go writes them in any. It skips probes, unless isProbe.
func (c natsConn) message(t *testing.T, isProbe bool) string {
	t.Helper()
	for {
		control, err := c.ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		var header, total int
		if _, err := fmt.Sscanf(control, "HMSG chat 1 %d %d\r\n", &header, &total); err != nil {
			continue // a PING or INFO of the server
		}
		message := make([]byte, total+len("\r\n"))
		if _, err := io.ReadFull(c.Reader, message); err != nil {
			t.Fatal(err)
		}
		if header == total && !isProbe {
			continue
		}
		lines := strings.SplitN(string(message), "\r\n", 4)
		slices.Sort(lines[1:3])
		return control + strings.Join(lines, "\r\n")
	}
}
