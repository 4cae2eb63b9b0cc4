"""The commands of the simulated engine: replay, profiles."""

from __future__ import annotations

import math
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import typer
from rich.text import Text

from walras import console
from walras.diagnosis.contract import to_json
from walras.diagnosis.serving import (
    Engine,
    Played,
    Sweep,
    Traffic,
    Worth,
    interval_of,
    play,
    sweep,
    warm_up,
    worth,
)
from walras.diagnosis.serving_report import (
    Report,
    profile_data,
    profiles_screen,
    replay_data,
    replay_screen,
)
from walras.engine.profiles import load_profile, shipped
from walras.engine.replay import Replay
from walras.engine.settings import Order
from walras.errors import RecordError, SettingsError
from walras.replay_options import (
    ACCEPTANCE,
    BLOCK_TOKENS,
    DRAFT_COST,
    KV_BYTES,
    LENGTHS,
    LINK_BYTES_PER_S,
    PROFILE,
    REQUESTS,
    SPECS,
    EngineOptions,
    generated_traffic,
    read_engine,
    read_traffic,
)
from walras.settings import Economy, load_economy
from walras.simulate.engine_metrics import As, Exporter, serving
from walras.supply.names import ENGINES

SCRAPE_S = 0.1
"""Seconds of an interval of a replay that is served: how old its counters are at most."""
WRITERS: dict[str, Callable[[Path, pa.Schema], Any]] = {
    ".parquet": pyarrow.parquet.ParquetWriter,
    ".csv": pyarrow.csv.CSVWriter,
}

Sink = Callable[[pa.Table], None]
Trace = Annotated[
    Path | None,
    typer.Argument(help="Requests: arrivals, prompt and answer lengths, .parquet, .csv or .jsonl; or a log"),
]
Generate = Annotated[str | None, typer.Option(help=f"Instead of TRACE: {', '.join(SPECS.values())}")]
LengthsOf = Annotated[
    str | None,
    typer.Option("--lengths", help=f"Of --generate: lognormal:PROMPT:ANSWER[:CV], or a trace ({LENGTHS})"),
]
RoutingName = Annotated[
    Literal["round-robin", "least-loaded", "kv", "priced"], typer.Option(help="How requests find a worker")
]
ScheduleName = Annotated[
    Order,
    typer.Option(help="Who goes first in line: priced is by delay saved for what it takes, at live prices"),
]
Rate = Annotated[float, typer.Option(help="Let requests arrive so many times as fast")]
OfModel = Annotated[str | None, typer.Option(help="Of a log: the model whose rows are meant")]
SessionEvery = Annotated[
    float, typer.Option(help="Of a trace of sessions: seconds between their starts", min=0)
]
ProfileName = Annotated[
    str, typer.Option(help="Step times: a name from `walras profiles`, or a file of measured steps")
]
KvBytes = Annotated[float, typer.Option(help="KV bytes per token that go from prefill to decode", min=0)]
SettingsFile = Annotated[Path | None, typer.Option(help="Settings file, economy.toml: λ₀ puts prices in USD")]
Lambda0 = Annotated[float | None, typer.Option(help=Economy.model_fields["lambda0"].description)]
Json = Annotated[bool, typer.Option("--json", help="Print plain data instead of tables")]
Table = Annotated[
    Path | None, typer.Option("--output", "-o", help="Also write a row for each request: .parquet or .csv")
]
IntervalTable = Annotated[
    Path | None, typer.Option("--intervals", help="Also write a row for each interval: .parquet or .csv")
]


def replay(
    trace: Trace = None,
    generate: Generate = None,
    lengths: LengthsOf = None,
    requests: Annotated[
        int | None, typer.Option(help=f"Only so many, from the first (of --generate {REQUESTS:,})", min=1)
    ] = None,
    rate: Rate = 1.0,
    model: OfModel = None,
    session_every: SessionEvery = 60.0,
    profile: ProfileName = PROFILE,
    workers: Annotated[int | None, typer.Option(help="Replicas, all alike (1)", min=1)] = None,
    prefill_workers: Annotated[int | None, typer.Option(help="Replicas that only prefill", min=1)] = None,
    decode_workers: Annotated[int | None, typer.Option(help="Replicas that only decode", min=1)] = None,
    routing: RoutingName = "round-robin",
    schedule: ScheduleName = "fcfs",
    admission: Annotated[
        bool,
        typer.Option(
            "--admission", help="Turn away what is worth less than its delay and what it costs others"
        ),
    ] = False,
    kv_blocks: Annotated[
        int | None, typer.Option(help="KV blocks of a replica, else the profile's", min=1)
    ] = None,
    block_tokens: Annotated[int, typer.Option(help="Tokens of a KV block", min=1)] = BLOCK_TOKENS,
    max_batched_tokens: Annotated[
        int | None, typer.Option(help="New tokens in a step, else the profile's", min=1)
    ] = None,
    max_sequences: Annotated[
        int | None, typer.Option(help="Sequences a replica runs at once, else the profile's", min=1)
    ] = None,
    chunked_prefill: Annotated[bool, typer.Option(help="Split long prompts over steps")] = True,
    prefix_caching: Annotated[
        bool, typer.Option(help="Keep prompts in memory for those that begin alike")
    ] = True,
    kv_bytes: KvBytes = KV_BYTES,
    link_bytes_per_s: Annotated[
        float, typer.Option(help="Bytes per second of a prefilling replica's link", min=1)
    ] = LINK_BYTES_PER_S,
    drafts: Annotated[
        int | None, typer.Option(help="Speculative decoding: tokens drafted in a step", min=1)
    ] = None,
    acceptance: Annotated[
        float, typer.Option(help="Probability that a drafted token is right", min=0, max=1)
    ] = ACCEPTANCE,
    draft_cost: Annotated[
        float, typer.Option(help="Seconds to draft a token, per second of a step", min=0)
    ] = DRAFT_COST,
    settings: SettingsFile = None,
    lambda0: Lambda0 = None,
    probes: Annotated[
        int, typer.Option(help="Times at which resources are priced; 0: not at all", min=0)
    ] = 64,
    horizon: Annotated[float, typer.Option(help="Seconds that each of them looks ahead", min=0.001)] = 60.0,
    interval: Annotated[
        float | None,
        typer.Option(help="Seconds of an interval; about a thousandth of the trace if not given"),
    ] = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Also find latency at other rates, and the knee")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of generated load and of probes", min=0)] = 0,
    output: Table = None,
    intervals: IntervalTable = None,
    json: Json = False,
    html: Annotated[
        Path | None, typer.Option(help="Also write a self-contained HTML report, with the sweep")
    ] = None,
    serve: Annotated[
        int | None,
        typer.Option(
            help="No report: be a SIMULATED engine, with metrics at this port; 0: a free one",
            min=0,
            max=65535,
        ),
    ] = None,
    as_: Annotated[As, typer.Option("--as", help="Of --serve: whose names the metrics have")] = "vllm",
    speed: Annotated[
        float, typer.Option(help="Of --serve: let time pass so many times as fast", min=0.001)
    ] = 1.0,
) -> None:
    """SIMULATED: what requests would wait for in an engine, and which of its resources is short."""
    for path, key in ((output, "--output"), (intervals, "--intervals")):
        _check_table(path, key)
    if html is not None:
        console.check_writable(html)
    if not (math.isfinite(rate) and rate > 0):
        raise SettingsError(f"{rate:g} times as fast", key="--rate", hint="more than 0")
    price = load_economy(settings, {"lambda0": lambda0}).lambda0
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
            price=price,
            seed=seed,
            order=schedule,
            admission=admission,
        )
        options = EngineOptions(
            profile=profile,
            routing=routing,
            workers=workers,
            prefill_workers=prefill_workers,
            decode_workers=decode_workers,
            kv_blocks=kv_blocks,
            block_tokens=block_tokens,
            max_batched_tokens=max_batched_tokens,
            max_sequences=max_sequences,
            chunked_prefill=chunked_prefill,
            prefix_caching=prefix_caching,
            kv_bytes=kv_bytes,
            link_bytes_per_s=link_bytes_per_s,
            drafts=drafts,
            acceptance=acceptance,
            draft_cost=draft_cost,
            schedule=schedule,
            admission=admission,
        )
        engine = read_engine(options, traffic.prefix_tokens)
    if serve is not None:
        _serve(engine, traffic, as_, serve, speed)
        return
    with console.steps() as on_step:
        played = _play(engine, traffic, interval_of(traffic, interval), output, on_step)
        if intervals is not None and played.timeline is not None:
            with _writing(intervals) as write:
                write(played.timeline.table())
        found = Report(
            traffic=traffic,
            engine=engine,
            played=played,
            worth=_worth(engine, traffic, played, probes, horizon, seed, on_step),
            sweep=_sweep(engine, traffic, played, on_step) if sweep or html else None,
        )
    if html is not None:
        from walras.diagnosis.html import write_replay  # noqa: PLC0415 - plotly takes a second to import

        write_replay(found, html)
    if json:
        console.show(to_json(replay_data(found)))
        return
    console.show(replay_screen(found))
    if html is not None:
        console.show(Text(f"Report: {html}", style="green"))


def profiles(json: Json = False) -> None:
    """Step times that come with Walras: of which model and GPU, measured by whom, and how far off they are."""
    found = [load_profile(name) for name in shipped()]
    if json:
        console.show(to_json({"profiles": [profile_data(profile) for profile in found]}))
        return
    console.show(profiles_screen(found))


def named_traffic(
    trace: Path | None,
    generate: str | None,
    lengths: str | None,
    *,
    model: str | None,
    every_s: float,
    speed: float,
    most: int | None,
    price: float | None,
    seed: int,
    order: Order = "fcfs",
    admission: bool = False,
) -> Traffic:
    """The requests that the options name."""
    if trace is not None and generate is None:
        if lengths is not None:
            raise SettingsError("is for --generate; a trace has its own", key="--lengths")
        return read_traffic(
            trace,
            model=model,
            session_every_s=every_s,
            speed=speed,
            most=most,
            price=price,
            order=order,
            admission=admission,
        )
    if generate is not None and trace is None:
        if order == "vtc" or admission:
            missing = "a value, for --admission" if admission else "a tenant, for --schedule vtc"
            raise SettingsError(
                f"no request has {missing}", key="--generate", hint="a trace with that column"
            )
        return generated_traffic(generate, lengths, speed=speed, most=most, price=price, seed=seed)
    raise SettingsError("give one of the two", key="TRACE or --generate")


# --- the work -----------------------------------------------------------------------------------------------------------


def _play(
    engine: Engine, traffic: Traffic, interval_s: float, output: Path | None, on_step: Callable[[str], None]
) -> Played:
    on_step("compiling the engine; the first time takes a minute")
    warm_up(engine)
    done = 0

    def on_requests(more: int) -> None:
        nonlocal done
        done += more
        on_step(f"replaying: {done:,} requests")

    with nullcontext() if output is None else _writing(output) as sink:
        return play(engine, traffic, interval_s=interval_s, sink=sink, on_requests=on_requests)


def _worth(
    engine: Engine,
    traffic: Traffic,
    played: Played,
    probes: int,
    horizon_s: float,
    seed: int,
    on_step: Callable[[str], None],
) -> Worth | None:
    if not probes:
        return None
    on_step(f"pricing resources at {probes} times")
    return worth(engine, traffic, played, probes, horizon_s, seed)


def _sweep(engine: Engine, traffic: Traffic, played: Played, on_step: Callable[[str], None]) -> Sweep | None:
    if not played.last_arrival_s:
        console.say("all requests arrive at once: there is no rate to vary")
        return None
    return sweep(engine, traffic, lambda factor: on_step(f"load against latency: {factor:g}× the rate"))


def _serve(engine: Engine, traffic: Traffic, kind: As, port: int, speed: float) -> None:
    """All of the traffic behind an engine's metrics, until it is interrupted; what has come to its end stays idle."""
    replay = Replay(engine.settings, engine.steps, engine.routing, interval_s=SCRAPE_S)
    exporter = Exporter(replay, kind)
    with console.steps() as on_step:
        on_step("compiling the engine; the first time takes a minute")
        warm_up(engine)
        try:
            for piece in traffic:
                replay.feed(piece)
        except RecordError as error:
            raise traffic.in_file(error) from error
    begin = time.monotonic()
    with serving(exporter, kind, port, lambda: (time.monotonic() - begin) * speed) as url:
        console.say(f"SIMULATED {ENGINES[kind].title}: {url}")
        threading.Event().wait()


# --- tables -------------------------------------------------------------------------------------------------------------


def _check_table(path: Path | None, key: str) -> None:
    if path is None:
        return
    if path.suffix.lower() not in WRITERS:
        raise SettingsError(f"'{path.name}' is no {' or '.join(WRITERS)}", key=key)
    console.check_writable(path)


@contextmanager
def _writing(path: Path) -> Iterator[Sink]:
    """Write tables of one schema to a file, whole or not at all."""
    # In the same folder, because a rename is atomic only inside one file system.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    writer: Any = None

    def write(table: pa.Table) -> None:
        nonlocal writer
        if writer is None:
            writer = WRITERS[path.suffix.lower()](partial, table.schema)
        writer.write_table(table)

    try:
        with console.writing(path):
            try:
                yield write
            finally:
                if writer is not None:
                    writer.close()
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
