package main

import (
	"errors"
	"fmt"
	"net/url"
	"strings"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
)

// connect connects to NATS, and keeps reconnecting until the connection is closed here. It
// returns an error if no server can be reached, or none accepts the connection.
func connect(urls, creds string) (*nats.Conn, error) {
	// Errors must not repeat the URL, which may contain a password. A part of the password
	// could also be parsed as the host, which errors name.
	for server := range strings.SplitSeq(urls, ",") {
		u, err := url.Parse(strings.TrimSpace(server))
		if err != nil || u.Host == "" || u.Path+u.RawQuery+u.Fragment != "" {
			return nil, errors.New("a URL of NATS is malformed: write nats://host:port or tls://host:port, " +
				"and in a name or password %2F for /, %23 for #, %2C for a comma and so on")
		}
	}
	options := []nats.Option{
		nats.Name("chat"),
		nats.NoCallbacksAfterClientClose(),

		// Without limit, also while NATS refuses this node's credentials.
		nats.MaxReconnects(-1),
		nats.IgnoreAuthErrorAbort(),
		nats.ReconnectWait(reconnectWait),
		nats.ReconnectJitter(reconnectWait, reconnectWait),

		// No buffer: nats.go would flush it on reconnect, before other nodes have
		// reconnected, and lose it if the connection breaks again.
		nats.ReconnectBufSize(-1),
	}
	if creds != "" {
		options = append(options, nats.UserCredentials(creds))
	}
	nc, err := nats.Connect(urls, options...)
	if err != nil {
		return nil, fmt.Errorf("cannot join NATS: %w", err)
	}
	return nc, nil
}

// startNATS starts a NATS server on a free loopback port.
func startNATS() (*server.Server, error) {
	s, err := server.NewServer(&server.Options{
		Host:   "127.0.0.1",
		Port:   server.RANDOM_PORT,
		NoLog:  true,
		NoSigs: true,
	})
	if err != nil {
		return nil, err
	}
	s.Start()
	if !s.ReadyForConnections(answerWait) {
		s.Shutdown()
		return nil, fmt.Errorf("the embedded NATS server did not start within %v", answerWait)
	}
	return s, nil
}
