"""What was learned, in a folder: `router.json` says what it is, `arrays.npz` holds the numbers. No code, no pickles.

The same log and seed give the same bytes. A folder is written beside its place and then moved there, so that a reader never
meets half of one.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from walras.errors import OutputError, QuantityError, RecordError

FORMAT = 1
"""Raised when an older Walras could not read what this one writes, or would misread it (hashing of texts included)."""
MANIFEST, ARRAYS = "router.json", "arrays.npz"
_NONSENSE = (AttributeError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile)
"""What comes of reading a tree that is none, or arrays that are not numbers."""


def save(folder: Path, content: Any, about: Mapping[str, Any]) -> None:
    """Write `content`, a tree of dataclasses, mappings, tuples, arrays and plain values; `about` is for people.

    Raises:
        OutputError: it cannot be written, or the folder holds something else. Nothing is left half written, and a router
            that was there before stays.
    """
    arrays: dict[str, Any] = {}
    tree = _pack(content, arrays)
    data = io.BytesIO()
    np.savez(data, allow_pickle=False, **arrays)
    manifest = {
        "format": FORMAT,
        "walras": version("walras"),
        "about": dict(about),
        "sha256": _digest(tree, data.getvalue()),
        "content": tree,
    }
    if folder.name in ("", ".."):
        raise OutputError(f"{folder}: cannot be replaced whole; name a folder of the router's own")
    fresh, old = (folder.with_name(f".{folder.name}.{what}") for what in ("new", "old"))
    try:
        if _holds_something_else(folder):
            raise OutputError(f"{folder}: holds something that is not a router; name another folder")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        (fresh / ARRAYS).write_bytes(data.getvalue())
        (fresh / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        _put(fresh, folder, old)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(fresh, ignore_errors=True)
        raise OutputError(f"{folder}: cannot be written: {error.strerror or error}") from error


def _holds_something_else(folder: Path) -> bool:
    """Whether replacing `folder` would lose anything but a router."""
    if not folder.exists():
        return False
    if not folder.is_dir():
        return True
    found = {file.name for file in folder.iterdir()}
    return bool(found) and (MANIFEST not in found or not found <= {MANIFEST, ARRAYS})


def _put(fresh: Path, folder: Path, old: Path) -> None:
    """Move `fresh` to its place, or put `old`, where there is one, back."""
    try:
        fresh.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise


def _digest(tree: Any, data: bytes) -> str:
    """Of all that is read back: the numbers, and the names and settings beside them."""
    return hashlib.sha256(json.dumps(tree).encode() + data).hexdigest()


def load(folder: Path, kinds: tuple[type, ...]) -> tuple[Any, dict[str, Any]]:
    """The content and what was said about it. Only dataclasses of `kinds` are made.

    Raises:
        RecordError: no router there, one of a newer Walras, or a damaged one.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        data = (folder / ARRAYS).read_bytes()
    except OSError as error:
        hint = "`walras fit LOG -o FOLDER` makes one"
        raise RecordError(f"is not a router: {error.strerror}", path=folder, hint=hint) from error
    except (ValueError, RecursionError) as error:
        raise RecordError(f"is not a router: {MANIFEST} is not JSON", path=folder) from error
    made_by = manifest.get("format") if isinstance(manifest, dict) else None
    if not isinstance(made_by, int):
        raise RecordError(f"is not a router: {MANIFEST} names no format", path=folder)
    if made_by != FORMAT:
        which = "a newer" if made_by > FORMAT else "an older"
        hint = "upgrade Walras" if made_by > FORMAT else "fit it again"
        what = f"was made by {which} Walras (format {made_by}, version {manifest.get('walras')}; this one reads {FORMAT})"
        raise RecordError(what, path=folder, hint=hint)
    if _digest(manifest.get("content"), data) != manifest.get("sha256"):
        raise RecordError("is damaged: it is not what was written", path=folder, hint="fit it again")
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            content = _unpack(manifest["content"], dict(arrays), {k.__name__: k for k in kinds})
    except (*_NONSENSE, QuantityError) as error:
        raise RecordError(f"is damaged: {error}", path=folder, hint="fit it again") from error
    return content, manifest.get("about", {})


def _pack(value: Any, arrays: dict[str, Any]) -> Any:
    """The tree as JSON takes it; its arrays go into `arrays`, by number: names of columns may hold anything."""
    if isinstance(value, np.ndarray):
        arrays[str(len(arrays))] = value
        return {"array": str(len(arrays) - 1)}
    if is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: _pack(getattr(value, field.name), arrays) for field in fields(value)}
        return {"kind": type(value).__name__, "fields": parts}
    if isinstance(value, Mapping):
        return {"table": {key: _pack(item, arrays) for key, item in value.items()}}
    if isinstance(value, tuple):
        return {"list": [_pack(item, arrays) for item in value]}
    return value


def _unpack(tree: Any, arrays: Mapping[str, Any], kinds: Mapping[str, type]) -> Any:
    if not isinstance(tree, dict):
        return tree
    if "array" in tree:
        return arrays[tree["array"]]
    if "kind" in tree:
        parts = {name: _unpack(part, arrays, kinds) for name, part in tree["fields"].items()}
        return kinds[tree["kind"]](**parts)
    if "table" in tree:
        return {key: _unpack(item, arrays, kinds) for key, item in tree["table"].items()}
    return tuple(_unpack(item, arrays, kinds) for item in tree["list"])
