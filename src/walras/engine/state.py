"""The state of a replay as plain arrays: a snapshot is a copy, and a branch goes on from it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

NOTHING, DECODING, MIXED = 0, 1, 2
"""What a worker does until its `end`: nothing, k steps that only decode, or one step that also prefills."""
CALL, TRANSFER = 0, 1
"""What becomes due at a later time: a session's next call (a row), or the end of a KV transfer (a slot)."""
DONE, LOG_FULL, SAMPLES_FULL, SLOTS_FULL = 0, 1, 2, 3
"""Why a replay stops: nothing left to do by the asked time, or room is needed."""
AS_THEY_COME, SHORTEST, PRICED, BY_TENANT = 0, 1, 2, 3
"""Who of those in line goes first."""

SETUP = np.dtype(
    [
        ("block", np.int64),  # tokens of a KV block
        ("prefix", np.int64),  # tokens of a chunk that one prefix id names
        ("per_chunk", np.int64),  # blocks of it
        ("blocks", np.int64),  # of a worker's memory
        ("budget", np.int64),  # most new tokens in a step
        ("most", np.int64),  # most sequences in a step
        ("chunked", np.bool_),
        ("caching", np.bool_),
        ("reserve", np.bool_),  # admit only what fits whole
        ("ahead", np.bool_),  # a step is composed while the one before it runs
        ("by_turns", np.bool_),  # round-robin
        ("by_prefix", np.bool_),  # routing looks at what is in memory
        ("verified", np.int64),  # new tokens of a decoding sequence in a step: 1 and its drafts
        ("rate", np.int64),  # a decoding sequence emits rate / unit tokens a step
        ("unit", np.int64),
        ("drafting", np.float64),  # seconds of drafting per second of a step that only decodes
        ("overhead_s", np.float64),
        ("pair_s", np.float64),
        ("workers", np.int64),
        ("prefilling", np.int64),  # workers that only prefill; 0: all do both
        ("transfer_s", np.float64),
        ("transfer_token_s", np.float64),
        ("order", np.int64),  # who of those in line goes first
        ("admission", np.bool_),  # what is not worth what it takes is turned away
        ("aging", np.float64),  # rank gained by a second in line
        ("prompt_weight", np.float64),  # of a prompt token in a tenant's count of service
        ("answer_weight", np.float64),
    ],
    align=True,
)
CLOCK = np.dtype(
    [
        ("now", np.float64),
        ("sample", np.float64),  # when the next sample is due
        ("interval", np.float64),
        ("intervals", np.int64),  # passed
        ("next", np.int64),  # place of the next arrival
        ("spare", np.int64),  # first slot of the spare ones
        ("live", np.int64),
        ("due", np.int64),  # entries of the heap of what is due later
        ("ticket", np.int64),
        ("turn", np.int64, (2,)),  # of round-robin: over the workers that prefill, over those that decode
        ("logged", np.int64),
        ("sampled", np.int64),
    ],
    align=True,
)
WORKER = np.dtype(
    [
        ("start", np.float64),
        ("end", np.float64),  # ∞ where nothing is planned
        ("kind", np.int64),
        ("steps", np.int64),  # planned until `end`
        ("seen", np.float64),  # when the last step began
        ("fixed_s", np.float64),  # a step that only decodes takes fixed_s + kv_s · KV tokens
        ("kv_s", np.float64),
        ("done", np.int64),  # steps with decoding sequences so far
        ("taken", np.int64),  # the token count up to which a run's blocks are taken
        ("n", np.int64),  # decoding sequences
        ("kv", np.int64),  # KV tokens they hold
        ("running", np.int64),
        ("first", np.int64),  # of the running, in order of admission; −1: none
        ("last", np.int64),
        ("partial", np.int64),  # the sequence whose prompt is not done after this step; −1: none
        ("prompts", np.int64),  # prompts that this step ends
        ("waiting", np.int64),
        ("head", np.int64),
        ("tail", np.int64),
        ("held", np.int64),  # finished, with their blocks not yet given back
        ("held_first", np.int64),
        ("held_last", np.int64),
        ("free", np.int64),
        ("empty", np.int64),
        ("spare", np.int64),
        ("link", np.float64),  # when the link to the decoding workers is free
        ("closed", np.bool_),
        ("hand_on", np.bool_),  # a branch asks: what waits goes elsewhere
        ("out", np.int64),  # a branch asks: so many free blocks go
        ("in_flight", np.int64),
        ("pending", np.int64),  # prompt tokens sent here and not yet computed, as routing saw them
        ("promised", np.int64),  # blocks of the prompts in flight here, as routing saw them
        ("output_tokens", np.int64),
        ("prompt_tokens", np.int64),
        ("hit_tokens", np.int64),
        ("preemptions", np.int64),
        ("finished", np.int64),
        ("left", np.int64),  # the tenant that was last to leave the line
    ],
    align=True,
)
SLOT = np.dtype(
    [
        ("row", np.int64),  # −1: spare
        ("worker", np.int64),
        ("before", np.int64),
        ("after", np.int64),
        ("order", np.int64),  # of admission
        ("lead", np.int64),  # KV tokens less the worker's token count
        ("finish", np.int64),  # the worker's token count at which it ends
        ("generated", np.int64),
        ("computed", np.int64),
        ("goal", np.int64),
        ("shared", np.int64),
        ("run", np.int64),  # what a preempted sequence left in memory
        ("tag", np.int64),
        ("whole", np.int64),  # full blocks of it
        ("hit", np.int64),
        ("preemptions", np.int64),
        ("ready", np.bool_),  # its KV came from another worker
        ("arrived", np.float64),
        ("queued", np.float64),  # when it came in line
        ("started", np.float64),
        ("first", np.float64),
        ("pending", np.int64),
        ("promised", np.int64),
        ("target", np.int64),  # the worker its KV goes to
        ("origin", np.int64),  # the worker its KV came from
        ("rank", np.float64),  # place in line: the least goes first, −∞ after a preemption
        ("work_s", np.float64),  # of the engine, as expected on arrival
    ],
    align=True,
)
ROW = np.dtype(
    [
        ("arrival", np.float64),
        ("weight", np.float64),
        ("input", np.int64),
        ("output", np.int64),
        ("begin", np.int64),  # of its prefix ids
        ("end", np.int64),
        ("child", np.int64),  # first call that follows this row; −1: none
        ("sibling", np.int64),  # next one that follows the same row
        ("number", np.int64),  # place in all that was fed
        ("tenant", np.int64),
        ("value", np.float64),
        ("expected", np.float64),  # output tokens
    ],
    align=True,
)
TENANT = np.dtype(
    [
        ("service", np.float64),  # weighted tokens, up to the worker's token count `counted`
        ("counted", np.int64),
        ("decoding", np.int64),  # its sequences
        ("waiting", np.int64),
    ],
    align=True,
)
BATCH = np.dtype([(key, np.float64) for key in ("decode", "decode_kv", "mixed", "mixed_kv")], align=True)
LATER = np.dtype(
    [("time", np.float64), ("ticket", np.int64), ("what", np.int64), ("who", np.int64)], align=True
)
FINISH = np.dtype([("key", np.int64), ("slot", np.int64)], align=True)
SERVED = np.dtype(
    [
        ("request", np.int64),
        ("arrival_s", np.float64),
        ("queue_s", np.float64),
        ("ttft_s", np.float64),
        ("tpot_s", np.float64),
        ("end_s", np.float64),
        ("delay_price", np.float64),
        ("cached_tokens", np.int64),
        ("preemptions", np.int32),
        ("worker", np.int32),
        ("prefill_worker", np.int32),
    ],
    align=True,
)
SAMPLE = np.dtype(
    [
        ("running", np.int64),
        ("waiting", np.int64),
        ("kv_blocks", np.int64),
        ("output_tokens", np.int64),
        ("prompt_tokens", np.int64),
        ("hit_tokens", np.int64),
        ("preemptions", np.int64),
        ("finished", np.int64),
    ],
    align=True,
)


class Columns(NamedTuple):
    """The requests a replay still needs; never written to, so branches share them."""

    rows: Any  # of ROW
    ids: Any  # prefix ids of all rows
    open: Any  # rows that arrive by themselves, in order


class Tables(NamedTuple):
    """Step times, routing weights and what requests take; never written to."""

    dense: Any
    batch: Any  # of BATCH, by decoding sequences
    routing: Any
    takes: Any


class State(NamedTuple):
    """Everything a replay changes."""

    clock: Any
    workers: Any
    slots: Any
    nodes: Any
    table: Any
    finish: Any
    phase: Any
    prompts: Any
    later: Any
    tree: Any
    tenants: Any  # of TENANT, by worker

    def copy(self) -> State:
        return State(*(array.copy() for array in self))
