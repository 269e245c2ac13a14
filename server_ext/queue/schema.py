"""The journal's tables, and whether a file is one that this program can read."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from ibtree.errors import FieldError
from server_ext.queue.states import State, run_of

VERSION = 2
APPLICATION = 0x49425450
"""`PRAGMA application_id` of a journal: "IBTP"."""
PART_BYTES = 1024 * 1024
"""A tree's bytes lie in rows of so many, so that any part is read without the others."""
_CHECKED_BYTES = 64 * 1024 * 1024
"""A larger file is not read through at the start: damage in it is found when it is read."""

_COUNTED = ", ".join(f"('{state}')" for state in (*State, "ever acked"))
TABLES = f"""
CREATE TABLE trees (
    seq           INTEGER PRIMARY KEY AUTOINCREMENT,   -- order of submission; never used again
    id            TEXT NOT NULL UNIQUE,
    run           TEXT NOT NULL,                       -- of the id: states.run_of
    content       BLOB NOT NULL,                       -- SHA-256 of the submitted prompt
    state         TEXT NOT NULL,
    submitted_at  REAL NOT NULL,                       -- times: see clock.py
    not_before    REAL NOT NULL DEFAULT 0,             -- when a queued prompt may be taken
    interruptions INTEGER NOT NULL DEFAULT 0,          -- in a row
    failures      INTEGER NOT NULL DEFAULT 0,          -- counted: growing failed by its own fault
    returns       INTEGER NOT NULL DEFAULT 0,          -- leases that ran out or were handed back
    refusals      INTEGER NOT NULL DEFAULT 0,          -- counted: of these, handed back as bad
    reasons       TEXT NOT NULL DEFAULT '[]',
    lease_id      TEXT,                                -- kept when acked: acking twice is a no-op
    lease_s       REAL,
    lease_until   REAL,
    tree_bytes    INTEGER NOT NULL DEFAULT 0,
    version       INTEGER                              -- the oldest weights in the tree
);
CREATE TABLE prompts (seq INTEGER PRIMARY KEY, prompt BLOB NOT NULL);     -- until acked
CREATE TABLE parts (                                                      -- of trees, until acked
    seq INTEGER NOT NULL, part INTEGER NOT NULL, data BLOB NOT NULL, UNIQUE (seq, part)
);
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE counts (state TEXT PRIMARY KEY, n INTEGER NOT NULL DEFAULT 0) WITHOUT ROWID;
INSERT INTO counts (state) VALUES {_COUNTED};

CREATE UNIQUE INDEX by_lease ON trees (lease_id) WHERE lease_id IS NOT NULL;
CREATE INDEX by_run ON trees (run, state);
CREATE INDEX queued ON trees (seq, not_before, run) WHERE state = 'queued';
CREATE INDEX resting ON trees (not_before) WHERE state = 'queued' AND not_before > 0;
CREATE INDEX growing ON trees (seq) WHERE state = 'growing';
CREATE INDEX graded ON trees (seq) WHERE state = 'graded';
CREATE INDEX graded_of_run ON trees (run, seq) WHERE state = 'graded';
CREATE INDEX graded_version ON trees (run, version) WHERE state = 'graded';
CREATE INDEX leased ON trees (lease_until) WHERE state = 'leased';
CREATE INDEX acked ON trees (seq) WHERE state = 'acked';
CREATE INDEX dead ON trees (seq, tree_bytes) WHERE state = 'dead';

CREATE TRIGGER came AFTER INSERT ON trees BEGIN
    UPDATE counts SET n = n + 1 WHERE state = NEW.state;
END;
CREATE TRIGGER moved AFTER UPDATE OF state ON trees WHEN OLD.state <> NEW.state BEGIN
    UPDATE counts SET n = n - 1 WHERE state = OLD.state;
    UPDATE counts SET n = n + 1
        WHERE state = NEW.state OR NEW.state = 'acked' AND state = 'ever acked';
END;
CREATE TRIGGER went AFTER DELETE ON trees BEGIN
    UPDATE counts SET n = n - 1 WHERE state = OLD.state;
    DELETE FROM prompts WHERE seq = OLD.seq;
    DELETE FROM parts WHERE seq = OLD.seq;
END;
PRAGMA application_id = {APPLICATION};
PRAGMA user_version = {VERSION};
"""


def prepare(db: sqlite3.Connection, path: Path) -> None:
    """Makes the tables in a new file; brings those of an older program to this one's. Raises
    FieldError for a file that is damaged, that is no journal, or of a newer program."""
    folder = path.parent
    try:
        version, tables = _checked(db, path)
        if not tables:
            db.execute("PRAGMA auto_vacuum = INCREMENTAL")  # before the first table
            db.execute("PRAGMA journal_mode = WAL")
            db.executescript(f"BEGIN IMMEDIATE; {TABLES} COMMIT;")
        elif version == 1:
            _from_version_1(db)
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError) and not _is_damage(error):
            raise
        raise _refused(folder, f"is damaged ({error})", "restored, or moved away") from error


def _checked(db: sqlite3.Connection, path: Path) -> tuple[int, set[str]]:
    """The schema's version and the names of the tables. Raises FieldError, DatabaseError."""
    folder = path.parent
    (version,) = db.execute("PRAGMA user_version").fetchone()
    (application,) = db.execute("PRAGMA application_id").fetchone()
    tables = {name for (name,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
    if not tables and not version:
        return 0, set()
    ours = application == APPLICATION or (application == 0 and version == 1)
    if not ours or "trees" not in tables:
        raise _refused(folder, "is another program's", "a folder of its own")
    if version > VERSION:
        problem = f"is of a newer ibtpo-server (schema {version}, this one knows {VERSION})"
        raise _refused(folder, problem, "that program, or another folder")
    if path.stat().st_size <= _CHECKED_BYTES:
        (verdict,) = db.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise _refused(folder, f"is damaged ({verdict})", "restored, or moved away")
    return version, tables


def _is_damage(error: sqlite3.Error) -> bool:
    code = getattr(error, "sqlite_errorcode", None)
    return code is not None and code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _refused(folder: Path, problem: str, allowed: str) -> FieldError:
    return FieldError("data_dir", f"the journal in {folder} {problem}".replace("\n", " "), allowed)


def _from_version_1(db: sqlite3.Connection) -> None:
    """One table held everything, times were the wall clock's and any return counted."""
    db.create_function("run_of", 1, run_of, deterministic=True)
    db.execute("BEGIN IMMEDIATE")
    try:
        db.execute("ALTER TABLE trees RENAME TO old_trees")
        db.execute("DROP INDEX trees_by_state")
        for statement in _statements(TABLES):
            db.execute(statement)
        db.execute(
            "INSERT INTO trees (seq, id, run, content, state, submitted_at, failures, returns,"
            " reasons, lease_id, lease_s, lease_until, tree_bytes)"
            " SELECT seq, id, run_of(id), content, state, 0, failures, returns, reasons, lease_id,"
            " 600, 0, COALESCE(LENGTH(tree), 0) FROM old_trees ORDER BY seq"
        )
        db.execute(
            "UPDATE counts SET n = (SELECT COUNT(*) FROM trees WHERE state = 'acked')"
            " WHERE state = 'ever acked'"
        )
        db.execute("INSERT INTO prompts SELECT seq, prompt FROM old_trees WHERE prompt IS NOT NULL")
        rows = db.execute("SELECT seq FROM old_trees WHERE tree IS NOT NULL").fetchall()
        for (seq,) in rows:
            query = "SELECT tree FROM old_trees WHERE seq = ?"
            write_parts(db, seq, db.execute(query, (seq,)).fetchone()[0])
        db.execute("DROP TABLE old_trees")
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _statements(script: str) -> list[str]:
    """The script's statements; those of a trigger end with its END."""
    found, held = [], ""
    for line in script.splitlines():
        held += f"{line}\n"
        if sqlite3.complete_statement(held):
            found.append(held)
            held = ""
    return found


def write_parts(db: sqlite3.Connection, seq: int, tree: bytes) -> None:
    """Writes a tree's bytes, in the place of any that are there."""
    db.execute("DELETE FROM parts WHERE seq = ?", (seq,))
    view = memoryview(tree)
    db.executemany(
        "INSERT INTO parts (seq, part, data) VALUES (?, ?, ?)",
        (
            (seq, part, view[at : at + PART_BYTES])
            for part, at in enumerate(range(0, len(tree), PART_BYTES))
        ),
    )
