"""The command that says which hardware to buy: capacity."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.text import Text

from walras import console
from walras.diagnosis.capacity import capacity_data, capacity_screen, plan_capacity
from walras.diagnosis.contract import to_json
from walras.diagnosis.serving import warm_up
from walras.engine.settings import Disaggregation
from walras.errors import SettingsError
from walras.replay_commands import (
    Generate,
    Json,
    KvBytes,
    Lambda0,
    LengthsOf,
    OfModel,
    ProfileName,
    Rate,
    RoutingName,
    SessionEvery,
    SettingsFile,
    Trace,
    named_traffic,
)
from walras.replay_options import (
    ACCEPTANCE,
    BLOCK_TOKENS,
    DRAFT_COST,
    KV_BYTES,
    LINK_BYTES_PER_S,
    PROFILE,
    REQUESTS,
    EngineOptions,
    read_engine,
)
from walras.settings import load_economy
from walras.supply.capacity import Shop

UNIT_TOKENS, UNIT_BYTES_PER_S = 65_536, 12.5e9
"""Of KV memory, and of a link: 100 Gbit/s."""
KINDS = {"both": (False, True), "together": (False,), "apart": (True,)}


def capacity(
    budget_usd_h: Annotated[float, typer.Option("--budget-usd-h", help="USD an hour for the whole fleet")],
    worker_usd_h: Annotated[float, typer.Option("--worker-usd-h", help="USD an hour of one replica")],
    trace: Trace = None,
    generate: Generate = None,
    lengths: LengthsOf = None,
    requests: Annotated[int, typer.Option(help="Of the trace, so many from the first", min=40)] = REQUESTS,
    rate: Rate = 1.0,
    model: OfModel = None,
    session_every: SessionEvery = 60.0,
    profile: ProfileName = PROFILE,
    kind: Annotated[
        Literal["both", "together", "apart"],
        typer.Option(help="Prefill and decoding on the same workers, on workers of their own, or the faster"),
    ] = "both",
    routing: RoutingName = "kv",
    kv_usd_h: Annotated[
        float | None,
        typer.Option("--kv-usd-h", help="USD an hour of --kv-tokens more in one replica; else not for sale"),
    ] = None,
    kv_tokens: Annotated[int, typer.Option(help="A unit of KV memory, in tokens", min=1)] = UNIT_TOKENS,
    link_usd_h: Annotated[
        float | None,
        typer.Option(
            "--link-usd-h", help="USD an hour of --link-bytes-per-s more from one replica that prefills"
        ),
    ] = None,
    link_bytes_per_s: Annotated[
        float | None,
        typer.Option(help="A unit of a link; where links are not for sale, its bandwidth", min=1),
    ] = None,
    kv_bytes: KvBytes = KV_BYTES,
    settings: SettingsFile = None,
    lambda0: Lambda0 = None,
    seed: Annotated[int, typer.Option(help="Seed of generated load", min=0)] = 0,
    json: Json = False,
    html: Annotated[Path | None, typer.Option(help="Also write a self-contained HTML report")] = None,
) -> None:
    """SIMULATED: the fastest fleet for a budget, and where the next dollar saves most delay."""
    if html is not None:
        console.check_writable(html)
    for key, number in (("--rate", rate), ("--budget-usd-h", budget_usd_h)):
        if not (math.isfinite(number) and number > 0):
            raise SettingsError(f"{number:g} is not finite and above 0", key=key)
    with console.steps() as on_step:
        on_step("reading")
        traffic = named_traffic(
            trace,
            generate,
            lengths,
            model=model,
            every_s=session_every,
            speed=rate,
            most=requests,
            price=load_economy(settings, {"lambda0": lambda0}).lambda0 or None,
            seed=seed,
        )
        engine = read_engine(_options(profile, routing), traffic.prefix_tokens)
        on_step("compiling the engine; the first time takes a minute")
        warm_up(engine)
        bandwidth = link_bytes_per_s or (UNIT_BYTES_PER_S if link_usd_h else LINK_BYTES_PER_S)
        links = Disaggregation(1, kv_bytes, bandwidth)
        engine = replace(engine, settings=replace(engine.settings, workers=2, disaggregation=links))
        shop = Shop(
            worker_usd_h,
            kv_usd_h,
            max(1, kv_tokens // BLOCK_TOKENS),
            link_usd_h,
            bandwidth,
        )
        found = plan_capacity(
            traffic,
            engine,
            next(iter(traffic)),
            shop,
            budget_usd_h,
            KINDS[kind],
            lambda done: on_step(f"replaying: {done:,} fleets"),
        )
    if html is not None:
        from walras.diagnosis.html import write_capacity  # noqa: PLC0415 - plotly takes a second to import

        write_capacity(found, html)
    if json:
        console.show(to_json(capacity_data(found)))
        return
    console.show(capacity_screen(found))
    if html is not None:
        console.show(Text(f"Report: {html}", style="green"))


def _options(profile: str, routing: str) -> EngineOptions:
    """One worker of the profile; what a fleet has more of is bought."""
    return EngineOptions(
        profile=profile,
        routing=routing,
        workers=None,
        prefill_workers=None,
        decode_workers=None,
        kv_blocks=None,
        block_tokens=BLOCK_TOKENS,
        max_batched_tokens=None,
        max_sequences=None,
        chunked_prefill=True,
        prefix_caching=True,
        kv_bytes=KV_BYTES,
        link_bytes_per_s=LINK_BYTES_PER_S,
        drafts=None,
        acceptance=ACCEPTANCE,
        draft_cost=DRAFT_COST,
    )
