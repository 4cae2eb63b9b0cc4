"""`walras prices` on a market in shards: the same prices as from the log, by every engine, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from walras import cli
from walras.simulate.sample import write_sample

LIMITS = ("--budget-usd", "0.012", "--sla-s", "15", "--risk", "0.02")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """log.parquet and its shard, shards/log.parquet."""
    folder = tmp_path_factory.mktemp("shards")
    write_sample(folder / "log.parquet", 3000, 1)
    with pytest.MonkeyPatch.context() as patch:
        assert (
            run(patch, "shards", str(folder / "log.parquet"), "-o", str(folder / "shards"), "--value", "5")
            == 0
        )
    return folder


def run(patch: pytest.MonkeyPatch, *arguments: str) -> int:
    patch.setattr("sys.argv", ["walras", *arguments])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def prices(
    patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], path: Path, *options: str
) -> dict[str, Any]:
    code = run(patch, "prices", str(path), *options, "--json")
    printed = capsys.readouterr()
    assert code == 0, printed.err
    data: dict[str, Any] = json.loads(printed.out)
    return data


def multipliers(data: dict[str, Any]) -> list[float]:
    return [row["multiplier"] for row in data["constraints"]]


@pytest.mark.parametrize(
    "engine", ["auto", "memory", "stream", pytest.param("ray", marks=pytest.mark.cluster)]
)
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_every_engine_finds_the_prices_of_the_log(
    folder: Path, engine: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if engine == "ray":
        pytest.importorskip("ray")
    log = prices(monkeypatch, capsys, folder / "log.parquet", "--value", "5", *LIMITS)
    found = prices(monkeypatch, capsys, folder / "shards" / "log.parquet", *LIMITS, "--engine", engine)
    assert sum(m > 0 for m in multipliers(log)) >= 2
    assert multipliers(found) == pytest.approx(multipliers(log), rel=1e-9)
    assert found["certificate"]["objective"] == pytest.approx(log["certificate"]["objective"], rel=1e-9)
    assert found["certificate"]["gap"] <= 1e-9
    assert found["certificate"]["rounded"]["split_tasks"] == log["certificate"]["rounded"]["split_tasks"]
    assert [r["used"] for r in found["constraints"]] == pytest.approx([r["used"] for r in log["constraints"]])
    assert found["engine"] == ("memory" if engine == "auto" else engine)
    assert (found["bytes_per_pass"] is not None) == (engine == "ray")


def test_the_search_goes_on_from_the_state(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tmp_path / "prices.json"
    shard = folder / "shards" / "log.parquet"
    cold = prices(monkeypatch, capsys, shard, *LIMITS, "--state", str(state))
    assert json.loads(state.read_text())["prices"] == pytest.approx(multipliers(cold))
    warm = prices(monkeypatch, capsys, shard, *LIMITS, "--state", str(state))
    assert multipliers(warm) == pytest.approx(multipliers(cold), rel=1e-9)
    assert warm["steps"] < cold["steps"]


def test_people_get_a_table(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "prices", str(folder / "shards" / "log.parquet"), *LIMITS) == 0
    shown = capsys.readouterr().out
    assert "3,000 tasks × 5 models" in shown
    assert "Certificate: gap" in shown
    assert "Engine memory: 1 pass" in shown


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("log", "--engine", "stream"), 4, "walras shards"),
        (("log", "--engine", "ray"), 4, "walras shards"),
        (("log", "--state", "x.json"), 4, "only for a market in shards"),
        (("shards/log", "--ray-address", "auto"), 4, "only for --engine ray"),
        (("shards/log", "--value", "5"), 4, "value: is about a log"),
        (("shards/log", "--risk", "0.1", "--risk-measure", "cvar"), 4, "losses by scenario"),
        (("shards/log", "--no-defer", "--budget-usd", "0.0001"), 5, "the least bound that would do is"),
        (("shards/log", "--no-defer", "--budget-usd", "0.0001", "--engine", "stream"), 5, "the least bound"),
    ],
)
def test_what_does_not_fit_is_explained(
    folder: Path,
    options: tuple[str, ...],
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, *rest = options
    assert run(monkeypatch, "prices", str(folder / f"{path}.parquet"), *rest) == code
    assert said in capsys.readouterr().err


def test_a_shard_without_a_plane_that_is_asked_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pq.read_table(folder / "shards" / "log.parquet")
    bare = tmp_path / "bare.parquet"
    pq.write_table(table.select([n for n in table.column_names if not n.startswith("seconds:")]), bare)
    assert run(monkeypatch, "prices", str(bare), "--sla-s", "3") == 3
    assert "seconds:" in capsys.readouterr().err


def test_a_full_disk_leaves_no_half_shard(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(table: pa.Table, where: Path) -> None:
        where.write_bytes(b"PAR1")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    assert run(monkeypatch, "shards", str(folder / "log.parquet"), "-o", str(tmp_path), "--value", "5") == 7
    assert "No space left" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
