"""How much a use takes: pooled where little is known, the data's own where much is, and honest about the tail."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from scipy.stats import norm

from walras.errors import QuantityError, RecordError
from walras.estimate import artefact
from walras.estimate.price_table import load_price_table
from walras.estimate.usage import UsageModel, cost_from_tokens, equal_slices

if TYPE_CHECKING:
    from conftest import DataDir

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
seeds = st.integers(0, 2**32 - 1)
LEVELS = np.array([0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99])
UNSEEN = np.array([-1])


def draw(
    rng: np.random.Generator, n: int, effects: Floats, noise: float = 0.5, models: int = 2, known: float = 1.0
) -> tuple[Floats, Ints]:
    """Lognormal amounts with the class means exp(`effects`), (n, models), and classes (n,)."""
    classes = rng.integers(0, len(effects), n)
    amount = np.exp(effects[classes, None] + noise * rng.normal(size=(n, models)) - noise**2 / 2)
    amount[rng.random(amount.shape) > known] = np.nan
    amount[0] = 1.0
    return amount, classes


# --- pooling ------------------------------------------------------------------------------------------------------------


def test_much_data_has_the_last_word() -> None:
    amount, classes = draw(np.random.default_rng(0), 60_000, np.array([0.0, 0.5, 2.0]))
    mean, se = UsageModel.fit(amount, classes, 3).predict(np.arange(3))
    own = np.stack([amount[classes == c].mean(axis=0) for c in range(3)])
    assert_allclose(mean, own, rtol=2e-3)
    assert (se < 0.02 * mean).all()


def test_classes_that_say_nothing_get_the_pool() -> None:
    amount, classes = draw(np.random.default_rng(1), 200, np.zeros(8))
    mean, _ = UsageModel.fit(amount, classes, 9).predict(np.append(np.arange(9), -1))
    assert_allclose(mean, np.tile(amount.mean(axis=0), (10, 1)), rtol=1e-12)


@given(
    seed=seeds,
    n=st.integers(1, 60),
    spread=st.sampled_from([0.0, 0.3, 2.0]),
    known=st.sampled_from([1.0, 0.6]),
)
def test_a_mean_lies_between_its_class_and_the_pool(seed: int, n: int, spread: float, known: float) -> None:
    rng = np.random.default_rng(seed)
    amount, classes = draw(rng, n, spread * rng.normal(size=5), known=known)
    mean, se = UsageModel.fit(amount, classes, 5).predict(np.arange(5))
    pool = np.nanmean(amount, axis=0)
    for c in range(5):
        for i in range(2):
            rows = amount[classes == c, i]
            rows = rows[~np.isnan(rows)]
            own = rows.mean() if rows.size else pool[i]
            low, high = sorted((max(own, np.nanmin(amount[:, i])), pool[i]))
            assert low - 1e-9 <= mean[c, i] <= high + 1e-9
    assert (se > 0).all()
    assert np.isfinite(se).all()


def test_one_wild_row_does_not_make_a_class() -> None:
    rng = np.random.default_rng(2)
    amount, classes = draw(rng, 400, np.zeros(20), noise=1.0)
    classes[classes == 7] = 8
    classes[:1], amount[0] = 7, 40.0
    mean, _ = UsageModel.fit(amount, classes, 20).predict(np.array([7]))
    assert (mean < 2.5).all()


def test_errors_are_as_large_as_the_errors_are() -> None:
    score, unseen = [], []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        effects = 0.4 * rng.normal(size=40)
        amount, classes = draw(rng, 400, effects, models=1)
        mean, se = UsageModel.fit(amount, classes, 40).predict(np.append(np.arange(40), -1))
        score.append((mean[:-1, 0] - np.exp(effects)) / se[:-1, 0])
        unseen.append((mean[-1, 0] - np.exp(0.4 * rng.normal())) / se[-1, 0])
    assert 0.8 < np.sqrt(np.mean(np.square(score))) < 1.25
    assert 0.7 < np.sqrt(np.mean(np.square(unseen))) < 1.3


# --- length -----------------------------------------------------------------------------------------------------------


def test_cost_follows_the_prompt_where_the_data_say_so() -> None:
    rng = np.random.default_rng(3)
    length, classes = rng.uniform(100, 1000, 900), rng.integers(0, 2, 900)
    slope = np.array([2e-3, 6e-3])
    amount = (1 + slope[classes] * length + 0.2 * rng.normal(size=900)).clip(0)[:, None]
    model = UsageModel.fit(amount, classes, 2, length)
    short, long = model.mean(np.arange(2), np.full(2, 200.0)), model.mean(np.arange(2), np.full(2, 800.0))
    assert_allclose((long - short)[:, 0] / 600, slope, rtol=0.03)
    assert_allclose(long[:, 0], 1 + slope * 800, rtol=0.01)


def test_a_length_that_says_nothing_is_ignored() -> None:
    moved = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        amount, classes = draw(rng, 200, np.zeros(4), models=1)
        model = UsageModel.fit(amount, classes, 4, rng.uniform(0, 1, 200))
        moved.append(abs(float(model.mean(UNSEEN, np.ones(1))[0, 0] - model.mean(UNSEEN, np.zeros(1))[0, 0])))
    # Plain least squares would move by 0.1 on average.
    assert np.mean(moved) < 0.06
    assert np.median(moved) == 0.0


def test_no_mean_is_below_what_was_ever_seen() -> None:
    length = np.linspace(10, 20, 50)
    model = UsageModel.fit((length - 9)[:, None], np.zeros(50, dtype=np.int64), 1, length)
    assert model.mean(np.zeros(1, dtype=np.int64), np.array([-1000.0]))[0, 0] == pytest.approx(1.0)
    assert model.quantile(0.01, UNSEEN, np.array([-1000.0]))[0, 0] >= 0


def test_an_unknown_length_reads_the_class() -> None:
    amount, classes = draw(np.random.default_rng(4), 300, np.array([0.0, 1.0]))
    length = np.random.default_rng(5).uniform(0, 1, 300)
    length[::7] = np.nan
    model = UsageModel.fit(amount, classes, 2, length)
    for a, b in zip(
        model.predict(np.arange(2), np.full(2, np.nan)), model.predict(np.arange(2)), strict=True
    ):
        assert_allclose(a, b)


# --- the distribution ---------------------------------------------------------------------------------------------------


@given(seed=seeds, n=st.integers(1, 80), noise=st.sampled_from([0.0, 0.3, 1.5]))
def test_quantiles_rise_and_exceed_is_their_inverse(seed: int, n: int, noise: float) -> None:
    rng = np.random.default_rng(seed)
    amount, classes = draw(rng, n, rng.normal(size=3), noise=noise)
    model = UsageModel.fit(amount, classes, 3)
    where = np.array([0, 1, 2, -1])
    levels = np.array([0.0, 0.02, 0.3, 0.5, 0.8, 0.9, 0.95, 0.999])
    table = np.stack([model.quantile(float(level), where) for level in levels])
    assert (np.diff(table, axis=0) >= 0).all()
    assert (table >= 0).all()
    # Where many rows share one amount, the probability jumps there: the inverse lies inside the jump.
    for level, amounts in zip(levels[1:], table[1:], strict=True):
        assert (model.exceed(amounts * (1 + 1e-9), where) <= 1 - level + 1e-6).all()
        assert (model.exceed(amounts * (1 - 1e-9), where) >= 1 - level - 1e-6).all()
    rising = np.stack([model.exceed(t, where) for t in (-1.0, 0.0, 0.5, 2.0, 50.0, 1e9)])
    assert (np.diff(rising, axis=0) <= 1e-12).all()
    assert (rising[0] == 1).all()
    assert (rising[-1] < 1e-6).all()


@given(seed=seeds, factor=st.sampled_from([2.0**-20, 0.5, 2.0**17]))
def test_the_unit_does_not_matter(seed: int, factor: float) -> None:
    # Powers of two: no round-off, so that not even the order of ties may change.
    rng = np.random.default_rng(seed)
    amount, classes = draw(rng, 60, rng.normal(size=3), known=0.8)
    length = rng.uniform(0, 9, 60)
    one, many = (
        UsageModel.fit(amount, classes, 3, length),
        UsageModel.fit(factor * amount, classes, 3, length),
    )
    where, at = np.array([0, 1, 2, -1]), np.full(4, 3.0)
    for a, b in zip(one.predict(where, at), many.predict(where, at), strict=True):
        assert_allclose(factor * a, b, rtol=1e-6)
    assert_allclose(factor * one.quantile(0.97, where, at), many.quantile(0.97, where, at), rtol=1e-6)


def test_the_tail_reaches_beyond_the_data() -> None:
    # Lomax with index 1/3: mean 1/2, quantile (1 − p)^(−1/3) − 1.
    ratio = []
    for seed in range(30):
        amount = np.random.default_rng(seed).pareto(3.0, 500)[:, None]
        model = UsageModel.fit(amount, np.zeros(500, dtype=np.int64), 1)
        assert model.tail_index[0] <= 0.5
        ratio.append(model.quantile(0.9995, np.zeros(1, dtype=np.int64))[0, 0] / (2000 ** (1 / 3) - 1))
    # An exponential tail would stop at half of it; a short sample's belief in one keeps it below 1.
    assert 0.65 < np.median(ratio) < 1.25


def test_a_free_model_is_free() -> None:
    model = UsageModel.fit(np.zeros((30, 1)), np.zeros(30, dtype=np.int64), 1)
    assert model.predict(UNSEEN)[0] == 0
    assert model.quantile(0.99, UNSEEN) == 0
    assert model.exceed(0.0, UNSEEN) == 0


def test_one_row_is_no_certainty() -> None:
    model = UsageModel.fit(np.array([[5.0]]), np.zeros(1, dtype=np.int64), 1)
    mean, se = model.predict(np.zeros(1, dtype=np.int64))
    assert mean == 5
    assert se >= 2.5
    assert model.quantile(0.95, UNSEEN)[0, 0] > 5.5


@given(seed=seeds, n=st.integers(1, 200), count=st.sampled_from([1, 7, 64]))
def test_slices_keep_the_mean(seed: int, n: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    sample, weight = rng.exponential(size=n), rng.uniform(0.1, 1, n)
    slices = equal_slices(sample, weight, count)
    assert_allclose(slices.mean(), np.average(sample, weights=weight), rtol=1e-9)
    assert (np.diff(slices) >= -1e-9).all()


# --- in, out, errors ------------------------------------------------------------------------------------------------------


def test_stored_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    amount, classes = draw(np.random.default_rng(6), 100, np.zeros(3))
    model = UsageModel.fit(amount, classes, 3, np.arange(100.0))
    artefact.save(tmp_path / "model", model, {})
    again, _ = artefact.load(tmp_path / "model", (UsageModel,))
    assert (again.quantile(0.9, np.arange(3)) == model.quantile(0.9, np.arange(3))).all()


@pytest.mark.parametrize(
    ("bad", "word"), [(-1.0, "is -1; it must be finite"), (np.inf, "row 2: an amount of 'b' is inf")]
)
def test_impossible_amounts(bad: float, word: str) -> None:
    with pytest.raises(RecordError, match=word):
        UsageModel.fit(np.array([[1.0, 1.0], [1.0, bad]]), np.zeros(2, dtype=np.int64), 1, models=("a", "b"))


def test_nothing_known_of_a_model() -> None:
    amount = np.array([[1.0, np.nan], [2.0, np.nan]])
    with pytest.raises(RecordError, match=r"nothing is known of how much 'b' uses .*cost_usd"):
        UsageModel.fit(amount, np.zeros(2, dtype=np.int64), 1, models=("a", "b"))


def test_a_quantile_of_one_is_refused() -> None:
    model = UsageModel.fit(np.ones((3, 1)), np.zeros(3, dtype=np.int64), 1)
    with pytest.raises(QuantityError, match=r"\[0, 1\)"):
        model.quantile(1.0, UNSEEN)


# --- money ------------------------------------------------------------------------------------------------------------------

RATES = load_price_table().rates(["claude-sonnet-4-5", "gpt-5"], dt.date(2026, 1, 1))


def test_leaving_a_warm_model_costs_the_prefix_again() -> None:
    # List prices of late 2025: Claude Sonnet 4.5 at 3, 0.30 cached, 15; GPT-5 at 1.25, 0.125 cached, 10.
    usd, se = cost_from_tokens(
        RATES,
        input_tokens=np.array([100_000.0]),
        cached_input_tokens=np.array([[95_000.0, 0.0]]),
        output_tokens=np.array([[1000.0, 1000.0]]),
        output_tokens_se=np.array([[100.0, 200.0]]),
    )
    assert_allclose(usd, [[0.015 + 0.0285 + 0.015, 0.125 + 0.010]])
    assert_allclose(se, [[0.0015, 0.002]])
    # Cold, the order is the other way round: what is warm decides.
    cold, _ = cost_from_tokens(RATES, input_tokens=np.array([1e5]), output_tokens=np.full((1, 2), 1e3))
    assert usd[0, 0] < usd[0, 1]
    assert cold[0, 0] > cold[0, 1]


def test_the_mean_is_billed_not_the_median() -> None:
    rng = np.random.default_rng(7)
    tokens = np.exp(5 + 1.5 * rng.normal(size=(4000, 2)))
    expected = UsageModel.fit(tokens, np.full(4000, -1), 0).mean(UNSEEN)
    usd, _ = cost_from_tokens(RATES, input_tokens=np.zeros(1), output_tokens=expected)
    paid = (tokens * RATES.output / 1e6).mean(axis=0)
    assert_allclose(usd[0], paid, rtol=1e-9)
    assert (np.median(tokens, axis=0) * RATES.output / 1e6 < 0.5 * paid).all()


@given(
    sent=st.integers(0, 10**6), warm=st.floats(0, 2), out=st.integers(0, 10**5), more=st.integers(1, 10**5)
)
def test_cost_rises_with_tokens_and_falls_with_warmth(sent: int, warm: float, out: int, more: int) -> None:
    def cost(s: float, w: float, o: float) -> Floats:
        return cost_from_tokens(
            RATES,
            input_tokens=np.array([float(s)]),
            cached_input_tokens=np.full((1, 2), w),
            output_tokens=np.full((1, 2), float(o)),
        )[0]

    here = cost(sent, warm * sent, out)
    assert (cost(sent, warm * sent, out + more) > here).all()
    assert (cost(sent, warm * sent + more, out) <= here + 1e-12).all()
    assert (cost(sent + more, min(warm, 1) * sent, out) > here - 1e-12).all()


# --- measured logs ------------------------------------------------------------------------------------------------------------


def wide(
    path: str, value: str, group: str, length: str | None = None
) -> tuple[Floats, Ints, int, Floats | None]:
    """A long log as amounts (N, I), classes, how many, lengths; rows without the value are left out."""
    columns = ["request_id", "model", value, group] + ([length] if length else [])
    table = pq.read_table(path, columns=columns)
    known = table[value].is_valid().to_numpy()
    data = {name: np.asarray(table[name].to_pylist(), dtype=object)[known] for name in columns}
    _, rows = np.unique(data["request_id"].astype(str), return_inverse=True)
    models, use = np.unique(data["model"].astype(str), return_inverse=True)
    names, of = np.unique(data[group].astype(str), return_inverse=True)
    amount = np.full((rows.max() + 1, len(models)), np.nan)
    amount[rows, use] = data[value].astype(float)
    classes, lengths = np.zeros(len(amount), dtype=np.int64), np.zeros(len(amount))
    classes[rows] = of
    if length:
        lengths[rows] = data[length].astype(float)
    return amount, classes, len(names), lengths if length else None


def pinball(actual: Floats, guess: Floats) -> Floats:
    """Mean loss of quantiles `guess` (N, I, levels), (I, levels)."""
    miss = actual[:, :, None] - guess
    loss: Floats = np.nanmean(np.maximum(LEVELS * miss, (LEVELS - 1) * miss), axis=0)
    return loss


def halves(n: int, share: float, seed: int) -> tuple[Ints, Ints]:
    order = np.random.default_rng(seed).permutation(n)
    return order[: int(share * n)], order[int(share * n) :]


def compare(log: tuple[Floats, Ints, int, Floats | None], share: float) -> tuple[float, float, float]:
    """Held-out pinball loss against each cell's raw quantiles and a pooled lognormal, and cover of the 90% quantile."""
    amount, classes, n_classes, length = log
    ours, raw, lognormal, cover = [], [], [], []
    for seed in range(4):
        train, test = halves(len(amount), share, seed)
        model = UsageModel.fit(
            amount[train], classes[train], n_classes, None if length is None else length[train]
        )
        at = None if length is None else length[test]
        table = np.stack([model.quantile(float(level), classes[test], at) for level in LEVELS], axis=2)
        whole = np.nanquantile(amount[train], LEVELS, axis=0)
        scale = pinball(amount[test], np.broadcast_to(whole.T, table.shape))
        cells = [amount[train][classes[train] == c] for c in range(n_classes)]
        own = np.stack([np.nanquantile(cell, LEVELS, axis=0) if len(cell) else whole for cell in cells])
        logs = np.log(amount[train])
        bell = np.exp(np.nanmean(logs, axis=0)[:, None] + np.nanstd(logs, axis=0)[:, None] * norm.ppf(LEVELS))
        ours.append((pinball(amount[test], table) / scale).mean())
        raw.append((pinball(amount[test], own.transpose(0, 2, 1)[classes[test]]) / scale).mean())
        lognormal.append((pinball(amount[test], np.broadcast_to(bell, table.shape)) / scale).mean())
        cover.append(np.nanmean(amount[test] <= table[:, :, 4]))
    return (
        float(np.mean(ours) / np.mean(raw)),
        float(np.mean(ours) / np.mean(lognormal)),
        float(np.mean(cover)),
    )


@pytest.mark.data
@pytest.mark.parametrize(
    ("file", "value", "group", "length", "raw", "lognormal"),
    [
        ("swebench_pro", "output_tokens_visible", "repo", None, 0.96, 0.95),
        ("swebench_pro", "cost_usd", "repo", None, 0.93, 0.98),
        ("swebench_verified_mini", "cost_usd", "repo", None, 0.94, 1.01),
        ("routellm_evals", "output_tokens", "benchmark", "input_tokens", 0.96, 0.95),
        ("routerbench_subset", "cost_usd", "benchmark", "prompt_chars", 0.83, 0.45),
    ],
)
def test_held_out_quantiles_beat_raw_cells_and_lognormals(
    data_dir: DataDir, file: str, value: str, group: str, length: str | None, raw: float, lognormal: float
) -> None:
    log = wide(str(data_dir / f"routing/{file}.parquet"), value, group, length)
    against_raw, against_lognormal, cover = compare(log, 0.5)
    assert against_raw < raw
    assert against_lognormal < lognormal
    assert 0.87 < cover < 0.93


@pytest.mark.data
def test_few_rows_do_not_blow_up(data_dir: DataDir) -> None:
    log = wide(str(data_dir / "routing/swebench_pro.parquet"), "cost_usd", "repo")
    against_raw, against_lognormal, _ = compare(log, 0.05)
    assert against_raw < 0.65
    assert against_lognormal < 1.01


@pytest.mark.data
def test_routerbench_cost_is_linear_in_the_prompt(data_dir: DataDir) -> None:
    amount, classes, n_classes, length = wide(
        str(data_dir / "routing/routerbench_subset.parquet"), "cost_usd", "benchmark", "prompt_chars"
    )
    assert length is not None
    explained, by_class = [], []
    for seed in range(4):
        train, test = halves(len(amount), 0.5, seed)
        model = UsageModel.fit(amount[train], classes[train], n_classes, length[train])
        for guesses, at in ((explained, length[test]), (by_class, None)):
            miss = ((amount[test] - model.mean(classes[test], at)) ** 2).mean(axis=0)
            guesses.append(1 - miss / amount[test].var(axis=0))
    assert np.mean(explained) > 0.72
    assert np.mean(by_class) < 0.71
