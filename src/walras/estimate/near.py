"""Which logged prompts are nearly the same as this one: MinHash signatures in bands (Broder 1997; Indyk & Motwani 1998).

Traffic repeats itself: retries, templates, the same question with its options in another order. What happened to a
near-duplicate says more than any model of the text. The index keeps hashes, never prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from walras.estimate.text import BUCKETS, Texts
from walras.quantities import BoolArray, IntArray
from walras.risk import FloatArray

HASHES = 32
"""Length of a signature; the share of equal entries estimates the Jaccard similarity within ±0.09."""
BANDS = 16
"""Two entries a band: a pair with similarity 0.5 meets in some band with probability 0.99, one with 0.1 in 0.15."""
ALIKE = HASHES // 2
"""Equal entries from which two prompts are near-duplicates: similarity of one half."""
MOST = 8
"""Neighbours looked at, the most similar first."""
CROWD = 64
"""Entries of one band that are compared, the latest first: a prompt sent a million times is met soon enough."""
COMMON = 0.1
"""n-grams in more than this share of the prompts are a template's, and say nothing about likeness."""


@dataclass(frozen=True, slots=True)
class Neighbours:
    """For N queries, up to `MOST` logged prompts each."""

    row: IntArray
    """Logged prompt, (N, MOST); −1 where there is none."""
    likeness: FloatArray
    """Estimated Jaccard similarity, (N, MOST)."""
    in_place: FloatArray
    """Share of lines that are equal at the same place, (N, MOST)."""

    @property
    def any(self) -> BoolArray:
        """Which queries have a neighbour, (N,)."""
        found: BoolArray = self.row[:, 0] >= 0
        return found

    def take(self, rows: IntArray) -> Neighbours:
        """The queries at `rows`, in that order."""
        return Neighbours(self.row[rows], self.likeness[rows], self.in_place[rows])


@dataclass(frozen=True, slots=True)
class NearIndex:
    """An index of logged prompts."""

    common: BoolArray
    """n-grams that are left out, (BUCKETS,)."""
    signatures: NDArray[np.uint32]
    """(N, HASHES)."""
    keys: NDArray[np.uint64]
    """Sorted, (BANDS, N)."""
    rows: NDArray[np.int32]
    """The prompt of each key, (BANDS, N)."""
    lines: NDArray[np.uint64]
    """Hash of each line, (N, LINES)."""
    classes: IntArray
    """(N,); a neighbour is of the same class."""

    @classmethod
    def of(cls, texts: Texts, classes: IntArray) -> NearIndex:
        n = len(texts)
        often = np.bincount(texts.grams, minlength=BUCKETS)
        common = often > max(COMMON * n, 5)
        signatures = _signatures(texts.grams, texts.start, common)
        keys = _band_keys(signatures, classes)
        order = np.argsort(keys, axis=1, kind="stable")
        return cls(
            common,
            signatures,
            np.take_along_axis(keys, order, axis=1),
            order.astype(np.int32),
            texts.lines,
            classes.astype(np.int64),
        )

    def find(self, texts: Texts, classes: IntArray, *, itself: bool = False) -> Neighbours:
        """Neighbours of N prompts; with `itself`, query n is logged prompt n and is not its own neighbour."""
        n = len(texts)
        row = np.full((n, MOST), -1, dtype=np.int64)
        likeness, in_place = np.zeros((n, MOST)), np.zeros((n, MOST))
        signatures = self.signatures if itself else _signatures(texts.grams, texts.start, self.common)
        _find(
            signatures,
            _band_keys(signatures, classes),
            texts.lines,
            classes.astype(np.int64),
            self.signatures,
            self.keys,
            self.rows,
            self.lines,
            self.classes,
            itself,
            row,
            likeness,
            in_place,
        )
        return Neighbours(row, likeness, in_place)


def families(texts: Texts) -> IntArray:
    """Prompts joined by being near-duplicates, directly or through others, (N,): 0, 1, …"""
    n = len(texts)
    everyone = np.zeros(n, dtype=np.int64)
    near = NearIndex.of(texts, everyone).find(texts, everyone, itself=True)
    who, which = np.nonzero(near.row >= 0)
    from scipy.sparse import coo_array  # noqa: PLC0415 - deciding must not wait for it to load
    from scipy.sparse.csgraph import connected_components  # noqa: PLC0415

    links = coo_array((np.ones(who.size), (who, near.row[who, which])), shape=(n, n))
    family: IntArray = connected_components(links, directed=False)[1].astype(np.int64)
    return family


_SALTS = (np.arange(1, HASHES + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)) ^ np.uint64(
    0x2545F4914F6CDD1D
)
_EMPTY = np.uint32(0xFFFFFFFF)


@numba.njit(cache=True)
def _signatures(grams: Any, start: Any, common: Any) -> Any:
    n = len(start) - 1
    out = np.full((n, HASHES), _EMPTY, dtype=np.uint32)
    for i in range(n):
        for g in grams[start[i] : start[i + 1]]:
            if common[g]:
                continue
            for k in range(HASHES):
                h = (np.uint64(g) + np.uint64(1)) * _SALTS[k]
                h ^= h >> np.uint64(31)
                h *= np.uint64(0xBF58476D1CE4E5B9)
                v = np.uint32(h >> np.uint64(32))
                out[i, k] = min(out[i, k], v)
    return out


def _band_keys(signatures: NDArray[np.uint32], classes: IntArray) -> NDArray[np.uint64]:
    """(BANDS, N). The class is part of a key, so that a crowd in one class does not hide the few of another."""
    wide = signatures.astype(np.uint64)
    bands = ((wide[:, 0::2] << np.uint64(32)) | wide[:, 1::2]).T
    keys: NDArray[np.uint64] = bands ^ (classes.astype(np.uint64) * _SALTS[0])
    return keys


@numba.njit(cache=True)
def _find(  # noqa: PLR0913, PLR0917 - a kernel is handed its columns one by one
    signatures: Any,
    band_keys: Any,
    lines: Any,
    classes: Any,
    known: Any,
    keys: Any,
    rows: Any,
    known_lines: Any,
    known_classes: Any,
    itself: bool,
    row: Any,
    likeness: Any,
    in_place: Any,
) -> None:
    for i in range(len(signatures)):
        if signatures[i, 0] == _EMPTY:
            continue  # nothing but template: no likeness to speak of
        for band in range(BANDS):
            key = band_keys[band, i]
            end = np.searchsorted(keys[band], key, side="right")
            for at in range(end - 1, max(end - 1 - CROWD, -1), -1):
                if keys[band, at] != key:
                    break
                j = rows[band, at]
                if (itself and j == i) or known_classes[j] != classes[i]:
                    continue
                equal = 0
                for k in range(HASHES):
                    equal += signatures[i, k] == known[j, k]
                if equal >= ALIKE:
                    _keep(row[i], likeness[i], j, equal / HASHES)
        for m in range(MOST):
            if row[i, m] >= 0:
                in_place[i, m] = _in_place(lines[i], known_lines[row[i, m]])


@numba.njit(cache=True)
def _keep(row: Any, likeness: Any, j: int, alike: float) -> None:
    """Insert into the list of the most similar; one prompt once."""
    for m in range(MOST):
        if row[m] == j:
            return
    if row[MOST - 1] >= 0 and likeness[MOST - 1] >= alike:
        return
    m = MOST - 1
    while m > 0 and (row[m - 1] < 0 or likeness[m - 1] < alike):
        row[m], likeness[m] = row[m - 1], likeness[m - 1]
        m -= 1
    row[m], likeness[m] = j, alike


@numba.njit(cache=True)
def _in_place(a: Any, b: Any) -> float:
    equal = most = 0
    for k in range(len(a)):
        most += a[k] != 0 or b[k] != 0
        equal += a[k] != 0 and a[k] == b[k]
    return equal / max(most, 1)
