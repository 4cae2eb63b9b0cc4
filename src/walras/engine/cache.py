"""The KV memory of one worker: blocks, shared prefixes and what is thrown out first. Compiled. [Z §3.3]

Memory is `kv_blocks` blocks. A *chunk* is what one prefix id names: `per_chunk` blocks that every sequence with this
prefix shares, counted by reference. All other blocks are a sequence's own. What no sequence holds stays readable until it
is needed: it waits in one list, oldest first, a sequence's last blocks before its first ones, and is thrown out from the
front. So `free` counts blocks that nobody holds and `empty` those of them with nothing in them.

A node of the list is a chunk (`refs` ≥ 0) or a run of own blocks (`refs` −1). Such a run carries the tag of the sequence that
was preempted, which finds there what is left of its own KV; a run without a tag (−1) will never be read again. A chunk
leaves the cache whole, although blocks of it might have done.

Numba keeps the compiled replay by the date of `kernel.py` alone: after a change here, touch that file.

`node` and `table` are the rows of one worker; the last node is the head of the list; `me` is the worker's record.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

compiled: Any = njit(nogil=True, cache=True, error_model="numpy")
"""What Python calls."""
_WITHOUT_ENTRY: Any = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
inner: Any = njit(nogil=True, error_model="numpy", **_WITHOUT_ENTRY)
"""What only compiled code calls, and is kept on disk with it: without an entry for Python it compiles in less time."""

NODE = np.dtype(
    [
        ("id", np.int64),  # of the chunk, or the tag of the run
        ("before", np.int32),
        ("after", np.int32),
        ("blocks", np.int32),
        ("refs", np.int32),
    ],
    align=True,
)


@inner
def _home(table, id):  # noqa: A002
    """Where the search for an id begins: Fibonacci hashing."""
    mixed = np.uint64(id) * np.uint64(0x9E3779B97F4A7C15)
    return np.int64(mixed >> np.uint64(32)) & (table.size - 1)


@inner
def find(node, table, id):  # noqa: A002
    """The node of a chunk, −1 where it is not in memory."""
    at = _home(table, id)
    while table[at] >= 0:
        if node[table[at]].id == id:
            return table[at]
        at = (at + 1) & (table.size - 1)
    return -1


@inner
def _enter(node, table, e):
    at = _home(table, node[e].id)
    while table[at] >= 0:
        at = (at + 1) & (table.size - 1)
    table[at] = e


@inner
def _leave(node, table, e):
    """Take a chunk out, and move up those that stand behind it only because it was there."""
    last = table.size - 1
    hole = _home(table, node[e].id)
    while table[hole] != e:
        hole = (hole + 1) & last
    at = (hole + 1) & last
    while table[at] >= 0:
        if ((at - _home(table, node[table[at]].id)) & last) >= ((at - hole) & last):
            table[hole] = table[at]
            hole = at
        at = (at + 1) & last
    table[hole] = -1


@compiled
def clear(me, node, table):
    """An empty memory: every node is spare, the list is empty."""
    for e in range(node.size):
        node[e].after = e + 1
    node[node.size - 1].before = node[node.size - 1].after = node.size - 1
    me.spare = 0
    table[:] = -1


@inner
def _unlink(node, e):
    node[node[e].before].after = node[e].after
    node[node[e].after].before = node[e].before


@inner
def _append(node, e):
    """To the end of the list: the last to be thrown out."""
    head = node.size - 1
    tail = node[head].before
    node[e].before, node[e].after = tail, head
    node[tail].after = e
    node[head].before = e


@inner
def _new(me, node, id, blocks, refs):  # noqa: A002
    e = me.spare
    me.spare = node[e].after
    node[e].id, node[e].blocks, node[e].refs = id, blocks, refs
    return e


@inner
def _scrap(me, node, e):
    node[e].refs, node[e].after = -2, me.spare
    me.spare = e


@inner
def _merge(me, node, e):
    """One run out of two that stand together and will never be read: so there are never more of these than of the others."""
    before = node[e].before
    if node[e].refs == -1 and node[e].id == -1 and node[before].refs == -1 and node[before].id == -1:
        node[before].blocks += node[e].blocks
        _unlink(node, e)
        _scrap(me, node, e)


def nodes_needed(blocks: int, per_chunk: int, sequences: int) -> int:
    """Most nodes a memory can need, the head included: chunks, a run of each preempted sequence, and runs between them."""
    return min(blocks, 2 * (blocks // per_chunk) + 2 * sequences + 2) + 1


@inner
def take(me, node, table, blocks):
    """Take blocks out of the free ones, the empty first; the caller has seen that there are enough."""
    me.free -= blocks
    short = blocks - me.empty
    if short <= 0:
        me.empty -= blocks
        return
    me.empty = 0
    while short > 0:
        e = node[node.size - 1].after
        held = node[e].blocks
        if node[e].refs < 0 and held > short:
            node[e].blocks -= short
            return
        _unlink(node, e)
        if node[e].refs == 0:
            _leave(node, table, e)
        _scrap(me, node, e)
        short -= held
    me.empty = -short


@inner
def matching(node, table, ids, most):
    """How many of the first `most` chunks are in memory without a gap, and how many of those nobody holds."""
    idle = 0
    for j in range(most):
        e = find(node, table, ids[j])
        if e < 0:
            return j, idle
        idle += node[e].refs == 0
    return most, idle


@inner
def hold(me, node, table, ids, count):
    """Hold the first `count` chunks, which are in memory."""
    for j in range(count):
        e = find(node, table, ids[j])
        if node[e].refs == 0:
            after = node[e].after
            _unlink(node, e)
            _merge(me, node, after)
            me.free -= node[e].blocks
        node[e].refs += 1


@inner
def publish(me, node, table, ids, shared, covered, per_chunk):
    """Make a sequence's own chunks from `shared` up to `covered` findable; returns how many it shares now.

    Stops at a chunk that is in memory already: two copies exist then, and this one stays the sequence's own.
    """
    while shared < covered and find(node, table, ids[shared]) < 0:
        _enter(node, table, _new(me, node, ids[shared], per_chunk, 1))
        shared += 1
    return shared


@inner
def release(me, node, table, ids, shared, own, tag, caching):
    """Let go of the first `shared` chunks and of `own` blocks; returns the node of the run with the tag, or −1."""
    run = -1
    if not caching:
        me.free += own
        me.empty += own
        return run
    if own > 0:
        me.free += own
        run = _new(me, node, tag, own, -1)
        _append(node, run)
        _merge(me, node, run)
    for j in range(shared - 1, -1, -1):
        e = find(node, table, ids[j])
        node[e].refs -= 1
        if node[e].refs == 0:
            _append(node, e)
            me.free += node[e].blocks
    return run


@inner
def left_of(node, run, tag):
    """How many blocks of a preempted sequence's own run are still there."""
    return node[run].blocks if run >= 0 and node[run].refs == -1 and node[run].id == tag else 0


@inner
def reclaim(me, node, run, blocks):
    """Take the first `blocks` of a run back; what is left of it will never be read again."""
    node[run].id = -1
    node[run].blocks -= blocks
    me.free -= blocks
    after = node[run].after
    if node[run].blocks == 0:
        _unlink(node, run)
        _scrap(me, node, run)
    else:
        _merge(me, node, run)
    _merge(me, node, after)


@compiled
def out_of_order(seen, offsets, ids):
    """The first (row, place) where an id does not stand where it stood before; (−1, −1) if there is none.

    `seen` is a table of (id, place, id before) with more rows than there are ids, a power of two; place −1: empty.
    """
    last = seen.shape[0] - 1
    for row in range(offsets.size - 1):
        before = np.int64(-1)
        for j in range(offsets[row], offsets[row + 1]):
            place = j - offsets[row]
            mixed = np.uint64(ids[j]) * np.uint64(0x9E3779B97F4A7C15)
            at = np.int64(mixed >> np.uint64(32)) & last
            while seen[at, 1] >= 0 and seen[at, 0] != ids[j]:
                at = (at + 1) & last
            if seen[at, 1] < 0:
                seen[at, 0], seen[at, 1], seen[at, 2] = ids[j], place, before
            elif seen[at, 1] != place or (place > 0 and seen[at, 2] != before):
                return row, place
            before = ids[j]
    return -1, -1
