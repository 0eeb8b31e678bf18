"""Finds payment cards, IBANs, and national ids: numbers with check digits, which `python-stdnum` computes.

Where form and check digits are weak, a word such as "SSN" must stand near the number. What is made for documentation
is no finding: the networks' test cards, the IBAN registry's examples.
"""

import re
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from gemma2_post.curation.spans import Spans, has_context, matches

# --- payment cards and accounts ---

_CARD = re.compile(r"(?<![\w.,$€£+-])\d(?:[ -]?\d){12,18}(?![\w]|[.,-]\d)")
_ISSUERS = [
    (re.compile(r"4"), {16}),  # Visa
    (re.compile(r"5[1-5]|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720"), {16}),  # Mastercard
    (re.compile(r"3[47]"), {15}),  # American Express
    (re.compile(r"6011|64[4-9]|65"), {16}),  # Discover
    (re.compile(r"30[0-5]|3[689]"), {14}),  # Diners Club
    (re.compile(r"35(?:2[89]|[3-8]\d)"), {16}),  # JCB
    (re.compile(r"62"), {16}),  # UnionPay
    (re.compile(r"220[0-4]"), {16}),  # Mir
]
_ISSUERS_IN_CONTEXT = [
    (re.compile(r"4"), {13, 19}),
    (re.compile(r"6011|64[4-9]|65|62|35(?:2[89]|[3-8]\d)"), {17, 18, 19}),
    (re.compile(r"50|5[6-9]|6"), {13, 14, 15, 16, 17, 18, 19}),  # Maestro
]
"""Rarer lengths, which other long numbers have as often."""
_CARD_WORDS = re.compile(r"(?i)card|visa|maestro|credit|karte|carte|tarjeta|carta|cart[ãa]o|卡|カード|카드|карт")
_TEST_CARDS = set(
    "4111111111111111 4242424242424242 4012888888881881 4000056655665556 4000000000000002 4222222222222 "
    "4917610000000000 5555555555554444 5105105105105100 5200828282828210 5454545454545454 2223003122003222 "
    "378282246310005 371449635398431 378734493671000 6011111111111117 6011000990139424 6011000000000004 "
    "30569309025904 38520000023237 36227206271667 3530111333300000 3566002020360505 6200000000000005 "
    "4012001037141112 4444333322221111 4988438843884305".split()
)
"""What the networks and payment services publish for tests."""


def payment_cards(text: str, regions: list[tuple[int, int]]) -> Spans:
    """Numbers with an issuer's prefix, one of its lengths, and the right check digit."""
    for match in matches(_CARD, text, regions):
        digits = re.sub(r"\D", "", match[0])
        issuers = _ISSUERS
        if has_context(_CARD_WORDS, text, match.start(), match.end()):
            issuers = _ISSUERS + _ISSUERS_IN_CONTEXT
        if (
            digits not in _TEST_CARDS
            and len(set(digits)) > 3
            and any(len(digits) in lengths and prefix.match(digits) for prefix, lengths in issuers)
            and _is_valid("luhn", digits)
        ):
            yield match.span()


_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}\d\d(?:[ -]?[A-Z0-9]){11,30}(?![A-Za-z0-9])")
_EXAMPLE_IBANS = set(
    "DE89370400440532013000 GB29NWBK60161331926819 GB82WEST12345698765432 GB33BUKB20201555555555 "
    "FR1420041010050500013M02606 FR7630006000011234567890189 ES9121000418450200051332 "
    "IT60X0542811101000000123456 NL91ABNA0417164300 BE68539007547034 AT611904300234573201 "
    "CH9300762011623852957 PL61109010140000071219812874 DE75512108001245126199".split()
)
"""The registry's examples, and others that documentation repeats."""


def ibans(text: str, regions: list[tuple[int, int]]) -> Spans:
    """Account numbers in a country's layout with the right check digits."""
    for match in matches(_IBAN, text, regions):
        # Words in capitals may follow: the longest beginning that is an IBAN counts.
        ends = [place.end() for place in re.finditer(r"[A-Z0-9](?![A-Z0-9])|(?<=[A-Z0-9])$", match[0])]
        for end in sorted({len(match[0]), *ends}, reverse=True):
            compact = re.sub(r"[ -]", "", match[0][:end])
            if len(compact) >= 15 and _is_valid("iban", compact, check_country=False):
                if compact not in _EXAMPLE_IBANS:
                    yield match.start(), match.start() + end
                break


def _is_valid(module: str, number: str, **options: bool) -> bool:
    """Whether a module of python-stdnum accepts the number, its check digits included."""
    return bool(import_module(f"stdnum.{module}").is_valid(number, **options))


# --- national ids ---


class _NationalId(NamedTuple):
    """How a country's id is written, which module of python-stdnum checks it, and which words stand near it."""

    country: str
    form: re.Pattern[str]
    module: str
    words: re.Pattern[str] | None = None
    """Without words, form and check digits are so strict that the id is found anywhere."""


def _national_id(country: str, form: str, module: str, words: str | None = None) -> _NationalId:
    compiled = re.compile(rf"(?<![\w.,$€£+/-])(?:{form})(?!\w|[.,/-]\d)")
    return _NationalId(country, compiled, module, re.compile(words, re.IGNORECASE) if words else None)


_TAX = r"|\btax\b|\bTIN\b|taxpayer"
_ID = r"|\bID\b|identity|identification|national"
_NATIONAL_IDS = [
    _national_id("us", r"\d{3}-\d\d-\d{4}", "us.ssn"),
    _national_id("us", r"\d{3}[ -]?\d\d[ -]?\d{4}", "us.ssn", r"\bSSN\b|social security" + _TAX),
    _national_id("us", r"9\d\d-?\d\d-?\d{4}", "us.itin", r"\bITIN\b" + _TAX),
    _national_id("gb", r"\d{3}[ -]?\d{3}[ -]?\d{4}", "gb.nhs", r"\bNHS\b"),
    _national_id("ca", r"\d{3}[ -]?\d{3}[ -]?\d{3}", "ca.sin", r"\bSIN\b|social insurance|assurance sociale"),
    _national_id("au", r"\d{3} ?\d{3} ?\d{2,3}", "au.tfn", r"\bTFN\b|tax file"),
    _national_id("ie", r"\d{7}[A-W][A-IW]?", "ie.pps", r"\bPPS"),
    _national_id("in", r"[2-9]\d{3}[ -]?\d{4}[ -]?\d{4}", "in_.aadhaar", r"aadha+r|\bUIDAI\b|आधार"),
    _national_id("in", r"[A-Z]{5}\d{4}[A-Z]", "in_.pan", r"\bPAN\b|permanent account|पैन" + _TAX),
    _national_id("za", r"\d{6} ?\d{4} ?\d{3}", "za.idnr", r"\bRSA\b|South Africa" + _ID),
    _national_id("de", r"\d{2} ?\d{3} ?\d{3} ?\d{3}", "de.idnr", r"\bIdNr|Steuer|\bTIN\b" + _TAX),
    _national_id("at", r"\d{4} ?\d{6}", "at.vnr", r"\bSVNR|Sozialversicherung|Versicherungsnummer"),
    _national_id("ch", r"756\.\d{4}\.\d{4}\.\d\d|756\d{10}", "ch.ssn"),
    _national_id("nl", r"\d{3}[ .]?\d{3}[ .]?\d{3}|\d{4}\.\d\d\.\d{3}", "nl.bsn", r"\bBSN\b|burgerservice|sofi"),
    _national_id("be", r"\d\d\.\d\d\.\d\d-\d{3}\.\d\d", "be.nn"),
    _national_id("be", r"\d{11}", "be.nn", r"rijksregister|registre national|\bNISS\b|\bINSZ\b|\bNRN\b" + _ID),
    _national_id("fr", r"[1-478] ?\d\d ?\d\d ?\d[\dAB] ?\d{3} ?\d{3} ?\d\d", "fr.nir"),
    _national_id("es", r"\d{8}[ -]?[A-HJ-NP-TV-Z]", "es.dni", r"\bDNI\b|\bNIF\b|documento|identidad" + _ID),
    _national_id("es", r"[XYZ][ -]?\d{7}[ -]?[A-HJ-NP-TV-Z]", "es.nie"),
    _national_id("it", r"[A-Z]{6}[\dL-NP-V]{2}[A-EHLMPRST][\dL-NP-V]{2}[A-Z][\dL-NP-V]{3}[A-Z]", "it.codicefiscale"),
    _national_id("pt", r"\d{9}|\d{3} \d{3} \d{3}", "pt.nif", r"\bNIF\b|contribuinte|fiscal"),
    _national_id("pt", r"\d{8}[ -]?\d[ -]?[A-Z0-9]{2}\d", "pt.cc", r"cart[ãa]o de cidad|\bCC\b|cidad[ãa]o" + _ID),
    _national_id("br", r"\d{3}\.\d{3}\.\d{3}-\d\d", "br.cpf"),
    _national_id("br", r"\d{3}\.?\d{3}\.?\d{3}-?\d\d", "br.cpf", r"\bCPF\b"),
    _national_id("mx", r"[A-Z]{4}\d{6}[HMX][A-Z]{5}[A-Z0-9]\d", "mx.curp"),
    _national_id("ar", r"(?:20|2[3-7]|3[034])-\d{8}-\d", "ar.cuit", r"\bCUI[TL]\b"),
    _national_id("pl", r"\d{11}", "pl.pesel", r"\bPESEL"),
    _national_id("cz", r"\d{6}/?\d{3,4}", "cz.rc", r"rodn[éeý]|\bRČ\b|\bRC\b" + _ID),
    _national_id("ro", r"[1-8]\d{12}", "ro.cnp", r"\bCNP\b|cod numeric" + _ID),
    _national_id("fi", r"\d{6}[-+A]\d{3}[0-9A-FHJ-NPR-Y]", "fi.hetu"),
    _national_id("se", r"(?:19|20)?\d{6}[-+]?\d{4}", "se.personnummer", r"personn|personal identity|samordning" + _ID),
    _national_id("no", r"\d{6} ?\d{5}", "no.fodselsnummer", r"f[øo]dsels|personn|personal identity" + _ID),
    _national_id("dk", r"\d{6}-?\d{4}", "dk.cpr", r"\bCPR\b|personn"),
    _national_id("tr", r"[1-9]\d{10}", "tr.tckimlik", r"\bT\.?C\b|kimlik" + _ID),
    _national_id("cn", r"[1-9]\d{5}(?:19|20)\d{9}[\dX]", "cn.ric"),
    _national_id("kr", r"\d{6}-[1-8]\d{6}", "kr.rrn"),
    _national_id("jp", r"\d{4}[ -]?\d{4}[ -]?\d{4}", "jp.in_", r"マイナンバー|個人番号|my number"),
]
_NATIONAL_INSURANCE = re.compile(
    r"(?<!\w)(?!BG|GB|NK|KN|TN|NT|ZZ)[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z] ?\d\d ?\d\d ?\d\d ?[A-D](?!\w)"
)
"""The United Kingdom's, without check digits."""
_NATIONAL_INSURANCE_WORDS = re.compile(r"(?i)national insurance|\bNINO\b|\bNI (?:number|no)")
_EXAMPLE_IDS = set(
    "123456789 987654321 123456782 123456788 111223333 12345678909 11144477735 12345678Z 00000000T X1234567L "
    "046454286 AB123456C QQ123456C".split()
)
"""What documentation and forms show; many pass their check."""


def national_ids(text: str, regions: list[tuple[int, int]], countries: Sequence[str]) -> Spans:
    """The ids of these countries, by ISO 3166 codes in lower case."""
    for country, form, module, words in _NATIONAL_IDS:
        if country in countries:
            for match in matches(form, text, regions):
                compact = re.sub(r"[ ./-]", "", match[0])
                if (
                    (words is None or has_context(words, text, *match.span()))
                    and compact not in _EXAMPLE_IDS
                    and len(set(re.sub(r"\D", "", compact))) > 2
                    and _is_valid(module, match[0])
                ):
                    yield match.span()
    if "gb" in countries:
        for match in matches(_NATIONAL_INSURANCE, text, regions):
            named = has_context(_NATIONAL_INSURANCE_WORDS, text, *match.span())
            if named and match[0].replace(" ", "") not in _EXAMPLE_IDS:
                yield match.span()
