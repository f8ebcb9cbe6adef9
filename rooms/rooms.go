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
// graceful shutdown, which ends the process with status 0; a second signal forces it to
// exit with status 1.
//
// main.go, hub.go, client.go and home.html are those of the chat server, except for the
// changes that README.md, main.diff and home.diff show. The other files are new.
package main

//go:generate cp ../main.go ../hub.go ../client.go ../home.html .
//go:generate sh -c "sed -n '/^--- /,/^```$/p' README.md | cat - main.diff home.diff | patch --no-backup-if-mismatch"

import (
	"cmp"
	"crypto/rand"
	"html"
	"log"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/gorilla/securecookie"
)

// Maximum number of open rooms.
const maxRooms = 100

// Rooms opens a room when a client joins it. expire closes it.
type Rooms struct {
	store   *Store
	cookies *securecookie.SecureCookie
	running sync.WaitGroup // the hubs' run

	mu   sync.Mutex      // expire locks it on run's goroutine: do not wait for a hub or the store while you hold it
	hubs map[string]*Hub // of the open rooms, by fold of their names; nil after stop
}

// newRooms returns the rooms of the store, which the caller closes after stop.
func newRooms(key string, store *Store) *Rooms {
	return &Rooms{store: store, cookies: securecookie.New([]byte(key), nil), hubs: make(map[string]*Hub)}
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
		hub = newHub()
		hub.Room = Room{rooms: rs, ticks: time.Tick(time.Second), users: make(map[string]*User), names: make(directory[User])}
		rs.hubs[fold(name)] = hub
		rs.running.Go(func() {
			hub.Record, hub.refusal = rs.store.load(name)
			hub.run()
		})
	}
	hub.joining.Add(1)
	return hub, status, ""
}

// refuse returns the reason for which user cannot connect to the hub of that room, and an
// HTTP status, or "". The hub itself refuses users that are kicked, whose name is taken,
// or for which there is no space. The caller holds mu.
func (rs *Rooms) refuse(name string, user Identity) (status int, reason string) {
	switch {
	case name == "":
		return http.StatusOK, "Choose a name and a room." // the form at /
	case len(name) > maxNameSize || parseName(name) != name:
		return http.StatusNotFound, "A room cannot have that name."
	case user.ID == "" || user.Name == "" || parseName(user.Name) != user.Name:
		return http.StatusUnauthorized, "Choose a name and a room."
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
	mux.HandleFunc("GET /room/{room}/{$}", rs.serveHome)
	mux.HandleFunc("GET /room/{room}/ws", rs.serveRoom)
	return http.MaxBytesHandler(http.NewCrossOriginProtection().Handler(mux), 4<<10)
}

// identify returns the user that the request's cookie names, or none.
func (rs *Rooms) identify(r *http.Request) (user Identity) {
	if cookie, err := r.Cookie("chat"); err == nil {
		rs.cookies.Decode("chat", cookie.Value, &user)
	}
	return user
}

// logIn sets the cookie for the name in the form, and redirects to the room. Authenticate
// users here: ask for a password, or redirect them to an identity provider.
func (rs *Rooms) logIn(w http.ResponseWriter, r *http.Request) {
	// Phone keyboards add a space after a word.
	name, room := strings.TrimSpace(r.PostFormValue("name")), strings.ToLower(strings.TrimSpace(r.PostFormValue("room")))
	user := Identity{ID: cmp.Or(rs.identify(r).ID, rand.Text()), Name: parseName(name)}
	if user.Name == "" || parseName(room) == "" {
		servePage(w, r, http.StatusBadRequest, "A name is one word of letters, digits, - and _, of at most 32 bytes.", name, room)
		return
	}
	value, _ := rs.cookies.Encode("chat", user) // No name is too long for a cookie.
	http.SetCookie(w, &http.Cookie{Name: "chat", Value: value, Path: "/", HttpOnly: true, Secure: *secure, SameSite: http.SameSiteLaxMode})
	http.Redirect(w, r, "/room/"+parseName(room)+"/", http.StatusSeeOther)
}

// serveHome serves a room's page, or the login form with the reason for it.
func (rs *Rooms) serveHome(w http.ResponseWriter, r *http.Request) {
	room, user := strings.ToLower(r.PathValue("room")), rs.identify(r)
	rs.mu.Lock()
	status, reason := rs.refuse(room, user)
	rs.mu.Unlock()
	servePage(w, r, status, reason, user.Name, room)
}

// serveRoom connects a client to a room.
func (rs *Rooms) serveRoom(w http.ResponseWriter, r *http.Request) {
	request := JoinRequest{Identity: rs.identify(r), RoomID: r.FormValue("room")}
	hub, status, reason := rs.admit(strings.ToLower(r.PathValue("room")), request.Identity)
	if reason != "" {
		log.Printf("%s: handshake refused: %q: %s", r.RemoteAddr, r.URL, reason)
		http.Error(w, reason, status)
		return
	}
	defer hub.joining.Add(-1)
	request.After, _ = strconv.ParseInt(r.FormValue("after"), 10, 64)
	serveWs(hub, request, w, r)
}

// servePage serves a room's page, or the login form if there is a reason for it. The
// content security policy allows the page its own script and style, by a nonce, its
// icon, and WebSockets. https://www.w3.org/TR/CSP3/
func servePage(w http.ResponseWriter, r *http.Request, status int, reason, name, room string) {
	log.Printf("%s: %s %q", r.RemoteAddr, r.Method, r.URL)
	page, nonce := home, rand.Text()
	if reason != "" {
		page = login
	}
	w.Header().Set("Cache-Control", "no-store") // as it depends on the cookie
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.Header().Set("X-Reason", reason) // A page that reconnects shows it.
	w.Header().Set("Content-Security-Policy", "default-src 'none'; script-src 'nonce-"+nonce+"'; style-src 'nonce-"+nonce+
		"'; img-src data:; connect-src 'self' ws: wss:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'")
	w.WriteHeader(status)
	strings.NewReplacer(
		"<script", `<script nonce="`+nonce+`"`, "<style", `<style nonce="`+nonce+`"`, "{{status}}", strconv.Itoa(status),
		"{{reason}}", html.EscapeString(reason), "{{name}}", html.EscapeString(name), "{{room}}", html.EscapeString(room),
	).WriteString(w, page)
}
