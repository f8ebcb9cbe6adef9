// Rooms is the chat server with what most copies of it grow: a room for each path,
// names that can be trusted, history, lines to one person, and somebody who can
// send others away.
//
// Usage:
//
//	rooms [-addr host:port] [-secure]
//
// It serves a form at /, each room's page at /room/NAME/, and its WebSocket endpoint
// at /room/NAME/ws. Cookies are signed with the environment variable CHAT_KEY; without
// one, a random key makes them last until the server restarts. SIGINT or SIGTERM sends
// everybody in all rooms home and ends it with status 0; a second one ends it at once.
//
// hub.go, client.go and home.html are those of the chat server, but for the lines
// that README.md shows. room.go and login.html are new. This file repeats some of that
// server's main.go, because a package main cannot be imported.
package main

//go:generate cp ../hub.go ../client.go ../home.html .
//go:generate sh -c "sed -n '/^--- /,/^```$/p' README.md | patch --no-backup-if-mismatch"

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"flag"
	"html"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/gorilla/securecookie"
)

// pageTimeout is the time allowed for each of these: to send a request, to take the
// answer, and to send the next request. Without it, who sends nothing would hold a
// connection for ever.
const pageTimeout = 10 * time.Second

// Maximum number of rooms, and of connections in a room: a person's second tab is
// one more.
const maxRooms, maxSeats = 100, 100

var addr = flag.String("addr", "localhost:8080", "listen on `host:port`")
var secure = flag.Bool("secure", false, "have browsers send cookies over https alone")

//go:embed home.html
var home string

//go:embed login.html
var login string

func main() {
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // so that a second signal ends the process at once
	listener, err := net.Listen("tcp", *addr)
	if err != nil {
		log.Fatal(err)
	}
	log.Printf("listening on http://%v/", listener.Addr())
	cookies := securecookie.New([]byte(cmp.Or(os.Getenv("CHAT_KEY"), rand.Text())), nil)
	rooms := &Rooms{cookies: cookies, hubs: make(map[string]*Hub)}
	server := &http.Server{Handler: rooms.handler(), ReadTimeout: pageTimeout, WriteTimeout: pageTimeout}
	context.AfterFunc(ctx, func() { server.Close() }) // WebSockets are the hubs' to close.
	err = server.Serve(listener)
	log.Print("shutting down")
	time.AfterFunc(5*time.Second, func() { log.Print("leaving clients behind that do not close"); os.Exit(0) })
	rooms.stop()
	if err != http.ErrServerClosed {
		log.Fatal(err)
	}
}

// Rooms makes each room when somebody comes, and removes it when the last has left.
type Rooms struct {
	cookies *securecookie.SecureCookie
	running sync.WaitGroup // the hubs' run

	mu   sync.Mutex
	hubs map[string]*Hub // by the names of their rooms; nil after stop
}

// admit takes a seat in the room of that name, and opens the room if there is none.
// The seat is for a client that registers with the hub. Until that has left, the hub
// runs, unless stop stops it. If there is no seat for who, admit returns why, and the
// HTTP status that goes with it.
func (rs *Rooms) admit(name string, who Identity) (hub *Hub, status int, why string) {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	if status, why = rs.refuse(name, who); why != "" {
		return nil, status, why
	}
	if hub = rs.hubs[name]; hub == nil {
		hub = newHub()
		hub.Room = Room{rs, name, who.ID, 0, nil, make(map[string]*Person), make(map[string]bool)}
		rs.hubs[name] = hub
		rs.running.Go(hub.run)
	}
	hub.seats++
	return hub, status, ""
}

// refuse returns why there is no seat for who, if so. Call it with mu locked.
func (rs *Rooms) refuse(name string, who Identity) (status int, why string) {
	switch hub := cmp.Or(rs.hubs[name], new(Hub)); {
	case name == "":
		return http.StatusOK, "Say who you are, and where you want to go."
	case parseName(name) != name:
		return http.StatusNotFound, "No room can have that name."
	case who.ID == "":
		return http.StatusUnauthorized, "Say who you are."
	case rs.hubs == nil:
		return http.StatusServiceUnavailable, "The server is shutting down."
	case hub.seats == 0 && len(rs.hubs) >= maxRooms:
		return http.StatusServiceUnavailable, "There are as many rooms as there can be."
	case hub.seats >= maxSeats:
		return http.StatusServiceUnavailable, "This room is full."
	}
	return http.StatusOK, ""
}

// stop sends everybody away, and returns when they have left.
func (rs *Rooms) stop() {
	rs.mu.Lock()
	for _, hub := range rs.hubs {
		hub.stop()
	}
	rs.hubs = nil
	rs.mu.Unlock()
	rs.running.Wait()
}

// handler answers all requests.
func (rs *Rooms) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", rs.serveHome)
	mux.HandleFunc("POST /{$}", rs.logIn)
	mux.HandleFunc("GET /room/{room}/{$}", rs.serveHome)
	mux.HandleFunc("GET /room/{room}/ws", rs.serveRoom)
	return http.MaxBytesHandler(http.NewCrossOriginProtection().Handler(mux), 4<<10)
}

// who returns who has sent the request, as the cookie says, or nobody.
func (rs *Rooms) who(r *http.Request) (who Identity) {
	if cookie, err := r.Cookie("chat"); err == nil {
		rs.cookies.Decode("chat", cookie.Value, &who)
	}
	return who
}

// logIn gives who sends the form the name that they ask for, and leads to the room.
// A real login goes here: ask for a password, or send them to a server that does.
func (rs *Rooms) logIn(w http.ResponseWriter, r *http.Request) {
	name, room := parseName(r.PostFormValue("name")), parseName(r.PostFormValue("room"))
	value, err := rs.cookies.Encode("chat", Identity{cmp.Or(rs.who(r).ID, rand.Text()), name})
	if name == "" || room == "" || err != nil { // no name is too long for a cookie
		servePage(w, r, http.StatusBadRequest, r.PostFormValue("name"), r.PostFormValue("room"),
			"A name is one word of letters, digits, - and _, of at most 32 bytes.")
		return
	}
	http.SetCookie(w, &http.Cookie{Name: "chat", Value: value, Path: "/", HttpOnly: true, Secure: *secure, SameSite: http.SameSiteLaxMode})
	http.Redirect(w, r, "/room/"+room+"/", http.StatusSeeOther)
}

// serveHome answers with a room's page, or with the form and why there is no seat.
func (rs *Rooms) serveHome(w http.ResponseWriter, r *http.Request) {
	room, who := r.PathValue("room"), rs.who(r)
	rs.mu.Lock()
	status, why := rs.refuse(room, who)
	rs.mu.Unlock()
	servePage(w, r, status, who.Name, room, why)
}

// serveRoom makes the request a client in a room. What is no handshake, or is from
// another site's page, is refused first: then nobody is told that somebody has come.
func (rs *Rooms) serveRoom(w http.ResponseWriter, r *http.Request) {
	who := rs.who(r)
	if origin := r.Header.Get("Origin"); origin != "" && !strings.EqualFold(origin[strings.LastIndex(origin, "/")+1:], r.Host) {
		http.Error(w, "this is for the chat's own pages", http.StatusForbidden)
	} else if r.Header.Get("Upgrade") == "" {
		http.Error(w, "this is for WebSockets", http.StatusBadRequest)
	} else if hub, status, why := rs.admit(r.PathValue("room"), who); why != "" {
		http.Error(w, why, status)
	} else {
		serveWs(hub, who, w, r)
	}
}

// A page gets its own script and style, by their hashes, the icon in it, its own
// server, and WebSockets; nothing else. https://www.w3.org/TR/CSP3/
const contentSecurityPolicy = "default-src 'none'; img-src data:; connect-src 'self' ws: wss:" +
	"; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"

// servePage answers with a room's page, or the form, and writes these words in it.
func servePage(w http.ResponseWriter, r *http.Request, status int, name, room, why string) {
	page := map[bool]string{true: home, false: login}[why == ""]
	log.Printf("%s: %s %q", r.RemoteAddr, r.Method, r.URL)
	w.Header().Set("Cache-Control", "no-store") // as it depends on the cookie
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.Header().Set("Content-Security-Policy", contentSecurityPolicy+
		"; script-src "+hashSource(page, "script")+"; style-src "+hashSource(page, "style"))
	w.WriteHeader(status)
	words := []string{"{{name}}", html.EscapeString(name), "{{room}}", html.EscapeString(room), "{{why}}", html.EscapeString(why)}
	strings.NewReplacer(words...).WriteString(w, page)
}

// hashSource returns the CSP hash source of what stands in the page's one element
// of that name. Browsers hash it with the line ends \n, also if git has made these
// \r\n.
func hashSource(page, element string) string {
	_, content, _ := strings.Cut(strings.ReplaceAll(page, "\r\n", "\n"), "<"+element+">")
	content, _, _ = strings.Cut(content, "</"+element+">")
	hash := sha256.Sum256([]byte(content))
	return "'sha256-" + base64.StdEncoding.EncodeToString(hash[:]) + "'"
}
