"""The command that clears markets across tenants: clear."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.text import Text

from walras import console
from walras.diagnosis.contract import to_json
from walras.diagnosis.economy import economy_data, economy_screen, view
from walras.errors import SettingsError
from walras.market.tenants.read import read_economies


def clear(
    economy: Annotated[
        Path,
        typer.Argument(
            help="Goods, tenants and production, .toml or .json; or a published exchange or activity-analysis file"
        ),
    ],
    every: Annotated[
        bool,
        typer.Option("--all", help="Find every equilibrium at positive prices, with proof (up to 6 goods)"),
    ] = False,
    solver: Annotated[
        Literal["auto", "newton", "homotopy", "tatonnement", "fisher"], typer.Option(help="How to find one")
    ] = "auto",
    work: Annotated[int, typer.Option(help="Of --all: boxes of prices to look at, at most", min=1)] = 500_000,
    json: Annotated[bool, typer.Option("--json", help="Print plain data instead of tables")] = False,
    html: Annotated[Path | None, typer.Option(help="Also write a self-contained HTML report")] = None,
) -> None:
    """Clear an economy of tenants: prices at which supply meets demand, who pays for whom, and the proof."""
    if html is not None:
        console.check_writable(html)
    if every and solver != "auto":
        raise SettingsError("has no solver to choose", key="--all", hint="leave --solver out")
    with console.steps() as on_step:
        on_step("reading")
        views = [
            view(name, one, every=every, solver=solver, work=work, on_step=on_step)
            for name, one in read_economies(economy).items()
        ]
    if html is not None:
        from walras.diagnosis.html import write_economy  # noqa: PLC0415 - plotly takes a second to import

        write_economy(views, html)
    if json:
        console.show(to_json(economy_data(views)))
        return
    console.show(economy_screen(views))
    if html is not None:
        console.show(Text(f"Report: {html}", style="green"))
