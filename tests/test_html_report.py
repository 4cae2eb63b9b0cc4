"""The HTML report says what the audit found, loads nothing, and runs nothing that came from a log."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from walras.diagnosis import html, sensitivity
from walras.diagnosis.audit import Audit, audit_log
from walras.diagnosis.case import Case, build_case
from walras.diagnosis.html import html_report, write_html
from walras.diagnosis.html.text import label, summands
from walras.diagnosis.regret import measure_regret, overdrafts
from walras.diagnosis.words import as_declared, number, percent, usd
from walras.equation import DEFER
from walras.errors import OutputError
from walras.market.mix import Mix
from walras.market.shadow import measure_usage
from walras.prices import Price
from walras.quantities import USD
from walras.records import Log, read_log
from walras.risk import FloatArray
from walras.settings import load_economy
from walras.simulate.sample import sample_log, write_sample

LIMITS = {"budget_usd": 0.01, "sla_s": 12, "risk": 0.005}
PLOTLY = "/* plotly.js */"
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "</script><b onclick='alert(3)'>%{x}</b>",
    '<a href="javascript:alert(4)">$\\alpha$</a>',
    "--today" + "]]>" * 30,
)


class Page(HTMLParser):
    """What a browser would see: elements with their attributes, scripts, and text by figure."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.figures: dict[str, dict[str, Any]] = {}
        self.words = ""
        self._inside = self._figure = self._kind = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside, self._kind = tag, dict(attrs).get("type") or ""
        if tag == "figure":
            self._figure = dict(attrs)["id"] or ""

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script" and self._kind == "application/json":
            self.figures[self._figure] = json.loads(data)
        elif self._inside == "script":
            self.scripts.append(data)
        elif self._inside != "style":
            self.words += re.sub(r"\s+", " ", data)

    @property
    def policy(self) -> str:
        metas = (a for tag, a in self.elements if tag == "meta")
        return next(a["content"] or "" for a in metas if a.get("http-equiv") == "Content-Security-Policy")


@pytest.fixture(autouse=True)
def _light(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Plotly's five megabytes only where they matter."""
    if "real_plotly" not in request.fixturenames:
        monkeypatch.setattr(html, "get_plotlyjs", lambda: PLOTLY)


@pytest.fixture
def real_plotly() -> None:
    """Asks for the real bundle."""


def page(audit: Audit) -> Page:
    return Page(html_report(audit, "log.parquet"))


def audited(log: Log, **settings: Any) -> Audit:
    return audit_log(log, load_economy(None, settings))


@pytest.fixture(scope="module", autouse=True)
def _few_resamples() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sensitivity, "RESAMPLES", 6)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="module")
def log(folder: Path) -> Log:
    write_sample(folder / "sample.parquet", 300, 0)
    return read_log([folder / "sample.parquet"], extra=["output_tokens"], losses=True)


@pytest.fixture(scope="module")
def limited(log: Log, _few_resamples: None) -> Audit:
    return audited(log, **LIMITS)


def written(folder: Path, name: str, rows: list[dict[str, Any]]) -> Log:
    pq.write_table(pa.Table.from_pylist(rows), folder / name)
    return read_log([folder / name])


@pytest.fixture(scope="module")
def hostile(folder: Path, _few_resamples: None) -> Audit:
    names = dict(zip(("nano", "small", "medium", "large", "frontier"), HOSTILE, strict=True))
    rows = sample_log(120).drop_columns(["risk_scenarios"]).to_pylist()
    for row in rows:
        row["model"] = names[row["model"]]
        row["tenant"], row["class"] = HOSTILE[1] + row["tenant"], HOSTILE[2] + row["class"]
    audit = audited(
        written(folder, "hostile.parquet", rows),
        tenants={HOSTILE[1] + "support": {"budget_usd": 0.001}},
        **LIMITS,
    )
    return replace(audit, case=replace(audit.case, notes=HOSTILE))


# --- one page, whole, that loads nothing ---------------------------------------------------------------------------


@pytest.mark.usefixtures("real_plotly")
def test_the_page_needs_no_network(limited: Audit, tmp_path: Path) -> None:
    write_html(limited, tmp_path / "report.html", "log.parquet")
    seen = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert not [a for _, a in seen.elements if {"src", "href", "srcset", "data", "action"} & a.keys()]
    assert not {"link", "img", "iframe", "object", "embed", "base"} & {tag for tag, _ in seen.elements}
    assert "default-src 'none'" in seen.policy
    assert "http" not in seen.policy
    style = re.search(r"<style>(.*?)</style>", html_report(limited, "x"), re.S)
    assert style
    assert not re.search(r"url\(|@import|@font-face", style[1])
    # The browser runs a script only if its hash is in the policy: these two, as they stand in the file.
    assert len(seen.scripts) == 2
    for script in seen.scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in seen.policy
    assert "plotly.js v" in seen.scripts[0][:200]


def test_every_colour_is_named_in_light_and_in_dark(limited: Audit) -> None:
    text = html_report(limited, "x")
    light, _, dark = text.partition("prefers-color-scheme: dark")
    used = set(re.findall(r'color":"(--[a-z]+)"', text))
    assert used
    for name in used:
        assert f"{name}:" in light
        assert f"{name}:" in dark


def test_plotly_knows_every_property_of_the_figures(limited: Audit, hostile: Audit) -> None:
    for audit in (limited, hostile):
        for spec in page(audit).figures.values():
            colours = json.loads(re.sub(r'"--[a-z]+"', '"#123456"', json.dumps(spec)))
            go.Figure(colours["data"], colours["layout"])  # raises on one it does not know


# --- the figures' numbers are the audit's ---------------------------------------------------------------------------


def test_figures_and_their_order(limited: Audit) -> None:
    expected = ["budget-curve", "regret-by-value", "regret-by-tenant", "regret-by-class"]
    assert list(page(limited).figures) == [*expected, "choice-shares", "benchmarks"]


def test_the_price_is_the_slope(limited: Audit) -> None:
    traces = {t["name"]: t for t in page(limited).figures["budget-curve"]["data"]}
    curve, objective = limited.curve, limited.clearing.certificate.objective
    assert traces["best possible"]["x"] == curve.budget.tolist()
    assert traces["best possible"]["y"] == curve.surplus.tolist()
    mu = limited.clearing.multipliers[0]
    (x0, x1), (y0, y1) = (traces[f"slope μ_C = {number(mu)}"][axis] for axis in "xy")
    assert (y1 - y0) / (x1 - x0) == pytest.approx(mu)
    assert y0 + mu * (0.01 - x0) == pytest.approx(objective)
    assert (traces["declared budget"]["x"], traces["declared budget"]["y"]) == ([0.01], [objective])


def test_today_and_best_fixed_stand_where_they_are_or_at_the_edge(limited: Audit) -> None:
    traces = {t["name"]: t for t in page(limited).figures["budget-curve"]["data"]}
    fixed = limited.best_fixed
    assert fixed
    cost = limited.case.uses.amount(USD)[:, fixed.use].mean()
    name = f"best fixed: {limited.case.uses.names[fixed.use]}"
    right = max(traces["more buys nothing"]["x"])
    for point, x, y in (
        (traces["today"], limited.realised.cost, limited.realised.surplus.mean),
        (traces[label(name)], cost, fixed.surplus),
    ):
        assert point["x"] == [min(x, right)]
        assert point["y"] == [y]
        assert point["mode"] == ("markers" if x <= right else "markers+text")
        assert usd(x) in point["text"][0]
        assert usd(x) in point["hovertext"][0]


def test_a_sampled_curve_says_so(limited: Audit) -> None:
    assert "sample of" not in page(limited).words
    sampled = replace(limited, curve=replace(limited.curve, sampled=10_000))
    assert "Computed on a sample of 10,000 tasks." in page(sampled).words


def test_regret_by_value_with_its_intervals(limited: Audit) -> None:
    seen = page(limited)
    bars, layout = seen.figures["regret-by-value"]["data"][0], seen.figures["regret-by-value"]["layout"]
    rows = limited.regret.by_value_decile
    assert bars["x"] == [r.regret.mean for r in rows]
    assert layout["yaxis"]["ticktext"] == [f"${r.name}" for r in rows]
    high = np.add(bars["x"], bars["error_x"]["array"])
    low = np.subtract(bars["x"], bars["error_x"]["arrayminus"])
    assert np.allclose(np.column_stack((low, high)), [r.regret.ci for r in rows])
    assert limited.regret.value_correlation is not None
    assert f"Spearman {number(limited.regret.value_correlation)}" in seen.words


@pytest.mark.parametrize("what", ["tenant", "class"])
def test_regret_by_group_largest_first(limited: Audit, what: str) -> None:
    rows = limited.regret.by_tenant if what == "tenant" else limited.regret.by_class
    figure = page(limited).figures[f"regret-by-{what}"]
    ordered = sorted(rows, key=lambda r: -r.total)
    assert figure["data"][0]["x"] == [r.total for r in ordered]
    assert figure["layout"]["yaxis"]["ticktext"] == [r.name for r in ordered]


def test_many_groups_are_summed_up(limited: Audit) -> None:
    rows = tuple(replace(limited.regret.by_class[0], name=f"c{k}", total=float(k)) for k in range(40))
    many = replace(limited, regret=replace(limited.regret, by_class=rows))
    figure = page(many).figures["regret-by-class"]
    assert figure["layout"]["yaxis"]["ticktext"][-1] == "28 others"
    assert sum(figure["data"][0]["x"]) == sum(range(40))


def test_choice_shares(limited: Audit) -> None:
    figure = page(limited).figures["choice-shares"]
    names = figure["layout"]["yaxis"]["ticktext"]
    assert [t["name"] for t in figure["data"]] == ["today", "at declared prices", "at discovered prices"]
    for trace, key in zip(figure["data"], ("chosen", "declared prices", "discovered prices"), strict=True):
        share = dict(zip((*limited.case.uses.names, "no model (deferred)"), limited.shares[key], strict=True))
        assert trace["x"] == pytest.approx([100 * share[name] for name in names])
        assert sum(trace["x"]) == pytest.approx(100)


def test_benchmarks_say_what_is_luck(limited: Audit) -> None:
    dots = {t["name"]: t for t in page(limited).figures["benchmarks"]["data"]}
    fixed, policy = limited.best_fixed, limited.attainable
    assert fixed
    assert policy
    surplus = {
        "today": limited.realised.surplus.mean,
        f"best fixed: {limited.case.uses.names[fixed.use]}": fixed.surplus,
        "attainable": policy.surplus.mean,
        "hindsight, all served": limited.oracle,
        "hindsight, may defer": limited.oracle_with_defer,
    }
    if limited.oracle is None:
        del surplus["hindsight, all served"]
    assert {name: dot["x"][0] for name, dot in dots.items()} == surplus
    assert all(
        ("hindsight" in name) == dot["marker"]["symbol"].endswith("open") for name, dot in dots.items()
    )
    error = dots["attainable"]["error_x"]
    assert policy.surplus.mean + error["array"][0] == pytest.approx(policy.surplus.ci[1])


# --- the accounts add up --------------------------------------------------------------------------------------------

PLENTY = {"budget_usd": 10.0}
ECONOMIES: list[dict[str, Any]] = [
    LIMITS,
    PLENTY,
    {"sla_s": 8, "lambda0": 0.001},
    {"sla_s": 12, "sla_quantile": 0.9, "budget_usd": 0.02},
    {"tenants": {"engineering": {"budget_usd": 0.01, "sla_s": 10}}, "classes": {"transfer": {"risk": 0.02}}},
    {"resources": {"tokens": {"column": "output_tokens", "limit": 300, "price_usd": 1e-6}}},
    {"risk": 0.01, "risk_measure": "cvar", "risk_alpha": 0.9, "risk_over": "portfolio"},
    {"risk": 0.01, "risk_measure": "cvar", "risk_alpha": 0.9, "risk_over": "use"},
]


@pytest.mark.parametrize("settings", ECONOMIES)
@pytest.mark.parametrize("unserved", [0, 40])
def test_regret_is_surplus_not_earned_plus_limits_overdrawn(
    log: Log, settings: dict[str, Any], unserved: int
) -> None:
    case = build_case(log, load_economy(None, settings))
    clearing = case.clear()
    chosen = case.chosen.copy()
    chosen[:unserved] = DEFER
    case = replace(case, chosen=chosen)
    regret = measure_regret(case, clearing.prices)
    charged = sum(_charged(case, price) for price in clearing.prices.discovered)
    realised = (regret.net + charged).mean()  # surplus at declared prices alone
    parts = overdrafts(case, clearing.prices)
    assert clearing.certificate.objective - realised + sum(parts) == pytest.approx(
        regret.overall.mean, abs=1e-9
    )
    # The same from what people read: used and bound, an SLA's per served task, a scope's per task inside it.
    for part, price in zip(parts, clearing.prices.discovered, strict=True):
        c = price.constraint
        if c.kind == "portfolio_envelope":
            continue
        used = measure_usage(case.tasks, case.uses, c, Mix.pure(chosen))
        members = c.scope.members(case.tasks)
        weight = (1.0 if members is None else members.mean()) * (
            used.service_rate if c.layer == "latency" else 1
        )
        assert part == pytest.approx(price.multiplier * (used.used - c.bound) * weight, abs=1e-12)
    assert any(parts) == (settings is not PLENTY)


def _charged(case: Case, price: Price) -> FloatArray:
    """μ·charge of each task's audited choice, written out."""
    c, n = price.constraint, len(case.tasks)
    served = case.chosen != DEFER
    per_use = c.charge(case.uses)[np.arange(n), np.maximum(case.chosen, 0)]
    members = c.scope.members(case.tasks)
    inside = served if members is None else served & members
    charged: FloatArray = price.multiplier * np.where(inside, per_use, 0.0)
    return charged


def test_the_accounts_are_on_the_page(limited: Audit) -> None:
    words = page(limited).words
    cells = [limited.clearing.certificate.objective, -limited.realised.surplus.mean]
    cells += overdrafts(limited.case, limited.clearing.prices)
    for text in summands([*cells, limited.regret.overall.mean]):
        assert text in words
    chosen = limited.regret.chosen
    means = [float(t.mean()) for t in (chosen.value, -chosen.compute, -chosen.latency, -chosen.risk)]
    for text in summands([*means, sum(means)]):
        assert text in words


def test_breaking_an_absolute_rule_is_accounted_for(log: Log) -> None:
    assert "breaking an absolute rule" not in page(audited(log, **LIMITS)).words
    ruled = audited(log, tenants={"engineering": {"forbidden_models": ["frontier"]}})
    assert "breaking an absolute rule" in page(ruled).words


# --- words ----------------------------------------------------------------------------------------------------------


def test_the_answer_comes_first(limited: Audit) -> None:
    words = page(limited).words
    mean, total = limited.regret.overall.mean, float(limited.regret.per_task.sum())
    assert f"Today’s choices lost {usd(mean)} per task, {usd(total)} over 300 tasks." in words
    assert "SYNTHETIC LOG" in words[:200]
    headings = [
        "What each limit is worth",
        "The changes worth most",
        "What more budget would buy",
        "Where it was lost",
        "Who gets which model",
        "How good could it get",
        "What a task gives and takes",
        "If the inputs are wrong",
        "Why to believe it",
    ]
    places = [words.index(text) for text in headings]
    assert places == sorted(places)


def test_prices_in_words(limited: Audit) -> None:
    words = page(limited).words
    for usage, today in zip(limited.clearing.usage, limited.realised.usage, strict=True):
        assert number(usage.multiplier) in words
        assert number(today.used) in words
        if usage.constraint.layer == "latency":
            assert f"{percent(usage.service_rate)} served" in words
    assert f"one more dollar of budget buys {usd(limited.clearing.multipliers[0])} of net surplus" in words
    assert "Declared by you, not discovered" in words


def test_a_slack_limit_costs_nothing(log: Log) -> None:
    words = page(audited(log, **PLENTY)).words
    assert "not binding: costs nothing" in words
    assert "so its price is 0" in words


def test_an_unknown_interval_says_so(limited: Audit) -> None:
    unsure = replace(limited, intervals=((0.0, np.inf), *limited.intervals[1:]))
    words = page(unsure).words
    assert "interval unknown" in words
    assert "inf" not in re.sub(r"inf[eo]|infl", "", words)


def test_every_scenario_is_listed(limited: Audit) -> None:
    words = page(limited).words
    for scenario in limited.scenarios:
        assert scenario.name in words
        assert usd(scenario.surplus) in words
        assert usd(scenario.regret) in words


# --- other logs -----------------------------------------------------------------------------------------------------


def test_no_limits_at_all(log: Log) -> None:
    seen = page(audited(log))
    assert "No limit is declared" in seen.words
    assert "the slope is what one would have" in seen.words
    assert not [t for t in seen.figures["budget-curve"]["data"] if "slope" in t["name"]]


def test_nothing_lost(folder: Path) -> None:
    rows = [
        {"request_id": f"r{k}", "model": m, "quality": q, "cost_usd": c, "chosen": m == "a"}
        for k in range(30)
        for m, q, c in (("a", 1.0, 0.01), ("b", 0.5, 0.02))
    ]
    seen = page(audited(written(folder, "zero.parquet", rows), value=1.0))
    assert "Today’s choices lost nothing: each of 30 tasks got its best use." in seen.words
    assert "Every task has the same value ($1.00)" in seen.words
    assert "regret-by-value" not in seen.figures
    low, high = seen.figures["benchmarks"]["layout"]["xaxis"]["range"]
    assert high - low > 0.01  # equal dots do not make the axis collapse


def test_a_production_log_gives_a_lower_bound(folder: Path) -> None:
    table = sample_log(200)
    rows = table.filter(table["chosen"]).drop_columns(["chosen", "risk_scenarios"])
    seen = page(audited(written(folder, "production.parquet", rows.to_pylist()), budget_usd=0.05))
    assert "lost at least" in seen.words
    assert "the loss is a lower bound" in seen.words
    assert "attainable" not in [t["name"] for t in seen.figures["benchmarks"]["data"]]
    assert "synthetic" not in seen.words


def test_one_model_for_every_task(log: Log) -> None:
    seen = page(audited(log, baseline="medium", **LIMITS))
    assert "Sending every task to medium loses" in seen.words
    assert "used with all on medium" in seen.words
    assert seen.figures["choice-shares"]["data"][0]["name"] == "all on medium"


def test_earning_more_by_breaking_limits_is_no_praise(log: Log) -> None:
    words = page(audited(log, baseline="frontier", budget_usd=0.0005)).words
    assert "more is earned than your limits allow" in words


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("swebench_verified_mini", {"value": 5, "budget_usd": 0.05}),
        ("swebench_verified_mini", {"value": 5}),
        ("routerbench_subset", {"value": 0.01}),
    ],
)
def test_real_logs(name: str, settings: dict[str, Any]) -> None:
    audit = audited(read_log([Path(os.environ["WALRAS_DATA"]) / "routing" / f"{name}.parquet"]), **settings)
    seen = page(audit)
    assert f"{usd(audit.regret.overall.mean)} per task" in seen.words
    assert "e-0" not in seen.words.partition("Certificate")[0]  # tiny costs are written out
    assert "synthetic" not in seen.words


# --- hostile names --------------------------------------------------------------------------------------------------


def test_names_from_logs_are_inert(hostile: Audit) -> None:
    clean = page(replace(hostile, case=replace(hostile.case, notes=("plain",) * len(HOSTILE))))
    seen = Page(html_report(hostile, HOSTILE[0] + HOSTILE[1]))
    own = {
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "main",
        "header",
        "h1",
        "h2",
        "h3",
        "p",
        "ul",
        "li",
    }
    own |= {"b", "i", "em", "strong", "small", "span", "section", "table", "thead", "tbody", "tr", "th", "td"}
    own |= {"figure", "figcaption", "div", "details", "summary", "script", "noscript", "footer"}
    assert {tag for tag, _ in seen.elements} <= own
    assert [tag for tag, _ in seen.elements] == [tag for tag, _ in clean.elements]
    assert not [a for _, a in seen.elements if any(key.startswith("on") for key in a)]
    assert seen.scripts == clean.scripts
    for name in HOSTILE:
        assert name in seen.words  # and yet they can be read


def test_names_in_figures_are_text_to_plotly(hostile: Audit) -> None:
    for spec in page(hostile).figures.values():
        for text in _strings(spec):
            assert "<" not in text
            assert ">" not in text
        assert not [key for key in _keys(spec) if "template" in key]  # %{…} is read nowhere


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _strings(item)


def _keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _keys(item)


# --- writing --------------------------------------------------------------------------------------------------------


def test_a_report_has_the_permissions_of_any_new_file(limited: Audit, tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    write_html(limited, tmp_path / "r.html", "x")
    assert (tmp_path / "r.html").stat().st_mode == (tmp_path / "other").stat().st_mode
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "r.html"]
    assert (tmp_path / "r.html").read_text(encoding="utf-8") == html_report(limited, "x")


def test_a_failed_write_leaves_what_was_there(
    limited: Audit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "r.html"
    target.write_text("before")

    def full(self: Path, other: Path) -> None:
        assert self.exists()  # the page had been written beside the target
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OutputError, match=r"r\.html: cannot be written: No space left on device"):
        write_html(limited, target, "x")
    assert list(tmp_path.iterdir()) == [target]
    assert target.read_text() == "before"


def test_no_folder_no_file(limited: Audit, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"absent.*r\.html: cannot be written: No such file"):
        write_html(limited, tmp_path / "absent" / "r.html", "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="folder: cannot be written"):
        write_html(limited, tmp_path / "folder", "x")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


# --- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (0, "$0"),
        (1e-14, "$0"),
        (3.3e-7, "$3.30e-07"),
        (0.000329, "$0.000329"),
        (0.042, "$0.0420"),
        (-0.1629, "−$0.163"),
        (3.6425, "$3.64"),
        (42.1, "$42.10"),
        (999.9, "$1,000"),
        (1234.4, "$1,234"),
    ],
)
def test_dollars(x: float, text: str) -> None:
    assert usd(x) == text


def test_numbers() -> None:
    assert [number(x) for x in (0, 11.2209, -0.5, 480_726.9, np.inf)] == [
        "0",
        "11.2",
        "−0.500",
        "480,727",
        "unknown",
    ]
    assert [as_declared(x) for x in (0, 15.0, 0.0125, 1e-5, 2e6)] == [
        "0",
        "15",
        "0.0125",
        "0.0000100",
        "2,000,000",
    ]
    assert [percent(x) for x in (0, 1, 0.004, 0.9996, 0.5, 1e-7, 7.2)] == [
        "0%", "100%", "0.4%", "99.96%", "50%", "<0.01%", "720%",
    ]  # fmt: skip


def test_summands_can_be_added_by_eye() -> None:
    texts = summands([3.64253, -2.95452, -0.16298, 0.52503])
    assert texts == ["$3.6425", "−$2.9545", "−$0.1630", "$0.5250"]
    assert summands([0.99, -0.99, 0.0])[-1] == "$0.00000"
