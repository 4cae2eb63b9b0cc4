"""The ledger in figures."""

from __future__ import annotations

from dataclasses import dataclass

from walras.ledger.money import Nano
from walras.ledger.sql import Filter, Query
from walras.ledger.store import Store


@dataclass(frozen=True, slots=True)
class Stats:
    """The ledger in figures. Money is what was charged, corrections apart, in nano-USD."""

    entries: int
    first_ns: int | None
    last_ns: int | None
    charged_nano: Nano
    by_status: dict[str, int]
    by_settled: dict[str, int]
    by_tenant: dict[str, tuple[int, Nano]]
    """(requests, charged), the dearest 20 first."""
    by_use: dict[str, tuple[int, Nano]]
    outcomes: int
    corrections: int
    to_reconcile: int
    """Settled at the cap, and corrected by nobody yet."""
    to_reconcile_nano: Nano
    """What they were charged."""
    open_holds: int
    retired: int
    size_bytes: int


def stats(store: Store) -> Stats:
    """Read every entry's place and money once."""
    with store.snapshot() as query:
        entries, first, last, charged = query(
            "SELECT count(*), min(at_ns), max(at_ns), sum(charged_nano) FROM entries"
        )[0]
        where, values = Filter(settled="cap", reconciled=False).where()
        guessed = query(f"SELECT count(*), sum(e.charged_nano) FROM entries e WHERE 1 = 1{where}", values)[0]
        return Stats(
            entries=entries,
            first_ns=first,
            last_ns=last,
            charged_nano=int(charged or 0),
            by_status=_counted(query, "status"),
            by_settled=_counted(query, "settled"),
            by_tenant=_dearest(query, "tenant"),
            by_use=_dearest(query, "use"),
            outcomes=query("SELECT count(*) FROM outcomes")[0][0],
            corrections=query("SELECT count(*) FROM corrections")[0][0],
            to_reconcile=guessed[0],
            to_reconcile_nano=int(guessed[1] or 0),
            open_holds=query("SELECT count(*) FROM holds WHERE closed = 0")[0][0],
            retired=int(query("SELECT coalesce(sum(entries), 0) FROM retired")[0][0]),
            size_bytes=store.size(),
        )


def _counted(query: Query, column: str) -> dict[str, int]:
    return dict(query(f"SELECT {column}, count(*) FROM entries GROUP BY 1 ORDER BY 2 DESC"))


def _dearest(query: Query, column: str) -> dict[str, tuple[int, Nano]]:
    rows = query(
        f"SELECT {column}, count(*), sum(charged_nano) FROM entries WHERE {column} IS NOT NULL GROUP BY 1 ORDER BY 3 DESC, 1 LIMIT 20"
    )
    return {name: (count, int(charged)) for name, count, charged in rows}
