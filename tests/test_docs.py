"""The pages say what the program does: examples run, outputs and tables are fresh, nothing is left undocumented."""

from __future__ import annotations

import difflib
import importlib.util
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from walras.cli import app
from walras.settings import load_economy, settings_rows
from walras.simulate.sample import write_sample

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def _generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATE = _generate()
PAGES = [str(page.relative_to(ROOT)) for page in GENERATE.pages()]


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `walras sample -o sample.parquet` writes."""
    path = tmp_path_factory.mktemp("docs") / "sample.parquet"
    write_sample(path, 2000, 0)
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("docs") / "small.parquet"
    write_sample(path, 300, 0)
    return path


# --- examples and generated parts -------------------------------------------------------------------------------------

NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")


def _differs(old: str, new: str) -> bool:
    """Whether two lines differ in more than layout and the last digits, which another BLAS or solver may move."""
    if NUMBER.sub("#", old).split() != NUMBER.sub("#", new).split():
        return True
    if "passes)" in old:
        old, new = (re.sub(r"\(\d+ passes\)", "", line) for line in (old, new))
    pairs = zip(NUMBER.findall(old), NUMBER.findall(new), strict=True)
    numbers = ((float(a.replace(",", "")), float(b.replace(",", ""))) for a, b in pairs)
    return any(a != pytest.approx(b, rel=0.02, abs=1e-6) for a, b in numbers)


def _stale(old: str, new: str) -> list[str]:
    """Lines of a diff that matter."""
    before, after = old.splitlines(), new.splitlines()
    if len(before) == len(after) and not any(map(_differs, before, after)):
        return []
    return list(difflib.unified_diff(before, after, "the page", "what the program says now", lineterm=""))


@pytest.mark.parametrize("page", PAGES)
def test_a_page_says_what_the_program_does(page: str, sample: Path) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    new, failures = GENERATE.rewrite(text, sample)
    assert not failures, "\n".join(failures)
    assert not (stale := _stale(text, new)), "\n".join(["run: python docs/generate.py", *stale])


@pytest.mark.parametrize(
    ("old", "new", "differs"),
    [
        ("price  1.448 net", "price 1.449   net", False),
        ("price 1.448", "price 1.6", True),
        ("gap 1e-16", "gap 0", False),
        ("gap 1e-16", "gap 0.1", True),
        ("$1,234 (2 passes)", "$1,235 (3 passes)", False),
        ("0.2 free", "0.2 slack", True),
    ],
)
def test_staleness_is_about_words_and_digits_that_matter(old: str, new: str, differs: bool) -> None:
    assert _differs(old, new) is differs


def test_an_undocumented_failure_is_a_failure(sample: Path) -> None:
    _, failures = GENERATE.rewrite("```console\n$ walras prices missing.parquet\n```\n", sample)
    assert failures
    assert "exit code 3" in failures[0]
    _, failures = GENERATE.rewrite("```python\n>>> 1 + 1\n3\n\n```\n", sample)
    assert failures


# --- settings ---------------------------------------------------------------------------------------------------------


def test_every_setting_is_on_its_page() -> None:
    text = (DOCS / "settings.md").read_text(encoding="utf-8")
    assert [key for key, *_ in settings_rows() if f"| `{key}` |" not in text] == []


def test_the_example_settings_load(tmp_path: Path) -> None:
    text = (DOCS / "settings.md").read_text(encoding="utf-8")
    example = re.search(r"^```toml\n(.*?)^```", text, flags=re.S | re.M)
    assert example is not None
    path = tmp_path / "economy.toml"
    path.write_text(example[1], encoding="utf-8")
    economy = load_economy(path, {})
    assert set(economy.model_dump(exclude_unset=True)) == set(tomllib.loads(example[1]))


# --- the JSON contract ------------------------------------------------------------------------------------------------

NAMED = {
    "prices": "LAYER",
    "multipliers": "LAYER",
    "attainable.multipliers": "CONSTRAINT",
    "attainable.used": "CONSTRAINT",
    "sensitivity[].multipliers": "CONSTRAINT",
    "failures": "LABEL",
    "shares": "PRICES",
    "shares.PRICES": "USE",
}
"""Objects whose keys are names from the log or from a list, and how the page writes such a name."""
WHOLE = {"price_vector"}
"""Described by another format."""


def _keys(value: Any, path: str = "") -> Iterator[str]:
    if path in WHOLE:
        yield path
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _keys(item, f"{path}.{NAMED.get(path, key)}".removeprefix("."))
    elif isinstance(value, list):
        for item in value:
            yield from _keys(item, f"{path}[]")
    else:
        yield path


def _documented() -> dict[str, bool]:
    """JSON key → whether `walras prices` prints it too."""
    text = (DOCS / "audit.md").read_text(encoding="utf-8").split("<!-- json keys -->")[1].split("\n#")[0]
    rows = re.findall(r"^\| `([^`]+)` \| (●?) ?\|", text, flags=re.M)
    assert len(dict(rows)) == len(rows), "a key is listed twice"
    return {key: bool(mark) for key, mark in rows}


def _printed(*command: str) -> set[str]:
    ran = CliRunner().invoke(app, [*command, "--json"])
    assert ran.exit_code == 0, ran.output
    data = json.loads(ran.stdout)
    # An empty list has no keys to show: notes only appear where something was left out.
    return {*_keys(data), "notes[]"}


def test_every_json_key_of_an_audit_is_documented_and_there(small: Path) -> None:
    printed = _printed("audit", str(small), "--budget-usd", "0.01", "--sla-s", "20")
    # Where the log is too small for it, `attainable` is null: a key of its own in the table.
    assert printed | {"attainable"} == set(_documented())


def test_every_json_key_of_prices_is_documented_and_there(small: Path) -> None:
    assert _printed("prices", str(small), "--budget-usd", "0.01") == {
        k for k, also in _documented().items() if also
    }


# --- the site ---------------------------------------------------------------------------------------------------------


def test_every_page_has_its_place() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = {page for entry in site["nav"] for page in entry.values()}
    there = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    decisions = {page for page in there if re.fullmatch(r"decisions/\d{4}-.*\.md", page)}
    assert listed == there - decisions
    index = (DOCS / "decisions" / "README.md").read_text(encoding="utf-8")
    assert [page for page in sorted(decisions) if f"({Path(page).name})" not in index] == []


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.S | re.M)
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    assert [link for link in links if "://" not in link and not (path.parent / link).exists()] == []
