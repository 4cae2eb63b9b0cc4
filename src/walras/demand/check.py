"""Is this menu what it says? Any menu: every IC and IR constraint, who gains by which lie, what it costs whom. [Z-5]

θ·q − λ₀·L − p is linear in θ, so the types meant for a tier are all checked by checking the least and the greatest of
them; and the best tier's utility rises with θ, so of those meant for none only the greatest of each stretch is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from walras.demand.menu import (
    MOST_TIERS,
    Certificate,
    Menu,
    Tier,
    between,
    certify,
    design,
    end_of,
    gains,
    taken,
    unserved,
)
from walras.demand.offerings import Offerings, Technology
from walras.demand.screening import Grid
from walras.errors import SettingsError
from walras.estimate.type_laws import TypeLaw, check_scale
from walras.quantities import IntArray
from walras.records.menus import MenuTable
from walras.risk import FloatArray

NAN = float("nan")


@dataclass(frozen=True, slots=True)
class Lie:
    """A misreport that pays: types meant for `own` do better with `takes`."""

    theta: float
    """The type that gains most by it, USD per unit of quality; ∞ where the gain grows without end."""
    latency_price: float
    """That type's price of delay, USD per second."""
    own: str | None
    """The tier meant for it; None for nothing."""
    takes: str | None
    """The tier it takes by lying; None for nothing."""
    gain: float
    """USD per request."""


@dataclass(frozen=True, slots=True)
class Downgrade:
    """Those who take `tier` and would get more quality from the reference menu."""

    tier: str | None
    """None: they get nothing."""
    share: float
    """Of all requests."""
    welfare_lost: float
    """Against the reference menu, USD per request of the whole population; below 0 where less is better for all."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What holds of a menu when each user takes what is meant for it. NaN where that cannot be known."""

    tiers: tuple[Tier, ...]
    """Ascending in quality; with the least and greatest type there is that takes it (NaN: none), share and rent."""
    certificate: Certificate
    lies: tuple[Lie, ...]
    """Those that gain more than `tolerance`, the greatest gain first; one for each pair of tiers."""
    tolerance: float
    """USD per request."""
    self_selected: bool
    """The menu does not say whom a tier is meant for: users took what is best for them, so nobody can gain by a lie."""
    untaken: tuple[str, ...]
    """Tiers that no type takes."""
    reference: Menu | None
    """The menu of as many tiers with the most welfare; None without a law or costs."""
    downgraded: tuple[Downgrade, ...]
    """By tier taken, in ascending quality, none first."""

    @property
    def holds(self) -> bool:
        """No constraint is violated by more than `tolerance`."""
        return not self.lies

    @property
    def downgraded_share(self) -> float:
        """Of all requests; NaN without a reference."""
        return NAN if self.reference is None else sum(d.share for d in self.downgraded)

    @property
    def welfare_lost(self) -> float:
        """By downgrading, USD per request; NaN without a reference."""
        return NAN if self.reference is None else sum(d.welfare_lost for d in self.downgraded)


def check(
    menu: MenuTable | Sequence[Tier],
    law: TypeLaw | Grid | None = None,
    technology: Technology | None = None,
    *,
    latency_price: float = 0.0,
    tolerance: float = 1e-9,
) -> Checked:
    """Verify a menu, whoever wrote it.

    Where it says whom each tier is meant for, those ranges are checked, and all other types are meant to take nothing:
    types are those the law has, or, without a law, all up to the greatest named, but only those named where each tier
    names one, or where no range begins at another's end. Where it does not say, users take the best tier (ties: the
    higher quality). On a grid it says only by one V and one λ₀ for each tier, not by ranges, which overlap there.

    Args:
        menu: as read, or tiers; `type_from` is NaN where a tier does not say.
        law: of types; without it there are no averages, and on a grid no reference.
        technology: gives the cost of tiers that have none, and the reference menu; without it the menu's own tiers do.
        latency_price: λ₀ of all users, USD per second, where neither menu nor grid gives it.
        tolerance: gains up to this are round-off, USD per request.

    Raises:
        SettingsError: a law of one dimension for users who differ in λ₀, a continuous one for tiers meant for single types,
            types of no sensible size, a technology with another λ₀, or one that cannot make a tier's quality.
    """
    tiers, delays = _ascending(menu, latency_price)
    tiers = [_costed(tier, technology) for tier in tiers]
    if isinstance(law, Grid):
        says = isinstance(menu, MenuTable) and menu.latency_price is not None
        own = _meant_on(tiers, delays, law) if says else _best(tiers, law.value, law.latency_price, tolerance)
        tiers, sums = _on_grid(tiers, law, own)
        return _checked(tiers, sums, _lies(tiers, own, law.value, law.latency_price), tolerance, not says)
    if law is not None:
        check_scale(law)
    _agree(tiers, delays, law, technology)
    delay = delays[0]
    self_selected = not any(_served(tier) for tier in tiers)
    tiers = _choose(tiers, law, delay, tolerance) if self_selected else _there(tiers, law)
    lies = _lies(tiers, *_points(tiers, delays, law))
    if law is None:
        return _checked(tiers, Certificate(0.0, 0.0, NAN, NAN, NAN, NAN), lies, tolerance, self_selected)
    tiers = [taken(tier, law, delay) if _served(tier) else replace(tier, share=0.0) for tier in tiers]
    sums = certify([tier for tier in tiers if _served(tier)], law, delay)
    found = _checked(tiers, sums, lies, tolerance, self_selected)
    reference = _reference(tiers, law, technology, delay)
    if reference is None:
        return found
    down = tuple(_downgraded(tiers, reference, law, delay, tolerance))
    return replace(found, reference=reference, downgraded=down)


def _checked(
    tiers: Sequence[Tier], sums: Certificate, lies: Sequence[Lie], tolerance: float, self_selected: bool
) -> Checked:
    ic = max((lie.gain for lie in lies if lie.takes is not None), default=0.0)
    ir = max((lie.gain for lie in lies if lie.takes is None), default=0.0)
    return Checked(
        tiers=tuple(tiers),
        certificate=replace(sums, worst_ic_violation=ic, worst_ir_violation=ir),
        lies=tuple(sorted((lie for lie in lies if lie.gain > tolerance), key=lambda lie: -lie.gain)),
        tolerance=tolerance,
        self_selected=self_selected,
        untaken=tuple(tier.name for tier in tiers if not _served(tier) or tier.share == 0),
        reference=None,
        downgraded=(),
    )


# --- the menu as it stands --------------------------------------------------------------------------------------------


def _served(tier: Tier) -> bool:
    """Some type is meant for it."""
    return not np.isnan(tier.type_from)


def _ascending(menu: MenuTable | Sequence[Tier], latency_price: float) -> tuple[list[Tier], list[float]]:
    """Tiers in ascending quality, and λ₀ of those each is meant for."""
    if not isinstance(menu, MenuTable):
        return sorted(menu, key=lambda tier: tier.quality), [latency_price] * max(len(menu), 1)
    nobody = np.full(len(menu.name), NAN)
    columns = (
        menu.quality,
        menu.price,
        nobody if menu.type_from is None else menu.type_from,
        nobody if menu.type_to is None else menu.type_to,
        menu.seconds,
        menu.cost,
    )
    tiers = [Tier(*row) for row in zip(menu.name, *(column.tolist() for column in columns), strict=True)]
    delay = np.full(len(tiers), latency_price) if menu.latency_price is None else menu.latency_price
    order = np.argsort(menu.quality, kind="stable")
    return [tiers[i] for i in order], [float(delay[i]) for i in order]


def _agree(
    tiers: Sequence[Tier], delays: list[float], law: TypeLaw | None, technology: Technology | None
) -> None:
    if law is not None and len(set(delays)) > 1:
        raise SettingsError(
            "users of this menu differ in what delay costs them, and the law of types says nothing of that",
            key="types",
            hint="check it without a law",
        )
    single = [tier.name for tier in tiers if tier.type_from == tier.type_to]
    if law is not None and law.atoms is None and single:
        raise SettingsError(
            f"tier '{single[0]}' is meant for a single type, and in {law.spec} no single type has any weight",
            key="types",
            hint="check it without a law, or say type_from and type_to, or nothing, of each tier",
        )
    if law is not None and technology is not None and delays[0] != technology.latency_price:
        raise SettingsError(
            f"delay costs users {delays[0]:g} USD/s, but the technology counts {technology.latency_price:g} USD/s",
            key="latency_price",
            hint="give both the same",
        )


def _costed(tier: Tier, technology: Technology | None) -> Tier:
    if technology is None or not np.isnan(tier.cost):
        return tier
    full = float(technology.cost_of(np.array(tier.quality)))
    if np.isinf(full):
        raise SettingsError(
            f"nothing there reaches quality {tier.quality:g} of tier '{tier.name}'",
            key="quality_cost",
            hint="give the tier's cost, or the offering it is",
        )
    return replace(tier, cost=full - technology.latency_price * technology.at(tier.quality)[1])


def _full(tiers: Sequence[Tier], delay: FloatArray) -> FloatArray:
    """Price and delay of nothing and of each tier at each λ₀ (P,), USD, (P, K + 1)."""
    price, seconds = (
        np.array([0.0, *(getattr(tier, name) for tier in tiers)]) for name in ("price", "seconds")
    )
    full: FloatArray = price + delay[:, None] * seconds
    return full


def _quality(tiers: Sequence[Tier]) -> FloatArray:
    return np.array([0.0, *(tier.quality for tier in tiers)])


# --- who takes what ---------------------------------------------------------------------------------------------------


def _best(tiers: Sequence[Tier], theta: FloatArray, delay: FloatArray, tie: float) -> IntArray:
    """The tier each type likes best, 0 for none, (P,).

    Prices make types indifferent, and rounding must not decide: within `tie` of the best, the highest quality.
    """
    utility = theta[:, None] * _quality(tiers) - _full(tiers, delay)
    best = utility >= utility.max(axis=1, keepdims=True) - tie
    own: IntArray = len(tiers) - best[:, ::-1].argmax(axis=1)
    return own


def _choose(tiers: list[Tier], law: TypeLaw | None, delay: float, tie: float) -> list[Tier]:
    """Tiers with the types that take them because they like them best."""
    if law is not None and law.atoms is not None:
        return _meant(tiers, law.atoms, _best(tiers, law.atoms, np.array([delay]), tie))
    q, full = _quality(tiers), _full(tiers, np.array([delay]))[0]
    liked: list[tuple[int, float]] = []
    for k in range(1, q.size):
        below, above = q < q[k], q > q[k]
        low = float(((full[k] - full[below]) / (q[k] - q[below])).max(initial=0.0))
        high = float(((full[above] - full[k]) / (q[above] - q[k])).min(initial=np.inf))
        rival = (q == q[k]) & ((full < full[k]) | ((full == full[k]) & (np.arange(q.size) < k)))
        if low < high and not rival.any():
            liked.append((k, low))
    out = [replace(tier, type_from=NAN, type_to=NAN) for tier in tiers]
    for (k, low), (_, high) in pairwise([*liked, (0, np.inf)]):  # the next one's least: no gap by rounding
        out[k - 1] = replace(tiers[k - 1], type_from=low, type_to=high)
    return _there(out, law)


def _there(tiers: list[Tier], law: TypeLaw | None) -> list[Tier]:
    """Tiers with the least and greatest type there is in their range; NaN where there is none."""
    if law is None:
        return tiers
    if law.atoms is not None:
        own = np.zeros(law.atoms.size, dtype=np.int64)
        for k, tier in enumerate(tiers, start=1):  # a type in two ranges is in the higher tier's
            own[(law.atoms >= tier.type_from) & (law.atoms <= tier.type_to)] = k
        return _meant(tiers, law.atoms, own)
    least, most = law.support
    clipped = [(max(tier.type_from, least), min(tier.type_to, most)) for tier in tiers]
    return [
        replace(tier, type_from=low if low < high else NAN, type_to=high if low < high else NAN)
        for tier, (low, high) in zip(tiers, clipped, strict=True)
    ]


def _meant(tiers: list[Tier], atoms: FloatArray, own: IntArray) -> list[Tier]:
    """Tiers with the least and greatest atom of those that are theirs; `own` is 0 for nothing, (T,)."""
    mine = [atoms[own == k] for k in range(1, len(tiers) + 1)]
    return [
        replace(tier, type_from=float(a.min()), type_to=float(a.max()))
        if a.size
        else replace(tier, type_from=NAN, type_to=NAN)
        for tier, a in zip(tiers, mine, strict=True)
    ]


def _meant_on(tiers: Sequence[Tier], delays: Sequence[float], grid: Grid) -> IntArray:
    """The tier each type of a grid is meant to take, 0 for none, (T,)."""
    own = np.zeros(len(grid), dtype=np.int64)
    for k, (tier, delay) in enumerate(zip(tiers, delays, strict=True), start=1):
        mine = (grid.value >= tier.type_from) & (grid.value <= tier.type_to)
        own[mine & (grid.latency_price == delay)] = k
    return own


def _on_grid(tiers: Sequence[Tier], grid: Grid, own: IntArray) -> tuple[list[Tier], Certificate]:
    """Tiers with the least and greatest V of those who take them, share and rent; and what the menu brings."""
    p = grid.probability
    q, full = _quality(tiers), _full(tiers, grid.latency_price)
    utility = (grid.value[:, None] * q - full)[np.arange(len(grid)), own]
    share, rent = (np.bincount(own, weights, q.size)[1:] for weights in (p, p * utility))
    out = []
    for k, tier in enumerate(_meant(list(tiers), grid.value, own)):
        mean = float(rent[k] / share[k]) if share[k] > 0 else NAN
        out.append(replace(tier, share=float(share[k]), rent=mean))
    revenue = sum(tier.share * tier.price for tier in out)
    profit = revenue - sum(tier.share * tier.cost for tier in out if tier.share > 0)
    return out, Certificate(0.0, 0.0, float(rent.sum()), revenue, profit, float(rent.sum()) + profit)


# --- who would rather have what ---------------------------------------------------------------------------------------


def _points(
    tiers: Sequence[Tier], delays: Sequence[float], law: TypeLaw | None
) -> tuple[IntArray, FloatArray, FloatArray]:
    """Types that stand for all: the tier meant for each (0: none), θ and λ₀, (P,)."""
    points: list[tuple[int, float, float]] = []
    for delay in sorted(set(delays)):
        mine = [k for k, tier in enumerate(tiers) if delays[k] == delay and _served(tier)]
        points += [(k + 1, theta, delay) for k in mine for theta in (tiers[k].type_from, tiers[k].type_to)]
        points += [(0, theta, delay) for theta in _unserved([tiers[k] for k in mine], law)]
    own, theta, at = np.array(points).reshape(-1, 3).T
    return own.astype(np.int64), theta, at


def _lies(tiers: Sequence[Tier], own: IntArray, theta: FloatArray, delay: FloatArray) -> list[Lie]:
    """Every misreport that pays, at the type that gains most by it: one for each pair of tiers."""
    gain = gains(_quality(tiers)[1:], _full(tiers, delay), own, theta)
    names = (None, *(tier.name for tier in tiers))
    lies = []
    for k in np.unique(own):
        mine = np.flatnonzero(own == k)
        most = mine[gain[mine].argmax(axis=0)]
        lies += [
            Lie(float(theta[i]), float(delay[i]), names[k], names[j], float(gain[i, j]))
            for j, i in enumerate(most)
            if gain[i, j] > 0
        ]
    return lies


def _unserved(served: list[Tier], law: TypeLaw | None) -> list[float]:
    """The greatest type of every stretch that no tier is meant for."""
    ranges = sorted((tier.type_from, tier.type_to) for tier in served)
    if law is not None:
        return unserved(ranges, law.support, law.atoms)
    apart = all(before[1] < low for before, (low, _) in pairwise(ranges)) and len(ranges) > 1
    if apart or all(low == high for low, high in ranges):
        return []  # the menu names its types, and there are no others
    return unserved(ranges, (0.0, max(high for _, high in ranges)), None)


# --- who gets less than would be best for all -----------------------------------------------------------------------


def _reference(
    tiers: list[Tier], law: TypeLaw | None, technology: Technology | None, delay: float
) -> Menu | None:
    """The menu of as many tiers with the most welfare, from the technology or else from these tiers at cost."""
    if law is None:
        return None
    if technology is None:
        q, cost, seconds = (
            np.array([getattr(tier, name) for tier in tiers]) for name in ("quality", "cost", "seconds")
        )
        if not np.isfinite(cost).all() or not 0 < q.max(initial=0.0) <= 1:
            return None
        technology = Offerings(tuple(tier.name for tier in tiers), q, cost, seconds, latency_price=delay)
    return design(law, technology, objective="welfare", tiers=min(max(len(tiers), 1), MOST_TIERS))


def _downgraded(
    tiers: list[Tier], reference: Menu, law: TypeLaw, delay: float, tolerance: float
) -> Iterator[Downgrade]:
    """Over the stretches between the cut-offs of both menus, in each of which everybody gets the same two tiers."""
    ends = sorted({0.0, np.inf, *_cuts(tiers, law), *_cuts(reference.tiers, law)})
    share, lost = np.zeros(len(tiers) + 1), np.zeros(len(tiers) + 1)
    for low, high in pairwise(ends):
        k, r = _taken_at(low, tiers, law), _taken_at(low, reference.tiers, law)
        mine = tiers[k - 1] if k else NOTHING
        theirs = reference.tiers[r - 1] if r else NOTHING
        if mine.quality >= theirs.quality - tolerance:
            continue
        mass, worth = (between(law, low, high, power) for power in (0, 1))
        burden = theirs.cost - mine.cost + delay * (theirs.seconds - mine.seconds)
        share[k] += mass
        lost[k] += (theirs.quality - mine.quality) * worth - burden * mass
    for k, name in enumerate((None, *(tier.name for tier in tiers))):
        if share[k] > tolerance:
            yield Downgrade(name, float(share[k]), float(lost[k]))


NOTHING = Tier("", 0.0, 0.0, 0.0, np.inf, cost=0.0)


def _cuts(tiers: Sequence[Tier], law: TypeLaw) -> list[float]:
    return [cut for tier in tiers if _served(tier) for cut in (tier.type_from, end_of(tier, law))]


def _taken_at(theta: float, tiers: Sequence[Tier], law: TypeLaw) -> int:
    """1 + index of the tier meant for this type, 0 for none."""
    mine = (k for k, tier in enumerate(tiers, start=1) if tier.type_from <= theta < end_of(tier, law))
    return next(mine, 0)
