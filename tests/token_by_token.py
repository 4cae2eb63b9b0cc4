"""A serving engine simulated token by token and block by block, in plain Python: slow, and with none of the replay's closed forms.

It keeps a list of blocks for every sequence and moves every sequence at every step, one step at a time, so that the replay has
something to agree with that was written differently.
"""

from __future__ import annotations

import heapq
import itertools
import math
from dataclasses import dataclass, field
from typing import Any

from walras.engine.requests import Requests
from walras.engine.settings import EngineSettings, Routing
from walras.engine.steps import StepTimes


@dataclass(eq=False)
class Sequence:
    row: int
    number: int
    arrived: float
    prompt: int
    output: int
    ids: list[int]
    weight: float
    queued: float = 0.0
    emitted: int = 0
    computed: int = 0
    goal: int = 0
    kv: int = 0
    shared: int = 0
    own: int = 0
    decoding: bool = False
    transferred: bool = False
    prompt_open: bool = True
    started: float | None = None
    first: float | None = None
    hit: int = 0
    preemptions: int = 0
    to_compute: int = 0
    to_hold: int = 0
    whole: int = 0
    origin: int = -1
    tenant: int = 0
    value: float = math.inf
    expected: float = 0.0
    rank: float = 0.0
    work_s: float = 0.0


@dataclass
class Memory:
    """Blocks one by one: `line` is what nobody holds and still can be read, the next to go first."""

    blocks: int
    per_chunk: int
    keeps: bool
    empty: int = 0
    chunks: dict[int, int] = field(default_factory=dict)
    line: list[tuple[str, Any, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.empty = self.blocks

    @property
    def free(self) -> int:
        return self.empty + sum(self.per_chunk if kind == "chunk" else 1 for kind, _, _ in self.line)

    def take(self, count: int) -> None:
        for _ in range(count):
            if not self.empty:
                kind, of, _ = self.line.pop(0)
                if kind == "chunk":
                    del self.chunks[of]
                self.empty += self.per_chunk if kind == "chunk" else 1
            self.empty -= 1

    def hold(self, chunk: int) -> None:
        if not self.chunks[chunk]:
            self.line.remove(("chunk", chunk, 0))
        self.chunks[chunk] += 1

    def let_go(self, sequence: Sequence, keep: bool) -> None:
        if self.keeps:
            for k in reversed(range(sequence.own)):
                self.line.append(("own", sequence if keep else None, k))
        else:
            self.empty += sequence.own
        for chunk in reversed(sequence.ids[: sequence.shared]):
            self.chunks[chunk] -= 1
            if not self.chunks[chunk]:
                self.line.append(("chunk", chunk, 0))

    def left_of(self, sequence: Sequence) -> int:
        return sum(of is sequence for _, of, _ in self.line)

    def reclaim(self, sequence: Sequence, count: int) -> None:
        self.line = [
            ("own", None, k) if of is sequence else (kind, of, k)
            for kind, of, k in self.line
            if not (of is sequence and k < count)
        ]

    def found(self, ids: list[int]) -> int:
        return sum(1 for _ in itertools.takewhile(lambda chunk: chunk in self.chunks, ids))


class Engine:
    def __init__(
        self,
        settings: EngineSettings,
        steps: StepTimes,
        routing: Routing,
        requests: Requests,
        interval_s: float,
    ) -> None:
        self.settings, self.steps, self.routing, self.requests = settings, steps, routing, requests
        self.weights, self.schedule = routing.weights(settings.workers), settings.schedule
        self.takes = settings.schedule.weights(settings.workers)
        self.turned_away: list[int] = []
        self.workers = [Worker(self, w) for w in range(settings.workers)]
        self.later: list[tuple[float, int, str, Any]] = []
        self.ticket = itertools.count()
        self.turn = [0, 0]
        self.served: dict[int, dict[str, float]] = {}
        self.samples: list[list[dict[str, float]]] = []
        self.interval_s = interval_s
        after = requests.after.tolist() if requests.after is not None else [-1] * len(requests)
        self.followers: dict[int, list[int]] = {}
        for row, parent in enumerate(after):
            self.followers.setdefault(parent, []).append(row)

    def run(self) -> None:
        coming = list(self.followers.get(-1, []))
        while True:
            arrival = self.requests.arrival_s[coming[0]] if coming else math.inf
            due = self.later[0][0] if self.later else math.inf
            end = min(worker.end for worker in self.workers)
            time = min(arrival, due, end)
            if time == math.inf:
                return
            while (len(self.samples) + 1) * self.interval_s <= time:
                self.samples.append([worker.sample() for worker in self.workers])
            if arrival == time:
                self.arrive(coming.pop(0), time)
            elif due == time:
                _, _, what, of = heapq.heappop(self.later)
                if what == "call":
                    self.arrive(of, time)
                else:
                    self.deliver(of, time)
            else:
                next(worker for worker in self.workers if worker.end == time).turn(time)

    def arrive(self, row: int, time: float) -> None:
        requests = self.requests
        ids: list[int] = []
        if requests.prefix_ids is not None and requests.prefix_offsets is not None:
            ids = requests.prefix_ids[
                requests.prefix_offsets[row] : requests.prefix_offsets[row + 1]
            ].tolist()
        weight = 1.0 if requests.delay_price is None else float(requests.delay_price[row])
        prompt = int(requests.input_tokens[row])
        ids = ids[: prompt // self.settings.chunk_tokens]
        new = Sequence(row, row, time, prompt, int(requests.output_tokens[row]), ids, weight, goal=prompt)
        if requests.tenant is not None:
            new.tenant = int(requests.tenant[row])
        if requests.value is not None:
            new.value = float(requests.value[row])
        expected = requests.expected_output
        new.expected = float(new.output if expected is None else expected[row])
        worker = self.choose(new, decoding=False)
        if worker.expect(new, time) < 0 and self.schedule.admission:
            self.turned_away.append(row)
            self.follow(row, time)
            return
        worker.assigned.append(new)
        worker.line_up(new, time)

    def choose(self, sequence: Sequence, decoding: bool) -> Worker:
        group = self.workers
        if self.settings.prefilling:
            k = self.settings.prefilling
            group = group[k:] if decoding else group[:k]
        blocks = math.ceil(sequence.prompt / self.settings.block_tokens)
        turn = self.turn[decoding]
        self.turn[decoding] += 1
        order = [group[(turn + k) % len(group)] for k in range(len(group))]
        if self.routing.by_turns:
            sequence.to_compute, sequence.to_hold = (0 if decoding else sequence.prompt), blocks
            return order[0]
        best: tuple[float, int, int, Worker] | None = None
        for worker in order:
            chunk, found = self.settings.chunk_tokens, 0
            if self.routing.looks_at_memory and self.settings.prefix_caching:
                found = worker.memory.found(sequence.ids[: (sequence.prompt - 1) // chunk])
            compute = 0 if decoding else sequence.prompt - found * chunk
            hold = blocks - found * worker.memory.per_chunk
            of = self.weights[worker.place]
            pending = sum(other.to_compute for other in worker.assigned if other.prompt_open)
            promised = sum(other.to_hold for other in worker.assigned)
            cost = sequence.weight * (of[0] + of[1] * (pending + compute) + of[2] * len(worker.assigned))
            cost += of[3] * compute + of[4] * (promised + hold) + of[5] * sequence.output
            if best is None or cost < best[0]:
                best = (cost, compute, hold, worker)
        assert best is not None
        sequence.to_compute, sequence.to_hold = best[1], best[2]
        return best[3]

    def transfer(self, sequence: Sequence, worker: Worker, time: float) -> None:
        apart = self.settings.disaggregation
        assert apart is not None
        worker.assigned.remove(sequence)
        target = self.choose(sequence, decoding=True)
        target.assigned.append(sequence)
        size = sequence.prompt * apart.bytes_per_token
        worker.link = max(worker.link, time) + apart.setup_s + size / apart.bandwidth
        heapq.heappush(self.later, (worker.link, next(self.ticket), "transfer", (sequence, worker, target)))

    def deliver(self, of: tuple[Sequence, Worker, Worker], time: float) -> None:
        sequence, worker, target = of
        worker.memory.let_go(sequence, keep=False)
        sequence.shared = sequence.own = sequence.kv = 0
        sequence.transferred, sequence.origin = True, worker.place
        target.line_up(sequence, time)
        if not worker.batch and worker.waiting:
            worker.end = min(worker.end, time)

    def ended(self, sequence: Sequence, worker: Worker, time: float) -> None:
        assert sequence.started is not None
        assert sequence.first is not None
        worker.assigned.remove(sequence)
        self.served[sequence.row] = {
            "queue_s": sequence.started - sequence.arrived,
            "ttft_s": sequence.first - sequence.arrived,
            "tpot_s": (time - sequence.first) / (sequence.output - 1) if sequence.output > 1 else 0.0,
            "end_s": time,
            "cached_tokens": sequence.hit,
            "preemptions": sequence.preemptions,
            "worker": worker.place,
            "prefill_worker": sequence.origin if sequence.origin >= 0 else worker.place,
        }
        self.follow(sequence.row, time)

    def follow(self, row: int, time: float) -> None:
        for call in self.followers.get(row, []):
            due = time + self.requests.arrival_s[call]
            heapq.heappush(self.later, (due, next(self.ticket), "call", call))


class Worker:
    def __init__(self, engine: Engine, place: int) -> None:
        self.engine, self.settings, self.place = engine, engine.settings, place
        per_chunk = self.settings.chunk_tokens // self.settings.block_tokens
        self.memory = Memory(self.settings.kv_blocks, per_chunk, self.settings.prefix_caching)
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.assigned: list[Sequence] = []
        self.held: list[Sequence] = []
        self.batch: dict[Sequence, int] = {}
        self.end, self.start, self.link = math.inf, 0.0, 0.0
        self.decode_steps = 0
        self.service: dict[int, float] = {}
        self.left: int | None = None
        self.count = dict.fromkeys(
            ("output_tokens", "prompt_tokens", "hit_tokens", "preemptions", "finished"), 0
        )

    def expect(self, new: Sequence, time: float) -> float:
        """Set the rank of one who arrives; what an answer is worth."""
        schedule, of, chunk = self.engine.schedule, self.engine.takes[self.place], self.settings.chunk_tokens
        found = self.memory.found(new.ids[: (new.prompt - 1) // chunk]) if self.settings.prefix_caching else 0
        computed = new.prompt - found * chunk
        pairs = sum(range(found * chunk + 1, new.prompt + 1))
        prompt_s = of[6] * computed + of[7] * pairs
        takes = of[0] * computed + of[1] * pairs + of[2] * prompt_s**2
        takes += (of[3] + of[4] * (new.prompt + new.expected / 2)) * new.expected
        new.work_s = prompt_s + of[8] * new.expected
        if schedule.order in {"shortest", "priced"}:
            first = takes if schedule.order == "shortest" else -new.weight / takes
            new.rank = first + schedule.aging * time
        ahead = sum(other.work_s for other in self.waiting if other.rank <= new.rank)
        seconds = ahead + prompt_s + of[9] * new.expected
        return float(new.value - new.weight * seconds - of[5] * takes)

    def line_up(self, sequence: Sequence, time: float) -> None:
        sequence.queued = time
        tenants = {other.tenant for other in self.waiting}
        if sequence.tenant not in tenants:
            floor = min((self.service.get(tenant, 0.0) for tenant in tenants), default=None)
            if floor is None and self.left is not None:
                floor = self.service.get(self.left, 0.0)
            if floor is not None:
                self.service[sequence.tenant] = max(self.service.get(sequence.tenant, 0.0), floor)
        behind = [k for k, other in enumerate(self.waiting) if other.rank > sequence.rank]
        self.waiting.insert(behind[0] if behind else len(self.waiting), sequence)
        if not self.batch:
            self.end = min(self.end, time)

    def sample(self) -> dict[str, float]:
        used = self.settings.kv_blocks - self.memory.free
        return {"running": len(self.running), "waiting": len(self.waiting), "kv_blocks": used, **self.count}

    def emit_now(self) -> int:
        """Tokens of each decoding sequence in the next step that decodes."""
        if self.settings.speculation is None:
            return 1
        rate = round(self.settings.speculation.tokens_per_step * 4096)
        return (self.decode_steps + 1) * rate // 4096 - self.decode_steps * rate // 4096

    def emit_at_most(self) -> int:
        speculation = self.settings.speculation
        return 1 if speculation is None else math.ceil(round(speculation.tokens_per_step * 4096) / 4096)

    def turn(self, time: float) -> None:
        """A step ends, or what came finds the worker at rest; the next one begins."""
        seen = time
        if self.batch:
            self.finish_step(time)
            if self.settings.schedule_ahead:
                seen = self.start
            elif self.engine.later and self.engine.later[0][0] == time:
                self.end = time
                return
        self.compose(seen, seen)
        if self.held or (not self.batch and seen < time):
            for sequence in self.held:
                self.memory.let_go(sequence, keep=False)
            self.held = []
            if not self.batch:
                self.compose(time, time)
        self.start = time
        self.end = time + self.step_s if self.batch else math.inf

    def finish_step(self, time: float) -> None:
        batch, self.batch = self.batch, {}
        emit = self.emit_now()
        self.decode_steps += any(sequence.decoding for sequence in batch)
        # Of those that end in one step, the one whose last token comes first gives its blocks back first.
        for sequence in sorted(batch, key=lambda sequence: sequence.output - sequence.emitted):
            if sequence.decoding:
                got = min(emit, sequence.output - sequence.emitted)
                sequence.emitted += got
                self.serve(sequence, self.engine.schedule.answer_weight * got)
                self.count["output_tokens"] += got
                if sequence.emitted == sequence.output:
                    self.done(sequence, time)
        for sequence in list(batch):
            if not sequence.decoding and sequence.computed == sequence.goal:
                self.end_prompt(sequence, time)

    def serve(self, sequence: Sequence, service: float) -> None:
        self.service[sequence.tenant] = self.service.get(sequence.tenant, 0.0) + service

    def end_prompt(self, sequence: Sequence, time: float) -> None:
        sequence.emitted += 1
        self.serve(sequence, self.engine.schedule.answer_weight)
        self.count["output_tokens"] += 1
        sequence.prompt_open = False
        sequence.first = time if sequence.first is None else sequence.first
        if sequence.emitted == sequence.output:
            self.done(sequence, time)
        elif self.place < self.settings.prefilling:
            self.running.remove(sequence)
            self.engine.transfer(sequence, self, time)
        else:
            sequence.decoding = True

    def done(self, sequence: Sequence, time: float) -> None:
        self.running.remove(sequence)
        self.count["finished"] += 1
        self.engine.ended(sequence, self, time)
        if self.settings.schedule_ahead:
            self.held.append(sequence)
        else:
            self.memory.let_go(sequence, keep=False)

    def missing(self, sequence: Sequence, kv: int) -> int:
        held = sequence.shared * self.memory.per_chunk + sequence.own
        return math.ceil(kv / self.settings.block_tokens) - held

    def grow(self, sequence: Sequence, kv: int) -> None:
        more = self.missing(sequence, kv)
        self.memory.take(more)
        sequence.own += more
        sequence.kv = kv

    def publish(self, sequence: Sequence) -> None:
        while (
            self.settings.prefix_caching
            and sequence.shared < min(len(sequence.ids), sequence.computed // self.settings.chunk_tokens)
            and sequence.ids[sequence.shared] not in self.memory.chunks
        ):
            self.memory.chunks[sequence.ids[sequence.shared]] = 1
            sequence.shared += 1
            sequence.own -= self.memory.per_chunk

    def throw_out(self) -> Sequence:
        last = self.running.pop()
        last.preemptions += 1
        self.count["preemptions"] += 1
        self.memory.let_go(last, keep=True)
        last.whole = last.kv // self.settings.block_tokens - last.shared * self.memory.per_chunk
        last.goal, last.computed, last.kv = last.prompt + last.emitted, 0, 0
        last.decoding = last.transferred = False
        last.own, last.rank = 0, -math.inf
        self.waiting.insert(0, last)
        return last

    def compose(self, seen: float, stamp: float) -> None:
        self.batch = {}
        self.pairs, self.kv_read = 0.0, 0
        budget = self.settings.max_batched_tokens
        emit, thrown = self.emit_now(), False
        k = 0
        while k < len(self.running):
            sequence = self.running[k]
            if sequence.decoding:
                new, kv = self.settings.verified_tokens, sequence.kv + emit
            else:
                new = min(sequence.goal - sequence.computed, budget)
                kv = sequence.kv + new
            while new and sequence in self.running and self.missing(sequence, kv) > self.memory.free:
                self.throw_out()
                thrown = True
            if new and sequence in self.running:
                self.go_on(sequence, new, kv)
                budget -= new
            k += 1
        if not thrown or not self.running:
            self.admit(budget, emit, seen, stamp)
        decoding = [sequence for sequence in self.batch if sequence.decoding]
        prefill = sum(new for sequence, new in self.batch.items() if not sequence.decoding)
        self.count["prompt_tokens"] += prefill
        self.step_s = self.seconds(prefill, len(decoding))

    def seconds(self, prefill: int, n: int) -> float:
        steps, q = self.engine.steps, self.settings.verified_tokens
        fixed, per_kv = (steps.mixed_s, steps.mixed_kv_s) if prefill else (steps.decode_s, steps.decode_kv_s)
        seconds = steps.overhead_s + steps.dense_s[prefill + n * q] + fixed[n] + per_kv[n] * self.kv_read
        seconds += steps.prefill_pair_s * self.pairs
        if self.settings.speculation is not None:
            alone = steps.dense_s[n * q] + steps.decode_s[n] + steps.decode_kv_s[n] * self.kv_read
            seconds += self.settings.speculation.drafts * self.settings.speculation.draft_cost * alone
        return float(seconds)

    def go_on(self, sequence: Sequence, new: int, kv: int) -> None:
        if sequence.decoding:
            self.kv_read += sequence.kv
        else:
            self.pairs += sum(sequence.kv + k for k in range(1, new + 1))
            sequence.computed += new
        self.grow(sequence, kv)
        if not sequence.decoding:
            self.publish(sequence)
        self.batch[sequence] = new

    def admit(self, budget: int, emit: int, seen: float, stamp: float) -> None:
        settings, memory = self.settings, self.memory
        while self.waiting and budget and len(self.running) + len(self.held) < settings.max_sequences:
            visible = [sequence for sequence in self.waiting if sequence.queued <= seen]
            if not visible:
                return
            sequence = visible[0]
            if self.engine.schedule.order == "vtc" and sequence.rank == 0:
                sequence = min(visible, key=lambda sequence: self.service.get(sequence.tenant, 0.0))
            found = again = 0
            if settings.prefix_caching:
                usable = sequence.prompt if sequence.transferred else sequence.goal - 1
                found = memory.found(sequence.ids[: usable // settings.chunk_tokens])
                if found == sequence.shared:
                    again = min(memory.left_of(sequence), sequence.whole)
            have = found * settings.chunk_tokens + again * settings.block_tokens
            rest = sequence.goal - have
            new = min(rest, budget)
            if sequence.transferred:
                if settings.verified_tokens > budget:
                    return
                target, fits = sequence.goal + emit, sequence.goal + self.emit_at_most()
            else:
                if new < rest and not settings.chunked_prefill:
                    return
                target = have + new
                fits = sequence.goal if settings.reserve_prompt else target
            idle = sum(memory.chunks[chunk] == 0 for chunk in sequence.ids[:found])
            held = found * memory.per_chunk + again
            blocks = math.ceil(fits / settings.block_tokens) - held
            if blocks + idle * memory.per_chunk + again > memory.free:
                return
            self.waiting.remove(sequence)
            self.left = sequence.tenant
            if sequence.started is None:
                self.serve(sequence, self.engine.schedule.prompt_weight * sequence.prompt)
            for chunk in sequence.ids[:found]:
                memory.hold(chunk)
            memory.reclaim(sequence, again)
            sequence.shared, sequence.own, sequence.kv, sequence.computed = found, again, have, have
            self.running.append(sequence)
            if sequence.started is None:
                sequence.started, sequence.hit = stamp, have
                self.count["hit_tokens"] += have
            if sequence.transferred:
                sequence.kv = sequence.computed = sequence.goal
                sequence.decoding, sequence.transferred = True, False
                new = settings.verified_tokens
                self.go_on(sequence, new, target)
                self.publish(sequence)
            else:
                self.go_on(sequence, new, target)
            budget -= new
