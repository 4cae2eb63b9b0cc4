"""Two layers at one board against two layers alone. SIMULATED.

    WALRAS_DATA=FOLDER PYTHONPATH=studies python -m two_layers runs.jsonl             # 20 seeds
    ... --write                                    # docs/two-layers.md and its figure, from what is in runs.jsonl

May be stopped and begun again: what is in the file is not run again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from two_layers.report import write
from two_layers.run import cells, run_all
from two_layers.world import TRACES


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", help="JSON lines; of several, the first is added to")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument(
        "--decisions", type=int, default=60, help="requests of a window that the policies decide"
    )
    parser.add_argument("--trace", choices=TRACES, action="append", help="one of the traces; left out, both")
    parser.add_argument(
        "--part", choices=("main", "couplings"), help="left out, both, the main coupling first"
    )
    parser.add_argument("--write", action="store_true", help="run nothing, write docs/two-layers.md")
    given = parser.parse_args()
    if given.write:
        write(given.runs)
    else:
        todo = cells(given.trace or list(TRACES), given.seeds, given.decisions)
        run_all(given.runs[0], (one for one in todo if given.part in (None, one.part)))


if __name__ == "__main__":
    main()
