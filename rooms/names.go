package main

import (
	"regexp"
	"strings"

	"go.mau.fi/util/confusable"
	"golang.org/x/text/cases"
	"golang.org/x/text/secure/precis"
)

var word = regexp.MustCompile(`^[\p{L}\p{Nd}][\p{L}\p{M}\p{Nd}\x{200C}\x{200D}_-]*$`)

// parseName returns a name in the form that RFC 8265 (PRECIS) has for user names, or "" if
// it is invalid. A name is one word, so that a command can have text after it. The invisible
// joiners U+200C and U+200D are valid where the script needs them, as in علی‌رضا.
func parseName(text string) string {
	name, err := precis.UsernameCasePreserved.String(text)
	if err != nil || len(name) > maxNameSize || !word.MatchString(name) {
		return ""
	}
	return name
}

// keys returns what names are compared by: one could be taken for the other if either key is
// equal. So it is if UTS 39 calls them confusable, or if they differ only in case, accents or
// punctuation.
func keys(name string) [2]string {
	return [2]string{simplify(fold(name)), simplify(looks(name))}
}

// alike returns a function that reports whether a user's name could be taken for name.
func alike(name string) func(*User) bool {
	keys := keys(name)
	return func(user *User) bool { return user.keys[0] == keys[0] || user.keys[1] == keys[1] }
}

// fold returns a key that is equal for names that differ in case only, as Lisa and LISA,
// or look alike in lower case. Weiß equals Weiss.
// https://www.unicode.org/reports/tr39/#Confusable_Detection
func fold(name string) string {
	small := strings.ReplaceAll(cases.Fold().String(name), "i\u0307", "i") // from the Turkish İ
	return cases.Fold().String(confusable.Skeleton(small))
}

// looks returns a key that is equal for names that look alike as written, as Gretel and
// GreteI, or look alike but for case, as Gretel and greteI. The stars, which no name contains,
// stand for capital Ls, so that TalkerL differs from TalkerI.
func looks(name string) string {
	return cases.Fold().String(strings.ReplaceAll(confusable.Skeleton(name), "L", "*"))
}

// What can be added to a letter or a name: accents, as in Greté, and punctuation, as in Grete_.
// Marks of other scripts than Latin, Greek and Cyrillic stay, as they tell words apart.
var additions = regexp.MustCompile(
	`[\x{300}-\x{36F}\x{1AB0}-\x{1AFF}\x{1DC0}-\x{1DFF}\x{20D0}-\x{20FF}\x{FE20}-\x{FE2F}_-]`)

// Two letters that look like one, and small capitals that UTS 39 tells from capitals.
var lookAlikes = strings.NewReplacer("vv", "w",
	"ᴀ", "a", "ʙ", "b", "ᴅ", "d", "ᴇ", "e", "ꜰ", "f", "ɢ", "g", "ʜ", "h", "ᴊ", "j",
	"ĸ", "k", "ʟ", "l", "ʍ", "rn", "ɴ", "n", "ᴘ", "p", "ʀ", "r", "ᴛ", "t")

// simplify makes equal what looks alike, though UTS 39 does not call it confusable.
func simplify(key string) string {
	return lookAlikes.Replace(additions.ReplaceAllString(key, ""))
}
