"""What the command line shows and writes: text, tables, progress, and errors where that fails."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from walras.errors import OutputError

out, err = Console(), Console(stderr=True)


def say(text: str, style: str | None = None) -> None:
    """A line on stderr, as it is."""
    err.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def bar(what: str, total: int, *, of_bytes: bool = False) -> Iterator[Any]:
    """A progress bar on stderr, shown only on a terminal; yields a function that advances it."""
    columns = [
        TextColumn(what),
        BarColumn(),
        DownloadColumn() if of_bytes else TextColumn("{task.completed:,}"),
    ]
    with Progress(
        *columns, TimeElapsedColumn(), console=err, transient=True, disable=not err.is_terminal
    ) as progress:
        task = progress.add_task(what, total=total)
        yield lambda step: progress.advance(task, step)


@contextmanager
def steps() -> Iterator[Any]:
    """A spinner with the current step; yields a function that names it."""
    columns = [SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()]
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task("", total=None)
        yield lambda step: progress.update(task, description=step)


def show(what: RenderableType) -> None:
    """To standard output: text as it is, anything else as rich renders it."""
    text = f"{what}\n"
    if not isinstance(what, str):
        with out.capture() as captured:
            out.print(what)
        text = captured.get()
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        # What could not be written is still in the buffer, and Python would try again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # the reader, `| head`, has seen enough
            sys.exit(0)
        raise OutputError(f"standard output: cannot be written: {error.strerror or error}") from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error


def check_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path}: cannot be made: {error.strerror or error}") from error


def check_writable(path: Path) -> None:
    """Fail before the work, not after it."""
    if path.is_dir():
        raise OutputError(f"{path}: cannot be written: it is a folder")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: cannot be written: no folder '{path.parent}'")
