"""The process that finds prices, apart from the one that serves: the solver is large, and must not make requests wait.

python -m walras.gateway.clearer      # one JSON line in for each clearing, one JSON line out
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from walras.errors import InfeasibleError, NotCleared
from walras.gateway.board import Board, Standing
from walras.gateway.logs import event
from walras.gateway.offers import CONGESTION, Asked, Experience, Known, tasks_of, uses_of
from walras.prices import Prices
from walras.settings import Economy
from walras.supply.engines import Load

LINE = 64 * 1024 * 1024
"""Longest line between the two processes, bytes."""


def clear(
    economy: Economy,
    asked: Sequence[Asked],
    known: Known,
    start: Sequence[float],
    loads: Mapping[str, Load] | None = None,
) -> dict[str, Any]:
    """Prices of the settings' limits over these requests, with their certificate; or the problem. A request to which no model is
    open was refused whatever the prices, and has no part in them. What it adds to the delay of others is charged as it is live."""
    from walras.market.shadow import discover  # noqa: PLC0415 - the serving process imports this module, not the solver

    open_to = uses_of(economy, asked, known).allowed.any(axis=1)
    asked = [asked[k] for k in np.flatnonzero(open_to).tolist()]
    if not asked:
        return {"problem": "no model is open to any of the latest requests"}
    rows, congestion = economy.constraints({}), ((CONGESTION, 1.0),) if loads else ()
    try:
        found = discover(
            tasks_of(economy, asked),
            uses_of(economy, asked, known, loads or None),
            rows,
            defer=economy.defer,
            declared=(*economy.declared(), *congestion),
            start=np.array(start) if len(start) == len(rows) and rows else None,
        )
    except (InfeasibleError, NotCleared) as error:
        return {"problem": str(error)}
    c = found.certificate
    certificate = {
        name: getattr(c, name) for name in ("objective", "dual", "gap", "max_violation", "slackness")
    }
    prices = replace(found.prices, declared=economy.declared())
    return {"prices": prices.to_json(), "certificate": certificate}


def main() -> None:
    """Serve clearings on standard input until it ends, be it within a line: the service may be killed."""
    first = sys.stdin.readline()
    if not first.endswith("\n"):
        return
    economy = Economy.model_validate_json(first)
    for line in sys.stdin:
        if not line.endswith("\n"):
            return
        wanted = json.loads(line)
        asked = [Asked(*row) for row in wanted["asked"]]
        known = {(model, c): Experience(*row) for model, c, row in wanted["known"]}
        loads = {model: Load(*load) for model, load in wanted["loads"].items()}
        answer = json.dumps(clear(economy, asked, known, wanted["start"], loads))
        try:
            sys.stdout.write(answer + "\n")
            sys.stdout.flush()
        except BrokenPipeError:  # the service was killed; Python would complain at its own end, too
            os._exit(0)


class Clearer:
    """The serving side: asks for new prices every few seconds, and posts what is certified."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._process: asyncio.subprocess.Process | None = None

    async def run(self) -> None:
        """Clear for ever. A process that dies is started again; its failure is shown on the board."""
        while True:
            await asyncio.sleep(self._board.economy.gateway.reclear_s)
            try:
                await self.once()
            except (OSError, ValueError, EOFError) as error:
                await self.stop()
                self._complain(f"prices could not be found again: {error}")

    def _complain(self, problem: str) -> None:
        """The prices before still hold, and it is shown why."""
        standing = self._board.standing
        if problem != standing.problem:
            event(logging.getLogger("walras.gateway"), logging.WARNING, "prices not found", problem=problem)
        self._board.post(replace(standing, problem=problem))

    async def once(self) -> None:
        """One clearing, if there is anything to clear."""
        board = self._board
        asked, known = board.latest()
        if not asked:
            return
        process = self._process or await self._start()
        before = board.standing
        question = {
            "asked": [(a.value, a.tokens, a.tenant, a.task_class, a.kind) for a in asked],
            "known": [(model, c, list(asdict(e).values())) for (model, c), e in known.items()],
            "start": [p.multiplier for p in before.prices.discovered],
            "loads": board.loads,
        }
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(question).encode() + b"\n")
        await process.stdin.drain()
        line = await process.stdout.readline()
        if not line:
            raise EOFError("the clearing process ended")
        answer = json.loads(line)
        if "problem" in answer:
            self._complain(answer["problem"])
            return
        prices = Prices.from_json(answer["prices"])
        now = board.clock()
        board.post(Standing(before.version + 1, prices, answer["certificate"], now, len(asked), None))

    async def _start(self) -> asyncio.subprocess.Process:
        self._process = process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "walras.gateway.clearer",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=LINE,
        )
        assert process.stdin is not None
        process.stdin.write(self._board.economy.model_dump_json().encode() + b"\n")
        return process

    async def stop(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.kill()
            await process.wait()


if __name__ == "__main__":
    main()
