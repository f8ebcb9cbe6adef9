// Rooms is the chat server with what most applications add to it: rooms, unique names,
// a history that survives restarts, private messages, and hosts that can remove users.
//
// Usage:
//
//	rooms [-addr host:port] [-db file] [-secure]
//
// It serves a login form at /, each room's page at /room/NAME/, and its WebSocket
// endpoint at /room/NAME/ws. It signs cookies with the environment variable CHAT_KEY, or
// without it with a random key that the database keeps. SIGINT or SIGTERM starts a
// graceful shutdown, which ends the process with status 0; a second signal ends it at
// once.
//
// main.go, hub.go, client.go and home.html are those of the chat server, except for the
// changes that README.md, main.diff and home.diff show. The other files are new.
package main

//go:generate sh copy.sh

import (
	"crypto/rand"
	"html"
	"log"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/gorilla/securecookie"
	"github.com/gorilla/websocket"
)

// Maximum number of open rooms.
const maxRooms = 100

// Rooms opens a room when a client joins it. expire closes it.
type Rooms struct {
	store   *Store
	cookies *securecookie.SecureCookie
	running sync.WaitGroup // the hubs' run

	// expire locks it on run's goroutine: do not wait for a hub or the store while you hold it.
	mu   sync.Mutex
	hubs map[string]*Hub // of the open rooms, by fold of their names; nil after stop
}

// newRooms returns the rooms of the store, which the caller closes after stop. It opens those
// that had users when the server last ran.
func newRooms(key string, store *Store) *Rooms {
	rs := &Rooms{store: store, cookies: securecookie.New([]byte(key), nil), hubs: map[string]*Hub{}}
	rs.mu.Lock()
	defer rs.mu.Unlock()
	for _, name := range store.occupied {
		rs.open(name)
	}
	return rs
}

// open opens the room, and returns its hub. The caller holds mu.
func (rs *Rooms) open(name string) *Hub {
	hub := newHub()
	hub.Room = Room{rooms: rs, users: make(map[string]*User)}
	rs.hubs[fold(name)] = hub
	rs.running.Go(func() {
		hub.Record, hub.refusal = rs.store.load(name)
		for _, identity := range hub.present { // as of when the server last ran
			hub.add(identity).away = time.Now().Add(restartTime - awayTime)
		}
		hub.expire()
		hub.run()
	})
	return hub
}

// admit returns the hub of the room, which it opens if it is not open, or the HTTP status
// and reason for which user cannot join. It counts the caller in hub.joining, so that the
// room stays open: the caller subtracts one when its client has registered or failed to.
func (rs *Rooms) admit(name string, user Identity) (hub *Hub, status int, reason string) {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	if status, reason = rs.refuse(name, user); reason != "" {
		return nil, status, reason
	}
	if hub = rs.hubs[fold(name)]; hub == nil {
		hub = rs.open(name)
	}
	hub.joining.Add(1)
	return hub, status, ""
}

// refuse returns the reason for which user cannot connect to the hub of that room, and an
// HTTP status, or "". The hub refuses users for reasons of its own. The caller holds mu.
func (rs *Rooms) refuse(name string, user Identity) (status int, reason string) {
	switch {
	case name == "":
		return http.StatusOK, chooseRoom // the form at /
	case len(name) > maxNameSize || parseName(name) != name:
		return http.StatusNotFound, "A room cannot have that name."
	case user.ID == "" || user.Name == "" || parseName(user.Name) != user.Name:
		return http.StatusUnauthorized, chooseRoom
	case rs.hubs == nil:
		return http.StatusServiceUnavailable, "The server is shutting down."
	case rs.hubs[fold(name)] == nil && len(rs.hubs) >= maxRooms:
		return http.StatusServiceUnavailable, "The server has too many open rooms."
	}
	return http.StatusOK, ""
}

// stop stops all hubs, and returns when their clients are done.
func (rs *Rooms) stop() {
	rs.mu.Lock()
	for _, hub := range rs.hubs {
		hub.stop()
	}
	rs.hubs = nil
	rs.mu.Unlock()
	rs.running.Wait()
}

// handler serves all requests.
func (rs *Rooms) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", rs.serveHome)
	mux.HandleFunc("POST /{$}", rs.logIn)
	mux.HandleFunc("POST /logout", rs.logOut)
	mux.HandleFunc("GET /room/{room}/{$}", rs.serveHome)
	mux.HandleFunc("GET /room/{room}/ws", rs.serveRoom)
	return http.MaxBytesHandler(http.NewCrossOriginProtection().Handler(mux), 4<<10)
}

// serveHome serves a room's page, or the login form with the reason for it.
func (rs *Rooms) serveHome(w http.ResponseWriter, r *http.Request) {
	room, user := strings.ToLower(r.PathValue("room")), rs.identify(r)
	rs.mu.Lock()
	status, reason := rs.refuse(room, user)
	hub := rs.hubs[fold(room)]
	rs.mu.Unlock()
	if reason == "" && hub != nil {
		hub.do(func() {
			if refusal := hub.refuse(user); refusal != nil && refusal.Code >= 4400 {
				status, reason = refusal.Code-4000, "You cannot join: "+refusal.Text+"."
			}
		})
	}
	servePage(w, r, status, reason, user.Name, room)
}

// serveRoom connects a client to a room.
func (rs *Rooms) serveRoom(w http.ResponseWriter, r *http.Request) {
	request := JoinRequest{Identity: rs.identify(r), RoomID: r.FormValue("room")}
	hub, status, reason := (*Hub)(nil), http.StatusBadRequest, "This is not a WebSocket handshake."
	if websocket.IsWebSocketUpgrade(r) { // Otherwise it would open the room.
		hub, status, reason = rs.admit(strings.ToLower(r.PathValue("room")), request.Identity)
	}
	if reason != "" {
		log.Printf("%s: handshake refused: %q: %s", r.RemoteAddr, r.URL, reason)
		http.Error(w, reason, status)
		return
	}
	defer hub.joining.Add(-1)
	request.After, _ = strconv.ParseInt(r.FormValue("after"), 10, 64)
	(&Client{hub: hub, request: request}).serve(w, r)
}

// servePage serves a room's page, or the login form if there is a reason for it. The
// content security policy allows the page its own script and style, by a nonce, its
// icon, and WebSockets. https://www.w3.org/TR/CSP3/
func servePage(w http.ResponseWriter, r *http.Request, status int, reason, name, room string) {
	log.Printf("%s: %s %q", r.RemoteAddr, r.Method, r.URL)
	page, nonce := home, rand.Text()
	if reason != "" {
		page = loginForm(status, reason)
		if len(r.CookiesNamed(cookieName(r))) == 0 {
			setCookie(w, r, "") // logIn checks that the browser returns it.
		}
	}
	header := w.Header()
	header.Set("Cache-Control", "no-store") // as it depends on the cookie
	header.Set("Content-Security-Policy", "default-src 'none'; script-src 'nonce-"+nonce+
		"'; style-src 'nonce-"+nonce+"'; img-src data:; connect-src 'self' ws: wss:; "+
		"base-uri 'none'; form-action 'self'; frame-ancestors 'none'")
	header.Set("Content-Type", "text/html; charset=utf-8")
	header.Set("X-Content-Type-Options", "nosniff")
	header.Set("X-Reason", reason) // A page that reconnects shows it.
	w.WriteHeader(status)
	strings.NewReplacer(
		"<script", `<script nonce="`+nonce+`"`, "<style", `<style nonce="`+nonce+`"`,
		"{{reason}}", html.EscapeString(reason),
		"{{name}}", html.EscapeString(name), "{{room}}", html.EscapeString(room),
	).WriteString(w, page)
}
