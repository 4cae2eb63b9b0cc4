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
    "irreversible_risk": 0.0625, "loss_usd": 0.5, "risk_scenarios": [0.0, 0.25], "chosen": True,
    "propensity": 0.75, "value_usd": 3.0, "tenant": "t", "class": "c", "prompt": "p", "embedding": [0.5, -1.0],
    "certainty": 0.875, "time_s": 9.0, "input_tokens": 10.0, "cached_input_tokens": 4.0, "output_tokens": 5.0,
    "reasoning_tokens": 1.0,
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
    decoy = {"r1": "no", "m": "no", "t": "no", "c": "no", "p": "no", True: False}.get(ROW[name], ROW[name]) if (
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


# --- prompts, vectors, facts, and what else is asked for ----------------------------------------------------------------


def told(k: int, **more: Any) -> list[dict[str, Any]]:
    """Both models' rows of request `k`."""
    row = {"request_id": f"r{k}", "quality": 1.0, "cost_usd": 0.5, **more}
    return [{**row, "model": model} for model in ("a", "b")]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        return write_jsonl(path, rows)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def read_texts(*paths: Path) -> Log:
    return read_log(paths, also=("prompt", "embedding"))


def test_nothing_more_is_read_than_was_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", told(1, prompt="p", embedding=[1.0], loss_usd=2.0, language="es"))
    log = read_log([path])
    assert (log.prompts, log.embeddings, log.facts) == (None, None, {})
    assert set(log.per_use) == {"quality", "cost_usd"}
    log = read_log([path], also=("prompt", "embedding", "loss_usd"), facts=("language",))
    assert log.prompts == ("p",)
    assert log.embeddings is not None
    assert log.embeddings.tolist() == [[1.0]]
    assert log.per_use["loss_usd"].tolist() == [[2.0, 2.0]]
    assert log.facts["language"].names == ("es",)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_prompts_stay_with_their_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """Rows come in any order, in small batches, and some requests are without a text."""
    texts = [None if k % 7 == 3 else f"text {k} " * (1 + k % 5) for k in range(200)]
    rows = [row for k, text in enumerate(texts) for row in told(k, prompt=text, embedding=text and [k, 0.5])]
    mixed = [rows[k] for k in np.random.default_rng(0).permutation(len(rows))]
    monkeypatch.setattr(read, "BATCH_ROWS", 11)
    monkeypatch.setattr(read, "BATCH_BYTES", 2_000)
    log = read_texts(write(tmp_path / f"a{suffix}", mixed))
    assert len(log) == 200
    assert log.prompts is not None
    assert log.embeddings is not None
    for name, prompt, vector in zip(log.ids, log.prompts, log.embeddings, strict=True):
        k = int(name[1:])
        assert prompt == texts[k]
        np.testing.assert_array_equal(vector, [np.nan, np.nan] if texts[k] is None else [k, 0.5])
    turned = log.take(np.arange(200)[::-1], np.array([1]))
    assert turned.prompts == log.prompts[::-1]


@pytest.mark.parametrize("bare", [0, 1, 2])
def test_a_file_without_prompts_among_others(tmp_path: Path, bare: int) -> None:
    """The requests of one file have no text; nobody else's moves up into its place."""
    files = []
    for f in range(3):
        rows = [
            r
            for k in range(3)
            for r in told(10 * f + k, **({} if f == bare else {"prompt": f"text {f} {k}"}))
        ]
        files.append(write(tmp_path / f"{f}.parquet", rows))
    log = read_texts(*files)
    texts = [None if f == bare else f"text {f} {k}" for f in range(3) for k in range(3)]
    assert log.prompts == tuple(texts)
    assert log.embeddings is None


def test_one_row_of_a_request_may_hold_its_text(tmp_path: Path) -> None:
    """Gateways log the prompt once: on the row of the model that was used, or in the file of one model."""
    first, second = told(1)
    late = write(tmp_path / "late.jsonl", [first, {**second, "prompt": "p", "embedding": [1, 2]}, *told(2)])
    log = read_texts(late)
    assert log.prompts == ("p", None)
    assert log.embeddings is not None
    np.testing.assert_array_equal(log.embeddings, [[1, 2], [np.nan, np.nan]])
    files = [
        write(tmp_path / "a.parquet", [first]),
        write(tmp_path / "b.parquet", [{**second, "prompt": "p"}]),
    ]
    assert read_texts(*files).prompts == ("p",)


def test_prompts_nobody_filled_are_no_prompts(tmp_path: Path) -> None:
    log = read_texts(write(tmp_path / "a.jsonl", told(1, prompt=None, embedding=None)))
    assert (log.prompts, log.embeddings) == (None, None)
    assert read_texts(write(tmp_path / "b.jsonl", told(1, prompt=""))).prompts == ("",)


@pytest.mark.parametrize(
    ("vectors", "says"),
    [([[1.0, 2.0], [1.0]], "as many numbers as the first, 2"), ([[], []], "at least one")],
)
def test_vectors_have_one_length(tmp_path: Path, vectors: list[list[float]], says: str) -> None:
    rows = [row for k, vector in enumerate(vectors) for row in told(k, embedding=vector)]
    with pytest.raises(RecordError, match=says):
        read_texts(write(tmp_path / "a.jsonl", rows))


def test_a_vector_may_be_negative_but_not_unknown_in_part(tmp_path: Path) -> None:
    read_texts(write(tmp_path / "a.jsonl", told(1, embedding=[-1.0])))
    with pytest.raises(RecordError, match=r"row 3, column 'embedding'"):
        read_texts(write(tmp_path / "b.parquet", [*told(1, embedding=[0.0]), *told(2, embedding=[np.nan])]))


def test_facts_are_text_by_request(tmp_path: Path) -> None:
    rows = [
        *told(1, language="es", tries=1),
        *told(2, language=None, tries=2),
        *told(3, language="en", tries=1),
    ]
    for path in (write(tmp_path / "a.jsonl", rows), write(tmp_path / "a.parquet", rows)):
        facts = read_log([path], facts=("language", "tries")).facts
        assert facts["language"].names == ("es", "en")
        assert facts["language"].codes.tolist() == [0, -1, 1]
        assert facts["tries"].names == ("1", "2")
        assert facts["tries"].codes.tolist() == [0, 1, 0]
        (half,) = (read_log([path], facts=("tries",)).take(np.array([2, 1]), np.array([0])).facts,)
        assert half["tries"].codes.tolist() == [0, 1]


def test_a_fact_nobody_filled_tells_nothing(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", "r1,a,1,.1,\nr1,b,1,.1,\n", header=HEADER + ",language")
    assert read_log([path], facts=("language",)).facts == {}


@pytest.mark.parametrize("name", ["request", "model code", "labels", "id", "prompt", "tenant", "class"])
def test_a_fact_may_have_any_name(tmp_path: Path, name: str) -> None:
    """Also those that the reader uses itself, or that it reads anyway."""
    rows = [row for k in range(6) for row in told(k, **{name: f"v{k % 2}"})]
    log = read_log([write(tmp_path / "a.parquet", rows)], facts=(name,), also=("prompt",))
    assert len(log) == 6
    assert log.per_use["quality"].tolist() == [[1.0, 1.0]] * 6
    found = {"tenant": log.tenant, "class": log.task_class}.get(name) or log.facts[name]
    assert [found.names[code] for code in found.codes] == ["v0", "v1"] * 3


def test_facts_must_agree_within_a_request(tmp_path: Path) -> None:
    first, second = told(2, language="es")
    path = write(tmp_path / "a.jsonl", [*told(1, language="es"), first, {**second, "language": "en"}])
    with pytest.raises(RecordError, match="differs from an earlier row of the same request") as caught:
        read_log([path], facts=("language",))
    assert (caught.value.row, caught.value.field) == (4, "language")


def test_certainty_is_of_the_request(tmp_path: Path) -> None:
    rows = [*told(1, certainty=0.25), *told(2, certainty=None), *told(3, certainty=1.0)]
    for suffix in (".jsonl", ".parquet"):
        log = read_log([write(tmp_path / f"a{suffix}", rows)])
        assert log.certainty is not None
        np.testing.assert_array_equal(log.certainty, [0.25, np.nan, 1.0])
        (turned,) = (log.take(np.array([2, 0]), np.array([1])).certainty,)
        np.testing.assert_array_equal(turned, [1.0, 0.25])
    assert read_log([write(tmp_path / "b.jsonl", told(1))]).certainty is None


def test_certainty_of_each_answer_is_refused(tmp_path: Path) -> None:
    """What the answer to one model said of itself is not known before that model is chosen."""
    first, second = told(2, certainty=0.5)
    path = write(tmp_path / "a.jsonl", [*told(1, certainty=0.5), first, {**second, "certainty": 0.75}])
    with pytest.raises(
        RecordError, match=r"same request \(how sure each answer was is known too late"
    ) as caught:
        read_log([path])
    assert (caught.value.row, caught.value.field) == (4, "certainty")
    with pytest.raises(RecordError, match=r"row 1, column 'certainty'"):
        read_log([write(tmp_path / "b.jsonl", told(1, certainty=1.5))])


@pytest.mark.parametrize("name", ["quality", "chosen", "risk_scenarios", "time_s"])
def test_a_number_is_no_fact(tmp_path: Path, name: str) -> None:
    with pytest.raises(RecordError, match=f"'{name}': is a column of numbers"):
        read_log([write(tmp_path / "a.jsonl", [ROW])], facts=(name,))


def test_a_fact_that_is_not_there_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", told(1, language="es"))
    with pytest.raises(RecordError, match=r"no column 'langage' \(did you mean 'language'\?\)"):
        read_log([path], facts=("langage",))


def test_a_mapped_prompt(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", told(1, question="q", prompt="p"))
    assert read_log([path], names={"prompt": "question"}, also=("prompt",)).prompts == ("q",)


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
