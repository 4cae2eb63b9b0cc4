"""The command line: thin verbs over the package.

Exit codes: 0 done · 1 a bug in Walras · 2 wrong usage · 3 unreadable records · 4 bad settings · 5 infeasible or no
numéraire · 6 not certified · 7 a result could not be written · 130 interrupted.
"""

from __future__ import annotations

import inspect
import math
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.text import Text

from walras import (
    capacity_commands,
    clear_commands,
    console,
    engine_commands,
    gateway_commands,
    replay_commands,
)
from walras.demand.route import Exploring, ask_of, search
from walras.demand.route import route as route_requests
from walras.demand.search import Verifier
from walras.diagnosis.audit import audit_log, price_log
from walras.diagnosis.contract import audit_data, prices_data, shard_prices_data, to_json
from walras.diagnosis.evaluate import evaluate_log
from walras.diagnosis.menu_report import check_data, check_screen, menu_data, menu_screen
from walras.diagnosis.published import check_file, publish
from walras.diagnosis.routing_report import (
    drift_data,
    drift_screen,
    evaluation_data,
    evaluation_screen,
    routing_data,
    routing_screen,
)
from walras.diagnosis.shard_prices import Engine, is_shards, price_shards, write_shard
from walras.diagnosis.terminal import audit_screen, prices_screen, shard_prices_screen
from walras.diagnosis.words import count
from walras.errors import NotCleared, SettingsError, WalrasError, nearest
from walras.estimate.estimates import ALSO, Estimates, fit_estimates
from walras.estimate.watch import watch_log
from walras.market.gpu import cuda
from walras.records import COLUMNS, Log, read_log
from walras.routing_options import read_asked, read_live, read_live_prices, read_policy
from walras.settings import Economy, MenuSettings, load_economy, settings_rows
from walras.simulate.sample import write_sample

app = typer.Typer(
    help="Prices for agentic AI platforms: what each constraint is worth, and where tokens were misallocated.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog=(__doc__ or "").split("\n\n")[1].replace("\n", " "),
)

Logs = Annotated[
    list[Path], typer.Argument(help="Records: .parquet, .csv or .jsonl, one row per (request, model)")
]
Json = Annotated[bool, typer.Option("--json", help="Print plain data instead of tables")]
Html = Annotated[Path | None, typer.Option(help="Also write a self-contained HTML report")]
Seed = Annotated[int, typer.Option(help="Seed of the resampling", min=0)]

SHOWN = 6
"""Prices in the progress line."""

ECONOMY_OPTIONS: dict[str, Any] = {
    "value": float,
    "value_column": str,
    "budget_usd": float,
    "budget_total_usd": float,
    "sla_s": float,
    "sla_quantile": float,
    "risk": float,
    "risk_measure": Literal["expectation", "cvar", "max-min"],
    "risk_alpha": float,
    "risk_over": Literal["use", "portfolio"],
    "lambda0": float,
    "rho0": float,
    "rho_irr": float,
    "defer": bool,
    "numeraire": Literal["usd", "compute"],
    "baseline": str,
}
"""Settings that are options too; the other ones (tables by tenant, class, resource) live in the file."""


def takes_economy(*without: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one option per setting, with the setting's own help; it gets the whole as `economy`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters.values()
        options = {
            "settings": (
                Path,
                typer.Option(help="Settings file, economy.toml; options given here override it"),
            ),
            "map_": (
                list[str],
                typer.Option("--map", help="NAME=COLUMN: the log's column for a schema column"),
            ),
        }
        for key, kind in ECONOMY_OPTIONS.items():
            if key not in without:
                options[key] = (kind, typer.Option(help=Economy.model_fields[key].description))
        shared = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
            )
            for name, (kind, option) in options.items()
        ]

        def run(**given: Any) -> None:
            chosen = {name: given.pop(name) for name in options}
            command(economy=_economy(chosen), **given)

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own if p.name != "economy"]
        everything = [*parameters[:1], *shared, *parameters[1:]]
        # Typer reads a command's options from its signature, and functions are not declared to have this attribute.
        run.__signature__ = inspect.Signature(everything)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in everything}
        return run

    return decorate


@app.command()
@takes_economy()
def audit(logs: Logs, economy: Economy, json: Json = False, html: Html = None, seed: Seed = 0) -> None:
    """What a log's constraints are worth, what each request cost, and what was left on the table."""
    if html is not None:
        console.check_writable(html)
    log = _read(logs, economy)
    with console.steps() as on_step:
        result = audit_log(log, economy, seed=seed, on_step=on_step)
    title = _title(logs)
    if html is not None:
        from walras.diagnosis.html import write_html  # noqa: PLC0415 - plotly takes a second to import

        write_html(result, html, title)
    if json:
        console.show(to_json(audit_data(result)))
        return
    console.show(audit_screen(result, f"audit of {title}", console.out.width))
    if html is not None:
        console.show(Text(f"Report: {html}", style="green"))


@app.command()
@takes_economy("baseline")
def prices(
    logs: Logs,
    economy: Economy,
    json: Json = False,
    engine: Annotated[
        Engine, typer.Option(help="Where passes run: auto takes memory, or stream where shards do not fit")
    ] = "auto",
    ray_address: Annotated[
        str | None, typer.Option(help="Ray cluster of --engine ray; a local one if not given")
    ] = None,
    state: Annotated[
        Path | None, typer.Option(help="Keep the latest prices of shards in this file, and start from them")
    ] = None,
) -> None:
    """The price of each constraint, with its certificate; nothing else. Takes a log, or a market in shards."""
    _check_engine(logs, engine, ray_address, state)
    title = f"prices of {_title(logs)}"
    with console.steps() as on_step:

        def on_pass(number: int, gap: float, mu: Any) -> None:
            known = f"gap {gap:.1e}" if math.isfinite(gap) else "no bound yet"
            on_step(f"pass {number}, {known}, prices {' '.join(f'{m:.4g}' for m in mu[:SHOWN])}")

        if is_shards(logs):
            found = price_shards(
                logs, economy, engine=engine, ray_address=ray_address, state=state, on_pass=on_pass
            )
            console.show(to_json(shard_prices_data(found)) if json else shard_prices_screen(found, title))
            return
        log = _read(logs, economy)
        case, clearing = price_log(log, economy, on_pass, xp=cuda() if engine == "gpu" else None)
    console.show(
        to_json(prices_data(case, clearing))
        if json
        else prices_screen(case, clearing, title, console.out.width)
    )


@app.command()
def shards(
    logs: Logs,
    folder: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the shards, one for each file of the log")
    ],
    settings: Annotated[
        Path | None, typer.Option(help="Settings file, economy.toml: values, columns")
    ] = None,
    value: Annotated[float | None, typer.Option(help=Economy.model_fields["value"].description)] = None,
) -> None:
    """Turn logs into a market in shards, which `walras prices` can stream or leave on a cluster."""
    economy = load_economy(settings, {"value": value})
    console.check_folder(folder)
    for path in logs:
        to = folder / f"{path.stem}.parquet"
        with console.writing(to):
            n, models = write_shard(_read([path], economy), economy, to)
        said = f"{to}: {n:,} tasks × {models} models"
        console.say(said)


FactColumns = Annotated[
    list[str] | None,
    typer.Option("--fact", help="Further column of text that tells requests apart; repeatable"),
]
ClassColumn = Annotated[
    str | None, typer.Option(help="The log's column that holds the kind of task (same as --map class=COLUMN)")
]


@app.command()
@takes_economy(*ECONOMY_OPTIONS)
def fit(
    logs: Logs,
    economy: Economy,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the router")],
    class_column: ClassColumn = None,
    fact: FactColumns = None,
    seed: Seed = 0,
) -> None:
    """Learn from a log what each model gives and takes on a request, with errors: a router in a folder."""
    log = _read(
        logs,
        _with_class(economy, class_column),
        losses=True,
        also=("prompt", "embedding", *ALSO),
        facts=tuple(fact or ()),
    )
    with console.steps() as on_step:
        on_step(f"learning from {len(log):,} requests")
        estimates = fit_estimates(log, seed=seed)
    about = {"logs": [p.name for p in logs], "rows": log.rows, "requests": len(log), "seed": seed}
    about |= {"models": list(log.models), "synthetic": log.synthetic}
    estimates.save(output, about)
    said = f"{output}: a router over {count(len(log.models), 'models')}, learned from {count(len(log), 'requests')}"
    console.say(said)


@app.command()
@takes_economy("value_column", "baseline")
def route(
    economy: Economy,
    router: Annotated[Path, typer.Option(help="Folder that `walras fit` wrote")],
    prompt: Annotated[str | None, typer.Option(help="One request's text; - reads standard input")] = None,
    jsonl: Annotated[
        Path | None,
        typer.Option(help="Requests, one JSON object a line: prompt or messages, class, tenant, …"),
    ] = None,
    task_class: Annotated[str | None, typer.Option("--class", help="Kind of task of --prompt")] = None,
    tenant: Annotated[str | None, typer.Option(help="Who pays for --prompt")] = None,
    warm: Annotated[
        list[str] | None,
        typer.Option(help="MODEL=TOKENS of --prompt that the model still holds in its prefix cache"),
    ] = None,
    prices: Annotated[
        Path | None, typer.Option(help="Live prices: what `walras prices --json` printed")
    ] = None,
    price_table: Annotated[
        Path | None, typer.Option(help="Token prices (TOML), in place of the ones shipped")
    ] = None,
    list_prices: Annotated[
        bool,
        typer.Option("--list-prices", help="Charge expected tokens at today's list prices, not as logged"),
    ] = False,
    load: Annotated[
        list[str] | None,
        typer.Option(help="MODEL=RUNNING[:WAITING], requests at its engine now; repeatable"),
    ] = None,
    explore: Annotated[
        str | None, typer.Option(help="softmax:USD (temperature) or thompson; the best use if not given")
    ] = None,
    explore_cap: Annotated[
        float, typer.Option(help="Most USD of expected regret that exploring may cost a request", min=0)
    ] = math.inf,
    explore_floor: Annotated[
        float, typer.Option(help="Least probability of every open use", min=0, max=1)
    ] = 0.0,
    verifier_accuracy: Annotated[
        float | None,
        typer.Option(help="Also plan a search: try, verify with this accuracy, escalate", min=0.5, max=1),
    ] = None,
    verifier_usd: Annotated[float, typer.Option(help="What one verification costs, USD", min=0)] = 0.0,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Choose a model for each request at the given prices, and say why: V·ΔQ, ΔC, λ·ΔL, ρ·ΔR of every use."""
    estimates, _ = Estimates.load(router)
    asked = read_asked(prompt, jsonl, task_class, tenant, warm)
    ask = ask_of(estimates, asked)
    routing = route_requests(
        estimates,
        ask,
        economy,
        prices=None if prices is None else read_live_prices(prices),
        live=read_live(estimates, price_table, list_prices, load or []),
        exploring=Exploring(read_policy(explore), explore_cap, explore_floor, seed),
    )
    plan = None
    if verifier_accuracy is not None:
        plan = search(estimates, ask, routing, Verifier.accurate(verifier_accuracy), verifier_usd)
    title = f"route by {router.name}" + (f" · {len(asked):,} requests" if jsonl else "")
    console.show(to_json(routing_data(routing, plan)) if json else routing_screen(routing, title, plan))


@app.command()
@takes_economy(
    "budget_usd", "budget_total_usd", "sla_s", "sla_quantile", "risk", "defer", "baseline", "numeraire"
)
def evaluate(
    logs: Logs,
    economy: Economy,
    class_column: ClassColumn = None,
    fact: FactColumns = None,
    seeds: Annotated[int, typer.Option(help="Random halves to learn from and judge on", min=1)] = 10,
    json: Json = False,
    html: Html = None,
) -> None:
    """Would a router learned from this log have helped? Fit on one half, judge on the other: regret, calibration."""
    if html is not None:
        console.check_writable(html)
    economy = _with_class(economy, class_column)
    log = _read(logs, economy, also=("prompt", "embedding", "propensity"), facts=tuple(fact or ()))
    with console.steps() as on_step:
        found = evaluate_log(log, economy, seeds=seeds, on_step=on_step)
    title = f"evaluation of {_title(logs)}"
    if html is not None:
        from walras.diagnosis.html import write_evaluation  # noqa: PLC0415 - plotly takes a second to import

        write_evaluation(found, html, title)
    if json:
        console.show(to_json(evaluation_data(found)))
        return
    console.show(evaluation_screen(found, title, seeds))
    if html is not None:
        console.show(Text(f"Report: {html}", style="green"))


@app.command()
@takes_economy(*ECONOMY_OPTIONS)
def drift(
    logs: Logs,
    economy: Economy,
    router: Annotated[Path, typer.Option(help="Folder that `walras fit` wrote")],
    class_column: ClassColumn = None,
    fact: FactColumns = None,
    alpha: Annotated[
        float, typer.Option(help="Probability of any false alarm", min=0.000001, max=0.5)
    ] = 0.05,
    json: Json = False,
) -> None:
    """Does a router still hold on a newer log? Names the models and classes whose outcomes have changed."""
    estimates, _ = Estimates.load(router)
    log = _read(
        logs, _with_class(economy, class_column), also=("prompt", "embedding"), facts=tuple(fact or ())
    )
    found = watch_log(estimates, log, alpha=alpha)
    console.show(to_json(drift_data(found)) if json else drift_screen(found, f"drift of {router.name}"))


menu = typer.Typer(
    help="Tiers among which users tell what their requests are worth: design a menu, or check one.",
    invoke_without_command=True,
)
app.add_typer(menu, name="menu")
Types = Annotated[
    str | None,
    typer.Option(
        help="What requests are worth: uniform:LOW:HIGH, exponential:MEAN, lognormal:MEDIAN:SIGMA, a table, or a log"
    ),
]
QualityCost = Annotated[
    str | None, typer.Option(help="What quality costs: quadratic (q²/2), a table of offerings, or a log")
]
Lambda0 = Annotated[float | None, typer.Option(help=Economy.model_fields["lambda0"].description)]


@menu.callback()
def design_menu(
    context: typer.Context,
    settings: Annotated[
        Path | None, typer.Option(help="Settings file, economy.toml; options given here override it")
    ] = None,
    types: Types = None,
    quality_cost: QualityCost = None,
    objective: Annotated[
        Literal["welfare", "revenue"] | None,
        typer.Option(
            help="What is made as large as possible: welfare, or revenue less cost (default welfare)"
        ),
    ] = None,
    tiers: Annotated[
        int | None, typer.Option(help="Most tiers; people read 3 to 5 (default 4)", min=1, max=100)
    ] = None,
    recover_usd: Annotated[
        float | None, typer.Option(help=MenuSettings.model_fields["recover_usd"].description)
    ] = None,
    family: Annotated[
        Literal["empirical", "lognormal", "exponential", "uniform"] | None,
        typer.Option(help=MenuSettings.model_fields["family"].description),
    ] = None,
    lambda0: Lambda0 = None,
    offered: Annotated[
        Path | None, typer.Option(help="The menu that a table of choices was made from")
    ] = None,
    routed: Annotated[
        bool, typer.Option("--routed", help="Tiers route inside, by a router learned from the log")
    ] = False,
    prices: Annotated[
        Path | None, typer.Option(help="Live prices: what `walras prices --json` printed")
    ] = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Design the best menu of tiers for users who know what their requests are worth, and may lie about it."""
    if context.invoked_subcommand is not None:
        return
    own = {
        "types": types,
        "quality_cost": quality_cost,
        "objective": objective,
        "tiers": tiers,
        "recover_usd": recover_usd,
        "family": family,
    }
    given = {key: value for key, value in own.items() if value is not None}
    economy = load_economy(settings, {"menu": given, "lambda0": lambda0})
    live = None if prices is None else read_live_prices(prices)
    with console.steps() as on_step:
        found = publish(
            economy, _read_for_menu, prices=live, offered=offered, routed=routed, seed=seed, on_step=on_step
        )
    console.show(to_json(menu_data(found)) if json else menu_screen(found, "menu"))


@menu.command("check")
def check_menu(
    file: Annotated[Path, typer.Argument(help="A menu: JSON as `walras menu` prints it, or CSV")],
    types: Types = None,
    quality_cost: QualityCost = None,
    lambda0: Lambda0 = None,
    tolerance: Annotated[
        float, typer.Option(help="Gains by lying that are let pass, USD per request", min=0)
    ] = 1e-9,
    json: Json = False,
) -> None:
    """Does anybody gain by lying? Verify every constraint of any menu; exit code 6 where one does not hold."""
    economy = load_economy(None, {"menu": {"types": types, "quality_cost": quality_cost}, "lambda0": lambda0})
    checked = check_file(file, economy, _read_for_menu, tolerance)
    console.show(to_json(check_data(checked)) if json else check_screen(checked, f"check of {file.name}"))
    if not checked.holds:
        worst = checked.lies[0]
        what = "1 constraint is" if len(checked.lies) == 1 else f"{len(checked.lies)} constraints are"
        raise NotCleared(
            f"{file}: {what} violated, by up to {worst.gain:.6g} USD",
            certificate=checked.certificate,
        )


def _read_for_menu(path: Path, economy: Economy, prompts: bool) -> Log:
    also = ("prompt", "embedding", *ALSO) if prompts else ()
    return _read([path], economy, losses=prompts and economy.needs_losses, also=also)


app.command()(gateway_commands.serve)
app.command()(gateway_commands.check)
app.add_typer(gateway_commands.keys, name="keys")
app.add_typer(gateway_commands.ledger, name="ledger")
app.command()(replay_commands.replay)
app.command()(replay_commands.profiles)
app.command()(engine_commands.engines)
app.command()(capacity_commands.capacity)
app.command()(clear_commands.clear)


@app.command()
def sample(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write: .parquet, .csv or .jsonl")],
    tasks: Annotated[int, typer.Option(help="How many requests", min=1)] = 2000,
    seed: Annotated[int, typer.Option(help="Same seed, same log", min=0)] = 0,
) -> None:
    """Write a synthetic sample log: realistic in shape, all of it drawn from tables in the code."""
    with console.bar("writing", tasks) as advance, console.writing(output):
        write_sample(output, tasks, seed, advance)
    said = f"{output}: a synthetic log of {tasks:,} requests (seed {seed})"
    console.say(said)


@app.command()
def settings(json: Json = False) -> None:
    """Every setting of economy.toml and its meaning, as a Markdown table."""
    if json:
        keys = ("setting", "type", "default", "meaning")
        console.show(to_json({"settings": [dict(zip(keys, row, strict=True)) for row in settings_rows()]}))
        return
    lines = ["| setting | type | default | meaning |", "| --- | --- | --- | --- |"]
    for row in settings_rows():
        key, *rest = (cell.replace("|", "\\|") for cell in row)
        lines.append(f"| `{key}` | " + " | ".join(rest) + " |")
    console.show("\n".join(lines))


def _version(wanted: bool) -> None:
    if wanted:
        console.show(f"walras {version('walras')}")
        raise typer.Exit


@app.callback()
def _common(
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version")
    ] = False,
) -> None:
    pass


# --- from options to work -------------------------------------------------------------------------------------------


def _economy(options: dict[str, Any]) -> Economy:
    """Settings from the file, with the options of a command on top."""
    path, mapping = options.pop("settings"), options.pop("map_")
    return load_economy(path, {**options, "columns": dict(_mapping(item) for item in mapping or ())})


def _mapping(item: str) -> tuple[str, str]:
    name, equals, column = item.partition("=")
    if not (name and equals and column):
        raise SettingsError(f"'{item}' is not NAME=COLUMN", key="--map")
    known = [c.name for c in COLUMNS]
    if name not in known:
        raise SettingsError(f"'{name}' is not a column of the schema", key="--map", hint=nearest(name, known))
    return name, column


def _with_class(economy: Economy, column: str | None) -> Economy:
    """The settings, with the class read from `column`."""
    if column is None:
        return economy
    return economy.model_copy(update={"columns": {**economy.columns, "class": column}})


def _read(
    paths: list[Path],
    economy: Economy,
    *,
    losses: bool = False,
    also: tuple[str, ...] = (),
    facts: tuple[str, ...] = (),
) -> Log:
    names = dict(economy.columns)
    if economy.value_column:
        names["value_usd"] = economy.value_column
    extra = [resource.column for resource in economy.resources.values()]
    with console.bar(
        "reading", sum(p.stat().st_size for p in paths if p.is_file()), of_bytes=True
    ) as advance:
        done = 0

        def on_rows(_: int, read: int) -> None:
            nonlocal done
            advance(max(read - done, 0))
            done = read

        return read_log(
            paths,
            names=names,
            extra=extra,
            losses=losses or economy.needs_losses,
            also=also,
            facts=facts,
            on_rows=on_rows,
        )


def _title(paths: list[Path]) -> str:
    return paths[0].name if len(paths) == 1 else f"{paths[0].name} and {len(paths) - 1} more"


def _check_engine(paths: list[Path], engine: Engine, ray_address: str | None, state: Path | None) -> None:
    if ray_address is not None and engine != "ray":
        raise SettingsError("is only for --engine ray", key="--ray-address")
    if is_shards(paths):
        return
    if engine in ("stream", "ray"):
        raise SettingsError(
            f"'{engine}' needs a market in shards; `walras shards LOG -o FOLDER` makes them", key="--engine"
        )
    if state is not None:
        raise SettingsError("is only for a market in shards", key="--state")


def main() -> None:
    """Entry point: errors become one line on stderr and an exit code."""
    try:
        app()
    except WalrasError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except SystemExit as end:
        if end.code == 130:  # typer's own way to say so
            _fail("interrupted", 130)
        raise
    except MemoryError:
        _fail("out of memory; audit fewer files at a time, or leave out the scenario columns", 1)
    except Exception as error:
        if os.environ.get("WALRAS_DEBUG"):
            raise
        _fail(f"a bug in Walras: {type(error).__name__}: {error} (WALRAS_DEBUG=1 shows where)", 1)


def _fail(message: str, code: int) -> None:
    console.say(f"walras: {message}", style="red")
    sys.exit(code)
