package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"reflect"
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

	"github.com/gorilla/websocket"
)

// The tests are in two files, in this order. Here: the index of the promises, the wire,
// how a client ends, the promises about clients, the helpers, fuzzing. In hub_test.go:
// the hub, its shutdown, what applications do, do and tell, serving, the log, the page,
// the process, the benchmarks.

// index lists the promises and the tests of each, in both files. It is code so that the
// compiler knows its names.
var index = []struct {
	promise string
	tests   []func(*testing.T)
}{
	{"1. Joined when Dial returns, and only after a valid handshake", list(
		TestInvalidHandshakeIsRefusedAndRegistersNothing,
		TestPanicInCheckOriginLeavesNothingInTheHub,
		TestHandshakeResponseIsDelayedUntilTheClientIsRegistered,
		TestClientIsRegisteredBeforeItsHandshakeSucceeds,
		TestJoinedWhenDialReturnsOverTCP,
		TestRunMayWriteToConnWhenItRegistersAClient,
		TestMiddlewareNeedsNoMoreThanUnwrap,
		TestServerWithoutHijackRespondsWithAnError,
		TestServeWsReturnsAfterTheHandshake,
	)},
	{"2. One order for all clients", list(
		TestAllClientsReceiveTheSameMessagesInTheSameOrder,
		TestEveryClientGetsEachBroadcastAsItsOwnItem,
		TestBatchesDoNotChangeTheMessagesThatClientsShare,
	)},
	{"3. A healthy client is never dropped because another one sends fast", list(
		TestFloodDropsNoHealthyClient,
		TestSenderIsRateLimitedAndNeverDropped,
		TestTokenBucketRefillsWhileIdle,
		TestHubAppliesBackpressureOnlyWhenAQueueIsPastHalf,
	)},
	{"4. A slow client costs the others a bounded wait, and then nothing", list(
		TestSlowClientCostsTheOthersNothingOnceItIsDropped,
		TestFullQueueDropsItsClientAlone,
		TestClientThatNeverReadsIsClosed,
		TestNothingWaitsForAClientAfterAFailedWrite,
		TestPeerThatDoesNotTakeTheHandshakeIsDroppedAfterWriteWait,
	)},
	{"5. Any message or control frame shows that a peer is alive", list(
		TestPeerTimesOutPongWaitAfterItsLastMessageOrControlFrame,
		TestClientDelayedByTheHubDoesNotTimeOut,
		TestPingsGoOutBetweenFramesOfABacklog,
		TestPongWaitsForAStalledPeer,
		TestHeartbeatClientGetsAnEmptyMessageWithEachPing,
		TestClientAsksForTheHeartbeatByItsURL,
	)},
	{"6. Graceful shutdown, forced exit, and a port in use", list(
		TestSignalShutsDownGracefullyWithStatus0,
		TestSecondSignalEndsTheProcessOneSecondAfterTheFirst,
		TestTwoSignalsAtOnceAreOne,
		TestHangupIsIgnoredIfItWasAtTheStart,
		TestProcessThatCannotListenExitsWithOneLine,
		TestServeReturnsAtOnceIfAllClientsDisconnect,
		TestServeReturnsAfterShutdownWaitDespiteASlowClient,
		TestServeReturnsTheListenersError,
		TestStoppedHubDropsAllClientsAndWaitsForThem,
		TestShutdownIsReadByAClientThatSendsBeforeItReads,
		TestHandshakeDuringShutdownIsRejected,
		TestPeerWhoseHandshakeMeetsTheStopGets1001,
		TestPeerThatDoesNotTakeTheHandshakeResponseDuringTheStopIsClosedAfterWriteWait,
		TestClientRegisteredAfterStopIsDroppedAtOnce,
	)},
	{"7. No goroutine outlives its client, and none the hub", list(
		TestHubEndsSoonHoweverItsClientEnds,
		TestSlowReaderDelaysItsEndByWriteWaitAndCloseWaitAtMost,
		TestManyClientsLeaveNothingBehindInAnyShape,
		TestNoTimerKeepsEndedClientsInMemory,
		TestIdleClientKeepsTwoStacksOf2KiB,
	)},
	{"8. A naive move of an application costs at most its own client", list(
		TestNaiveMoveCostsAtMostItsOwnClient,
		TestClientThatEndsBeforeItIsRegisteredIsDropped,
		TestDropOfAnotherHubsClientIsHarmless,
		TestDoneTwiceDoesNotEndTheHubEarly,
		TestAnyGoroutineMayStopTheHubAnyNumberOfTimes,
		TestReasonIsSetBeforeTheQueueIsClosed,
		TestDropWithoutAReasonSendsOne,
		TestCloseCodeThatMustNotBeSentIsReplaced,
		TestEveryCloseReasonIsSentAndLogged, // a reason that is too long
		TestQueueClosedByTheApplicationIsANormalClosure,
		TestClientDroppedByTheApplicationItselfCostsItAlone,
		TestBlockingSendInRunEndsWithTheSlowClientsConnection,
		TestFullQueueOfAClientThatIsNotDroppedCostsNoWait,
		TestHistoryMayExceedTheQueue,
		TestUpstreamsServeWsWorksWithThesePumps,
		TestPeerMayBeAskedForAPasswordBeforeItRegisters,
		TestDelayedHandshakeDoesNotKeepTheWritersBuffer,
		TestAnsweredHandshakeIsNotRejected,
		TestPumpsEndInEveryShapeHoweverThePeerEnds,
		TestStoppedHubEndsThePumpsOfEveryShape,
		TestPumpsThatStartAfterTheHubHasEndedCloseTheConnection,
		TestPumpsThatStartWhileTheHubStopsCloseTheConnection,
		TestReasonOfAClientThatEndsBeforeItsPumpsStartIsSent,
	)},
	{"9. An application reaches the hub from any goroutine, at any time", list(
		TestDoAndTellReachTheHubFromAnyGoroutine,
		TestDoReturnsWhenTheFunctionHasReturned,
		TestDoAndTellReturnFalseOnceTheHubIsStopped,
		TestStopReleasesCallersOfDoThatRunHasNotTaken,
		TestDoAndTellFromFiftyGoroutinesAgainstDropAndStop,
		TestGoroutineThatOutlivesTheHubEnds,
		TestClientsDoRunsOnlyWhileTheClientIsRegistered,
		TestQueueReachesItsClientAloneAndReportsWhetherItQueued,
		TestDeliverToReachesTheClientsItSelects,
		TestRunListsADroppedClientOnceIfItWasRegistered,
		TestRepliesToASlowClientCostItAlone,
		TestNewConnectionOfAUserReplacesTheOldOnlyAfterAValidHandshake,
	)},
	{"10. Nothing in the shutdown waits for the log", list(
		TestHubEndsAlthoughTheLogBlocks,
		TestServeReturnsAlthoughTheLogBlocks,
		TestSignalEndsTheProcessAlthoughItsLogBlocks,
		TestRateLimitedClientDoesNotWaitForTheLog,
		TestProcessOutlivesTheReaderOfItsLog,
	)},
	{"On the wire: figures, lines, frames and close codes", list(
		TestConstantsAndCloseReasonsAreAsPromised,
		TestMessageBecomesOneCleanLineOrNone,
		TestCleanReplacesInvalidUTF8,
		TestQueuedMessagesAreJoinedInFramesBelow32KiB,
		TestBatchIsFilledToTheLastByte,
		TestMessagesOfAnySizeFillFramesInOrder,
		TestFramesAreAnsweredAsRFC6455Says,
		TestViolatorAloneIsClosedAndReadsTheReason,
		TestViolatorReadsTheReasonOverTCPWhileItSends,
		TestViolatorThatNeverAnswersIsClosedAfterCloseWait,
		TestViolatorReadsTheReasonWithoutCloseWrite,
		TestCompressedMessageThatCannotBeReadIsAProtocolError,
		TestTLSConnectionCutWithinARecordIsAbnormalClosure,
	)},
	{"The server, its log and its page", list(
		TestProcessServesWhereItSays,
		TestServerLogsAURLThatCanBeOpened,
		TestServeClosesASlowHTTPConnection,
		TestServeLimitsTheRequestHeader,
		TestLogHasAtMost200BytesOfWhatAPeerSends,
		TestHomeIsServedAtTheRootAlone,
		TestContentSecurityPolicyAllowsThePageItsOwnScriptAndStyleAlone,
		TestCSPHashesIgnoreCRLF,
		TestThePageKnowsTheServersFigures,
	)},
}

func TestEveryPromiseHasTestsAndEveryTestAPromise(t *testing.T) {
	listed := map[string]bool{t.Name(): true}
	for i, entry := range index {
		if n, _, _ := strings.Cut(entry.promise, "."); i < 10 && n != fmt.Sprint(i+1) {
			t.Errorf("entry %d of the index is %q, want promise %[1]d", i+1, entry.promise)
		}
		if len(entry.tests) == 0 {
			t.Errorf("%q has no test", entry.promise)
		}
		for _, test := range entry.tests {
			name := runtime.FuncForPC(reflect.ValueOf(test).Pointer()).Name()
			listed[strings.TrimPrefix(name, "chat.")] = true
		}
	}
	for _, file := range list("client_test.go", "hub_test.go") {
		source, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		tests := regexp.MustCompile(`(?m)^func (Test\w+)\(t \*testing\.T\)`)
		for _, test := range tests.FindAllStringSubmatch(string(source), -1) {
			if !listed[test[1]] {
				t.Errorf("%s is not in the index", test[1])
			}
		}
	}
}

// The figures and texts that users rely on. All other tests use the constants.

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
		"httpTimeout":       {httpTimeout, 10 * time.Second},
		"idleTimeout":       {idleTimeout, 75 * time.Second},
		"forceAfter":        {forceAfter, time.Second},
		"newline":           {string(newline), "\n"},
		"addr":              {*addr, ":8080"},
		"read buffer":       {upgrader.ReadBufferSize, 512},
		"write buffer":      {upgrader.WriteBufferSize, 32767},
		"buffers shared":    {upgrader.WriteBufferPool != nil, true},
	} {
		if test.got != test.want {
			t.Errorf("%s is %v, want %v", name, test.got, test.want)
		}
	}
	for _, test := range []struct {
		reason *websocket.CloseError
		code   int
		text   string
	}{
		{errShuttingDown, 1001, "server shutting down"},
		{errUnregistered, 1000, "closed by the server"},
		{errBinary, 1003, "binary messages are not supported"},
		{errInvalidUTF8, 1007, "message is not valid UTF-8"},
		{errTooBig, 1009, "message exceeds 512 bytes"},
		{errTimeout, 1008, "no pong, or no complete message, for 1m0s"},
		{errSlowClient, 1013, "slow client: 256 messages queued"},
	} {
		if test.reason.Code != test.code || test.reason.Text != test.text {
			t.Errorf("the reason is %v, want %d %q", test.reason, test.code, test.text)
		}
	}
}

// On the wire, in: one WebSocket text message is one chat message, of at most 512 bytes.
// Control characters become spaces, surrounding white space is trimmed, and an empty
// message is not broadcast.

func TestMessageBecomesOneCleanLineOrNone(t *testing.T) {
	withServer(t, func(t *testing.T, s *server) {
		p := s.join(t)
		for sent, want := range map[string]string{
			"plain":                             "plain",
			"  around\t\r\n":                    "around",
			"one\ntwo\r\nthree":                 "one two  three",
			"\x1b[2J\x07bell\x00\x7f":           "[2J bell",
			"C1 \u009b31m and \u0085 next line": "C1  31m and   next line",
			"\u00a0\u3000grüße, 世界 👋🏽\u2003":    "grüße, 世界 👋🏽",
			"<b>not markup</b>":                 "<b>not markup</b>",
			strings.Repeat("x", 512):            strings.Repeat("x", 512),
			"":                                  "",
			" ":                                 "",
			"\n":                                "",
			"\x00\x1b\u0085":                    "",
			"\u00a0\u2003":                      "",
		} {
			want := list(want, "end")
			if want[0] == "" {
				want = want[1:]
			}
			p.send(sent)
			p.send("end")
			p.wantLines(want...)
		}
	})
}

func TestCleanReplacesInvalidUTF8(t *testing.T) {
	got := string(clean([]byte("\xff of an application\xc3")))
	if want := "\ufffd of an application\ufffd"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// On the wire, out: one WebSocket text message is one or more chat messages joined by
// '\n', in one frame, below 32 KiB. The message that does not fit into a frame begins the
// next. An application's messages may have any size.

func TestQueuedMessagesAreJoinedInFramesBelow32KiB(t *testing.T) {
	withServer(t, func(t *testing.T, s *server) {
		p := s.join(t).unbuffered()
		var want, got []string
		for n := range 1 + sendQueueSize { // One is with writePump.
			want = append(want, fmt.Sprintf("%0*d", maxMessageSize, n))
			s.broadcast(want[n])
		}
		s.hub.stop()
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
		const batches = (sendQueueSize*(maxMessageSize+1) + maxBatchSize - 1) / maxBatchSize
		if frames != 1+batches {
			t.Errorf("got %d frames, want %d", frames, 1+batches)
		}
	})
}

func TestBatchIsFilledToTheLastByte(t *testing.T) {
	// These 62 leave 962 bytes, which hold a newline, 448 bytes, another newline
	// and a message of the greatest length, and not one byte more.
	const most = maxBatchSize/(maxMessageSize+1) - 1
	for gap, want := range map[int]int{448: most + 2, 449: most + 1} {
		runWithServer(t, fmt.Sprint(gap), func(t *testing.T, s *server) {
			p := s.join(t).unbuffered()
			s.broadcast("writePump is busy with this")
			for range most {
				s.broadcast(strings.Repeat("x", maxMessageSize))
			}
			s.broadcast(strings.Repeat("x", gap), strings.Repeat("x", maxMessageSize))
			p.wantLines("writePump is busy with this")
			lines, err := p.read(patience)
			if len(lines) != want {
				t.Errorf("got %d lines in one message and %v, want %d", len(lines), err, want)
			}
		})
	}
}

func TestMessagesOfAnySizeFillFramesInOrder(t *testing.T) {
	const full = maxBatchSize
	for _, test := range []struct {
		name   string
		queued []int // sizes, while writePump writes another message
		want   []int // sizes of the frames
	}{
		{
			name:   "two that fit exactly",
			queued: list(full-10, 9),
			want:   list(full),
		},
		{
			name:   "two that do not fit",
			queued: list(full-10, 10),
			want:   list(full-10, 10),
		},
		{
			name:   "one that does not fit begins a full frame",
			queued: list(full-1, 2, full-3, 1),
			want:   list(full-1, full, 1),
		},
		{
			name:   "one that fills a frame",
			queued: list(full, 1),
			want:   list(full, 1),
		},
		{
			name:   "one larger than a frame",
			queued: list(1, full+1, 1, 1),
			want:   list(1, full+1, 3),
		},
		{
			name:   "three larger than two frames",
			queued: list(2*full+1, 2*full+2, 2*full+3),
			want:   list(2*full+1, 2*full+2, 2*full+3),
		},
		{
			name:   "empty ones",
			queued: list(full, 0, 0, full),
			want:   list(full, 1, full),
		},
	} {
		runWithServer(t, test.name, func(t *testing.T, s *server) {
			p := s.join(t).unbuffered()
			client := s.clients()[0]
			s.broadcast("busy")
			var want []byte
			s.hub.do(func() {
				for i, size := range test.queued {
					message := bytes.Repeat([]byte{'a' + byte(i)}, size)
					want = append(append(want, '\n'), message...)
					s.hub.queue(client, message)
				}
			})
			s.hub.stop()
			p.wantLines("busy")
			var got []byte
			var sizes []int
			for {
				f, err := p.readFrame(patience)
				if err != nil {
					t.Fatal(err)
				}
				if f.first != 0x81 {
					break
				}
				got = append(append(got, '\n'), f.payload...)
				sizes = append(sizes, len(f.payload))
			}
			if !slices.Equal(sizes, test.want) {
				t.Errorf("the frames have %d bytes, want %d", sizes, test.want)
			}
			if !bytes.Equal(got, want) {
				t.Error("the frames do not hold the messages in order")
			}
		})
	}
}

func TestBatchesDoNotChangeTheMessagesThatClientsShare(t *testing.T) {
	withServer(t, func(t *testing.T, s *server) {
		one, other := s.join(t).unbuffered(), s.join(t).unbuffered()
		s.broadcast("busy")
		buffer := []byte("hello, and room behind it")
		s.broadcast("first", "second")
		s.hub.do(func() { s.hub.deliver(buffer[:5]) })
		s.broadcast("third")
		for _, p := range list(one, other) {
			p.wantLines("busy", "first", "second", "hello", "third")
		}
		if string(buffer) != "hello, and room behind it" {
			t.Errorf("the application's buffer is %q", buffer)
		}
	})
}

// A client that asks for heartbeats, by its URL or by the subprotocol, gets an empty text
// message with every ping. Other clients get none.

func TestHeartbeatClientGetsAnEmptyMessageWithEachPing(t *testing.T) {
	without := list(`10s text "hello"`, `54s ping ""`, `1m48s ping ""`)
	with := list(`10s text "hello"`, `54s ping ""`, `54s text ""`, `1m48s ping ""`, `1m48s text ""`)
	for subprotocol, want := range map[string][]string{
		"":          without,
		"other":     without,
		"heartbeat": with,
	} {
		runWithServer(t, subprotocol, func(t *testing.T, s *server) {
			p := s.join(t, strings.Fields(subprotocol)...)
			if got := p.Subprotocol(); (got == "heartbeat") != (subprotocol == "heartbeat") {
				t.Errorf("the server chose %q", got)
			}
			start := time.Now()
			time.AfterFunc(10*time.Second, func() { s.broadcast("hello") })
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

func TestClientAsksForTheHeartbeatByItsURL(t *testing.T) {
	for query, want := range map[string]bool{
		"":             false,
		"?heartbeat":   true,
		"?heartbeat=1": true,
		"?other":       false,
	} {
		runWithServer(t, query, func(t *testing.T, s *server) {
			conn, _, err := s.dialer(t).Dial(serverURL+query, nil)
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

// RFC 6455: a chat with one client is an echo server. gorilla/websocket parses the
// frames, and has tests for that. This test shows what the pumps do with them.

func TestFramesAreAnsweredAsRFC6455Says(t *testing.T) {
	const closeBack = `close 1000 ""`
	// The first and last characters of each length in UTF-8.
	const lengths = "\u00a1\u07ff\u0800\uffff\U00010000\U0010ffff."
	hello, helloBack := encode(0x81, "hello"), `text "hello"`
	type test struct {
		name string
		sent [][]byte // and then a close frame with 1000
		want []string // and then the end of TCP
	}
	tests := []test{
		{
			name: "5.2 text",
			sent: list(hello),
			want: list(helloBack, closeBack),
		},
		{
			name: "5.2 reserved opcode",
			sent: list(encode(0x8f, "")),
			want: list(`close 1002 "bad opcode 15"`),
		},
		{
			name: "5.2 negative length",
			sent: list([]byte{0x81, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}),
			want: list(`close 1002 "websocket: read limit exceeded"`),
		},
		{
			name: "5.4 two fragments",
			sent: list(encode(0x01, "hel"), encode(0x80, "lo")),
			want: list(helloBack, closeBack),
		},
		{
			name: "5.4 empty fragments",
			sent: list(encode(0x01, ""), encode(0x00, "hello"), encode(0x00, ""), encode(0x80, "")),
			want: list(helloBack, closeBack),
		},
		{
			name: "5.4 ping between fragments",
			sent: list(encode(0x01, "hel"), encode(0x89, "?"), encode(0x80, "lo")),
			want: list(`pong "?"`, helloBack, closeBack),
		},
		{
			name: "5.4 close between fragments",
			sent: list(encode(0x01, "hel"), encodeClose(1000, "")),
			want: list(closeBack),
		},
		{
			name: "5.4 close between binary fragments",
			sent: list(encode(0x02, "hel"), encodeClose(1000, "")),
			want: list(closeBack),
		},
		{
			name: "5.4 text between fragments",
			sent: list(encode(0x01, "x"), hello),
			want: list(`close 1002 "data before FIN"`),
		},
		{
			name: "5.4 fragments that are too long together",
			sent: list(
				encode(0x01, strings.Repeat("x", 300)),
				encode(0x80, strings.Repeat("x", 300)),
			),
			want: list(`close 1009 "message exceeds 512 bytes"`),
		},
		{
			name: "5.5.1 close without a code",
			sent: list(encode(0x88, "")),
			want: list(`close`),
		},
		{
			name: "5.5.1 close with a reason",
			sent: list(encodeClose(1000, "good night")),
			want: list(`close 1000 "good night"`),
		},
		{
			name: "5.5.1 close with a private code",
			sent: list(encodeClose(4999, "why")),
			want: list(`close 4999 "why"`),
		},
		{
			name: "5.5.1 text after the close",
			sent: list(encodeClose(1000, ""), hello),
			want: list(closeBack),
		},
		{
			name: "5.5.1 ping after the close",
			sent: list(encodeClose(1000, ""), encode(0x89, "?")),
			want: list(closeBack),
		},
		{
			name: "5.5.1 text before the close",
			sent: list(hello, encodeClose(1000, "")),
			want: list(helloBack, closeBack),
		},
		{
			name: "5.5.2 ping",
			sent: list(encode(0x89, "")),
			want: list(`pong ""`, closeBack),
		},
		{
			name: "5.5.2 ping of 125 bytes",
			sent: list(encode(0x89, strings.Repeat("x", 125))),
			want: list(`pong "`+strings.Repeat("x", 125)+`"`, closeBack),
		},
		{
			name: "5.5.3 unsolicited pong",
			sent: list(encode(0x8a, "x")),
			want: list(closeBack),
		},
		{
			name: "5.6 fragmented binary",
			sent: list(encode(0x02, "x"), encode(0x80, "x")),
			want: list(`close 1003 "binary messages are not supported"`),
		},
		{
			name: "8.1 character in two fragments",
			sent: list(encode(0x01, "\xc3"), encode(0x80, "\xa9")),
			want: list(`text "é"`, closeBack),
		},
		{
			name: "8.1 first and last of each length",
			sent: list(encode(0x81, lengths)),
			want: list(fmt.Sprintf("text %q", lengths), closeBack),
		},
	}
	for _, bad := range []string{
		"\xff", "\xc3", "\xc0\xaf", "\xed\xa0\x80", "\xf4\x90\x80\x80", "\x80", "\xe2\x82",
	} {
		tests = append(tests, test{
			name: fmt.Sprintf("8.1 %q is not UTF-8", bad),
			sent: list(encode(0x81, "x"+bad)),
			want: list(`close 1007 "message is not valid UTF-8"`),
		})
	}
	for _, test := range tests {
		runWithServer(t, test.name, func(t *testing.T, s *server) {
			p := s.join(t)
			start := time.Now()
			p.write(append(slices.Concat(test.sent...), encodeClose(1000, "")...))
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

// When a client violates the protocol, it alone gets a close code and a reason, also
// while it is sending. After both close frames TCP is closed at once. The other clients
// notice nothing.

// A violation is something that a client sends to have its connection closed.
type violation struct {
	name string
	sent []byte
	want *websocket.CloseError
}

var violations = []violation{
	{
		name: "binary",
		sent: encode(0x82, "text all the same"),
		want: errBinary,
	},
	{
		name: "binary, not UTF-8",
		sent: encode(0x82, "\xff"),
		want: errBinary,
	},
	{
		name: "not UTF-8",
		sent: encode(0x81, "abc\xff\xfe\xfd"),
		want: errInvalidUTF8,
	},
	{
		name: "one byte too long",
		sent: encode(0x81, strings.Repeat("x", maxMessageSize+1)),
		want: errTooBig,
	},
	{
		name: "binary, too long",
		sent: encode(0x82, strings.Repeat("x", maxMessageSize+1)),
		want: errTooBig,
	},
	{
		name: "blank, too long",
		sent: encode(0x81, strings.Repeat(" ", maxMessageSize+1)),
		want: errTooBig,
	},
	{
		name: "too long, cut within a character",
		sent: encode(0x81, strings.Repeat("é", maxMessageSize)),
		want: errTooBig,
	},
	{
		name: "2 MB",
		sent: encode(0x81, strings.Repeat("x", 2<<20)),
		want: errTooBig,
	},
	{
		name: "without end",
		sent: encode(0x01, strings.Repeat("x", maxMessageSize+1)),
		want: errTooBig,
	},
	{
		name: "reserved opcode",
		sent: encode(0x8f, ""),
		want: &websocket.CloseError{Code: 1002, Text: "bad opcode 15"},
	},
}

// manyMessages, and manyFragments of one message, are more than a pipe holds for a peer
// that does not read, and more than the rate limit lets through in closeWait.
var (
	manyMessages  = bytes.Repeat(encode(0x81, strings.Repeat("x", 122)), 2000)
	manyFragments = bytes.Repeat(encode(0x00, strings.Repeat("x", 122)), 2000)
)

func TestViolatorAloneIsClosedAndReadsTheReason(t *testing.T) {
	for _, violation := range violations {
		for _, busy := range list(false, true) {
			for _, sends := range list(false, true) {
				name := fmt.Sprintf("%s,busy=%v,sends=%v", violation.name, busy, sends)
				runWithServer(t, name, func(t *testing.T, s *server) {
					testViolation(t, s, violation, busy, sends)
				})
			}
		}
	}
}

// testViolation has a client violate the protocol. If busy, three messages are queued for
// it; if sends, it keeps sending.
func testViolation(t *testing.T, s *server, violation violation, busy, sends bool) {
	sent, want := violation.sent, violation.want
	violator, other := s.join(t), s.join(t)
	logged, start := *want, time.Now()
	var broadcast, received []string
	if busy {
		violator.unbuffered()
		broadcast = list("one", "two", "three")
		s.broadcast(broadcast...)
		received = broadcast
	}
	if logged.Code == 1002 {
		// gorilla/websocket writes this one itself, ahead of the queue.
		logged.Text = "websocket: " + logged.Text
		received = broadcast[:min(1, len(broadcast))]
	}
	if sends {
		more := manyMessages
		if sent[0] == 0x01 {
			more = manyFragments
		}
		sent = slices.Concat(sent, more)
	}
	var writing sync.WaitGroup
	writing.Go(func() { violator.write(sent) })
	if synctest.Wait(); !busy {
		writing.Wait() // It reads only when it has written all.
	}
	if got := violator.wantClose(want); !slices.Equal(got, received) {
		t.Errorf("got %s before the close frame, want %q", brief(got), received)
	}
	if logged.Code == 1002 {
		violator.wantHalfEnd()
		violator.pipe().CloseWrite()
		synctest.Wait()
	}
	violator.wantEnd()
	writing.Wait()
	if got := time.Since(start); got != 0 {
		t.Errorf("the ending took %v, want no time", got)
	}
	s.wantLogged(t, fmt.Sprintf("pipe: dropped: %q", logged.Error()))
	s.broadcast("still here")
	other.wantLines(append(broadcast, "still here")...)
}

// The same over TCP, which the pipes imitate.

func TestViolatorReadsTheReasonOverTCPWhileItSends(t *testing.T) {
	watch(t, patience)
	s := tcpServer(t)
	for _, violation := range violations {
		if len(violation.sent) < 1000 && violation.sent[0] != 0x01 {
			p := s.join(t)
			p.write(slices.Concat(violation.sent, manyMessages[:8<<10]))
			p.wantClose(violation.want)
		}
	}
}

func TestViolatorThatNeverAnswersIsClosedAfterCloseWait(t *testing.T) {
	for _, violation := range violations {
		runWithServer(t, violation.name, func(t *testing.T, s *server) {
			p := s.join(t)
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
		s := newServer(t, wholeListener{listener})
		s.connect = listener.connect
		p := s.join(t)
		p.write(slices.Concat(encode(0x8f, ""), manyMessages))
		p.wantClose(&websocket.CloseError{Code: 1002, Text: "bad opcode 15"})
		p.pipe().CloseWrite()
		synctest.Wait()
		p.wantEnd()
	})
}

// An application may enable compression, or TLS.

func TestCompressedMessageThatCannotBeReadIsAProtocolError(t *testing.T) {
	defer func(old websocket.Upgrader) { upgrader = old }(upgrader)
	upgrader.EnableCompression = true
	for _, test := range []struct{ name, sent, log string }{
		{
			name: "invalid",
			sent: "\xff\xff\xff this does not expand",
			log:  "flate: corrupt input before offset 1",
		},
		{
			name: "truncated",
			sent: "\x00\xff\x00\x00\xffthis is truncated",
			log:  "unexpected EOF",
		},
	} {
		runWithServer(t, test.name, func(t *testing.T, s *server) {
			p := s.join(t)
			p.write(encode(0xc1, test.sent))
			_, err := p.read(patience)
			if !websocket.IsCloseError(err, websocket.CloseProtocolError) {
				t.Errorf("the connection ended with %v, want 1002", err)
			}
			p.Close()
			s.wantLogged(t, `pipe: dropped: "websocket: close 1002 (protocol error): `+test.log+`"`)
		})
	}
}

func TestTLSConnectionCutWithinARecordIsAbnormalClosure(t *testing.T) {
	issuer := httptest.NewTLSServer(nil) // for its certificate
	issuer.Close()
	for name, sent := range map[string][]byte{
		"between messages": nil,
		"within a message": encode(0x01, "begun"),
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T) {
				pipes := newPipeListener()
				s := newServer(t, tls.NewListener(pipes, issuer.TLS))
				s.connect = func(t testing.TB) net.Conn {
					return tls.Client(pipes.connect(t), &tls.Config{InsecureSkipVerify: true})
				}
				p := s.join(t)
				p.write(sent)
				conn := p.NetConn().(*tls.Conn).NetConn()
				conn.Write([]byte{23, 3, 3, 0, 100, 'x'}) // one byte of a record of 100
				conn.Close()
				s.wantLogged(t, "pipe: "+logVanished)
			})
		})
	}
}

// How a connection ends, and its line in the log, which says which side closed it. A
// normal closure is not logged. A peer's text is quoted, so that it can neither end a
// line of the log nor drive a terminal.

// A closing is a way to end a connection, and what it leads to.
type closing struct {
	name  string
	end   func(*server, *peer)
	after time.Duration         // from the start of end until TCP is closed
	lines int                   // that the peer reads before the close frame
	want  *websocket.CloseError // what the peer reads, or nil if it has closed TCP
	log   string                // what follows the address
}

const logVanished = `disconnected: "websocket: close 1006 (abnormal closure): unexpected EOF"`

// sends has the peer send bytes, and not answer a close frame.
func sends(sent []byte) func(*server, *peer) {
	return func(_ *server, p *peer) {
		p.SetCloseHandler(func(int, string) error { return nil })
		p.write(sent)
	}
}

// stall broadcasts lines that the peer does not read before the end.
func (s *server) stall(p *peer, lines int) {
	p.unbuffered()
	for n := range lines {
		s.broadcast(fmt.Sprint("line ", n))
	}
}

// drop drops the server's only client for each of the reasons, in this order.
func (s *server) drop(reasons ...*websocket.CloseError) {
	client := s.clients()[0]
	s.hub.do(func() {
		for _, reason := range reasons {
			s.hub.drop(client, reason)
		}
	})
}

// end calls end of the server's only client for each of the reasons, in this order.
func (s *server) end(reasons ...*websocket.CloseError) {
	client := s.clients()[0]
	for _, reason := range reasons {
		client.end(reason)
	}
}

func TestEveryCloseReasonIsSentAndLogged(t *testing.T) {
	const forged = "x\n2026/11/23 10:00:00 10.0.0.1: forged\x1b[2J\u009b31m"
	closings := []closing{
		{
			name: "the peer closes",
			end:  sends(encodeClose(1000, "")),
			want: &websocket.CloseError{Code: 1000},
		},
		{
			name: "the peer's tab is closed",
			end:  sends(encodeClose(1001, "")),
			want: &websocket.CloseError{Code: 1001},
		},
		{
			name: "the peer closes without a code",
			end:  sends(encode(0x88, "")),
			want: &websocket.CloseError{Code: 1005},
		},
		{
			name: "the peer closes with a reason",
			end:  sends(encodeClose(4000, forged)),
			want: &websocket.CloseError{Code: 4000, Text: forged},
			log: `disconnected: "websocket: close 4000: ` +
				`x\n2026/11/23 10:00:00 10.0.0.1: forged\x1b[2J\u009b31m"`,
		},
		{
			name: "the peer closes with a reason of the server",
			end:  sends(encodeClose(errTooBig.Code, errTooBig.Text)),
			want: errTooBig,
			log: `disconnected: "websocket: close 1009 (message too big): ` +
				`message exceeds 512 bytes"`,
		},
		{
			name: "the peer half-closes",
			end:  func(_ *server, p *peer) { p.pipe().CloseWrite() },
			want: &websocket.CloseError{Code: 1006, Text: "unexpected EOF"},
			log:  logVanished,
		},
		{
			name: "the peer vanishes",
			end:  func(_ *server, p *peer) { p.Close() },
			log:  logVanished,
		},
		{
			name: "the peer vanishes within a message",
			end: func(_ *server, p *peer) {
				p.write(encode(0x01, "x"))
				p.Close()
			},
			log: logVanished,
		},
		{
			name: "the network resets it",
			end: func(s *server, p *peer) {
				s.broadcast("not read")
				p.Close()
			},
			log: `disconnected: "websocket: close 1006 (abnormal closure): ` +
				`read pipe: connection reset by peer"`,
		},
		{
			name: "the peer sends binary and half-closes",
			end: func(s *server, p *peer) {
				s.stall(p, 1)
				p.write(encode(0x82, ""))
				p.pipe().CloseWrite()
				synctest.Wait()
			},
			lines: 1,
			want:  errBinary,
			log: `dropped: "websocket: close 1003 (unsupported data): ` +
				`binary messages are not supported"`,
		},
		{
			name: "the peer answers no ping",
			end: func(_ *server, p *peer) {
				p.SetPingHandler(func(string) error { return nil })
			},
			after: pongWait,
			want:  errTimeout,
			log: `dropped: "websocket: close 1008 (policy violation): ` +
				`no pong, or no complete message, for 1m0s"`,
		},
		{
			name: "the peer reads nothing and violates the protocol",
			end: func(s *server, p *peer) {
				s.stall(p, 1)
				p.write(encode(0x8f, ""))
				time.Sleep(writeWait - time.Second)
			},
			after: writeWait - time.Second,
			lines: 1,
			want:  &websocket.CloseError{Code: 1002, Text: "websocket: bad opcode 15"},
			log:   `dropped: "websocket: close 1002 (protocol error): websocket: bad opcode 15"`,
		},
		{
			name: "the peer does not read",
			end: func(s *server, p *peer) {
				s.stall(p, 1+sendQueueSize+2) // One line is with writePump.
			},
			after: sendQueueSize / 2 * backpressureDelay,
			lines: 1 + sendQueueSize,
			want:  errSlowClient,
			log:   `dropped: "websocket: close 1013: slow client: 256 messages queued"`,
		},
		{
			name: "the application unregisters it",
			end:  func(s *server, _ *peer) { s.hub.unregister <- s.clients()[0] },
			want: errUnregistered,
		},
		{
			name: "the server shuts down",
			end: func(s *server, p *peer) {
				s.stall(p, 3)
				s.hub.stop()
			},
			lines: 3,
			want:  errShuttingDown,
		},
	}
	long := &websocket.CloseError{Code: 4000, Text: "x" + strings.Repeat("é", 70)}
	cut := &websocket.CloseError{Code: 4000, Text: "x" + strings.Repeat("é", 61)}
	for how, ends := range map[string]func(*server, ...*websocket.CloseError){
		"drop": (*server).drop,
		"end":  (*server).end,
	} {
		closings = append(closings, closing{
			name: how + " with a long reason",
			end:  func(s *server, _ *peer) { ends(s, long) },
			want: cut,
			log:  fmt.Sprintf("dropped: %q", long.Error()),
		}, closing{
			name: how + " with one reason, then another",
			end:  func(s *server, _ *peer) { ends(s, errBinary, errTooBig) },
			want: errBinary,
			log: `dropped: "websocket: close 1003 (unsupported data): ` +
				`binary messages are not supported"`,
		})
	}
	for _, test := range closings {
		runWithServer(t, test.name, func(t *testing.T, s *server) {
			p := s.join(t)
			start := time.Now()
			test.end(s, p)
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
				s.wantLogged(t)
			} else {
				s.wantLogged(t, "pipe: "+test.log)
			}
		})
	}
}

// A close code that must not be sent is replaced. RFC 6455 section 7.4.

func TestCloseCodeThatMustNotBeSentIsReplaced(t *testing.T) {
	for code, sent := range map[int]bool{
		-1: false, 0: false, 403: false, 999: false,
		1000: true, 1003: true, 1004: false, 1005: false, 1006: false, 1007: true, 1013: true,
		1015: false, 2999: false,
		3000: true, 4999: true, 5000: false, 70000: false,
	} {
		for how, ends := range map[string]func(*server, ...*websocket.CloseError){
			"drop": (*server).drop,
			"end":  (*server).end,
		} {
			runWithServer(t, fmt.Sprint(how, code), func(t *testing.T, s *server) {
				p := s.join(t)
				reason := &websocket.CloseError{Code: code, Text: "kicked"}
				want := reason
				if !sent {
					want = &websocket.CloseError{Code: 1011, Text: reason.Error()}
				}
				start := time.Now()
				ends(s, reason)
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

func TestClientThatNeverReadsIsClosed(t *testing.T) {
	timeout := closeError(1006, "%v", os.ErrDeadlineExceeded) // the failed write's error
	for _, test := range []struct {
		name         string // what the server writes
		subprotocols []string
		begin        func(*server, *peer)
		after        time.Duration         // until the write fails
		want         *websocket.CloseError // in the log
	}{
		{
			name:  "a message",
			begin: func(s *server, _ *peer) { s.broadcast("this") },
			after: writeWait,
			want:  timeout,
		},
		{
			name: "a message, then a close frame",
			begin: func(s *server, _ *peer) {
				s.broadcast("this")
				s.drop(errBinary)
			},
			after: writeWait,
			want:  errBinary,
		},
		{
			name:  "a close frame",
			begin: func(s *server, _ *peer) { s.drop(errBinary) },
			after: writeWait,
			want:  errBinary,
		},
		{
			name:  "a ping",
			begin: func(*server, *peer) {},
			after: pingPeriod + writeWait,
			want:  timeout,
		},
		{
			name:         "a heartbeat",
			subprotocols: list(heartbeat),
			begin: func(_ *server, p *peer) {
				go io.ReadFull(p.NetConn(), make([]byte, 2)) // the ping alone
			},
			after: pingPeriod + writeWait,
			want:  timeout,
		},
		{
			name:  "a pong",
			begin: func(_ *server, p *peer) { p.write(encode(0x89, "")) },
			after: pingPeriod, // The next write fails.
			want:  timeout,
		},
		{
			name: "a pong, then a message",
			begin: func(s *server, p *peer) {
				p.write(encode(0x89, ""))
				time.Sleep(2 * writeWait)
				s.broadcast("this")
			},
			after: 2 * writeWait,
			want:  timeout,
		},
	} {
		runWithServer(t, test.name, func(t *testing.T, s *server) {
			p := s.join(t, test.subprotocols...).unbuffered()
			start, want := time.Now(), test.after+closeWait
			test.begin(s, p)
			p.NetConn().SetWriteDeadline(time.Time{})
			for !p.pipe().far.isClosed() && time.Since(start) < 2*want { // It answers.
				time.Sleep(100 * time.Millisecond)
				p.NetConn().Write(encode(0x8a, ""))
				synctest.Wait()
			}
			if got := time.Since(start); got < want || got > want+200*time.Millisecond {
				t.Errorf("TCP was closed after %v, want %v", got, want)
			}
			s.wantLogged(t, fmt.Sprintf("pipe: dropped: %q", test.want.Error()))
		})
	}
}

func TestNothingWaitsForAClientAfterAFailedWrite(t *testing.T) {
	withServer(t, func(t *testing.T, s *server) {
		p := s.join(t)
		client := s.clients()[0]
		p.pipe().far.onWrite = func() error { return errReset }
		start := time.Now()
		s.broadcast("this ends writePump")
		for range 2 * sendQueueSize {
			client.send <- []byte("sent past the hub")
		}
		synctest.Wait()
		for range 2 * sendQueueSize {
			s.broadcast("lost")
		}
		if got := time.Since(start); got != 0 {
			t.Errorf("it cost the others %v, want no time", got)
		}
		time.Sleep(closeWait)
		s.wantLogged(t, `pipe: dropped: "websocket: close 1006 (abnormal closure): `+
			`read pipe: connection reset by peer"`)
	})
}

func TestPeerThatDoesNotTakeTheHandshakeIsDroppedAfterWriteWait(t *testing.T) {
	for _, stopping := range list(false, true) {
		runWithServer(t, fmt.Sprintf("stopping=%v", stopping), func(t *testing.T, s *server) {
			conn := s.connect(t).(*pipe)
			defer conn.Close()
			conn.unbuffer()
			start := time.Now()
			fmt.Fprintf(conn, "%s\r\n", handshake)
			client := s.clients()[0]
			s.hub.broadcast <- []byte("run no longer receives this")
			if stopping {
				s.hub.stop()
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
				s.wantEnd(t)
				s.wantLogged(t)
			} else {
				s.wantLogged(t, `pipe: disconnected: "websocket: close 1006 (abnormal closure): `+
					`handshake response: i/o timeout"`)
			}
		})
	}
}

func TestSlowReaderDelaysItsEndByWriteWaitAndCloseWaitAtMost(t *testing.T) {
	for _, test := range []struct {
		name  string
		end   func(*server)
		busy  bool // writePump is writing when the reason is set.
		pings bool // The peer sends pings as well.
	}{
		{
			name: "stop",
			end:  func(s *server) { s.hub.stop() },
		},
		{
			name: "stop while writePump is writing",
			end:  func(s *server) { s.hub.stop() },
			busy: true,
		},
		{
			name:  "stop of a peer that sends pings",
			end:   func(s *server) { s.hub.stop() },
			busy:  true,
			pings: true,
		},
		{
			name: "drop",
			end:  func(s *server) { s.drop(errBinary) },
		},
		{
			name: "drop while writePump is writing",
			end:  func(s *server) { s.drop(errBinary) },
			busy: true,
		},
		{
			name:  "drop of a peer that sends pings",
			end:   func(s *server) { s.drop(errBinary) },
			busy:  true,
			pings: true,
		},
	} {
		runWithServer(t, test.name, func(t *testing.T, s *server) {
			p := s.join(t).unbuffered()
			client := s.clients()[0]
			start := time.Now()
			if test.busy {
				s.broadcast("not read yet")
			}
			s.hub.do(func() {
				for range sendQueueSize {
					s.hub.queue(client, bytes.Repeat([]byte("x"), maxMessageSize))
				}
			})
			test.end(s)
			var running sync.WaitGroup
			defer running.Wait()
			running.Go(func() { // It reads each frame just in time, and answers none.
				for err := error(nil); err == nil; {
					time.Sleep(writeWait - time.Second)
					_, err = p.readFrame(time.Second)
				}
			})
			running.Go(func() { // The pong would be written after the first frame.
				for err := error(nil); err == nil && test.pings; {
					time.Sleep(writeWait - 3*time.Second/2)
					_, err = p.NetConn().Write(encode(0x89, ""))
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

func TestPongWaitsForAStalledPeer(t *testing.T) {
	withServer(t, func(t *testing.T, s *server) {
		p := s.join(t).unbuffered()
		s.broadcast("this is not read yet")
		p.write(encode(0x89, "are you there?"))
		time.Sleep(writeWait - time.Second)
		for _, want := range list(`text "this is not read yet"`, `pong "are you there?"`) {
			if f, err := p.readFrame(patience); err != nil || f.String() != want {
				t.Errorf("got %v, %v, want %s", f, err, want)
			}
		}
		p.send("still here")
		p.wantLines("still here")
	})
}

func TestPingsGoOutBetweenFramesOfABacklog(t *testing.T) {
	withServer(t, func(t *testing.T, s *server) {
		p := s.join(t).unbuffered()
		client := s.clients()[0]
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
			s.hub.do(func() {
				for len(client.send) < 3 && s.hub.clients[client] {
					s.hub.queue(client, make([]byte, maxBatchSize))
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

// An idle client's goroutines keep stacks of 2 KiB each: see readPump.

func TestIdleClientKeepsTwoStacksOf2KiB(t *testing.T) {
	watch(t, patience)
	const n = 200
	s := tcpServer(t)
	others := runtime.NumGoroutine()
	stacks := func(clients int) int {
		for runtime.NumGoroutine() > others+2*clients { // The handlers return.
			runtime.Gosched()
		}
		runtime.GC() // Shrinks stacks.
		runtime.GC()
		var stats runtime.MemStats
		runtime.ReadMemStats(&stats)
		return int(stats.StackInuse)
	}
	p := s.join(t)
	p.send("hello")
	p.wantLines("hello")
	before := stacks(1)
	for range n {
		conn := s.connect(t)
		t.Cleanup(func() { conn.Close() })
		fmt.Fprintf(conn, "%s\r\n", handshake)
		http.ReadResponse(bufio.NewReader(conn), nil)
	}
	most := 5 << 10
	info, _ := debug.ReadBuildInfo()
	if slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"}) {
		most = 9 << 10 // The race detector's frames are larger.
	}
	if runtime.GOOS == "windows" {
		most = 16 << 10 // A read takes more there.
	}
	if got := (stacks(1+n) - before) / n; got > most {
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
	const badKey = "not a websocket handshake: 'Sec-WebSocket-Key' header must be " +
		"Base64 encoded value of 16-byte in length"
	for _, test := range []struct {
		name, request string
		want          int // status
		log           string
	}{
		{
			name:    "foreign origin",
			request: handshake + "Origin: http://example.com\r\n",
			want:    http.StatusForbidden,
			log:     "request origin not allowed by Upgrader.CheckOrigin",
		},
		{
			name:    "plain GET",
			request: "GET /ws HTTP/1.1\r\nHost: pipe\r\n",
			want:    http.StatusBadRequest,
			log:     badHandshake + "'upgrade' token not found in 'Connection' header",
		},
		{
			name:    "plain HEAD",
			request: "HEAD /ws HTTP/1.1\r\nHost: pipe\r\n",
			want:    http.StatusBadRequest,
			log:     badHandshake + "'upgrade' token not found in 'Connection' header",
		},
		{
			name:    "another upgrade",
			request: strings.Replace(handshake, "websocket", "h2c", 1),
			want:    http.StatusBadRequest,
			log:     badHandshake + "'websocket' token not found in 'Upgrade' header",
		},
		{
			name:    "POST",
			request: strings.Replace(handshake, "GET", "POST", 1),
			want:    http.StatusMethodNotAllowed,
			log:     badHandshake + "request method is not GET",
		},
		{
			name:    "version 12",
			request: strings.Replace(handshake, "13", "12", 1),
			want:    http.StatusBadRequest,
			log:     "unsupported version: 13 not found in 'Sec-Websocket-Version' header",
		},
		{
			name:    "no key",
			request: without("Sec-WebSocket-Key"),
			want:    http.StatusBadRequest,
			log:     badKey,
		},
		{
			name:    "short key",
			request: without("Sec-WebSocket-Key") + "Sec-WebSocket-Key: c2hvcnQ=\r\n",
			want:    http.StatusBadRequest,
			log:     badKey,
		},
	} {
		runWithServer(t, test.name, func(t *testing.T, s *server) {
			front := *s.hub
			front.register = make(chan *Client) // which nothing receives from
			s.serveFor(&front)
			conn := s.connect(t)
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
			s.wantLogged(t, fmt.Sprintf(
				`pipe: handshake refused: "websocket: %s" (Origin %q, Host "pipe")`,
				test.log, origin))
		})
	}
}

func TestPanicInCheckOriginLeavesNothingInTheHub(t *testing.T) {
	defer func(old websocket.Upgrader) { upgrader = old }(upgrader)
	upgrader.CheckOrigin = func(*http.Request) bool { panic("an application's mistake") }
	withServer(t, func(t *testing.T, s *server) {
		if _, _, err := s.dialer(t).Dial(serverURL, nil); err == nil {
			t.Error("the handshake succeeded")
		}
		if got := len(s.clients()); got != 0 {
			t.Errorf("the hub has %d clients, want none", got)
		}
	}) // and the hub ends
}

func TestHandshakeResponseIsDelayedUntilTheClientIsRegistered(t *testing.T) {
	withServer(t, func(t *testing.T, s *server) {
		front := *s.hub
		front.register = make(chan *Client)
		s.serveFor(&front)
		const slow = 50 * time.Millisecond
		go func() {
			time.Sleep(slow)
			client := <-front.register
			if got := client.conn.RemoteAddr().String(); got != "pipe" {
				t.Errorf("run sees a client at %s, want pipe", got)
			}
			s.hub.register <- client
		}()
		start := time.Now()
		sameOrigin := http.Header{"Origin": {"http://pipe"}}
		conn, _, err := s.dialer(t).Dial(serverURL, sameOrigin)
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
	withServer(t, func(t *testing.T, s *server) {
		connect := s.connect
		s.connect = func(t testing.TB) net.Conn {
			conn := connect(t)
			// A message at the moment of the handshake response must reach the client.
			welcome := sync.OnceFunc(func() { s.hub.broadcast <- []byte("welcome") })
			conn.(*pipe).far.onWrite = func() error { welcome(); return nil }
			return conn
		}
		s.join(t).wantLines("welcome")
	})
}

func TestJoinedWhenDialReturnsOverTCP(t *testing.T) {
	watch(t, patience)
	s := tcpServer(t)
	for n := 0; n < 300 && !t.Failed(); n++ {
		p, want := s.join(t), fmt.Sprint("line ", n)
		s.hub.broadcast <- []byte(want)
		p.wantLines(want)
		p.Close()
	}
}

func TestMiddlewareNeedsNoMoreThanUnwrap(t *testing.T) {
	withServer(t, func(t *testing.T, s *server) {
		s.serve = func(w http.ResponseWriter, req *http.Request) { serveWs(s.hub, wrapped{w}, req) }
		p := s.join(t)
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
	serveWs(newHub(), rec, req)
	if rec.Code != http.StatusInternalServerError {
		t.Errorf("got status %d, want 500", rec.Code)
	}
	want := `: handshake refused: "feature not supported" (Origin "", Host "pipe")`
	if got := book.lines(); !slices.Equal(got, list(want)) {
		t.Errorf("the log is %q, want %q", got, want)
	}
}

func TestServeWsReturnsAfterTheHandshake(t *testing.T) {
	withServer(t, func(t *testing.T, s *server) {
		returned := make(chan bool)
		s.serve = func(w http.ResponseWriter, req *http.Request) {
			serveWs(s.hub, w, req)
			close(returned)
		}
		s.join(t)
		wait(t, returned, "serveWs")
	})
}

// Promise 2. One order: every client sees the same messages in the same order.

func TestAllClientsReceiveTheSameMessagesInTheSameOrder(t *testing.T) {
	withServer(t, func(t *testing.T, s *server) {
		const senders, each = 8, 50
		seen := make([][]string, senders)
		var peers []*peer
		for range senders {
			peers = append(peers, s.join(t))
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
				t.Errorf("client %d received %s, want %s", i, brief(seen[i]), brief(seen[0]))
			}
		}
		for i := range senders { // Each sender's lines come in its order, and none twice.
			own := slices.DeleteFunc(slices.Clone(seen[0]), func(line string) bool {
				return line[0] != byte('0'+i)
			})
			if len(own) != each || !slices.IsSorted(own) || len(slices.Compact(own)) != each {
				t.Errorf("client %d sent %s, want %d lines in order", i, brief(own), each)
			}
		}
	})
}

// Promise 3. A healthy client is never dropped because another one sends fast.
// The hub's backpressure is in hub_test.go.

func TestFloodDropsNoHealthyClient(t *testing.T) {
	withServer(t, func(t *testing.T, s *server) {
		const floods, each = 8, 3 * rateBurst
		var wg sync.WaitGroup
		var peers []*peer
		for range 2 * floods {
			peers = append(peers, s.join(t).unbuffered())
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
						t.Errorf("client %d got %d lines, then %v; want %d", i, n, err, floods*each)
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
		runWithServer(t, name, func(t *testing.T, s *server) {
			p := s.join(t).unbuffered()
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
					s.wantLogged(t)
				}
			}
			s.wantLogged(t, "pipe: rate limited: 1/10ms")
		})
	}
}

func TestTokenBucketRefillsWhileIdle(t *testing.T) {
	withServer(t, func(t *testing.T, s *server) {
		p := s.join(t).unbuffered()
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

// Promise 5. Any message or control frame from a peer, not only a pong, shows that it is
// alive. A message must be complete pongWait after it has begun.

func TestPeerTimesOutPongWaitAfterItsLastMessageOrControlFrame(t *testing.T) {
	type step struct {
		wait time.Duration
		sent []byte
	}
	const almost, quarter = pongWait - time.Nanosecond, pongWait / 4
	text, blank := encode(0x81, "x"), encode(0x81, "")
	ping, pong := encode(0x89, ""), encode(0x8a, "")
	begin, more, end := encode(0x01, "x"), encode(0x00, "x"), encode(0x80, "x")
	for _, test := range []struct {
		name   string
		steps  []step
		repeat step // done times times, after the steps
		times  int
		want   time.Duration
	}{
		{
			name: "nothing",
			want: pongWait,
		},
		{
			name:   "text",
			repeat: step{almost, text},
			times:  5,
			want:   5*almost + pongWait,
		},
		{
			name:   "blank text",
			repeat: step{almost, blank},
			times:  5,
			want:   5*almost + pongWait,
		},
		{
			name:   "text in two fragments",
			repeat: step{almost, slices.Concat(begin, end)},
			times:  5,
			want:   5*almost + pongWait,
		},
		{
			name:   "pings",
			repeat: step{almost, ping},
			times:  5,
			want:   5*almost + pongWait,
		},
		{
			name:   "pongs",
			repeat: step{almost, pong},
			times:  5,
			want:   5*almost + pongWait,
		},
		{
			name:   "pings after text",
			steps:  list(step{almost, text}),
			repeat: step{almost, ping},
			times:  5,
			want:   6*almost + pongWait,
		},
		{
			name:   "pongs after text",
			steps:  list(step{almost, text}),
			repeat: step{almost, pong},
			times:  5,
			want:   6*almost + pongWait,
		},
		{
			name:   "pongs after blank text",
			steps:  list(step{almost, blank}),
			repeat: step{almost, pong},
			times:  5,
			want:   6*almost + pongWait,
		},
		{
			name: "message that takes almost pongWait",
			steps: list(
				step{almost, begin},
				step{time.Second, ping},
				step{almost - time.Second, end},
			),
			want: 2*almost + pongWait,
		},
		{
			name:   "slowloris",
			steps:  list(step{quarter, begin}),
			repeat: step{time.Second, more},
			times:  100,
			want:   quarter + pongWait,
		},
		{
			name:   "slowloris with empty fragments",
			steps:  list(step{quarter, begin}),
			repeat: step{time.Second, encode(0x00, "")},
			times:  100,
			want:   quarter + pongWait,
		},
		{
			name:   "slowloris with pings",
			steps:  list(step{quarter, begin}),
			repeat: step{time.Second, slices.Concat(ping, more)},
			times:  100,
			want:   quarter + pongWait,
		},
		{
			name:   "slowloris with pongs",
			steps:  list(step{quarter, begin}),
			repeat: step{time.Second, slices.Concat(pong, more)},
			times:  100,
			want:   quarter + pongWait,
		},
	} {
		runWithServer(t, test.name, func(t *testing.T, s *server) {
			p := s.join(t)
			p.SetPingHandler(func(string) error { return nil })
			start := time.Now()
			go func() {
				repeated := slices.Repeat(list(test.repeat), test.times)
				for _, step := range slices.Concat(test.steps, repeated) {
					time.Sleep(step.wait)
					p.NetConn().Write(step.sent)
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
	withServer(t, func(t *testing.T, s *server) {
		front := *s.hub // It receives messages, and broadcasts none.
		front.broadcast = make(chan []byte)
		s.serveFor(&front)
		p := s.join(t)
		go io.Copy(io.Discard, p.NetConn())
		for range 3 {
			p.send("hello")
			time.Sleep(2 * pongWait)
			<-front.broadcast
			time.Sleep(pongWait / 2)
			p.write(encode(0x8a, ""))
		}
		s.wantLogged(t)
		if len(s.clients()) != 1 {
			t.Error("the client was dropped")
		}
	})
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

// withServer runs test in a bubble with a server.
func withServer(t *testing.T, test func(*testing.T, *server)) {
	inBubble(t, func(t *testing.T) { test(t, pipeServer(t)) })
}

// runWithServer runs test as a subtest, in a bubble with a server: its sleeps take no real time.
func runWithServer(t *testing.T, name string, test func(*testing.T, *server)) {
	t.Run(name, func(t *testing.T) { withServer(t, test) })
}

// A server is a running hub, its HTTP server, and the way to connect to it.
type server struct {
	hub     *Hub
	ended   chan struct{}    // closed when hub.run has returned
	serve   http.HandlerFunc // for /ws
	connect func(testing.TB) net.Conn
	log     *logBook
}

// serverURL is the URL of a server's WebSocket endpoint, over pipes or TCP.
const serverURL = "ws://pipe/ws"

// handshake is the header of a handshake request, without the final empty line.
const handshake = "GET /ws HTTP/1.1\r\nHost: pipe\r\n" +
	"Connection: Upgrade\r\nUpgrade: websocket\r\n" +
	"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"

// tcpServer starts a server on a loopback port.
func tcpServer(t testing.TB) *server {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// A pump may log after run has returned, and would write to the next test's log.
		isPump := func(stack string) bool { return strings.Contains(stack, ".(*Client).") }
		for slices.ContainsFunc(goroutines(), isPump) {
			runtime.Gosched()
		}
	})
	s := newServer(t, listener)
	s.connect = func(t testing.TB) net.Conn {
		t.Helper()
		conn, err := net.Dial("tcp", listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		return conn
	}
	return s
}

// pipeServer starts a server whose connections are pipes.
func pipeServer(t testing.TB) *server {
	t.Helper()
	listener := newPipeListener()
	s := newServer(t, listener)
	s.connect = listener.connect
	return s
}

// newServer starts a hub and, on listener, its HTTP server. The test's end stops both,
// and fails if run does not return.
func newServer(t testing.TB, listener net.Listener) *server {
	t.Helper()
	s := &server{hub: newHub(), ended: make(chan struct{}), log: captureLog(t)}
	s.serveFor(s.hub)
	mux := http.NewServeMux()
	mux.HandleFunc("/", serveHome)
	mux.HandleFunc("/ws", func(w http.ResponseWriter, req *http.Request) { s.serve(w, req) })
	httpServer := &httptest.Server{Listener: listener, Config: &http.Server{Handler: mux}}
	httpServer.Start()
	go func() {
		s.hub.run()
		select {
		case <-s.hub.stopped:
		default:
			t.Error("hub.run has returned, although the hub has not been stopped")
			s.hub.stop() // or every client would wait for it
		}
		close(s.ended)
	}()
	t.Cleanup(func() {
		s.hub.stop()
		s.wantEnd(t)
		httpServer.Close()
	})
	return s
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

// serveFor has peers served as clients of hub.
func (s *server) serveFor(hub *Hub) {
	s.serve = func(w http.ResponseWriter, req *http.Request) { serveWs(hub, w, req) }
}

// wantEnd waits until the hub, which has been stopped, has ended. Then the pumps
// of all clients have ended, too: the hub waits until each readPump is done, and
// readPump waits for writePump.
func (s *server) wantEnd(t testing.TB) {
	t.Helper()
	wait(t, s.ended, "hub.run")
}

// wantLogged waits until the bubble is idle, and checks that the log is want.
func (s *server) wantLogged(t testing.TB, want ...string) {
	t.Helper()
	synctest.Wait()
	if got := s.log.lines(); !slices.Equal(got, want) {
		t.Errorf("the log is %s, want %s", brief(got), brief(want))
	}
}

// broadcast broadcasts lines, one after the other, and waits until the bubble is idle.
func (s *server) broadcast(lines ...string) {
	for _, line := range lines {
		s.hub.broadcast <- []byte(line)
		synctest.Wait()
	}
}

// clients waits until the bubble is idle, and returns the hub's clients.
func (s *server) clients() (clients []*Client) {
	synctest.Wait()
	s.hub.do(func() { clients = slices.Collect(maps.Keys(s.hub.clients)) })
	return clients
}

// dialer returns a dialer that connects to the server. It offers compression, which the
// server must not accept: each connection would keep a window for it.
func (s *server) dialer(t testing.TB) *websocket.Dialer {
	return &websocket.Dialer{
		EnableCompression: true,
		HandshakeTimeout:  patience,
		NetDialContext: func(context.Context, string, string) (net.Conn, error) {
			return s.connect(t), nil
		},
	}
}

// join connects a client, until the test ends.
func (s *server) join(t testing.TB, subprotocols ...string) *peer {
	t.Helper()
	dialer := s.dialer(t)
	dialer.Subprotocols = subprotocols
	conn, _, err := dialer.Dial(serverURL, nil)
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

// pipe returns its connection, if the server is a pipeServer.
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
		p.t.Errorf("sending %s failed with %v", brief(text), err)
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
// returns the lines before that.
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
			p.t.Errorf("after %d lines got %v, want %v", len(lines), err, want)
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
	if n != 0 || err != io.EOF {
		p.t.Errorf("after the close frame got %d bytes and %v, want the end of TCP", n, err)
	}
	if got := p.pipe().far.isClosed(); got != both {
		p.t.Errorf("the server has closed both directions of TCP: %v, want %v", got, both)
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
	unread          []byte       // received from far
	window          int          // with more than this unread, far waits when it writes
	ended           bool         // far has closed its direction
	closed          bool
	readBy, writeBy deadline
}

// A deadline has one timer, as net.Conn's do: if a bubble has many that are due at the same
// time, two may run at once, which can crash the race detector (go.dev/issue/78156).
type deadline struct {
	time.Time
	timer *time.Timer
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
func (p *pipe) await(by *deadline, done func() bool) error {
	for {
		switch {
		case p.closed:
			return net.ErrClosed
		case p.reset:
			return errReset
		case !by.IsZero() && !time.Now().Before(by.Time):
			return os.ErrDeadlineExceeded
		case done():
			return nil
		}
		p.changed.Wait()
	}
}

func (p *pipe) Read(b []byte) (n int, err error) {
	p.do(func() {
		err = p.await(&p.readBy, func() bool { return len(p.unread) > 0 || p.ended })
		if err != nil {
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
func (p *pipe) setDeadline(by *deadline, t time.Time) error {
	p.do(func() {
		if by.timer != nil {
			by.timer.Stop()
		}
		by.Time = t
		if wait := time.Until(t); wait > 0 {
			by.timer = time.AfterFunc(wait, func() { p.do(func() {}) })
		}
	})
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
	client, far := newPipes()
	select {
	case l.conns <- far:
	case <-l.closed:
		t.Error("the server is not listening")
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

// Fuzzing: whatever a client sends, the others receive only clean lines.

func FuzzMessage(f *testing.F) {
	f.Add(true, []byte("hello"))
	f.Add(false, []byte("hello"))
	f.Add(true, []byte(" \x00\u0085\u00a0\n\xff"))
	f.Add(true, bytes.Repeat([]byte("x"), maxMessageSize+1))
	s := tcpServer(f)
	other := s.join(f)
	f.Fuzz(func(t *testing.T, text bool, message []byte) {
		first := byte(0x82)
		if text {
			first = 0x81
		}
		s.fuzz(t, other, append(encode(first, string(message)), encode(0x88, "")...))
	})
}

func FuzzBytes(f *testing.F) {
	f.Add(encode(0x81, "hello"))
	f.Add(append(encode(0x01, "hel"), encode(0x80, "lo")...))
	f.Add(append(encode(0x89, "ping"), encode(0x88, "\x03\xe8bye")...))
	f.Add([]byte{0x81, 0xff, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0})
	s := tcpServer(f)
	other := s.join(f)
	f.Fuzz(func(t *testing.T, sent []byte) { s.fuzz(t, other, sent) })
}

// fuzz has a client send bytes, and checks what other receives.
func (s *server) fuzz(t *testing.T, other *peer, sent []byte) {
	t.Helper()
	watch(t, patience)
	p := s.join(t)
	p.write(sent)
	p.NetConn().(*net.TCPConn).CloseWrite()
	for err := error(nil); err == nil; {
		_, err = p.read(patience)
	}
	// The end is longer than any client's message.
	end := strings.Repeat("end", maxMessageSize)
	s.hub.broadcast <- []byte(end)
	for {
		lines, err := other.read(patience)
		if err != nil {
			other.Close() // so that what follows fails at once
			t.Fatalf("the other client's connection ended with %v", err)
		}
		for _, line := range lines {
			if line == end {
				return
			}
			if !utf8.ValidString(line) || line == "" || line != strings.TrimSpace(line) ||
				len(line) > maxMessageSize || strings.ContainsFunc(line, unicode.IsControl) {
				t.Errorf("the other client receives %q", line)
			}
		}
	}
}
