#!/bin/sh
# Copies the chat server's files from .. and changes them as README.md, main.diff and home.diff
# show: go generate runs it. With the argument diffs, it goes the other way: it makes these
# diffs from the copies, which may have been edited. If that fails, it changes nothing.
set -eu
cd "$(dirname "$0")"
temp=$(mktemp -d)
trap 'rm -rf "$temp"' EXIT

# base writes the chat server's file, with a first line that says where it is from.
base() {
	case $1 in
	*.html) echo "<!-- From ../$1 by go generate. If you edit this copy, run make diffs. -->" ;;
	*) printf '// From ../%s by go generate. If you edit this copy, run make diffs.\n\n' "$1" ;;
	esac
	cat "../$1"
}

# difference writes the difference of each of the files.
difference() {
	for file; do
		base "$file" | diff -a -U1 --label "../$file" --label "$file" - "$file" || test $? -eq 1
	done
}

if [ "${1:-}" = diffs ]; then
	difference main.go >"$temp/main.diff"
	difference home.html >"$temp/home.diff"
	difference hub.go client.go >"$temp/readme.diff"
	sed -e "/^\`\`\`diff\$/,/^\`\`\`\$/{/^\`\`\`diff\$/r $temp/readme.diff" -e '/^```/!d' -e '}' README.md >"$temp/README.md"
	cp "$temp/main.diff" "$temp/home.diff" "$temp/README.md" .
	exit
fi
for file in main.go hub.go client.go home.html; do base "$file" >"$temp/$file"; done
if ! output=$(sed -n '/^```diff$/,/^```$/{/^```/!p}' README.md | cat - main.diff home.diff |
	patch --no-backup-if-mismatch --reject-file=- --directory="$temp" 2>&1); then
	echo "$output" >&2
	echo "The copies are as before. Make these changes in them by hand, then run make diffs." >&2
	exit 1
fi
cp "$temp/main.go" "$temp/hub.go" "$temp/client.go" "$temp/home.html" .
