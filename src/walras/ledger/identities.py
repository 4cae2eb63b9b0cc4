"""[balance] What must hold in a ledger, to the last nano-USD, and who breaks it.

    Σ holds = Σ settled + Σ released + Σ open        settled + overrun = what was charged, corrections included

An entry owns all its request's holds; its terms are those of [Z-1]; own delay is part of the latency term and charged nowhere
else; and the running totals agree with the rows, so none was lost or changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from walras.errors import RecordError, WalrasError
from walras.ledger.entry import Entry, unpack
from walras.ledger.money import Nano, priced
from walras.ledger.sql import Query, pages
from walras.ledger.store import Store

NAMED = 20
"""Most requests named for one identity."""

_RULES = {
    "every closed hold has an entry, and no open one": """SELECT h.request_id FROM holds h LEFT JOIN entries e
        ON e.request_id = h.request_id WHERE (e.request_id IS NULL) <> (h.closed = 0)""",
    "an entry reserved the sum of its holds": """SELECT e.request_id FROM entries e LEFT JOIN
        (SELECT request_id, sum(amount_nano) AS held FROM holds GROUP BY request_id) h ON h.request_id = e.request_id
        WHERE e.reserved_nano <> coalesce(h.held, 0)""",
    "holds and entry name the same tenant and key": """SELECT h.request_id FROM holds h JOIN entries e
        ON e.request_id = h.request_id WHERE h.tenant <> e.tenant OR h.key_id <> e.key_id""",
    "a request has one entry": "SELECT request_id FROM entries GROUP BY request_id HAVING count(*) > 1",
    "overrun is what was charged beyond the reservation": """SELECT request_id FROM entries WHERE overrun_nano <>
        CASE WHEN charged_nano > reserved_nano THEN charged_nano - reserved_nano ELSE 0 END""",
    "settled at the cap is charged the reservation, settled 'none' nothing": """SELECT request_id FROM entries
        WHERE (settled = 'cap' AND charged_nano <> reserved_nano) OR (settled = 'none' AND charged_nano <> 0)
        OR (status = 'refused' AND settled <> 'none')""",
    "corrections lead from what was charged to what they say": """SELECT c.request_id FROM corrections c JOIN
        (SELECT request_id, max(nth) AS last, sum(delta_nano) AS delta FROM corrections GROUP BY request_id) s
        ON s.request_id = c.request_id AND s.last = c.nth LEFT JOIN entries e ON e.request_id = c.request_id
        WHERE e.request_id IS NULL OR c.charged_nano <> e.charged_nano + s.delta""",
    "an outcome belongs to an entry": """SELECT o.request_id FROM outcomes o LEFT JOIN entries e
        ON e.request_id = o.request_id WHERE e.request_id IS NULL""",
}
"""Identity → SQL that finds the requests which break it."""

_TOTALS = """SELECT count(*), sum(paid), sum(CASE WHEN paid < reserved_nano THEN paid ELSE reserved_nano END),
    sum(CASE WHEN paid < reserved_nano THEN reserved_nano - paid ELSE 0 END),
    sum(CASE WHEN paid > reserved_nano THEN paid - reserved_nano ELSE 0 END), sum(paid - charged_nano),
    sum(CASE WHEN settled = 'cap' AND corrected IS NULL THEN 1 ELSE 0 END)
    FROM (SELECT e.reserved_nano, e.charged_nano, e.settled, c.delta AS corrected, e.charged_nano + coalesce(c.delta, 0) AS paid
        FROM entries e LEFT JOIN (SELECT request_id, sum(delta_nano) AS delta FROM corrections GROUP BY request_id) c
        ON c.request_id = e.request_id) t"""

_CONTROL = """SELECT sum(holds), sum(held), sum(entries), sum(charged) FROM (
    SELECT holds, held_nano AS held, entries, charged_nano AS charged FROM control
    UNION ALL SELECT -holds, -held_nano, -entries, -charged_nano FROM retired
    UNION ALL SELECT -count(*), -coalesce(sum(amount_nano), 0), 0, 0 FROM holds
    UNION ALL SELECT 0, 0, -count(*), -coalesce(sum(charged_nano), 0) FROM entries) t"""
"""What the running totals have too much: holds, held, entries, charged."""


@dataclass(frozen=True, slots=True)
class Violation:
    """An identity that does not hold, and (at most 20 of) the requests that break it."""

    identity: str
    sentence: str
    request_ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Verified:
    """Sums over the rows that are kept, and what is wrong with them. held = settled + released + open, if nothing is."""

    holds: int
    entries: int
    held_nano: Nano
    settled_nano: Nano
    """Paid out of reservations."""
    released_nano: Nano
    open_nano: Nano
    overrun_nano: Nano
    """Paid beyond them."""
    paid_nano: Nano
    """settled + overrun."""
    corrected_nano: Nano
    """By how much corrections changed what was charged."""
    to_reconcile: int
    """Entries settled at the cap that nobody has corrected."""
    violations: tuple[Violation, ...]

    @property
    def ok(self) -> bool:
        return not self.violations


def verify(store: Store, *, metering_step_nano: Nano | None = None) -> Verified:
    """Check every identity on one snapshot, reading every row once or twice.

    Args:
        metering_step_nano: the most a charge may exceed its reservation by; None does not ask.

    Raises:
        RecordError: the file is damaged, so that its rows mean nothing.
    """
    if damage := store.damage():
        raise RecordError(f"the ledger's file is damaged: {damage[0]}", hint="restore it from a backup")
    with store.snapshot() as query:
        found: list[Violation] = []
        for identity, statement in _RULES.items():
            found += _violation(identity, [row[0] for row in query(f"{statement} LIMIT {NAMED}")])
        if metering_step_nano is not None:
            beyond = query(
                f"SELECT request_id FROM entries WHERE overrun_nano > ? LIMIT {NAMED}", [metering_step_nano]
            )
            found += _violation("an overrun is at most one metering step", [row[0] for row in beyond])
        found += _terms(query)
        return _balance(query, found)


def _violation(identity: str, request_ids: list[str]) -> Iterator[Violation]:
    if request_ids:
        names = ", ".join(request_ids[:3]) + (", …" if len(request_ids) > 3 else "")
        yield Violation(identity, f"not so for {names}", tuple(request_ids))


def _balance(query: Query, found: list[Violation]) -> Verified:
    holds, held, still = _ints(
        query(
            "SELECT count(*), sum(amount_nano), sum(CASE WHEN closed = 0 THEN amount_nano ELSE 0 END) FROM holds"
        )[0]
    )
    entries, paid, settled, released, overrun, corrected, to_reconcile = _ints(query(_TOTALS)[0])
    if held != settled + released + still:
        what = f"{held} held, but {settled} settled + {released} released + {still} open (nano-USD)"
        found.append(Violation("holds = settled + released + open", what))
    excess = _ints(query(_CONTROL)[0])
    if any(excess):
        names = ("holds", "nano-USD held", "entries", "nano-USD charged")
        missing = ", ".join(f"{n:+} {name}" for n, name in zip(excess, names, strict=True) if n)
        found.append(
            Violation("running totals = rows kept and retired", f"the totals have {missing} that no row has")
        )
    return Verified(
        holds=holds,
        entries=entries,
        held_nano=held,
        settled_nano=settled,
        released_nano=released,
        open_nano=still,
        overrun_nano=overrun,
        paid_nano=paid,
        corrected_nano=corrected,
        to_reconcile=to_reconcile,
        violations=tuple(found),
    )


def _ints(row: tuple[object, ...]) -> tuple[int, ...]:
    """Sums as Python's integers: PostgreSQL's are decimals, and nothing sums to null."""
    return tuple(int(str(value or 0)) for value in row)


def _terms(query: Query) -> Iterator[Violation]:
    """The identities of [Z-1], entry by entry."""
    broken: dict[str, list[str]] = {}
    for page in pages(query):
        for row in page:
            for identity in _broken(row.entry):
                broken.setdefault(identity, []).append(row.entry.request_id)
    for identity, request_ids in broken.items():
        yield from _violation(identity, request_ids[:NAMED])


def _broken(entry: Entry) -> Iterator[str]:
    expected = 0 if entry.quality_expected is None else priced(entry.quality_expected, entry.value_usd)
    if entry.value_nano != expected:
        yield "the value term is V × the quality expected"
    if entry.compute_nano != entry.charged_nano:
        yield "the compute term is what was charged"
    if not 0 <= entry.own_delay_nano <= entry.latency_nano:
        yield "own delay is charged once, inside the latency term"
    try:
        alternatives = unpack(entry.alternatives)
    except WalrasError:
        yield "alternatives can be read"
        return
    if any(a.net_nano != a.value_nano - a.compute_nano - a.latency_nano - a.risk_nano for a in alternatives):
        yield "an alternative's net is value − compute − latency − risk"
