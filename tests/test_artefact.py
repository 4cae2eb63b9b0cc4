"""Routers on disk: the same bits back, the same bytes from the same log, and nothing but a router is ever read or replaced."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import os
import pickle
import string
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from logs import walras, walras_script
from routers import OUTPUT, RECORDS, fitted, manifest_of, refused
from walras.errors import OutputError, RecordError
from walras.estimate import artefact
from walras.estimate.estimates import ALSO, KINDS, Estimates, fit_estimates
from walras.estimate.quality import Requests
from walras.estimate.text import read_texts
from walras.quantities import Labels
from walras.records import read_log
from walras.simulate import write_sample

FILES = ("router.json", "arrays.npz")


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sample") / "sample.parquet"
    write_sample(path, 100, seed=0)
    return path


@pytest.fixture(scope="module")
def made(sample: Path) -> Path:
    return fitted(sample)


@pytest.fixture
def router(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may harm."""
    copy = tmp_path / "router"
    copy.mkdir()
    for name in FILES:
        (copy / name).write_bytes((made / name).read_bytes())
    return copy


def bits(router: Path) -> list[bytes]:
    return [(router / name).read_bytes() for name in FILES]


def routed(router: Path) -> Any:
    return walras("route", "--router", router, "--prompt", "hello", "--value", 1)


# --- what is written is what is read ----------------------------------------------------------------------------------


def test_predictions_come_back_bit_for_bit(sample: Path, tmp_path: Path) -> None:
    estimates = fit_estimates(read_log([sample], losses=True, also=("prompt", *ALSO)), seed=3)
    estimates.save(tmp_path / "r", {"seed": 3})
    again, about = Estimates.load(tmp_path / "r")
    assert about == {"seed": 3}
    known = estimates.quality.classes
    requests = Requests(
        read_texts(["", "Sum 1 and 2.", "x" * 9000, None]),
        Labels(np.array([0, 1, -1, 2]), (known[2], known[0], "never seen")),
        {"tenant": Labels(np.array([0, -1, 0, 0]), ("acme",))},
    )
    for late_at in ((), (3.0, 30.0)):
        first, second = (e.offer(requests, late_at=late_at) for e in (estimates, again))
        assert first.uses.names == second.uses.names
        for column, other in zip(*(o.uses.each(np.copy).values() for o in (first, second)), strict=True):
            np.testing.assert_equal(other, column)
        np.testing.assert_array_equal(second.quality_error, first.quality_error)
        np.testing.assert_array_equal(second.usd_error, first.usd_error)
    np.testing.assert_array_equal(again.losses_of(requests), estimates.losses_of(requests))
    found = estimates.quality.predict(requests)
    for end, other in zip(
        estimates.quality.interval(found, 0.9), again.quality.interval(found, 0.9), strict=True
    ):
        np.testing.assert_array_equal(other, end)


def test_same_log_and_seed_same_bytes(sample: Path, made: Path, tmp_path: Path) -> None:
    again = tmp_path / made.name
    ran = walras_script("fit", sample, "-o", again, env=os.environ | {"PYTHONHASHSEED": "17"})
    assert ran.code == 0, ran.err
    assert bits(again) == bits(made)


def test_another_seed_other_bytes(sample: Path, made: Path, tmp_path: Path) -> None:
    assert walras("fit", sample, "-o", tmp_path / "r", "--seed", 1).code == 0
    assert bits(tmp_path / "r")[1] != bits(made)[1]


def test_what_it_was_learned_from(made: Path) -> None:
    about = manifest_of(made)["about"]
    assert about["logs"] == ["sample.parquet"]
    assert (about["requests"], about["rows"], about["seed"], about["synthetic"]) == (100, 500, 0, True)


NAMES = st.text(string.ascii_letters + "._/é漢\0", max_size=6)
TREES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(st.characters(), max_size=8),
        arrays.arrays(
            st.sampled_from([np.float64, np.int64, np.bool_, np.uint64, np.float32]),
            arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
        ),
    ),
    lambda inner: st.one_of(
        st.dictionaries(NAMES, inner, max_size=3), st.lists(inner, max_size=3).map(tuple)
    ),
    max_leaves=8,
)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return (
            isinstance(b, np.ndarray)
            and a.dtype == b.dtype
            and np.array_equal(a.view(), b, equal_nan=a.dtype.kind == "f")
        )
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return isinstance(b, tuple) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and math.isnan(a):
        return isinstance(b, float) and math.isnan(b)
    return type(a) is type(b) and bool(a == b)


@given(TREES)
@settings(max_examples=60)
def test_any_tree_comes_back(tree: Any) -> None:
    """Also where names hold dots, slashes and nulls, or two paths read alike: {"a.b": …, "a": {"b": …}}."""
    with tempfile.TemporaryDirectory() as folder:
        artefact.save(Path(folder) / "r", tree, {})
        again, _ = artefact.load(Path(folder) / "r", ())
    assert same(tree, again)


def test_paths_that_read_alike_are_two() -> None:
    with tempfile.TemporaryDirectory() as folder:
        artefact.save(Path(folder) / "r", {"a.b": np.zeros(1), "a": {"b": np.ones(1)}}, {})
        again, _ = artefact.load(Path(folder) / "r", ())
    assert (again["a.b"][0], again["a"]["b"][0]) == (0.0, 1.0)


def test_names_that_are_half_characters(tmp_path: Path) -> None:
    artefact.save(tmp_path / "r", ("\udcff",), {"logs": ["\udcff.parquet"]})
    assert artefact.load(tmp_path / "r", ()) == (("\udcff",), {"logs": ["\udcff.parquet"]})


# --- what cannot be read ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made_by", "says"),
    [(artefact.FORMAT + 6, ("newer", "upgrade")), (artefact.FORMAT - 1, ("older", "fit it again"))],
)
def test_another_format(router: Path, made_by: int, says: tuple[str, ...]) -> None:
    manifest = manifest_of(router) | {
        "format": made_by,
        "walras": "9.8.7",
        "content": "what this one cannot know",
    }
    (router / "router.json").write_text(json.dumps(manifest))
    expected = (router, f"format {made_by}", "9.8.7", f"this one reads {artefact.FORMAT}", *says)
    refused(routed(router), RECORDS, *expected)


def flip(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]


@pytest.mark.parametrize(
    ("name", "harm", "says"),
    [
        ("arrays.npz", flip, "damaged"),
        ("arrays.npz", lambda data: data[:-100], "damaged"),
        ("arrays.npz", lambda data: b"", "damaged"),
        ("router.json", lambda data: data[:-100], "is not JSON"),
        ("router.json", lambda data: b"", "is not JSON"),
        ("router.json", lambda data: b"\xff\xfe" + data, "is not JSON"),
        ("router.json", lambda data: b"[" * 200_000, "is not JSON"),
        ("router.json", lambda data: b"[]", "names no format"),
        ("router.json", lambda data: b'{"format": "1"}', "names no format"),
        ("router.json", lambda data: b'{"format": 1}', "damaged"),
        ("router.json", lambda data: data.replace(b'"frontier"', b'"frontiez"'), "damaged"),
    ],
)  # fmt: skip
def test_damage_is_told(router: Path, name: str, harm: Callable[[bytes], bytes], says: str) -> None:
    harmed = harm((router / name).read_bytes())
    assert harmed != (router / name).read_bytes()
    (router / name).write_bytes(harmed)
    refused(routed(router), RECORDS, router, says)


@pytest.mark.parametrize("name", FILES)
def test_half_a_router(router: Path, name: str) -> None:
    (router / name).unlink()
    refused(routed(router), RECORDS, router, "is not a router", "walras fit")


def test_no_router(tmp_path: Path, sample: Path) -> None:
    for path in (tmp_path / "none", tmp_path, sample):
        refused(routed(path), RECORDS, path, "is not a router", "walras fit")


# --- nothing is executed ----------------------------------------------------------------------------------------------


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def forge(folder: Path, content: Any, columns: dict[str, Any]) -> Path:
    """A router with a valid digest that holds what it should not."""
    folder.mkdir()
    data = io.BytesIO()
    np.savez(data, **columns)
    digest = hashlib.sha256(json.dumps(content).encode() + data.getvalue()).hexdigest()
    manifest = {"format": artefact.FORMAT, "walras": "0", "about": {}, "sha256": digest, "content": content}
    (folder / "router.json").write_text(json.dumps(manifest))
    (folder / "arrays.npz").write_bytes(data.getvalue())
    return folder


def test_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    bomb = np.array([Bomb(tmp_path / "owned")], dtype=object)
    router = forge(tmp_path / "r", {"array": "x"}, {"x": bomb})
    refused(routed(router), RECORDS, "damaged", "fit it again")
    assert not (tmp_path / "owned").exists()
    bare = forge(tmp_path / "bare", {"array": "x"}, {"x": np.zeros(1)})
    pickled = pickle.dumps(Bomb(tmp_path / "owned"))
    digest = hashlib.sha256(json.dumps({"array": "x"}).encode() + pickled).hexdigest()
    (bare / "arrays.npz").write_bytes(pickled)
    (bare / "router.json").write_text(json.dumps(manifest_of(bare) | {"sha256": digest}))
    refused(routed(bare), RECORDS, "damaged")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "kind", ["os.mkdir", "mkdir", "Path", "builtins.exec", "Economy", "", None, 1, "__class__"]
)
def test_only_known_kinds_are_made(tmp_path: Path, kind: Any) -> None:
    content = {"kind": kind, "fields": {"path": str(tmp_path / "owned")}}
    refused(routed(forge(tmp_path / "r", content, {})), RECORDS, "damaged")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "content",
    [
        None, 3, "text", [], {}, {"list": 3}, {"table": 3}, {"array": "no such"}, {"array": ["x"]},
        {"kind": "Estimates"}, {"kind": "Estimates", "fields": []}, {"kind": "Estimates", "fields": {}},
        {"kind": "Estimates", "fields": {"no_such_field": 1}}, {"kind": ["Estimates"], "fields": {}},
        {"kind": "Joint", "fields": {"weight": {"array": "x"}, "right": {"array": "x"}, "error": {"array": "x"}}},
    ],
)  # fmt: skip
def test_a_well_sealed_manifest_of_nonsense(tmp_path: Path, content: Any) -> None:
    refused(routed(forge(tmp_path / "r", content, {"x": np.zeros((1, 1))})), RECORDS, "damaged")


def test_every_kind_in_a_router_is_known(made: Path) -> None:
    found: set[str] = set()

    def look(tree: Any) -> None:
        if isinstance(tree, dict):
            found.update([tree["kind"]] if "kind" in tree else [])
        for part in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
            look(part)

    look(manifest_of(made)["content"])
    assert {"Estimates", "QualityModel", "UsageModel", "LatencyModel"} <= found
    assert found <= {kind.__name__ for kind in KINDS}


# --- what is replaced, and what never is ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "beside", [{"notes.txt": "keep"}, {"router.json": "{}", "notes.txt": "keep"}, {"arrays.npz": "x"}]
)
def test_a_folder_with_something_else_is_left_alone(
    sample: Path, tmp_path: Path, beside: dict[str, str]
) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    for name, text in beside.items():
        (folder / name).write_text(text)
    refused(walras("fit", sample, "-o", folder), OUTPUT, folder, "not a router", "another folder")
    assert {file.name: file.read_text() for file in folder.iterdir()} == beside
    assert [file.name for file in tmp_path.iterdir()] == ["work"]


@pytest.mark.parametrize("path", [".", "..", "deep/..", "/"])
def test_folders_that_cannot_be_replaced_whole(
    sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    (tmp_path / "here" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "deep")
    refused(walras("fit", sample, "-o", path), OUTPUT, "name a folder of the router's own")


def test_places_where_nothing_can_be_written(sample: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("keep")
    for path in (tmp_path / "file", tmp_path / "file" / "r", tmp_path / ("n" * 300)):
        refused(walras("fit", sample, "-o", path), OUTPUT, path)
    assert (tmp_path / "file").read_text() == "keep"


def test_an_empty_folder_and_an_old_router_give_way(sample: Path, router: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (router / "arrays.npz").write_bytes(b"damaged")
    for folder in (tmp_path / "empty", router, tmp_path / "made" / "on" / "the" / "way"):
        assert walras("fit", sample, "-o", folder).code == 0
        assert {file.name for file in folder.iterdir()} == set(FILES)
        assert routed(folder).code == 0
    assert {file.name for file in tmp_path.iterdir()} == {"empty", "router", "made"}


@pytest.mark.parametrize("nth", [1, 2])
def test_a_move_that_fails_leaves_the_old_router(
    router: Path, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    """The first move takes the old router away, the second puts the new one there."""
    estimates, before, move, calls = Estimates.load(router)[0], bits(router), Path.rename, []

    def failing(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == nth:
            raise OSError(errno.EIO, "Input/output error")
        return move(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OutputError, match="Input/output error"):
        estimates.save(router, {"new": True})
    assert bits(router) == before
    assert Estimates.load(router)[1] != {"new": True}
    assert [file.name for file in router.parent.iterdir()] == ["router"]


@pytest.mark.parametrize("method", ["write_bytes", "write_text", "mkdir"])
def test_a_full_disk_leaves_the_old_router(
    router: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    estimates, before = Estimates.load(router)[0], bits(router)

    def full(self: Path, *args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, method, full)
    with pytest.raises(OutputError, match="router: cannot be written: No space left on device"):
        estimates.save(router, {"new": True})
    assert bits(router) == before
    assert [file.name for file in router.parent.iterdir()] == ["router"]


def test_a_full_disk_on_the_command_line(
    sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    refused(walras("fit", sample, "-o", tmp_path / "r"), OUTPUT, tmp_path / "r", "No space left on device")
    assert not list(tmp_path.iterdir())


def test_leftovers_of_a_kill_do_not_matter(sample: Path, router: Path) -> None:
    """Killed while writing, there is a hidden half: the old router is read, and the next fit clears up."""
    half = router.with_name(f".{router.name}.new")
    half.mkdir()
    (half / "arrays.npz").write_bytes(b"half")
    assert routed(router).code == 0
    assert walras("fit", sample, "-o", router).code == 0
    assert [file.name for file in router.parent.iterdir()] == ["router"]


def test_the_library_raises_what_the_command_line_tells(router: Path) -> None:
    with pytest.raises(OutputError, match="own"):
        artefact.save(Path(), {}, {})
    artefact.save(router, {"not": "estimates"}, {})
    with pytest.raises(RecordError, match="holds no estimates"):
        Estimates.load(router)
