"""An audit, an evaluation, a replay, a capacity plan or a cleared economy as one self-contained HTML page: opens without a network, loads nothing, runs no script but its own two."""

from __future__ import annotations

import base64
import hashlib
import uuid
from importlib.resources import files
from pathlib import Path
from string import Template

from plotly.offline import get_plotlyjs

from walras.diagnosis.audit import Audit
from walras.diagnosis.capacity import Capacity
from walras.diagnosis.economy import View
from walras.diagnosis.evaluate import Evaluation
from walras.diagnosis.html.capacity import capacity_report
from walras.diagnosis.html.economy import economy_report
from walras.diagnosis.html.evaluation import evaluation_report
from walras.diagnosis.html.sections import report
from walras.diagnosis.html.serving import replay_report
from walras.diagnosis.html.text import esc
from walras.diagnosis.serving_report import Report
from walras.errors import OutputError


def html_report(audit: Audit, title: str) -> str:
    """An audit as one page; `title` names what was audited."""
    return _page(f"audit of {title}", report(audit, title))


def html_evaluation(found: Evaluation, title: str) -> str:
    """An evaluation as one page; `title` says what it is: "evaluation of log.parquet"."""
    return _page(title, evaluation_report(found, title))


def write_html(audit: Audit, path: Path, title: str) -> None:
    """Write an audit, whole or not at all; `title` as in `html_report`.

    Raises:
        OutputError: the file cannot be written.
    """
    _write(html_report(audit, title), path)


def write_evaluation(found: Evaluation, path: Path, title: str) -> None:
    """Write an evaluation, whole or not at all; `title` as in `html_evaluation`.

    Raises:
        OutputError: the file cannot be written.
    """
    _write(html_evaluation(found, title), path)


def write_replay(found: Report, path: Path) -> None:
    """Write a replay, whole or not at all.

    Raises:
        OutputError: the file cannot be written.
    """
    _write(_page(f"replay of {found.traffic.name}", replay_report(found)), path)


def write_capacity(found: Capacity, path: Path) -> None:
    """Write what `walras capacity` found, whole or not at all.

    Raises:
        OutputError: the file cannot be written.
    """
    _write(_page(f"capacity for {found.traffic.name}", capacity_report(found)), path)


def write_economy(views: list[View], path: Path) -> None:
    """Write what `walras clear` found, whole or not at all.

    Raises:
        OutputError: the file cannot be written.
    """
    _write(_page(f"{', '.join(view.name for view in views)}, cleared", economy_report(views)), path)


def _page(title: str, body: str) -> str:
    """Ready HTML in the page's shell, with its style, scripts and content security policy."""
    here = files(__package__)
    style, script, page = (
        here.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js", "page.html")
    )
    plotly = get_plotlyjs()
    return Template(page).substitute(
        title=esc(title),
        allowed=f"{_hash(plotly)} {_hash(script)}",
        style=style,
        body=body,
        plotly=plotly,
        script=script,
    )


def _hash(script: str) -> str:
    """What the content security policy knows a script by; any other is not run."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _write(page: str, path: Path) -> None:
    # In the same folder, because a rename is atomic only inside one file system.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        try:
            with partial.open("x", encoding="utf-8", newline="\n") as sink:
                sink.write(page)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
