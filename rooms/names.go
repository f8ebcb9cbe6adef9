package main

import (
	"cmp"
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

// A directory maps names to values, and treats confusable names as equal: each value has
// two keys, fold and looks.
type directory[T any] map[string]*T

func (d directory[T]) find(name string) *T       { return cmp.Or(d[fold(name)], d[looks(name)]) }
func (d directory[T]) add(name string, value *T) { d[fold(name)], d[looks(name)] = value, value }
func (d directory[T]) remove(name string)        { delete(d, fold(name)); delete(d, looks(name)) }

// fold returns a key that is equal for names that differ in case only, as Lisa and LISA,
// or look alike in lower case. Weiß equals Weiss.
// https://www.unicode.org/reports/tr39/#Confusable_Detection
func fold(name string) string {
	small := strings.ReplaceAll(cases.Fold().String(name), "i\u0307", "i") // from the Turkish capital i
	return cases.Fold().String(confusable.Skeleton(small))
}

// looks returns a key that is equal for names that look alike as written, as Gretel and
// GreteI, or look alike but for case, as Gretel and greteI. The first star keeps these keys
// apart from those of fold, as no name contains one. The others stand for capital Ls, so that
// TalkerL differs from TalkerI.
func looks(name string) string {
	return "* " + cases.Fold().String(strings.ReplaceAll(confusable.Skeleton(name), "L", "*"))
}
