"""What a prompt looks like, without a download: hashed n-grams, cues of length and structure, and line hashes.

One pass over the UTF-8 bytes, compiled. Nothing here keeps the text: an artefact holds hashes and sums only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from walras.quantities import IntArray
from walras.risk import FloatArray

BUCKETS = 1 << 14
"""n-grams are hashed into this many; a collision costs a little accuracy, never an error."""
HEAD = TAIL = 2048
"""Bytes read at each end of a long prompt: its task and its question. Its full length is a cue."""
LINES = 24
"""Lines whose hashes are kept, from the top."""
MOST_GRAMS = 4 * (HEAD + TAIL) + 8

CUES = (
    "bytes (log)",
    "words (log)",
    "lines (log)",
    "mean word length",
    "share of long words",
    "share of repeated words",
    "share of digits",
    "share of upper case",
    "share of punctuation",
    "share of operators",
    "share of code signs",
    "share of indented lines",
    "share of bytes beyond ASCII",
    "question marks",
    "commas",
    "full stops",
    "bytes of the first line (log)",
    "list lines",
    "mean bytes of a list line",
    "spread of list lines",
    "longest less shortest list line",
    "words in common between list lines",
)
"""What each column of `Texts.cues` holds. A list line begins like `A)`, `1.` or `- `."""

Grams = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Texts:
    """N prompts as numbers."""

    grams: Grams
    """Distinct buckets of all prompts, one after another, (nnz,)."""
    counts: NDArray[np.float32]
    """How often each occurs, (nnz,)."""
    start: IntArray
    """Where a prompt's buckets begin, (N + 1,)."""
    cues: FloatArray
    """(N, len(CUES))."""
    lines: NDArray[np.uint64]
    """Hash of each line, 0 past the last, (N, LINES)."""

    def __len__(self) -> int:
        return len(self.cues)

    def take(self, rows: IntArray) -> Texts:
        """The prompts at `rows`, in that order."""
        size = np.diff(self.start)[rows]
        start = np.concatenate(([0], np.cumsum(size)))
        where = np.arange(start[-1]) + np.repeat(self.start[rows] - start[:-1], size)
        return Texts(self.grams[where], self.counts[where], start, self.cues[rows], self.lines[rows])


def read_texts(prompts: Sequence[str | bytes | None]) -> Texts:
    """Prompts as numbers; binary or broken text is read as the bytes it is, None as an empty prompt."""
    n = len(prompts)
    cues, lines = np.zeros((n, len(CUES))), np.zeros((n, LINES), dtype=np.uint64)
    count_of, seen = np.zeros(BUCKETS, dtype=np.int32), np.zeros(WORDS, dtype=np.uint64)
    grams, counts = np.empty(MOST_GRAMS, dtype=np.int32), np.empty(MOST_GRAMS, dtype=np.float32)
    parts: list[tuple[Any, Any]] = []
    for row, prompt in enumerate(prompts):
        text, length = _ends(prompt)
        found = _read(text, length, count_of, seen, grams, counts, cues[row], lines[row])
        parts.append((grams[:found].copy(), counts[:found].copy()))
    start = np.concatenate(([0], np.cumsum([len(p[0]) for p in parts], dtype=np.int64)))
    if not parts:
        parts.append((grams[:0], counts[:0]))
    return Texts(
        np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts]), start, cues, lines
    )


def _ends(prompt: str | bytes | None) -> tuple[NDArray[np.uint8], int]:
    """The bytes to read, and how many there are in all."""
    if prompt is None:
        prompt = b""
    if isinstance(prompt, str):
        if len(prompt) > HEAD + TAIL and prompt.isascii():
            # A character is a byte: encoding all of it would cost more than reading its ends.
            ends = (prompt[:HEAD] + prompt[-TAIL:]).encode()
            return np.frombuffer(ends, dtype=np.uint8), len(prompt)
        prompt = prompt.encode("utf-8", "replace")
    length = len(prompt)
    if length > HEAD + TAIL:
        prompt = prompt[:HEAD] + prompt[-TAIL:]
    return np.frombuffer(prompt, dtype=np.uint8), length


# --- the pass over the bytes ----------------------------------------------------------------------------------------

WORDS = 1 << 13
"""Slots for the words of one prompt (open addressing); there are at most half as many words."""
_PRIME = np.uint64(1099511628211)
_SEED = np.uint64(14695981039346656037)
_SPREAD = np.uint64(0x9E3779B97F4A7C15)
_OPERATORS = np.frombuffer(b"+*/=<>^%|&~", dtype=np.uint8)
_CODE = np.frombuffer(b"{}[]();_`\\#$@", dtype=np.uint8)
_KIND = np.zeros(256, dtype=np.uint8)
"""1 letter (and every byte beyond ASCII), 2 digit, 4 upper case, 8 punctuation, 16 operator, 32 code sign."""
for _byte in range(256):
    _c = chr(_byte)
    if _byte >= 128 or ("a" <= _c <= "z") or ("A" <= _c <= "Z"):
        _KIND[_byte] = 1 + 4 * ("A" <= _c <= "Z")
    elif "0" <= _c <= "9":
        _KIND[_byte] = 2
    elif _byte > 32:
        _KIND[_byte] = 8 + 16 * (_byte in _OPERATORS) + 32 * (_byte in _CODE)


@numba.njit(cache=True)
def _mix(h):
    """All bits of a hash into its low ones."""
    h ^= h >> np.uint64(29)
    h *= _SPREAD
    return h ^ (h >> np.uint64(32))


@numba.njit(cache=True)
def _count(h, count_of, grams, found):
    bucket = np.int32(_mix(h) & np.uint64(BUCKETS - 1))
    count_of[bucket] += 1
    if count_of[bucket] == 1:
        grams[found] = bucket
        found += 1
    return found


@numba.njit(cache=True)
def _is_new(h, seen):
    """Whether a word is seen for the first time; remembers it."""
    slot = np.int64(_mix(h) & np.uint64(WORDS - 1))
    while seen[slot] != 0:
        if seen[slot] == h:
            return False
        slot = (slot + 1) & (WORDS - 1)
    seen[slot] = h
    return True


@numba.njit(cache=True)
def _read(text, length, count_of, seen, grams, counts, cues, lines):
    """Fill `grams`, `counts`, `cues`, `lines` for one prompt; returns how many distinct buckets it has."""
    n, found = len(text), 0
    seen[:] = 0
    words = long_words = repeated = letters = digits = upper = points = operators = code = beyond = 0
    questions = commas = stops = indented = n_lines = 0
    word, size, before = _SEED, 0, np.uint64(0)
    line, begin, first_line = _SEED, 0, 0
    items = item_sum = item_square = item_low = item_high = item_words = item_repeated = 0
    for i in range(n + 1):
        byte = text[i] if i < n else np.uint8(10)
        kind = _KIND[byte]
        if kind & 4:
            upper += 1
            byte |= np.uint8(32)
        if kind & 3:
            word = (word ^ np.uint64(byte)) * _PRIME
            size += 1
            letters += 1
            digits += kind >> 1 & 1
            beyond += byte >= 128
        elif size:
            new = _is_new(word, seen)
            words += 1
            long_words += size > 8
            repeated += not new
            if _begins_item(text, begin):
                item_words += 1
                item_repeated += not new
            found = _count(word, count_of, grams, found)
            if before:
                found = _count((before * np.uint64(31)) ^ word, count_of, grams, found)
            before, word, size = word, _SEED, 0
        if kind & 8:
            points += 1
            operators += kind >> 4 & 1
            code += kind >> 5 & 1
            questions += byte == 63
            commas += byte == 44
            stops += byte == 46
        if i >= 3 and i < n:
            # Four bytes, lower case, as one n-gram.
            four = _SEED
            for j in range(i - 3, i + 1):
                b = text[j]
                four = (four ^ np.uint64(b | 32 if 65 <= b <= 90 else b)) * _PRIME
            found = _count(four ^ np.uint64(4), count_of, grams, found)
        if byte == 10:
            width = i - begin
            if n_lines < LINES and width > 0:
                lines[n_lines] = line | np.uint64(1)
            if width > 0:
                indented += text[begin] == 32 or text[begin] == 9
                first_line = width if n_lines == 0 else first_line
                n_lines += 1
                if _begins_item(text, begin):
                    item_low = width if items == 0 else min(item_low, width)
                    item_high = max(item_high, width)
                    items += 1
                    item_sum += width
                    item_square += width * width
            line, begin = _SEED, i + 1
        else:
            line = (line ^ np.uint64(byte)) * _PRIME
    for g in range(found):
        counts[g] = count_of[grams[g]]
        count_of[grams[g]] = 0
    each, per_word, per_line = max(n, 1), max(words, 1), max(n_lines, 1)
    cues[0] = np.log1p(length)
    cues[1] = np.log1p(words)
    cues[2] = np.log1p(n_lines)
    cues[3] = letters / per_word
    cues[4] = long_words / per_word
    cues[5] = repeated / per_word
    cues[6] = digits / each
    cues[7] = upper / each
    cues[8] = points / each
    cues[9] = operators / each
    cues[10] = code / each
    cues[11] = indented / per_line
    cues[12] = beyond / each
    cues[13] = np.log1p(questions)
    cues[14] = np.log1p(commas)
    cues[15] = np.log1p(stops)
    cues[16] = np.log1p(first_line)
    cues[17] = np.log1p(items)
    if items:
        mean = item_sum / items
        cues[18] = np.log1p(mean)
        cues[19] = np.log1p(np.sqrt(max(item_square / items - mean * mean, 0.0)))
        cues[20] = np.log1p(item_high - item_low)
        cues[21] = item_repeated / max(item_words, 1)
    return found


@numba.njit(cache=True)
def _begins_item(text, begin):
    """Whether the line at `begin` starts like a list's: `A)`, `1.`, `- `."""
    if begin + 1 >= len(text):
        return False
    a, b = text[begin], text[begin + 1]
    return (_KIND[a] & 3 != 0 and b in (41, 46)) or (a in (45, 42) and b == 32)
