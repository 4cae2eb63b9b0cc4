"""The commands of the service: serve, keys, ledger, check."""

from __future__ import annotations

import asyncio
import json as json_module
import os
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.text import Text

from walras import console
from walras.diagnosis.contract import to_json
from walras.diagnosis.terminal import table
from walras.diagnosis.words import count
from walras.diagnosis.words import usd as dollars
from walras.errors import OutputError, RecordError, SettingsError
from walras.gateway.escrow import PERIODS
from walras.gateway.keys import Key, KeyStore, NewKey
from walras.ledger import Store, open_store, stats, usd, verify
from walras.ledger.money import nano
from walras.ledger.store import LEDGER
from walras.settings import Economy, load_economy

DATA = Path("walras-data")
Data = Annotated[Path, typer.Option("--data", help="Folder of the service's state: keys, ledger")]
LedgerUrl = Annotated[
    str | None,
    typer.Option(
        "--ledger",
        envvar=LEDGER,
        help="postgresql://… in place of the SQLite file in the folder",
        show_envvar=True,
    ),
]
Settings = Annotated[Path | None, typer.Option("--settings", help="Settings file, economy.toml")]
Json = Annotated[bool, typer.Option("--json", help="Print plain data instead of tables")]

SIMULATED = "; SIMULATED: no provider is called"
PER = {"none": " in all"} | {p: f" by {p}" for p in PERIODS if p != "none"}

REFUSED_SHOWN = 10
"""Refused rows that are named where nobody asks for all."""

keys = typer.Typer(help="API keys of the service: who may call, with what budget.", no_args_is_help=True)
ledger = typer.Typer(help="What requests were promised and paid.", no_args_is_help=True)


# --- serve and check ----------------------------------------------------------------------------------------------------


def serve(
    settings: Settings = None,
    data: Data = DATA,
    ledger: LedgerUrl = None,
    menu: Annotated[
        Path | None, typer.Option(help="Menu to serve: what `walras menu --json` printed")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 takes a free one", min=0, max=65535)] = None,
    ready_json: Annotated[
        bool,
        typer.Option("--ready-json", help='Print {"url": …, "key": …} in one line once calls are accepted'),
    ] = False,
) -> None:
    """Serve models in OpenAI's and Anthropic's APIs at live prices. Without settings: SIMULATED providers, to try it."""
    economy = _listening(load_economy(settings, {}), host, port)
    # A process of its own, which loads none of the analysis: a worker stays small.
    what = {
        "economy": economy.model_dump_json(),
        "data": str(data),
        "menu": None if menu is None else str(menu),
        "ready_json": ready_json,
    }
    if ledger is not None:
        os.environ[LEDGER] = ledger
    os.execv(sys.executable, [sys.executable, "-m", "walras.gateway.process", json_module.dumps(what)])


def _listening(economy: Economy, host: str | None, port: int | None) -> Economy:
    given = {k: v for k, v in (("host", host), ("port", port)) if v is not None}
    return economy.model_copy(update={"gateway": economy.gateway.model_copy(update=given)})


def check(settings: Settings = None, json: Json = False) -> None:
    """Are the settings sound, and do the upstreams answer with these keys? Exit code 4 where not."""
    from walras.gateway.serve import build_upstreams, demo_economy  # noqa: PLC0415
    from walras.gateway.simulated import SimulatedTransport  # noqa: PLC0415
    from walras.gateway.transport import HttpTransport  # noqa: PLC0415

    economy = demo_economy(load_economy(settings, {}))

    async def ping() -> list[tuple[str, str, str]]:
        transport = HttpTransport()
        try:
            upstreams = build_upstreams(economy, transport, SimulatedTransport())
            found = await asyncio.gather(*(u.check() for u in upstreams.values()))
            return [
                (name, label, wrong)
                for name, all_ in zip(upstreams, found, strict=True)
                for label, wrong in all_
            ]
        finally:
            await transport.aclose()

    rows = asyncio.run(ping())
    simulated = all(upstream.kind == "simulated" for upstream in economy.upstreams.values())
    if json:
        keys_ = ("upstream", "route", "problem")
        console.show(
            to_json({"upstreams": [dict(zip(keys_, (a, b, c or None), strict=True)) for a, b, c in rows]})
        )
    else:
        console.show(
            table(
                "Upstreams",
                ("upstream", "route", ""),
                [(escape(a), escape(b), escape(c or "answers")) for a, b, c in rows],
            )
        )
        console.say(f"the settings are sound: {count(len(economy.models), 'models')}" + SIMULATED * simulated)
    bad = [f"{a} ({b}): {c}" for a, b, c in rows if c]
    if bad:
        raise SettingsError("; ".join(bad), key="upstreams")


# --- keys ---------------------------------------------------------------------------------------------------------------


def _state(data: Path, file: str, made_by: str) -> Path:
    """A file of the service's state, which must be there."""
    if not (data / file).exists():
        hint = f"{made_by} makes it; --data names its folder"
        raise SettingsError(f"there is no {file}", key=f"--data {data}", hint=hint)
    return data / file


def _store(data: Path) -> KeyStore:
    return KeyStore(_state(data, "keys.sqlite", "`walras serve` or `walras keys create`"))


def _key_data(key: Key) -> dict[str, Any]:
    row = asdict(key)
    budget = row.pop("budget_nano")
    return {**row, "budget_usd": None if budget is None else usd(budget)}


def _new(made: NewKey, json: bool) -> None:
    if json:
        console.show(json_module.dumps({"key": made.secret, **_key_data(made.key)}))
        return
    console.show(made.secret)
    console.say(f"key {made.key.id} of tenant {made.key.tenant}; it is not shown again")


@keys.command()
def create(
    tenant: Annotated[str, typer.Option(help="Who pays")],
    data: Data = DATA,
    scope: Annotated[Literal["tenant", "admin", "read-only"], typer.Option(help="What it may do")] = "tenant",
    budget_usd: Annotated[
        float | None, typer.Option(help="Most USD by period; no limit if not given", min=0)
    ] = None,
    period: Annotated[
        Literal["none", "minute", "hour", "day", "week", "month"],
        typer.Option(help="Period of the budget, in UTC"),
    ] = "day",
    value: Annotated[
        float | None, typer.Option(help="V of requests that do not say, USD per unit of quality")
    ] = None,
    task_class: Annotated[
        str | None, typer.Option("--class", help="Class of requests that do not say")
    ] = None,
    json: Json = False,
) -> None:
    """Make a key. Its secret is printed once and stored nowhere."""
    console.check_folder(data)
    with KeyStore(data / "keys.sqlite") as store:
        made = store.create(
            tenant,
            scope=scope,
            budget_nano=None if budget_usd is None else nano(budget_usd),
            period=period,
            value_usd=value,
            task_class=task_class,
            now_ns=time.time_ns(),
        )
    _new(made, json)


@keys.command("list")
def list_keys(data: Data = DATA, json: Json = False) -> None:
    """All keys, without their secrets."""
    with _store(data) as store:
        found = store.list()
    if json:
        console.show(to_json({"keys": [_key_data(key) for key in found]}))
        return
    rows = [
        (
            key.id,
            escape(key.tenant),
            key.scope,
            "no limit" if key.budget_nano is None else dollars(usd(key.budget_nano)) + PER[key.period],
            "" if key.value_usd is None else dollars(key.value_usd),
            escape(key.task_class or ""),
            "revoked" if key.revoked_ns is not None else "",
        )
        for key in found
    ]
    console.show(table("Keys", ("key", "tenant", "scope", "budget", "V", "class", ""), rows))


@keys.command()
def rotate(
    key: Annotated[str, typer.Argument(help="The key's id: key_…")],
    data: Data = DATA,
    grace_s: Annotated[
        float, typer.Option(help="Seconds for which the old secret still works", min=0)
    ] = 86_400.0,
    json: Json = False,
) -> None:
    """Give a key a new secret."""
    with _store(data) as store:
        made = store.rotate(key, grace_s=grace_s, now_ns=time.time_ns())
    _new(made, json)


@keys.command()
def revoke(
    key: Annotated[str, typer.Argument(help="The key's id: key_…")], data: Data = DATA, json: Json = False
) -> None:
    """End a key. A service that runs notices within a second."""
    with _store(data) as store:
        ended = store.revoke(key, now_ns=time.time_ns())
    if json:
        console.show(json_module.dumps(_key_data(ended)))
    else:
        console.say(f"key {key} works no more")


# --- ledger -------------------------------------------------------------------------------------------------------------


def _open(data: Path, url: str | None) -> Store:
    return open_store(url or _state(data, "ledger.sqlite", "`walras serve`"), read_only=True)


@ledger.command()
def export(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write: .parquet")],
    data: Data = DATA,
    url: LedgerUrl = None,
    alternatives: Annotated[
        bool,
        typer.Option("--alternatives", help="Also a row for each use that was considered and not chosen"),
    ] = False,
    synthetic: Annotated[
        bool,
        typer.Option("--synthetic", help="Mark the file: the traffic or the providers were simulated"),
    ] = False,
    json: Json = False,
) -> None:
    """Write the ledger as records that `walras audit` and `walras fit` read."""
    from walras.ledger.export import export as write  # noqa: PLC0415 - loads Arrow

    store = _open(data, url)
    console.check_writable(output)
    synthetic = synthetic or _simulated(store)
    done = write(store, output, alternatives=alternatives, synthetic=synthetic)
    if json:
        console.show(to_json(asdict(done) | {"synthetic": synthetic}))
        return
    console.say(
        f"{output}: {count(done.requests, 'requests')}, {done.with_quality:,} of them with an outcome; "
        f"{done.left_out:,} left out, for which nothing was used" + SIMULATED * synthetic
    )
    if not done.with_quality:
        console.say(
            "without outcomes there is nothing to audit: POST /v1/outcomes says how good an answer was"
        )


def _simulated(store: Store) -> bool:
    """Whether the providers of a service without settings answered any of it."""
    with store.snapshot() as query:
        return bool(query("SELECT 1 FROM entries WHERE upstream = ? LIMIT 1", ["simulated"]))


@ledger.command("verify")
def verify_ledger(data: Data = DATA, url: LedgerUrl = None, json: Json = False) -> None:
    """Do the books balance, to the last unit? Exit code 3 where not."""
    found = verify(_open(data, url))
    if json:
        console.show(to_json(asdict(found) | {"ok": found.ok}))
    else:
        wrong = f"The ledger does not balance: {count(len(found.violations), 'violations')}"
        said = "The ledger balances." if found.ok else wrong
        console.show(Text(said, style="bold green" if found.ok else "bold red"))
        for violation in found.violations[:10]:
            console.show(Text(f"  {violation.sentence}"))
        held = sum((found.settled_nano, found.released_nano, found.open_nano))
        parts = (("reserved", held), ("settled", found.settled_nano), ("released", found.released_nano))
        more = (("open", found.open_nano), ("charged beyond", found.overrun_nano), ("paid", found.paid_nano))
        rows = [(name, f"{amount / 1e9:,.9f}") for name, amount in (*parts, *more)]
        console.show(
            table(f"{count(found.entries, 'requests')}, {count(found.holds, 'holds')}", ("", "USD"), rows)
        )
        if found.to_reconcile:
            console.say(
                f"{count(found.to_reconcile, 'requests')} settled at what was reserved: a crash or a cut stream "
                "left unknown what the upstream charged"
            )
    if not found.ok:
        raise RecordError("the books do not balance", path=_named(data, url))


def _named(data: Path, url: str | None) -> Path | str:
    return data / "ledger.sqlite" if url is None else "the ledger in PostgreSQL"  # a URL may hold a password


@ledger.command("stats")
def ledger_stats(data: Data = DATA, url: LedgerUrl = None, json: Json = False) -> None:
    """How much is in the ledger: by tenant, by what was used, and by how it ended and was settled."""
    found = stats(_open(data, url))
    if json:
        console.show(to_json(asdict(found)))
        return
    for title, spent in (("By tenant", found.by_tenant), ("By use", found.by_use)):
        rows = [(escape(name), f"{n:,}", dollars(usd(nano_))) for name, (n, nano_) in spent.items()]
        if rows:
            console.show(table(title, ("", "requests", "charged"), rows))
    for title, counted in (("Ended", found.by_status), ("Settled", found.by_settled)):
        if counted:
            console.show(table(title, ("", "requests"), [(name, f"{n:,}") for name, n in counted.items()]))
    whole = [
        ("entries", f"{found.entries:,}"),
        ("first", _when(found.first_ns)),
        ("last", _when(found.last_ns)),
        ("charged", dollars(usd(found.charged_nano))),
        ("outcomes", f"{found.outcomes:,}"),
        ("corrections", f"{found.corrections:,}"),
        ("to reconcile", f"{found.to_reconcile:,}, charged {dollars(usd(found.to_reconcile_nano))}"),
        ("open holds", f"{found.open_holds:,}"),
        ("retired entries", f"{found.retired:,}"),
        ("size", f"{found.size_bytes / 1e6:,.1f} MB"),
    ]
    console.show(table("Ledger", ("", "in all"), whole))


@ledger.command()
def reconcile(
    file: Annotated[Path, typer.Argument(help=".csv or .jsonl: request_id, and charged_usd or charged_nano")],
    data: Data = DATA,
    url: LedgerUrl = None,
    source: Annotated[str, typer.Option(help="Who says so, such as an invoice's number")] = "upstream",
    json: Json = False,
) -> None:
    """Say what requests really cost that were settled at their cap, or estimated: by a file from the provider. Exit code 3 if a
    row is refused. While a service runs on the ledger, send POST /v1/reconcile instead."""
    from walras.ledger.reconcile import reconcile as correct  # noqa: PLC0415 - of this command alone

    try:
        store = open_store(url or _state(data, "ledger.sqlite", "`walras serve`"))
    except OutputError as error:
        raise OutputError(f"{error} Or send a service that runs on it POST /v1/reconcile.") from error
    try:
        done = correct(store, file, source=source, at_ns=time.time_ns())
    finally:
        store.stop()
    if json:
        console.show(to_json(asdict(done)))
    else:
        more = "more" if done.difference_nano >= 0 else "less"
        console.say(
            f"{count(done.corrected, 'requests')} corrected, {done.unchanged:,} unchanged: "
            f"{dollars(usd(abs(done.difference_nano)))} {more} than the ledger said"
        )
        for row in done.refused[:REFUSED_SHOWN]:
            console.say(f"row {row.row}: {row.request_id or 'no request'}: {row.problem}")
    if url is not None:
        console.say("a service that runs on this ledger counts it from its next start")
    if done.refused:
        raise RecordError(f"{count(len(done.refused), 'rows')} refused", path=file)


def _when(at_ns: int | None) -> str:
    return "" if at_ns is None else f"{datetime.fromtimestamp(at_ns // 10**9, UTC):%Y-%m-%d %H:%M:%S} UTC"


@ledger.command()
def retain(
    days: Annotated[int, typer.Option(help="Days that are kept whole", min=1)],
    data: Data = DATA,
    url: LedgerUrl = None,
    json: Json = False,
) -> None:
    """Remove what is older, and keep its sums by day, tenant and key. In a SQLite file: while no service runs on it."""
    store = open_store(url or _state(data, "ledger.sqlite", "`walras serve`"))
    try:
        removed = store.retain(time.time_ns() - days * 86_400 * 10**9)
    finally:
        store.stop()
    console.show(to_json({"removed": removed}) if json else f"{count(removed, 'requests')} removed")
