"""The journal in front of the database: what is in it survives, once, whatever happens to the process or the disk."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ledgers import entry, hold
from walras.errors import OutputError
from walras.ledger import verify
from walras.ledger.entry import Hold, Outcome, Record
from walras.ledger.journal import HALF, Journal, left
from walras.ledger.sqlite import SqliteStore
from walras.ledger.writer import State, Unwritable


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
