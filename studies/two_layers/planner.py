"""A planner with the same information, who tries each action on futures drawn at random and takes the best for everybody. SIMULATED.

The engines are as they are (the planner even knows how long the answers under way will be, which the board does not). What comes next is
drawn in blocks from the first half hour at the rate of the cell, and goes where the board would send it at prices that follow it; then each
action is tried with that future as it is, so that an engine's future differs by the one request. An action other than the board's is
taken where it is better by two standard errors. So this is a step of policy improvement with the board as its base (fortified rollout:
Bertsekas & Castañon 1999), by few futures that do not answer to the action: good, but not a bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from two_layers.play import DEFER, PENALTY, Decide, Pool, live_seconds
from two_layers.policies import Beliefs, best, board, charge, delay_price
from two_layers.world import FloatArray, IntArray, Window
from walras.engine.replay import Replay
from walras.engine.requests import Requests

FUTURES, KEPT, SLICES = 4, 20, 12
"""How many futures, for how many decisions they serve, and in how many pieces prices follow them."""
HORIZON = 6.0
"""Times what a mean request takes alone on the slowest engine."""


@dataclass(frozen=True, slots=True)
class Future:
    """J requests to come, (J,), and where they go."""

    arrival_s: FloatArray
    rows: IntArray
    """Of the window they are drawn from."""
    choice: IntArray
    source: Window

    def after(self, now: float) -> Future:
        at = slice(int(np.searchsorted(self.arrival_s, now)), None)
        return Future(self.arrival_s[at], self.rows[at], self.choice[at], self.source)


def planner(beliefs: Beliefs, source: Window, horizon_s: float, seed: int) -> Decide:
    """Decide by futures drawn from `source`, a window of the half hour that was learned from."""
    random = np.random.default_rng((seed, 1))
    futures: list[Future] = []
    base = board(beliefs)

    def decide(pool: Pool, stream: Window, n: int) -> int:
        now = float(stream.arrival_s[n])
        if n % KEPT == 0:
            futures[:] = [
                imagined(pool, stream, n, source, horizon_s, beliefs, random) for _ in range(FUTURES)
            ]
        gross = stream.value[n] * stream.q[n] - beliefs.avoidable * stream.believed_usd(n)
        values = np.zeros((len(futures), len(pool.plant) + 1))
        for k, whole in enumerate(futures):
            future, answer = whole.after(now), int(random.choice(stream.answers[n]))
            for m in range(len(pool.plant)):
                lost = tried(pool, stream, n, m, future, answer, now + horizon_s, beliefs)
                values[k, m] = gross[m] - lost
        return fortified(values, base(pool, stream, n))

    return decide


def fortified(values: FloatArray, usual: int) -> int:
    """The best action in the mean over F futures (F, M + 1), deferring last, where it beats the usual one by two standard errors."""
    ahead = values - values[:, usual][:, None]
    error = ahead.std(axis=0, ddof=1) / np.sqrt(len(values))
    sure = np.where(ahead.mean(axis=0) > 2 * error, ahead.mean(axis=0), 0.0)
    m = int(np.argmax(sure)) if sure.max() > 0 else usual
    return m if 0 <= m < values.shape[1] - 1 else DEFER


def imagined(
    pool: Pool,
    stream: Window,
    n: int,
    source: Window,
    horizon_s: float,
    beliefs: Beliefs,
    random: np.random.Generator,
) -> Future:
    """A block of what came after a random time, as if it came now, and where the board would send it, slice by slice."""
    now, long_s = float(stream.arrival_s[n]), 1.5 * horizon_s
    start = random.uniform(0, max(float(source.arrival_s[-1]) - long_s, 0.0))
    low, high = np.searchsorted(source.arrival_s, [start, start + long_s])
    rows = np.arange(low, high)
    arrival = now + source.arrival_s[rows] - start
    delay = [delay_price(pool, stream, m, beliefs) for m in range(len(pool.plant))]
    copy = Pool(pool.plant, [replay.snapshot() for replay in pool.replays], [], pool.lengths)
    choice = np.full(len(rows), DEFER)
    bounds = np.searchsorted(arrival, now + long_s * np.arange(SLICES + 1) / SLICES)
    for k, (first, last) in enumerate(pairwise(bounds)):
        if first == last:
            continue
        copy.run(now + long_s * k / SLICES)
        part = slice(first, last)
        choice[part] = sent_at(source, rows[part], copy, delay, beliefs)
        for m, replay in enumerate(copy.replays):
            mine = first + np.flatnonzero(choice[part] == m)
            if mine.size:
                replay.feed(Requests(arrival[mine], source.prompt[rows[mine]], source.output[rows[mine]]))
    return Future(arrival, rows, choice, source)


def sent_at(source: Window, rows: IntArray, pool: Pool, delay: list[float], beliefs: Beliefs) -> IntArray:
    """(J,) where the board would send these, by prices of now and what those before it in the slice put in line."""
    models = pool.models()
    seconds = live_seconds(pool.plant, models, beliefs.ratio)
    answer, prompt = source.answers[rows].mean(axis=1), source.prompt[rows].astype(np.float64)
    takes = seconds.mean(source.prompt[rows], answer)
    usd = prompt[:, None] * source.list_usd[:, 0] + answer[:, None] * source.list_usd[:, 1]
    values = source.value[rows, None] * source.q[rows] - beliefs.avoidable * usd
    for m, model in enumerate(models):
        values[:, m] -= charge(model, prompt, answer, delay[m])
    line, out = np.zeros(len(models)), np.empty(len(rows), np.int64)
    for j in range(len(rows)):
        wait = takes[j] + line
        out[j] = best(
            values[j]
            - source.delay_price[rows[j]] * wait
            - PENALTY * source.value[rows[j]] * (wait > beliefs.sla_s)
        )
        if out[j] != DEFER:
            line[out[j]] += seconds.prompt[out[j]] * prompt[j] / pool.plant.replicas[out[j]]
    return out


def tried(
    pool: Pool,
    stream: Window,
    n: int,
    m: int,
    future: Future,
    answer: int,
    until_s: float,
    beliefs: Beliefs,
) -> float:
    """USD that everybody loses in this future by delay if request n goes to engine m: itself, and the others by its being there."""
    replay, now, source = pool.replays[m], float(stream.arrival_s[n]), future.source
    mine = np.flatnonzero(future.choice == m)
    inside = np.setdiff1d(np.arange(replay.fed), replay.served().request)
    sent = np.asarray(pool.sent[m], np.int64)[inside]
    rows = future.rows[mine]
    own = replay.fed
    came = Came(
        ids=np.concatenate([inside, own + 1 + np.arange(len(mine))]),
        arrival_s=np.concatenate([stream.arrival_s[sent], future.arrival_s[mine]]),
        value=np.concatenate([stream.value[sent], source.value[rows]]),
    )
    arrival = np.append(now, future.arrival_s[mine])
    prompt, output = (
        np.append(one, two)
        for one, two in ((stream.prompt[n], source.prompt[rows]), (answer, source.output[rows]))
    )
    price = np.append(stream.delay_price[n], source.delay_price[rows])
    whole = replay.branch(add=Requests(arrival, prompt, output, delay_price=price)).run(until_s)
    if mine.size:
        come = Requests(arrival[1:], prompt[1:], output[1:], delay_price=price[1:])
        without = replay.branch(add=come).run(until_s)
    else:
        without = replay.snapshot().run(until_s)
    own_end = np.append(whole.served().end_s[whole.served().request == own], until_s)[0]
    own_s = own_end - now
    alone = Came(np.where(came.ids > own, came.ids - 1, came.ids), came.arrival_s, came.value)
    others = whole.delay_cost(now, without=[own]) - without.delay_cost(now)
    others += came.penalty(whole, until_s, beliefs.sla_s) - alone.penalty(without, until_s, beliefs.sla_s)
    own_cost = stream.delay_price[n] * own_s + PENALTY * stream.value[n] * (own_s > beliefs.sla_s)
    return float(others + own_cost)


@dataclass(frozen=True, slots=True)
class Came:
    """Requests in an engine or coming to it, by their place in what it was fed."""

    ids: IntArray
    arrival_s: FloatArray
    value: FloatArray

    def penalty(self, replay: Replay, until_s: float, sla_s: float) -> float:
        """USD for those late by `until_s`."""
        served = replay.served()
        end = np.full(int(self.ids.max(initial=0)) + 1, until_s)
        known = served.request < len(end)
        end[served.request[known]] = served.end_s[known]
        return float(PENALTY * self.value[end[self.ids] - self.arrival_s > sla_s].sum())
