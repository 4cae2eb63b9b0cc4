"""Traces as people have them become requests, and what is wrong with a file is said of its own row and column."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import DataDir
from walras.engine.traces import read_trace
from walras.errors import RecordError

MOONCAKE = [
    {"timestamp": 500, "input_length": 1100, "output_length": 7, "hash_ids": [4, 5, 6]},
    {"timestamp": 500, "input_length": 1024, "output_length": 1, "hash_ids": [4, 5]},
    {"timestamp": 3500, "input_length": 600, "output_length": 90, "hash_ids": [9, 8]},
    {"timestamp": 3500, "input_length": 2000, "output_length": 3, "hash_ids": [4, 5, 7, 2]},
]


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    """The rows in the format that the name asks for."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".csv":
        pyarrow.csv.write_csv(table, path)
    else:
        pq.write_table(table, path)
    return path


def plain(**changes: object) -> list[dict[str, object]]:
    """Three requests, the second with the changes."""
    rows: list[dict[str, object]] = [
        {"arrival_s": float(i), "input_tokens": 100 + i, "output_tokens": 10 + i} for i in range(3)
    ]
    rows[1] |= changes
    return rows


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_mooncake_rows_keep_their_blocks_and_count_time_from_the_first(tmp_path: Path, name: str) -> None:
    trace = read_trace(write(tmp_path / name, MOONCAKE))
    found = trace.requests
    assert found.arrival_s.tolist() == [0.0, 0.0, 3.0, 3.0]
    assert found.input_tokens.tolist() == [1100, 1024, 600, 2000]
    assert found.output_tokens.tolist() == [7, 1, 90, 3]
    assert trace.prefix_tokens == 512
    assert found.prefix_offsets is not None
    assert found.prefix_ids is not None
    assert found.prefix_offsets.tolist() == [0, 3, 5, 7, 11]
    assert found.prefix_ids.tolist() == [4, 5, 6, 4, 5, 9, 8, 4, 5, 7, 2]


@pytest.mark.parametrize("name", ["a.csv", "a.parquet", "a.jsonl"])
def test_plain_columns_are_read_from_every_format(tmp_path: Path, name: str) -> None:
    trace = read_trace(write(tmp_path / name, plain()))
    assert trace.requests.arrival_s.tolist() == [0.0, 1.0, 2.0]
    assert trace.requests.input_tokens.tolist() == [100, 101, 102]
    assert trace.requests.output_tokens.tolist() == [10, 11, 12]
    assert trace.prefix_tokens == 0


@pytest.mark.parametrize("name", ["a.csv", "a.parquet", "a.jsonl"])
def test_milliseconds_may_have_a_fraction(tmp_path: Path, name: str) -> None:
    rows = [{"timestamp": ms, "input_length": 5, "output_length": 3} for ms in (27, 28.5, 30)]
    assert read_trace(write(tmp_path / name, rows)).requests.arrival_s == pytest.approx([0.0, 0.0015, 0.003])


@pytest.mark.parametrize(
    ("clock", "message"),
    [
        ((1, -2, 3), "row 2, column 'timestamp': is -2, which must be finite and ≥ 0"),
        ((1, "soon", 3), "row 2, column 'timestamp': is 'soon', expected a number"),
        ((1, None, 3), "row 2, column 'timestamp': is missing"),
        (("2023-11-16 18:15:46", "soon", None), "row 3, column 'timestamp': is missing"),
        (
            ("2023-11-16 18:15:46", "soon", "2023-11-16"),
            "row 2, column 'timestamp': is 'soon', expected a date",
        ),
    ],
)
def test_a_bad_time_is_named(tmp_path: Path, clock: tuple[object, ...], message: str) -> None:
    rows = [{"timestamp": time, "input_length": 5, "output_length": 3} for time in clock]
    with pytest.raises(RecordError, match=message):
        read_trace(write(tmp_path / "a.jsonl", rows))


def test_azure_dates_become_seconds(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n"
        "2023-11-16 18:16:46.9805900,396,109\n",
        encoding="utf-8",
    )
    requests = read_trace(path).requests
    assert requests.arrival_s == pytest.approx([0.0, 60.3])
    assert requests.output_tokens.tolist() == [44, 109]


def log() -> list[dict[str, object]]:
    """Two tasks × two models, of which the second model answered."""
    return [
        {
            "request_id": f"r{i}",
            "model": m,
            "chosen": m == "b",
            "time_s": i * 2.0,
            "prompt_tokens": 50 + i,
            "completion_tokens": 5,
        }
        for i in range(2)
        for m in "ab"
    ]


def test_a_log_of_records_gives_the_rows_that_were_chosen(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path / "log.jsonl", log()))
    assert trace.requests.arrival_s.tolist() == [0.0, 2.0]
    assert trace.requests.input_tokens.tolist() == [50, 51]
    assert trace.requests.names is not None
    assert trace.requests.names.tolist() == ["r0", "r1"]
    assert trace.rows.tolist() == [2, 4]


def test_a_log_of_records_gives_the_rows_of_a_model(tmp_path: Path) -> None:
    path = write(tmp_path / "log.jsonl", log())
    assert read_trace(path, model="a").rows.tolist() == [1, 3]
    with pytest.raises(
        RecordError, match=r"log\.jsonl, column 'model': no row of model 'aa' \(did you mean 'a'\?\)"
    ):
        read_trace(path, model="aa")


def test_rows_that_were_not_chosen_may_lack_anything(tmp_path: Path) -> None:
    unchosen = [row | {} if row["chosen"] else row | {"completion_tokens": None} for row in log()]
    trace = read_trace(write(tmp_path / "log.jsonl", unchosen))
    assert trace.requests.output_tokens.tolist() == [5, 5]
    unchosen[3]["completion_tokens"] = None
    with pytest.raises(RecordError, match=r"row 4, column 'completion_tokens': is missing"):
        read_trace(write(tmp_path / "log.jsonl", unchosen))


def test_a_log_may_name_blocks(tmp_path: Path) -> None:
    rows = [row | {"hash_ids": [10 * i + k for k in range(4)]} for i, row in enumerate(log())]
    trace = read_trace(write(tmp_path / "log.jsonl", rows), model="a")
    assert trace.prefix_tokens == 16
    assert trace.requests.prefix_ids is not None
    assert trace.requests.prefix_ids.tolist() == [0, 1, 2, 3, 20, 21, 22, 23]


def test_an_error_in_a_log_names_the_files_row(tmp_path: Path) -> None:
    rows = log()
    rows[3]["completion_tokens"] = 0
    with pytest.raises(RecordError, match=r"row 4, column 'completion_tokens': a request without tokens"):
        read_trace(write(tmp_path / "log.jsonl", rows))


def sessions(**changes: object) -> list[dict[str, object]]:
    """Two sessions of 64-token blocks; the first starts an agent of its own after its first call."""

    def call(
        session: str, agent: str, think_s: float | None, runs: list[tuple[int, int]]
    ) -> dict[str, object]:
        blocks = sum(length for _, length in runs)
        return {
            "session": session,
            "agent": agent,
            "think_s": think_s,
            "input_tokens": 64 * blocks + 5,
            "output_tokens": 9,
            "run_start": [start for start, _ in runs],
            "run_len": [length for _, length in runs],
        }

    rows = [
        call("x", "", 0.0, [(1, 17)]),
        call("x", "sub", None, [(500, 8)]),
        call("x", "sub", 3.0, [(500, 8), (600, 8)]),
        call("x", "", 40.0, [(1, 10), (90, 7)]),
        call("y", "", 0.0, [(1, 8)]),
    ]
    rows[3] |= changes
    return rows


def test_sessions_are_closed_loops_with_blocks_of_their_own(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path / "agents.parquet", sessions(output_tokens=0)), session_every_s=30.0)
    found = trace.requests
    assert found.after is not None
    assert found.prefix_offsets is not None
    assert found.prefix_ids is not None
    assert found.after.tolist() == [-1, 0, 1, 0, -1]
    assert found.arrival_s.tolist() == [0.0, 0.0, 3.0, 40.0, 30.0]
    assert found.output_tokens.tolist() == [9, 9, 9, 1, 9]
    # A chunk of 512 tokens carries the id of its eighth block; the session's number stands above 32 bits.
    assert trace.prefix_tokens == 512
    assert found.prefix_offsets.tolist() == [0, 2, 3, 5, 7, 8]
    assert (found.prefix_ids & 0xFFFFFFFF).tolist() == [8, 16, 507, 507, 607, 8, 95, 8]
    assert (found.prefix_ids >> 32).tolist() == [0] * 7 + [1]


@settings(max_examples=50)
@given(st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=5), min_size=1, max_size=6))
def test_runs_of_blocks_are_what_listing_them_gives(lengths: list[list[int]]) -> None:
    rows, expected, fresh = [], [], 1
    for row, parts in enumerate(lengths):
        ids, starts = [], []
        for length in parts:
            starts.append(fresh)
            ids += list(range(fresh, fresh + length))
            fresh += length + 3
        rows.append(
            {
                "session": f"s{row:03}",
                "agent": "",
                "think_s": 0.0,
                "input_tokens": 64 * len(ids) + 1,
                "output_tokens": 1,
                "run_start": starts,
                "run_len": parts,
            }
        )
        expected += [(row << 32) + ids[i] for i in range(7, len(ids), 8)]
    with TemporaryDirectory() as folder:
        ids_read = read_trace(write(Path(folder) / "a.parquet", rows)).requests.prefix_ids
    assert ids_read is not None
    assert ids_read.tolist() == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arrival_s": -1.0}, "row 2, column 'arrival_s': is -1, which must be finite and ≥ 0"),
        ({"arrival_s": 9.0}, "row 3, column 'arrival_s': arrives at 2 s, after a row that arrives at 9 s"),
        ({"arrival_s": None}, "row 2, column 'arrival_s': is missing"),
        ({"input_tokens": 0}, "row 2, column 'input_tokens': a request without tokens"),
        ({"output_tokens": 0}, "row 2, column 'output_tokens': a request without tokens"),
        ({"output_tokens": 1.5}, "row 2, column 'output_tokens': is 1.5, expected a whole number of tokens"),
        ({"input_tokens": "many"}, "row 2, column 'input_tokens': is .?'many'.*expected a number"),
    ],
)
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_a_bad_value_is_named_with_file_row_and_column(
    tmp_path: Path, name: str, changes: dict[str, object], message: str
) -> None:
    rows = plain(**changes)
    path = tmp_path / name
    if name == "a.csv":
        lines = [",".join("" if v is None else str(v) for v in row.values()) for row in rows]
        path.write_text("\n".join([",".join(rows[0]), *lines]) + "\n", encoding="utf-8")
    else:
        write(path, rows)
    with pytest.raises(RecordError, match=message) as caught:
        read_trace(path)
    assert str(caught.value).startswith(str(path))


def test_ids_that_occur_twice_are_named(tmp_path: Path) -> None:
    rows = [row | {"request_id": name} for row, name in zip(plain(), "aba", strict=True)]
    with pytest.raises(RecordError, match=r"row 3, column 'request_id': 'a' is the request of row 1 already"):
        read_trace(write(tmp_path / "a.csv", rows))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([5, 4], "row 2, column 'hash_ids': id 5 stands at place 1 here"),
        ([4, 5, 6, 7], "row 2, column 'hash_ids': 4 ids for 1024 tokens, other rows have one for every"),
        ([4, "x"], "row 2, column 'hash_ids': is not a list of whole numbers"),
        (None, "row 2, column 'hash_ids': is (missing|not a list)"),
    ],
)
def test_block_ids_out_of_prefix_order_are_named(tmp_path: Path, ids: object, message: str) -> None:
    rows = [dict(row) for row in MOONCAKE]
    rows[1]["hash_ids"] = ids
    with pytest.raises(RecordError, match=message):
        read_trace(write(tmp_path / "a.jsonl", rows))


def test_a_file_that_is_no_trace_says_what_is_missing(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", [{"arrival_s": 0.0, "input_tokens": 1, "answer": 2}])
    with pytest.raises(
        RecordError, match=r"a\.csv: no column 'output_tokens', nor under the names output_length"
    ):
        read_trace(path)


@pytest.mark.parametrize(
    ("text", "message"), [("", "is empty"), ("arrival_s,input_tokens,output_tokens\n", "has no records")]
)
def test_an_empty_trace_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecordError, match=message):
        read_trace(path)


def test_a_date_that_is_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,3,4\nnoon,3,4\n", encoding="utf-8"
    )
    with pytest.raises(RecordError, match=r"row 2, column 'TIMESTAMP': is 'noon', expected a date"):
        read_trace(path)


def test_a_request_larger_than_memory_is_named_in_the_file(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path / "log.jsonl", log()))
    error = trace.in_file(RecordError("too large", row=2, field="input_tokens", hint="leave it out"))
    assert str(error).endswith("log.jsonl, row 4, column 'prompt_tokens': too large (leave it out)")


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "rows", "ids"),
    [
        ("mooncake_conversation", 12_031, 288_500),
        ("mooncake_synthetic", 3_993, 121_877),
        ("azure_code_2023", 8_819, None),
        ("agentic_claude_code_kv", 40_587, 9_665_720),
    ],
)
def test_the_public_traces_are_read_as_they_are(
    data_dir: DataDir, name: str, rows: int, ids: int | None
) -> None:
    trace = read_trace(data_dir / f"serving/{name}.parquet")
    assert len(trace.requests) == rows
    if ids is None:
        assert trace.requests.prefix_ids is None
    else:
        assert trace.prefix_tokens == 512
        assert trace.requests.prefix_ids is not None
        assert len(trace.requests.prefix_ids) == ids
        assert len(np.unique(trace.requests.prefix_ids)) < ids
