"""Requests as columns, and what is wrong with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from walras.engine.cache import out_of_order
from walras.engine.settings import EngineSettings
from walras.errors import RecordError

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


MOST_TENANTS = 1 << 20
_EACH = ("input_tokens", "output_tokens", "delay_price", "after", "tenant", "value", "expected_output")


@dataclass(frozen=True, slots=True)
class Requests:
    """N requests. Rows that arrive by themselves are in order of arrival.

    Raises:
        RecordError: naming row (1 = first) and column, for columns that cannot be requests.
    """

    arrival_s: FloatArray
    """(N,) seconds, ≥ 0; where `after` names a row, seconds after that one has ended."""
    input_tokens: IntArray
    """(N,) ≥ 1."""
    output_tokens: IntArray
    """(N,) ≥ 1."""
    prefix_offsets: IntArray | None = None
    """(N+1,) row n has the prefix ids `prefix_ids[prefix_offsets[n]:prefix_offsets[n + 1]]`."""
    prefix_ids: IntArray | None = None
    """One id for each chunk of the prompt, from its first; the same id means the same prefix up to and with the chunk."""
    delay_price: FloatArray | None = None
    """(N,) USD per second of delay, ≥ 0."""
    after: IntArray | None = None
    """(N,) the earlier row this one follows, a session's next call; −1: it arrives by itself."""
    names: NDArray[Any] | None = None
    """(N,) what the requests are called; no two alike."""
    tenant: IntArray | None = None
    """(N,) whose it is, from 0; left out, all are one tenant's."""
    value: FloatArray | None = None
    """(N,) USD that an answer at once is worth, ≥ 0; after L seconds it is worth value − delay_price · L. Left out: whatever it takes."""
    expected_output: FloatArray | None = None
    """(N,) output tokens that a scheduler expects, ≥ 1; left out, those that come."""

    def __post_init__(self) -> None:
        for column in ("arrival_s", "delay_price", "value", "expected_output"):
            self._set(column, np.float64)
        for column in ("input_tokens", "output_tokens", "prefix_offsets", "prefix_ids", "after", "tenant"):
            self._set(column, np.int64)
        if len(self) == 0:
            raise RecordError("no requests", field="arrival_s", hint="a trace needs at least one row")
        for column in (*_EACH, "names"):
            values = getattr(self, column)
            if values is not None and len(values) != len(self):
                raise RecordError(f"{len(values)} values for {len(self)} requests", field=column)
        _first_bad(~np.isfinite(self.arrival_s), "arrival_s", "the arrival is not a number of seconds")
        _first_bad(self.arrival_s < 0, "arrival_s", "the arrival is before the trace begins")
        for column in ("input_tokens", "output_tokens"):
            _first_bad(getattr(self, column) < 1, column, "a request without tokens", "at least 1")
        self._check_worth()
        self._check_order()
        self._check_names()
        self._check_prefixes()

    def __len__(self) -> int:
        return len(self.arrival_s)

    def _set(self, column: str, kind: Any) -> None:
        values = getattr(self, column)
        if values is None:
            return
        array = np.asarray(values)
        if array.ndim != 1:
            raise RecordError(f"shape {array.shape}", field=column, hint="one row of values")
        if kind is np.int64 and array.dtype.kind not in "iu":
            whole = array.dtype.kind == "f" and np.isfinite(array).all() and (array == np.floor(array)).all()
            if array.size and not whole:
                raise RecordError(f"{array.dtype} values", field=column, hint="whole numbers")
        object.__setattr__(self, column, np.ascontiguousarray(array, dtype=kind))

    def _check_worth(self) -> None:
        for column, least, problem in (
            ("delay_price", 0.0, "a price of delay is finite and ≥ 0"),
            ("value", 0.0, "the value of an answer is finite and ≥ 0"),
            (
                "expected_output",
                1.0,
                "an answer is expected to have at least one token, and not infinitely many",
            ),
        ):
            numbers = getattr(self, column)
            if numbers is not None:
                _first_bad(~(np.isfinite(numbers) & (numbers >= least)), column, problem)
        if self.tenant is not None:
            bad = (self.tenant < 0) | (self.tenant >= MOST_TENANTS)
            _first_bad(bad, "tenant", f"tenants are numbered from 0 to {MOST_TENANTS - 1}")

    def _check_order(self) -> None:
        arrivals, alone = self.arrival_s, np.arange(len(self))
        if self.after is not None:
            late = (self.after >= alone) | (self.after < -1)
            _first_bad(late, "after", "a call follows an earlier row of the same table", "or −1")
            alone = np.flatnonzero(self.after < 0)
            arrivals = arrivals[alone]
        back = np.flatnonzero(np.diff(arrivals) < 0)
        if back.size:
            raise RecordError(
                f"arrives at {arrivals[back[0] + 1]:g} s, after a row that arrives at {arrivals[back[0]]:g} s",
                row=int(alone[back[0] + 1]) + 1,
                field="arrival_s",
                hint="sort the requests by arrival",
            )

    def _check_names(self) -> None:
        if self.names is None:
            return
        order = np.argsort(self.names, kind="stable")
        same = np.flatnonzero(self.names[order][1:] == self.names[order][:-1])
        if same.size:
            row = int(order[same + 1].min())
            first = int(np.flatnonzero(self.names == self.names[row])[0])
            raise RecordError(
                f"'{self.names[row]}' is the request of row {first + 1} already", row=row + 1, field="names"
            )

    def _check_prefixes(self) -> None:
        if (self.prefix_ids is None) != (self.prefix_offsets is None):
            raise RecordError("prefix ids and their offsets come together", field="prefix_offsets")
        if self.prefix_ids is None or self.prefix_offsets is None:
            return
        offsets = self.prefix_offsets
        if len(offsets) != len(self) + 1 or offsets[0] != 0 or offsets[-1] != len(self.prefix_ids):
            raise RecordError(
                f"{len(offsets)} offsets into {len(self.prefix_ids)} ids for {len(self)} requests",
                field="prefix_offsets",
                hint="N + 1 of them, from 0 to the number of ids",
            )
        _first_bad(np.diff(offsets) < 0, "prefix_offsets", "offsets go down")
        bits = max(4, int(2 * max(len(self.prefix_ids), 1)).bit_length())
        seen = np.full((1 << bits, 3), -1, dtype=np.int64)
        row, place = out_of_order(seen, offsets, self.prefix_ids)
        if row >= 0:
            raise RecordError(
                f"id {self.prefix_ids[offsets[row] + place]} stands at place {place + 1} here, but elsewhere at another place, or after "
                "another id",
                row=int(row) + 1,
                field="prefix_ids",
                hint="an id names a prompt's whole prefix, so what stands before it is always the same",
            )

    def check_fits(self, settings: EngineSettings) -> None:
        """Raises RecordError for a request that this engine can never serve."""
        emitted = int(np.ceil(settings.speculation.tokens_per_step)) if settings.speculation else 1
        kv = self.input_tokens + self.output_tokens + emitted - 2
        room = settings.kv_blocks * settings.block_tokens
        at = np.flatnonzero(kv > room)
        if at.size:
            raise RecordError(
                f"prompt and answer need {kv[at[0]]} KV tokens, a worker has {room}",
                row=int(at[0]) + 1,
                field="input_tokens",
                hint="raise kv_blocks, or leave the request out",
            )
        at = np.flatnonzero(self.input_tokens + self.output_tokens - 1 > settings.max_batched_tokens)
        if at.size and not settings.chunked_prefill:
            raise RecordError(
                f"prompt and answer may have to be computed in one step of {settings.max_batched_tokens} tokens",
                row=int(at[0]) + 1,
                field="input_tokens",
                hint="raise max_batched_tokens, or turn chunked_prefill on",
            )
        if self.prefix_offsets is not None:
            chunks = -(-self.input_tokens // settings.chunk_tokens)
            _first_bad(
                np.diff(self.prefix_offsets) > chunks,
                "prefix_ids",
                f"more ids than the prompt has chunks of {settings.chunk_tokens} tokens",
                "set prefix_tokens to what one id stands for",
            )


def _first_bad(bad: NDArray[np.bool_], column: str, problem: str, hint: str | None = None) -> None:
    at = np.flatnonzero(bad)
    if at.size:
        raise RecordError(problem, row=int(at[0]) + 1, field=column, hint=hint)
