"""docs/benchmarks.md, a section at a time: each bench_*.py rewrites its own and leaves the others as they are."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
HEADER = """\
# Benchmarks

Written by `make bench`, a section by each `benchmarks/bench_*.py`. Machines are shared and noisy: read the ratios, which
are taken within one run, not the seconds. Medians, with the range in brackets, unless a table says otherwise.
"""
LOAD = os.getloadavg()[0]
"""When the benchmark began."""


def write_section(name: str, markdown: str) -> None:
    """Put `markdown` between this section's markers, whatever was there before."""
    page = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    sections = dict(re.findall(r"<!-- begin (\S+) -->\n(.*?)<!-- end \1 -->", page, flags=re.DOTALL))
    sections[name] = f"\n{markdown.strip()}\n\n{machine()}\n\n"
    body = (f"\n<!-- begin {n} -->\n{text}<!-- end {n} -->\n" for n, text in sorted(sections.items()))
    PAGE.write_text(HEADER + "".join(body), encoding="utf-8")
    print(f"wrote section {name} of {PAGE}")


def machine() -> str:
    cpu = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpu.read_text(encoding="utf-8")) if cpu.exists() else None
    return (
        f"*Measured on {os.cpu_count()} cores ({found[1] if found else platform.processor()}), Python "
        f"{platform.python_version()}, numpy {np.__version__}; load average {LOAD:.1f} at the start "
        f"and {os.getloadavg()[0]:.1f} at the end, this benchmark included.*"
    )


def spread(values: Sequence[float], digits: str = ".2g") -> str:
    """The median, and the range of several."""
    if not values:
        return "–"
    if len(values) == 1:
        return f"{values[0]:{digits}}"
    return f"{np.median(values):{digits}} ({min(values):{digits}}–{max(values):{digits}})"
