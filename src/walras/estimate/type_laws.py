"""What a request is worth to its user: laws of the hidden type θ = V, USD per unit of quality. [Z-IR]

Everything a menu needs of a law is its partial moments E[θ^k · 1{θ ≥ t}], k = 0, 1, 2, in closed form: k = 0 is the survival
S(t), t·S(t) the revenue curve, and φ(θ) = θ − (1 − F)/f the slope of that curve against S.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from scipy.special import ndtr, ndtri

from walras.errors import SettingsError
from walras.risk import FloatArray

LARGEST = 1e12
"""USD per unit of quality."""
GRID = 2000
"""Cut-offs a continuous law is searched at before they are polished."""


class TypeLaw(Protocol):
    """A law of θ ≥ 0."""

    @property
    def spec(self) -> str:
        """As `--types` would have it."""

    @property
    def atoms(self) -> FloatArray | None:
        """Support of a discrete law, ascending, (T,); None where continuous."""

    @property
    def support(self) -> tuple[float, float]:
        """Least and greatest type; the latter may be ∞."""

    def moment_above(self, t: FloatArray, power: int) -> FloatArray:
        """E[θ^power · 1{θ ≥ t}], same shape as `t`; `power` 0, 1 or 2."""

    def density(self, t: FloatArray) -> FloatArray:
        """f(t) of a continuous law, same shape."""

    def grid(self, n: int = GRID) -> FloatArray:
        """Candidates for cut-offs, ascending: all atoms, or `n` points that leave next to nothing above the last."""


@dataclass(frozen=True, slots=True)
class Uniform:
    """θ uniform on [low, high]; φ(θ) = 2θ − high."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high < np.inf:
            raise SettingsError(
                f"uniform types from {self.low:g} to {self.high:g} are an empty support",
                key="types",
                hint="0 ≤ LOW < HIGH",
            )

    @property
    def spec(self) -> str:
        return f"uniform:{self.low:g}:{self.high:g}"

    @property
    def atoms(self) -> None:
        return None

    @property
    def support(self) -> tuple[float, float]:
        return self.low, self.high

    def moment_above(self, t: FloatArray, power: int) -> FloatArray:
        t, k = np.clip(t, self.low, self.high), power + 1
        part: FloatArray = (np.float64(self.high) ** k - t**k) / (k * (self.high - self.low))
        return part

    def density(self, t: FloatArray) -> FloatArray:
        return np.where((t >= self.low) & (t <= self.high), 1 / (self.high - self.low), 0.0)

    def grid(self, n: int = GRID) -> FloatArray:
        return np.linspace(self.low, self.high, n, endpoint=False)


@dataclass(frozen=True, slots=True)
class Exponential:
    """θ exponential with the given mean; φ(θ) = θ − mean."""

    mean: float

    def __post_init__(self) -> None:
        if not 0 < self.mean < np.inf:
            raise SettingsError(f"exponential types of mean {self.mean:g}", key="types", hint="MEAN > 0")

    @property
    def spec(self) -> str:
        return f"exponential:{self.mean:g}"

    @property
    def atoms(self) -> None:
        return None

    @property
    def support(self) -> tuple[float, float]:
        return 0.0, np.inf

    def moment_above(self, t: FloatArray, power: int) -> FloatArray:
        t, m = np.maximum(t, 0.0), self.mean
        inside = (1.0, t + m, t * t + 2 * m * t + 2 * m * m)[power]
        part: FloatArray = inside * np.exp(-t / m)
        return part

    def density(self, t: FloatArray) -> FloatArray:
        return np.where(t >= 0, np.exp(-np.maximum(t, 0.0) / self.mean) / self.mean, 0.0)

    def grid(self, n: int = GRID) -> FloatArray:
        return self.mean * np.linspace(0.0, 40.0, n)


@dataclass(frozen=True, slots=True)
class LogNormal:
    """log θ normal about log(median) with standard deviation `sigma`; its φ falls somewhere where sigma is large."""

    median: float
    sigma: float

    def __post_init__(self) -> None:
        if not (0 < self.median < np.inf and 0 < self.sigma < np.inf):
            what = f"lognormal types of median {self.median:g} and sigma {self.sigma:g}"
            raise SettingsError(what, key="types", hint="MEDIAN > 0 and SIGMA > 0")

    @property
    def spec(self) -> str:
        return f"lognormal:{self.median:g}:{self.sigma:g}"

    @property
    def atoms(self) -> None:
        return None

    @property
    def support(self) -> tuple[float, float]:
        return 0.0, np.inf

    def _z(self, t: FloatArray) -> FloatArray:
        with np.errstate(divide="ignore"):
            z: FloatArray = (np.log(np.maximum(t, 0.0)) - np.log(self.median)) / self.sigma
        return z

    def moment_above(self, t: FloatArray, power: int) -> FloatArray:
        z = self._z(t)
        whole = np.float64(self.median) ** power * np.exp((power * self.sigma) ** 2 / 2)
        part: FloatArray = whole * ndtr(power * self.sigma - z)
        return part

    def density(self, t: FloatArray) -> FloatArray:
        inside = t > 0
        at = np.where(inside, t, self.median)
        bell = np.exp(-(self._z(at) ** 2) / 2) / (np.sqrt(2 * np.pi) * self.sigma * at)
        return np.where(inside, bell, 0.0)

    def grid(self, n: int = GRID) -> FloatArray:
        z = np.linspace(ndtri(1e-9), 2 * self.sigma - ndtri(1e-12), n)
        points: FloatArray = self.median * np.exp(self.sigma * z)
        return points


@dataclass(frozen=True, slots=True)
class Atoms:
    """θ on finitely many points: two types, a table by hand, or an empirical law."""

    value: FloatArray
    """θ, strictly ascending, ≥ 0, (T,)."""
    probability: FloatArray
    """> 0, sums to 1, (T,)."""
    name: str = "table"
    _above: FloatArray = field(init=False, repr=False)
    """Σ p·θ^k from each atom on, k = 0, 1, 2, and 0 past the last, (3, T + 1)."""

    @classmethod
    def empirical(cls, sample: FloatArray, name: str = "sample") -> Atoms:
        """Each observation equally likely."""
        value, count = np.unique(np.asarray(sample, dtype=np.float64), return_counts=True)
        return cls(value, count / count.sum(), name)

    def __post_init__(self) -> None:
        if self.value.shape != self.probability.shape or not self.value.size:
            raise SettingsError(
                "the law of types has an empty support", key="types", hint="give at least one type"
            )
        if not (np.diff(self.value) > 0).all() or not self.value[0] >= 0 or not np.isfinite(self.value).all():
            raise SettingsError("types must be finite, ≥ 0 and in ascending order", key="types")
        if not (self.probability > 0).all() or abs(self.probability.sum() - 1) > 1e-6:
            raise SettingsError("probabilities must be > 0 and sum to 1", key="types")
        with np.errstate(over="ignore"):
            mass = self.probability * np.stack((np.ones_like(self.value), self.value, self.value**2))
        above = np.cumsum(np.pad(mass, ((0, 0), (0, 1)))[:, ::-1], axis=1)[:, ::-1]
        object.__setattr__(self, "_above", above)

    @property
    def spec(self) -> str:
        return self.name

    @property
    def atoms(self) -> FloatArray:
        return self.value

    @property
    def support(self) -> tuple[float, float]:
        return float(self.value[0]), float(self.value[-1])

    def moment_above(self, t: FloatArray, power: int) -> FloatArray:
        part: FloatArray = self._above[power, np.searchsorted(self.value, t, side="left")]
        return part

    def density(self, t: FloatArray) -> FloatArray:
        # A law must have the method, and steps have no density: whoever needs one looks at `atoms` first.
        raise NotImplementedError("a law of atoms has no density")

    def grid(self, n: int = GRID) -> FloatArray:  # noqa: ARG002 - all of them, however many are asked for
        return self.value


def check_scale(law: TypeLaw) -> None:
    """Types so small or so large that dollars drown in rounding are a mistake.

    Raises:
        SettingsError: their mean is below 1e-12 USD per unit of quality, but not 0, or their root mean square above `LARGEST`.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        mean, square = (float(law.moment_above(np.zeros(()), power)) for power in (1, 2))
    small = mean < 1 / LARGEST
    if mean and (small or not square <= LARGEST**2):
        raise SettingsError(
            f"the types of {law.spec} are too {'small' if small else 'large'} to compute with",
            key="types",
            hint=f"USD per unit of quality, {1 / LARGEST:g} to {LARGEST:g}",
        )


LAWS: dict[str, tuple[type[Uniform | Exponential | LogNormal], str]] = {
    "uniform": (Uniform, "LOW:HIGH"),
    "exponential": (Exponential, "MEAN"),
    "lognormal": (LogNormal, "MEDIAN:SIGMA"),
}
"""By the names that `parse_law` knows, with their parameters."""


def parse_law(text: str) -> TypeLaw:
    """`uniform:LOW:HIGH`, `exponential:MEAN` or `lognormal:MEDIAN:SIGMA`.

    Raises:
        SettingsError: another name, another number of parameters, or parameters without a law.
    """
    kind, *given = text.split(":")
    known = ", ".join(f"{name}:{wanted}" for name, (_, wanted) in LAWS.items()) + " or a file"
    if kind not in LAWS:
        raise SettingsError(f"'{text}' is not a law of types", key="types", hint=known)
    law, wanted = LAWS[kind]
    if len(given) != wanted.count(":") + 1:
        raise SettingsError(f"'{text}' is not {kind}:{wanted}", key="types", hint=known)
    try:
        numbers = [float(part) for part in given]
    except ValueError:
        raise SettingsError(f"'{text}' is not {kind}:{wanted} in numbers", key="types", hint=known) from None
    if not np.isfinite(numbers).all():
        raise SettingsError(f"'{text}' has a parameter that is not finite", key="types", hint=known)
    return law(*numbers)
