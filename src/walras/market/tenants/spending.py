"""One pass over tenants with budgets: what they buy at given prices, and how that bends. The compiled code of `fisher`.

Units are scaled: every supply is 1, and so is the sum of budgets. A tenant of elasticity σ has a row L of its taste
(G,), by which a unit of its utility costs c, with q = log p:

    σ = 0        c = Σ_j L_j p_j                              L: what a unit takes of each good (Leontief)
    σ = 1        log c = Σ_j L_j q_j                          L: shares of spending (Cobb–Douglas)
    else         log c = −log Σ_j exp(k (L_j − q_j)) / k      k = σ − 1, and L_j = log α_j / k, with α summing to 1 for finite σ

Perfect substitutes are σ = ∞, and are taken at a finite `cap` on σ: the cheapest good then is a soft minimum. A tenant
that may keep its money compares c with the log `keep` of what the same utility costs it in money, softly again.
"""

from __future__ import annotations

from math import exp, expm1, log, log1p

import numpy as np

from walras.market.sweep import compiled

GONE, LEAST = 40.0, 690.0
"""A substitute whose log share is further below the first is not bought: e^−40 is less than round-off. Of complements there
must be something, if only e^−690."""

NEAR = 0.01
"""Elasticities this near 1 have sums of exp(k …) next to 1, whose logs over k would be round-off."""


@compiled
def scale(weights, sigma, goods, supply, logs, lo, hi, taste, base):
    """The taste of tenants lo … hi − 1 for some goods, in shares of supply, and the log by which their utility is too small."""
    n = goods.size
    for i in range(lo, hi):
        total, k, most = 0.0, sigma[i] - 1.0, 0.0
        for j in range(n):
            w = weights[i, goods[j]]
            total += w
            most = max(most, w / supply[j])
        if sigma[i] == 0.0:
            base[i] = log(total / most)
            for j in range(n):
                taste[i, j] = weights[i, goods[j]] / supply[j] / most
            continue
        if sigma[i] == 1.0:
            base[i] = 0.0
            for j in range(n):
                taste[i, j] = weights[i, goods[j]] / total
                base[i] += taste[i, j] * logs[j]
            continue
        top = -np.inf
        for j in range(n):
            w = weights[i, goods[j]]
            if sigma[i] == np.inf:
                taste[i, j] = log(w) + logs[j] if w > 0.0 else -np.inf
                top = max(top, taste[i, j])
            else:
                taste[i, j] = log(w / total) / k + logs[j] if w > 0.0 else -np.inf * k
                top = max(top, k * taste[i, j])
        if sigma[i] < np.inf:
            total = 0.0
            for j in range(n):
                total += exp(k * taste[i, j] - top)
            top = (top + log(total)) / k
        base[i] = top
        for j in range(n):
            taste[i, j] -= top


@compiled
def reciprocal(p):
    """1/p, and 0 of 0: what is free is bought by Leontief tenants only, who do not ask."""
    return np.array([1.0 / x if x > 0.0 else 0.0 for x in p])


@compiled
def unit(own, taste, sigma, keep, p, inverse, q, cap):
    """What one tenant buys for a unit of money: its demand into own (G,), and of it k, rest, φ, bend, log C.

    `rest` is the share of spending that does not go to the first good: 1 − share, without cancelling. φ is the part of the
    budget that is spent, `bend` how sharply that falls, and C what a unit of utility costs, money kept counted.
    """
    n, rest, first = own.size, 0.0, 0
    k = min(sigma, cap) - 1.0
    if sigma == 0.0:
        total = 0.0
        for j in range(n):
            total += taste[j] * p[j]
        for j in range(n):
            own[j] = taste[j] / total if total > 0.0 else np.inf
        cost = log(total) if total > 0.0 else -np.inf
    elif sigma == 1.0:
        cost = 0.0
        for j in range(n):
            own[j] = taste[j] * inverse[j]
            cost += taste[j] * q[j] if taste[j] > 0.0 else 0.0
    else:
        top = -np.inf
        for j in range(n):
            x = k * (taste[j] - q[j])
            own[j] = x
            if x > top:
                top, first = x, j
        gone = GONE if k > 0.0 else LEAST
        for j in range(n):
            x = own[j] - top
            own[j] = exp(x) if x > -gone else 0.0
            if j != first:
                rest += own[j]
        total = 1.0 + rest
        part = 1.0 / total
        cost = -(top + log1p(rest)) / k
        if abs(k) < NEAR:
            cost = 0.0
            for j in range(n):
                if np.isfinite(taste[j]):
                    cost += exp(k * taste[j]) * expm1(-k * q[j])
            cost = -log1p(cost) / k
        rest /= total
        for j in range(n):
            own[j] *= inverse[j] * part
    if keep == np.inf:
        return k, rest, first, 1.0, 0.0, cost
    sharp = cap - 1.0
    apart = sharp * (cost - keep)
    if apart > 0.0:
        small = exp(-apart)
        return k, rest, first, small / (1.0 + small), sharp / (1.0 + small), keep - log1p(small) / sharp
    small = exp(apart)
    return k, rest, first, 1.0 / (1.0 + small), sharp * small / (1.0 + small), cost - log1p(small) / sharp


@compiled
def respond(taste, sigma, keep, budget, p, q, cap, lo, hi, sums, demand, curvature):
    """Add up tenants lo … hi − 1: Σ B log C into sums[0], money kept into sums[1], demand (G,), and the curvature (G, G) of
    −Σ B log C, which is the slope of demand with its sign turned."""
    n = p.size
    own, inverse = np.empty(n), reciprocal(p)
    at = np.empty(n, dtype=np.int64)
    for i in range(lo, hi):
        k, rest, first, spent, bend, cost = unit(own, taste[i], sigma[i], keep[i], p, inverse, q, cap)
        mass = budget[i] * spent
        sums[0] += budget[i] * cost
        sums[1] += budget[i] - mass
        if mass == 0.0:
            continue
        count = 0
        for j in range(n):
            if own[j] > 0.0:
                at[count] = j
                count += 1
        for a in range(count):
            j = at[a]
            y = own[j]
            demand[j] += mass * y
            if sigma[i] > 0.0:
                # σ·share·(1 − share), and the square of what is bought.
                others = rest if j == first and sigma[i] != 1.0 else 1.0 - y * p[j]
                curvature[j, j] += mass * ((k + 1.0) * others * y * inverse[j] + (1.0 + bend) * y * y)
            else:
                curvature[j, j] += mass * (1.0 + bend) * y * y
            for b in range(a):
                curvature[j, at[b]] += mass * (bend - k) * y * own[at[b]]


@compiled
def leads(taste, keep, q, first, lead, lo, hi):
    """Of perfect substitutes: the best good (G: money) into first, and by how much its log worth per price leads."""
    n = q.size
    for i in range(lo, hi):
        top, second, at = -keep[i], -np.inf, n
        for j in range(n):
            x = taste[i, j] - q[j]
            if x > top:
                top, second, at = x, top, j
            elif x > second:
                second = x
        first[i], lead[i] = at, top - second


@compiled
def bundles(taste, sigma, keep, budget, p, q, cap, lo, hi, bought, kept):
    """What tenants lo … hi − 1 buy, (N, G), and keep, (N,)."""
    own, inverse = np.empty(p.size), reciprocal(p)
    for i in range(lo, hi):
        _, _, _, spent, _, _ = unit(own, taste[i], sigma[i], keep[i], p, inverse, q, cap)
        for j in range(p.size):
            bought[i, j] = budget[i] * spent * own[j] if spent > 0.0 else 0.0
        kept[i] = budget[i] * (1.0 - spent)


@compiled
def log_utility(taste, sigma, bundle):
    """log u of a bundle (G,), by the utility itself rather than by what it costs."""
    n = bundle.size
    if sigma == 0.0:
        least = np.inf
        for j in range(n):
            if taste[j] > 0.0:
                least = min(least, bundle[j] / taste[j])
        return log(least) if least > 0.0 else -np.inf
    if sigma == 1.0:
        total = 0.0
        for j in range(n):
            if taste[j] > 0.0:
                if bundle[j] <= 0.0:
                    return -np.inf
                total += taste[j] * log(bundle[j] / taste[j])
        return total
    if sigma == np.inf:
        total = 0.0
        for j in range(n):
            if bundle[j] > 0.0:
                total += exp(taste[j]) * bundle[j]
        return log(total) if total > 0.0 else -np.inf
    power = 1.0 - 1.0 / sigma
    if abs(power) < NEAR:
        total = 0.0
        for j in range(n):
            if np.isfinite(taste[j]):
                share = (sigma - 1.0) * taste[j]
                x = power * (log(bundle[j]) - share) if bundle[j] > 0.0 else -power * np.inf
                total += exp(share) * expm1(x)
        return log1p(total) / power if total > -1.0 and total < np.inf else -np.inf
    top = -np.inf if power > 0.0 else np.inf
    for j in range(n):
        if np.isfinite(taste[j]):
            x = taste[j] + log(bundle[j]) if bundle[j] > 0.0 else -np.inf
            top = max(top, x) if power > 0.0 else min(top, x)
    if top == -np.inf:
        return top
    total = 0.0
    for j in range(n):
        if np.isfinite(taste[j]) and bundle[j] > 0.0:
            total += exp(power * (taste[j] + log(bundle[j]) - top))
    return top + log(total) / power


@compiled
def add(x, y):
    """log(eˣ + e^y)."""
    most, least = max(x, y), min(x, y)
    return most + log1p(exp(least - most)) if least > -np.inf else most


@compiled
def judge(taste, sigma, keep, budget, p, q, cap, bought, kept, shrink, lo, hi, sums, worst):
    """What proves tenants lo … hi − 1: Σ B log U of the bundles times `shrink` (G,) less money kept, and Σ B log C, into
    sums; into worst (2,) the largest share of attainable utility a tenant misses, and of its budget that is not accounted
    for. The tenants it happens to into worst (2 … 3)."""
    n = p.size
    own, fit, inverse = np.empty(n), np.empty(n), reciprocal(p)
    for i in range(lo, hi):
        paid = kept[i]
        for j in range(n):
            fit[j] = bought[i, j] * shrink[j]
            paid += bought[i, j] * p[j]
        _, _, _, _, _, cost = unit(own, taste[i], sigma[i], keep[i], p, inverse, q, cap)
        got = log_utility(taste[i], sigma[i], bought[i])
        fits = log_utility(taste[i], sigma[i], fit)
        if keep[i] < np.inf and kept[i] > 0.0:
            got, fits = add(got, log(kept[i]) - keep[i]), add(fits, log(kept[i]) - keep[i])
        sums[0] += budget[i] * fits - kept[i]
        sums[1] += budget[i] * cost
        sums[2] += budget[i] * log(budget[i]) - budget[i]
        miss = 1.0 - exp(got + cost - log(budget[i]))
        if miss > worst[0]:
            worst[0], worst[2] = miss, i
        off = abs(paid - budget[i]) / budget[i]
        if off > worst[1]:
            worst[1], worst[3] = off, i


@compiled
def utilities(taste, sigma, keep, bundle, kept, lo, hi, logs):
    """log U of bundles (N, G) and money kept (N,), for tenants lo … hi − 1."""
    for i in range(lo, hi):
        logs[i] = log_utility(taste[i], sigma[i], bundle[i])
        if keep[i] < np.inf and kept[i] != 0.0:
            money = kept[i] * exp(-keep[i])
            if money > 0.0:
                logs[i] = add(logs[i], log(money))
            else:
                rest = exp(logs[i]) + money
                logs[i] = log(rest) if rest > 0.0 else np.nan


@compiled
def envy(taste, sigma, keep, budget, bundle, kept, others, lo, hi, most, whom):
    """What the bundle in `others` that tenants lo … hi − 1 like best, scaled to their own budget, is worth beside their own:
    the log of the ratio into most, and whose it is into whom."""
    n = bundle.shape[1]
    fit = np.empty(n)
    for i in range(lo, hi):
        own, best, at = -np.inf, -np.inf, i
        for m in range(-1, others.size):
            k = i if m < 0 else others[m]
            scale = budget[i] / budget[k]
            for j in range(n):
                fit[j] = bundle[k, j] * scale
            x = log_utility(taste[i], sigma[i], fit)
            if keep[i] < np.inf and kept[k] > 0.0:
                x = add(x, log(kept[k] * scale) - keep[i])
            if m < 0:
                own = x
            elif k != i and x > best:
                best, at = x, k
        most[i], whom[i] = best - own, at
