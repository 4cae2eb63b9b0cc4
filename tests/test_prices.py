"""Prices and the constraints that make them: exact on disk, and the same decisions in any unit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from economies import KINDS, SEEDS, Economy, economies, lagrangian, price_vectors
from walras.equation import choose, net_value
from walras.errors import NumeraireError, QuantityError, SettingsError
from walras.market.shadow import discover
from walras.prices import Constraint, Price, Prices, Scope
from walras.quantities import Labels, Tasks, Uses
from walras.risk import CVaR, Expectation, MaxMin

# --- on disk and back ----------------------------------------------------------------------------------------------

amounts = st.floats(0, allow_nan=False, allow_infinity=False)
names = st.text(max_size=8)
scopes = st.builds(
    Scope,
    tenant=st.none() | names,
    task_class=st.none() | names,
    window=st.none()
    | st.tuples(*[st.floats(allow_nan=False, allow_infinity=False)] * 2)
    .map(sorted)
    .filter(lambda w: w[0] < w[1])
    .map(tuple),
)
measures = st.one_of(
    st.just(Expectation()),
    st.builds(CVaR, st.floats(0, 1, exclude_max=True)),
    st.lists(st.sampled_from(((1.0, 0.0), (0.1, 0.9), (1 / 3, 2 / 3))), min_size=1, max_size=3)
    .map(tuple)
    .map(MaxMin),
)


@st.composite
def constraints(draw: st.DrawFn) -> Constraint:
    kind = draw(
        st.sampled_from(("budget", "mean_sla", "quantile_sla", "risk_envelope", "portfolio_envelope"))
    )
    extra: dict[str, object] = {}
    bound = draw(amounts)
    if kind == "budget":
        extra = {"resource": draw(names)}
    if kind == "quantile_sla":
        bound = draw(st.floats(0, 1, exclude_min=True, exclude_max=True))
        extra = {"seconds": draw(st.floats(0, 1e9, exclude_min=True))}
    if kind == "portfolio_envelope":
        extra = {
            "measure": draw(measures),
            "density": draw(st.none() | st.lists(amounts, max_size=4).map(tuple)),
        }
    return Constraint(kind, bound, draw(scopes), hard=draw(st.booleans()), **extra)


prices = st.builds(
    Prices,
    discovered=st.lists(st.builds(Price, constraints(), amounts), max_size=4).map(tuple),
    declared=st.lists(st.tuples(names, amounts), max_size=3).map(tuple),
    numeraire=st.sampled_from(("usd", "compute")),
    unit=st.floats(0, exclude_min=True, allow_infinity=False),
)


@settings(max_examples=300)
@given(prices)
def test_json_is_exact(vector: Prices) -> None:
    """To the bit: repr tells −0.0 from 0.0 and a list from a tuple, which == does not always."""
    again = Prices.from_json(vector.to_json())
    assert again == vector
    assert repr(again) == repr(vector)
    assert again.to_json() == vector.to_json()


def test_json_names_the_constraint_of_each_price() -> None:
    """What is written is what a person would look for."""
    row = Constraint("mean_sla", 1.5, Scope("acme", "code", (0.0, 60.0)))
    text = Prices((Price(row, 0.1),)).to_json()
    for part in ('"kind": "mean_sla"', '"tenant": "acme"', '"window": [0.0, 60.0]', "0.1"):
        assert part in text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "1",
        "{}",
        '{"discovered": [], "declared": []}',
        '{"discovered": [{}], "declared": [], "numeraire": "usd", "unit": 1.0}',
    ],
)
def test_other_json_is_no_price_vector(text: str) -> None:
    with pytest.raises(QuantityError, match="not a price vector"):
        Prices.from_json(text)


def test_a_price_vector_on_disk_is_checked_like_any_other() -> None:
    text = Prices((Price(Constraint("budget", 1.0), 2.0),)).to_json()
    with pytest.raises(QuantityError, match="must be finite and ≥ 0"):
        Prices.from_json(text.replace("2.0", "-2.0"))


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multiplier", [-1e-12, -1.0, float("nan"), float("inf")])
def test_a_multiplier_is_finite_and_not_negative(multiplier: float) -> None:
    with pytest.raises(QuantityError, match="price of 'budget 1 usd/task'"):
        Price(Constraint("budget", 1.0), multiplier)


@pytest.mark.parametrize("price", [-1.0, float("nan"), float("inf")])
def test_a_declared_price_is_finite_and_not_negative(price: float) -> None:
    with pytest.raises(QuantityError, match="declared price of 'gpu_s'"):
        Prices(declared=(("gpu_s", price),))


@pytest.mark.parametrize("unit", [0.0, -1.0, float("nan"), float("inf")])
def test_the_unit_of_account_is_worth_something(unit: float) -> None:
    with pytest.raises(NumeraireError, match="more than 0 USD"):
        Prices(unit=unit)


@pytest.mark.parametrize(
    ("kind", "bound", "more"),
    [
        ("budget", -1.0, {}),
        ("budget", float("nan"), {}),
        ("mean_sla", float("inf"), {}),
        ("quantile_sla", 0.05, {}),
        ("quantile_sla", 0.0, {"seconds": 1.0}),
        ("quantile_sla", 1.0, {"seconds": 1.0}),
        ("portfolio_envelope", 1.0, {}),
    ],
)
def test_a_constraint_that_means_nothing_is_refused(kind: str, bound: float, more: dict[str, float]) -> None:
    with pytest.raises(SettingsError):
        Constraint(kind, bound, **more)


@pytest.mark.parametrize("window", [(0.0, float("inf")), (float("nan"), 1.0), (2.0, 2.0), (3.0, 1.0)])
def test_a_window_ends_after_its_start(window: tuple[float, float]) -> None:
    with pytest.raises(SettingsError, match="time window"):
        Scope(window=window)


def test_a_scope_needs_the_column_it_speaks_of() -> None:
    tasks = Tasks(np.ones(2))
    for scope, says in (
        (Scope(tenant="a"), "names tenant 'a', but the records have no tenant"),
        (Scope(task_class="code"), "names class 'code', but the records have no class"),
        (Scope(window=(0.0, 1.0)), "needs tasks with a time column"),
    ):
        with pytest.raises(SettingsError, match=says):
            scope.members(tasks)


def test_an_envelope_can_be_charged_only_by_a_density() -> None:
    uses = Uses(("a",), np.ones((1, 1)), np.ones((1, 1, 1)), losses=np.ones((1, 1, 2)))
    with pytest.raises(QuantityError, match="a density"):
        Constraint("portfolio_envelope", 1.0, measure=CVaR(0.5)).charge(uses)


def test_scopes_cover_whom_they_name() -> None:
    tasks = Tasks(
        np.ones(4),
        tenant=Labels(np.array([0, 0, 1, -1]), ("a", "b")),
        task_class=Labels(np.array([0, 1, 0, 0]), ("code", "chat")),
        time=np.array([0.0, 1.0, 2.0, 3.0]),
    )
    assert Scope().members(tasks) is None
    assert Scope(tenant="a").members(tasks).tolist() == [True, True, False, False]
    assert Scope(tenant="a", task_class="code").members(tasks).tolist() == [True, False, False, False]
    # A window holds its start and not its end.
    assert Scope(window=(1.0, 3.0)).members(tasks).tolist() == [False, True, True, False]


# --- units of account ----------------------------------------------------------------------------------------------


@given(economies(min_rows=1), SEEDS, st.floats(1e-6, 1e6))
def test_the_unit_of_account_changes_no_decision(economy: Economy, seed: int, unit: float) -> None:
    """[Z-3] V is divided by π_C with everything else."""
    vector = price_vectors(economy, np.random.default_rng(seed))
    in_usd = net_value(economy.tasks, economy.uses, vector)
    for other in (vector.normalised(), replace(vector, unit=unit)):
        values = net_value(economy.tasks, economy.uses, other)
        choice, plain = choose(values), choose(in_usd)
        # Another choice only where two are as good, to the last bit of a division.
        assert choice.value * other.unit == pytest.approx(plain.value, rel=1e-12, abs=1e-12)
        differ = choice.use != plain.use
        got = np.where(choice.use < 0, 0.0, in_usd[np.arange(len(in_usd)), choice.use])
        assert got[differ] == pytest.approx(plain.value[differ], rel=1e-12, abs=1e-12)
        assert np.array_equal(np.isfinite(values), np.isfinite(in_usd))


def test_the_display_form_has_compute_at_one() -> None:
    """(1, λ, ρ) = (1, π_L/π_C, π_R/π_C), and V/π_C with it."""
    tasks = Tasks(np.array([10.0]), latency_price=np.array([0.5]), risk_price=np.array([2.0]))
    rows = (Constraint("budget", 1.0), Constraint("risk_envelope", 1.0))
    vector = Prices((Price(rows[0], 3.0), Price(rows[1], 6.0))).normalised()
    assert vector.unit == 4.0

    def value_of(quality: float = 0.0, usd: float = 0.0, seconds: float = 0.0, risk: float = 0.0) -> float:
        cell = np.ones((1, 1))
        uses = Uses(
            ("use",), cell * quality, cell[:, :, None] * usd, seconds=cell * seconds, risk=cell * risk
        )
        return float(net_value(tasks, uses, vector)[0, 0])

    assert value_of(usd=1.0) == -1.0
    assert value_of(quality=1.0) == 10.0 / 4
    assert value_of(seconds=1.0) == -0.5 / 4
    assert value_of(risk=1.0) == -(2.0 + 6.0) / 4


def test_no_price_of_compute_no_numeraire() -> None:
    for vector in (
        Prices(numeraire="compute"),
        Prices((Price(Constraint("budget", 1.0), 0.0),), numeraire="compute"),
        Prices((Price(Constraint("budget", 1.0, Scope(tenant="a")), 2.0),), numeraire="compute"),
        Prices((Price(Constraint("mean_sla", 1.0), 2.0),), numeraire="compute"),
        Prices(declared=(("usd", 0.0),)),
    ):
        assert vector.compute_price == 0.0
        with pytest.raises(NumeraireError, match="compute has no price"):
            vector.normalised()


def test_what_holds_for_everybody_is_told_from_what_is_scoped() -> None:
    rows = (
        Price(Constraint("budget", 1.0), 2.0),
        Price(Constraint("budget", 1.0, resource="gpu_s"), 5.0),
        Price(Constraint("budget", 1.0, Scope(tenant="a")), 7.0),
        Price(Constraint("mean_sla", 1.0), 0.25),
        Price(Constraint("quantile_sla", 0.5, seconds=1.0), 0.5),
        Price(Constraint("risk_envelope", 1.0), 3.0),
    )
    vector = Prices(rows)
    assert [vector.multiplier(layer) for layer in ("compute", "latency", "risk")] == [2.0, 0.75, 3.0]
    assert vector.compute_price == 3.0
    assert replace(vector, numeraire="compute").compute_price == 2.0


def in_cents(economy: Economy) -> Economy:
    """The same economy with money counted in cents: V, λ₀, ρ₀, prices paid and budgets in money, times 100."""
    tasks, uses = economy.tasks, economy.uses
    money = np.array([100.0, 1.0])
    return replace(
        economy,
        tasks=replace(
            tasks,
            value=100 * tasks.value,
            latency_price=100 * tasks.latency_price,
            risk_price=100 * tasks.risk_price,
            irreversible_price=100 * tasks.irreversible_price,
        ),
        uses=replace(uses, amounts=uses.amounts * money),
        declared=tuple((name, usd * (1 if name == "usd" else 100)) for name, usd in economy.declared),
        rows=tuple(
            replace(row, bound=100 * row.bound) if row.kind == "budget" and row.resource == "usd" else row
            for row in economy.rows
        ),
    )


@settings(max_examples=150)
@given(economies(kinds=KINDS))
def test_counting_in_cents_changes_no_decision(economy: Economy) -> None:
    """A price of money in money stays what it is; one of seconds, risk or tool calls is a hundred times as much."""
    cents = in_cents(economy)
    usd_clearing, cent_clearing = (
        discover(e.tasks, e.uses, e.rows, defer=e.defer, declared=e.declared) for e in (economy, cents)
    )
    objective = usd_clearing.certificate.objective
    tolerance = 1e-8 * economy.scale
    assert cent_clearing.certificate.objective / 100 == pytest.approx(objective, abs=tolerance)
    factor = np.array([1 if row.kind == "budget" and row.resource == "usd" else 100 for row in economy.rows])
    back = cent_clearing.multipliers / factor
    # Multipliers need not be unique; those found in cents must be as good in dollars: the same, or at a kink.
    assert lagrangian(economy, back)[1] == pytest.approx(objective, abs=tolerance)
    # And at the same prices, restated, each task chooses the same.
    in_usd = net_value(economy.tasks, economy.uses, usd_clearing.prices)
    restated = Prices(
        tuple(
            Price(row, float(mu * f))
            for row, mu, f in zip(cents.rows, usd_clearing.multipliers, factor, strict=True)
        ),
        cents.declared,
    )
    values = net_value(cents.tasks, cents.uses, restated)
    known = economy.uses.allowed
    assert values[known] / 100 == pytest.approx(in_usd[known], abs=1e-9 * economy.scale)


def test_multipliers_in_cents_where_they_are_unique() -> None:
    """Golden of the above: one budget and one SLA, both binding."""
    quality = np.array([[0.2, 0.9, 0.8]] * 7) * np.linspace(1, 2, 7)[:, None]
    amounts = np.array([[[0.1], [1.0], [2.0]]] * 7) * np.linspace(1, 1.5, 7)[:, None, None]
    seconds = np.array([[3.0, 5.0, 0.5]] * 7) * np.linspace(1, 1.2, 7)[:, None]
    economy = Economy(
        Tasks(np.linspace(5, 11, 7), latency_price=np.full(1, 0.125)),
        Uses(("slow", "good", "fast"), quality, amounts, seconds=seconds),
        (Constraint("budget", 0.9), Constraint("mean_sla", 3.5)),
    )
    cents = replace(
        economy,
        tasks=replace(
            economy.tasks, value=100 * economy.tasks.value, latency_price=100 * economy.tasks.latency_price
        ),
        uses=replace(economy.uses, amounts=100 * amounts),
        rows=(Constraint("budget", 90.0), Constraint("mean_sla", 3.5)),
    )
    one, other = (discover(e.tasks, e.uses, e.rows) for e in (economy, cents))
    assert (one.multipliers > 0).all()
    assert other.multipliers == pytest.approx(one.multipliers * [1, 100])
    assert (other.use == one.use).all()


def test_an_unknown_numeraire_is_refused() -> None:
    with pytest.raises(QuantityError, match="'gold'"):
        Prices.from_json(
            Prices()
            .to_json()
            .replace('"usd", "unit"', '"gold", "unit"')
            .replace('numeraire": "usd"', 'numeraire": "gold"')
        )
