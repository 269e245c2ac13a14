"""What lies in the data folder: damaged, foreign, newer, older, on a network."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from ibtree.errors import FieldError
from server_ext.queue import volume
from server_ext.queue.journal import Journal
from server_ext.queue.schema import VERSION
from server_ext.queue.states import State
from tests.server_ext.queue.book import MANY, Book

VERSION_1 = """
CREATE TABLE trees (
    seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, content BLOB NOT NULL, state TEXT NOT NULL,
    prompt BLOB, tree BLOB, submitted_at REAL NOT NULL, failures INTEGER NOT NULL DEFAULT 0,
    returns INTEGER NOT NULL DEFAULT 0, reasons TEXT NOT NULL DEFAULT '[]', lease_id TEXT UNIQUE,
    lease_until REAL
);
CREATE INDEX trees_by_state ON trees (state, seq);
PRAGMA user_version = 1;
"""


@pytest.fixture
def path(tmp_path) -> Path:
    """A journal with some trees, closed."""
    book = Book(tmp_path / "data" / "journal.sqlite")
    book.graded(*map(str, range(50)), size=4000)
    book.journal.close()
    return book.path


def changed(path: Path, script: str) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.executescript(script)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 + 17])


def overwritten(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[4096 * 2 : 4096 * 9] = b"\x5a" * (4096 * 7)
    path.write_bytes(data)


UNFIT = {
    "cut off": (cut, "damaged"),
    "overwritten": (overwritten, "damaged"),
    "text": (lambda path: path.write_text("nothing of a database\n" * 100), "damaged"),
    "another's": (
        lambda path: (path.unlink(), changed(path, "CREATE TABLE books (title TEXT)")),
        "another program's",
    ),
    "another's with our table": (
        lambda path: changed(path, "PRAGMA application_id = 7"),
        "another program's",
    ),
    "newer": (lambda path: changed(path, f"PRAGMA user_version = {VERSION + 1}"), "newer"),
}


@pytest.mark.parametrize("how", UNFIT)
def test_an_unfit_file_is_refused_in_one_line_that_names_the_folder_and_is_left_alone(path, how):
    spoil, word = UNFIT[how]
    spoil(path)
    before = path.read_bytes()
    with pytest.raises(FieldError) as caught:
        Journal(path)
    line = caught.value.as_option()
    assert str(path.parent) in line and word in line and "\n" not in line
    assert line.startswith("--data-dir: ")
    assert path.read_bytes() == before


def test_an_empty_file_is_a_new_journal(tmp_path):
    path = tmp_path / "journal.sqlite"
    path.touch()
    journal = Journal(path)
    assert journal.submit([("a", b"")]) == (1, 0)
    journal.close()


def test_a_journal_of_the_first_schema_goes_on(tmp_path):
    path = tmp_path / "journal.sqlite"
    changed(path, "PRAGMA journal_mode = WAL;" + VERSION_1)
    tree = bytes(range(256)) * 10_000
    rows = [
        ("run/1", "queued", b"q", None, None),
        ("run/2", "growing", b"g", None, None),
        ("run/3", "graded", b"d", tree, None),
        ("run/4", "leased", b"l", b"leased tree", "lease-4"),
        ("run/5", "acked", None, None, "lease-5"),
        ("plain", "dead", b"x", b"dead tree", None),
    ]
    with closing(sqlite3.connect(path)) as db, db:
        for id_, state, prompt, data, lease in rows:
            content = hashlib.sha256(prompt or b"").digest()
            db.execute(
                "INSERT INTO trees (id, content, state, prompt, tree, lease_id, submitted_at,"
                " returns, reasons, lease_until) VALUES (?, ?, ?, ?, ?, ?, 1e9, 2, ?, 1e9)",
                (id_, content, state, prompt, data, lease, json.dumps(["why"])),
            )
    book = Book(path)
    journal = book.journal
    assert book.rows() == {
        "run/1": "queued",
        "run/2": "queued",
        "run/3": "graded",
        "run/4": "leased",
        "run/5": "acked",
        "plain": "dead",
    }
    assert journal.counts() == {
        State.QUEUED: 2,
        State.GROWING: 0,
        State.GRADED: 1,
        State.LEASED: 1,
        State.ACKED: 1,
        State.DEAD: 1,
    }
    assert journal.submit([("run/1", b"q"), ("new", b"n")]) == (1, 1)
    (leased,) = journal.lease(9, 9.0, MANY, "run")
    assert (leased.id, leased.tree, leased.returns) == ("run/3", tree, 2)
    journal.ack(["lease-4", "lease-5"])
    assert [queued.prompt for queued in journal.take(9)] == [b"q", b"g", b"n"]
    assert journal.reasons("plain") == ["why"]
    journal.close()
    book.reopen().close()
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (VERSION,)
        names = {name for (name,) in db.execute("SELECT name FROM sqlite_schema")}
    assert "old_trees" not in names and {"graded", "moved", "parts"} <= names


NETWORKS = {0x6969: "NFS", 0xFF534D42: "CIFS", 0xFE534D42: "SMB", 0x00C36400: "Ceph"}


@pytest.mark.parametrize("f_type", NETWORKS)
def test_a_network_volume_is_refused_before_anything_is_written(tmp_path, monkeypatch, f_type):
    monkeypatch.setattr(volume, "_statfs_type", lambda folder: f_type)
    with pytest.raises(FieldError, match=f"{tmp_path}.*{NETWORKS[f_type]}") as caught:
        Journal(tmp_path / "journal.sqlite")
    assert caught.value.field == "data_dir"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "network"),
    [("fuse.sshfs", True), ("fuse.s3fs", True), ("fuse", True), ("fuseblk", False)],
)
def test_fuse_is_what_is_mounted_there(tmp_path, monkeypatch, kind, network):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
        f"99 22 0:50 / {tmp_path}/my\\040data rw,nosuid shared:1 - {kind} host:/x rw\n"
    )
    monkeypatch.setattr(volume, "_MOUNTS", mounts)
    folder = tmp_path / "my data"
    folder.mkdir()
    assert bool(volume.network_name(0x65735546, folder)) == network
    assert not volume.network_name(0xEF53, folder)


def test_the_type_is_read_from_the_volume(tmp_path):
    """By what is known of two that every Linux has."""
    assert volume._statfs_type(Path("/proc")) == 0x9FA0
    assert volume._statfs_type(Path("/sys")) == 0x62656572
    assert volume._statfs_type(tmp_path / "nowhere") is None
    assert volume.network_name(volume._statfs_type(tmp_path), tmp_path) == ""
