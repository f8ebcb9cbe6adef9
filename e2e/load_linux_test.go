package e2e

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// A load is what BenchmarkLoad puts on a server, which broadcasts each message to all
// clients.
type load struct {
	name    string
	clients int           // connections that read
	floods  int           // how many of them send as fast as TCP allows
	senders int           // how many more of them send at a rate, or a burst
	rate    int           // messages a second from each sender
	burst   int           // messages at once from each sender
	size    int           // bytes of a message
	slow    int           // further connections, which read nothing
	during  time.Duration // for which they send
}

var loads = []load{
	{name: "4 of 100 flood, a fifth sends 20/s", clients: 100, floods: 4, senders: 1, rate: 20, size: 64, during: 4 * time.Second},
	{name: "1 of 100 sends 300 at once", clients: 100, senders: 1, burst: 300, size: 64},
	{name: "12 of 100 send 100 each at once", clients: 100, senders: 12, burst: 100, size: 64},
	{name: "100 send 10,000/s together", clients: 100, senders: 100, rate: 100, size: 64, during: 5 * time.Second},
	{name: "10 of 100 send 500/s together, 20 more read nothing", clients: 100, senders: 10, rate: 50, size: 500, slow: 20, during: 5 * time.Second},
	{name: "50 of 1,000 send 50/s together", clients: 1000, senders: 50, rate: 1, size: 64, during: 8 * time.Second},
	{name: "200 flood", clients: 200, floods: 200, size: 64, during: 4 * time.Second},
}

// idleClients is how many connections BenchmarkIdle opens.
const idleClients = 8000

// A peer is one connection of the load driver: a bare socket, without a goroutine and
// without the runtime's poller. The driver polls all of them once a millisecond, so it
// takes little CPU beside the server.
type peer struct {
	fd       int
	in       []byte // the part of the next frame that has arrived
	out      []byte // the part of the last sent frame that is still to be written
	received int    // messages
	closed   bool
}

// connect does the handshake with the server at addr.
func connect(t testing.TB, addr string) *peer {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "GET /ws HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"+
		"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n", addr)
	response := make([]byte, 1024) // No client sends yet, so nothing follows the header.
	n, err := conn.Read(response)
	if err != nil || !bytes.HasPrefix(response, []byte("HTTP/1.1 101 ")) || !bytes.HasSuffix(response[:n], []byte("\r\n\r\n")) {
		t.Fatalf("the handshake gets the response %q, %v", response[:n], err)
	}
	raw, err := conn.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	p := new(peer)
	if raw.Control(func(fd uintptr) { p.fd, err = syscall.Dup(int(fd)) }); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Close(p.fd) })
	return p
}

// message returns a frame with a message of size bytes that starts with now, in nanoseconds.
func message(size int, now int64) []byte {
	frame := []byte{0x81, 0x80 | byte(size), 0, 0, 0, 0} // the mask is zero
	if size > 125 {
		frame = []byte{0x81, 0x80 | 126, byte(size >> 8), byte(size), 0, 0, 0, 0}
	}
	frame = fmt.Appendf(frame, "%019d ", now)
	return append(frame, bytes.Repeat([]byte("x"), size-20)...)
}

// send sends frame, and reports whether it did: false if the last frame is still to be
// written.
func (p *peer) send(frame []byte) bool {
	if p.flush(); p.closed || len(p.out) > 0 {
		return false
	}
	p.out = frame
	p.flush()
	return !p.closed
}

// flush writes as much of p.out as the socket accepts.
func (p *peer) flush() {
	if len(p.out) == 0 {
		return
	}
	n, err := syscall.Write(p.fd, p.out)
	p.out = p.out[max(0, n):]
	p.closed = p.closed || err != nil && err != syscall.EAGAIN
}

// receive reads the frames that have arrived and calls handle for each message.
func (p *peer) receive(buf []byte, handle func(message []byte)) {
	for !p.closed {
		n, err := syscall.Read(p.fd, buf)
		if err == syscall.EAGAIN {
			return
		}
		if n <= 0 {
			p.closed = true
			return
		}
		p.in = append(p.in, buf[:n]...)
		p.frames(handle)
		if n < len(buf) {
			return
		}
	}
}

// frames handles the complete frames in p.in.
func (p *peer) frames(handle func(message []byte)) {
	rest := p.in
	for len(rest) >= 2 {
		header, size := 2, int(rest[1])
		if size == 126 {
			if header = 4; len(rest) < header {
				break
			}
			size = int(rest[2])<<8 | int(rest[3])
		}
		if len(rest) < header+size {
			break
		}
		switch payload := rest[header : header+size]; rest[0] & 0x0f {
		case 1:
			for line := range bytes.SplitSeq(payload, []byte("\n")) {
				p.received++
				handle(line)
			}
		case 8:
			p.closed = true
		}
		rest = rest[header+size:]
	}
	p.in = append(p.in[:0], rest...)
}

// A result is the outcome of a load on a server.
type result struct {
	load, server string
	deliveries   int           // messages that arrived, over all clients
	dropped      int           // clients that were disconnected although they read
	lost         int           // messages that did not reach a client
	elapsed      time.Duration // until the last one arrived
	p50, p99     time.Duration // from a message's write to its arrival, to the millisecond
	cpu          time.Duration // of the server's process
	kib          float64       // resident, for each connection
	kibAtGOGC5   float64       // the same, without most of the garbage
}

// results are for reportLoads, which prints them when all benchmarks have run.
var results []*result

func BenchmarkLoad(b *testing.B) {
	servers := targets(b)
	for _, load := range loads {
		for _, which := range servers {
			b.Run(load.name+"/"+which.name, func(b *testing.B) {
				for b.Loop() {
					r := load.run(b, which.start(b))
					r.load, r.server = load.name, which.name
					results = append(results, r)
					b.ReportMetric(float64(r.deliveries)/r.elapsed.Seconds(), "deliveries/s")
					b.ReportMetric(float64(r.dropped), "dropped")
					b.ReportMetric(float64(r.lost), "lost")
					b.ReportMetric(r.p50.Seconds()*1000, "p50-ms")
					b.ReportMetric(r.p99.Seconds()*1000, "p99-ms")
					b.ReportMetric(float64(r.cpu)/float64(r.deliveries), "cpu-ns/delivery")
				}
			})
		}
	}
}

// run puts the load on server.
func (l *load) run(t testing.TB, server *target) *result {
	var peers []*peer
	for range l.clients {
		peers = append(peers, connect(t, server.addr))
	}
	for range l.slow {
		connect(t, server.addr)
	}
	var (
		r         result
		latencies []time.Duration
		sent      = make([]int, l.senders)
		flood     = message(l.size, 0)
		maximum   = func() int { // of messages that one client has received
			return slices.MaxFunc(peers, func(a, b *peer) int { return a.received - b.received }).received
		}
		buf   = make([]byte, 1<<20)
		cpu   = server.cpu(t)
		start = time.Now()
		last  = start
		total int // messages that every client should receive
	)
	for now := start; ; now = time.Now() {
		sending := now.Sub(start) < l.during || now == start
		if sending {
			for _, p := range peers[:l.floods] {
				for range 20 {
					if !p.send(flood) {
						break
					}
				}
			}
			for i, p := range peers[l.floods : l.floods+l.senders] {
				due := l.burst
				if l.rate > 0 { // Senders take turns, so that the load is even.
					due = int((now.Sub(start)*time.Duration(l.rate) + time.Second*time.Duration(i)/time.Duration(l.senders)) / time.Second)
				}
				for sent[i] < due && p.send(message(l.size, time.Now().UnixNano())) {
					sent[i]++
					total++
				}
			}
		}
		complete := true
		for i, p := range peers {
			p.flush()
			before := p.received
			p.receive(buf, func(message []byte) {
				if i%10 != 0 { // Only one client in ten measures latency.
					return
				}
				if written, _ := strconv.ParseInt(string(message[:19]), 10, 64); written > 0 {
					latencies = append(latencies, time.Since(time.Unix(0, written)))
				}
			})
			if p.received > before {
				last = time.Now()
			}
			complete = complete && (p.closed || p.received >= total)
		}
		if l.floods > 0 && sending {
			total = maximum() // The server decides how much of a flood it reads.
		}
		if !sending && (complete || now.Sub(last) > time.Second || now.Sub(start) > l.during+3*time.Second) {
			break
		}
		time.Sleep(time.Until(now.Add(time.Millisecond)))
	}
	r.cpu, r.elapsed = server.cpu(t)-cpu, last.Sub(start)
	for _, p := range peers {
		r.deliveries += p.received
		r.lost += max(0, total-p.received)
		if p.closed {
			r.dropped++
		}
	}
	if slices.Sort(latencies); len(latencies) > 0 {
		r.p50, r.p99 = latencies[len(latencies)/2], latencies[len(latencies)*99/100]
	}
	return &r
}

func BenchmarkIdle(b *testing.B) {
	for _, which := range targets(b) {
		b.Run(which.name, func(b *testing.B) {
			for b.Loop() {
				r := &result{load: fmt.Sprint(idleClients, " idle"), server: which.name}
				server := which.start(b)
				cpu, kib := server.cpu(b), server.resident(b)
				for range idleClients {
					connect(b, server.addr)
				}
				r.cpu = server.cpu(b) - cpu
				r.kib = (server.resident(b) - kib) / idleClients

				// How much garbage a process holds varies from run to run. With GOGC=5, it
				// holds little.
				server = which.start(b, "GOGC=5")
				kib = server.resident(b)
				for range idleClients {
					connect(b, server.addr)
				}
				r.kibAtGOGC5 = (server.resident(b) - kib) / idleClients
				results = append(results, r)
				b.ReportMetric(r.kib, "KiB/connection")
				b.ReportMetric(r.kibAtGOGC5, "KiB/connection-GOGC=5")
				b.ReportMetric(float64(r.cpu)/idleClients, "cpu-ns/handshake")
			}
		})
	}
}

// A target is a server process under load.
type target struct {
	name, path string
	addr       string
	pid        int
}

// targets returns upstream's example, built from the same gorilla/websocket, and this server.
func targets(b *testing.B) []target {
	b.Helper()
	upstream := filepath.Join(filepath.Dir(binary), "upstream")
	build := exec.Command("go", "build", "-o", upstream, "github.com/gorilla/websocket/examples/chat")
	if out, err := build.CombinedOutput(); err != nil {
		b.Fatalf("go build: %v\n%s", err, out)
	}
	return []target{{name: "upstream", path: upstream}, {name: "ours", path: binary}}
}

// start starts the server with additional environment variables on a free port, and waits
// until it listens. The benchmark's end kills it.
func (c target) start(b *testing.B, environment ...string) *target {
	b.Helper()
	c.addr = freeAddr(b)
	cmd := exec.Command(c.path, "-addr", c.addr)
	cmd.Env = append(os.Environ(), environment...)
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	c.pid = cmd.Process.Pid
	awaitListener(b, c.addr)
	return &c
}

// cpu returns the CPU time that the server has used, user and system, to the kernel's tick
// of 10 ms.
func (c *target) cpu(t testing.TB) time.Duration {
	t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", c.pid))
	if err != nil {
		t.Fatal(err)
	}
	_, after, _ := strings.Cut(string(stat), ") ") // the name may contain spaces
	fields := strings.Fields(after)
	user, _ := strconv.Atoi(fields[11])
	system, _ := strconv.Atoi(fields[12])
	return time.Duration(user+system) * 10 * time.Millisecond
}

// resident returns the server's resident memory in KiB.
func (c *target) resident(t testing.TB) float64 {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", c.pid))
	if err != nil {
		t.Fatal(err)
	}
	_, after, _ := strings.Cut(string(status), "VmRSS:")
	kib, _ := strconv.ParseFloat(strings.Fields(after)[0], 64)
	return kib
}

// reportLoads prints a table of the benchmarks' results, if any has run.
func reportLoads() {
	if len(results) == 0 {
		return
	}
	cpu, _ := os.ReadFile("/proc/cpuinfo")
	_, model, _ := strings.Cut(string(cpu), "model name\t: ")
	model, _, _ = strings.Cut(model, "\n")
	fmt.Printf("\n%d cores of %s, %s, load driver and server together\n\n", runtime.NumCPU(), model, runtime.Version())
	fmt.Println("| load | server | deliveries/s | dropped | lost | p50 ms | p99 ms | CPU µs/delivery |")
	fmt.Println("| --- | --- | --: | --: | --: | --: | --: | --: |")
	for _, r := range results {
		if r.kib > 0 {
			fmt.Printf("| %s | %s | %.1f KiB a connection (%.1f with GOGC=5), %.0f µs CPU a handshake ||||||\n",
				r.load, r.server, r.kib, r.kibAtGOGC5, float64(r.cpu.Microseconds())/idleClients)
			continue
		}
		fmt.Printf("| %s | %s | %.0f | %d | %d | %.1f | %.1f | %.2f |\n", r.load, r.server,
			float64(r.deliveries)/r.elapsed.Seconds(), r.dropped, r.lost,
			r.p50.Seconds()*1000, r.p99.Seconds()*1000, float64(r.cpu.Microseconds())/float64(max(1, r.deliveries)))
	}
}
