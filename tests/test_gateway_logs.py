"""Logs are JSON a line, say what happened to what, and hold no prompt, answer or key."""

from __future__ import annotations

import json
import logging
import socket
import sys
from pathlib import Path

import pytest

from gateways import Service, running
from inprocess import Got, parse, request
from walras.gateway import logs

SETTINGS = """\
value = 1.0
[gateway]
log_level = "info"
[upstreams.gone]
kind = "openai"
base_url = "http://127.0.0.1:9/v1"
[upstreams.here]
kind = "simulated"
[models.dead]
upstream = "gone"
input_usd = 0.1
output_usd = 0.1
quality = 0.9
[models.simulated-small]
upstream = "here"
input_usd = 0.1
output_usd = 0.4
"""
BODY = {"model": "auto", "max_tokens": 5, "messages": [{"role": "user", "content": "a secret question"}]}


def call(own: Service) -> Got:
    host, port = own.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as s:
        s.sendall(request("/v1/chat/completions", json.dumps(BODY).encode(), own.key))
        return parse(b"".join(iter(lambda: s.recv(65536), b"")))


def test_a_service_logs_what_it_does(tmp_path: Path) -> None:
    with running(tmp_path, SETTINGS) as own:
        answers = [call(own) for _ in range(6)]
        assert {a.status for a in answers} == {200}
        key = own.key
        assert own.stop() == 0
    lines = [json.loads(line) for line in own.log.read_text().splitlines() if line.startswith("{")]
    events = [line["event"] for line in lines]
    assert events[0] == "serving"
    assert events[-1] == "stopped"
    told = [line for line in lines if line["event"] == "request"]
    assert [line["request_id"] for line in told] == [a.headers["x-request-id"] for a in answers]
    assert {(line["use"], line["status"], line["level"]) for line in told} == {
        ("simulated-small", "ok", "info")
    }
    failed = next(line for line in lines if line["event"] == "attempt failed")
    assert (failed["upstream"], failed["reason"]) == ("gone", "unreachable")
    alone = next(line for line in lines if line["event"] == "upstream left alone for a while")
    assert (alone["level"], alone["upstream"], alone["failures_in_row"]) == ("warning", "gone", 5)
    whole = own.log.read_text()
    assert "secret question" not in whole
    assert key not in whole


def test_a_line_stays_a_line_whatever_is_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    root, own = logging.getLogger(), logging.getLogger("walras")
    before = root.handlers[:], root.level, own.level
    try:
        logs.set_up("info")
        log = logging.getLogger("walras.gateway")
        logs.event(log, logging.INFO, 'two\nlines, "quoted"', tenant="a\nb\x1b[31m\u2028", seconds=0.5)
        logs.event(log, logging.DEBUG, "not shown")
    finally:
        root.handlers[:] = before[0]
        root.setLevel(before[1])
        own.setLevel(before[2])
    (line,) = capsys.readouterr().err.splitlines(keepends=False)
    read = json.loads(line)
    assert (read["event"], read["tenant"], read["seconds"]) == (
        'two\nlines, "quoted"',
        "a\nb\x1b[31m\u2028",
        0.5,
    )
    assert read["time"].endswith("+00:00")
    assert sys.stderr is not None
