"""Laws of types: partial moments against quadrature, densities, and what is no law."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.integrate import quad

from walras.errors import SettingsError
from walras.estimate.type_laws import Atoms, Exponential, LogNormal, TypeLaw, Uniform, parse_law

LAWS = (Uniform(0, 2), Uniform(1, 3), Exponential(0.5), LogNormal(0.3, 0.8))


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("power", [0, 1, 2])
def test_moments_are_integrals_of_the_density(law: TypeLaw, power: int) -> None:
    top = min(law.support[1], 80.0)
    for t in (0.0, 0.2, 0.9, 1.7, 2.5):
        start = max(t, law.support[0])
        found = quad(
            lambda x: x**power * float(law.density(np.array(x))), start, max(top, start), epsabs=1e-12
        )[0]
        assert float(law.moment_above(np.array(t), power)) == pytest.approx(found, abs=1e-7)


def test_moments_of_atoms_are_sums() -> None:
    law = Atoms(np.array([1.0, 2, 5]), np.array([0.5, 0.3, 0.2]))
    t = np.array([0.0, 1, 1.5, 2, 5, 6])
    assert law.moment_above(t, 0) == pytest.approx([1, 1, 0.5, 0.5, 0.2, 0])
    assert law.moment_above(t, 2) == pytest.approx([6.7, 6.7, 6.2, 6.2, 5, 0])
    assert law.support == (1, 5)


def test_a_sample_is_a_law() -> None:
    law = Atoms.empirical(np.array([3.0, 1, 3, 2]))
    assert law.value.tolist() == [1, 2, 3]
    assert law.probability.tolist() == [0.25, 0.25, 0.5]


@pytest.mark.parametrize("law", LAWS)
def test_a_spec_reads_back(law: TypeLaw) -> None:
    assert parse_law(law.spec) == law


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gamma:1:2", "'gamma:1:2' is not a law of types"),
        ("uniform:1", "is not uniform:LOW:HIGH"),
        ("uniform:a:b", "is not uniform:LOW:HIGH in numbers"),
        ("uniform:2:2", "uniform types from 2 to 2 are an empty support"),
        ("uniform:-1:2", "uniform types from -1 to 2"),
        ("exponential:0", "exponential types of mean 0"),
        ("exponential:nan", "not finite"),
        ("lognormal:1:-1", "sigma -1"),
    ],
)
def test_what_is_no_law(text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        parse_law(text)


@pytest.mark.parametrize(
    ("value", "probability", "message"),
    [
        ([], [], "empty support"),
        ([1, 1], [0.5, 0.5], "ascending"),
        ([1, np.inf], [0.5, 0.5], "finite"),
        ([-1, 1], [0.5, 0.5], "≥ 0"),
        ([1, 2], [0.5, 0.4], "sum to 1"),
        ([1, 2], [0, 1], "> 0"),
    ],
)
def test_what_are_no_atoms(value: list[float], probability: list[float], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Atoms(np.array(value, dtype=float), np.array(probability, dtype=float))
