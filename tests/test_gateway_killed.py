"""kill -9 of the running service, again and again, with its default ledger: what a client was told is kept, and money stays exact.

WALRAS_LIVES=100 lets it die a hundred times.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from crowds import STEP_NANO, Crowd, audit, settings
from gateways import WALRAS, Service, start
from walras.ledger import open_store, usd
from walras.ledger.journal import left

LIVES = int(os.environ.get("WALRAS_LIVES", "12"))
CLIENTS = 16
BUDGET_NANO = 100_000 * LIVES
"""Of a quarter of the clients, which spend it before the last life."""


def walras(*arguments: str) -> str:
    done = subprocess.run([WALRAS, *arguments], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


async def live_and_die(service: Service, keys: list[str], crowd: Crowd, seconds: float) -> None:
    """The rest of a life of the service, with all its clients."""
    ends = asyncio.Event()
    own = [keys[k % 4 == 0] for k in range(CLIENTS)]
    clients = [asyncio.create_task(crowd.calls(service, key, ends)) for key in own]
    await asyncio.sleep(seconds)
    service.kill()
    ends.set()
    await asyncio.gather(*clients)


def look(path: Path, crowd: Crowd) -> None:
    """As the service died, before anybody has started it again."""
    store = open_store(path, read_only=True)
    try:
        audit(store, crowd.acknowledged)
    finally:
        store.stop()


def test_kill_9_again_and_again_loses_nothing_that_was_acknowledged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng, crowd = random.Random(), Crowd()
    path, journal = tmp_path / "data" / "ledger.sqlite", tmp_path / "data" / "ledger.sqlite-ahead"
    ahead = list[int]()

    async def lives() -> None:
        async with settings() as toml:
            command: list[str] = []
            while len(ahead) < LIVES or not ahead[-1]:
                service = start(tmp_path, None if command else toml, command=command)
                if not command:
                    command = service.command()
                    keys = [
                        service.make_key("wide"),
                        service.make_key("short", budget_nano=BUDGET_NANO, period="none"),
                    ]
                await live_and_die(service, keys, crowd, rng.uniform(0.05, 0.6))
                assert "Traceback" not in service.log.read_text()
                ahead.append(len(left(journal)))
                if len(ahead) % 3 == 1 and len(ahead) < LIVES:
                    look(path, crowd)

    asyncio.run(lives())
    assert len(crowd.acknowledged) > 20 * LIVES
    assert sum(ahead) > LIVES, "hardly a death left anything in the journal: this has tried nothing"
    assert crowd.statuses[429] > 0, "the short budget was not spent"
    assert crowd.statuses[0] > LIVES, "hardly an answer was cut off"
    assert set(crowd.statuses) <= {0, 200, 402, 429}, crowd.statuses

    # The command line sees what the journal holds, without a service.
    data = ["--data", str(tmp_path / "data")]
    assert json.loads(walras("ledger", "verify", "--json", *data))["ok"]
    walras("ledger", "export", "--output", str(tmp_path / "all.parquet"), *data)
    rows = pq.read_metadata(tmp_path / "all.parquet").num_rows
    assert rows >= len(crowd.acknowledged)
    look(path, crowd)

    assert start(tmp_path).stop() == 0
    store = open_store(path, read_only=True)
    entries = audit(store, crowd.acknowledged)
    assert store.open_holds() == []
    spent = store.spent(0, key_id=next(e.key_id for e in entries if e.tenant == "short"))
    store.stop()
    assert BUDGET_NANO - 2 * STEP_NANO < spent <= BUDGET_NANO + STEP_NANO, usd(spent)
    unknown = [e for e in entries if e.status == "unknown"]
    assert 0 < len(unknown) <= CLIENTS * len(ahead)
    assert {e.settled for e in unknown} == {"cap"}
    with capsys.disabled():
        print(f"\n{len(ahead)} lives: {len(crowd.acknowledged):,} acknowledged, 0 lost; {sum(ahead):,} records were in the "  # noqa: T201
              f"journal at a death; {len(unknown)} settled at the cap; {spent / BUDGET_NANO:.2%} of the budget spent")  # fmt: skip
