"""What a prompt says of quality: used when it says something, ignored when it does not, and never oversold.

Every prompt and outcome is drawn from a law that is known, so that q̂ is held against the true probability itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from walras.errors import RecordError
from walras.estimate.quality import VALUES, Estimate, QualityModel, Requests, fit_quality, one_request
from walras.estimate.text import Texts, read_texts
from walras.quantities import Labels

MODELS = ("a", "b", "c")
LEVELS = (0.8, 0.9, 0.95)
VOCABULARY = np.array([f"word{k}" for k in range(300)])


def labels(codes: Sequence[int] | np.ndarray) -> Labels:
    codes = np.asarray(codes, dtype=np.int64)
    return Labels(codes, tuple(f"c{k}" for k in range(codes.max(initial=-1) + 1)))


def prose(rng: np.random.Generator, n: int, words: int = 12) -> list[str]:
    return [" ".join(row) for row in rng.choice(VOCABULARY, (n, words))]


def at(n: int) -> tuple[np.ndarray, np.ndarray]:
    """The first third is logged, the rest is asked for."""
    return np.arange(n // 3), np.arange(n // 3, n)


def tossed(rng: np.random.Generator, probability: np.ndarray) -> np.ndarray:
    return (rng.random(probability.shape) < probability).astype(float)


def one_known(rng: np.random.Generator, quality: np.ndarray) -> np.ndarray:
    """A production log: each request was sent to one model."""
    mask = np.full_like(quality, np.nan)
    rows, sent = np.arange(len(quality)), rng.integers(0, quality.shape[1], len(quality))
    mask[rows, sent] = quality[rows, sent]
    return mask


def by_class(model: QualityModel, requests: Requests) -> np.ndarray:
    return model.means.mean[model.class_codes(requests.task_class)]


# --- worlds: requests and the true probability of each model ---------------------------------------------------------

World = tuple[Requests, np.ndarray]


def only_class(rng: np.random.Generator, n: int) -> World:
    codes = rng.integers(0, 6, n)
    return Requests(read_texts(prose(rng, n)), labels(codes)), rng.beta(3, 3, (6, 3))[codes]


def planted_word(rng: np.random.Generator, n: int) -> World:
    proof = rng.random(n) < 0.5
    ends = np.where(proof, " please prove", " summary wanted")
    prompts = [a + b for a, b in zip(prose(rng, n), ends, strict=True)]
    effect = np.where(proof, 1, -1)[:, None] * rng.normal(0, 0.15, 3)
    return Requests(read_texts(prompts), labels(np.zeros(n))), np.clip(0.5 + effect, 0.03, 0.97)


def length_counts(rng: np.random.Generator, n: int) -> World:
    words = rng.integers(3, 120, n)
    prompts = [" ".join(rng.choice(VOCABULARY, k)) for k in words]
    effect = (np.log(words) - 3.5)[:, None] * rng.normal(0, 0.15, 3)
    return Requests(read_texts(prompts), labels(np.zeros(n))), np.clip(0.5 + effect, 0.03, 0.97)


def a_fact(rng: np.random.Generator, n: int) -> World:
    tenant = rng.integers(0, 4, n)
    requests = Requests(read_texts(prose(rng, n)), labels(rng.integers(0, 3, n)), {"tenant": labels(tenant)})
    return requests, np.clip(0.5 + rng.normal(0, 0.15, (4, 3))[tenant], 0.03, 0.97)


def class_and_fact(rng: np.random.Generator, n: int) -> World:
    codes, tenant = rng.integers(0, 6, n), rng.integers(0, 2, n)
    logit = rng.normal(0, 0.8, (6, 3))[codes] + rng.normal(0, 0.5, (2, 3))[tenant]
    return Requests(read_texts(prose(rng, n)), labels(codes), {"tenant": labels(tenant)}), 1 / (
        1 + np.exp(-logit)
    )


def vectors(rng: np.random.Generator, n: int) -> World:
    places = rng.normal(0, 1, (n, 16))
    logit = places @ rng.normal(0, 0.25, (16, 3))
    return Requests(read_texts(prose(rng, n)), labels(np.zeros(n)), vectors=places), 1 / (1 + np.exp(-logit))


def sure_or_lost(rng: np.random.Generator, n: int) -> World:
    """The first look helps at both ends and is nowhere linear; a fifth of the looks were never taken."""
    certainty = rng.random(n)
    effect = (np.abs(certainty - 0.5) - 0.25)[:, None] * np.array([1.6, -1.6, 0.8])
    certainty[rng.random(n) < 0.2] = np.nan
    requests = Requests(read_texts(prose(rng, n)), labels(np.zeros(n)), certainty=certainty)
    return requests, 0.5 + effect


WORLDS: dict[str, Callable[[np.random.Generator, int], World]] = {
    w.__name__: w
    for w in (only_class, planted_word, length_counts, a_fact, class_and_fact, vectors, sure_or_lost)
}


# --- never worse, and better where there is something to learn -------------------------------------------------------


def losses(q: np.ndarray, p: np.ndarray) -> tuple[float, float]:
    """Expected Brier and log loss of `q` where the truth is `p`."""
    safe = np.clip(q, 0.005, 0.995)
    log = -(p * np.log(safe) + (1 - p) * np.log1p(-safe))
    return float(((q - p) ** 2 + p * (1 - p)).mean()), float(log.mean())


def test_text_that_says_nothing_leaves_the_class_mean() -> None:
    worse = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        requests, p = only_class(rng, 600)
        logged, asked = at(600)
        model = fit_quality(requests.take(logged), MODELS, tossed(rng, p[logged]), seed=seed)
        some = requests.take(asked)
        ours, plain = losses(model.predict(some).mean, p[asked]), losses(by_class(model, some), p[asked])
        worse.append(np.subtract(ours, plain))
    assert np.max(worse) < 0.005
    assert np.mean(worse, axis=0).max() < 2e-4


@pytest.mark.parametrize(
    ("world", "partial"),
    [
        ("planted_word", False),
        ("planted_word", True),
        ("length_counts", False),
        ("a_fact", False),
        ("a_fact", True),
        ("vectors", False),
        ("sure_or_lost", False),
        ("sure_or_lost", True),
    ],
)
def test_signal_is_found(world: str, partial: bool) -> None:
    ours = plain = 0.0
    for seed in range(2):
        rng = np.random.default_rng(seed)
        requests, p = WORLDS[world](rng, 3000)
        logged, asked = at(3000)
        quality = tossed(rng, p[logged])
        model = fit_quality(requests.take(logged), MODELS, one_known(rng, quality) if partial else quality)
        some = requests.take(asked)
        ours += ((model.predict(some).mean - p[asked]) ** 2).mean()
        plain += ((by_class(model, some) - p[asked]) ** 2).mean()
    assert ours < (0.85 if partial else 0.35) * plain


def test_certainty_of_few_values_is_told_apart() -> None:
    """A vote share out of four, half of the votes lost: each value has its own quality, without a line through them."""
    rng = np.random.default_rng(5)
    votes = rng.choice(5, 4000, p=[0.5, 0.05, 0.05, 0.1, 0.3])
    p = np.array([[0.1, 0.7, 0.5, 0.9, 0.3], [0.9, 0.2, 0.6, 0.6, 0.8], [0.5] * 5]).T
    requests = Requests(read_texts([None] * 4000), labels(np.zeros(4000)), certainty=votes / 4)
    model = fit_quality(requests, MODELS, tossed(rng, p[votes]))
    each = Requests(
        read_texts([None] * 6), labels(np.zeros(6)), certainty=np.array([*np.arange(5) / 4, np.nan])
    )
    said = model.predict(each).mean
    assert_allclose(said[:5], p, atol=0.1)
    # Nothing known of it, by a NaN or by no column at all: the centre of those it was learned from.
    assert_allclose(said[5], by_class(model, each)[5], atol=1e-9)
    assert_array_equal(model.predict(replace(each, certainty=None)).mean, said[[5] * 6])


def test_certainty_is_ignored_where_it_was_never_seen() -> None:
    rng = np.random.default_rng(6)
    requests, p = planted_word(rng, 400)
    model = fit_quality(requests, MODELS, tossed(rng, p))
    sure = replace(requests, certainty=rng.random(400))
    assert_array_equal(model.predict(sure).mean, model.predict(requests).mean)
    nowhere = replace(requests, certainty=np.full(400, np.nan))
    same = fit_quality(nowhere, MODELS, tossed(np.random.default_rng(7), p))
    well_formed(same.predict(sure), 400, 3)


@pytest.mark.parametrize("partial", [False, True])
def test_rows_with_holes_are_learned_from(partial: bool) -> None:
    """Text decides; a third of the rows have a hole, or each row but a few is of one model."""
    rng = np.random.default_rng(11)
    proof = np.arange(1200) % 2 == 0
    prompts = [
        a + (" please prove" if b else " summary wanted")
        for a, b in zip(prose(rng, 1200), proof, strict=True)
    ]
    requests = Requests(read_texts(prompts), labels(np.zeros(1200)))
    quality = tossed(rng, np.where(proof, 0.85, 0.25)[:, None].repeat(3, axis=1))
    holes = one_known(rng, quality)
    holes[: 400 if partial else 800] = quality[: 400 if partial else 800]
    said = fit_quality(requests, MODELS, holes).predict(requests).mean
    assert_allclose(said[proof].mean(axis=0), 0.85, atol=0.1)
    assert_allclose(said[~proof].mean(axis=0), 0.25, atol=0.1)


# --- near-duplicates -------------------------------------------------------------------------------------------------


def twins(seed: int, turned: bool) -> tuple[Requests, np.ndarray]:
    """Pairs of the same question with its option lines swapped; half the time or always the same outcome."""
    rng = np.random.default_rng(seed)
    questions, outcomes, prompts = prose(rng, 700, 20), rng.random((700, 3)) < 0.5, []
    for k, question in enumerate(questions):
        one, two = f"A) {rng.choice(VOCABULARY)} {k}x", f"B) {rng.choice(VOCABULARY)} {k}y"
        prompts += [f"{question}\n{one}\n{two}", f"{question}\n{two}\n{one}"]
    quality = np.empty((1400, 3))
    quality[0::2], quality[1::2] = outcomes, ~outcomes if turned else outcomes
    flipped = rng.random(quality.shape) < 0.1
    return Requests(read_texts(prompts), labels(np.zeros(1400))), np.where(flipped, 1 - quality, quality)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("partial", [False, True])
def test_what_happened_to_a_near_duplicate_is_copied_or_turned_round(turned: bool, partial: bool) -> None:
    requests, quality = twins(5, turned)
    first, second = np.arange(0, 1400, 2), np.arange(1, 1400, 2)
    logged, asked = np.concatenate((first, second[:500])), second[500:]
    learned = quality[logged]
    if partial:  # every request to two of the three models, so that twins share at least one
        learned[np.arange(len(logged)), np.random.default_rng(0).integers(0, 3, len(logged))] = np.nan
    model = fit_quality(requests.take(logged), MODELS, learned)
    said = model.predict(requests.take(asked)).mean
    found = model.near.find(requests.texts.take(asked), np.zeros(asked.size, dtype=np.int64)).any
    assert found.mean() > 0.7
    twin = learned[500 : first.size]  # the twins of those asked for, as logged
    for m in range(3):
        good, bad = found & (twin[:, m] == 1), found & (twin[:, m] == 0)
        gap = said[good, m].mean() - said[bad, m].mean()
        assert (-gap if turned else gap) > (0.25 if partial else 0.45)
    if not partial:
        right = np.abs(said[found] - quality[asked][found]) < 0.5
        assert right.mean() > 0.75


def test_near_duplicates_whose_outcomes_have_nothing_to_do_with_each_other_are_ignored() -> None:
    requests, _ = twins(6, turned=False)
    quality = tossed(np.random.default_rng(6), np.full((1400, 3), 0.6))
    model = fit_quality(requests, MODELS, quality)
    said = model.predict(requests).mean
    assert_allclose(said, by_class(model, requests), atol=0.03)


# --- errors and intervals --------------------------------------------------------------------------------------------


def test_errors_tell_how_far_off_the_estimate_is() -> None:
    """q̂ ± 1.96 error against the true probability, over worlds with and without signal."""
    inside: dict[str, list[float]] = {name: [] for name in WORLDS}
    for name, world in WORLDS.items():
        for seed in range(6):
            rng = np.random.default_rng(100 + seed)
            requests, p = world(rng, 900)
            logged, asked = at(900)
            model = fit_quality(requests.take(logged), MODELS, tossed(rng, p[logged]), seed=seed)
            found = model.predict(requests.take(asked))
            inside[name].append((np.abs(found.mean - p[asked]) <= 1.96 * found.error).mean())
    covered = {name: float(np.mean(shares)) for name, shares in inside.items()}
    assert min(covered.values()) > 0.80, covered
    assert 0.90 <= np.mean(list(covered.values())) <= 0.99, covered


def test_more_data_gives_smaller_errors() -> None:
    rng = np.random.default_rng(1)
    requests, p = class_and_fact(rng, 4000)
    quality, asked = tossed(rng, p), requests.take(np.arange(3200, 4000))
    error = [
        fit_quality(requests.take(np.arange(n)), MODELS, quality[:n]).predict(asked).error.mean()
        for n in (200, 800, 3200)
    ]
    assert error[0] > 1.2 * error[1] > 1.2**2 * error[2] > 0


def test_a_class_never_seen_is_less_sure() -> None:
    rng = np.random.default_rng(2)
    requests, p = only_class(rng, 900)
    model = fit_quality(requests, MODELS, tossed(rng, p))
    strange = model.predict(one_request("x", "of another world"))
    nameless = model.predict(one_request("x"))
    # What a prompt may say comes on top, and is as unsure in any class.
    assert (model.means.error[-1] > 1.5 * model.means.error[model.classes.index("c0")]).all()
    assert (strange.error >= model.means.error[-1]).all()
    assert_array_equal(strange.mean, nameless.mean)
    assert_array_equal(strange.error, nameless.error)
    overall = np.average(p, axis=0)
    assert (np.abs(strange.mean[0] - overall) < 0.1).all()


def covers(
    model: QualityModel, found: Estimate, outcome: np.ndarray, uniform: np.ndarray | None
) -> np.ndarray:
    """Share of outcomes inside, by level; checks that the interval is one, and grows with the level."""
    shares, widths = [], []
    for level in LEVELS:
        low, high = model.interval(found, level, uniform)
        assert low.shape == high.shape == outcome.shape
        assert (low >= 0).all()
        assert (high <= 1).all()
        shares.append(((low <= outcome) & (outcome <= high)).mean())
        widths.append((high - low).mean())
    assert (np.diff(widths) >= -1e-8).all()
    return np.array(shares)


def right_or_wrong(rng: np.random.Generator, p: np.ndarray) -> np.ndarray:
    return tossed(rng, p)


def a_share(rng: np.random.Generator, p: np.ndarray) -> np.ndarray:
    return rng.beta(6 * p, 6 * (1 - p))


def a_few_grades(rng: np.random.Generator, p: np.ndarray) -> np.ndarray:
    return rng.binomial(4, p) / 4


def always_one(rng: np.random.Generator, p: np.ndarray) -> np.ndarray:
    del rng
    return np.ones_like(p)


def never(rng: np.random.Generator, p: np.ndarray) -> np.ndarray:
    del rng
    return np.zeros_like(p)


def always_a_third(rng: np.random.Generator, p: np.ndarray) -> np.ndarray:
    del rng
    return np.full_like(p, 1 / 3)


@pytest.mark.parametrize("kind", [right_or_wrong, a_share, a_few_grades, always_one, never, always_a_third])
def test_intervals_hold_the_outcome_as_often_as_they_say(
    kind: Callable[[np.random.Generator, np.ndarray], np.ndarray],
) -> None:
    by_lot, plain = [], []
    constant = kind in {always_one, never, always_a_third}
    for seed in range(1 if constant else 4):
        rng = np.random.default_rng(seed)
        requests, p = class_and_fact(rng, 3900)
        outcome = kind(rng, p)
        logged, asked = at(3900)
        model = fit_quality(requests.take(logged), MODELS, outcome[logged], seed=seed)
        found = model.predict(requests.take(asked))
        by_lot.append(covers(model, found, outcome[asked], rng.random(asked.size)))
        plain.append(covers(model, found, outcome[asked], None))
    assert_allclose(np.mean(by_lot, axis=0), LEVELS, atol=0.015)
    assert (np.mean(plain, axis=0) >= np.array(LEVELS) - 0.015).all()
    if constant:
        assert_array_equal(plain, 1)


@pytest.mark.parametrize("n", [1, 3, 9])
def test_too_few_rows_for_an_interval_give_the_whole_range(n: int) -> None:
    rng = np.random.default_rng(n)
    requests, p = only_class(rng, n)
    model = fit_quality(requests, MODELS, tossed(rng, p))
    for uniform in (None, np.linspace(0, 1, n, endpoint=False)):
        low, high = model.interval(model.predict(requests), 0.9, uniform)
        assert_array_equal(low + np.zeros((n, 3)), 0)
        assert_array_equal(high + np.zeros((n, 3)), 1)


@pytest.mark.parametrize(("n_classes", "rows"), [(4, 5), (4, 20), (12, 10)])
def test_intervals_hold_in_small_classes(n_classes: int, rows: int) -> None:
    """Where each outcome moves the mean of its class, and so makes itself look likelier than it was."""
    shares = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        n = n_classes * rows
        codes = rng.integers(0, n_classes, n + 300)
        requests = Requests(read_texts([None] * (n + 300)), labels(codes))
        outcome = tossed(rng, rng.beta(3, 3, (n_classes, 3))[codes])
        model = fit_quality(requests.take(np.arange(n)), MODELS, outcome[:n], seed=seed)
        found = model.predict(requests.take(np.arange(n, n + 300)))
        shares.append(covers(model, found, outcome[n:], rng.random(300)))
    over = np.mean(shares, axis=0) - np.array(LEVELS)
    assert (over > -0.015).all()
    assert (over < 0.1).all()


@pytest.mark.parametrize("level", [0.0, 1.0, -1.0, 95.0, float("nan")])
def test_a_level_that_is_none(level: float) -> None:
    model = fit_quality(one_request("x"), MODELS, np.ones((1, 3)))
    with pytest.raises(RecordError, match="between 0 and 1"):
        model.interval(model.predict(one_request("x")), level)


@pytest.mark.parametrize("world", ["planted_word", "class_and_fact"])
def test_said_probabilities_are_frequencies(world: str) -> None:
    """Expected calibration error over ten equal bins."""
    errors = []
    for seed in range(2):
        rng = np.random.default_rng(50 + seed)
        requests, p = WORLDS[world](rng, 3000)
        logged, asked = at(3000)
        model = fit_quality(requests.take(logged), MODELS, tossed(rng, p[logged]), seed=seed)
        said = model.predict(requests.take(asked)).mean
        bins = np.minimum((10 * said).astype(int), 9)
        gap = [abs((said - p[asked])[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)]
        errors.append(sum(gap))
    assert np.mean(errors) <= 0.03


# --- bad and odd input -----------------------------------------------------------------------------------------------


def well_formed(found: Estimate, n: int, m: int) -> None:
    assert found.mean.shape == found.error.shape == (n, m)
    assert ((found.mean >= 0) & (found.mean <= 1)).all()
    assert (found.error >= 0).all()
    assert np.isfinite(found.error).all()


@pytest.mark.parametrize("n", [1, 2, 9, 10, 11, 120])
@pytest.mark.parametrize("m", [1, 5])
def test_any_size(n: int, m: int) -> None:
    rng = np.random.default_rng(n + m)
    for codes in (np.zeros(n), np.arange(n), np.full(n, -1)):
        requests = Requests(read_texts(prose(rng, n)), labels(codes))
        model = fit_quality(requests, tuple("abcde"[:m]), rng.random((n, m)))
        well_formed(model.predict(requests), n, m)
        well_formed(model.predict(requests.take(np.arange(0))), 0, m)
        well_formed(model.predict(one_request("something else", "new")), 1, m)


@pytest.mark.parametrize(
    "prompts", [[None], ["", " ", "\n"], ["the same"], [b"\xff\x00", "\ud800", "x" * 50_000]]
)
def test_prompts_that_say_nothing(prompts: list[str | bytes | None]) -> None:
    rng = np.random.default_rng(0)
    n = 240
    requests = Requests(read_texts((prompts * n)[:n]), labels(np.arange(n) % 2))
    quality = tossed(rng, np.where(np.arange(n) % 2, 0.8, 0.3)[:, None].repeat(3, axis=1))
    model = fit_quality(requests, MODELS, quality)
    said = model.predict(requests)
    well_formed(said, n, 3)
    assert_allclose(said.mean, by_class(model, requests), atol=0.05)
    for prompt in (None, "", b"", "a prompt with words in it"):
        well_formed(model.predict(one_request(prompt, "c1")), 1, 3)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.3])
def test_an_outcome_that_never_changes(value: float) -> None:
    rng = np.random.default_rng(0)
    requests, _ = class_and_fact(rng, 300)
    found = fit_quality(requests, MODELS, np.full((300, 3), value)).predict(requests)
    assert_allclose(found.mean, value, atol=1e-12)
    assert_allclose(found.error, 0, atol=1e-6)


def test_one_model_never_right_among_others() -> None:
    rng = np.random.default_rng(0)
    requests, p = class_and_fact(rng, 600)
    quality = tossed(rng, p)
    quality[:, 1] = 0.0
    found = fit_quality(requests, MODELS, quality).predict(requests)
    assert found.mean[:, 1].max() < 0.02
    assert found.mean[:, 0].min() > 0.1


def test_a_model_tried_once() -> None:
    rng = np.random.default_rng(0)
    requests, p = class_and_fact(rng, 400)
    for others in (tossed(rng, p), one_known(rng, tossed(rng, p))):
        quality = others.copy()
        quality[:, 2] = np.nan
        quality[7, 2] = 1.0
        model = fit_quality(requests, MODELS, quality)
        well_formed(model.predict(requests), 400, 3)
        low, high = model.interval(model.predict(requests), 0.9)
        assert_array_equal(low[:, 2], 0)
        assert_array_equal(high[:, 2], 1)


def refused(quality: np.ndarray, match: str, models: tuple[str, ...] = MODELS) -> None:
    requests, _ = only_class(np.random.default_rng(0), 20)
    with pytest.raises(RecordError, match=match):
        fit_quality(requests, models, quality)


def test_outcomes_that_cannot_be() -> None:
    good = np.full((20, 3), 0.5)
    for bad in (-0.01, 1.01, 100.0, np.inf, -np.inf):
        wrong = good.copy()
        wrong[3, 1] = bad
        refused(wrong, "between 0 and 1")
    refused(np.full((20, 3), np.nan), "no outcome is known")
    refused(good[:-1], "20 requests to 3 models")
    refused(good[:, :2], "20 requests to 3 models")
    refused(good[:, 0], "20 requests to 3 models")


def test_a_model_without_a_known_outcome_is_named() -> None:
    quality = np.full((20, 3), 0.5)
    quality[:, 2] = np.nan
    refused(quality, "no outcome of gemma is known", ("x", "y", "gemma"))


def test_facts_that_are_unknown_new_or_missing() -> None:
    rng = np.random.default_rng(3)
    requests, p = a_fact(rng, 1500)
    model = fit_quality(requests, MODELS, tossed(rng, p))
    prompt = "word1 word2 word3"
    known = model.predict(one_request(prompt, "c0", tenant="c1"))
    for other in (
        one_request(prompt, "c0"),
        one_request(prompt, "c0", tenant="a new one"),
        one_request(prompt, "c0", country="c1"),
    ):
        found = model.predict(other)
        well_formed(found, 1, 3)
        assert (
            np.abs(found.mean - by_class(model, other)) < np.abs(known.mean - by_class(model, other)) + 0.15
        ).all()
    absent = model.predict(one_request(prompt, "c0"))
    assert_array_equal(model.predict(one_request(prompt, "c0", tenant="a new one")).mean, absent.mean)
    assert_array_equal(model.predict(one_request(prompt, "c0", tenant="c1", country="c1")).mean, known.mean)


def test_a_fact_means_its_name_not_its_code() -> None:
    rng = np.random.default_rng(4)
    requests, p = a_fact(rng, 1500)
    model = fit_quality(requests, MODELS, tossed(rng, p))
    tenant = requests.facts["tenant"]
    turned = Labels(3 - tenant.codes, tenant.names[::-1])
    again = replace(requests, facts={"tenant": turned})
    assert_array_equal(model.predict(again).mean, model.predict(requests).mean)
    classes = Labels(2 - requests.task_class.codes, requests.task_class.names[::-1])
    again = replace(requests, task_class=classes)
    assert_array_equal(model.predict(again).mean, model.predict(requests).mean)


def test_an_identifier_is_not_a_fact() -> None:
    """A value of its own for each of many requests: nothing to learn, and no matrix as wide as the log."""
    rng = np.random.default_rng(5)
    requests, p = only_class(rng, 4000)
    named = replace(
        requests, facts={"id": labels(np.arange(4000)), "session": labels(rng.integers(0, 1500, 4000))}
    )
    quality = tossed(rng, p)
    model = fit_quality(named, MODELS, quality)
    assert model.levels["id"] == ()
    assert len(model.levels["session"]) == VALUES
    assert_allclose(model.predict(named).mean, by_class(model, named), atol=0.05)


def test_vectors_unknown_missing_or_of_another_size() -> None:
    rng = np.random.default_rng(6)
    requests, p = vectors(rng, 1500)
    assert requests.vectors is not None
    holed = requests.vectors.copy()
    holed[::7] = np.nan
    model = fit_quality(replace(requests, vectors=holed), MODELS, tossed(rng, p))
    well_formed(model.predict(replace(requests, vectors=holed)), 1500, 3)
    assert ((model.predict(requests).mean - p) ** 2).mean() < 0.4 * (
        (by_class(model, requests) - p) ** 2
    ).mean()
    without, unknown = replace(requests, vectors=None), replace(requests, vectors=np.full((1500, 16), np.nan))
    assert_allclose(model.predict(without).mean, model.predict(unknown).mean)
    with pytest.raises(RecordError, match="vectors of 16"):
        model.predict(replace(requests, vectors=np.zeros((1500, 15))))
    well_formed(fit_quality(unknown, MODELS, tossed(rng, p)).predict(requests), 1500, 3)


# --- laws ------------------------------------------------------------------------------------------------------------


def equal(a: object, b: object, where: str = "model") -> None:
    """Bit for bit, all the way down."""
    assert type(a) is type(b), where
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        assert_array_equal(a, b, err_msg=where)
    elif is_dataclass(a) and not isinstance(a, type):
        for field in fields(a):
            equal(getattr(a, field.name), getattr(b, field.name), f"{where}.{field.name}")
    elif isinstance(a, Mapping) and isinstance(b, Mapping):
        assert list(a) == list(b), where
        for key in a:
            equal(a[key], b[key], f"{where}[{key}]")
    elif isinstance(a, tuple) and isinstance(b, tuple):
        assert len(a) == len(b), where
        for k, (one, other) in enumerate(zip(a, b, strict=True)):
            equal(one, other, f"{where}[{k}]")
    else:
        assert a == b, where


def rich(seed: int) -> World:
    """Signal in text, length, fact and class at once."""
    rng = np.random.default_rng(seed)
    requests, p = class_and_fact(rng, 900)
    proof = rng.random(900) < 0.5
    texts = read_texts([a + " please prove" * int(b) for a, b in zip(prose(rng, 900), proof, strict=True)])
    return replace(requests, texts=texts), np.clip(p + 0.2 * np.where(proof, 1, -1)[:, None], 0.02, 0.98)


def test_the_same_seed_gives_the_same_model() -> None:
    requests, p = rich(0)
    quality = tossed(np.random.default_rng(1), p)
    one, two = (fit_quality(requests, MODELS, quality.copy(), seed=3) for _ in range(2))
    equal(one, two)
    with pytest.raises(AssertionError):
        equal(one, fit_quality(requests, MODELS, quality, seed=4))


def test_fitting_and_predicting_leave_their_input_alone() -> None:
    requests, p = rich(0)
    quality = one_known(np.random.default_rng(2), tossed(np.random.default_rng(1), p))
    kept, cues = quality.copy(), requests.texts.cues.copy()
    model = fit_quality(requests, MODELS, quality)
    model.predict(requests)
    assert_array_equal(quality, kept)
    assert_array_equal(requests.texts.cues, cues)
    first = model.predict(requests)
    first.mean[:] = -1
    assert (model.predict(requests).mean >= 0).all()


@pytest.mark.parametrize("partial", [False, True])
def test_the_order_of_models_does_not_matter(partial: bool) -> None:
    requests, p = rich(1)
    rng = np.random.default_rng(1)
    quality = tossed(rng, p)
    quality = one_known(rng, quality) if partial else quality
    turn = np.array([2, 0, 1])
    plain = fit_quality(requests, MODELS, quality).predict(requests)
    turned = fit_quality(requests, tuple(MODELS[t] for t in turn), quality[:, turn]).predict(requests)
    assert_allclose(turned.mean, plain.mean[:, turn], atol=1e-6)
    assert_allclose(turned.error, plain.error[:, turn], atol=1e-6)


def test_a_request_is_judged_alike_alone_and_in_a_batch() -> None:
    requests, p = rich(2)
    model = fit_quality(requests, MODELS, tossed(np.random.default_rng(1), p))
    together = model.predict(requests)
    for row in range(0, 900, 90):
        alone = model.predict(requests.take(np.array([row])))
        assert_allclose(alone.mean[0], together.mean[row], atol=1e-6)
        assert_allclose(alone.error[0], together.error[row], atol=1e-6)


def test_flipping_right_and_wrong_flips_the_estimate() -> None:
    requests, p = rich(3)
    quality = tossed(np.random.default_rng(1), p)
    right, wrong = (fit_quality(requests, MODELS, q).predict(requests) for q in (quality, 1 - quality))
    assert_allclose(wrong.mean, 1 - right.mean, atol=1e-6)
    assert_allclose(wrong.error, right.error, atol=1e-6)


def test_the_model_keeps_no_text() -> None:
    requests, p = rich(4)
    model = fit_quality(requests, MODELS, tossed(np.random.default_rng(1), p))

    def strings(thing: object) -> set[str]:
        if isinstance(thing, str):
            return {thing}
        if isinstance(thing, Mapping):
            return set().union(*(strings(k) | strings(v) for k, v in thing.items()))
        if isinstance(thing, tuple):
            return set().union(*map(strings, thing))
        if is_dataclass(thing) and not isinstance(thing, type | Texts):
            return set().union(*(strings(getattr(thing, f.name)) for f in fields(thing)))
        assert not isinstance(thing, bytes | bytearray)
        assert not isinstance(thing, np.ndarray) or thing.dtype.kind in "buif"
        return set()

    known = {*MODELS, *requests.task_class.names, *requests.facts["tenant"].names, "tenant"}
    assert strings(model) <= known | {"facts", "cues", "topics", "vectors"}
