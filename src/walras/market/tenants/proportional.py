"""Fisher markets by proportional response: the second road to `fisher.solve`, without curvature, in many more steps.

Every tenant splits its budget as its utility came from goods last time, and prices are what is bid (Zhang 2011). That is
mirror descent on Shmyrev's convex programme (Birnbaum, Devanur and Xiao 2011), for perfect substitutes and σ > 1.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from walras.errors import NotCleared, QuantityError
from walras.market.tenants.fisher import FisherEquilibrium, FisherMarket, Found, Scaled, judge
from walras.risk import FloatArray

LOOK = 50
"""Steps between two looks at the certificate."""


def proportional_response(
    market: FisherMarket, *, tolerance: float = 1e-6, steps: int = 20_000, accelerated: bool = True
) -> FisherEquilibrium:
    """The equilibrium of substitutes, with its certificate; a tenant may keep its money where its goods are perfect ones.

    `accelerated`: on along the last change of log bids, with momentum that starts anew where the dual rises.

    Raises:
        QuantityError: a tenant's goods are not substitutes, or it may keep its money at a finite σ.
        NotCleared: the tolerance was not reached in so many steps.
    """
    began = time.perf_counter()
    unfit = (market.elasticity <= 1) | (np.isfinite(market.worth) & np.isfinite(market.elasticity))
    if unfit.any():
        raise QuantityError(
            f"{market.tenant(int(np.argmax(unfit)))}: proportional response needs an elasticity above 1, and ∞ where money "
            "may be kept (use solve)"
        )
    scaled = Scaled.of(market)
    taken, best = 0, np.inf
    for taken, (p, bids) in enumerate(_bids(scaled, accelerated), 1):
        if taken % LOOK == 0 or taken == steps:
            bought, kept = bids[:, :-1] / p, bids[:, -1]
            found = Found(p, bought, kept, judge(scaled.tenants, p, bought, kept))
            best = found.certificate.worst
            if best <= tolerance or taken == steps:
                break
    name = f"{'accelerated ' * accelerated}proportional response ({taken} steps)"
    answer = scaled.equilibrium(found, name, float(taken), time.perf_counter() - began)
    if best > tolerance:
        raise NotCleared(
            f"{taken} steps of proportional response reached {best:.2g}, not {tolerance:g} (use solve)",
            certificate=answer.certificate,
        )
    return answer


def _bids(scaled: Scaled, accelerated: bool) -> Iterator[tuple[FloatArray, FloatArray]]:
    """Prices (G,) and bids (N, G + 1), the last column being money kept; without end."""
    tenants = scaled.tenants
    taste = np.column_stack((tenants.taste, -tenants.keep))
    power, budget = 1.0 - 1.0 / tenants.sigma[:, None], tenants.budget[:, None]
    wanted = np.isfinite(taste)
    share = np.where(wanted, 0.0, -np.inf)
    share -= _log_sum(share)
    before, momentum, low = share, 0, np.inf
    while True:
        change = np.subtract(share, before, out=np.zeros_like(share), where=wanted)
        ahead = share + momentum / (momentum + 3) * change
        ahead -= _log_sum(ahead)
        bids = budget * np.exp(ahead)
        p = bids[:, :-1].sum(axis=0)
        yield p, bids
        price = np.append(np.log(p), 0.0)
        before, share = share, power * (taste + ahead - price + np.log(budget))
        share = share - _log_sum(share)
        dual = p.sum() - float(tenants.budget @ _log_cost(taste, tenants.sigma, price))
        momentum = momentum + 1 if accelerated and dual <= low else 0
        low = min(low, dual) if momentum else dual


def _log_sum(logs: FloatArray) -> FloatArray:
    """log Σ_j exp, (N, 1)."""
    top = logs.max(axis=1, keepdims=True)
    return np.asarray(top + np.log(np.exp(logs - top).sum(axis=1, keepdims=True)))


def _log_cost(taste: FloatArray, sigma: FloatArray, price: FloatArray) -> FloatArray:
    """log C at log prices, (N,)."""
    k = np.where(np.isinf(sigma), 1.0, sigma - 1.0)[:, None]
    smooth = _log_sum(k * (taste - price)) / k
    return -np.asarray(np.where(np.isinf(sigma), (taste - price).max(axis=1), smooth[:, 0]))
