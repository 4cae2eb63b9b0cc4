"""What LiteLLM needs its database for, given to it without one: keys with budgets, and a log of what was spent. Runs in LiteLLM's environment.

Its own code checks the budgets, reserves before a call and settles after it (`common_checks`, `ProxyDBLogger`); only where the
database would be read or written, a table in memory is read and SQLite is written. BENCH_KEYS is JSON {hash of key: budget in USD}.
"""

import json
import os
import sqlite3

from litellm.proxy import proxy_server
from litellm.proxy._types import ProxyErrorTypes, ProxyException, UserAPIKeyAuth, hash_token
from litellm.proxy.auth.auth_checks import virtual_key_max_budget_check
from litellm.proxy.db.db_spend_update_writer import DBSpendUpdateWriter
from litellm.proxy.hooks.proxy_track_cost_callback import ProxyDBLogger

BUDGETS = json.loads(os.environ["BENCH_KEYS"])
SPENT = sqlite3.connect("spent.sqlite", isolation_level=None)
SPENT.execute("PRAGMA journal_mode=WAL")
SPENT.execute("PRAGMA synchronous=NORMAL")
SPENT.execute(
    "CREATE TABLE IF NOT EXISTS spent (id TEXT, key TEXT, usd REAL, model TEXT, input INTEGER, output INTEGER, began TEXT, ended TEXT)"
)


async def authenticate(_request, api_key):
    budget = BUDGETS.get(hash_token(api_key))
    if budget is None:
        raise ProxyException("no such key", ProxyErrorTypes.auth_error, "api_key", 401)
    key = UserAPIKeyAuth(api_key=api_key, max_budget=budget)
    # Its own look at a key from the database ends with this check; what a hook returns it only reserves for.
    await virtual_key_max_budget_check(valid_token=key, proxy_logging_obj=proxy_server.proxy_logging_obj)
    return key


async def update_database(
    _self, token, kwargs, completion_response, response_cost, start_time, end_time, **_more
):
    usage = getattr(completion_response, "usage", None)
    counts = (getattr(usage, "prompt_tokens", 0), getattr(usage, "completion_tokens", 0))
    row = (kwargs.get("litellm_call_id"), token, response_cost, kwargs.get("model"), *counts)
    SPENT.execute("INSERT INTO spent VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (*row, str(start_time), str(end_time)))
    return True


DBSpendUpdateWriter.update_database = update_database
log = ProxyDBLogger()
