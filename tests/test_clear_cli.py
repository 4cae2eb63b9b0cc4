"""`walras clear`: the contract, published economies as they are, what it says in words, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from conftest import DataDir
from logs import walras
from test_html_report import HOSTILE

GATEWAY = """
goods = ["prefill", "decode", "gpu"]
supply = { gpu = 8 }

[[tenants]]
name = "search"
budget = 25
utility = { kind = "ces", shares = { prefill = 0.7, decode = 0.3 }, elasticity = 0.5 }

[[tenants]]
name = "agents"
budget = 75
utility = { kind = "cobb-douglas", shares = { prefill = 0.2, decode = 0.8 } }

[[activities]]
name = "prefill engine"
net = { gpu = -1, prefill = 8 }

[[activities]]
name = "decode engine"
net = { gpu = -1, decode = 2 }
"""


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clear") / "economy.toml"
    path.write_text(GATEWAY, encoding="utf-8")
    return path


def test_a_market_of_budgets_is_priced_in_dollars(gateway: Path) -> None:
    """By hand: all 100 USD end up at the 8 GPUs, 12.5 each; a token costs what its GPU does."""
    data = walras("clear", str(gateway), "--json").data
    (found,) = data["equilibria"]
    assert found["normalisation"] == "usd"
    assert found["prices"] == pytest.approx([12.5 / 8, 12.5 / 2, 12.5])
    assert sum(found["activities"]) == pytest.approx(8)
    assert found["incomes"] == pytest.approx([25, 75])
    assert found["certificate"]["worst"] < 1e-9
    assert data["solver"] == found["solver"]
    assert data["evaluations"] > 0
    # One GPU more is worth its price to all together: the envelope theorem, found by clearing again.
    assert data["one_unit_more"][0]["by_good"]["gpu"] == pytest.approx(12.5, rel=1e-3)
    assert data["one_unit_more"][0]["by_good"]["decode"] is None


def test_who_pays_for_whom_is_what_clearing_without_a_tenant_says(gateway: Path, tmp_path: Path) -> None:
    data = walras("clear", str(gateway), "--json").data
    costs = np.array(data["who_pays_for_whom"][0]["costs"], dtype=float)
    alone = tmp_path / "alone.toml"
    start = GATEWAY.index('[[tenants]]\nname = "agents"')
    alone.write_text(GATEWAY[:start] + GATEWAY[GATEWAY.index("[[activities]]") :], encoding="utf-8")
    there = walras("clear", str(alone), "--json").data["equilibria"][0]
    # Alone, search has all 8 GPUs instead of the 2 that its 25 USD buy, at unchanged ratios of prices: 4 times as much.
    with_both, by_itself = (np.array(one["allocation"][0][:2]) for one in (data["equilibria"][0], there))
    assert by_itself == pytest.approx(4 * with_both)
    assert costs[1, 0] == pytest.approx(3 * 25, rel=1e-6)


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("scarf1960", (), 1),
        ("mwg15b2", ("--all",), 3),
        ("kehoe1985", ("--all",), 3),
        ("scarf_hansen1973", (), 1),
        ("shoven_whalley1984", (), 1),
        ("fisher", (), 2),
    ],
)
def test_published_economies_clear_as_they_are(
    name: str, options: tuple[str, ...], count: int, data_dir: DataDir
) -> None:
    path = data_dir / f"equilibrium/{name}.json"
    data = walras("clear", str(path), *options, "--json").data
    assert len(data["equilibria"]) == count
    assert data["complete"] is (True if options else None)
    golden = json.loads(path.read_text(encoding="utf-8")).get("equilibria", [])
    published = [np.array(one["prices"]) for one in golden if "prices" in one]
    for one in data["equilibria"]:
        assert one["certificate"]["worst"] < 1e-9
        if published:
            assert min(np.abs(p - one["prices"]).max() for p in published) < 1e-8


MARKET = """
goods = ["prefill", "decode"]
supply = { prefill = 10, decode = 5 }
tenants = [
    { name = "chat", budget = 10, utility = { kind = "linear", weights = { prefill = 1, decode = 3 } } },
    { name = "search", budget = 10, utility = { kind = "ces", shares = { prefill = 3, decode = 1 }, elasticity = 2 } },
    { name = "batch", budget = 5, utility = { kind = "leontief", shares = { prefill = 1, decode = 1 } } },
]
"""


def test_a_market_of_budgets_is_shown_to_be_fair(tmp_path: Path) -> None:
    """No envy, and nobody does worse than with its budget's share of everything (Varian 1974)."""
    path, page = tmp_path / "market.toml", tmp_path / "page.html"
    path.write_text(MARKET, encoding="utf-8")
    (fair,) = walras("clear", str(path), "--json").data["fairness"]
    assert max(fair["envy"]) < 1e-6
    assert min(fair["over_budget_split"]) > 1 - 1e-6
    shown = walras("clear", str(path), "--solver", "fisher", "--html", str(page))
    assert "Is it fair?" in shown.out
    assert "Is it fair?" in page.read_text(encoding="utf-8")


def test_what_is_found_is_said_in_words(gateway: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    shown = walras("clear", str(gateway), "--html", str(page))
    said = " ".join(shown.out.split())
    for words in (
        "gpu is what matters most",
        "A unit of gpu more would bring $12.5",
        "agents costs the others most, $75.0",
        "Certificate: excess demand",
        "--all looks for every other",
    ):
        assert words in said
    assert "Who pays for whom" in page.read_text(encoding="utf-8")


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    path, page = tmp_path / "economy.toml", tmp_path / "page.html"
    name = HOSTILE[0]
    path.write_text(GATEWAY.replace('"search"', json.dumps(name)), encoding="utf-8")
    shown = walras("clear", str(path), "--html", str(page))
    assert shown.code == 0, shown.err
    assert name in shown.out
    assert name not in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("old", "new", "words", "code"),
    [
        ("budget = 25", "budget = -25", "search", 4),
        ("budget = 25", "budget = nan", "search", 4),
        ("supply = { gpu = 8 }", "supply = { gpu = 0 }", "no supply", 4),
        ("gpu = -1, decode = 2", "gpu = -1, decoed = 2", "decoed", 4),
        ("decode = 0.8", "decode = -0.8", "agents", 4),
        ("net = { gpu = -1, prefill = 8 }", "net = { prefill = 8 }", "prefill", 5),
        ("goods =", "goods", "economy.toml", 3),
    ],
)
def test_what_cannot_be_an_economy_is_named(
    old: str, new: str, words: str, code: int, tmp_path: Path
) -> None:
    assert old in GATEWAY
    path = tmp_path / "economy.toml"
    path.write_text(GATEWAY.replace(old, new), encoding="utf-8")
    shown = walras("clear", str(path))
    assert shown.code == code, shown.err
    assert words in shown.err
    assert "Traceback" not in shown.err


def test_no_file_is_said(tmp_path: Path) -> None:
    shown = walras("clear", str(tmp_path / "none.toml"))
    assert shown.code == 3
    assert "none.toml" in shown.err


def test_all_takes_no_solver(gateway: Path) -> None:
    shown = walras("clear", str(gateway), "--all", "--solver", "newton")
    assert shown.code == 4
    assert "--solver" in shown.err
