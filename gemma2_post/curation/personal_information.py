"""Finds personal information and secrets in a text, and replaces it by typed placeholders.

A text of 300 tokens mostly has none, so each kind begins with a search that costs a microsecond or two: an @, seven
digits in a row, the prefix of a key. What it lets through is checked by a library: check digits by `python-stdnum`,
phone numbers by `phonenumbers`, networks by `ipaddress`. What is made for documentation, or belongs to nobody, is no
finding.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gemma2_post.curation import checked_numbers, contacts, credentials
from gemma2_post.curation.spans import number_regions

Severity = Literal["sensitive", "personal"]
_DIGIT = re.compile(r"\d")

DEFAULT = tuple("us gb ca au ie in za de at ch nl be fr es it pt br mx ar pl cz ro fi se no dk tr cn kr jp".split())
"""Countries whose national ids and national forms of phone numbers are looked for, as ISO 3166 codes.

International forms (+49 ...) are found whatever the country."""


@dataclass(frozen=True)
class Finding:
    """Personal information at `text[start:end]`."""

    kind: str
    """`email`, `phone_number`, `payment_card`, `iban`, `national_id`, `ip_address`, `street_address`, `private_key`,
    `api_key`, `access_token`, or `password`."""
    severity: Severity
    """What harms by itself (cards, accounts, ids, secrets) is sensitive, what leads to a person is personal."""
    start: int
    end: int
    text: str


def find(text: str, countries: Sequence[str] = DEFAULT) -> list[Finding]:
    """What `text` has of personal information, in its order; findings do not overlap.

    Args:
        countries: whose national ids, and phone numbers without a country code, are looked for (`us`, `de`, ...).
    """
    found: list[Finding] = []

    def add(kind: str, severity: Severity, start: int, end: int) -> None:
        if not any(start < other.end and other.start < end for other in found):
            found.append(Finding(kind, severity, start, end, text[start:end]))

    lowered = text.lower()
    for kind, start, end in credentials.find(text, lowered):
        add(kind, "sensitive", start, end)
    if "@" in text or "[at]" in lowered or "(at)" in lowered:
        for start, end in contacts.emails(text):
            add("email", "personal", start, end)
    if _DIGIT.search(text):
        if regions := number_regions(text):
            for start, end in checked_numbers.ibans(text, regions):
                add("iban", "sensitive", start, end)
            for start, end in checked_numbers.payment_cards(text, regions):
                add("payment_card", "sensitive", start, end)
            for start, end in checked_numbers.national_ids(text, regions, countries):
                add("national_id", "sensitive", start, end)
            for start, end in contacts.phone_numbers(text, regions, countries):
                add("phone_number", "personal", start, end)
        for start, end in contacts.ip_addresses(text):
            add("ip_address", "personal", start, end)
        for start, end in contacts.street_addresses(text, lowered):
            add("street_address", "personal", start, end)
    return sorted(found, key=lambda finding: finding.start)


def replace(text: str, findings: Sequence[Finding]) -> str:
    """`text` with each finding replaced by the name of its kind, such as `[EMAIL]` or `[PHONE_NUMBER]`."""
    for finding in sorted(findings, key=lambda each: each.start, reverse=True):
        text = f"{text[: finding.start]}[{finding.kind.upper()}]{text[finding.end :]}"
    return text
