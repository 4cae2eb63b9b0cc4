"""Serving engines as they are polled: rates, states, and prices of their resources, with the reason for each. [Z §3.3]

Rates are taken by this process's own monotonic clock, over the latest `window_s`. A counter that fell, or another start of the process,
is a restart: what was before it says nothing more. Prices hold for `stale_s` after the last good reading, and then decay to the declared
fallback, by 1/e in each further `stale_s`.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from walras.engine.profiles import Profile, load_profile, shipped
from walras.engine.settings import EngineSettings
from walras.engine.steps import StepTimes
from walras.errors import SettingsError, nearest
from walras.settings import EngineKind, EngineLink
from walras.supply.exposition import Page, lacking, parse, read_page
from walras.supply.names import COUNTED, ENGINES, Quantity
from walras.supply.poll import fetch, whole_url
from walras.supply.resource_prices import EngineModel, live_prices
from walras.supply.state import EngineState

MTOK = 1_000_000
RESOURCES = {
    "prefill token": "prefill_token",
    "decode token": "decode_token",
    "KV block-second": "kv_block_s",
    "transferred byte": "transferred_byte",
    "attention pair": "attention_pair",
    "squared second of the line": "line_s2",
}
"""What is priced, and its name in `ResourcePrices`."""
BASE: tuple[Quantity, ...] = ("running", "waiting", "finished", "prompt_tokens", "output_tokens")
"""Without these no price can be told."""
NEEDED: dict[str, tuple[Quantity, ...]] = {"KV block-second": (*BASE, "kv_use")}
FALLBACKS: dict[Quantity, str] = {
    "kv_use": "taken as 0: a decode token costs more than this price says",
    "hit_share": "taken as 0: prompts are priced as if all were computed",
    "preemptions": "taken as none",
}
"""Quantities that something is taken for where they are not exported, and what follows."""
_LINE_REASONS = (
    "prompts attend to all that is before them",
    "who comes while a prompt is computed waits for the rest",
)
BLOCK = 16
"""Tokens of a KV block where neither settings nor the engine say."""
KEPT = 64
"""Pages in a window, at most about: rates need no more."""
LEAST_S = 0.05
"""Two readings closer than this give no rate."""

Amount = TypeVar("Amount", float, NDArray[np.float64])
Fetch = Callable[[str, float], Awaitable[tuple[bytes, str]]]


class Load(NamedTuple):
    """What a request is expected to add to the delay of others in an engine: `quote` of its `expected_amounts`, in plain numbers."""

    hit_share: float
    """Of its prompt, found in memory."""
    block_tokens: float
    token_s: float
    """Seconds between two tokens of an answer; 0: unknown."""
    line_token_s: float
    line_pair_s: float
    """As in `ResourcePrices`, and so are the prices, in USD."""
    prefill_token: float
    decode_token: float
    kv_block_s: float
    attention_pair: float
    line_s2: float

    def congestion(self, tokens: Amount, output_tokens: Amount, seconds: Amount) -> Amount:
        """USD, of a prompt and the expected answer. A byte is not charged: who routes does not see what is moved.

        Args:
            seconds: that it is expected to take in all, where the engine's own pace is unknown.
        """
        cached = tokens * self.hit_share
        new = tokens - cached
        pairs = new * (cached + 0.5 * (new + 1))
        line_s = self.line_token_s * new + self.line_pair_s * pairs
        decode_s = output_tokens * self.token_s if self.token_s else seconds
        prefill_s = self.line_token_s * new + self.line_pair_s * new * (cached + new / 2)
        held = (tokens + cached) / 2 * prefill_s + (tokens + output_tokens / 2) * decode_s
        return (
            self.prefill_token * new
            + self.attention_pair * pairs
            + self.decode_token * (output_tokens - 1) * (output_tokens > 1)
            + self.kv_block_s * held / self.block_tokens
            + self.line_s2 * line_s * line_s
        )


IDLE = Load(0.0, BLOCK, *(0.0,) * 8)
"""Nobody is delayed."""


@dataclass(frozen=True, slots=True)
class Price:
    """Of one resource of an engine, now."""

    resource: str
    usd: float
    """What a unit is charged: as read while fresh, then on its way to the fallback."""
    read_usd: float | None
    """As last read; None: cannot be told."""
    relative_error: float
    """Of what was read; NaN: unknown."""
    reason: str


@dataclass(frozen=True, slots=True)
class EngineNow:
    """An engine and its prices at one moment."""

    engine: str
    kind: EngineKind | None
    at_s: float
    """Seconds since 1970."""
    age_s: float | None
    """Since it was last read well, by a clock that nobody sets; None: never."""
    states: Mapping[str, EngineState]
    """By replica: its address or label."""
    prices: tuple[Price, ...]
    """Of `RESOURCES`."""
    load: Load
    """The same as a request is charged."""
    problem: str | None
    """Why the last reading failed, in whole or in part."""
    notes: tuple[str, ...]
    simulated: bool


def engine_json(now: EngineNow, at_s: float, unit: str = "USD") -> dict[str, Any]:
    """An engine as the service and `walras engines --json` show it."""
    return {
        "engine": now.engine,
        "kind": now.kind,
        "simulated": now.simulated,
        "age_s": None if now.age_s is None else now.age_s + max(at_s - now.at_s, 0.0),
        "problem": now.problem,
        "notes": list(now.notes),
        "states": {replica: asdict(state) for replica, state in now.states.items()},
        "load": now.load._asdict(),
        "prices": [
            {
                "constraint": f"congestion of engine {now.engine}",
                "resource": p.resource,
                "unit": f"{unit} per {p.resource}",
                "price": p.usd,
                "as_read": p.read_usd,
                "relative_error": p.relative_error if math.isfinite(p.relative_error) else None,
                "reason": p.reason,
            }
            for p in now.prices
        ],
    }


# --- one address --------------------------------------------------------------------------------------------------------


class _At(NamedTuple):
    """A page and when it was read, by the monotonic clock."""

    s: float
    page: Page


@dataclass(slots=True)
class History:
    """Pages of one address, from which rates are."""

    window_s: float
    replicas: int = 1
    """That the address sums up."""
    restarts: int = 0
    _pages: deque[_At] = field(default_factory=deque)

    def add(self, at_s: float, page: Page) -> None:
        """The next page."""
        if self._pages:
            before = self._pages[-1].page
            if _restarted(before, page):
                self.restarts += 1
                self._pages.clear()
            elif before.read_by != page.read_by or before.values.keys() != page.values.keys():
                self._pages.clear()
        if len(self._pages) > 1 and at_s - self._pages[-2].s < self.window_s / KEPT:
            self._pages.pop()
        self._pages.append(_At(at_s, page))
        while len(self._pages) > 2 and self._pages[1].s <= at_s - self.window_s:
            self._pages.popleft()

    def page(self, since_s: float) -> Page | None:
        """The latest, unless it is older."""
        return self._pages[-1].page if self._pages and self._pages[-1].s >= since_s else None

    def states(self, at_s: float) -> dict[str, EngineState] | None:
        """By replica, as of `at_s` (since 1970); None before there are two pages to take rates from."""
        if len(self._pages) < 2 or self._pages[-1].s - self._pages[0].s < LEAST_S:
            return None
        first, last = self._pages[0], self._pages[-1]
        found: dict[str, EngineState] = {}
        for replica in last.page.values:
            values = _Rates(first.page, last.page, replica, last.s - first.s, self.replicas)
            found[replica] = _state(values, at_s)
        return found


def _restarted(before: Page, page: Page) -> bool:
    """A counter fell, or the process says that it began at another time."""
    if before.started_s is not None and page.started_s is not None and before.started_s != page.started_s:
        return True
    for replica, values in page.values.items():
        earlier = before.values.get(replica, {})
        for quantity in COUNTED:
            if page.read_by.get(quantity) != before.read_by.get(quantity):
                continue
            was, now = earlier.get(quantity), values.get(quantity)
            if was is None or now is None or (quantity == "hit_share" and now.below is None):
                continue
            if now.above < was.above or (now.below or 0.0) < (was.below or 0.0):
                return True
    return False


@dataclass(frozen=True, slots=True)
class _Rates:
    """Quantities of one replica between two pages; 0 where there are none."""

    first: Page
    last: Page
    replica: str
    seconds: float
    replicas: int

    def gauge(self, quantity: Quantity, page: Page | None = None) -> float:
        value = (page or self.last).values[self.replica].get(quantity)
        return 0.0 if value is None else value.now / (1 if quantity == "kv_use" else self.replicas)

    def per_s(self, quantity: Quantity) -> float:
        was, now = (page.values[self.replica].get(quantity) for page in (self.first, self.last))
        return 0.0 if was is None or now is None else (now.above - was.above) / self.seconds / self.replicas

    def share(self) -> float:
        """Of the prompt tokens that came in between, 0 where none did; else what the gauge says."""
        was, now = (page.values[self.replica].get("hit_share") for page in (self.first, self.last))
        if was is None or now is None:
            return 0.0
        if now.below is None or was.below is None:
            return now.now
        over = now.below - was.below
        return (now.above - was.above) / over if over else 0.0


def _state(of: _Rates, at_s: float) -> EngineState:
    """[`supply.state.state_of`] of a live engine, by the same definitions."""
    finished, prompt, output = (of.per_s(q) for q in ("finished", "prompt_tokens", "output_tokens"))
    inside, before = (of.gauge("running", p) + of.gauge("waiting", p) for p in (of.last, of.first))
    arrivals = max(0.0, finished + (inside - before) / of.seconds)
    share = min(max(of.share(), 0.0), 1.0)
    return EngineState(
        at_s=at_s,
        running=of.gauge("running"),
        waiting=of.gauge("waiting"),
        kv_use=min(of.gauge("kv_use"), 1.0),
        arrivals_per_s=arrivals,
        prompt_tokens_per_s=prompt * (1 - share),
        output_tokens_per_s=output,
        hit_share=share,
        preemptions_per_s=of.per_s("preemptions"),
        mean_prompt_tokens=prompt / arrivals if arrivals > 0 else 0.0,
        mean_output_tokens=output / finished if finished > 0 else 0.0,
    )


# --- one engine ---------------------------------------------------------------------------------------------------------


def profile_of(which: str, key: str) -> Profile:
    """Step times by their name, or from a file.

    Raises:
        SettingsError: no such. RecordError: a file that is none.
    """
    if which in shipped() or which.endswith(".json"):
        return load_profile(which)
    if not Path(which).is_file():
        raise SettingsError(f"no profile '{which}'", key=key, hint=nearest(which, shipped()))
    from walras.engine.fitting import read_profile  # noqa: PLC0415 - measured steps alone need the solver

    return read_profile(which)


class EngineReader:
    """Polls one engine, which may have an address for each replica.

    Raises:
        SettingsError: an address or a profile that is none.
    """

    def __init__(
        self,
        name: str,
        link: EngineLink,
        *,
        get: Fetch = fetch,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name, self.link = name, link
        path = ENGINES[link.kind].path if link.kind else "/metrics"
        self._urls = [whole_url(url, path, f"engines.{name}.urls") for url in link.urls]
        self._profile = None if link.profile is None else profile_of(link.profile, f"engines.{name}.profile")
        self._histories = {url: History(link.window_s, link.replicas) for url in self._urls}
        self._get, self._clock, self._monotonic = get, clock, monotonic
        self._limits: EngineSettings | None = None
        self._steps: StepTimes | None = None
        self._read, self._read_at = self._nothing(), math.nan

    async def poll(self, delay_price: float) -> EngineNow:
        """Read it, and price its resources; what fails is said in what comes back.

        Args:
            delay_price: what a second of delay costs the others on average, USD.
        """
        problems = await asyncio.gather(*map(self._poll_one, self._urls))
        now = self._clock()
        wrong = [p for p in problems if p is not None]
        if len(wrong) < len(self._urls):
            try:
                self._read = self._priced(now, delay_price)
            except Exception as error:  # whatever it is, prices must decay, not stay as they were
                wrong.append(str(error))
        problem = "; ".join(dict.fromkeys(wrong)) or None
        age = self._monotonic() - self._read_at
        aged = replace(self._read, at_s=now, age_s=None if math.isnan(age) else age, problem=problem)
        return self._aged(aged)

    async def _poll_one(self, url: str) -> str | None:
        try:
            body, content_type = await self._get(url, self.link.timeout_s)
            page = read_page(parse(body, content_type), self.link.kind, self.link.model)
        except Exception as error:  # as above; most are RecordErrors
            return str(error) if len(self._urls) == 1 else f"{url} {error}"
        self._histories[url].add(self._monotonic(), page)
        return None

    def _nothing(self) -> EngineNow:
        return EngineNow(
            engine=self.name,
            kind=self.link.kind,
            at_s=self._clock(),
            age_s=None,
            states={},
            prices=tuple(Price(r, 0.0, None, math.nan, "not read yet") for r in RESOURCES),
            load=IDLE._replace(block_tokens=self.link.block_tokens or BLOCK),
            problem=None,
            notes=(),
            simulated=False,
        )

    def _priced(self, now: float, delay_price: float) -> EngineNow:
        """What the pages say now. Of several addresses one that does not answer counts as it last was until that is stale."""
        fresh = self._monotonic() - self.link.stale_s
        known = {url: h for url, h in self._histories.items() if h.page(fresh) is not None}
        pages = [page for h in known.values() if (page := h.page(fresh)) is not None]
        page, states = pages[0], dict[str, EngineState]()
        for url, history in known.items():
            for replica, state in (history.states(now) or {}).items():
                states[_label(url if len(self._urls) > 1 else "", replica)] = state
        notes = tuple(_notes(pages, sum(h.restarts for h in self._histories.values())))
        settings = self._settings(page)
        weight = np.array([s.arrivals_per_s for s in states.values()])
        weight = weight / weight.sum() if weight.any() else np.full(len(states), 1 / max(len(states), 1))
        prices, load = self._prices(page, states, weight, settings, delay_price)
        if states:
            self._read_at = self._monotonic()
        return EngineNow(
            engine=self.name,
            kind=page.kind,
            at_s=now,
            age_s=None,
            states=states,
            prices=prices,
            load=load,
            problem=None,
            notes=notes,
            simulated=any(p.simulated for p in pages),
        )

    def _settings(self, page: Page) -> EngineSettings | str:
        """The engine's limits: declared, else exported, else the profile's; or why they are not known."""
        if self._profile is None:
            return 'step times are not declared: profile = "…" (`walras profiles` has names)'
        own, limits = self.link, self._profile.limits
        block = self._block(page)
        blocks = own.kv_blocks or page.limits.get("kv_blocks") or max(1, limits.kv_tokens // block)
        sequences = own.max_sequences or page.limits.get("max_sequences") or limits.most_sequences
        batched = own.max_batched_tokens or page.limits.get("max_batched_tokens") or limits.step_tokens
        found = EngineSettings(
            blocks, block, max_sequences=sequences, max_batched_tokens=max(batched, sequences)
        )
        if found != self._limits:
            self._limits, self._steps = found, self._profile.steps(found.max_batched_tokens, sequences)
        return found

    def _block(self, page: Page) -> int:
        return self.link.block_tokens or page.limits.get("block_tokens") or BLOCK

    def _prices(
        self,
        page: Page,
        states: Mapping[str, EngineState],
        weight: NDArray[np.float64],
        settings: EngineSettings | str,
        delay_price: float,
    ) -> tuple[tuple[Price, ...], Load]:
        """A request comes to a replica as often as others do: prices are means over replicas, by what arrives there."""
        load = IDLE._replace(block_tokens=self._block(page))
        usd, error, reasons = dict.fromkeys(RESOURCES, 0.0), math.nan, dict.fromkeys(RESOURCES, "")
        if states and isinstance(settings, EngineSettings) and self._steps is not None:
            each = [live_prices(s, settings, self._steps, delay_price) for s in states.values()]

            def mean(values: Iterable[float]) -> float:
                return float(weight @ list(values))

            usd = {r: mean(getattr(p, name) for p in each) for r, name in RESOURCES.items()}
            error = mean(p.relative_error for p in each)
            most = each[int(weight.argmax())]
            reasons = dict(zip(RESOURCES, (*most.reasons, *_LINE_REASONS), strict=True))
            models = [EngineModel.of(s, settings, self._steps) for s in states.values()]
            load = load._replace(
                hit_share=mean(s.hit_share for s in states.values()),
                token_s=mean(m.token_s for m in models),
                line_token_s=mean(p.line_token_s for p in each),
                line_pair_s=mean(p.line_pair_s for p in each),
            )
        found = []
        for resource, price in usd.items():
            why = self._untold(page, states, settings, resource)
            told = Price(resource, price, price, error, reasons[resource])
            found.append(Price(resource, price, None, math.nan, why) if why else told)
        return tuple(found), load

    @staticmethod
    def _untold(
        page: Page, states: Mapping[str, EngineState], settings: EngineSettings | str, resource: str
    ) -> str:
        """Why a price cannot be told; "" where it can."""
        lost = [lacking(page, q) for q in NEEDED.get(resource, BASE) if q in page.missing]
        if lost:
            return "; ".join(lost)
        if isinstance(settings, str):
            return settings
        return "" if states else "rates need a second reading"

    def _aged(self, read: EngineNow) -> EngineNow:
        """The same with the prices that are charged now: fresh, on their way to the fallback, or the fallback."""
        age = read.age_s
        late = 0.0 if age is None else max(age - self.link.stale_s, 0.0)
        left = 0.0 if age is None else math.exp(-late / self.link.stale_s)
        link = self.link
        fallback = (link.prefill_usd / MTOK, link.decode_usd / MTOK, link.kv_block_s_usd, 0.0, 0.0, 0.0)
        prices = tuple(self._charge(p, f, age, left) for p, f in zip(read.prices, fallback, strict=True))
        prefill, decode, kv, _, pair, line = (p.usd for p in prices)
        load = read.load._replace(
            prefill_token=prefill, decode_token=decode, kv_block_s=kv, attention_pair=pair, line_s2=line
        )
        return replace(read, prices=prices, load=load)

    @staticmethod
    def _charge(price: Price, fallback: float, age: float | None, left: float) -> Price:
        if price.read_usd is None:
            return replace(
                price, usd=fallback, reason=f"the declared fallback, since it cannot be told: {price.reason}"
            )
        if left == 1.0:
            return price
        reason = f"last read {age:.0f} s ago: {left:.0%} of what it was, the rest the declared fallback"
        return replace(price, usd=left * price.read_usd + (1 - left) * fallback, reason=reason)


def _label(url: str, replica: str) -> str:
    """What a replica is called."""
    return " ".join(filter(None, (url, replica))) or "0"


def _notes(pages: Sequence[Page], restarts: int) -> Iterator[str]:
    for quantity, what in FALLBACKS.items():
        if any(quantity in page.missing for page in pages):
            yield f"{lacking(pages[0], quantity)}; {what}"
    if restarts:
        yield f"restarted {restarts} time{'s' * (restarts > 1)} since it is watched"


# --- all of them ---------------------------------------------------------------------------------------------------------


async def watch(
    readers: Sequence[EngineReader],
    delay_price: Callable[[], float],
    post: Callable[[tuple[EngineNow, ...]], None],
) -> None:
    """Poll each engine for ever, at its own interval give or take a tenth, and tell all that is known at every reading."""
    known: dict[str, EngineNow] = {}

    async def one(reader: EngineReader) -> None:
        while True:
            known[reader.name] = await reader.poll(delay_price())
            post(tuple(known[r.name] for r in readers if r.name in known))
            await asyncio.sleep(reader.link.poll_s * random.uniform(0.9, 1.1))

    async with asyncio.TaskGroup() as group:
        for reader in readers:
            group.create_task(one(reader))
