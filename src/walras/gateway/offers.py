"""Requests as tasks, models as uses: what the live decision and the clearing of prices both see. [Z §2]"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from walras.errors import SettingsError
from walras.quantities import USD, Labels, Tasks, Uses
from walras.settings import Economy, Kind, ModelSettings
from walras.supply.engines import IDLE, Load

CONGESTION = "congestion"
"""The resource that is the delay of others in an engine, in USD, so that its price is 1."""
MTOK = 1_000_000
"""Prices of tokens are per million of them."""
FORGET = 1 / 200
"""Weight of the latest request in what is expected of a model and class: about the last 200 count."""
PRIOR = 20.0
"""Outcomes that the settings' expected quality counts for."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One request, as far as prices depend on it."""

    value: float
    """V, USD per unit of quality."""
    tokens: float
    """Of the prompt."""
    tenant: str
    task_class: str
    kind: Kind = "chat"
    """Of the models it is open to."""


@dataclass(slots=True)
class Experience:
    """What is expected of one model on one class, as requests come back."""

    quality: float
    output_tokens: float
    seconds: float
    outcomes: float

    def seen(self, output_tokens: float, seconds: float) -> None:
        self.output_tokens += FORGET * (output_tokens - self.output_tokens)
        self.seconds += FORGET * (seconds - self.seconds)

    def judged(self, quality: float) -> None:
        """Mean of the outcomes and the prior; after 200 outcomes the old are forgotten."""
        self.outcomes = min(self.outcomes + 1, 1 / FORGET)
        self.quality += (quality - self.quality) / self.outcomes


Known = Mapping[tuple[str, str], Experience]
"""By (model, class); where there is none the settings' expectation holds."""


def expected(economy: Economy, known: Known, model: str, task_class: str) -> Experience:
    """What is expected of a model on a class."""
    found = known.get((model, task_class))
    if found is not None:
        return found
    settings = economy.models[model]
    quality = settings.quality_by_class.get(task_class, settings.quality)
    made = settings.output_tokens if settings.kind == "chat" else 0.0
    return Experience(quality, made, settings.seconds, PRIOR)


def tasks_of(economy: Economy, asked: Sequence[Asked]) -> Tasks:
    """N requests as tasks, at the settings' declared prices of delay and risk."""
    n = len(asked)
    tenant, task_class = (_labels([getattr(a, name) for a in asked]) for name in ("tenant", "task_class"))

    def declared(key: str, default: float) -> Any:
        return economy.per_task(key, default, n, tenant, task_class)

    return Tasks(
        value=np.array([a.value for a in asked]),
        latency_price=declared("lambda0", 0.0),
        risk_price=declared("rho0", 1.0),
        irreversible_price=declared("rho_irr", 0.0),
        tenant=tenant,
        task_class=task_class,
    )


def uses_of(
    economy: Economy, asked: Sequence[Asked], known: Known, loads: Mapping[str, Load] | None = None
) -> Uses:
    """What each model would give and take on N requests, (N, I); models of another kind are not open to a request.

    Args:
        loads: what a request adds to the delay of others, by model; left out, there is no such resource.

    Raises:
        SettingsError: an absolute rule names a model that is not there.
    """
    names = tuple(economy.models)
    classes = sorted({a.task_class for a in asked})
    rows = {c: [expected(economy, known, name, c) for name in names] for c in classes}
    models = [economy.models[name] for name in names]
    tokens = np.array([a.tokens for a in asked])
    each = {c: i for i, c in enumerate(classes)}
    at = np.array([each[a.task_class] for a in asked])

    def column(of: Callable[[Experience, ModelSettings], float]) -> Any:
        table = [[of(e, m) for e, m in zip(rows[c], models, strict=True)] for c in classes]
        return np.array(table)[at]

    fixed = column(lambda e, m: e.output_tokens * m.output_usd / MTOK + m.request_usd)
    usd = fixed + tokens[:, None] * np.array([m.input_usd for m in models]) / MTOK
    labels = _labels([a.tenant for a in asked]), _labels([a.task_class for a in asked])
    for kind, group, model in economy.forbidden_models():
        if model not in names:
            raise SettingsError(f"there is no model '{model}'", key=f"{kind}.{group}.forbidden_models")
    others = None
    if loads is not None:
        flat = [loads.get(name, IDLE) for name in names]
        made, seconds = column(lambda e, _: e.output_tokens), column(lambda e, _: e.seconds)
        pairs = zip(flat, made.T, seconds.T, strict=True)
        others = np.column_stack([load.congestion(tokens, out, s) for load, out, s in pairs])
    suited = np.array([a.kind for a in asked])[:, None] == np.array([m.kind for m in models])
    return Uses(
        names=names,
        quality=column(lambda e, _: min(max(e.quality, 0.0), 1.0)),
        amounts=usd[:, :, None] if others is None else np.stack((usd, others), axis=2),
        resources=(USD,) if others is None else (USD, CONGESTION),
        seconds=column(lambda e, _: e.seconds),
        risk=column(lambda _, m: m.risk_usd),
        allowed=suited & ~economy.forbidden(names, len(asked), *labels),
    )


def _labels(values: Sequence[str]) -> Labels:
    names = tuple(dict.fromkeys(v for v in values if v))
    at = {name: code for code, name in enumerate(names)}
    return Labels(np.array([at.get(v, -1) for v in values], dtype=np.int64), names)
