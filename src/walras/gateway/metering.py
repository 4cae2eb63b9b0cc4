"""What a call will cost, how much to reserve for it, and what money is worth when it runs short.

To reserve all that a call may cost wastes most of it, since lengths are heavy-tailed: few answers are long. So a call
reserves its input and the learned *mean* of its output, and asks for another step before it emits more than that. The
mean, because open calls then hold together what they will spend together (law of large numbers), however heavy the
tail: a lower quantile admits calls that are cut later, a higher one refuses calls that would have fitted.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import ceil
from typing import TYPE_CHECKING, TypeVar

import msgspec

from walras.errors import QuantityError
from walras.gateway.escrow import Escrow, Refused, Reservation, Standing
from walras.ledger.money import Nano

if TYPE_CHECKING:  # it brings numpy along, for one annotation
    from walras.estimate.price_table import TokenPrice

LEAST = 0.5
"""A call starts only if this quantile fits: one that would more likely than not be cut is not worth its input."""
STEP = 256
"""Tokens asked for at a time."""
AHEAD = 16
"""Least tokens kept reserved beyond what was emitted: the upstream may have made them before it notices a cut."""
GAIN = 20.0
"""Of the price on pace: 5% behind it makes money 2.6 times as dear."""
GRACE = 0.02
"""Share of the budget by which spending may run ahead before it is priced."""
LAST = 0.1
"""Share of a budget without period that is priced as it runs out."""
MOST = 1e6
"""Highest multiplier."""

_PER = 1_000_000


@dataclass(frozen=True, slots=True)
class Tariff:
    """The dearest that a token can be billed, whole nano-USD per million tokens."""

    input: int
    output: int
    request_nano: Nano = 0
    """Besides the tokens."""

    @classmethod
    def of(cls, price: TokenPrice) -> Tariff:
        """From USD per million tokens; input may turn out to be a cache write, output to be reasoning."""
        dearest = (
            max(price.input, price.cached_input, price.cache_write),
            max(price.output, price.reasoning),
        )
        return cls(*(ceil(round(usd * 1e9, 3)) for usd in dearest))

    def cost(self, input_tokens: int, output_tokens: int) -> Nano:
        """At most this, rounded up to whole nano-USD."""
        return self.request_nano - (-(input_tokens * self.input + output_tokens * self.output) // _PER)

    def affordable(self, amount_nano: Nano, input_tokens: int) -> int:
        """Most output tokens with `cost` within the amount; the tariff must charge for output."""
        return ((amount_nano - self.request_nano) * _PER - input_tokens * self.input) // self.output


# --- lengths ------------------------------------------------------------------------------------------------------

_EDGES = tuple(sorted({ceil(2 ** (k / 8)) for k in range(1, 161)}))
"""Upper edges of the buckets, 9% apart, to a million."""
_BUCKETS = len(_EDGES)
_WINDOW = 2048.0
"""Calls after which all counts are halved, so that the distribution follows a change."""
_TRUST = 8.0
"""Calls' worth of belief that a group is like the one it belongs to."""
_GROUPS = 2048
"""Most groups; a class may be any text a client sends, and memory must not grow with it."""


class Lengths:
    """A distribution of counts ≥ 1 that learns as it goes; a few calls lean on the `parent`'s shape.

    A log-histogram with the estimate of Kaplan and Meier (1958): a call that was cut says only that it would have been
    longer, and leaving it out would make long calls look rare just when money is short. The longest seen counts as
    ended (Efron 1967).
    """

    __slots__ = ("_cut", "_due", "_ended", "_known", "_parent", "_seen")

    def __init__(self, parent: Lengths | None, guess: int = 256) -> None:
        """`guess` is what to expect before anything was seen, where there is no parent."""
        self._ended, self._cut = array("d", bytes(8 * _BUCKETS)), array("d", bytes(8 * _BUCKETS))
        self._parent, self._seen, self._due = parent, 0.0, 0.0
        self._known: dict[float | str, int] = {}
        if parent is None:
            self._ended[_bucket(guess)] = self._seen = 1.0

    def observe(self, length: int, *, ended: bool) -> None:
        """One call: its length, or with `ended` False the length at which it was cut."""
        self.observe_in(_bucket(length), ended=ended)

    def observe_in(self, bucket: int, *, ended: bool) -> None:
        """The same, where the bucket is known."""
        (self._ended if ended else self._cut)[bucket] += 1.0
        self._seen += 1.0
        if self._seen >= _WINDOW:
            self._ended, self._cut = (array("d", (n / 2 for n in a)) for a in (self._ended, self._cut))
            self._seen, self._due = self._seen / 2, 0.0
        if self._seen >= self._due:  # every call at first, then one in 32 of what is known
            self._known.clear()
            self._due = self._seen * (1 + 1 / 32)

    def quantile(self, level: float) -> int:
        """Length not exceeded with this probability, rounded up to a bucket's edge (9%)."""
        known = self._known.get(level)
        if known is None:
            below = accumulate(self._shape())
            known = next((e for p, e in zip(below, _EDGES, strict=True) if p >= level - 1e-9), _EDGES[-1])
            self._known[level] = known
        return known

    def mean(self) -> int:
        """Expected length."""
        known = self._known.get("mean")
        if known is None:
            ends = zip(self._shape(), (1, *_EDGES), _EDGES, strict=False)
            known = self._known["mean"] = round(sum(p * (low + high) / 2 for p, low, high in ends))
        return known

    def beyond(self, length: int) -> float:
        """Expected length beyond this one, of what is longer; as much again where nothing was."""
        mass = total = 0.0
        for p, low, high in zip(self._shape(), (1, *_EDGES), _EDGES, strict=False):
            if high > length:
                mass += p
                total += p * max((max(low, length) + high) / 2 - length, 0.0)
        return total / mass if mass > 1e-9 else float(length)

    def _shape(self) -> list[float]:
        """Probability of each bucket."""
        prior = [0.0] * _BUCKETS if self._parent is None else [_TRUST * p for p in self._parent._shape()]
        at_risk, left, shape = sum(prior) + self._seen, 1.0, []
        for ended, cut, belief in zip(self._ended, self._cut, prior, strict=True):
            after = at_risk - ended - cut - belief
            share = left * (ended + belief) / at_risk if after > 1e-6 else left
            at_risk, left = after, left - share
            shape.append(share)
        return shape


def _bucket(length: int) -> int:
    return min(bisect_left(_EDGES, length), _BUCKETS - 1)


# --- one call -----------------------------------------------------------------------------------------------------


class Job(msgspec.Struct, frozen=True):
    """A call that is about to be made."""

    use: str
    task_class: str
    tariff: Tariff
    input_tokens: int
    max_tokens: int
    """Most the upstream may return: what the client asked for, or the model's own limit."""
    metered: bool = True
    """Whether output can be seen as it comes. What comes in one piece, or is reasoned in secret, cannot be cut: then all
    of `max_tokens` is reserved."""


class Signs:
    """How many tokens the pieces and the characters of a stream stand for, as one use makes them.

    Both are learned from what upstreams count, tokens that are hidden included; at any rise at once, so that a stream is
    seldom metered too low, and the larger one counts.
    """

    __slots__ = ("_burst", "_character", "_piece")

    def __init__(self) -> None:
        self._burst = 0.0
        self._piece, self._character = 1.0, 1 / 3
        """Tokens for each: most providers send one in a piece, and few languages have less than three characters in one."""

    @property
    def ahead(self) -> int:
        """Tokens to keep reserved: as many as have lately come at once, for they are paid even if they do not fit."""
        return min(max(AHEAD, ceil(self._burst)), STEP)

    def came(self, tokens: int) -> None:
        """So many came at once."""
        self._burst = max(tokens, self._burst * (1 - 1 / 256))

    def tokens(self, pieces: int, characters: int) -> int:
        """Tokens of a stream so far."""
        return ceil(max(pieces * self._piece, characters * self._character))

    def learn(self, pieces: int, characters: int, tokens: int) -> None:
        """What an upstream counted for a whole stream."""
        self._piece = _toward(self._piece, min(max(tokens / max(pieces, 1), 1 / 8), _HIDDEN))
        self._character = _toward(self._character, min(max(tokens / max(characters, 1), 1 / 16), _HIDDEN))


_HIDDEN = 32.0
"""Most tokens that a model is taken to make for each piece or character that is seen."""


def _toward(known: float, ratio: float) -> float:
    return max(ratio, known + (ratio - known) / 16)


class Call:
    """The money of one call. Ask `emit` before tokens go out; then `settle` or `release`, whatever happens."""

    __slots__ = ("_job", "_meter", "_reservation", "ahead", "emitted_tokens", "max_tokens", "reserved_nano")

    def __init__(self, meter: Meter, job: Job, reservation: Reservation, max_tokens: int) -> None:
        self._meter, self._job = meter, job
        self._reservation: Reservation | None = reservation
        self.max_tokens = max_tokens
        """What to ask of the upstream: less than the job's where no more is affordable."""
        self.reserved_nano = reservation.amount_nano
        """Most that was ever set aside: what to charge where the upstream's charge cannot be known."""
        self.emitted_tokens = 0
        self.ahead = AHEAD
        """Tokens kept reserved beyond those emitted."""

    @property
    def emitted_nano(self) -> Nano:
        """What the input and the tokens emitted so far cost at most."""
        return self._job.tariff.cost(self._job.input_tokens, self.emitted_tokens)

    @property
    def needed_nano(self) -> Nano:
        """What the input and the tokens emitted so far cost at most, and what the upstream may have made meanwhile."""
        total = max(self.emitted_tokens, min(self.emitted_tokens + self.ahead, self.max_tokens))
        return self._job.tariff.cost(self._job.input_tokens, total)

    @property
    def at_stake_nano(self) -> Nano:
        """The same with room to go on, a quarter of what was emitted: what a ledger should hold, since that is charged where the
        end is not known. All of it, where output is not seen as it comes."""
        if not self._job.metered:
            return self.reserved_nano
        ahead = min(max(2 * self.ahead, self.emitted_tokens // 4), STEP)
        total = max(self.emitted_tokens, min(self.emitted_tokens + ahead, self.max_tokens))
        return min(self._job.tariff.cost(self._job.input_tokens, total), self.reserved_nano)

    async def emit(self, tokens: int) -> Refused | None:
        """Before so many more tokens go out; None: they may. Refused: cut here, with finish reason "length"."""
        tariff, given, total = self._job.tariff, self._job.input_tokens, self.emitted_tokens + tokens
        # An upstream that ignores max_tokens is metered beyond it too.
        need = tariff.cost(given, max(total, min(total + self.ahead, self.max_tokens)))
        if need > self.reserved_nano:
            step = tariff.cost(given, max(total, min(total + STEP, self.max_tokens)))
            refused = await self._extend(step)
            if refused and step > need and refused.remaining_nano >= need - self.reserved_nano:
                refused = await self._extend(need)
            if refused:
                return refused
        self.emitted_tokens = total
        return None

    async def settle(self, charged_nano: Nano, output_tokens: int | None = None, *, ended: bool) -> Nano:
        """Spend what the upstream charged, learn the length; the overrun. Only the first end of a call counts.

        Args:
            output_tokens: as the upstream counted them, hidden reasoning included; None: as emitted.
            ended: whether the model had finished; False after a cut, a disconnect, or finish reason "length".
        """
        if self._reservation is None:
            return 0
        overrun = await self._meter.escrow.settle(self._reservation, charged_nano)
        self._reservation = None
        if self._job.max_tokens:
            length = self.emitted_tokens if output_tokens is None else output_tokens
            self._meter.learn(self._job.use, self._job.task_class, length, ended=ended)
        return overrun

    async def release(self) -> None:
        """The upstream charged nothing: it was never reached, or failed before its first token."""
        if self._reservation is not None:
            await self._meter.escrow.release(self._reservation)
            self._reservation = None

    async def _extend(self, total_nano: Nano) -> Refused | None:
        if self._reservation is None:
            raise QuantityError("a call that is settled or released emits nothing more")
        refused = await self._meter.escrow.extend(self._reservation, total_nano - self.reserved_nano)
        if refused is None:
            self.reserved_nano = total_nano
        return refused


class Meter:
    """Reserves for calls what they will probably cost, and learns from what they did cost."""

    def __init__(self, escrow: Escrow) -> None:
        self.escrow = escrow
        self._all, self._bytes = Lengths(None), Lengths(None, guess=_PER_KB // 3)
        self._uses: dict[str, Lengths] = {}
        self._classes: dict[tuple[str, str], Lengths] = {}
        self._texts: dict[str, Lengths] = {}
        self._signs: dict[str, Signs] = {}

    def signs(self, use: str) -> Signs:
        """Of the streams of a use."""
        found = self._signs.get(use)
        if found is None:
            found = self._signs[use] = Signs()
        return found

    def learn(self, use: str, task_class: str, output_tokens: int, *, ended: bool) -> None:
        """How long an answer was; calls of the past may be taught at start. `ended` as for `Call.settle`."""
        bucket = _bucket(output_tokens)
        for lengths in {self._own(use, task_class), _group(self._uses, use, self._all), self._all}:
            lengths.observe_in(bucket, ended=ended)

    def tokens(self, use: str, text_bytes: int) -> int:
        """Tokens that so many bytes of UTF-8 text will hardly exceed, as `use` counts them; images not included."""
        return -(-max(text_bytes, _SHORT) * self._texts.get(use, self._bytes).quantile(0.9) // _PER_KB)

    def learn_tokens(self, use: str, text_bytes: int, tokens: int) -> None:
        """What an upstream counted for a text."""
        bucket = _bucket(-(-tokens * _PER_KB // max(text_bytes, _SHORT)))
        for lengths in {_group(self._texts, use, self._bytes), self._bytes}:
            lengths.observe_in(bucket, ended=True)

    async def open(self, accounts: Sequence[str], job: Job, now_ns: int) -> Call | Refused:
        """Reserve for a call, in all accounts or none; with less than usual, and fewer tokens, when money is short."""
        lengths, cap = self._own(job.use, job.task_class), job.max_tokens
        likely = min(lengths.mean(), cap) if job.metered else cap
        want = job.tariff.cost(job.input_tokens, likely)
        got = await self.escrow.reserve(accounts, want, now_ns)
        if isinstance(got, Refused):
            least = job.tariff.cost(job.input_tokens, min(lengths.quantile(LEAST), cap))
            want = got.remaining_nano
            if want < least:
                return got
            got = await self.escrow.reserve(accounts, want, now_ns)
            if isinstance(got, Refused):
                return got
            cap = min(cap, job.tariff.affordable(want, job.input_tokens))
        return Call(self, job, got, cap)

    def _own(self, use: str, task_class: str) -> Lengths:
        own = self._classes.get((use, task_class))
        return own or _group(self._classes, (use, task_class), _group(self._uses, use, self._all))


_PER_KB = 1024
_SHORT = 256
"""Bytes below which a prompt's fixed tokens outweigh its text: it counts as if it had so many."""
Key = TypeVar("Key")


def _group(groups: dict[Key, Lengths], key: Key, parent: Lengths) -> Lengths:
    """The group's own distribution, or its parent's where there are too many groups."""
    own = groups.get(key)
    if own is None:
        own = parent
        if len(groups) < _GROUPS:
            own = groups[key] = Lengths(parent)
    return own


# --- scarcity -----------------------------------------------------------------------------------------------------


def scarcity(standing: Standing, now_ns: int) -> float:
    """μ_C ≥ 0 of one budget: what a dollar of it is worth beyond itself. A use pays 1 + Σ μ_C over its budgets. [Z-3]

    Dual mirror descent on the pace (Balseiro, Lu and Mirrokni 2020), multiplicative as `market.online` is additive, so
    that it needs no scale of worth:  ln π ← ln π + GAIN·(spent/left − elapsed/remaining),  π = 1 + μ_C ≥ 1, with money
    and time left. Projected only when it is read (lazily), the sum telescopes to

        π = max(1, (share of time left + GRACE) / (share of money left + GRACE)) ^ GAIN

    so nothing is stored: replicas agree, and a restart changes no price. A steady pace is assumed: where demand comes
    in bursts, a longer period prices them more gently. What is reserved counts as spent. Without a period there is no
    pace: the last tenth of the money is priced by what is left of it.
    """
    budget = standing.budget_nano
    if budget is None:
        return 0.0
    left = (standing.remaining_nano or 0) / budget if budget else 0.0
    if standing.resets_at_ns is None:
        return min(max(LAST / left - 1.0, 0.0), MOST) if left else MOST
    whole = standing.resets_at_ns - standing.starts_at_ns
    time = min(max((standing.resets_at_ns - now_ns) / whole, 0.0), 1.0)
    price: float = max((time + GRACE) / (left + GRACE), 1.0) ** GAIN
    return min(price - 1.0, MOST)
