"""A real local Ray: the same prices as in memory whoever answers, and few bytes on the way."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from test_shards import CUTS, DECLARED, NAMES, USES, market, mixed
from walras.errors import OutputError, RecordError, SettingsError, WalrasError
from walras.market import cluster
from walras.market.cluster import Cluster, Worker, checkpoint, resume
from walras.market.dual import Answer, solve
from walras.market.memory import Memory
from walras.market.shards import write_shard

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'walras[cluster]'")

pytestmark = [
    pytest.mark.cluster,
    # Ray's own: sockets and files it leaves to the garbage collector, and a notice about accelerators.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
]


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    """One Ray for all tests, with room for two workers of a test and two of the one before, which may still be ending."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(
        "local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=cluster.STORE,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def held() -> Memory:
    return market()


@pytest.fixture(scope="module")
def expected(held: Memory) -> Answer:
    return solve(held)


@pytest.fixture(scope="module")
def paths(held: Memory, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("shards")
    for i, (lo, hi) in enumerate(pairwise(CUTS)):
        write_shard(folder / f"{i}.arrow", held.planes.part(lo, hi), USES, NAMES, ["weight"])
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def there(paths: list[Path], held: Memory) -> Iterator[Cluster]:
    with Cluster(paths, held.rows, NAMES, DECLARED) as two_workers:
        yield two_workers


@pytest.fixture(scope="module")
def undisturbed(there: Cluster) -> Answer:
    return solve(there)


Start = Callable[..., Cluster]


@pytest.fixture
def start(paths: list[Path], held: Memory) -> Iterator[Start]:
    """Another cluster, of workers that behave in some way."""
    started: list[Cluster] = []

    def start(kind: type[Worker] = Worker, **settings: Any) -> Cluster:
        class Odd(Cluster):
            worker = kind

        started.append(Odd(paths, held.rows, NAMES, DECLARED, **settings))
        return started[-1]

    yield start
    for each in started:
        each.close()


def test_prices_are_those_of_the_market_in_memory(there: Cluster, held: Memory, expected: Answer) -> None:
    before = len(there.traffic)
    answer = solve(there)
    passes = there.traffic[before:]
    assert len(there) == len(held)
    assert there.width == held.width
    assert there.weight == held.weight
    np.testing.assert_allclose(answer.multipliers, expected.multipliers, rtol=1e-9)
    assert abs(answer.dual - answer.objective) <= 1e-12 * answer.objective
    assert mixed(answer) == mixed(expected)
    # The last pass but one brings the few undecided tasks; all others bring sums.
    assert max(t.sent for t in passes) < 2_000
    assert max(t.received for t in passes[:-2]) < 2_000
    assert len(passes) >= answer.steps


def test_undecided_tasks_keep_their_numbers(there: Cluster, held: Memory) -> None:
    price, step = np.array([2.0, 0.1, 1.0]), np.full(3, 0.1)
    sums, near = there.screen(price, step, 1.0)
    same_sums, same = held.screen(price, step, 1.0)
    here = near.gather()
    assert len(near) == len(here) == len(same)
    np.testing.assert_array_equal(here.ids, same.ids)
    np.testing.assert_array_equal(here.planes.quality, same.planes.quality)
    np.testing.assert_allclose(sums.usage, same_sums.usage, rtol=1e-12)


def test_a_search_is_taken_up_where_it_was_left(there: Cluster, tmp_path: Path, expected: Answer) -> None:
    class Gone(Exception):
        pass

    seen = []

    def fail(number: int, gap: float, prices: Any) -> None:
        seen.append(prices)
        raise Gone

    file = tmp_path / "prices.json"
    with pytest.raises(Gone):
        solve(there, on_pass=checkpoint(file, fail))
    np.testing.assert_array_equal(resume(file), seen[0])
    answer = solve(there, start=resume(file), on_pass=checkpoint(file))
    np.testing.assert_allclose(answer.multipliers, expected.multipliers, rtol=1e-9)
    np.testing.assert_array_equal(resume(file), answer.multipliers)
    assert list(tmp_path.iterdir()) == [file]


def test_checkpoints_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "half.json").write_text('{"prices": [1.0')
    for name in ("none.json", "half.json"):
        with pytest.raises(RecordError, match="is not a checkpoint"):
            resume(tmp_path / name)
    with pytest.raises(OutputError, match="cannot be written"):
        checkpoint(tmp_path / "no" / "a.json")(1, 0.0, np.ones(2))


def test_how_many_workers_there_are_changes_no_digit(start: Start, undisturbed: Answer) -> None:
    same(solve(start(workers=1)), undisturbed)


def test_a_worker_that_is_killed_is_replaced(start: Start, undisturbed: Answer) -> None:
    there = start()
    killed = []

    def kill(number: int, gap: float, prices: Any) -> None:
        if not killed:
            killed.append(there.crew.workers[1])
            ray.kill(killed[0])

    same(solve(there, on_pass=kill), undisturbed)
    assert there.crew.workers[1] is not killed[0]


def test_a_worker_that_is_late_is_overtaken(start: Start, undisturbed: Answer) -> None:
    class Sleepy(Worker):
        def answer(self, question: bytes) -> bytes:
            if self.number == 0 and b"Screen" in question:
                time.sleep(300)
            return super().answer(question)

    began = time.monotonic()
    same(solve(start(Sleepy, patience=3.0)), undisturbed)
    assert time.monotonic() - began < 200


def test_shards_that_do_not_fit_are_streamed(start: Start, expected: Answer) -> None:
    class Small(Worker):
        held = 0

    answer = solve(start(Small, workers=1))
    np.testing.assert_allclose(answer.multipliers, expected.multipliers, rtol=1e-9)


def test_a_question_that_kills_ends_the_search(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    class Mortal(Worker):
        def answer(self, question: bytes) -> bytes:
            if b"Screen" in question:
                os._exit(1)
            return super().answer(question)

    monkeypatch.setattr(cluster, "LOSSES", 1)
    with pytest.raises(WalrasError, match="lost again and again"):
        solve(start(Mortal, workers=1))


def same(answer: Answer, other: Answer) -> None:
    np.testing.assert_array_equal(answer.multipliers, other.multipliers)
    np.testing.assert_array_equal(answer.usage, other.usage)
    assert (answer.dual, answer.objective, answer.steps) == (other.dual, other.objective, other.steps)


def test_bad_shards_are_named_from_afar(held: Memory, paths: list[Path], tmp_path: Path) -> None:
    part = held.planes.part(0, 50)
    value = part.value.copy()
    value[20] = np.inf
    write_shard(tmp_path / "bad.arrow", replace(part, value=value), USES, NAMES, ["weight"])
    write_shard(tmp_path / "other.arrow", part, USES[::-1], NAMES, ["weight"])
    for name, message in (
        ("bad.arrow", "row 21, column 'value': is inf"),
        ("other.arrow", "has other uses than .*0.arrow"),
    ):
        with pytest.raises(RecordError, match=rf"{name}.*{message}"):
            Cluster([*paths, tmp_path / name], held.rows, NAMES, DECLARED, workers=1)
    with pytest.raises(SettingsError, match="no files"):
        Cluster([], held.rows, NAMES, DECLARED)


def test_without_ray_it_says_what_to_install(
    held: Memory, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SettingsError, match=r"needs Ray \(pip install 'walras\[cluster\]'\)"):
        Cluster(paths, held.rows, NAMES, DECLARED)
