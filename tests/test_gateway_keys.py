"""API keys: who is let in, rotation and revocation, what other processes change, and that no secret is ever shown or stored."""

from __future__ import annotations

import asyncio
import hmac
import multiprocessing
import re
import sqlite3
import stat
import time
import traceback
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from walras.errors import OutputError, RecordError, SettingsError
from walras.gateway import keys as keys_module
from walras.gateway.escrow import LocalEscrow
from walras.gateway.keys import GRACE_S, Key, KeyStore, NewKey

NOW = 1_795_000_000 * 10**9
SECOND = 10**9


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.sqlite"


@pytest.fixture
def store(path: Path) -> Iterator[KeyStore]:
    with KeyStore(path) as store:
        yield store


def in_another_process(path: Path, what: str, *args: Any, **named: Any) -> Any:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_elsewhere, (path, what, args, named))


def _elsewhere(path: Path, what: str, args: Any, named: Any) -> Any:
    with KeyStore(path) as store:
        return getattr(store, what)(*args, **named)


# --- who is let in --------------------------------------------------------------------------------------------------


def test_a_key_is_found_by_its_secret_with_all_that_was_said_of_it(store: KeyStore, path: Path) -> None:
    made = store.create(
        "acme", scope="read-only", budget_nano=5, period="day", value_usd=2.5, task_class="code", now_ns=NOW
    )
    assert re.fullmatch("wl-[a-z2-7]{52}", made.secret)
    key = store.find(made.secret.encode(), NOW)
    assert key == made.key == Key(made.key.id, "acme", "read-only", 5, "day", 2.5, "code", NOW, None, None)
    assert key.accounts == (f"key:{key.id}", "tenant:acme", "global")
    with KeyStore(path) as again:
        assert again.find(made.secret.encode(), NOW) == key
        assert again.list() == (key,)


def test_secrets_are_32_bytes_of_chance(store: KeyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(keys_module.secrets, "token_bytes", lambda n: asked.append(n) or bytes(range(n)))
    assert (
        store.create("acme", now_ns=NOW).secret == "wl-aaaqeayeaudaocajbifqydiob4ibceqtcqkrmfyydenbwha5dypq"
    )
    assert asked == [6, 32], "the id is not part of the secret"


@pytest.fixture(scope="module")
def old_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KeyStore]:
    with KeyStore(tmp_path_factory.mktemp("old") / "keys.sqlite") as store:
        store.create("acme", now_ns=NOW)
        yield store


@given(st.one_of(st.binary(max_size=80), st.binary(min_size=52, max_size=52).map(lambda rest: b"wl-" + rest)))
def test_anything_else_is_nobody(old_store: KeyStore, garbage: bytes) -> None:
    assert old_store.find(garbage, NOW) is None


def test_a_secret_with_one_letter_changed_is_nobody(store: KeyStore) -> None:
    secret = store.create("acme", now_ns=NOW).secret.encode()
    for at in range(len(secret)):
        wrong = bytearray(secret)
        wrong[at] = ord("b") if wrong[at] == ord("a") else ord("a")
        assert store.find(bytes(wrong), NOW) is None
    assert store.find(secret[:-1], NOW) is None
    assert store.find(secret + b"a", NOW) is None
    assert store.find(secret.upper(), NOW) is None
    assert store.find(secret, NOW) is not None


def test_digests_are_compared_in_constant_time(store: KeyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two digests with the same head: only `compare_digest` tells them apart, and what it says is what counts."""
    secret = store.create("acme", now_ns=NOW).secret.encode()
    digest = sha256(secret).digest()
    compared: list[tuple[bytes, bytes]] = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return hmac.compare_digest(a, b)

    monkeypatch.setattr(keys_module, "hmac", type("hmac", (), {"compare_digest": staticmethod(compare)}))
    assert store.find(secret, NOW) is not None
    assert compared == [(digest, digest)]
    [(known, key, until)] = store._index[digest[:8]]
    store._index[digest[:8]] = [(known[:-1] + bytes([known[-1] ^ 1]), key, until)]
    assert store.find(secret, NOW) is None
    assert set(compared[1:]) == {(known[:-1] + bytes([known[-1] ^ 1]), digest)}


def test_looking_up_costs_next_to_nothing(store: KeyStore) -> None:
    secret = [store.create("acme", now_ns=NOW).secret.encode() for _ in range(20)][10]
    store.find(secret, NOW)
    took = []
    for _ in range(50):
        begin = time.perf_counter()
        for _ in range(20):
            store.find(secret, NOW)
        took.append((time.perf_counter() - begin) / 20)
    assert min(took) < 5e-6


# --- rotation and revocation ------------------------------------------------------------------------------------------


def test_a_rotated_secret_works_until_its_grace_is_over(store: KeyStore) -> None:
    first = store.create("acme", budget_nano=7, now_ns=NOW)
    second = store.rotate(first.key.id, now_ns=NOW)
    assert second.key.rotated_ns == NOW
    assert second.key.budget_nano == 7
    end = NOW + int(GRACE_S) * SECOND
    old, new = first.secret.encode(), second.secret.encode()
    assert store.find(old, end - 1) == store.find(new, end + 10**15) == second.key
    assert store.find(old, end) is None
    third = store.rotate(first.key.id, grace_s=3 * GRACE_S, now_ns=NOW + SECOND)
    assert store.find(old, end) is None, "a later rotation does not lengthen an earlier grace"
    assert store.find(new, end + 2 * SECOND) == third.key
    fourth = store.rotate(first.key.id, grace_s=0, now_ns=NOW + 2 * SECOND)
    for secret in (old, new, third.secret.encode()):
        assert store.find(secret, NOW + 2 * SECOND) is None
    assert store.find(fourth.secret.encode(), NOW + 2 * SECOND) == fourth.key


def test_a_revoked_key_is_nobody_and_stays_on_the_list(store: KeyStore) -> None:
    made, other = store.create("acme", now_ns=NOW), store.create("acme", now_ns=NOW + 1)
    rotated = store.rotate(made.key.id, now_ns=NOW)
    key = store.revoke(made.key.id, now_ns=NOW + 5)
    assert key.revoked_ns == NOW + 5
    assert store.revoke(made.key.id, now_ns=NOW + 9) == key
    for secret in (made.secret, rotated.secret):
        assert store.find(secret.encode(), NOW + 5) is None
    assert store.find(other.secret.encode(), NOW) == other.key
    assert store.list() == (key, other.key)
    with pytest.raises(SettingsError, match="is revoked: create a new key"):
        store.rotate(made.key.id, now_ns=NOW)


# --- other processes --------------------------------------------------------------------------------------------------


def test_what_another_process_changes_is_seen_within_a_second(
    store: KeyStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = time.monotonic_ns()
    monkeypatch.setattr(keys_module.time, "monotonic_ns", lambda: clock)
    mine = store.create("acme", now_ns=NOW)
    assert store.find(mine.secret.encode(), NOW) == mine.key
    theirs = in_another_process(path, "create", "beta", now_ns=NOW)
    assert store.find(theirs.secret.encode(), NOW) == theirs.key, "a new key works at once"
    in_another_process(path, "revoke", mine.key.id, now_ns=NOW)
    clock += SECOND
    assert store.find(mine.secret.encode(), NOW) is None
    assert [key.tenant for key in store.list()] == ["acme", "beta"]
    assert store.revoke(theirs.key.id, now_ns=NOW).revoked_ns == NOW


def test_two_processes_that_change_keys_do_not_lose_each_other_s(store: KeyStore, path: Path) -> None:
    with KeyStore(path) as other:
        made = [which.create("acme", now_ns=NOW + k) for k, which in enumerate((store, other) * 5)]
        assert store.list() == other.list() == tuple(one.key for one in made)
        other.rotate(made[0].key.id, grace_s=0, now_ns=NOW + 100)
        store.revoke(made[0].key.id, now_ns=NOW + 101)
        with pytest.raises(SettingsError, match="revoked"):
            other.rotate(made[0].key.id, now_ns=NOW + 102)


def test_the_watcher_is_told_and_can_open_the_budgets(path: Path) -> None:
    escrow = LocalEscrow()

    def watch(keys: tuple[Key, ...]) -> None:
        for key in keys:
            escrow.set_budget(key.accounts[0], key.budget_nano, key.period, NOW)

    with KeyStore(path, watch) as store, KeyStore(path) as other:
        made = other.create("acme", budget_nano=12, period="week", now_ns=NOW)
        key = store.list()[0]
        assert key == made.key
        assert asyncio.run(escrow.standing(key.accounts[0], NOW)).budget_nano == 12


def test_keys_still_work_while_the_file_cannot_be_read(
    store: KeyStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = time.monotonic_ns()
    monkeypatch.setattr(keys_module.time, "monotonic_ns", lambda: clock)
    made = store.create("acme", now_ns=NOW)
    whole = store._file

    class Broken:
        def execute(self, *_: object) -> None:
            raise sqlite3.OperationalError("disk I/O error")

    clock += SECOND
    store._file = Broken()  # type: ignore[assignment]
    assert store.find(made.secret.encode(), NOW) == made.key
    assert store.problem == f"{path}: keys cannot be read: disk I/O error"
    with pytest.raises(OutputError, match=r"keys\.sqlite: keys cannot be read or written: disk I/O error"):
        store.create("acme", now_ns=NOW)
    clock += SECOND
    store._file = whole
    assert store.find(made.secret.encode(), NOW) == made.key
    assert store.problem is None


def test_what_the_watcher_could_not_take_it_is_told_again(path: Path) -> None:
    """Such as the budgets of a new key, while nobody can read what was spent of them."""
    told: list[tuple[Key, ...]] = []
    well = True

    def watch(keys: tuple[Key, ...]) -> None:
        if not well:
            raise OutputError("the ledger cannot be read")
        told.append(keys)

    with KeyStore(path, watch) as store, KeyStore(path) as other:
        old = store.create("acme", now_ns=NOW)
        well = False
        new = other.create("late", now_ns=NOW)
        assert store.find(old.secret.encode(), NOW) == old.key
        with pytest.raises(OutputError, match="the ledger cannot be read"):
            store.find(new.secret.encode(), NOW)
        well = True
        assert store.find(new.secret.encode(), NOW) == new.key
        assert told[-1] == (old.key, new.key)
        assert store.problem is None


# --- nothing is shown -------------------------------------------------------------------------------------------------


def test_no_secret_in_any_text_nor_in_the_file(store: KeyStore, path: Path) -> None:
    made = store.create("acme", now_ns=NOW)
    rotated = store.rotate(made.key.id, now_ns=NOW)
    assert isinstance(rotated, NewKey)
    texts = [f"{one!r} {one} {one.key!r} {one.key} {[one]}" for one in (made, rotated)]
    texts += [repr(store), str(store.__dict__), repr(store.list())]
    for wrong in (made.secret, made.secret[:-1]):
        for change in (store.rotate, store.revoke):
            with pytest.raises(SettingsError) as caught:
                change(wrong, now_ns=NOW)
            texts += ["".join(traceback.format_exception(caught.value)), repr(caught.value)]
    files = [file.read_bytes() for file in path.parent.iterdir()]
    assert len(files) >= 2, "the write-ahead log too"
    for one in (made, rotated):
        bare = one.secret.removeprefix("wl-")
        assert sha256(one.secret.encode()).digest() in b"".join(files)
        for text in texts:
            assert bare[:20] not in text
        for content in files:
            assert bare[:20].encode() not in content


def test_the_file_is_its_owner_s_alone(store: KeyStore, path: Path) -> None:
    store.create("acme", now_ns=NOW)
    for file in path.parent.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"tenant": ""}, "needs the name of a tenant"),
        ({"tenant": "a\nb"}, "needs the name of a tenant"),
        ({"scope": "admn"}, "'admn' is no scope .did you mean 'admin'"),
        ({"period": "dayly"}, "'dayly' is no period .did you mean 'day'"),
        ({"budget_nano": -1}, "a budget must be at least 0"),
        ({"budget_nano": 2**63}, "below 9.2e9 USD"),
        ({"value_usd": -0.5}, "a value must be finite"),
        ({"value_usd": float("inf")}, "a value must be finite"),
        ({"value_usd": float("nan")}, "a value must be finite"),
    ],
)
def test_a_key_that_makes_no_sense_is_not_made(store: KeyStore, named: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        store.create(**{"tenant": "acme", "now_ns": NOW, **named})
    assert store.list() == ()


def test_an_unknown_key_is_named_with_the_nearest(store: KeyStore) -> None:
    made = store.create("acme", now_ns=NOW)
    with pytest.raises(SettingsError, match=f"no such key .did you mean '{made.key.id}'"):
        store.revoke(made.key.id[:-1], now_ns=NOW)
    with pytest.raises(SettingsError, match="at least 0 seconds, not -1"):
        store.rotate(made.key.id, grace_s=-1, now_ns=NOW)


def test_files_that_are_no_key_files_are_refused_and_left_as_they_are(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("no keys here, " * 100)
    with pytest.raises(RecordError, match=r"notes\.txt: is not a file of keys"):
        KeyStore(text)
    assert text.read_text() == "no keys here, " * 100
    newer = tmp_path / "newer.sqlite"
    with KeyStore(newer) as store:
        store._file.execute("PRAGMA user_version = 99")
    with pytest.raises(RecordError, match="written by a newer Walras"):
        KeyStore(newer)
    with pytest.raises(OutputError, match="cannot be made: No such file or directory"):
        KeyStore(tmp_path / "missing" / "keys.sqlite")
    with pytest.raises(OutputError, match="cannot be read or written"):
        KeyStore(tmp_path)
