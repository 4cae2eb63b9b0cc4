"""Text, tables and parts of the page. Every name and note passes through here."""

from __future__ import annotations

import html
import math
from collections.abc import Collection, Sequence


def esc(text: str) -> str:
    """Text for the page: names and notes come from users' logs."""
    return html.escape(text)


def label(text: str, most: int = 28) -> str:
    """Text for a figure, cut in the middle to fit. Plotly reads <, > and & as markup, and knows their entities only."""
    if len(text) > most:
        text = f"{text[: most // 2]}…{text[-(most // 2 - 1) :]}"
    return html.escape(text, quote=False)


def summands(values: Sequence[float]) -> list[str]:
    """Dollars with as many decimals each, so that the eye can add them up; the last one is the sum."""
    size = max(abs(values[-1]), 0.03 * max(map(abs, values)), 1e-12)
    decimals = max(2, 3 - math.floor(math.log10(size)))
    texts = [f"{abs(v):,.{decimals}f}" for v in values]
    return [
        f"{'−' if v < 0 and float(t.replace(',', '')) else ''}${t}"
        for v, t in zip(values, texts, strict=True)
    ]


def small(text: str) -> str:
    return f"<small>{text}</small>"


def line(text: str) -> str:
    """A small line of its own under what stands before it."""
    return f'<small class="line">{text}</small>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], words: Collection[int] = (0,)) -> str:
    """A table of ready cells; columns are numbers, set to the right, except `words`. On a phone each row of a wide one is a card."""
    kind = ["" if k in words else ' class="n"' for k in range(len(head))]
    top = "".join(f'<th scope="col"{k}>{cell}</th>' for cell, k in zip(head, kind, strict=True))
    body = ""
    for row in rows:
        first, *rest = zip(head, row, kind, strict=True)
        body += f'<tr><th scope="row">{first[1]}</th>'
        body += "".join(
            f'<td{k}><span class="name">{name}</span><span>{cell}</span></td>' for name, cell, k in rest
        )
        body += "</tr>\n"
    wide = ' class="wide"' if len(head) > 3 else ""
    return f"<table{wide}><thead><tr>{top}</tr></thead>\n<tbody>{body}</tbody></table>"


def header(
    what: str, answer: str, points: Sequence[tuple[str, str]], *, synthetic: bool, simulated: bool = False
) -> str:
    """The top of a page: `what` it is (not escaped yet), the answer, and (name, text) of what the answer rests on."""
    marks = ["SYNTHETIC LOG"] * synthetic + ["SIMULATED"] * simulated
    mark = "".join(f' <strong class="mark">{text}</strong>' for text in marks)
    listed = "".join(f"<li><b>{name}</b> {text}</li>" for name, text in points)
    return f'<header><p class="title">Walras {esc(what)}{mark}</p><h1>{answer}</h1>\n<ul>{listed}</ul></header>\n'


def section(title: str, body: str, annotation: str = "") -> str:
    """One chapter; `body` is ready HTML."""
    note = f" {small(annotation)}" if annotation else ""
    return f"<section><h2>{title}{note}</h2>\n{body}</section>\n"


def notes_on_log(notes: Sequence[str], *, synthetic: bool) -> str:
    """What the reader of the log had to say, and whether anybody asked these questions; nothing if nothing."""
    listed = [esc(note) for note in notes]
    if synthetic:
        listed.append("The log is synthetic: it was generated, nobody asked these questions.")
    items = "".join(f"<li>{note}</li>" for note in listed)
    return f"<h3>Notes on this log</h3><ul>{items}</ul>" if listed else ""
