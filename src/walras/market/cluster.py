"""A market whose shards stay with the workers of a Ray cluster: prices go down, sums come up. [Z-1] [Z-CS]

Each worker answers for a group of shards. A part of the market (a sample, or what some screens left undecided) exists
only as its *trail*, the steps that lead to it from the shards. A question always carries its trail, so any worker can
answer for any group: one that has taken the steps before remembers where they led, a new one takes them again. Hence a
worker that is lost is replaced, one that is late is overtaken, and neither changes a digit, for sums are added shard by
shard, in order.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import pickle
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import add
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from walras.errors import OutputError, RecordError, SettingsError, WalrasError
from walras.market.dual import Market, Progress
from walras.market.memory import Memory, Sums
from walras.market.planes import Planes, Rows
from walras.market.shards import Shards
from walras.quantities import IntArray
from walras.risk import FloatArray

LOSSES = 3
"""Workers lost in one pass before the cluster is given up: it is not chance that kills them."""
STORE = 80 << 20
"""Bytes of Ray's object store where it is started here: about the least it takes. Nothing is kept in it."""

Floats = tuple[float, ...]


class Sample(NamedTuple):
    """A step: n of `among` tasks, each shard giving its share."""

    n: int
    among: int


class Screen(NamedTuple):
    """A step: the tasks that a box leaves undecided."""

    price: Floats
    radius: Floats
    scale: float


Trail = tuple[Sample | Screen, ...]


class Traffic(NamedTuple):
    """Bytes of questions and of answers in one pass, all workers together."""

    sent: int
    received: int


@dataclass(frozen=True)
class Job:
    """What a worker must know to answer for any of the groups."""

    groups: tuple[tuple[Path, ...], ...]
    rows: Rows
    planes: tuple[str, ...]
    declared: Floats
    defer: bool


class Worker:
    """Runs on the cluster, one process each. What it remembers it could find again."""

    held = 2 << 30
    """Bytes of shards that are kept in memory for a group; a larger one is streamed. The same for all workers: the last
    digit depends on it."""

    def __init__(self, number: int, job: Job) -> None:
        self.number, self._job = number, job
        self._shards: dict[int, list[tuple[Shards, Market]]] = {}
        self._steps: dict[tuple[int, Trail], list[tuple[Sums, Market]]] = {}

    def answer(self, question: bytes) -> bytes:
        """The answers of a group's shards, in order, or the error that one of them is."""
        group, trail, ask, arguments = pickle.loads(question)
        try:
            self._forget(group, trail)
            return pickle.dumps(getattr(self, f"_{ask}")(group, trail, *arguments))
        except WalrasError as error:
            return pickle.dumps(error)

    def _forget(self, group: int, trail: Trail) -> None:
        """The search never comes back to a branch that it has left."""
        for of, other in list(self._steps):
            if of == group and other != trail[: len(other)]:
                del self._steps[of, other]

    def _open(self, group: int) -> list[tuple[Shards, Market]]:
        if group not in self._shards:
            job = self._job
            shards = [Shards([p], job.rows, job.planes, job.declared, job.defer) for p in job.groups[group]]
            fits = sum(s.nbytes for s in shards) <= self.held
            self._shards[group] = [(s, s.gather() if fits else s) for s in shards]
        return self._shards[group]

    def _markets(self, group: int, trail: Trail) -> list[Market]:
        return [m for _, m in (self._reached(group, trail) if trail else self._open(group))]

    def _reached(self, group: int, trail: Trail) -> list[tuple[Sums, Market]]:
        """Where the last step leads from each shard, and what it sums up."""
        if (group, trail) not in self._steps:
            before = self._markets(group, trail[:-1])
            self._steps[group, trail] = [self._step(market, trail[-1]) for market in before]
        return self._steps[group, trail]

    def _step(self, market: Market, step: Sample | Screen) -> tuple[Sums, Market]:
        if isinstance(step, Screen):
            return market.screen(np.array(step.price), np.array(step.radius), step.scale)
        n = min(max(round(step.n * len(market) / step.among), 1), len(market))
        return Sums.zero(len(market.rows)), market.sample(n) if n else market

    # --- what can be asked --------------------------------------------------------------------------------------------

    def _uses(self, group: int, _: Trail) -> list[tuple[str, ...]]:
        return [shards.uses for shards, _ in self._open(group)]

    def _sizes(self, group: int, trail: Trail) -> list[tuple[int, float]]:
        return [(len(m), m.weight) for m in self._markets(group, trail)]

    def _sums(
        self,
        group: int,
        trail: Trail,
        price: Floats,
        scale: float,
        bandwidth: float,
        yardstick: Floats,
        moments: bool,
    ) -> Any:
        """A row of numbers for each shard, see `_packed`."""
        parts = [
            m.sums(np.array(price), scale, bandwidth, np.array(yardstick), moments=moments)
            for m in self._markets(group, trail)
        ]
        return np.array([_packed(part) for part in parts])

    def _take(self, group: int, trail: Trail) -> Any:
        """For the trail's last step, a row of numbers for each shard: how many tasks are left, and the sums."""
        return np.array([[len(market), *_packed(part)] for part, market in self._reached(group, trail)])

    def _gather(self, group: int, trail: Trail) -> list[tuple[Planes, IntArray | None]]:
        here = [m.gather() for m in self._markets(group, trail)]
        return [(m.planes, m.ids) for m in here]


def _packed(sums: Sums) -> FloatArray:
    return np.concatenate(
        ([sums.worth], sums.usage, sums.served, sums.curvature.ravel(), sums.moments.ravel())
    )


def _unpacked(flat: FloatArray, k: int) -> Sums:
    curvature, moments = flat[1 + 2 * k : 1 + 2 * k + k * k], flat[1 + 2 * k + k * k :]
    side = k if moments.size else 0
    return Sums.of(flat[: 1 + 2 * k], curvature.reshape(k, k), moments.reshape(side, side))


# --- the driver ---------------------------------------------------------------------------------------------------


class Part:
    """Implements `dual.Market` for the tasks at the end of a trail."""

    screens = True

    def __init__(self, crew: Crew, trail: Trail, sizes: IntArray) -> None:
        self.crew, self.trail, self.sizes = crew, trail, sizes
        self.rows, self.defer = crew.job.rows, crew.job.defer

    def __len__(self) -> int:
        return int(self.sizes.sum())

    @property
    def width(self) -> int:
        return len(self.crew.uses)

    @cached_property
    def weight(self) -> float:
        """Of all tasks."""
        return float(sum(weight for _, weight in self.crew.ask("sizes", self.trail)))

    def sums(
        self,
        price: FloatArray,
        scale: float,
        bandwidth: float,
        yardstick: FloatArray,
        *,
        moments: bool = False,
    ) -> Sums:
        """Best responses at `price`; see `sweep.respond`."""
        asked = (_floats(price), float(scale), float(bandwidth), _floats(yardstick), moments)
        return self._added(self.crew.ask("sums", self.trail, *asked))

    def screen(self, price: FloatArray, radius: FloatArray, scale: float) -> tuple[Sums, Part]:
        """Sums over the tasks that choose alike within `radius` of `price`; the others stay where they are."""
        return self._take(Screen(_floats(price), _floats(radius), float(scale)))

    def sample(self, n: int) -> Part:
        """About n tasks, which stay where they are, too."""
        return self._take(Sample(n, len(self)))[1]

    def gather(self) -> Memory:
        """The same market, in this process."""
        starts = np.cumsum(self.crew.sizes) - self.crew.sizes
        parts = self.crew.ask("gather", self.trail)
        ids = [
            start + (np.arange(len(planes)) if own is None else own)
            for (planes, own), start in zip(parts, starts, strict=True)
        ]
        planes = Planes.concatenate([planes for planes, _ in parts])
        return Memory(planes, self.rows, self.defer, np.concatenate(ids))

    def _take(self, step: Sample | Screen) -> tuple[Sums, Part]:
        trail = (*self.trail, step)
        shards = self.crew.ask("take", trail)
        sizes = np.array([flat[0] for flat in shards], dtype=np.int64)
        return self._added([flat[1:] for flat in shards]), Part(self.crew, trail, sizes)

    def _added(self, shards: list[FloatArray]) -> Sums:
        return reduce(add, (_unpacked(flat, len(self.rows)) for flat in shards))


class Cluster(Part):
    """The whole market. Close it, or use it in a `with` statement: workers are processes."""

    worker: type[Worker] = Worker

    def __init__(
        self,
        paths: Sequence[Path | str],
        rows: Rows,
        planes: Sequence[str],
        declared: Sequence[float],
        defer: bool = True,
        *,
        workers: int = 2,
        address: str | None = None,
        patience: float = 300.0,
    ) -> None:
        """Starts the workers, which open their shards.

        Args:
            paths: shards, as workers see them; see `Shards`, also for the other arguments.
            workers: how many processes, at most one for each shard. Each uses all cores of its machine.
            address: of a Ray cluster; None starts Ray on this machine.
            patience: seconds into a pass after which a worker's shards are given to another one as well.

        Raises:
            RecordError: a shard that cannot be read, or with other uses than the first.
            SettingsError: Ray is not installed or not there.
        """
        if not paths:
            raise SettingsError("names no files", key="shards")
        groups = np.array_split(np.arange(len(paths)), min(max(workers, 1), len(paths)))
        job = Job(
            tuple(tuple(Path(paths[i]) for i in group) for group in groups),
            rows,
            tuple(planes),
            tuple(float(usd) for usd in declared),
            defer,
        )
        crew = Crew(job, self.worker, address, patience)
        try:
            crew.open()
        except BaseException:
            crew.close()
            raise
        super().__init__(crew, (), crew.sizes)

    @property
    def traffic(self) -> list[Traffic]:
        """Of every pass so far."""
        return self.crew.traffic

    def close(self) -> None:
        """End the workers, and Ray if it was started here."""
        self.crew.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Crew:
    """The workers, and who answers for which group."""

    def __init__(self, job: Job, worker: type[Worker], address: str | None, patience: float) -> None:
        self.job, self.patience, self.traffic = job, patience, list[Traffic]()
        self.uses: tuple[str, ...] = ()
        self.sizes: IntArray = np.zeros(0, dtype=np.int64)
        self._ray, self._started = _connect(address, len(job.groups))
        self._remote = self._ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(worker)
        self.workers = [self._remote.remote(number, job) for number in range(len(job.groups))]
        self._home = list(range(len(job.groups)))

    def open(self) -> None:
        """Have all shards opened and compared."""
        paths = [path for group in self.job.groups for path in group]
        uses = self.ask("uses", ())
        for path, own in zip(paths, uses, strict=True):
            if own != uses[0]:
                raise RecordError(f"has other uses than {paths[0]}, or in another order", path=path)
        self.uses = uses[0]
        self.sizes = np.array([n for n, _ in self.ask("sizes", ())], dtype=np.int64)

    def ask(self, ask: str, trail: Trail, *arguments: Any) -> list[Any]:
        """One pass: the answers of all shards, in order.

        Raises:
            WalrasError: what a worker raised, or workers die again and again.
        """
        questions = [pickle.dumps((group, trail, ask, arguments)) for group in range(len(self.job.groups))]
        answers: dict[int, bytes] = {}
        running: dict[Any, tuple[int, int, Any]] = {}
        asked: list[set[int]] = [set() for _ in questions]
        sent, losses = 0, 0

        def put(group: int, worker: int) -> None:
            nonlocal sent
            process = self.workers[worker]
            running[process.answer.remote(questions[group])] = group, worker, process
            asked[group].add(worker)
            sent += len(questions[group])

        for group, worker in enumerate(self._home):
            put(group, worker)
        until = time.monotonic() + self.patience
        while len(answers) < len(questions):
            done, _ = self._ray.wait(list(running), timeout=max(until - time.monotonic(), 0.0))
            if not done:
                for group in set(range(len(questions))) - set(answers):
                    others = set(range(len(self.workers))) - asked[group]
                    if others:
                        put(group, min(others, key=lambda w: (self._home.count(w), w)))
                until = time.monotonic() + self.patience
                continue
            group, worker, process = running.pop(done[0])
            try:
                answer = self._ray.get(done[0])
            except self._ray.exceptions.RayTaskError:
                raise
            except self._ray.exceptions.RayError as error:
                losses += 1
                if losses > LOSSES * len(self.workers):
                    raise WalrasError(f"workers are lost again and again: {error}") from error
                if process is self.workers[worker]:
                    self.workers[worker] = self._remote.remote(worker, self.job)
                if group not in answers:
                    put(group, worker)
            else:
                if group not in answers:
                    answers[group], self._home[group] = answer, worker
        self.traffic.append(Traffic(sent, sum(map(len, answers.values()))))
        found = [pickle.loads(answers[group]) for group in range(len(questions))]
        for wrong in found:
            if isinstance(wrong, WalrasError):
                raise wrong
        return [answer for group in found for answer in group]

    def close(self) -> None:
        for worker in self.workers:
            self._ray.kill(worker)
        self.workers = []
        if self._started:
            self._ray.shutdown()


def _connect(address: str | None, cores: int) -> tuple[Any, bool]:
    """Ray, and whether it was this call that started it or joined it."""
    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        raise SettingsError("a cluster needs Ray", hint="pip install 'walras[cluster]'") from error
    if ray.is_initialized():
        return ray, False
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init("local", num_cpus=cores, include_dashboard=False, object_store_memory=STORE, **quiet)
        return ray, True
    try:
        ray.init(address, **quiet)
    except (ConnectionError, ValueError) as error:
        raise SettingsError(f"no Ray cluster at {address}: {error}", key="--ray-address") from error
    return ray, True


def _floats(values: FloatArray) -> Floats:
    return tuple(values.tolist())


# --- starting again -------------------------------------------------------------------------------------------------


def checkpoint(path: Path, also: Progress | None = None) -> Progress:
    """An `on_pass` for `dual.solve` that leaves the latest prices in `path`, whole at any time.

    Raises (when called):
        OutputError: the file cannot be written.
    """

    def write(number: int, gap: float, prices: FloatArray) -> None:
        known = {"pass": number, "gap": gap if np.isfinite(gap) else None, "prices": prices.tolist()}
        beside = path.with_name(path.name + ".tmp")
        try:
            beside.write_text(json.dumps(known), encoding="utf-8")
            beside.replace(path)
        except OSError as error:
            raise OutputError(f"{path}: cannot be written: {error.strerror}") from error
        if also:
            also(number, gap, prices)

    return write


def resume(path: Path) -> FloatArray:
    """The prices in a checkpoint, as a `start` for `dual.solve`.

    Raises:
        RecordError: there is none.
    """
    try:
        prices = np.array(json.loads(path.read_text(encoding="utf-8"))["prices"], dtype=np.float64)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecordError("is not a checkpoint", path=path) from error
    return prices
