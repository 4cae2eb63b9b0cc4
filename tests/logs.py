"""Logs made by hand, and the command line run on them."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from walras.cli import main
from walras.quantities import Labels
from walras.records import Log

HEADER = "request_id,model,quality,cost_usd"
PAIR = "r1,cheap,0,0.01\nr1,dear,1,0.1\n"
"""One request and two models: the rest of a small CSV log that is right."""


@dataclass(frozen=True)
class Ran:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        """What --json printed."""
        assert self.code == 0, self.err
        return json.loads(self.out)


def walras(*args: object) -> Ran:
    """`walras ARGS` through its real entry point, in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv = mock.patch.object(sys, "argv", ["walras", *map(str, args)])
    with argv, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return Ran(code, out.getvalue(), err.getvalue())


SCRIPT = Path(sys.executable).with_name("walras")


def walras_script(*args: object, **options: Any) -> Ran:
    """The installed console script, in a process of its own."""
    done = subprocess.run(
        [SCRIPT, *map(str, args)], capture_output=True, text=True, timeout=300, check=False, **options
    )
    return Ran(done.returncode, done.stdout, done.stderr)


def write_csv(path: Path, body: str | bytes, header: str = HEADER) -> Path:
    path.write_bytes(header.encode() + b"\n" + (body if isinstance(body, bytes) else body.encode()))
    return path


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def random_log(
    seed: int,
    n: int = 300,
    *,
    models: Sequence[str] = ("small", "medium", "large"),
    classes: int = 3,
    tenants: int = 2,
    informative: float = 1.0,
) -> Log:
    """A log in which the dearer models are better, most of all in the later classes.

    Args:
        informative: how much the class tells about the outcomes; at 0 labels are pure noise.
    """
    rng = np.random.default_rng(seed)
    i = len(models)
    size = np.linspace(0, 1, i)
    task_class = rng.integers(0, classes, n)
    hard = informative * task_class[:, None] / max(classes - 1, 1)
    able = np.clip(0.9 - hard * (1 - size) * 0.8, 0, 1)
    cost = 0.01 * 10 ** (1.5 * size) * rng.lognormal(0, 0.3, (n, i))
    return Log(
        ids=tuple(f"r{k}" for k in range(n)),
        models=tuple(models),
        per_use={
            "quality": (rng.random((n, i)) < able).astype(float),
            "cost_usd": cost,
            "latency_s": (1 + 9 * size) * rng.lognormal(0, 0.5, (n, i)),
            "risk": 0.05 * (1 - size) * rng.lognormal(0, 1.0, (n, i)),
        },
        losses=0.05 * (1.2 - size[:, None]) * rng.lognormal(0, 1.0, (n, i, 8)),
        chosen=rng.integers(0, i, n),
        value=rng.lognormal(-0.5, 1.0, n),
        time=np.sort(rng.uniform(0, 100, n)),
        tenant=Labels(rng.integers(0, tenants, n), tuple(f"tenant{k}" for k in range(tenants))),
        task_class=Labels(task_class, tuple(f"class{k}" for k in range(classes))),
        rows=n * i,
        synthetic=True,
    )


# --- the contract of --json ------------------------------------------------------------------------------------------

NUMBER = (int, float)
MAYBE = (int, float, type(None))
PRICE = {"value": NUMBER, "unit": str, "constraint": (str, type(None))}
SURPLUS = {"surplus": NUMBER}
CONTRACT: dict[str, Any] = {
    "n_tasks": int,
    "prices": {"compute": PRICE, "latency": PRICE, "risk": PRICE},
    "multipliers": {"compute": NUMBER, "latency": NUMBER, "risk": NUMBER},
    "certificate": dict.fromkeys(("objective", "dual", "gap", "max_violation", "slackness"), NUMBER),
    "best_fixed": {"use": str, "surplus": NUMBER},
    "attainable": SURPLUS,
    "oracle": SURPLUS,
    "oracle_with_defer": SURPLUS,
    "realised": SURPLUS,
    "regret": {"mean": NUMBER, "ci": list},
    "failures": {"FM-1": {"tasks": int, "total": NUMBER}, "FM-2": {"tasks": int, "total": NUMBER}},
    "passes": int,
    "seconds": NUMBER,
}
"""What scripts may rely on, from the issue that asked for the audit: keys and types."""


def assert_contract(data: Any, contract: Mapping[str, Any] = CONTRACT, where: str = "") -> None:
    for key, kind in contract.items():
        assert key in data, f"{where}{key} is missing"
        if isinstance(kind, dict):
            assert_contract(data[key], kind, f"{where}{key}.")
        else:
            assert isinstance(data[key], kind), f"{where}{key} is {data[key]!r}"
            assert not isinstance(data[key], bool)


def assert_certified(data: Any, *, gap: float = 1e-6) -> None:
    """Prices are proved: a small gap, bounds kept, and no price on a constraint with slack [Z-CS]."""
    certificate = data["certificate"]
    assert certificate["dual"] - certificate["objective"] <= gap
    assert certificate["gap"] <= gap
    assert certificate["max_violation"] <= 1e-6
    for row in data["constraints"]:
        assert row["used"] <= row["bound"] * (1 + 1e-6) + 1e-12, row["name"]
        assert row["multiplier"] >= 0
        if row["used"] < row["bound"] * (1 - 1e-6):
            assert row["multiplier"] == 0, row["name"]
