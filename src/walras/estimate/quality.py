"""What each model would give on a request: q̂_m(x), its error, and an interval, learned from logs. [Z-4] [OP-1]

Four layers, each pulled to the one before it by as much of it as is noise, so that a text that says nothing leaves the class
mean, and a class that says nothing leaves the overall mean:

    q̂ = class mean + what happened to near-duplicates + what caller's facts say + what the prompt's shape and n-grams say

The outcomes of all models on one prompt move together (a hard question is hard for all), so the last three are learned
along the principal directions of those outcomes, where one column is nearly free of another's noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from walras.errors import RecordError
from walras.estimate.class_means import ClassMeans, class_means
from walras.estimate.near import NearIndex, Neighbours
from walras.estimate.reader import Reader, standard
from walras.estimate.shrinkage import LEAST_EVIDENCE, Ridge, fit_ridge
from walras.estimate.text import Texts, read_texts
from walras.quantities import BoolArray, IntArray, Labels
from walras.risk import FloatArray

FOLDS = 5
SMALL = 100
"""Classes with fewer rows share one model of what the prompts say."""
BENDS = (0.2, 0.4, 0.6, 0.8)
"""Quantiles of the certainties in the log at which the response to certainty may bend."""
VALUES = 256
"""Values of one fact that are told apart: an identifier is not a fact, and thousands of columns would never be fitted."""


@dataclass(frozen=True, slots=True)
class Requests:
    """What is known of N requests before they are answered."""

    texts: Texts
    task_class: Labels
    facts: Mapping[str, Labels] = field(default_factory=dict)
    """Anything else the caller knows (tenant, language, repository), by name."""
    vectors: FloatArray | None = None
    """Embeddings of the prompts, or any other numbers, by the caller's own means, (N, D); NaN where unknown."""
    certainty: FloatArray | None = None
    """How sure a first look was, 0 to 1, (N,); NaN where unknown. [OP-3]"""

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: IntArray) -> Requests:
        """The requests at `rows`, in that order."""
        facts = {name: labels.take(rows) for name, labels in self.facts.items()}
        vectors = None if self.vectors is None else self.vectors[rows]
        certainty = None if self.certainty is None else self.certainty[rows]
        return Requests(self.texts.take(rows), self.task_class.take(rows), facts, vectors, certainty)


def one_request(prompt: str | bytes | None, task_class: str | None = None, **facts: str) -> Requests:
    """One live request."""

    def label(name: str | None) -> Labels:
        return Labels.none(1) if name is None else Labels(np.zeros(1, dtype=np.int64), (name,))

    return Requests(read_texts([prompt]), label(task_class), {k: label(v) for k, v in facts.items()})


@dataclass(frozen=True, slots=True)
class Estimate:
    """q̂ for N requests × M models."""

    mean: FloatArray
    """(N, M), in [0, 1]."""
    error: FloatArray
    """Standard deviation of q̂ about the true probability, (N, M): what more data of the same kind would take away."""


@dataclass(frozen=True, slots=True)
class Group:
    """One class with enough rows, or all smaller ones together: what the prompts say beyond the class mean."""

    basis: FloatArray
    """Directions of the outcomes, (P, M)."""
    pair: FloatArray
    """Weights of a neighbour's outcome, and of it times how alike the two are, (P, 3)."""
    pair_error: FloatArray
    """Their covariance, (P, 3, 3)."""
    alike: FloatArray
    """Mean likeness and mean lines in place over the pairs fitted on, (2,)."""
    cue_mean: FloatArray
    cue_scale: FloatArray
    centre: Mapping[str, FloatArray]
    """Mean of each block of features."""
    ridges: Mapping[str, tuple[Ridge, ...]]
    """By block, in the order they are added: one for all directions, or one for each."""
    quiet: FloatArray
    """Mean variance from the blocks that say nothing and are left out, (P,): a live request does not wait for them."""
    trust: float = 1.0
    """What cross-fitting leaves of it, 0 to 1."""
    trust_error: float = 0.0
    """How far that may be from what would be best (root mean square)."""
    unread: Mapping[str, FloatArray] = field(default_factory=dict)
    """By block, mean square of what it says of a request, (P,): what is missed of one whose numbers are unknown."""


@dataclass(frozen=True, slots=True)
class QualityModel:
    """Everything that was learned. Made by `fit_quality`."""

    models: tuple[str, ...]
    classes: tuple[str, ...]
    levels: Mapping[str, tuple[str, ...]]
    """Known values of each fact."""
    means: ClassMeans
    group_of: IntArray
    """Group of each class, and of a class never seen, (C + 1,)."""
    groups: tuple[Group, ...]
    reader: Reader
    near: NearIndex
    beyond: NDArray[np.float32]
    """Outcome less class mean of each logged request, (N, M)."""
    scores: FloatArray
    """Cross-fitted |outcome − q̂| of each model, sorted, NaN past the last, (N, M): what intervals are cut from."""
    bends: FloatArray = field(default_factory=lambda: np.zeros(0))
    """Certainties at which the response to certainty may bend, ascending, (K,)."""

    def class_codes(self, labels: Labels) -> IntArray:
        """Row of `means` for each request, (N,): C for a class never seen."""
        return _codes(labels, self.classes, len(self.classes))

    def predict(self, requests: Requests) -> Estimate:
        """q̂ and its error."""
        classes = self.class_codes(requests.task_class)
        mean, variance = self.means.mean[classes], self.means.error[classes] ** 2
        near = self.near.find(requests.texts, classes)
        group_of = self.group_of[classes]
        if len(requests) == 1:  # live: nothing to sort out
            said, doubt = self._beyond_class(self.groups[group_of[0]], requests, near)
            return Estimate(np.clip(mean + said, 0.0, 1.0), np.sqrt(variance + doubt))
        for g in np.unique(group_of):
            rows = np.flatnonzero(group_of == g)
            said, doubt = self._beyond_class(self.groups[g], requests.take(rows), near.take(rows))
            mean[rows] += said
            variance[rows] += doubt
        return Estimate(np.clip(mean, 0.0, 1.0), np.sqrt(variance))

    def _beyond_class(
        self, group: Group, requests: Requests, near: Neighbours
    ) -> tuple[FloatArray, FloatArray]:
        """What the prompts add to the class means, (N, M), and its variance."""
        if not group.trust and not group.trust_error:
            return np.zeros((1, 1)), np.zeros((1, 1))
        said = np.zeros((len(requests), len(group.basis)))
        doubt = said + group.quiet
        if near.any.any():
            pairs = _pairs(near, self.beyond, group.basis, group.alike)
            said += np.einsum("nfp,pf->np", pairs, group.pair)
            doubt += np.einsum("nfp,pfg,ngp->np", pairs, group.pair_error, pairs)
        for name, ridges in group.ridges.items():
            features = _features(name, requests, self, group)
            said += _side_by_side([ridge.predict(features) for ridge in ridges])
            doubt += _side_by_side([ridge.variance(features) for ridge in ridges])
            doubt[_unknown(features)] += group.unread.get(name, 0.0)
        said = said @ group.basis
        return group.trust * said, doubt @ group.basis**2 + (group.trust_error * said) ** 2

    def interval(
        self, estimate: Estimate, level: float, uniform: FloatArray | None = None
    ) -> tuple[FloatArray, FloatArray]:
        """Conformal interval for the outcome itself, low and high (N, M), (Vovk et al. 2005; cross-conformal).

        It holds the outcome with probability `level`, whatever the distribution, as long as requests are
        exchangeable with the logged ones. Outcomes of 0 and 1 pile up on few scores, which makes an interval wider than it need be;
        `uniform` (N,) in [0, 1) breaks such ties by lot and makes the coverage exact.
        """
        if not 0.0 < level < 1.0:
            raise RecordError(f"an interval needs a level between 0 and 1, not {level}")
        known = (~np.isnan(self.scores)).sum(axis=0)
        rank = np.ceil(level * (known + 1)).astype(np.int64)
        enough = np.flatnonzero(rank <= known)
        reach = np.ones((1 if uniform is None else uniform.size, known.size))
        reach[:, enough] = self.scores[rank[enough] - 1, enough]
        if uniform is not None:
            reach[:, enough] -= _jitter(uniform)[:, None]
        return np.clip(estimate.mean - reach, 0.0, 1.0), np.clip(estimate.mean + reach, 0.0, 1.0)


_LOT = 1e-9
"""Scores closer than this are ties, decided by lot."""


def _jitter(uniform: FloatArray) -> FloatArray:
    return _LOT * uniform


# --- fitting --------------------------------------------------------------------------------------------------------


def fit_quality(
    requests: Requests, models: tuple[str, ...], quality: FloatArray, *, seed: int = 0
) -> QualityModel:
    """Learn from outcomes `quality` (N, M); NaN is unknown.

    Raises:
        RecordError: `quality` has another shape, no outcome of a model is known, or one is outside [0, 1].
    """
    _check(quality, (len(requests), len(models)), models)
    reader = Reader.of(requests.texts, seed)
    model = _fit(requests, models, quality, reader)
    if len(requests) < 2 * FOLDS:
        return replace(model, groups=tuple(replace(g, trust=0.0) for g in model.groups))
    plain, full = _cross_fitted(requests, models, quality, reader, seed)
    classes = model.class_codes(requests.task_class)
    group_of = model.group_of[classes]
    everyone = np.ones(len(requests), dtype=np.bool_)
    inside = [group_of == g for g in range(len(model.groups))]
    trusts = [_trust(quality, plain, full, rows if rows.sum() >= SMALL else everyone) for rows in inside]
    groups = tuple(
        replace(group, trust=trust, trust_error=error)
        for group, (trust, error) in zip(model.groups, trusts, strict=True)
    )
    trust = np.array([g.trust for g in groups])[group_of]
    # A large class keeps its final mean: those of the folds differ by chance, which would blur ties that are none. In a
    # small one a row pulls the mean towards itself, and only the other folds tell how far off the mean is.
    small = (group_of == len(groups) - 1)[:, None]
    said = np.where(small, plain, model.means.mean[classes]) + trust[:, None] * (full - plain)
    said = np.clip(said, 0.0, 1.0)
    lot = _jitter(np.random.default_rng(seed).random(len(requests)))
    return replace(model, groups=groups, scores=np.sort(np.abs(quality - said) + lot[:, None], axis=0))


def _check(quality: FloatArray, shape: tuple[int, int], models: tuple[str, ...]) -> None:
    if quality.shape != shape:
        raise RecordError(
            f"outcomes are {quality.shape}; {shape[0]} requests to {shape[1]} models need {shape}",
            field="quality",
        )
    known = quality[~np.isnan(quality)]
    if not known.size:
        raise RecordError("no outcome is known: nothing can be learned", field="quality")
    if known.min() < 0 or known.max() > 1:
        raise RecordError("outcomes must lie between 0 and 1", field="quality")
    empty = [m for m, column in zip(models, quality.T, strict=True) if np.isnan(column).all()]
    if empty:
        raise RecordError(
            f"no outcome of {', '.join(empty)} is known: leave it out, or try it", field="quality"
        )


def _cross_fitted(
    requests: Requests, models: tuple[str, ...], quality: FloatArray, reader: Reader, seed: int
) -> tuple[FloatArray, FloatArray]:
    """q̂ of each request from the others: by class means alone, and by everything, both (N, M) and not clipped."""
    fold = np.random.default_rng(seed).permutation(len(requests)) % FOLDS
    plain, full = np.empty_like(quality), np.empty_like(quality)
    for k in range(FOLDS):
        rest, held_out = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
        model = _fit(requests.take(rest), models, quality[rest], reader)
        part = requests.take(held_out)
        plain[held_out] = model.means.mean[model.class_codes(part.task_class)]
        full[held_out] = model.predict(part).mean
    return plain, full


def _trust(quality: FloatArray, plain: FloatArray, full: FloatArray, rows: BoolArray) -> tuple[float, float]:
    """How much of what the prompts say survives on requests that were not fitted on, 0 to 1, and its error.

    The least-squares weight of (full − plain) on (outcome − plain), less one standard error: what is not clearly a gain is
    left out. The error counts requests, not outcomes, because the outcomes of one request move together.
    """
    said, left = (full - plain)[rows], np.nan_to_num((quality - plain)[rows])
    said = np.where(np.isnan(quality[rows]), 0.0, said)
    power = float((said**2).sum())
    if power <= 0:
        return 0.0, 1.0
    weight = float((said * left).sum()) / power
    error = float(np.sqrt((((said * (left - weight * said)).sum(axis=1)) ** 2).sum())) / power
    trust, best = np.clip((weight - error, weight), 0.0, 1.0)
    return float(trust), float(np.hypot(best - trust, error))


def _fit(requests: Requests, models: tuple[str, ...], quality: FloatArray, reader: Reader) -> QualityModel:
    """Everything but trust and scores."""
    names = tuple(
        name
        for code, name in enumerate(requests.task_class.names)
        if (requests.task_class.codes == code).any()
    )
    classes = _codes(requests.task_class, names, -1)
    means = class_means(quality, classes, len(names))
    classes = np.where(classes < 0, len(names), classes)
    beyond = (quality - means.mean[classes]).astype(np.float32)
    size = np.bincount(classes, minlength=len(names) + 1)
    own = np.flatnonzero(size[:-1] >= SMALL)
    group_of = np.full(len(names) + 1, own.size)
    group_of[own] = np.arange(own.size)
    near = NearIndex.of(requests.texts, classes)
    model = QualityModel(
        models=models,
        classes=names,
        levels={name: _levels(labels) for name, labels in requests.facts.items()},
        means=means,
        group_of=group_of,
        groups=(),
        reader=reader,
        near=near,
        beyond=beyond,
        scores=np.zeros((0, len(models))),
        bends=_bends(requests.certainty),
    )
    pairs = near.find(requests.texts, classes, itself=True)
    groups = []
    for g in range(own.size + 1):
        rows = np.flatnonzero(group_of[classes] == g)
        if g == own.size and rows.size < SMALL:  # too few to learn from, and classes never seen come here too
            rows = np.arange(len(requests))
        groups.append(
            _fit_group(requests.take(rows), beyond[rows].astype(np.float64), pairs.take(rows), model)
        )
    return replace(model, groups=tuple(groups))


def _directions(beyond: FloatArray) -> FloatArray:
    """Principal directions of centred outcomes (N, M), all M of them, (M, M)."""
    directions: FloatArray = np.linalg.eigh(beyond.T @ beyond)[1].T[::-1]
    return directions


def _fit_group(requests: Requests, beyond: FloatArray, near: Neighbours, model: QualityModel) -> Group:
    """Learn what is left of the outcomes `beyond` (N, M) after the class means."""
    m = beyond.shape[1]
    cue_mean, cue_scale = standard(requests.texts.cues)
    group = Group(
        basis=np.eye(m),
        pair=np.zeros((m, 3)),
        pair_error=np.zeros((m, 3, 3)),
        alike=np.zeros(2),
        cue_mean=cue_mean,
        cue_scale=cue_scale,
        centre={},
        ridges={},
        quiet=np.zeros(m),
    )
    complete: BoolArray = np.logical_not(np.isnan(beyond).any(axis=1))
    if len(requests) < 2 * FOLDS:
        return group
    if complete.mean() >= 0.5:
        beyond = np.where(complete[:, None], beyond, np.nan)
        group = replace(group, basis=_directions(beyond[complete]))
    else:
        complete = np.zeros(len(requests), dtype=np.bool_)
    left = _along(beyond, group.basis)
    group, left = _fit_pairs(group, left, near, model)
    for name in ("facts", "certainty", "vectors", "cues", "topics"):
        raw = _features(name, requests, model, group)
        if not raw.shape[1]:
            continue
        centre = raw.mean(axis=0)
        features = raw - centre
        blocks = (
            [(complete, slice(None))]
            if complete.any()
            else [(~np.isnan(left[:, p]), slice(p, p + 1)) for p in range(m)]
        )
        ridges = tuple(fit_ridge(features[rows], left[rows, columns]) for rows, columns in blocks)
        said = _side_by_side([ridge.predict(features) for ridge in ridges])
        left = left - said
        if not any(ridge.used.any() for ridge in ridges):
            hidden = _side_by_side([ridge.variance(features) for ridge in ridges]).mean(axis=0)
            group = replace(group, quiet=group.quiet + hidden)
        else:
            group = replace(
                group,
                centre={**group.centre, name: centre},
                ridges={**group.ridges, name: ridges},
                unread={**group.unread, name: (said[~_unknown(features)] ** 2).mean(axis=0)},
            )
    return group


def _fit_pairs(
    group: Group, left: FloatArray, near: Neighbours, model: QualityModel
) -> tuple[Group, FloatArray]:
    """Learn how a neighbour's outcome carries over, by direction: copied, ignored, or turned round."""
    found = near.any
    if found.sum() < 2 * FOLDS:
        return group, left
    group = replace(group, alike=np.array([near.likeness[found, 0].mean(), near.in_place[found, 0].mean()]))
    pairs = _pairs(near, model.beyond, group.basis, group.alike)
    weights, error = np.zeros_like(group.pair), np.zeros_like(group.pair_error)
    for p in range(left.shape[1]):
        rows = found & ~np.isnan(left[:, p])
        if rows.sum() < 2 * FOLDS:
            continue
        ridge = fit_ridge(pairs[rows, :, p], left[rows, p : p + 1], LEAST_EVIDENCE)
        weights[p] = ridge.weights[:, 0] * ridge.used
        shrunk = ridge.ratio[0] / (1.0 + ridge.ratio[0] * ridge.power)
        error[p] = ridge.noise[0] * (ridge.basis * shrunk) @ ridge.basis.T
        error[p] += np.outer(ridge.weights, ridge.weights) * ~ridge.used
        error[p] *= ridge.likely
    said = np.einsum("nfp,pf->np", pairs, weights)
    return replace(group, pair=weights, pair_error=error), left - said


# --- features -------------------------------------------------------------------------------------------------------


def _features(name: str, requests: Requests, model: QualityModel, group: Group) -> FloatArray:
    """One block of features, (N, p), centred once the group knows its centre."""
    if name == "cues":
        raw = model.reader.waved(requests.texts.cues, group.cue_mean, group.cue_scale)
    elif name == "topics":
        raw = model.reader.topics(requests.texts)
    elif name == "vectors":
        return _vectors(requests.vectors, len(requests), group.centre.get(name))
    elif name == "certainty":
        return _vectors(_hinges(requests.certainty, model.bends), len(requests), group.centre.get(name))
    else:
        raw = _indicators(requests, model)
    return raw - group.centre[name] if name in group.centre else raw


def _vectors(vectors: FloatArray | None, n: int, centre: FloatArray | None) -> FloatArray:
    """Numbers of N requests, (N, D), centred once the centre is known; an unknown one lies there."""
    if vectors is None:
        return np.zeros((n, 0 if centre is None else centre.size))
    if centre is None:
        known: BoolArray = np.logical_not(np.isnan(vectors).any(axis=1))
        middle = vectors[known].mean(axis=0) if known.any() else 0.0
        return np.where(known[:, None], vectors, middle)
    if vectors.shape[1] != centre.size:
        what = f"has {vectors.shape[1]} numbers; the router learned from vectors of {centre.size}"
        raise RecordError(what, field="embedding")
    return np.nan_to_num(vectors - centre)


def _unknown(features: FloatArray) -> BoolArray:
    """Rows at the very centre, (N,): nothing is known there."""
    unknown: BoolArray = np.logical_not(features.any(axis=1))
    return unknown


def _bends(certainty: FloatArray | None) -> FloatArray:
    """Quantiles of the distinct certainties, (K,): a vote share of few values must not hide its bends under its mass."""
    known = np.zeros(0) if certainty is None else np.unique(certainty[~np.isnan(certainty)])
    return np.quantile(known, BENDS) if known.size > 2 else np.zeros(0)


def _hinges(certainty: FloatArray | None, bends: FloatArray) -> FloatArray | None:
    """Certainty and how far it lies above each bend, (N, K + 1): piecewise linear in sum."""
    if certainty is None:
        return None
    return np.column_stack((certainty, np.maximum(certainty[:, None] - bends, 0.0)))


def _levels(labels: Labels) -> tuple[str, ...]:
    """Values of a fact that can be learned from: seen more than once, and among the `VALUES` most frequent."""
    size = np.bincount(labels.codes[labels.codes >= 0], minlength=len(labels.names))
    often = np.argsort(-size, kind="stable")[:VALUES]
    return tuple(labels.names[value] for value in np.sort(often) if size[value] > 1)


def _side_by_side(columns: Sequence[FloatArray]) -> FloatArray:
    return columns[0] if len(columns) == 1 else np.hstack(columns)


def _indicators(requests: Requests, model: QualityModel) -> FloatArray:
    """One column for each known value of each fact, (N, p)."""
    columns = [np.zeros((len(requests), 0))]
    for name, levels in model.levels.items():
        labels = requests.facts.get(name, Labels.none(len(requests)))
        codes = _codes(labels, levels, -1)
        columns.append((codes[:, None] == np.arange(len(levels))).astype(np.float64))
    return np.hstack(columns)


def _pairs(near: Neighbours, beyond: NDArray[np.float32], basis: FloatArray, alike: FloatArray) -> FloatArray:
    """Outcomes of the neighbours along each direction, alone and times what makes the pair alike, (N, 3, P).

    The sum over neighbours is divided by one more than their number: a single outcome is one draw, and counts for half.
    """
    out, number = np.zeros((len(near.row), 3, len(basis))), np.ones((len(near.row), len(basis)))
    for m in range(near.row.shape[1]):
        rows = np.flatnonzero(near.row[:, m] >= 0)
        if not rows.size:
            break
        score = _along(beyond[near.row[rows, m]], basis)
        known = ~np.isnan(score)
        ways = np.stack(
            (np.ones(rows.size), near.likeness[rows, m] - alike[0], near.in_place[rows, m] - alike[1]), axis=1
        )
        out[rows] += ways[:, :, None] * np.where(known, score, 0.0)[:, None, :]
        number[rows] += known
    out /= number[:, None, :]
    return out


def _along(outcomes: FloatArray | NDArray[np.float32], basis: FloatArray) -> FloatArray:
    """Outcomes (N, M) along each direction, (N, P); NaN where a direction takes in one that is not known."""
    unknown = np.isnan(outcomes)
    along: FloatArray = np.where(unknown, 0.0, outcomes) @ basis.T
    if unknown.any():
        along[unknown.astype(np.float64) @ np.abs(basis.T) > 0] = np.nan
    return along


def _codes(labels: Labels, names: tuple[str, ...], unknown: int) -> IntArray:
    """Each label as a position in `names`, (N,)."""
    at = {name: code for code, name in enumerate(names)}
    table = np.array([*(at.get(name, unknown) for name in labels.names), unknown], dtype=np.int64)
    codes: IntArray = table[labels.codes]
    return codes
