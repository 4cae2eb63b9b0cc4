"""When estimates no longer hold: betting against them while outcomes stream in, at any time, with few false alarms.

While predictions hold, nobody can expect to grow rich by betting on residuals r = observed − predicted. A bet λ that
starts at row j has turned 1 USD into

    K_λ(j, t) = Π_{i=j…t} (1 + λ·r_i) / (1 + |λ|·tolerance)

by row t; with a mean residual within ± tolerance, whatever else the outcomes do, that is a supermartingale, so it ever
reaches x with probability ≤ 1/x (Ville 1939; Waudby-Smith and Ramdas 2024). Each cell's 1 USD is split evenly over the
bets and over starts j with weights w_j that sum to 1 (e-detectors: Shin, Ramdas and Rinaldo 2024). An early start
finds what was always wrong, a late one what has just changed, however long all was well. One alarms when the best
part, counted at its weight, reaches cells/α: over the whole stream, all cells together, a false alarm has probability
≤ α. Nothing need be kept but the best start of each bet, because a later start never does better than the best before
it unless it is worth more from the outset.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar, cast

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray
from scipy.stats import beta

from walras.errors import QuantityError
from walras.quantities import IntArray, Labels
from walras.risk import FloatArray

BETS = np.array([-0.9, -0.5, -0.25, -0.1, 0.1, 0.25, 0.5, 0.9])
"""λ. A shift δ of outcomes with variance σ² is found quickest by δ/σ²: these serve 0.02 to 0.3."""
FIRST_STARTS = 8
"""Rows between the first starts of a cell; later they are as far apart as an eighth of what it has seen."""
BOX = 0.1
"""Share of α that pays for not knowing the class mix of the log exactly."""
UNSEEN_NAMES = 100
"""Most unseen names that are counted one by one."""
_ROBBINS = 2.0
"""ρ of the normal mixture: narrowest near 200 rows."""
_ABSENT, _UNSEEN = -1, -2

Kernel = TypeVar("Kernel", bound=Callable[..., Any])
Kind = Literal["quality", "class mix", "unseen"]


def compiled(kernel: Kernel) -> Kernel:
    """Exact arithmetic: rows one by one and in a batch come out the same, bit for bit."""
    return cast(Kernel, njit(nogil=True, cache=True, error_model="numpy")(kernel))


@dataclass(frozen=True, slots=True)
class Alarm:
    """One cell whose estimates do not hold."""

    kind: Kind
    """Quality of a model, share of a class among requests, or share of requests of classes never seen."""
    model: str | None
    """None: not about a model."""
    task_class: str | None
    """None: over all classes."""
    since: float
    """When the change began, as far as the best bet can tell, time."""
    found: float
    """When it was first certain enough, time."""
    rows: int
    """Rows of the cell from `since` on that the figures below rest on."""
    mean_residual: float
    """Mean of observed − predicted over them; a share less its expected share for a mix."""
    interval: tuple[float, float]
    """For their expected mean. Each end holds at any time, for all cells and starts at once, with probability 1 − α."""
    evidence: float
    """Betting odds against no drift anywhere, at their highest; an alarm from 1/α on."""


@dataclass(frozen=True, slots=True)
class Drift:
    """What a stream says of the estimates."""

    alarms: tuple[Alarm, ...]
    """Strongest first. An alarm stays, even if the cell recovers."""
    unseen_models: tuple[tuple[str, int], ...]
    """Models the estimates know nothing of, and rows of outcomes; most first, at most `UNSEEN_NAMES`."""
    unseen_classes: tuple[tuple[str, int], ...]
    """Classes likewise, and rows of requests."""
    rows: int
    """Outcomes."""
    refit: bool
    """Whether there is an alarm or an unseen model: the latter is no matter of chance."""
    reason: str
    """One sentence."""


class Book(NamedTuple):
    """State of all K cells × G bets: plain arrays."""

    wealth: FloatArray
    """log w_j + log K of the best start, (K, G)."""
    weight: FloatArray
    """log w_j of that start, (K, G); likewise the next three."""
    rows: FloatArray
    total: FloatArray
    since: FloatArray
    seen: IntArray
    """Rows, (K,)."""
    starts: IntArray
    next_start: IntArray
    peak: FloatArray
    """Highest log wealth of any bet so far, (K,)."""
    best: FloatArray
    """Then: bet, rows, total, since, log w, (K, 5)."""
    found: FloatArray
    """Time of the alarm, (K,); NaN without."""

    @classmethod
    def empty(cls, n_cells: int) -> Book:
        def table() -> FloatArray:
            return np.zeros((n_cells, BETS.size))

        def counts() -> IntArray:
            return np.zeros(n_cells, np.int64)

        never = np.full(n_cells, -np.inf)
        return cls(
            table() - np.inf,
            table(),
            table(),
            table(),
            table(),
            counts(),
            counts(),
            counts(),
            never,
            np.zeros((n_cells, 5)),
            np.full(n_cells, np.nan),
        )


class DriftMonitor:
    """Watches predictions of quality by model and class (`update`), and what is asked for (`update_requests`).

    There is a cell for each model and class, one for each model over all classes, one for each class's share of requests
    where `mix` is given, and one for the share of unseen classes. After a refit make a new monitor: its predictions
    are new, and so is its α.

    Args:
        alpha: probability of any false alarm, ever.
        tolerance: a mean residual of at most this size is no drift, scalar or (M, C): the estimates' own error, else a
            long stream will find it. Two standard errors are a fair choice.
        mix: how many requests of each class the estimates were made from, (C,).
        unseen_share: unseen classes are no drift up to this share of requests.

    Raises:
        QuantityError: an argument is out of range or does not fit the others.
    """

    def __init__(
        self,
        alpha: float,
        models: tuple[str, ...],
        classes: tuple[str, ...],
        *,
        tolerance: ArrayLike = 0.0,
        mix: ArrayLike | None = None,
        unseen_share: float = 0.01,
    ) -> None:
        if not 0 < alpha < 1:
            raise QuantityError(f"the false-alarm rate must be inside (0, 1), got {alpha}")
        if not models or not classes or len({*models}) < len(models) or len({*classes}) < len(classes):
            raise QuantityError("a drift monitor needs at least one model and one class, each named once")
        if not 0 <= unseen_share < 1:
            raise QuantityError(f"unseen_share must be in [0, 1), got {unseen_share}")
        self.alpha, self.models, self.classes = alpha, tuple(models), tuple(classes)
        m, c = len(models), len(classes)
        allowed = _tolerances(tolerance, m, c)
        share, spread = _box(mix, alpha, c)
        self._share = share
        self._tolerance = np.concatenate((allowed.ravel(), allowed.max(axis=1), spread, [unseen_share]))
        cells = self._tolerance.size
        self._level = math.log(cells / (alpha * (1 - BOX) if share.size else alpha))
        self._bar = self._level + math.log(BETS.size)
        self._book = Book.empty(cells)
        self._rows = self._requests = 0
        self._unseen: tuple[dict[str, int], dict[str, int]] = ({}, {})
        self._code = tuple({name: i for i, name in enumerate(names)} for names in (self.models, self.classes))

    def update(
        self,
        model: str,
        task_class: str | None,
        predicted: float,
        observed: float,
        *,
        time: float | None = None,
    ) -> None:
        """One outcome. Cost does not grow with the stream. A class of None is not known.

        Raises:
            QuantityError: predicted or observed quality is not in [0, 1].
        """
        when = None if time is None else np.full(1, time)
        self.update_batch(
            _one(model), _one(task_class), np.full(1, predicted), np.full(1, observed), time=when
        )

    def update_batch(
        self,
        model: Labels,
        task_class: Labels,
        predicted: FloatArray,
        observed: FloatArray,
        *,
        time: FloatArray | None = None,
    ) -> None:
        """N outcomes in order of time, all (N,); the same, to the bit, as one by one. Without `time` rows are counted.

        Raises:
            QuantityError: columns of different lengths, a quality that is not in [0, 1], or a row without a model; then
                nothing has changed.
        """
        n = len(model.codes)
        columns = [np.asarray(column, np.float64) for column in (predicted, observed)]
        for name, column in zip(("predicted", "observed"), columns, strict=True):
            bad = np.flatnonzero(~((column >= 0) & (column <= 1)))
            if bad.size:
                raise QuantityError(
                    f"drift: {name} of row {bad[0]} is {column[bad[0]]}; a quality is in [0, 1]"
                )
        columns.append(_times(time, n, self._rows))
        shapes = {column.shape for column in (*columns, task_class.codes)}
        if shapes != {(n,)}:
            raise QuantityError(f"drift: columns have shapes {sorted(shapes)}; all must be ({n},)")
        if (model.codes < 0).any():
            raise QuantityError(f"drift: row {np.argmax(model.codes < 0)} has no model")
        models = self._known(model, self._code[0], self._unseen[0])
        classes = self._known(task_class, self._code[1], {})
        rules = (self._tolerance, len(self.models), len(self.classes), self._bar)
        _bet_on_outcomes(models, classes, columns[0], columns[1], columns[2], rules, self._book)
        self._rows += n

    def update_requests(self, task_class: Labels, *, time: FloatArray | None = None) -> None:
        """Classes of N requests in order of time, (N,): each request once, however many models answered it.

        Raises:
            QuantityError: times that do not fit.
        """
        n = len(task_class.codes)
        when = _times(time, n, self._requests)
        classes = self._known(task_class, self._code[1], self._unseen[1])
        first = len(self.models) * (len(self.classes) + 1)
        _bet_on_classes(classes, when, self._share, (self._tolerance, first, self._bar), self._book)
        self._requests += n

    def report(self) -> Drift:
        """What has been found so far. Looking often costs nothing: the false-alarm rate covers every look."""
        found = np.flatnonzero(np.isfinite(self._book.found))
        alarms = tuple(
            self._alarm(cell) for cell in found[np.argsort(-self._book.peak[found], kind="stable")]
        )
        models, classes = (
            tuple(sorted(names.items(), key=lambda item: (-item[1], item[0]))) for names in self._unseen
        )
        return Drift(
            alarms, models, classes, self._rows, bool(alarms or models), _reason(alarms, models, self._rows)
        )

    def state(self) -> dict[str, NDArray[Any]]:
        """Everything learned, as plain arrays by name; copies."""
        arrays: dict[str, NDArray[Any]] = {name: a.copy() for name, a in self._book._asdict().items()}
        for which, names in zip(("models", "classes"), self._unseen, strict=True):
            arrays[f"unseen_{which}"] = np.array(list(names), dtype=np.str_)
            arrays[f"unseen_{which}_rows"] = np.array(list(names.values()), dtype=np.int64)
        return arrays | {"counts": np.array([self._rows, self._requests])}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on from `state` of a monitor that was made with the same arguments.

        Raises:
            QuantityError: an array is missing, or has another shape.
        """
        book = []
        for name, mine in self._book._asdict().items():
            if name not in state or state[name].shape != mine.shape:
                raise QuantityError(
                    f"drift: state has no '{name}' of shape {mine.shape}; was it another monitor's?"
                )
            book.append(np.array(state[name], dtype=mine.dtype))
        self._book = Book(*book)
        self._rows, self._requests = (int(count) for count in state["counts"])
        for which, names in zip(("models", "classes"), self._unseen, strict=True):
            names.clear()
            names.update(
                zip(state[f"unseen_{which}"].tolist(), state[f"unseen_{which}_rows"].tolist(), strict=True)
            )

    @staticmethod
    def _known(labels: Labels, known: Mapping[str, int], unseen: dict[str, int]) -> IntArray:
        """Own codes of some labels; names that have none are counted in `unseen`."""
        own = np.array([*(known.get(name, _UNSEEN) for name in labels.names), _ABSENT], dtype=np.int64)
        for i in np.flatnonzero(own == _UNSEEN):
            name, rows = labels.names[i], int((labels.codes == i).sum())
            if rows and (name in unseen or len(unseen) < UNSEEN_NAMES):
                unseen[name] = unseen.get(name, 0) + rows
        return own[labels.codes]

    def _alarm(self, cell: int) -> Alarm:
        bet, rows, total, since, weight = self._book.best[cell]
        peak, lam = float(self._book.peak[cell]), float(BETS[int(bet)])
        m, c = len(self.models), len(self.classes)
        kind: Kind = (
            "quality" if cell < m * c + m else "unseen" if cell == self._book.peak.size - 1 else "class mix"
        )
        model = task_class = None
        if kind == "quality":
            model = self.models[cell // c if cell < m * c else cell - m * c]
            task_class = self.classes[cell % c] if cell < m * c else None
        elif kind == "class mix":
            task_class = self.classes[cell - m * c - m]
        return Alarm(
            kind,
            model,
            task_class,
            float(since),
            float(self._book.found[cell]),
            int(rows),
            float(total / rows),
            self._interval(
                lam, rows, total, weight, peak + rows * math.log1p(abs(lam) * self._tolerance[cell])
            ),
            math.exp(min(peak - self._bar - math.log(self.alpha), 700.0)),
        )

    def _interval(
        self, lam: float, rows: float, total: float, weight: float, log_wealth: float
    ) -> tuple[float, float]:
        """Where the mean may lie: the near end is what the bet has won against, the far one the normal mixture's.

        A mean m (over the rows, each given its past) lets the bet grow at most like (1 + λm)^rows; Robbins 1970.
        """
        near = math.expm1((log_wealth - self._bar) / rows) / lam
        spread = rows / 4.0 + _ROBBINS  # outcomes in [0, 1] spread no more than a fair coin
        log_odds = math.log(spread / _ROBBINS) + 2.0 * (self._level - weight)
        half = math.sqrt(spread * log_odds) / rows
        far = total / rows + (half if lam > 0 else -half)
        low, high = (near, far) if lam > 0 else (far, near)
        return float(max(low, -1.0)), float(min(high, 1.0))


def _one(name: str | None) -> Labels:
    return Labels.none(1) if name is None else Labels(np.zeros(1, np.int64), (name,))


def _times(time: FloatArray | None, n: int, before: int) -> FloatArray:
    if time is None:
        return np.arange(before, before + n, dtype=np.float64)
    when = np.asarray(time, np.float64)
    if when.shape != (n,) or not np.isfinite(when).all():
        raise QuantityError(f"drift: time has shape {when.shape}; it must be ({n},) and finite")
    return when


def _tolerances(tolerance: ArrayLike, m: int, c: int) -> FloatArray:
    given = np.asarray(tolerance, dtype=np.float64)
    if given.shape not in ((), (m, c)) or not ((given >= 0) & (given < 1)).all():
        raise QuantityError(
            f"tolerance must be in [0, 1), one number or of shape ({m}, {c}); got {given.shape}"
        )
    return np.broadcast_to(given, (m, c))


def _box(mix: ArrayLike | None, alpha: float, c: int) -> tuple[FloatArray, FloatArray]:
    """Middle and half width of what each class's share may be, (C,), by exact binomial limits (Clopper, Pearson 1934)."""
    if mix is None:
        return np.empty(0), np.empty(0)
    count = np.asarray(mix, dtype=np.float64)
    if count.shape != (c,) or not (count >= 0).all() or not 0 < count.sum() < math.inf:
        raise QuantityError(f"mix must hold the rows of each of the {c} classes, ≥ 0 and not all 0")
    n, tail = count.sum(), alpha * BOX / (2 * c)
    low = np.where(count > 0, beta.ppf(tail, np.maximum(count, 1), n - count + 1), 0.0)
    high = np.where(count < n, beta.isf(tail, count + 1, np.maximum(n - count, 1)), 1.0)
    return (low + high) / 2, (high - low) / 2


def _reason(alarms: tuple[Alarm, ...], models: tuple[tuple[str, int], ...], rows: int) -> str:
    if not alarms and models:
        return f"Refit: model {models[0][0]} has outcomes and no estimates."
    if not alarms:
        return f"No drift in {rows:,} rows."
    worst = alarms[0]
    low, high = worst.interval
    if worst.kind == "unseen":
        what = f"unseen classes make up {worst.mean_residual:.3f} of requests"
    elif worst.kind == "class mix":
        what = f"the share of class {worst.task_class} among requests is off by {worst.mean_residual:+.3f}"
    else:
        where = f" on class {worst.task_class}" if worst.task_class else ""
        what = f"quality of {worst.model}{where} is off by {worst.mean_residual:+.3f}"
    more = f"; {len(alarms) - 1} more" if len(alarms) > 1 else ""
    return f"Refit: {what} ({low:+.3f} to {high:+.3f}) over {worst.rows:,} rows since {worst.since:g}{more}."


@compiled
def _bet_on_outcomes(
    model: IntArray,
    task_class: IntArray,
    predicted: FloatArray,
    observed: FloatArray,
    time: FloatArray,
    rules: tuple[FloatArray, int, int, float],
    book: Book,
) -> None:
    """A row of a model or class never seen says nothing about the estimates."""
    tolerance, n_models, n_classes, bar = rules
    for n in range(model.size):
        m, c = model[n], task_class[n]
        if min(m, c) == _UNSEEN:
            continue
        residual = observed[n] - predicted[n]
        pooled, cell = n_models * n_classes + m, m * n_classes + c
        _bet(pooled, residual, time[n], tolerance[pooled], bar, book)
        if c != _ABSENT:
            _bet(cell, residual, time[n], tolerance[cell], bar, book)


@compiled
def _bet_on_classes(
    task_class: IntArray,
    time: FloatArray,
    share: FloatArray,
    rules: tuple[FloatArray, int, float],
    book: Book,
) -> None:
    """Shares are among the requests of known classes."""
    tolerance, first, bar = rules
    last = tolerance.size - 1
    for n in range(task_class.size):
        c = task_class[n]
        _bet(last, 1.0 if c == _UNSEEN else 0.0, time[n], tolerance[last], bar, book)
        for k in range(share.size if c >= 0 else 0):
            residual = (1.0 if k == c else 0.0) - share[k]
            _bet(first + k, residual, time[n], tolerance[first + k], bar, book)


@compiled
def _bet(cell: int, residual: float, time: float, tolerance: float, bar: float, book: Book) -> None:
    starts = book.seen[cell] == book.next_start[cell]
    weight = 0.0
    if starts:
        k = book.starts[cell]
        weight = -math.log((k + 1.0) * (k + 2.0))  # Σ_k 1/((k + 1)(k + 2)) = 1
        book.starts[cell] += 1
        book.next_start[cell] += max(FIRST_STARTS, book.seen[cell] // 8)
    book.seen[cell] += 1
    for g in range(BETS.size):
        if starts and book.wealth[cell, g] < weight:
            book.wealth[cell, g] = book.weight[cell, g] = weight
            book.rows[cell, g] = book.total[cell, g] = 0.0
            book.since[cell, g] = time
        book.wealth[cell, g] += math.log1p(BETS[g] * residual) - math.log1p(abs(BETS[g]) * tolerance)
        book.rows[cell, g] += 1.0
        book.total[cell, g] += residual
        if book.wealth[cell, g] > book.peak[cell]:
            book.peak[cell] = book.wealth[cell, g]
            best = book.best[cell]
            best[0], best[1], best[2] = g, book.rows[cell, g], book.total[cell, g]
            best[3], best[4] = book.since[cell, g], book.weight[cell, g]
    if book.peak[cell] >= bar and math.isnan(book.found[cell]):
        book.found[cell] = time
