"""The engine, event by event: what a vLLM-like scheduler does, at the cost of a change of batch. Compiled. [Z §3.3]

A step runs every decoding sequence, then the prompt it left unfinished, then waiting prompts, first come first served or
in another order, while its budget of new tokens, its number of sequences and the KV memory last. A decoding sequence that finds no block
throws out the last of the running (maybe itself): its KV is lost, it goes to the head of the waiting, and no one is
admitted in that step.

All decoding sequences of a worker emit alike, so the worker counts tokens T once. A sequence with `lead` has T + lead KV
tokens, and needs a block when T ≡ −lead modulo the block: `phase` counts sequences by that residue. One run of k steps then
has closed forms for its time, its blocks and its end; it is cut short where an arrival could be admitted.

A line is kept by rank, the least first and equals as they come; ranks are set on arrival. In fair shares between tenants the
next is looked up instead: the first of the tenant with the least service so far, which is affine in T while a run lasts.

Work at equal times goes in this order: arrivals, calls and transfers that fall due, ends of steps by worker.
"""

from __future__ import annotations

import numpy as np

from walras.engine.cache import compiled, hold, inner, left_of, matching, publish, reclaim, release, take
from walras.engine.state import (
    BY_TENANT,
    CALL,
    DECODING,
    DONE,
    LOG_FULL,
    MIXED,
    NOTHING,
    PRICED,
    SAMPLES_FULL,
    SHORTEST,
    SLOTS_FULL,
    TRANSFER,
)


@inner
def floor_sum(n, unit, rate, first):
    """Σ_{j<n} ⌊(first + j·rate) / unit⌋, in logarithmic time."""
    total = 0
    while True:
        total += (n - 1) * n // 2 * (rate // unit) + n * (first // unit)
        rate, first = rate % unit, first % unit
        most = n * rate + first
        if most < unit:
            return total
        n, first, rate, unit = most // unit, most % unit, unit, rate


@inner
def tokens_at(rules, steps):
    """What a sequence that decodes from the first step on has emitted after `steps`."""
    return steps * rules.rate // rules.unit


@inner
def run_s(rules, me, steps):
    """Seconds of the first `steps` steps of a run that only decodes."""
    grown = floor_sum(steps, rules.unit, rules.rate, me.done * rules.rate % rules.unit)
    return steps * me.fixed_s + me.kv_s * (steps * me.kv + me.n * grown)


@inner
def steps_by(rules, me, seconds):
    """The fewest of the planned steps, at least one, that take so many seconds."""
    low, high = 1, me.steps
    while low < high:
        middle = (low + high) // 2
        if run_s(rules, me, middle) >= seconds:
            high = middle
        else:
            low = middle + 1
    return low


@inner
def blocks_for(phase, n, at, tokens):
    """Blocks that n sequences need to go from token count `at` on by `tokens`."""
    rounds = tokens // phase.size
    need = rounds * n
    for u in range(at, at + tokens - rounds * phase.size):
        need += phase[u % phase.size]
    return need


@inner
def tokens_for(phase, n, at, blocks):
    """How many tokens from `at` on n ≥ 1 sequences can go with so many blocks."""
    rounds = blocks // n
    left, tokens = blocks - rounds * n, rounds * phase.size
    while phase[(at + tokens) % phase.size] <= left:
        left -= phase[(at + tokens) % phase.size]
        tokens += 1
    return tokens


@inner
def plan_end(tree, w, time):
    """Set when worker w is next looked at; the root of the tree is the earliest."""
    at = tree.size // 2 + w
    tree[at] = time
    while at > 1:
        at //= 2
        tree[at] = min(tree[2 * at], tree[2 * at + 1])


@inner
def _earlier(a, b):
    return a.time < b.time or (a.time == b.time and a.ticket < b.ticket)


@inner
def postpone(clock, later, time, what, item):
    """Put what falls due at `time` into the heap."""
    at = clock.due
    clock.due += 1
    later[at].time, later[at].ticket = time, clock.ticket
    later[at].what, later[at].who = what, item
    clock.ticket += 1
    while at > 0 and _earlier(later[at], later[(at - 1) // 2]):
        _swap(later, at, (at - 1) // 2)
        at = (at - 1) // 2


@inner
def _swap(later, a, b):
    x, y = later[a], later[b]
    x.time, y.time = y.time, x.time
    x.ticket, y.ticket = y.ticket, x.ticket
    x.what, y.what = y.what, x.what
    x.who, y.who = y.who, x.who


@inner
def next_due(clock, later):
    """Take the first of the heap out: (what, item)."""
    what, item = later[0].what, later[0].who
    clock.due -= 1
    _swap(later, 0, clock.due)
    at = 0
    while 2 * at + 1 < clock.due:
        below = 2 * at + 1
        if below + 1 < clock.due and _earlier(later[below + 1], later[below]):
            below += 1
        if not _earlier(later[below], later[at]):
            break
        _swap(later, at, below)
        at = below
    return what, item


@inner
def _ends_first(slots, a, b):
    return a.key < b.key or (a.key == b.key and slots[a.slot].order < slots[b.slot].order)


@inner
def _exchange(heap, a, b):
    x, y = heap[a], heap[b]
    x.key, y.key = y.key, x.key
    x.slot, y.slot = y.slot, x.slot


@inner
def _sift(heap, slots, at, count):
    """Put the entry at `at` in its place, up or down."""
    while at > 0 and _ends_first(slots, heap[at], heap[(at - 1) // 2]):
        _exchange(heap, at, (at - 1) // 2)
        at = (at - 1) // 2
    while 2 * at + 1 < count:
        below = 2 * at + 1
        if below + 1 < count and _ends_first(slots, heap[below + 1], heap[below]):
            below += 1
        if not _ends_first(slots, heap[below], heap[at]):
            break
        _exchange(heap, at, below)
        at = below


@inner
def join(rules, me, slots, heap, phase, s, kv):
    """A sequence with `kv` tokens of KV begins to decode; what it has still to emit is set by its `finish` − T."""
    slot, now = slots[s], tokens_at(rules, me.done)
    slot.lead = kv - now
    phase[-slot.lead % rules.block] += 1
    heap[me.n].key, heap[me.n].slot = slot.finish, s
    me.n += 1
    me.kv += kv
    _sift(heap, slots, me.n - 1, me.n)


@inner
def leave(rules, me, slots, heap, phase, at):
    """The sequence at place `at` of the heap decodes no more; returns its KV tokens."""
    slot = slots[heap[at].slot]
    kv = tokens_at(rules, me.done) + slot.lead
    phase[-slot.lead % rules.block] -= 1
    me.n -= 1
    me.kv -= kv
    _exchange(heap, at, me.n)
    if at < me.n:
        _sift(heap, slots, at, me.n)
    return kv


@inner
def _run_last(me, slots, s, ticket):
    """To the end of the running."""
    slot = slots[s]
    slot.order, slot.before, slot.after = ticket, me.last, -1
    if me.last >= 0:
        slots[me.last].after = s
    else:
        me.first = s
    me.last = s
    me.running += 1


@inner
def _run_no_more(me, slots, s):
    slot = slots[s]
    if slot.before >= 0:
        slots[slot.before].after = slot.after
    else:
        me.first = slot.after
    if slot.after >= 0:
        slots[slot.after].before = slot.before
    else:
        me.last = slot.before
    me.running -= 1


@inner
def _wait_first(me, slots, s):
    slots[s].after = me.head
    if me.head < 0:
        me.tail = s
    me.head = s
    me.waiting += 1


@inner
def _wait(me, slots, s):
    """In line by rank, behind equals."""
    at = me.tail
    if at >= 0 and slots[s].rank < slots[at].rank:
        at, next_ = -1, me.head
        while slots[next_].rank <= slots[s].rank:
            at, next_ = next_, slots[next_].after
    if at < 0:
        slots[s].after, me.head = me.head, s
    else:
        slots[s].after, slots[at].after = slots[at].after, s
    if slots[s].after < 0:
        me.tail = s
    me.waiting += 1


@inner
def _wait_no_more(me, slots, before, s):
    after = slots[s].after
    if before < 0:
        me.head = after
    else:
        slots[before].after = after
    if after < 0:
        me.tail = before
    me.waiting -= 1


@inner
def serve(rules, tenant, now, sequences):
    """Count what a tenant's sequences have emitted by token count `now`, and how many more decode from now on."""
    tenant.service += rules.answer_weight * tenant.decoding * (now - tenant.counted)
    tenant.counted = now
    tenant.decoding += sequences


@inner
def lift(rules, me, tenants, tenant, now):
    """A tenant comes into the line: what it did not use while away is not saved up (VTC, arXiv 2401.00588, algorithm 2)."""
    serve(rules, tenants[tenant], now, 0)
    if tenants[tenant].waiting == 0:
        least = np.inf
        if me.waiting == 0 and me.left >= 0:
            serve(rules, tenants[me.left], now, 0)
            least = tenants[me.left].service
        for other in range(tenants.size):
            if tenants[other].waiting > 0:
                serve(rules, tenants[other], now, 0)
                least = min(least, tenants[other].service)
        if least < np.inf:
            tenants[tenant].service = max(tenants[tenant].service, least)


@inner
def next_in_line(rules, columns, me, slots, tenants, visible):
    """The one in line that goes first of those that came by `visible`, −1 for none, and the one before it."""
    before, s = -1, me.head
    while s >= 0 and slots[s].queued > visible:
        before, s = s, slots[s].after
    if rules.order != BY_TENANT or s < 0 or slots[s].rank < 0.0:
        return before, s
    now, least, found, front = tokens_at(rules, me.done), np.inf, s, before
    while s >= 0:
        if slots[s].queued <= visible:
            tenant = tenants[columns.rows[slots[s].row].tenant]
            serve(rules, tenant, now, 0)
            if tenant.service < least:
                least, found, front = tenant.service, s, before
        before, s = s, slots[s].after
    return front, found


@inner
def _ids_of(columns, row):
    return columns.ids[columns.rows[row].begin : columns.rows[row].end]


@inner
def _let_go(rules, columns, me, node, table, slot, kv):
    """Give back a sequence's blocks; returns the node of its own run, which it can find by its tag, if it has one."""
    own = -(-kv // rules.block) - slot.shared * rules.per_chunk
    ids = _ids_of(columns, slot.row)
    return release(me, node, table, ids, slot.shared, own, slot.tag, rules.caching)


@inner
def preempt(rules, clock, columns, me, slots, node, table, heap, phase, tenants):
    """Throw out the last of the running: its KV is lost (unless found again), it waits first in line."""
    s = me.last
    slot = slots[s]
    slot.rank = -np.inf
    if rules.order == BY_TENANT:
        tenant = tenants[columns.rows[slot.row].tenant]
        serve(rules, tenant, tokens_at(rules, me.done), 0 if me.partial == s else -1)
        tenant.waiting += 1
    if me.partial == s:
        kv = slot.computed
        me.partial = -1
    else:
        at = 0
        while heap[at].slot != s:
            at += 1
        kv = leave(rules, me, slots, heap, phase, at)
        slot.generated = columns.rows[slot.row].output - (slot.finish - tokens_at(rules, me.done))
    _run_no_more(me, slots, s)
    slot.tag = clock.ticket
    clock.ticket += 1
    slot.run = _let_go(rules, columns, me, node, table, slot, kv)
    slot.whole = kv // rules.block - slot.shared * rules.per_chunk
    slot.goal, slot.computed, slot.ready = columns.rows[slot.row].input + slot.generated, 0, False
    slot.preemptions += 1
    me.preemptions += 1
    _wait_first(me, slots, s)


@inner
def _fits(rules, columns, me, node, table, slot, budget, tokens):
    """What it takes to admit: (chunks found, own blocks found again, new tokens, new blocks); −1 chunks: it does not fit."""
    row = slot.row
    ids = _ids_of(columns, row)
    found, idle, again = 0, 0, 0
    if rules.caching:
        usable = columns.rows[row].input // rules.prefix if slot.ready else (slot.goal - 1) // rules.prefix
        most = min(ids.size, columns.rows[row].input // rules.prefix, usable)
        found, idle = matching(node, table, ids, most)
        if slot.run >= 0 and found == slot.shared:
            again = min(left_of(node, slot.run, slot.tag), slot.whole)
    have = found * rules.prefix + again * rules.block
    new = slot.goal - have
    if slot.ready:
        new, last = 0, slot.goal - -rules.rate // rules.unit
        if rules.verified > budget:
            return -1, 0, 0, 0
    else:
        if new > budget and not rules.chunked:
            return -1, 0, 0, 0
        last = slot.goal if rules.reserve else have + min(new, budget)
        new = min(new, budget)
    held = found * rules.per_chunk + again
    if -(-last // rules.block) - held + idle * rules.per_chunk + again > me.free:
        return -1, 0, 0, 0
    to = slot.goal + tokens if slot.ready else have + new
    return found, again, new, -(-to // rules.block) - held


@inner
def _cover(rules, columns, me, node, table, slot):
    """Make the chunks that are computed by the end of this step findable."""
    if rules.caching:
        ids = _ids_of(columns, slot.row)
        covered = min(ids.size, columns.rows[slot.row].input // rules.prefix, slot.computed // rules.prefix)
        slot.shared = publish(me, node, table, ids, slot.shared, covered, rules.per_chunk)


@inner
def leave_line(rules, columns, me, slot, tenants):
    """Charge a tenant for the prompt, when it is first taken out of the line."""
    me.left = columns.rows[slot.row].tenant
    tenant = tenants[me.left]
    tenant.waiting -= 1
    if slot.started < 0.0:
        tenant.service += rules.prompt_weight * columns.rows[slot.row].input
    if slot.ready:
        serve(rules, tenant, tokens_at(rules, me.done), 1)


@inner
def admit(rules, clock, columns, state, w, budget, visible, stamp):
    """Admit waiting requests while they fit; returns (new prefill tokens, their attention pairs)."""
    me, slots, node, table = state.workers[w], state.slots, state.nodes[w], state.table[w]
    heap, phase, prompts, tenants = state.finish[w], state.phase[w], state.prompts[w], state.tenants[w]
    total, pairs = 0, 0.0
    tokens = tokens_at(rules, me.done + 1) - tokens_at(rules, me.done)
    while me.head >= 0 and budget > 0 and me.running + me.held < rules.most:
        before, s = next_in_line(rules, columns, me, slots, tenants, visible)
        if s < 0:
            break
        slot = slots[s]
        found, again, new, blocks = _fits(rules, columns, me, node, table, slot, budget, tokens)
        if found < 0:
            break
        _wait_no_more(me, slots, before, s)
        if rules.order == BY_TENANT:
            leave_line(rules, columns, me, slot, tenants)
        hold(me, node, table, _ids_of(columns, slot.row), found)
        if left_of(node, slot.run, slot.tag) > 0:
            reclaim(me, node, slot.run, again)
        take(me, node, table, blocks)
        slot.run, slot.tag, slot.shared = -1, -1, found
        have = found * rules.prefix + again * rules.block
        _run_last(me, slots, s, clock.ticket)
        clock.ticket += 1
        if slot.started < 0.0:
            slot.started, slot.hit = stamp, have
            me.hit_tokens += have
        if slot.ready:
            slot.computed, slot.ready = slot.goal, False
            slot.finish = tokens_at(rules, me.done) + columns.rows[slot.row].output - slot.generated
            join(rules, me, slots, heap, phase, s, slot.goal)
            budget -= rules.verified
        else:
            slot.computed = have + new
            pairs += new * (have + 0.5 * (new + 1))
            total += new
            budget -= new
            if slot.computed < slot.goal:
                me.partial = s
            else:
                prompts[me.prompts] = s
                me.prompts += 1
        _cover(rules, columns, me, node, table, slot)
    return total, pairs


@inner
def resume(rules, columns, me, slots, node, table, prompts, budget):
    """Go on with the prompt that is not done; returns (new tokens, their attention pairs), or −1 where no block is left."""
    s = me.partial
    slot = slots[s]
    new = min(slot.goal - slot.computed, budget)
    blocks = -(-(slot.computed + new) // rules.block) - -(-slot.computed // rules.block)
    if blocks > me.free:
        return -1, 0.0
    take(me, node, table, blocks)
    pairs = new * (slot.computed + 0.5 * (new + 1))
    slot.computed += new
    _cover(rules, columns, me, node, table, slot)
    if slot.computed == slot.goal:
        prompts[me.prompts] = s
        me.prompts += 1
        me.partial = -1
    return new, pairs


@inner
def plan_run(rules, me, heap, phase, single):
    """How many steps go on with nobody coming or going, and with blocks for all of them."""
    if single:
        return 1
    steps = -(-heap[0].key * rules.unit // rules.rate) - me.done
    first = tokens_at(rules, me.done + 1)
    tokens = tokens_at(rules, me.done + steps) - first
    if me.n * (tokens // rules.block + 1) > me.free:
        tokens = first + min(tokens, tokens_for(phase, me.n, first, me.free))
        steps = min(steps, ((tokens + 1) * rules.unit - 1) // rules.rate - me.done)
    return steps


@inner
def compose(rules, columns, tables, state, w, time, visible, stamp):
    """Compose the next step of a worker and plan until when it holds; returns whether there is anything to do."""
    clock = state.clock[0]
    me, slots, node, table = state.workers[w], state.slots, state.nodes[w], state.table[w]
    heap, phase, prompts, tenants = state.finish[w], state.phase[w], state.prompts[w], state.tenants[w]
    before = me.preemptions
    now = tokens_at(rules, me.done)
    while me.n > 0:
        need = blocks_for(phase, me.n, now, tokens_at(rules, me.done + 1) - now)
        if need <= me.free:
            take(me, node, table, need)
            break
        preempt(rules, clock, columns, me, slots, node, table, heap, phase, tenants)
    budget, total, pairs = rules.budget - me.n * rules.verified, 0, 0.0
    me.prompts = 0
    if me.partial >= 0 and budget > 0:
        total, pairs = resume(rules, columns, me, slots, node, table, prompts, budget)
        if total < 0:
            preempt(rules, clock, columns, me, slots, node, table, heap, phase, tenants)
            total = 0
    if me.preemptions == before or me.running == 0:
        new, more = admit(rules, clock, columns, state, w, budget - total, visible, stamp)
        total, pairs = total + new, pairs + more
    if total == 0 and me.n == 0:
        return False
    me.start, me.prompt_tokens = time, me.prompt_tokens + total
    batch = me.n * rules.verified
    if total > 0:
        fixed, kv_s = tables.batch[me.n].mixed, tables.batch[me.n].mixed_kv
        drafts = rules.drafting * (
            tables.dense[batch] + tables.batch[me.n].decode + tables.batch[me.n].decode_kv * me.kv
        )
        me.kind, me.steps = MIXED, 1
        me.end = time + (
            rules.overhead_s
            + tables.dense[batch + total]
            + fixed
            + kv_s * me.kv
            + rules.pair_s * pairs
            + drafts
        )
    else:
        me.kind = DECODING
        me.fixed_s = rules.overhead_s + (1.0 + rules.drafting) * (
            tables.dense[batch] + tables.batch[me.n].decode
        )
        me.kv_s = (1.0 + rules.drafting) * tables.batch[me.n].decode_kv
        unseen = me.head >= 0 and (me.held > 0 or slots[me.head].queued > visible)
        # What others throw out of memory can make an idle prefix dearer to keep than to compute, chunk by chunk.
        shaky = me.head >= 0 and rules.per_chunk > 1 and not rules.reserve
        # Whose turn it is changes with every token of a tenant's.
        shaky = shaky or (rules.order == BY_TENANT and me.head >= 0 and me.running < rules.most)
        single = unseen or shaky or me.preemptions > before or me.partial >= 0
        me.taken = tokens_at(rules, me.done + 1)
        me.steps = plan_run(rules, me, heap, phase, single)
        me.end = time + run_s(rules, me, me.steps)
    return True


@inner
def _spare(clock, slots, s):
    slots[s].row = -1
    slots[s].after = clock.spare
    clock.spare = s
    clock.live -= 1


@inner
def call_on(columns, state, row, time):
    """Let the calls that follow a row fall due."""
    child = columns.rows[row].child
    while child >= 0:
        postpone(state.clock[0], state.later, time + columns.rows[child].arrival, CALL, child)
        child = columns.rows[child].sibling


@inner
def finish(rules, columns, state, log, w, s, kv, time):
    """A sequence has emitted its last token: write it down, and let what waits for it fall due."""
    clock, me, slots = state.clock[0], state.workers[w], state.slots
    slot = slots[s]
    row, entry = slot.row, log[clock.logged]
    clock.logged += 1
    entry.request, entry.arrival_s, entry.end_s = columns.rows[row].number, slot.arrived, time
    entry.queue_s, entry.ttft_s = slot.started - slot.arrived, slot.first - slot.arrived
    entry.tpot_s = (time - slot.first) / (slot.generated - 1) if slot.generated > 1 else 0.0
    entry.delay_price = columns.rows[row].weight
    entry.cached_tokens, entry.preemptions = slot.hit, slot.preemptions
    entry.worker, entry.prefill_worker = w, slot.origin if slot.origin >= 0 else w
    call_on(columns, state, row, time)
    _run_no_more(me, slots, s)
    me.finished += 1
    me.in_flight -= 1
    me.promised -= slot.promised
    if rules.ahead:
        slot.computed, slot.after = kv, -1
        if me.held > 0:
            slots[me.held_last].after = s
        else:
            me.held_first = s
        me.held_last = s
        me.held += 1
    else:
        _let_go(rules, columns, me, state.nodes[w], state.table[w], slot, kv)
        _spare(clock, slots, s)


@inner
def give_back(rules, columns, state, w):
    """Give back what finished sequences held while the next step was composed without knowing."""
    me, slots = state.workers[w], state.slots
    s = me.held_first
    for _ in range(me.held):
        after = slots[s].after
        _let_go(rules, columns, me, state.nodes[w], state.table[w], slots[s], slots[s].computed)
        _spare(state.clock[0], slots, s)
        s = after
    me.held = 0


@inner
def catch_up(rules, state, w, time):
    """Take the blocks that the steps begun by now have taken: what they threw out is not in memory any more."""
    me = state.workers[w]
    if me.kind == DECODING and me.steps > 1:
        to = tokens_at(rules, me.done + steps_by(rules, me, time - me.start))
        if to > me.taken:
            blocks = blocks_for(state.phase[w], me.n, me.taken, to - me.taken)
            take(me, state.nodes[w], state.table[w], blocks)
            me.taken = to


@inner
def choose(rules, columns, tables, state, s, time):
    """The worker for a request, with what routing thinks it brings there: (worker, prompt tokens, blocks)."""
    clock, workers = state.clock[0], state.workers
    row, decoding = state.slots[s].row, state.slots[s].generated > 0
    low, high = 0, rules.workers
    if rules.prefilling > 0:
        low = rules.prefilling if decoding else 0
        high = high if decoding else rules.prefilling
    turn = clock.turn[1 if decoding else 0]
    prompt, blocks = columns.rows[row].input, -(-columns.rows[row].input // rules.block)
    tokens = 0 if decoding else prompt
    ids = _ids_of(columns, row)
    most = min(ids.size, (prompt - 1) // rules.prefix) if rules.by_prefix and rules.caching else 0
    best, least, new_tokens, new_blocks = -1, np.inf, tokens, blocks
    for k in range(high - low):
        w = low + (turn + k) % (high - low)
        me = workers[w]
        if me.closed:
            continue
        if rules.by_turns:
            clock.turn[1 if decoding else 0] = w - low + 1
            return w, tokens, blocks
        if most > 0:
            catch_up(rules, state, w, time)
        found, _ = matching(state.nodes[w], state.table[w], ids, most)
        to_compute = 0 if decoding else prompt - found * rules.prefix
        to_hold = blocks - found * rules.per_chunk
        of = tables.routing[w]
        cost = columns.rows[row].weight * (of[0] + of[1] * (me.pending + to_compute) + of[2] * me.in_flight)
        cost += of[3] * to_compute + of[4] * (me.promised + to_hold) + of[5] * columns.rows[row].output
        if cost < least:
            best, least, new_tokens, new_blocks = w, cost, to_compute, to_hold
    clock.turn[1 if decoding else 0] = turn + 1
    return best, new_tokens, new_blocks


@inner
def bring(state, w, s, tokens, blocks):
    """Count a request as on its way to worker w."""
    me, slot = state.workers[w], state.slots[s]
    slot.pending, slot.promised = tokens, blocks
    me.pending += tokens
    me.promised += blocks
    me.in_flight += 1


@inner
def enqueue(rules, columns, state, s, w, time):
    """Put a request in line at worker w; it is looked at after the step that runs, or at once."""
    me, slots = state.workers[w], state.slots
    slots[s].worker, slots[s].queued = w, time
    if rules.order == BY_TENANT:
        steps = me.done
        if me.kind == DECODING:
            steps += steps_by(rules, me, time - me.start) - 1
        tenant = columns.rows[slots[s].row].tenant
        lift(rules, me, state.tenants[w], tenant, tokens_at(rules, steps))
        state.tenants[w, tenant].waiting += 1
    _wait(me, slots, s)
    if me.kind == NOTHING:
        if me.end > time:
            me.end = time
            plan_end(state.tree, w, time)
    elif me.kind == DECODING and me.head == s and me.steps > 1 and me.running < rules.most:
        steps = steps_by(rules, me, time - me.start)
        if steps < me.steps:
            me.steps = steps
            me.end = me.start + run_s(rules, me, steps)
            plan_end(state.tree, w, me.end)


@inner
def expect(rules, columns, tables, state, w, s, time):
    """Rank a request that comes to worker w by what it is expected to take there; returns what answering it is worth, USD:
    value − price of delay × seconds until it is answered − quote."""
    me, slots = state.workers[w], state.slots
    slot, row, of = slots[s], columns.rows[slots[s].row], tables.takes[w]
    found = 0
    if rules.caching:
        ids = _ids_of(columns, slot.row)
        catch_up(rules, state, w, time)
        found, _ = matching(
            state.nodes[w], state.table[w], ids, min(ids.size, (row.input - 1) // rules.prefix)
        )
    prompt = row.input - found * rules.prefix
    pairs = prompt * (found * rules.prefix + 0.5 * (prompt + 1))
    prompt_s = of[6] * prompt + of[7] * pairs
    takes = of[0] * prompt + of[1] * pairs + of[2] * prompt_s * prompt_s
    takes += (of[3] + of[4] * (row.input + 0.5 * row.expected)) * row.expected
    slot.work_s = prompt_s + of[8] * row.expected
    if rules.order == SHORTEST:
        slot.rank = takes + rules.aging * time
    elif rules.order == PRICED:
        slot.rank = -row.weight / takes + rules.aging * time
    if not rules.admission:
        return 0.0
    ahead, other = 0.0, me.head
    while other >= 0 and slots[other].rank <= slot.rank:
        ahead += slots[other].work_s
        other = slots[other].after
    return row.value - row.weight * (ahead + prompt_s + of[9] * row.expected) - of[5] * takes


@inner
def turn_away(columns, state, log, s, time):
    """Write down that a request is not let in; what follows it comes as after an answer at once."""
    clock, slot = state.clock[0], state.slots[s]
    entry = log[clock.logged]
    clock.logged += 1
    entry.request, entry.arrival_s, entry.end_s = columns.rows[slot.row].number, time, time
    entry.worker = -1
    call_on(columns, state, slot.row, time)
    _spare(clock, state.slots, s)


@inner
def arrive(rules, columns, tables, state, log, row, time):
    """A request arrives: give it a slot, and a worker."""
    clock, slots = state.clock[0], state.slots
    s = clock.spare
    slot = slots[s]
    clock.spare = slot.after
    clock.live += 1
    slot.row, slot.arrived, slot.started, slot.first = row, time, -1.0, -1.0
    slot.generated, slot.computed, slot.goal, slot.shared, slot.hit = 0, 0, columns.rows[row].input, 0, 0
    slot.run, slot.tag, slot.preemptions, slot.ready, slot.origin = -1, -1, 0, False, -1
    slot.rank = 0.0
    w, tokens, blocks = choose(rules, columns, tables, state, s, time)
    if (rules.order in (SHORTEST, PRICED) or rules.admission) and (
        expect(rules, columns, tables, state, w, s, time) < 0.0
    ):
        turn_away(columns, state, log, s, time)
        return
    bring(state, w, s, tokens, blocks)
    enqueue(rules, columns, state, s, w, time)


@inner
def deliver(rules, columns, state, s, time):
    """A prompt's KV has arrived where it will be decoded; the worker that made it gives its blocks back."""
    slot = state.slots[s]
    w, to = slot.worker, slot.target
    me = state.workers[w]
    _let_go(rules, columns, me, state.nodes[w], state.table[w], slot, slot.goal)
    slot.shared, slot.ready, slot.origin = 0, True, w
    enqueue(rules, columns, state, s, to, time)
    if me.kind == NOTHING and me.waiting > 0 and me.end > time:
        me.end = time
        plan_end(state.tree, w, time)


@inner
def end_prompt(rules, columns, tables, state, log, w, s, time):
    """A prompt is computed, and the next token with it: decode here, send the KV elsewhere, or end."""
    me, slot = state.workers[w], state.slots[s]
    row = slot.row
    slot.generated += 1
    me.output_tokens += 1
    decodes_here = slot.generated < columns.rows[row].output and w >= rules.prefilling
    if rules.order == BY_TENANT:
        tenant = state.tenants[w, columns.rows[row].tenant]
        tenant.service += rules.answer_weight
        serve(rules, tenant, tokens_at(rules, me.done), 1 if decodes_here else 0)
    me.pending -= slot.pending
    slot.pending = 0
    if slot.first < 0.0:
        slot.first = time
    if slot.generated == columns.rows[row].output:
        finish(rules, columns, state, log, w, s, slot.goal, time)
    elif w < rules.prefilling:
        _run_no_more(me, state.slots, s)
        me.in_flight -= 1
        me.promised -= slot.promised
        slot.target, tokens, blocks = choose(rules, columns, tables, state, s, time)
        bring(state, slot.target, s, tokens, blocks)
        me.link = max(me.link, time) + rules.transfer_s + rules.transfer_token_s * columns.rows[row].input
        postpone(state.clock[0], state.later, me.link, TRANSFER, s)
    else:
        slot.finish = tokens_at(rules, me.done) + columns.rows[row].output - slot.generated
        join(rules, me, state.slots, state.finish[w], state.phase[w], s, slot.goal)


@inner
def complete(rules, columns, tables, state, log, w):
    """What was planned for worker w is done: count its tokens, end what ends."""
    me, slots, heap, phase = state.workers[w], state.slots, state.finish[w], state.phase[w]
    me.seen = me.start
    if me.kind == DECODING:
        me.seen += run_s(rules, me, me.steps - 1)
    if me.n > 0:
        if me.kind == DECODING:
            catch_up(rules, state, w, np.inf)
        now = tokens_at(rules, me.done)
        me.done += me.steps
        then = tokens_at(rules, me.done)
        me.kv += me.n * (then - now)
        me.output_tokens += me.n * (then - now)
        while me.n > 0 and heap[0].key <= then:
            s = heap[0].slot
            me.output_tokens -= then - heap[0].key
            if rules.order == BY_TENANT:
                tenant = state.tenants[w, columns.rows[slots[s].row].tenant]
                serve(rules, tenant, then, -1)
                tenant.service -= rules.answer_weight * (then - heap[0].key)
            kv = leave(rules, me, slots, heap, phase, 0)
            slots[s].generated = columns.rows[slots[s].row].output
            finish(rules, columns, state, log, w, s, kv, me.end)
    if me.kind == MIXED:
        for k in range(me.prompts):
            end_prompt(rules, columns, tables, state, log, w, state.prompts[w, k], me.end)
    me.kind = NOTHING


@inner
def begin(rules, columns, tables, state, w, time, visible):
    """Start what worker w does next; it sees what came until `visible`."""
    me = state.workers[w]
    at_work = compose(rules, columns, tables, state, w, time, visible, visible)
    if me.held > 0 or (not at_work and visible < time):
        give_back(rules, columns, state, w)
        at_work = at_work or compose(rules, columns, tables, state, w, time, time, time)
    if not at_work:
        me.kind, me.end = NOTHING, np.inf
    plan_end(state.tree, w, me.end)


@inner
def take_sample(rules, state, samples, time):
    """What each worker is doing at `time`, and has done until then."""
    for w in range(rules.workers):
        me, of = state.workers[w], samples[state.clock[0].sampled, w]
        of.running, of.waiting, of.kv_blocks = me.running, me.waiting, rules.blocks - me.free
        of.output_tokens, of.prompt_tokens = me.output_tokens, me.prompt_tokens
        of.hit_tokens, of.preemptions, of.finished = me.hit_tokens, me.preemptions, me.finished
        if me.kind == DECODING and time > me.start:
            steps = me.done + steps_by(rules, me, time - me.start)
            of.output_tokens += me.n * (tokens_at(rules, steps - 1) - tokens_at(rules, me.done))
            of.kv_blocks += blocks_for(state.phase[w], me.n, me.taken, tokens_at(rules, steps) - me.taken)
    state.clock[0].sampled += 1


@inner
def hand_on(rules, columns, tables, state, w, time):
    """Send what waits at a worker, and has not begun, to the others; in its order."""
    me, slots = state.workers[w], state.slots
    s, count = me.head, me.waiting
    me.head, me.tail, me.waiting = -1, -1, 0
    for _ in range(count):
        after = slots[s].after
        if slots[s].started >= 0.0:
            _wait(me, slots, s)
        else:
            if rules.order == BY_TENANT:
                state.tenants[w, columns.rows[slots[s].row].tenant].waiting -= 1
            me.pending -= slots[s].pending
            me.promised -= slots[s].promised
            me.in_flight -= 1
            to, tokens, blocks = choose(rules, columns, tables, state, s, time)
            bring(state, to, s, tokens, blocks)
            enqueue(rules, columns, state, s, to, time)
        s = after


@inner
def take_out(rules, state, w, time):
    """Take free blocks out of a worker's memory for good; a run planned on them ends with the step that is under way."""
    me = state.workers[w]
    take(me, state.nodes[w], state.table[w], me.out)
    if me.kind == DECODING:
        me.steps = steps_by(rules, me, time - me.start)
        me.end = me.start + run_s(rules, me, me.steps)
        plan_end(state.tree, w, me.end)


@inner
def change(rules, columns, tables, state):
    """What a branch asked for."""
    time = state.clock[0].now
    for w in range(rules.workers):
        me = state.workers[w]
        if me.hand_on:
            me.hand_on = False
            hand_on(rules, columns, tables, state, w, time)
        if me.out > 0:
            take_out(rules, state, w, time)
            me.out = 0


@inner
def _room(clock, slots, log, samples, most):
    if clock.spare >= slots.size:
        return SLOTS_FULL
    if clock.logged + most > log.size:
        return LOG_FULL
    return SAMPLES_FULL if clock.sampled >= samples.shape[0] else DONE


@compiled
def advance(setup, columns, tables, state, log, samples, until):
    """Do all that happens by `until`; returns DONE, or what is full."""
    rules, clock = setup[0], state.clock[0]
    change(rules, columns, tables, state)
    while True:
        full = _room(clock, state.slots, log, samples, rules.most)
        if full != DONE:
            return full
        arrival = columns.rows[columns.open[clock.next]].arrival if clock.next < columns.open.size else np.inf
        due = state.later[0].time if clock.due > 0 else np.inf
        end = state.tree[1]
        time = min(arrival, due, end)
        if clock.sample <= min(until, time) and min(until, time) < np.inf:
            take_sample(rules, state, samples, clock.sample)
            clock.intervals += 1
            clock.sample = clock.interval * (clock.intervals + 1)
            continue
        if time > until or time == np.inf:
            return DONE
        clock.now = time
        if arrival == time:
            arrive(rules, columns, tables, state, log, columns.open[clock.next], time)
            clock.next += 1
        elif due == time:
            what, item = next_due(clock, state.later)
            if what == CALL:
                arrive(rules, columns, tables, state, log, item, time)
            else:
                deliver(rules, columns, state, item, time)
        else:
            at = 1
            while at < state.tree.size // 2:
                at = 2 * at if state.tree[2 * at] == end else 2 * at + 1
            w = at - state.tree.size // 2
            me = state.workers[w]
            visible = time
            if me.kind != NOTHING:
                complete(rules, columns, tables, state, log, w)
                visible = me.seen if rules.ahead else time
                if not rules.ahead and clock.due > 0 and state.later[0].time == time:
                    continue  # an answer came, and the next call with it: it can be in the step that starts now
            begin(rules, columns, tables, state, w, time, visible)


@compiled
def catch_up_all(setup, state, time):
    """`catch_up` of every worker, so that `free` is what is free at `time`."""
    for w in range(setup[0].workers):
        catch_up(setup[0], state, w, time)


@compiled
def need_followers(needed, rows):
    """Mark the calls that follow marked rows, and theirs; returns how many rows follow another one."""
    count = 0
    for row in range(needed.size):
        call = rows[row].child if needed[row] else -1
        while call >= 0:
            needed[call] = True
            count += 1
            call = rows[call].sibling
    return count
