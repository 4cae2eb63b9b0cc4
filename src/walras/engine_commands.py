"""The command of live serving engines: engines."""

from __future__ import annotations

import asyncio
import json as json_module
import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.text import Text

from walras import console
from walras.diagnosis.contract import to_json
from walras.diagnosis.serving_report import cost_text
from walras.diagnosis.terminal import table
from walras.diagnosis.words import count, number, percent
from walras.errors import RecordError, SettingsError
from walras.settings import EngineLink, load_economy
from walras.supply.engines import MTOK, EngineNow, EngineReader, Price, engine_json
from walras.supply.names import ENGINES, engine_of

PER = {
    "prefill token": (MTOK, "a million prompt tokens computed"),
    "decode token": (MTOK, "a million output tokens"),
    "KV block-second": (1.0, "a KV block for a second"),
    "transferred byte": (1e9, "a gigabyte moved"),
    "attention pair": (1e9, "a billion attention pairs"),
    "squared second of the line": (1.0, "a prompt of a second, as a line"),
}
"""What a price is shown for."""


def engines(
    settings: Annotated[
        Path | None, typer.Option(help="Settings file, economy.toml, with tables [engines.NAME]")
    ] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(help=f"URL[,TYPE] besides those of the settings; types: {', '.join(ENGINES)}"),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(help="Step times of engines that have none: a name from `walras profiles`, or a file"),
    ] = None,
    lambda0: Annotated[
        float | None,
        typer.Option(
            help="What a second of others' delay costs, USD; without it prices are in seconds", min=0
        ),
    ] = None,
    interval: Annotated[
        float, typer.Option(help="Seconds between two readings, from which rates are taken", min=0.1)
    ] = 2.0,
    watch: Annotated[bool, typer.Option("--watch", help="Go on until interrupted")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print plain data instead of tables")] = False,
) -> None:
    """Serving engines: their state, and what their resources cost everybody else, with the reason. Exit code 3 if one cannot be read."""
    economy = load_economy(settings, {"lambda0": lambda0})
    links = {
        n: _with_profile(link, profile) for n, link in (dict(economy.engines) | _named(engine or [])).items()
    }
    if not links:
        hint = "http://127.0.0.1:8000, or a table [engines.NAME] in --settings"
        raise SettingsError("there are none to read", key="--engine", hint=hint)
    readers = [EngineReader(name, link) for name, link in links.items()]
    asyncio.run(_read(readers, economy.lambda0, interval, watch, json))


def _named(given: list[str]) -> dict[str, EngineLink]:
    """Engines of the command line, by their addresses."""
    pairs = [one.partition(",") for one in given]
    return {
        url.rpartition("://")[2].rstrip("/"): EngineLink.model_validate(
            {"urls": (url,), "kind": engine_of(kind) if kind else None}
        )
        for url, _, kind in pairs
    }


def _with_profile(link: EngineLink, profile: str | None) -> EngineLink:
    return link if link.profile or profile is None else link.model_copy(update={"profile": profile})


async def _read(
    readers: list[EngineReader], price: float | None, interval: float, watch: bool, json: bool
) -> None:
    """Poll twice, for rates, and show; go on where asked to."""
    await _poll(readers, price)
    while True:
        await asyncio.sleep(interval)
        found = await _poll(readers, price)
        console.show(_data(found, price, watch) if json else _screen(found, price))
        if not watch:
            break
    wrong = [e.engine for e in found if e.problem]
    if wrong:
        raise RecordError(
            f"{count(len(wrong), 'engines')} of {len(found)} cannot be read: {', '.join(wrong)}"
        )


async def _poll(readers: list[EngineReader], price: float | None) -> list[EngineNow]:
    return list(await asyncio.gather(*(r.poll(1.0 if price is None else price) for r in readers)))


def _data(found: list[EngineNow], price: float | None, watch: bool) -> str:
    """One document; one a line where they go on."""
    unit = "seconds of others' delay" if price is None else "USD"
    data: dict[str, Any] = {"engines": [engine_json(e, e.at_s, unit) for e in found]}
    return json_module.dumps(json_module.loads(to_json(data))) if watch else to_json(data)


def _screen(found: list[EngineNow], price: float | None) -> RenderableType:
    parts: list[RenderableType] = [_states(found), _prices(found, "seconds" if price is None else "usd")]
    parts += [Text(f"{e.engine} is SIMULATED", style="bold yellow") for e in found if e.simulated]
    parts += [Text(f"{e.engine}: {note}", style="dim") for e in found for note in e.notes]
    if price is None:
        parts.append(Text("Without --lambda0 prices are seconds of others’ delay.", style="dim"))
    return Group(*parts)


def _states(found: list[EngineNow]) -> RenderableType:
    rows = []
    for e in found:
        what = ENGINES[e.kind].title if e.kind else ""
        age = "never" if e.age_s is None else f"{e.age_s:.1f} s ago"
        for replica, s in e.states.items() or [("", None)]:
            cells = ("",) * 7
            if s is not None:
                cells = (
                    number(s.running),
                    number(s.waiting),
                    percent(s.kv_use),
                    number(s.arrivals_per_s),
                    number(s.prompt_tokens_per_s),
                    number(s.output_tokens_per_s),
                    percent(s.hit_share),
                )
            own = replica if len(e.states) > 1 else ""
            rows.append((escape(e.engine), escape(own), escape(what), *cells, age, escape(e.problem or "")))
    head = ("running", "waiting", "KV use", "arrivals", "prompt", "output", "hits", "read")
    return table("Engines; arrivals and tokens a second", ("engine", "replica", "", *head, ""), rows)


def _prices(found: list[EngineNow], unit: str) -> RenderableType:
    rows: list[tuple[str, ...]] = []
    for e in found:
        if e.age_s is None and len({p.reason for p in e.prices}) == 1:
            rows.append((escape(e.engine), "all", "", "", escape(e.prices[0].reason)))
        else:
            rows += [(escape(e.engine) * (k == 0), *_price(p, unit)) for k, p in enumerate(e.prices)]
    return table("What a use costs the others", ("engine", "", "price", "± error", ""), rows)


def _price(p: Price, unit: str) -> tuple[str, str, str, str]:
    size, name = PER[p.resource]
    error = percent(p.relative_error) if math.isfinite(p.relative_error) and p.usd else ""
    return name, cost_text(p.usd * size, unit), error, escape(p.reason)
