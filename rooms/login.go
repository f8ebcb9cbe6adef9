package main

import (
	"crypto/rand"
	"maps"
	"net/http"
	"net/url"
	"strings"
)

// An Identity is the content of a user's cookie.
type Identity struct{ ID, Name string }

// What the form says if nothing is wrong, and if the login would not last.
const chooseRoom = "Choose a name and a room."
const noCookie = "Your browser did not return the cookie of this form: " +
	"allow cookies for this site. (With -secure, it needs HTTPS.)"

// cookieName returns the name of the cookie. Browsers send a cookie to all ports of a host,
// so the name contains the port: two servers on one host do not log each other out. They
// accept a name that starts with __Host- from this host alone, over HTTPS.
func cookieName(r *http.Request) string {
	name := "chat" + (&url.URL{Host: r.Host}).Port()
	if *secure {
		return "__Host-" + name
	}
	return name
}

// setCookie sets the cookie for as long as the browser runs.
func setCookie(w http.ResponseWriter, r *http.Request, value string) {
	http.SetCookie(w, &http.Cookie{Name: cookieName(r), Value: value, Path: "/",
		HttpOnly: true, Secure: *secure, SameSite: http.SameSiteLaxMode})
}

// identify returns the user that the request's cookie names, or none. It tries each cookie
// of that name, as other servers of this host or domain may have set one for other paths.
func (rs *Rooms) identify(r *http.Request) (user Identity) {
	for _, cookie := range r.CookiesNamed(cookieName(r)) {
		if rs.cookies.Decode("chat", cookie.Value, &user) == nil {
			return user
		}
	}
	return Identity{}
}

// logIn sets the cookie for the name in the form, and redirects to the room. Another name is
// another user, so that no user receives the private messages of the one before. Authenticate
// users here: ask for a password, or redirect them to an identity provider.
func (rs *Rooms) logIn(w http.ResponseWriter, r *http.Request) {
	// Phone keyboards add a space after a word.
	name := strings.TrimSpace(r.PostFormValue("name"))
	room := strings.ToLower(strings.TrimSpace(r.PostFormValue("room")))
	switch {
	case len(r.CookiesNamed(cookieName(r))) == 0: // servePage has set one.
		servePage(w, r, http.StatusUnauthorized, noCookie, name, room)
		return
	case parseName(name) == "":
		servePage(w, r, http.StatusBadRequest, "A user cannot have that name.", name, room)
		return
	case parseName(room) == "":
		servePage(w, r, http.StatusNotFound, "A room cannot have that name.", name, room)
		return
	}
	user := rs.identify(r)
	if user.Name != parseName(name) {
		rs.remove(user)
		user = Identity{ID: rand.Text(), Name: parseName(name)}
	}
	value, _ := rs.cookies.Encode("chat", user) // No name is too long for a cookie.
	setCookie(w, r, value)
	http.Redirect(w, r, "/room/"+parseName(room)+"/", http.StatusSeeOther)
}

// logOut empties the cookie, and redirects to the form.
func (rs *Rooms) logOut(w http.ResponseWriter, r *http.Request) {
	rs.remove(rs.identify(r))
	setCookie(w, r, "")
	http.Redirect(w, r, "/", http.StatusSeeOther)
}

// remove removes a user that logs out from all rooms, and closes its connections.
func (rs *Rooms) remove(user Identity) {
	if user.ID == "" {
		return // Otherwise each login would wait for all hubs.
	}
	rs.mu.Lock()
	hubs := maps.Clone(rs.hubs)
	rs.mu.Unlock()
	for _, hub := range hubs {
		hub.do(func() {
			if user := hub.users[user.ID]; user != nil {
				hub.remove(user, "", errLoggedOut)
			}
		})
	}
}

// loginForm returns the form, with the focus on its first field, or on the one that is to
// blame for status.
func loginForm(status int, reason string) string {
	class, name, room := "error", "autofocus", ""
	switch {
	case reason == chooseRoom:
		class = ""
	case status == http.StatusBadRequest || status == http.StatusConflict:
		name = `autofocus aria-invalid="true"`
	case status == http.StatusForbidden || status == http.StatusNotFound:
		name, room = "", `autofocus aria-invalid="true"`
	}
	states := strings.NewReplacer("{{class}}", class, "{{name-state}}", name, "{{room-state}}", room)
	return states.Replace(login)
}
