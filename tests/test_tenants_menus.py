"""Tenants' request menus against an operator's capacity: bound and mixture meet, and what whole uses lose is bounded."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.sparse import csr_matrix, hstack, vstack

from economies import SEEDS
from walras.equation import DEFER
from walras.errors import QuantityError
from walras.market.tenants import menus
from walras.market.tenants.fairness import accounts, menu_externalities
from walras.market.tenants.menus import MenuClearing, RequestMenus, clear_menus

FRONTIER = np.array([[0.2, 0.02], [0.15, 0.1], [0.02, 0.15], [0.0, 0.0]])


def requests(
    seed: int, tenants: int, each: int, *, budgets: bool = True, single: bool = False, ties: bool = False
) -> RequestMenus:
    rng = np.random.default_rng(seed)
    n, number = tenants * each, np.float32 if single else np.float64

    def draw(scale: float) -> np.ndarray:
        plane = rng.integers(0, 5, (n, 3)) / 4 if ties else rng.lognormal(0, 1, (n, 3))
        return (scale * plane).astype(number)

    quality = draw(0.3)
    quality[rng.random((n, 3)) < 0.1] = np.nan
    tenant = np.repeat(np.arange(tenants), each)
    if seed % 2:
        tenant = rng.permutation(tenant)
    own = rng.uniform(0.005, 0.1, tenants) * each if budgets else None
    return RequestMenus(
        tenant,
        rng.lognormal(0, 1, n),
        quality,
        draw(0.02),
        (draw(0.3), draw(0.2)),
        ("prefill", "decode"),
        own,
    )


def planner(m: RequestMenus, frontier: np.ndarray) -> float:
    """HiGHS on all shares, and on the shares of the frontier's vertices, at once."""
    n, uses = m.quality.shape
    allowed = ~np.isnan(m.quality).ravel()
    at = np.flatnonzero(allowed)
    worth = (m.value[:, None] * m.quality - m.cost).ravel()[at].astype(float)
    columns, vertices = at.size, frontier.shape[0]
    one = csr_matrix((np.ones(columns), (at // uses, np.arange(columns))), shape=(n, columns + vertices))
    used = hstack(
        [csr_matrix(np.array([a.ravel()[at] for a in m.amounts], dtype=float)), csr_matrix(-frontier.T)]
    )
    made = csr_matrix(np.concatenate((np.zeros(columns), np.ones(vertices)))[None])
    rows, limits = [one, used, made], [np.ones(n), np.zeros(used.shape[0]), np.ones(1)]
    if m.budgets is not None:
        spent = (m.cost.ravel()[at].astype(float), (m.tenant[at // uses], np.arange(columns)))
        rows.append(csr_matrix(spent, shape=(m.budgets.size, columns + vertices)))
        limits.append(m.budgets)
    best = linprog(
        -np.concatenate((worth, np.zeros(vertices))), vstack(rows), np.concatenate(limits), method="highs"
    )
    return -float(best.fun)


def check(m: RequestMenus, cleared: MenuClearing, frontier: np.ndarray) -> None:
    """What is said of whole uses, added up again; and nobody could do better at the prices with one request."""
    n = len(m)
    on = np.flatnonzero(cleared.whole.use != DEFER)
    use = cleared.whole.use[on]
    worth = m.value[on] * m.quality[on, use] - m.cost[on, use]
    assert cleared.whole.welfare == pytest.approx(float(worth.sum()), rel=1e-6, abs=1e-9)
    assert not np.isnan(m.quality[on, use]).any()
    used = np.array([a[on, use].sum(dtype=float) for a in m.amounts])
    assert (used <= cleared.production * (1 + 1e-6) + 1e-9).all()
    assert cleared.production == pytest.approx(cleared.mixture @ frontier, rel=1e-6, abs=1e-9)
    assert cleared.mixture.sum() <= 1 + 1e-9
    if m.budgets is not None:
        spent = np.bincount(m.tenant[on], weights=m.cost[on, use].astype(float), minlength=m.budgets.size)
        assert (spent <= m.budgets * (1 + 1e-6) + 1e-9).all()
        own = cleared.budget_prices[m.tenant]
    else:
        own = np.zeros(n)
    net = m.value[:, None] * m.quality - (1 + own[:, None]) * m.cost
    net = net - sum(p * a.astype(float) for p, a in zip(cleared.prices, m.amounts, strict=True))
    dual = np.fmax.reduce(net, axis=1, initial=0.0).sum() + (frontier @ cleared.prices).max()
    dual += 0.0 if m.budgets is None else float(cleared.budget_prices @ m.budgets)
    assert dual == pytest.approx(cleared.bound, rel=1e-6, abs=1e-9)
    # What is made earns most at the prices.
    assert cleared.production @ cleared.prices == pytest.approx(
        (frontier @ cleared.prices).max(), rel=1e-6, abs=1e-9
    )


@settings(max_examples=30)
@given(
    seed=SEEDS, tenants=st.integers(1, 12), each=st.integers(1, 25), budgets=st.booleans(), single=st.booleans(),
    ties=st.booleans(), chooses=st.booleans(),
)  # fmt: skip
def test_agrees_with_the_planner(
    seed: int, tenants: int, each: int, budgets: bool, single: bool, ties: bool, chooses: bool
) -> None:
    m = requests(seed, tenants, each, budgets=budgets, single=single, ties=ties)
    table = (FRONTIER if chooses else np.array([[0.1, 0.08]])) * len(m)
    cleared = clear_menus(m, table if chooses else table[0])
    best = planner(m, table)
    size = max(best, 1e-6)
    event(f"budgets with a price: {min(3, int((cleared.budget_prices > 0).sum()))}")
    assert cleared.bound == pytest.approx(best, abs=2e-6 * size)
    assert abs(cleared.gap) <= 2e-6
    assert cleared.excess <= 1e-6
    assert cleared.slackness <= 2e-6
    check(m, cleared, table)


@pytest.mark.parametrize("budgets", [False, True])
@pytest.mark.parametrize("chooses", [False, True])
def test_thousands_of_requests(monkeypatch: pytest.MonkeyPatch, budgets: bool, chooses: bool) -> None:
    monkeypatch.setattr(menus, "SAMPLE", 4.0)  # aimed by a sample, as hundreds of thousands are
    m = requests(3, 40, 150, budgets=budgets, single=True)
    table = (FRONTIER if chooses else np.array([[0.1, 0.08]])) * len(m)
    cleared = clear_menus(m, table if chooses else table[0])
    assert abs(cleared.gap) <= 1e-8
    assert cleared.excess <= 1e-6
    assert -1e-9 <= cleared.whole.loss <= cleared.whole.allowed_loss
    assert cleared.whole.loss < 0.01
    check(m, cleared, table)


@pytest.mark.parametrize("budgets", [False, True])
def test_what_a_tenant_costs_the_others_is_between_its_amounts_without_it_and_its_payment(
    budgets: bool,
) -> None:
    m = requests(6, 5, 60, budgets=budgets)
    supply = np.array([0.1, 0.08]) * len(m)
    cleared = clear_menus(m, supply)
    own = accounts(m, cleared)
    assert own.worth.sum() == pytest.approx(cleared.whole.welfare)
    if not budgets:
        assert (own.surplus > -1e-9).all()
    found = menu_externalities(m, supply, cleared, np.arange(5))
    assert found.first_order == pytest.approx(own.payment)
    slack = found.error + 1e-7 * cleared.bound
    assert (found.exact <= found.first_order + slack).all()
    assert (found.exact >= found.least - slack).all()
    assert (found.exact > 0).all()


def test_what_nobody_needs_is_free() -> None:
    m = requests(4, 3, 20, budgets=False)
    cleared = clear_menus(m, np.array([0.05 * len(m), 1e6]))
    assert cleared.prices[0] > 0
    assert cleared.prices[1] == 0


def test_bad_input_is_named() -> None:
    m = requests(0, 2, 3)

    def refused(match: str, **change: object) -> None:
        fields = ("tenant", "value", "quality", "cost", "amounts", "resources", "budgets", "tenants")
        given = {name: getattr(m, name) for name in fields} | {"tenants": ("ann", "bob")} | change
        with pytest.raises(QuantityError, match=match):
            RequestMenus(**given)  # type: ignore[arg-type]

    def spoilt(plane: np.ndarray, row: int, number: float) -> np.ndarray:
        out, column = plane.copy(), int(np.flatnonzero(~np.isnan(m.quality[row]))[0])
        out[row, column] = number
        return out

    refused("tenant 'bob', request 4: cost is", cost=spoilt(m.cost, 4, -1.0))
    refused("tenant 'ann', request 1: decode is", amounts=(m.amounts[0], spoilt(m.amounts[1], 1, np.nan)))
    refused("tenant 'ann', request 0: quality is", quality=spoilt(m.quality, 0, np.inf))
    refused("tenant 'ann', request 2: its value is nan", value=np.where(np.arange(6) == 2, np.nan, m.value))
    refused("tenant 'bob': its budget is -1", budgets=np.array([1.0, -1.0]))
    refused("request 3 is of tenant 1, who has no budget", budgets=np.ones(1))
    refused("there must be one for each request", tenant=m.tenant[:-1])
    refused("resources are named", resources=("prefill",))
    refused("decode is", amounts=(m.amounts[0], m.amounts[1][:, :2]))
    for supply, match in (
        (np.ones(3), "supply has shape"),
        (np.array([1.0, -1.0]), "supply of 'decode', row 0, is -1"),
        (np.array([[1.0, 0.0], [2.0, 0.0]]), "there is nothing of 'decode'"),
    ):
        with pytest.raises(QuantityError, match=match):
            clear_menus(m, supply)
