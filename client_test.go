package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"unicode"
	"unicode/utf8"
	"weak"

	"github.com/gorilla/websocket"
)

// The order of the tests: what happens on the wire, the promises, serving, the page, the
// helpers, fuzzing. Tests of the hub alone, of what applications do, and of the process,
// and the benchmarks are in hub_test.go.

// The promises, and the tests of each in both files. This index is code so that the
// compiler knows its names.
var _ = map[string][]func(*testing.T){
	"1. Joined when Dial returns, and only after a right handshake": {
		TestInvalidHandshakeIsRefusedAndRegistersNothing, TestPanicInCheckOriginLeavesNothingInTheHub,
		TestHandshakeResponseIsDelayedUntilTheClientIsRegistered, TestClientIsRegisteredBeforeItsHandshakeSucceeds,
		TestJoinedWhenDialReturnsOverTCP, TestRunMayWriteToConnWhenItRegistersAClient},
	"2. One order": {
		TestAllClientsReceiveTheSameMessagesInTheSameOrder},
	"3. A healthy client is never dropped because another one sends fast": {
		TestFloodDropsNoHealthyClient, TestSenderIsRateLimitedAndNeverDropped,
		TestTokenBucketRefillsWhileIdle, TestHubAppliesBackpressureOnlyWhenAQueueIsPastHalf},
	"4. A slow client costs a bounded wait, and then nothing": {
		TestSlowClientCostsTheOthersNothingOnceItIsDropped, TestFullQueueDropsItsClientAlone,
		TestClientThatNeverReadsIsClosed, TestNothingWaitsForAClientAfterAFailedWrite},
	"5. Any message or control frame shows that a peer is alive": {
		TestPeerTimesOutPongWaitAfterItsLastMessageOrControlFrame, TestClientDelayedByTheHubDoesNotTimeOut},
	"6. SIGINT or SIGTERM, and a port in use": {
		TestSignalShutsDownGracefullyWithStatus0, TestSecondSignalForcesAnExitOneSecondAfterTheFirst,
		TestTwoSignalsAtOnceAreOne, TestHangupIsIgnoredIfItWasAtTheStart,
		TestProcessThatCannotListenExitsWithOneLine, TestServeReturnsAtOnceIfAllClientsDisconnect,
		TestServeReturnsAfterShutdownWaitDespiteASlowClient, TestStoppedHubDropsAllClientsAndWaitsForThem,
		TestShutdownIsReadByAClientThatSendsBeforeItReads, TestHandshakeDuringShutdownIsRejected,
		TestRejectedPeerThatDoesNotReadIsClosedAfterWriteWait},
	"7. No goroutine outlives its client, and none the hub": {
		TestHubEndsSoonHoweverItsClientEnds, TestServeWsReturnsAfterTheHandshake,
		TestStoppedHubDropsAllClientsAndWaitsForThem},
	"8. A naive move of an application costs at most its own client": {
		TestRegisteringAgainIsHarmless, TestUnregisterTwiceIsHarmless, TestUnregisterOfAnUnknownClientIsHarmless,
		TestDoneTwiceDoesNotEndTheHubEarly, TestDoneWithoutUnregisterIsEnough,
		TestAnyGoroutineMayStopTheHubAnyNumberOfTimes, TestQueueClosedByTheApplicationIsANormalClosure,
		TestBlockingSendInRunEndsWithTheSlowClientsConnection, TestHistoryMayExceedTheQueue,
		TestEveryCloseReasonIsSentAndLogged, // a reason that is too long
		TestUpstreamsServeWsWorksWithThesePumps, TestPeerMayBeAskedForAPasswordBeforeItRegisters},
	"9. From any goroutine, at any time, through do and tell": {
		TestDoAndTellReachTheHubFromAnyGoroutine, TestDoReturnsWhenTheFunctionHasReturned,
		TestDoAndTellReturnFalseOnceTheHubIsStopped, TestStopReleasesCallersOfDoThatRunHasNotTaken,
		TestDoAndTellFromFiftyGoroutinesAgainstDropAndStop, TestGoroutineThatOutlivesTheHubEnds,
		TestMessageForOneClientReachesItAlone, TestRepliesToASlowClientCostItAlone,
		TestNewConnectionOfAUserReplacesTheOldOnlyAfterAValidHandshake},
	"10. Nothing in the shutdown waits for the log, and a log whose reader has died ends nothing": {
		TestProcessOutlivesTheReaderOfItsLog,
		TestHubEndsAlthoughTheLogBlocks, TestServeReturnsAlthoughTheLogBlocks,
		TestSignalEndsTheProcessAlthoughItsLogBlocks, TestRateLimitedClientDoesNotWaitForTheLog},
}

// The figures and texts that users rely on; all other tests use the constants.

func TestConstantsAndCloseReasonsAreAsPromised(t *testing.T) {
	for name, test := range map[string]struct{ got, want any }{
		"writeWait":         {writeWait, 10 * time.Second},
		"pongWait":          {pongWait, time.Minute},
		"pingPeriod":        {pingPeriod, 54 * time.Second},
		"closeWait":         {closeWait, 5 * time.Second},
		"maxMessageSize":    {maxMessageSize, 512},
		"maxBatchSize":      {maxBatchSize, 32767},
		"sendQueueSize":     {sendQueueSize, 256},
		"rateBurst":         {rateBurst, 128},
		"rateInterval":      {rateInterval, time.Second / 100},
		"backpressureDelay": {backpressureDelay, time.Millisecond},
		"shutdownWait":      {shutdownWait, 8 * time.Second},
		"logWait":           {logWait, time.Second / 10},
		"maxHeaderSize":     {maxHeaderSize, 16384},
		"httpTimeout":       {httpTimeout, 10 * time.Second},
		"idleTimeout":       {idleTimeout, 75 * time.Second},
		"forceAfter":        {forceAfter, time.Second},
		"newline":           {string(newline), "\n"},
		"addr":              {*addr, ":8080"},
		"read buffer":       {upgrader.ReadBufferSize, 512},
		"write buffer":      {upgrader.WriteBufferSize, 32767},
		"buffers shared":    {upgrader.WriteBufferPool != nil, true},
		"errShuttingDown":   {*errShuttingDown, websocket.CloseError{Code: 1001, Text: "server shutting down"}},
		"errUnregistered":   {*errUnregistered, websocket.CloseError{Code: 1000, Text: "closed by the server"}},
		"errBinary":         {*errBinary, websocket.CloseError{Code: 1003, Text: "binary messages are not supported"}},
		"errInvalidUTF8":    {*errInvalidUTF8, websocket.CloseError{Code: 1007, Text: "message is not valid UTF-8"}},
		"errTooBig":         {*errTooBig, websocket.CloseError{Code: 1009, Text: "message exceeds 512 bytes"}},
		"errTimeout":        {*errTimeout, websocket.CloseError{Code: 1008, Text: "no pong, or no complete message, for 1m0s"}},
		"errSlowClient":     {*errSlowClient, websocket.CloseError{Code: 1013, Text: "slow client: 256 messages queued"}},
	} {
		if test.got != test.want {
			t.Errorf("%s is %v, want %v", name, test.got, test.want)
		}
	}
}

// On the wire, in: one WebSocket text message is one chat message, of at most 512 bytes.
// Control characters become spaces, surrounding white space is trimmed, and an empty
// message is not broadcast.

func TestMessageBecomesOneCleanLineOrNone(t *testing.T) {
	inRoom(t, func(t *testing.T, r *room) {
		p := r.join(t)
		for sent, want := range map[string]string{
			"plain":                             "plain",
			"  around\t\r\n":                    "around",
			"one\ntwo\r\nthree":                 "one two  three",
			"\x1b[2J\x07bell\x00\x7f":           "[2J bell",
			"C1 \u009b31m and \u0085 next line": "C1  31m and   next line",
			"\u00a0\u3000grüße, 世界 👋🏽\u2003":    "grüße, 世界 👋🏽",
			"<b>not markup</b>":                 "<b>not markup</b>",
			strings.Repeat("x", 512):            strings.Repeat("x", 512),
			"":                                  "", " ": "", "\n": "", "\x00\x1b\u0085": "", "\u00a0\u2003": "",
		} {
			want := list(want, "end")
			if want[0] == "" {
				want = want[1:]
			}
			p.send(sent)
			p.send("end")
			p.wantLines(want...)
		}
		if got, want := string(clean([]byte("\xff of an application\xc3"))), "\ufffd of an application\ufffd"; got != want {
			t.Errorf("what is not UTF-8 becomes %q, want %q", got, want)
		}
	})
}

// On the wire, out: one WebSocket text message is one or more chat messages
// joined by '\n', in one frame, below 32 KiB.

func TestQueuedMessagesAreJoinedInFramesBelow32KiB(t *testing.T) {
	inRoom(t, func(t *testing.T, r *room) {
		p := r.join(t).unbuffered()
		var want, got []string
		for n := range 1 + sendQueueSize { // One is with writePump.
			want = append(want, fmt.Sprintf("%0*d", maxMessageSize, n))
			r.broadcast(want[n])
		}
		r.hub.stop()
		frames := 0
		for {
			f, err := p.readFrame(patience)
			if err != nil || f.first != 0x81 {
				break
			}
			if len(f.payload) >= 32<<10 {
				t.Errorf("frame %d has %d bytes, want less than 32 KiB", frames, len(f.payload))
			}
			frames++
			got = append(got, strings.Split(string(f.payload), "\n")...)
		}
		if !slices.Equal(got, want) {
			t.Errorf("got %d lines that differ from the %d sent", len(got), len(want))
		}
		if want := 1 + (sendQueueSize*(maxMessageSize+1)+maxBatchSize-1)/maxBatchSize; frames != want {
			t.Errorf("they came in %d frames, want %d", frames, want)
		}
	})
}

func TestBatchIsFilledToTheLastByte(t *testing.T) {
	// These 62 leave 962 bytes, which hold a newline, 448 bytes, another newline
	// and a message of the greatest length, and not one byte more.
	const most = maxBatchSize/(maxMessageSize+1) - 1
	for gap, want := range map[int]int{448: most + 2, 449: most + 1} {
		runInRoom(t, fmt.Sprint(gap), func(t *testing.T, r *room) {
			p := r.join(t).unbuffered()
			r.broadcast("writePump is busy with this")
			for range most {
				r.broadcast(strings.Repeat("x", maxMessageSize))
			}
			r.broadcast(strings.Repeat("x", gap), strings.Repeat("x", maxMessageSize))
			p.wantLines("writePump is busy with this")
			lines, err := p.read(patience)
			if len(lines) != want {
				t.Errorf("got %d lines in one message, and %v, want %d lines", len(lines), err, want)
			}
		})
	}
}

// A client that asks for the subprotocol heartbeat gets an empty text message
// with every ping; other clients get none.

func TestHeartbeatClientGetsAnEmptyMessageWithEachPing(t *testing.T) {
	without := []string{`10s text "hello"`, `54s ping ""`, `1m48s ping ""`}
	with := []string{`10s text "hello"`, `54s ping ""`, `54s text ""`, `1m48s ping ""`, `1m48s text ""`}
	for subprotocol, want := range map[string][]string{"": without, "other": without, "heartbeat": with} {
		runInRoom(t, subprotocol, func(t *testing.T, r *room) {
			p := r.join(t, strings.Fields(subprotocol)...)
			if got, want := p.Subprotocol() == "heartbeat", subprotocol == "heartbeat"; got != want {
				t.Errorf("the server chose %q", p.Subprotocol())
			}
			start := time.Now()
			time.AfterFunc(10*time.Second, func() { r.broadcast("hello") })
			var got []string
			for {
				f, err := p.readFrame(time.Until(start.Add(3*pingPeriod - 1)))
				if err != nil {
					break
				}
				got = append(got, fmt.Sprint(time.Since(start), " ", f))
				p.write(encode(0x8a, "")) // a pong
			}
			if !slices.Equal(got, want) {
				t.Errorf("got %q, want %q", got, want)
			}
		})
	}
}

// RFC 6455: a chat with one client is an echo server. gorilla/websocket parses the
// frames, and has tests for that; these are what the pumps do with them.

func TestFramesAreAnsweredAsRFC6455Says(t *testing.T) {
	const closeCode, closeBack = "\x03\xe8", `close 1000 ""`
	hello, helloBack := encode(0x81, "hello"), `text "hello"`
	type test struct {
		name string
		sent [][]byte // a close frame with 1000 is sent after that
		want []string // the end of TCP is expected after that
	}
	tests := []test{
		{"5.2 text", list(hello), list(helloBack, closeBack)},
		{"5.2 against the protocol", list(encode(0x8f, "")), list(`close 1002 "bad opcode 15"`)},
		{"5.2 negative length", list([]byte{0x81, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}), list(`close 1002 "websocket: read limit exceeded"`)},
		{"5.4 two fragments", list(encode(0x01, "hel"), encode(0x80, "lo")), list(helloBack, closeBack)},
		{"5.4 empty fragments", list(encode(0x01, ""), encode(0x00, "hello"), encode(0x00, ""), encode(0x80, "")), list(helloBack, closeBack)},
		{"5.4 a ping in between", list(encode(0x01, "hel"), encode(0x89, "?"), encode(0x80, "lo")), list(`pong "?"`, helloBack, closeBack)},
		{"5.4 a close in between", list(encode(0x01, "hel"), encodeClose(1000, "")), list(closeBack)},
		{"5.4 a close in a binary message", list(encode(0x02, "hel"), encodeClose(1000, "")), list(closeBack)},
		{"5.4 text within a text", list(encode(0x01, "x"), hello), list(`close 1002 "data before FIN"`)},
		{"5.4 too long together", list(encode(0x01, strings.Repeat("x", 300)), encode(0x80, strings.Repeat("x", 300))), list(`close 1009 "message exceeds 512 bytes"`)},
		{"5.5.1 close without a code", list(encode(0x88, "")), list(`close`)},
		{"5.5.1 close with a reason", list(encodeClose(1000, "good night")), list(`close 1000 "good night"`)},
		{"5.5.1 close with a code of one's own", list(encodeClose(4999, "why")), list(`close 4999 "why"`)},
		{"5.5.1 text after the close", list(encodeClose(1000, ""), hello), list(closeBack)},
		{"5.5.1 ping after the close", list(encodeClose(1000, ""), encode(0x89, "?")), list(closeBack)},
		{"5.5.1 text before the close", list(hello, encodeClose(1000, "")), list(helloBack, closeBack)},
		{"5.5.2 ping", list(encode(0x89, "")), list(`pong ""`, closeBack)},
		{"5.5.2 ping of 125 bytes", list(encode(0x89, strings.Repeat("x", 125))), list(`pong "`+strings.Repeat("x", 125)+`"`, closeBack)},
		{"5.5.3 unsolicited pong", list(encode(0x8a, "x")), list(closeBack)},
		{"5.6 fragmented binary", list(encode(0x02, "x"), encode(0x80, "x")), list(`close 1003 "binary messages are not supported"`)},
		{"8.1 character over two fragments", list(encode(0x01, "\xc3"), encode(0x80, "\xa9")), list(`text "é"`, closeBack)},
		{"8.1 first and last of each length", list(encode(0x81, "\u00a1\u07ff\u0800\uffff\U00010000\U0010ffff.")), list(fmt.Sprintf("text %q", "\u00a1\u07ff\u0800\uffff\U00010000\U0010ffff."), closeBack)},
	}
	for _, bad := range []string{"\xff", "\xc3", "\xc0\xaf", "\xed\xa0\x80", "\xf4\x90\x80\x80", "\x80", "\xe2\x82"} {
		tests = append(tests, test{fmt.Sprintf("8.1 %q is not UTF-8", bad), list(encode(0x81, "x"+bad)), list(`close 1007 "message is not valid UTF-8"`)})
	}
	for _, test := range tests {
		runInRoom(t, test.name, func(t *testing.T, r *room) {
			p := r.join(t)
			start := time.Now()
			p.write(append(slices.Concat(test.sent...), encode(0x88, closeCode)...))
			var got []string
			for {
				f, err := p.readFrame(patience)
				if err == io.EOF {
					break
				}
				if err != nil {
					t.Fatalf("got %q and then %v, want %q and the end of TCP", got, err, test.want)
				}
				got = append(got, f.String())
			}
			if !slices.Equal(got, test.want) {
				t.Errorf("got %q, want %q", got, test.want)
			}
			if got := time.Since(start); got != 0 {
				t.Errorf("it took %v, want no time", got)
			}
		})
	}
}

// On the wire, when things go wrong: the client that caused it gets a close code and a
// reason, also while it is sending; after both close frames TCP is closed at once; and
// the other clients notice nothing.

// violations are what a client can do to have its connection closed.
var violations = []struct {
	name string
	sent []byte
	want *websocket.CloseError
}{
	{"binary", encode(0x82, "text all the same"), errBinary},
	{"binary, not UTF-8", encode(0x82, "\xff"), errBinary},
	{"not UTF-8", encode(0x81, "abc\xff\xfe\xfd"), errInvalidUTF8},
	{"one byte too long", encode(0x81, strings.Repeat("x", maxMessageSize+1)), errTooBig},
	{"binary, too long", encode(0x82, strings.Repeat("x", maxMessageSize+1)), errTooBig},
	{"blank, too long", encode(0x81, strings.Repeat(" ", maxMessageSize+1)), errTooBig},
	{"too long, cut within a character", encode(0x81, strings.Repeat("é", maxMessageSize)), errTooBig},
	{"2 MB", encode(0x81, strings.Repeat("x", 2<<20)), errTooBig},
	{"without end", encode(0x01, strings.Repeat("x", maxMessageSize+1)), errTooBig},
	{"against the protocol", encode(0x8f, ""), &websocket.CloseError{Code: 1002, Text: "bad opcode 15"}},
}

// much is many messages, and endless as many parts of one: more than a pipe holds
// for a peer that does not read, and more than the rate limit takes in closeWait.
var (
	much    = bytes.Repeat(encode(0x81, strings.Repeat("x", 122)), 2000)
	endless = bytes.Repeat(encode(0x00, strings.Repeat("x", 122)), 2000)
)

func TestViolatorAloneIsClosedAndReadsTheReason(t *testing.T) {
	for _, violation := range violations {
		for _, busy := range []bool{false, true} {
			for _, sends := range []bool{false, true} {
				runInRoom(t, fmt.Sprintf("%s,busy=%v,sends=%v", violation.name, busy, sends), func(t *testing.T, r *room) {
					violator, other := r.join(t), r.join(t)
					logged, start := *violation.want, time.Now()
					var broadcast, received []string
					if busy {
						violator.unbuffered()
						broadcast = list("one", "two", "three")
						r.broadcast(broadcast...) // The peer has not read it when it violates the protocol.
						received = broadcast
					}
					if logged.Code == 1002 {
						// gorilla/websocket writes this one itself, ahead of the queue.
						logged.Text = "websocket: " + logged.Text
						received = broadcast[:min(1, len(broadcast))]
					}
					sent := violation.sent
					if sends {
						more := much
						if sent[0] == 0x01 {
							more = endless
						}
						sent = slices.Concat(sent, more)
					}
					var writing sync.WaitGroup
					writing.Go(func() { violator.write(sent) })
					if synctest.Wait(); !busy {
						writing.Wait() // It reads only when it has written all.
					}
					if got := violator.wantClose(violation.want); !slices.Equal(got, received) {
						t.Errorf("before the close frame came %s, want %q", brief(got), received)
					}
					if logged.Code == 1002 {
						violator.wantHalfEnd()
						violator.pipe().CloseWrite()
						synctest.Wait()
					}
					violator.wantEnd()
					writing.Wait()
					if got := time.Since(start); got != 0 {
						t.Errorf("all this took %v, want no time", got)
					}
					r.wantLogged(t, fmt.Sprintf("pipe: dropped: %q", logged.Error()))
					r.broadcast("still here")
					other.wantLines(append(broadcast, "still here")...)
				})
			}
		}
	}
}

func TestCompressedMessageThatCannotBeReadIsAProtocolError(t *testing.T) {
	defer func(old websocket.Upgrader) { upgrader = old }(upgrader)
	upgrader.EnableCompression = true
	inRoom(t, func(t *testing.T, r *room) {
		p := r.join(t)
		p.write(encode(0xc1, "\xff\xff\xff this does not expand"))
		if _, err := p.read(patience); !websocket.IsCloseError(err, websocket.CloseProtocolError) {
			t.Errorf("the connection ended with %v, want 1002", err)
		}
	})
	inRoom(t, func(t *testing.T, r *room) {
		p := r.join(t)
		p.write(encode(0xc1, "\x00\xff\x00\x00\xffthis is truncated"))
		if _, err := p.read(patience); !websocket.IsCloseError(err, websocket.CloseProtocolError) {
			t.Errorf("the connection ended with %v, want 1002", err)
		}
		p.Close()
		r.wantLogged(t, `pipe: dropped: "websocket: close 1002 (protocol error): unexpected EOF"`)
	})
}

func TestTLSConnectionCutWithinARecordIsAbnormalClosure(t *testing.T) {
	issuer := httptest.NewTLSServer(nil) // for its certificate
	issuer.Close()
	inBubble(t, func(t *testing.T) {
		pipes := newPipeListener()
		r := newRoom(t, tls.NewListener(pipes, issuer.TLS))
		r.connect = func(t testing.TB) net.Conn {
			return tls.Client(pipes.connect(t), &tls.Config{InsecureSkipVerify: true})
		}
		conn := r.join(t).NetConn().(*tls.Conn).NetConn()
		conn.Write([]byte{23, 3, 3, 0, 100, 'x'}) // one byte of a record of 100
		conn.Close()
		r.wantLogged(t, `pipe: disconnected: "websocket: close 1006 (abnormal closure): unexpected EOF"`)
	})
}

// The same over TCP, as the pipes only imitate it.

func TestViolatorReadsTheReasonOverTCPWhileItSends(t *testing.T) {
	watch(t, patience)
	r := tcpRoom(t)
	for _, violation := range violations {
		if len(violation.sent) < 1000 && violation.sent[0] != 0x01 {
			p := r.join(t)
			p.write(slices.Concat(violation.sent, much[:8<<10]))
			p.wantClose(violation.want)
		}
	}
}

func TestViolatorThatNeverAnswersIsClosedAfterCloseWait(t *testing.T) {
	for _, violation := range violations {
		runInRoom(t, violation.name, func(t *testing.T, r *room) {
			p := r.join(t)
			p.SetCloseHandler(func(int, string) error { return nil })
			p.write(violation.sent)
			p.wantClose(violation.want)
			time.Sleep(closeWait - 1)
			synctest.Wait()
			if p.pipe().far.isClosed() {
				t.Errorf("TCP was closed before %v have passed", closeWait)
			}
			time.Sleep(time.Nanosecond)
			synctest.Wait()
			p.wantEnd()
		})
	}
}

// An application's connection, perhaps not TCP, may have no CloseWrite.

type wholeListener struct{ *pipeListener }

func (l wholeListener) Accept() (net.Conn, error) {
	conn, err := l.pipeListener.Accept()
	return struct{ net.Conn }{conn}, err
}

func TestViolatorReadsTheReasonWithoutCloseWrite(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		listener := newPipeListener()
		r := newRoom(t, wholeListener{listener})
		r.connect = listener.connect
		p := r.join(t)
		p.write(slices.Concat(encode(0x8f, ""), much))
		p.wantClose(&websocket.CloseError{Code: 1002, Text: "bad opcode 15"})
		p.pipe().CloseWrite()
		synctest.Wait()
		p.wantEnd()
	})
}

// How a connection ends, and its line in the log: which side closed it, or no line after
// a normal closure. A peer's text is quoted, so that it can neither end a line of the log
// nor drive a terminal.

func TestEveryCloseReasonIsSentAndLogged(t *testing.T) {
	const evil = "x\n2026/11/23 10:00:00 10.0.0.1: forged\x1b[2J\u009b31m"
	sends := func(sent []byte) func(*room, *peer) {
		return func(_ *room, p *peer) {
			p.SetCloseHandler(func(int, string) error { return nil })
			p.write(sent)
		}
	}
	stall := func(r *room, p *peer, lines int) { // The peer has not read them.
		p.unbuffered()
		for n := range lines {
			r.broadcast(fmt.Sprint("line ", n))
		}
	}
	const all = 1 + sendQueueSize // One is with writePump.
	const vanished = `disconnected: "websocket: close 1006 (abnormal closure): unexpected EOF"`
	for _, test := range []struct {
		name  string
		end   func(*room, *peer)
		after time.Duration
		lines int                   // that come before the close frame
		want  *websocket.CloseError // what the peer reads, unless it has reset the connection
		log   string
	}{
		{"the peer closes", sends(encodeClose(1000, "")), 0, 0, &websocket.CloseError{Code: 1000}, ""},
		{"the peer's tab is closed", sends(encodeClose(1001, "")), 0, 0, &websocket.CloseError{Code: 1001}, ""},
		{"the peer closes without a code", sends(encode(0x88, "")), 0, 0, &websocket.CloseError{Code: 1005}, ""},
		{"the peer closes with a reason", sends(encodeClose(4000, evil)), 0, 0, &websocket.CloseError{Code: 4000, Text: evil},
			`disconnected: "websocket: close 4000: x\n2026/11/23 10:00:00 10.0.0.1: forged\x1b[2J\u009b31m"`},
		{"the peer closes with a reason of the server", sends(encodeClose(errTooBig.Code, errTooBig.Text)), 0, 0, errTooBig,
			`disconnected: "websocket: close 1009 (message too big): message exceeds 512 bytes"`},
		{"the peer half-closes", func(_ *room, p *peer) { p.pipe().CloseWrite() }, 0, 0, &websocket.CloseError{Code: 1006, Text: "unexpected EOF"}, vanished},
		{"the peer vanishes", func(_ *room, p *peer) { p.Close() }, 0, 0, nil, vanished},
		{"the peer vanishes in a message", func(_ *room, p *peer) { p.write(encode(0x01, "x")); p.Close() }, 0, 0, nil, vanished},
		{"the network resets it", func(r *room, p *peer) { r.broadcast("not read"); p.Close() }, 0, 0, nil,
			`disconnected: "websocket: close 1006 (abnormal closure): read pipe: connection reset by peer"`},
		{"the peer violates the protocol and half-closes", func(r *room, p *peer) {
			stall(r, p, 1)
			p.write(encode(0x82, ""))
			p.pipe().CloseWrite()
			synctest.Wait()
		}, 0, 1, errBinary, `dropped: "websocket: close 1003 (unsupported data): binary messages are not supported"`},
		{"the peer answers no ping", func(_ *room, p *peer) { p.SetPingHandler(func(string) error { return nil }) }, pongWait, 0, errTimeout,
			`dropped: "websocket: close 1008 (policy violation): no pong, or no complete message, for 1m0s"`},
		{"the peer reads nothing and violates the protocol", func(r *room, p *peer) {
			stall(r, p, 1)
			p.write(encode(0x8f, ""))
			time.Sleep(writeWait - time.Second)
		}, writeWait - time.Second, 1, &websocket.CloseError{Code: 1002, Text: "websocket: bad opcode 15"},
			`dropped: "websocket: close 1002 (protocol error): websocket: bad opcode 15"`},
		{"the peer does not read", func(r *room, p *peer) { stall(r, p, all+2) }, sendQueueSize / 2 * backpressureDelay, all, errSlowClient,
			`dropped: "websocket: close 1013: slow client: 256 messages queued"`},
		{"the application unregisters it", func(r *room, _ *peer) { r.hub.unregister <- r.clients()[0] }, 0, 0, errUnregistered, ""},
		{"the application drops it with a long reason", func(r *room, _ *peer) {
			r.clients()[0].end(&websocket.CloseError{Code: 4000, Text: "x" + strings.Repeat("é", 70)})
		}, 0, 0, &websocket.CloseError{Code: 4000, Text: "x" + strings.Repeat("é", 61)},
			`dropped: "websocket: close 4000: x` + strings.Repeat("é", 70) + `"`},
		{"the application drops it with one reason, then another", func(r *room, _ *peer) {
			client := r.clients()[0]
			client.end(errBinary)
			client.end(errTooBig)
		}, 0, 0, errBinary, `dropped: "websocket: close 1003 (unsupported data): binary messages are not supported"`},
		{"the server shuts down", func(r *room, p *peer) { stall(r, p, 3); r.hub.stop() }, 0, 3, errShuttingDown, ""},
	} {
		runInRoom(t, test.name, func(t *testing.T, r *room) {
			p := r.join(t)
			start := time.Now()
			test.end(r, p)
			if test.want != nil {
				lines := p.wantCloseWithin(2*pongWait, test.want)
				for n, line := range lines {
					if line != fmt.Sprint("line ", n) {
						t.Fatalf("got %s, want every line in order", brief(lines))
					}
				}
				if len(lines) != test.lines {
					t.Errorf("got %d lines, want %d", len(lines), test.lines)
				}
				if code := test.want.Code; code == 1002 || code == 1008 {
					p.wantHalfEnd()
					p.pipe().CloseWrite()
					synctest.Wait()
				}
				p.wantEnd()
			}
			if got := time.Since(start); got != test.after {
				t.Errorf("it ended after %v, want %v", got, test.after)
			}
			if test.log == "" {
				r.wantLogged(t)
			} else {
				r.wantLogged(t, "pipe: "+test.log)
			}
		})
	}
}

func TestClientThatNeverReadsIsClosed(t *testing.T) {
	ping := func(p *peer) { p.write(encode(0x89, "")) }
	timeout := closeError(1006, "%v", os.ErrDeadlineExceeded) // the failed write's error
	for name, test := range map[string]struct {
		begin func(*room, *peer)
		after time.Duration
		want  *websocket.CloseError // in the log
	}{
		"a message":            {func(r *room, p *peer) { r.broadcast("this") }, writeWait, timeout},
		"message, close frame": {func(r *room, p *peer) { r.broadcast("this"); r.clients()[0].end(errBinary) }, writeWait, errBinary},
		"a close frame":        {func(r *room, _ *peer) { r.clients()[0].end(errBinary) }, writeWait, errBinary},
		"a ping":               {func(*room, *peer) {}, pingPeriod + writeWait, timeout},
		"heartbeat":            {func(_ *room, p *peer) { go io.ReadFull(p.NetConn(), make([]byte, 2)) }, pingPeriod + writeWait, timeout},
		"a pong":               {func(_ *room, p *peer) { ping(p) }, pingPeriod, timeout}, // when writing fails
		"two pongs":            {func(r *room, p *peer) { ping(p); time.Sleep(2 * writeWait); r.broadcast("this") }, 2 * writeWait, timeout},
	} {
		runInRoom(t, name, func(t *testing.T, r *room) {
			var subprotocols []string
			if name == heartbeat {
				subprotocols = list(heartbeat)
			}
			p := r.join(t, subprotocols...).unbuffered()
			start, want := time.Now(), test.after+closeWait
			test.begin(r, p)
			p.NetConn().SetWriteDeadline(time.Time{})
			for !p.pipe().far.isClosed() && time.Since(start) < 2*want { // It answers.
				time.Sleep(100 * time.Millisecond)
				p.NetConn().Write(encode(0x8a, ""))
				synctest.Wait()
			}
			if got := time.Since(start); got < want || got > want+200*time.Millisecond {
				t.Errorf("TCP was closed after %v, want %v", got, want)
			}
			r.wantLogged(t, fmt.Sprintf("pipe: dropped: %q", test.want.Error()))
		})
	}
}

func TestNothingWaitsForAClientAfterAFailedWrite(t *testing.T) {
	inRoom(t, func(t *testing.T, r *room) {
		p := r.join(t)
		client := r.clients()[0]
		p.pipe().far.onWrite = func() error { return errReset }
		start := time.Now()
		r.broadcast("this ends writePump")
		for range 2 * sendQueueSize {
			client.send <- []byte("sent past the hub")
		}
		synctest.Wait()
		for range 2 * sendQueueSize {
			r.broadcast("lost")
		}
		if got := time.Since(start); got != 0 {
			t.Errorf("it cost the others %v, want no time", got)
		}
		time.Sleep(closeWait)
		r.wantLogged(t, `pipe: dropped: "websocket: close 1006 (abnormal closure): read pipe: connection reset by peer"`)
	})
}

func TestPeerThatDoesNotTakeTheHandshakeIsDroppedAfterWriteWait(t *testing.T) {
	for _, stopping := range []bool{false, true} {
		runInRoom(t, fmt.Sprintf("stopping=%v", stopping), func(t *testing.T, r *room) {
			conn := r.connect(t).(*pipe)
			defer conn.Close()
			conn.unbuffer()
			start := time.Now()
			fmt.Fprintf(conn, "%s\r\n", handshake)
			client := r.clients()[0]
			r.hub.broadcast <- []byte("run no longer receives this")
			if stopping {
				r.hub.stop()
			}
			time.Sleep(writeWait - 1)
			if synctest.Wait(); conn.far.isClosed() {
				t.Errorf("TCP was closed before %v have passed", writeWait)
			}
			for range client.send { // Closed when the hub has dropped it.
			}
			time.Sleep(time.Until(start.Add(writeWait)))
			if synctest.Wait(); !conn.far.isClosed() {
				t.Errorf("TCP was not closed after %v", writeWait)
			}
			if stopping {
				r.wantEnd(t)
				r.wantLogged(t)
			} else {
				r.wantLogged(t, `pipe: disconnected: "websocket: close 1006 (abnormal closure): handshake response: i/o timeout"`)
			}
		})
	}
}

func TestPongWaitsForAStalledPeer(t *testing.T) {
	inRoom(t, func(t *testing.T, r *room) {
		p := r.join(t).unbuffered()
		r.broadcast("this is not read yet")
		p.write(encode(0x89, "are you there?"))
		time.Sleep(writeWait - time.Second)
		for _, want := range []string{`text "this is not read yet"`, `pong "are you there?"`} {
			if f, err := p.readFrame(patience); err != nil || f.String() != want {
				t.Errorf("got %v, %v, want %s", f, err, want)
			}
		}
		p.send("still here")
		p.wantLines("still here")
	})
}

// Messages to the peer may have any size. What does not fit into a frame begins the next.

func TestMessagesOfAnySizeFillFramesInOrder(t *testing.T) {
	const full = maxBatchSize
	for _, test := range []struct {
		name   string
		queued []int // sizes, while writePump writes another message
		want   []int // sizes of the frames
	}{
		{"two that fit exactly", []int{full - 10, 9}, []int{full}},
		{"two that do not fit", []int{full - 10, 10}, []int{full - 10, 10}},
		{"one that does not fit begins a full frame", []int{full - 1, 2, full - 3, 1}, []int{full - 1, full, 1}},
		{"one that fills a frame", []int{full, 1}, []int{full, 1}},
		{"one larger than a frame", []int{1, full + 1, 1, 1}, []int{1, full + 1, 3}},
		{"three larger than two frames", []int{2*full + 1, 2*full + 2, 2*full + 3}, []int{2*full + 1, 2*full + 2, 2*full + 3}},
		{"empty ones", []int{full, 0, 0, full}, []int{full, 1, full}},
	} {
		runInRoom(t, test.name, func(t *testing.T, r *room) {
			p := r.join(t).unbuffered()
			client := r.clients()[0]
			r.broadcast("busy")
			var want, got []byte
			r.hub.do(func() {
				for i, size := range test.queued {
					message := bytes.Repeat([]byte{'a' + byte(i)}, size)
					want = append(append(want, '\n'), message...)
					r.hub.queue(client, message)
				}
			})
			r.hub.stop()
			var sizes []int
			for f, err := p.readFrame(patience); f.first == 0x81; f, err = p.readFrame(patience) {
				if err != nil {
					t.Fatal(err)
				}
				if got = append(got, '\n'); string(f.payload) != "busy" {
					got = append(got, f.payload...)
					sizes = append(sizes, len(f.payload))
				} else {
					got = nil
				}
			}
			if !slices.Equal(sizes, test.want) || string(got) != string(want) {
				t.Errorf("the frames have %d bytes, want %d; same bytes: %v", sizes, test.want, string(got) == string(want))
			}
		})
	}
}

func TestBatchesDoNotChangeTheMessagesThatClientsShare(t *testing.T) {
	inRoom(t, func(t *testing.T, r *room) {
		one, other := r.join(t).unbuffered(), r.join(t).unbuffered()
		r.broadcast("busy")
		buffer := []byte("hello, and room behind it")
		r.broadcast("first", "second")
		r.hub.do(func() { r.hub.deliver(buffer[:5]) })
		r.broadcast("third")
		for _, p := range list(one, other) {
			p.wantLines("busy", "first", "second", "hello", "third")
		}
		if string(buffer) != "hello, and room behind it" {
			t.Errorf("the application's buffer is %q", buffer)
		}
	})
}

func TestPingsGoOutBetweenFramesOfABacklog(t *testing.T) {
	inRoom(t, func(t *testing.T, r *room) {
		p := r.join(t).unbuffered()
		client := r.clients()[0]
		var reading sync.WaitGroup
		defer reading.Wait()
		pings := 0
		reading.Go(func() {
			for {
				time.Sleep(time.Second) // a frame a second
				f, err := p.readFrame(patience)
				if err != nil {
					return
				}
				if f.first == 0x89 {
					pings++
				}
				p.NetConn().Write(encode(0x8a, ""))
			}
		})
		for range 5 * pingPeriod / time.Second { // The queue is never empty.
			r.hub.do(func() {
				for len(client.send) < 3 && r.hub.clients[client] {
					r.hub.queue(client, make([]byte, maxBatchSize))
				}
			})
			time.Sleep(time.Second)
		}
		if synctest.Wait(); pings < 3 {
			t.Errorf("got %d pings in five times %v", pings, pingPeriod)
		}
		p.Close()
	})
}

// A close code that must not be sent is replaced. RFC 6455 section 7.4.

func TestCloseCodeThatMustNotBeSentIsReplaced(t *testing.T) {
	for code, sent := range map[int]bool{
		-1: false, 0: false, 403: false, 999: false, 1000: true, 1003: true, 1004: false, 1005: false, 1006: false,
		1007: true, 1013: true, 1015: false, 2999: false, 3000: true, 4999: true, 5000: false, 70000: false,
	} {
		for _, how := range []string{"drop", "end"} {
			runInRoom(t, fmt.Sprint(code, how), func(t *testing.T, r *room) {
				p := r.join(t)
				client := r.clients()[0]
				reason := &websocket.CloseError{Code: code, Text: "kicked"}
				want := reason
				if !sent {
					want = &websocket.CloseError{Code: 1011, Text: reason.Error()}
				}
				start := time.Now()
				if how == "drop" {
					r.hub.do(func() { r.hub.drop(client, reason) })
				} else {
					client.end(reason)
				}
				p.wantClose(want)
				synctest.Wait()
				p.wantEnd()
				if got := time.Since(start); got != 0 {
					t.Errorf("TCP was closed after %v, want at once", got)
				}
			})
		}
	}
}

func TestTLSConnectionCutWithinAMessageIsAbnormalClosure(t *testing.T) {
	issuer := httptest.NewTLSServer(nil) // for its certificate
	issuer.Close()
	inBubble(t, func(t *testing.T) {
		pipes := newPipeListener()
		r := newRoom(t, tls.NewListener(pipes, issuer.TLS))
		r.connect = func(t testing.TB) net.Conn {
			return tls.Client(pipes.connect(t), &tls.Config{InsecureSkipVerify: true})
		}
		p := r.join(t)
		p.write(encode(0x01, "begun"))
		conn := p.NetConn().(*tls.Conn).NetConn()
		conn.Write([]byte{23, 3, 3, 0, 100, 'x'}) // one byte of a record of 100
		conn.Close()
		r.wantLogged(t, `pipe: disconnected: "websocket: close 1006 (abnormal closure): unexpected EOF"`)
	})
}

func TestClientAsksForTheHeartbeatByItsURL(t *testing.T) {
	for query, want := range map[string]bool{"": false, "?heartbeat": true, "?heartbeat=1": true, "?other": false} {
		runInRoom(t, query, func(t *testing.T, r *room) {
			conn, _, err := r.dialer(t).Dial(roomURL+query, nil)
			if err != nil {
				t.Fatal(err)
			}
			p := &peer{conn, t}
			defer p.Close()
			f, err := p.readFrame(pingPeriod + 1)
			if err != nil || f.String() != `ping ""` {
				t.Fatalf("got %v, %v, want a ping", f, err)
			}
			f, err = p.readFrame(time.Second)
			if got := err == nil && f.String() == `text ""`; got != want {
				t.Errorf("got %v, %v; want a heartbeat: %v", f, err, want)
			}
		})
	}
}

func TestLogHasAtMost200BytesOfWhatAPeerSends(t *testing.T) {
	inRoom(t, func(t *testing.T, r *room) {
		long := strings.Repeat("x", 15_000)
		for _, request := range []string{
			strings.Replace(handshake, "Host: pipe", "Host: "+long, 1) + "Origin: http://y" + long + "\r\n",
			"GET /" + long + " HTTP/1.1\r\nHost: pipe\r\n",
			long + " / HTTP/1.1\r\nHost: pipe\r\n",
		} {
			conn := r.connect(t)
			fmt.Fprintf(conn, "%s\r\n", request)
			synctest.Wait()
			conn.Close()
		}
		origin, path := ("http://y" + long)[:200], ("/" + long)[:200]
		r.wantLogged(t,
			fmt.Sprintf(`pipe: handshake refused: "websocket: request origin not allowed by Upgrader.CheckOrigin" (Origin %q, Host %q)`, origin, long[:200]),
			fmt.Sprintf("pipe: GET %q", path),
			fmt.Sprintf("pipe: %s %q", long[:200], "/"))
	})
}

// An application may start the pumps of its own Client as upstream does, in either order,
// before it registers the client, or without ever registering it.

// A shape is how an application serves a peer without serve.
type shape struct {
	name  string
	serve func(*Hub, *websocket.Conn) *Client
}

func newClient(hub *Hub, conn *websocket.Conn) *Client {
	return &Client{hub: hub, conn: conn, send: make(chan []byte, sendQueueSize)}
}

// registerLater registers client, as an application does when it has logged in the peer.
func registerLater(client *Client, wait time.Duration) {
	select {
	case <-time.After(wait):
	case <-client.hub.ended:
	}
	select {
	case client.hub.register <- client:
	case <-client.hub.stopped:
	}
}

var shapes = []shape{
	{"register, then the pumps, as in upstream", func(hub *Hub, conn *websocket.Conn) *Client {
		client := newClient(hub, conn)
		registerLater(client, 0)
		go client.writePump()
		go client.readPump()
		return client
	}},
	{"readPump first", func(hub *Hub, conn *websocket.Conn) *Client {
		client := newClient(hub, conn)
		registerLater(client, 0)
		go client.readPump()
		time.Sleep(time.Nanosecond)
		go client.writePump()
		return client
	}},
	{"registered right after the pumps start", func(hub *Hub, conn *websocket.Conn) *Client {
		client := newClient(hub, conn)
		go client.readPump()
		go client.writePump()
		registerLater(client, 0)
		return client
	}},
	{"registered a second later", func(hub *Hub, conn *websocket.Conn) *Client {
		client := newClient(hub, conn)
		go client.writePump()
		go client.readPump()
		registerLater(client, time.Second)
		return client
	}},
	{"registered after it has timed out", func(hub *Hub, conn *websocket.Conn) *Client {
		client := newClient(hub, conn)
		go client.writePump()
		go client.readPump()
		registerLater(client, 2*pongWait)
		return client
	}},
	{"never registered", func(hub *Hub, conn *websocket.Conn) *Client {
		client := newClient(hub, conn)
		go client.writePump()
		go client.readPump()
		return client
	}},
}

// serveShape has the room serve peers in that shape. The channel receives the clients.
func (r *room) serveShape(t *testing.T, serve func(*Hub, *websocket.Conn) *Client) chan *Client {
	clients := make(chan *Client, 1000)
	r.serve = func(w http.ResponseWriter, req *http.Request) {
		conn, err := upgrader.Upgrade(w, req, nil)
		if err != nil {
			t.Error(err)
			return
		}
		clients <- serve(r.hub, conn)
	}
	return clients
}

// An ending is how a peer ends its connection.
type ending struct {
	name string
	end  func(*peer)
	want *websocket.CloseError // what the peer reads, unless it has closed TCP
}

var endings = []ending{
	{
		name: "close frame",
		end:  func(p *peer) { p.write(encodeClose(4000, "bye")) },
		want: &websocket.CloseError{Code: 4000, Text: "bye"},
	},
	{
		name: "a line, then a close frame",
		end:  func(p *peer) { p.write(append(encode(0x81, "hello"), encodeClose(1000, "")...)) },
		want: &websocket.CloseError{Code: 1000},
	},
	{
		name: "protocol violation",
		end:  func(p *peer) { p.write(encode(0x8f, "")) },
		want: &websocket.CloseError{Code: 1002, Text: "bad opcode 15"},
	},
	{
		name: "binary",
		end:  func(p *peer) { p.write(encode(0x82, "")) },
		want: errBinary,
	},
	{
		name: "silence",
		end:  func(p *peer) { p.SetPingHandler(func(string) error { return nil }) },
		want: errTimeout,
	},
	{
		name: "TCP closed",
		end:  func(p *peer) { p.Close() },
	},
}

func TestPumpsEndInEveryShapeHoweverThePeerEnds(t *testing.T) {
	for _, shape := range shapes {
		for _, ending := range endings {
			runInRoom(t, shape.name+","+ending.name, func(t *testing.T, r *room) {
				clients := r.serveShape(t, shape.serve)
				p := r.join(t)
				ending.end(p)
				if ending.want != nil {
					p.wantCloseWithin(2*pongWait, ending.want)
					p.pipe().CloseWrite()
				}
				client := <-clients
				synctest.Wait()
				if !p.pipe().far.isClosed() {
					t.Error("TCP is still open")
				}
				if got := len(r.clients()); got != 0 || client.tell([]byte("anyone?")) {
					t.Errorf("the hub has %d clients, want none", got)
				}
			})
		}
	}
}

func TestStoppedHubEndsThePumpsOfEveryShape(t *testing.T) {
	for _, shape := range shapes {
		runInRoom(t, shape.name, func(t *testing.T, r *room) {
			r.serveShape(t, shape.serve)
			p := r.join(t)
			p.send("a line")
			synctest.Wait()
			r.hub.stop()
			for err := error(nil); err == nil; { // The line may come first.
				_, err = p.read(patience)
				if err != nil && !websocket.IsCloseError(err, websocket.CloseGoingAway) {
					t.Errorf("the connection ended with %v, want 1001", err)
				}
			}
			r.wantEnd(t)
		})
	}
}

func TestPumpsThatStartAfterTheHubHasEndedCloseTheConnection(t *testing.T) {
	for _, ending := range endings {
		runInRoom(t, ending.name, func(t *testing.T, r *room) {
			r.serveShape(t, func(hub *Hub, conn *websocket.Conn) *Client {
				hub.stop()
				<-hub.ended
				client := newClient(hub, conn)
				go client.writePump()
				go client.readPump()
				return client
			})
			p := r.join(t)
			p.wantClose(errShuttingDown)
			ending.end(p)
			p.Close()
			time.Sleep(closeWait)
			if synctest.Wait(); !p.pipe().far.isClosed() {
				t.Error("TCP is still open")
			}
		})
	}
}

func TestManyClientsLeaveNothingBehindInAnyShape(t *testing.T) {
	const n = 200
	all := append(shapes, shape{"served", nil})
	for _, shape := range all {
		runInRoom(t, shape.name, func(t *testing.T, r *room) {
			if shape.serve != nil {
				r.serveShape(t, shape.serve)
			}
			var pipes []*pipe
			for i := range n {
				p := r.join(t)
				pipes = append(pipes, p.pipe().far)
				if i%2 == 0 {
					endings[i/2%len(endings)].end(p)
				}
			}
			r.hub.stop()
			time.Sleep(writeWait + closeWait)
			r.wantEnd(t) // synctest fails if a goroutine is left.
			for _, pipe := range pipes {
				if !pipe.isClosed() {
					t.Fatal("a connection is still open")
				}
			}
			if got := len(r.hub.clients) + len(r.hub.open) + len(r.hub.dropped); got != 0 {
				t.Errorf("the hub still has %d clients", got)
			}
		})
	}
}

func TestNoTimerKeepsEndedClientsInMemory(t *testing.T) {
	for _, ending := range endings {
		runInRoom(t, ending.name, func(t *testing.T, r *room) {
			var clients []weak.Pointer[Client]
			for range 40 {
				p := r.join(t)
				clients = append(clients, weak.Make(r.clients()[0]))
				ending.end(p)
				p.wantEndSoon()
				p.Close()
				synctest.Wait()
			}
			time.Sleep(closeWait / 2)
			runtime.GC()
			kept := 0
			for _, client := range clients {
				if client.Value() != nil {
					kept++
				}
			}
			if kept > len(clients)/2 { // The runtime removes some stopped timers later.
				t.Errorf("%d of %d clients are still in memory", kept, len(clients))
			}
		})
	}
}

// wantEndSoon reads until the connection ends.
func (p *peer) wantEndSoon() {
	for err := error(nil); err == nil; {
		_, err = p.read(2 * pongWait)
	}
}

func TestAnsweredHandshakeIsNotRejected(t *testing.T) {
	inRoom(t, func(t *testing.T, r *room) {
		r.serve = func(w http.ResponseWriter, req *http.Request) {
			// An application's serve, which asks for a password before it registers.
			handshake := &delayedHandshake{ResponseWriter: w}
			conn, err := upgrader.Upgrade(handshake, req, nil)
			if err != nil {
				t.Error(err)
				return
			}
			conn.ReadMessage()
			r.hub.stop()
			client := newClient(r.hub, conn)
			if handshake.conn.answer([]byte(unavailable)) {
				t.Error("the handshake was answered twice")
			}
			go client.writePump()
			go client.readPump()
		}
		p := r.join(t)
		p.send("sesame")
		p.wantClose(errShuttingDown)
		synctest.Wait()
		p.wantEnd()
	})
}

func TestSlowReaderDelaysItsEndByWriteWaitAndCloseWaitAtMost(t *testing.T) {
	type reason struct {
		name string
		end  func(*room, *Client)
	}
	for _, reason := range []reason{
		{"stop", func(r *room, _ *Client) { r.hub.stop() }},
		{"drop", func(r *room, c *Client) { r.hub.do(func() { r.hub.drop(c, errBinary) }) }},
	} {
		for _, busy := range []bool{true, false} { // Is writePump writing when the reason comes?
			runInRoom(t, fmt.Sprint(reason.name, ",busy=", busy), func(t *testing.T, r *room) {
				p := r.join(t).unbuffered()
				client := r.clients()[0]
				start := time.Now()
				if busy {
					r.broadcast("not read yet")
				}
				r.hub.do(func() {
					for range sendQueueSize {
						r.hub.queue(client, bytes.Repeat([]byte("x"), maxMessageSize))
					}
				})
				reason.end(r, client)
				var reading sync.WaitGroup
				defer reading.Wait()
				reading.Go(func() { // It takes each frame just in time, and answers no close frame.
					for err := error(nil); err == nil; {
						time.Sleep(writeWait - time.Second)
						_, err = p.readFrame(time.Second)
					}
				})
				for synctest.Wait(); !p.pipe().far.isClosed(); synctest.Wait() {
					time.Sleep(time.Second)
				}
				if got, most := time.Since(start), writeWait+closeWait; got > most {
					t.Errorf("TCP was closed after %v, want at most %v", got, most)
				}
			})
		}
	}
}

// An idle client's goroutines keep stacks of 2 KiB each: see readPump.

func TestIdleClientKeepsTwoStacksOf2KiB(t *testing.T) {
	watch(t, patience)
	const n = 200
	r := tcpRoom(t)
	stacks := func() int {
		runtime.GC() // Shrinks stacks.
		runtime.GC()
		var stats runtime.MemStats
		runtime.ReadMemStats(&stats)
		return int(stats.StackInuse)
	}
	r.join(t).send("hello")
	before := stacks()
	for range n {
		conn := r.connect(t)
		t.Cleanup(func() { conn.Close() })
		fmt.Fprintf(conn, "%s\r\n", handshake)
		http.ReadResponse(bufio.NewReader(conn), nil)
	}
	most := 5 << 10
	if info, _ := debug.ReadBuildInfo(); slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"}) {
		most = 9 << 10 // The race detector's frames are larger.
	}
	if got := (stacks() - before) / n; got > most {
		t.Errorf("an idle client keeps %d bytes of stack, want at most %d", got, most)
	}
}

// Promise 1. Joined when Dial returns: a message sent by any client after another's
// handshake succeeded reaches that client. Only a valid handshake registers.

func TestInvalidHandshakeIsRefusedAndRegistersNothing(t *testing.T) {
	without := func(header string) string {
		return regexp.MustCompile(header+": .*\r\n").ReplaceAllString(handshake, "")
	}
	const badHandshake = "the client is not using the websocket protocol: "
	const badKey = "not a websocket handshake: 'Sec-WebSocket-Key' header must be Base64 encoded value of 16-byte in length"
	for _, test := range []struct {
		name, request string
		want          int
		log           string
	}{
		{"foreign origin", handshake + "Origin: http://example.com\r\n", http.StatusForbidden, "request origin not allowed by Upgrader.CheckOrigin"},
		{"plain GET", "GET /ws HTTP/1.1\r\nHost: pipe\r\n", http.StatusBadRequest, badHandshake + "'upgrade' token not found in 'Connection' header"},
		{"plain HEAD", "HEAD /ws HTTP/1.1\r\nHost: pipe\r\n", http.StatusBadRequest, badHandshake + "'upgrade' token not found in 'Connection' header"},
		{"another upgrade", strings.Replace(handshake, "websocket", "h2c", 1), http.StatusBadRequest, badHandshake + "'websocket' token not found in 'Upgrade' header"},
		{"POST", strings.Replace(handshake, "GET", "POST", 1), http.StatusMethodNotAllowed, badHandshake + "request method is not GET"},
		{"version 12", strings.Replace(handshake, "13", "12", 1), http.StatusBadRequest, "unsupported version: 13 not found in 'Sec-Websocket-Version' header"},
		{"no key", without("Sec-WebSocket-Key"), http.StatusBadRequest, badKey},
		{"short key", without("Sec-WebSocket-Key") + "Sec-WebSocket-Key: c2hvcnQ=\r\n", http.StatusBadRequest, badKey},
	} {
		runInRoom(t, test.name, func(t *testing.T, r *room) {
			front := *r.hub
			front.register = make(chan *Client) // A client that registers gets no response.
			r.serve = func(w http.ResponseWriter, req *http.Request) { serveWs(&front, w, req) }
			conn := r.connect(t)
			defer conn.Close()
			fmt.Fprintf(conn, "%s\r\n", test.request)
			conn.SetDeadline(time.Now().Add(patience))
			response, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil {
				t.Fatal(err)
			}
			if response.StatusCode != test.want {
				t.Errorf("got status %d, want %d", response.StatusCode, test.want)
			}
			origin := ""
			if _, header, found := strings.Cut(test.request, "Origin: "); found {
				origin = strings.TrimSpace(header)
			}
			r.wantLogged(t, fmt.Sprintf(`pipe: handshake refused: "websocket: %s" (Origin %q, Host "pipe")`, test.log, origin))
		})
	}
}

func TestPanicInCheckOriginLeavesNothingInTheHub(t *testing.T) {
	defer func(old websocket.Upgrader) { upgrader = old }(upgrader)
	upgrader.CheckOrigin = func(*http.Request) bool { panic("an application's mistake") }
	inRoom(t, func(t *testing.T, r *room) {
		if _, _, err := r.dialer(t).Dial(roomURL, nil); err == nil {
			t.Error("the handshake succeeded")
		}
		if got := len(r.clients()); got != 0 {
			t.Errorf("the hub has %d clients, want none", got)
		}
	}) // and the hub ends
}

func TestHandshakeResponseIsDelayedUntilTheClientIsRegistered(t *testing.T) {
	inRoom(t, func(t *testing.T, r *room) {
		front := *r.hub
		front.register = make(chan *Client)
		r.serve = func(w http.ResponseWriter, req *http.Request) { serveWs(&front, w, req) }
		const slow = 50 * time.Millisecond
		go func() {
			time.Sleep(slow)
			client := <-front.register
			if got := client.conn.RemoteAddr().String(); got != "pipe" {
				t.Errorf("run sees a client at %s, want pipe", got)
			}
			r.hub.register <- client
		}()
		start := time.Now()
		conn, _, err := r.dialer(t).Dial(roomURL, http.Header{"Origin": {"http://pipe"}}) // its own
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if got := time.Since(start); got != slow {
			t.Errorf("the handshake was answered after %v, want %v", got, slow)
		}
		synctest.Wait() // until it has registered with the hub that the test's end stops
	})
}

func TestClientIsRegisteredBeforeItsHandshakeSucceeds(t *testing.T) {
	inRoom(t, func(t *testing.T, r *room) {
		connect := r.connect
		r.connect = func(t testing.TB) net.Conn {
			conn := connect(t)
			// A message at the moment of the handshake response must reach the client.
			welcome := sync.OnceFunc(func() { r.hub.broadcast <- []byte("welcome") })
			conn.(*pipe).far.onWrite = func() error { welcome(); return nil }
			return conn
		}
		r.join(t).wantLines("welcome")
	})
}

func TestJoinedWhenDialReturnsOverTCP(t *testing.T) {
	watch(t, patience)
	r := tcpRoom(t)
	for n := 0; n < 300 && !t.Failed(); n++ {
		p, want := r.join(t), fmt.Sprint("line ", n)
		r.hub.broadcast <- []byte(want)
		p.wantLines(want)
		p.Close()
	}
}

func TestMiddlewareNeedsNoMoreThanUnwrap(t *testing.T) {
	inRoom(t, func(t *testing.T, r *room) {
		r.serve = func(w http.ResponseWriter, req *http.Request) { serveWs(r.hub, wrapped{w}, req) }
		p := r.join(t)
		p.send("hello")
		p.wantLines("hello")
	})
}

// wrapped is what a middleware's ResponseWriter may be: http.ResponseController
// looks through it.
type wrapped struct{ inner http.ResponseWriter }

func (w wrapped) Header() http.Header         { return w.inner.Header() }
func (w wrapped) Write(p []byte) (int, error) { return w.inner.Write(p) }
func (w wrapped) WriteHeader(status int)      { w.inner.WriteHeader(status) }
func (w wrapped) Unwrap() http.ResponseWriter { return w.inner }

func TestServerWithoutHijackRespondsWithAnError(t *testing.T) {
	book, rec := captureLog(t), httptest.NewRecorder()
	req, err := http.ReadRequest(bufio.NewReader(strings.NewReader(handshake + "\r\n")))
	if err != nil {
		t.Fatal(err)
	}
	serveWs(nil, rec, req) // It needs no hub.
	if want := list(`: handshake refused: "feature not supported" (Origin "", Host "pipe")`); rec.Code != http.StatusInternalServerError || !slices.Equal(book.lines(), want) {
		t.Errorf("got status %d and the log %q, want 500 and %q", rec.Code, book.lines(), want)
	}
}

// Promise 2. One order: every client sees the same messages in the same order.

func TestAllClientsReceiveTheSameMessagesInTheSameOrder(t *testing.T) {
	inRoom(t, func(t *testing.T, r *room) {
		const senders, each = 8, 50
		seen := make([][]string, senders)
		var peers []*peer
		for range senders {
			peers = append(peers, r.join(t))
		}
		var wg sync.WaitGroup
		for i, p := range peers {
			wg.Go(func() {
				for n := range each {
					p.send(fmt.Sprintf("%d: %02d", i, n))
				}
			})
			wg.Go(func() { seen[i] = p.lines(senders * each) })
		}
		wg.Wait()
		for i := range seen {
			if !slices.Equal(seen[i], seen[0]) {
				t.Errorf("client %d saw %s, client 0 saw %s", i, brief(seen[i]), brief(seen[0]))
			}
		}
		for i := range senders { // Each sender's lines come in its order, and none twice.
			own := slices.DeleteFunc(slices.Clone(seen[0]), func(line string) bool { return line[0] != byte('0'+i) })
			if len(own) != each || !slices.IsSorted(own) || len(slices.Compact(own)) != each {
				t.Errorf("of client %d came %s, want %d lines in order", i, brief(own), each)
			}
		}
	})
}

// Promise 3. A healthy client is never dropped because another one sends fast.
// The hub's backpressure is tested in hub_test.go.

func TestFloodDropsNoHealthyClient(t *testing.T) {
	inRoom(t, func(t *testing.T, r *room) {
		const floods, each = 8, 3 * rateBurst
		var wg sync.WaitGroup
		var peers []*peer
		for range 2 * floods {
			peers = append(peers, r.join(t).unbuffered())
		}
		for i, p := range peers {
			if i < floods {
				wg.Go(func() {
					for range each {
						p.send("and another thing")
					}
				})
			}
			wg.Go(func() {
				for n := 0; n < floods*each; {
					lines, err := p.read(patience)
					if err != nil {
						t.Errorf("client %d got %d lines and then %v, want %d", i, n, err, floods*each)
						return
					}
					n += len(lines)
					time.Sleep(backpressureDelay / 2) // as long as a batch takes
				}
			})
		}
		wg.Wait()
	})
}

func TestSenderIsRateLimitedAndNeverDropped(t *testing.T) {
	for name, sent := range map[string][]byte{
		"messages":       encode(0x81, "flood"),
		"blank messages": encode(0x81, ""),
		"pings":          encode(0x89, "flood"),
		"pongs":          encode(0x8a, "flood"),
	} {
		runInRoom(t, name, func(t *testing.T, r *room) {
			p := r.join(t).unbuffered()
			go io.Copy(io.Discard, p.NetConn())
			start := time.Now()
			for n := range 1000 {
				p.write(sent) // until readPump has read it
				synctest.Wait()
				// After the burst, the pump sleeps before it reads the next.
				want := rateInterval * time.Duration(max(0, n-rateBurst))
				if got := time.Since(start); got != want {
					t.Fatalf("frame %d was read after %v, want %v", n+1, got, want)
				}
				if n == rateBurst-1 {
					r.wantLogged(t)
				}
			}
			r.wantLogged(t, "pipe: rate limited to 100 messages a second")
		})
	}
}

func TestTokenBucketRefillsWhileIdle(t *testing.T) {
	inRoom(t, func(t *testing.T, r *room) {
		p := r.join(t).unbuffered()
		go io.Copy(io.Discard, p.NetConn())
		burst := func() time.Duration {
			start := time.Now()
			for range rateBurst {
				p.write(encode(0x81, "x"))
			}
			return time.Since(start)
		}
		for range 3 {
			if got := burst(); got != 0 {
				t.Errorf("a burst took %v, want no time", got)
			}
			time.Sleep(rateBurst * rateInterval)
		}
		burst()
		time.Sleep(rateBurst*rateInterval/2 + rateInterval/3)
		if got, want := burst(), rateBurst*rateInterval/2-rateInterval-rateInterval/3; got != want {
			t.Errorf("a burst after half the refill time took %v, want %v", got, want)
		}
	})
}

// Promise 4. A slow client costs the room only that bounded wait until its queue is
// full, and nothing after: in hub_test.go.

// Promise 5. Any message or control frame from a peer, not only a pong, shows that
// it is alive.

// A message, too, must be complete after pongWait.

func TestPeerTimesOutPongWaitAfterItsLastMessageOrControlFrame(t *testing.T) {
	type step struct {
		wait time.Duration
		sent []byte
	}
	const almost, quarter = pongWait - time.Nanosecond, pongWait / 4
	text, blank, ping, pong := encode(0x81, "x"), encode(0x81, ""), encode(0x89, ""), encode(0x8a, "")
	begin, more, end := encode(0x01, "x"), encode(0x00, "x"), encode(0x80, "x")
	for name, test := range map[string]struct {
		steps []step
		times int // that the last of these is done
		want  time.Duration
	}{
		"nothing":           {nil, 0, pongWait},
		"text":              {list(step{almost, text}), 5, 5*almost + pongWait},
		"blank text":        {list(step{almost, blank}), 5, 5*almost + pongWait},
		"text in two":       {list(step{almost, slices.Concat(begin, end)}), 5, 5*almost + pongWait},
		"pings":             {list(step{almost, ping}), 5, 5*almost + pongWait},
		"pongs":             {list(step{almost, pong}), 5, 5*almost + pongWait},
		"pings after text":  {list(step{almost, text}, step{almost, ping}), 5, 6*almost + pongWait},
		"pongs after text":  {list(step{almost, text}, step{almost, pong}), 5, 6*almost + pongWait},
		"pongs after blank": {list(step{almost, blank}, step{almost, pong}), 5, 6*almost + pongWait},
		"slow message":      {list(step{almost, begin}, step{time.Second, ping}, step{almost - time.Second, end}), 1, 2*almost + pongWait},
		"slowloris":         {list(step{quarter, begin}, step{time.Second, more}), 100, quarter + pongWait},
		"slowloris, empty":  {list(step{quarter, begin}, step{time.Second, encode(0x00, "")}), 100, quarter + pongWait},
		"slowloris, pings":  {list(step{quarter, begin}, step{time.Second, slices.Concat(ping, more)}), 100, quarter + pongWait},
		"slowloris, pongs":  {list(step{quarter, begin}, step{time.Second, slices.Concat(pong, more)}), 100, quarter + pongWait},
	} {
		runInRoom(t, name, func(t *testing.T, r *room) {
			p := r.join(t)
			p.SetPingHandler(func(string) error { return nil })
			start := time.Now()
			go func() {
				for i, step := range test.steps {
					for n := 0; n == 0 || i == len(test.steps)-1 && n < test.times; n++ {
						time.Sleep(step.wait)
						p.NetConn().Write(step.sent)
					}
				}
			}()
			p.wantCloseWithin(10*pongWait, errTimeout)
			if got := time.Since(start); got != test.want {
				t.Errorf("it was dropped after %v, want %v", got, test.want)
			}
			p.pipe().CloseWrite()
			time.Sleep(2 * pongWait) // until it has done all
		})
	}
}

func TestClientDelayedByTheHubDoesNotTimeOut(t *testing.T) {
	inRoom(t, func(t *testing.T, r *room) {
		front := *r.hub // It receives messages, and broadcasts none.
		front.broadcast = make(chan []byte)
		r.serve = func(w http.ResponseWriter, req *http.Request) { serveWs(&front, w, req) }
		p := r.join(t)
		go io.Copy(io.Discard, p.NetConn())
		for range 3 {
			p.send("hello")
			time.Sleep(2 * pongWait)
			<-front.broadcast
			time.Sleep(pongWait / 2)
			p.write(encode(0x8a, ""))
		}
		r.wantLogged(t)
		if len(r.clients()) != 1 {
			t.Error("the client was dropped")
		}
	})
}

// Promise 6. SIGINT or SIGTERM: no new connections, every client gets what is
// queued and 1001, as shown above. The process is further down.

func TestShutdownIsReadByAClientThatSendsBeforeItReads(t *testing.T) {
	inRoom(t, func(t *testing.T, r *room) {
		p := r.join(t)
		r.hub.stop()
		synctest.Wait()
		start := time.Now()
		for range 10 * rateBurst {
			p.write(encode(0x81, "sent after the reason, and ignored"))
			p.write(encode(0x89, ""))
			p.write(encode(0x8a, ""))
		}
		if got := time.Since(start); got != 0 {
			t.Errorf("the client is delayed by %v, want no rate limit", got)
		}
		p.wantClose(errShuttingDown)
	})
}

func TestRejectedPeerThatDoesNotReadIsClosedAfterWriteWait(t *testing.T) {
	for takes, want := range map[bool]time.Duration{true: 0, false: writeWait} {
		runInRoom(t, fmt.Sprintf("takes=%v", takes), func(t *testing.T, r *room) {
			last := join(r.hub, 0) // so that the hub goes on
			r.hub.stop()
			synctest.Wait()
			conn := r.connect(t).(*pipe)
			defer conn.Close()
			if !takes {
				conn.unbuffer()
			}
			start := time.Now()
			fmt.Fprintf(conn, "%s\r\n", handshake)
			for synctest.Wait(); !conn.far.isClosed() && time.Since(start) < 2*writeWait; synctest.Wait() {
				time.Sleep(time.Second)
			}
			if got := time.Since(start); got != want {
				t.Errorf("TCP was closed after %v, want %v", got, want)
			}
			r.hub.done <- last
		})
	}
}

func TestHandshakeDuringShutdownIsRejected(t *testing.T) {
	inRoom(t, func(t *testing.T, r *room) {
		last := join(r.hub, 0)
		r.hub.stop()
		synctest.Wait()
		for range 20 {
			_, response, err := r.dialer(t).Dial(roomURL, nil)
			if err == nil || response == nil || response.StatusCode != http.StatusServiceUnavailable {
				t.Fatalf("dial returned %v, %v; want status 503", response, err)
			}
			if body, _ := io.ReadAll(response.Body); string(body) != "server shutting down\n" {
				t.Errorf("the response is %q, want the reason in it", body)
			}
		}
		r.hub.done <- last
	})
}

// Promise 7. No goroutine outlives its client, and none the hub: run returns, and the
// pumps end, after shutdown. At the end of each bubble, synctest checks that all other
// goroutines have ended.

func TestHubEndsSoonHoweverItsClientEnds(t *testing.T) {
	for name, end := range map[string]func(*room, *peer){
		"the peer sends a close frame":                 func(_ *room, p *peer) { p.write(encodeClose(1000, "")) },
		"the peer vanishes":                            func(_ *room, p *peer) { p.Close() },
		"the peer answers no ping":                     func(_ *room, p *peer) { time.Sleep(pongWait) },
		"the peer breaks a rule":                       func(_ *room, p *peer) { p.write(encode(0x82, "")) },
		"the peer breaks a rule, goes on":              func(_ *room, p *peer) { p.write(encode(0x82, "")); p.write(much) },
		"the peer breaks the protocol":                 func(_ *room, p *peer) { p.write(encode(0x8f, "")) },
		"the peer does nothing":                        func(*room, *peer) {},
		"the peer takes nothing":                       func(r *room, p *peer) { p.unbuffered(); r.broadcast("this"); time.Sleep(writeWait) },
		"the application unregisters it":               func(r *room, _ *peer) { r.hub.unregister <- r.clients()[0] },
		"the application unregisters it, a minute ago": func(r *room, _ *peer) { r.hub.unregister <- r.clients()[0]; time.Sleep(pongWait) },
	} {
		runInRoom(t, name, func(t *testing.T, r *room) {
			p := r.join(t)
			p.pipe().far.onClose = func() {
				synctest.Wait()
				select {
				case <-r.ended:
					t.Error("the hub has ended before its client's connection has")
				default:
				}
			}
			if name != "the peer takes nothing" {
				go io.Copy(io.Discard, p.NetConn()) // It reads, but answers nothing.
			}
			end(r, p)
			start := time.Now()
			r.hub.stop()
			r.wantEnd(t)
			if got := time.Since(start); got > closeWait {
				t.Errorf("the hub ended %v after it was stopped, want at most %v", got, closeWait)
			}
		})
	}
}

func TestServeWsReturnsAfterTheHandshake(t *testing.T) {
	inRoom(t, func(t *testing.T, r *room) {
		returned := make(chan bool)
		r.serve = func(w http.ResponseWriter, req *http.Request) { serveWs(r.hub, w, req); close(returned) }
		r.join(t)
		wait(t, returned, "serveWs")
	})
}

// run and serve. The process is in hub_test.go.

func TestServerLogsAURLThatCanBeOpened(t *testing.T) {
	watch(t, patience)
	for addr, want := range map[string]string{
		":0":          `localhost:[1-9]\d*/ \(all interfaces\)`,
		"0.0.0.0:0":   `localhost:[1-9]\d*/ \(all interfaces\)`,
		"127.0.0.1:0": `127.0.0.1:[1-9]\d*/`,
	} {
		book := captureLog(t)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := run(ctx, addr); err != nil {
			t.Fatal(err)
		}
		if got := book.lines(); len(got) > 2 {
			t.Fatalf("the log is %q, although no client was connected", got)
		}
		if got := book.lines()[0]; !regexp.MustCompile(`^listening on http://` + want + `$`).MatchString(got) {
			t.Errorf("on %s the log is %q, want %s there", addr, got, want)
		}
	}
}

func TestServeReturnsTheListenersError(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		r, listener, _, result := startServe(t)
		p := r.join(t)
		listener.Close()
		p.wantClose(errShuttingDown)
		if err := wait(t, result, "serve"); !errors.Is(err, net.ErrClosed) {
			t.Errorf("serve returned %v, want %v", err, net.ErrClosed)
		}
	})
}

func TestServeReturnsAtOnceIfAllClientsDisconnect(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		r, _, cancel, result := startServe(t)
		for range 10 {
			p := r.join(t)
			go p.wantClose(errShuttingDown)
		}
		idle := r.connect(t) // as browsers keep one ready
		defer idle.Close()
		synctest.Wait()
		start := time.Now()
		cancel()
		if err := wait(t, result, "serve"); err != nil {
			t.Errorf("serve returned %v, want nil", err)
		}
		if _, err := idle.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("reading from the server gives %v, want %v", err, io.EOF)
		}
		if got := time.Since(start); got != 0 {
			t.Errorf("serve returned after %v, want at once", got)
		}
		r.wantLogged(t, "shutting down")
	})
}

func TestServeReturnsAfterShutdownWaitDespiteASlowClient(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		r, _, cancel, result := startServe(t)
		slow, p := r.join(t).unbuffered(), r.join(t)
		p.send("the slow client does not read this")
		synctest.Wait()
		start := time.Now()
		cancel()
		p.wantClose(errShuttingDown)
		if err := wait(t, result, "serve"); err != nil {
			t.Errorf("serve returned %v, want nil", err)
		}
		if got := time.Since(start); got != shutdownWait {
			t.Errorf("serve returned after %v, want %v", got, shutdownWait)
		}
		r.wantLogged(t, "shutting down", "exiting: some clients are still connected after 8s")
		slow.Close()
	})
}

func TestServeClosesASlowHTTPConnection(t *testing.T) {
	const page = "GET / HTTP/1.1\r\nHost: pipe\r\n\r\n"
	for _, test := range []struct {
		name, sent string
		drip       string // sent each second after that
		reads      bool
		after      time.Duration
	}{
		{"nothing sent", "", "", true, httpTimeout},
		{"header that never ends", "GET / HTTP/1.1\r\nX: ", "x", true, httpTimeout},
		{"body that never ends", "POST /ws HTTP/1.1\r\nHost: pipe\r\nContent-Length: 1000\r\n\r\n", "x", true, httpTimeout},
		{"page that the peer does not read", page, "", false, httpTimeout},
		{"no second request", page, "", true, idleTimeout},
	} {
		t.Run(test.name, func(t *testing.T) {
			inBubble(t, func(t *testing.T) {
				r, _, _, _ := startServe(t)
				conn := r.connect(t).(*pipe)
				var dripping sync.WaitGroup
				defer dripping.Wait()
				defer conn.Close()
				conn.unbuffer()
				dripping.Go(func() {
					for _, err := io.WriteString(conn, test.sent); err == nil && test.drip != ""; _, err = io.WriteString(conn, test.drip) {
						time.Sleep(time.Second)
					}
				})
				if test.reads {
					go io.Copy(io.Discard, conn)
				}
				time.Sleep(test.after - 1)
				if synctest.Wait(); conn.far.isClosed() {
					t.Errorf("the connection is closed before %v have passed", test.after)
				}
				time.Sleep(time.Second)
				if synctest.Wait(); !conn.far.isClosed() {
					t.Errorf("the connection is still open after %v", test.after)
				}
			})
		})
	}
}

func TestServeLimitsTheRequestHeader(t *testing.T) {
	for _, header := range []string{
		"GET /?" + strings.Repeat("x", 900_000) + " HTTP/1.1\r\nHost: pipe\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: pipe\r\nCookie: " + strings.Repeat("x", 900_000) + "\r\n\r\n",
	} {
		inBubble(t, func(t *testing.T) {
			r, _, _, _ := startServe(t)
			conn := r.connect(t)
			defer conn.Close()
			go io.WriteString(conn, header)
			response, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil || response.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
				t.Errorf("got %v, %v, want status 431", response, err)
			}
			r.wantLogged(t)
			time.Sleep(time.Second) // net/http takes half of it to close a connection like this.
		})
	}
}

// Promise 10. Nothing in the shutdown waits for the log.

// A blockedLog blocks each write until it is closed.
type blockedLog chan struct{}

func (l blockedLog) Write(p []byte) (int, error) { <-l; return len(p), nil }

func TestHubEndsAlthoughTheLogBlocks(t *testing.T) {
	inRoom(t, func(t *testing.T, r *room) {
		blocked := make(blockedLog)
		defer close(blocked)
		log.SetOutput(blocked)
		p, other := r.join(t), r.join(t)
		p.Close() // which is logged
		synctest.Wait()
		r.hub.stop()
		other.wantClose(errShuttingDown)
		start := time.Now()
		r.wantEnd(t)
		if got := time.Since(start); got != 0 {
			t.Errorf("the hub waits %v for the log", got)
		}
	})
}

func TestRateLimitedClientDoesNotWaitForTheLog(t *testing.T) {
	inRoom(t, func(t *testing.T, r *room) {
		blocked := make(blockedLog)
		defer close(blocked)
		log.SetOutput(blocked)
		p := r.join(t)
		for n := range 2 * rateBurst {
			p.send(fmt.Sprint("line ", n))
		}
		p.lines(2 * rateBurst)
	})
}

func TestServeReturnsAlthoughTheLogBlocks(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		r, _, cancel, result := startServe(t)
		blocked := make(blockedLog)
		defer close(blocked)
		log.SetOutput(blocked)
		p := r.join(t)
		start := time.Now()
		cancel()
		p.wantClose(errShuttingDown)
		if got := time.Since(start); got != 0 {
			t.Errorf("the clients wait %v for the log", got)
		}
		wait(t, result, "serve")
		if got := time.Since(start); got != logWait {
			t.Errorf("serve returned after %v, want %v", got, logWait)
		}
	})
}

// The page.

func TestHomePage(t *testing.T) {
	const html, plain = "text/html; charset=utf-8", "text/plain; charset=utf-8"
	defer func(old string) { home = old }(home)
	home = "a page whose content does not look like HTML"
	for _, test := range []struct {
		method, path string
		status       int
		contentType  string
		body         string
		allow        string
	}{
		{"GET", "/", http.StatusOK, html, home, ""},
		{"HEAD", "/", http.StatusOK, html, home, ""},
		{"GET", "/?\u009b31m%0a%1b", http.StatusOK, html, home, ""},
		{"GET", "/favicon.ico", http.StatusNotFound, plain, "404 page not found\n", ""},
		{"GET", "/index.html", http.StatusNotFound, plain, "404 page not found\n", ""},
		{"POST", "/index.html", http.StatusNotFound, plain, "404 page not found\n", ""},
		{"POST", "/", http.StatusMethodNotAllowed, plain, "method not allowed\n", "GET, HEAD"},
		{"DELETE", "/", http.StatusMethodNotAllowed, plain, "method not allowed\n", "GET, HEAD"},
	} {
		t.Run(test.method+" "+test.path, func(t *testing.T) {
			book := captureLog(t)
			rec := httptest.NewRecorder()
			serveHome(rec, httptest.NewRequest(test.method, test.path, nil))
			if rec.Code != test.status {
				t.Errorf("got status %d, want %d", rec.Code, test.status)
			}
			if got := rec.Body.String(); got != test.body {
				t.Errorf("got %s, want %q", brief(got), test.body)
			}
			for name, want := range map[string]string{
				"Content-Type": test.contentType, "Allow": test.allow, "X-Content-Type-Options": "nosniff",
			} {
				if got := rec.Result().Header.Get(name); got != want {
					t.Errorf("got %s %q, want %q", name, got, want)
				}
			}
			if got, want := book.lines(), list(fmt.Sprintf("192.0.2.1:1234: %s %q", test.method, test.path)); !slices.Equal(got, want) {
				t.Errorf("the log is %q, want %q", got, want)
			}
		})
	}
}

func TestContentSecurityPolicyAllowsThePageItsOwnScriptAndStyleAlone(t *testing.T) {
	rec := httptest.NewRecorder()
	serveHome(rec, httptest.NewRequest("GET", "/", nil))
	hash := func(element string) string {
		found := regexp.MustCompile("(?s)<"+element+"\\b[^>]*>(.*?)</"+element+">").FindAllStringSubmatch(rec.Body.String(), -1)
		if len(found) != 1 {
			t.Fatalf("the page has %d elements %s, want 1", len(found), element)
		}
		// Browsers normalize line endings before hashing.
		sum := sha256.Sum256([]byte(strings.ReplaceAll(found[0][1], "\r\n", "\n")))
		return base64.StdEncoding.EncodeToString(sum[:])
	}
	want := "default-src 'none'; script-src 'sha256-" + hash("script") + "'; style-src 'sha256-" + hash("style") +
		"'; img-src data:; connect-src 'self' ws: wss:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
	if got := rec.Result().Header.Get("Content-Security-Policy"); got != want {
		t.Errorf("the policy is\n%s, want\n%s", got, want)
	}
}

func TestCSPHashesIgnoreCRLF(t *testing.T) {
	defer func(old string) { home = old }(home)
	for _, element := range []string{"script", "style"} {
		home = strings.ReplaceAll(home, "\r\n", "\n")
		want := hashSource(element)
		home = strings.ReplaceAll(home, "\n", "\r\n")
		if got := hashSource(element); got != want || !strings.Contains(contentSecurityPolicy, want) {
			t.Errorf("with CRLF the hash of %s is %s, want %s", element, got, want)
		}
	}
}

func TestThePageKnowsTheServersFigures(t *testing.T) {
	ms := pingPeriod.Milliseconds()
	for _, want := range []string{
		fmt.Sprintf("const pingPeriod = %d_%03d;", ms/1000, ms%1000),
		fmt.Sprintf("const maxMessageSize = %d;", maxMessageSize),
	} {
		if !strings.Contains(home, want) {
			t.Errorf("home.html does not contain %q", want)
		}
	}
	if got := len(regexp.MustCompile(fmt.Sprintf(`\b%d\b`, maxMessageSize)).FindAllString(home, -1)); got != 1 {
		t.Errorf("home.html states the limit %d times, want once", got)
	}
}

// Helpers.

// patience is how long a test waits for an expected event, and how long it may take in
// real time. It only bounds failing tests.
const patience = 20 * time.Second

// watch ends the whole test run if t takes longer than limit, as what makes one test hang
// may make many hang. It prints where each goroutine of this package waits. In a bubble,
// limit is in the bubble's time.
func watch(t testing.TB, limit time.Duration) {
	tooLong := time.AfterFunc(limit, func() {
		lines := regexp.MustCompile(`\[.+\]:|\b(main|hub|client)(_test)?\.go:\d+`)
		var waits []string
		for _, goroutine := range goroutines() {
			if at := lines.FindAllString(goroutine, -1); len(at) > 1 {
				waits = append(waits, strings.Join(at, " "))
			}
		}
		slices.Sort(waits)
		panic(fmt.Sprintf("%s has not ended within %v. Its goroutines:\n%s",
			t.Name(), limit, strings.Join(slices.Compact(waits), "\n")))
	})
	t.Cleanup(func() { tooLong.Stop() })
}

// goroutines returns the stack of each goroutine.
func goroutines() []string {
	stacks := make([]byte, 16<<20)
	return strings.Split(string(stacks[:runtime.Stack(stacks, true)]), "\n\n")
}

// inBubble runs test in a synctest bubble, where time passes only while all goroutines
// wait. A test that takes an hour of bubble time hangs: only its tickers go on.
func inBubble(t *testing.T, test func(*testing.T)) {
	watch(t, patience)
	synctest.Test(t, func(t *testing.T) {
		watch(t, time.Hour)
		test(t)
	})
}

// inRoom runs test in a bubble with a room.
func inRoom(t *testing.T, test func(*testing.T, *room)) {
	inBubble(t, func(t *testing.T) { test(t, pipeRoom(t)) })
}

// runInRoom runs test in a room as a subtest.
func runInRoom(t *testing.T, name string, test func(*testing.T, *room)) {
	t.Run(name, func(t *testing.T) { inRoom(t, test) })
}

// A room is a running server and the way to connect to it.
type room struct {
	hub     *Hub
	ended   chan struct{}    // closed when hub.run has returned
	serve   http.HandlerFunc // for /ws
	connect func(testing.TB) net.Conn
	log     *logBook
}

// roomURL is where a room's WebSocket endpoint is, for its clients.
const roomURL = "ws://pipe/ws"

// handshake is the header of a handshake request, without the final empty line.
const handshake = "GET /ws HTTP/1.1\r\nHost: pipe\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n" +
	"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"

// tcpRoom starts a server on a loopback port.
func tcpRoom(t testing.TB) *room {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// A pump may log after run has returned: wait, or it would write to the next test's log.
		for slices.ContainsFunc(goroutines(), func(stack string) bool { return strings.Contains(stack, ".(*Client).") }) {
			runtime.Gosched()
		}
	})
	r := newRoom(t, listener)
	r.connect = func(t testing.TB) net.Conn {
		t.Helper()
		conn, err := net.Dial("tcp", listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		return conn
	}
	return r
}

// pipeRoom starts a server whose connections are pipes.
func pipeRoom(t testing.TB) *room {
	t.Helper()
	listener := newPipeListener()
	r := newRoom(t, listener)
	r.connect = listener.connect
	return r
}

// newRoom starts a hub and, on listener, its server. The test's end stops both, and fails
// if run does not return.
func newRoom(t testing.TB, listener net.Listener) *room {
	t.Helper()
	r := &room{hub: newHub(), ended: make(chan struct{}), log: captureLog(t)}
	r.serve = func(w http.ResponseWriter, req *http.Request) { serveWs(r.hub, w, req) }
	mux := http.NewServeMux()
	mux.HandleFunc("/", serveHome)
	mux.HandleFunc("/ws", func(w http.ResponseWriter, req *http.Request) { r.serve(w, req) })
	server := &httptest.Server{Listener: listener, Config: &http.Server{Handler: mux}}
	server.Start()
	go func() {
		r.hub.run()
		select {
		case <-r.hub.stopped:
		default:
			t.Error("hub.run has returned, although the hub has not been stopped")
			r.hub.stop() // or every client would wait for it
		}
		close(r.ended)
	}()
	t.Cleanup(func() {
		r.hub.stop()
		r.wantEnd(t)
		server.Close()
	})
	return r
}

// startServe calls serve, until the test ends. It returns a room without a hub, its
// listener, a function that ends serve, and serve's result.
func startServe(t *testing.T) (r *room, listener net.Listener, cancel func(), result chan error) {
	t.Helper()
	pipes := newPipeListener()
	ctx, cancel := context.WithCancel(t.Context())
	result = make(chan error, 1)
	ended := make(chan struct{})
	r = &room{connect: pipes.connect, log: captureLog(t)}
	go func() { result <- serve(ctx, pipes); close(ended) }()
	t.Cleanup(func() { cancel(); wait(t, ended, "serve") })
	return r, pipes, cancel, result
}

// wait receives from c, which signals that what has ended.
func wait[T any](t testing.TB, c chan T, what string) (result T) {
	t.Helper()
	select {
	case result = <-c:
	case <-time.After(patience):
		t.Errorf("%s has not ended within %v", what, patience)
	}
	return result
}

// wantEnd waits until the hub, which has been stopped, has ended. Then the pumps
// of all clients have ended, too: the hub waits until each readPump is done, and
// readPump waits for writePump.
func (r *room) wantEnd(t testing.TB) {
	t.Helper()
	wait(t, r.ended, "hub.run")
}

// wantLogged waits until the bubble is idle, and checks that the log is want.
func (r *room) wantLogged(t testing.TB, want ...string) {
	t.Helper()
	synctest.Wait()
	if got := r.log.lines(); !slices.Equal(got, want) {
		t.Errorf("the log is %s, want %s", brief(got), brief(want))
	}
}

// broadcast broadcasts lines, one after the other, and waits until the bubble is idle.
func (r *room) broadcast(lines ...string) {
	for _, line := range lines {
		r.hub.broadcast <- []byte(line)
		synctest.Wait()
	}
}

// clients waits until the bubble is idle, and returns the hub's clients.
func (r *room) clients() (clients []*Client) {
	synctest.Wait()
	r.hub.do(func() { clients = slices.Collect(maps.Keys(r.hub.clients)) })
	return clients
}

// dialer returns a dialer that connects to the room. It offers compression, which the
// server must not accept: each connection would keep a window for it.
func (r *room) dialer(t testing.TB) *websocket.Dialer {
	return &websocket.Dialer{
		EnableCompression: true,
		HandshakeTimeout:  patience,
		NetDialContext:    func(context.Context, string, string) (net.Conn, error) { return r.connect(t), nil },
	}
}

// join connects a client, until the test ends.
func (r *room) join(t testing.TB, subprotocols ...string) *peer {
	t.Helper()
	dialer := r.dialer(t)
	dialer.Subprotocols = subprotocols
	conn, _, err := dialer.Dial(roomURL, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return &peer{conn, t}
}

// A peer is the client's side of a connection. Any goroutine may call its methods: they
// report errors, and go on.
type peer struct {
	*websocket.Conn
	t testing.TB
}

// pipe returns the connection that it has in a room of pipes.
func (p *peer) pipe() *pipe { return p.NetConn().(*pipe) }

// unbuffered has its pipe hold nothing from now on, so that a peer that does not read
// blocks the writer.
func (p *peer) unbuffered() *peer {
	p.pipe().unbuffer()
	return p
}

// send sends a text message.
func (p *peer) send(text string) {
	p.t.Helper()
	p.SetWriteDeadline(time.Now().Add(patience))
	if err := p.WriteMessage(websocket.TextMessage, []byte(text)); err != nil {
		p.t.Errorf("saying %s failed with %v", brief(text), err)
	}
}

// write sends bytes as they are.
func (p *peer) write(sent []byte) {
	p.t.Helper()
	p.NetConn().SetWriteDeadline(time.Now().Add(patience))
	if _, err := p.NetConn().Write(sent); err != nil {
		p.t.Errorf("sending %s failed with %v", brief(sent), err)
	}
}

// read reads one WebSocket message: the lines in it.
func (p *peer) read(within time.Duration) ([]string, error) {
	p.SetReadDeadline(time.Now().Add(within))
	_, message, err := p.ReadMessage()
	if err != nil {
		return nil, err
	}
	return strings.Split(string(message), "\n"), nil
}

// lines reads n lines of chat.
func (p *peer) lines(n int) (lines []string) {
	p.t.Helper()
	for len(lines) < n {
		more, err := p.read(patience)
		if err != nil {
			p.t.Errorf("got %s and then %v, want %d lines", brief(lines), err, n)
			break
		}
		lines = append(lines, more...)
	}
	return lines
}

func (p *peer) wantLines(want ...string) {
	p.t.Helper()
	if got := p.lines(len(want)); !slices.Equal(got, want) {
		p.t.Errorf("got %s, want %s", brief(got), brief(want))
	}
}

// wantClose reads until the connection ends, which must be with want. It
// returns the lines that came before.
func (p *peer) wantClose(want *websocket.CloseError) (lines []string) {
	p.t.Helper()
	return p.wantCloseWithin(patience, want)
}

func (p *peer) wantCloseWithin(within time.Duration, want *websocket.CloseError) (lines []string) {
	p.t.Helper()
	for end := time.Now().Add(within); ; {
		more, err := p.read(time.Until(end))
		if err == nil {
			lines = append(lines, more...)
			continue
		}
		var got *websocket.CloseError
		if !errors.As(err, &got) || *got != *want {
			p.t.Errorf("after %d lines the connection ended with %v, want %v", len(lines), err, want)
		}
		return lines
	}
}

// wantEnd checks that the server has closed TCP, and has not reset it.
func (p *peer) wantEnd() { p.t.Helper(); p.wantEndOf(true) }

// wantHalfEnd checks that the server has closed its side of TCP alone.
func (p *peer) wantHalfEnd() { p.t.Helper(); p.wantEndOf(false) }

func (p *peer) wantEndOf(both bool) {
	p.t.Helper()
	p.NetConn().SetReadDeadline(time.Now().Add(patience))
	n, err := p.NetConn().Read(make([]byte, 1))
	if got := p.pipe().far.isClosed(); n != 0 || err != io.EOF || got != both {
		p.t.Errorf("after the close frame came %d bytes and %v, and the server had closed TCP: %v; want %v and %v", n, err, got, io.EOF, both)
	}
}

// A frame is one from the server. RFC 6455 section 5.2.
type frame struct {
	first   byte // FIN and opcode
	payload []byte
}

// String returns what is in a whole frame, such as: text "hello".
func (f frame) String() string {
	kind := map[byte]string{0x81: "text", 0x88: "close", 0x89: "ping", 0x8a: "pong"}[f.first]
	switch {
	case kind == "":
		return fmt.Sprintf("%#x %q", f.first, f.payload)
	case kind == "close" && len(f.payload) == 0:
		return kind
	case kind == "close":
		return fmt.Sprintf("close %d %q", binary.BigEndian.Uint16(f.payload), f.payload[2:])
	}
	return fmt.Sprintf("%s %q", kind, f.payload)
}

// readFrame reads one frame, answering nothing.
func (p *peer) readFrame(within time.Duration) (f frame, err error) {
	p.NetConn().SetReadDeadline(time.Now().Add(within))
	header := make([]byte, 10)
	if _, err := io.ReadFull(p.NetConn(), header[:2]); err != nil {
		return f, err
	}
	size := uint64(header[1])
	switch size {
	case 126:
		_, err = io.ReadFull(p.NetConn(), header[8:])
		size = uint64(binary.BigEndian.Uint16(header[8:]))
	case 127:
		_, err = io.ReadFull(p.NetConn(), header[2:])
		size = binary.BigEndian.Uint64(header[2:])
	}
	if err != nil {
		return f, err
	}
	f = frame{header[0], make([]byte, size)}
	_, err = io.ReadFull(p.NetConn(), f.payload)
	return f, err
}

// encode returns a masked frame, as clients send them. The key is zero, so that
// the payload stands there as it is.
func encode(first byte, payload string) []byte {
	header := []byte{first, 0x80 | byte(min(len(payload), 126))}
	switch {
	case len(payload) > 0xffff:
		header[1] = 0xff
		header = binary.BigEndian.AppendUint64(header, uint64(len(payload)))
	case len(payload) > 125:
		header = binary.BigEndian.AppendUint16(header, uint16(len(payload)))
	}
	return slices.Concat(header, make([]byte, 4), []byte(payload))
}

// encodeClose returns a masked close frame.
func encodeClose(code int, text string) []byte {
	return encode(0x88, string(binary.BigEndian.AppendUint16(nil, uint16(code)))+text)
}

func list[T any](items ...T) []T { return items }

// brief quotes v, and cuts it where a log has enough.
func brief(v any) string {
	s := fmt.Sprintf("%q", v)
	if len(s) > 400 {
		s = fmt.Sprintf("%s… (%d bytes)", s[:400], len(s))
	}
	return s
}

// A pipe is one end of a connection in memory. It does what TCP does, at its
// worst: it buffers; it can be closed one way; and an end that closes it with input
// unread, or writes when the other end is closed, resets it, which destroys what
// the other end has not read.
type pipe struct {
	*wire
	far             *pipe        // the other end
	onWrite         func() error // called before each write, which fails if this does
	onClose         func()       // called before it is closed
	unread          []byte       // what has come from far
	window          int          // with more than this unread, far waits when it writes
	ended           bool         // nothing comes from far any more
	closed          bool
	readBy, writeBy time.Time
}

// A wire is what both ends of a connection share.
type wire struct {
	sync.Mutex
	changed *sync.Cond
	reset   bool
}

var errReset = &net.OpError{Op: "read", Net: "pipe", Err: errors.New("connection reset by peer")}

func newPipes() (a, b *pipe) {
	w := new(wire)
	w.changed = sync.NewCond(w)
	a, b = &pipe{wire: w, window: 64 << 10}, &pipe{wire: w, window: 64 << 10}
	a.far, b.far = b, a
	return a, b
}

// do changes something about the connection.
func (p *pipe) do(change func()) {
	p.Lock()
	defer p.Unlock()
	change()
	p.changed.Broadcast()
}

// await waits until done, or returns why it never will be. It is called locked.
func (p *pipe) await(by *time.Time, done func() bool) error {
	for {
		switch {
		case p.closed:
			return net.ErrClosed
		case p.reset:
			return errReset
		case !by.IsZero() && !time.Now().Before(*by):
			return os.ErrDeadlineExceeded
		case done():
			return nil
		}
		p.changed.Wait()
	}
}

func (p *pipe) Read(b []byte) (n int, err error) {
	p.do(func() {
		if err = p.await(&p.readBy, func() bool { return len(p.unread) > 0 || p.ended }); err != nil {
			return
		}
		if n = copy(b, p.unread); n == 0 && len(b) > 0 {
			err = io.EOF
		}
		p.unread = p.unread[n:]
	})
	return n, err
}

func (p *pipe) Write(b []byte) (n int, err error) {
	if p.onWrite != nil {
		if err := p.onWrite(); err != nil {
			return 0, err
		}
	}
	p.do(func() {
		if err = p.await(&p.writeBy, func() bool { return true }); err != nil {
			return
		}
		n = len(b)
		if p.far.ended {
			n, err = 0, net.ErrClosed
		} else if p.far.closed {
			p.reset = true
		} else {
			p.far.unread = append(p.far.unread, b...)
			p.changed.Broadcast()
			err = p.await(&p.writeBy, func() bool { return len(p.far.unread) <= p.far.window })
		}
	})
	return n, err
}

func (p *pipe) Close() error {
	if p.onClose != nil {
		p.onClose()
	}
	p.do(func() {
		p.reset = p.reset || !p.closed && len(p.unread) > 0
		p.closed, p.far.ended = true, true
	})
	return nil
}

func (p *pipe) CloseWrite() error { p.do(func() { p.far.ended = true }); return nil }
func (p *pipe) unbuffer()         { p.do(func() { p.window, p.far.window = 0, 0 }) }

func (p *pipe) isClosed() (closed bool) { p.do(func() { closed = p.closed }); return closed }

func (p *pipe) SetDeadline(t time.Time) error {
	p.SetReadDeadline(t)
	return p.SetWriteDeadline(t)
}
func (p *pipe) SetReadDeadline(t time.Time) error  { return p.setDeadline(&p.readBy, t) }
func (p *pipe) SetWriteDeadline(t time.Time) error { return p.setDeadline(&p.writeBy, t) }
func (p *pipe) setDeadline(by *time.Time, t time.Time) error {
	p.do(func() { *by = t })
	if !t.IsZero() {
		time.AfterFunc(time.Until(t), func() { p.do(func() {}) })
	}
	return nil
}

func (p *pipe) LocalAddr() net.Addr  { return pipeAddr("this end") }
func (p *pipe) RemoteAddr() net.Addr { return pipeAddr("pipe") }

// A pipeListener accepts pipes.
type pipeListener struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func newPipeListener() *pipeListener {
	return &pipeListener{conns: make(chan net.Conn), closed: make(chan struct{})}
}

func (l *pipeListener) connect(t testing.TB) net.Conn {
	t.Helper()
	client, server := newPipes()
	select {
	case l.conns <- server:
	case <-l.closed:
		t.Error("the server does not listen")
	}
	return client
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case conn := <-l.conns:
		return conn, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Close() error   { l.once.Do(func() { close(l.closed) }); return nil }
func (l *pipeListener) Addr() net.Addr { return pipeAddr("listener") }

type pipeAddr string

func (pipeAddr) Network() string  { return "pipe" }
func (a pipeAddr) String() string { return string(a) }

// Fuzzing: whatever a client sends, the others see clean lines alone.

func FuzzMessage(f *testing.F) {
	f.Add(true, []byte("hello"))
	f.Add(false, []byte("hello"))
	f.Add(true, []byte(" \x00\u0085\u00a0\n\xff"))
	f.Add(true, bytes.Repeat([]byte("x"), maxMessageSize+1))
	r := tcpRoom(f)
	other := r.join(f)
	f.Fuzz(func(t *testing.T, text bool, message []byte) {
		first := byte(0x82)
		if text {
			first = 0x81
		}
		r.fuzz(t, other, append(encode(first, string(message)), encode(0x88, "")...))
	})
}

func FuzzBytes(f *testing.F) {
	f.Add(encode(0x81, "hello"))
	f.Add(append(encode(0x01, "hel"), encode(0x80, "lo")...))
	f.Add(append(encode(0x89, "ping"), encode(0x88, "\x03\xe8bye")...))
	f.Add([]byte{0x81, 0xff, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0})
	r := tcpRoom(f)
	other := r.join(f)
	f.Fuzz(func(t *testing.T, sent []byte) { r.fuzz(t, other, sent) })
}

// fuzz has a client send bytes, and checks what other sees of it.
func (r *room) fuzz(t *testing.T, other *peer, sent []byte) {
	t.Helper()
	watch(t, patience)
	p := r.join(t)
	p.write(sent)
	p.NetConn().(*net.TCPConn).CloseWrite()
	for err := error(nil); err == nil; {
		_, err = p.read(patience)
	}
	// The end is longer than any client's message.
	end := strings.Repeat("end", maxMessageSize)
	r.hub.broadcast <- []byte(end)
	for {
		lines, err := other.read(patience)
		if err != nil {
			other.Close() // so that what follows fails at once
			t.Fatalf("the other one's connection ended with %v", err)
		}
		for _, line := range lines {
			if line == end {
				return
			}
			if !utf8.ValidString(line) || line == "" || line != strings.TrimSpace(line) ||
				len(line) > maxMessageSize || strings.ContainsFunc(line, unicode.IsControl) {
				t.Errorf("the other one sees %q", line)
			}
		}
	}
}
