"""The study's page: its tables between marks in docs/two-layers.md, and its figure."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from two_layers.run import COUPLINGS, VARIED_LOAD, VARIED_SLA
from two_layers.world import TRACES, FloatArray

PAGE = Path(__file__).parents[2] / "docs" / "two-layers.md"
FIGURE = PAGE.with_name("two-layers.svg")
DRAWS = 4000
SHOWN = ("priority only", "selfish", "prices to the router only", "board", "planner")
Row = dict[str, Any]


def read(paths: Iterable[Path]) -> list[Row]:
    return [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]


def section(page: Path, name: str, text: str) -> None:
    """Put `text` between the marks of its name."""
    whole = page.read_text(encoding="utf-8")
    begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
    found = re.sub(
        f"{re.escape(begin)}.*?{re.escape(end)}",
        lambda _: f"{begin}\n{text.strip()}\n\n{end}",
        whole,
        flags=re.DOTALL,
    )
    page.write_text(found, encoding="utf-8")


def gains(rows: Sequence[Row], policy: str) -> FloatArray:
    """(seeds,) welfare over that of the isolated router, % of ΣV."""
    return np.array(
        [
            100 * (row["policies"][policy]["welfare"] - row["policies"]["isolated"]["welfare"]) / row["value"]
            for row in rows
        ]
    )


def seed_means(rows: Sequence[Row], policy: str) -> FloatArray:
    """(seeds,) as `gains`, where a seed has several windows their mean."""
    return np.array([gains(some, policy).mean() for some in by_cell(rows, "seed").values()])


def interval(values: FloatArray) -> tuple[float, float, float]:
    """Mean and 95% bootstrap interval over seeds; too few to tell below five."""
    if len(values) < 5:
        return float(values.mean()), np.nan, np.nan
    random = np.random.default_rng(0)
    means = values[random.integers(0, len(values), (DRAWS, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def share(board: FloatArray, planner: FloatArray) -> str:
    """(W_board − W_isolated) / (W_planner − W_isolated) with its interval, or why there is none."""
    _, low, high = interval(planner)
    if np.isnan(low):
        return "too few windows"
    if not (low > 0 or high < 0):
        return "planner's gain is not told from 0"
    random = np.random.default_rng(0)
    draws = random.integers(0, len(board), (DRAWS, len(board)))
    ratios = board[draws].mean(axis=1) / planner[draws].mean(axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return f"{board.mean() / planner.mean():.2f} ({low:.2f} to {high:.2f})"


def show(values: FloatArray) -> str:
    mean, low, high = interval(values)
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})" if np.isfinite(low) else f"{mean:+.1f}"


def by_cell(rows: Iterable[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    out: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        out[tuple(row["cell"][key] for key in keys)].append(row)
    return dict(sorted(out.items()))


def main_table(rows: Sequence[Row]) -> str:
    lines = [
        "| trace | SLA | load | windows | isolated | "
        + " | ".join(SHOWN)
        + " | board/planner | outcomes likely | known |",
        "|---|---|---|---|---|" + "---|" * (len(SHOWN) + 3),
    ]
    for (trace, sla, load), some in by_cell(rows, "trace", "sla", "load").items():
        isolated = np.mean([100 * row["policies"]["isolated"]["welfare"] / row["value"] for row in some])
        most = [
            np.mean([100 * row["bounds"][f"outcomes {k}"] / row["value"] for row in some])
            for k in ("likely", "known")
        ]
        cells = [show(gains(some, name)) for name in SHOWN]
        ratio = share(gains(some, "board"), gains(some, "planner"))
        lines.append(
            f"| {trace} | {sla:g}× | {load:g} | {len(some)} | {isolated:.1f} | {' | '.join(cells)} | {ratio} | "
            f"{most[0]:.1f} | {most[1]:.1f} |"
        )
    return "\n".join(lines)


def pooled_table(rows: Sequence[Row]) -> str:
    """Over the loads: each seed's mean is one observation."""
    lines = ["| trace | SLA | windows | board | planner | board/planner |", "|---|---|---|---|---|---|"]
    for (trace, sla), some in by_cell(rows, "trace", "sla").items():
        of = {name: seed_means(some, name) for name in SHOWN}
        lines.append(
            f"| {trace} | {sla:g}× | {len(some)} | {show(of['board'])} | {show(of['planner'])} | "
            f"{share(of['board'], of['planner'])} |"
        )
    return "\n".join(lines)


def coupling_table(rows: Sequence[Row]) -> str:
    names = [name for name in SHOWN if name != "planner"]
    lines = [
        "| coupling | trace | windows | isolated | " + " | ".join(names) + " |",
        "|---|---|---|---|" + "---|" * len(names),
    ]
    for name in COUPLINGS:
        varied = (
            row for row in rows if (row["cell"]["load"], row["cell"]["sla"]) == (VARIED_LOAD, VARIED_SLA)
        )
        for (trace,), some in by_cell(
            (row for row in varied if row["cell"]["coupling"] == name), "trace"
        ).items():
            isolated = np.mean([100 * row["policies"]["isolated"]["welfare"] / row["value"] for row in some])
            cells = " | ".join(show(gains(some, policy)) for policy in names)
            lines.append(f"| {name} | {trace} | {len(some)} | {isolated:.1f} | {cells} |")
    return "\n".join(lines)


def deeds_table(rows: Sequence[Row]) -> str:
    """What the policies did: means over all windows of the main coupling."""
    lines = ["| trace | policy | turned away | late | latency |", "|---|---|---|---|---|"]
    for trace in TRACES:
        for name in ("isolated", *SHOWN):
            did = [row["policies"][name] for row in rows if row["cell"]["trace"] == trace]
            if did:
                away, late, seconds = (
                    np.mean([one[key] for one in did]) for key in ("deferred", "late", "latency_s")
                )
                lines.append(f"| {trace} | {name} | {away:.1%} | {late:.1%} | {seconds:.2f} s |")
    return "\n".join(lines)


def luck(rows: Sequence[Row]) -> str:
    """The same pooled gain with the rows' own outcomes."""
    own = np.array(
        [
            100
            * (row["policies"]["board"]["with luck"] - row["policies"]["isolated"]["with luck"])
            / row["value"]
            for row in rows
        ]
    )
    mean = gains(rows, "board")
    return (
        f"Over all {len(rows)} windows the board gains {show(mean)}% of ΣV by mean outcomes of the class, and {show(own)}% by the "
        "rows' own outcomes, coin throws included."
    )


def write(paths: Sequence[Path]) -> None:
    rows = read(paths)
    main = [row for row in rows if row["cell"]["coupling"] == "main"]
    section(
        PAGE,
        "runs",
        main_table(main)
        + "\n\nOver the loads, each seed's mean being one observation:\n\n"
        + pooled_table(main)
        + "\n\n"
        + luck(main),
    )
    section(PAGE, "deeds", deeds_table(main))
    section(PAGE, "couplings", coupling_table(rows))
    FIGURE.write_text(figure(main), encoding="utf-8")


WIDTH, HEIGHT, LEFT, TOP = 720, 300, 54, 40
INK = {"board": "#0b6e4f", "selfish": "#c05621", "planner": "#555"}


def figure(rows: Sequence[Row]) -> str:
    """Gain over the router alone by load, a panel for each trace, mean over SLAs and seeds with 95% intervals."""
    panels = [trace for trace in TRACES if any(row["cell"]["trace"] == trace for row in rows)]
    found = {
        (trace, name): {
            load: interval(seed_means(some, name))
            for (load,), some in by_cell((r for r in rows if r["cell"]["trace"] == trace), "load").items()
        }
        for trace in panels
        for name in INK
    }
    ends = [x for points in found.values() for one in points.values() for x in one if np.isfinite(x)]
    low, high = min([0.0, *ends]), max([1.0, *ends])
    width = (WIDTH - LEFT) / max(len(panels), 1) - 20

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - 46) * (high - value) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="t" font-family="sans-serif" font-size="12">',
        '<title id="t">Welfare gained over the isolated router, by load</title>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
    ]
    for k, trace in enumerate(panels):
        left = LEFT + k * (width + 24)

        def x(load: float, left: float = left) -> float:
            return left + width * (load - 0.45) / 0.7

        parts.append(
            f'<text x="{left}" y="16" font-weight="bold">{trace}: gain over isolated, % of ΣV</text>'
        )
        for tick in np.arange(2 * np.ceil(low / 2), high + 0.1, 2):
            parts.append(
                f'<line x1="{left}" x2="{left + width:.0f}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" stroke="#ddd"/>'
            )
            parts.append(
                f'<text x="{left - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick + 0.0:.0f}</text>'
            )
        parts.append(
            f'<line x1="{left}" x2="{left + width:.0f}" y1="{y(0):.1f}" y2="{y(0):.1f}" stroke="#000"/>'
        )
        for n, (name, ink) in enumerate(INK.items()):
            points = found[trace, name]
            at = [(x(load) + 4 * (n - 1), one) for load, one in points.items()]
            parts.append(
                f'<polyline fill="none" stroke="{ink}" stroke-width="2" points="'
                + " ".join(f"{px:.1f},{y(one[0]):.1f}" for px, one in at)
                + '"/>'
            )
            parts += [
                f'<line x1="{px:.1f}" x2="{px:.1f}" y1="{y(one[1]):.1f}" y2="{y(one[2]):.1f}" stroke="{ink}"/>'
                for px, one in at
                if np.isfinite(one[1])
            ]
            parts.append(f'<text x="{left + 8 + 90 * n}" y="{TOP - 8}" fill="{ink}">{name}</text>')
        for load in sorted({row["cell"]["load"] for row in rows}):
            parts.append(f'<text x="{x(load):.1f}" y="{HEIGHT - 26}" text-anchor="middle">{load:g}</text>')
        parts.append(f'<text x="{left + width / 2:.0f}" y="{HEIGHT - 8}" text-anchor="middle">load</text>')
    return "\n".join([*parts, "</svg>", ""])
