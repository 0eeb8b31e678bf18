"""Finds private keys, API keys, access tokens, and passwords: by their issuer's prefix, or by a name before them."""

import math
import re
from collections import Counter
from collections.abc import Iterator

_SECRETS = [
    (
        "private_key",
        "PRIVATE KEY",
        r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----[\s\S]{40,}?(?:-----END [A-Z0-9 ]+-----|$)",
    ),
    ("private_key", "PuTTY-User-Key-File", r"PuTTY-User-Key-File-[23]:[\s\S]{100,}"),
    ("access_token", "eyJ", r"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{10,}"),  # JSON web token, RFC 7519
    ("api_key", "sk-", r"\bsk-(?:[a-z]+[0-9]{0,2}-)*[A-Za-z0-9_-]{20,}"),  # OpenAI, Anthropic, OpenRouter
    ("api_key", "sk_live_", r"\b[sr]k_live_[0-9A-Za-z]{20,}"),  # Stripe
    ("api_key", "rk_live_", r"\brk_live_[0-9A-Za-z]{20,}"),
    ("api_key", "AIza", r"\bAIza[\w-]{35}"),  # Google
    ("access_token", "hf_", r"\bhf_[A-Za-z0-9]{30,}"),  # Hugging Face
    ("api_key", "AKIA", r"\bAKIA[0-9A-Z]{16}\b"),  # Amazon Web Services
    ("api_key", "ASIA", r"\bASIA[0-9A-Z]{16}\b"),
    ("access_token", "ghp_", r"\bghp_\w{36,}"),  # GitHub
    ("access_token", "gho_", r"\bgho_\w{36,}"),
    ("access_token", "ghs_", r"\bghs_\w{36,}"),
    ("access_token", "github_pat_", r"\bgithub_pat_\w{40,}"),
    ("access_token", "glpat-", r"\bglpat-[\w-]{20,}"),  # GitLab
    ("access_token", "xox", r"\bxox[abeoprs]-[\w-]{20,}"),  # Slack
    ("access_token", "hooks.slack.com", r"https://hooks\.slack\.com/services/T\w+/B\w+/\w+"),
    ("access_token", "npm_", r"\bnpm_[A-Za-z0-9]{36}\b"),
    ("access_token", "pypi-", r"\bpypi-AgE[\w-]{50,}"),
    ("api_key", "SG.", r"\bSG\.[\w-]{20,24}\.[\w-]{39,50}"),  # SendGrid
    ("api_key", "key-", r"\bkey-[0-9a-f]{32}\b"),  # Mailgun
    ("api_key", "AccountKey=", r"\bAccountKey=[A-Za-z0-9+/=]{80,}"),  # Azure
    ("access_token", "AA", r"\b\d{8,10}:AA[\w-]{33}\b"),  # Telegram
    (
        "password",
        "://",
        r"(?<=://)[^\s:/?#\[\]@'\"<>]{1,40}:[^\s:/?#\[\]@'\"<>]{4,60}(?=@(?!localhost|127\.|example\.|host\b)[\w.-]+)",
    ),
]
_SECRET_PATTERNS = [(kind, literal, re.compile(pattern)) for kind, literal, pattern in _SECRETS]
_ASSIGNED = re.compile(
    r"(?i)(?:api[_ -]?key|secret(?:[_ -]?(?:access)?[_ -]?key)?|access[_ -]?token|auth[_ -]?token|bearer"
    r"|passw(?:or)?d|pwd)"
    r"[\"']?\s*(?:=>|[:=]|\bis\b| )\s*[\"'`]?([A-Za-z0-9+/_=.-]{20,200})"
)
_ASSIGNED_WORDS = "api key|api_key|api-key|apikey|secret|token|bearer|passw|pwd".split("|")
_PLACEHOLDER = re.compile(
    r"(?i)example|your|xxxx|placeholder|dummy|test|1234567|abcdef|<|\*\*\*|\.\.\.|password|user:pass"
)
_EXAMPLE_TOKEN_SIGNATURE = "SflKxwRJSMeKKF2QT4fwpMeJf36POk6yJV_adQssw5c"
"""The signature of the token that jwt.io shows."""
_MINIMUM_ENTROPY = 3.5
"""Bits for each character; words joined by underscores have about 3, random letters and digits above 4."""


def find(text: str, lowered: str) -> Iterator[tuple[str, int, int]]:
    """The kind, the begin and the end of each credential.

    Args:
        lowered: The text in lower case.
    """
    for kind, literal, pattern in _SECRET_PATTERNS:
        if literal in text:
            for match in pattern.finditer(text):
                example = _PLACEHOLDER.search(match[0]) or _EXAMPLE_TOKEN_SIGNATURE in match[0]
                if kind == "private_key" or not example:
                    yield kind, match.start(), match.end()
    if any(word in lowered for word in _ASSIGNED_WORDS):
        for match in _ASSIGNED.finditer(text):
            value = match[1]
            if (
                not _PLACEHOLDER.search(value)
                and re.search(r"\d", value)
                and re.search(r"[A-Za-z]", value)
                and _entropy(value) >= _MINIMUM_ENTROPY
            ):
                yield "api_key", match.start(1), match.end(1)


def _entropy(text: str) -> float:
    """Shannon entropy of the characters, in bits."""
    return -sum(count / len(text) * math.log2(count / len(text)) for count in Counter(text).values())
