"""The journal in front of the database: what is in it survives, once, whatever happens to the process or the disk."""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from ledgers import entry, hold
from walras.errors import OutputError, WalrasError
from walras.ledger import sqlite, verify
from walras.ledger.entry import Hold, Outcome, Record
from walras.ledger.journal import HALF, Journal, left
from walras.ledger.sqlite import SqliteStore
from walras.ledger.writer import State, Ticket, Unwritable


def ahead(path: Path) -> Path:
    return path.with_name(path.name + "-ahead")


@contextmanager
def stuck(store: Any) -> Iterator[None]:
    """The database takes nothing until the block ends."""
    backend, why = store._writer._backend, Unwritable(State("disk full", "the disk is full"))
    with (
        patch.object(type(backend), "write", side_effect=why),
        patch.object(type(backend), "probe", side_effect=why),
    ):
        yield


def dead(path: Path, *records: Record) -> None:
    """A ledger whose process died with this in its journal and nothing of it in the database."""
    SqliteStore(path).stop()
    journal = Journal(ahead(path))
    assert all(journal.append(record) for record in records)
    journal.close(empty=False)


def ids(store: SqliteStore) -> list[str]:
    return [row.entry.request_id for row in store.entries()]


# --- the file ---------------------------------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(st.sampled_from(["hold", "entry", "turn"]), st.text(min_size=1, max_size=40)), max_size=30
    )
)
def test_what_is_left_is_what_was_not_drained(tmp_path_factory: Any, steps: list[tuple[str, str]]) -> None:
    """Against a list for each half."""
    path = tmp_path_factory.mktemp("j") / "x-ahead"
    journal, halves = Journal(path), ([], [])  # type: tuple[Journal, tuple[list[Record], list[Record]]]
    filling = 0
    for k, (what, name) in enumerate(steps):
        if what == "turn":
            journal.turn()
            filling = 1 - filling
            journal.drained()
            halves[1 - filling].clear()
        else:
            own = f"{k}{name}".encode("utf-8", "replace").decode()
            record = hold(own) if what == "hold" else entry(own)
            assert journal.append(record)
            halves[filling].append(record)
    journal.close(empty=False)
    kept = [*halves[0], *halves[1]]
    assert left(path) == sorted(kept, key=lambda record: not isinstance(record, Hold))


@pytest.mark.parametrize("cut", [1, 5, 9, 40, 200])
def test_a_record_that_was_half_written_was_not_acknowledged(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "x-ahead"
    journal = Journal(path)
    journal.append(hold("a"))
    end = journal._end
    journal.append(entry("a"))
    journal.close(empty=False)
    with path.open("r+b") as file:
        file.seek(end + cut)
        file.write(bytes(1000))
    assert left(path) == [hold("a")]


def test_what_an_older_turn_left_behind_counts_no_more(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "x-ahead")
    journal.append(hold("a"))
    journal.append(hold("b"))
    journal.turn()
    journal.drained()
    journal.turn()
    journal.append(hold("c"))  # lies where 'a' was, and 'b' still lies behind it
    journal.close(empty=False)
    assert left(journal.path) == [hold("c")]


def test_what_does_not_fit_waits_for_its_commit(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "x-ahead")
    assert not journal.append(hold("a", id="x" * HALF))
    assert not journal.append(hold("\ud800"))
    assert not journal.append(hold("much", 2**70))
    assert not journal.append(Outcome("a", 1, 0.5))
    assert journal.append(hold("b"))
    journal.close(empty=True)
    assert not journal.path.exists()


# --- after a death ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read_only", [False, True])
def test_what_a_dead_process_acknowledged_is_there(read_only: bool, tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    dead(path, entry("a"), hold("b"), hold("a"))
    store = SqliteStore(path, read_only=read_only)
    assert ids(store) == ["a"]
    assert [h.request_id for h in store.open_holds()] == ["b"]
    assert read_only or [h.request_id for h in store.orphans()] == ["b"]
    assert verify(store).ok
    store.stop()
    assert left(ahead(path)) == []


def test_what_was_committed_and_is_still_in_the_journal_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    store = SqliteStore(path)
    for record in (hold("a"), hold("b")):
        store.hold(record).wait(10)
    store.close(entry("a")).wait(10)
    store.stop()
    dead(path, hold("a"), entry("a"), hold("b"), entry("b"))
    store = SqliteStore(path)
    assert ids(store) == ["a", "b"]
    assert verify(store).ok
    store.stop()


def test_a_journal_that_cannot_be_written_out_stays(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    dead(path, hold("a"), entry("a"))
    why = Unwritable(State("disk full", "the disk is full"))
    with (
        patch("walras.ledger.sqlite._Backend.write", side_effect=why),
        patch("walras.ledger.sqlite._Backend.probe", side_effect=why),
        pytest.raises(OutputError, match="disk is full"),
    ):
        SqliteStore(path, durable="journal")
    assert len(left(ahead(path))) == 2
    store = SqliteStore(path, durable="journal")
    assert ids(store) == ["a"]
    store.stop()


# --- in a living process ----------------------------------------------------------------------------------------------


def test_it_is_acknowledged_at_once_and_read_at_once(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "ledger.db", durable="journal")
    for k in range(5_000):  # more than the journal has room for
        held = store.hold(hold(f"r{k}"))
        held.wait(10)
        store.close(entry(f"r{k}")).wait(10)
    assert len(store.entries(limit=10_000)) == 5_000
    assert verify(store).ok
    store.stop()
    assert not ahead(tmp_path / "ledger.db").exists()


def test_what_the_disk_has_no_room_for_is_kept_and_written_later(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    store = SqliteStore(path, durable="journal")
    with stuck(store):
        assert store.hold(hold("a")).done
        assert store.close(entry("a")).done
        assert ids(store) == []
        assert store.state().name == "disk full"
        assert store.hold(hold("b")).done
        with pytest.raises(OutputError, match="disk is full"):
            store.outcome(Outcome("a", 1, 0.5)).wait(10)
    while store.state().name != "healthy":
        pass
    assert ids(store) == ["a"]
    assert [h.request_id for h in store.open_holds()] == ["b"]
    assert verify(store).ok
    store.stop()


def test_what_was_never_written_is_there_after_the_next_start(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    store = SqliteStore(path, durable="journal")
    with stuck(store):
        store.hold(hold("a"))
        store.close(entry("a"))
        store.stop()
    assert len(left(ahead(path))) == 2
    again = SqliteStore(path)
    assert ids(again) == ["a"]
    again.stop()


def test_a_contradiction_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = SqliteStore(tmp_path / "ledger.db", durable="journal")
    assert store.close(entry("never held")).done
    with caplog.at_level(logging.ERROR, "walras.ledger"):
        assert store.entries() == []
    assert "never held" in caplog.text
    store.stop()


def test_where_there_can_be_no_journal_each_record_waits(tmp_path: Path) -> None:
    with patch.object(os, "posix_fallocate", side_effect=OSError(95, "not supported")):
        store = SqliteStore(tmp_path / "ledger.db", durable="journal")
    ticket = store.hold(hold("a"))
    ticket.wait(10)
    assert not ticket.safe
    store.stop()


# --- when several things go wrong at once -----------------------------------------------------------------------------


def test_stopping_writes_what_came_while_something_was_kept(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    store = SqliteStore(path, durable="journal")
    with stuck(store):
        store.hold(hold("a"))
        store._writer.flush()  # type: ignore[union-attr]
        assert store.state().name == "disk full"
        store.close(entry("a"))
        store.hold(hold("b"))
    store.stop()
    again = SqliteStore(path)
    assert ids(again) == ["a"]
    assert [h.request_id for h in again.open_holds()] == ["b"]
    again.stop()


def test_what_must_wait_comes_after_what_it_stands_on(tmp_path: Path) -> None:
    """A hold is in the journal; its entry is too large for it, and an outcome of it never is in there."""
    store = SqliteStore(tmp_path / "ledger.db", durable="journal")
    with stuck(store):
        store.hold(hold("before"))
        store._writer.flush()  # type: ignore[union-attr]
        assert store.hold(hold("a")).safe
        assert store.hold(hold("b")).safe
        assert store.close(entry("b")).safe
        large = structs.replace(entry("a"), prompt="x" * HALF)
        with pytest.raises(OutputError, match="disk is full"):
            store.close(large).wait(10)
    store.close(large).wait(10)
    store.outcome(Outcome("b", 1, 0.5)).wait(10)
    assert ids(store) == ["b", "a"]
    assert verify(store).ok
    store._writer.flush()  # type: ignore[union-attr]
    assert left(ahead(store.path)) == []  # or it would come again after retention
    store.stop()


def test_a_batch_of_which_one_half_could_not_be_written(tmp_path: Path) -> None:
    """A record is refused, and while its batch is halved the disk is full for a moment."""
    path = tmp_path / "ledger.db"
    store = SqliteStore(path)
    write, calls = sqlite._Backend.write, []

    def once(backend: sqlite._Backend, records: Any) -> Any:
        calls.append(len(records))
        if len(calls) == 2:
            raise Unwritable(State("disk full", "the disk is full"))
        return write(backend, records)

    tickets = []
    with patch.object(sqlite._Backend, "write", once):
        with store._writer._lock:  # type: ignore[union-attr]
            for record in (hold("a"), hold("b"), entry("c"), hold("d")):
                ticket = Ticket(record, lambda: None)
                tickets.append(ticket)
                store._writer._submitted.append(ticket)  # type: ignore[union-attr]
        store._writer._work.set()  # type: ignore[union-attr]
        for ticket in tickets:
            with suppress(WalrasError):
                ticket.wait(5)
    assert len(calls) >= 2
    there = {h.request_id for h in store.open_holds()}
    assert {t.record.request_id for t in tickets if t.error is None} == there  # type: ignore[union-attr]
    store.hold(hold("later")).wait(5)
    store.stop()


def test_a_record_that_no_ledger_takes_keeps_nobody_out(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    wrong: Any = structs.replace(entry("a"), status="weird")
    dead(path, hold("a"), wrong, hold("b"))
    store = SqliteStore(path)
    assert [h.request_id for h in store.open_holds()] == ["a", "b"]
    store.stop()


def test_a_journal_that_never_got_its_room_is_none(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"

    def partly(file: int, start: int, length: int) -> None:
        os.ftruncate(file, 5)
        raise OSError(28, "no space left on device")

    with patch.object(os, "posix_fallocate", side_effect=partly):
        SqliteStore(path, durable="journal").stop()
    assert not ahead(path).exists()
    ahead(path).write_bytes(b"short")  # as a death in the middle of it leaves it
    assert left(ahead(path)) == []
    SqliteStore(path, durable="journal").stop()


def test_where_there_is_no_such_call_each_record_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """macOS has none."""
    monkeypatch.delattr(os, "posix_fallocate")
    store = SqliteStore(tmp_path / "ledger.db", durable="journal")
    ticket = store.hold(hold("a"))
    ticket.wait(10)
    assert not ticket.safe
    store.stop()


def test_who_only_looks_is_not_kept_out(tmp_path: Path) -> None:
    """By a disk that is full, by somebody who begins to write at that moment, or by a journal that is not its to read."""
    path = tmp_path / "ledger.db"
    dead(path, hold("a"))
    why = Unwritable(State("disk full", "the disk is full"))
    with (
        patch("walras.ledger.sqlite._Backend.write", side_effect=why),
        patch("walras.ledger.sqlite._Backend.probe", side_effect=why),
    ):
        look = SqliteStore(path, read_only=True)
        assert look.open_holds() == []
        look.stop()
    with patch("walras.ledger.sqlite._only_writer", side_effect=_busy):
        SqliteStore(path, read_only=True).stop()
    with patch.object(Path, "read_bytes", side_effect=PermissionError(13, "Permission denied")):
        SqliteStore(path, read_only=True).stop()
        with pytest.raises(OutputError, match="Permission denied"):
            SqliteStore(path)
    assert left(ahead(path)) == [hold("a")]


def _busy(path: Path) -> Any:
    db = sqlite3.connect(path.with_name("held"), isolation_level=None)
    other = sqlite3.connect(path.with_name("held"), isolation_level=None, timeout=0)
    try:
        db.execute("BEGIN EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
    finally:
        other.close()
        db.close()


def test_a_read_waits_for_a_writer_that_is_stuck_but_not_for_ever(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    store = SqliteStore(path, durable="journal")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    store.hold(hold("a"))
    began = time.monotonic()
    with patch("walras.ledger.writer.FLUSH_S", 0.1):
        assert store.open_holds() == []
    assert time.monotonic() - began < 5
    other.execute("ROLLBACK")
    other.close()
    assert len(store.open_holds()) == 1
    store.stop()


def test_generations_begin_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "x-ahead")
    journal._generations = [2**32 - 1] * 2
    for name in ("a", "b", "c"):
        journal.turn()
        journal.drained()
        assert journal.append(hold(name))
    journal.close(empty=False)
    assert left(journal.path) == [hold("c")]
