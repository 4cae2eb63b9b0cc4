"""Envelopes on the whole portfolio's loss, met by linear pieces. [Z-K]

A coherent measure of the portfolio is the worst of many weighted losses (`risk`), and each of those is a linear row like any
other. Only the rows that an allocation breaks are needed, so `market.shadow` adds them one at a time: solve, find
the weights at which the loss is worst, and if it is over the bound, add that row. An envelope's price is the sum
of its rows' multipliers, levied at their mean weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from walras.equation import DEFER
from walras.errors import InfeasibleError
from walras.market.dual import solve
from walras.market.memory import Memory
from walras.market.mix import Mix
from walras.market.planes import Planes, Rows, tables
from walras.prices import Constraint
from walras.quantities import Tasks, Uses
from walras.risk import FloatArray

MAX_CUTS = 200
"""Linear pieces before an envelope is given up."""


def scenario_totals(tasks: Tasks, uses: Uses, constraint: Constraint, mix: Mix) -> FloatArray:
    """Mean loss per task in scope by scenario, (S,), under the mix."""
    if uses.losses is None:
        raise InfeasibleError(
            f"{constraint.name}: the records carry no losses by scenario",
            constraint=constraint.name,
            bound=constraint.bound,
            least=None,
        )
    members = constraint.scope.members(tasks)
    inside = np.ones(len(tasks), dtype=np.bool_) if members is None else members
    keep = (mix.use != DEFER) & inside[mix.task]
    losses = uses.losses[mix.task[keep], mix.use[keep]]
    shares = tasks.weight[mix.task[keep]] * mix.share[keep]
    totals: FloatArray = shares @ losses / (tasks.weight[inside].sum() or 1.0)
    return totals


def same_envelope(a: Constraint, b: Constraint) -> bool:
    return replace(a, density=None) == replace(b, density=None)


def least_envelope(
    market: Memory, tasks: Tasks, uses: Uses, envelope: Constraint, met: Sequence[int], mix: Mix
) -> float:
    """The least bound of a portfolio envelope that does beside the rows `met`, which `mix` meets; nobody defers.

    It is the least, over allocations, of the worst weighted loss. One more task makes that a programme like any
    other: its share of a use that grants `most` to every piece of the envelope is the bound, and costs as much.
    """
    assert envelope.measure is not None
    assert uses.losses is not None
    n, i = uses.shape
    allowed = ~np.isnan(market.planes.quality)
    members = envelope.scope.members(tasks)
    scope = np.ones(n) if members is None else members.astype(np.float64)
    mass = scope / (tasks.weight @ scope)
    most = float(np.where(allowed[:, :, None], uses.losses, 0.0).max())
    worth = np.full((n + 1, i + 1), np.nan)
    worth[:n, :i] = np.where(allowed, 0.0, np.nan)
    worth[n, [0, i]] = 0.0, -most
    _, charges, _ = tables(market.planes, market.rows)
    planes = [np.pad(charges[j], ((0, 1), (0, 1))) for j in met]
    limits = list(market.rows.limits[list(met)])
    least = most
    for _ in range(MAX_CUTS):
        density = envelope.measure.density(scenario_totals(tasks, uses, envelope, mix))
        piece = np.zeros((n + 1, i + 1))
        piece[:n, :i] = np.where(allowed, mass[:, None] * (uses.losses @ density), 0.0)
        piece[n, i] = -most
        planes, limits = [*planes, piece], [*limits, 0.0]
        epigraph = _plain(worth, planes, limits, np.append(tasks.weight, 1.0))
        answer = solve(epigraph)
        mix = Mix.of(epigraph, answer)
        real = mix.task < n
        mix = Mix(mix.task[real], mix.use[real], mix.share[real])
        totals = scenario_totals(tasks, uses, envelope, mix)
        least = min(least, float(envelope.measure.density(totals) @ totals))
        if least <= -answer.objective * (1 + 1e-9) + 1e-15:
            break
    return least


def _plain(
    worth: FloatArray, charges: Sequence[FloatArray], limits: Sequence[float], weight: FloatArray
) -> Memory:
    """A market from worth (N, I), NaN where not allowed, and one plane of charges for each row; nobody defers."""
    k, (n, _) = len(charges), worth.shape
    none = np.zeros(k, dtype=np.bool_)
    rows = Rows(np.arange(k), np.full(k, np.nan), np.zeros(k), np.array(limits), none, none)
    free = tuple(np.zeros(1) for _ in charges)
    planes = Planes(np.ones(n), worth, tuple(charges), free, weight, np.zeros(1, dtype=np.uint64))
    return Memory(planes, rows, defer=False)


def broken_envelopes(
    tasks: Tasks, uses: Uses, constraints: Sequence[Constraint], mix: Mix
) -> list[tuple[int, Constraint]]:
    broken = []
    for position, constraint in enumerate(constraints):
        if constraint.kind != "portfolio_envelope" or constraint.measure is None:
            continue
        totals = scenario_totals(tasks, uses, constraint, mix)
        density = constraint.measure.density(totals)
        if density @ totals > constraint.bound * (1 + 1e-9) + 1e-15:
            broken.append((position, replace(constraint, density=tuple(map(float, density)))))
    return broken


def at_their_densities(
    tasks: Tasks, uses: Uses, constraints: Sequence[Constraint], mix: Mix
) -> list[Constraint]:
    """The constraints, each envelope with the weights its losses have under `mix`: even a slack one can be charged."""
    out = []
    for constraint in constraints:
        if constraint.kind == "portfolio_envelope" and constraint.measure is not None:
            density = constraint.measure.density(scenario_totals(tasks, uses, constraint, mix))
            constraint = replace(constraint, density=tuple(map(float, density)))  # noqa: PLW2901
        out.append(constraint)
    return out
