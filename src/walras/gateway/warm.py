"""What a service knew before it was stopped, learned again from its ledger: demand, lengths, seconds, quality.

Not in the ledger, and learned anew: how many tokens a byte of text has, how many a model hides, and whether an answer ended
where its client's own limit was (it is taken to have ended there).
"""

from __future__ import annotations

from collections import defaultdict

from walras.errors import RecordError
from walras.gateway.board import Board
from walras.gateway.calls import Calls
from walras.ledger import Entry, Store, unpack
from walras.settings import Kind

OUTCOMES = """SELECT e.use, e.task_class, o.quality FROM
    (SELECT request_id, at_ns, quality FROM outcomes ORDER BY at_ns DESC LIMIT ?) o
    JOIN entries e ON e.request_id = o.request_id ORDER BY o.at_ns"""
"""(use, class, quality) of the latest outcomes, in the order they were said."""


def warm(calls: Calls, store: Store, latest: int) -> None:
    """Teach `calls`, its board and its meter what the `latest` entries and outcomes say."""
    board = calls.board
    rows = store.entries(None, latest, newest=True)
    entries = [row.entry for row in reversed(rows) if row.entry.status != "unknown"]
    usual = _usual_tokens(entries)
    for e in entries:
        kind, task_class = _kind(board, e), calls.priced_as(e.task_class or "")
        if board.of(kind):
            tokens = usual[e.task_class] if e.input_tokens is None else float(e.input_tokens)
            board.asked(e.value_usd, tokens, e.tenant, task_class, kind)
        if e.use in board.models and e.output_tokens is not None and e.seconds is not None:
            board.came_back(e.use, task_class, e.output_tokens, e.seconds)
            if kind == "chat":
                calls.meter.learn(e.use, task_class, e.output_tokens, ended=e.status == "ok")
    with store.snapshot() as query:
        for use, task_class, quality in query(OUTCOMES, [latest]):
            if use in board.models:
                board.judged(use, calls.priced_as(task_class or ""), quality)


def _usual_tokens(entries: list[Entry]) -> defaultdict[str | None, float]:
    """Mean prompt by class, and of all where a class has none: what was refused was never counted."""
    known: dict[str | None, list[int]] = {}
    for e in entries:
        if e.input_tokens is not None:
            known.setdefault(e.task_class, []).append(e.input_tokens)
    of_all = [n for counts in known.values() for n in counts]
    whole = sum(of_all) / len(of_all) if of_all else 0.0
    return defaultdict(lambda: whole, {c: sum(counts) / len(counts) for c, counts in known.items()})


def _kind(board: Board, e: Entry) -> Kind:
    """What was asked for: what the model makes that was used, named, or considered."""
    models = board.economy.models
    named = next((models[name] for name in (e.use, e.model_asked) if name in models), None)
    if named is None:
        try:
            considered = unpack(e.alternatives)
        except RecordError:
            considered = []
        named = next((models[a.use] for a in considered if a.use in models), None)
    return "chat" if named is None else named.kind
