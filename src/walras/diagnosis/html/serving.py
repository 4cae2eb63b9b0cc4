"""The sections of the replay report, in reading order."""

from __future__ import annotations

from importlib.metadata import version

from walras.diagnosis.html.serving_figures import distributions, load_figure, timeline_figures
from walras.diagnosis.html.text import esc, header, section, table
from walras.diagnosis.serving import SWEPT
from walras.diagnosis.serving_report import (
    Report,
    advice,
    knee_text,
    load_rows,
    profile_text,
    requests_per_cpu_s,
    seconds_text,
    size_text,
    unit_text,
    worth_head,
    worth_rows,
)
from walras.diagnosis.words import number, percent


def replay_report(found: Report) -> str:
    """All of it; what was not asked for is left out."""
    parts = [_headline(found)]
    if found.sweep is not None:
        load = load_figure(found.sweep, SWEPT).html(numbers_shown=True)
        parts.append(section("Load against latency", f"<p>{esc(knee_text(found.sweep))}</p>{load}"))
    both = "".join(figure.html(heading=True) for figure in distributions(found.played))
    parts.append(section("What requests wait for", f'<div class="pair">{both}</div>'))
    parts.append(section("Over time", _timeline(found)))
    if found.worth is not None:
        parts.append(section("What a use costs the others", _worth(found), "[Z §3.3]"))
    parts.append(section("Why to believe it", _notes(found)))
    return "".join(parts) + f"<footer>Walras {version('walras')}</footer>"


def _headline(found: Report) -> str:
    played = found.played
    answer = (
        f"The first token comes after <em>{seconds_text(played.ttft.mean)}</em> "
        f"({seconds_text(played.ttft.quantile(0.95))} at the 95% quantile)"
    )
    if played.tpot.count:
        answer += f", each further one after <em>{seconds_text(played.tpot.mean)}</em>"
    points = [("What is short.", esc(advice(found)))]
    if found.sweep is not None:
        points.append(("How much more load it takes.", esc(knee_text(found.sweep))))
    points.append(("How far to trust it.", esc(profile_text(found.engine.profile)) + "."))
    what = f"replay of {found.traffic.name} · {size_text(found)}"
    return header(what, answer + ".", points, synthetic=False, simulated=True)


def _timeline(found: Report) -> str:
    timeline = found.played.timeline
    loads = table(("", "mean", "most"), [tuple(map(esc, row)) for row in load_rows(found.played)])
    if timeline is None or len(timeline) < 2:
        return f"<p>It was over within two intervals.</p>{loads}"
    return "".join(figure.html(heading=True) for figure in timeline_figures(timeline)) + loads


def _worth(found: Report) -> str:
    what = found.worth
    assert what is not None
    said = (
        f"<p>Mean over {what.prices.probes} times drawn at random: the next {number(what.prices.horizon_s)} s are run twice, with one "
        f"use more and without, and what others wait is compared, in {unit_text(what)}. The error is a standard error.</p>"
    )
    return said + table(worth_head(what), worth_rows(what), (0, 4))


def _notes(found: Report) -> str:
    profile, settings = found.engine.profile, found.engine.settings
    error = profile.error
    facts = [
        (
            "requests",
            "generated" if found.traffic.trace is None else "as in the trace",
            esc(found.traffic.name),
        ),
        ("step times", esc(profile.name), esc(profile.source)),
        (
            "their error",
            f"{percent(error.median)} median, {percent(error.p95)} p95",
            f"{error.rows:,} held out by {esc(error.held_out_by)}",
        ),
        ("KV memory of a worker", f"{settings.kv_blocks:,} blocks", f"of {settings.block_tokens} tokens"),
        (
            "a step",
            f"{settings.max_batched_tokens:,} tokens",
            f"of at most {settings.max_sequences:,} sequences",
        ),
        ("speed", number(requests_per_cpu_s(found.played)), "requests per CPU-second"),
    ]
    return (
        "<p>Nothing ran on a GPU: an engine with continuous batching, chunked prefill, paged KV memory, prefix reuse and preemption "
        "was simulated, event by event. Its error is that of the step times, and of what an engine does besides.</p>"
        + table(("", "", ""), facts, (0, 1, 2))
    )
