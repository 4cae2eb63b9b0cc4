"""The page of an evaluation says what was found, for whatever a log can tell, loads nothing, and runs nothing from a log."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
from scipy.stats import binomtest

from logs import walras
from test_html_report import HOSTILE, PLOTLY, Page
from walras.diagnosis import html
from walras.diagnosis.evaluate import BINS, Calibration, Evaluation, Halves, Spread
from walras.diagnosis.html import html_evaluation, write_evaluation
from walras.diagnosis.html.evaluation_figures import give_or_take, wilson
from walras.diagnosis.html.plot import ATTAINABLE, BARS, REFERENCE
from walras.diagnosis.html.text import label
from walras.diagnosis.regret import Mean
from walras.diagnosis.words import interval, number, percent, usd
from walras.errors import OutputError
from walras.estimate.off_policy import Logged, OffPolicy, compare, evaluate_policy
from walras.risk import FloatArray
from walras.simulate import write_sample

MODELS = ("cheap", "middling", "dear")


@pytest.fixture(autouse=True)
def _light(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Plotly's five megabytes only where they matter."""
    if "real_plotly" not in request.fixturenames:
        monkeypatch.setattr(html, "get_plotlyjs", lambda: PLOTLY)


@pytest.fixture
def real_plotly() -> None:
    """Asks for the real bundle."""


def halves(router: float, by_class: float, seed: int, splits: int = 4) -> Halves:
    """Policies that close about these shares of a gap of $0.20 above $0.50, with some noise."""
    rng = np.random.default_rng(seed)
    fixed = 0.5 + 0.01 * rng.standard_normal(splits)

    def closing(share: float) -> Spread:
        return Spread(fixed + 0.2 * (share + 0.01 * rng.standard_normal(splits)))

    return Halves(
        policy=closing(router),
        category_mean=closing(by_class),
        fixed=Spread(fixed - 0.02),
        best_fixed=Spread(fixed),
        oracle=Spread(fixed + 0.2),
        ceiling=Spread(0.6 + 0.02 * rng.standard_normal(splits)),
    )


def calibration(splits: int = 4, each: int = 300) -> Calibration:
    """Nine bins with outcomes and one without."""
    count = each * np.arange(BINS)
    predicted = np.where(count > 0, (np.arange(BINS) + 0.5) / BINS, np.nan)
    shares = {0.8: 0.79, 0.9: 0.93}
    rng = np.random.default_rng(5)
    return Calibration(
        error=Spread(0.021 + 0.001 * rng.standard_normal(splits)),
        predicted=predicted,
        observed=predicted + 0.03,
        count=count,
        coverage={k: Spread(v + 0.01 * rng.standard_normal(splits)) for k, v in shares.items()},
    )


def logged_choices() -> tuple[Logged, FloatArray, FloatArray]:
    """A log that explores, a policy that always takes the last model, and a model of rewards."""
    rng = np.random.default_rng(0)
    p = np.tile([0.5, 0.3, 0.2], (600, 1))
    action = rng.choice(3, 600, p=p[0])
    reward = np.array([0.2, 0.4, 0.7])[action] + 0.1 * rng.standard_normal(600)
    model = np.tile([0.25, 0.35, 0.6], (600, 1))
    policy = np.zeros((600, 3))
    policy[:, 2] = 1.0
    return Logged(action, p[np.arange(600), action], reward, p), policy, model


@pytest.fixture(scope="module")
def complete() -> Evaluation:
    """A log that knows every outcome and has propensities: nothing is missing."""
    logs = logged_choices()
    return Evaluation(
        tasks=900,
        models=MODELS,
        classes=2,
        left_out=14,
        synthetic=False,
        halves=halves(0.4, 0.3, 1),
        apart=halves(0.3, 0.3, 2),
        near_duplicates=0.22,
        regret=Mean(0.0123, (0.0111, 0.0145)),
        picks=dict(zip(MODELS, (0.25, 0.0, 0.75), strict=True)),
        calibration=calibration(),
        off_policy=evaluate_policy(*logs),
        gain=compare(*logs),
        notes=("a note of the reader",),
    )


@pytest.fixture(scope="module")
def production(complete: Evaluation) -> Evaluation:
    """Only the chosen model's outcomes are known."""
    return replace(complete, halves=None, apart=None, regret=None, near_duplicates=float("nan"), left_out=0)


def page(found: Evaluation) -> Page:
    return Page(html_evaluation(found, "evaluation of log.parquet"))


def traces(found: Evaluation, figure: str) -> list[dict[str, Any]]:
    data: list[dict[str, Any]] = page(found).figures[figure]["data"]
    return data


# --- the answer -----------------------------------------------------------------------------------------------------


def test_the_answer_comes_first(complete: Evaluation) -> None:
    seen = page(complete)
    assert complete.halves
    ours = complete.halves.closed(complete.halves.policy)
    lead = Spread(ours.by_seed - complete.halves.closed(complete.halves.category_mean).by_seed)
    fixed = complete.halves.policy.by_seed - complete.halves.fixed.by_seed
    assert (
        f"A router learned from this log beats class means ({give_or_take(lead, 100, ' points')} of the gap) and beats one "
        f"model for all ({usd(fixed.mean())} ± {usd(fixed.std(ddof=1))} per task)"
    ) in seen.words
    assert seen.words.index("A router learned") < 200
    assert f"the router closes {give_or_take(ours, 100, '%')}" in seen.words
    order = ["gap-closed", "calibration", "coverage", "picks", "off-policy"]
    assert list(seen.figures) == order
    headings = [
        "Share of the gap",
        "Predicted against observed",
        "Which model",
        "Against the best use",
        "Overlap",
        "Notes on",
    ]
    places = [seen.words.index(text) for text in headings]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("router", "said"),
    [(0.5, "beats class means"), (0.1, "loses to class means"), (0.3, "is level with class means")],
)
def test_no_difference_is_claimed_that_the_splits_do_not_show(
    complete: Evaluation, router: float, said: str
) -> None:
    found = replace(complete, halves=halves(router, 0.3, 2), apart=None)
    assert f"A router learned from this log {said} (" in page(found).words


def test_a_lead_that_only_repeated_prompts_give_is_said_in_the_answer(complete: Evaluation) -> None:
    words = page(complete).words
    assert "; on prompts unlike any it has seen, it is level with class means." in words
    assert "22% of the requests have a near-duplicate" in words
    assert "unlike any it has seen" not in page(replace(complete, apart=halves(0.4, 0.3, 3))).words


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ((0.1, 0.3), "earns more than the logged choices"),
        ((-0.3, -0.1), "earns less than the logged choices"),
        ((-0.1, 0.3), "is not shown to earn more than the logged choices"),
    ],
)
def test_a_production_log_is_answered_by_its_propensities(
    production: Evaluation, ends: tuple[float, float], said: str
) -> None:
    assert production.gain
    gain = replace(production.gain, value=sum(ends) / 2, interval=ends)
    words = page(replace(production, gain=gain)).words
    assert (
        f"A router learned from this log {said}: {usd(gain.value)} per task (95% interval {interval(ends)})."
        in words
    )


def test_a_synthetic_log_says_so(complete: Evaluation) -> None:
    assert "SYNTHETIC LOG" not in page(complete).words
    words = page(replace(complete, synthetic=True)).words
    assert "SYNTHETIC LOG" in words[:200]
    assert "nobody asked these questions" in words


# --- gap closed -----------------------------------------------------------------------------------------------------


def test_every_split_is_a_dot_and_near_duplicates_stand_beside(complete: Evaluation) -> None:
    data = traces(complete, "gap-closed")
    for half, hollow in ((complete.halves, False), (complete.apart, True)):
        assert half
        ours, by_class = half.closed(half.policy).by_seed, half.closed(half.category_mean).by_seed
        shares = (ours, by_class, half.ceiling.by_seed, ours - by_class)
        dots = [t for t in data if t["marker"]["symbol"] == ("circle-open" if hollow else "circle")]
        assert [t["x"] for t in dots] == [pytest.approx(100 * share) for share in shares]
        assert [t["showlegend"] for t in dots[1:]] == [False] * 3
    means = [t for t in data if t["marker"]["symbol"] == "line-ns-open"]
    assert complete.halves
    spread = complete.halves.closed(complete.halves.policy)
    assert means[0]["x"] == [pytest.approx(100 * spread.mean)]
    assert (
        means[0]["error_x"]["array"] == means[0]["error_x"]["arrayminus"] == [pytest.approx(100 * spread.sd)]
    )
    rows = {t["y"][0] for t in data}
    assert len(rows) == 8  # four policies, each beside itself


def test_every_policy_is_in_the_table_with_its_error(complete: Evaluation) -> None:
    words, found = page(complete).words, complete.halves
    assert found
    for policy in (found.policy, found.category_mean, found.fixed, found.best_fixed, found.oracle):
        assert f"{usd(policy.mean)} ± {usd(policy.sd)}" in words
        assert give_or_take(found.closed(policy), 100, "%") in words
    assert give_or_take(found.ceiling, 100, "%") in words


def test_without_near_duplicates_nothing_is_beside(complete: Evaluation) -> None:
    seen = page(replace(complete, apart=None, near_duplicates=0.0))
    figure = seen.figures["gap-closed"]
    assert {t["y"][0] for t in figure["data"]} == {0, 1, 2, 3}
    assert not figure["layout"]["showlegend"]
    assert "near-duplicates kept in one half" not in seen.words
    assert "No near-duplicate prompts were found" in seen.words


def test_one_split_has_no_spread(complete: Evaluation) -> None:
    one = replace(complete, halves=halves(0.4, 0.3, 1, splits=1), apart=None, calibration=calibration(1))
    seen = page(one)
    for name in ("gap-closed", "coverage"):
        assert not [t for t in seen.figures[name]["data"] if "error_x" in t]
    assert "nan" not in seen.words
    assert "After ± stands one standard deviation over 1 split." in seen.words


# --- calibration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("right", "n"), [(0, 7), (3, 7), (7, 7), (412, 500)])
def test_wilson_is_the_textbooks(right: int, n: int) -> None:
    """Against scipy's, for one bin of one split."""
    count, observed = np.zeros(BINS, dtype=np.int64), np.full(BINS, np.nan)
    count[4], observed[4] = n, right / n
    low, high = wilson(replace(calibration(), count=count, observed=observed), distinct=10_000)
    ours, known = (low[4], high[4]), binomtest(right, n).proportion_ci(method="wilson")
    assert ours == pytest.approx((known.low, known.high), abs=1e-12)
    assert np.isnan(np.delete(low, 4)).all()


def test_outcomes_that_splits_share_count_once() -> None:
    once = calibration()
    often = replace(once, count=5 * once.count)
    everything = int(once.count.sum())
    for ours, pooled in zip(wilson(once, everything), wilson(often, everything), strict=True):
        assert ours == pytest.approx(pooled, nan_ok=True)
    narrow = wilson(often, 5 * everything)
    assert narrow[1][5] - narrow[0][5] < 0.5 * (
        wilson(once, everything)[1][5] - wilson(once, everything)[0][5]
    )


def test_calibration_plot(complete: Evaluation) -> None:
    bins, (diagonal, bubbles, dots) = complete.calibration, traces(complete, "calibration")
    seen = bins.count > 0
    assert (diagonal["x"], diagonal["y"]) == ([0, 1], [0, 1])
    for trace in (bubbles, dots):
        assert trace["x"] == pytest.approx(bins.predicted[seen])
        assert trace["y"] == pytest.approx(bins.observed[seen])
    assert bubbles["marker"]["sizemode"] == "area"
    assert bubbles["marker"]["size"] == bins.count[seen].tolist()
    low, high = wilson(bins, complete.tasks * len(complete.models))
    assert np.add(dots["y"], dots["error_y"]["array"]) == pytest.approx(high[seen])
    assert np.subtract(dots["y"], dots["error_y"]["arrayminus"]) == pytest.approx(low[seen])
    layout = page(complete).figures["calibration"]["layout"]
    assert layout["yaxis"]["scaleanchor"] == "x"  # the diagonal is one
    assert "expected calibration error" in page(complete).words
    assert number(bins.error.mean) in page(complete).words


def test_coverage_against_nominal(complete: Evaluation) -> None:
    data = traces(complete, "coverage")
    for k, (level, share) in enumerate(complete.calibration.coverage.items()):
        dots, mean = data[2 * k : 2 * k + 2]
        assert dots["x"] == pytest.approx(100 * (share.by_seed - level))
        assert mean["x"] == [pytest.approx(100 * (share.mean - level))]
    layout = page(complete).figures["coverage"]["layout"]
    assert layout["yaxis"]["ticktext"] == ["80%", "90%"]
    low, high = layout["xaxis"]["range"]
    assert low == -high
    assert high > max(abs(x) for t in data for x in t["x"])
    held = [f"{share.mean:.1%}" for share in complete.calibration.coverage.values()]
    assert (
        f"Intervals meant to hold 80% and 90% of the outcomes hold {held[0]} and {held[1]}."
        in page(complete).words
    )


# --- picks, regret, off policy --------------------------------------------------------------------------------------


def test_picks_largest_first(complete: Evaluation) -> None:
    seen = page(complete)
    figure = seen.figures["picks"]
    assert figure["layout"]["yaxis"]["ticktext"] == ["dear", "cheap"]
    assert figure["data"][0]["x"] == [75.0, 25.0]
    assert "Never picked: 1 of 3 models." in seen.words
    many = replace(complete, picks={f"m{k}": (k + 1) / 210 for k in range(20)})
    figure = page(many).figures["picks"]
    assert figure["layout"]["yaxis"]["ticktext"][-1] == f"{20 - BARS} other models"
    assert sum(figure["data"][0]["x"]) == pytest.approx(100)
    assert percent(1 / 210) in page(many).words  # the table has all


def test_regret_with_its_interval(complete: Evaluation) -> None:
    assert complete.regret
    words = page(complete).words
    assert (
        f"leaves {usd(complete.regret.mean)} per task (95% interval {interval(complete.regret.ci)})" in words
    )


def test_off_policy_with_its_intervals(production: Evaluation) -> None:
    policy = production.off_policy
    assert policy
    seen = page(production)
    data = seen.figures["off-policy"]["data"]
    assert seen.figures["off-policy"]["layout"]["yaxis"]["ticktext"] == ["IPS", "SNIPS", "DR", "switch-DR"]
    for trace, (key, estimate) in zip(data, policy.estimates.items(), strict=True):
        assert trace["x"] == [estimate.value]
        assert estimate.value + trace["error_x"]["array"][0] == pytest.approx(estimate.interval[1])
        assert estimate.value - trace["error_x"]["arrayminus"][0] == pytest.approx(estimate.interval[0])
        assert trace["marker"]["color"] == (ATTAINABLE if key == policy.recommended else REFERENCE)
        assert usd(estimate.se) in seen.words
    overlap = policy.overlap
    assert f"{number(overlap.ess)} of 600" in seen.words
    assert number(overlap.max_weight) in seen.words
    assert policy.reason[1:] in seen.words


def test_estimates_stand_beside_what_is_known(complete: Evaluation) -> None:
    assert complete.halves
    exact = traces(complete, "off-policy")[-1]
    assert (exact["name"], exact["x"]) == ("exact", [complete.halves.policy.mean])


def test_wrong_propensities_are_pointed_at(production: Evaluation) -> None:
    assert production.off_policy
    doubt = "the propensities are wrong"
    assert doubt not in page(production).words
    overlap = replace(production.off_policy.overlap, mean_weight=1.4, mean_weight_z=5.0)
    wrong: OffPolicy = replace(production.off_policy, overlap=overlap)
    assert doubt in page(replace(production, off_policy=wrong)).words
    silent = replace(wrong, overlap=replace(overlap, expected_ess=None))
    assert "the same, expected" not in page(replace(production, off_policy=silent)).words


# --- what a log cannot tell -----------------------------------------------------------------------------------------


def test_a_production_log_has_no_regret_and_no_gap(production: Evaluation) -> None:
    seen = page(production)
    assert list(seen.figures) == ["calibration", "coverage", "picks", "off-policy"]
    assert "Unknown: only what the chosen model gave is in the log" in seen.words
    assert "nan" not in seen.words


def test_no_propensities_no_off_policy(complete: Evaluation) -> None:
    seen = page(replace(complete, off_policy=None, gain=None))
    assert "off-policy" not in seen.figures
    assert "logged choices" not in seen.words


def test_nothing_known_says_so(production: Evaluation) -> None:
    words = page(replace(production, off_policy=None, gain=None)).words
    assert "This log does not say whether a learned router would help." in words


def test_notes_and_what_was_left_out(complete: Evaluation) -> None:
    words = page(complete).words
    assert "a note of the reader" in words
    assert "14 requests left out: not every model’s outcome is known" in words
    assert "left out" not in page(replace(complete, left_out=0)).words


# --- one page that loads nothing, and runs nothing from a log -------------------------------------------------------


@pytest.mark.usefixtures("real_plotly")
def test_the_page_needs_no_network(complete: Evaluation, tmp_path: Path) -> None:
    write_evaluation(complete, tmp_path / "e.html", "evaluation of log.parquet")
    text = (tmp_path / "e.html").read_text(encoding="utf-8")
    seen = Page(text)
    assert "<title>Walras evaluation of log.parquet</title>" in text
    assert not [a for _, a in seen.elements if {"src", "href", "srcset", "data", "action"} & a.keys()]
    assert not {"link", "img", "iframe", "object", "embed", "base"} & {tag for tag, _ in seen.elements}
    assert "default-src 'none'" in seen.policy
    assert "http" not in seen.policy
    # The browser runs a script only if its hash is in the policy: these two, as they stand in the file.
    assert len(seen.scripts) == 2
    for script in seen.scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in seen.policy


def test_every_figure_says_what_it_shows(complete: Evaluation) -> None:
    seen = page(complete)
    plots = [a for _, a in seen.elements if a.get("class") == "plot"]
    assert len(plots) == len(seen.figures)
    for plot in plots:
        assert plot["role"] == "img"
        assert plot["aria-label"]
        assert plot["aria-label"] in seen.words  # as its heading too
    units = {name: spec["layout"]["xaxis"]["title"]["text"] for name, spec in seen.figures.items()}
    assert units == {
        "gap-closed": "gap closed, %",
        "calibration": "predicted quality q̂",
        "coverage": "coverage less nominal, points",
        "picks": "share of held-out requests, %",
        "off-policy": "net surplus, USD per task",
    }


def test_every_colour_is_named_in_light_and_in_dark(complete: Evaluation) -> None:
    text = html_evaluation(complete, "x")
    light, _, dark = text.partition("prefers-color-scheme: dark")
    used = set(re.findall(r'color":"(--[a-z]+)"', text))
    assert {ATTAINABLE, REFERENCE} < used
    for name in used:
        assert f"{name}:" in light
        assert f"{name}:" in dark


def hostile(found: Evaluation) -> Evaluation:
    picks = dict(zip(HOSTILE, (0.4, 0.3, 0.1, 0.1, 0.1), strict=True))
    assert found.off_policy
    policy = replace(found.off_policy, reason=HOSTILE[0])
    return replace(found, models=HOSTILE, picks=picks, notes=HOSTILE, off_policy=policy)


def test_plotly_knows_every_property_of_the_figures(complete: Evaluation, production: Evaluation) -> None:
    for found in (complete, hostile(complete), production):
        for spec in page(found).figures.values():
            colours = json.loads(re.sub(r'"--[a-z]+"', '"#123456"', json.dumps(spec)))
            go.Figure(colours["data"], colours["layout"])  # raises on one it does not know


def test_names_from_logs_are_inert(complete: Evaluation) -> None:
    clean = page(
        replace(
            hostile(complete),
            picks=dict.fromkeys("abcde", 0.2),
            notes=tuple("abcde"),
            off_policy=complete.off_policy,
        )
    )
    seen = Page(html_evaluation(hostile(complete), HOSTILE[0] + HOSTILE[1]))
    assert [tag for tag, _ in seen.elements] == [tag for tag, _ in clean.elements]
    assert not [a for _, a in seen.elements if any(key.startswith("on") for key in a)]
    assert seen.scripts == clean.scripts
    for name in HOSTILE:
        assert name in seen.words  # and yet they can be read
    figure = seen.figures["picks"]
    assert figure["layout"]["yaxis"]["ticktext"] == [label(name) for name in HOSTILE]
    for text in (*figure["layout"]["yaxis"]["ticktext"], *figure["data"][0]["hovertext"]):
        assert "<" not in text
        assert ">" not in text


# --- writing --------------------------------------------------------------------------------------------------------


def test_a_failed_write_leaves_what_was_there(
    complete: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "e.html"
    target.write_text("before")

    def full(self: Path, other: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OutputError, match=r"e\.html: cannot be written: No space left on device"):
        write_evaluation(complete, target, "x")
    assert list(tmp_path.iterdir()) == [target]
    assert target.read_text() == "before"


def test_the_command_writes_the_page_of_what_it_prints(tmp_path: Path) -> None:
    write_sample(tmp_path / "s.parquet", 200, 0)
    ran = walras("evaluate", tmp_path / "s.parquet", "--seeds", 2, "--json", "--html", tmp_path / "e.html")
    found = ran.data
    seen = Page((tmp_path / "e.html").read_text(encoding="utf-8"))
    assert "Walras evaluation of s.parquet · 200 tasks × 5 models" in seen.words
    dots = seen.figures["gap-closed"]["data"][0]["x"]
    assert len(dots) == 2
    assert np.mean(dots) == pytest.approx(100 * found["gap_closed"]["mean"])
    assert usd(found["regret"]["mean"]) in seen.words
    assert "SYNTHETIC LOG" in seen.words
