"""The frontier of a serving engine: what a replay makes lies below it, its corners are extreme, and an economy can offer it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import linprog

from engines import flat_steps, steps_up_to
from logs import walras
from walras.engine.profiles import load_profile
from walras.engine.replay import Replay
from walras.engine.requests import Requests
from walras.engine.settings import EngineSettings
from walras.errors import QuantityError
from walras.market.tenants.frontier import engine_frontier

LLAMA = load_profile("a100-80gb-llama2-70b-tp8")
ENGINE = EngineSettings(
    kv_blocks=LLAMA.limits.kv_tokens // 16, max_batched_tokens=4096, max_sequences=64, prefix_caching=False
)


def room(frontier: np.ndarray, made: np.ndarray) -> float:
    """How many times `made` the frontier reaches in its direction; below 1 it does not reach it."""
    v = len(frontier)
    found = linprog(
        np.r_[np.zeros(v), -1.0],
        A_ub=np.c_[-frontier.T, made],
        b_ub=np.zeros(2),
        A_eq=[np.r_[np.ones(v), 0.0]],
        b_eq=[1.0],
    )
    return float(found.x[-1])


def test_steps_of_constant_length_make_a_triangle_cut_by_the_batch() -> None:
    """By hand: a step of 0.1 s takes 100 new tokens, at most 40 of them decoded: corners (1000, 0) and (600, 400)."""
    settings = EngineSettings(kv_blocks=1000, max_batched_tokens=100, max_sequences=40)
    frontier = engine_frontier(settings, flat_steps(100, 40, overhead_s=0.1), 100.0)
    assert frontier == pytest.approx(np.array([[1000, 0], [600, 400]]))
    # With memory for 10 sequences only.
    assert engine_frontier(settings, flat_steps(100, 40, overhead_s=0.1), 1600.0)[-1] == pytest.approx(
        [900, 100]
    )


@pytest.mark.parametrize(("prompt", "answer"), [(2000, 20), (1000, 200), (100, 800)])
def test_a_replay_lies_below_the_frontier_and_not_far(prompt: int, answer: int) -> None:
    """Two roads: 1,000 requests that all wait from the beginning, replayed; the frontier may choose its steps, the scheduler fills them."""
    count = 1000
    steps = LLAMA.steps(ENGINE.max_batched_tokens, ENGINE.max_sequences)
    requests = Requests(np.zeros(count), np.full(count, prompt), np.full(count, answer))
    seconds = Replay(ENGINE, steps, requests=requests, interval_s=None).run().served().end_s.max()
    made = np.array([count * prompt, count * (answer - 1)]) / seconds
    assert 1.0 < room(engine_frontier(ENGINE, steps, prompt + answer / 2), made) < 1.4


@pytest.mark.parametrize("seed", range(5))
def test_corners_are_extreme_and_in_order(seed: int) -> None:
    settings = EngineSettings(kv_blocks=500, max_batched_tokens=128, max_sequences=16)
    frontier = engine_frontier(settings, steps_up_to(128, 16, seed), 200.0)
    assert (np.diff(frontier[:, 0]) < 0).all()
    assert (np.diff(frontier[:, 1]) > 0).all()
    slopes = np.diff(frontier[:, 1]) / np.diff(frontier[:, 0])
    assert (np.diff(slopes) > 0).all() or len(slopes) < 2


@pytest.mark.parametrize("context", [0.0, -1.0, float("nan"), 1e9])
def test_a_context_that_does_not_fit_is_refused(context: float) -> None:
    with pytest.raises(QuantityError, match="context"):
        engine_frontier(ENGINE, LLAMA.steps(4096, 64), context)


MARKET = """
goods = ["prefill", "decode", "gpu"]
supply = { gpu = 4 }
tenants = [
    { name = "search", budget = 60, utility = { kind = "cobb-douglas", shares = { prefill = 0.8, decode = 0.2 } } },
    { name = "agents", budget = 40, utility = { kind = "ces", shares = { prefill = 0.3, decode = 0.7 }, elasticity = 0.5 } },
]
engines = [
    { name = "a100", profile = "a100-80gb-llama2-70b-tp8", input = "gpu", prefill = "prefill", decode = "decode", context = 1000 },
]
"""


def test_an_economy_can_offer_an_engine(tmp_path: Path) -> None:
    path = tmp_path / "market.toml"
    path.write_text(MARKET, encoding="utf-8")
    (found,) = walras("clear", str(path), "--json").data["equilibria"]
    prefill, decode, gpu = found["prices"]
    assert gpu == pytest.approx(100 / 4)
    # At these prices no corner makes more than a GPU costs, and those in use make just that.
    settings = EngineSettings(
        kv_blocks=LLAMA.limits.kv_tokens,
        block_tokens=1,
        max_batched_tokens=LLAMA.limits.step_tokens,
        max_sequences=LLAMA.limits.most_sequences,
    )
    steps = LLAMA.steps(settings.max_batched_tokens, settings.max_sequences)
    worth = engine_frontier(settings, steps, 1000.0) @ [prefill, decode]
    assert worth.max() == pytest.approx(gpu)
    assert worth[np.array(found["activities"]) > 1e-9] == pytest.approx(gpu)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"a100-80gb-llama2-70b-tp8"', '"nobody"', "nobody"),
        ('input = "gpu"', 'input = "gpus"', "did you mean 'gpu'"),
        ("context = 1000", "context = 0", "context"),
        ("context = 1000", "contxt = 1000", "contxt"),
    ],
)
def test_an_engine_that_cannot_be_is_named(old: str, new: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "market.toml"
    path.write_text(MARKET.replace(old, new), encoding="utf-8")
    shown = walras("clear", str(path))
    assert shown.code == 4
    assert words in shown.err
