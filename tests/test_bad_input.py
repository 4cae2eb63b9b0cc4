"""Bad input: one line on stderr that says where, what and what to do; nothing on stdout; a documented exit code."""

from __future__ import annotations

import gzip
import os
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from logs import HEADER, PAIR, SCRIPT, Ran, walras, walras_script, write_csv, write_jsonl
from walras import cli
from walras.diagnosis import case as case_module
from walras.simulate import write_sample

RECORDS, SETTINGS, INFEASIBLE, OUTPUT = 3, 4, 5, 7


def refused(ran: Ran, code: int, *says: object) -> None:
    """It ended with `code` and one line that holds all of `says`."""
    assert ran.code == code, ran.err
    assert ran.out == ""
    assert ran.err.count("\n") == 1, ran.err
    assert ran.err.startswith("walras: ")
    assert "Traceback" not in ran.err
    assert "a bug in Walras" not in ran.err
    for part in says:
        assert str(part) in ran.err


def prices(path: Path, *options: object) -> Ran:
    return walras("prices", path, "--value", 1, *options)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "good.csv", PAIR)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sample") / "sample.parquet"
    write_sample(path, 100, seed=0)
    return path


def test_the_good_log_is_good(good: Path) -> None:
    assert prices(good, "--json").data["n_tasks"] == 1


# --- the file ---------------------------------------------------------------------------------------------------------


def test_missing_file(tmp_path: Path) -> None:
    refused(
        walras_script("prices", tmp_path / "no.csv", "--value", 1),
        RECORDS,
        tmp_path / "no.csv",
        "no such file",
    )


def test_folder(tmp_path: Path) -> None:
    refused(prices(tmp_path), RECORDS, tmp_path, "is a folder", "name the files in it")


@pytest.mark.parametrize("name", ["log.txt", "log", "log.xlsx", "log.parquet.gz"])
def test_wrong_extension(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("x")
    refused(prices(tmp_path / name), RECORDS, name, "unknown extension", ".parquet", ".csv", ".jsonl")


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_empty_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"log{suffix}"
    path.touch()
    refused(prices(path), RECORDS, path, "is empty")


def test_header_only(tmp_path: Path) -> None:
    refused(prices(write_csv(tmp_path / "log.csv", "")), RECORDS, "log.csv", "has no records", "one row per")


def test_blank_lines_only(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text("\n\n")
    refused(prices(tmp_path / "log.jsonl"), RECORDS, "log.jsonl", "has no records")


def test_parquet_without_rows(tmp_path: Path, sample: Path) -> None:
    pq.write_table(pq.read_table(sample).slice(0, 0), tmp_path / "log.parquet")
    refused(prices(tmp_path / "log.parquet"), RECORDS, "log.parquet", "has no records")


def test_truncated_parquet(tmp_path: Path, sample: Path) -> None:
    path = tmp_path / "cut.parquet"
    path.write_bytes(sample.read_bytes()[:-1000])
    ran = walras_script("audit", path, "--value", 1, "--json")
    refused(ran, RECORDS, path, "not a complete Parquet file", "still being written?")


def test_parquet_with_a_damaged_middle(tmp_path: Path, sample: Path) -> None:
    path = tmp_path / "damaged.parquet"
    raw = bytearray(sample.read_bytes())
    raw[2_000:6_000] = b"x" * 4_000
    path.write_bytes(raw)
    refused(prices(path), RECORDS, path)


def test_text_renamed_to_parquet(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "log.parquet", PAIR)
    refused(prices(path), RECORDS, path, "not a complete Parquet file")


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_other_formats_renamed_to_text(tmp_path: Path, sample: Path, suffix: str) -> None:
    path = tmp_path / f"log{suffix}"
    for raw, what in (
        (sample.read_bytes(), "is Parquet"),
        (gzip.compress(b"text"), "is gzip"),
        (b"PK\x03\x04zip", "spreadsheet"),
        ("text".encode("utf-16"), "is UTF-16"),
    ):
        path.write_bytes(raw)
        refused(prices(path), RECORDS, path, what, "export it again, or rename it")


@pytest.mark.parametrize("keep", [60, 5])
def test_truncated_gzip(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "log.csv.gz"
    path.write_bytes(gzip.compress(f"{HEADER}\n{PAIR}".encode() * 100)[:keep])
    refused(prices(path), RECORDS, path, "cannot be read")


def test_no_permission(good: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    good.chmod(0)
    refused(prices(good), RECORDS, good, "cannot be read: Permission denied")


# --- columns ----------------------------------------------------------------------------------------------------------


def test_missing_column_names_the_nearest(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "log.csv", PAIR, header="request_id,model,qualty,cost_usd")
    ran = walras_script("audit", path, "--value", 1)
    refused(ran, RECORDS, path, "no column 'quality'", "did you mean 'qualty'?", "--map quality=COLUMN")


def test_missing_column_far_from_all_lists_them(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "log.jsonl", [{"zzz": 1, "yyy": 2}])
    refused(prices(path), RECORDS, path, "no column 'request_id'", "known: zzz, yyy")


def test_wrong_delimiter_shows_what_was_read(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "log.csv", PAIR.replace(",", ";"), header=HEADER.replace(",", ";"))
    refused(prices(path), RECORDS, "no column 'request_id'", HEADER.replace(",", ";"))


def test_column_twice(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "log.csv", "r1,m,1,.1,0\n", header=HEADER + ",quality")
    refused(prices(path), RECORDS, path, "column 'quality'", "occurs twice in the header")


def test_mapping_to_a_column_that_is_not_there(good: Path) -> None:
    refused(prices(good, "--map", "quality=qualty"), RECORDS, "no column 'qualty'", "did you mean 'quality'?")


def test_value_column_that_is_not_there(good: Path) -> None:
    refused(walras("prices", good, "--value-column", "costusd"), RECORDS, "no column 'costusd'", "'cost_usd'")


@pytest.mark.parametrize("mapping", ["quality", "=x", "quality="])
def test_mapping_that_is_none(good: Path, mapping: str) -> None:
    refused(prices(good, "--map", mapping), SETTINGS, "--map", "is not NAME=COLUMN")


def test_mapping_of_an_unknown_column(good: Path) -> None:
    refused(prices(good, "--map", "qualty=x"), SETTINGS, "--map", "'qualty'", "did you mean 'quality'?")


@pytest.mark.parametrize("field", ["quality", "cost_usd"])
def test_column_without_a_single_value(tmp_path: Path, field: str) -> None:
    body = "r1,m,,.1\n" if field == "quality" else "r1,m,1,\n"
    refused(prices(write_csv(tmp_path / "log.csv", body)), RECORDS, f"column '{field}'", "null in every row")


# --- values -----------------------------------------------------------------------------------------------------------

VALUES = {
    "no id": (",m,1,.1", "request_id", "is missing"),
    "no model": ("r2,,1,.1", "model", "is missing"),
    "NaN cost": ("r2,m,1,NaN", "cost_usd", "is nan, which must be finite and ≥ 0 (null means unknown)"),
    "infinite cost": ("r2,m,1,inf", "cost_usd", "is inf, which must be finite"),
    "negative cost": ("r2,m,1,-0.1", "cost_usd", "is -0.1, which must be finite and ≥ 0"),
    "quality above 1": (
        "r2,m,87,.1",
        "quality",
        "is 87, which must be between 0 and 1 (divide by the scale's",
    ),
    "quality below 0": ("r2,m,-1,.1", "quality", "is -1, which must be between 0 and 1 (null means unknown)"),
    "text for a number": ("r2,m,good,.1", "quality", "is 'good', expected a number"),
}


@pytest.mark.parametrize("wrong", VALUES)
def test_wrong_value(tmp_path: Path, wrong: str) -> None:
    row, field, says = VALUES[wrong]
    path = write_csv(tmp_path / "log.csv", f"{PAIR}{row}\nr3,m,1,.1\n")
    refused(prices(path), RECORDS, f"{path}, row 3, column '{field}': {says}")


def test_wrong_value_through_the_script(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "log.csv", PAIR + "r2,m,1,-5\n")
    refused(walras_script("audit", path, "--value", 1), RECORDS, path, "row 3", "'cost_usd'", "is -5")


def test_wrong_value_in_a_mapped_column_names_the_file_s_own(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "log.csv", PAIR + "r2,m,9,.1\n", header="request_id,model,grade,cost_usd")
    refused(prices(path, "--map", "quality=grade"), RECORDS, "row 3, column 'grade'", "is 9")


def test_flag_that_is_none(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "log.csv", "r1,m,1,.1,true\nr2,m,1,.1,maybe\n", header=HEADER + ",chosen")
    refused(prices(path), RECORDS, "row 2, column 'chosen'", "is 'maybe', expected true or false")


def test_json_of_the_wrong_type(tmp_path: Path) -> None:
    row = {"request_id": "r1", "model": "m", "quality": 1, "cost_usd": 0.1}
    path = write_jsonl(tmp_path / "log.jsonl", [row, {**row, "request_id": "r2", "cost_usd": {"usd": 1}}])
    refused(prices(path), RECORDS, f"{path}, row 2, column 'cost_usd'", "expected a number")


def test_parquet_of_the_wrong_type(tmp_path: Path) -> None:
    columns = {"request_id": ["a", "b"], "model": ["m", "m"], "quality": ["1", "x"], "cost_usd": [1.0, 1.0]}
    pq.write_table(pa.table(columns), tmp_path / "log.parquet")
    refused(prices(tmp_path / "log.parquet"), RECORDS, "row 2, column 'quality'", "is 'x', expected a number")


# --- rows that contradict one another ---------------------------------------------------------------------------------


def test_duplicate(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "log.csv", PAIR + "r1,cheap,1,.1\n")
    refused(prices(path), RECORDS, f"{path}, row 3", "request 'r1', model 'cheap'", "--map model=COLUMN")


@pytest.mark.parametrize(
    ("column", "rows", "says"),
    [
        ("chosen", ("true", "true"), "marks a second model of the same request"),
        ("value_usd", ("1", "2"), "differs from an earlier row of the same request"),
        ("value_usd", ("1", ""), "differs from an earlier row of the same request"),
        ("tenant", ("me", "you"), "differs from an earlier row of the same request"),
        ("class", ("code", ""), "differs from an earlier row of the same request"),
        ("time_s", ("1", "1.5"), "differs from an earlier row of the same request"),
    ],
)
def test_rows_of_one_request_disagree(tmp_path: Path, column: str, rows: tuple[str, str], says: str) -> None:
    lines = zip(PAIR.splitlines(), rows, strict=True)
    body = "".join(f"{line},{cell}\n" for line, cell in lines)
    path = write_csv(tmp_path / "log.csv", body, header=f"{HEADER},{column}")
    refused(prices(path), RECORDS, f"{path}, row 2, column '{column}': {says}")


# --- text that is broken ----------------------------------------------------------------------------------------------


def test_csv_that_is_not_utf8(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "log.csv", PAIR.encode() + "r2,modèle,1,.1\n".encode("latin-1"))
    ran = walras_script("prices", path, "--value", 1)
    refused(ran, RECORDS, path, "line 4 is not UTF-8 (byte 0xe8)", "iconv -f LATIN1 -t UTF-8")


def test_jsonl_that_is_not_utf8(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "log.jsonl", [{"request_id": "r1", "model": "modele", "quality": 1, "cost_usd": 1}]
    )
    path.write_bytes(path.read_bytes() + path.read_bytes().replace(b"modele", b"mod\xe8le"))
    refused(prices(path), RECORDS, f"{path}, row 2, column 'model'", "not UTF-8", "iconv -f LATIN1 -t UTF-8")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"request_id": "r2", "model"', "is not JSON"),
        ("[1, 2]", "is not a JSON object"),
        ("plain", "is not JSON"),
    ],
)
def test_line_that_is_not_json(tmp_path: Path, line: str, says: str) -> None:
    path = write_jsonl(
        tmp_path / "log.jsonl", [{"request_id": "r1", "model": "m", "quality": 1, "cost_usd": 1}]
    )
    path.write_text(path.read_text() + line + "\n")
    refused(prices(path), RECORDS, f"{path}, row 2", says, "one object per line")


@pytest.mark.parametrize("row", ["r2,m,1", "r2,m,1,.1,?", '"r2,m,1,.1'])
def test_csv_row_with_another_number_of_fields(tmp_path: Path, row: str) -> None:
    path = write_csv(tmp_path / "log.csv", f"{PAIR}{row}\n")
    refused(prices(path), RECORDS, f"{path}, row 3", "expected 4 columns, got", "quote what holds commas")


# --- settings ---------------------------------------------------------------------------------------------------------

FILES = {
    "model": ("[tenants.me]\nforbidden_models = ['chaep']", "tenants.me.forbidden_models", "did you mean 'cheap'?"),
    "tenant": ("[tenants.mee]", "tenants.mee", "did you mean 'me'?"),
    "class": ("[classes.cod]", "classes.cod", "did you mean 'code'?"),
    "baseline": ("baseline = 'daer'", "baseline", "did you mean 'dear'?"),
    "key": ("budget_us = 1", "economy.toml: budget_us", "unknown setting (did you mean 'budget_usd'?)"),
    "key in a table": ("[tenants.me]\nvalu = 1", "economy.toml: tenants.me.valu", "did you mean 'value'?"),
    "TOML": ("budget_usd = = 1", "economy.toml", "is not TOML"),
    "TOML not UTF-8": ("# é".encode("latin-1"), "economy.toml", "is not TOML"),
    "type": ("budget_usd = 'much'", "economy.toml: budget_usd", "should be a valid number"),
    "table": ("tenants = 3", "economy.toml: tenants", "valid dictionary"),
    "columns": ("columns = 3", "economy.toml: columns", "valid dictionary"),
    "negative": ("[tenants.me]\nbudget_usd = -1", "economy.toml: tenants.me.budget_usd", "greater than or equal"),
    "infinite": ("budget_usd = inf", "economy.toml: budget_usd", "finite"),
    "two units": ("[tenants.me]\nbudget_usd = 1\nbudget_total_usd = 1", "economy.toml: tenants.me", "not both"),
    "resource usd": ("[resources.usd]\ncolumn = 'cost_usd'", "economy.toml", "use budget_usd"),
    "beliefs": ("risk_measure = 'max-min'", "economy.toml", "needs risk_beliefs"),
}  # fmt: skip


@pytest.mark.parametrize("what", FILES)
def test_bad_settings_file(tmp_path: Path, what: str) -> None:
    text, where, says = FILES[what]
    log = write_csv(tmp_path / "log.csv", PAIR.replace("\n", ",me,code\n"), header=HEADER + ",tenant,class")
    economy = tmp_path / "economy.toml"
    economy.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(prices(log, "--settings", economy), SETTINGS, where, says)


def test_bad_settings_file_through_the_script(good: Path, tmp_path: Path) -> None:
    (tmp_path / "economy.toml").write_text("slas = 1")
    ran = walras_script("audit", good, "--value", 1, "--settings", tmp_path / "economy.toml")
    refused(ran, SETTINGS, "economy.toml: slas: unknown setting (did you mean 'sla_s'?)")


def test_settings_file_that_is_not_there(good: Path) -> None:
    refused(prices(good, "--settings", "no.toml"), SETTINGS, "no.toml: cannot be read: No such file")


def test_tenant_in_a_log_without_tenants(good: Path, tmp_path: Path) -> None:
    (tmp_path / "e.toml").write_text("[tenants.me]")
    refused(
        prices(good, "--settings", tmp_path / "e.toml"),
        SETTINGS,
        "tenants.me",
        "the log has no column for tenants",
    )


def test_resource_that_is_not_there(good: Path, tmp_path: Path) -> None:
    (tmp_path / "e.toml").write_text("[resources.gpu]\ncolumn = 'cost'")
    refused(prices(good, "--settings", tmp_path / "e.toml"), RECORDS, "no column 'cost'", "'cost_usd'")


def test_resource_nobody_measured(tmp_path: Path) -> None:
    log = write_csv(tmp_path / "log.csv", "r1,m,1,.1,\n", header=HEADER + ",gpu_s")
    (tmp_path / "e.toml").write_text("[resources.gpu]\ncolumn = 'gpu_s'")
    refused(
        prices(log, "--settings", tmp_path / "e.toml"),
        SETTINGS,
        "resources.gpu",
        "'gpu_s' is null in every row",
    )


OPTIONS = {
    "two budgets": (["--budget-usd", 1, "--budget-total-usd", 1], "not both"),
    "quantile alone": (["--sla-quantile", 0.9], "sla_quantile needs sla_s > 0"),
    "quantile of 1": (["--sla-s", 1, "--sla-quantile", 1], "--sla-quantile: Input should be less than 1"),
    "SLA without latency": (["--sla-s", 1], "no column 'latency_s'"),
    "λ₀ without latency": (["--lambda0", 1], "no column 'latency_s'"),
    "envelope without risk": (["--risk", 1], "no column 'risk'"),
    "measure without scenarios": (
        ["--risk", 1, "--risk-measure", "cvar"],
        "needs the column 'risk_scenarios'",
    ),
    "negative budget": (["--budget-usd", -1], "--budget-usd: Input should be greater than or equal to 0"),
    "NaN budget": (["--budget-usd", "nan"], "--budget-usd: Input should be a finite number"),
    "α of 1": (["--risk-alpha", 1], "--risk-alpha: Input should be less than 1"),
    "NaN value": (["--value", "nan"], "--value: Input should be a finite number"),
    "infinite value": (["--value", "inf"], "--value: Input should be a finite number"),
    "negative value": (["--value", -5], "--value: Input should be greater than or equal to 0"),
}


@pytest.mark.parametrize("what", OPTIONS)
def test_bad_options(good: Path, what: str) -> None:
    options, says = OPTIONS[what]
    refused(prices(good, *options), SETTINGS, says)


def test_options_are_blamed_by_their_own_name_even_next_to_a_file(good: Path, tmp_path: Path) -> None:
    (tmp_path / "e.toml").write_text("value = 1")
    ran = walras("prices", good, "--settings", tmp_path / "e.toml", "--budget-usd", -1)
    refused(ran, SETTINGS, "walras: --budget-usd: ")


def test_no_value(good: Path) -> None:
    refused(walras_script("audit", good), SETTINGS, "no task has a value", "--value USD", "--value-column C")


def test_some_values_missing(tmp_path: Path) -> None:
    log = write_csv(tmp_path / "log.csv", "r1,m,1,.1,2\nr2,m,1,.1,\n", header=HEADER + ",value_usd")
    refused(walras("prices", log), SETTINGS, "1 of 2 tasks have no value", "--value USD")
    refused(walras("prices", log, "--value-column", "value_usd"), SETTINGS, "1 of 2 tasks have no value")


def test_unknown_baseline(good: Path) -> None:
    refused(
        walras("audit", good, "--value", 1, "--baseline", "deer"), SETTINGS, "'deer'", "did you mean 'dear'?"
    )


def test_baseline_that_was_not_recorded(good: Path) -> None:
    ran = walras("audit", good, "--value", 1, "--baseline", "realised")
    refused(ran, SETTINGS, "the log does not say what was chosen", "--baseline MODEL")


@pytest.mark.parametrize(
    "options", [["--valu", 1], ["--value", "much"], ["--risk-measure", "x"], ["--seed", -1]]
)
def test_wrong_usage(good: Path, options: list[object]) -> None:
    ran = walras("audit", good, *options)
    assert (ran.code, ran.out) == (2, "")
    assert str(options[0]) in ran.err
    assert "Usage" in ran.err


# --- nothing fits -----------------------------------------------------------------------------------------------------


def test_infeasible_budget_says_the_least(good: Path) -> None:
    ran = walras_script("prices", good, "--value", 1, "--no-defer", "--budget-usd", 0.005)
    refused(
        ran,
        INFEASIBLE,
        "budget 0.005 usd/task",
        "the least bound that would do is 0.01",
        "let tasks be deferred",
    )
    assert prices(good, "--no-defer", "--budget-usd", 0.01).code == 0


def test_budget_in_compute_units_that_is_slack(good: Path) -> None:
    ran = prices(good, "--numeraire", "compute", "--budget-usd", 100)
    refused(ran, INFEASIBLE, "compute has no price", "declare a budget that binds")


# --- output -----------------------------------------------------------------------------------------------------------


def test_html_into_a_folder_that_is_not_there(good: Path, tmp_path: Path) -> None:
    path = tmp_path / "no" / "report.html"
    ran = walras("audit", good, "--value", 1, "--html", path)
    refused(ran, OUTPUT, path, "cannot be written: no folder")


def test_html_onto_a_folder(good: Path, tmp_path: Path) -> None:
    refused(walras("audit", good, "--value", 1, "--html", tmp_path), OUTPUT, tmp_path, "it is a folder")


def small_files() -> None:
    """In a child: no file may grow beyond 20 kB, as if the disk were full."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def test_full_disk_keeps_the_old_report(sample: Path, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("the old report")
    assert walras_script("audit", sample, "--json").code == 0  # what is compiled once is then on disk already
    ran = walras_script("audit", sample, "--html", path, "--json", preexec_fn=small_files)
    refused(ran, OUTPUT, path, "cannot be written")
    assert path.read_text() == "the old report"
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk_keeps_the_old_sample(tmp_path: Path) -> None:
    path = tmp_path / "sample.csv"
    path.write_text("the old sample")
    ran = walras_script("sample", "-o", path, "--tasks", 500, preexec_fn=small_files)
    refused(ran, OUTPUT, path, "cannot be written: File too large")
    assert path.read_text() == "the old sample"
    assert list(tmp_path.iterdir()) == [path]


def test_sample_into_a_folder_that_is_not_there(tmp_path: Path) -> None:
    refused(walras("sample", "-o", tmp_path / "no" / "a.csv"), OUTPUT, "a.csv", "cannot be written")


def test_sample_of_another_format(tmp_path: Path) -> None:
    refused(walras("sample", "-o", tmp_path / "a.txt"), SETTINGS, "a.txt", ".parquet", ".csv", ".jsonl")


def test_full_disk_under_standard_output(good: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [SCRIPT, "prices", good, "--value", "1", "--json"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    refused(Ran(done.returncode, "", done.stderr), OUTPUT, "cannot be written", "No space left")


@pytest.mark.parametrize("options", [["--json"], []])
def test_reader_that_goes_away(good: Path, options: list[str]) -> None:
    """`walras … | head -1`, when head is gone before anything was written."""
    child = subprocess.Popen(
        [SCRIPT, "prices", good, "--value", "1", *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.close()
        assert child.stderr.read() == b""
    assert child.returncode == 0


# --- interrupted ------------------------------------------------------------------------------------------------------


def test_interrupt_while_writing(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [SCRIPT, "sample", "-o", tmp_path / "a.csv", "--tasks", "5000000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509 - no threads yet
    )  # fmt: skip
    until = time.monotonic() + 60
    while not list(tmp_path.iterdir()):  # its unfinished file
        assert child.poll() is None
        assert time.monotonic() < until
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out, err) == (130, "", "walras: interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_interrupt_while_solving(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(case_module, "discover", stop)
    refused(walras("audit", good, "--value", 1), 130, "interrupted")


def test_out_of_memory(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(case_module, "discover", fail)
    refused(walras("audit", good, "--value", 1), 1, "out of memory", "fewer files")


def test_a_bug_is_called_one(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(case_module, "discover", fail)
    ran = walras("audit", good, "--value", 1)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err == "walras: a bug in Walras: ZeroDivisionError: oops (WALRAS_DEBUG=1 shows where)\n"
    monkeypatch.setenv("WALRAS_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        walras("audit", good, "--value", 1)


def test_every_exit_code_is_documented() -> None:
    text = " ".join((cli.__doc__ or "").split())
    for code in (0, 1, 2, RECORDS, SETTINGS, INFEASIBLE, 6, OUTPUT, 130):
        assert f" {code} " in text
    assert text.partition("Exit codes: ")[2] in " ".join(walras_help().split())


def walras_help() -> str:
    return "".join(c for c in walras("--help").out if c not in "│╭╰─╮╯")


# --- two gigabytes in four --------------------------------------------------------------------------------------------

TWO_GB = 2 << 30
FOUR_GB = 4 << 30
BIG_TASKS = 380_000
PROMPT = 2_900


def big_rows(suffix: str) -> Iterator[bytes]:
    """Two models for each request, costs all different, each row with a long prompt."""
    rng = np.random.default_rng(0)
    text = "".join(rng.choice(list("abcdefghij klmnop, qrst"), 2 * PROMPT))
    row = '{id},"{prompt}",{model},{quality},{cost}\n'
    if suffix == ".csv":
        yield b"request_id,prompt,model,quality,cost_usd\n"
    else:
        row = '{{"request_id":"{id}","prompt":"{prompt}","model":"{model}","quality":{quality},"cost_usd":{cost}}}\n'
    for start in range(0, BIG_TASKS, 2_000):
        costs = rng.uniform(0.001, 0.01, (2_000, 2)).round(9).tolist()
        good = (rng.random((2_000, 2)) < (0.5, 0.9)).astype(int).tolist()
        chunk = []
        for k in range(2_000):
            prompt = text[k : k + PROMPT]
            for m, model in enumerate(("cheap", "dear")):
                cost = costs[k][m] * (1 + 9 * m)
                chunk.append(
                    row.format(id=f"r{start + k}", prompt=prompt, model=model, quality=good[k][m], cost=cost)
                )
        yield "".join(chunk).encode()


@pytest.mark.big
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_two_gigabytes_under_a_limit_of_four(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"big{suffix}"
    try:
        with path.open("wb") as file:
            file.writelines(big_rows(suffix))
        assert path.stat().st_size >= TWO_GB
        ran = walras_script(
            *("prices", path, "--value", 0.1, "--budget-usd", 0.01, "--json"),
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (FOUR_GB, FOUR_GB)),
        )
    finally:
        path.unlink()
    found = ran.data
    assert found["n_tasks"] == BIG_TASKS
    assert found["multipliers"]["compute"] > 0
    (row,) = found["constraints"]
    assert row["used"] == pytest.approx(0.01, rel=1e-6)
    assert found["certificate"]["gap"] <= 1e-6
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    assert peak < 2 << 20, f"{peak >> 10} MB"  # in kB; the children before this one included
