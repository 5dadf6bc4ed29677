//! `polylora.db`: the tables of adapters, access, jobs and files, and how they came to be so.
//!
//! Owns the file's name and its one list of formats. Never reads or changes a row: that is done by
//! whose rows they are. The thing to know: access and jobs had files of their own once, and each
//! format of those is one here, so that a file moves in at the format that it has.

use super::moved::Moved;

pub const NAME: &str = "polylora.db";

/// Oldest first; the list only ever grows. "IF NOT EXISTS" in the first: files made before
/// migrations were counted have these tables.
pub const MIGRATIONS: &[&str] = &[
    "
    CREATE TABLE IF NOT EXISTS names (
        name TEXT PRIMARY KEY, current INTEGER, next_number INTEGER NOT NULL) STRICT;
    CREATE TABLE IF NOT EXISTS versions (
        name TEXT NOT NULL, number INTEGER NOT NULL, digest TEXT NOT NULL,
        summary TEXT NOT NULL,
        logit_change_max REAL, forced INTEGER NOT NULL, created INTEGER NOT NULL,
        file_bytes INTEGER NOT NULL, resident_bytes INTEGER NOT NULL,
        PRIMARY KEY (name, number)) STRICT;
",
    "
    ALTER TABLE versions ADD COLUMN lineage TEXT NOT NULL DEFAULT '{\"kind\":\"uploaded\"}';
    ALTER TABLE versions ADD COLUMN pinned INTEGER NOT NULL DEFAULT 0;
    CREATE TABLE base (only INTEGER PRIMARY KEY CHECK (only = 1), digest TEXT NOT NULL) STRICT;
    CREATE TABLE aliases (
        alias TEXT PRIMARY KEY, targets TEXT NOT NULL, previous TEXT,
        created INTEGER NOT NULL, updated INTEGER NOT NULL) STRICT;
",
    // When the catalogue last changed, in Unix milliseconds: whether it has seen a file.
    "
    CREATE TABLE changed (only INTEGER PRIMARY KEY CHECK (only = 1), at INTEGER NOT NULL) STRICT;
    INSERT INTO changed SELECT 1, 1000 * max(
        (SELECT coalesce(max(created), 0) FROM versions),
        (SELECT coalesce(max(updated), 0) FROM aliases));
",
    "
    CREATE TABLE owners (name TEXT PRIMARY KEY, tenant TEXT) STRICT;
    INSERT INTO owners (name) SELECT DISTINCT name FROM versions;
    INSERT OR IGNORE INTO owners (name) SELECT alias FROM aliases;
",
    // What was `access.db`.
    "
    CREATE TABLE keys (
        number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, label TEXT NOT NULL,
        scopes TEXT NOT NULL, tenant TEXT, adapters TEXT NOT NULL, weight INTEGER NOT NULL,
        limits TEXT NOT NULL, created INTEGER NOT NULL, expires INTEGER, revoked INTEGER,
        last_used INTEGER) STRICT;
    CREATE TABLE secrets (
        hash BLOB PRIMARY KEY, key TEXT NOT NULL REFERENCES keys (id), expires INTEGER) STRICT;
",
    "
    CREATE TABLE limits (name TEXT PRIMARY KEY, limits TEXT NOT NULL) STRICT;
    CREATE TABLE usage (
        subject TEXT PRIMARY KEY, day INTEGER NOT NULL, day_tokens INTEGER NOT NULL,
        month INTEGER NOT NULL, month_tokens INTEGER NOT NULL) STRICT;
    CREATE TABLE audit (
        id INTEGER PRIMARY KEY AUTOINCREMENT, at INTEGER NOT NULL, key TEXT NOT NULL, tenant TEXT,
        action TEXT NOT NULL, name TEXT, digest TEXT, outcome TEXT NOT NULL,
        status INTEGER NOT NULL, request TEXT NOT NULL) STRICT;
    CREATE TRIGGER audit_is_not_changed BEFORE UPDATE ON audit BEGIN
        SELECT RAISE(ABORT, 'the audit log is append-only'); END;
    CREATE TRIGGER audit_is_not_shortened BEFORE DELETE ON audit BEGIN
        SELECT RAISE(ABORT, 'the audit log is append-only'); END;
",
    "
    ALTER TABLE keys ADD COLUMN manage TEXT;
    ALTER TABLE audit ADD COLUMN count INTEGER NOT NULL DEFAULT 1;
",
    // What was `jobs.db`.
    "
    CREATE TABLE jobs (
        number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE,
        key TEXT NOT NULL, tenant TEXT, spec TEXT NOT NULL, sets TEXT,
        state TEXT NOT NULL, restarts INTEGER NOT NULL DEFAULT 0,
        created INTEGER NOT NULL, started INTEGER, ended INTEGER,
        outcome TEXT, failure TEXT) STRICT;
    CREATE TABLE reports (
        id TEXT PRIMARY KEY REFERENCES jobs (id), report TEXT NOT NULL, picture TEXT NOT NULL,
        evaluation TEXT) STRICT;
",
    // A tenant's page of the audit log is found without a look at the others' records.
    "
    CREATE INDEX audit_by_tenant ON audit (tenant);
",
    "
    CREATE TABLE files (
        number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, tenant TEXT,
        digest TEXT NOT NULL, bytes INTEGER NOT NULL, name TEXT NOT NULL, purpose TEXT NOT NULL,
        created INTEGER NOT NULL, expires INTEGER, problem TEXT) STRICT;
    CREATE INDEX files_by_digest ON files (digest);
    CREATE INDEX files_by_tenant ON files (tenant);
    CREATE TABLE uploads (
        id TEXT PRIMARY KEY, tenant TEXT, bytes INTEGER NOT NULL, name TEXT NOT NULL,
        purpose TEXT NOT NULL, lifetime INTEGER, created INTEGER NOT NULL,
        expires INTEGER NOT NULL, state TEXT NOT NULL, file TEXT) STRICT;
    CREATE TABLE parts (
        id TEXT PRIMARY KEY, upload TEXT NOT NULL REFERENCES uploads (id),
        bytes INTEGER NOT NULL, created INTEGER NOT NULL) STRICT;
    CREATE INDEX parts_by_upload ON parts (upload);
",
    // What jobs tell while they run.
    "
    CREATE TABLE events (
        number INTEGER PRIMARY KEY AUTOINCREMENT, job TEXT NOT NULL REFERENCES jobs (id),
        at INTEGER NOT NULL, level TEXT NOT NULL, message TEXT NOT NULL, metrics TEXT,
        step INTEGER) STRICT;
    CREATE INDEX events_by_job ON events (job, number);
",
    // How a result was judged; and the digests of lines that jobs learnt, which are known as long
    // as a version rests on them.
    "
    ALTER TABLE jobs ADD COLUMN gate TEXT;
    CREATE TABLE learnt (
        job TEXT PRIMARY KEY, tenant TEXT, file TEXT NOT NULL, lines BLOB NOT NULL) STRICT;
",
];

/// Files that are no more.
pub const MOVED: &[Moved] = &[
    Moved { file: "access.db", after: 4, formats: 3 },
    Moved { file: "jobs.db", after: 7, formats: 1 },
];
