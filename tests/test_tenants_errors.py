"""What cannot be an economy is refused with a sentence that names tenant and good, or file and field."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from walras.errors import InfeasibleError, QuantityError, RecordError, SettingsError, WalrasError
from walras.market.tenants.certificate import support
from walras.market.tenants.economy import Economy, Sector, Tenant
from walras.market.tenants.read import read_economies
from walras.market.tenants.solve import clear
from walras.market.tenants.utility import CES, Demand, Linear, QuasiLinear, Term, Utility
from walras.risk import FloatArray

GOODS = ("prefill", "decode")
EVEN = CES(np.ones(2), 1.0)


def tenant(
    utility: Utility = EVEN, endowment: Any = (1, 1), budget: float = 0.0, name: str = "ops"
) -> Tenant:
    return Tenant(name, utility, np.array(endowment, dtype=float), budget)


def economy(*tenants: Tenant, **more: Any) -> Economy:
    return Economy(GOODS, tenants, **more)


def own(demand: Callable[[FloatArray, float], Any]) -> Tenant:
    return tenant(Demand(lambda p, income: np.array(demand(p, income))))


CASES: dict[str, tuple[Callable[[], object], str]] = {
    "nobody owns anything": (lambda: economy(tenant(endowment=(0, 0))), "no tenant owns anything.*'prefill'.*'ops'"),
    "a good nobody owns": (lambda: economy(tenant(endowment=(1, 0))), "nobody owns.*'decode'.*tenant 'ops' wants it"),
    "negative endowment": (lambda: economy(tenant(endowment=(1, -2))), "tenant 'ops': endowment of 'decode'.*-2"),
    "endowment NaN": (lambda: economy(tenant(endowment=(np.nan, 1))), "tenant 'ops': endowment of 'prefill'"),
    "endowment too short": (lambda: economy(tenant(endowment=(1,))), "tenant 'ops': endowment has 1 amounts for 2"),
    "negative share": (lambda: economy(tenant(CES(np.array([1.0, -1.0]), 1.0))), "tenant 'ops', good 'decode'.*negative"),
    "shares too short": (lambda: economy(tenant(CES(np.ones(3), 1.0))), "tenant 'ops': 3 shares for 2 goods"),
    "wants nothing": (lambda: economy(tenant(CES(np.zeros(2), 1.0))), "tenant 'ops'.*wants nothing"),
    "linear wants nothing": (lambda: economy(tenant(Linear(np.zeros(2)))), "tenant 'ops'.*wants nothing"),
    "negative weight": (lambda: economy(tenant(Linear(np.array([-1.0, 1.0])))), "good 'prefill'.*negative"),
    "negative elasticity": (lambda: economy(tenant(CES(np.ones(2), -1.0))), "tenant 'ops'.*elasticity"),
    "infinite elasticity": (lambda: economy(tenant(CES(np.ones(2), np.inf))), "tenant 'ops'.*use Linear"),
    "one tenant twice": (lambda: economy(tenant(), tenant()), "tenant 'ops' is there twice"),
    "negative budget": (lambda: economy(tenant(budget=-1.0)), "tenant 'ops': its budget"),
    "budget for nothing": (lambda: economy(tenant(budget=1.0)), "tenant 'ops' has a budget, but there is no supply"),
    "supply for nobody": (lambda: economy(tenant(), supply=np.ones(2)), "supply of 'prefill', but no tenant"),
    "bad supply": (lambda: economy(tenant(), supply=np.array([1.0, np.inf])), "supply of 'decode' must be"),
    "activity NaN": (lambda: economy(tenant(), activities=np.array([[1.0], [np.nan]])), "activity 1.*'decode'"),
    "activity rows": (lambda: economy(tenant(), activities=np.ones((3, 1))), "3 rows for 2 goods"),
    "activity names": (
        lambda: economy(tenant(), activities=-np.ones((2, 1)), activity_names=("a", "b")),
        "2 activity names for 1",
    ),
    "idle activity": (lambda: economy(tenant(), activities=np.zeros((2, 1))), "activity 1 neither needs nor makes"),
    "sector eats itself": (
        lambda: economy(tenant(), sectors=(Sector("fab", 0, CES(np.ones(2), 1.0), 1.0),)),
        "sector 'fab' needs its own output 'prefill'",
    ),
    "sector costs nothing": (
        lambda: economy(tenant(), sectors=(Sector("fab", 0, CES(np.array([0.0, 1.0]), 1.0), 0.0),)),
        "sector 'fab': its unit cost",
    ),
    "subsistence exceeds what there is": (
        lambda: economy(tenant(CES(np.ones(2), 1.0, np.array([2.0, 0.0])))),
        "subsistence takes 1 more of 'prefill'.*tenant 'ops'",
    ),
    "budget below subsistence at any prices": (
        lambda: economy(
            tenant(CES(np.ones(2), 1.0, np.array([0.6, 0.5])), (0, 0), 1.0),
            tenant(endowment=(0, 0), budget=1.0, name="b"),
            supply=np.ones(2),
        ),
        "tenant 'ops' can pay for its subsistence at no prices: of 'prefill'",
    ),
    "a quasi-linear term that falls": (
        lambda: economy(tenant(QuasiLinear(0, (Term(1, -1.0, 0.5),)))), "tenant 'ops', good 'decode'.*more of it"
    ),
    "a quasi-linear term that is convex": (
        lambda: economy(tenant(QuasiLinear(0, (Term(1, 1.0, 2.0),)))), "tenant 'ops', good 'decode'.*exponent must be < 1"
    ),
    "a quasi-linear good twice": (
        lambda: economy(tenant(QuasiLinear(0, (Term(0, 1.0, 0.5),)))), "tenant 'ops', good 'prefill'.*twice"
    ),
    "a callable's NaN": (lambda: economy(own(lambda p, i: [i / p[0], np.nan])), "tenant 'ops', good 'decode'.*not a finite"),
    "a callable's shape": (lambda: economy(own(lambda p, i: [i / p[0]])), r"tenant 'ops'.*shape \(1,\)"),
    "a satiated callable": (
        lambda: economy(own(lambda p, i: [0.5 * i / p[0], 0.0])), "tenant 'ops', good 'prefill'.*satiated.*Walras' law"
    ),
    "a callable that overspends": (lambda: economy(own(lambda p, i: [2 * i / p[0], 0])), "buys more than it can pay"),
    "a callable below zero": (
        lambda: economy(own(lambda p, i: [(i + p[1]) / p[0], -1.0])), "tenant 'ops', good 'decode'.*negative"
    ),
    "a callable that is not homogeneous": (
        lambda: economy(own(lambda p, i: [i / p[0] / (1 + i), i / p[1] * i / (1 + i)])), "double"
    ),
    "goods made from nothing": (
        lambda: clear(economy(tenant(), activities=np.array([[1.0], [0.0]]), activity_names=("magic",))),
        "'prefill' can be made from nothing by 'magic'",
    ),
    "subsistence that a poor tenant cannot pay for": (
        lambda: clear(
            economy(
                tenant(CES(np.ones(2), 1.0, np.array([0.0, 0.9])), (1, 0), name="poor"),
                tenant(CES(np.array([0.1, 0.9]), 1.0), (5, 1), name="rich"),
            )
        ),
        "tenant 'poor' cannot pay for its subsistence.*'decode'",
    ),
    "start prices": (lambda: clear(economy(tenant()), start=np.array([1.0, 0.0])), "'decode' to start from must be > 0"),
    "number of start prices": (lambda: clear(economy(tenant()), start=np.ones(3)), "3 prices to start from"),
    "solver": (lambda: clear(economy(tenant()), solver="magic"), "no solver is called 'magic'"),  # type: ignore[arg-type]
    "no Fisher market": (lambda: clear(economy(tenant()), solver="fisher"), "no Fisher market"),
    "tâtonnement with activities": (
        lambda: clear(economy(tenant(), activities=np.array([[1.0], [-2.0]])), solver="tatonnement"),
        "no law of motion",
    ),
    "an allocation of another shape": (lambda: support(economy(tenant()), np.ones((2, 2))), "tenants by goods"),
    "a demand without utility": (
        lambda: support(economy(own(lambda p, i: i / p / 2)), np.ones((1, 2))), "tenant 'ops' has a demand function"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_refused(case: str) -> None:
    make, sentence = CASES[case]
    with pytest.raises(WalrasError, match=sentence) as refusal:
        make()
    assert isinstance(refusal.value, QuantityError | SettingsError | InfeasibleError)


def test_a_callable_that_turns_nan_later_is_named() -> None:
    def sometimes(p: FloatArray, income: float) -> FloatArray:
        return np.array([income / p[0], np.nan if p[0] == 0.9 else 0.0])

    with pytest.raises(
        QuantityError, match=r"tenant 'ops': its demand for 'decode' is NaN at prices \[0.9, 0.1\]"
    ):
        economy(own(sometimes)).excess_demand(np.array([0.9, 0.1]))


GOOD_FILE: dict[str, Any] = {
    "goods": ["prefill", "decode"],
    "supply": {"prefill": 10},
    "tenants": [
        {
            "name": "ops",
            "budget": 5,
            "utility": {"kind": "cobb-douglas", "shares": {"prefill": 0.7, "decode": 0.3}},
        }
    ],
    "activities": [{"name": "engine", "net": {"prefill": -1, "decode": 0.5}}],
}


def changed(path: str, value: object) -> dict[str, Any]:
    """The good file with the field at a dotted path set, or dropped where the value is None."""
    document = json.loads(json.dumps(GOOD_FILE))
    *way, last = (int(key) if key.isdigit() else key for key in path.split("."))
    place = document
    for key in way:
        place = place[key]
    place[last] = value
    if value is None:
        del place[last]
    return document


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("goods", None, "e.json, goods: is missing"),
        ("goods", "prefill", "e.json, goods: must be a list of names"),
        ("suply", {}, r"e.json, suply: is not a field of the format \(did you mean 'supply'"),
        ("supply", {"prefil": 1}, r"supply.prefil: is not a good \(did you mean 'prefill'"),
        ("supply", [1], r"supply: has 1 numbers for 2 goods"),
        ("supply", "much", r"supply: must be amounts by good"),
        ("kind", "barter", "kind: 'barter' is no kind of economy"),
        ("kind", 3, "kind: must be text"),
        ("tenants", {"ops": 1}, "tenants: must be a list of tables"),
        ("tenants.0.name", None, r"tenants\[1\].name: is missing"),
        ("tenants.0.budget", "5", r"tenants\[1\].budget: must be a number, not '5'"),
        ("tenants.0.budget", True, r"tenants\[1\].budget: must be a number, not True"),
        ("tenants.0.utility", "ces", r"tenants\[1\].utility: must be a table"),
        (
            "tenants.0.utility.kind",
            "cobb",
            r"utility.kind: 'cobb' is no utility \(did you mean 'cobb-douglas'",
        ),
        ("tenants.0.utility.shares", {"prefill": "all"}, r"utility.shares.prefill: must be a number"),
        ("tenants.0.utility.elasticity", 2, "utility.elasticity: is not a field"),
        (
            "tenants.0.utility",
            {"kind": "quasi-linear", "sum": "x1 + y^0.5"},
            "utility.sum: .*names the good 'y'",
        ),
        ("tenants.0.utility", {"kind": "quasi-linear", "sum": "prefill +"}, "cannot be read as a term"),
        (
            "tenants.0.utility",
            {"kind": "quasi-linear", "sum": "x1^0.5 + x2^0.5"},
            "exactly one good that counts as it is",
        ),
        ("tenants.0.budget", 0, "e.json: there is a supply of 'prefill', but no tenant"),
        ("activities.0.net", [1, 2, 3], r"activities\[1\].net: has 3 numbers for 2 goods"),
        (
            "sectors",
            [{"name": "s", "output": "x", "phi": 1, "delta": {}, "elasticity": 1}],
            r"output: 'x' is not a good",
        ),
        (
            "sectors",
            [{"name": "s", "output": "decode", "phi": 0, "delta": {"prefill": 1}, "elasticity": 1}],
            r"sectors\[1\].phi: must be > 0",
        ),
        (
            "sectors",
            [{"name": "s", "output": "decode", "phi": 1, "delta": {}, "elasticity": 1}],
            r"sectors\[1\].delta: .*some input used",
        ),
    ],
)
def test_a_field_is_named(tmp_path: Path, path: str, value: object, sentence: str) -> None:
    file = tmp_path / "e.json"
    file.write_text(json.dumps(changed(path, value)))
    with pytest.raises(WalrasError, match=sentence):
        read_economies(file)


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.toml", "goods = [", "is not TOML"),
        ("a.json", "{", "is not JSON"),
        ("a.json", "[1]", "holds no table"),
        ("a.json", b"\xff\xfe", "UTF-8"),
        ("missing.json", None, "cannot be read"),
        (
            "a.json",
            '{"kind": "exchange", "goods": 2, "consumers": [{"utility": "leontief", "wants": [0, 2], "weights": [1, 1]}]}',
            r"consumers\[1\].wants: must be numbers of goods, 0 to 1",
        ),
        (
            "a.json",
            '{"kind": "fisher", "supply": [1, 1], "linear": {"budgets": [1], "valuations": [[1, 1], [1, 2]]}}',
            "linear.budgets: has 1 numbers for 2 tenants",
        ),
        (
            "a.json",
            '{"kind": "activity analysis", "goods": 2, "consumers": [], "activities": [[1]]}',
            r"activities\[1\]: has 1",
        ),
    ],
)
def test_a_file_is_named(tmp_path: Path, name: str, text: str | bytes | None, sentence: str) -> None:
    file = tmp_path / name
    if text is not None:
        file.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises((RecordError, SettingsError), match=sentence) as refusal:
        read_economies(file)
    assert re.search(re.escape(file.name), str(refusal.value))


def test_the_good_file_is_good(tmp_path: Path) -> None:
    file = tmp_path / "e.json"
    file.write_text(json.dumps(GOOD_FILE))
    found = clear(read_economies(file)["e"])
    # Half a token of decode out of one of prefill, so it costs twice as much; 7 prefill are bought and 3 turned into 1.5.
    assert found.prices * found.usd == pytest.approx([0.5, 1.0])
    assert found.allocation[0] == pytest.approx([7.0, 1.5])
