"""The ledger: exact money, records that are written once, group commit, crashes, full and read-only disks, identities."""

from __future__ import annotations

import asyncio
import contextlib
import random
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import hypothesis.strategies as st
import msgspec
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ledgers import NOON, entry, hold, live_and_die, postgres_binaries, postgres_server
from walras.errors import OutputError, QuantityError, RecordError, SettingsError
from walras.gateway.warm import OUTCOMES
from walras.ledger import (
    Alternative,
    Conflict,
    Correction,
    Filter,
    Outcome,
    Store,
    UnknownRequest,
    nano,
    open_store,
    pack,
    priced,
    recover,
    sqlite,
    stats,
    unpack,
    usd,
    verify,
    writer,
)
from walras.ledger.export import export
from walras.ledger.reconcile import reconcile
from walras.ledger.writer import Durable
from walras.records import read_log

DAY = 86_400_000_000_000
Open = Callable[..., Store]


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    binaries = postgres_binaries()
    if binaries is None:
        pytest.skip("no PostgreSQL server is installed (initdb and pg_ctl were not found)")
    with postgres_server(binaries) as url:
        yield url


def wipe(url: str) -> None:
    import psycopg  # noqa: PLC0415

    with psycopg.connect(url, autocommit=True) as db:
        db.execute("DROP SCHEMA IF EXISTS walras CASCADE")


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Opens the same ledger again and again; all are stopped at the end."""
    url = str(tmp_path / "ledger.db")
    if request.param == "postgres":
        url = request.getfixturevalue("server")
        wipe(url)
    with contextlib.ExitStack() as stack:

        def make(**options: bool) -> Store:
            store = open_store(url, **options)  # type: ignore[arg-type]
            stack.callback(store.stop)
            return store

        yield make


@pytest.fixture
def store(opened: Open) -> Store:
    return opened()


def write(store: Store, *request_ids: str, **known: object) -> None:
    """A hold and its entry each."""
    tickets = []
    for request_id in request_ids:
        tickets += [store.hold(hold(request_id)), store.close(entry(request_id, **known))]  # type: ignore[arg-type]
    for ticket in tickets:
        ticket.wait(10)


# --- money ------------------------------------------------------------------------------------------------------------


@given(st.decimals(min_value=0, max_value=9_000_000_000, allow_nan=False, allow_infinity=False))
def test_usd_become_the_nearest_nano_ties_to_even(amount: Decimal) -> None:
    exact = Fraction(amount) * 10**9
    assert nano(amount) == round(exact)
    assert nano(str(amount)) == nano(amount)


@given(st.integers(0, 10**15))
def test_what_is_shown_is_read_back(amount: int) -> None:
    assert nano(usd(amount)) == amount


def test_money_that_is_none_is_refused() -> None:
    for wrong in (float("nan"), float("inf"), "a dollar", "", -0.01, "9e9999999", 9.3e9, Decimal("-1")):
        with pytest.raises(QuantityError):
            nano(wrong)
    assert nano(-0.5, negative=True) == -500_000_000
    assert nano("1e-999999") == 0
    assert nano(0.1) + nano(0.2) == nano(0.3)
    assert [nano(x) for x in ("5e-10", "15e-10", "25e-10")] == [0, 2, 2]
    assert priced(1_000, 2.5e-6) == 2_500_000
    with pytest.raises(QuantityError):
        priced(float("inf"), 1.0)


# --- records ----------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_back_whole(store: Store) -> None:
    full = entry(
        "a", prompt="héllo \n\t\\ ünïcode", quality_expected=0.1 + 0.2, value_usd=1.1, value_nano=330_000_000
    )
    bare = msgspec.structs.replace(
        entry("b", 0, reserved=0, status="refused", settled="none", alternatives=b""),
        use=None, seconds=None, input_tokens=None, quality_expected=None, value_nano=0, session=None,
    )  # fmt: skip
    for ticket in (store.hold(hold("a")), store.close(full), store.close(bare)):
        ticket.wait(10)
    assert [row.entry for row in store.entries()] == [full, bare]
    assert store.open_holds() == []
    assert verify(store).violations == ()
    assert unpack(full.alternatives)[1] == Alternative("large", 9, 4, 2, 1, 2)
    assert pack(unpack(full.alternatives)) == full.alternatives
    with pytest.raises(RecordError):
        unpack(b"[[1]]")


def test_pages_filters_and_order(store: Store) -> None:
    write(store, *"abc")
    write(store, *"de", tenant="acme", at_ns=NOON + 5, use="large")
    first = store.entries(limit=2)
    second = store.entries(after=first[-1].seq, limit=2)
    assert [row.entry.request_id for row in first + second] == list("abcd")
    assert [row.entry.request_id for row in store.entries(limit=2, newest=True)] == ["e", "d"]
    before = store.entries(newest=True)[1].seq
    assert [row.entry.request_id for row in store.entries(before, 2, newest=True)] == ["c", "b"]
    assert [row.entry.request_id for row in store.entries(where=Filter(use="large", since_ns=NOON + 1))] == [
        "d",
        "e",
    ]
    assert store.entries(where=Filter(until_ns=NOON)) == []
    assert store.entries(where=Filter(tenant="acme' OR 1=1 --")) == []


def test_the_same_record_again_is_accepted_and_another_refused(store: Store) -> None:
    write(store, "a", settled="estimated")
    outcome = Outcome("a", NOON, 0.5)
    for again in (hold("a"), entry("a", settled="estimated")):
        send = store.hold if again == hold("a") else store.close
        send(again).wait(10)  # type: ignore[operator]
    store.outcome(outcome).wait(10)
    store.outcome(msgspec.structs.replace(outcome, at_ns=NOON + 9)).wait(10)
    store.reconcile(Correction("a", NOON, 700)).wait(10)
    store.reconcile(Correction("a", NOON + 9, 700)).wait(10)
    assert len(store.entries()) == 1
    assert store.outcomes(["a"]) == {"a": [outcome]}
    assert verify(store).corrected_nano == -100
    wrong = [
        (Conflict, store.hold(hold("a", 2_000))),
        (Conflict, store.hold(hold("a", id="late"))),
        (Conflict, store.close(entry("a", 900))),
        (Conflict, store.close(entry("never held"))),
        (Conflict, store.outcome(Outcome("a", NOON, 0.6))),
        (Conflict, store.outcome(Outcome("a", NOON, 1.5, source="bad"))),
        (UnknownRequest, store.outcome(Outcome("nobody", NOON, 0.6))),
        (UnknownRequest, store.reconcile(Correction("nobody", NOON, 1))),
        (RecordError, store.hold(hold("\ud800"))),
        (Conflict, store.hold(hold("much", 2**70))),
        (Conflict, store.close(entry("x", 0, reserved=0, status="nonsense"))),
    ]
    for kind, ticket in wrong:
        with pytest.raises(kind):
            ticket.wait(10)
    assert verify(store).violations == ()
    assert store.state().name == "healthy"


def test_several_holds_are_closed_by_one_entry_that_owns_up_to_all(store: Store) -> None:
    for k in range(3):
        store.hold(hold("a", 100, id=str(k))).wait(10)
    with pytest.raises(Conflict, match="holds 300 nano-USD, its entry says 200"):
        store.close(entry("a", 200, reserved=200)).wait(10)
    assert len(store.open_holds()) == 3
    store.close(entry("a", 310, reserved=300)).wait(10)
    seen = verify(store)
    assert (seen.held_nano, seen.settled_nano, seen.overrun_nano, seen.paid_nano) == (300, 300, 10, 310)
    assert verify(store, metering_step_nano=10).ok
    assert verify(store, metering_step_nano=9).violations[0].request_ids == ("a",)


def test_corrections_are_rows_and_count_where_the_request_did(store: Store) -> None:
    write(store, "a", "b", settled="estimated")
    store.reconcile(Correction("a", NOON + 3 * DAY, 1_300)).wait(10)
    store.reconcile(Correction("a", NOON + 4 * DAY, 100)).wait(10)
    write(store, "c")
    with pytest.raises(Conflict, match="settled 'exact'"):
        store.reconcile(Correction("c", NOON, 1)).wait(10)
    row = store.entries()[0]
    assert (row.entry.charged_nano, row.corrected_nano, row.paid_nano) == (800, 100, 100)
    assert store.spent(0) == 100 + 800 + 800
    assert store.spent(NOON + 1) == 0
    seen = verify(store)
    assert (seen.violations, seen.paid_nano, seen.released_nano, seen.corrected_nano) == (
        (),
        1_700,
        1_300,
        -700,
    )


def test_spent_by_tenant_key_and_time(store: Store) -> None:
    write(store, "a")
    for name, tenant, key, at in (
        ("b", "acme", "k2", NOON),
        ("c", "other", "k3", NOON),
        ("d", "acme", "k1", NOON - DAY),
    ):
        store.hold(hold(name, tenant=tenant, key_id=key, at_ns=at)).wait(10)
        store.close(entry(name, tenant=tenant, key_id=key, at_ns=at)).wait(10)
    assert [store.spent(0), store.spent(0, tenant="acme"), store.spent(0, key_id="k1")] == [
        3_200,
        2_400,
        1_600,
    ]
    assert store.spent(NOON, tenant="acme", key_id="k1") == 800


def test_retention_keeps_the_sums(store: Store) -> None:
    for k, at in enumerate((NOON - 40 * DAY, NOON - 40 * DAY, NOON - 39 * DAY, NOON)):
        store.hold(hold(str(k), at_ns=at)).wait(10)
        store.close(entry(str(k), at_ns=at, settled="estimated")).wait(10)
    store.hold(hold("open", at_ns=NOON - 40 * DAY)).wait(10)
    store.reconcile(Correction("0", NOON, 500)).wait(10)
    store.outcome(Outcome("0", NOON, 1.0)).wait(10)
    before = store.spent(0)
    assert store.retain(NOON - 9 * DAY) == 3
    assert [row.entry.request_id for row in store.entries()] == ["3"]
    assert store.spent(0) == before == 500 + 3 * 800
    assert store.spent(NOON - 39 * DAY + 1) == 1_600  # the first day in full
    assert [hold.request_id for hold in store.open_holds()] == ["open"]
    assert verify(store).violations == ()
    assert store.retain(NOON - 9 * DAY) == 0
    assert stats(store).retired == 3
    with pytest.raises(UnknownRequest, match="retired"):
        store.outcome(Outcome("0", NOON, 1.0, source="late")).wait(10)


def test_a_reader_reads_beside_the_writer_and_cannot_write(opened: Open) -> None:
    store = opened()
    reader = opened(read_only=True)
    write(store, "a")
    assert [row.entry.request_id for row in reader.entries()] == ["a"]
    for call in (lambda: reader.hold(hold("b")), lambda: reader.retain(NOON)):
        with pytest.raises(OutputError, match="read only"):
            call()


# --- group commit -----------------------------------------------------------------------------------------------------


def test_many_at_once_share_commits_and_one_wrong_record_spoils_nobody_else(store: Store) -> None:
    async def client(k: int) -> str:
        await store.written(store.hold(hold(str(k))))
        reserved = 999 if k % 50 == 7 else 1_000
        try:
            await store.written(store.close(entry(str(k), reserved=reserved)))
        except Conflict:
            return "conflict"
        return "ok"

    async def all_clients() -> list[str]:
        return await asyncio.gather(*(client(k) for k in range(300)))

    said = asyncio.run(all_clients())
    assert [k for k, word in enumerate(said) if word == "conflict"] == list(range(7, 300, 50))
    assert len(store.entries()) == 294
    assert len(store.open_holds()) == 6
    assert verify(store).violations == ()


def test_nothing_is_acknowledged_before_it_is_committed(tmp_path: Path) -> None:
    store = open_store(tmp_path / "ledger.db")
    with contextlib.closing(sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        ticket = store.hold(hold("a"))
        with pytest.raises(OutputError, match="did not answer"):
            ticket.wait(0.2)
        assert store.open_holds() == []
        other.execute("ROLLBACK")
    ticket.wait(10)
    assert len(store.open_holds()) == 1
    store.stop()


def test_a_waiter_that_gives_up_disturbs_nobody(store: Store) -> None:
    async def main() -> None:
        ticket = store.hold(hold("a"))
        waiting = [asyncio.ensure_future(store.written(ticket)) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        assert [type(x) for x in await asyncio.gather(*waiting, return_exceptions=True)].count(
            type(None)
        ) >= 2
        await store.written(ticket)  # long done

    asyncio.run(main())


def test_stopping_writes_what_is_queued_and_then_nothing(opened: Open) -> None:
    store = opened()
    tickets = [store.hold(hold(str(k))) for k in range(500)]
    store.stop()
    assert all(ticket.done and ticket.error is None for ticket in tickets)
    assert store.state().name == "closed"
    with pytest.raises(OutputError, match="closed"):
        store.hold(hold("late"))
    assert len(opened().open_holds()) == 500


def test_what_a_loop_submits_is_written_though_the_loop_is_blocked_or_ends(opened: Open) -> None:
    store = opened()

    async def blocked() -> None:
        store.hold(hold("a")).wait(10)

    async def ends() -> None:
        store.hold(hold("b"))

    asyncio.run(blocked())
    asyncio.run(ends())
    store.stop()
    assert {h.request_id for h in opened().open_holds()} == {"a", "b"}


def test_a_bug_in_writing_is_told_to_those_who_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path / "ledger.db")
    with monkeypatch.context() as patch:
        patch.setattr(sqlite.sql, "counts", lambda *_: 1 / 0)
        with pytest.raises(OutputError, match="ZeroDivisionError"):
            store.hold(hold("a")).wait(10)
    store.hold(hold("a")).wait(10)
    assert store.state() is writer.HEALTHY
    assert verify(store).violations == ()
    store.stop()


# --- opening ----------------------------------------------------------------------------------------------------------


def test_a_second_writer_is_kept_out(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    store = open_store(path)
    with pytest.raises(OutputError, match="another process writes it"):
        open_store(path)
    store.stop()
    open_store(path).stop()


def test_migrations_run_in_order_once_and_a_newer_ledger_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ledger.db"
    store = open_store(path)
    write(store, "a")
    store.stop()
    steps = (
        *sqlite.MIGRATIONS,
        ("b", ("ALTER TABLE holds ADD COLUMN note text",)),
        ("c", ("UPDATE holds SET note = 'x'",)),
    )
    with monkeypatch.context() as patch:
        patch.setattr(sqlite, "MIGRATIONS", (*steps, ("d", ("CREATE TABLE half (a)", "nonsense"))))
        with pytest.raises(OutputError, match="nonsense"):
            open_store(path)
        patch.setattr(sqlite, "MIGRATIONS", steps)
        open_store(path).stop()
        open_store(path).stop()
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT number, name FROM migrations").fetchall() == [
            (1, "the ledger"),
            (2, "b"),
            (3, "c"),
        ]
        assert db.execute("SELECT note FROM holds").fetchall() == [("x",)]
        assert not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'half'").fetchall()
    for read_only in (False, True):
        with pytest.raises(RecordError, match="newer Walras"):
            open_store(path, read_only=read_only)


def test_what_is_no_ledger_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / "other.db"
    with contextlib.closing(sqlite3.connect(other)) as db:
        db.execute("CREATE TABLE mine (a)")
    text = tmp_path / "text.db"
    text.write_text("not a database, but long enough to be looked at" * 50)
    for path in (other, text):
        before = path.read_bytes()
        with pytest.raises((RecordError, OutputError), match=r"no ledger|not a database"):
            open_store(path)
        with pytest.raises(RecordError, match=r"no ledger|not a database"):
            open_store(path, read_only=True)
        assert path == text or b"CREATE TABLE holds" not in path.read_bytes()
        assert path == other or path.read_bytes() == before
    with pytest.raises(RecordError, match="no such ledger"):
        open_store(tmp_path / "none.db", read_only=True)
    with pytest.raises(OutputError):
        open_store(tmp_path / "no folder" / "ledger.db")


# --- disks ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 2 MB."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "none", tmp_path], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


def fill(store: Store) -> tuple[list[str], list[str]]:
    """Write until it fails; ids of acknowledged holds and entries."""
    held, settled = [], []
    with contextlib.suppress(OutputError):
        for k in range(100_000):
            store.hold(hold(str(k))).wait(10)
            held.append(str(k))
            store.close(entry(str(k), prompt="x" * 2_000)).wait(10)
            settled.append(str(k))
    return held, settled


def survives_full_disk(store: Store, make_room: Callable[[], None]) -> None:
    held, settled = fill(store)
    assert 10 < len(settled) < 50_000
    assert store.state().name == "disk full"
    assert "make room" in store.state().sentence
    with pytest.raises(OutputError, match="disk is full"):
        store.close(entry("big", 0, reserved=0, prompt="x" * 1_000_000)).wait(10)
    assert {row.entry.request_id for row in store.entries(limit=100_000)} == set(settled)
    make_room()
    deadline = asyncio.run(until(lambda: store.state().name == "healthy"))
    assert deadline, "the ledger did not recover by itself"
    for request_id in set(held) - set(settled):
        store.close(entry(request_id)).wait(10)
    write(store, "after")
    assert {row.entry.request_id for row in store.entries(limit=100_000)} == {*held, "after"}
    assert verify(store).violations == ()


async def until(true: Callable[[], bool], seconds: float = 10) -> bool:
    for _ in range(int(seconds / 0.02)):
        if true():
            return True
        await asyncio.sleep(0.02)
    return False


def test_a_full_disk_loses_nothing_acknowledged_and_is_left_again(small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(1_000_000))
    store = open_store(small_disk / "ledger.db")
    try:
        survives_full_disk(store, ballast.unlink)
    finally:
        store.stop()
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    with pytest.raises(OutputError, match="disk is full"):
        open_store(small_disk / "ledger.db")
    ballast.unlink()
    open_store(small_disk / "ledger.db").stop()


def test_a_full_database_behaves_like_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[sqlite3.Connection] = []
    make = sqlite._writer

    def limited(path: Path, durable: str) -> sqlite3.Connection:
        opened.append(make(path, durable))
        opened[-1].execute("PRAGMA max_page_count = 200")
        return opened[-1]

    monkeypatch.setattr(sqlite, "_writer", limited)
    store = open_store(tmp_path / "ledger.db")
    try:
        survives_full_disk(store, lambda: opened[0].execute("PRAGMA max_page_count = 100000").close())
    finally:
        store.stop()


def test_a_disk_that_cannot_be_written_can_be_read_and_is_left_again(small_disk: Path) -> None:
    store = open_store(small_disk / "ledger.db")
    write(store, "a")
    store.stop()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    store = open_store(small_disk / "ledger.db")
    try:
        assert store.state().name == "read-only"
        with pytest.raises(OutputError, match="cannot be written"):
            store.hold(hold("b")).wait(10)
        assert [row.entry.request_id for row in store.entries()] == ["a"]
        assert verify(store).violations == ()
        # A remount fails while somebody has the file open to write, and nobody has.
        subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
        assert asyncio.run(until(lambda: store.state().name == "healthy"))
        write(store, "b")
    finally:
        store.stop()
    with pytest.raises(OutputError):
        open_store(Path("/proc/ledger.db"))


# --- crashes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("durable", ["normal", "journal"])
def test_killed_again_and_again_it_keeps_what_it_acknowledged(durable: Durable, tmp_path: Path) -> None:
    path, held, settled, luck = tmp_path / "ledger.db", set[str](), set[str](), random.Random(7)
    for life in range(10):
        holds, entries = live_and_die(str(path), life, luck.uniform(0.0, 0.15), durable)
        held |= holds
        settled |= entries
        store = open_store(path, read_only=True)
        rows = {row.entry.request_id for row in store.entries(limit=1_000_000)}
        still = {hold.request_id for hold in store.open_holds()}
        seen = verify(store)
        store.stop()
        assert settled <= rows, f"acknowledged entries are gone: {sorted(settled - rows)[:5]}"
        assert held <= rows | still, f"acknowledged holds are gone: {sorted(held - rows - still)[:5]}"
        assert seen.violations == ()
    store = open_store(path)
    recover(store)
    seen = verify(store)
    store.stop()
    assert (seen.violations, seen.open_nano) == ((), 0)
    assert len(settled) > 100
    assert seen.to_reconcile <= 8 * 10


@pytest.mark.postgres
def test_what_a_dead_gateway_held_is_settled_and_what_a_living_one_holds_is_not(server: str) -> None:
    wipe(server)
    living = open_store(server)
    living.hold(hold("living")).wait(10)
    held, settled = live_and_die(server, 0, 0.3)
    assert settled

    def dead() -> bool:  # the server notices a lost connection a moment later
        return len(living.orphans()) == len(living.open_holds()) - 1

    assert asyncio.run(until(dead))
    done = recover(living)
    seen = verify(living)
    rows = {row.entry.request_id for row in living.entries(limit=1_000_000)}
    assert held | settled <= rows
    assert [hold.request_id for hold in living.open_holds()] == ["living"]
    assert (seen.violations, seen.to_reconcile) == ((), len(done))
    living.close(entry("living")).wait(10)
    living.stop()


@pytest.mark.postgres
def test_a_server_that_is_gone_for_a_while(server: str) -> None:
    import psycopg  # noqa: PLC0415

    wipe(server)
    store = open_store(server)
    write(store, "a")
    with psycopg.connect(server, autocommit=True) as db:
        db.execute("ALTER DATABASE postgres SET default_transaction_read_only = on")
        cut = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datname = 'postgres'"
        db.execute(cut)
        with pytest.raises(OutputError, match="does not answer"):
            store.hold(hold("b")).wait(10)
        assert asyncio.run(until(lambda: store.state().name == "read-only"))
        db.execute("SET default_transaction_read_only = off")
        db.execute("ALTER DATABASE postgres RESET default_transaction_read_only")
        db.execute(cut)
    assert asyncio.run(until(lambda: store.state().name == "healthy"))
    write(store, "b")
    assert [row.entry.request_id for row in store.entries()] == ["a", "b"]
    store.stop()
    with pytest.raises(OutputError, match="does not answer"):
        open_store("postgresql://walras:hunter2@127.0.0.1:1/postgres")


def test_without_psycopg_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys  # noqa: PLC0415

    monkeypatch.setitem(sys.modules, "psycopg", None)
    monkeypatch.delitem(sys.modules, "walras.ledger.postgres", raising=False)
    with pytest.raises(SettingsError, match=r"pip install 'walras\[postgres\]'"):
        open_store("postgresql://nowhere/x")


# --- identities -------------------------------------------------------------------------------------------------------


TAMPERED = {
    "DELETE FROM entries WHERE request_id = 'a'": {"every closed hold has an entry, and no open one", "running totals", "holds ="},
    "DELETE FROM holds WHERE request_id = 'a'": {"an entry reserved the sum of its holds", "running totals", "holds ="},
    "DELETE FROM entries; DELETE FROM holds": {"running totals"},
    "UPDATE holds SET closed = 0 WHERE request_id = 'a'": {"every closed hold has an entry, and no open one", "holds ="},
    "UPDATE holds SET amount_nano = 1001 WHERE request_id = 'a'": {"an entry reserved the sum", "running totals", "holds ="},
    "UPDATE holds SET tenant = 'x' WHERE request_id = 'a'": {"holds and entry name the same"},
    "UPDATE entries SET charged_nano = 801 WHERE request_id = 'a'": {"running totals", "the compute term"},
    "UPDATE entries SET settled = 'cap' WHERE request_id = 'a'": {"settled at the cap"},
    "UPDATE entries SET value_nano = 1 WHERE request_id = 'a'": {"the value term"},
    "UPDATE entries SET own_delay_nano = 51 WHERE request_id = 'a'": {"own delay is charged once"},
    "UPDATE entries SET alternatives = x'5b5d7d' WHERE request_id = 'a'": {"alternatives can be read"},
    "INSERT INTO outcomes VALUES ('z', 1, 1, NULL, 'u')": {"an outcome belongs"},
    "INSERT INTO corrections VALUES ('a', 1, 1, 5, 2, 'u')": {"corrections lead from"},
}  # fmt: skip


@pytest.mark.parametrize("change", TAMPERED)
def test_whoever_changes_the_file_is_found_out(tmp_path: Path, change: str) -> None:
    path = tmp_path / "ledger.db"
    store = open_store(path)
    write(store, "a", "b")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        if change.startswith("UPDATE") and "closed" not in change:
            with pytest.raises(sqlite3.IntegrityError, match="are not changed"):
                db.execute(change)
        for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            db.execute(f"DROP TRIGGER {name}")
        db.executescript(change)
    found = verify(store).violations
    store.stop()
    assert len(found) == len(TAMPERED[change])
    for begins in TAMPERED[change]:
        assert any(violation.identity.startswith(begins) for violation in found), (begins, found)
    assert all(
        v.request_ids in (("a",), ("z",))
        for v in found
        if v.identity[:4] not in ("runn", "hold") or v.request_ids
    )


def test_an_alternative_that_charges_a_delay_twice_is_named(store: Store) -> None:
    twice = pack([Alternative("small", 100, 10, 20, 5, 45)])
    write(store, "fine")
    write(store, "twice", alternatives=twice)
    (violation,) = verify(store).violations
    assert violation.request_ids == ("twice",)
    assert violation.identity == "an alternative's net is value − compute − latency − risk"


def test_a_torn_page_is_found(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    store = open_store(path)
    write(store, *(f"r{k}" for k in range(200)))
    store.stop()
    with path.open("r+b") as file:
        file.seek(4096 * 12)
        file.write(b"\xff" * 2048)
    store = open_store(path, read_only=True)
    with pytest.raises(RecordError, match="damaged"):
        verify(store)
    store.stop()


class Balance(RuleBasedStateMachine):
    """Holds, entries, crashes, recovery, corrections and retention in any order: it always balances, as a model says."""

    def __init__(self) -> None:
        super().__init__()
        import tempfile  # noqa: PLC0415

        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "ledger.db"
        self.store = open_store(self.path)
        self.open: dict[str, int] = {}
        self.dead: set[str] = set()
        self.paid: dict[str, int] = {}
        self.cap: set[str] = set()
        self.count = 0

    @rule(amount=st.integers(0, 10**12))
    def hold(self, amount: int) -> None:
        self.count += 1
        self.open[f"r{self.count}"] = amount
        self.store.hold(hold(f"r{self.count}", amount)).wait(10)

    @precondition(lambda self: set(self.open) - self.dead)
    @rule(data=st.data())
    def hold_more(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(set(self.open) - self.dead)))
        self.count += 1
        self.open[name] += 5
        self.store.hold(hold(name, 5, id=str(self.count))).wait(10)

    @precondition(lambda self: set(self.open) - self.dead)
    @rule(data=st.data(), share=st.floats(0, 1), over=st.integers(0, 3))
    def close(self, data: st.DataObject, share: float, over: int) -> None:
        name = data.draw(st.sampled_from(sorted(set(self.open) - self.dead)))
        reserved = self.open.pop(name)
        charged = reserved + over if share == 1 else int(reserved * share)
        self.paid[name] = charged
        self.store.close(entry(name, charged, reserved=reserved)).wait(10)

    @rule()
    def refuse(self) -> None:
        self.count += 1
        self.paid[f"r{self.count}"] = 0
        self.store.close(entry(f"r{self.count}", 0, reserved=0, status="refused", settled="none")).wait(10)

    @rule()
    def crash(self) -> None:
        """What is open has lost its process, as far as the next one can know."""
        self.store.stop()
        self.store = open_store(self.path)
        self.dead = set(self.open)

    @rule()
    def recover(self) -> None:
        assert {e.request_id for e in recover(self.store)} == self.dead
        for name in self.dead:
            self.paid[name] = self.open.pop(name)
        self.cap |= self.dead
        self.dead = set()

    @precondition(lambda self: self.cap)
    @rule(data=st.data(), charged=st.integers(0, 10**12))
    def reconcile(self, data: st.DataObject, charged: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.cap)))
        self.paid[name] = charged
        self.store.reconcile(Correction(name, NOON, charged)).wait(10)

    @rule()
    def retain(self) -> None:
        assert self.store.retain(NOON + DAY) >= len(self.cap)
        self.cap = set()

    @invariant()
    def balances(self) -> None:
        seen = verify(self.store)
        assert seen.violations == ()
        assert seen.held_nano == seen.settled_nano + seen.released_nano + seen.open_nano
        assert seen.open_nano == sum(self.open.values())
        assert self.store.spent(0) == sum(self.paid.values())

    def teardown(self) -> None:
        self.store.stop()
        self.folder.cleanup()


TestBalance = Balance.TestCase
TestBalance.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)


# --- export -----------------------------------------------------------------------------------------------------------


def traded(store: Store) -> None:
    """Six requests with every kind of ending."""
    write(store, "a", "b", task_class="chat")
    write(store, "c", use="large", at_ns=NOON + 2_500_000_000, settled="estimated")
    store.close(entry("refused", 0, reserved=0, status="refused", settled="none", use=None)).wait(10)
    for outcome in (
        Outcome("a", NOON, 0.2),
        Outcome("a", NOON + 5, 0.9, 0.25, "judge"),
        Outcome("c", NOON, 1.0),
    ):
        store.outcome(outcome).wait(10)
    store.reconcile(Correction("c", NOON, 700)).wait(10)


def test_the_export_says_what_was_paid(store: Store, tmp_path: Path) -> None:
    traded(store)
    path = tmp_path / "out.parquet"
    done = export(store, path)
    assert (done.requests, done.rows, done.with_quality, done.left_out) == (3, 3, 2, 1)
    rows = {row["request_id"]: row for row in pq.read_table(path).to_pylist()}
    assert (rows["a"]["quality"], rows["a"]["loss_usd"], rows["b"]["quality"]) == (0.9, 0.25, None)
    assert (rows["a"]["cost_usd"], rows["c"]["cost_usd"]) == (800e-9, 700e-9)
    assert (rows["c"]["model"], rows["c"]["time_s"], rows["a"]["time_s"]) == ("large", 2.5, 0.0)
    assert (rows["a"]["latency_s"], rows["a"]["risk"], rows["a"]["chosen"]) == (0.5, 7e-9, True)
    assert (rows["a"]["input_tokens"], rows["a"]["reasoning_tokens"], rows["a"]["propensity"]) == (
        120,
        5,
        0.9,
    )


def test_records_read_the_export_with_alternatives(store: Store, tmp_path: Path) -> None:
    traded(store)
    path = tmp_path / "out.parquet"
    done = export(store, path, alternatives=True, synthetic=True, where=Filter(tenant="acme"))
    assert done.rows == 6
    log = read_log([path])
    assert log.synthetic
    assert log.models == ("small", "large")
    assert [log.models[i] for i in log.chosen] == ["small", "small", "large"]
    assert str(log.per_use["quality"].tolist()) == "[[0.9, nan], [nan, nan], [nan, 1.0]]"
    assert log.value is not None
    assert log.value.tolist() == [0.3, 0.3, 0.3]


def test_an_export_that_fails_leaves_nothing(store: Store, tmp_path: Path) -> None:
    write(store, "a")
    with pytest.raises(OutputError):
        export(store, tmp_path / "no folder" / "out.parquet")
    kept = tmp_path / "kept.parquet"
    export(store, kept)
    before = kept.read_bytes()
    write(store, "b", alternatives=b"broken")
    with pytest.raises(RecordError, match="alternatives"):
        export(store, kept, alternatives=True)
    assert kept.read_bytes() == before
    assert [path.name for path in tmp_path.glob("*.parquet*")] == ["kept.parquet"]
    assert not list(tmp_path.glob(".*.new"))


def test_stats(store: Store) -> None:
    traded(store)
    store.hold(hold("open")).wait(10)
    seen = stats(store)
    assert (seen.entries, seen.outcomes, seen.corrections, seen.open_holds) == (4, 3, 1, 1)
    assert seen.by_status == {"ok": 3, "refused": 1}
    assert seen.by_use == {"small": (2, 1_600), "large": (1, 800)}
    assert (seen.first_ns, seen.last_ns, seen.charged_nano) == (NOON, NOON + 2_500_000_000, 2_400)
    assert seen.size_bytes > 0


def test_what_is_to_reconcile_is_counted_found_and_corrected(store: Store, tmp_path: Path) -> None:
    write(store, "a", "b", "c", settled="cap", charged=1_000)
    write(store, "known")
    (tmp_path / "charges.csv").write_text("request_id,charged_nano\na,400\nknown,1\nnone,1\nb,1000\n")
    done = reconcile(store, tmp_path / "charges.csv", source="invoice", at_ns=NOON)
    assert (done.corrected, done.unchanged, done.difference_nano) == (2, 0, -600)
    assert [(row.row, row.request_id) for row in done.refused] == [(2, "known"), (3, "none")]

    def found(**where: object) -> list[str]:
        return [row.entry.request_id for row in store.entries(where=Filter(**where))]  # type: ignore[arg-type]

    assert found(settled="cap", reconciled=False) == ["c"]
    assert found(reconciled=True, tenant="acme") == ["a", "b"]
    assert found(reconciled=False) == ["c", "known"]
    seen = stats(store)
    assert (seen.to_reconcile, seen.to_reconcile_nano, seen.corrections) == (1, 1_000, 2)
    again = reconcile(store, tmp_path / "charges.csv", source="invoice", at_ns=NOON)
    assert (again.corrected, again.unchanged, len(again.refused)) == (0, 2, 2)


def test_the_latest_outcomes_are_read_in_the_order_said(store: Store) -> None:
    write(store, "a", "b", use="small")
    write(store, "c", use="large", task_class=None)
    for at, (name, quality) in enumerate((("b", 0.1), ("a", 0.2), ("c", 0.3), ("b", 0.4))):
        store.outcome(Outcome(name, NOON + at, quality, source=str(at))).wait(10)
    with store.snapshot() as query:
        assert [tuple(row) for row in query(OUTCOMES, [3])] == [
            ("small", "chat", 0.2), ("large", None, 0.3), ("small", "chat", 0.4),
        ]  # fmt: skip
