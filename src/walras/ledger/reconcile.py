"""What providers say they charged, against what was written down while nobody knew: corrections from a file."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial
from itertools import islice
from pathlib import Path

import msgspec

from walras.errors import QuantityError, RecordError
from walras.ledger.entry import Correction
from walras.ledger.money import Nano, nano
from walras.ledger.sql import Filter
from walras.ledger.store import Store

AMOUNTS = ("charged_usd", "charged_nano")
BATCH = 1000
"""Corrections on their way at a time."""


class Charge(msgspec.Struct, frozen=True):
    """One row: what a request cost, in one of the two units."""

    request_id: str
    charged_usd: Decimal | None = None
    charged_nano: int | None = None

    def amount(self) -> Nano:
        """What was charged.

        Raises:
            QuantityError: none or two are given, or it is none that a ledger can hold.
        """
        if self.charged_usd is not None and self.charged_nano is None:
            return nano(self.charged_usd)
        if self.charged_nano is not None and self.charged_usd is None:
            return nano(Decimal(self.charged_nano).scaleb(-9))
        raise QuantityError("give either charged_usd or charged_nano")


@dataclass(frozen=True, slots=True)
class RefusedRow:
    """A row that corrected nothing. The first of the file is row 1."""

    row: int
    request_id: str | None
    problem: str


@dataclass(slots=True)
class Reconciled:
    """What became of the rows of a file."""

    corrected: int = 0
    """Written down, also where a row confirms what was charged."""
    unchanged: int = 0
    """The ledger said it already."""
    difference_nano: Nano = 0
    """By how much more was paid than the ledger said before; below 0 for less."""
    refused: list[RefusedRow] = field(default_factory=list)


def reconcile(store: Store, path: Path, *, source: str, at_ns: int) -> Reconciled:
    """Correct the ledger by a .csv or .jsonl file with request_id, and charged_usd or charged_nano. The same file again
    changes nothing.

    Raises:
        RecordError: it cannot be read at all. OutputError: the ledger cannot be written; what was written stays.
    """
    done, wanted = Reconciled(), dict[str, tuple[int, Nano]]()
    for row, said in _rows(path):
        try:
            if isinstance(said, str):
                raise RecordError(said)
            if (earlier := wanted.setdefault(said.request_id, (row, said.amount()))[0]) != row:
                raise RecordError(f"row {earlier} has this request too", hint="give one row with their sum")
        except (RecordError, QuantityError) as error:
            done.refused.append(
                RefusedRow(row, None if isinstance(said, str) else said.request_id, str(error))
            )
    left = iter(wanted.items())
    while batch := [(row, Correction(i, at_ns, amount, source)) for i, (row, amount) in islice(left, BATCH)]:
        _write(store, batch, done)
    done.refused.sort(key=lambda refused: refused.row)
    return done


def _write(store: Store, batch: list[tuple[int, Correction]], done: Reconciled) -> None:
    """Send a batch to the ledger, and wait for it."""
    under_way = []
    for row, correction in batch:
        known = store.entries(None, 1, Filter(request_id=correction.request_id))
        if known and known[0].corrected_nano == correction.charged_nano:
            done.unchanged += 1
        else:
            before = known[0].paid_nano if known else 0
            under_way.append((row, correction, before, store.reconcile(correction)))
    for row, correction, before, ticket in under_way:
        try:
            ticket.wait()
        except RecordError as error:
            done.refused.append(RefusedRow(row, correction.request_id, str(error)))
        else:
            done.corrected += 1
            done.difference_nano += correction.charged_nano - before


def _rows(path: Path) -> Iterator[tuple[int, Charge | str]]:
    """(row, what it says, or what is wrong with it)."""
    read = {".csv": _csv, ".jsonl": _jsonl}.get(path.suffix.lower())
    if read is None:
        raise RecordError("is neither .csv nor .jsonl", path=path, hint="name the file by what it holds")
    try:
        yield from read(path)
    except OSError as error:
        raise RecordError(f"cannot be read: {error.strerror or error}", path=path) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise RecordError(f"cannot be read: {error}", path=path) from error


def _csv(path: Path) -> Iterator[tuple[int, Charge | str]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        lines = csv.DictReader(file)
        columns = lines.fieldnames or ()
        if "request_id" not in columns or not any(name in columns for name in AMOUNTS):
            hint = f"it has {', '.join(columns) or 'none'}"
            raise RecordError(
                f"needs the columns request_id and {' or '.join(AMOUNTS)}", path=path, hint=hint
            )
        for row, line in enumerate(lines, 1):
            given = {name: line[name] or None for name in ("request_id", *AMOUNTS) if name in line}
            yield row, _charge(partial(msgspec.convert, given, Charge, strict=False))


def _jsonl(path: Path) -> Iterator[tuple[int, Charge | str]]:
    with path.open("rb") as file:
        for row, line in enumerate((line for line in file if line.strip()), 1):
            yield row, _charge(partial(msgspec.json.decode, line, type=Charge))


def _charge(read: Callable[[], Charge]) -> Charge | str:
    try:
        found = read()
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        return str(error).replace("`$.", "`")
    return found if found.request_id.isprintable() else "its request_id is none that the service gives"
