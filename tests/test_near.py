"""Near-duplicates: found when near, left alone when not, and never at the cost of looking at everything."""

from __future__ import annotations

from time import perf_counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from walras.estimate.near import ALIKE, CROWD, HASHES, MOST, NearIndex, Neighbours
from walras.estimate.text import BUCKETS, Texts, read_texts

seeds = st.integers(0, 2**32)


def make_words(rng: np.random.Generator, n: int) -> list[str]:
    """Words of random letters."""
    return ["".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), rng.integers(4, 9))) for _ in range(n)]


WORDS = np.array(make_words(np.random.default_rng(0), 3000))


def prompts(rng: np.random.Generator, n: int, length: int = 40) -> list[str]:
    return [" ".join(row) for row in rng.choice(WORDS, (n, length))]


def zeros(texts: Texts) -> np.ndarray:
    return np.zeros(len(texts), dtype=np.int64)


def index_of(logged: list[str]) -> NearIndex:
    texts = read_texts(logged)
    return NearIndex.of(texts, zeros(texts))


def find(index: NearIndex, asked: list[str]) -> Neighbours:
    texts = read_texts(asked)
    return index.find(texts, zeros(texts))


LOGGED = prompts(np.random.default_rng(1), 300)
INDEX = index_of(LOGGED)


@given(which=st.integers(0, 299), word=st.integers(0, 39), seed=seeds)
def test_one_word_changed_is_found(which: int, word: int, seed: int) -> None:
    words = LOGGED[which].split()
    words[word] = make_words(np.random.default_rng(seed), 1)[0]
    near = find(INDEX, [" ".join(words)])
    assert near.row[0, 0] == which
    assert near.likeness[0, 0] > 0.6
    assert_array_equal(near.row[0, 1:], -1)


@given(seed=seeds)
def test_another_prompt_is_not(seed: int) -> None:
    near = find(INDEX, [" ".join(make_words(np.random.default_rng(seed), 40))])
    assert not near.any[0]
    assert_array_equal(near.likeness, 0)


def test_a_prompt_is_not_its_own_neighbour() -> None:
    texts = read_texts([*LOGGED, LOGGED[7], LOGGED[7] + LOGGED[8][:60]])
    classes = zeros(texts)
    near = NearIndex.of(texts, classes).find(texts, classes, itself=True)
    assert (near.row != np.arange(len(texts))[:, None]).all()
    assert_array_equal(np.flatnonzero(near.any), [7, 300, 301])
    assert set(near.row[7, :2]) == {300, 301}
    assert near.row[7, 0] == 300  # the one that is equal comes first


def test_classes_are_kept_apart() -> None:
    texts = read_texts(LOGGED * 2)
    classes = np.arange(2).repeat(300)
    index = NearIndex.of(texts, classes)
    for asked in (0, 1):
        near = index.find(read_texts(LOGGED), np.full(300, asked))
        assert_array_equal(near.row[:, 0], np.arange(300) + 300 * asked)
        assert_array_equal(near.row[:, 1:], -1)
    assert not index.find(read_texts(LOGGED), np.full(300, 2)).any.any()


def test_a_crowd_in_another_class_hides_nobody() -> None:
    rng = np.random.default_rng(2)
    crowd = 2 * CROWD
    texts = read_texts([LOGGED[0]] * (3 + crowd) + prompts(rng, 12 * crowd))
    classes = np.where(np.arange(len(texts)) < 3, 0, 1)
    near = NearIndex.of(texts, classes).find(read_texts(LOGGED[:1]), np.zeros(1, dtype=np.int64))
    assert set(near.row[0].tolist()) == {0, 1, 2, -1}


def test_no_more_than_most_each_once_the_most_similar_first() -> None:
    rng = np.random.default_rng(3)
    words = LOGGED[0].split()
    copies = []
    for changed in range(15):  # copy c differs in c words
        copy = list(words)
        copy[:changed] = make_words(rng, changed)
        copies.append(" ".join(copy))
    near = find(index_of([*copies, *prompts(rng, 300)]), [LOGGED[0]])
    assert (near.row >= 0).all()
    assert len(set(near.row[0].tolist())) == MOST
    assert (np.diff(near.likeness[0]) <= 0).all()
    assert near.row[0, 0] == 0
    assert near.likeness[0, 0] == 1
    assert near.likeness[0, -1] >= ALIKE / HASHES
    assert near.row[0].max() < 13


def test_a_prompt_sent_a_thousand_times() -> None:
    texts = read_texts([LOGGED[0]] * 1000 + prompts(np.random.default_rng(4), 9500, length=8))
    classes = zeros(texts)
    index = NearIndex.of(texts, classes)
    index.find(texts.take(np.arange(2)), classes[:2])  # compiled
    began = perf_counter()
    near = index.find(texts, classes, itself=True)
    assert perf_counter() - began < 5.0  # comparing each pair of copies in each band would be minutes
    assert (near.row[:1000] >= 0).all()
    assert (near.row[:1000] < 1000).all()
    assert_array_equal(near.likeness[:1000], 1)
    assert (near.row[:1000] != np.arange(1000)[:, None]).all()


def test_a_template_is_no_likeness() -> None:
    template = "You are a careful assistant. Answer with one letter and nothing else.\n"
    tails = [t[:60] for t in LOGGED]
    alone = find(index_of([template] * 50), [template])
    assert not alone.any[0]
    index = index_of([template + tail for tail in tails])
    assert not find(index, [template + "zebra quagga okapi gnu"]).any[0]
    near = find(index, [template + tail for tail in tails[:20]])
    assert_array_equal(near.row[:, 0], np.arange(20))
    assert_array_equal(near.row[:, 1:], -1)


def exact_jaccard(index: NearIndex, texts: Texts, a: int, b: int) -> float:
    sets = []
    for row in (a, b):
        grams = texts.grams[texts.start[row] : texts.start[row + 1]]
        sets.append(set(grams[~index.common[grams]].tolist()))
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_likeness_is_the_jaccard_similarity_give_or_take_what_sampling_allows() -> None:
    rng = np.random.default_rng(5)
    base = prompts(rng, 400)
    other = []
    for prompt in base:
        words = prompt.split()
        changed = int(rng.integers(0, 20))
        words[:changed] = make_words(rng, changed)
        other.append(" ".join(words))
    texts = read_texts(base + other)
    index = NearIndex.of(texts, zeros(texts))
    exact = np.array([exact_jaccard(index, texts, i, 400 + i) for i in range(400)])
    equal = (index.signatures[:400] == index.signatures[400:]).mean(axis=1)
    sd = np.sqrt(exact * (1 - exact) / HASHES)
    assert (np.abs(equal - exact) <= 4 * sd + 1e-12).all()
    assert abs((equal - exact).mean()) < 4 * np.sqrt((sd**2).sum()) / 400
    near = index.find(texts.take(np.arange(400, 800)), np.zeros(400, dtype=np.int64))
    match = near.row == np.arange(400)[:, None]
    assert_allclose(near.likeness[match], equal[match.any(axis=1)])
    assert match.any(axis=1)[exact > 0.75].all()
    assert not match.any(axis=1)[exact < 0.2].any()


@pytest.mark.parametrize(
    ("asked", "share"),
    [
        ("{q}\nA) {a}\nB) {b}\nC) {c}", 1.0),
        ("{q}\nA) {b}\nB) {a}\nC) {c}", 2 / 4),
        ("{q}\nA) {c}\nB) {a}\nC) {b}", 1 / 4),
        ("{q}\n\n\nA) {a}\nB) {b}\nC) {c}\n", 1.0),  # empty lines are no lines
        ("{Q}\nA) {a}\nB) {b}\nC) {c}", 1.0),
        ("{q}\nA) {a}\nB) {b}", 3 / 4),
        ("Now:\n{q}\nA) {a}\nB) {b}\nC) {c}", 0.0),
        ("{q}\nA) {a}\nB) {b}\nC) {c}" + "\nmore" * 100, 4 / 24),
    ],
)
def test_lines_in_place(asked: str, share: float) -> None:
    a, b, c = LOGGED[1][:80], LOGGED[2][:80], LOGGED[3][:80]
    parts = {"q": LOGGED[0], "Q": LOGGED[0].upper(), "a": a, "b": b, "c": c}
    logged = "{q}\nA) {a}\nB) {b}\nC) {c}".format(**parts)
    near = find(index_of([logged, *LOGGED[4:]]), [asked.format(**parts)])
    assert near.row[0, 0] == 0
    assert_allclose(near.in_place[0, 0], share)
    assert_array_equal(near.in_place[0, 1:], 0)


def test_prompts_without_a_gram_have_no_neighbours() -> None:
    odd = ["", "   ", "\n\n", "...", "a"]
    index = index_of([*LOGGED, *odd, *odd])
    near = find(index, odd)
    assert not near.any[:3].any()
    texts = read_texts([*LOGGED, *odd, *odd])
    assert not index.find(texts, zeros(texts), itself=True).any[300:303].any()


def test_an_empty_index_and_no_questions() -> None:
    assert not find(index_of([]), LOGGED[:3]).any.any()
    assert find(INDEX, []).row.shape == (0, MOST)


@given(rows=st.lists(st.integers(0, 19), max_size=10))
def test_take(rows: list[int]) -> None:
    near, at = find(INDEX, LOGGED[:20]), np.array(rows, dtype=np.int64)
    some = near.take(at)
    assert_array_equal(some.row, near.row[at])
    assert_array_equal(some.likeness, near.likeness[at])
    assert_array_equal(some.in_place, near.in_place[at])
    assert_array_equal(some.row[:, 0], at)


def test_the_index_keeps_no_text() -> None:
    for name in ("common", "signatures", "keys", "rows", "lines", "classes"):
        assert getattr(INDEX, name).dtype.kind in "bui"
    assert INDEX.common.shape == (BUCKETS,)
