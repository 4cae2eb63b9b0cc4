"""A prompt as numbers: against a slow reading of the same bytes in plain Python, and on everything a log may hold."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from itertools import pairwise
from math import log1p, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from walras.estimate.text import BUCKETS, CUES, HEAD, LINES, MOST_GRAMS, TAIL, WORDS, Texts, read_texts

READ = HEAD + TAIL
MASK = (1 << 64) - 1

# Letters, list lines, code, signs, indents, bytes beyond ASCII: what the cues tell apart.
looks_real = st.lists(
    st.sampled_from(
        [
            "A) ",
            "1. ",
            "- ",
            "* ",
            "\n",
            " ",
            "the",
            "Answer",
            "42",
            "x9",
            "é",
            "字",
            "😀",
            "?",
            ",",
            ".",
            "\t",
            "{};",
        ]
    ),
    max_size=60,
).map("".join)
prompts = st.one_of(
    st.text(max_size=80),
    st.text(st.characters(), max_size=80),  # lone surrogates too
    st.binary(max_size=80),
    looks_real,
    st.tuples(looks_real, st.integers(1, 200), looks_real).map(lambda t: t[0] * t[1] + t[2]),
)

ODD: dict[str, str | bytes | None] = {
    "nothing": None,
    "empty": "",
    "one sign": ".",
    "new lines": "\n" * 5000,
    "nuls": "\0" * 5000,
    "carriage returns": "a\r\nB) b\r\n",
    "every byte": bytes(range(256)) * 40,
    "broken text": b"\xff\xfe\xc3(\x80",
    "lone surrogates": "a\ud800b \udfff" * 900,
    "one word": "w" * 100_000,
    "long": "What is the answer? " * 10_000,
    "emoji across the cut": "a" * (HEAD - 1) + "😀" * TAIL,
    "just as long as is read": "字" * (READ // 3) + "!",
    "one more": "x" * (READ + 1),
    "every word new": " ".join(f"{a:c}{b:c}" for a in range(97, 123) for b in range(97, 123)),
}


def same(a: Texts, b: Texts) -> None:
    for field in ("start", "grams", "counts", "cues", "lines"):
        assert_array_equal(getattr(a, field), getattr(b, field), err_msg=field)


# --- the slow reading ------------------------------------------------------------------------------------------------


def fnv(data: bytes) -> int:
    h = 14695981039346656037
    for byte in data:
        h = (h ^ byte) * 1099511628211 & MASK
    return h


def bucket(h: int) -> int:
    h ^= h >> 29
    h = h * 0x9E3779B97F4A7C15 & MASK
    return (h ^ h >> 32) % BUCKETS


def ends(prompt: str | bytes | None) -> tuple[bytes, int]:
    data = prompt.encode("utf-8", "replace") if isinstance(prompt, str) else prompt or b""
    return (data[:HEAD] + data[-TAIL:] if len(data) > READ else data), len(data)


def slow_grams(prompt: str | bytes | None) -> Counter[int]:
    text = ends(prompt)[0].lower()
    words = [fnv(w) for w in re.findall(rb"[a-z0-9\x80-\xff]+", text)]
    pairs = [(a * 31 & MASK) ^ b for a, b in pairwise(words)]
    fours = [fnv(text[i : i + 4]) ^ 4 for i in range(len(text) - 3)]
    return Counter(bucket(h) for h in words + pairs + fours)


def slow_cues(prompt: str | bytes | None) -> list[float]:
    text, length = ends(prompt)
    lines = [line for line in text.split(b"\n") if line]
    words = re.findall(rb"[a-z0-9\x80-\xff]+", text.lower())
    seen: set[bytes] = set()
    again = in_list = in_list_again = 0
    for line in lines:
        for word in re.findall(rb"[a-z0-9\x80-\xff]+", line.lower()):
            again += word in seen
            if is_item(line):
                in_list += 1
                in_list_again += word in seen
            seen.add(word)

    def share(pattern: bytes) -> float:
        return len(re.findall(pattern, text)) / max(len(text), 1)

    items = [len(line) for line in lines if is_item(line)]
    mean = sum(items) / max(len(items), 1)
    spread = sqrt(sum((i - mean) ** 2 for i in items) / len(items)) if items else 0.0
    return [
        log1p(length),
        log1p(len(words)),
        log1p(len(lines)),
        sum(map(len, words)) / max(len(words), 1),
        sum(len(w) > 8 for w in words) / max(len(words), 1),
        again / max(len(words), 1),
        share(rb"[0-9]"),
        share(rb"[A-Z]"),
        share(rb"[^\x00-\x20a-zA-Z0-9\x80-\xff]"),
        share(rb"[+*/=<>^%|&~]"),
        share(rb"[]{}[();_`\\#$@]"),
        sum(line[:1] in (b" ", b"\t") for line in lines) / max(len(lines), 1),
        share(rb"[\x80-\xff]"),
        *(log1p(text.count(sign)) for sign in (b"?", b",", b".")),
        log1p(len(lines[0])) if lines else 0.0,
        log1p(len(items)),
        log1p(mean),
        log1p(spread),
        log1p(max(items) - min(items)) if items else 0.0,
        in_list_again / max(in_list, 1),
    ]


def is_item(line: bytes) -> bool:
    return re.match(rb"[a-zA-Z0-9\x80-\xff][).]|[-*] ", line) is not None


def against_the_slow_reading(prompt: str | bytes | None) -> None:
    texts = read_texts([prompt])
    assert dict(zip(texts.grams.tolist(), texts.counts.tolist(), strict=True)) == slow_grams(prompt)
    cues = dict(zip(CUES, slow_cues(prompt), strict=True))
    # A spread is the root of a difference of squares: what round-off leaves of 0 is its root.
    assert_allclose(texts.cues[0], list(cues.values()), rtol=1e-9, atol=1e-5, err_msg=str(cues))
    lines = [fnv(line.lower()) | 1 for line in ends(prompt)[0].split(b"\n") if line][:LINES]
    assert texts.lines[0].tolist() == lines + [0] * (LINES - len(lines))


@given(prompt=prompts)
def test_the_same_as_a_slow_reading(prompt: str | bytes) -> None:
    against_the_slow_reading(prompt)


@pytest.mark.parametrize("name", ODD)
def test_odd_prompts_read_the_same_slowly(name: str) -> None:
    against_the_slow_reading(ODD[name])


# --- laws ------------------------------------------------------------------------------------------------------------


@given(batch=st.lists(prompts, max_size=6))
def test_a_prompt_reads_the_same_alone_and_in_a_batch(batch: list[str | bytes]) -> None:
    together = read_texts(batch)
    for row, prompt in enumerate(batch):
        same(together.take(np.array([row])), read_texts([prompt]))


@given(prompt=st.one_of(st.text(max_size=80), looks_real), times=st.sampled_from([1, 60, 3000]))
def test_text_reads_as_its_bytes(prompt: str, times: int) -> None:
    same(read_texts([prompt * times]), read_texts([(prompt * times).encode()]))


@given(batch=st.lists(prompts, min_size=1, max_size=6), data=st.data())
def test_take_is_reading_those_prompts(batch: list[str | bytes], data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.integers(0, len(batch) - 1), max_size=8))
    same(read_texts(batch).take(np.array(rows, dtype=np.int64)), read_texts([batch[r] for r in rows]))


def test_take_there_and_back() -> None:
    texts = read_texts(list(ODD.values()))
    order = np.random.default_rng(0).permutation(len(texts))
    same(texts.take(order).take(np.argsort(order)), texts)


def test_no_prompts() -> None:
    texts = read_texts([])
    assert len(texts) == 0
    assert texts.cues.shape == (0, len(CUES))
    assert_array_equal(texts.start, [0])


@pytest.mark.parametrize("filler", ["x", "字", "😀", "é "])
def test_the_question_at_the_end_of_a_long_prompt_is_read(filler: str) -> None:
    cats, dogs = read_texts([filler * 9000 + "Who feeds the cats?"]), read_texts([filler * 9000 + "No dogs."])
    assert set(cats.grams.tolist()) != set(dogs.grams.tolist())
    assert_allclose([t.cues[0, CUES.index("question marks")] for t in (cats, dogs)], [np.log(2), 0])


@given(length=st.integers(0, 9000), sign=st.sampled_from(["x", "é", "字", "😀"]))
def test_length_is_that_of_the_whole_prompt_in_bytes(length: int, sign: str) -> None:
    assert_allclose(np.expm1(read_texts([sign * length]).cues[0, 0]), length * len(sign.encode()), rtol=1e-9)


def test_neither_the_table_of_words_nor_that_of_grams_can_fill() -> None:
    # A word takes a byte and another between it and the next. A full table of open addressing is an endless loop.
    assert (READ + 1) // 2 <= WORDS // 2
    assert READ + 2 * ((READ + 1) // 2) <= MOST_GRAMS
    letters = [bytes([b]) for b in (*range(48, 58), *range(97, 123), *range(128, 256))]
    short = letters + [a + b for a in letters for b in letters]
    everything = b" ".join(short)  # the most different words that so many bytes can hold
    texts = read_texts([everything[:READ], everything, b"a " * READ])
    words = np.expm1(texts.cues[:, CUES.index("words (log)")])
    assert words.max() <= WORDS // 2
    assert_allclose(texts.cues[0, CUES.index("share of repeated words")], 0)
    assert np.diff(texts.start).max() <= MOST_GRAMS


def test_case_does_not_matter_to_grams_and_lines() -> None:
    small, large = read_texts(["Who is it?\nA) me"]), read_texts(["WHO IS IT?\nA) ME"])
    assert_array_equal(small.grams, large.grams)
    assert_array_equal(small.lines, large.lines)
    assert small.cues[0, CUES.index("share of upper case")] < large.cues[0, CUES.index("share of upper case")]


def test_hashes_are_those_of_every_other_process() -> None:
    """An artefact outlives the process that learned it: its hashes must mean the same tomorrow."""
    texts = read_texts(["Which is a prime?\nA) 91\nB) 97 — of course\n", None, b"\x00\xff"])
    digest = hashlib.sha256()
    for array in (texts.grams, texts.counts, texts.start, texts.lines, np.round(texts.cues, 9) + 0.0):
        digest.update(np.ascontiguousarray(array).tobytes())
    assert digest.hexdigest() == "ecd51cf8a6b7a4439d7fd82f59fd3110f6bd23751d0a9bc9564afb7846ddf23b"
