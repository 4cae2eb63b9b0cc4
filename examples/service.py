"""The service in half a minute, with SIMULATED providers:  python examples/service.py demo/service

Starts `walras serve` without settings, gives a tenant seven and a half cents, and spends them with OpenAI's own client. As the budget runs
short the price of its money rises, and cheaper models win. Then the books are checked, and the ledger is audited as any log.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

from openai import APIStatusError, OpenAI

from walras.gateway.simulated import MODELS, quality

WALRAS = str(Path(sys.executable).with_name("walras"))
BUDGET_USD = "0.075"
BATCH, BATCHES, AT_ONCE = 12, 16, 6
WORDS = 60
"""Most tokens of an answer, so that nobody waits for simulated ones."""


def main(folder: Path) -> None:
    """Serve, spend, check, audit."""
    shutil.rmtree(folder, ignore_errors=True)
    with subprocess.Popen(
        [WALRAS, "serve", "--data", folder, "--port", "0", "--ready-json"], stdout=subprocess.PIPE, text=True
    ) as serving:
        try:
            assert serving.stdout is not None
            ready = json.loads(serving.stdout.readline())
            print(f"\nWalras serves at {ready['url']}. SIMULATED: no provider is called, no money is spent.")
            spend(ready["url"], folder)
        finally:
            serving.send_signal(signal.SIGTERM)
    log = f"{folder}.parquet"
    for command in (
        f"ledger verify --data {folder}",
        f"ledger export --data {folder} --output {log}",
        f"audit {log}",
    ):
        print(f"\n$ walras {command}", flush=True)
        subprocess.run([WALRAS, *command.split()], check=True)


def spend(url: str, folder: Path) -> None:
    """Batches of requests until the money is gone; after each, what money is worth now."""
    options = ("--tenant", "demo", "--budget-usd", BUDGET_USD, "--period", "none", "--json")
    made = subprocess.run(
        [WALRAS, "keys", "create", "--data", folder, *options], stdout=subprocess.PIPE, check=True
    )
    client = OpenAI(base_url=f"{url}/v1", api_key=json.loads(made.stdout)["key"], max_retries=0)
    print(
        f"OpenAI's client asks for 'auto', {BATCH} requests at a time; the key has {BUDGET_USD} USD for all of them.\n"
    )
    print(f"{'spent':>10}{'left':>12}{'price of a dollar':>20}   what answered")
    answered: list[tuple[str, str, str]] = []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for batch in range(BATCHES):
            questions = [f"Question {k}" for k in range(batch * BATCH, (batch + 1) * BATCH)]
            got = list(pool.map(lambda question: ask(client, question), questions))
            answered += [(q, use, name) for q, (use, name) in zip(questions, got, strict=True) if name]
            budget: Any = client.get("/budgets", cast_to=object)
            spent, left, price = (budget[k] for k in ("spent_usd", "remaining_usd", "multiplier"))
            uses = Counter(use.removeprefix("simulated-") for use, _ in got)
            said = ", ".join(f"{n} {use}" for use, n in uses.most_common())
            print(f"{spent:10.6f}{left:12.6f}{1 + price:20,.2f}   {said}", flush=True)
            if not any(name for _, name in got):
                break
        list(pool.map(lambda one: judge(client, *one), answered))
    print(f"\nThen users said how good the {len(answered)} answers were.")


def ask(client: OpenAI, question: str) -> tuple[str, str]:
    """What answered, and the request's id; or why nothing did, and ""."""
    try:
        got = client.chat.completions.with_raw_response.create(
            model="auto", messages=[{"role": "user", "content": question}], max_tokens=WORDS
        )
    except APIStatusError as error:
        return f"none ({error.status_code} {error.code})", ""
    return got.headers["x-walras-use"], got.headers["x-request-id"]


def judge(client: OpenAI, question: str, use: str, request_id: str) -> None:
    """What a user, or a test, says of an answer later; SIMULATED as well."""
    right = Random(question).random() < quality(next(m for m in MODELS if m.name == use), question)
    client.post("/outcomes", cast_to=object, body={"request_id": request_id, "quality": float(right)})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
