-- The schema, as steps from each user_version to the next. To change it, add a step: a
-- database of an earlier version goes through those that it lacks, a new one through all.

-- From version 0, of which databases exist that have these tables. Lists of user IDs are
-- separated by spaces. A line without recipients is for all users.
CREATE TABLE IF NOT EXISTS server (cookie_key TEXT NOT NULL, clean INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS rooms (id TEXT PRIMARY KEY, name TEXT NOT NULL, fold TEXT NOT NULL UNIQUE,
	owner TEXT NOT NULL, kicked TEXT NOT NULL, used INTEGER NOT NULL,
	last INTEGER NOT NULL, forgotten INTEGER NOT NULL, lost INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS lines (room TEXT NOT NULL REFERENCES rooms ON DELETE CASCADE, n INTEGER NOT NULL,
	recipients TEXT NOT NULL, line TEXT NOT NULL, PRIMARY KEY (room, n)) WITHOUT ROWID;

-- From version 1. The users of a room, in the order in which they joined or were kicked:
-- kicked is 0 if the user is in the room, 1 if it was kicked, 2 if it was by a host that
-- stood in for the owner. A room's last kicks are its last lines of that kind, which have the
-- names. Joins and leaves are no longer history. A crash may lose lines of a room that is
-- open: a hub has it.
CREATE TABLE users (n INTEGER PRIMARY KEY, room TEXT NOT NULL REFERENCES rooms ON DELETE CASCADE,
	id TEXT NOT NULL, name TEXT NOT NULL, kicked INTEGER NOT NULL, UNIQUE (room, id));
INSERT OR IGNORE INTO users (room, id, name, kicked) SELECT rooms.id, value, '', 1
	FROM rooms, json_each('[' || replace(json_quote(kicked), ' ', '","') || ']') WHERE kicked <> '' ORDER BY rooms.id, key;
DELETE FROM lines WHERE NOT json_valid(line);
WITH kicks AS (SELECT room, line ->> 'user' AS name, row_number() OVER (PARTITION BY room ORDER BY n DESC) AS latest
		FROM lines WHERE line ->> 'kind' = 'leave' AND line ->> 'text' LIKE 'kicked by %'),
	kicked AS (SELECT room, n, row_number() OVER (PARTITION BY room ORDER BY n DESC) AS latest FROM users)
	UPDATE users SET name = kicks.name FROM kicks JOIN kicked USING (room, latest) WHERE users.n = kicked.n;
DELETE FROM lines WHERE line ->> 'kind' IN ('join', 'leave');
ALTER TABLE rooms DROP COLUMN kicked;
ALTER TABLE rooms ADD COLUMN open INTEGER NOT NULL DEFAULT 0;
UPDATE rooms SET open = (SELECT NOT clean FROM server);
ALTER TABLE server DROP COLUMN clean;
