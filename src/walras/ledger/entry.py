"""What a ledger holds: holds, entries, outcomes and corrections. All are written once and never changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from walras.errors import RecordError
from walras.ledger.money import Nano

Status = Literal["ok", "error", "cut", "refused", "unknown"]
Settled = Literal["exact", "estimated", "cap", "none"]


class UnknownRequest(RecordError):
    """The ledger has no entry of this request."""


class Conflict(RecordError):
    """The ledger already says something else about this request."""


class Hold(msgspec.Struct, frozen=True):
    """Money set aside for a request before its upstream is called. A request may have several, each with its own `id`."""

    id: str
    request_id: str
    at_ns: int
    """Unix time."""
    key_id: str
    tenant: str
    amount_nano: Nano


class Entry(msgspec.Struct, frozen=True):
    """One request: what it was promised and what it paid. None means unknown.

    Ids that grow with time (ULID, UUIDv7) keep the index on `request_id` fast when the ledger is large.
    """

    request_id: str
    at_ns: int
    """Unix time at which it was held, or refused: which period of a budget pays."""
    tenant: str
    key_id: str
    status: Status
    settled: Settled
    """exact: usage was reported; estimated: we counted the tokens; cap: unknown, charged what was reserved, to be
    reconciled; none: nothing to pay."""
    session: str | None = None
    task_class: str | None = None
    model_asked: str | None = None
    use: str | None = None
    """What was chosen."""
    upstream: str | None = None
    http_status: int | None = None
    value_usd: float = 0.0
    """V as declared: USD per unit of quality."""
    quality_expected: float | None = None
    value_nano: Nano = 0
    """V·ΔQ: `money.priced(quality_expected, value_usd)`, or 0 where no quality is expected."""
    compute_nano: Nano = 0
    """ΔC: what was charged. The budget's price on top of it is in `alternatives`."""
    latency_nano: Nano = 0
    """λΔL: own delay, and what SLAs charge."""
    risk_nano: Nano = 0
    """ρΔR."""
    alternatives: bytes = b""
    """JSON made by `pack`."""
    propensity: float | None = None
    prices_version: str | None = None
    input_tokens: int | None = None
    """Cached ones included."""
    cached_input_tokens: int | None = None
    output_tokens: int | None = None
    """Reasoning included."""
    reasoning_tokens: int | None = None
    reserved_nano: Nano = 0
    """Sum of the request's holds."""
    charged_nano: Nano = 0
    seconds_to_first: float | None = None
    seconds: float | None = None
    own_delay_nano: Nano = 0
    """The part of `latency_nano` that is the request's own delay."""
    prompt: str | None = None

    @property
    def overrun_nano(self) -> Nano:
        """Charged beyond the reservation: at most one metering step."""
        return max(self.charged_nano - self.reserved_nano, 0)

    @property
    def released_nano(self) -> Nano:
        """Reserved and not charged."""
        return max(self.reserved_nano - self.charged_nano, 0)


class Alternative(msgspec.Struct, frozen=True, array_like=True):
    """One use that was considered, at the prices of the decision."""

    use: str
    value_nano: Nano
    compute_nano: Nano
    latency_nano: Nano
    risk_nano: Nano
    net_nano: Nano
    """value − compute − latency − risk."""


class Outcome(msgspec.Struct, frozen=True):
    """How good the answer was, said later. One for each (request, source)."""

    request_id: str
    at_ns: int
    quality: float
    """0 to 1."""
    loss_usd: float | None = None
    """Lost in fact by wrong actions."""
    source: str = "user"


class Correction(msgspec.Struct, frozen=True):
    """What a request settled at its cap, or by an estimate, really cost."""

    request_id: str
    at_ns: int
    charged_nano: Nano
    source: str = "upstream"


Record = Hold | Entry | Outcome | Correction

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(list[Alternative]).decode


def pack(alternatives: Sequence[Alternative]) -> bytes:
    """As stored: a JSON list of [use, value, compute, latency, risk, net]."""
    return _encode(alternatives) if alternatives else b""


def unpack(stored: bytes) -> list[Alternative]:
    """What `pack` made.

    Raises:
        RecordError: it did not make this.
    """
    try:
        return _decode(stored) if stored else []
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RecordError(f"alternatives cannot be read: {error}") from error
