"""Requests through an engine: what each waits for, and what the engine holds meanwhile. SIMULATED. [Z §3.3]

    replay = Replay(settings, steps, Routing.kv(16), requests)
    replay.run()
    replay.served().ttft_s.mean()

A replay stops anywhere (`run(until_s)`) and goes on in two ways: itself, and as a `branch` in which one request more
arrives, one worker less is open, or routing sees other prices. The same input gives the same output, to the bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from walras.engine import kernel
from walras.engine.cache import NODE, clear, nodes_needed
from walras.engine.requests import Requests
from walras.engine.settings import EngineSettings, Routing, Schedule
from walras.engine.state import (
    AS_THEY_COME,
    BATCH,
    BY_TENANT,
    CALL,
    CLOCK,
    DONE,
    FINISH,
    LATER,
    LOG_FULL,
    PRICED,
    ROW,
    SAMPLE,
    SAMPLES_FULL,
    SERVED,
    SETUP,
    SHORTEST,
    SLOT,
    TENANT,
    WORKER,
    Columns,
    State,
    Tables,
)
from walras.engine.steps import StepTimes
from walras.errors import RecordError, SettingsError

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_RATE_UNIT = 4096
"""Expected tokens a step are rounded to 1 / _RATE_UNIT: the engine counts whole tokens."""
_ORDERS = {"fcfs": AS_THEY_COME, "shortest": SHORTEST, "priced": PRICED, "vtc": BY_TENANT}
_FIRST_SLOTS = 256
_SAMPLES = 1024


@dataclass(frozen=True, slots=True)
class Served:
    """What became of N finished requests, by `request`, its place in all that was fed. SIMULATED."""

    request: IntArray
    arrival_s: FloatArray
    """When it arrived, from the beginning of the trace."""
    queue_s: FloatArray
    """From arrival to the step that first computes for it."""
    ttft_s: FloatArray
    """From arrival to the end of the step that gives the first token."""
    tpot_s: FloatArray
    """(end − first token) / (output tokens − 1); 0 for one token."""
    end_s: FloatArray
    """When its last token came, from the beginning of the trace."""
    delay_price: FloatArray
    """USD per second of its delay; 1 where none was given."""
    cached_tokens: IntArray
    """Prompt tokens found in memory when it was first admitted."""
    preemptions: IntArray
    worker: IntArray
    """That decoded it."""
    prefill_worker: IntArray
    """That computed its prompt."""

    def __len__(self) -> int:
        return len(self.request)

    @property
    def latency_s(self) -> FloatArray:
        """From arrival to end."""
        return self.end_s - self.arrival_s


@dataclass(frozen=True, slots=True)
class Intervals:
    """T intervals of W workers: states at the end of each, counts over each. SIMULATED."""

    end_s: FloatArray
    """(T,)"""
    running: IntArray
    """(T, W) sequences."""
    waiting: IntArray
    """(T, W) requests in line."""
    kv_use: FloatArray
    """(T, W) share of the KV blocks that sequences hold."""
    output_tokens: IntArray
    prompt_tokens: IntArray
    """(T, W) prompt tokens computed, those computed again after a preemption included; a step counts when it starts."""
    hit_tokens: IntArray
    """(T, W) prompt tokens found in memory."""
    preemptions: IntArray
    finished: IntArray


class Replay:
    """An engine in the middle of a trace.

    Raises:
        RecordError: a request that this engine can never serve, or that arrives before those fed earlier.
        SettingsError: step times that do not reach the engine's limits.
    """

    def __init__(
        self,
        settings: EngineSettings,
        steps: StepTimes,
        routing: Routing | None = None,
        requests: Requests | None = None,
        *,
        interval_s: float | None = 1.0,
    ) -> None:
        settings.check_steps(steps)
        if interval_s is not None and not (np.isfinite(interval_s) and interval_s > 0):
            raise SettingsError(
                f"{interval_s} seconds", key="interval_s", hint="more than 0, or None for no samples"
            )
        self.settings, self.steps, self.routing = settings, steps, routing or Routing.round_robin()
        self.schedule = settings.schedule
        self._rules()
        self._state = _empty_state(settings, interval_s or np.inf)
        self._columns = Columns(np.empty(0, ROW), np.empty(0, np.int64), np.empty(0, np.int64))
        self._fed, self._last_arrival, self._calls = 0, 0.0, 0
        self._turned_away: list[IntArray] = []
        self._room_for_results()
        if requests is not None:
            self.feed(requests)

    def _rules(self) -> None:
        """What the kernel reads of routing and schedule."""
        self._setup = _setup(self.settings, self.steps, self.routing, self.schedule)
        self._tables = _tables(self.settings, self.steps, self.routing, self.schedule)

    def _room_for_results(self) -> None:
        self._log = np.empty(max(4096, 2 * self.settings.max_sequences), SERVED)
        self._samples = np.empty((_SAMPLES, self.settings.workers), SAMPLE)
        self._served: list[Any] = []
        self._sampled: list[Any] = []
        self._before = np.zeros((1, self.settings.workers), SAMPLE)

    def reschedule(self, schedule: Schedule) -> None:
        """Order those who come from now on by other numbers; who is in line stays where he is.

        Raises:
            SettingsError: another order than the replay began with, which its line and its counts do not have.
        """
        if schedule.order != self.schedule.order:
            raise SettingsError(
                f"the line is {self.schedule.order}, not {schedule.order}",
                key="schedule",
                hint="begin a replay with it",
            )
        self.schedule = schedule
        self._setup = _setup(self.settings, self.steps, self.routing, schedule)
        self._tables = self._tables._replace(takes=schedule.weights(self.settings.workers))

    def turned_away(self) -> IntArray:
        """The requests that were not let in so far, by their place in all that was fed."""
        self._drain_log()
        self._turned_away = [np.sort(np.concatenate([*self._turned_away, np.empty(0, np.int64)]))]
        return self._turned_away[0]

    @property
    def service(self) -> FloatArray:
        """(W, tenants) weighted tokens that each tenant has got of a worker, as fair shares count them: with what was lifted."""
        workers, of = self._state.workers, self._state.tenants
        now = np.array([_tokens(self._setup[0], int(done)) for done in workers["done"]])[:, None]
        service: FloatArray = of["service"] + self.schedule.answer_weight * of["decoding"] * (
            now - of["counted"]
        )
        return service

    @property
    def now_s(self) -> float:
        """Until when everything has happened."""
        return float(self._state.clock["now"][0])

    @property
    def in_flight(self) -> int:
        """Requests that have arrived and not ended."""
        return int(self._state.clock["live"][0])

    @property
    def over(self) -> bool:
        """Whether nothing is in flight and nothing is to come of what was fed."""
        clock = self._state.clock[0]
        return not (clock["live"] or clock["due"]) and int(clock["next"]) == len(self._columns.open)

    @property
    def delay_price(self) -> FloatArray:
        """(W,) mean price of delay of the requests at each worker, USD per second; NaN where there is none."""
        live = self._state.slots[self._state.slots["row"] >= 0]
        workers, weight = live["worker"], self._columns.rows["weight"][live["row"]]
        count = np.bincount(workers, minlength=self.settings.workers)
        total = np.bincount(workers, weight, minlength=self.settings.workers)
        mean: FloatArray = np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)
        return mean

    @property
    def fed(self) -> int:
        """Requests fed so far: the place of the next one."""
        return self._fed

    @property
    def free_blocks(self) -> IntArray:
        """(W,) KV blocks that no sequence holds now."""
        kernel.catch_up_all(self._setup, self._state, self.now_s)
        free: IntArray = self._state.workers["free"].copy()
        return free

    def feed(self, requests: Requests) -> None:
        """More requests, none before the last one fed; a session's calls come in one piece."""
        requests.check_fits(self.settings)
        alone = _alone(requests)
        if alone.size:
            first = float(requests.arrival_s[alone[0]])
            earliest = max(self._last_arrival, self.now_s)
            if first < earliest:
                raise RecordError(
                    f"arrives at {first:g} s, when {earliest:g} s have been replayed or fed",
                    row=int(alone[0]) + 1,
                    field="arrival_s",
                    hint="feed requests in order of arrival",
                )
            self._last_arrival = float(requests.arrival_s[alone[-1]])
        self._keep_needed()
        self._append(requests)

    def run(self, until_s: float = np.inf) -> Replay:
        """Do all that happens by `until_s`; without it, all there is."""
        clock = self._state.clock
        while True:
            full = kernel.advance(
                self._setup,
                self._columns,
                self._tables,
                self._state,
                self._log,
                self._samples,
                float(until_s),
            )
            if full == DONE:
                break
            if full == LOG_FULL:
                self._drain_log()
            elif full == SAMPLES_FULL:
                self._drain_samples()
            else:
                self._more_slots()
                clock = self._state.clock
        if np.isfinite(until_s):
            clock["now"][0] = max(until_s, clock["now"][0])
        return self

    def served(self) -> Served:
        """The requests that have ended, since the start or since `take`."""
        self._drain_log()
        rows = np.concatenate(self._served) if self._served else np.empty(0, SERVED)
        self._served = [rows]
        rows = rows[np.argsort(rows["request"], kind="stable")]
        columns: dict[str, Any] = {}
        for key in SERVED.names or ():
            whole = np.issubdtype(rows.dtype[key], np.integer)
            columns[key] = rows[key].astype(np.int64 if whole else np.float64)
        return Served(**columns)

    def take(self) -> Served:
        """As `served`, and forget them: what a long trace needs."""
        served = self.served()
        self._served = []
        return served

    def intervals(self) -> Intervals:
        """The intervals that have passed, since the start or since `take_intervals`."""
        self._drain_samples()
        rows = np.concatenate([self._before, *self._sampled])
        self._sampled = [rows[1:]]
        passed = int(self._state.clock["intervals"][0])
        interval = float(self._state.clock["interval"][0])
        ends = interval * np.arange(passed - len(rows) + 2, passed + 1, dtype=np.float64)
        over = {key: np.diff(rows[key], axis=0) for key in (SAMPLE.names or ())[3:]}
        now = rows[1:]
        return Intervals(
            end_s=ends,
            running=now["running"].copy(),
            waiting=now["waiting"].copy(),
            kv_use=now["kv_blocks"] / self.settings.kv_blocks,
            **over,
        )

    def take_intervals(self) -> Intervals:
        """As `intervals`, and forget them."""
        intervals = self.intervals()
        if len(self._sampled[0]):
            self._before = self._sampled[0][-1:].copy()
        self._sampled = []
        return intervals

    def snapshot(self) -> Replay:
        """A copy that goes on by itself from here; what has been served so far stays behind."""
        copy = object.__new__(Replay)
        copy.__dict__.update(self.__dict__)
        copy._state, copy._turned_away = self._state.copy(), []
        copy._room_for_results()
        self._drain_samples()
        copy._before = np.concatenate([self._before, *self._sampled[-1:]])[-1:]
        copy._state.clock["logged"][0] = copy._state.clock["sampled"][0] = 0
        return copy

    def branch(
        self,
        *,
        add: Requests | None = None,
        drop: Sequence[int] = (),
        close: Sequence[int] = (),
        block: Sequence[int] = (),
        routing: Routing | None = None,
    ) -> Replay:
        """A snapshot with a change.

        Args:
            add: requests that arrive as well, from now on.
            drop: requests still to arrive that do not, by their place in all that was fed.
            close: workers that end what they have begun, hand on what waits, and get no more.
            block: for each worker, KV blocks that are taken out of its free ones.
            routing: how requests find their worker from now on.

        Raises:
            RecordError: a request to add that arrives before now, or one to drop that has arrived.
            SettingsError: a worker that there is not, or none left open for prompts or for answers.
        """
        other = self.snapshot()
        if add is not None:
            other._add(add)
        if len(drop):
            other._drop(drop)
        if routing is not None:
            other.routing = routing
            other._rules()
        if len(close):
            other._close(close)
        if len(block):
            other._block(block)
        return other

    def delay_cost(self, since_s: float, without: Sequence[int] = ()) -> float:
        """Σ price of delay × seconds in the engine after `since_s`, over the requests served since the start (or the branch, or
        `take`) and those in flight, but not over those of `without`. USD; seconds where no price of delay was given."""
        served, live = self.served(), self._state.slots[self._state.slots["row"] >= 0]
        rows = self._columns.rows[live["row"]]
        request = np.concatenate([served.request, rows["number"]])
        begin = np.concatenate([served.arrival_s, live["arrived"]])
        end = np.concatenate([served.end_s, np.full(len(live), self.now_s)])
        price = np.concatenate([served.delay_price, rows["weight"]])
        seconds = np.maximum(end - np.maximum(begin, since_s), 0.0)
        return float((price * seconds)[~np.isin(request, np.asarray(without, dtype=np.int64))].sum())

    def _add(self, requests: Requests) -> None:
        requests.check_fits(self.settings)
        alone = _alone(requests)
        if alone.size and requests.arrival_s[alone[0]] < self.now_s:
            raise RecordError(
                f"arrives at {requests.arrival_s[alone[0]]:g} s, and it is {self.now_s:g} s already",
                row=int(alone[0]) + 1,
                field="arrival_s",
                hint="branch from an earlier time",
            )
        self._append(requests)
        coming = self._columns.open[int(self._state.clock["next"][0]) :]
        order = np.argsort(self._columns.rows["arrival"][coming], kind="stable")
        self._state.clock["next"][0] = 0
        self._columns = self._columns._replace(open=coming[order])

    def _drop(self, requests: Sequence[int]) -> None:
        coming = self._columns.open[int(self._state.clock["next"][0]) :]
        gone = np.isin(self._columns.rows["number"][coming], np.asarray(requests))
        if np.count_nonzero(gone) != len(set(requests)):
            absent = sorted(set(requests) - set(self._columns.rows["number"][coming].tolist()))
            raise RecordError(
                f"request {absent[0]} is not among those that will arrive by themselves",
                row=int(absent[0]) + 1,
                hint="branch before it arrives",
            )
        self._state.clock["next"][0] = 0
        self._columns = self._columns._replace(open=coming[~gone])

    def _close(self, workers: Sequence[int]) -> None:
        for w in workers:
            if not 0 <= w < self.settings.workers:
                raise SettingsError(
                    f"there is no worker {w}", key="close", hint=f"0 to {self.settings.workers - 1}"
                )
            self._state.workers["closed"][w] = True
        open_now = ~self._state.workers["closed"]
        first = self.settings.prefilling
        if not open_now[first:].any() or (first and not open_now[:first].any()):
            raise SettingsError("no worker would be left", key="close", hint="leave one open")
        self._state.workers["hand_on"][list(workers)] = True

    def _block(self, blocks: Sequence[int]) -> None:
        out, free = np.asarray(blocks, dtype=np.int64), self.free_blocks
        if out.shape != free.shape or (out < 0).any() or (out > free).any():
            raise SettingsError(
                f"{out.tolist()} of {free.tolist()} free blocks",
                key="block",
                hint="for each worker, at most its free ones",
            )
        self._state.workers["out"] = out

    def _append(self, requests: Requests) -> None:
        """Put rows behind those that are there."""
        old, first = self._columns, len(self._columns.rows)
        after = requests.after if requests.after is not None else np.full(len(requests), -1, np.int64)
        rows, ids = np.zeros(len(requests), ROW), old.ids
        rows["arrival"], rows["input"] = requests.arrival_s, requests.input_tokens
        rows["output"], rows["number"] = requests.output_tokens, np.arange(self._fed, self._fed + len(rows))
        rows["weight"] = 1.0 if requests.delay_price is None else requests.delay_price
        rows["value"] = np.inf if requests.value is None else requests.value
        expected = requests.expected_output
        rows["expected"] = requests.output_tokens if expected is None else expected
        if requests.tenant is not None:
            rows["tenant"] = requests.tenant
            self._tenants_room(int(requests.tenant.max()) + 1)
        if requests.prefix_offsets is not None and requests.prefix_ids is not None:
            rows["begin"], rows["end"] = (
                len(ids) + requests.prefix_offsets[:-1],
                len(ids) + requests.prefix_offsets[1:],
            )
            ids = np.concatenate([ids, requests.prefix_ids])
        for key, other in zip(("child", "sibling"), _families(after), strict=True):
            rows[key] = np.where(other < 0, -1, other + first)
        alone = np.flatnonzero(after < 0) + first
        self._columns = Columns(np.concatenate([old.rows, rows]), ids, np.concatenate([old.open, alone]))
        self._calls += int(np.count_nonzero(after >= 0))
        self._fed += len(rows)
        self._later_room()

    def _keep_needed(self) -> None:
        """Forget the rows of requests that have ended, so that memory does not grow with the trace."""
        old, state = self._columns, self._state
        coming = old.open[int(state.clock["next"][0]) :]
        live = np.flatnonzero(state.slots["row"] >= 0)
        due = state.later[: int(state.clock["due"][0])]
        calls = np.flatnonzero(due["what"] == CALL)
        needed = np.zeros(len(old.rows), np.bool_)
        for used in (coming, state.slots["row"][live], due["who"][calls]):
            needed[used] = True
        self._calls = int(kernel.need_followers(needed, old.rows)) + len(calls)
        to = np.append(np.where(needed, np.cumsum(needed) - 1, -1), -1)
        rows = old.rows[needed]
        lengths = rows["end"] - rows["begin"]
        ends = np.cumsum(lengths)
        ids = old.ids[np.repeat(rows["begin"] - ends + lengths, lengths) + np.arange(lengths.sum())]
        rows["begin"], rows["end"] = ends - lengths, ends
        rows["child"], rows["sibling"] = to[rows["child"]], to[rows["sibling"]]
        self._columns = Columns(rows, ids, to[coming])
        state.slots["row"][live] = to[state.slots["row"][live]]
        due["who"][calls] = to[due["who"][calls]]
        state.clock["next"][0] = 0

    def _later_room(self) -> None:
        """Every live request may be under way between workers, every call to come may be due."""
        most = len(self._state.slots) + self._calls
        if len(self._state.later) < most:
            later = np.zeros(most + most // 2, LATER)
            later[: len(self._state.later)] = self._state.later
            self._state = self._state._replace(later=later)

    def _tenants_room(self, most: int) -> None:
        old = self._state.tenants
        if most > old.shape[1]:
            tenants = np.zeros((len(old), most), TENANT)
            tenants[:, : old.shape[1]] = old
            self._state = self._state._replace(tenants=tenants)

    def _more_slots(self) -> None:
        old = self._state.slots
        slots = _spare_slots(2 * len(old))
        slots[: len(old)] = old
        self._state = self._state._replace(slots=slots)
        self._later_room()

    def _drain_log(self) -> None:
        count = int(self._state.clock["logged"][0])
        if count:
            rows = self._log[:count]
            self._turned_away.append(rows["request"][rows["worker"] < 0])
            self._served.append(rows[rows["worker"] >= 0])
            self._state.clock["logged"][0] = 0

    def _drain_samples(self) -> None:
        count = int(self._state.clock["sampled"][0])
        if count:
            self._sampled.append(self._samples[:count].copy())
            self._state.clock["sampled"][0] = 0


def stream(
    settings: EngineSettings, steps: StepTimes, chunks: Iterable[Requests], routing: Routing | None = None
) -> Iterator[Served]:
    """Replay a trace too long to hold: chunk in, what has ended meanwhile out. A session's calls stand in one chunk."""
    replay = Replay(settings, steps, routing, interval_s=None)
    for chunk in chunks:
        replay.feed(chunk)
        alone = _alone(chunk)
        if alone.size:
            # The next chunk may begin at the very time at which this one ends.
            replay.run(float(np.nextafter(chunk.arrival_s[alone[-1]], -np.inf)))
        yield replay.take()
    yield replay.run().take()


def _alone(requests: Requests) -> IntArray:
    """The rows that arrive by themselves."""
    return np.arange(len(requests)) if requests.after is None else np.flatnonzero(requests.after < 0)


def _families(after: IntArray) -> tuple[IntArray, IntArray]:
    """The first follower of each row, and the next follower of the same row as each: −1 where there is none."""
    child, sibling = np.full(len(after), -1, np.int64), np.full(len(after), -1, np.int64)
    rows = np.flatnonzero(after >= 0)
    order = rows[np.argsort(after[rows], kind="stable")]
    parents = after[order]
    new = np.append(True, parents[1:] != parents[:-1])[: len(order)]
    child[parents[new]] = order[new]
    sibling[order[:-1][~new[1:]]] = order[1:][~new[1:]]
    return child, sibling


def _tokens(rules: Any, steps: int) -> int:
    """A worker's token count after so many of its steps."""
    return steps * int(rules["rate"]) // int(rules["unit"])


def _setup(settings: EngineSettings, steps: StepTimes, routing: Routing, schedule: Schedule) -> Any:
    """The engine's numbers as the kernel reads them, (1,)."""
    of = np.zeros(1, SETUP)
    speculation, apart = settings.speculation, settings.disaggregation
    of["block"], of["prefix"] = settings.block_tokens, settings.chunk_tokens
    of["per_chunk"], of["blocks"] = settings.chunk_tokens // settings.block_tokens, settings.kv_blocks
    of["budget"], of["most"] = settings.max_batched_tokens, settings.max_sequences
    of["chunked"], of["caching"] = settings.chunked_prefill, settings.prefix_caching
    of["reserve"], of["ahead"] = settings.reserve_prompt, settings.schedule_ahead
    of["by_turns"], of["by_prefix"] = routing.by_turns, routing.looks_at_memory
    of["verified"], of["rate"], of["unit"] = settings.verified_tokens, 1, 1
    if speculation is not None:
        of["rate"], of["unit"] = round(speculation.tokens_per_step * _RATE_UNIT), _RATE_UNIT
        of["drafting"] = speculation.drafts * speculation.draft_cost
    of["order"], of["admission"], of["aging"] = _ORDERS[schedule.order], schedule.admission, schedule.aging
    of["prompt_weight"], of["answer_weight"] = schedule.prompt_weight, schedule.answer_weight
    of["overhead_s"], of["pair_s"] = steps.overhead_s, steps.prefill_pair_s
    of["workers"], of["prefilling"] = settings.workers, settings.prefilling
    if apart is not None:
        of["transfer_s"], of["transfer_token_s"] = apart.setup_s, apart.bytes_per_token / apart.bandwidth
    return of


def _tables(settings: EngineSettings, steps: StepTimes, routing: Routing, schedule: Schedule) -> Tables:
    batch = np.empty(len(steps.decode_s), BATCH)
    for key in BATCH.names or ():
        batch[key] = getattr(steps, f"{key}_s")
    # A copy can be written to, as the compiled replay expects of every array: it would be compiled anew for others.
    n = settings.workers
    return Tables(steps.dense_s.copy(), batch, routing.weights(n), schedule.weights(n))


def _spare_slots(count: int) -> Any:
    slots = np.zeros(count, SLOT)
    slots["row"] = -1
    slots["after"] = np.arange(1, count + 1)
    return slots


def _empty_state(settings: EngineSettings, interval_s: float) -> State:
    w, per_chunk = settings.workers, settings.chunk_tokens // settings.block_tokens
    clock = np.zeros(1, CLOCK)
    clock["interval"] = clock["sample"] = interval_s
    workers = np.zeros(w, WORKER)
    workers["end"] = np.inf
    for key in ("first", "last", "partial", "head", "tail", "left"):
        workers[key] = -1
    workers["free"] = workers["empty"] = settings.kv_blocks
    nodes, entries = 1, 8
    if settings.prefix_caching:
        nodes = nodes_needed(settings.kv_blocks, per_chunk, settings.max_sequences)
        entries = max(entries, 1 << (2 * (settings.kv_blocks // per_chunk)).bit_length())
    memory, table = np.zeros((w, nodes), NODE), np.zeros((w, entries), np.int32)
    for k in range(w):
        clear(workers[k], memory[k], table[k])
    leaves = 1 << max(1, (w - 1).bit_length())
    return State(
        clock=clock,
        workers=workers,
        slots=_spare_slots(_FIRST_SLOTS),
        nodes=memory,
        table=table,
        finish=np.zeros((w, settings.max_sequences), FINISH),
        phase=np.zeros((w, settings.block_tokens), np.int32),
        prompts=np.zeros((w, settings.max_sequences), np.int64),
        later=np.zeros(_FIRST_SLOTS, LATER),
        tree=np.full(2 * leaves, np.inf),
        tenants=np.zeros((w, 1), TENANT),
    )
