"""What is blanked in prompts before the ledger keeps them: what looks like a secret or an address, and what the settings name."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from walras.errors import SettingsError

ALWAYS = (
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
    r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*",  # JSON Web Tokens
    r"\b(?:sk|pk|rk|wl|gh[opsu]|glpat|xox[abprs])[-_][\w-]{16,}",
    r"\bAKIA[0-9A-Z]{16}\b",
    r"(?i:\b(?:password|passwd|secret|api[-_]?key|token)\b\s*[:=]\s*)\S+",
    r"\b[\w.%+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8}",
    r"\b\d(?:[ -]?\d){12,18}\b",  # card and account numbers
)
BLANK = "[redacted]"


def redaction(rules: Sequence[str]) -> Callable[[str], str]:
    """A function that blanks `ALWAYS` and `rules`, regular expressions, in a text.

    Raises:
        SettingsError: a rule is no regular expression, or one that matches the empty text.
    """
    patterns = []
    for rule in (*ALWAYS, *rules):
        try:
            pattern = re.compile(rule)
        except re.error as error:
            raise SettingsError(
                f"'{rule}' is no regular expression: {error}", key="gateway.redact"
            ) from error
        if pattern.match(""):
            raise SettingsError(
                f"'{rule}' matches the empty text", key="gateway.redact", hint="use + in place of *"
            )
        patterns.append(pattern)

    def blanked(text: str) -> str:
        for pattern in patterns:
            text = pattern.sub(BLANK, text)
        return text

    return blanked
