"""`walras fit` and `walras route` as people run them: what goes in, what comes out, and what is refused."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from logs import HEADER, PAIR, Ran, walras, walras_script, write_csv, write_jsonl
from routers import INFEASIBLE, RECORDS, SETTINGS, asks, fitted, refused, settings, spend, sure_log, uses
from walras.simulate import write_sample

TASKS = 200


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sample") / "sample.parquet"
    write_sample(path, TASKS, seed=0)
    return path


@pytest.fixture(scope="module")
def router(sample: Path) -> Path:
    return fitted(sample)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models that the shipped price table knows."""
    tokens = {"input_tokens": 8000, "output_tokens": 500, "latency_s": 2.0}
    models = {
        "gpt-4o": {"quality": 0.9, "cost_usd": 0.025, **tokens},
        "gpt-4o-mini": {"quality": 0.8, "cost_usd": 0.0015, **tokens},
    }
    return fitted(sure_log(tmp_path_factory.mktemp("chat") / "chat.jsonl", models))


def route(router: Path, *options: object) -> Ran:
    return walras("route", "--router", router, *options)


def ask(router: Path, *options: object) -> Ran:
    return route(router, "--prompt", "Is 91 prime?", *options)


# --- what comes out ---------------------------------------------------------------------------------------------------


def test_one_request_as_data(router: Path) -> None:
    data = ask(router, "--value", 0.4, "--lambda0", 0.001, "--json").data
    (only,) = data["routes"]
    assert only["request_id"] == "prompt"
    assert (only["propensity"], only["expected_regret"], only["search"]) == (1.0, 0.0, None)
    best = max(only["uses"], key=lambda use: use["net_value"])
    assert only["model"] == best["model"]
    assert data["shares"][best["model"]] == 1.0
    for use in only["uses"]:
        assert use["value"] == pytest.approx(0.4 * use["quality"])
        assert use["compute"] == pytest.approx(use["usd"])
        assert use["latency"] == pytest.approx(0.001 * use["seconds"])
        net = use["value"] - use["compute"] - use["latency"] - use["risk"]
        assert use["net_value"] == pytest.approx(net)
        assert use["probability"] == (use is best)
        assert min(use["quality_error"], use["net_value_error"]) > 0


def test_one_request_on_a_screen(router: Path) -> None:
    ran = ask(router, "--value", 0.4)
    assert (ran.code, ran.err) == (0, "")
    for word in (
        "use",
        "quality",
        "V·ΔQ",
        "π·ΔC",
        "net value",
        "← chosen",
        "nano",
        "frontier",
        "Prices: money 1",
    ):
        assert word in ran.out
    assert "defer: the best use is worth" in ask(router, "--value", 0).out


def test_many_requests_on_a_screen(router: Path, tmp_path: Path) -> None:
    path = asks(tmp_path / "q.jsonl", [{"request_id": f"[b]q{k}[/b]"} for k in range(20)])
    ran = route(router, "--jsonl", path, "--value", 0.4)
    assert ran.code == 0
    assert "20 requests" in ran.out
    assert "[b]q0[/b]" in ran.out  # no markup is read in what users write
    assert "and 8 more" in ran.out
    assert "Shares" in ran.out


def test_every_request_of_a_file(router: Path, sample: Path, tmp_path: Path) -> None:
    """All the kinds of rows people send, each with what it is worth and where it is warm."""
    rows = [
        {"request_id": "a", "prompt": "Hello", "class": "chat", "tenant": "growth", "value_usd": 0.3},
        {"messages": [{"role": "user", "content": "Hello"}], "facts": {"language": "es"}},
        {"prompt": "", "value_usd": 0},
        {"prompt": "日本語 " * 5000, "class": "never seen", "embedding": [0.1, 0.2]},
    ]
    data = route(router, "--jsonl", write_jsonl(tmp_path / "q.jsonl", rows), "--value", 1, "--json").data
    assert [r["request_id"] for r in data["routes"]] == ["a", "2", "3", "4"]
    assert data["routes"][2]["model"] == "defer"
    assert all(use["value"] == 0 for use in data["routes"][2]["uses"])
    for use in data["routes"][0]["uses"]:
        assert use["value"] == pytest.approx(0.3 * use["quality"])
    assert sum(data["shares"].values()) == pytest.approx(1.0)


@pytest.mark.parametrize("prompt", ["", " ", "x" * 200_000, "\0", "é" * 5000, "-", "--help"])
def test_any_prompt_is_routed(router: Path, prompt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"from stdin")))
    data = route(router, f"--prompt={prompt}", "--value", 1, "--json").data
    assert np.isfinite([use["net_value"] for use in data["routes"][0]["uses"]]).all()


@pytest.mark.parametrize("sent", [b"", b"plain", b"\xff\xfe\x00binary\x80" * 100, bytes(range(256)) * 1000])
def test_standard_input_may_be_anything(router: Path, sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(sent)))
    assert route(router, "--prompt", "-", "--value", 1, "--json").data["routes"][0]["model"] != "defer"


def test_standard_input_is_the_prompt(router: Path) -> None:
    """In a process of its own, through a pipe."""
    text = "Translate: " + "palabra " * 3000
    piped = walras_script("route", "--router", router, "--prompt", "-", "--value", "1", "--json", input=text)
    assert piped.data == route(router, "--prompt", text, "--value", 1, "--json").data


# --- prices -----------------------------------------------------------------------------------------------------------


def test_prices_of_a_market_are_paid_live(router: Path, sample: Path, tmp_path: Path) -> None:
    """`walras prices --json` in one place, `walras route --prices` in another: the same vector decides."""
    ran = walras("prices", sample, "--budget-usd", 0.004, "--sla-s", 8, "--sla-quantile", 0.8, "--json")
    vector = ran.data["price_vector"]
    path = tmp_path / "prices.json"
    path.write_text(ran.out)
    data = ask(router, "--value", 0.2, "--class", "chat", "--prices", path, "--json").data
    assert data["price_vector"] == vector
    mu = {row["constraint"]["kind"]: row["multiplier"] for row in vector["discovered"]}
    assert mu["budget"] > 0.1
    for use in data["routes"][0]["uses"]:
        assert use["compute"] == pytest.approx((1 + mu["budget"]) * use["usd"])
        assert -0.2 * mu["quantile_sla"] <= use["latency"] + 1e-12
        assert use["latency"] <= 0.8 * mu["quantile_sla"] + 1e-12
    path.write_text(json.dumps(vector))
    assert ask(router, "--value", 0.2, "--class", "chat", "--prices", path, "--json").data == data
    dear = json.loads(json.dumps(vector))
    for row in dear["discovered"]:
        row["multiplier"] *= 1000
    path.write_text(json.dumps(dear))
    assert (
        ask(router, "--value", 0.2, "--class", "chat", "--prices", path, "--json").data["shares"]["frontier"]
        == 0
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"{", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[]", "not a price vector"),
        (b"{}", "not a price vector"),
        (b'{"price_vector": 3}', "not a price vector"),
        (
            b'{"discovered": [], "declared": [["usd", -1]], "numeraire": "usd", "unit": 1}',
            "must be finite and",
        ),
        (b'{"discovered": [{}], "declared": [], "numeraire": "usd", "unit": 1}', "not a price vector"),
    ],
)
def test_what_is_no_price_vector(router: Path, tmp_path: Path, text: bytes, says: str) -> None:
    path = tmp_path / "prices.json"
    path.write_bytes(text)
    refused(ask(router, "--value", 1, "--prices", path), SETTINGS, says)


def test_prices_that_are_no_file(router: Path, tmp_path: Path) -> None:
    refused(ask(router, "--value", 1, "--prices", tmp_path), SETTINGS, tmp_path, "cannot be read")
    refused(
        ask(router, "--value", 1, "--prices", tmp_path / "no"), SETTINGS, tmp_path / "no", "cannot be read"
    )


def test_a_budget_over_a_file_is_kept(router: Path, tmp_path: Path) -> None:
    path = asks(tmp_path / "q.jsonl", [{"class": "chat", "value_usd": 0.05 + 0.001 * k} for k in range(100)])
    free = route(router, "--jsonl", path, "--json").data
    last = -1.0
    for share in (0.9, 0.5, 0.1):
        bound = share * spend(free)
        data = route(router, "--jsonl", path, "--budget-usd", bound, "--json").data
        (row,) = data["price_vector"]["discovered"]
        assert row["multiplier"] > last
        last = row["multiplier"]
        expected = [use["probability"] * use["usd"] for r in data["routes"] for use in r["uses"]]
        assert sum(expected) / 100 <= bound * (1 + 1e-6)
    assert "μ(budget" in route(router, "--jsonl", path, "--budget-usd", bound).out


def test_a_limit_that_cannot_be_met(router: Path) -> None:
    refused(
        ask(router, "--value", 1, "--budget-usd", 0, "--no-defer"),
        INFEASIBLE,
        "the least bound that would do",
    )


def test_settings_of_a_file_and_options_on_top(router: Path, tmp_path: Path) -> None:
    file = settings(
        tmp_path / "economy.toml",
        'value = 1\n[classes.chat]\nvalue = 2\nforbidden_models = ["frontier", "large"]\n[tenants.acme]\nvalue = 3\n',
    )
    for options, value in (((), 1), (("--class", "chat"), 2), (("--tenant", "acme"), 3), (("--value", 4), 4)):
        (only,) = ask(router, *file, *options, "--json").data["routes"]
        for use in only["uses"]:
            assert use["value"] == pytest.approx(value * use["quality"])
    (only,) = ask(router, *file, "--class", "chat", "--json").data["routes"]
    assert [uses(only)[m]["allowed"] for m in ("medium", "large", "frontier")] == [True, False, False]
    assert uses(only)["large"]["net_value"] is None
    assert "forbidden" in ask(router, *file, "--class", "chat").out


# --- warm caches, efforts, load ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [(), ("--list-prices",)])
def test_a_warm_cache_keeps_a_session(chat: Path, how: tuple[str, ...]) -> None:
    """At V = 0.18 gpt-4o falls short by 0.0055 USD; at 1.25 USD per million that is 4400 warm tokens."""
    options = ("--value", 0.18, "--class", "all", "--json", *how)
    for warm, model in (
        ((), "gpt-4o-mini"),
        (("--warm", "gpt-4o=4300"), "gpt-4o-mini"),
        (("--warm", "gpt-4o=4500"), "gpt-4o"),
    ):
        assert ask(chat, *options, *warm).data["routes"][0]["model"] == model


def test_a_price_table_of_ones_own(chat: Path, router: Path, tmp_path: Path) -> None:
    table = tmp_path / "prices.toml"
    row = '[[{}.prices]]\nvalid_from = 2020-01-01\ninput = 1.0\ncached_input = 0.0\noutput = 2.0\nsource = "ours"\n'
    table.write_text("".join(row.format(name) for name in ("gpt-4o", "gpt-4o-mini")))
    options = ("--value", 1, "--list-prices", "--price-table", table, "--json")
    for use in ask(chat, *options).data["routes"][0]["uses"]:
        assert use["usd"] == pytest.approx((8000 * 1.0 + 500 * 2.0) / 1e6)
    refused(ask(router, *options), SETTINGS, "no price of 'nano'", "price table of your own")
    table.write_text("nonsense = ")
    refused(ask(chat, *options), SETTINGS, table, "is not TOML")
    refused(ask(chat, "--value", 1, "--price-table", tmp_path / "no.toml"), SETTINGS, "cannot be read")


def test_load_is_counted_in_requests(router: Path) -> None:
    def seconds(*load: str) -> dict[str, float]:
        options = [part for item in load for part in ("--load", item)]
        (only,) = ask(router, "--value", 1, *options, "--json").data["routes"]
        return {name: use["seconds"] for name, use in uses(only).items()}

    calm, busy, queued = seconds("large=1"), seconds("large=30"), seconds("large=30:60", "nano=1")
    # The log does not say how many requests ran together, so only the queue is known to cost time.
    assert calm["large"] == busy["large"] < queued["large"] / 2
    assert calm["small"] == queued["small"]


# --- exploring --------------------------------------------------------------------------------------------------------


def test_exploring_is_logged_and_can_be_replayed(router: Path, tmp_path: Path) -> None:
    path = asks(tmp_path / "q.jsonl", [{"class": "chat", "value_usd": 0.1} for _ in range(300)])
    options = (
        "--jsonl",
        path,
        "--explore",
        "softmax:0.05",
        "--explore-cap",
        0.01,
        "--explore-floor",
        0.001,
        "--json",
    )
    data = route(router, *options).data
    assert data == route(router, *options, "--seed", 0).data
    for row in data["routes"]:
        chances = {name: use["probability"] for name, use in uses(row).items()}
        deferring = 1 - sum(chances.values())
        assert deferring >= 0.001 - 1e-9
        assert min(chances.values()) >= 0.001
        chosen = deferring if row["model"] == "defer" else chances[row["model"]]
        assert row["propensity"] == pytest.approx(chosen)
        assert row["expected_regret"] <= 0.01
    other = route(router, *options, "--seed", 1).data
    assert [r["model"] for r in other["routes"]] != [r["model"] for r in data["routes"]]
    assert [r["propensity"] for r in route(router, "--jsonl", path, "--json").data["routes"]] == [1.0] * 300
    assert "thompson" not in ask(router, "--value", 1, "--explore", "thompson").err


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        *(
            (name, "neither softmax:USD nor thompson")
            for name in ("softmax", "softmax:x", "thompson:1", "greedy", "")
        ),
        *((f"softmax:{t}", "the temperature must be > 0") for t in ("0", "-1", "nan")),
    ],
)
def test_policies_that_do_not_exist(router: Path, policy: str, says: str) -> None:
    refused(ask(router, "--value", 1, "--explore", policy), SETTINGS, says)


# --- search -----------------------------------------------------------------------------------------------------------


def test_search_is_planned_where_right_and_wrong_are_known(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    hard = rng.random(300)
    cheap, dear = hard < 0.6, hard < 0.9
    rows = [
        {"request_id": f"r{k}", "model": m, "quality": float(right[k]), "cost_usd": cost}
        for k in range(300)
        for m, right, cost in (("cheap", cheap, 0.01), ("dear", dear, 0.2))
    ]
    made = fitted(write_jsonl(tmp_path / "log.jsonl", rows))
    options = ("--value", 1, "--verifier-accuracy", 1, "--verifier-usd", 0.001)
    (only,) = ask(made, *options, "--json").data["routes"]
    found = only["search"]
    assert "try cheap" in found["plan"]
    assert found["one_shot"] < found["surplus"] <= found["bound"] + 1e-9
    # Who tries cheap, checks, and takes dear when it was wrong, is right as often as dear is and seldom pays for it.
    by_hand = dear.mean() - 0.01 - 0.001 - (1 - cheap.mean()) * 0.2
    assert found["surplus"] == pytest.approx(by_hand, abs=0.01)
    assert "Search" in ask(made, "--value", 1, "--verifier-accuracy", 0.9).out


def test_search_needs_outcomes_that_are_right_or_wrong(router: Path) -> None:
    refused(
        ask(router, "--value", 1, "--verifier-accuracy", 0.9), SETTINGS, "--verifier-accuracy", "not 0 or 1"
    )


# --- what is refused --------------------------------------------------------------------------------------------------


def test_one_way_of_asking(router: Path, tmp_path: Path) -> None:
    path = asks(tmp_path / "q.jsonl", [{}])
    refused(route(router, "--value", 1), SETTINGS, "--prompt or --jsonl", "one of the two")
    refused(ask(router, "--value", 1, "--jsonl", path), SETTINGS, "--prompt or --jsonl", "one of the two")
    for option in (("--class", "chat"), ("--tenant", "acme"), ("--warm", "nano=3")):
        refused(route(router, "--jsonl", path, "--value", 1, *option), SETTINGS, "belong to --prompt")


def test_a_request_without_a_value(router: Path, tmp_path: Path) -> None:
    refused(ask(router), SETTINGS, "'prompt' has no value", "--value")
    path = asks(tmp_path / "q.jsonl", [{"value_usd": 1}, {"request_id": "lost"}])
    refused(route(router, "--jsonl", path), SETTINGS, "'lost' has no value", "value_usd")


@pytest.mark.parametrize(
    ("option", "says"),
    [
        (("--warm", "nono=3"), "did you mean 'nano'"),
        (("--warm", "nano"), "not MODEL=TOKENS"),
        (("--warm", "nano=-1"), "not MODEL=TOKENS"),
        (("--warm", "nano=inf"), "not MODEL=TOKENS"),
        (("--warm", "=3"), "not MODEL=TOKENS"),
        (("--warm", "nano=3"), "no price of 'nano'"),
        (("--load", "nano"), "not MODEL=RUNNING"),
        (("--load", "nano=1:2:3"), "not MODEL=RUNNING"),
        (("--load", "nano=-1"), "not MODEL=RUNNING"),
        (("--load", "nano=1.5"), "not MODEL=RUNNING"),
        (("--load", "nono=1"), "did you mean 'nano'"),
        (("--load", "nano=0:5"), "none running"),
        (("--explore-floor", 0.5), "sums to more than 1"),
        (("--explore", "thompson", "--seed", 1 << 64), "the seed must be"),
        (("--numeraire", "compute"), "compute has no price"),
        (("--map", "promt=text"), "did you mean 'prompt'"),
    ],
)  # fmt: skip
def test_options_that_cannot_be(router: Path, option: tuple[object, ...], says: str) -> None:
    ran = ask(router, "--value", 1, *option)
    refused(ran, INFEASIBLE if "--numeraire" in option else SETTINGS, says)


def test_faults_of_a_file_name_line_and_key(router: Path, tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    for line, says in (
        ('{"prompt": 3}', "column 'prompt'"),
        ('{"prompt": "a", "value": 3}', "column 'value'"),
        ("nonsense", "is not JSON"),
        ('{"prompt": "a", "cached_tokens": {"nano": "x"}}', "column 'cached_tokens.nano'"),
    ):
        path.write_text(f'{{"prompt": "good"}}\n{line}\n')
        refused(route(router, "--jsonl", path, "--value", 1), RECORDS, path, "row 2", says)
    path.write_text('{"prompt": "a", "cached_tokens": {"nono": 3}}')
    refused(route(router, "--jsonl", path, "--value", 1), SETTINGS, "did you mean 'nano'")
    refused(route(router, "--jsonl", tmp_path / "no.jsonl", "--value", 1), RECORDS, "cannot be read")


def test_settings_that_name_what_the_router_does_not_know(router: Path, tmp_path: Path) -> None:
    for text, says in (
        ('[tenants.acme]\nforbidden_models = ["frontierr"]', "did you mean 'frontier'"),
        ('[resources.gpu]\ncolumn = "gpu_s"', "without 'gpu_s'"),
        ("rho_irr = 1", "irreversible_risk"),
    ):
        refused(ask(router, "--value", 1, *settings(tmp_path / "e.toml", text)), SETTINGS, says)


# --- fitting ----------------------------------------------------------------------------------------------------------


def test_fit_says_what_it_made(sample: Path, tmp_path: Path) -> None:
    ran = walras("fit", sample, "-o", tmp_path / "r")
    assert (ran.code, ran.out) == (0, "")
    assert ran.err == f"{tmp_path / 'r'}: a router over 5 models, learned from {TASKS} requests\n"


@pytest.mark.parametrize(
    ("body", "code", "says"),
    [
        ("r1,a,,1\nr1,b,1,1\n", RECORDS, "no outcome of a is known"),
        ("r1,a,1,\nr1,b,1,1\n", RECORDS, "nothing is known of how much 'a' uses"),
        ("r1,a,2,1\n", RECORDS, "row 1"),
        ("r1,a,1,-1\n", RECORDS, "row 1"),
        (PAIR + PAIR, RECORDS, "row 3"),
        ("", RECORDS, "has no records"),
    ],
)
def test_logs_nothing_can_be_learned_from(tmp_path: Path, body: str, code: int, says: str) -> None:
    ran = walras("fit", write_csv(tmp_path / "log.csv", body), "-o", tmp_path / "r")
    refused(ran, code, says)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("body", [PAIR, "r1,only,1,0\n", "r1,a,0,0\nr1,b,0,0\n", "r1,a,1,1\nr2,b,0,1\n"])
def test_the_smallest_logs_make_a_router(tmp_path: Path, body: str) -> None:
    made = fitted(write_csv(tmp_path / "log.csv", body))
    for use in ask(made, "--value", 10, "--json").data["routes"][0]["uses"]:
        assert 0 <= use["quality"] <= 1
        assert use["usd"] >= 0


def test_classes_and_facts_of_other_columns(tmp_path: Path) -> None:
    """Outcomes hang on `topic` and on `language`; neither is called what the schema calls it."""
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for k in range(600):
        topic, language = rng.choice(["sums", "poems"]), rng.choice(["es", "en"])
        for model, able in (("a", 0.9 if topic == "sums" else 0.3), ("b", 0.9 if language == "es" else 0.3)):
            rows.append(
                {
                    "request_id": f"r{k}", "model": model, "topic": topic, "language": language,
                    "quality": float(rng.random() < able), "cost_usd": 0.01,
                }
            )  # fmt: skip
    log = write_jsonl(tmp_path / "log.jsonl", rows)
    made = fitted(log, "--class-column", "topic", "--fact", "language")
    path = write_jsonl(
        tmp_path / "q.jsonl",
        [
            {"prompt": "", "class": topic, "facts": {"language": language}}
            for topic in ("sums", "poems")
            for language in ("es", "en")
        ],
    )
    got = route(made, "--jsonl", path, "--value", 1, "--json").data["routes"]
    found = np.array([[use["quality"] for use in r["uses"]] for r in got])
    np.testing.assert_allclose(found, [[0.9, 0.9], [0.9, 0.3], [0.3, 0.9], [0.3, 0.3]], atol=0.1)
    assert [r["model"] for r in got[1:3]] == ["a", "b"]
    refused(walras("fit", log, "-o", tmp_path / "x", "--fact", "langage"), RECORDS, "did you mean 'language'")
    refused(walras("fit", log, "-o", tmp_path / "x", "--fact", "quality"), RECORDS, "column of numbers")
    refused(
        walras("fit", log, "-o", tmp_path / "x", "--class-column", "topc"), RECORDS, "did you mean 'topic'"
    )


def test_resources_of_the_settings_are_learned(tmp_path: Path) -> None:
    log = sure_log(
        tmp_path / "log.jsonl",
        {"a": {"quality": 0.5, "cost_usd": 1, "gpu_s": 1}, "b": {"quality": 0.9, "cost_usd": 1, "gpu_s": 9}},
    )
    file = settings(tmp_path / "e.toml", '[resources.gpu]\ncolumn = "gpu_s"\nprice_usd = 1.0\n')
    made = fitted(log, *file)
    assert ask(made, "--value", 10, *file, "--json").data["routes"][0]["model"] == "a"
    assert ask(made, "--value", 100, *file, "--json").data["routes"][0]["model"] == "b"
    assert ask(made, "--value", 10, "--json").data["routes"][0]["model"] == "b"


def test_several_files_are_one_log(sample: Path, router: Path, tmp_path: Path) -> None:
    table = pq.read_table(sample)
    pq.write_table(table.slice(0, 333), tmp_path / "a.parquet")
    pq.write_table(table.slice(333), tmp_path / "b.parquet")
    assert walras("fit", tmp_path / "a.parquet", tmp_path / "b.parquet", "-o", tmp_path / "r").code == 0
    assert (tmp_path / "r" / "arrays.npz").read_bytes() == (router / "arrays.npz").read_bytes()


def test_prompts_are_not_in_the_router(tmp_path: Path) -> None:
    """It holds hashes and sums: a router may go where the log may not."""
    rows = [
        {"request_id": f"r{k}", "model": m, "quality": k % 2, "cost_usd": 1, "prompt": f"secretword{k} of the crown"}
        for k in range(60)
        for m in ("a", "b")
    ]  # fmt: skip
    made = fitted(write_jsonl(tmp_path / "log.jsonl", rows))
    for file in made.iterdir():
        assert b"secretword" not in file.read_bytes()
    assert HEADER not in (made / "router.json").read_text()
