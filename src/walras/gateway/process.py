"""The serving process: `walras serve` becomes it, so that it carries none of the analysis in memory.

python -m walras.gateway.process JSON
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path

import uvloop

from walras.errors import WalrasError
from walras.gateway import logs
from walras.gateway.keys import KeyStore, NewKey
from walras.gateway.serve import demo_economy, serve
from walras.ledger.store import LEDGER
from walras.settings import Economy


def main(argument: str) -> None:
    """Serve until a signal; errors become one line on stderr and an exit code."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a connection is a file
    wanted = json.loads(argument)
    declared = Economy.model_validate_json(wanted["economy"])
    economy = demo_economy(declared)
    logs.set_up(economy.gateway.log_level)

    def on_ready(url: str, keys: KeyStore) -> None:
        first = _first_key(keys)
        if wanted["ready_json"]:
            sys.stdout.write(json.dumps({"url": url, "key": first.secret if first else None}) + "\n")
            sys.stdout.flush()
            return
        what = "" if declared.models else ", SIMULATED: no provider is called"
        _say(f"serving {len(economy.models)} models at {url}{what}")
        if first:
            _say(f"a key with scope admin, shown this once: {first.secret}")
        _say(f"watch: {url}/" + (f"#key={first.secret}" if first else ""))

    menu = None if wanted["menu"] is None else Path(wanted["menu"])
    os.umask(0o077)  # the ledger may hold prompts
    try:
        uvloop.run(
            serve(economy, Path(wanted["data"]), ledger=os.environ.get(LEDGER), menu=menu, on_ready=on_ready)
        )
    except WalrasError as error:
        _say(f"walras: {error}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def _first_key(store: KeyStore) -> NewKey | None:
    """A key to begin with, where there is none that works."""
    if any(key.revoked_ns is None for key in store.list()):
        return None
    return store.create("default", scope="admin", now_ns=time.time_ns())


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main(sys.argv[1])
