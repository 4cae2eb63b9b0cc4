"""`walras replay` and `walras profiles`: the contract, every option, every source of requests, what is refused, what people see."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from playwright.sync_api import sync_playwright

from conftest import DataDir
from engines import flat_steps
from logs import walras
from test_gateway_page import CHROMIUM, QUIET
from test_html_report import HOSTILE, PLOTLY, Page
from walras.diagnosis import html, serving
from walras.diagnosis.serving import Engine, Latencies, Traffic, play
from walras.diagnosis.serving_report import seconds_text
from walras.engine.generated import Lengths
from walras.engine.profiles import load_profile, shipped
from walras.engine.replay import Replay
from walras.engine.requests import Requests
from walras.engine.settings import EngineSettings, Routing
from walras.engine.traces import read_trace
from walras.replay_options import PROFILE

HEAD = "arrival_s,input_tokens,output_tokens"
QUANTILES = {"mean", "p50", "p95", "p99", "max"}
N = 60


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """N requests that begin alike in threes, and have names."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("replay") / "trace.jsonl"
    rows = [
        {
            "request_id": f"r{k}",
            "arrival_s": round(k * 0.25, 6),
            "input_tokens": 1024 + int(rng.integers(0, 512)),
            "output_tokens": int(rng.integers(1, 40)),
            "hash_ids": [k // 3, 1000 + k],
        }
        for k in range(N)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def replay(*options: object) -> Any:
    """What --json says; nothing is priced unless asked."""
    asked = options if "--probes" in options else (*options, "--probes", 0)
    ran = walras("replay", *asked, "--json")
    assert (ran.code, ran.err) == (0, ""), ran.err
    return ran.data


def refused(code: int, *options: object) -> str:
    ran = walras("replay", *options)
    assert ran.code == code, ran.err
    assert "Traceback" not in ran.err
    assert ran.out == ""
    if code != 2:
        assert ran.err.startswith("walras: ")
        assert ran.err.count("\n") == 1, "one line"
    return ran.err


# --- the contract -------------------------------------------------------------------------------------------------------


def test_json_says_what_the_engine_did(trace: Path) -> None:
    """Another road to the same figures: the engine itself, its limits read from the profile by hand."""
    data = replay(trace, "--workers", 2, "--routing", "kv", "--probes", 4)
    profile, read = load_profile(PROFILE), read_trace(trace)
    limits = profile.limits
    settings = EngineSettings(
        kv_blocks=limits.kv_tokens // 16,
        prefix_tokens=512,
        max_batched_tokens=limits.step_tokens,
        max_sequences=limits.most_sequences,
        schedule_ahead=limits.steps_ahead == 1,
        workers=2,
    )
    steps = profile.steps(limits.step_tokens, limits.most_sequences)
    served = Replay(settings, steps, Routing.kv(16), read.requests).run().served()
    for key, column in (
        ("ttft_s", served.ttft_s),
        ("tpot_s", served.tpot_s[read.requests.output_tokens > 1]),
        ("queue_s", served.queue_s),
        ("latency_s", served.end_s - served.arrival_s),
    ):
        assert data[key].keys() == QUANTILES
        assert data[key]["mean"] == pytest.approx(column.mean())
        for name, share in (("p50", 50), ("p95", 95), ("p99", 99), ("max", 100)):
            assert data[key][name] == pytest.approx(np.percentile(column, share))
    assert data["simulated"] is True
    assert data["requests"] == N
    assert data["requests_per_cpu_s"] == pytest.approx(N / data["cpu_s"])
    hits = served.cached_tokens.sum() / read.requests.input_tokens.sum()
    assert data["kv_hit_ratio"] == pytest.approx(hits)
    assert hits > 0
    assert data["preemptions"] == served.preemptions.sum()
    through = data["throughput"]
    span = np.quantile(served.end_s, 0.9) - np.quantile(served.end_s, 0.1)
    assert through["completed_per_s"] == pytest.approx(0.8 * N / span)
    assert through["output_tokens_per_s"] == pytest.approx(
        read.requests.output_tokens.mean() * 0.8 * N / span
    )
    assert data["profile"]["name"] == PROFILE
    assert data["profile"]["error"] == dataclasses.asdict(profile.error)
    assert data["profile"]["source"] == profile.source
    for key in ("running", "waiting", "kv_use"):
        assert data[key].keys() == {"mean", "max"}


def test_prices_have_errors_and_a_unit(trace: Path) -> None:
    seconds = replay(trace, "--rate", 40, "--probes", 8, "--horizon", 5)["resource_prices"]
    names = ("prefill_token", "decode_token", "kv_block_s")
    assert seconds["unit"] == "s"
    assert seconds["standard_errors"].keys() == set(names)
    assert (seconds["probes"], seconds["horizon_s"]) == (8, 5)
    assert seconds["cost_per_s"].keys() == {"prefill", "decode", "kv"}
    assert seconds["cost_per_s"][seconds["short"]] == max(seconds["cost_per_s"].values()) > 0
    dollars = replay(trace, "--rate", 40, "--probes", 8, "--horizon", 5, "--lambda0", 0.002)[
        "resource_prices"
    ]
    assert dollars["unit"] == "usd"
    for name in names:  # the same futures: a second of delay is worth λ₀
        assert dollars[name] == pytest.approx(0.002 * seconds[name], abs=1e-15)


def test_settings_file_says_what_delay_costs(trace: Path, tmp_path: Path) -> None:
    economy = write(tmp_path, "economy.toml", "lambda0 = 0.5\n")
    assert replay(trace, "--settings", economy, "--probes", 2)["resource_prices"]["unit"] == "usd"


def test_no_probes_no_prices(trace: Path) -> None:
    assert replay(trace, "--probes", 0)["resource_prices"] is None
    assert "Which resource is short was not asked" in walras("replay", trace, "--probes", 0).out


def test_seed_decides_alone(trace: Path) -> None:
    def prices(seed: int) -> Any:
        return replay(trace, "--rate", 40, "--probes", 4, "--seed", seed)["resource_prices"]

    assert prices(1) == prices(1)
    assert prices(1) != prices(2)


# --- options of the engine ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--workers", 3), {"workers": 3}),
        (("--kv-blocks", 300), {"kv_blocks": 300}),
        (("--block-tokens", 64), {"block_tokens": 64, "kv_blocks": 655_360 // 64}),
        (("--max-batched-tokens", 700), {"max_batched_tokens": 700}),
        (("--max-sequences", 2), {"max_sequences": 2}),
        (("--no-chunked-prefill",), {"chunked_prefill": False}),
        (("--no-prefix-caching",), {"prefix_caching": False}),
        (("--routing", "least-loaded"), {"routing": "least-loaded"}),
        (("--routing", "priced"), {"routing": "priced"}),
        (
            ("--drafts", 3, "--acceptance", 0.5, "--draft-cost", 0.1),
            {"speculation": {"drafts": 3, "acceptance": 0.5, "draft_cost": 0.1}},
        ),
    ],
)
def test_options_of_the_engine_reach_it(trace: Path, options: tuple[object, ...], expected: Any) -> None:
    plain, data = replay(trace, "--rate", 30), replay(trace, "--rate", 30, *options)
    assert {key: data["engine"][key] for key in expected} == expected
    assert {key: plain["engine"][key] for key in expected} != expected
    if options[0] not in {"--kv-blocks", "--block-tokens", "--no-chunked-prefill", "--routing"}:
        assert data["latency_s"] != plain["latency_s"], "it makes a difference"


def test_prefill_and_decode_apart(trace: Path) -> None:
    pair = ("--prefill-workers", 1, "--decode-workers", 2)
    fast = replay(trace, *pair, "--link-bytes-per-s", 1e15)
    slow = replay(trace, *pair, "--kv-bytes", 1e6, "--link-bytes-per-s", 1e10)
    assert fast["engine"]["workers"] == 3
    assert fast["engine"]["disaggregation"]["prefill_workers"] == 1
    assert slow["engine"]["disaggregation"]["bytes_per_token"] == 1e6
    # A prompt of 1,024 tokens and more takes 0.1 s over the slow link, before the second token.
    assert slow["latency_s"]["mean"] > fast["latency_s"]["mean"] + 0.1
    assert slow["ttft_s"]["mean"] == pytest.approx(fast["ttft_s"]["mean"])
    screen = walras("replay", trace, *pair, "--probes", 0).out
    assert "3 workers, 1 of them prefill" in screen.replace("\n", "")


def test_a_shipped_profile_by_name(trace: Path) -> None:
    data = replay(trace, "--profile", "a100-80gb-llama2-70b-tp8")
    limits = load_profile("a100-80gb-llama2-70b-tp8").limits
    assert data["engine"]["max_sequences"] == limits.most_sequences
    assert data["profile"]["name"] == "a100-80gb-llama2-70b-tp8"


def test_a_profile_of_ones_own(trace: Path, tmp_path: Path) -> None:
    """Steps that take 10 ms, 20 µs per new prompt token and 1 ms per sequence: one request alone takes just that."""
    rows = [(p, 0, 0) for p in (64, 256, 1024, 4096)] + [
        (0, n, n * kv) for n in (1, 4, 16) for kv in (100, 2000)
    ]
    lines = [f"{p},{n},{kv},{0.01 + 2e-5 * p + 1e-3 * n}" for p, n, kv in rows]
    steps = write(
        tmp_path, "steps.csv", "prefill_tokens,sequences,kv_tokens,seconds\n" + "\n".join(lines) + "\n"
    )
    one = write(tmp_path, "one.csv", f"{HEAD}\n0,1000,11\n")
    data = replay(one, "--profile", steps)
    assert data["profile"]["name"] == "steps"
    assert data["profile"]["error"]["rows"] == len(rows)
    assert data["ttft_s"]["mean"] == pytest.approx(0.03, rel=0.02)
    assert data["tpot_s"]["mean"] == pytest.approx(0.011, rel=0.02)
    assert data["engine"]["max_sequences"] == 16


def test_profiles_are_listed_with_their_errors() -> None:
    data, screen = walras("profiles", "--json").data["profiles"], walras("profiles").out
    assert [profile["name"] for profile in data] == shipped()
    assert PROFILE in shipped()
    for profile in data:
        assert profile["error"]["median"] > 0
        assert profile["source"]
        assert profile["limits"]["kv_tokens"] > 0
    assert all(name[:12] in screen for name in shipped())


# --- requests -----------------------------------------------------------------------------------------------------------


def test_rate_and_requests(trace: Path) -> None:
    plain, faster = replay(trace), replay(trace, "--rate", 4)
    assert faster["throughput"]["arrivals_per_s"] == pytest.approx(4 * plain["throughput"]["arrivals_per_s"])
    assert replay(trace, "--requests", 7)["requests"] == 7
    assert replay(trace, "--requests", 1000)["requests"] == N


@pytest.mark.parametrize("name", ["rows.parquet", "rows.csv"])
def test_output_has_a_row_for_each_request(trace: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    data = replay(trace, "--workers", 2, "--output", path)
    rows = pq.read_table(path) if name.endswith("parquet") else pyarrow.csv.read_csv(path)
    requests = read_trace(trace).requests
    assert rows["request"].to_pylist() == [f"r{k}" for k in range(N)]
    assert rows["simulated"].to_pylist() == [True] * N
    assert rows["arrival_s"].to_pylist() == requests.arrival_s.tolist()
    assert rows["input_tokens"].to_pylist() == requests.input_tokens.tolist()
    assert rows["output_tokens"].to_pylist() == requests.output_tokens.tolist()
    assert set(rows["worker"].to_pylist()) == {0, 1}
    for key in ("ttft_s", "queue_s", "latency_s"):
        assert rows[key].to_numpy().mean() == pytest.approx(data[key]["mean"])
    assert rows["cached_tokens"].to_numpy().sum() == pytest.approx(
        data["kv_hit_ratio"] * requests.input_tokens.sum()
    )
    assert [p.name for p in tmp_path.iterdir()] == [name], "nothing else is left behind"


def test_intervals_add_up(trace: Path, tmp_path: Path) -> None:
    path = tmp_path / "intervals.csv"
    each = tmp_path / "rows.csv"
    data = replay(trace, "--intervals", path, "--interval", 0.5, "--output", each)
    rows = pyarrow.csv.read_csv(path).to_pydict()
    assert np.diff(rows["end_s"]) == pytest.approx(0.5)
    ended = data["throughput"]["end_s"]
    assert len(rows["end_s"]) == int(ended / 0.5)
    ends = pyarrow.csv.read_csv(each)["end_s"].to_numpy()
    assert sum(rows["finished"]) == (ends <= rows["end_s"][-1]).sum() > N / 2
    assert max(rows["running"]) == data["running"]["max"]
    assert np.mean(rows["kv_use"]) == pytest.approx(data["kv_use"]["mean"])


@pytest.mark.parametrize(
    "spec", ["poisson:20", "bursty:20:3", "diurnal:20:0.5:100", "sessions:5", "sessions:5:4:1.5"]
)
def test_generated_load(spec: str) -> None:
    options = ("--generate", spec, "--requests", 400, "--lengths", "lognormal:200:10:0.5")
    data = replay(*options, "--seed", 3)
    assert data["generated"] is True
    assert data["requests"] == 400
    assert data["traffic"] == spec
    assert {k: data[k] for k in ("ttft_s", "kv_hit_ratio")} == {
        k: v for k, v in replay(*options, "--seed", 3).items() if k in {"ttft_s", "kv_hit_ratio"}
    }
    assert data["ttft_s"] != replay(*options, "--seed", 4)["ttft_s"]
    if spec.startswith("sessions"):
        assert data["kv_hit_ratio"] > 0.5, "what was said before is in memory"
    else:
        assert data["throughput"]["arrivals_per_s"] == pytest.approx(20, rel=0.5)


def test_generated_lengths_are_those_asked_for(trace: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    replay("--generate", "poisson:50", "--requests", 3000, "--lengths", "lognormal:300:20:0.5", "-o", path)
    rows = pq.read_table(path)
    assert rows["input_tokens"].to_numpy().mean() == pytest.approx(300.5, rel=0.05)
    assert rows["output_tokens"].to_numpy().mean() == pytest.approx(20.5, rel=0.05)
    assert rows["input_tokens"].to_numpy().std() / 300 == pytest.approx(0.5, rel=0.1)
    replay("--generate", "poisson:50", "--requests", 500, "--lengths", trace, "-o", path)
    known = read_trace(trace).requests
    drawn = set(
        zip(*(pq.read_table(path)[c].to_pylist() for c in ("input_tokens", "output_tokens")), strict=True)
    )
    assert drawn <= set(zip(known.input_tokens.tolist(), known.output_tokens.tolist(), strict=True))


def test_pieces_make_no_difference() -> None:
    """Traffic in pieces, as long generated load comes, against the same in one."""
    rng = np.random.default_rng(5)
    whole = Requests(np.sort(rng.uniform(0, 3, 200)), rng.integers(1, 90, 200), rng.integers(1, 30, 200))
    parts = [
        Requests(whole.arrival_s[a:b], whole.input_tokens[a:b], whole.output_tokens[a:b])
        for a, b in ((0, 50), (50, 51), (51, 200))
    ]
    settings = EngineSettings(kv_blocks=40, max_batched_tokens=64, max_sequences=8, workers=2)
    engine = Engine(settings, load_profile(PROFILE), flat_steps(64, 8, 0.004, 1e-5), Routing.least_loaded())
    tables: list[list[Any]] = [[], []]
    played = [
        play(
            engine,
            Traffic("made", lambda pieces=pieces: iter(pieces), Lengths.like(whole), 0),
            interval_s=0.1,
            sink=found.append,
        )
        for pieces, found in zip(([whole], parts), tables, strict=True)
    ]
    rows = [
        sorted(row for table in found for row in zip(*table.to_pydict().values(), strict=True))
        for found in tables
    ]
    assert rows[0] == rows[1]
    assert played[0].timeline is not None
    assert played[1].timeline is not None
    assert played[0].timeline.table() == played[1].timeline.table()
    assert played[0].ttft.quantile(0.95) == played[1].ttft.quantile(0.95)
    assert played[0].preemptions == played[1].preemptions


def test_many_latencies_are_counted_in_bins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "KEPT", 1000)
    rng, binned = np.random.default_rng(0), Latencies()
    values = np.concatenate([rng.lognormal(-3, 2, 20_000), np.zeros(3000)])
    for piece in np.array_split(rng.permutation(values), 7):
        binned.add(piece)
    shares = np.array([0.05, 0.3, 0.5, 0.95, 0.999, 1.0])
    assert binned.quantiles(shares) == pytest.approx(np.quantile(values, shares), rel=2e-3)
    assert binned.mean == pytest.approx(values.mean())
    assert binned.most == values.max()


def test_a_log_names_its_model(tmp_path: Path) -> None:
    rows = [
        f"r{k},{model},{k * 0.1},{tokens},5"
        for k in range(20)
        for model, tokens in (("small", 50), ("large", 80))
    ]
    log = write(tmp_path, "log.csv", f"request,model,{HEAD}\n" + "\n".join(rows) + "\n")
    path = tmp_path / "rows.csv"
    assert replay(log, "--model", "large", "-o", path)["requests"] == 20
    found = pyarrow.csv.read_csv(path)
    assert set(found["input_tokens"].to_pylist()) == {80}
    assert found["request"].to_pylist() == list(range(2, 41, 2)), "rows of the file"
    assert "did you mean 'large'?" in refused(3, log, "--model", "larg")


def test_a_replay_begins_with_the_first_request(tmp_path: Path) -> None:
    """Logs may count seconds from 1970."""
    found = []
    for begin in (0, 1_700_000_000):
        rows = "".join(f"{begin + k},500,10\n" for k in range(50))
        data = replay(write(tmp_path, "log.csv", f"{HEAD}\n{rows}"), "--sweep")
        found.append({key: data[key] for key in ("throughput", "ttft_s", "running", "sweep")})
    assert found[0] == found[1]
    assert found[0]["throughput"]["arrivals_per_s"] == pytest.approx(50 / 49)


# --- load against latency -----------------------------------------------------------------------------------------------


def test_the_knee_is_where_power_is_largest(trace: Path) -> None:
    data = replay(trace, "--sweep")
    rates, knee = data["sweep"]["rates"], data["sweep"]["knee"]
    factors = [row["factor"] for row in rates]
    assert factors == sorted(factors)
    assert {0.25, 0.5, 0.75, 1, 1.25, 1.5, 2} <= set(factors)
    power = [row["completed_per_s"] / row["latency_s"]["mean"] for row in rates]
    assert knee == rates[int(np.argmax(power))]
    assert factors[0] < knee["factor"] < factors[-1]
    same = next(row for row in rates if row["factor"] == 1)
    assert same["ttft_s"] == data["ttft_s"], "at its own rate it is the same replay"
    assert rates[-1]["latency_s"]["mean"] > rates[0]["latency_s"]["mean"]
    assert "knee is at" in walras("replay", trace, "--sweep", "--probes", 0).out.replace("\n", " ")
    assert replay(trace)["sweep"] is None


def test_a_sweep_of_many_takes_the_first(monkeypatch: pytest.MonkeyPatch, trace: Path) -> None:
    monkeypatch.setattr(serving, "SWEPT", 20)
    data = replay(trace, "--sweep")
    assert data["requests"] == N
    assert {row["requests"] for row in data["sweep"]["rates"]} == {20}


def test_requests_at_once_have_no_rate(tmp_path: Path) -> None:
    path = write(tmp_path, "burst.csv", f"{HEAD}\n" + "0,100,5\n" * 30)
    ran = walras("replay", path, "--sweep", "--json", "--probes", 4)
    assert ran.err == "all requests arrive at once: there is no rate to vary\n"
    assert ran.data["sweep"] is None
    assert ran.data["throughput"]["arrivals_per_s"] is None
    assert ran.data["resource_prices"]["prefill_token"] >= 0


def test_one_request_of_one_token(tmp_path: Path) -> None:
    path = write(tmp_path, "one.csv", f"{HEAD}\n0,1,1\n")
    data = replay(path, "--probes", 2)
    assert data["requests"] == 1
    assert data["tpot_s"]["mean"] is None
    assert "SIMULATED" in walras("replay", path, "--probes", 0, "--html", tmp_path / "one.html").out


# --- what is refused ----------------------------------------------------------------------------------------------------

GOOD = "0,100,10\n"


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("0,100,10\n-1,100,10\n", "row 2, column 'arrival_s': "),
        (
            "0,100,10\n5,100,10\n4,100,10\n",
            "row 3, column 'arrival_s': arrives at 4 s, after a row that arrives at 5 s",
        ),
        ("0,100,10\n1,0,10\n", "row 2, column 'input_tokens': a request without tokens"),
        ("0,100,10\n1,100,10\n2,100,0\n", "row 3, column 'output_tokens': a request without tokens"),
        ("0,100,10\n1,900000,10\n", "row 2, column 'input_tokens': prompt and answer need 900009 KV tokens"),
        ("0,100,10\nx,100,10\n", "row 2, column 'arrival_s'"),
        ("0,100,10\n1,10.5,10\n", "row 2, column 'input_tokens': is 10.5, expected a whole number"),
        ("", ""),
    ],
)
def test_bad_requests_name_row_and_column(tmp_path: Path, rows: str, said: str) -> None:
    path = write(tmp_path, "bad.csv", f"{HEAD}\n{rows}")
    message = refused(3, path)
    assert message.startswith(f"walras: {path}")
    assert said in message


def test_duplicate_ids(tmp_path: Path) -> None:
    path = write(tmp_path, "bad.csv", f"id,{HEAD}\na,{GOOD}b,{GOOD}a,{GOOD}")
    assert "row 3, column 'id': 'a' is the request of row 1 already" in refused(3, path)


def test_block_ids_out_of_prefix_order(tmp_path: Path) -> None:
    rows = [
        {"arrival_s": k, "input_tokens": 1024, "output_tokens": 1, "hash_ids": ids}
        for k, ids in enumerate(([1, 2], [2, 1]))
    ]
    path = write(tmp_path, "bad.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert "row 2, column 'hash_ids': " in refused(3, path)


def test_a_profile_with_one_point(trace: Path, tmp_path: Path) -> None:
    path = write(
        tmp_path, "steps.csv", "prefill_tokens,sequences,kv_tokens,seconds\n512,0,0,0.02\n0,1,9,0.01\n"
    )
    message = refused(3, trace, "--profile", path)
    assert f"{path}, column 'prefill_tokens': " in message


def test_unknown_profiles_name_the_known(trace: Path) -> None:
    assert "did you mean 'h100-qwen3-32b-tp8'?" in refused(4, trace, "--profile", "h100-qwen-32b")
    assert "known: rtx4090-llama3.1-8b, " in refused(4, trace, "--profile", "zzz")


@pytest.mark.parametrize(
    ("code", "options", "said"),
    [
        (4, (), "TRACE or --generate: give one of the two"),
        (4, ("TRACE", "--generate", "poisson:1"), "TRACE or --generate: give one of the two"),
        (4, ("TRACE", "--lengths", "lognormal:9:9"), "--lengths: is for --generate"),
        (4, ("--generate", "poison:1"), "--generate: no load 'poison' (did you mean 'poisson'?)"),
        (4, ("--generate", "poisson:x"), "--generate: 'poisson:x' is not poisson:RATE"),
        (4, ("--generate", "bursty:1"), "--generate: 'bursty:1' is not bursty:RATE:CV"),
        (4, ("--generate", "poisson:-1"), "rate: -1.0 is not finite and above 0"),
        (4, ("--generate", "poisson:1", "--lengths", "lognormal:9"), "--lengths: 'lognormal:9' is not"),
        (4, ("TRACE", "--rate", "0"), "--rate: 0 times as fast"),
        (4, ("TRACE", "--rate", "nan"), "--rate: nan times as fast"),
        (4, ("TRACE", "--interval", "0"), "--interval: 0 s"),
        (4, ("TRACE", "--interval", "1e-9"), "--interval: 1e-09 s"),
        (4, ("TRACE", "--probes", "1"), "probes: 1 tell no error"),
        (
            4,
            ("TRACE", "--prefill-workers", "1"),
            "--prefill-workers, --decode-workers: one without the other",
        ),
        (
            4,
            ("TRACE", "--workers", "4", "--prefill-workers", "1", "--decode-workers", "1"),
            "--workers: 4, but 1 prefill and 1 decode",
        ),
        (4, ("TRACE", "--max-batched-tokens", "8"), "max_batched_tokens: "),
        (4, ("TRACE", "--block-tokens", "48"), "prefix_tokens: "),
        (4, ("TRACE", "--output", "rows.txt"), "--output: 'rows.txt' is no .parquet or .csv"),
        (4, ("TRACE", "--intervals", "rows.json"), "--intervals: 'rows.json' is no .parquet or .csv"),
        (7, ("TRACE", "--output", "missing/rows.csv"), "missing/rows.csv: cannot be written"),
        (7, ("TRACE", "--html", "missing/report.html"), "missing/report.html: cannot be written"),
        (2, ("TRACE", "--workers", "0"), "Invalid value for '--workers'"),
        (2, ("TRACE", "--routing", "random"), "Invalid value for '--routing'"),
        (3, ("missing.csv",), "missing.csv: no such file"),
    ],
)
def test_bad_options(trace: Path, code: int, options: tuple[str, ...], said: str) -> None:
    given = [trace if option == "TRACE" else option for option in options]
    assert said in refused(code, *given)


def test_what_fails_leaves_no_file(tmp_path: Path) -> None:
    path = write(tmp_path, "bad.csv", f"{HEAD}\n0,100,10\n1,900000,10\n")
    refused(3, path, "-o", tmp_path / "rows.parquet", "--html", tmp_path / "report.html")
    assert [p.name for p in tmp_path.iterdir()] == ["bad.csv"]


# --- what people see ----------------------------------------------------------------------------------------------------


def test_the_screen_leads_with_the_answer(trace: Path) -> None:
    ran = walras("replay", trace, "--rate", 40, "--probes", 16, "--workers", 1)
    assert ran.code == 0
    assert ran.err == ""
    text = " ".join(ran.out.split())
    assert text.startswith(
        f"Walras replay of trace.jsonl · {N} requests · 1 worker · round-robin · SIMULATED "
    )
    assert text.index("hort: ") < text.index("Latency")
    for said in (
        "first token (TTFT)",
        "per output token (TPOT)",
        "KV use",
        "a prompt token computed",
        "per CPU-second",
    ):
        assert said in text
    assert f"Profile {PROFILE}: off by" in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0 s"), (1.5, "1.50 s"), (0.0193, "19.3 ms"), (8.1e-4, "810 µs"), (0.9998, "1.000 s")],
)
def test_seconds_as_people_read_them(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


# --- the page -----------------------------------------------------------------------------------------------------------


def test_the_page_shows_what_json_says(trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html, "get_plotlyjs", lambda: PLOTLY)
    path = tmp_path / "report.html"
    data = replay(trace, "--rate", 20, "--html", path, "--probes", 4, "--intervals", tmp_path / "t.parquet")
    page = Page(path.read_text(encoding="utf-8"))
    assert list(page.figures) == [
        "load",
        "ttft",
        "tpot",
        "requests-running-and-waiting",
        "kv-use",
        "throughput",
    ]
    assert "SIMULATED" in page.words[:200]
    assert PROFILE in page.words
    rates = data["sweep"]["rates"]
    by_name = {trace["name"]: trace for trace in page.figures["load"]["data"]}
    answer = by_name["whole answer, mean"]
    assert answer["x"] == pytest.approx([row["arrivals_per_s"] for row in rates])
    assert answer["y"] == pytest.approx([row["latency_s"]["mean"] for row in rates])
    assert by_name["knee"]["x"] == pytest.approx([data["sweep"]["knee"]["arrivals_per_s"]] * 2)
    first = next(t for t in page.figures["ttft"]["data"] if t["name"] == "first token")
    assert np.interp(50, first["y"], first["x"]) == pytest.approx(data["ttft_s"]["p50"], rel=1e-6)
    assert first["y"] == sorted(first["y"])
    timeline = pq.read_table(tmp_path / "t.parquet")
    running = page.figures["requests-running-and-waiting"]["data"][0]
    assert running["x"][-1] == pytest.approx(timeline["end_s"][-1].as_py())
    for figure in page.figures.values():
        for axis in ("xaxis", "yaxis"):
            assert figure["layout"][axis]["title"]["text"], "every axis says what it is, and in what unit"
    assert "http" not in "".join(str(v) for _, attributes in page.elements for v in attributes.values())
    assert page.policy.startswith("default-src 'none'")


def test_without_prices_they_are_left_out(
    trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(html, "get_plotlyjs", lambda: PLOTLY)
    path = tmp_path / "report.html"
    replay(trace, "--html", path)
    assert "What a use costs the others" not in Page(path.read_text(encoding="utf-8")).words


def test_long_timelines_are_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html, "get_plotlyjs", lambda: PLOTLY)
    path, table = tmp_path / "report.html", tmp_path / "t.parquet"
    load = ("--generate", "poisson:20", "--requests", 600, "--lengths", "lognormal:200:10")
    replay(*load, "--interval", 0.01, "--html", path, "--intervals", table)
    figures, whole = Page(path.read_text(encoding="utf-8")).figures, pq.read_table(table)
    drawn = next(t for t in figures["throughput"]["data"] if t["name"] == "output tokens")
    assert len(drawn["x"]) <= 400 < len(whole)
    spans = np.diff([0, *drawn["x"]])
    assert (np.array(drawn["y"]) * spans).sum() == pytest.approx(whole["output_tokens"].to_numpy().sum())


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        assert not os.environ.get("CI"), "this machine has no Chromium: apt-get install chromium"
        pytest.skip("this machine has no Chromium: apt-get install chromium")
    with sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        yield found
        found.close()


def test_the_page_in_a_browser(browser: Any, trace: Path, tmp_path: Path) -> None:
    """Every figure is drawn, in light and in dark; a hostile name runs nothing; nothing is asked of anybody."""
    hostile = tmp_path / (HOSTILE[1].replace("/", "") + ".jsonl")
    shutil.copy(trace, hostile)
    report = tmp_path / "report.html"
    replay(hostile, "--html", report, "--probes", 2)
    for scheme in ("light", "dark"):
        context = browser.new_context(color_scheme=scheme)
        page, wrong, asked = context.new_page(), [], []
        page.on("dialog", lambda dialog, wrong=wrong: (wrong.append(dialog.message), dialog.dismiss()))
        page.on("pageerror", lambda error, wrong=wrong: wrong.append(str(error)))
        page.on(
            "console", lambda said, wrong=wrong: wrong.append(said.text) if said.type == "error" else None
        )
        context.on("request", lambda request, asked=asked: asked.append(request.url))
        page.goto(report.as_uri())
        for figure in page.query_selector_all("figure"):
            drawn = figure.query_selector(".plot")
            drawn.wait_for_selector("svg.main-svg .scatterlayer path.js-line", state="attached")
            assert figure.query_selector(".xtitle").text_content()
            assert figure.query_selector(".ytitle").text_content()
        ink = page.evaluate("getComputedStyle(document.body).color")
        assert ink == ("rgb(27, 31, 36)" if scheme == "light" else "rgb(232, 234, 237)")
        assert (
            page.query_selector("svg.main-svg .xtitle").evaluate("e => getComputedStyle(e).fill")
            != "rgb(0, 0, 0)"
        )
        context.close()
        assert wrong == []
        assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []


# --- real traces --------------------------------------------------------------------------------------------------------


@pytest.mark.data
@pytest.mark.parametrize("workers", [4, 16])
def test_mooncake_gains_from_looking_at_memory(data_dir: DataDir, workers: int) -> None:
    conversation = data_dir / "serving/mooncake_conversation.parquet"
    by_turns, by_memory = (
        replay(conversation, "--workers", workers, "--routing", routing) for routing in ("round-robin", "kv")
    )
    assert by_turns["requests"] == by_memory["requests"] == 12_031
    assert by_memory["kv_hit_ratio"] > 1.3 * by_turns["kv_hit_ratio"] > 0
    assert by_memory["ttft_s"]["mean"] < by_turns["ttft_s"]["mean"]


@pytest.mark.data
def test_every_shared_trace_replays(data_dir: DataDir) -> None:
    azure = replay(data_dir / "serving/azure_code_2023.parquet", "--workers", 2)
    assert azure["requests"] == 8_819
    assert azure["kv_hit_ratio"] == 0
    agents = data_dir / "serving/agentic_claude_code_kv.parquet"
    room = ("--kv-blocks", 60_000, "--workers", 4, "--routing", "kv")
    found = replay(agents, "--requests", 3000, *room, "--session-every", 5)
    assert found["kv_hit_ratio"] > 0.8, "an agent's call begins with its conversation so far"
