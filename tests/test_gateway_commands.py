"""`walras serve`, `keys`, `ledger`, `check` as a user meets them: what they print, what they keep to themselves, what errors teach."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import sqlite3
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pyarrow.parquet as pq
import pytest

import gateways
from gateways import Service, running
from logs import Ran, walras, walras_script

ROOT = Path(__file__).parent.parent
UPSTREAM = """
value = 1.0
[upstreams.first]
base_url = "{url}"
key_env = ["WALRAS_TEST_KEY"]
[models.m]
upstream = "first"
input_usd = 1
output_usd = 2
"""


def call(service: Service, path: str, body: object = None, key: str | None = None) -> Any:
    """What the service answers to one request, and its id."""
    request = urllib.request.Request(
        service.url + path,
        None if body is None else json.dumps(body).encode(),
        {"authorization": f"Bearer {key or service.key}"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer), answer.headers["x-request-id"]


def chat(service: Service, key: str | None = None) -> str:
    body = {"model": "auto", "max_tokens": 4, "messages": [{"role": "user", "content": "Hello"}]}
    return str(call(service, "/v1/chat/completions", body, key)[1])


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One that has answered three requests, and was told how good one of the answers was."""
    with running(tmp_path_factory.mktemp("commands")) as found:
        ids = [chat(found) for _ in range(3)]
        call(found, "/v1/outcomes", {"request_id": ids[0], "quality": 1.0})
        yield found


def failed(ran: Ran, code: int, *says: str) -> None:
    """It ended with this code, one line on stderr that says all of these, and no trace of Python."""
    assert ran.code == code, (ran.out, ran.err)
    assert "Traceback" not in ran.err
    assert "a bug in Walras" not in ran.err
    line = " ".join(ran.err.split())
    for part in says:
        assert part in line, (part, line)


# --- keys -------------------------------------------------------------------------------------------------------------


def test_a_secret_is_shown_once_and_never_again(tmp_path: Path) -> None:
    data = ("--data", tmp_path / "new" / "data")  # made with all that leads to it
    made = walras(
        "keys", "create", "--tenant", "acme", "--budget-usd", 12.5, "--period", "week", "--json", *data
    ).data
    secret = made.pop("key")
    assert secret.startswith("wl-")
    assert made["budget_usd"] == 12.5
    assert (made["tenant"], made["scope"], made["period"]) == ("acme", "tenant", "week")
    rotated = walras("keys", "rotate", made["id"], "--json", *data).data
    assert rotated["key"] != secret
    plain = walras("keys", "create", "--tenant", "other", *data)
    listed = [walras("keys", "list", *data), walras("keys", "list", "--json", *data)]
    listed.append(walras("keys", "revoke", made["id"], *data))
    listed.append(walras("keys", "revoke", made["id"], "--json", *data))
    for shown in listed:
        assert shown.code == 0
        for one in (secret, rotated["key"], plain.out.strip()):
            assert one not in shown.out + shown.err
    assert "$12.50 by week" in listed[0].out
    assert [key["tenant"] for key in listed[1].data["keys"]] == ["acme", "other"]
    assert listed[3].data["revoked_ns"] is not None
    kept = b"".join(file.read_bytes() for file in (tmp_path / "new" / "data").iterdir())
    assert secret.encode() not in kept
    assert oct((tmp_path / "new" / "data" / "keys.sqlite").stat().st_mode)[-3:] == "600"


def test_a_new_key_works_at_once_and_a_revoked_one_soon_does_not(service: Service) -> None:
    made = walras(
        "keys", "create", "--tenant", "fresh", "--budget-usd", 1, "--data", service.data, "--json"
    ).data
    chat(service, made["key"])
    budget, _ = call(service, "/v1/budgets", key=made["key"])
    assert budget["budget_usd"] == 1.0
    assert 0 < budget["spent_usd"] < 0.01
    assert budget["reserved_usd"] == 0
    assert budget["multiplier"] >= 0
    walras("keys", "revoke", made["id"], "--data", service.data)
    time.sleep(1.1)
    with pytest.raises(urllib.error.HTTPError, match="401"):
        chat(service, made["key"])


def test_names_are_shown_as_they_are(tmp_path: Path) -> None:
    walras("keys", "create", "--tenant", "[/bold]x", "--class", "[red]", "--data", tmp_path)
    shown = walras("keys", "list", "--data", tmp_path).out
    assert "[/bold]x" in shown
    assert "[red]" in shown


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (("keys", "list", "--data", "nowhere"), 4, ("no keys.sqlite", "walras keys create", "--data")),
        (("keys", "create"), 2, ("--tenant",)),
        (("keys", "create", "--tenant", ""), 4, ("name of a tenant",)),
        (("keys", "create", "--tenant", "a", "--budget-usd", "1e12"), 4, ("below",)),
        (("keys", "create", "--tenant", "a", "--budget-usd", "-1"), 2, ("--budget-usd",)),
        (("keys", "create", "--tenant", "a", "--value", "nan"), 4, ("finite",)),
        (("keys", "create", "--tenant", "a", "--period", "fortnight"), 2, ("'week'",)),
        (("keys", "create", "--tenant", "a", "--data", "file"), 7, ("file", "cannot be made")),
        (("ledger", "verify", "--data", "nowhere"), 4, ("no ledger.sqlite", "walras serve")),
        (("ledger", "stats", "--data", "broken"), 3, ("ledger.sqlite", "not a database")),
        (("keys", "list", "--data", "broken"), 3, ("keys.sqlite", "not a database")),
    ],
)
def test_errors_say_what_to_do(
    options: tuple[str, ...],
    code: int,
    says: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("broken").mkdir()
    for name in ("keys", "ledger"):
        Path(f"broken/{name}.sqlite").write_text("no database, but long enough to be taken for one\n" * 20)
    failed(walras(*options), code, *says)


def test_a_key_is_named_by_its_id(tmp_path: Path) -> None:
    made = walras("keys", "create", "--tenant", "a", "--data", tmp_path, "--json").data
    wrong = walras("keys", "revoke", made["key"], "--data", tmp_path)
    failed(wrong, 4, "never by its secret", "walras keys list")
    assert made["key"] not in wrong.err
    failed(walras("keys", "rotate", made["id"][:-1], "--data", tmp_path), 4, f"did you mean '{made['id']}'?")


# --- ledger -----------------------------------------------------------------------------------------------------------


def test_the_ledger_is_read_while_the_service_writes_it(service: Service) -> None:
    data = ("--data", service.data)
    figures = walras("ledger", "stats", "--json", *data).data
    assert figures["entries"] >= 3
    assert figures["outcomes"] == 1
    assert figures["by_status"]["ok"] >= 3
    shown = walras("ledger", "stats", *data).out
    assert "default" in shown
    assert " UTC" in shown
    books = walras("ledger", "verify", "--json", *data).data
    assert books["ok"] is True
    assert books["entries"] >= figures["entries"]
    assert books["violations"] == []
    assert "The ledger balances." in walras("ledger", "verify", *data).out
    assert walras("ledger", "verify", *data).out.count("\n") < 20


def test_an_export_says_what_is_in_it_and_that_it_is_simulated(service: Service, tmp_path: Path) -> None:
    plain, wide = tmp_path / "log.parquet", tmp_path / "wide.parquet"
    done = walras("ledger", "export", "-o", plain, "--data", service.data, "--json").data
    assert done["requests"] == done["rows"] == pq.read_metadata(plain).num_rows
    assert done["with_quality"] == 1
    assert done["synthetic"] is True
    told = walras("ledger", "export", "-o", wide, "--alternatives", "--data", service.data)
    assert "1 of them with an outcome" in " ".join(told.err.split())
    assert "SIMULATED" in told.err
    assert pq.read_metadata(wide).num_rows == 3 * done["requests"]
    audited = walras("audit", plain, "--json").data
    assert audited["synthetic"] is True
    failed(
        walras("ledger", "export", "-o", tmp_path / "no" / "x.parquet", "--data", service.data),
        7,
        "no folder",
    )


def test_a_running_service_is_told_of_corrections_itself(service: Service, tmp_path: Path) -> None:
    file = tmp_path / "invoice.csv"
    file.write_text("request_id,charged_usd\nr,1\n", encoding="utf-8")
    ran = walras("ledger", "reconcile", file, "--data", service.data)
    failed(ran, 7, "another process writes it", "POST /v1/reconcile")
    with pytest.raises(urllib.error.HTTPError, match="404"):
        call(service, "/v1/reconcile", {"request_id": "r", "charged_usd": 1})


def test_what_is_old_is_retired_only_when_nothing_writes(service: Service) -> None:
    failed(walras("ledger", "retain", "--days", 1, "--data", service.data), 7, "another process writes it")


def test_books_that_do_not_balance_are_named(tmp_path: Path) -> None:
    with running(tmp_path) as served:
        request_id = chat(served)
    assert walras("ledger", "retain", "--days", 1, "--data", served.data, "--json").data == {"removed": 0}
    assert walras("ledger", "verify", "--data", served.data).code == 0
    with sqlite3.connect(served.data / "ledger.sqlite") as file:
        file.execute("DROP TRIGGER entries_stay")
        file.execute("UPDATE entries SET charged_nano = charged_nano + 1")
    file.close()
    ran = walras("ledger", "verify", "--data", served.data)
    failed(ran, 3, "do not balance")
    assert "does not balance" in ran.out
    assert walras("ledger", "verify", "--data", served.data, "--json").code == 3
    assert request_id not in ran.err


# --- check ------------------------------------------------------------------------------------------------------------


def settings(folder: Path, text: str) -> tuple[str, Path]:
    path = folder / "economy.toml"
    path.write_text(text, encoding="utf-8")
    return "--settings", path


def test_check_without_settings_says_that_all_is_simulated() -> None:
    ran = walras("check")
    assert ran.code == 0
    assert "answers" in ran.out
    assert "SIMULATED" in ran.err
    assert walras("check", "--json").data == {
        "upstreams": [{"upstream": "simulated", "route": "default", "problem": None}]
    }


def test_check_names_what_does_not_answer_and_keeps_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:  # bound and not listening: nobody else can answer there
        taken.bind(("127.0.0.1", 0))
        file = settings(tmp_path, UPSTREAM.format(url=f"http://127.0.0.1:{taken.getsockname()[1]}/v1"))
        failed(walras("check", *file), 4, "upstreams.first.key_env", "WALRAS_TEST_KEY is not set")
        monkeypatch.setenv("WALRAS_TEST_KEY", "sk-very-secret-1234")
        for options in ((), ("--json",)):
            ran = walras("check", *file, *options)
            failed(ran, 4, "first", "cannot be reached")
            assert "sk-very-secret" not in ran.out + ran.err


# --- serve ------------------------------------------------------------------------------------------------------------

FIRST = UPSTREAM.format(url="http://x/v1")


def served(*options: object) -> Ran:
    """`walras serve OPTIONS` that does not come to serve: the command here, the process it becomes in one of its own."""
    becomes: list[list[str]] = []
    port = () if "--port" in options else ("--port", 0)
    with mock.patch.dict(os.environ), mock.patch.object(os, "execv", lambda _, argv: becomes.append(argv)):
        ran = walras("serve", *options, *port)
        if not becomes:
            return ran
        assert "pass-word" not in becomes[0][-1], "everybody on the machine sees arguments"
        done = subprocess.run(becomes[0], capture_output=True, text=True, timeout=60, check=False)
    return Ran(done.returncode, ran.out + done.stdout, ran.err + done.stderr)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x = 1", ("x: unknown setting",)),
        ("x = [", ("is not TOML",)),
        (FIRST.replace('upstream = "first"', 'upstream = "frist"'), ("no upstream 'frist'", "first")),
        (FIRST.replace("base_url", "bas_url"), ("unknown setting", "'base_url'")),
        (FIRST, ("upstreams.first.key_env", "WALRAS_TEST_KEY is not set")),
        (
            FIRST.replace("http://x/v1", "ftp://x").replace("WALRAS_TEST_KEY", "PATH"),
            ("upstreams.first.base_url", "must be http"),
        ),
        (FIRST.replace("[models.m]", "[models.auto]"), ("models.auto", "rename it")),
        (
            '[tenants.a]\nforbidden_models = ["simulated-smal"]\n',
            ("tenants.a.forbidden", "'simulated-small'"),
        ),
        ('[upstreams.first]\nkind = "simulated"\n', ("models",)),  # and nothing simulated in its place
        ('[gateway]\nredact = ["("]\n', ("gateway.redact", "no regular expression")),
    ],
)
def test_settings_that_cannot_serve_are_refused(text: str, says: tuple[str, ...], tmp_path: Path) -> None:
    ran = served(*settings(tmp_path, text), "--data", tmp_path / "data")
    failed(ran, 4, *says)
    assert ran.out == ""


def test_what_stands_in_the_way_is_named(service: Service, tmp_path: Path) -> None:
    port = service.url.rpartition(":")[2]
    failed(served("--data", tmp_path / "a", "--port", port), 4, "already in use", "--port")
    failed(served("--data", service.data), 7, "another process writes it")
    failed(served("--data", "/proc/no"), 7, "cannot be made")
    failed(served("--data", tmp_path / "a", "--ledger", "mysql://x"), 4, "--ledger", "postgresql://")
    url = "postgresql://nobody:pass-word@127.0.0.1:1/x"
    nowhere = served("--data", tmp_path / "a", "--ledger", url)
    failed(nowhere, 7, "PostgreSQL", "does not answer")
    assert "pass-word" not in nowhere.out + nowhere.err
    menu = tmp_path / "menu.json"
    menu.write_text("{}")
    failed(served("--data", tmp_path / "b", "--menu", menu), 4, "walras menu --json")
    chat(service)  # which goes on


def test_ready_is_one_line_and_the_key_is_told_once(tmp_path: Path) -> None:
    with running(tmp_path) as first:
        assert first.key.startswith("wl-")
        assert first.key not in first.log.read_text(encoding="utf-8")
        chat(first)
    with running(tmp_path, key=first.key) as again:
        assert again.key == first.key, "there is a key already: it is not told again, and no other is made"
        chat(again)
    assert len(walras("keys", "list", "--data", first.data, "--json").data["keys"]) == 1


def test_without_ready_json_it_says_where_and_that_it_is_simulated(tmp_path: Path) -> None:
    command = [gateways.WALRAS, "serve", "--data", tmp_path / "data", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = [process.stderr.readline() for _ in range(3)]
        process.terminate()
    assert "SIMULATED" in lines[0]
    assert "wl-" in lines[1]
    assert lines[2].startswith("watch: http://127.0.0.1:")
    assert process.returncode == 0


# --- completion, help, and the example --------------------------------------------------------------------------------


def test_the_shell_completes_it() -> None:
    line = "walras keys create --period "
    asked = {"_WALRAS_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    periods = walras_script(env={**os.environ, **asked}).out.split()
    assert periods == ["none", "minute", "hour", "day", "week", "month"]


@pytest.mark.parametrize("command", ["serve", "check", "keys create", "keys list", "keys rotate", "keys revoke", "ledger export", "ledger verify", "ledger stats", "ledger reconcile", "ledger retain"])  # fmt: skip
def test_help_has_a_word_on_every_option(command: str) -> None:
    from typer.main import get_command  # noqa: PLC0415 - typer's own view of the options

    from walras.cli import app  # noqa: PLC0415

    found: Any = get_command(app)
    for word in command.split():
        found = found.commands[word]
    assert found.help
    assert [p.name for p in found.params if not getattr(p, "help", None)] == []
    if command != "serve":
        assert "json" in {p.name for p in found.params}


def test_the_example_spends_a_budget_and_audits_its_own_ledger(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("service_example", ROOT / "examples" / "service.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    for name, value in {"BUDGET_USD": "0.0004", "BATCH": 4, "BATCHES": 9, "AT_ONCE": 4, "WORDS": 6}.items():
        monkeypatch.setattr(example, name, value)

    def run(command: list[object], **_: object) -> SimpleNamespace:
        ran = walras(*command[1:])
        assert ran.code == 0, ran.err
        print(ran.out)  # noqa: T201 - as the command would
        return SimpleNamespace(stdout=ran.out)

    here = SimpleNamespace(run=run, Popen=subprocess.Popen, PIPE=subprocess.PIPE)
    monkeypatch.setattr(example, "subprocess", here)
    example.main(tmp_path / "service")
    out = capfd.readouterr().out
    assert "SIMULATED" in out
    assert "The ledger balances." in out
    assert "SYNTHETIC LOG" in out
    table = out.split("what answered\n")[1].split("\nThen users")[0]
    prices = [float(line.split()[2].replace(",", "")) for line in table.splitlines()]
    assert prices[0] < prices[-1], "money grew dear as it ran short"
    assert "none (4" in table, "and then ran out"
