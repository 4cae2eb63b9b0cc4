"""Tables of types, offerings and tiers: what is read, and that a fault names its file, its row and its column."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from walras.demand.menu import design
from walras.demand.offerings import Quadratic
from walras.errors import RecordError
from walras.estimate.type_laws import Uniform
from walras.records.menus import (
    ChoiceTable,
    LawTable,
    MenuTable,
    OfferingTable,
    RangeTable,
    SampleTable,
    TypeTable,
    read_menu,
    read_offerings,
    read_types,
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("menus") / "table.csv"


def types(path: Path, text: str) -> TypeTable:
    path.write_text(text)
    return read_types(path)


def offerings(path: Path, text: str) -> OfferingTable:
    path.write_text(text)
    return read_offerings(path)


def menu(path: Path, text: str) -> MenuTable:
    path.write_text(text)
    return read_menu(path)


# --- types ------------------------------------------------------------------------------------------------------------


def test_a_law(path: Path) -> None:
    found = types(path, "type,probability\n0,0.25\n\n2.5,0.75\n")
    assert isinstance(found, LawTable)
    assert found.value.tolist() == [0, 2.5]
    assert found.probability.tolist() == [0.25, 0.75]
    assert found.latency_price is None


def test_a_law_of_pairs(path: Path) -> None:
    found = types(path, "V, lambda ,P\n1,0,0.5\n1,0.01,0.25\n2,0,0.25\n")
    assert isinstance(found, LawTable)
    assert found.latency_price is not None
    assert found.value.tolist() == [1, 1, 2]
    assert found.latency_price.tolist() == [0, 0.01, 0]


def test_rounded_probabilities_are_made_to_sum_to_one(path: Path) -> None:
    found = types(path, "type,probability\n1,0.3333333\n2,0.3333333\n3,0.3333333\n")
    assert isinstance(found, LawTable)
    assert found.probability.sum() == pytest.approx(1, abs=1e-15)


def test_a_sample_is_in_any_order(path: Path) -> None:
    path.write_bytes(b"\xef\xbb\xbf Willingness_To_Pay ,Team\r\n3, acme\r\n1e-1,\r\n3,acme\r\n")
    found = read_types(path)
    assert isinstance(found, SampleTable)
    assert found.value.tolist() == [3, 0.1, 3]
    assert found.tenant == ("acme", "", "acme")


def test_what_choices_revealed(path: Path) -> None:
    found = types(path, "type_from,type_to\n0,1\n1,1\n2,\n3,inf\n")
    assert isinstance(found, RangeTable)
    assert found.low.tolist() == [0, 1, 2, 3]
    assert found.high.tolist() == [1, 1, math.inf, math.inf]
    assert found.tenant is None


def test_choices(path: Path) -> None:
    assert types(path, 'tier\npro\n""\nbasic\n') == ChoiceTable(("pro", "", "basic"), None)
    assert types(path, "tenant,tier\na,pro\nb,\n") == ChoiceTable(("pro", ""), ("a", "b"))


@pytest.mark.parametrize(
    ("text", "row", "column", "problem"),
    [
        ("", None, None, "an empty support: no types"),
        ("type,probability\n", None, None, "an empty support: no types"),
        ("type,probability\n1,0.5\n2,0.4\n", 2, "probability", "probabilities sum to 0.9, not to 1"),
        ("type,probability\n1,0.5\n2,0.6\n3,0.5\n", 2, "probability", "probabilities sum to 1.6, not to 1"),
        (
            "type,probability\n1,0.5\n2,0.500002\n",
            2,
            "probability",
            "probabilities sum to 1.000002, not to 1",
        ),
        ("type,probability\n1,1\n2,0\n", 2, "probability", "is 0, and must be greater"),
        ("type,probability\n1,1.5\n2,-0.5\n", 2, "probability", "is -0.5, expected a number from 0 to 1e+12"),
        ("type,probability\n1,0.5\n1,0.5\n", 2, "type", "type 1 comes after 1"),
        ("type,probability\n1,0.2\n3,0.3\n2,0.5\n", 3, "type", "type 2 comes after 3"),
        (
            "v,lambda,p\n1,0.2,0.5\n1,0.1,0.5\n",
            2,
            "type",
            "(type, latency_price) (1, 0.1) comes after (1, 0.2)",
        ),
        ("v,lambda,p\n1,0.2,0.5\n1,0.2,0.5\n", 2, "type", "(1, 0.2) comes after (1, 0.2)"),
        ("v,lambda,p\n1,-1,1\n", 1, "latency_price", "is -1, expected a number from 0 to 1e+12"),
        ("type\n1\nnan\n", 2, "type", "is nan, expected a number from 0 to 1e+12"),
        ("type\n1\n1e999\n", 2, "type", "is inf, expected a number from 0 to 1e+12"),
        ("type\n1\n1e13\n", 2, "type", "is 1e+13, expected a number from 0 to 1e+12"),
        ("type;probability\n1;1\n", None, None, "has no commas between its columns"),
        ("type\n$1\n", 1, "type", "is '$1', expected a number"),
        ("type,tenant\n1,a\n,b\n", 2, "type", "is missing (every row needs one)"),
        ("type\n1\n\n2\n", 2, None, "is a blank line"),
        ("tier\npro\n\n", 2, None, 'is a blank line (drop it; an empty cell that stands alone is "")'),
        ("type_from,type_to\n0,1\n2,1\n", 2, "type_to", "types out of order: from 2 to 1"),
        ("type_from,type_to\n,1\n", 1, "type_from", "is missing"),
        ("type_from,type_to\n1,nan\n", 1, "type_to", "is nan"),
        ("type,probablity\n1,1\n", None, "probablity", "is not known (did you mean 'probability'?)"),
        ("type,V\n1,1\n", None, "V", "says the same as 'type' (keep one of them)"),
        ("type,type\n1,1\n", None, "type", "is there twice"),
        ("type,latency_price\n1,1\n", None, None, "not a table of types: type, latency_price"),
        ("type,probability,tenant\n1,1,a\n", None, None, "not a table of types: type, probability, tenant"),
        ("type,tier\n1,a\n", None, None, "not a table of types: type, tier"),
        ("type,probability\n1,0.5,2\n", 1, None, "has 3 cells and the header 2"),
        ("type,probability\n1,0.5\n2\n", 2, None, "has 1 cells and the header 2"),
        ('type\n"1\n', 1, None, "is not CSV: unexpected end of data"),
    ],
)
def test_types_that_cannot_be(
    path: Path, text: str, row: int | None, column: str | None, problem: str
) -> None:
    with pytest.raises(RecordError) as caught:
        types(path, text)
    assert (caught.value.path, caught.value.row, caught.value.field) == (path, row, column)
    assert problem in str(caught.value)
    assert caught.value.hint


def test_files_that_cannot_be_read(path: Path, tmp_path: Path) -> None:
    for read in (read_types, read_offerings, read_menu):
        with pytest.raises(RecordError, match=r"none.csv: cannot be read: No such file"):
            read(tmp_path / "none.csv")
        path.write_bytes(b"type\n\xff\n")
        with pytest.raises(RecordError, match="is not UTF-8 text"):
            read(path)


# --- offerings --------------------------------------------------------------------------------------------------------


def test_offerings(path: Path) -> None:
    found = offerings(
        path, "Model,quality,USD,Latency_s,note,kv_block_s\nnano,0.3,0,2,old,10\nlarge,1,0.5,9,,40.5\n"
    )
    assert found.name == ("nano", "large")
    assert found.quality.tolist() == [0.3, 1]
    assert found.cost.tolist() == [0, 0.5]
    assert found.seconds.tolist() == [2, 9]
    assert found.risk.tolist() == [0, 0]
    assert list(found.amounts) == ["kv_block_s"]
    assert found.amounts["kv_block_s"].tolist() == [10, 40.5]


def test_offerings_without_names_or_more_than_needed(path: Path) -> None:
    found = offerings(path, "quality,cost\n0.5,2\n0.4,3\n")  # the second is worse in both: no error here
    assert found.name == ("offering 1", "offering 2")
    assert found.amounts == {}


@pytest.mark.parametrize(
    ("text", "row", "column", "problem"),
    [
        ("", None, None, "has no offerings"),
        ("quality,cost\n", None, None, "has no offerings (a header, then one row for each of the offerings)"),
        ("quality,price\n0.5,1\n", None, "cost", "is missing"),
        ("qualty,cost\n0.5,1\n", None, "quality", "is missing (did you mean 'qualty'?)"),
        ("quality,cost\n0.5,1\n1.2,1\n", 2, "quality", "is 1.2, expected a number from 0 to 1"),
        ("quality,cost\n-0.1,1\n", 1, "quality", "is -0.1, expected a number from 0 to 1"),
        ("quality,cost\n0,1\n0,2\n", None, "quality", "is 0 throughout"),
        ("quality,cost\nnan,1\n", 1, "quality", "is nan, expected a number from 0 to 1"),
        ("quality,cost\n0.5,-1\n", 1, "cost", "is -1, expected a number from 0 to 1e+12"),
        ("quality,cost\n0.5,inf\n", 1, "cost", "is inf, expected a number from 0 to 1e+12"),
        ("quality,cost\n0.5,\n", 1, "cost", "is missing"),
        (
            "name,quality,cost\na,0.5,1\nb,0.5,1\na,0.5,1\n",
            3,
            "name",
            "'a' is also row 1 (give each its own)",
        ),
        ("name,quality,cost\na,0.5,1\n ,0.5,1\n", 2, "name", "is missing (every offering needs one)"),
        ("quality,cost,gpu_s\n0.5,1,2\n0.5,1,x\n", 2, "gpu_s", "is 'x', expected a number"),
        ("quality,cost,gpu_s\n0.5,1,2\n0.5,1,\n", 2, "gpu_s", "is missing"),
        ("quality,cost,gpu_s\n0.5,1,-2\n", 1, "gpu_s", "is -2"),
        ("quality,cost,latency_s,seconds\n0.5,1,1,1\n", None, "seconds", "says the same as 'latency_s'"),
    ],
)
def test_offerings_that_cannot_be(
    path: Path, text: str, row: int | None, column: str | None, problem: str
) -> None:
    with pytest.raises(RecordError) as caught:
        offerings(path, text)
    assert (caught.value.path, caught.value.row, caught.value.field) == (path, row, column)
    assert problem in str(caught.value)
    assert caught.value.hint


# --- menus ------------------------------------------------------------------------------------------------------------


def test_a_menu(path: Path) -> None:
    found = menu(
        path,
        "tier,quality,price,type_from,type_to,cost_usd,latency_s,colour\nlow,0.5,1,2,3,,4,red\nhigh,0.9,2,3,,1.5,4,\n",
    )
    assert found.name == ("low", "high")
    assert (found.quality.tolist(), found.price.tolist()) == ([0.5, 0.9], [1, 2])
    assert found.type_from is not None
    assert found.type_to is not None
    assert (found.type_from.tolist(), found.type_to.tolist()) == ([2, 3], [3, math.inf])
    assert found.seconds.tolist() == [4, 4]
    assert found.latency_price is None
    np.testing.assert_array_equal(found.cost, [math.nan, 1.5])


def test_a_price_list(path: Path) -> None:
    found = menu(path, "Quality,Price_USD\n0.9,2\n0.5,1\n")
    assert found.name == ("tier 1", "tier 2")
    assert found.type_from is None
    assert found.type_to is None
    assert np.isnan(found.cost).all()
    assert found.seconds.tolist() == [0, 0]


def test_a_type_for_each_tier(path: Path) -> None:
    found = menu(path, "quality,price,v,lambda,seconds\n0.5,1,2,0,9\n0.5,1.5,2,1,1\n0.9,3,4,1,1\n")
    assert found.type_from is not None
    assert found.type_to is not None
    assert found.latency_price is not None
    assert found.type_from.tolist() == found.type_to.tolist() == [2, 2, 4]
    assert found.latency_price.tolist() == [0, 1, 1]


@given(st.integers(1, 4))
def test_a_designed_menu_comes_back(tmp_path_factory: pytest.TempPathFactory, k: int) -> None:
    made = design(Uniform(0, 3), Quadratic(), tiers=k)
    names = ("name", "quality", "price", "type_from", "type_to")
    tiers = [{name: getattr(tier, name) for name in names} for tier in made.tiers]
    said = {"types": made.law.spec, "quality_cost": "quadratic", "tiers": tiers, "certificate": {}}
    path = tmp_path_factory.mktemp("made") / "menu.json"
    found = menu(path, json.dumps(said))
    assert (found.types, found.quality_cost) == ("uniform:0:3", "quadratic")
    assert found.name == tuple(tier.name for tier in made.tiers)
    for name in names[1:]:
        assert getattr(found, name).tolist() == [getattr(tier, name) for tier in made.tiers]


def test_json_may_be_a_list_and_null_is_unbounded(path: Path) -> None:
    tiers = [
        {"name": "a", "quality": 0.5, "price": 1, "type_from": 1, "type_to": 2, "cost": None},
        {"name": "b", "quality": 0.75, "price": 2, "type_from": 2, "type_to": None, "cost_usd": 0.5},
    ]
    found = menu(path, "\n " + json.dumps(tiers))
    assert found.type_to is not None
    assert found.type_to.tolist() == [2, math.inf]
    assert (found.types, found.quality_cost) == (None, None)
    np.testing.assert_array_equal(found.cost, [math.nan, 0.5])


def test_what_is_null_throughout_is_not_said(path: Path) -> None:
    tier = {"name": "a", "quality": 0.5, "price": 1, "type_from": 1, "type_to": None, "latency_price": None}
    found = menu(path, json.dumps([tier]))
    assert found.type_to is not None
    assert found.type_to.tolist() == [math.inf]
    assert found.latency_price is None
    assert menu(path, json.dumps([tier | {"type_from": None}])).type_from is None


def test_spans_of_types_on_a_grid_overlap_and_tell_nothing(path: Path) -> None:
    tiers = [
        {"quality": 0.5, "price": 1, "seconds": 9, "type_from": 1, "type_to": 3, "latency_price": [0, 0.1]},
        {"quality": 0.75, "price": 2, "seconds": 9, "type_from": 2, "type_to": 4, "latency_price": [0, 0.2]},
    ]
    found = menu(path, json.dumps(tiers))
    assert (found.type_from, found.type_to, found.latency_price) == (None, None, None)
    tiers[1]["latency_price"] = 0.2
    with pytest.raises(
        RecordError, match=r"row 1, column 'latency_price': tier 'tier 1': is \[0, 0.1\], expected"
    ):
        menu(path, json.dumps(tiers))


@pytest.mark.parametrize(
    ("text", "row", "column", "problem"),
    [
        ("", None, None, "has no tiers"),
        ("name,quality,price\n", None, None, "has no tiers"),
        ("[]", None, None, "has no tiers"),
        ('{"tires": []}', None, None, "has no tiers"),
        ('{"tiers": [', None, None, "is not JSON: "),
        ("[" * 100_000, None, None, "is not JSON: "),
        ("[1]", 1, None, "is 1, expected an object"),
        ('[{"quality": 0.5, "price": 1, "price_usd": 1}]', 1, "price_usd", "names a thing twice (keep one of them)"),
        ('{"types": 3, "tiers": [{"quality": 0.5, "price": 1}]}', None, "types", "is 3, expected text"),
        ('[{"quality": 0.5, "price": 1, "price": 2}]', None, "price", "is there twice in an object"),
        ('{"lambda0": -1, "tiers": [{"quality": 0.5, "price": 1}]}', 1, "lambda0", "is -1, expected a number from 0 to 1e+12"),
        ('[{"name": "x", "quality": 0.5}]', None, "price", "is missing"),
        ('[{"quality": 0.5, "price": true}]', 1, "price", "tier 'tier 1': is True, expected a number"),
        ('[{"quality": 0.5, "price": 1}, {"quality": 0.6}]', 2, "price", "tier 'tier 2': is missing"),
        ('[{"quality": 1' + "0" * 400 + ', "price": 1}]', 1, "quality", "tier 'tier 1': is inf"),
        ("name,quality\na,1\n", None, "price", "is missing"),
        ("name,quality,price\na,0.5,1\nb,0.6,-2\n", 2, "price", "tier 'b': is -2, expected a number from 0 to 1e+12"),
        ("name,quality,price\na,1.5,1\n", 1, "quality", "tier 'a': is 1.5, expected a number from 0 to 1"),
        ("name,quality,price\na,nan,1\n", 1, "quality", "tier 'a': is nan, expected a number from 0 to 1"),
        ("name,quality,price\na,,1\n", 1, "quality", "tier 'a': is missing"),
        ("name,quality,price\na,0.5,1\na,0.6,2\n", 2, "name", "'a' is also row 1"),
        (
            "name,quality,price\na,0.5,2\nb,0.6,1\n", 1, None,
            "tier 'a': dominated by 'b' (row 2): quality 0.5 and 0.6, price 2 and 1 "
            "(nobody would take it; drop it, or make it better or cheaper)",
        ),
        ("name,quality,price\na,0.5,1\nb,0.5,2\n", 2, None, "tier 'b': dominated by 'a' (row 1): quality 0.5 and 0.5"),
        ("name,quality,price,seconds\na,0.5,1,3\nb,0.5,1,2\n", 1, None, "dominated by 'b' (row 2): quality 0.5 and 0.5, price 1 and 1, seconds 3 and 2"),
        ("name,quality,price,type_from,type_to\na,0.5,1,2,1\n", 1, "type_to", "tier 'a': types out of order: from 2 to 1"),
        (
            "name,quality,price,type_from,type_to\nbest,0.9,3,1,2\nplain,0.5,1,3,4\n", 1, "type_from",
            "tier 'best': types out of order: 1 to 2, but tier 'plain' (row 2), of no higher quality, has 3 to 4",
        ),
        ("name,quality,price,type_from,type_to\na,0.5,1,1,3\nb,0.9,2,2,4\n", 2, "type_from", "tier 'b': types out of order: 2 to 4, but tier 'a' (row 1)"),
        ("quality,price,type\n0.5,1,2\n0.9,2,1\n", 2, "type_from", "tier 'tier 2': types out of order: 1 to 1, but tier 'tier 1' (row 1), of no higher quality, has 2 to 2"),
        ("quality,price,type_from,type_to\n0.5,1,,2\n0.6,2,2,\n", 1, "type_from", "tier 'tier 1': is missing"),
        ("quality,price,type_from\n0.5,1,2\n", None, None, "has type_from (give type, or type_from and type_to"),
        ("quality,price,type,type_to\n0.5,1,2,2\n", None, None, "has type and type_to"),
        ("quality,price,latency_price\n0.5,1,2\n", None, "latency_price", "says whom a tier is meant for, but there is no type"),
    ],
)  # fmt: skip
def test_menus_that_cannot_be(
    path: Path, text: str, row: int | None, column: str | None, problem: str
) -> None:
    with pytest.raises(RecordError) as caught:
        menu(path, text)
    assert (caught.value.path, caught.value.row, caught.value.field) == (path, row, column)
    assert problem in str(caught.value)
    assert caught.value.hint


def test_only_a_quadratic_technology_has_qualities_above_one(path: Path) -> None:
    tier = '{"quality": 1.5, "price": 1}]}'
    assert menu(path, '{"quality_cost": "quadratic", "tiers": [' + tier).quality.tolist() == [1.5]
    with pytest.raises(RecordError, match=r"tier 'tier 1': is 1.5, expected a number from 0 to 1"):
        menu(path, '{"quality_cost": "models.csv", "tiers": [' + tier)
    with pytest.raises(RecordError, match=r"tier 'tier 1': is inf, expected a number from 0 to 1e\+12"):
        menu(path, '{"quality_cost": "quadratic", "tiers": [{"quality": Infinity, "price": 1}]}')


def test_identical_tiers_and_tiers_that_differ_both_ways_are_not_dominated(path: Path) -> None:
    assert menu(path, "quality,price\n0.5,1\n0.5,1\n").name == ("tier 1", "tier 2")
    assert menu(path, "quality,price,seconds\n0.5,1,1\n0.6,0.9,2\n").name == ("tier 1", "tier 2")


@given(st.binary(max_size=80) | st.text("type,probability\n\"{}[]:01.'-", max_size=80).map(str.encode))
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_bytes(data)
    for read in (read_types, read_offerings, read_menu):
        with contextlib.suppress(RecordError):
            read(path)
