"""Every error Walras raises on purpose.

    WalrasError            base; carries an exit code for the command line
     ├ RecordError         unreadable input: file, row, field
     │  └ SupportError     a log that cannot speak for a policy: which action is missing, how much to explore
     ├ SettingsError       economy.toml or an option: which key, what would do
     ├ QuantityError       arrays that cannot be an economy: which column, where
     ├ InfeasibleError     nothing fits: the constraint, the least bound that would
     ├ NumeraireError      prices asked for in a numéraire whose price is zero
     ├ NotCleared          prices were not certified: the best certificate so far
     └ OutputError         a result could not be written

Exit codes: 0 done, 1 a bug in Walras, 2 wrong usage, then one per error class below.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class WalrasError(Exception):
    """Base of all errors Walras raises on purpose."""

    exit_code = 1


class RecordError(WalrasError):
    """Input that cannot be read as records. Names file, row (1 = first record) and field where known."""

    exit_code = 3

    def __init__(
        self,
        problem: str,
        *,
        path: Path | str | None = None,
        row: int | None = None,
        field: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.path, self.row, self.field, self.hint = path, row, field, hint
        where = [str(path)] if path is not None else []
        if row is not None:
            where.append(f"row {row}")
        if field is not None:
            where.append(f"column '{field}'")
        super().__init__(_sentence(", ".join(where), problem, hint))


class SupportError(RecordError):
    """The log cannot speak for this policy: it never, or too seldom, took the actions the policy wants."""

    def __init__(self, problem: str, *, action: int, mass: float, hint: str) -> None:
        self.action, self.mass = action, mass
        super().__init__(problem, hint=hint)


class SettingsError(WalrasError):
    """A setting or option that is unknown, contradictory or out of range."""

    exit_code = 4

    def __init__(self, problem: str, *, key: str | None = None, hint: str | None = None) -> None:
        self.key, self.hint = key, hint
        super().__init__(_sentence(key or "", problem, hint))


class QuantityError(WalrasError):
    """Arrays that do not describe an economy: wrong shape, NaN, or out of range."""

    exit_code = 4


class InfeasibleError(WalrasError):
    """No allocation meets the constraints. `least` is the smallest bound of `constraint` that would do."""

    exit_code = 5

    def __init__(self, problem: str, *, constraint: str, bound: float | None, least: float | None) -> None:
        self.constraint, self.bound, self.least = constraint, bound, least
        super().__init__(problem)


class NumeraireError(WalrasError):
    """Prices asked for in a numéraire that has no price (μ_C = 0) [Z-3]."""

    exit_code = 5


class NotCleared(WalrasError):
    """The solver stopped before its certificate reached the tolerance; `certificate` is the best it had."""

    exit_code = 6

    def __init__(self, problem: str, *, certificate: object) -> None:
        self.certificate = certificate
        super().__init__(problem)


class OutputError(WalrasError):
    """A result could not be written (full disk, no permission)."""

    exit_code = 7


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint that names the closest known word, or the first few known ones."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'?"
    return "known: " + ", ".join(known[:12]) + (", …" if len(known) > 12 else "")


def _sentence(where: str, problem: str, hint: str | None) -> str:
    text = f"{where}: {problem}" if where else problem
    return f"{text} ({hint})" if hint else text
