"""economy.toml and the options: one table of settings, from which help, validation and rows are made."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from pydantic import BaseModel

from logs import walras
from walras.cli import ECONOMY_OPTIONS, app
from walras.errors import SettingsError
from walras.prices import Constraint, Scope
from walras.risk import CVaR, Expectation, MaxMin
from walras.settings import (
    Economy,
    EngineLink,
    GatewaySettings,
    MenuSettings,
    ModelSettings,
    Resource,
    TaskClass,
    Tenant,
    UpstreamSettings,
    load_economy,
    settings_rows,
)

TABLES: dict[str, type[BaseModel]] = {
    "": Economy,
    "tenants.NAME.": Tenant,
    "classes.NAME.": TaskClass,
    "resources.NAME.": Resource,
    "menu.": MenuSettings,
    "models.NAME.": ModelSettings,
    "upstreams.NAME.": UpstreamSettings,
    "engines.NAME.": EngineLink,
    "gateway.": GatewaySettings,
}


def economy_file(folder: Path, text: str) -> Path:
    path = folder / "economy.toml"
    path.write_text(text, encoding="utf-8")
    return path


# --- one table ----------------------------------------------------------------------------------------------------


def every_key() -> dict[str, str]:
    return {
        prefix + name: field.description or ""
        for prefix, table in TABLES.items()
        for name, field in table.model_fields.items()
    }


def test_every_setting_says_what_it_means() -> None:
    assert all(every_key().values())


def test_the_table_has_every_setting() -> None:
    rows = settings_rows()
    assert {key: meaning for key, _, _, meaning in rows} == every_key()
    assert len(rows) == len(every_key())
    by_key = {key: (kind, default) for key, kind, default, _ in rows}
    assert by_key["value"] == ("number", "")
    assert by_key["defer"] == ("boolean", "true")
    assert by_key["risk_measure"] == ("expectation | cvar | max-min", "expectation")
    assert by_key["risk_alpha"] == ("number", "0.95")
    assert by_key["tenants"] == ("table", "")
    assert by_key["resources.NAME.column"] == ("string", "")


def test_walras_settings_prints_every_setting() -> None:
    ran = walras("settings")
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert [line.split("|")[1].strip().strip("`") for line in lines[2:]] == list(every_key())
    for line, meaning in zip(lines[2:], every_key().values(), strict=True):
        assert line.endswith(f"| {meaning} |")
        assert line.replace("\\|", "").count("|") == 5, "a | in a cell would break the table"


@pytest.mark.parametrize("command", ["audit", "prices"])
def test_options_have_the_settings_help(command: str) -> None:
    options = {p.name: p for p in typer.main.get_command(app).commands[command].params}
    wanted = set(ECONOMY_OPTIONS) - ({"baseline"} if command == "prices" else set())
    assert wanted <= set(options)
    for key in wanted:
        option = options[key]
        assert option.help == Economy.model_fields[key].description
        assert f"--{key.replace('_', '-')}" in option.opts
        assert option.default is None, "an option that is not given must not override the file"
    assert options["defer"].secondary_opts == ["--no-defer"]


def test_help_shows_the_settings() -> None:
    ran = walras("audit", "--help")
    text = " ".join(ran.out.replace("│", " ").split())
    for key in ("value", "budget_usd", "sla_quantile", "baseline"):
        assert f"--{key.replace('_', '-')}" in text
        assert " ".join((Economy.model_fields[key].description or "").split()) in text


def test_every_scalar_setting_is_an_option() -> None:
    only_in_files = {
        "risk_beliefs",
        "tenants",
        "classes",
        "resources",
        "menu",
        "models",
        "upstreams",
        "engines",
        "gateway",
        "columns",
    }
    assert set(ECONOMY_OPTIONS) == set(Economy.model_fields) - only_in_files


# --- files and options --------------------------------------------------------------------------------------------

FILE = """
value = 2.0
budget_usd = 0.5
defer = false
risk_measure = "max-min"
risk_beliefs = [[0.5, 0.5], [1, 0]]

[tenants.acme]
value = 7
forbidden_models = ["large"]

[classes.code]
sla_s = 3
sla_quantile = 0.9

[resources.gpu]
column = "gpu_s"
price_usd = 0.01
limit = 4
hard = true

[columns]
quality = "grade"
"""


def test_a_file_is_read(tmp_path: Path) -> None:
    economy = load_economy(economy_file(tmp_path, FILE), {})
    assert (economy.value, economy.budget_usd, economy.defer) == (2.0, 0.5, False)
    assert economy.tenants == {"acme": Tenant(value=7, forbidden_models=("large",))}
    assert economy.classes == {"code": TaskClass(sla_s=3, sla_quantile=0.9)}
    assert economy.resources == {"gpu": Resource(column="gpu_s", price_usd=0.01, limit=4, hard=True)}
    assert economy.columns == {"quality": "grade"}
    assert economy.measure == MaxMin(((0.5, 0.5), (1.0, 0.0)))
    assert economy.declared() == (("usd", 1.0), ("gpu", 0.01))


def test_options_override_a_file(tmp_path: Path) -> None:
    path = economy_file(tmp_path, FILE)
    options = {"value": 3.0, "defer": True, "risk": None, "columns": {"model": "m"}}
    economy = load_economy(path, options)
    assert (economy.value, economy.defer, economy.risk) == (3.0, True, None)
    assert economy.budget_usd == 0.5, "what no option names stays"
    assert economy.columns == {"quality": "grade", "model": "m"}


def test_an_option_may_state_the_budget_in_the_other_unit(tmp_path: Path) -> None:
    path = economy_file(tmp_path, "budget_usd = 0.5")
    economy = load_economy(path, {"budget_total_usd": 10.0})
    assert (economy.budget_usd, economy.budget_total_usd) == (None, 10.0)
    back = load_economy(economy_file(tmp_path, "budget_total_usd = 9"), {"budget_usd": 1.0})
    assert (back.budget_usd, back.budget_total_usd) == (1.0, None)
    with pytest.raises(SettingsError, match="not both"):
        load_economy(path, {"budget_total_usd": 10.0, "budget_usd": 1.0})


def test_nothing_is_a_setting_too() -> None:
    assert load_economy(None, {}) == Economy()


def test_settings_do_not_change_under_the_hand() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Economy().value = 3.0


def test_measures() -> None:
    assert Economy().measure == Expectation()
    assert not Economy().needs_losses
    cvar = Economy(risk_measure="cvar", risk_alpha=0.8)
    assert cvar.measure == CVaR(0.8)
    assert cvar.needs_losses


@pytest.mark.parametrize(
    "beliefs", [((0.5, 0.4),), ((1.0,), (0.5, 0.5)), ((float("nan"), 1.0),), ((2.0, -1.0),)]
)
def test_beliefs_must_be_distributions(tmp_path: Path, beliefs: tuple[tuple[float, ...], ...]) -> None:
    rows = ", ".join(str(list(row)) for row in beliefs)
    path = economy_file(tmp_path, f"risk_measure = 'max-min'\nrisk_beliefs = [{rows}]")
    ran = walras("prices", sample_of(tmp_path), "--value", 1, "--settings", path)
    assert (ran.code, ran.out) == (4, "")
    assert "a bug" not in ran.err


def sample_of(folder: Path) -> Path:
    path = folder / "sample.jsonl"
    assert walras("sample", "-o", path, "--tasks", 3).code == 0
    return path


# --- rows ---------------------------------------------------------------------------------------------------------

EVERYBODY = Scope()
ROWS: list[tuple[Economy, Constraint]] = [
    (Economy(budget_usd=0.5), Constraint("budget", 0.5)),
    (Economy(budget_total_usd=50), Constraint("budget", 0.5)),
    (Economy(sla_s=3), Constraint("mean_sla", 3)),
    (Economy(sla_s=3, sla_quantile=0.75), Constraint("quantile_sla", 0.25, seconds=3)),
    (Economy(risk=0.1), Constraint("risk_envelope", 0.1)),
    (Economy(risk=0.1, risk_measure="cvar"), Constraint("risk_envelope", 0.1)),
    (
        Economy(risk=0.1, risk_measure="cvar", risk_over="portfolio"),
        Constraint("portfolio_envelope", 0.1, measure=CVaR(0.95)),
    ),
    (Economy(risk=0.1, risk_over="portfolio"), Constraint("risk_envelope", 0.1)),  # the expectation adds up
    (Economy(tenants={"a": Tenant(budget_usd=2)}), Constraint("budget", 2, Scope(tenant="a"))),
    (Economy(tenants={"a": Tenant(budget_total_usd=2)}), Constraint("budget", 0.2, Scope(tenant="a"))),
    (Economy(classes={"c": TaskClass(sla_s=2)}), Constraint("mean_sla", 2, Scope(task_class="c"))),
    (Economy(classes={"c": TaskClass(risk=2)}), Constraint("risk_envelope", 2, Scope(task_class="c"))),
    (
        Economy(resources={"gpu": Resource(column="gpu_s", limit=4, hard=True)}),
        Constraint("budget", 4, resource="gpu", hard=True),
    ),
]


@pytest.mark.parametrize(("economy", "row"), ROWS)
def test_rows(economy: Economy, row: Constraint) -> None:
    sizes = {EVERYBODY: 100.0, Scope(tenant="a"): 10.0, Scope(task_class="c"): 5.0}
    assert economy.constraints(sizes) == [row]


def test_rows_of_all_tables_together() -> None:
    economy = Economy(
        budget_usd=1,
        sla_s=2,
        risk=3,
        tenants={"a": Tenant(budget_usd=4)},
        classes={"c": TaskClass(budget_usd=5)},
    )
    found = [(row.kind, row.scope, row.bound) for row in economy.constraints({})]
    assert found == [
        ("budget", EVERYBODY, 1),
        ("mean_sla", EVERYBODY, 2),
        ("risk_envelope", EVERYBODY, 3),
        ("budget", Scope(tenant="a"), 4),
        ("budget", Scope(task_class="c"), 5),
    ]


def test_no_settings_no_rows() -> None:
    resource = Resource(column="gpu_s", price_usd=1)
    assert Economy(resources={"gpu": resource}, tenants={"a": Tenant()}).constraints({}) == []
