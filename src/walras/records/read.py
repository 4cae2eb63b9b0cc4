"""Readers: Parquet, CSV and JSON Lines in, batches of the record schema out. One batch is in memory at a time."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from walras.errors import RecordError, nearest
from walras.records.schema import BY_NAME, Column

BATCH_BYTES = 8 << 20
BATCH_ROWS = 65_536

_FORMATS = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
}

_MAGIC = {
    b"PAR1": "Parquet",
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "a zip file or spreadsheet",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}
"""First bytes of what people rename to .csv or .jsonl."""

OnRows = Callable[[int, int], None]
"""Called with rows and (uncompressed or file) bytes read so far, for progress."""


def read_records(
    path: Path,
    columns: Sequence[str],
    names: Mapping[str, str] | None = None,
    extra: Sequence[str] = (),
    on_rows: OnRows | None = None,
    facts: Sequence[str] = (),
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """(number of the first row, batch) pairs with the wanted schema columns, checked.

    Args:
        columns: schema columns wanted; optional ones that the file lacks are left out of the batches.
        names: schema column → column of the file, where they differ.
        extra: further columns of the file, read as float64 ≥ 0 under their own names.
        facts: further columns of the file, read as text under their own names.

    Raises:
        RecordError: names the file, and row (from 1) and column where there is one to blame.
    """
    kind = _format(path)
    wanted: Wanted = {}
    try:
        source = _columns_of(path, kind)
        wanted = _resolve(path, source, columns, names or {}, sparse=kind == "jsonl")
        wanted |= _further(path, source, extra, pa.float64()) | _further(path, source, facts, pa.string())
        _refuse_twice(path, source, wanted)
        number, batches = 1, _batches(path, kind, wanted)
        for raw, done in batches:
            if not raw.num_rows:
                continue
            batch = _conform(path, raw, wanted, number)
            _check(path, batch, wanted, number)
            yield number, batch
            number += raw.num_rows
            if on_rows:
                on_rows(number - 1, done)
    except pa.ArrowException as error:
        raise _translate(path, kind, error, wanted) from error
    except UnicodeDecodeError as error:
        raise _not_text(path) from error
    except UnicodeEncodeError as error:
        raise RecordError("has a name that is not UTF-8", path=path, hint="rename it") from error
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise RecordError(f"cannot be read: {reason}", path=path) from error
    if number == 1:
        raise RecordError("has no records", path=path, hint="one row per (request, model) is expected")


def columns_of(path: Path) -> list[str]:
    """Names of the columns of a file, as they stand there.

    Raises:
        RecordError: a file that is not there, empty, or not of a known format.
    """
    kind = _format(path)
    try:
        return _columns_of(path, kind)
    except pa.ArrowException as error:
        raise _translate(path, kind, error, {}) from error


def _format(path: Path) -> str:
    if not path.exists():
        raise RecordError("no such file", path=path)
    if path.is_dir():
        raise RecordError("is a folder", path=path, hint="name the files in it")
    suffixes = path.suffixes[-2:] if path.suffix == ".gz" else path.suffixes[-1:]
    kind = _FORMATS.get(suffixes[0].lower()) if suffixes else None
    if kind is None or (path.suffix == ".gz" and kind == "parquet"):
        known = ", ".join(_FORMATS) + ", .csv.gz, .jsonl.gz"
        raise RecordError(f"unknown extension '{''.join(suffixes)}'", path=path, hint=f"readable: {known}")
    if path.stat().st_size == 0:
        raise RecordError("is empty", path=path)
    if kind != "parquet" and path.suffix != ".gz":
        with path.open("rb") as file:
            start = file.read(4)
        for magic, what in _MAGIC.items():
            if start.startswith(magic):
                raise RecordError(
                    f"is {what}, not UTF-8 text", path=path, hint="export it again, or rename it"
                )
    return kind


# --- which column of the file is which ------------------------------------------------------------------------------


def _columns_of(path: Path, kind: str) -> list[str]:
    if kind == "parquet":
        return list(pa.parquet.read_schema(path).names)
    if kind == "csv":
        with _open_csv(path) as reader:
            return list(reader.schema.names)
    return list(_json_head(path))


def _json_head(path: Path) -> dict[str, Any]:
    """Keys of the first records, each with its first value that is not null."""
    now = path.stat()
    return _head_of(path, now.st_size, now.st_mtime_ns)


@lru_cache(4)  # it is asked for several times in one reading
def _head_of(path: Path, _size: int, _changed_ns: int) -> dict[str, Any]:
    head: dict[str, Any] = {}
    with _stream(path) as stream:
        text = stream.read(BATCH_BYTES)
    lines = text.splitlines()
    for line in lines if len(text) < BATCH_BYTES else lines[:-1] or lines:
        try:
            record = json.loads(line) if line.strip() else {}
        except ValueError:  # told with its row by `_translate`, when the parser comes to it
            record = {}
        for key, value in record.items() if isinstance(record, dict) else ():
            if head.get(key) is None:
                head[key] = value
    if not head:
        raise _json_fault(path, {}) or RecordError("has no records", path=path)
    return head


def _json_type(column: Column, value: Any) -> pa.DataType:
    """The type to parse: loggers write ids as numbers, flags as 0 and 1, decimals as text; the cast comes after."""
    if isinstance(value, bool):
        return pa.bool_()
    if isinstance(value, int) and not pa.types.is_floating(column.type):
        return pa.int64()
    return pa.string() if isinstance(value, str) else column.type


Wanted = dict[str, tuple[Column, str]]
"""Schema name → (its column, name in the file)."""


def _resolve(
    path: Path,
    source: Sequence[str],
    columns: Sequence[str],
    names: Mapping[str, str],
    *,
    sparse: bool = False,
) -> Wanted:
    """Which column of the file is which. `sparse`: a key may first occur late in the file, so look for it anyway."""
    for name in names:
        if name not in BY_NAME:
            raise RecordError(
                f"'{name}' is not a column of the schema", path=path, hint=nearest(name, BY_NAME)
            )
    wanted: Wanted = {}
    for name in columns:
        column = BY_NAME[name]
        candidates = [names[name]] if name in names else [name, *column.aliases]
        found = next((c for c in candidates if c in source), None)
        if found is not None:
            wanted[name] = (column, found)
        elif column.required or name in names:
            raise RecordError(
                f"no column '{candidates[0]}'",
                path=path,
                hint=f"{nearest(candidates[0], source)}; name it with --map {name}=COLUMN",
            )
        elif sparse:
            wanted[name] = (column, name)
    return wanted


def _further(path: Path, source: Sequence[str], columns: Sequence[str], kind: pa.DataType) -> Wanted:
    """Columns outside the schema, under their own names."""
    for name in columns:
        if name not in source:
            raise RecordError(f"no column '{name}'", path=path, hint=nearest(name, source))
    return {name: (Column(name, kind, "", low=0), name) for name in columns}


def _refuse_twice(path: Path, source: Sequence[str], wanted: Wanted) -> None:
    twice = next((name for _, name in wanted.values() if source.count(name) > 1), None)
    if twice is not None:
        raise RecordError("occurs twice in the header", path=path, field=twice, hint="rename one of the two")


# --- raw batches ------------------------------------------------------------------------------------------------------


def _stream(path: Path) -> Any:
    return pa.input_stream(str(path), compression="detect")


def _open_csv(path: Path, wanted: Wanted | None = None) -> Any:
    options: dict[str, Any] = {
        "null_values": [""],
        "strings_can_be_null": True,
        "quoted_strings_can_be_null": True,
    }
    if wanted is not None:
        options["include_columns"] = [name for _, name in wanted.values()]
        options["column_types"] = {name: column.type for column, name in wanted.values()}
    return pa.csv.open_csv(
        _stream(path),
        # One thread is as fast here, and only then do Arrow's errors tell the row.
        read_options=pa.csv.ReadOptions(block_size=BATCH_BYTES, use_threads=False),
        parse_options=pa.csv.ParseOptions(newlines_in_values=True),
        convert_options=pa.csv.ConvertOptions(**options),
    )


def _batches(path: Path, kind: str, wanted: Wanted) -> Iterator[tuple[pa.RecordBatch, int]]:
    """Raw batches, and how many bytes of the file had been read when each came."""
    size = path.stat().st_size
    if kind == "parquet":
        with pa.parquet.ParquetFile(path) as file:
            total, rows = max(file.metadata.num_rows, 1), 0
            for batch in file.iter_batches(BATCH_ROWS, columns=sorted({name for _, name in wanted.values()})):
                rows += batch.num_rows
                yield batch, size * rows // total
        return
    if kind == "csv":
        reader = _open_csv(path, wanted)
    else:
        head = _json_head(path)
        schema = pa.schema([(name, _json_type(column, head.get(name))) for column, name in wanted.values()])
        reader = pa.json.open_json(
            _stream(path),
            read_options=pa.json.ReadOptions(block_size=BATCH_BYTES),
            parse_options=pa.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
        )
    read = 0
    with reader:
        for batch in reader:
            read = min(read + BATCH_BYTES, size)
            yield batch, read


def _conform(path: Path, raw: pa.RecordBatch, wanted: Wanted, first: int) -> pa.RecordBatch:
    """Columns renamed and cast to the schema's types."""
    arrays = {}
    for name, (column, source) in wanted.items():
        array: Any = raw.column(raw.schema.get_field_index(source))
        if pa.types.is_dictionary(array.type):
            array = array.dictionary_decode()
        if array.type != column.type:
            try:
                array = array.cast(column.type)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                row = _first_bad(array, partial(_cast, to=column.type))
                problem = f"is {_shown(array[row].as_py())}, expected {_KIND[column.type]}"
                raise RecordError(problem, path=path, row=first + row, field=source) from error
        if column.type == pa.string():
            try:
                array.validate(full=True)
            except pa.ArrowInvalid as error:
                row = _first_bad(array, lambda one: one.validate(full=True))
                raise RecordError(
                    "is not UTF-8 text", path=path, row=first + row, field=source, hint=_RECODE
                ) from error
        arrays[name] = array
    return pa.RecordBatch.from_pydict(arrays)


_KIND = {
    pa.string(): "text",
    pa.float64(): "a number",
    pa.bool_(): "true or false",
    pa.list_(pa.float64()): "a list of numbers",
}


def _cast(array: Any, to: pa.DataType) -> Any:
    return array.cast(to)


def _first_bad(array: Any, check: Callable[[Any], Any]) -> int:
    """Position of the first element that fails `check`."""
    for row in range(len(array)):
        try:
            check(array[row : row + 1])
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            return row
    return 0


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 40 else text[:37] + "…"


# --- checks -----------------------------------------------------------------------------------------------------------


def _check(path: Path, batch: pa.RecordBatch, wanted: Wanted, first: int) -> None:
    for name, (column, source) in wanted.items():
        array: Any = batch.column(name)
        if name in ("request_id", "model") and array.null_count:
            row = int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0])
            raise RecordError("is missing", path=path, row=first + row, field=source)
        if column.type == pa.float64():
            _check_range(path, array, column, source, first)
        elif pa.types.is_list(column.type):
            flat = array.flatten().to_numpy(zero_copy_only=False)
            wrong = np.flatnonzero(
                ~(np.isfinite(flat) & (flat >= (-np.inf if column.low is None else column.low)))
            )
            if wrong.size:
                lengths = array.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
                row = int(np.searchsorted(np.cumsum(lengths), wrong[0], side="right"))
                must = "finite" if column.low is None else f"finite and ≥ {column.low:g}"
                problem = f"holds {flat[wrong[0]]:g}, which must be {must}"
                raise RecordError(problem, path=path, row=first + row, field=source)


def _check_range(path: Path, array: Any, column: Column, source: str, first: int) -> None:
    known = ~array.is_null().to_numpy(zero_copy_only=False)
    values = array.to_numpy(zero_copy_only=False)
    low = -np.inf if column.low is None else column.low
    high = np.inf if column.high is None else column.high
    with np.errstate(invalid="ignore"):
        bad = np.flatnonzero(known & ~(np.isfinite(values) & (values >= low) & (values <= high)))
    if bad.size:
        value = float(values[bad[0]])
        bounds = f"between {low:g} and {high:g}" if np.isfinite(high) else f"finite and ≥ {low:g}"
        hint = (
            "divide by the scale's maximum"
            if column.name == "quality" and value > 1
            else "null means unknown"
        )
        raise RecordError(
            f"is {value:g}, which must be {bounds}",
            path=path,
            row=first + int(bad[0]),
            field=source,
            hint=hint,
        )


# --- errors of the parsers --------------------------------------------------------------------------------------------


_RECODE = "convert it: iconv -f LATIN1 -t UTF-8"
_CSV_ROW = re.compile(r"(?:In CSV column #(\d+): )?(?:CSV parse error: )?Row #(\d+): (.*)", re.DOTALL)


def _translate(path: Path, kind: str, error: pa.ArrowException, wanted: Wanted) -> RecordError:
    text = str(error).splitlines()[0]
    if "UTF8" in text or "UTF-8" in text:
        return _not_text(path)
    if kind == "parquet":
        return RecordError(
            f"is not a complete Parquet file: {text}",
            path=path,
            hint="was it cut off, or is it still being written?",
        )
    if "straddling" in text:
        return RecordError(
            f"has a record longer than {BATCH_BYTES >> 20} MB, or a quote that is never closed", path=path
        )
    fault = _csv_fault(path, str(error)) if kind == "csv" else _json_fault(path, wanted)
    return fault or RecordError(f"is not readable as {kind}: {text}", path=path)


def _csv_fault(path: Path, text: str) -> RecordError | None:
    """Arrow's message with record number and column name; Arrow counts the header as row 1."""
    match = _CSV_ROW.match(text)
    if match is None:
        return None
    row, problem = int(match[2]) - 1, match[3].splitlines()[0]
    if match[1] is not None:
        value = problem.rpartition("invalid value ")[2]
        kind = "true or false" if "to bool" in problem else "a number"
        field = _columns_of(path, "csv")[int(match[1])]
        return RecordError(f"is {value}, expected {kind}", path=path, row=row, field=field)
    hint = "quote what holds commas, quotes or line breaks"
    return RecordError(problem[:1].lower() + problem[1:], path=path, row=row, hint=hint)


def _json_fault(path: Path, wanted: Wanted) -> RecordError | None:
    """The first record that is not what it should be: read again, slowly, only now that something is known to be wrong."""
    with _stream(path) as stream:
        row = 0
        for line in _lines(stream):
            if not line.strip():
                continue
            row += 1
            try:
                record = json.loads(line)
            except UnicodeDecodeError:
                return RecordError("is not UTF-8 text", path=path, row=row, hint=_RECODE)
            except json.JSONDecodeError as error:
                problem = f"is not JSON: {error.msg} at character {error.pos + 1}"
                return RecordError(problem, path=path, row=row, hint="one object per line")
            if not isinstance(record, dict):
                return RecordError("is not a JSON object", path=path, row=row, hint="one object per line")
            for column, name in wanted.values():
                if not _fits(record.get(name), column.type):
                    problem = f"is {_shown(record[name])}, expected {_KIND[column.type]}"
                    return RecordError(problem, path=path, row=row, field=name)
    return None


def _fits(value: Any, kind: pa.DataType) -> bool:
    if value is None:
        return True
    if kind == pa.string():
        return isinstance(value, str)
    if kind == pa.float64():
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind == pa.bool_():
        return isinstance(value, bool)
    return isinstance(value, list) and all(_fits(item, pa.float64()) for item in value)


def _lines(stream: Any) -> Iterator[bytes]:
    tail = b""
    while chunk := stream.read(1 << 20):
        *lines, tail = (tail + chunk).split(b"\n")
        yield from lines
    yield tail


def _not_text(path: Path) -> RecordError:
    """Which line is not UTF-8: read again only now that something is known to be wrong."""
    with _stream(path) as stream:
        for number, text in enumerate(_lines(stream), 1):
            try:
                text.decode("utf-8")
            except UnicodeDecodeError as error:
                return _bad_line(path, number, error)
    return RecordError("is not UTF-8 text", path=path, hint=_RECODE)


def _bad_line(path: Path, line: int, error: UnicodeDecodeError) -> RecordError:
    byte = error.object[error.start]
    return RecordError(
        f"line {line} is not UTF-8 (byte 0x{byte:02x})",
        path=path,
        hint=_RECODE,
    )
