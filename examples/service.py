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
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for batch in range(BATCHES):
            questions = [f"Question {k}" for k in range(batch * BATCH, (batch + 1) * BATCH)]
            uses = Counter(pool.map(lambda question: ask(client, question), questions))
            budget: Any = client.get("/budgets", cast_to=object)
            spent, left, price = (budget[k] for k in ("spent_usd", "remaining_usd", "multiplier"))
            answered = ", ".join(f"{n} {use.removeprefix('simulated-')}" for use, n in uses.most_common())
            print(f"{spent:10.6f}{left:12.6f}{1 + price:20,.2f}   {answered}", flush=True)
            if all(use.startswith("none") for use in uses):
                break
    print(
        "What is under way counts as spent while a request is decided, so cheaper models win a little earlier."
    )


def ask(client: OpenAI, question: str) -> str:
    """One request and, as a user would, a word on its answer; what answered, or why nothing did."""
    try:
        got = client.chat.completions.with_raw_response.create(
            model="auto", messages=[{"role": "user", "content": question}], max_tokens=WORDS
        )
    except APIStatusError as error:
        return f"none ({error.status_code} {error.code})"
    use = got.headers["x-walras-use"]
    simulated = next(m for m in MODELS if m.name == use)
    right = Random(question).random() < quality(simulated, question)
    client.post(
        "/outcomes", cast_to=object, body={"request_id": got.headers["x-request-id"], "quality": float(right)}
    )
    return use


if __name__ == "__main__":
    main(Path(sys.argv[1]))
