"""API keys: who may call, as which tenant, with what budget; made and revoked here or by another process.

A secret is `wl-` and 32 random bytes in base 32. It is shown once and never stored: what is stored is its SHA-256. A
slow hash would add nothing, since 256 random bits cannot be guessed from it. Looked up is the digest, never the secret,
so that how long a look-up takes says nothing about secrets; the digests are then compared in constant time.
"""

from __future__ import annotations

import hmac
import secrets
import sqlite3
import time
from base64 import b32encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Literal, cast, get_args

from walras.errors import OutputError, RecordError, SettingsError, nearest
from walras.gateway.escrow import PERIODS, Period
from walras.ledger.money import Nano

KeyScope = Literal["tenant", "admin", "read-only"]
SCOPES: tuple[KeyScope, ...] = get_args(KeyScope)
"""tenant: calls and its own budget. admin: everything. read-only: looks, and makes no calls."""
GRACE_S = 86_400.0
"""How long a rotated secret still works, seconds."""
POLL_NS = 1_000_000_000
"""How often changes made by other processes are looked for."""

_SECOND = 1_000_000_000
_PREFIX = "wl-"
_LENGTH = len(_PREFIX) + 52
_HEAD = 8
"""Bytes of a digest by which it is found."""
_MIGRATIONS = (
    """
    CREATE TABLE key (
        id TEXT PRIMARY KEY, tenant TEXT NOT NULL, scope TEXT NOT NULL, budget_nano INTEGER, period TEXT NOT NULL,
        value_usd REAL, task_class TEXT, created_ns INTEGER NOT NULL, rotated_ns INTEGER, revoked_ns INTEGER
    ) STRICT;
    CREATE TABLE secret (
        digest BLOB PRIMARY KEY, key_id TEXT NOT NULL REFERENCES key (id), until_ns INTEGER
    ) STRICT, WITHOUT ROWID;
    """,
)
"""One script for each version of the file, never changed once released."""


@dataclass(frozen=True, slots=True)
class Key:
    """What is known of a key, without its secret."""

    id: str
    tenant: str
    scope: KeyScope
    budget_nano: Nano | None
    """None: no limit of its own."""
    period: Period
    value_usd: float | None
    """Worth of a task that does not state its own, USD per unit of quality."""
    task_class: str | None
    """Class of a task that does not state its own."""
    created_ns: int
    """UNIX time, as are the next two."""
    rotated_ns: int | None
    revoked_ns: int | None

    @property
    def accounts(self) -> tuple[str, str, str]:
        """The escrow accounts its calls draw on."""
        return accounts_of(self.id, self.tenant)


@lru_cache(4096)
def accounts_of(key_id: str, tenant: str) -> tuple[str, str, str]:
    """The escrow accounts of a tenant's key."""
    return f"key:{key_id}", f"tenant:{tenant}", "global"


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key just made or rotated, with its secret for the one time that it is shown."""

    key: Key
    secret: str = field(repr=False)


class KeyStore:
    """Keys in one SQLite file, indexed in memory. For one thread; other processes may use the same file.

    What another process changes is seen within a second of the next `find`, a new secret at once. While the file cannot be read, the keys
    known so far still work, and `problem` says why.
    """

    def __init__(self, path: Path, watch: Callable[[tuple[Key, ...]], None] | None = None) -> None:
        """
        Args:
            path: made, with permissions for its owner alone, if it is not there.
            watch: called with all keys now and whenever they change, such as to tell the escrow their budgets.

        Raises:
            RecordError: not a file of keys, or one of a newer version.
            OutputError: it cannot be opened or written.
        """
        self._path, self._watch = path, watch
        self.problem: str | None = None
        self._keys: dict[str, Key] = {}
        self._index: dict[bytes, list[tuple[bytes, Key, int | None]]] = {}
        self._version, self._next_poll = -1, 0
        with self._stated():
            path.touch(mode=0o600)
            self._file = sqlite3.connect(path, isolation_level=None, timeout=5.0)
            try:
                self._migrate()
                self._load()
            except BaseException:
                self._file.close()
                raise

    def __enter__(self) -> KeyStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Keys are not found any more."""
        self._file.close()

    def find(self, secret: bytes, now_ns: int) -> Key | None:
        """The key of a secret as a request carries it; None where it is wrong, revoked, or rotated and out of grace.

        Raises:
            OutputError: it is none of those known, and keys cannot be read now.
        """
        if (clock := time.monotonic_ns()) >= self._next_poll:
            self._next_poll = clock + POLL_NS
            self._poll()
        if len(secret) != _LENGTH:
            return None
        digest = sha256(secret).digest()
        found = self._match(digest, now_ns)
        if found is None:  # made a moment ago, perhaps; to ask takes some microseconds
            self._poll()
            found = self._match(digest, now_ns)
        if found is None and self.problem is not None:
            raise OutputError(self.problem)
        return found

    def _match(self, digest: bytes, now_ns: int) -> Key | None:
        for known, key, until_ns in self._index.get(digest[:_HEAD], ()):
            if hmac.compare_digest(known, digest) and (until_ns is None or now_ns < until_ns):
                return key
        return None

    def list(self) -> tuple[Key, ...]:
        """All keys, revoked ones too, oldest first."""
        self._poll()
        return tuple(self._keys.values())

    def create(
        self,
        tenant: str,
        *,
        scope: KeyScope = "tenant",
        budget_nano: Nano | None = None,
        period: Period = "none",
        value_usd: float | None = None,
        task_class: str | None = None,
        now_ns: int,
    ) -> NewKey:
        """A new key; its secret is in the answer and nowhere else.

        Raises:
            SettingsError: an empty tenant, an unknown scope or period, a negative or infinite budget or value.
            OutputError: it cannot be written; nothing has changed.
        """
        key = Key(
            *(f"key_{secrets.token_hex(6)}", tenant, scope, budget_nano, period, value_usd, task_class),
            *(now_ns, None, None),
        )
        _check(key)
        with self._writing():
            self._file.execute(
                "INSERT INTO key VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (key.id, tenant, scope, budget_nano, period, value_usd, task_class, now_ns, None, None),
            )
            secret = self._new_secret(key.id)
        return NewKey(self._keys[key.id], secret)

    def rotate(self, key_id: str, *, grace_s: float = GRACE_S, now_ns: int) -> NewKey:
        """A new secret; older ones work for `grace_s` seconds more at most.

        Raises:
            SettingsError: an unknown or revoked key, or a negative grace.
            OutputError: it cannot be written; nothing has changed.
        """
        if not 0 <= grace_s < 1e9:
            raise SettingsError(f"a grace period must be at least 0 seconds, not {grace_s}")
        with self._writing():
            if self._known(key_id).revoked_ns is not None:
                raise SettingsError("is revoked: create a new key", key=key_id)
            until = now_ns + round(grace_s * _SECOND)
            self._file.execute(
                "UPDATE secret SET until_ns = min(coalesce(until_ns, ?1), ?1) WHERE key_id = ?2",
                (until, key_id),
            )
            self._file.execute("DELETE FROM secret WHERE until_ns <= ?", (now_ns,))
            self._file.execute("UPDATE key SET rotated_ns = ? WHERE id = ?", (now_ns, key_id))
            secret = self._new_secret(key_id)
        return NewKey(self._keys[key_id], secret)

    def revoke(self, key_id: str, *, now_ns: int) -> Key:
        """It works no more, with any secret. A second time changes nothing.

        Raises:
            SettingsError: an unknown key.
            OutputError: it cannot be written; nothing has changed.
        """
        with self._writing():
            self._known(key_id)
            self._file.execute("DELETE FROM secret WHERE key_id = ?", (key_id,))
            self._file.execute(
                "UPDATE key SET revoked_ns = coalesce(revoked_ns, ?) WHERE id = ?", (now_ns, key_id)
            )
        return self._keys[key_id]

    # --- the file ---------------------------------------------------------------------------------------------------

    def _new_secret(self, key_id: str) -> str:
        secret = _PREFIX + b32encode(secrets.token_bytes(32)).decode().rstrip("=").lower()
        digest = sha256(secret.encode()).digest()
        self._file.execute("INSERT INTO secret VALUES (?, ?, NULL)", (digest, key_id))
        return secret

    def _known(self, key_id: str) -> Key:
        """Raises SettingsError for an unknown key. Ask within `_writing`, which has read what others wrote."""
        key = self._keys.get(key_id)
        if key is None and key_id.startswith(_PREFIX):
            raise SettingsError(
                "a key is named by its id (key_…), never by its secret", hint="`walras keys list`"
            )
        if key is None:
            raise SettingsError("no such key", key=key_id, hint=nearest(key_id, self._keys))
        return key

    def _migrate(self) -> None:
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
            self._file.execute(f"PRAGMA {pragma}")
        with self._transaction():
            done = self._file.execute("PRAGMA user_version").fetchone()[0]
            if done > len(_MIGRATIONS):
                raise RecordError("was written by a newer Walras; use that one", path=self._path)
            for script in _MIGRATIONS[done:]:
                for statement in script.split(";"):
                    self._file.execute(statement)
            self._file.execute(f"PRAGMA user_version = {len(_MIGRATIONS)}")

    def _poll(self) -> None:
        """Read again if another process has written. An error keeps what is known: to refuse all would be worse."""
        try:
            if self._file.execute("PRAGMA data_version").fetchone()[0] != self._version:
                self._load()
            self.problem = None
        except sqlite3.Error as error:
            self.problem = f"{self._path}: keys cannot be read: {error}"
        except OutputError as error:  # of whoever watches
            self.problem = str(error)

    def _load(self) -> None:
        # In this order, since others may write in between: the version is too old rather than too new, and no secret
        # is without its key, for keys are never deleted.
        version = self._file.execute("PRAGMA data_version").fetchone()[0]
        digests = self._file.execute("SELECT digest, key_id, until_ns FROM secret").fetchall()
        rows = self._file.execute("SELECT * FROM key ORDER BY created_ns, rowid")
        keys = {row[0]: Key(*row) for row in rows}
        if self._watch is not None:  # if it fails, nothing has changed, and it is told again at the next poll
            self._watch(tuple(keys.values()))
        index: dict[bytes, list[tuple[bytes, Key, int | None]]] = {}
        for digest, key_id, until_ns in digests:
            index.setdefault(digest[:_HEAD], []).append((digest, keys[key_id], until_ns))
        self._keys, self._index, self._version = keys, index, version

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._file.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._file.execute("COMMIT")
        except BaseException:
            if self._file.in_transaction:
                self._file.execute("ROLLBACK")
            raise

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """A change to the file, on what it holds now, and then to the index."""
        with self._stated():
            with self._transaction():
                self._load()
                yield
            self._load()

    @contextmanager
    def _stated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise OutputError(f"{self._path}: keys cannot be read or written: {error}") from error
        except sqlite3.DatabaseError as error:
            raise RecordError(f"is not a file of keys: {error}", path=self._path) from error
        except OSError as error:
            raise OutputError(f"{self._path}: cannot be made: {error.strerror or error}") from error


def _check(key: Key) -> None:
    if not key.tenant or not key.tenant.isprintable():
        raise SettingsError("a key needs the name of a tenant, of printable characters")
    for what, given, known in (("scope", key.scope, SCOPES), ("period", key.period, PERIODS)):
        if given not in known:
            raise SettingsError(f"'{given}' is no {what}", hint=nearest(given, cast(tuple[str, ...], known)))
    if key.budget_nano is not None and not 0 <= key.budget_nano < 2**63:
        raise SettingsError(
            f"a budget must be at least 0 and below 9.2e9 USD, not {key.budget_nano} nano-USD"
        )
    if key.value_usd is not None and not 0 <= key.value_usd < float("inf"):
        raise SettingsError(f"a value must be finite and at least 0, not {key.value_usd}")
