"""Token prices: dated, by any usual name, and never guessed."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from walras.errors import QuantityError, SettingsError
from walras.estimate.price_table import PriceTable, load_price_table

TABLE = load_price_table()
MODELS = sorted(TABLE.prices)
TODAY = dt.date(2026, 1, 1)
counts = st.integers(0, 10**7).map(float)
parts = st.floats(0, 1)


def usd(
    model: str, on: dt.date, sent: float, cached: float = 0, given_: float = 0, hidden: float = 0
) -> float:
    return float(
        TABLE.usd(
            model,
            on,
            input_tokens=sent,
            cached_input_tokens=cached,
            output_tokens=given_,
            reasoning_tokens=hidden,
        )
    )


# --- goldens: list prices with their source and date ------------------------------------------------------------


def test_bills_at_list_price() -> None:
    # OpenAI DevDay, 6 November 2023: GPT-4 Turbo at 10 and 30 USD per million tokens.
    assert usd("gpt-4-1106-preview", TODAY, 1000, 0, 500) == pytest.approx(0.010 + 0.015)
    # The same day: gpt-3.5-turbo-1106 at 1 and 2.
    assert usd("gpt-3.5-turbo-1106", TODAY, 1000, 0, 500) == pytest.approx(0.001 + 0.001)
    # OpenAI, 7 August 2025: GPT-5 at 1.25, 0.125 cached and 10; hidden reasoning is billed as output.
    assert usd("gpt-5", TODAY, 1e6, 8e5, 1e5, 9e4) == pytest.approx(0.25 + 0.1 + 1.0)


def test_a_price_changes_on_its_day() -> None:
    # OpenAI cut o3 from 10 / 40 to 2 / 8 on 10 June 2025.
    before, after = dt.date(2025, 6, 9), dt.date(2025, 6, 10)
    assert usd("o3", before, 1e6, 0, 1e6) == pytest.approx(50)
    assert usd("o3", after, 1e6, 0, 1e6) == pytest.approx(10)
    # Prompt caching halved cached input of gpt-4o-mini from 1 October 2024; before, it cost what input costs.
    assert usd("gpt-4o-mini", dt.date(2024, 9, 30), 1e6, 1e6) == pytest.approx(0.15)
    assert usd("gpt-4o-mini", dt.date(2024, 10, 1), 1e6, 1e6) == pytest.approx(0.075)


def test_writing_to_a_cache_costs_more_than_sending() -> None:
    # Anthropic pricing page: Claude Sonnet 4.5, 3 USD input, 3.75 five-minute write, 0.30 read.
    rates = TABLE.rates(["claude-sonnet-4-5"], TODAY)
    assert_allclose(rates.usd(input_tokens=1e6, cache_write_tokens=1e6), [3.75])
    assert_allclose(
        rates.usd(input_tokens=1e6, cached_input_tokens=9e5, cache_write_tokens=1e5), [0.27 + 0.375]
    )


# --- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("gpt-5@high", "gpt-5"),
        ("openai/gpt-5", "gpt-5"),
        ("OpenAI/GPT-5@minimal", "gpt-5"),
        ("gpt-5-2025-08-07", "gpt-5"),
        ("anthropic/claude-sonnet-4-5", "claude-sonnet-4-5-20250929"),
    ],
)
def test_usual_spellings(name: str, model: str) -> None:
    assert TABLE.price(name, TODAY).model == model


def test_another_host_is_another_price() -> None:
    with pytest.raises(SettingsError, match="price table of your own"):
        TABLE.price("azure/gpt-5", TODAY)


def test_unknown_model_says_what_is_near() -> None:
    with pytest.raises(SettingsError, match="did you mean 'gpt-5-mini'"):
        TABLE.price("gpt5-mini", TODAY)


def test_no_price_before_the_first() -> None:
    with pytest.raises(SettingsError, match="no price on 2025-08-06; its first is from 2025-08-07"):
        TABLE.price("gpt-5", dt.date(2025, 8, 6))


# --- what is shipped ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_every_shipped_entry_is_sane(model: str) -> None:
    for price in TABLE.prices[model]:
        assert 0 < price.input <= price.output <= 100
        assert 0.05 * price.input <= price.cached_input <= price.input <= price.cache_write <= 2 * price.input
        assert price.reasoning == price.output
        assert price.source.split()[0].rstrip(",:") in {"OpenAI", "Anthropic", "Google", "Mistral"}
        assert price.valid_from.year >= 2023


# --- laws -----------------------------------------------------------------------------------------------------------


@given(model=st.sampled_from(MODELS), sent=counts, cached=parts, given_=counts, hidden=parts, more=counts)
def test_more_tokens_never_cost_less_and_cached_ones_never_more(
    model: str, sent: float, cached: float, given_: float, hidden: float, more: float
) -> None:
    bill = usd(model, TODAY, sent, cached * sent, given_, hidden * given_)
    slack = 1e-12 * (1 + bill)
    assert usd(model, TODAY, sent + more, cached * sent, given_, hidden * given_) >= bill - slack
    assert usd(model, TODAY, sent, cached * sent, given_ + more, hidden * given_) >= bill - slack
    assert usd(model, TODAY, sent, sent, given_, hidden * given_) <= bill + slack
    assert usd(model, TODAY, sent, 0, given_, hidden * given_) >= bill - slack


@given(factor=st.floats(0.01, 100), sent=counts, cached=parts, given_=counts, hidden=parts)
def test_a_bill_scales_with_the_price(
    tmp_path_factory: pytest.TempPathFactory,
    factor: float,
    sent: float,
    cached: float,
    given_: float,
    hidden: float,
) -> None:
    path = tmp_path_factory.mktemp("prices") / "p.toml"

    def table(k: float) -> PriceTable:
        path.write_text(
            f"[m]\nprices = [{{valid_from = 2025-01-01, source = 'x', input = {3 * k!r}, cached_input = {k!r}, "
            f"output = {9 * k!r}, reasoning = {5 * k!r}}}]\n"
        )
        return load_price_table(path)

    tokens = {
        "input_tokens": sent,
        "cached_input_tokens": cached * sent,
        "output_tokens": given_,
        "reasoning_tokens": hidden * given_,
    }
    one, many = (table(k).usd("m", TODAY, **tokens) for k in (1.0, factor))
    assert_allclose(many, factor * one, rtol=1e-9)
    by_hand = 3 * sent * (1 - cached) + cached * sent + given_ * (9 * (1 - hidden) + 5 * hidden)
    assert_allclose(one, by_hand / 1e6, rtol=1e-9, atol=1e-12)


def test_rates_are_the_same_prices_side_by_side() -> None:
    rng = np.random.default_rng(0)
    sent, given_ = rng.integers(0, 10**5, (2, 7, 1)).astype(float)
    bill = TABLE.rates(MODELS, TODAY).usd(
        input_tokens=sent, cached_input_tokens=sent / 2, output_tokens=given_
    )
    for column, model in enumerate(MODELS):
        one = TABLE.usd(model, TODAY, input_tokens=sent, cached_input_tokens=sent / 2, output_tokens=given_)
        assert_allclose(bill[:, [column]], one)


def test_unknown_tokens_make_an_unknown_bill() -> None:
    bill = TABLE.usd("gpt-5", TODAY, input_tokens=np.array([10.0, np.nan]), output_tokens=[5.0, 5.0])
    assert np.isfinite(bill[0])
    assert np.isnan(bill[1])


@pytest.mark.parametrize(
    ("tokens", "word"),
    [
        ({"input_tokens": 10, "cached_input_tokens": 11}, "part of the input"),
        ({"input_tokens": 10, "output_tokens": 5, "reasoning_tokens": 6}, "part of the output"),
        ({"input_tokens": -1.0}, "part of the input"),
        ({"input_tokens": 10, "cached_input_tokens": -1}, "cached tokens must be ≥ 0"),
    ],
)
def test_impossible_tokens(tokens: dict[str, float], word: str) -> None:
    with pytest.raises(QuantityError, match=word):
        TABLE.usd("gpt-5", TODAY, **tokens)


# --- a table of one's own ---------------------------------------------------------------------------------------------

PRICE = "{valid_from = 2025-01-01, source = 'my bill', input = 1, output = 2}"


def test_own_table_replaces_the_shipped_one(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f"[llama]\nprovider = 'me'\naliases = ['l']\nprices = [{PRICE}]\n")
    mine = load_price_table(path)
    assert mine.price("me/l@low", TODAY).output == 2
    with pytest.raises(SettingsError):
        mine.price("gpt-5", TODAY)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "[m]\nprices = [{valid_from = 2025-01-01, source = 'x', input = -1, output = 2}]",
            "m.prices[0].input: is -1",
        ),
        ("[m]\nprices = [{source = 'x', input = 1, output = 2}]", "m.prices[0].valid_from: is missing"),
        (
            "[m]\nprices = [{valid_from = 2025-01-01, input = 1, output = 2}]",
            "m.prices[0].source: is missing",
        ),
        ("[m]\nprices = [{valid_from = '2025', source = 'x', input = 1, output = 2}]", "must be a date"),
        ("[m]\nprices = [{valid_from = 2025-01-01, source = 'x', input = nan, output = 2}]", "is nan"),
        ("[m]\nprices = [{valid_from = 2025-01-01, source = 'x', input = true, output = 2}]", "is True"),
        (
            "[m]\nprices = [{valid_from = 2025-01-01, source = 'x', inputs = 1, output = 2}]",
            "m.prices[0].inputs: unknown key (did you mean 'input'?)",
        ),
        (f"[m]\nprice = [{PRICE}]", "m.price: unknown key (did you mean 'prices'?)"),
        (f"[m]\nprices = [{PRICE}, {PRICE}]", "two prices from 2025-01-01"),
        (f"[m]\nprices = [{PRICE}]\n[n]\naliases = ['M']\nprices = [{PRICE}]", "'m' already means m"),
        ("[m]\nprices = []", "at least one dated price"),
        ("m = 3", "must be a table"),
        ("[m]\nprices = [3]", "m.prices[0]: must be a table"),
        (f"[m]\naliases = 'x'\nprices = [{PRICE}]", "m.aliases: must be a list"),
        (f"[m]\nprovider = 3\nprices = [{PRICE}]", "m.provider: must be a name"),
        ("[m\n", "is not TOML"),
    ],
)
def test_a_bad_table_says_where(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        load_price_table(path)
    assert words in str(caught.value)
    assert "bad.toml" in str(caught.value)


def test_a_missing_table_is_a_setting_that_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be read"):
        load_price_table(tmp_path / "none.toml")
