"""Partially pooled class means: between the overall mean and the class mean, and nearer the one that is known better.

And their errors, which must tell how far from the truth they are.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from walras.estimate.class_means import class_means as with_errors
from walras.estimate.class_means import pooled_class_means

seeds = st.integers(0, 2**32)


def class_means(values: np.ndarray, classes: np.ndarray, n_classes: int) -> np.ndarray:
    return np.array([values[classes == c].mean(axis=0) for c in range(n_classes)])


def draw(
    seed: int, n_classes: int, n: int, spread: float, noise: float, columns: int = 3
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(true class means, values, classes) with every class seen at least twice."""
    rng = np.random.default_rng(seed)
    true = rng.normal(0, spread, (n_classes, columns))
    classes = np.concatenate((np.arange(n_classes).repeat(2), rng.integers(0, n_classes, n)))
    return true, true[classes] + rng.normal(0, noise, (classes.size, columns)), classes


@given(
    seed=seeds,
    n_classes=st.integers(2, 6),
    n=st.integers(0, 60),
    spread=st.sampled_from([0.0, 0.1, 1.0, 10.0]),
)
def test_between_no_pooling_and_full(seed: int, n_classes: int, n: int, spread: float) -> None:
    _, values, classes = draw(seed, n_classes, n, spread, noise=1.0)
    none, full = class_means(values, classes, n_classes), values.mean(axis=0)
    pooled = pooled_class_means(values, classes, n_classes)
    assert (pooled >= np.minimum(none, full) - 1e-9).all()
    assert (pooled <= np.maximum(none, full) + 1e-9).all()


@given(seed=seeds, spread=st.sampled_from([0.3, 1.0, 3.0]))
def test_a_class_with_more_rows_is_trusted_more(seed: int, spread: float) -> None:
    rng = np.random.default_rng(seed)
    count = np.array([2, 5, 20, 80])
    classes = np.arange(4).repeat(count)
    values = rng.normal(0, spread, 4)[classes] + rng.normal(0, 1, classes.size)
    step = class_means(values, classes, 4) - values.mean()
    assume((np.abs(step) > 1e-6).all())
    trust = (pooled_class_means(values, classes, 4) - values.mean()) / step
    assert (np.diff(trust) >= -1e-9).all()


def test_classes_that_say_nothing_get_the_overall_mean() -> None:
    # The same numbers in each class: the between-class variance is below what noise alone would make.
    values = np.tile([0.0, 1.0, 5.0], 4)
    classes = np.arange(4).repeat(3)
    assert_allclose(pooled_class_means(values, classes, 4), np.full(4, 2.0))


def test_what_noise_alone_makes_of_class_means_is_not_believed() -> None:
    rng = np.random.default_rng(0)
    classes = np.arange(50).repeat(4)
    none = pooled = 0.0
    for _ in range(50):  # classes say nothing: every true mean is 0
        values = rng.normal(0, 1, 200)
        none += (class_means(values, classes, 50) ** 2).mean()
        pooled += (pooled_class_means(values, classes, 50) ** 2).mean()
    assert pooled < 0.1 * none


def test_classes_without_noise_get_their_own_mean() -> None:
    classes = np.array([0, 0, 1, 1, 2, 2, 2])
    values = np.array([1.0, 4.0, 9.0])[classes]
    assert_allclose(pooled_class_means(values, classes, 3), [1, 4, 9])


def test_many_rows_give_the_class_mean() -> None:
    _, values, classes = draw(0, 4, 200_000, spread=1.0, noise=1.0)
    assert_allclose(pooled_class_means(values, classes, 4), class_means(values, classes, 4), atol=1e-4)


def test_nearer_the_truth_than_either_extreme() -> None:
    """What pooling is for, over 200 draws in which the spread between classes equals the error of a class mean."""
    errors = np.zeros(3)
    for seed in range(200):
        true, values, classes = draw(seed, 8, 16, spread=0.5, noise=1.0, columns=1)
        none = class_means(values, classes, 8)
        for k, guess in enumerate((pooled_class_means(values, classes, 8), none, values.mean(axis=0))):
            errors[k] += ((guess - true) ** 2).mean()
    assert errors[0] < 0.85 * errors[1:].min()


@given(seed=seeds, shift=st.floats(-5, 5), scale=st.floats(0.1, 10))
def test_units_do_not_matter(seed: int, shift: float, scale: float) -> None:
    _, values, classes = draw(seed, 4, 20, spread=1.0, noise=1.0)
    pooled = pooled_class_means(values, classes, 4)
    assert_allclose(pooled_class_means(shift + scale * values, classes, 4), shift + scale * pooled, atol=1e-6)


@given(seed=seeds)
def test_columns_are_pooled_one_by_one(seed: int) -> None:
    _, values, classes = draw(seed, 4, 20, spread=1.0, noise=1.0, columns=6)
    together = pooled_class_means(values.reshape(-1, 3, 2), classes, 4)
    alone = [pooled_class_means(column, classes, 4) for column in values.T]
    assert_allclose(together, np.stack(alone, axis=1).reshape(4, 3, 2), atol=1e-12)


def test_a_class_without_rows_gets_the_overall_mean() -> None:
    classes = np.array([0, 0, 2, 2])
    pooled = pooled_class_means(np.array([1.0, 1.0, 3.0, 3.0]), classes, 4)
    assert_allclose(pooled, [1, 2, 3, 2])


def test_too_little_to_tell_classes_apart() -> None:
    one_class = pooled_class_means(np.array([1.0, 2.0, 6.0]), np.zeros(3, dtype=np.int64), 1)
    assert_allclose(one_class, [3])
    one_row_each = pooled_class_means(np.array([1.0, 2.0, 6.0]), np.arange(3), 3)
    assert_allclose(one_row_each, [3, 3, 3])


# --- unknown values, unknown classes, errors -------------------------------------------------------------------------


@given(seed=seeds, spread=st.sampled_from([0.0, 0.5, 3.0]))
def test_an_unknown_value_is_as_if_the_row_were_not_there(seed: int, spread: float) -> None:
    _, values, classes = draw(seed, 5, 40, spread, noise=1.0)
    hidden = np.random.default_rng(seed).random(values.shape) < 0.4
    holed = with_errors(np.where(hidden, np.nan, values), classes, 5)
    for column in range(values.shape[1]):
        known = ~hidden[:, column]
        alone = with_errors(values[known][:, [column]], classes[known], 5)
        assert_allclose(holed.mean[:, [column]], alone.mean, atol=1e-12)
        assert_allclose(holed.error[:, [column]], alone.error, atol=1e-12)


@given(seed=seeds)
def test_a_row_of_no_class_counts_towards_the_overall_mean_only(seed: int) -> None:
    _, values, classes = draw(seed, 3, 30, spread=2.0, noise=1.0)
    nameless = np.random.default_rng(seed).random(classes.size) < 0.3
    found = with_errors(values, np.where(nameless, -1, classes), 3)
    assert_allclose(found.mean[-1], values.mean(axis=0))
    far = values.copy()
    far[nameless] += 1000.0
    moved = with_errors(far, np.where(nameless, -1, classes), 3)
    assert_allclose(moved.mean[-1], values.mean(axis=0) + 1000.0 * nameless.mean())


def test_nothing_but_rows_of_no_class() -> None:
    found = with_errors(np.array([[1.0], [3.0]]), np.array([-1, -1]), 2)
    assert_allclose(found.mean, 2.0)
    assert_allclose(found.error, 1.0)


def test_a_column_of_which_nothing_is_known_leaves_the_others_alone() -> None:
    _, values, classes = draw(1, 3, 30, spread=1.0, noise=1.0)
    holed = values.copy()
    holed[:, 1] = np.nan
    found, whole = with_errors(holed, classes, 3), with_errors(values, classes, 3)
    assert_array_equal(found.mean[:, [0, 2]], whole.mean[:, [0, 2]])
    assert np.isfinite(found.mean).all()
    assert np.isfinite(found.error).all()


@pytest.mark.parametrize("spread", [0.0, 0.1, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("rows", [5, 20])
def test_errors_of_class_means_tell_how_far_off_they_are(spread: float, rows: int) -> None:
    """95 % intervals over 150 draws of ten classes of unequal size."""
    inside = []
    for seed in range(150):
        true, values, classes = draw(seed, 10, 10 * rows, spread, noise=1.0, columns=4)
        found = with_errors(values, classes, 10)
        inside.append(np.abs(found.mean[:-1] - true) <= 1.96 * found.error[:-1])
    assert 0.90 <= np.mean(inside) <= 0.995


@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
def test_error_of_a_class_never_seen_takes_in_how_classes_differ(spread: float) -> None:
    inside = []
    for seed in range(300):
        true, values, classes = draw(seed, 12, 300, spread, noise=1.0, columns=4)
        seen = classes < 11
        found = with_errors(values[seen], classes[seen], 11)
        inside.append(np.abs(found.mean[-1] - true[11]) <= 1.96 * found.error[-1])
    assert 0.84 <= np.mean(inside) <= 0.98  # ten classes tell little of how classes differ


@given(seed=seeds, spread=st.sampled_from([0.0, 1.0]))
def test_errors_are_finite_and_in_the_units_of_the_values(seed: int, spread: float) -> None:
    _, values, classes = draw(seed, 4, 30, spread, noise=1.0)
    one, ten = with_errors(values, classes, 4), with_errors(5.0 + 10.0 * values, classes, 4)
    assert (one.error > 0).all()
    assert_allclose(ten.error, 10.0 * one.error, rtol=1e-6)
    assert (one.error[-1] >= 0.99 * np.sqrt(values.var(axis=0) / len(values))).all()


def test_what_never_varies_has_no_error() -> None:
    found = with_errors(np.full((20, 2), 0.7), np.arange(20) % 3, 3)
    assert_allclose(found.mean, 0.7)
    assert_allclose(found.error, 0.0, atol=1e-12)
