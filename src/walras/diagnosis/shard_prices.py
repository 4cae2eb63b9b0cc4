"""Prices of a market that lies in shards: what `walras prices` does with files that are not a log. [Z-3]"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from walras.diagnosis.case import build_case
from walras.errors import SettingsError
from walras.market.clearing import Certificate, Rounded, Usage, certificate_of, round_off, usage_of
from walras.market.cluster import Cluster, checkpoint, resume
from walras.market.dual import Market, Progress, Unbounded, Unstable, solve
from walras.market.gpu import Device, cuda
from walras.market.planes import Rows
from walras.market.shadow import check_certificate, why_infeasible
from walras.market.shards import Shards
from walras.prices import Constraint, Price, Prices, Scope
from walras.records import Log
from walras.settings import Economy

Engine = Literal["auto", "memory", "stream", "ray", "gpu"]
ROOM = 0.5
"""Share of the machine's memory that a market may take and still be held there."""


@dataclass(frozen=True, slots=True)
class ShardPrices:
    """What came out, and by which engine."""

    prices: Prices
    certificate: Certificate
    rounded: Rounded | None
    """None where masses of tasks tie and their choices are mixed: shards are not rounded then."""
    usage: tuple[Usage, ...]
    tasks: int
    uses: int
    engine: str
    passes: int
    steps: int
    seconds: float
    bytes_per_pass: int | None
    """Sent and received by the driver, mean over passes; None without a cluster."""


def is_shards(paths: Sequence[Path]) -> bool:
    """Whether these files are a market in shards rather than a log."""
    first = paths[0]
    if first.suffix in (".arrow", ".feather"):
        return True
    if first.suffix not in (".parquet", ".pq"):
        return False
    try:
        return any(name.startswith("quality:") for name in pq.read_schema(first).names)
    except (OSError, pa.ArrowInvalid):
        return False  # the log's reader says what is wrong


def price_shards(
    paths: Sequence[Path],
    economy: Economy,
    *,
    engine: Engine = "auto",
    ray_address: str | None = None,
    state: Path | None = None,
    on_pass: Progress | None = None,
) -> ShardPrices:
    """Discover the prices of the constraints that hold for everybody.

    Args:
        state: a file for the latest prices; if it exists, the search starts from it.

    Raises:
        SettingsError: settings that a log has and shards have not: values, tenants, classes, scenarios.
        InfeasibleError, NotCleared: see `market.shadow.discover`.
    """
    began = time.perf_counter()
    _check(economy)
    weight = Shards(paths, _rows((), (), 0.0), (), ()).weight
    constraints = economy.constraints({Scope(): weight})
    declared = _declared(paths[0], economy)
    names = list(dict.fromkeys([*declared, *(_plane(c) for c in constraints)]))
    usd = [declared.get(name, 0.0) for name in names]
    rows = _rows(constraints, names, weight)
    with ExitStack() as stack:
        market: Market
        if engine == "ray":
            cluster = stack.enter_context(
                Cluster(paths, rows, names, usd, economy.defer, address=ray_address, workers=len(paths))
            )
            market = cluster
        else:
            shards = Shards(paths, rows, names, usd, economy.defer)
            if engine == "auto":
                engine = "memory" if shards.nbytes < ROOM * _memory() else "stream"
            market = shards if engine == "stream" else shards.gather()
            if engine == "gpu":
                held = shards.gather()
                market = Device(held.planes, held.rows, held.defer, xp=cuda())
        start = resume(state) if state is not None and state.exists() else None
        report = on_pass if state is None else checkpoint(state, on_pass)
        try:
            answer = solve(market, start=start, on_pass=report)
        except (Unbounded, Unstable):
            raise why_infeasible(market, constraints, np.full(len(constraints), weight)) from None
        traffic = [t.sent + t.received for t in cluster.traffic] if engine == "ray" else None
    usage = tuple(usage_of(constraints, answer, np.full(len(constraints), weight)))
    certificate = certificate_of(rows, weight, answer, usage)
    check_certificate(certificate, answer.passes)
    prices = tuple(Price(c, float(m)) for c, m in zip(constraints, answer.multipliers, strict=True))
    return ShardPrices(
        Prices(prices, economy.declared(), economy.numeraire),
        certificate,
        round_off(rows, weight, answer),
        usage,
        int(weight),
        market.width,
        engine,
        answer.passes,
        answer.steps,
        time.perf_counter() - began,
        None if traffic is None else int(np.mean(traffic)),
    )


def write_shard(log: Log, economy: Economy, path: Path) -> tuple[int, int]:
    """Write a log as one shard (Parquet); how many tasks and models it has. Settings say what tasks are worth.

    Raises:
        SettingsError, RecordError: see `case.build_case`.
    """
    case = build_case(log, economy, audited=False)
    uses, allowed = case.uses, case.uses.allowed
    planes = {"quality": uses.quality, "seconds": uses.seconds, "risk": uses.risk}
    planes |= {name: uses.amount(name) for name in uses.resources}
    columns = {"value": case.tasks.value, "weight": case.tasks.weight}
    for plane, amounts in planes.items():
        for i, use in enumerate(uses.names):
            columns[f"{plane}:{use}"] = np.where(allowed[:, i], amounts[:, i], np.nan)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        pq.write_table(pa.table(columns), partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return uses.shape


def _check(economy: Economy) -> None:
    given = [key for key in ("value", "value_column", "rho_irr") if getattr(economy, key) is not None]
    given += [key for key in ("tenants", "classes", "columns") if getattr(economy, key)]
    if given:
        raise SettingsError(
            "is about a log; shards carry their tasks' values and nothing by tenant", key=given[0]
        )
    if economy.needs_losses:
        raise SettingsError("needs losses by scenario, which shards do not carry", key="risk_measure")


def _declared(first: Path, economy: Economy) -> dict[str, float]:
    """USD per unit of each plane that has a declared price and is there."""
    if economy.numeraire == "compute":
        return {}
    prices = dict(economy.declared())
    prices["seconds"] = economy.lambda0 or 0.0
    prices["risk"] = 1.0 if economy.rho0 is None else economy.rho0
    there = {name.split(":")[0] for name in _names(first)}
    # Risk is priced by default, so a market may do without; what was asked for must be there.
    return {
        name: usd for name, usd in prices.items() if usd and (name != "risk" or economy.rho0 or name in there)
    }


def _names(path: Path) -> list[str]:
    if path.suffix in (".parquet", ".pq"):
        return list(pq.read_schema(path).names)
    with pa.OSFile(str(path), "rb") as file:
        return list(pa.ipc.open_file(file).schema.names)


def _plane(constraint: Constraint) -> str:
    match constraint.layer:
        case "compute":
            return constraint.resource
        case "latency":
            return "seconds"
        case "risk":
            return "risk"


def _rows(constraints: Sequence[Constraint], names: Sequence[str], weight: float) -> Rows:
    none = np.zeros(len(constraints), dtype=np.bool_)
    sla = [c.bound if c.layer == "latency" else 0.0 for c in constraints]
    return Rows(
        np.array([names.index(_plane(c)) for c in constraints], dtype=np.int64),
        np.array([c.seconds if c.kind == "quantile_sla" else np.nan for c in constraints]),
        np.array(sla),
        np.array([c.per_task_limit * weight for c in constraints]),
        none,
        none,
    )


def _memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
