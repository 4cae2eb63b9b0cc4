"""Published economies [Z-GE]: their files read as they are, prices to 1e-8, and Scarf's circle that tâtonnement follows."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from scipy.integrate import solve_ivp

from conftest import DataDir
from walras.errors import NotCleared
from walras.market.tenants.certificate import support
from walras.market.tenants.economy import Economy, Tenant
from walras.market.tenants.read import read_economies
from walras.market.tenants.solve import clear
from walras.market.tenants.utility import CES
from walras.risk import FloatArray

EXACT = 1e-8
STARTS = 100


def scarf() -> Economy:
    """Scarf (1960), first example: each of three owns one good and uses it with the next, one to one."""
    owned = np.eye(3)
    tenants = (
        Tenant(f"consumer {i + 1}", CES(owned[i] + owned[(i + 1) % 3], 0.0), owned[i]) for i in range(3)
    )
    return Economy(("a", "b", "c"), tuple(tenants))


def facts(data_dir: DataDir, name: str) -> tuple[dict[str, Any], dict[str, Economy]]:
    path = data_dir / f"equilibrium/{name}.json"
    return json.loads(path.read_text()), read_economies(path)


def only(economies: dict[str, Economy]) -> Economy:
    (economy,) = economies.values()
    return economy


@pytest.mark.data
@pytest.mark.parametrize("solver", ["auto", "homotopy"])
def test_scarf_and_hansen(data_dir: DataDir, solver: Any) -> None:
    said, economies = facts(data_dir, "scarf_hansen1973")
    found = clear(only(economies), solver=solver)
    assert found.prices == pytest.approx(said["equilibria"][0]["prices"], abs=EXACT)
    assert found.activities == pytest.approx(said["equilibria"][0]["activities"], abs=1e-7)
    assert found.certificate.worst < 1e-12
    assert found.certificate.index == 1


@pytest.mark.data
@pytest.mark.parametrize("solver", ["auto", "homotopy"])
def test_shoven_and_whalley(data_dir: DataDir, solver: Any) -> None:
    said, economies = facts(data_dir, "shoven_whalley1984")
    found, (golden,) = clear(only(economies), solver=solver), said["equilibria"]
    prices = found.prices / found.prices[2]
    names = "p_manufacturing", "p_nonmanufacturing", "wage", "rental"
    assert prices == pytest.approx([golden[name] for name in names], abs=EXACT)
    assert found.activities == pytest.approx(golden["output"], abs=1e-7)
    assert found.allocation[:, :2] == pytest.approx(np.array([golden["rich"], golden["poor"]]), abs=1e-7)


@pytest.mark.data
def test_fisher(data_dir: DataDir) -> None:
    said, economies = facts(data_dir, "fisher")
    for name, economy in economies.items():
        found = clear(economy)
        assert found.prices * found.usd == pytest.approx(said[name]["prices"], abs=EXACT)
        assert np.sum(found.prices * found.usd * economy.supply) == pytest.approx(sum(said[name]["budgets"]))
    linear = clear(economies["linear"])
    assert linear.allocation == pytest.approx(np.array(said["linear"]["allocation"]), abs=EXACT)


@pytest.mark.data
def test_kehoe_has_three_equilibria_whose_indices_sum_to_one(data_dir: DataDir) -> None:
    said, economies = facts(data_dir, "kehoe1985")
    economy = only(economies)
    starts = [np.array(golden["prices"]) * [1.001, 1.0, 0.999, 1.0] for golden in said["equilibria"]]
    found = [clear(economy, start=start) for start in starts]
    for golden, one in zip(said["equilibria"], found, strict=True):
        assert one.prices == pytest.approx(golden["prices"], abs=EXACT)
        assert one.activities == pytest.approx(golden["activities"], abs=1e-6)
    assert [one.certificate.index for one in found] == [1, -1, 1]


@pytest.mark.data
def test_mwg_has_three_equilibria_of_which_the_middle_one_is_unstable(data_dir: DataDir) -> None:
    said, economies = facts(data_dir, "mwg15b2")
    economy = only(economies)
    ratio, z = 0.7, economy.excess_demand(np.array([0.7, 1.0]))
    r = said["r"]
    assert z[0] == pytest.approx(2 + r / ratio - ratio ** (1 / 9) / ratio + ratio ** (-1 / 9) - (2 + r))
    for golden in said["equilibria"]:
        found = clear(economy, start=np.array([golden["p1_over_p2"] * 1.05, 1.0]))
        assert found.prices[0] / found.prices[1] == pytest.approx(golden["p1_over_p2"], abs=EXACT)
        assert found.certificate.index == golden["index"]
        assert found.certificate.stable == (golden["index"] == 1)


@pytest.mark.data
def test_scarf_as_published(data_dir: DataDir) -> None:
    said, economies = facts(data_dir, "scarf1960")
    economy, p = only(economies), np.array([0.5, 0.2, 0.3])
    assert economy.excess_demand(p) == pytest.approx(scarf().excess_demand(p))
    assert economy.jacobian(np.ones(3)) == pytest.approx(
        np.array(said["tatonnement"]["jacobian_at_ones"]), abs=1e-15
    )
    assert clear(economy).prices == pytest.approx(said["equilibria"][0]["prices"], abs=EXACT)


def test_scarf_goes_in_circles() -> None:
    """dp/dt = z(p) from (1.2, 1, 0.8): back after 14.494, Σp² and Πp kept, never near the equilibrium."""
    economy, start = scarf(), np.array([1.2, 1.0, 0.8])
    ahead = economy.excess_demand(start)

    def back(_: float, p: FloatArray) -> float:
        return float((p - start) @ ahead)

    back.direction = 1  # type: ignore[attr-defined]
    orbit = solve_ivp(
        lambda _, p: economy.excess_demand(p),
        (0, 30),
        start,
        "DOP853",
        events=back,
        rtol=1e-11,
        atol=1e-13,
        max_step=0.05,
    )
    periods = np.diff(np.append(0.0, orbit.t_events[0][orbit.t_events[0] > 1]))
    assert periods == pytest.approx(14.494, abs=0.01)
    assert np.abs((orbit.y**2).sum(axis=0) - 3.08).max() < 1e-8
    assert np.abs(orbit.y.prod(axis=0) - 0.96).max() < 1e-8
    away = np.linalg.norm(orbit.y / np.linalg.norm(orbit.y, axis=0) - np.sqrt(1 / 3), axis=0)
    assert away.min() == pytest.approx(0.15868596, abs=1e-5)


def test_tatonnement_says_that_it_circles() -> None:
    with pytest.raises(NotCleared, match="gross substitutes"):
        clear(scarf(), solver="tatonnement", start=np.array([1.2, 1.0, 0.8]))


def test_the_fallback_reaches_scarfs_equilibrium_from_anywhere() -> None:
    for start in np.random.default_rng(1960).dirichlet(np.ones(3), STARTS):
        found = clear(scarf(), solver="homotopy", start=start)
        assert found.prices == pytest.approx(1 / 3, abs=EXACT)
        assert found.certificate.index == 1


def test_scarfs_equilibrium_supports_itself() -> None:
    found = clear(scarf())
    held = support(scarf(), found.allocation)
    assert held.waste == pytest.approx(0.0, abs=1e-12)
    assert held.transfers == pytest.approx(0.0, abs=EXACT)
