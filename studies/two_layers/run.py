"""Runs of the study, one line of JSON for each window; what is in the file already is not run again.

The order is by seed, so that a study that is cut short has every load and SLA at fewer seeds.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from two_layers.learn import Setting, setting
from two_layers.planner import HORIZON, planner
from two_layers.play import DEFER, Run, bounds, play, welfare
from two_layers.policies import board, isolated, selfish
from two_layers.world import Coupling, Window, scale_of, window

LOADS, SLAS = (0.5, 0.7, 0.9, 1.0, 1.1), (2.0, 6.0)
COUPLINGS = {
    "main": Coupling(),
    "engines alike": Coupling(engines="alike"),
    "engines reversed": Coupling(engines="reversed"),
    "paired by rank": Coupling(pairing="rank"),
    "avoidable 0.3": Coupling(avoidable=0.3),
    "one replica each": Coupling(planned=False),
}
VARIED_LOAD, VARIED_SLA = 0.9, 6.0
SOURCE = 1500
"""Requests that the planner's futures are drawn from."""


@dataclass(frozen=True, slots=True)
class Cell:
    trace: str
    coupling: str
    load: float
    sla: float
    seed: int
    before: int = 60
    decisions: int = 60
    after: int = 40

    @property
    def part(self) -> str:
        return "main" if self.coupling == "main" else "couplings"

    @property
    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


def cells(traces: list[str], seeds: int, decisions: int) -> Iterator[Cell]:
    """All of the main coupling, and at one load and SLA those that vary it."""
    for seed, trace, load, sla in product(range(1, seeds + 1), traces, LOADS, SLAS):
        yield Cell(trace, "main", load, sla, seed, decisions=decisions)
    for seed, trace, name in product(range(1, seeds + 1), traces, list(COUPLINGS)[1:]):
        yield Cell(trace, name, VARIED_LOAD, VARIED_SLA, seed, decisions=decisions)


def run_all(path: Path, todo: Iterable[Cell]) -> None:
    """Append what is not there yet."""
    done = (
        {Cell(**json.loads(line)["cell"]).key for line in path.read_text().splitlines()}
        if path.exists()
        else set()
    )
    for cell in todo:
        if cell.key in done:
            continue
        began = time.process_time()
        row = run_cell(cell)
        row["cpu_s"] = time.process_time() - began
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def run_cell(cell: Cell) -> dict[str, Any]:
    """All policies on one window; the planner in the main coupling only, which is where its time goes."""
    coupling = COUPLINGS[cell.coupling]
    at = setting(cell.trace, coupling, cell.load, cell.sla)
    beliefs, priority = at.beliefs, at.plant.with_priority
    count = cell.before + cell.decisions + cell.after
    stream = window(cell.trace, coupling, at.rate, count, cell.seed)
    runs = {
        "isolated": (at.plant, isolated(beliefs)),
        "priority only": (priority, isolated(beliefs)),
        "selfish": (at.plant, selfish(beliefs)),
        "prices to the router only": (at.plant, board(beliefs)),
        "board": (priority, board(beliefs)),
    }
    if cell.coupling == "main":
        source = window(cell.trace, coupling, at.rate, SOURCE, 5, train=True)
        horizon_s = HORIZON * scale_of(cell.trace)[1]
        runs["planner"] = (priority, planner(beliefs, source, horizon_s, cell.seed))
    around = (cell.before, cell.after, isolated(beliefs))
    found = {
        name: figures(cell, at, stream, play(plant, stream, decide, around))
        for name, (plant, decide) in runs.items()
    }
    known, likely = bounds(stream, at.plant, beliefs.sla_s, coupling.avoidable)
    return {
        "cell": asdict(cell),
        "policies": found,
        "bounds": {"outcomes known": known, "outcomes likely": likely},
        "value": float(stream.value.sum()),
        "replicas": at.plant.replicas,
        "rate": at.rate,
        "sla_s": beliefs.sla_s,
        "learned": at.learned,
    }


def figures(cell: Cell, at: Setting, stream: Window, run: Run) -> dict[str, Any]:
    """Welfare of the whole window, USD; the rest of those decided."""
    sla_s, avoidable = at.beliefs.sla_s, at.beliefs.avoidable
    mine = slice(cell.before, cell.before + cell.decisions)
    choice, latency = run.choice[mine], run.latency_s[mine]
    answered = choice != DEFER
    return {
        "welfare": float(welfare(stream, run, sla_s, avoidable).sum()),
        "with luck": float(welfare(stream, run, sla_s, avoidable, luck=True).sum()),
        "deferred": float(1 - answered.mean()),
        "late": float((latency[answered] > sla_s).mean()) if answered.any() else 0.0,
        "latency_s": float(latency[answered].mean()) if answered.any() else 0.0,
        "shares": np.bincount(choice[answered], minlength=len(at.plant)).tolist(),
    }
