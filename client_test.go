package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
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

// The tests stand in the order of what they show: what happens on the wire, the
// seven promises, the process, the page, and a storm that tries all of it at
// once. What needs only a Hub is in hub_test.go. Then comes the rig, and after it
// fuzzing and benchmarks.

// The figures that people rely on; all other tests ask the constants.

func TestFiguresAreThePromisedOnes(t *testing.T) {
	for name, test := range map[string]struct{ got, want any }{
		"writeWait":      {writeWait, 10 * time.Second},
		"pongWait":       {pongWait, time.Minute},
		"pingPeriod":     {pingPeriod, 54 * time.Second},
		"maxMessageSize": {maxMessageSize, 512},
		"sendQueueSize":  {sendQueueSize, 256},
		"maxBatchSize":   {maxBatchSize, 32767},
		"rateBurst":      {rateBurst, 128},
		"rateInterval":   {rateInterval, time.Second / 100},
		"breather":       {breather, time.Millisecond},
		"closeWait":      {closeWait, time.Second},
		"shutdownWait":   {shutdownWait, 5 * time.Second},
		"newline":        {string(newline), "\n"},
		"addr":           {*addr, ":8080"},
	} {
		if test.got != test.want {
			t.Errorf("%s is %v, want %v", name, test.got, test.want)
		}
	}
}

// On the wire, in: one WebSocket text message is one chat message, at most 512
// bytes. Control characters become spaces; surrounding white space goes; what is
// then empty is not broadcast.

func TestMessageBecomesOneCleanLine(t *testing.T) {
	p := tcpRoom(t).join(t)
	tests := []struct{ sent, want string }{
		{"plain", "plain"},
		{"  around\t\r\n", "around"},
		{"one\ntwo\r\nthree", "one two  three"},
		{"\x1b[2J\x07bell\x00\x7f", "[2J bell"},
		{"C1 \u009b31m and \u0085 next line", "C1  31m and   next line"},
		{"\u00a0\u3000grüße, 世界 👋🏽\u2003", "grüße, 世界 👋🏽"},
		{"<b>not markup</b>", "<b>not markup</b>"},
		{strings.Repeat("x", 512), strings.Repeat("x", 512)},
	}
	for _, test := range tests {
		p.say(test.sent)
		p.wantLines(test.want)
	}
}

func TestBlankMessageIsNotBroadcast(t *testing.T) {
	p := tcpRoom(t).join(t)
	for _, blank := range []string{"", " ", "\n", "\x00\x1b\u0085", "\u00a0\u2003"} {
		p.say(blank)
	}
	p.say("something")
	p.wantLines("something")
}

// On the wire, out: one WebSocket text message is one or more chat messages
// joined by '\n', in one frame, below 32 KiB.

func TestQueuedMessagesAreJoinedInFramesBelow32KiB(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := pipeRoom(t)
		p := r.join(t)
		var want []string
		for n := range 1 + sendQueueSize { // One is with writePump.
			want = append(want, fmt.Sprintf("%0*d", maxMessageSize, n))
			r.say(want[n])
		}
		r.hub.stop()
		var got []string
		var frames []frame
		for {
			f, err := p.readFrame(patience)
			if err != nil || f.first != 0x81 {
				break
			}
			if len(f.payload) >= 32<<10 {
				t.Errorf("frame %d has %d bytes, want less than 32 KiB", len(frames), len(f.payload))
			}
			frames = append(frames, f)
			got = append(got, strings.Split(string(f.payload), "\n")...)
		}
		if !slices.Equal(got, want) {
			t.Errorf("got %d lines that differ from the %d sent", len(got), len(want))
		}
		if want := 1 + (sendQueueSize*(maxMessageSize+1)+maxBatchSize-1)/maxBatchSize; len(frames) != want {
			t.Errorf("they came in %d frames, want %d", len(frames), want)
		}
	})
}

func TestBatchIsFilledToTheLastByte(t *testing.T) {
	// These 62 leave 962 bytes, which hold a newline, 448 bytes, another newline
	// and a message of the greatest length, and not one byte more.
	const most = maxBatchSize/(maxMessageSize+1) - 1
	for gap, want := range map[int]int{448: most + 2, 449: most + 1} {
		t.Run(fmt.Sprint(gap), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := pipeRoom(t)
				p := r.join(t)
				r.say("writePump is busy with this")
				for range most {
					r.say(strings.Repeat("x", maxMessageSize))
				}
				r.say(strings.Repeat("x", gap), strings.Repeat("x", maxMessageSize))
				p.wantLines("writePump is busy with this")
				lines, err := p.read(patience)
				if len(lines) != want {
					t.Errorf("got %d lines in one message, and %v, want %d lines", len(lines), err, want)
				}
			})
		})
	}
}

// A client that asks for the subprotocol heartbeat gets an empty text message
// with every ping; who does not ask gets none.

func TestWhoAsksForHeartbeatsGetsAnEmptyMessageWithEachPing(t *testing.T) {
	quiet := []string{`10s text "hello"`, `54s ping ""`, `1m48s ping ""`}
	lively := []string{`10s text "hello"`, `54s ping ""`, `54s text ""`, `1m48s ping ""`, `1m48s text ""`}
	for subprotocol, want := range map[string][]string{"": quiet, "other": quiet, "heartbeat": lively} {
		t.Run(subprotocol, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := pipeRoom(t)
				p := r.join(t, strings.Fields(subprotocol)...)
				if got, want := p.Subprotocol() == "heartbeat", subprotocol == "heartbeat"; got != want {
					t.Errorf("the server chose %q", p.Subprotocol())
				}
				start := time.Now()
				time.AfterFunc(10*time.Second, func() { r.say("hello") })
				var got []string
				for {
					f, err := p.readFrame(time.Until(start.Add(3*pingPeriod - 1)))
					if err != nil {
						break
					}
					got = append(got, fmt.Sprint(time.Since(start), " ", f))
					p.NetConn().Write(encode(0x8a, "")) // a pong
				}
				if !slices.Equal(got, want) {
					t.Errorf("got %q, want %q", got, want)
				}
			})
		})
	}
}

// RFC 6455: a chat with one client is an echo server.

func TestFramesAreAnsweredAsRFC6455Says(t *testing.T) {
	const bye, byeBack = "\x03\xe8", `close 1000 ""`
	hello, helloBack := encode(0x81, "hello"), `text "hello"`
	closing := func(code int, text string) []byte {
		return encode(0x88, string(binary.BigEndian.AppendUint16(nil, uint16(code)))+text)
	}
	type test struct {
		name string
		sent [][]byte // a close frame with 1000 is sent after that
		want []string // the end of TCP is expected after that
	}
	tests := []test{
		// Section 5.2: base framing.
		{"5.2 text", list(hello), list(helloBack, byeBack)},
		{"5.2 length of 125", list(encode(0x81, strings.Repeat("x", 125))), list(`text "`+strings.Repeat("x", 125)+`"`, byeBack)},
		{"5.2 length of 126", list(encode(0x81, strings.Repeat("x", 126))), list(`text "`+strings.Repeat("x", 126)+`"`, byeBack)},
		{"5.2 RSV1", list(encode(0xc1, "x")), list(`close 1002 "RSV1 set"`)},
		{"5.2 RSV2", list(encode(0xa1, "x")), list(`close 1002 "RSV2 set"`)},
		{"5.2 RSV3", list(encode(0x91, "x")), list(`close 1002 "RSV3 set"`)},
		{"5.2 all wrong at once", list([]byte{0x7f, 0x7f}), list(`close 1002 "RSV1 set, RSV2 set, RSV3 set, bad opcode 15, bad MASK"`)},
		{"5.2 negative length", list([]byte{0x81, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}), list(`close 1002 "websocket: read limit exceeded"`)},
		{"5.2 HTTP", list([]byte("GET / HTTP/1.1\r\n\r\n")), list(`close 1002 "RSV1 set, bad opcode 7, bad MASK"`)},
		// A sender must use the shortest form, but a receiver need not insist.
		{"5.2 16 bits for a short length", list([]byte{0x81, 0xfe, 0, 1, 0, 0, 0, 0, 'x'}), list(`text "x"`, byeBack)},
		{"5.2 64 bits for a short length", list([]byte{0x81, 0xff, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 'x'}), list(`text "x"`, byeBack)},

		// Sections 5.1 and 5.3: masking.
		{"5.1 not masked", list([]byte{0x81, 1, 'x'}), list(`close 1002 "bad MASK"`)},
		{"5.3 masked", list([]byte{0x81, 0x85, 0x37, 0xfa, 0x21, 0x3d, 0x7f, 0x9f, 0x4d, 0x51, 0x58}), list(`text "Hello"`, byeBack)},

		// Section 5.4: fragmentation.
		{"5.4 two fragments", list(encode(0x01, "hel"), encode(0x80, "lo")), list(helloBack, byeBack)},
		{"5.4 empty fragments", list(encode(0x01, ""), encode(0x00, "hello"), encode(0x00, ""), encode(0x80, "")), list(helloBack, byeBack)},
		{"5.4 a ping in between", list(encode(0x01, "hel"), encode(0x89, "?"), encode(0x80, "lo")), list(`pong "?"`, helloBack, byeBack)},
		{"5.4 a close in between", list(encode(0x01, "hel"), closing(1000, "")), list(byeBack)},
		{"5.4 continuation of nothing", list(encode(0x80, "x")), list(`close 1002 "continuation after FIN"`)},
		{"5.4 text within a text", list(encode(0x01, "x"), hello), list(`close 1002 "data before FIN"`)},
		{"5.4 too long together", list(encode(0x01, strings.Repeat("x", 300)), encode(0x80, strings.Repeat("x", 300))), list(`close 1009 "send at most 512 bytes in a message"`)},

		// Section 5.5: control frames.
		{"5.5 fragmented ping", list(encode(0x09, "x")), list(`close 1002 "FIN not set on control"`)},
		{"5.5 ping of 126 bytes", list(encode(0x89, strings.Repeat("x", 126))), list(`close 1002 "len > 125 for control"`)},
		{"5.5.1 close without a code", list(encode(0x88, "")), list(`close`)},
		// Half a code is wrong, but gorilla/websocket takes it for none.
		{"5.5.1 close with half a code", list(encode(0x88, "\x03")), list(`close`)},
		{"5.5.1 close with a reason", list(closing(1000, "good night")), list(`close 1000 "good night"`)},
		{"5.5.1 reason that is not UTF-8", list(closing(1000, "\xff")), list(`close 1002 "invalid utf8 payload in close frame"`)},
		{"5.5.1 text after the close", list(closing(1000, ""), hello), list(byeBack)},
		{"5.5.1 ping after the close", list(closing(1000, ""), encode(0x89, "?")), list(byeBack)},
		{"5.5.1 text before the close", list(hello, closing(1000, "")), list(helloBack, byeBack)},
		{"5.5.2 ping", list(encode(0x89, "")), list(`pong ""`, byeBack)},
		{"5.5.2 ping of 125 bytes", list(encode(0x89, strings.Repeat("x", 125))), list(`pong "`+strings.Repeat("x", 125)+`"`, byeBack)},
		{"5.5.3 pong that nobody asked for", list(encode(0x8a, "x")), list(byeBack)},

		// Section 5.6 and 8.1: data.
		{"5.6 binary", list(encode(0x82, "x")), list(`close 1003 "send text messages, not binary ones"`)},
		{"5.6 fragmented binary", list(encode(0x02, "x"), encode(0x80, "x")), list(`close 1003 "send text messages, not binary ones"`)},
		{"8.1 character over two fragments", list(encode(0x01, "\xc3"), encode(0x80, "\xa9")), list(`text "é"`, byeBack)},
		{"8.1 first and last of each length", list(encode(0x81, "\u00a1\u07ff\u0800\uffff\U00010000\U0010ffff.")), list(fmt.Sprintf("text %q", "\u00a1\u07ff\u0800\uffff\U00010000\U0010ffff."), byeBack)},
	}
	for _, opcode := range []byte{3, 4, 5, 6, 7, 11, 12, 13, 14, 15} {
		tests = append(tests, test{fmt.Sprintf("5.2 opcode %d", opcode), list(encode(0x80|opcode, "")), list(fmt.Sprintf(`close 1002 "bad opcode %d"`, opcode))})
	}
	for _, bad := range []string{"\xff", "\xc3", "\xc0\xaf", "\xed\xa0\x80", "\xf4\x90\x80\x80", "\x80", "\xe2\x82"} {
		tests = append(tests, test{fmt.Sprintf("8.1 %q is not UTF-8", bad), list(encode(0x81, "x"+bad)), list(`close 1007 "send text as valid UTF-8"`)})
	}
	for _, code := range []int{1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 3000, 3999, 4000, 4999} {
		tests = append(tests, test{fmt.Sprint("7.4 close ", code), list(closing(code, "why")), list(fmt.Sprintf(`close %d "why"`, code))})
	}
	for _, code := range []int{0, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535} {
		tests = append(tests, test{fmt.Sprint("7.4 close ", code), list(closing(code, "why")), list(fmt.Sprintf(`close 1002 "bad close code %d"`, code))})
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := pipeRoom(t).join(t)
				go p.NetConn().Write(append(slices.Concat(test.sent...), encode(0x88, bye)...))
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
			})
		})
	}
}

// On the wire, when things go wrong: the one who caused it gets a close code and
// a reason, also when it is in the middle of sending; when both have said goodbye
// TCP ends at once, and everyone else sees nothing.

// offences are what a client can do to be sent away.
var offences = []struct {
	name string
	sent []byte
	want *goodbye
}{
	{"binary", encode(0x82, "text all the same"), notText},
	{"not UTF-8", encode(0x81, "abc\xff\xfe\xfd"), notUTF8},
	{"one byte too long", encode(0x81, strings.Repeat("x", maxMessageSize+1)), tooBig},
	{"2 MB", encode(0x81, strings.Repeat("x", 2<<20)), tooBig},
	{"against the protocol", encode(0x8f, ""), &goodbye{Code: 1002, Text: "bad opcode 15"}},
}

// much is 2 MB in many messages: more than TCP holds for somebody who does not
// read. some is enough for a pipe, which holds nothing, and more than the allowed
// rate takes in closeWait.
var (
	much = bytes.Repeat(encode(0x81, strings.Repeat("x", 122)), 2<<20/128)
	some = much[:100<<10]
)

func TestOffenderAloneIsSentAwayAndReadsWhy(t *testing.T) {
	for _, offence := range offences {
		for _, busy := range []bool{false, true} {
			for _, sends := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s,busy=%v,sends=%v", offence.name, busy, sends), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						r := pipeRoom(t)
						offender, other := r.join(t), r.join(t)
						start := time.Now()
						var said []string
						if busy {
							said = []string{"one", "two", "three"}
							r.say(said...) // Nobody has read it when the offence comes.
						}
						sent := offence.sent
						if sends {
							sent = append(slices.Clip(sent), some...)
						}
						written := make(chan error, 1)
						go func() {
							_, err := offender.NetConn().Write(sent)
							written <- err
						}()
						if sends && offence.want.Code != 1002 {
							// It reads only when it has written: gorilla/websocket
							// cannot get its 1002 out meanwhile.
							if err := <-written; err != nil {
								t.Errorf("what was being sent failed with %v", err)
							}
						}
						lines := offender.wantGoodbye(offence.want)
						if offence.want.Code != 1002 && !slices.Equal(lines, said) {
							t.Errorf("before the goodbye came %q, want %q", lines, said)
						}
						offender.wantEnd()
						if got := time.Since(start); got != 0 {
							t.Errorf("all this took %v, want no time", got)
						}
						offender.Close()

						r.say("still here")
						other.wantLines(append(said, "still here")...)
						if got, want := r.log.String(), fmt.Sprintf("pipe: dropped with %q\n", offence.want.Error()); !strings.HasSuffix(got, want) && offence.want.Code != 1002 {
							t.Errorf("the log is %q, want %q in it", got, want)
						}
						if got, want := r.log.String(), fmt.Sprintf("pipe: dropped with \"websocket: close %d ", offence.want.Code); strings.Count(got, want) != 1 {
							t.Errorf("the log is %q, want %q in it once", got, want)
						}
					})
				})
			}
		}
	}
}

func TestOffenderReadsWhyOverTCPAlsoWhileItSends(t *testing.T) {
	r := tcpRoom(t)
	for _, offence := range offences {
		t.Run(offence.name, func(t *testing.T) {
			for n := 0; n < 10 && !t.Failed(); n++ {
				p := r.join(t)
				p.write(offence.sent)
				p.write(much)
				p.wantGoodbye(offence.want)
				p.wantEnd()
				p.Close()
			}
		})
	}
}

func TestOffenderThatHasStoppedWritingReadsWhy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := pipeRoom(t)
		p := r.join(t)
		r.say("this is not read yet")
		p.write(encode(0x82, ""))
		p.NetConn().(*pipe).CloseWrite()
		synctest.Wait()
		p.wantGoodbye(notText)
		p.wantEnd()
	})
}

func TestOffenderThatNeverAnswersIsCutOffAfterCloseWait(t *testing.T) {
	for _, offence := range offences {
		t.Run(offence.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := pipeRoom(t).join(t)
				p.SetCloseHandler(func(int, string) error { return nil })
				p.write(offence.sent)
				p.wantGoodbye(offence.want)
				start := time.Now()
				_, err := io.Copy(io.Discard, p.NetConn())
				for err == nil && time.Since(start) < 2*closeWait { // The server may have closed its half before.
					time.Sleep(time.Millisecond)
					_, err = p.NetConn().Write(encode(0x8a, ""))
				}
				if got := time.Since(start); got < closeWait || got > closeWait+time.Millisecond {
					t.Errorf("the connection ended %v after the goodbye, want %v", got, closeWait)
				}
			})
		})
	}
}

func TestClosesAreFollowedByTheEndOfTCPAtOnce(t *testing.T) {
	tests := []struct {
		name string
		end  func(*room, *peer)
		want *goodbye
	}{
		{"the peer goes", func(_ *room, p *peer) { p.write(encode(0x88, "\x03\xe8")) }, &goodbye{Code: 1000}},
		{"the peer's tab is closed", func(_ *room, p *peer) { p.write(encode(0x88, "\x03\xe9")) }, &goodbye{Code: 1001}},
		{"the peer goes without a word", func(_ *room, p *peer) { p.write(encode(0x88, "")) }, &goodbye{Code: 1005}},
		{"the server sends it away", func(r *room, _ *peer) { r.hub.unregister <- r.clients()[0] }, unregistered},
		{"the server shuts down", func(r *room, _ *peer) { r.hub.stop() }, shuttingDown},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := pipeRoom(t)
				p := r.join(t)
				start := time.Now()
				test.end(r, p)
				p.wantGoodbye(test.want)
				p.wantEnd()
				if got := time.Since(start); got != 0 {
					t.Errorf("it took %v, want no time", got)
				}
				if got := r.log.String(); got != "" {
					t.Errorf("the log is %q, want nothing in it", got)
				}
			})
		})
	}
}

func TestClientThatDoesNotReadIsToldToTryAgainLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := pipeRoom(t)
		stuck := r.join(t)
		var want []string
		for n := range 1 + sendQueueSize { // One is with writePump.
			want = append(want, fmt.Sprint("message ", n))
			r.say(want[n])
		}
		r.say("one too many")
		if got := stuck.wantGoodbye(fellBehind); !slices.Equal(got, want) {
			t.Errorf("got %q, want %q", got, want)
		}
		synctest.Wait()
		if got, want := r.log.String(), fellBehind.Error(); !strings.Contains(got, want) {
			t.Errorf("the log is %q, want %q in it", got, want)
		}
	})
}

func TestClientThatNeverReadsIsCutOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := pipeRoom(t)
		p := r.join(t)
		r.say("nobody takes this")
		start := time.Now()
		var err error
		for err == nil && time.Since(start) < 2*writeWait { // It lives, but does not read.
			time.Sleep(100 * time.Millisecond)
			_, err = p.NetConn().Write(encode(0x8a, ""))
		}
		if got, least := time.Since(start), writeWait+closeWait; got < least || got > least+200*time.Millisecond {
			t.Errorf("it was cut off after %v, want %v", got, least)
		}
		synctest.Wait()
		if got, want := r.log.String(), fellBehind.Error(); !strings.Contains(got, want) {
			t.Errorf("the log is %q, want %q in it", got, want)
		}
	})
}

func TestSilentPeerIsToldSoAfterPongWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := pipeRoom(t)
		p := r.join(t)
		p.SetPingHandler(func(string) error { return nil })
		p.SetCloseHandler(func(int, string) error { return nil })
		start := time.Now()
		p.wantGoodbyeWithin(2*pongWait, tooSlow)
		p.write(encode(0x88, "\x03\xf0")) // It finds somebody who reads it.
		p.wantEnd()
		if got := time.Since(start); got != pongWait {
			t.Errorf("it was dropped after %v, want %v", got, pongWait)
		}
		if got, want := r.log.String(), tooSlow.Error(); !strings.Contains(got, want) {
			t.Errorf("the log is %q, want %q in it", got, want)
		}
	})
}

func TestPeerThatDoesNotTakeTheHandshakeIsDroppedAfterWriteWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := pipeRoom(t)
		conn := r.connect(t)
		defer conn.Close()
		start := time.Now()
		fmt.Fprintf(conn, "%s\r\n", handshake)
		client := r.clients()[0]
		for range client.send { // Closed when the hub has dropped it.
		}
		if got := time.Since(start); got != writeWait {
			t.Errorf("it was dropped after %v, want %v", got, writeWait)
		}
		if _, err := conn.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("reading from the server gives %v, want %v", err, io.EOF)
		}
		r.hub.stop()
		r.wantEnd(t)
	})
}

func TestDrippingMessageIsDroppedPongWaitAfterItBegan(t *testing.T) {
	const before = 10 * time.Second
	for name, drip := range map[string][]byte{
		"bytes":     encode(0x00, "x"),
		"nothing":   encode(0x00, ""),
		"and pings": append(encode(0x89, ""), encode(0x00, "x")...),
		"and pongs": append(encode(0x8a, ""), encode(0x00, "x")...),
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := pipeRoom(t).join(t)
				p.SetPingHandler(func(string) error { return nil })
				start := time.Now()
				time.Sleep(before)
				var dripping sync.WaitGroup
				dripping.Go(func() {
					_, err := p.NetConn().Write(encode(0x01, "a"))
					for err == nil {
						time.Sleep(time.Second)
						_, err = p.NetConn().Write(drip)
					}
				})
				p.wantGoodbyeWithin(2*pongWait, tooSlow)
				if got, want := time.Since(start), before+pongWait; got != want {
					t.Errorf("it was dropped after %v, want %v", got, want)
				}
				p.Close()
				dripping.Wait()
			})
		})
	}
}

func TestSlowMessageHasPongWaitToArrive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := pipeRoom(t).join(t)
		time.Sleep(pingPeriod - time.Second)
		p.write(encode(0x01, "slow "))
		time.Sleep(time.Second / 2)
		p.write(encode(0x89, ""))
		p.readFrame(patience)
		p.readFrame(patience) // its pong, and our ping
		time.Sleep(pongWait - 2*time.Second)
		p.write(encode(0x80, "but whole"))
		p.wantLines("slow but whole")
	})
}

func TestPongWaitsForAStalledPeer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := pipeRoom(t)
		p := r.join(t)
		r.say("this is not read yet")
		p.write(encode(0x89, "are you there?"))
		time.Sleep(writeWait - time.Second)
		for _, want := range []string{`text "this is not read yet"`, `pong "are you there?"`} {
			if f, err := p.readFrame(patience); err != nil || f.String() != want {
				t.Errorf("got %v, %v, want %s", f, err, want)
			}
		}
		p.say("still here")
		p.wantLines("still here")
	})
}

func TestProtocolErrorReachesAStalledPeer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := pipeRoom(t)
		p := r.join(t)
		r.say("this is not read yet")
		p.write(encode(0x8f, ""))
		time.Sleep(writeWait - time.Second)
		lines := p.wantGoodbye(&goodbye{Code: 1002, Text: "websocket: bad opcode 15"})
		if want := []string{"this is not read yet"}; !slices.Equal(lines, want) {
			t.Errorf("got %q, want %q", lines, want)
		}
	})
}

func TestRequestThatIsNoHandshakeIsRefused(t *testing.T) {
	r := pipeRoom(t)
	other := r.join(t)
	tests := []struct {
		name, request string
		want          int
	}{
		{"handshake", handshake, http.StatusSwitchingProtocols},
		{"own origin", handshake + "Origin: http://pipe\r\n", http.StatusSwitchingProtocols},
		{"foreign origin", handshake + "Origin: http://example.com\r\n", http.StatusForbidden},
		{"no upgrade", "GET /ws HTTP/1.1\r\nHost: pipe\r\n", http.StatusBadRequest},
		{"no key", regexp.MustCompile("Sec-WebSocket-Key.*\r\n").ReplaceAllString(handshake, ""), http.StatusBadRequest},
		{"POST", strings.Replace(handshake, "GET", "POST", 1), http.StatusMethodNotAllowed},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			conn := r.connect(t)
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(patience))
			go fmt.Fprintf(conn, "%s\r\n", test.request)
			response, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil {
				t.Fatal(err)
			}
			if response.StatusCode != test.want {
				t.Errorf("got status %d, want %d", response.StatusCode, test.want)
			}
		})
	}
	r.hub.broadcast <- []byte("still here")
	other.wantLines("still here")
}

func TestFailedHandshakeLeavesNothingInTheHub(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hub, _ := startHub(t)
		serveWs(hub, httptest.NewRecorder(), httptest.NewRequest("GET", "/ws", nil))
		synctest.Wait()
		if got := len(hub.clients); got != 0 {
			t.Errorf("the hub has %d clients, want none", got)
		}
	})
}

func TestGoodbyesCanBeSent(t *testing.T) {
	for _, why := range []*goodbye{shuttingDown, unregistered, notText, notUTF8, tooBig, tooSlow, fellBehind} {
		if payload := websocket.FormatCloseMessage(why.Code, why.Text); why.Text == "" || len(payload) > 125 {
			t.Errorf("%v has a payload of %d bytes, want at most 125, and a reason in it", why, len(payload))
		}
	}
}

// A close reason, a URL and whatever else a peer chooses is logged so that it can
// neither end a line of the log nor drive a terminal.

const evil = "x\n2026/11/23 10:00:00 10.0.0.1: forged\x1b[2J\u009b31m"

func TestPeerCannotForgeALineOfTheLog(t *testing.T) {
	tests := map[string]func(*testing.T, *room){
		"close reason": func(t *testing.T, r *room) {
			p := r.join(t)
			p.write(encode(0x88, "\x0f\xa0"+evil))
			p.wantGoodbye(&goodbye{Code: 4000, Text: evil})
		},
		"URL": func(t *testing.T, r *room) {
			conn := r.connect(t)
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(patience))
			fmt.Fprintf(conn, "GET /?\u009b31m%%0a%%1b HTTP/1.1\r\nHost: pipe\r\n\r\n")
			http.ReadResponse(bufio.NewReader(conn), nil)
		},
		"handshake": func(t *testing.T, r *room) {
			conn := r.connect(t)
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(patience))
			fmt.Fprintf(conn, "%sOrigin: http://\u009b31m\r\n\r\n", handshake)
			http.ReadResponse(bufio.NewReader(conn), nil)
		},
	}
	for name, do := range tests {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := pipeRoom(t)
				do(t, r)
				synctest.Wait()
				got := r.log.String()
				line, end := strings.CutSuffix(got, "\n")
				if !end || strings.ContainsFunc(line, unicode.IsControl) || !strings.Contains(line, "pipe: ") {
					t.Errorf("the log is %q, want one line with the peer's address", got)
				}
			})
		})
	}
}

func TestVanishedPeerIsLogged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := pipeRoom(t)
		r.join(t).Close()
		synctest.Wait()
		if got, want := r.log.String(), `pipe: left with "websocket: close 1006 (abnormal closure): unexpected EOF"`; !strings.Contains(got, want) {
			t.Errorf("the log is %q, want %q in it", got, want)
		}
	})
}

func TestHalfClosedPeerIsNotSent1006(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := pipeRoom(t).join(t)
		p.NetConn().(*pipe).CloseWrite()
		if f, err := p.readFrame(patience); err != io.EOF {
			t.Errorf("got %v, %v, want the end of TCP", f, err)
		}
	})
}

// Promise 1. Joined when Dial returns: a message sent by anyone after a client's
// handshake succeeded reaches that client.

func TestClientIsInTheRoomBeforeItsHandshakeSucceeds(t *testing.T) {
	r := pipeRoom(t)
	var welcome sync.Once
	r.serve = func(w http.ResponseWriter, req *http.Request) {
		// What is said at the moment at which the handshake is answered has to
		// reach the client.
		serveWs(r.hub, onWrite{w, func() {
			welcome.Do(func() { r.hub.broadcast <- []byte("welcome") })
		}}, req)
	}
	r.join(t).wantLines("welcome")
}

// Promise 2. One order: every client sees the same messages in the same order.

func TestEverybodySeesTheSameMessagesInTheSameOrder(t *testing.T) {
	const senders, each = 8, 50
	r := tcpRoom(t)
	var peers []*peer
	for range senders {
		peers = append(peers, r.join(t))
	}
	seen := make([][]string, senders)
	var wg sync.WaitGroup
	for i, p := range peers {
		wg.Go(func() {
			for n := range each {
				p.say(fmt.Sprintf("%d says %d", i, n))
			}
		})
		wg.Go(func() { seen[i] = p.lines(senders * each) })
	}
	wg.Wait()
	for i := range seen {
		if !slices.Equal(seen[i], seen[0]) {
			t.Errorf("client %d saw %q, client 0 saw %q", i, seen[i], seen[0])
		}
	}
	slices.Sort(seen[0])
	if got := len(slices.Compact(seen[0])); got != senders*each {
		t.Errorf("%d different lines, want %d", got, senders*each)
	}
}

// Promise 3. A healthy client is never dropped because somebody else sends fast.
// That the hub pauses is shown in hub_test.go.

func TestFloodDropsNoHealthyReader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const floods, each = 8, 3 * rateBurst
		r := pipeRoom(t)
		var peers []*peer
		for range 2 * floods {
			peers = append(peers, r.join(t))
		}
		var wg sync.WaitGroup
		for i, p := range peers {
			if i < floods {
				wg.Go(func() {
					for range each {
						p.say("and another thing")
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
					time.Sleep(breather / 2) // as long as a batch is on its way
				}
			})
		}
		wg.Wait()
	})
}

func TestSenderIsSlowedToItsRateAndNeverDropped(t *testing.T) {
	for name, sent := range map[string][]byte{
		"messages":       encode(0x81, "flood"),
		"blank messages": encode(0x81, ""),
		"pings":          encode(0x89, "flood"),
		"pongs":          encode(0x8a, "flood"),
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := pipeRoom(t).join(t)
				go io.Copy(io.Discard, p.NetConn())
				start := time.Now()
				for n := range 1000 {
					// A pipe buffers nothing: this returns when readPump has read.
					p.write(sent)
					synctest.Wait()
					// After the burst, the pump sleeps before it reads the next.
					want := rateInterval * time.Duration(max(0, n-rateBurst))
					if got := time.Since(start); got != want {
						t.Fatalf("frame %d was read after %v, want %v", n+1, got, want)
					}
				}
			})
		})
	}
}

func TestBurstComesBackAfterSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := pipeRoom(t).join(t)
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
		time.Sleep(rateBurst * rateInterval / 2)
		if got, want := burst(), rateBurst*rateInterval/2-rateInterval; got != want {
			t.Errorf("a burst after half the silence took %v, want %v", got, want)
		}
	})
}

// Promise 4. A stuck client costs the room only that bounded pause until its
// queue is full, and nothing after: in hub_test.go.

// Promise 5. Any message or control frame from a peer, not only a pong, shows that
// it lives.

func TestAnyMessageOrControlFrameShowsThatThePeerLives(t *testing.T) {
	const between = pongWait - time.Nanosecond
	for name, sent := range map[string][]byte{
		"text":             encode(0x81, "x"),
		"blank text":       encode(0x81, ""),
		"text in two":      append(encode(0x01, "x"), encode(0x80, "x")...),
		"ping":             encode(0x89, ""),
		"pong":             encode(0x8a, ""),
		"blank then pings": append(encode(0x81, ""), encode(0x89, "")...),
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := pipeRoom(t).join(t)
				p.SetPingHandler(func(string) error { return nil })
				start := time.Now()
				go func() {
					for range 5 {
						time.Sleep(between)
						p.write(sent)
					}
				}()
				p.wantGoodbyeWithin(10*pongWait, tooSlow)
				if got, want := time.Since(start), 5*between+pongWait; got != want {
					t.Errorf("it was dropped after %v, want %v", got, want)
				}
			})
		})
	}
}

func TestClientThatTheRoomHoldsUpIsNotTakenForSilent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := pipeRoom(t)
		front := *r.hub // It takes what clients say, and passes nothing on.
		front.broadcast = make(chan []byte)
		r.serve = func(w http.ResponseWriter, req *http.Request) { serveWs(&front, w, req) }
		p := r.join(t)
		ended := make(chan error, 1)
		go func() {
			_, err := io.Copy(io.Discard, p.NetConn())
			ended <- err
		}()
		for range 3 {
			p.say("hello")
			time.Sleep(2 * pongWait)
			<-front.broadcast
			time.Sleep(pongWait / 2)
			p.write(encode(0x8a, ""))
		}
		select {
		case <-ended:
			t.Error("the client was dropped")
		default:
		}
	})
}

// Promise 6. SIGINT or SIGTERM: no new connections, every client gets what is
// queued and 1001. The process is further down; signals are in e2e.

func TestShutdownDeliversWhatIsQueuedAndThenSaysGoingAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := pipeRoom(t)
		p := r.join(t)
		want := []string{"one", "two", "three"}
		r.say(want...)
		r.hub.stop()
		if got := p.wantGoodbye(shuttingDown); !slices.Equal(got, want) {
			t.Errorf("got %q, want %q", got, want)
		}
		p.wantEnd()
		r.wantEnd(t)
		if got := r.log.String(); got != "" {
			t.Errorf("the log is %q, want nothing in it for each client", got)
		}
	})
}

func TestShutdownIsReadByIdleAndByBusyClients(t *testing.T) {
	r := tcpRoom(t)
	var wg sync.WaitGroup
	for i := range 30 {
		p := r.join(t)
		if i < 10 {
			wg.Go(func() { // It sends without pause.
				for p.WriteMessage(websocket.TextMessage, []byte("and another thing")) == nil {
				}
			})
		}
		wg.Go(func() { p.wantGoodbye(shuttingDown); p.Close() })
	}
	r.hub.stop()
	wg.Wait()
	r.wantEnd(t)
}

func TestShutdownIsReadByAClientThatSendsBeforeItReads(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := pipeRoom(t)
		p := r.join(t)
		r.hub.stop()
		synctest.Wait()
		start := time.Now()
		for range 10 * rateBurst {
			p.write(encode(0x81, "what is sent now is no longer heard"))
			p.write(encode(0x8a, ""))
		}
		if got := time.Since(start); got != 0 {
			t.Errorf("the client is held up for %v, want it let go", got)
		}
		p.wantGoodbye(shuttingDown)
	})
}

func TestHandshakeDuringShutdownIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := pipeRoom(t)
		last := join(r.hub, 0)
		r.hub.stop()
		synctest.Wait()
		for range 20 {
			_, response, err := r.dialer(t).Dial(roomURL, nil)
			if err == nil || response == nil || response.StatusCode != http.StatusServiceUnavailable {
				t.Errorf("dial returned %v, %v; want status 503", response, err)
			}
		}
		r.hub.left <- last
	})
}

// Promise 7. No goroutine outlives its client, and none the hub: run returns, and
// the pumps end, after shutdown. That all other goroutines have ended, synctest
// checks at the end of each of its tests.

func TestHubEndsSoonHoweverItsClientEnds(t *testing.T) {
	tests := map[string]func(*room, *peer){
		"the peer says goodbye":            func(_ *room, p *peer) { p.write(encode(0x88, "\x03\xe8")) },
		"the peer vanishes":                func(_ *room, p *peer) { p.Close() },
		"the peer has vanished for long":   func(_ *room, p *peer) { p.Close(); time.Sleep(pongWait) },
		"the peer is silent":               func(_ *room, p *peer) { time.Sleep(pongWait) },
		"the peer breaks a rule":           func(_ *room, p *peer) { p.write(encode(0x82, "")) },
		"the peer breaks a rule, goes on":  func(_ *room, p *peer) { p.write(encode(0x82, "")); p.write(some) },
		"the peer breaks the protocol":     func(_ *room, p *peer) { p.write(encode(0x8f, "")) },
		"the peer does nothing":            func(*room, *peer) {},
		"somebody unregisters it":          func(r *room, _ *peer) { r.hub.unregister <- r.clients()[0] },
		"somebody unregisters it for long": func(r *room, _ *peer) { r.hub.unregister <- r.clients()[0]; time.Sleep(pongWait) },
	}
	for name, end := range tests {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := pipeRoom(t)
				p := r.join(t)
				go io.Copy(io.Discard, p.NetConn()) // It reads, but answers nothing.
				end(r, p)
				start := time.Now()
				r.hub.stop()
				r.wantEnd(t)
				if got := time.Since(start); got > closeWait {
					t.Errorf("the hub ended %v after it was stopped, want at most %v", got, closeWait)
				}
			})
		})
	}
}

// The process: run and serve.

func TestMainServesUntilItIsInterrupted(t *testing.T) {
	logged, w := io.Pipe()
	log.SetOutput(w)
	t.Cleanup(func() { log.SetOutput(io.Discard) })
	lines := make(chan string, 1)
	go func() {
		line, _ := bufio.NewReader(logged).ReadString('\n')
		lines <- line
		io.Copy(io.Discard, logged)
	}()
	defer func(old string) { *addr = old }(*addr)
	*addr = ":0"
	ended := make(chan bool)
	go func() { main(); close(ended) }()

	line := wait(t, lines, "the first line of the log")
	url := regexp.MustCompile("http://localhost:[0-9]+/").FindString(line)
	response, err := http.Get(url)
	if err != nil {
		t.Fatalf("the log says %q, and getting the page there fails: %v", line, err)
	}
	response.Body.Close()
	if response.StatusCode != http.StatusOK {
		t.Errorf("got status %d, want 200", response.StatusCode)
	}
	conn, _, err := websocket.DefaultDialer.Dial("ws"+strings.TrimPrefix(url, "http")+"ws", nil)
	if err != nil {
		t.Fatal(err)
	}
	p := &peer{conn, t}
	p.say("hello")
	p.wantLines("hello")
	self, err := os.FindProcess(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if err := self.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	p.wantGoodbye(shuttingDown)
	wait(t, ended, "main")
	if _, err := http.Get(url); err == nil {
		t.Error("the server still listens after main has returned")
	}
}

func TestRunReturnsWhyItCannotListen(t *testing.T) {
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	for addr, want := range map[string]string{
		busy.Addr().String(): "address already in use",
		"nonsense":           "missing port",
		":99999":             "invalid port",
	} {
		if err := run(t.Context(), addr); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("run on %q returned %v, want %q in it", addr, err, want)
		}
	}
}

func TestServeReturnsWhyItNoLongerListens(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, listener, _, result := startServe(t)
		listener.Close()
		if err := wait(t, result, "serve"); !errors.Is(err, net.ErrClosed) {
			t.Errorf("serve returned %v, want %v", err, net.ErrClosed)
		}
	})
}

func TestServeReturnsAtOnceIfEverybodyLeaves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, _, cancel, result := startServe(t)
		for range 10 {
			p := r.join(t)
			go p.wantGoodbye(shuttingDown)
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
	})
}

func TestServeReturnsInTimeEvenIfAClientIsStuck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, _, cancel, result := startServe(t)
		stuck, p := r.join(t), r.join(t)
		p.say("the stuck one does not take this")
		synctest.Wait()
		start := time.Now()
		cancel()
		p.wantGoodbye(shuttingDown)
		if err := wait(t, result, "serve"); err != nil {
			t.Errorf("serve returned %v, want nil", err)
		}
		if got := time.Since(start); got != shutdownWait {
			t.Errorf("serve returned after %v, want %v", got, shutdownWait)
		}
		if got, want := r.log.String(), "leaving clients behind"; !strings.Contains(got, want) {
			t.Errorf("the log is %q, want %q in it", got, want)
		}
		stuck.Close()
	})
}

func TestServeCutsOffASlowRequest(t *testing.T) {
	tests := []struct {
		name, sent string
		drip       string // sent each second after that
		reads      bool
		want       time.Duration
	}{
		{"nothing sent", "", "", true, pageTimeout},
		{"header that never ends", "GET / HTTP/1.1\r\nX: ", "x", true, pageTimeout},
		{"body that never ends", "POST /ws HTTP/1.1\r\nHost: pipe\r\nContent-Length: 1000\r\n\r\n", "x", true, pageTimeout},
		{"page that nobody takes", "GET / HTTP/1.1\r\nHost: pipe\r\n\r\n", "", false, pageTimeout},
		{"no second request", "GET / HTTP/1.1\r\nHost: pipe\r\n\r\n", "", true, pageTimeout},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r, _, _, _ := startServe(t)
				conn := r.connect(t)
				start := time.Now()
				dripped := make(chan struct{})
				go func() {
					defer close(dripped)
					_, err := io.WriteString(conn, test.sent)
					for err == nil && test.drip != "" {
						time.Sleep(time.Second)
						_, err = io.WriteString(conn, test.drip)
					}
				}()
				if test.reads {
					io.Copy(io.Discard, conn)
				} else {
					time.Sleep(test.want + time.Millisecond)
					synctest.Wait()
					conn.SetReadDeadline(time.Now().Add(time.Millisecond))
					if _, err := io.Copy(io.Discard, conn); err != nil {
						t.Errorf("the connection ended with %v, want it closed by the server", err)
					}
				}
				if got := time.Since(start); got < test.want || got > test.want+time.Second {
					t.Errorf("the connection ended after %v, want %v", got, test.want)
				}
				conn.Close()
				wait(t, dripped, "the one who sends slowly")
			})
		})
	}
}

// The page.

func TestHomePage(t *testing.T) {
	tests := []struct {
		method, path string
		status       int
		contentType  string
		allow        string
	}{
		{"GET", "/", http.StatusOK, "text/html; charset=utf-8", ""},
		{"HEAD", "/", http.StatusOK, "text/html; charset=utf-8", ""},
		{"GET", "/favicon.ico", http.StatusNotFound, "text/plain; charset=utf-8", ""},
		{"GET", "/index.html", http.StatusNotFound, "text/plain; charset=utf-8", ""},
		{"POST", "/", http.StatusMethodNotAllowed, "text/plain; charset=utf-8", "GET, HEAD"},
		{"DELETE", "/", http.StatusMethodNotAllowed, "text/plain; charset=utf-8", "GET, HEAD"},
	}
	for _, test := range tests {
		t.Run(test.method+" "+test.path, func(t *testing.T) {
			book := captureLog(t)
			rec := httptest.NewRecorder()
			serveHome(rec, httptest.NewRequest(test.method, test.path, nil))
			if rec.Code != test.status {
				t.Errorf("got status %d, want %d", rec.Code, test.status)
			}
			if got := rec.Body.String() == home; got != (test.status == http.StatusOK) {
				t.Errorf("with status %d the page was sent: %v", rec.Code, got)
			}
			for name, want := range map[string]string{
				"Content-Type": test.contentType, "Allow": test.allow, "X-Content-Type-Options": "nosniff",
			} {
				if got := rec.Header().Get(name); got != want {
					t.Errorf("got %s %q, want %q", name, got, want)
				}
			}
			if got, want := book.String(), fmt.Sprintf("%s %q\n", test.method, test.path); !strings.HasSuffix(got, want) {
				t.Errorf("the log is %q, want %q at its end", got, want)
			}
		})
	}
}

func TestContentSecurityPolicyAllowsThePageItsOwnScriptAndStyleAlone(t *testing.T) {
	rec := httptest.NewRecorder()
	serveHome(rec, httptest.NewRequest("GET", "/", nil))
	policy := rec.Header().Get("Content-Security-Policy")
	for _, element := range []string{"script", "style"} {
		found := regexp.MustCompile("(?s)<"+element+"\\b[^>]*>(.*?)</"+element+">").FindAllStringSubmatch(rec.Body.String(), -1)
		if len(found) != 1 {
			t.Fatalf("the page has %d elements %s, want 1", len(found), element)
		}
		hash := sha256.Sum256([]byte(found[0][1]))
		want := element + "-src 'sha256-" + base64.StdEncoding.EncodeToString(hash[:]) + "';"
		if !strings.Contains(policy, want) {
			t.Errorf("the policy is %q, want %q in it", policy, want)
		}
	}
	for _, want := range []string{"default-src 'none'", "connect-src 'self'", "frame-ancestors 'none'"} {
		if !strings.Contains(policy, want) {
			t.Errorf("the policy is %q, want %q in it", policy, want)
		}
	}
	if strings.Contains(policy, "unsafe") {
		t.Errorf("the policy is %q, want nothing unsafe in it", policy)
	}
}

func TestThePageKnowsThePingPeriod(t *testing.T) {
	ms := pingPeriod.Milliseconds()
	if want := fmt.Sprintf("const pingPeriod = %d_%03d;", ms/1000, ms%1000); !strings.Contains(home, want) {
		t.Errorf("home.html does not say %q", want)
	}
}

func TestThePageHasTheLimitOnce(t *testing.T) {
	want := fmt.Sprintf("const maxMessageSize = %d;", maxMessageSize)
	if !strings.Contains(home, want) {
		t.Errorf("home.html does not say %q", want)
	}
	if got := len(regexp.MustCompile(fmt.Sprintf(`\b%d\b`, maxMessageSize)).FindAllString(home, -1)); got != 1 {
		t.Errorf("home.html states the limit %d times, want once", got)
	}
}

// README.md, "Copy it": the code there is the code here, and works.

func TestCodeInREADMEWorks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mux := http.NewServeMux()
		pipes := newPipeListener()
		server := &http.Server{Handler: mux}
		go server.Serve(pipes)
		t.Cleanup(func() { server.Close() })
		join := func(path string) *peer {
			conn, _, err := (&room{connect: pipes.connect}).dialer(t).Dial("ws://pipe"+path, nil)
			if err != nil {
				t.Fatal(err)
			}
			return &peer{conn, t}
		}

		hubs := map[string]*Hub{"/kitchen/ws": newHub(), "/garden/ws": newHub()}
		var running sync.WaitGroup
		for path, hub := range hubs {
			running.Go(hub.run)
			mux.HandleFunc(path, func(w http.ResponseWriter, r *http.Request) { serveWs(hub, w, r) })
		}
		start := time.Now()
		var peers sync.WaitGroup
		for want, peer := range map[string]*peer{"Dinner is ready.": join("/kitchen/ws"), "": join("/garden/ws")} {
			peers.Go(func() {
				time.Sleep(closeWait / 2)
				if got := strings.Join(peer.wantGoodbye(shuttingDown), "\n"); got != want {
					t.Errorf("got %q before the goodbye, want %q", got, want)
				}
			})
		}
		hubs["/kitchen/ws"].broadcast <- []byte("Dinner is ready.")
		for _, hub := range hubs {
			hub.stop() // Everybody reads what is queued, and 1001.
		}
		running.Wait() // Until they have, the process must not end.
		if took := time.Since(start); took < closeWait/2 {
			t.Errorf("it ends after %v, before anybody has read this", took)
		}
		peers.Wait()
	})
}

func TestCodeInREADMEIsTheCodeHere(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	here, err := os.ReadFile("client_test.go")
	if err != nil {
		t.Fatal(err)
	}
	_, code, _ := strings.Cut(string(readme), "\n    hubs := ")
	code, _, found := strings.Cut("hubs := "+code, "\n\n")
	if !found {
		t.Fatal("README.md has no code that starts with hubs")
	}
	_, rest, _ := strings.Cut(string(here), "func TestCodeInREADMEWorks")
	for line := range strings.Lines(code) {
		before, after, found := strings.Cut(rest, "\t"+strings.TrimSpace(line)+"\n")
		if !found {
			t.Fatalf("README.md says %q where the code here goes on with %.200q", line, before)
		}
		rest = after
	}
}

// The storm: histories made up from a seed, which hold the server to all of these
// promises at once.

var storms = flag.Int("storms", 100, "how many `histories` TestStorm plays")

// To play one history again: go test -run='TestStorm/seed=17$' -storms=18 .
func TestStorm(t *testing.T) {
	for seed := range *storms {
		t.Run(fmt.Sprint("seed=", seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				random := rand.New(rand.NewPCG(uint64(seed), 0))
				s := &storm{room: pipeRoom(t), end: time.Now().Add(upTo(random, 3*time.Second))}
				s.chorus = time.Now().Add(upTo(random, 3*time.Second))
				witness := s.enter(t, random, "listens")
				for range 3 + random.IntN(15) {
					if time.Sleep(upTo(random, 300*time.Millisecond)); !time.Now().Before(s.end) {
						break
					}
					fates := []string{"listens", "talks", "is slow", "stalls", "offends", "offends blindly", "leaves", "vanishes"}
					s.enter(t, random, fates[random.IntN(len(fates))])
					if c := s.cast[random.IntN(len(s.cast))]; random.IntN(5) == 0 && c != witness && c.client != nil {
						c.sentAway(unregistered, time.Now())
						s.hub.unregister <- c.client
					}
				}
				time.Sleep(time.Until(s.end))
				s.hub.stop()
				s.wantEnd(t)
				s.actors.Wait()
				s.check(t, witness.heard)
			})
		})
	}
}

func upTo(random *rand.Rand, most time.Duration) time.Duration {
	return time.Duration(random.Int64N(int64(most)))
}

// A storm is a room, and those who have been in it.
type storm struct {
	*room
	chorus time.Time // when many of them speak at once
	end    time.Time // when the hub is stopped
	cast   []*character
	actors sync.WaitGroup
}

// A character is a client in a storm, and what has become of it.
type character struct {
	*peer
	client     *Client
	name, fate string
	joined     time.Time
	said       []time.Time // when each of its lines was begun
	finished   time.Time   // when the last of them was written
	heard      []string
	end        error         // of its reading
	written    chan struct{} // closed when it writes no more
	cut        error         // of what it sent with its offence, and after it

	mu   sync.Mutex
	whys map[*goodbye]time.Time // why it may have been sent away, and when
}

// sentAway notes a reason for the server to send c away.
func (c *character) sentAway(why *goodbye, at time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.whys[why]; !ok {
		c.whys[why] = at
	}
}

// enter has a client join, say some lines, and meet its fate.
func (s *storm) enter(t *testing.T, random *rand.Rand, fate string) *character {
	c := &character{peer: s.join(t), name: fmt.Sprint("#", len(s.cast)), fate: fate, joined: time.Now(), written: make(chan struct{})}
	c.whys = map[*goodbye]time.Time{shuttingDown: s.end}
	first, second := offences[random.IntN(len(offences))], offences[random.IntN(len(offences))]
	for fate == "offends blindly" && (first.want.Code == websocket.CloseProtocolError || second.want.Code == websocket.CloseProtocolError) {
		// Not these: gorilla/websocket waits until its 1002 is read.
		first, second = offences[random.IntN(len(offences))], offences[random.IntN(len(offences))]
	}
	lines, pause, slowness := random.IntN(150), upTo(random, 20*time.Millisecond), upTo(random, breather/2)
	begin, stall := time.Now(), time.Now().Add(upTo(random, time.Second))
	if random.IntN(2) == 0 {
		begin, pause = s.chorus, 0
	}
	s.actors.Go(func() {
		defer close(c.written)
		if fate == "listens" {
			return
		}
		time.Sleep(time.Until(begin))
		for n := range lines {
			time.Sleep(pause)
			c.said = append(c.said, time.Now())
			if c.WriteMessage(websocket.TextMessage, fmt.Append(nil, c.name, " says ", n)) != nil {
				return
			}
		}
		c.finished = time.Now()
		switch fate {
		case "offends", "offends blindly":
			c.sentAway(first.want, time.Now())
			if second.want.Code == websocket.CloseProtocolError {
				// gorilla/websocket says this one itself, ahead of what is queued.
				c.sentAway(second.want, time.Now())
			}
			_, c.cut = c.NetConn().Write(slices.Concat(first.sent, second.sent, some))
		case "leaves":
			c.sentAway(hadEnough, time.Now())
			c.NetConn().Write(encode(0x88, "\x0f\xa0had enough"))
		case "vanishes":
			c.Close()
		}
	})
	s.actors.Go(func() {
		for c.end == nil {
			switch {
			case fate == "is slow":
				time.Sleep(slowness)
			case fate == "stalls" && time.Now().After(stall):
				c.sentAway(fellBehind, time.Now())
				time.Sleep(writeWait / 2)
				stall = s.end.Add(time.Hour)
			case fate == "offends blindly":
				c.sentAway(fellBehind, time.Now())
				<-c.written // It reads nothing before.
			}
			var lines []string
			lines, c.end = c.read(2 * pongWait)
			c.heard = append(c.heard, lines...)
		}
		<-c.written
		c.Close()
	})
	for _, client := range s.clients() {
		if !slices.ContainsFunc(s.cast, func(c *character) bool { return c.client == client }) {
			c.client = client
		}
	}
	s.cast = append(s.cast, c)
	return c
}

var hadEnough = &goodbye{Code: 4000, Text: "had enough"}

// check holds the promises against what everybody has heard. The witness has
// been there from the beginning to the end, so that what it has heard is the order.
func (s *storm) check(t *testing.T, order []string) {
	t.Helper()
	const soon = 500 * time.Millisecond // by when the server has done what was asked of it
	position := make(map[string]int)
	for i, line := range order {
		if _, ok := position[line]; ok {
			t.Errorf("%q was heard twice", line)
		}
		position[line] = i
	}
	for _, c := range s.cast {
		var due *goodbye // what ends it first, apart from its being slow
		for why, at := range c.whys {
			if why != fellBehind && (due == nil || at.Before(c.whys[due])) {
				due = why
			}
		}

		// What it says is heard completely and in its order.
		last, missing := -1, 0
		for n := range c.said {
			if i, ok := position[fmt.Sprint(c.name, " says ", n)]; !ok {
				missing++
			} else if missing > 0 || i < last {
				t.Errorf("%s, which %s: line %d was heard after one that it had said later", c.name, c.fate, n)
			} else {
				last = i
			}
		}
		if missing > 0 && !c.finished.IsZero() && c.finished.Add(soon).Before(c.whys[due]) && c.whys[fellBehind].IsZero() {
			t.Errorf("%s, which %s: %d of its %d lines were not heard", c.name, c.fate, missing, len(c.said))
		}

		// It hears a part of the one order without a gap, from when it joined.
		first := len(order) // of what was said since
		for _, other := range s.cast {
			for n, at := range other.said {
				if i, ok := position[fmt.Sprint(other.name, " says ", n)]; ok && at.After(c.joined) {
					first = min(first, i)
				}
			}
		}
		start := first
		if len(c.heard) > 0 {
			start = position[c.heard[0]]
		}
		if start > first || !slices.Equal(c.heard, order[start:min(start+len(c.heard), len(order))]) {
			t.Errorf("%s, which %s, heard %q, want a part of %q that starts at %d or before", c.name, c.fate, c.heard, order, first)
		}

		// Nobody is sent away but for a reason of its own, and the first is what
		// it reads; until then the server takes what it sends.
		if c.fate == "vanishes" && !c.finished.IsZero() {
			continue
		}
		var got *goodbye
		errors.As(c.end, &got)
		sound := false
		for why, at := range c.whys {
			sound = sound || got != nil && got.Code == why.Code && at.Before(c.whys[due].Add(soon)) &&
				(got.Text == why.Text || got.Code == websocket.CloseProtocolError)
		}
		if !sound {
			t.Errorf("%s, which %s, ended with %v, want %v", c.name, c.fate, c.end, due)
		}
		if c.cut != nil && !c.whys[due].Before(c.finished) {
			t.Errorf("%s, which %s: what it was sending failed with %v", c.name, c.fate, c.cut)
		}
		if len(c.whys) == 1 && start+len(c.heard) != len(order) {
			t.Errorf("%s, which %s, did not hear the last %d lines", c.name, c.fate, len(order)-start-len(c.heard))
		}
	}
}

// The rig.

// patience is how long a test waits for what must come: it only bounds how long
// a failing one takes.
const patience = 10 * time.Second

// A room is a running server, and how to reach it.
type room struct {
	hub     *Hub
	ended   chan struct{}    // closed when hub.run has returned
	serve   http.HandlerFunc // for /ws
	connect func(testing.TB) net.Conn
	log     *logBook
}

// roomURL is where a room's WebSocket endpoint is, for those who connect to it.
const roomURL = "ws://pipe/ws"

// handshake is the header of a request for it; an empty line has to follow.
const handshake = "GET /ws HTTP/1.1\r\nHost: pipe\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n" +
	"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"

// tcpRoom starts a server on a loopback port.
func tcpRoom(t testing.TB) *room {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
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

// newRoom starts a hub and, on listener, its server. The test's end stops both,
// and fails if the hub does not end.
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
			t.Error("hub.run has returned, although nobody has stopped the hub")
			r.hub.stop() // or everybody would wait for it
		}
		close(r.ended)
	}()
	t.Cleanup(func() {
		select {
		case <-r.hub.stopped:
		default:
			r.hub.stop()
		}
		r.wantEnd(t)
		server.Close()
	})
	return r
}

// startServe calls serve, until the test ends. It returns a room without a hub,
// its listener, how to end serve, and what that returns.
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

// wait returns what comes from c, which is what tells that something has ended.
func wait[T any](t testing.TB, c chan T, what string) (result T) {
	t.Helper()
	select {
	case result = <-c:
	case <-time.After(patience):
		t.Errorf("%s has not come to its end within %v", what, patience)
	}
	return result
}

// wantEnd waits until the hub, which has been stopped, has ended. Then the pumps
// of all clients have ended, too: readPump's last word is what the hub waits for,
// and readPump waits for writePump.
func (r *room) wantEnd(t testing.TB) {
	t.Helper()
	wait(t, r.ended, "hub.run")
}

// say says lines in the room, one after the other. It returns when everything
// that follows from it is done; call it in a synctest bubble.
func (r *room) say(lines ...string) {
	for _, line := range lines {
		r.hub.broadcast <- []byte(line)
		synctest.Wait()
	}
}

// clients returns who is in the hub, at a moment at which it has nothing to do;
// call it in a synctest bubble.
func (r *room) clients() []*Client {
	for {
		synctest.Wait()
		select {
		case r.hub.unregister <- nil: // It was waiting for somebody, and does again:
			synctest.Wait()
			clients := slices.Collect(maps.Keys(r.hub.clients))
			r.hub.unregister <- nil // so the next thing that it does, it does after that.
			return clients
		default:
			time.Sleep(breather)
		}
	}
}

// dialer returns a dialer that connects to the room.
func (r *room) dialer(t testing.TB) *websocket.Dialer {
	return &websocket.Dialer{
		HandshakeTimeout: patience,
		NetDialContext:   func(context.Context, string, string) (net.Conn, error) { return r.connect(t), nil },
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

// A peer is a client's side of a connection. All but its join may be called from
// any goroutine: they report what is wrong, and go on.
type peer struct {
	*websocket.Conn
	t testing.TB
}

// say sends a message.
func (p *peer) say(text string) {
	p.t.Helper()
	p.SetWriteDeadline(time.Now().Add(patience))
	if err := p.WriteMessage(websocket.TextMessage, []byte(text)); err != nil {
		p.t.Errorf("saying %.99q failed with %v", text, err)
	}
}

// write sends bytes as they are.
func (p *peer) write(sent []byte) {
	p.t.Helper()
	p.NetConn().SetWriteDeadline(time.Now().Add(patience))
	if _, err := p.NetConn().Write(sent); err != nil {
		p.t.Errorf("sending %.99q failed with %v", sent, err)
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
			p.t.Errorf("got %q and then %v, want %d lines", lines, err, n)
			break
		}
		lines = append(lines, more...)
	}
	return lines
}

func (p *peer) wantLines(want ...string) {
	p.t.Helper()
	if got := p.lines(len(want)); !slices.Equal(got, want) {
		p.t.Errorf("got %q, want %q", got, want)
	}
}

// wantGoodbye reads until the connection ends, which must be with want. It
// returns the lines that came before.
func (p *peer) wantGoodbye(want *goodbye) (lines []string) {
	p.t.Helper()
	return p.wantGoodbyeWithin(patience, want)
}

func (p *peer) wantGoodbyeWithin(within time.Duration, want *goodbye) (lines []string) {
	p.t.Helper()
	for {
		more, err := p.read(within)
		if err == nil {
			lines = append(lines, more...)
			continue
		}
		var got *goodbye
		if !errors.As(err, &got) || *got != *want {
			p.t.Errorf("after %d lines the connection ended with %v, want %v", len(lines), err, want)
		}
		return lines
	}
}

// wantEnd checks that the server has ended TCP, and has not reset it.
func (p *peer) wantEnd() {
	p.t.Helper()
	p.NetConn().SetReadDeadline(time.Now().Add(patience))
	if n, err := p.NetConn().Read(make([]byte, 1)); n != 0 || err != io.EOF {
		p.t.Errorf("after the goodbye came %d bytes and %v, want %v", n, err, io.EOF)
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
	header := make([]byte, 2, 4)
	if _, err := io.ReadFull(p.NetConn(), header); err != nil {
		return f, err
	}
	size := int(header[1])
	if size == 126 {
		if _, err := io.ReadFull(p.NetConn(), header[2:4]); err != nil {
			return f, err
		}
		size = int(binary.BigEndian.Uint16(header[2:4]))
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

func list[T any](items ...T) []T { return items }

// A pipe is one end of a connection in memory that, as TCP, can be closed one
// way. It buffers nothing: each write waits until it is read, and time in a
// synctest bubble goes on while all wait.
type pipe struct {
	net.Conn               // to read from
	out      net.Conn      // to write to
	writing  chan struct{} // holds what each write takes: time would not go on for a net.Pipe's mutex
}

func newPipe(in, out net.Conn) *pipe { return &pipe{in, out, make(chan struct{}, 1)} }

func (p *pipe) Write(b []byte) (int, error) {
	p.writing <- struct{}{}
	defer func() { <-p.writing }()
	return p.out.Write(b)
}

func (p *pipe) SetWriteDeadline(t time.Time) error { return p.out.SetWriteDeadline(t) }
func (p *pipe) SetDeadline(t time.Time) error {
	p.Conn.SetReadDeadline(t)
	return p.out.SetWriteDeadline(t)
}
func (p *pipe) CloseWrite() error { return p.out.Close() }
func (p *pipe) Close() error      { p.out.Close(); return p.Conn.Close() }

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
	clientIn, serverOut := net.Pipe()
	serverIn, clientOut := net.Pipe()
	select {
	case l.conns <- newPipe(serverIn, serverOut):
	case <-l.closed:
		t.Error("the server does not listen")
	}
	return newPipe(clientIn, clientOut)
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
func (l *pipeListener) Addr() net.Addr { return pipeAddr{} }

type pipeAddr struct{}

func (pipeAddr) Network() string { return "pipe" }
func (pipeAddr) String() string  { return "pipe" }

// onWrite makes a ResponseWriter call do before each write on the connection
// that is hijacked from it.
type onWrite struct {
	http.ResponseWriter
	do func()
}

func (w onWrite) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, rw, err := w.ResponseWriter.(http.Hijacker).Hijack()
	return onWriteConn{conn, w.do}, rw, err
}

type onWriteConn struct {
	net.Conn
	do func()
}

func (c onWriteConn) Write(p []byte) (int, error) {
	c.do()
	return c.Conn.Write(p)
}

// A logBook is what the program has logged.
type logBook struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *logBook) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logBook) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// captureLog collects what is logged until the test ends.
func captureLog(t testing.TB) *logBook {
	t.Helper()
	book := new(logBook)
	log.SetOutput(book)
	t.Cleanup(func() { log.SetOutput(io.Discard) })
	return book
}

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
	p := r.join(t)
	p.write(sent)
	p.NetConn().(*net.TCPConn).CloseWrite()
	for err := error(nil); err == nil; {
		_, err = p.read(patience)
	}
	// The end is longer than what any client may say.
	end := strings.Repeat("end", maxMessageSize)
	r.hub.broadcast <- []byte(end)
	for {
		lines, err := other.read(patience)
		if err != nil {
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

// BenchmarkBroadcast measures the way of one message from the hub to n clients.
func BenchmarkBroadcast(b *testing.B) {
	for _, n := range []int{1, 100, 1000} {
		b.Run(fmt.Sprintf("clients=%d", n), func(b *testing.B) {
			r := tcpRoom(b)
			message := []byte("a line of chat, about as long as people write them")
			var received sync.WaitGroup
			for range n {
				conn := r.join(b).NetConn() // read as bytes, so as to cost little itself
				go func() {
					frame := make([]byte, 2+len(message))
					for {
						if _, err := io.ReadFull(conn, frame); err != nil {
							return
						}
						received.Done()
					}
				}()
			}
			b.ReportAllocs()
			for b.Loop() {
				received.Add(n)
				r.hub.broadcast <- message
				received.Wait()
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*n), "ns/delivery")
		})
	}
}
