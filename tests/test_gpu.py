"""The pass for a device, run on numpy: the same sums and the same undecided tasks as the compiled one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings

from economies import Economy, economies, tight_economy
from walras.errors import QuantityError, SettingsError
from walras.market import gpu
from walras.market.dual import solve
from walras.market.gpu import Device, cuda
from walras.market.memory import Memory
from walras.market.planes import planes_of
from walras.market.shadow import discover


def both(economy: Economy) -> tuple[Memory, Device]:
    planes, rows = planes_of(economy.tasks, economy.uses, economy.rows, economy.declared)
    return Memory(planes, rows, economy.defer), Device(planes, rows, economy.defer)


@settings(max_examples=60)
@given(economies(min_rows=1))
def test_a_screen_is_the_same_on_both(economy: Economy) -> None:
    memory, device = both(economy)
    rng = np.random.default_rng(len(economy.tasks))
    k = len(economy.rows)
    price, radius = rng.exponential(1.0, k), rng.exponential(0.1, k) * rng.integers(0, 2, k)
    (sums, near), (others, rest) = (m.screen(price, radius, 1.0) for m in (memory, device))
    assert others.worth == pytest.approx(sums.worth, abs=1e-9 * economy.scale * len(economy.tasks))
    assert others.usage == pytest.approx(sums.usage, abs=1e-9)
    assert others.served == pytest.approx(sums.served)
    assert rest.ids.tolist() == near.ids.tolist()


def test_blocks_of_tasks_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "BLOCK", 7)
    memory, device = both(tight_economy(3, 400))
    one, other = solve(memory), solve(device)
    assert other.multipliers == pytest.approx(one.multipliers, rel=1e-12)
    assert other.dual == pytest.approx(one.dual, rel=1e-12)


def test_discover_takes_a_device() -> None:
    economy = tight_economy(3, 400)
    there = discover(economy.tasks, economy.uses, economy.rows, defer=economy.defer, xp=np)
    here = discover(economy.tasks, economy.uses, economy.rows, defer=economy.defer)
    assert there.multipliers == pytest.approx(here.multipliers, rel=1e-12)
    assert (there.use == here.use).all()


def test_numbers_that_are_not_finite_are_named() -> None:
    memory, device = both(tight_economy(3, 400))
    task, use = np.argwhere(~np.isnan(memory.planes.quality))[123]
    memory.planes.amounts[0][task, use] = np.inf
    for market in (memory, device):
        with pytest.raises(QuantityError, match=f"task {task}, use {use} is not finite"):
            market.screen(np.ones(1), np.zeros(1), 1.0)


def test_without_a_device_the_user_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cupy", None)
    with pytest.raises(SettingsError, match=r"pip install 'walras\[gpu\]'"):
        cuda()
