"""When a second attempt is worth its price while the first keeps its client waiting. [Z-1]

A hedge is a use like any other. To wait on for use i, which has taken t seconds, is worth V·ΔQ_i − λ·E[T_i − t | T_i > t]; to ask
j beside it, V·ΔQ_j − λ·E[T_j] − ΔC_j − ρ·ΔR_j, where j is expected to be first. The first attempt is paid for either way. An answer
that is expected after its deadline is worth nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from walras.gateway.board import Alternative
from walras.gateway.metering import Lengths

_MS = 1000.0


class Waits:
    """How long each use keeps its client waiting: for a whole answer, or for the first bytes of a stream."""

    def __init__(self, expected_s: Callable[[str, bool], float]) -> None:
        """`expected_s(use, stream)`: seconds, before any was seen."""
        self._expected_s = expected_s
        self._seen: dict[tuple[str, bool], Lengths] = {}

    def learn(self, use: str, stream: bool, seconds: float, *, ended: bool) -> None:
        """One wait; with `ended` False it was given up after so long."""
        self._of(use, stream).observe(max(round(seconds * _MS), 1), ended=ended)

    def left(self, use: str, stream: bool, waited_s: float = 0.0) -> float:
        """Expected seconds more, after so many."""
        return self._of(use, stream).beyond(int(waited_s * _MS)) / _MS

    def _of(self, use: str, stream: bool) -> Lengths:
        found = self._seen.get((use, stream))
        if found is None:
            guess = max(round(self._expected_s(use, stream) * _MS), 1)
            found = self._seen[use, stream] = Lengths(None, guess=guess)
        return found


def best_hedge(
    offered: Sequence[Alternative],
    chosen: Alternative,
    delay_price: float,
    left_s: float,
    waits_s: Callable[[str], float],
    deadline_left_s: float | None = None,
) -> Alternative | None:
    """The use that it is worth most to ask besides; None where it is best to wait.

    Args:
        offered: uses that may be asked now.
        chosen: the use that is waited for, which is expected to take `left_s` more.
        delay_price: USD a second.
        waits_s: seconds that a use is expected to take from now.
        deadline_left_s: seconds until an answer is worth nothing; None: never.
    """
    best, most = None, _worth(chosen.value, left_s, delay_price, deadline_left_s)
    for other in offered:
        wait = waits_s(other.use)
        if wait < left_s:
            worth = _worth(other.value, wait, delay_price, deadline_left_s) - other.compute - other.risk
            if worth > most:
                best, most = other, worth
    return best


def _worth(value: float, wait_s: float, delay_price: float, deadline_left_s: float | None) -> float:
    late = deadline_left_s is not None and wait_s > deadline_left_s
    return (0.0 if late else value) - delay_price * wait_s
