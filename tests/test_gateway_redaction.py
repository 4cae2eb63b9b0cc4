"""Kept prompts: what looks like a secret or an address is blanked, and what the settings name; nothing else is."""

from __future__ import annotations

import time

import pytest

from walras.errors import SettingsError
from walras.gateway.redaction import redaction

SECRETS = (
    "sk-proj-abcdefghijklmnop1234",
    "wl-qfgcchnm3avdv3t5cjsx37yfkcj4llycyibpev53dycqj7byrvsa",
    "ghp_abcdefghijklmnopqrst",
    "AKIAABCDEFGHIJKLMNOP",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl",
    "ada@example.co.uk",
    "4111 1111 1111 1111",
    "4111111111111111",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----",
    "-----BEGIN PRIVATE KEY-----\ncut off",
)
PLAIN = (
    "Fix line 1234567 of test-2026-11-21, which takes 3.5 s; risk-averse users pay more, a secret to none."
)


@pytest.mark.parametrize("secret", SECRETS)
def test_secrets_are_blanked_and_the_rest_stays(secret: str) -> None:
    assert redaction(())(f"before {secret}") == "before [redacted]"
    assert redaction(())(PLAIN) == PLAIN


def test_what_is_called_a_secret_is_one() -> None:
    assert "hunter2" not in redaction(())("my Password: hunter2, please")


def test_the_settings_name_more() -> None:
    assert redaction((r"ACME-\d+",))("ticket ACME-77") == "ticket [redacted]"


@pytest.mark.parametrize(("rule", "says"), [("(", "no regular expression"), ("a*", "empty text")])
def test_a_rule_that_cannot_be_is_refused(rule: str, says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        redaction((rule,))


@pytest.mark.parametrize(
    "text", ["a" * 2_000_000, "1 " * 500_000, "a@" * 500_000, "x.y" * 400_000, "eyJ" * 400_000]
)
def test_a_hostile_prompt_takes_no_time(text: str) -> None:
    begin = time.perf_counter()
    redaction(())(text)
    assert time.perf_counter() - begin < 5
