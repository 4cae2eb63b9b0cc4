"""Money as integers of nano-USD (10⁻⁹ USD): sums are exact, and a token of the cheapest model is still some nanos."""

from __future__ import annotations

import math
from decimal import Decimal, InvalidOperation
from fractions import Fraction

from walras.errors import QuantityError

Nano = int
"""An amount of money in 10⁻⁹ USD."""

NANO_PER_USD = 1_000_000_000
MOST = 2**63 - 1
"""What a column of a ledger holds: 9.2 billion USD."""


def nano(usd: float | str | Decimal, *, negative: bool = False) -> Nano:
    """USD to nano-USD, half to even. A float counts as the decimal number it prints as.

    Raises:
        QuantityError: not a number, not finite, too large, or below zero where `negative` is not allowed.
    """
    try:
        amount = usd if isinstance(usd, Decimal) else Decimal(str(usd))
    except InvalidOperation:
        raise QuantityError(f"{usd!r:.40} is no amount of USD; write it like 12.50") from None
    if not amount.is_finite() or amount.adjusted() > 9:
        raise QuantityError(f"{usd!r:.40} USD is no amount a ledger can hold; give a finite one below 9e9")
    if amount < 0 and not negative:
        raise QuantityError(f"{usd!r:.40} USD is negative; give an amount of at least 0")
    # Far below half a nano; as a fraction, 1e-999999 would have a million digits.
    exact = 0 if amount.adjusted() < -20 else round(Fraction(amount) * NANO_PER_USD)
    if abs(exact) > MOST:
        raise QuantityError(f"{usd!r:.40} USD is no amount a ledger can hold; give one below 9e9")
    return exact


def priced(amount: float, usd_per_unit: float) -> Nano:
    """What a physical amount is worth at a price, in nano-USD: the one place where floats become money.

    Raises:
        QuantityError: the product is not finite, or too large.
    """
    product = amount * usd_per_unit * NANO_PER_USD
    if not math.isfinite(product) or abs(product) > MOST:
        raise QuantityError(f"{amount!r} at {usd_per_unit!r} USD is no amount a ledger can hold")
    return round(product)


def usd(amount: Nano) -> float:
    """Nano-USD as USD, to show; never to add up."""
    return amount / NANO_PER_USD
