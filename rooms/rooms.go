// Rooms is the chat server with what most copies of it grow: a room for each path,
// names that two cannot have at once, history, lines to one person, and somebody who can
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
// main.go, hub.go, client.go and home.html are those of the chat server, but for the
// lines that README.md, main.diff and home.diff show. The other files are new.
package main

//go:generate cp ../main.go ../hub.go ../client.go ../home.html .
//go:generate sh -c "sed -n '/^--- /,/^```$/p' README.md | cat - main.diff home.diff | patch --no-backup-if-mismatch"

import (
	"cmp"
	"crypto/rand"
	_ "embed"
	"flag"
	"html"
	"log"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/gorilla/securecookie"
)

// Maximum number of rooms at once.
const maxRooms = 100

var secure = flag.Bool("secure", false, "have browsers send cookies over https alone")

//go:embed login.html
var login string

// Rooms opens each room when somebody comes. A room closes itself, in sweep.
type Rooms struct {
	cookies *securecookie.SecureCookie
	running sync.WaitGroup // the hubs' run

	mu   sync.Mutex     // sweep locks it in run: do not send to a hub while you hold it
	hubs directory[Hub] // by the rooms' names; nil after stop
}

func newRooms(key string) *Rooms {
	return &Rooms{cookies: securecookie.New([]byte(key), nil), hubs: make(directory[Hub])}
}

// admit returns the hub of the room of that name, and opens the room if there is none.
// It counts the caller in hub.coming, which keeps the room open: the caller takes one away
// when its client has registered, or has failed to. If there is no way in, hub is nil,
// and why says why.
func (rs *Rooms) admit(name string, who Identity) (hub *Hub, status int, why string) {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	if status, why = rs.whyNot(name, who); why != "" {
		return nil, status, why
	}
	if hub = rs.hubs.find(name); hub == nil {
		hub = newHub()
		hub.Room = Room{
			rooms: rs, name: name, id: rand.Text(), seconds: time.Tick(time.Second),
			kicked: make(map[string]bool), people: make(map[string]*Person), names: make(directory[Person]),
		}
		rs.hubs.add(name, hub)
		rs.running.Go(hub.run)
	}
	hub.coming.Add(1)
	return hub, status, ""
}

// whyNot returns why this person cannot get to the hub of the room of that name, and the
// HTTP status for that; or "". Kicks and full rooms are enter's business. The caller
// holds mu.
func (rs *Rooms) whyNot(name string, who Identity) (status int, why string) {
	switch {
	case name == "":
		return http.StatusOK, "Say who you are, and where you want to go."
	case len(name) > maxNameSize || parseName(name) != name: // the length first: a long name takes parseName long
		return http.StatusNotFound, "No room can have that name."
	case who.ID == "" || who.Name == "" || parseName(who.Name) != who.Name:
		return http.StatusUnauthorized, "Say who you are."
	case rs.hubs == nil:
		return http.StatusServiceUnavailable, "The server is shutting down."
	case rs.hubs.find(name) == nil && len(rs.hubs) >= 2*maxRooms: // each stands in it twice
		return http.StatusServiceUnavailable, "There are as many rooms as there can be."
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
	// A phone's keyboard puts a space behind a word.
	name, room := strings.TrimSpace(r.PostFormValue("name")), strings.TrimSpace(r.PostFormValue("room"))
	who := Identity{ID: cmp.Or(rs.who(r).ID, rand.Text()), Name: parseName(name)}
	if who.Name == "" || parseName(room) == "" {
		servePage(w, r, http.StatusBadRequest, "A name is one word of letters, digits, - and _, of at most 32 bytes.", name, room)
		return
	}
	value, _ := rs.cookies.Encode("chat", who) // No name is too long for a cookie.
	http.SetCookie(w, &http.Cookie{Name: "chat", Value: value, Path: "/", HttpOnly: true, Secure: *secure, SameSite: http.SameSiteLaxMode})
	http.Redirect(w, r, "/room/"+parseName(room)+"/", http.StatusSeeOther)
}

// serveHome answers with a room's page, or with the form and why there is no way in.
func (rs *Rooms) serveHome(w http.ResponseWriter, r *http.Request) {
	room, who := r.PathValue("room"), rs.who(r)
	rs.mu.Lock()
	status, why := rs.whyNot(room, who)
	rs.mu.Unlock()
	servePage(w, r, status, why, who.Name, room)
}

// serveRoom makes the request a client in a room.
func (rs *Rooms) serveRoom(w http.ResponseWriter, r *http.Request) {
	visit := Visit{Identity: rs.who(r)}
	hub, status, why := rs.admit(r.PathValue("room"), visit.Identity)
	if why != "" {
		http.Error(w, why, status)
		return
	}
	defer hub.coming.Add(-1)
	if r.FormValue("room") == hub.id { // else the number is another room's, of the same name
		visit.After, _ = strconv.Atoi(r.FormValue("after"))
	}
	serveWs(hub, visit, w, r)
}

// servePage answers with a room's page, or with the form if there is a why, and
// writes these words in it. A page gets its own script and style, which bear this
// answer's nonce, the icon in it, its own server, and WebSockets; nothing else.
// https://www.w3.org/TR/CSP3/
func servePage(w http.ResponseWriter, r *http.Request, status int, why, name, room string) {
	log.Printf("%s: %s %q", r.RemoteAddr, r.Method, r.URL)
	page, nonce := home, rand.Text()
	if why != "" {
		page = login
	}
	w.Header().Set("Cache-Control", "no-store") // as it depends on the cookie
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.Header().Set("Content-Security-Policy", "default-src 'none'; script-src 'nonce-"+nonce+"'; style-src 'nonce-"+nonce+
		"'; img-src data:; connect-src 'self' ws: wss:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'")
	w.WriteHeader(status)
	strings.NewReplacer(
		"<script>", `<script nonce="`+nonce+`">`, "<style>", `<style nonce="`+nonce+`">`,
		"{{why}}", html.EscapeString(why), "{{name}}", html.EscapeString(name), "{{room}}", html.EscapeString(room),
	).WriteString(w, page)
}
