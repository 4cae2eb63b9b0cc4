"""After a crash: what was held and never settled is charged in full, because the upstream may have charged it."""

from __future__ import annotations

from itertools import groupby

from walras.ledger.entry import Entry
from walras.ledger.store import Store


def recover(store: Store) -> list[Entry]:
    """Settle dead processes' open holds at the cap, marked to be reconciled (`settled` = "cap"); returns the entries.

    Each is dated like its first hold, so that the period that reserved the money pays it.

    Raises:
        OutputError: the ledger cannot be written. What was settled before stays; call again.
    """
    orphans = sorted(store.orphans(), key=lambda hold: (hold.request_id, hold.at_ns))
    entries = []
    for request_id, group in groupby(orphans, key=lambda hold: hold.request_id):
        holds = list(group)
        cap = sum(hold.amount_nano for hold in holds)
        entries.append(
            Entry(
                request_id=request_id,
                at_ns=holds[0].at_ns,
                tenant=holds[0].tenant,
                key_id=holds[0].key_id,
                status="unknown",
                settled="cap",
                compute_nano=cap,
                reserved_nano=cap,
                charged_nano=cap,
            )
        )
    for ticket in [store.close(entry) for entry in entries]:
        ticket.wait()
    return entries
