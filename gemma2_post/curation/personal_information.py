"""Finds personal information and secrets in a text, and replaces it by typed placeholders.

A text of 300 tokens mostly has none, so each kind begins with a search that costs a microsecond or two: an @, seven
digits in a row, the prefix of a key. What it lets through is checked by a library: check digits by `python-stdnum`,
phone numbers by `phonenumbers`, networks by `ipaddress`. Where a number's form and check digits are weak, a word such
as "SSN" must stand near it.

No finding is what is made for documentation, or belongs to nobody: domains of RFC 2606 and placeholders like `your-
company.com`, networks of RFC 5737 and RFC 3849, private networks and public name servers, 555 and Ofcom's fictional
numbers, numbers of services (toll-free, premium-rate, shared-cost), the networks' test cards, the IBAN registry's
examples.
"""

import ipaddress
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Literal, NamedTuple

Severity = Literal["sensitive", "personal"]

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
    for kind, start, end in _secrets(text, lowered):
        add(kind, "sensitive", start, end)
    if "@" in text or "[at]" in lowered or "(at)" in lowered:
        for start, end in _emails(text):
            add("email", "personal", start, end)
    if _DIGIT.search(text):
        if regions := _number_regions(text):
            for start, end in _ibans(text, regions):
                add("iban", "sensitive", start, end)
            for start, end in _payment_cards(text, regions):
                add("payment_card", "sensitive", start, end)
            for start, end in _national_ids(text, regions, countries):
                add("national_id", "sensitive", start, end)
            for start, end in _phone_numbers(text, regions, countries):
                add("phone_number", "personal", start, end)
        for start, end in _ip_addresses(text):
            add("ip_address", "personal", start, end)
        for start, end in _street_addresses(text, lowered):
            add("street_address", "personal", start, end)
    return sorted(found, key=lambda finding: finding.start)


def replace(text: str, findings: Sequence[Finding]) -> str:
    """`text` with each finding replaced by the name of its kind, such as `[EMAIL]` or `[PHONE_NUMBER]`."""
    for finding in sorted(findings, key=lambda each: each.start, reverse=True):
        text = f"{text[: finding.start]}[{finding.kind.upper()}]{text[finding.end :]}"
    return text


Spans = Iterator[tuple[int, int]]

_DIGIT = re.compile(r"\d")
_NUMBER = re.compile(
    r"\d(?:(?:[ .\-/()]{0,2}\d){6}|(?<=[A-Z]{4}\d)\d|(?<=[A-Z]{2}\d)\d(?: ?\d\d){2}|(?<=[A-Z]{2} \d)\d(?: ?\d\d){2})"
)
"""Seven digits with at most two separators between any two, or an id that begins with letters. It starts with a digit,
which `re` finds fastest."""
_AROUND = 40
"""Characters around a long number where other parts of it may be."""


def _number_regions(text: str) -> list[tuple[int, int]]:
    """Where long numbers stand, with what is around them; regions do not overlap."""
    regions: list[tuple[int, int]] = []
    for match in _NUMBER.finditer(text):
        start, end = max(0, match.start() - _AROUND), min(len(text), match.end() + _AROUND)
        if regions and start <= regions[-1][1]:
            regions[-1] = (regions[-1][0], end)
        else:
            regions.append((start, end))
    return regions


def _matches(form: re.Pattern[str], text: str, regions: list[tuple[int, int]]) -> Iterator[re.Match[str]]:
    for start, end in regions:
        for match in form.finditer(text, start, end):
            if match.end() < end or end == len(text):  # What ends where a region ends may be cut.
                yield match


def _has_context(words: re.Pattern[str], text: str, start: int, end: int, before: int = 60, after: int = 25) -> bool:
    return bool(words.search(text, max(0, start - before), min(len(text), end + after)))


# E-mail addresses

_EMAIL = re.compile(
    r"(?<![\w.+/=-])[\w.+'%-]{1,64}(?:@| ?\[at\] ?| ?\(at\) ?)(?:[\w-]{1,63}(?:\.| ?\[dot\] ?| ?\(dot\) ?)){1,4}"
    r"([^\W\d_]{2,24}|xn--[a-z0-9-]+)(?![\w@]|-\w)"
)
_NO_DOMAIN = re.compile(
    r"(?:^|\.)(?:example(?:\.\w+)*|test|invalid|localhost|local|png|jpe?g|gif|svg|webp|css|js|py"
    r"|(?:your|my|the)-?(?:domain|company|email|site|school|business|website|organization)\.\w+|(?:domain"
    r"|company)\.\w+)$"
)
"""Reserved by RFC 2606 or a placeholder; or a file (`icon@2x.png`)."""
_NOBODY = re.compile(r"(?i)^(?:git|example|(?:your|my)[\w.-]*|user(?:name)?|someone|name|firstname.*|email|xxx+)$")
"""Local parts that stand for any address."""


def _emails(text: str) -> Spans:
    for match in _EMAIL.finditer(text):
        start = match.start() + len(match[0]) - len(match[0].lstrip(".'-"))
        local, _, domain = re.sub(r" ?[\[(]dot[\])] ?", ".", re.sub(r" ?[\[(]at[\])] ?", "@", match[0])).rpartition(
            "@"
        )
        if local.strip(".'-") and not _NOBODY.match(local) and not _NO_DOMAIN.search(domain.lower()):
            yield start, match.end()


# Payment cards and accounts

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


def _payment_cards(text: str, regions: list[tuple[int, int]]) -> Spans:
    for match in _matches(_CARD, text, regions):
        digits = re.sub(r"\D", "", match[0])
        issuers = _ISSUERS
        if _has_context(_CARD_WORDS, text, match.start(), match.end()):
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


def _ibans(text: str, regions: list[tuple[int, int]]) -> Spans:
    for match in _matches(_IBAN, text, regions):
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


# National ids


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


def _national_ids(text: str, regions: list[tuple[int, int]], countries: Sequence[str]) -> Spans:
    for country, form, module, words in _NATIONAL_IDS:
        if country in countries:
            for match in _matches(form, text, regions):
                compact = re.sub(r"[ ./-]", "", match[0])
                if (
                    (words is None or _has_context(words, text, *match.span()))
                    and compact not in _EXAMPLE_IDS
                    and len(set(re.sub(r"\D", "", compact))) > 2
                    and _is_valid(module, match[0])
                ):
                    yield match.span()
    if "gb" in countries:
        for match in _matches(_NATIONAL_INSURANCE, text, regions):
            named = _has_context(_NATIONAL_INSURANCE_WORDS, text, *match.span())
            if named and match[0].replace(" ", "") not in _EXAMPLE_IDS:
                yield match.span()


# Phone numbers

_PHONE = re.compile(r"(?<![\w.,$€£=/#<-])(?:\+(?=\d|\()|\(|\d)[\d ().\-/]{5,22}\d(?!\w|[.,:]\d|[%€$]| ?[=*+>])")
_FORMATTED = re.compile(r"(?:1[ .-])?\(\d{3}\) ?\d{3}[ .-]\d{4}|(?:1[ .-])?\d{3}([.-])\d{3}\1\d{4}")
"""North America's own forms, which hardly anything else has."""
_NO_PHONE = re.compile(r"[ .\-/]{3}|\d{4}[-/.]\d\d[-/.]\d\d(?!\d)|^\(?555[ .-]?\d{4}$|^[1-9]\d+ ?/|\.\d$")
"""Dates, fractions, decimals, and the 555 exchange without an area."""
_PHONE_WORDS = re.compile(
    r"(?i)\b(?:tele)?(?:ph|f)ones?\b|\btel\b|\bcall(?:ed|ing)?\b|\bmobile|\bcell(?: ?phone)?\b|\bwhatsapp|\bfax\b"
    r"|\bsms\b|\btext me\b"
    r"|\b(?:reach(?:ed)?|ring) (?:me|us|him|her)\b|\bdial|\bcontact|\bphone|t[ée]l[ée]phone|\btelef[oó]n|\bhandy"
    r"|rufnummer|\brufen"
    r"|\bm[óo]vil|celular|\bcellulare|\bportable\b|\bnumm?er[oi]?\b|\btelefoon|\bgsm\b|電話|电话|手机|携帯|전화|фон|फ़?ोन"
)
_FICTIONAL = re.compile(
    r"\+1\d{3}555\d{4}|\+44(?:11[3-8]496|1[2-6]1496|1914980|2079460|2890?496|2920180|1632960|7700900|8081570|9098790"
    r"|3069990)\d+"
)
"""The 555 exchange in North America, and the numbers that Ofcom keeps for drama."""


def _phone_numbers(text: str, regions: list[tuple[int, int]], countries: Sequence[str]) -> Spans:
    import phonenumbers
    from phonenumbers import PhoneNumberType

    services = {
        PhoneNumberType.TOLL_FREE,
        PhoneNumberType.PREMIUM_RATE,
        PhoneNumberType.SHARED_COST,
        PhoneNumberType.UAN,
        PhoneNumberType.UNKNOWN,
    }
    for match in _matches(_PHONE, text, regions):
        number, digits = match[0], re.sub(r"\D", "", match[0])
        if not 7 <= len(digits) <= 15 or _NO_PHONE.search(number):
            continue
        if number.startswith(("+", "00")):
            parse_in: Sequence[str] = ["us"]  # A plus sign or 00 says the country; the region is not used.
            number = "+" + digits.removeprefix("00")
        elif _has_context(_PHONE_WORDS, text, *match.span(), before=40, after=0):
            parse_in = countries
        elif _FORMATTED.fullmatch(number) and {"us", "ca"} & set(countries):
            parse_in = ["us"]
        else:
            continue
        for region in parse_in:
            try:
                parsed = phonenumbers.parse(number, region.upper())
            except phonenumbers.NumberParseException:
                continue
            if phonenumbers.is_valid_number(parsed):
                e164 = phonenumbers.format_number(parsed, phonenumbers.PhoneNumberFormat.E164)
                if phonenumbers.number_type(parsed) not in services and not _FICTIONAL.match(e164):
                    yield match.span()
                break


# IP addresses

_OCTETS = re.compile(r"\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]")
_IPV4 = re.compile(r"[0-9]{1,3}(?:\.[0-9]{1,3}){3}(?!\w|\.[0-9]|-[0-9])")
_IPV6 = re.compile(r"[23][0-9a-fA-F]{3}:[0-9a-fA-F:]{2,34}(?![\w:])")
_INSIDE = re.compile(r"[\w.:-]$|(?:^|[^/:])/$")
"""What stands before a part of something longer, or before a version (`Chrome/69.0.34.12`)."""
_EXAMPLE_ADDRESSES = set(
    "1.2.3.4 5.6.7.8 8.8.8.8 8.8.4.4 1.1.1.1 1.0.0.1 9.9.9.9 208.67.222.222 208.67.220.220".split()
)
_VERSION = re.compile(r"(?i)(?:\bv|version|release|build|firmware|driver|sections?|chapters?|§)[ .:\"']*$")
_IP_WORDS = re.compile(
    r"(?i)\bIP(?:v4)?\b|address|server|host|ping|ssh|https?:|\bDNS\b|login|logged|network|subnet|router"
)


def _ip_addresses(text: str) -> Spans:
    for match in _IPV4.finditer(text) if _OCTETS.search(text) else ():
        octets = [int(octet) for octet in match[0].split(".")]
        if (
            max(octets) < 256
            and not _INSIDE.search(text, max(0, match.start() - 2), match.start())
            and match[0] not in _EXAMPLE_ADDRESSES
            and not any(octet.startswith("0") and octet != "0" for octet in match[0].split("."))
            and _is_public(ipaddress.ip_address(match[0]))
            and not _VERSION.search(text, max(0, match.start() - 20), match.start())
            # Four small numbers are a version or a section, unless the text speaks of the network.
            and (max(octets) >= 32 or _has_context(_IP_WORDS, text, *match.span()))
        ):
            yield match.span()
    for match in _IPV6.finditer(text) if "::" in text or text.count(":") > 6 else ():
        number = match[0] if match[0].endswith("::") else match[0].rstrip(":")
        try:
            address = ipaddress.ip_address(number)
        except ValueError:
            continue
        if _is_public(address) and not _INSIDE.search(text, max(0, match.start() - 2), match.start()):
            yield match.start(), match.start() + len(number)


def _is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    return address.is_global and not address.is_multicast


# Street addresses

_NUMBER_AND_STREET = re.compile(
    r"\d{1,5}[A-Za-z]?,? (?:(?:[NSEW]\.? |North |South |East |West )?(?:[A-Z0-9][\w'.-]{0,20} ){1,3}"
    r"(?:Street|St|Avenue|Ave|Road|Rd|Boulevard|Blvd|Lane|Ln|Drive|Dr|Court|Ct|Place|Pl|Way|Terrace|Circle|Close"
    r"|Crescent"
    r"|Parkway|Pkwy|Highway|Hwy|Square|Sq)\b\.?"
    r"|(?:bis |ter )?(?:rue|avenue|boulevard|allée|impasse|chemin|quai)"
    r"(?: (?:de|du|des|la|le|les)| d[e'\u2019]| l['\u2019])*"
    r" ?[A-Z][\w'\u2019.-]*(?: [A-Z][\w'\u2019.-]*)*)"
)
_STREET_AND_NUMBER = re.compile(
    r"\b(?:[A-ZÄÖÜ][\w-]{2,25}(?:straße|strasse|str\.|weg|allee|gasse|platz|ufer|straat|laan|plein|gracht)"
    r"|[A-ZÄÖÜ][\w-]{2,20} (?:Straße|Strasse|Str\.|Allee|Weg|Platz|Gasse)) \d{1,4} ?[a-zA-Z]?\b"
    r"|\b(?:Calle|C/|Avenida|Avda\.|Paseo|Plaza|Via|Viale|Corso|Piazza|Rua|Travessa|Alameda|ul\.|ulica|al\.)"
    r"(?: (?:de|del|della|dei|da|das|do|dos|la|las|los|el))* [A-ZÀ-Ž][\w'\u2019.-]*(?: (?:de|da|do"
    r"|e )?[A-ZÀ-Ž]?[\w'\u2019.-]+){0,4}?"
    r",? (?:n\.?[ºo°] ?)?\d{1,5}\b"
)
_STREETS = (
    "straße |strasse |str. |weg |allee |gasse |platz |ufer |straat |laan |plein |gracht |calle |c/|avenida |avda. "
    "|paseo "
    "|plaza |via |viale |corso |piazza |rua |travessa |alameda |ul. |ulica |al. "
).split("|")
_POSTCODE = re.compile(
    r"\b[A-Z]{2},? \d{5}(?:-\d{4})?\b|\b[A-Z]{1,2}\d[A-Z\d]? \d[A-Z]{2}\b|\b[A-Z]\d[A-Z] \d[A-Z]\d\b"
    r"|\b\d{4} ?[A-Z]{2}\b"
    r"|\b\d{5}(?:-\d{3})? [A-ZÀ-Ž]|\b\d\d-\d{3} [A-ZÀ-Ž]|\b(?:NSW|VIC|QLD|WA|SA|TAS|ACT) \d{4}\b"
    r"|\b\d{4}(?:-\d{3})? [A-ZÀ-Ž]"
)
_ADDRESS_WORDS = re.compile(
    r"(?i)\baddress|\bliv(?:es?|ed|ing) (?:at|on|in)\b|\breside|\bship(?:ped|ping)? to|\bdeliver|\bmail(?:ed)? to"
    r"|\bmoved to"
    r"|\badresse|\bwohn|\bhabite|\bdomicili|\bdirecci[oó]n|\bviv[oe]|\bindirizzo|\babito|\bendere[cç]o|\bmor[oa]\b"
    r"|\badres"
    r"|\bmieszka|\bwoon"
)
_KNOWN_ADDRESSES = re.compile(
    r"1600 Pennsylvania|10 Downing|221B? Baker|350 Fifth|1 Infinite Loop|4 Privet|742 Evergreen|123 Main"
)


def _street_addresses(text: str, lowered: str) -> Spans:
    forms = [_NUMBER_AND_STREET]
    if any(street in lowered for street in _STREETS):
        forms.append(_STREET_AND_NUMBER)
    for form in forms:
        for match in form.finditer(text):
            before = text[max(0, match.start() - 40) : match.start()]
            if before[-1:].isalnum() or _KNOWN_ADDRESSES.match(match[0]):
                continue
            if _ADDRESS_WORDS.search(before) or _POSTCODE.search(text, match.end(), match.end() + 45):
                yield match.span()


# Secrets

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


def _secrets(text: str, lowered: str) -> Iterator[tuple[str, int, int]]:
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
