package main

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"log"
	"math/rand/v2"
	"net/url"
	"os"
	"strings"
	"time"
	"unicode"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
)

// Maximum size in bytes of a subject. NATS closes the connection if it does not fit into its
// line of 4 KiB.
const maxSubjectSize = 255

// natsOptions returns the options of a connection to NATS that reconnects until it is closed
// here. It returns an error if a URL is malformed, or if a file cannot be read.
//
// The file creds has NATS credentials. The file password has the password of the URLs' user.
// Both are read for each connection, so that they can be replaced.
func natsOptions(urls, creds, password string) (nats.Options, error) {
	options := nats.GetDefaultOptions()
	options.Name = "chat"
	options.NoCallbacksAfterClientClose = true

	// Without limit, also while NATS refuses this node's credentials.
	options.MaxReconnect = -1
	options.IgnoreAuthErrorAbort = true
	options.ReconnectWait = reconnectWait
	options.ReconnectJitter = reconnectWait
	options.ReconnectJitterTLS = reconnectWait

	// No buffer: nats.go would flush it on reconnect, before other nodes have
	// reconnected, and lose it if the connection breaks again.
	options.ReconnectBufSize = -1

	// NATS also advertises its servers of other regions.
	options.IgnoreDiscoveredServers = true

	if urls == "" {
		return options, errors.New("-nats is empty: name the NATS servers, " +
			"or leave the flag out for an embedded one")
	}
	user := ""
	// Errors must not repeat the URL, which may contain a password. A part of the password
	// could also be parsed as the host, which errors name.
	for server := range strings.SplitSeq(urls, ",") {
		u, err := url.Parse(strings.TrimSpace(server))
		if err != nil || u.Host == "" || u.Path+u.RawQuery+u.Fragment != "" {
			return options, errors.New("a URL of NATS is malformed: write nats://host:port or " +
				"tls://host:port, and in a name or password %2F for /, %23 for #, %2C for a " +
				"comma, …")
		}
		if text, hasPassword := u.User.Password(); hasPassword && text == "" {
			return options, errors.New("the password in a URL of NATS is empty")
		} else if password != "" {
			name := u.User.Username()
			if hasPassword || name == "" || user != "" && name != user {
				return options, errors.New("with -password, each URL of NATS has the same user " +
					"and no password: nats://user@host:port")
			}
			user, u.User = name, nil
		}
		options.Servers = append(options.Servers, u.String())
	}
	if creds != "" {
		if err := nats.UserCredentials(creds)(&options); err != nil {
			return options, err
		}
		_, err := options.UserJWT()
		if err == nil {
			_, err = options.SignatureCB([]byte("a nonce"))
		}
		if err != nil {
			return options, err
		}
	}
	if password != "" {
		read := func() (string, error) {
			text, err := os.ReadFile(password)
			if text = bytes.TrimSpace(text); err == nil && len(text) == 0 {
				err = fmt.Errorf("%s is empty", password)
			}
			return string(text), err
		}
		if _, err := read(); err != nil {
			return options, err
		}
		options.UserInfo = func() (string, string) {
			text, err := read()
			if err != nil {
				log.Printf("cannot join NATS: %v", err)
			}
			return user, text
		}
	}
	return options, nil
}

// connect connects to NATS, and passes the connection to run. It retries until it
// succeeds, or leave has been called. From then on nats.go reconnects by itself, except
// after a few errors, after which run calls connect again.
func (r *Relay) connect() {
	options := r.options
	options.AsyncErrorCB = r.handleError
	options.DisconnectedErrCB = r.handleDisconnect
	options.ReconnectedCB = r.handleReconnect
	options.ConnectedCB = func(nc *nats.Conn) {
		if r.hasJoined.Load() {
			r.handleReconnect(nc)
		}
	}
	for {
		nc, err := options.Connect()
		if err == nil {
			select {
			case r.conns <- nc:
			case <-r.clientsDone:
				nc.Close()
			}
			return
		}
		r.log.Printf("cannot join NATS, and will retry: %v", err)
		select {
		case <-time.After(reportPeriod + rand.N(reconnectWait)):
		case <-r.clientsDone:
			return
		}
	}
}

// handleError counts an error that NATS has reported, and tells run of missing permissions.
func (r *Relay) handleError(_ *nats.Conn, _ *nats.Subscription, err error) {
	r.metrics.natsErrors.Inc()
	r.metrics.count(err.Error(), 1)
	if errors.Is(err, nats.ErrPermissionViolation) {
		select {
		case r.denied <- struct{}{}:
		default: // run has not received the one before
		}
	}
}

func (r *Relay) handleDisconnect(nc *nats.Conn, err error) {
	if !nc.IsClosed() { // else settle logs why
		// Without an error, check has closed the connection.
		r.logDisconnect(cmp.Or(err, nats.ErrTimeout))
	}
}

func (r *Relay) logDisconnect(err error) {
	r.log.Printf("disconnected from NATS: %v; messages of clients are queued", err)
}

func (r *Relay) handleReconnect(nc *nats.Conn) {
	r.metrics.reconnects.Inc()
	// Flush, so that NATS has the subscription again. If the connection has broken again,
	// there is no address, or the flush fails.
	if address := nc.ConnectedAddr(); address != "" && nc.FlushTimeout(answerWait) == nil {
		const text = "reconnected to NATS: %s; messages of other nodes were missed meanwhile"
		r.log.Printf(text, address)
	}
}

// isLiteral reports whether subject is valid, without wildcards, and not too long.
func isLiteral(subject string) bool {
	return len(subject) <= maxSubjectSize && server.IsValidLiteralSubject(subject) &&
		!strings.ContainsFunc(subject, unicode.IsSpace)
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
