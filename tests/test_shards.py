"""Shards on disk against the same market in memory, and what is said about files that are none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from walras.errors import RecordError, SettingsError
from walras.market import shards
from walras.market.dual import Answer, solve
from walras.market.memory import Memory
from walras.market.planes import Planes, Rows
from walras.market.shards import Shards, write_shard

USES = ("m0", "m1", "m2")
NAMES = ("usd", "seconds", "risk")
DECLARED = (1.0, 0.0, 0.0)
CUTS = (0, 3_000, 3_001, 17_000, 24_000)
"""Where the market is cut into files."""


def market(
    n: int = CUTS[-1], number: Any = np.float32, *, scoped: bool = False, weighted: bool = True
) -> Memory:
    """Three rows that bind, a tenth of the uses masked, weights; the last row concerns every other task if `scoped`."""
    rng = np.random.default_rng(5)
    shape = (len(USES), n)
    quality = np.where(rng.random(shape) < 0.1, np.nan, rng.random(shape))
    amounts = (0.1 * rng.lognormal(0, 1, shape), rng.lognormal(0, 1, shape), rng.exponential(0.05, shape))
    weight = rng.integers(1, 4, n) / 2.0 if weighted else np.ones(1)
    value = (1 + rng.permutation(n)) / 8192  # no two the same, in either precision
    member = (rng.integers(0, 2, n) << 2).astype(np.uint64) if scoped else np.zeros(1, dtype=np.uint64)
    planes = Planes(
        value,
        quality.astype(number).T,
        tuple(a.astype(number).T for a in amounts),
        tuple(np.array([usd]) for usd in DECLARED),
        weight,
        member,
    )
    limits = np.array([0.04, 0.0, 0.012]) * planes.total_weight()
    scopes = np.array([False, False, scoped])
    rows = Rows(
        np.arange(3), np.full(3, np.nan), np.array([0.0, 1.2, 0.0]), limits, np.zeros(3, dtype=bool), scopes
    )
    return Memory(planes, rows)


def mixed(answer: Answer) -> set[int]:
    """The tasks that get a part of a use: the optimum's own, whichever box they were found in."""
    some = (answer.split.share > 1e-6) & (answer.split.share < 1 - 1e-6)
    return set(answer.split.task[some].tolist())


Write = Callable[..., Shards]


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Puts a market on disk in uneven files of small batches, to be read in small pages."""
    monkeypatch.setattr(shards, "CHUNK", 700)
    monkeypatch.setattr(shards, "DECODED", 300)
    monkeypatch.setattr(shards, "PAGE", 200_000)

    def write(held: Memory, extension: str = "arrow", cuts: tuple[int, ...] = CUTS) -> Shards:
        paths = [tmp_path / f"{len(cuts)}-{i}.{extension}" for i in range(len(cuts) - 1)]
        also = [name for name in ("weight", "member") if getattr(held.planes, name).size > 1]
        for path, lo, hi in zip(paths, cuts[:-1], cuts[1:], strict=True):
            write_shard(path, held.planes.part(lo, hi), USES, NAMES, also)
        return Shards(paths, held.rows, NAMES, DECLARED, held.defer)

    return write


@pytest.mark.parametrize("number", [np.float32, np.float64])
@pytest.mark.parametrize("extension", ["arrow", "parquet"])
def test_prices_are_those_of_the_market_in_memory(written: Write, extension: str, number: Any) -> None:
    held = market(number=number)
    there, here = solve(written(held, extension)), solve(held)
    assert (here.multipliers > 0).all()
    np.testing.assert_allclose(there.multipliers, here.multipliers, rtol=1e-9)
    assert there.objective == pytest.approx(here.objective, rel=1e-12)
    assert abs(there.dual - there.objective) <= 1e-12 * there.objective
    np.testing.assert_allclose(there.usage, here.usage, atol=1e-9)
    assert mixed(there) == mixed(here)
    assert there.passes <= 2


def test_scopes_are_read_from_the_member_column(written: Write) -> None:
    held = market(scoped=True)
    np.testing.assert_allclose(solve(written(held)).multipliers, solve(held).multipliers, rtol=1e-9)


def test_how_tasks_are_cut_into_files_changes_no_digit(written: Write) -> None:
    held = market(weighted=False)
    one, many = written(held, cuts=(0, len(held))), written(held)
    price, step = np.array([2.0, 0.1, 1.0]), np.full(3, 0.1)
    for of in (
        lambda m: m.sums(price, 1.0, 0.05, np.ones(3), moments=True),
        lambda m: m.screen(price, step, 1.0)[0],
    ):
        a, b = of(one), of(many)
        assert a.worth == b.worth
        for field in ("usage", "served", "curvature", "moments"):
            np.testing.assert_array_equal(getattr(a, field), getattr(b, field))
    assert one.weight == many.weight == len(held)


def test_what_is_left_undecided_is_held_under_its_own_number(written: Write) -> None:
    held = market()
    price, step = np.array([2.0, 0.1, 1.0]), np.full(3, 0.1)
    sums, near = written(held, "parquet").screen(price, step, 1.0)
    expected, same = held.screen(price, step, 1.0)
    assert 0 < len(near) < len(held) / 2
    np.testing.assert_array_equal(near.ids, same.ids)
    assert_same(near.planes, same.planes)
    np.testing.assert_allclose(sums.usage, expected.usage, rtol=1e-12)


@pytest.mark.parametrize("extension", ["arrow", "parquet"])
def test_a_sample_comes_from_everywhere_and_stands_for_everybody(written: Write, extension: str) -> None:
    held = market()
    known = {value: at for at, value in enumerate(held.planes.value)}
    sample = written(held, extension).sample(2_000)
    at = np.array([known[value] for value in sample.planes.value])
    assert 1_700 <= len(sample) <= 2_000
    assert np.unique(at).size > 0.98 * len(sample)
    assert set(np.searchsorted(CUTS, at, side="right")) >= {1, 3, 4}
    np.testing.assert_array_equal(sample.planes.quality, held.planes.quality[at])
    assert sample.weight == pytest.approx(held.weight)


def test_gathered_it_is_the_market_in_memory(written: Write) -> None:
    held = market()
    there = written(held, "parquet")
    assert len(there) == len(held)
    assert there.weight == held.weight
    assert there.nbytes == 4 * 12 * len(held)
    assert_same(there.gather().planes, held.planes)


def test_nulls_and_compression(tmp_path: Path, written: Write) -> None:
    held = market()
    plain = written(held, cuts=(0, len(held)))
    table = pa.ipc.open_file(plain.files[0].path).read_all()
    nulls = [
        pa.array(column.to_numpy(), from_pandas=True) if name.startswith("quality:") else column
        for name, column in zip(table.column_names, table.columns, strict=True)
    ]
    shuffled = pa.table(nulls, table.column_names).add_column(0, "note", pa.array(["x"] * len(held)))
    pa.feather.write_feather(shuffled, str(tmp_path / "a.feather"), compression="zstd", chunksize=999)
    there = Shards([tmp_path / "a.feather"], held.rows, NAMES, DECLARED)
    assert_same(there.gather().planes, held.planes)


def test_without_rows_everybody_is_asked_once(written: Write) -> None:
    held = market()
    free = Memory(held.planes, Rows(*(column[:0] for column in rows_of(held.rows))))
    assert solve(written(free)).objective == pytest.approx(solve(free).objective, rel=1e-12)


def rows_of(rows: Rows) -> tuple[Any, ...]:
    return rows.plane, rows.level, rows.offset, rows.limits, rows.exactly, rows.scoped


def assert_same(planes: Planes, expected: Planes) -> None:
    np.testing.assert_array_equal(planes.value, expected.value)
    np.testing.assert_array_equal(planes.quality, expected.quality)
    np.testing.assert_array_equal(planes.weight, expected.weight)
    for plane, same in zip(planes.amounts, expected.amounts, strict=True):
        np.testing.assert_array_equal(plane, same)


# --- what is no market ----------------------------------------------------------------------------------------------

BAD = 3_456
"""A task of the third file, in its row 456."""


@pytest.mark.parametrize("ask", ["screen", "sums", "gather", "solve"])
@pytest.mark.parametrize("extension", ["arrow", "parquet"])
def test_an_amount_that_is_not_finite_is_named(written: Write, extension: str, ask: str) -> None:
    held = market()
    quality, seconds = held.planes.quality.copy(), held.planes.amounts[1].copy()
    quality[BAD, 2], seconds[BAD, 2] = 0.5, np.nan
    usd, _, risk = held.planes.amounts
    there = written(
        Memory(replace(held.planes, quality=quality, amounts=(usd, seconds, risk)), held.rows), extension
    )
    price, step = np.ones(3), np.full(3, 0.1)
    do: dict[str, Callable[[], object]] = {
        "screen": lambda: there.screen(price, step, 1.0),
        "sums": lambda: there.sums(price, 1.0, 0.0, price),
        "gather": there.gather,
        "solve": lambda: solve(there),
    }
    with pytest.raises(RecordError, match=rf"5-2\.{extension}, row 456, column 'seconds:m2': is nan"):
        do[ask]()


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("value", np.inf, "row 8, column 'value': is inf"),
        ("value", None, "row 8, column 'value': is nan"),
        ("quality:m1", -np.inf, "row 8, column 'quality:m1': is -inf"),
        ("weight", -1.0, "row 8, column 'weight': is -1.0"),
        ("weight", None, "row 8, column 'weight': is nan"),
        ("member", None, "row 8, column 'member': is null"),
    ],
)
def test_a_bad_cell_is_named(tmp_path: Path, column: str, value: float | None, message: str) -> None:
    held = market(50, scoped=True)
    path = tmp_path / "a.parquet"
    write_shard(path, held.planes, USES, NAMES, ("weight", "member"))
    table = pa.parquet.read_table(path)
    at = table.column_names.index(column)
    cells = table.column(at).to_pylist()
    cells[7] = value
    changed = table.set_column(at, column, pa.array(cells, table.schema.field(at).type))
    pa.parquet.write_table(changed, path)
    with pytest.raises(RecordError, match=message):
        solve(Shards([path], held.rows, NAMES, DECLARED))


def test_a_task_that_may_not_defer_needs_a_use(written: Write) -> None:
    held = market()
    quality = held.planes.quality.copy()
    allowed = np.isnan(quality).all(axis=1)
    quality[allowed, 0] = 0.5
    quality[BAD] = np.nan
    there = written(Memory(replace(held.planes, quality=quality), held.rows, defer=False))
    with pytest.raises(RecordError, match=r"5-2\.arrow, row 456, .*null for every use"):
        there.sums(np.ones(3), 1.0, 0.0, np.ones(3))


def test_a_bad_weight_is_found_before_it_is_used(written: Write) -> None:
    held = market()
    weight = held.planes.weight.copy()
    weight[BAD] = np.nan
    there = written(Memory(replace(held.planes, weight=weight), held.rows))
    with pytest.raises(RecordError, match=r"5-2\.arrow, row 456, column 'weight': is nan"):
        _ = there.weight


def table(**columns: Any) -> pa.Table:
    plain = {"value": [1.0], "quality:a": [0.5], "usd:a": [0.1]}
    return pa.table({name: cells for name, cells in (plain | columns).items() if cells is not None})


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (table(value=None), "column 'value': is not there"),
        (table(**{"usd:a": None}), "column 'usd:a': is not there"),
        (table(**{"quality:a": None}), "column 'quality:a': is not there"),
        (table(**{"quality:b": [0.5]}), r"column 'quality:b': is not there in .*first\.parquet"),
        (table(weight=[1.0]), r"column 'weight': is not there in .*first\.parquet"),
        (table(**{"usd:a": [1]}), "column 'usd:a': is int64, not float or double"),
        (table().slice(0, 0), "has no tasks"),
    ],
)
def test_shards_must_have_the_same_columns(tmp_path: Path, second: pa.Table, message: str) -> None:
    pa.parquet.write_table(table(), tmp_path / "first.parquet")
    pa.parquet.write_table(second, tmp_path / "second.parquet")
    with pytest.raises(RecordError, match=rf"second\.parquet.*{message}"):
        opened(tmp_path / "first.parquet", tmp_path / "second.parquet")


def test_files_that_are_no_shards(tmp_path: Path) -> None:
    pa.parquet.write_table(table(), tmp_path / "a.parquet")
    pa.feather.write_feather(table(), str(tmp_path / "a.arrow"))
    (tmp_path / "empty.arrow").touch()
    (tmp_path / "text.parquet").write_text("value,quality:a\n1,2\n")
    pa.parquet.write_table(pa.table({"value": [1.0]}), tmp_path / "none.parquet")
    for names, message in (
        (["none.parquet"], "column 'quality:<use>': is not there"),
        (["missing.arrow"], "cannot be read"),
        (["empty.arrow"], "cannot be read"),
        (["text.parquet"], "cannot be read"),
        (["a.csv"], "unknown extension '.csv'"),
        (["a.parquet", "a.arrow"], r"is Arrow, while .*a\.parquet is Parquet"),
    ):
        with pytest.raises(RecordError, match=message):
            opened(*(tmp_path / name for name in names))
    with pytest.raises(RecordError, match="column 'member': is not there"):
        opened(tmp_path / "a.arrow", scoped=True)
    with pytest.raises(SettingsError, match="no files"):
        opened()
    with pytest.raises(SettingsError, match="2 prices for 1 planes"):
        Shards([tmp_path / "a.arrow"], rows_of_one(), ("usd",), (1.0, 0.0))


def rows_of_one(*, scoped: bool = False) -> Rows:
    one = np.ones(1)
    return Rows(np.zeros(1, dtype=np.int64), one * np.nan, 0 * one, one, one < 0, np.array([scoped]))


def opened(*paths: Path, scoped: bool = False) -> Shards:
    return Shards(paths, rows_of_one(scoped=scoped), ("usd",), (1.0,))
