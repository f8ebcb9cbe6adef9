-- A database of a version before schema.sql: what sqlite3 .dump gives.
PRAGMA foreign_keys=OFF;
BEGIN TRANSACTION;
CREATE TABLE server (cookie_key TEXT NOT NULL, clean INTEGER NOT NULL);
INSERT INTO server VALUES('3U3TIXY6EFV3VHPDVMWXNWY3SP',1);
CREATE TABLE rooms (id TEXT PRIMARY KEY, name TEXT NOT NULL, fold TEXT NOT NULL UNIQUE,
	owner TEXT NOT NULL, kicked TEXT NOT NULL, used INTEGER NOT NULL,
	last INTEGER NOT NULL, forgotten INTEGER NOT NULL, lost INTEGER NOT NULL);
INSERT INTO rooms VALUES('UIWSGGPTHAUQ7VGQGOFG6JOUEE','kitchen','kitchen','GRETESID','MALLORYSID TRUDYSID',1796052150,11,0,0);
INSERT INTO rooms VALUES('DANKXTIVHBT7G3PXXLDA2RUJ5N','garden','garden','UWESID','',1796052150,4,0,0);
CREATE TABLE lines (room TEXT NOT NULL REFERENCES rooms ON DELETE CASCADE, n INTEGER NOT NULL,
	recipients TEXT NOT NULL, line TEXT NOT NULL, PRIMARY KEY (room, n)) WITHOUT ROWID;
INSERT INTO lines VALUES('DANKXTIVHBT7G3PXXLDA2RUJ5N',1,'','{"n":1,"time":"2026-11-30T15:22:30.169996149Z","kind":"join","user":"Uwe"}');
INSERT INTO lines VALUES('DANKXTIVHBT7G3PXXLDA2RUJ5N',2,'','{"n":2,"time":"2026-11-30T15:22:30.170635589Z","kind":"message","user":"Uwe","text":"weeds 0"}');
INSERT INTO lines VALUES('DANKXTIVHBT7G3PXXLDA2RUJ5N',3,'','{"n":3,"time":"2026-11-30T15:22:30.170645558Z","kind":"message","user":"Uwe","text":"weeds 1"}');
INSERT INTO lines VALUES('DANKXTIVHBT7G3PXXLDA2RUJ5N',4,'','{"n":4,"time":"2026-11-30T15:22:30.170649836Z","kind":"message","user":"Uwe","text":"weeds 2"}');
INSERT INTO lines VALUES('UIWSGGPTHAUQ7VGQGOFG6JOUEE',1,'','{"n":1,"time":"2026-11-30T15:22:30.157817703Z","kind":"join","user":"Grete"}');
INSERT INTO lines VALUES('UIWSGGPTHAUQ7VGQGOFG6JOUEE',2,'','{"n":2,"time":"2026-11-30T15:22:30.159075472Z","kind":"join","user":"Hans"}');
INSERT INTO lines VALUES('UIWSGGPTHAUQ7VGQGOFG6JOUEE',3,'','{"n":3,"time":"2026-11-30T15:22:30.16003883Z","kind":"join","user":"Mallory"}');
INSERT INTO lines VALUES('UIWSGGPTHAUQ7VGQGOFG6JOUEE',4,'','{"n":4,"time":"2026-11-30T15:22:30.16218391Z","kind":"join","user":"Trudy"}');
INSERT INTO lines VALUES('UIWSGGPTHAUQ7VGQGOFG6JOUEE',5,'','{"n":5,"time":"2026-11-30T15:22:30.163388117Z","kind":"message","user":"Grete","text":"dinner is at six, <b>\"promptly\"</b>"}');
INSERT INTO lines VALUES('UIWSGGPTHAUQ7VGQGOFG6JOUEE',6,'GRETESID HANSSID','{"n":6,"time":"2026-11-30T15:22:30.163699501Z","kind":"private","user":"Grete","to":"Hans","text":"bring wine","line":"/to Hans bring wine"}');
INSERT INTO lines VALUES('UIWSGGPTHAUQ7VGQGOFG6JOUEE',7,'HANSSID GRETESID','{"n":7,"time":"2026-11-30T15:22:30.163823367Z","kind":"private","user":"Hans","to":"Grete","text":"red or white?","line":"/to Grete red or white?"}');
INSERT INTO lines VALUES('UIWSGGPTHAUQ7VGQGOFG6JOUEE',8,'','{"n":8,"time":"2026-11-30T15:22:30.163905203Z","kind":"message","user":"Mallory","text":"I was here"}');
INSERT INTO lines VALUES('UIWSGGPTHAUQ7VGQGOFG6JOUEE',9,'','{"n":9,"time":"2026-11-30T15:22:30.16405556Z","kind":"leave","user":"Mallory","text":"kicked by Grete"}');
INSERT INTO lines VALUES('UIWSGGPTHAUQ7VGQGOFG6JOUEE',10,'','{"n":10,"time":"2026-11-30T15:22:30.16431762Z","kind":"leave","user":"Trudy","text":"kicked by Grete"}');
INSERT INTO lines VALUES('UIWSGGPTHAUQ7VGQGOFG6JOUEE',11,'','{"n":11,"time":"2026-11-30T15:22:30.164522721Z","kind":"message","user":"Hans","text":"schön & gut 😀"}');
COMMIT;
