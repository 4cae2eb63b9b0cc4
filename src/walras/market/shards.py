"""A market in files that may be larger than memory: read a page at a time, while the next one is being fetched. [Z-1]

A shard is a Parquet (.parquet, .pq) or Arrow IPC file (.arrow, .feather) with one row a task. Its columns are float32 or
float64, `member` apart, and found by name:

    value             V, USD per unit of quality
    quality:<use>     null or NaN where the use is not allowed
    <plane>:<use>     one amount of that use: usd:gpt-5, seconds:gpt-5, …
    weight            optional; 1 where there is none
    member            optional, uint64: bit k says whether the task is in scope of row k

Others are not read. All shards of a market have the same uses and one format. Pages are filled across the borders of
files and batches, so how tasks are cut into files changes no digit.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from itertools import cycle
from operator import add
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from walras.errors import QuantityError, RecordError, SettingsError
from walras.market.memory import Memory, Sums
from walras.market.planes import Planes, Rows
from walras.quantities import IntArray
from walras.risk import FloatArray

PAGE = 64 << 20
"""Bytes of uses in a page; there are two, one being filled."""
CHUNK = 1 << 20
"""Rows of a record batch or row group that is written."""
DECODED = 1 << 17
"""Rows of Parquet that are decoded at a time."""
RUNS, RUN = 256, 64
"""Runs of neighbours that a sample of Arrow shards consists of, at most, and tasks in one, at least: every task by itself
would cost a page of the disk."""
GROUPS = 16
"""Row groups that a sample of Parquet shards comes from: each is decoded in full."""

_FORMATS: dict[str, Literal["Arrow", "Parquet"]] = {
    ".arrow": "Arrow",
    ".feather": "Arrow",
    ".parquet": "Parquet",
    ".pq": "Parquet",
}

T = TypeVar("T")


class Shards:
    """Implements `dual.Market` on files; a pass reads each of them once. What is left undecided is held in memory."""

    screens = True

    def __init__(
        self,
        paths: Sequence[Path | str],
        rows: Rows,
        planes: Sequence[str],
        declared: Sequence[float],
        defer: bool = True,
    ) -> None:
        """Reads schemas and sizes only.

        Args:
            planes: names of the amounts, in the order in which `rows.plane` counts them.
            declared: USD per unit of each at declared prices.

        Raises:
            RecordError: a file that cannot be read, is empty, or lacks a column; shards that differ.
            SettingsError: no files, or not one declared price for each plane.
        """
        if not paths:
            raise SettingsError("names no files", key="shards")
        if len(planes) != len(declared):
            raise SettingsError(f"{len(declared)} prices for {len(planes)} planes", key="declared")
        self.rows, self.defer = rows, defer
        self.files = [_File.open(Path(path)) for path in paths]
        first = self.files[0]
        self.uses = tuple(
            name.removeprefix("quality:") for name in first.types if name.startswith("quality:")
        )
        if not self.uses:
            raise RecordError("is not there", path=first.path, field="quality:<use>")
        self._planes = ("quality", *planes)
        self._optional = [name for name in ("weight", "member") if name in first.types]
        if rows.scoped.any() and "member" not in first.types:
            raise RecordError("is not there, but rows have scopes", path=first.path, field="member")
        self._names = ["value", *self._cells, *self._optional]
        for file in self.files:
            self._check_columns(file)
        types = {file.types[name] for file in self.files for name in self._cells}
        self._number: type[np.floating[Any]] = np.float32 if types == {pa.float32()} else np.float64
        self._declared = tuple(np.array([usd], dtype=np.float64) for usd in declared)
        self._starts = np.concatenate(([0], np.cumsum([len(file) for file in self.files])))
        self._sound = False

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def width(self) -> int:
        return len(self.uses)

    @property
    def nbytes(self) -> int:
        """Of all planes, in memory."""
        return len(self) * len(self._cells) * np.dtype(self._number).itemsize

    @cached_property
    def weight(self) -> float:
        """Of all tasks; where there are weights, their column is read once for it.

        Raises:
            RecordError: one that is negative or not finite.
        """
        if "weight" not in self._optional:
            return float(len(self))
        total = 0.0
        for file in self.files:
            for at, batch in file.batches(["weight"], range(file.sizes.size)):
                weight = _array(batch.column(0))
                bad = np.flatnonzero(~(np.isfinite(weight) & (weight >= 0)))
                if bad.size:
                    row = at + int(bad[0]) + 1
                    raise RecordError(f"is {weight[bad[0]]}", path=file.path, row=row, field="weight")
                total += float(weight.sum(dtype=np.float64))
        return total

    def sums(
        self,
        price: FloatArray,
        scale: float,
        bandwidth: float,
        yardstick: FloatArray,
        *,
        moments: bool = False,
    ) -> Sums:
        """One pass; see `Memory.sums`.

        Raises:
            RecordError: an amount that is not finite, with file, row and column.
        """

        def respond(page: Memory, at: int) -> Sums:
            if not self._sound:  # kernels that only sum take NaN for "not allowed"
                self._check(page.planes, at)
            return page.sums(price, scale, bandwidth, yardstick, moments=moments)

        return reduce(add, self._each(respond))

    def screen(self, price: FloatArray, radius: FloatArray, scale: float) -> tuple[Sums, Memory]:
        """One pass; see `Memory.screen`.

        Raises:
            RecordError: an amount that is not finite, with file, row and column.
        """

        def part(page: Memory, at: int) -> tuple[Sums, Planes, IntArray]:
            sums, near = page.screen(price, radius, scale)
            assert near.ids is not None  # a part of a market says which
            return sums, near.planes, near.ids + at

        parts, near, ids = zip(*self._each(part), strict=True)
        return reduce(add, parts), Memory(
            Planes.concatenate(near), self.rows, self.defer, np.concatenate(ids)
        )

    def sample(self, n: int) -> Memory:
        """About n tasks from all over the files, standing for the whole weight: RUNS runs of neighbours, or tasks of
        GROUPS row groups. Where neighbours are alike it is less exact than `Memory.sample`, and the box that is
        aimed by it may have to be screened again.

        Raises:
            RecordError: an amount that is not finite.
        """
        ids = self._spread(min(n, len(self)))
        planes, at = self._room(ids.size)(ids.size), 0
        for file, start in zip(self.files, self._starts[:-1], strict=True):
            own = ids[(ids >= start) & (ids < start + len(file))] - start
            for first, batch in file.batches(self._names, np.unique(file.unit(own)), sparse=True):
                here = own[(own >= first) & (own < first + batch.num_rows)] - first
                self._put(planes, at, self._arrays(file, first, batch), here)
                at += here.size
        self._check(planes, ids)
        weight = planes.weight * (self.weight / planes.total_weight())
        return Memory(replace(planes, weight=weight), self.rows, self.defer)

    def gather(self) -> Memory:
        """The same market, in this process's memory."""
        ((planes, _),) = self._pages(len(self))
        self._check(planes, 0)
        return Memory(planes, self.rows, self.defer)

    # --- pages -----------------------------------------------------------------------------------------------------

    def _each(self, work: Callable[[Memory, int], T]) -> list[T]:
        """`work` on each page and the number of its first task, while the next page is read."""
        size = max(1, PAGE // (len(self._cells) * np.dtype(self._number).itemsize))
        pages, done = self._pages(size), []
        with ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(next, pages, None)
            while (page := ahead.result()) is not None:
                ahead = reader.submit(next, pages, None)
                planes, at = page
                try:
                    done.append(work(Memory(planes, self.rows, self.defer), at))
                except QuantityError:
                    self._check(planes, at)
                    raise
        self._sound = True
        return done

    def _pages(self, size: int) -> Iterator[tuple[Planes, int]]:
        """All tasks, `size` at a time, and the number of the first. A page is overwritten by the next but one."""
        rooms = cycle([self._room(min(size, len(self))) for _ in range(1 + (size < len(self)))])
        at, filled, planes = 0, 0, next(rooms)(min(size, len(self)))
        for file in self.files:
            for first, batch in file.batches(self._names, range(file.sizes.size)):
                columns, taken = self._arrays(file, first, batch), 0
                while taken < batch.num_rows:
                    some = min(len(planes) - filled, batch.num_rows - taken)
                    self._put(planes, filled, columns, slice(taken, taken + some))
                    taken, filled = taken + some, filled + some
                    if filled == len(planes):
                        yield planes, at
                        at, filled = at + filled, 0
                        planes = next(rooms)(min(size, len(self) - at))

    def _room(self, size: int) -> Callable[[int], Planes]:
        """Memory for up to `size` tasks, use by use; gives the planes of n tasks in it."""
        shape = (len(self._planes), self.width)
        cells, value = np.empty(shape[0] * shape[1] * size, dtype=self._number), np.empty(size)
        weight = np.ones(size if "weight" in self._optional else 1)
        member = np.zeros(size if "member" in self._optional else 1, dtype=np.uint64)

        def planes(n: int) -> Planes:
            quality, *amounts = cells[: shape[0] * shape[1] * n].reshape(*shape, n).transpose(0, 2, 1)
            return Planes(value[:n], quality, tuple(amounts), self._declared, weight[:n], member[:n])

        return planes

    def _put(self, planes: Planes, at: int, columns: list[NDArray[Any]], pick: slice | IntArray) -> None:
        """The tasks `pick` of `columns`, in the order of `_names`, to the places from `at` on."""
        uses = (row for plane in (planes.quality, *planes.amounts) for row in plane.T)
        rest = (getattr(planes, name) for name in self._optional)
        for to, column in zip((planes.value, *uses, *rest), columns, strict=True):
            some = column[pick]
            to[at : at + some.size] = some

    def _arrays(self, file: _File, first: int, batch: pa.RecordBatch) -> list[NDArray[Any]]:
        if "member" in self._optional and batch.column(batch.num_columns - 1).null_count:
            row = int(np.flatnonzero(batch.column(batch.num_columns - 1).is_null())[0])
            raise RecordError("is null", path=file.path, row=first + row + 1, field="member")
        return [_array(column) for column in batch.columns]

    def _spread(self, n: int) -> IntArray:
        """The tasks of a sample, ascending."""
        size, rng = len(self), np.random.default_rng(len(self))
        if self.files[0].kind == "Arrow":
            runs = min(RUNS, -(-n // RUN))
            each, apart = n // runs, size / runs
            starts = np.arange(runs) * apart + rng.random(runs) * (apart - each)
            return (starts.astype(np.int64)[:, None] + np.arange(each)).ravel()
        sizes = np.concatenate([file.sizes for file in self.files])
        picked = np.unique(((np.arange(GROUPS) + 0.5) * (sizes.size / GROUPS)).astype(np.int64))
        ends = np.cumsum(sizes[picked])
        n = min(n, int(ends[-1]))
        place = ((np.arange(n) + rng.random(n)) * (ends[-1] / n)).astype(np.int64)
        group = np.searchsorted(ends, place, side="right")
        before = np.cumsum(sizes) - sizes
        chosen: IntArray = place - (ends - sizes[picked])[group] + before[picked][group]
        return chosen

    # --- checks ----------------------------------------------------------------------------------------------------

    @property
    def _cells(self) -> list[str]:
        return [f"{plane}:{use}" for plane in self._planes for use in self.uses]

    def _check_columns(self, file: _File) -> None:
        first = self.files[0]
        if file.kind != first.kind:
            raise RecordError(f"is {file.kind}, while {first.path} is {first.kind}", path=file.path)
        for name in self._names:
            if name not in file.types:
                raise RecordError("is not there", path=file.path, field=name)
            allowed = [pa.uint64()] if name == "member" else [pa.float32(), pa.float64()]
            if file.types[name] not in allowed:
                known = " or ".join(str(t) for t in allowed)
                raise RecordError(f"is {file.types[name]}, not {known}", path=file.path, field=name)
        for name in file.types:
            if name not in self._names and (name.startswith("quality:") or name in ("weight", "member")):
                raise RecordError(f"is not there in {first.path}", path=file.path, field=name)

    def _check(self, planes: Planes, ids: int | IntArray) -> None:
        """Raise about the first cell that no market can have; `ids` are the tasks, or the first of consecutive ones."""

        def refuse(bad: Any, column: NDArray[Any], name: str, what: str = "") -> None:
            if not bad.any():
                return
            at = int(np.flatnonzero(bad)[0])
            task = int(ids + at if isinstance(ids, int) else ids[at])
            of = int(np.searchsorted(self._starts, task, side="right")) - 1
            row = task - int(self._starts[of]) + 1
            raise RecordError(what or f"is {column[at]}", path=self.files[of].path, row=row, field=name)

        refuse(~np.isfinite(planes.value), planes.value, "value")
        refuse(~(np.isfinite(planes.weight) & (planes.weight >= 0)), planes.weight, "weight")
        allowed = ~np.isnan(planes.quality.T)
        for name, plane in zip(self._planes, (planes.quality, *planes.amounts), strict=True):
            for use, column, asked in zip(self.uses, plane.T, allowed, strict=True):
                refuse(~np.isfinite(column) & asked, column, f"{name}:{use}")
        if not self.defer:
            none = ~allowed.any(axis=0)
            refuse(none, planes.value, "quality:*", "is null for every use, and the task may not be deferred")


@dataclass(frozen=True)
class _File:
    """One shard. Its units are record batches or row groups."""

    path: Path
    kind: Literal["Arrow", "Parquet"]
    types: dict[str, pa.DataType]
    sizes: IntArray
    """(units,) rows of each."""

    def __len__(self) -> int:
        return int(self.sizes.sum())

    @classmethod
    def open(cls, path: Path) -> _File:
        """Its schema and sizes.

        Raises:
            RecordError: it is not a shard, or has no tasks.
        """
        kind = _FORMATS.get(path.suffix.lower())
        if kind is None:
            known = ", ".join(_FORMATS)
            raise RecordError(f"unknown extension '{path.suffix}'", path=path, hint=f"readable: {known}")
        with _reading(path):
            if kind == "Parquet":
                with pq.ParquetFile(path) as file:
                    about, schema = file.metadata, file.schema_arrow
                sizes = [about.row_group(u).num_rows for u in range(about.num_row_groups)]
            else:
                reader = _mapped(path)
                schema = reader.schema
                sizes = [reader.get_batch(u).num_rows for u in range(reader.num_record_batches)]
        if not sum(sizes):
            raise RecordError("has no tasks", path=path)
        types = dict(zip(schema.names, schema.types, strict=True))
        return cls(path, kind, types, np.array(sizes, dtype=np.int64))

    def unit(self, rows: IntArray) -> IntArray:
        """The unit each row is in."""
        found: IntArray = np.searchsorted(np.cumsum(self.sizes), rows, side="right").astype(np.int64)
        return found

    def batches(
        self, columns: list[str], units: Iterable[int], *, sparse: bool = False
    ) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Columns of some units and the number of their first row; `sparse` if little of them will be looked at."""
        before = np.cumsum(self.sizes) - self.sizes
        with _reading(self.path):
            if self.kind == "Parquet":
                with pq.ParquetFile(self.path) as file:
                    for unit in units:
                        at = int(before[unit])
                        for batch in file.iter_batches(DECODED, [int(unit)], columns):
                            yield at, batch.select(columns)
                            at += batch.num_rows
                return
            only = pa.ipc.IpcReadOptions(included_fields=[list(self.types).index(c) for c in columns])
            reader = (
                _mapped(self.path)
                if sparse
                else pa.ipc.open_file(pa.OSFile(str(self.path), "r"), options=only)
            )
            for unit in units:
                yield int(before[unit]), reader.get_batch(int(unit)).select(columns)


def _mapped(path: Path) -> pa.ipc.RecordBatchFileReader:
    """Its batches are the file itself (unless it is compressed): what is not touched is not read."""
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM"):  # not on Windows
        # Otherwise each task of a sample brings megabytes of its neighbours from the disk.
        mapped.madvise(mmap.MADV_RANDOM)
    return pa.ipc.open_file(pa.py_buffer(mapped))


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise RecordError(f"cannot be read: {reason}", path=path) from error


def _array(column: pa.Array[Any]) -> NDArray[Any]:
    """Not copied unless there are nulls, which become NaN."""
    values: NDArray[Any] = column.to_numpy(zero_copy_only=False)
    return values


def write_shard(
    path: Path, market: Planes, uses: Sequence[str], planes: Sequence[str], also: Sequence[str] = ()
) -> None:
    """One shard, uncompressed if it is Arrow; declared prices are not part of it.

    Args:
        uses: names of the I uses.
        planes: names of the amounts.
        also: which of "weight" and "member" to write; the same for all shards of a market.
    """
    columns = {"value": market.value}
    for name, plane in zip(("quality", *planes), (market.quality, *market.amounts), strict=True):
        columns |= {f"{name}:{use}": column for use, column in zip(uses, plane.T, strict=True)}
    columns |= {name: np.broadcast_to(getattr(market, name), len(market)) for name in also}
    table = pa.table({name: pa.array(np.ascontiguousarray(column)) for name, column in columns.items()})
    if _FORMATS[path.suffix] == "Parquet":
        pq.write_table(table, path, row_group_size=CHUNK)
    else:
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=CHUNK)
