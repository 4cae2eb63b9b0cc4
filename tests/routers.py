"""Logs whose routers are known beforehand, routers fitted on them, and what a refusal looks like."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from logs import Ran, walras, write_jsonl

RECORDS, SETTINGS, INFEASIBLE, OUTPUT = 3, 4, 5, 7


def refused(ran: Ran, code: int, *says: object) -> None:
    """It ended with `code`, nothing on stdout, and one line on stderr that holds all of `says`."""
    assert ran.code == code, ran.err
    assert ran.out == ""
    assert ran.err.count("\n") == 1, ran.err
    assert ran.err.startswith("walras: ")
    assert "a bug in Walras" not in ran.err
    for part in says:
        assert str(part) in ran.err


def sure_log(path: Path, models: Mapping[str, Mapping[str, float]], requests: int = 40) -> Path:
    """A log in which every request gets the same from a model: estimates are these numbers, to round-off."""
    rows = [
        {"request_id": f"r{k}", "model": name, "class": "all", **gives}
        for k in range(requests)
        for name, gives in models.items()
    ]
    return write_jsonl(path, rows)


def fitted(log: Path, *options: object) -> Path:
    """The router that `walras fit` makes of a log, beside it."""
    router = log.with_name(f"{log.stem}-router")
    ran = walras("fit", log, "-o", router, *options)
    assert ran.code == 0, ran.err
    return router


def asks(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Requests for `walras route --jsonl`."""
    return write_jsonl(path, [{"prompt": "", "class": "all", **row} for row in rows])


def settings(path: Path, text: str) -> tuple[str, Path]:
    """The option that reads these settings."""
    path.write_text(text, encoding="utf-8")
    return "--settings", path


def uses(route: Any) -> dict[str, Any]:
    """Of one decision of `route --json`: each use's row by name."""
    return {use["model"]: use for use in route["uses"]}


def spend(data: Any) -> float:
    """Mean expected USD of the decisions of `route --json`."""
    paid = [0.0 if r["model"] == "defer" else uses(r)[r["model"]]["usd"] for r in data["routes"]]
    return sum(paid) / len(paid)


def manifest_of(router: Path) -> Any:
    return json.loads((router / "router.json").read_text(encoding="utf-8"))
