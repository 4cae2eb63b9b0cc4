"""What each request was promised and what it paid, for good: records, stores, identities.

`walras.ledger.export` is imported on its own: it brings Arrow, which a service does not need.
"""

from walras.ledger.entry import (
    Alternative,
    Conflict,
    Correction,
    Entry,
    Hold,
    Outcome,
    UnknownRequest,
    pack,
    unpack,
)
from walras.ledger.identities import Verified, Violation, verify
from walras.ledger.money import Nano, nano, priced, usd
from walras.ledger.recovery import recover
from walras.ledger.sql import Filter, Row
from walras.ledger.stats import Stats, stats
from walras.ledger.store import Store, open_store
from walras.ledger.writer import State, Ticket

__all__ = [
    "Alternative",
    "Conflict",
    "Correction",
    "Entry",
    "Filter",
    "Hold",
    "Nano",
    "Outcome",
    "Row",
    "State",
    "Stats",
    "Store",
    "Ticket",
    "UnknownRequest",
    "Verified",
    "Violation",
    "nano",
    "open_store",
    "pack",
    "priced",
    "recover",
    "stats",
    "unpack",
    "usd",
    "verify",
]
