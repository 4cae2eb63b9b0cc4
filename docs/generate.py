"""Rewrite what the pages quote from the program, so that they cannot go stale:  python docs/generate.py

Three kinds of thing, in README.md and in every page under docs/:

- a table between `<!-- generated: NAME -->` and `<!-- end -->` is written by the function of that name in `TABLES`;
- in a ```console block, the output under each `$ walras …`, `$ make demo` and `$ echo $?` is what it prints, in a
  folder of the page's own that holds sample.parquet (`walras sample -o sample.parquet`); where a block shows a line
  `[…]`, only as many lines above and below it are shown as before. Other commands are not run;
- a ```python block is run as a doctest, a ```toml block is written to economy.toml, and a ```csv block to the file that
  the line above it names (`models.csv`:), in page order.

tests/test_docs.py calls `rewrite` too, and fails where a page would change.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import re
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from rich.console import Console

from walras import cli, console, errors
from walras.records import COLUMNS
from walras.simulate.sample import write_sample
from walras.supply.names import ENGINES, MEANING

ROOT = Path(__file__).parent.parent
WIDTH = 100
CUT = "[…]"


def pages() -> list[Path]:
    """README.md and everything under docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


# --- tables -----------------------------------------------------------------------------------------------------------


def records_table() -> str:
    """The record schema."""
    rows = ["| column | type | required | range | also read as | meaning |", "|---|---|---|---|---|---|"]
    for c in COLUMNS:
        low, high = c.low, c.high
        span = "" if low is None else f"≥ {low:g}" if high is None else f"{low:g} to {high:g}"
        also = ", ".join(f"`{alias}`" for alias in c.aliases)
        rows.append(
            f"| `{c.name}` | `{c.type}` | {'yes' if c.required else ''} | {span} | {also} | {c.meaning} |"
        )
    return "\n".join(rows)


def settings_table() -> str:
    """Every setting."""
    return _run("walras settings", Path.cwd())[1].strip()


def exit_codes_table() -> str:
    """What each exit code means, from the error classes."""
    found: dict[int, list[type[errors.WalrasError]]] = {}
    for kind in errors.WalrasError.__subclasses__():
        if kind.__module__ != errors.__name__:  # the service's own, which never reach the command line
            continue
        found.setdefault(kind.exit_code, []).append(kind)
    rows = ["| code | error | meaning |", "|---|---|---|", "| 0 | | done |"]
    rows += [
        "| 1 | | a bug in Walras; `WALRAS_DEBUG=1` shows where |",
        "| 2 | | wrong usage: no such option |",
    ]
    for code, kinds in sorted(found.items()):
        names = ", ".join(f"`{kind.__name__}`" for kind in kinds)
        meaning = " ".join((kind.__doc__ or "").split("\n")[0].replace("|", "\\|") for kind in kinds)
        rows.append(f"| {code} | {names} | {meaning} |")
    return "\n".join([*rows, "| 130 | | interrupted |"])


def engine_names_table() -> str:
    """What is read of each engine, the name that is looked for first before the others."""
    rows = []
    for kind, engine in ENGINES.items():
        rows += [f'**{engine.title}**, `kind = "{kind}"`', "", "| | |", "|---|---|"]
        for quantity, what in MEANING.items():
            formulas = ((f"`{f.text}`", f.versions and f", {f.versions}") for f in engine.formulas[quantity])
            names = "<br>".join(map("".join, formulas))
            rows.append(f"| {what} | {names or 'not exported'} |")
        rows.append("")
    return "\n".join(rows).strip()


TABLES: dict[str, Callable[[], str]] = {
    "engine names": engine_names_table,
    "records": records_table,
    "settings": settings_table,
    "exit codes": exit_codes_table,
}


# --- commands ---------------------------------------------------------------------------------------------------------


def _run(command: str, folder: Path) -> tuple[int, str]:
    """Exit code and output of one `walras …` command."""
    text, code = io.StringIO(), 0
    page = Console(file=text, width=WIDTH)
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(text),
        contextlib.redirect_stderr(text),
        mock.patch.multiple(console, out=page, err=page),
        mock.patch.object(sys, "argv", shlex.split(command)),
    ):
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
    return code, "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines())


def _demo(folder: Path) -> tuple[int, str]:
    """`make demo` without make: the recipe's walras commands."""
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8").split("\ndemo:")[1].split("\n\n")[0]
    (folder / "demo").mkdir(exist_ok=True)
    code, texts = 0, []
    for command in re.findall(r"\$\(BIN\)/(walras .*)", recipe):
        code, text = _run(command, folder)
        texts.append(text)
    return code, "\n".join(texts)


def _console(block: str, folder: Path, failures: list[str]) -> str:
    """The block with the outputs it has now."""
    out, code = [], 0
    for part in filter(None, re.split(r"^(?=\$ )", block, flags=re.M)):
        written = re.match(r"(?:[^\n]*\\\n)*[^\n]*", part)[0]  # a line that ends in \ goes on
        shown = part[len(written) :].strip("\n").splitlines()
        command = re.sub(r"\\\n\s*", "", written).removeprefix("$ ")
        if command == "echo $?":
            out += [written, str(code)]
            code = 0
            continue
        if command != "make demo" and not command.startswith("walras "):
            out += [written, *shown]
            continue
        if code:
            failures.append(f"exit code {code} is not documented (`$ echo $?`) before `$ {command}`")
        code, text = _demo(folder) if command == "make demo" else _run(command, folder)
        out += [written, *_cut(text.splitlines(), shown)]
    if code:
        failures.append(f"exit code {code} is not documented (`$ echo $?`) after `$ {command}`")
    return "\n".join(out) + "\n"


def _cut(output: list[str], before: list[str]) -> list[str]:
    """As much of the output as the page showed before."""
    if CUT not in before:
        return output
    head, tail = before.index(CUT), len(before) - before.index(CUT) - 1
    return [*output[:head], CUT, *output[len(output) - tail :]]


# --- pages ------------------------------------------------------------------------------------------------------------


def rewrite(text: str, sample: Path) -> tuple[str, list[str]]:
    """The page as it would be now, and what failed on it."""
    failures: list[str] = []
    names: dict[str, object] = {}
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS, verbose=False)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "sample.parquet").symlink_to(sample)

        def block(found: re.Match[str]) -> str:
            file, kind, body = found[1], found[2], found[3]
            if kind == "csv":
                (folder / file).write_text(body, encoding="utf-8")
                return found[0]
            if kind == "console":
                body = _console(body, folder, failures)
            elif kind == "toml":
                (folder / "economy.toml").write_text(body, encoding="utf-8")
            elif kind == "python":
                test = doctest.DocTestParser().get_doctest(body, names, "page", None, None)
                with contextlib.chdir(folder):
                    runner.run(test, out=failures.append, clear_globs=False)
                names.update(test.globs)
            return f"```{kind}\n{body}```"  # only a csv block has a name above it

        def table(found: re.Match[str]) -> str:
            return f"<!-- generated: {found[1]} -->\n\n{TABLES[found[1]]()}\n\n<!-- end -->"

        text = re.sub(r"<!-- generated: ([a-z ]+) -->.*?<!-- end -->", table, text, flags=re.S)
        text = re.sub(
            r"(?:^`(\S+\.csv)`:\n\n)?^```(console|toml|python|csv)\n(.*?)^```", block, text, flags=re.S | re.M
        )
    return text, failures


def main() -> None:
    """Rewrite every page in place."""
    with tempfile.TemporaryDirectory() as name:
        sample = Path(name) / "sample.parquet"
        write_sample(sample, 2000, 0)
        for page in pages():
            text = page.read_text(encoding="utf-8")
            new, failures = rewrite(text, sample)
            if new != text:
                page.write_text(new, encoding="utf-8")
                sys.stdout.write(f"{page.relative_to(ROOT)}: rewritten\n")
            for failure in failures:
                sys.stderr.write(f"{page.relative_to(ROOT)}: {failure}\n")
            if failures:
                sys.exit(1)


if __name__ == "__main__":
    main()
