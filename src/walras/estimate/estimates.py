"""Everything that is learned from a log and needed to offer uses: quality, money, seconds and risk of each model.

This is what `walras fit` writes and `walras route` reads. Amounts are physical; prices are put on them elsewhere.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from walras.errors import RecordError, SettingsError, nearest
from walras.estimate import artefact
from walras.estimate.class_means import ClassMeans, class_means
from walras.estimate.harm import HarmModel
from walras.estimate.latency import LatencyModel
from walras.estimate.near import NearIndex
from walras.estimate.outcomes import Joint, fit_joint
from walras.estimate.price_table import PriceTable
from walras.estimate.quality import Group, QualityModel, Requests, fit_quality
from walras.estimate.reader import Reader
from walras.estimate.shrinkage import Ridge
from walras.estimate.text import read_texts
from walras.estimate.usage import UsageModel, cost_from_tokens
from walras.quantities import USD, IntArray, Labels, Uses
from walras.records import Log
from walras.risk import FloatArray

ALSO = ("input_tokens", "cached_input_tokens", "output_tokens", "reasoning_tokens", "loss_usd")
"""Columns worth reading besides those a log is always read with: from tokens money and seconds are worked out anew."""
SCENARIOS = 64
"""Equally likely slices of what wrong actions lose."""
LEAST_TOGETHER = 50
"""Requests answered by two models or more from which their joint law is learned."""
LEAST_LATENCIES = 20
"""Rows of each model from which seconds are worked out from tokens."""


@dataclass(frozen=True, slots=True)
class Live:
    """What is true now and was not in the log."""

    table: PriceTable | None = None
    on: dt.date | None = None
    """Token prices, and the day they are looked up for."""
    list_prices: bool = False
    """Whether expected tokens are charged at `table`, in place of what the log paid."""
    cached: FloatArray | None = None
    """Tokens of each request's prompt that each model still holds in its prefix cache, (N, I)."""
    running: FloatArray | None = None
    waiting: FloatArray | None = None
    """Requests that each model's engine serves and has queued, (I,)."""


@dataclass(frozen=True, slots=True)
class Offer:
    """What N requests could be given."""

    uses: Uses
    quality_error: FloatArray
    """Standard error of q̂, (N, I)."""
    usd_error: FloatArray
    """Standard error of the expected money, (N, I)."""


@dataclass(frozen=True, slots=True)
class Estimates:
    """What each model would give and take."""

    quality: QualityModel
    amounts: Mapping[str, UsageModel]
    """By column of the log; `cost_usd` always, seconds, tokens and extra columns where it has them."""
    latency: LatencyModel | None
    """Seconds from tokens and load, where the log has both seconds and tokens."""
    harm: HarmModel | None
    """Wrong actions and what they lose, where the log has losses."""
    joint: Joint | None
    """How right answers go together, where outcomes are right or wrong: what sequential search needs."""
    losses: FloatArray | None
    """Mean loss by class and joint scenario, (C + 1, I, S), where the log has scenarios [Z-K]."""

    @property
    def models(self) -> tuple[str, ...]:
        return self.quality.models

    def offer(
        self,
        requests: Requests,
        live: Live | None = None,
        *,
        resources: Mapping[str, str] | None = None,
        late_at: Sequence[float] = (),
    ) -> Offer:
        """Uses for N requests, in physical amounts.

        Args:
            resources: resource → column of the log, for amounts besides money.
            late_at: seconds whose breach probability is wanted, for quantile SLAs.

        Raises:
            SettingsError: something is asked for that the log did not show.
        """
        live = live or Live()
        at = _At(self.quality.class_codes(requests.task_class), _length(requests))
        found = self.quality.predict(requests)
        usd, usd_error = self._usd(at, live)
        extra = {
            name: self._amount(column, at, f"resources.{name}") for name, column in (resources or {}).items()
        }
        seconds, late = self._seconds(at, live, late_at)
        uses = Uses(
            names=self.models,
            quality=found.mean,
            amounts=np.stack([usd, *extra.values()], axis=2),
            resources=(USD, *extra),
            seconds=seconds,
            risk=self._risk(at),
            irreversible_risk=self._risk(at, "irreversible_risk"),
            late=late,
        )
        return Offer(uses, found.error, usd_error)

    def _amount(self, column: str, at: _At, key: str | None = None) -> FloatArray:
        """Expected amount, (N, I)."""
        if column not in self.amounts:
            what = f"the router was fitted on a log without '{column}'"
            raise SettingsError(what, key=key or column, hint="fit again on one that has it for every model")
        return self.amounts[column].mean(at.classes, at.length)

    def _risk(self, at: _At, column: str = "risk") -> FloatArray:
        """Expected loss, (N, I): as the log expected it, else from what was lost in fact; 0 where it has neither."""
        if column in self.amounts:
            return self._amount(column, at)
        if self.harm is not None and column == "risk":
            return self.harm.expected_loss(at.classes)[0]
        return np.zeros((1, 1))

    def _usd(self, at: _At, live: Live) -> tuple[FloatArray, FloatArray]:
        """Expected money and its standard error, (N, I).

        Warm tokens are paid at the cached rate, so leaving a warm model costs real money [Z §3.1].
        """
        if live.list_prices:
            table, on = _priced_on(live)
            out, out_error = (
                self._amount("output_tokens", at),
                self.amounts["output_tokens"].predict(at.classes, at.length)[1],
            )
            reasoning = self._amount("reasoning_tokens", at) if "reasoning_tokens" in self.amounts else 0.0
            return cost_from_tokens(
                table.rates(self.models, on),
                input_tokens=self._amount("input_tokens", at),
                cached_input_tokens=0.0 if live.cached is None else live.cached,
                output_tokens=out,
                reasoning_tokens=reasoning,
                output_tokens_se=out_error,
            )
        usd, error = self.amounts["cost_usd"].predict(at.classes, at.length)
        if live.cached is not None:
            table, on = _priced_on(live)
            for column in np.flatnonzero(live.cached.any(axis=0)):
                price = table.price(self.models[column], on)
                saved = live.cached[:, column] * (price.input - price.cached_input) / 1e6
                usd[:, column] = np.maximum(usd[:, column] - saved, 0.0)
        return usd, error

    def _seconds(
        self, at: _At, live: Live, late_at: Sequence[float]
    ) -> tuple[FloatArray, dict[float, FloatArray]]:
        """Expected seconds, and P(L > s) for each s: at the engines' present load where it is known, else as logged."""
        if live.running is None and live.waiting is None:
            if "latency_s" not in self.amounts and not late_at:
                return np.zeros((1, 1)), {}
            logged = self._amount("latency_s", at)
            return logged, {s: self.amounts["latency_s"].exceed(s, at.classes, at.length) for s in late_at}
        if self.latency is None:
            what = "the router was fitted on a log without both seconds and tokens"
            raise SettingsError(what, key="running, waiting", hint="leave the load out, or fit again")
        state = self.latency.state(live.running, live.waiting)
        sent, out = self._amount("input_tokens", at), self.amounts["output_tokens"]
        uncached = np.maximum(sent - (0.0 if live.cached is None else live.cached), 0.0)
        seconds = state.seconds(uncached, out.mean(at.classes, at.length))
        return seconds, {s: state.late(s, uncached, out, at.classes, at.length) for s in late_at}

    def column_of(self, model: str) -> int:
        """Position of a model.

        Raises:
            SettingsError: the router was not fitted on it.
        """
        if model not in self.models:
            hint = nearest(model, self.models)
            raise SettingsError(f"the router does not know the model '{model}'", key="model", hint=hint)
        return self.models.index(model)

    def losses_of(self, requests: Requests) -> FloatArray:
        """Loss in USD by joint scenario, (N, I, S): what CVaR and max–min need [Z-K].

        The log's own scenarios where it has them; else equally likely slices of what wrong actions lose.
        """
        classes = self.quality.class_codes(requests.task_class)
        if self.losses is not None:
            own: FloatArray = self.losses[classes]
            return own
        if self.harm is None:
            raise SettingsError(
                "the router was fitted on a log without risk_scenarios or loss_usd", key="risk_measure"
            )
        return self.harm.losses(classes, SCENARIOS)

    def save(self, folder: Path, about: Mapping[str, Any]) -> None:
        """Write to a folder; see `artefact.save`."""
        artefact.save(folder, self, about)

    @classmethod
    def load(cls, folder: Path) -> tuple[Estimates, dict[str, Any]]:
        """Read from a folder; see `artefact.load`."""
        content, about = artefact.load(folder, KINDS)
        if not isinstance(content, cls):
            raise RecordError("is damaged: it holds no estimates", path=folder, hint="fit it again")
        return content, about


KINDS = (
    *(Estimates, QualityModel, ClassMeans, Group, Ridge, Reader, NearIndex),
    *(UsageModel, LatencyModel, HarmModel, Joint),
)


@dataclass(frozen=True, slots=True)
class _At:
    """Where N requests stand in the tables of amounts."""

    classes: IntArray
    length: FloatArray


def _priced_on(live: Live) -> tuple[PriceTable, dt.date]:
    if live.table is None or live.on is None:
        raise SettingsError("list prices and warm caches need a price table and a day", key="prices")
    return live.table, live.on


def _length(requests: Requests) -> FloatArray:
    """Bytes of each prompt, (N,)."""
    length: FloatArray = np.expm1(requests.texts.cues[:, 0])
    return length


def requests_of(log: Log) -> Requests:
    """What a log knew of its requests before they were answered: text, class, tenant, facts, vectors and certainty."""
    n = len(log)
    facts = dict(log.facts)
    if log.tenant is not None:
        facts["tenant"] = log.tenant
    texts = read_texts(log.prompts if log.prompts is not None else [None] * n)
    return Requests(texts, log.task_class or Labels.none(n), facts, log.embeddings, log.certainty)


def fit_estimates(log: Log, requests: Requests | None = None, *, seed: int = 0) -> Estimates:
    """Learn from a log; `requests` are its `requests_of`, where they are at hand.

    Raises:
        RecordError: a model without a known outcome or cost; see `fit_quality`, `UsageModel.fit`.
    """
    requests = requests_of(log) if requests is None else requests
    quality = fit_quality(requests, log.models, log.per_use["quality"], seed=seed)
    classes, length = quality.class_codes(requests.task_class), _length(requests)
    length = np.where(length > 0, length, np.nan)
    n_classes = len(quality.classes)
    # A column that says nothing of some model (reasoning tokens, where it does not reason) cannot be offered for it.
    known = {
        name: column
        for name, column in log.per_use.items()
        if name == "cost_usd"
        or (name not in ("quality", "propensity", "loss_usd") and not np.isnan(column).all(axis=0).any())
    }
    amounts = {
        name: UsageModel.fit(column, classes, n_classes, length, models=log.models)
        for name, column in known.items()
    }
    harm = losses = None
    if "loss_usd" in log.per_use:
        lost = log.per_use["loss_usd"]
        wrong = np.where(np.isnan(lost), np.nan, lost > 0)
        harm = HarmModel.fit(wrong, classes, n_classes, lost if (lost > 0).any() else None, models=log.models)
    if log.losses is not None:
        named = np.where(classes < n_classes, classes, -1)
        flat = class_means(log.losses.reshape(len(log), -1), named, n_classes).mean
        losses = flat.reshape(-1, *log.losses.shape[1:])
    return Estimates(quality, amounts, _latency(log), harm, _joint(log, classes, n_classes), losses)


def _joint(log: Log, classes: IntArray, n_classes: int) -> Joint | None:
    """The joint law of right and wrong answers; a class never seen is the last one."""
    right = log.per_use["quality"]
    known = right[~np.isnan(right)]
    together = (~np.isnan(right)).sum(axis=1) >= 2
    if not np.isin(known, (0.0, 1.0)).all() or together.sum() < LEAST_TOGETHER:
        return None
    return fit_joint(right, classes, n_classes + 1)


def _latency(log: Log) -> LatencyModel | None:
    """Seconds by tokens, where the log shows them for every model."""
    columns = [log.per_use.get(name) for name in ("latency_s", "input_tokens", "output_tokens")]
    seconds, sent, out = columns
    if seconds is None or sent is None or out is None:
        return None
    enough = (~np.isnan(seconds + sent + out)).sum(axis=0) >= LEAST_LATENCIES
    if not enough.all():
        return None
    uncached = sent - np.nan_to_num(log.per_use.get("cached_input_tokens", np.zeros_like(sent)))
    return LatencyModel.fit(seconds, uncached, out, models=log.models)
