"""`walras menu` and `walras menu check`: the contract, every source of types and costs, what is refused, what people see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logs import walras
from walras.simulate import write_sample

TIER_KEYS = {"name", "quality", "price", "type_from", "type_to"}
CERTIFICATE_KEYS = {
    "worst_ic_violation",
    "worst_ir_violation",
    "information_rent",
    "revenue",
    "profit",
    "welfare",
}
MODELS = "name,quality,cost,latency_s\nsmall,0.5,0.01,1\nlarge,0.9,0.25,3\nworse,0.85,0.4,4\n"


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("menu") / "sample.parquet"
    write_sample(path, 300, seed=0)
    return path


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def menu(*options: object) -> Any:
    ran = walras("menu", *options, "--json")
    assert (ran.code, ran.err) == (0, ""), ran.err
    return ran.data


def refused(code: int, *options: object) -> str:
    ran = walras("menu", *options)
    assert ran.code == code, ran.err
    assert "Traceback" not in ran.err
    return ran.err


# --- the contract -------------------------------------------------------------------------------------------------------


def test_uniform_types_and_quadratic_cost() -> None:
    """Bergemann et al. (2012): 4 tiers of qualities 2k/9, sold from (1 + (2k − 1)/9)/2."""
    data = menu(
        "--types", "uniform:0:1", "--quality-cost", "quadratic", "--objective", "revenue", "--tiers", 4
    )
    assert [t.keys() >= TIER_KEYS for t in data["tiers"]] == [True] * 4
    assert data["certificate"].keys() >= CERTIFICATE_KEYS
    assert [t["quality"] for t in data["tiers"]] == pytest.approx([2 / 9, 4 / 9, 6 / 9, 8 / 9])
    assert [t["type_from"] for t in data["tiers"]] == pytest.approx([5 / 9, 6 / 9, 7 / 9, 8 / 9])
    assert data["tiers"][-1]["type_to"] == 1
    assert data["certificate"]["profit"] == pytest.approx((1 - 1 / 81) / 12)
    assert data["certificate"]["loss_to_cap"] == pytest.approx(1 / 81 / 12, abs=1e-7)
    assert max(data["certificate"]["worst_ic_violation"], data["certificate"]["worst_ir_violation"]) <= 1e-9


def test_an_unbounded_tier_is_null() -> None:
    data = menu("--types", "exponential:0.5", "--quality-cost", "quadratic")
    assert data["objective"] == "welfare"
    assert data["tiers"][-1]["type_to"] is None


def test_two_types_from_a_file(tmp_path: Path) -> None:
    types = write(tmp_path, "types.csv", "type,probability\n1,0.8\n2,0.2\n")
    data = menu("--types", types, "--quality-cost", "quadratic", "--objective", "revenue")
    assert [(t["quality"], t["price"]) for t in data["tiers"]] == [
        (pytest.approx(0.75), pytest.approx(0.75)),
        (pytest.approx(2), pytest.approx(3.25)),
    ]
    assert data["certificate"]["information_rent"] == pytest.approx(0.15)
    low = next(d for d in data["downgraded"]["by_tier"] if d["tier"] == "tier 1")
    assert low["share"] == pytest.approx(0.8)
    assert low["welfare_lost"] == pytest.approx(0.8 * (1 - 0.75) ** 2 / 2)


def test_settings_and_files_beside_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "models.csv", MODELS)
    settings = write(
        tmp_path,
        "economy.toml",
        'lambda0 = 0.01\n[menu]\ntypes = "uniform:0:2"\nquality_cost = "models.csv"\nobjective = "revenue"\ntiers = 1\n',
    )
    monkeypatch.chdir(tmp_path.parent)
    data = menu("--settings", settings)
    assert [t["name"] for t in data["tiers"]] == ["large"]
    both = menu("--settings", settings, "--tiers", 3, "--objective", "welfare")
    assert [t["name"] for t in both["tiers"]] == ["small", "large"]
    assert [t["price"] for t in both["tiers"]] == pytest.approx([0.01, 0.25])
    assert both["tiers"][0]["type_from"] == pytest.approx(0.02 / 0.5)  # its user waits a second, at 0.01 USD
    assert [o["name"] for o in both["offerings"] if o["idle"]] == ["worse"]


def test_live_prices_and_resources_make_the_cost(tmp_path: Path) -> None:
    table = write(tmp_path, "models.csv", "name,quality,cost,kv\na,0.5,0.01,2\nb,0.9,0.1,10\n")
    settings = write(
        tmp_path,
        "economy.toml",
        '[resources.kv]\ncolumn = "kv"\nprice_usd = 0.01\n[menu]\ntypes = "uniform:0:2"\n'
        f'quality_cost = "{table}"\n',
    )
    assert [t["cost"] for t in menu("--settings", settings)["tiers"]] == pytest.approx([0.03, 0.2])
    vector = write(
        tmp_path,
        "prices.json",
        json.dumps(
            {
                "numeraire": "usd",
                "unit": 1.0,
                "declared": [["usd", 1.0], ["kv", 0.02]],
                "discovered": [],
            }
        ),
    )
    assert [t["cost"] for t in menu("--settings", settings, "--prices", vector)["tiers"]] == pytest.approx(
        [0.05, 0.3]
    )


def test_what_users_chose_says_what_requests_are_worth(tmp_path: Path) -> None:
    """Drawn from a lognormal that the choices alone must find again, within the interval that is given."""
    offered = write(tmp_path, "offered.csv", "name,quality,price\nbasic,0.5,0.02\nplus,0.8,0.08\n")
    worth = 0.15 * np.exp(0.8 * np.random.default_rng(1).standard_normal(3000))
    taken = np.where(worth < 0.04, "", np.where(worth < 0.2, "basic", "plus"))
    choices = write(
        tmp_path, "choices.csv", "tier,tenant\n" + "".join(f"{t},u{i}\n" for i, t in enumerate(taken))
    )
    models = write(tmp_path, "models.csv", MODELS.replace(",0.25,", ",0.03,"))
    data = menu("--types", choices, "--offered", offered, "--quality-cost", models)
    median, sigma = data["law"]["parameters"]
    assert median["interval"][0] < 0.15 < median["interval"][1]
    assert sigma["interval"][0] < 0.8 < sigma["interval"][1]
    assert data["spread"]["regret"] >= -1e-12
    for tier, spread in zip(data["tiers"], data["spread"]["tiers"], strict=True):
        assert spread["price"][0] <= tier["price"] + 1e-12
        assert tier["price"] <= spread["price"][1] + 1e-12
    assert "without the menu" in refused(4, "--types", choices, "--quality-cost", models)


def test_a_log_says_both(sample: Path) -> None:
    data = menu("--types", sample, "--quality-cost", sample, "--family", "lognormal")
    assert data["law"]["family"] == "lognormal"
    assert {o["name"] for o in data["offerings"]} >= {t["name"] for t in data["tiers"]}
    assert all(o["quality_error"] > 0 and o["cost_error"] > 0 for o in data["offerings"])
    assert [t["price"] for t in data["tiers"]] == pytest.approx([t["cost"] for t in data["tiers"]])


def test_tiers_that_route_inside(sample: Path) -> None:
    """At each cost a router is at least as good as the best mixture of models, on the requests it did not learn from."""
    options = ("--types", "lognormal:0.1:1.5", "--quality-cost", sample, "--tiers", 5)
    plain, routed = menu(*options), menu(*options, "--routed")
    assert all(t["name"].startswith("routed at") for t in routed["tiers"])
    assert routed["certificate"]["bound"] > plain["certificate"]["bound"]
    assert "needs a log" in refused(4, "--types", "uniform:0:1", "--quality-cost", "quadratic", "--routed")


def test_users_who_differ_in_haste(tmp_path: Path) -> None:
    """Half the users mind delay: the menu has a slow tier and a fast one of the same quality."""
    types = write(
        tmp_path,
        "types.csv",
        "type,latency_price,probability\n1,0,0.25\n1,0.1,0.25\n2,0,0.25\n2,0.1,0.25\n",
    )
    models = write(tmp_path, "models.csv", "name,quality,cost,latency_s\nslow,0.8,0.05,8\nfast,0.8,0.2,1\n")
    data = menu("--types", types, "--quality-cost", models, "--objective", "revenue")
    assert {t["name"] for t in data["tiers"]} == {"slow", "fast"}
    fast = next(t for t in data["tiers"] if t["name"] == "fast")
    assert fast["latency_price"] == [0.1, 0.1]
    assert data["certificate"]["worst_ic_violation"] <= 1e-9
    assert data["certificate"]["loss_to_cap"] >= 0
    assert "seconds" in refused(4, "--types", types, "--quality-cost", "quadratic")
    assert "lambda0" in refused(4, "--types", types, "--quality-cost", models, "--lambda0", 0.1)


def test_nobody_worth_serving(tmp_path: Path) -> None:
    models = write(tmp_path, "models.csv", "name,quality,cost\na,0.5,3\n")
    ran = walras("menu", "--types", "uniform:0:1", "--quality-cost", models)
    assert ran.code == 0
    assert "Nobody is worth serving" in ran.out
    assert menu("--types", "uniform:0:1", "--quality-cost", models)["tiers"] == []


# --- check ----------------------------------------------------------------------------------------------------------------


def test_a_designed_menu_holds_and_a_changed_one_does_not(tmp_path: Path) -> None:
    data = menu("--types", "uniform:0:1", "--quality-cost", "quadratic", "--objective", "revenue")
    path = write(tmp_path, "menu.json", json.dumps(data))
    ran = walras("menu", "check", path, "--json")
    assert ran.code == 0
    assert ran.data["holds"] is True
    assert ran.data["certificate"] == {
        k: pytest.approx(data["certificate"][k], abs=1e-12) for k in CERTIFICATE_KEYS
    }
    assert ran.data["downgraded"]["welfare_lost"] == pytest.approx(data["downgraded"]["welfare_lost"])
    data["tiers"][2]["price"] += 0.1
    path = write(tmp_path, "bad.json", json.dumps(data))
    ran = walras("menu", "check", path, "--json")
    assert ran.code == 6
    assert "4 constraints are violated, by up to 0.1 USD" in ran.err
    found = json.loads(ran.out)
    assert found["certificate"]["worst_ic_violation"] == pytest.approx(0.1)
    worst = found["lies"][0]
    assert (worst["own"], worst["gain"]) == ("tier 3", pytest.approx(0.1))
    shown = walras("menu", "check", path)
    assert "Does not hold: users of tier 3" in " ".join(shown.out.split())


def test_delay_that_users_mind_is_on_record(tmp_path: Path) -> None:
    models = write(tmp_path, "models.csv", MODELS)
    data = menu("--types", "uniform:0:2", "--quality-cost", models, "--lambda0", 0.01)
    assert data["lambda0"] == 0.01
    path = write(tmp_path, "menu.json", json.dumps(data))
    assert walras("menu", "check", path).code == 0
    assert "2 constraints are violated" in refused(6, "check", path, "--lambda0", 0)


def test_names_are_shown_as_they_are(tmp_path: Path) -> None:
    models = write(tmp_path, "models.csv", "name,quality,cost\n[red],0.5,0.01\n[/x],0.9,0.25\n")
    options = ("--types", "uniform:0:1", "--quality-cost", models, "--objective", "revenue")
    shown = walras("menu", *options)
    assert (shown.code, shown.out.count("\\")) == (0, 0)
    assert "[red] 20% (" in " ".join(shown.out.split())
    data = menu(*options)
    data["tiers"][0]["price"] += 0.001
    ran = walras("menu", "check", write(tmp_path, "menu.json", json.dumps(data)))
    assert "users of [red] of type" in ran.out
    assert "\\" not in ran.out
    assert "2 constraints are violated" in ran.err


def test_a_public_price_list(tmp_path: Path) -> None:
    path = write(tmp_path, "list.csv", "name,quality,price,cost\nbasic,0.6,0.01,0.005\nplus,0.8,0.05,0.04\n")
    data = walras("menu", "check", path, "--types", "lognormal:0.2:1", "--json").data
    assert data["self_selected"] is True
    assert [t["type_from"] for t in data["tiers"]] == pytest.approx([0.01 / 0.6, 0.2])
    c = data["certificate"]
    assert c["welfare"] == pytest.approx(c["information_rent"] + c["profit"])
    assert "there is nothing to lie about" in walras("menu", "check", path).out.replace("\n", " ")


# --- what is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("type,probability\n1,0.5\n2,0.4\n", "row 2, column 'probability': probabilities sum to 0.9"),
        ("type,probability\n2,0.5\n1,0.5\n", "row 2, column 'type': type 1 comes after 2"),
        ("type,probability\n", "empty support"),
        ("type,probability\n1,-0.5\n2,1.5\n", "row 1, column 'probability'"),
        ("type,probability\n1,nan\n2,1\n", "row 1, column 'probability'"),
        ("type\n1\nx\n", "row 2, column 'type'"),
        ("quality,price\n1,2\n", "column 'quality': is not known"),
        ("type\n1\n2\n", "2 observations are too few for a law"),
        ("type,tenant\n" + "1,a\n2,a\n" * 20, "column 'tenant': all observations are of one tenant"),
    ],
)
def test_types_that_cannot_be(tmp_path: Path, table: str, said: str) -> None:
    path = write(tmp_path, "types.csv", table)
    error = refused(3, "--types", path, "--quality-cost", "quadratic")
    assert said in error
    assert str(path) in error


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("name,quality,cost\na,1.2,0.1\n", "row 1, column 'quality'"),
        ("name,quality,cost\na,0.5,-1\n", "row 1, column 'cost'"),
        ("name,quality\na,0.5\n", "column 'cost'"),
        ("name,quality,cost\na,0.5,0.1\na,0.6,0.2\n", "'a' is also row 1"),
        ("name,quality,cost\n", "has no offerings"),
    ],
)
def test_offerings_that_cannot_be(tmp_path: Path, table: str, said: str) -> None:
    path = write(tmp_path, "models.csv", table)
    assert said in refused(3, "--types", "uniform:0:1", "--quality-cost", path)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("name,quality,price\na,0.5,-1\n", "row 1, column 'price': tier 'a'"),
        ("name,quality,price\na,0.5,1\nb,0.4,2\n", "row 2: tier 'b': dominated by 'a' (row 1)"),
        ("name,quality,price\na,1.5,1\n", "column 'quality'"),
        ("name,quality,price,type_from,type_to\na,0.5,1,3,2\n", "types out of order"),
        ("name,quality,price\n", "has no tiers"),
        ('{"tiers": 3}', "tiers"),
        ("{", "JSON"),
    ],
)
def test_menus_that_cannot_be(tmp_path: Path, table: str, said: str) -> None:
    path = write(tmp_path, "menu.csv", table)
    assert said in refused(3, "check", path)


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        ((), 4, "types: says what requests are worth, and is missing"),
        (("--types", "uniform:0:1"), 4, "quality_cost: says what quality costs, and is missing"),
        (("--types", "uniform:1:0", "--quality-cost", "quadratic"), 4, "empty support"),
        (("--types", "gamma:1:0", "--quality-cost", "quadratic"), 4, "'gamma:1:0' is not a law of types"),
        (("--types", "nowhere.csv", "--quality-cost", "quadratic"), 3, "nowhere.csv: cannot be read"),
        (("--types", "uniform:0:1", "--quality-cost", "nowhere.csv"), 3, "nowhere.csv: cannot be read"),
        (("--types", "uniform:0:1", "--quality-cost", "quadratic", "--tiers", "0"), 2, "--tiers"),
        (
            ("--types", "uniform:0:1", "--quality-cost", "quadratic", "--recover-usd", "0.09"),
            5,
            "cost recovery: no menu of 4 tiers makes 0.09 USD per request; the most is 0.0823045",
        ),
        (("--types", "uniform:0:1", "--quality-cost", "quadratic", "--recover-usd", "-1"), 4, "recover_usd"),
        (("--types", "uniform:0:1", "--quality-cost", "quadratic", "--family", "uniform"), 4, "family"),
    ],
)
def test_options_that_make_no_menu(options: tuple[str, ...], code: int, said: str) -> None:
    assert said in refused(code, *options)


def test_what_people_see(tmp_path: Path) -> None:
    models = write(tmp_path, "models.csv", MODELS)
    ran = walras("menu", "--types", "exponential:1", "--quality-cost", models, "--objective", "revenue")
    text = " ".join(ran.out.split())
    assert "for requests worth, per unit of quality" in text
    assert "and more" in text
    assert "No menu of any size makes more profit than" in text
    assert "Downgraded on purpose" in text
    assert "Never worth a tier: worse" in text
    assert "no type gains more than" in text
