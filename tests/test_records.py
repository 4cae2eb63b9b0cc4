"""Reading records: three formats, one log; the row that is named is the row that is wrong."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from logs import HEADER, PAIR, write_csv, write_jsonl
from walras.errors import RecordError
from walras.records import COLUMNS, SCHEMA, UNKNOWN, Log, read, read_log
from walras.simulate import write_sample

TASKS = 300
FORMATS = (".parquet", ".csv", ".csv.gz", ".jsonl", ".jsonl.gz")


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same sample in every format."""
    folder = tmp_path_factory.mktemp("samples")
    files = {suffix: folder / f"sample{suffix}" for suffix in FORMATS}
    for suffix, path in files.items():
        plain = path.with_suffix("") if suffix.endswith(".gz") else path
        if plain == path:
            write_sample(path, TASKS, seed=3)
        else:
            path.write_bytes(gzip.compress(plain.read_bytes(), compresslevel=1))
    return files


def parts(log: Log) -> dict[str, Any]:
    """A log as plain values that compare by ==; NaN equals NaN."""

    def plain(array: Any) -> Any:
        return None if array is None else np.where(np.isnan(array), None, array).tolist()

    labels = {
        name: found and [found.names[c] if c >= 0 else None for c in found.codes]
        for name, found in (("tenant", log.tenant), ("class", log.task_class))
    }
    numbers = {name: plain(column) for name, column in log.per_use.items()}
    return {
        "ids": log.ids,
        "models": log.models,
        "chosen": log.chosen.tolist(),
        "rows": log.rows,
        "losses": plain(log.losses),
        "value": plain(log.value),
        "time": plain(log.time),
        **numbers,
        **labels,
    }


# --- one log, whatever the format -------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", FORMATS[1:])
def test_formats_give_the_same_log(samples: dict[str, Path], suffix: str) -> None:
    losses = "csv" not in suffix  # lists have no place in CSV
    expected, got = (read_log([samples[s]], losses=losses) for s in (".parquet", suffix))
    assert len(got) == TASKS
    assert (got.losses is not None) == losses
    assert parts(got) == parts(expected)


def test_only_parquet_can_say_that_it_is_synthetic(samples: dict[str, Path]) -> None:
    assert read_log([samples[".parquet"]]).synthetic
    assert not read_log([samples[".csv"]]).synthetic
    assert not read_log([samples[".parquet"], samples_part(samples, "x")]).synthetic


def samples_part(samples: dict[str, Path], prefix: str) -> Path:
    """The CSV sample with other request ids, next to it."""
    path = samples[".csv"].with_name(f"{prefix}.csv")
    path.write_text(samples[".csv"].read_text().replace("req-", f"{prefix}-"))
    return path


@pytest.mark.parametrize("suffix", FORMATS)
def test_batch_size_changes_nothing(
    samples: dict[str, Path], suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = parts(read_log([samples[suffix]], losses="csv" not in suffix))
    monkeypatch.setattr(read, "BATCH_ROWS", 7)
    monkeypatch.setattr(read, "BATCH_BYTES", 2_000)
    calls: list[int] = []
    small = read_log(
        [samples[suffix]], losses="csv" not in suffix, on_rows=lambda rows, _: calls.append(rows)
    )
    assert len(calls) > 20
    assert parts(small) == whole


def test_several_files_are_one_log(samples: dict[str, Path], tmp_path: Path) -> None:
    table = pq.read_table(samples[".parquet"])
    # The cuts fall inside requests: a request may be spread over files.
    pieces = [table.slice(0, 501), table.slice(501, 302), table.slice(803)]
    files = [tmp_path / "a.parquet", tmp_path / "b.jsonl", tmp_path / "c.parquet"]
    for piece, path in zip(pieces, files, strict=True):
        if path.suffix == ".parquet":
            pq.write_table(piece, path)
        else:
            write_jsonl(path, piece.to_pylist())
    assert parts(read_log(files, losses=True)) == parts(read_log([samples[".parquet"]], losses=True))


def test_dictionary_encoded_and_narrow_columns(samples: dict[str, Path], tmp_path: Path) -> None:
    table = pq.read_table(samples[".parquet"])
    for name in ("model", "tenant", "class"):
        table = table.set_column(
            table.schema.get_field_index(name), name, table[name].dictionary_encode().cast(
                pa.dictionary(pa.int8(), pa.string())
            )
        )  # fmt: skip
    ids = table["request_id"].cast(pa.large_string())
    table = table.set_column(table.schema.get_field_index("request_id"), "request_id", ids)
    path = tmp_path / "coded.parquet"
    pq.write_table(table, path)
    assert pa.types.is_dictionary(pq.read_schema(path).field("model").type)
    assert parts(read_log([path])) == parts(read_log([samples[".parquet"]]))


# --- names of columns -------------------------------------------------------------------------------------------------

ROW = {
    "request_id": "r1", "model": "m", "quality": 0.5, "cost_usd": 0.25, "latency_s": 2.0, "risk": 0.125,
    "irreversible_risk": 0.0625, "risk_scenarios": [0.0, 0.25], "chosen": True, "propensity": 0.75,
    "value_usd": 3.0, "tenant": "t", "class": "c", "time_s": 9.0, "input_tokens": 10.0,
    "cached_input_tokens": 4.0, "output_tokens": 5.0, "reasoning_tokens": 1.0,
}  # fmt: skip


def test_the_row_above_has_every_column() -> None:
    assert set(ROW) == {c.name for c in COLUMNS} == set(SCHEMA.names)


@pytest.mark.parametrize(("name", "alias"), [(c.name, alias) for c in COLUMNS for alias in c.aliases])
def test_aliases(tmp_path: Path, name: str, alias: str) -> None:
    plain = write_jsonl(tmp_path / "plain.jsonl", [ROW])
    renamed = write_jsonl(tmp_path / "alias.jsonl", [{alias if k == name else k: v for k, v in ROW.items()}])
    without = write_jsonl(tmp_path / "without.jsonl", [{k: v for k, v in ROW.items() if k != name}])
    (first,) = read.read_records(plain, [c.name for c in COLUMNS])
    (second,) = read.read_records(renamed, [c.name for c in COLUMNS])
    assert first[1].equals(second[1])
    if name in ("request_id", "model", "quality", "cost_usd"):
        with pytest.raises(RecordError, match=f"no column '{name}'"):
            list(read.read_records(without, [c.name for c in COLUMNS]))


def test_the_schema_name_wins_over_an_alias(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", "r1,m,0.25,1,0.5\n", header="id,model,score,cost,quality")
    assert read_log([path]).per_use["quality"].tolist() == [[0.5]]


@pytest.mark.parametrize("name", [c.name for c in COLUMNS])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_any_column_can_be_mapped(tmp_path: Path, name: str, suffix: str) -> None:
    # The old name stays, with something else in it: a mapping must win over the schema's own name.
    decoy = {"r1": "no", "m": "no", "t": "no", "c": "no", True: False}.get(ROW[name], ROW[name]) if (
        not isinstance(ROW[name], list)
    ) else [1.0, 1.0]  # fmt: skip
    row = {**ROW, name: decoy, "mine": ROW[name]}
    path = tmp_path / f"mapped{suffix}"
    if suffix == ".jsonl":
        write_jsonl(path, [row])
    else:
        pq.write_table(pa.Table.from_pylist([row]), path)
    ((_, batch),) = read.read_records(path, [name], {name: "mine"})
    assert batch.column(name).to_pylist() == [ROW[name]]


def test_extra_columns_are_amounts_per_use(tmp_path: Path) -> None:
    body = "r1,a,1,.1,7,3\nr1,b,1,.1,,4\nr2,b,1,.1,9,5\n"
    path = write_csv(tmp_path / "a.csv", body, header=HEADER + ",gpu_s,input_tokens")
    log = read_log([path], extra=["gpu_s", "input_tokens"])
    np.testing.assert_array_equal(log.per_use["gpu_s"], [[7, np.nan], [np.nan, 9]])
    np.testing.assert_array_equal(log.per_use["input_tokens"], [[3, 4], [np.nan, 5]])


# --- what was chosen --------------------------------------------------------------------------------------------------


def test_chosen_is_read_by_its_flag(tmp_path: Path) -> None:
    body = "r1,a,1,.1,false\nr1,b,1,.1,true\nr2,a,1,.1,\nr2,b,1,.1,0\nr3,a,1,.1,1\n"
    log = read_log([write_csv(tmp_path / "a.csv", body, header=HEADER + ",chosen")])
    assert log.chosen.tolist() == [1, UNKNOWN, 0]


@pytest.mark.parametrize("header", [HEADER, HEADER + ",chosen"])
def test_one_row_a_request_says_what_was_chosen(tmp_path: Path, header: str) -> None:
    comma = "," if "chosen" in header else ""  # a column nobody filled says nothing
    body = "".join(f"{row}{comma}\n" for row in ("r1,a,1,.1", "r2,b,0,.2", "r3,a,1,.1"))
    assert read_log([write_csv(tmp_path / "a.csv", body, header=header)]).chosen.tolist() == [0, 1, 0]


def test_without_a_flag_alternatives_leave_the_choice_unknown(tmp_path: Path) -> None:
    assert read_log([write_csv(tmp_path / "a.csv", PAIR)]).chosen.tolist() == [UNKNOWN]


def test_one_row_a_request_with_flags_all_false_chose_nothing(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", "r1,a,1,.1,false\n", header=HEADER + ",chosen")
    assert read_log([path]).chosen.tolist() == [UNKNOWN]


# --- losses by scenario -----------------------------------------------------------------------------------------------


def lossy(*losses: Sequence[float] | None) -> list[dict[str, Any]]:
    row = {"model": "m", "quality": 1, "cost_usd": 0.1}
    return [{"request_id": f"r{k}", **row, "risk_scenarios": loss} for k, loss in enumerate(losses)]


def test_losses_by_scenario(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    rows = lossy(None, None, [1, 2], None, [3, 4])
    pq.write_table(pa.Table.from_pylist(rows), path)
    expected = [[[np.nan] * 2], [[np.nan] * 2], [[1, 2]], [[np.nan] * 2], [[3, 4]]]
    for batch_rows in (100, 2, 1):  # a batch may hold only rows whose losses are unknown
        monkeypatch.setattr(read, "BATCH_ROWS", batch_rows)
        losses = read_log([path], losses=True).losses
        assert losses is not None
        np.testing.assert_array_equal(losses, expected)


def test_losses_nobody_filled_are_no_losses(tmp_path: Path) -> None:
    schema = pa.schema([f for f in SCHEMA if f.name in lossy(None)[0]])
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(lossy(None, None), schema=schema), path)
    assert read_log([path], losses=True).losses is None


@pytest.mark.parametrize(
    ("wrong", "says"),
    [([1.0], "1 scenarios"), ([], "0 scenarios"), ([1.0, -2.0], "-2"), ([1.0, math.inf], "inf")],
)
def test_bad_losses_name_their_row(tmp_path: Path, wrong: list[float], says: str) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(lossy([0, 1], None, [1, 1], wrong, [2, 2])), path)
    with pytest.raises(RecordError, match=says) as caught:
        read_log([path], losses=True)
    assert (caught.value.row, caught.value.field) == (4, "risk_scenarios")


def test_scenario_counts_must_agree_across_files(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", lossy([0, 1]))
    second = write_jsonl(tmp_path / "b.jsonl", [{**row, "request_id": "z"} for row in lossy([0, 1, 2])])
    with pytest.raises(RecordError, match=r"3 scenarios.*holds 2") as caught:
        read_log([first, second], losses=True)
    assert (caught.value.path, caught.value.row) == (second, 1)


# --- progress ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", FORMATS)
def test_progress_ends_at_every_row(
    samples: dict[str, Path], suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read, "BATCH_ROWS", 100)
    monkeypatch.setattr(read, "BATCH_BYTES", 20_000)
    calls: list[tuple[int, int]] = []
    read_log([samples[suffix]], on_rows=lambda *call: calls.append(call))
    rows, done = zip(*calls, strict=True)
    assert rows[-1] == 5 * TASKS
    assert list(rows) == sorted(set(rows))
    assert list(done) == sorted(done)
    assert 0 < done[0] <= done[-1] <= samples[suffix].stat().st_size


# --- what JSON Lines and CSV get away with ----------------------------------------------------------------------------


def test_jsonl_ignores_what_it_does_not_know(tmp_path: Path) -> None:
    # `meta` is of another type in every record: it must not even be looked at.
    extras = [{"a": [1, {"b": "x"}]}, "text", 3, None, [[1], "y"]]
    rows = [
        {
            "meta": extra,
            "request_id": f"r{k}",
            "model": "m",
            "quality": 1,
            "cost_usd": 0.5,
            "k": {"quality": 9},
        }
        for k, extra in enumerate(extras)
    ]
    log = read_log([write_jsonl(tmp_path / "a.jsonl", rows)])
    assert log.ids == ("r0", "r1", "r2", "r3", "r4")
    assert log.per_use["quality"].tolist() == [[1.0]] * 5


def test_jsonl_reads_what_loggers_write(tmp_path: Path) -> None:
    rows = [
        {"request_id": 17, "model": "m", "quality": True, "cost_usd": "0.25", "chosen": 1},
        {"request_id": 18, "model": "m", "quality": False, "cost_usd": "1e-3", "chosen": 0},
    ]
    log = read_log([write_jsonl(tmp_path / "a.jsonl", rows)])
    assert log.ids == ("17", "18")
    assert log.per_use["quality"].tolist() == [[1.0], [0.0]]
    assert log.per_use["cost_usd"].tolist() == [[0.25], [0.001]]
    assert log.chosen.tolist() == [0, UNKNOWN]


def test_jsonl_keys_may_come_late_and_lines_may_be_blank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = {"model": "m", "quality": 0.5, "cost_usd": 1}
    rows: list[dict[str, Any]] = [{"request_id": f"r{k}", **base} for k in range(50)]
    rows[-1] |= {"chosen": True, "value_usd": 2.5, "tenant": "late", "latency_s": 3}
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n".join(json.dumps(row) for row in rows))  # no line end after the last
    monkeypatch.setattr(read, "BATCH_BYTES", 300)
    log = read_log([path])
    assert log.chosen.tolist() == [UNKNOWN] * 49 + [0]
    assert log.tenant is not None
    assert log.tenant.equal("late").tolist() == [False] * 49 + [True]
    assert log.value is not None
    assert log.value[-1] == 2.5
    assert log.per_use["latency_s"][-1, 0] == 3


def test_csv_fields_may_hold_anything(tmp_path: Path) -> None:
    ids = ['a,"b"', "two\nlines", "crlf\r\nline", "naïve 日本 🜁", " spaced ", "NULL", "nan"]
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8-sig") as file:  # with a byte order mark
        out = csv.writer(file)
        out.writerow(["request_id", "prompt", "model", "quality", "cost_usd"])
        out.writerows([[i, "a prompt\nof lines,\n and commas", "m", 1, 0.5] for i in ids])
    assert list(read_log([tmp_path / "a.csv"]).ids) == ids


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_unicode_names(tmp_path: Path, suffix: str) -> None:
    row = {
        "request_id": "œuvre-🜁",
        "model": "模型",
        "quality": 1.0,
        "cost_usd": 0.1,
        "tenant": "ℵ",
        "class": "ß",
    }
    path = tmp_path / f"ünï{suffix}"
    write_table(path, [row])
    log = read_log([path])
    assert (log.ids, log.models) == (("œuvre-🜁",), ("模型",))
    assert log.tenant is not None
    assert log.tenant.names == ("ℵ",)


# --- the row that is named is the row that is wrong -------------------------------------------------------------------

WRONG = {
    "NaN cost": {"cost_usd": math.nan},
    "negative cost": {"cost_usd": -1.0},
    "quality above 1": {"quality": 1.5},
    "no id": {"request_id": None},
    "no model": {"model": None},
    "text": {"quality": "good"},
    "again": {"request_id": "r3"},
    "another tenant": {"request_id": "r3", "model": "other", "tenant": "you", "chosen": False},
    "another value": {"request_id": "r3", "model": "other", "value_usd": 2.0, "chosen": False},
    "chosen twice": {"request_id": "r3", "model": "other", "chosen": True},
}
FIELD = {"again": None, "chosen twice": "chosen", "another tenant": "tenant", "another value": "value_usd"}


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("wrong", WRONG)
def test_errors_name_the_row(
    tmp_path: Path, suffix: str, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read, "BATCH_ROWS", 4)
    monkeypatch.setattr(read, "BATCH_BYTES", 450)
    base = {"model": "m", "quality": 1.0, "cost_usd": 0.5, "tenant": "me", "value_usd": 1.0, "chosen": True}
    good = [{"request_id": f"g{k}", **base} for k in range(20)]
    rows: list[dict[str, Any]] = [{"request_id": f"r{k}", **base} for k in range(20)]
    rows[13] |= WRONG[wrong]
    if suffix == ".parquet" and wrong == "text":  # a column has one type there
        rows = [{**row, "quality": str(row["quality"])} for row in rows]
    first, second = tmp_path / f"first{suffix}", tmp_path / f"second{suffix}"
    write_table(first, good)
    write_table(second, rows)
    with pytest.raises(RecordError) as caught:
        read_log([first, second])
    error = caught.value
    assert (error.path, error.row) == (second, 14), str(error)
    assert error.field == FIELD.get(wrong, next(iter(WRONG[wrong])))


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    elif path.suffix == ".jsonl":
        write_jsonl(path, rows)
    else:
        text = io.StringIO()
        out = csv.writer(text)
        out.writerow(rows[0])
        for row in rows:
            out.writerow(["" if v is None else str(v).lower() if v is True else v for v in row.values()])
        path.write_text(text.getvalue(), encoding="utf-8", newline="")


def test_parquet_names_the_row_of_text_that_is_not_utf8(tmp_path: Path) -> None:
    raw = pa.array([b"a", b"b", b"\xe9"])
    names = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    table = pa.table(
        {"request_id": ["1", "2", "3"], "model": names, "quality": [1.0] * 3, "cost_usd": [1.0] * 3}
    )
    pq.write_table(table, tmp_path / "a.parquet", use_dictionary=False)
    with pytest.raises(RecordError, match="not UTF-8") as caught:
        read_log([tmp_path / "a.parquet"])
    assert (caught.value.row, caught.value.field) == (3, "model")


def test_files_must_agree_on_their_columns(tmp_path: Path) -> None:
    first = write_csv(tmp_path / "a.csv", "r1,m,1,.1,5\n", header=HEADER + ",latency_s")
    second = write_csv(tmp_path / "b.csv", "r2,m,1,.1\n")
    with pytest.raises(RecordError, match="some of the files only") as caught:
        read_log([first, second])
    assert caught.value.field == "latency_s"


# --- any log, every format --------------------------------------------------------------------------------------------

words = st.text(
    st.characters(exclude_categories=("Cs", "Cc"), include_characters="\n,\""), min_size=1, max_size=6
)  # fmt: skip
amounts = st.none() | st.floats(0, 1e6)


@st.composite
def tables(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Rows of a small log, in any order, with anything unknown that may be."""
    pairs = draw(st.lists(st.tuples(words, words), min_size=1, max_size=8, unique=True))
    once = {
        request: {
            "value_usd": draw(amounts),
            "tenant": draw(st.none() | words),
            "class": draw(st.none() | words),
        }
        for request in dict.fromkeys(request for request, _ in pairs)
    }
    picked = {
        request: draw(st.sampled_from([None, *(m for r, m in pairs if r == request)])) for request in once
    }
    return [
        {
            "request_id": request,
            "model": model,
            "quality": draw(st.none() | st.floats(0, 1)),
            "cost_usd": draw(amounts),
            "latency_s": draw(amounts),
            **once[request],
            "chosen": model == picked[request],
        }
        for request, model in pairs
    ]


def gathered(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What `parts(read_log(…))` must say: the slow, obvious way."""
    ids = tuple(dict.fromkeys(row["request_id"] for row in rows))
    models = tuple(dict.fromkeys(row["model"] for row in rows))
    at = {(row["request_id"], row["model"]): row for row in rows}
    found: dict[str, Any] = {
        "ids": ids,
        "models": models,
        "rows": len(rows),
        "losses": None,
        "time": None,
        "chosen": [
            next((models.index(m) for m in models if at.get((i, m), {}).get("chosen")), UNKNOWN) for i in ids
        ],
    }
    for name in ("quality", "cost_usd", "latency_s"):
        if any(row[name] is not None for row in rows):
            found[name] = [[at.get((i, m), {}).get(name) for m in models] for i in ids]
    for name, key in (("value", "value_usd"), ("tenant", "tenant"), ("class", "class")):
        column = [next(row[key] for row in rows if row["request_id"] == i) for i in ids]
        found[name] = None if all(item is None for item in column) else column
    return found


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=tables(), batch=st.sampled_from([2, 1000]))
def test_any_log_reads_back_from_every_format(
    rows: list[dict[str, Any]], batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    types = {name: SCHEMA.field(name).type for name in rows[0]}
    files = [tmp_path / f"any{suffix}" for suffix in (".parquet", ".csv", ".jsonl")]
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(types)), files[0])
    write_table(files[1], rows)
    write_table(files[2], rows)
    monkeypatch.setattr(read, "BATCH_ROWS", batch)
    expected = gathered(rows)
    for path in files:
        if "quality" in expected and "cost_usd" in expected:
            assert parts(read_log([path])) == expected
        else:
            with pytest.raises(RecordError, match="null in every row"):
                read_log([path])
