"""One pass over the columns: what every task would do at given prices. The only compiled code. [Z-1]

Three kernels, each on the tasks [lo, hi), without temporaries of the size of the data:

- `respond`: best responses, summed; and the curvature of the dual, from how densely tasks are about to change.
- `screen`: the same sums over the tasks that choose alike at *every* price in a box; the others are listed, and prices in
  the box can then be found on those few.
- `pick`: the best response of each task.

Data may be float32 or float64; whatever is computed from them is float64. Tasks are handled a tile at a time, transposed,
so that one instruction serves several tasks: inner loops run over the tasks of a tile, load all they need before they
store, and select instead of branching, because which use is best is as good as random to a processor.

Arguments: `columns` = (width, strides, value, quality, amounts, declared, weight, member), the planes flat with their
strides (of task, of use); `rows` = (plane, level, offset, scoped), see `planes`; `price` (K,) the multipliers;
`scale` 1, or 0 to leave worth out of it and count charges only. Sums are [worth at declared prices, charge of each
row…, weight served in each row's scope…].
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

TILE = 256
"""Tasks handled together: all that is known about them stays in a near cache."""
ROUND_OFF = 1e-14
"""Of sums of a few terms, relative to the terms."""

compiled: Any = njit(nogil=True, cache=True, fastmath={"nsz", "contract", "arcp", "reassoc"})
"""NaN marks a use that is not allowed, so comparisons must keep their meaning: no `nnan`."""


@compiled
def inside(member, k, n):
    """Whether task n is in the scope of row k."""
    return (member[n if member.size > 1 else 0] >> np.uint64(k)) & np.uint64(1)


@compiled
def _load(to, flat, by_task, by_use, at, m):
    """A tile of a plane, transposed: to (I, m)."""
    width = to.shape[0]
    if by_task == 1:
        for i in range(width):
            column, own = flat[i * by_use + at : i * by_use + at + m], to[i]
            for j in range(m):
                own[j] = column[j]
    else:
        for j in range(m):
            start = (at + j) * by_task
            for i in range(width):
                to[i, j] = flat[start + i * by_use]


@compiled
def _load_tile(value, mass, usd, inside, quality, amount, columns, rows, at, m):
    """Everything about m tasks from `at` on; `inside` (K, m) is 1 where the task is in the row's scope."""
    _, strides, values, qualities, amounts, declared, weight, member = columns
    scoped = rows[3]
    _load(quality, qualities, strides[0, 0], strides[0, 1], at, m)
    for p in range(amount.shape[0]):
        _load(amount[p], amounts[p], strides[1 + p, 0], strides[1 + p, 1], at, m)
        price, one = declared[p], declared[p].size == 1
        for j in range(m):
            usd[p, j] = price[0] if one else price[at + j]
    for j in range(m):
        value[j] = values[at + j]
        mass[j] = weight[0] if weight.size == 1 else weight[at + j]
    for k in range(scoped.size):
        own = inside[k]
        if scoped[k]:
            for j in range(m):
                own[j] = (member[0 if member.size == 1 else at + j] >> np.uint64(k)) & np.uint64(1)
        else:
            own[:m] = 1.0


@compiled
def _net_values(v, w, credit, value, usd, inside, quality, amount, rows, price, scale, m):
    """V·q − Σ_p w_p·amount_p − Σ_k price_k·[amount > level_k] into v (I, m), and Σ_k price_k·offset_k into credit (m,)."""
    plane, level, offset, _ = rows
    width = quality.shape[0]
    credit[:m] = 0.0
    for p in range(amount.shape[0]):
        pay, own = w[p], usd[p]
        for j in range(m):
            pay[j] = scale * own[j]
    for k in range(plane.size):
        if price[k] == 0.0:
            continue
        of, each, back = inside[k], price[k], price[k] * offset[k]
        for j in range(m):
            credit[j] += back * of[j]
        if np.isnan(level[k]):
            pay = w[plane[k]]
            for j in range(m):
                pay[j] += each * of[j]
    for i in range(width):
        own, q = v[i], quality[i]
        for j in range(m):
            own[j] = scale * value[j] * q[j]
        for p in range(amount.shape[0]):
            pay, a = w[p], amount[p, i]
            for j in range(m):
                own[j] -= pay[j] * a[j]
        for k in range(plane.size):
            if not np.isnan(level[k]) and price[k] != 0.0:
                of, a = inside[k], amount[plane[k], i]
                for j in range(m):
                    x, late = own[j], price[k] * of[j]
                    own[j] = x - late if a[j] > level[k] else x


@compiled
def _best(best, first, v, credit, defer, m):
    """The highest net value of each task, and its use as a float: −1 for deferring, or where nothing is allowed."""
    for j in range(m):
        best[j] = -credit[j] if defer else -np.inf
        first[j] = -1.0
    for i in range(v.shape[0]):
        own, here = v[i], float(i)
        for j in range(m):
            x, y, use = own[j], best[j], first[j]
            more = x > y
            best[j] = x if more else y
            first[j] = here if more else use


@compiled
def _of_use(taken, first, amount, m):
    """The amounts of the uses `first`, into taken (P, m); 0 where deferred."""
    for p in range(amount.shape[0]):
        to = taken[p]
        to[:m] = 0.0
        for i in range(amount.shape[1]):
            a, here = amount[p, i], float(i)
            for j in range(m):
                x, y = np.float64(a[j]), to[j]
                to[j] = x if first[j] == here else y


@compiled
def _charge(charge, taken, first, inside, rows, m):
    """What each row charges for the uses `first` with the amounts `taken`, into charge (K, m)."""
    plane, level, offset, _ = rows
    for k in range(plane.size):
        to, a, of, off, bar = charge[k], taken[plane[k]], inside[k], offset[k], level[k]
        linear = np.isnan(bar)
        for j in range(m):
            x, served = a[j], first[j] >= 0.0
            late = 1.0 if x > bar else 0.0
            x = of[j] * ((x if linear else late) - off)
            to[j] = x if served else 0.0


@compiled
def _add(sums, mass, first, value, usd, inside, quality, taken, charge, m):
    """Add what m tasks choose to the sums; uses < 0 add nothing. `mass` becomes that of the tasks that count."""
    n_rows, worth = charge.shape[0], 0.0
    for j in range(m):
        x = mass[j]
        mass[j] = x if first[j] >= 0.0 else 0.0
    for i in range(quality.shape[0]):
        q, here = quality[i], float(i)
        for j in range(m):
            x = mass[j] * value[j] * q[j]
            worth += x if first[j] == here else 0.0
    for p in range(taken.shape[0]):
        a, price, paid = taken[p], usd[p], 0.0
        for j in range(m):
            paid += mass[j] * price[j] * a[j]
        worth -= paid
    sums[0] += worth
    for k in range(n_rows):
        own, of, used, served = charge[k], inside[k], 0.0, 0.0
        for j in range(m):
            used += mass[j] * own[j]
            served += mass[j] * of[j]
        sums[1 + k] += used
        sums[1 + n_rows + k] += served


@compiled
def room(columns, n_rows):
    """What `respond_in` works in: to be made once for many small ranges of tasks."""
    width, n_planes, number = columns[0], columns[1].shape[0] - 1, columns[3].dtype
    return (
        np.empty((8, TILE)),
        np.empty((3, n_planes, TILE)),
        np.empty((3, n_rows, TILE)),
        np.empty((width, TILE), number),
        np.empty((n_planes, width, TILE), number),
        np.empty((width, TILE)),
    )


@compiled
def respond(columns, rows, price, scale, defer, bandwidth, yardstick, lo, hi, sums, curvature, moments):
    """Sum best responses; returns how many tasks have no use at all although they may not defer.

    A task is about to change when its margin is below bandwidth · Σ_k yardstick_k·|difference of the two charges|; each
    such task adds d·dᵀ / (2·bandwidth·Σ…) to `curvature` (K, K), a kernel estimate of the dual's Hessian. `moments`
    (K, K), where it has a size, gets Σ weight²·charge·chargeᵀ: the noise of sums over a sample.
    """
    space = room(columns, price.size)
    return respond_in(
        space, columns, rows, price, scale, defer, bandwidth, yardstick, lo, hi, sums, curvature, moments
    )


@compiled
def respond_in(
    space, columns, rows, price, scale, defer, bandwidth, yardstick, lo, hi, sums, curvature, moments
):
    """`respond` in a `room` made before."""
    width, n_rows, stuck = columns[0], price.size, 0
    lines, by_plane, by_row, quality, amount, v = space
    value, mass, credit, best = lines[0], lines[1], lines[2], lines[3]
    first, second, other, stake = lines[4], lines[5], lines[6], lines[7]
    usd, w, taken = by_plane[0], by_plane[1], by_plane[2]
    inside, charge, rival = by_row[0], by_row[1], by_row[2]
    for at in range(lo, hi, TILE):
        m = min(TILE, hi - at)
        _load_tile(value, mass, usd, inside, quality, amount, columns, rows, at, m)
        _net_values(v, w, credit, value, usd, inside, quality, amount, rows, price, scale, m)
        _best(best, first, v, credit, defer, m)
        if not defer:
            for j in range(m):
                stuck += first[j] < 0.0
        _of_use(taken, first, amount, m)
        _charge(charge, taken, first, inside, rows, m)
        if bandwidth > 0.0:
            for i in range(width):
                own, here = v[i], float(i)
                for j in range(m):
                    x = own[j]
                    own[j] = -np.inf if first[j] == here else x
            _best(second, other, v, credit, False, m)
            for j in range(m):
                x, use, nothing = second[j], other[j], -credit[j]
                better = defer and first[j] >= 0.0 and nothing > x
                second[j] = nothing if better else x
                other[j] = -1.0 if better else use
            _of_use(taken, other, amount, m)
            _charge(rival, taken, other, inside, rows, m)
            _of_use(taken, first, amount, m)
            stake[:m] = 0.0
            for k in range(n_rows):
                own, there, each = charge[k], rival[k], yardstick[k]
                for j in range(m):
                    x = own[j] - there[j]
                    there[j] = x
                    stake[j] += each * abs(x)
            for j in range(m):
                if best[j] - second[j] < bandwidth * stake[j]:
                    density = mass[j] / (2.0 * bandwidth * stake[j])
                    for k in range(n_rows):
                        if rival[k, j] != 0.0:
                            for l in range(n_rows):
                                curvature[k, l] += density * rival[k, j] * rival[l, j]
        _add(sums, mass, first, value, usd, inside, quality, taken, charge, m)
        if moments.size:
            for j in range(m):
                for k in range(n_rows):
                    if charge[k, j] != 0.0:
                        for l in range(n_rows):
                            moments[k, l] += mass[j] * mass[j] * charge[k, j] * charge[l, j]
    return stuck


@compiled
def _reach(reach, sway, each, chosen, taken, first, charge, inside, amount, rows, radius, m):
    """How far each use can gain on the chosen one anywhere in the box: Σ_k radius_k·|difference of charges|, (I, m).

    `sway` (m,) is the same for deferring; `each` and `chosen` (m,) are room to work in.
    """
    plane, level, offset, _ = rows
    reach[:, :m] = 0.0
    sway[:m] = 0.0
    for k in range(plane.size):
        if radius[k] == 0.0:
            continue
        of, own, bar, off, paid = inside[k], taken[plane[k]], level[k], offset[k], charge[k]
        linear = np.isnan(bar)
        for j in range(m):
            sway[j] += radius[k] * abs(paid[j])
            each[j] = radius[k] * of[j]
            x = own[j]
            y = x if linear else (1.0 if x > bar else 0.0)
            chosen[j] = (
                y if first[j] >= 0.0 else off
            )  # deferring is charged nothing, like an amount equal to the offset
        for i in range(reach.shape[0]):
            a, to = amount[plane[k], i], reach[i]
            if linear:
                for j in range(m):
                    to[j] += each[j] * abs(a[j] - chosen[j])
            else:
                for j in range(m):
                    to[j] += each[j] * abs((1.0 if a[j] > bar else 0.0) - chosen[j])


@compiled
def screen(columns, rows, price, radius, scale, defer, lo, hi, sums, undecided):
    """Sum the tasks that choose alike at all prices within `radius` of `price`; list the others in `undecided`.

    Returns how many are listed, and the first task with a value that is not finite, or −1.
    """
    width, n_planes, n_rows, count = columns[0], columns[1].shape[0] - 1, price.size, 0
    value, mass, credit, best = np.empty(TILE), np.empty(TILE), np.empty(TILE), np.empty(TILE)
    first, sway, rivals, floor = np.empty(TILE), np.empty(TILE), np.empty(TILE), np.empty(TILE)
    usd, w, taken = np.zeros((n_planes, TILE)), np.empty((n_planes, TILE)), np.empty((n_planes, TILE))
    inside, charge = np.empty((n_rows, TILE)), np.empty((n_rows, TILE))
    each, chosen = np.empty(TILE), np.empty(TILE)
    quality = np.empty((width, TILE), columns[3].dtype)
    amount, v, reach = (
        np.zeros((n_planes, width, TILE), columns[3].dtype),
        np.empty((width, TILE)),
        np.empty((width, TILE)),
    )
    for at in range(lo, hi, TILE):
        m = min(TILE, hi - at)
        _load_tile(value, mass, usd, inside, quality, amount, columns, rows, at, m)
        _net_values(v, w, credit, value, usd, inside, quality, amount, rows, price, scale, m)
        check = 0.0
        for i in range(width):
            own = v[i]
            for j in range(m):
                check += own[j] * 0.0
        if check != 0.0:
            for j in range(m):
                for i in range(width):
                    if not np.isfinite(v[i, j]) and not np.isnan(quality[i, j]):
                        return count, at + j
        _best(best, first, v, credit, defer, m)
        _of_use(taken, first, amount, m)
        _charge(charge, taken, first, inside, rows, m)
        _reach(reach, sway, each, chosen, taken, first, charge, inside, amount, rows, radius, m)
        for j in range(m):
            floor[j] = abs(best[j]) + 2.0 * abs(credit[j])
        for p in range(n_planes):
            pay, a = w[p], taken[p]
            for j in range(m):
                floor[j] += 2.0 * abs(pay[j] * a[j])
        for j in range(m):
            # Round-off is as large as the terms, not as what is left of them.
            floor[j] = best[j] - ROUND_OFF * floor[j]
            rivals[j] = 1.0 if defer and sway[j] > 0.0 and sway[j] - credit[j] >= floor[j] else 0.0
        for i in range(width):
            own, up = v[i], reach[i]
            for j in range(m):
                # A use without reach is charged as the chosen one is: its twin, not its rival. NaN, for a use that is not
                # allowed, reaches nothing.
                x, far = own[j] + up[j], up[j]
                rivals[j] += 1.0 if x >= floor[j] and far > 0.0 else 0.0
        for j in range(m):
            alone, use = rivals[j] == 0.0 and (defer or first[j] >= 0.0), first[j]
            first[j] = use if alone else -1.0
            undecided[count] = at + j
            count += not alone
        _add(sums, mass, first, value, usd, inside, quality, taken, charge, m)
    return count, -1


@compiled
def pick(columns, rows, price, scale, defer, lo, hi, use):
    """The best response of each task into `use`, −1 where it defers; ties go to deferring, then to the first use."""
    width, n_planes, n_rows = columns[0], columns[1].shape[0] - 1, price.size
    value, mass, credit, best, first = (
        np.empty(TILE),
        np.empty(TILE),
        np.empty(TILE),
        np.empty(TILE),
        np.empty(TILE),
    )
    usd, w, inside = np.zeros((n_planes, TILE)), np.empty((n_planes, TILE)), np.empty((n_rows, TILE))
    quality = np.empty((width, TILE), columns[3].dtype)
    amount, v = np.zeros((n_planes, width, TILE), columns[3].dtype), np.empty((width, TILE))
    for at in range(lo, hi, TILE):
        m = min(TILE, hi - at)
        _load_tile(value, mass, usd, inside, quality, amount, columns, rows, at, m)
        _net_values(v, w, credit, value, usd, inside, quality, amount, rows, price, scale, m)
        _best(best, first, v, credit, defer, m)
        for j in range(m):
            use[at + j - lo] = int(first[j])
