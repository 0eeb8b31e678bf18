"""Finds what leads to a person: e-mail, phone, and IP addresses, and streets.

What belongs to nobody is no finding: domains of RFC 2606 and placeholders like `your-company.com`, networks of RFC
5737 and RFC 3849, private networks and public name servers, 555 and Ofcom's fictional numbers, numbers of services
(toll-free, premium-rate, shared-cost).
"""

import ipaddress
import re
from collections.abc import Sequence

from gemma2_post.curation.spans import Spans, has_context, matches

# --- e-mail addresses ---

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
_NOBODY = re.compile(
    r"(?i)^(?:git|example|(?:your|my)[\w.-]*|user(?:name)?|someone|name|firstname.*|email|xxx+"
    r"|(?:do-?not|no)-?reply|alerts?|notifications?|mailer-daemon|postmaster)$"
)
"""Local parts that stand for any address, or for a machine."""


def emails(text: str) -> Spans:
    """Addresses of somebody, also with [at] and [dot]."""
    for match in _EMAIL.finditer(text):
        start = match.start() + len(match[0]) - len(match[0].lstrip(".'-"))
        local, _, domain = re.sub(r" ?[\[(]dot[\])] ?", ".", re.sub(r" ?[\[(]at[\])] ?", "@", match[0])).rpartition(
            "@"
        )
        if local.strip(".'-") and not _NOBODY.match(local) and not _NO_DOMAIN.search(domain.lower()):
            yield start, match.end()


# --- phone numbers ---

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


def phone_numbers(text: str, regions: list[tuple[int, int]], countries: Sequence[str]) -> Spans:
    """Numbers with a country code, or in the form of one of these countries beside a word such as "call"."""
    import phonenumbers
    from phonenumbers import PhoneNumberType

    services = {
        PhoneNumberType.TOLL_FREE,
        PhoneNumberType.PREMIUM_RATE,
        PhoneNumberType.SHARED_COST,
        PhoneNumberType.UAN,
        PhoneNumberType.UNKNOWN,
    }
    for match in matches(_PHONE, text, regions):
        number, digits = match[0], re.sub(r"\D", "", match[0])
        if not 7 <= len(digits) <= 15 or _NO_PHONE.search(number) or digits.startswith("123456"):
            continue
        if number.startswith(("+", "00")):
            parse_in: Sequence[str] = ["us"]  # A plus sign or 00 says the country; the region is not used.
            number = "+" + digits.removeprefix("00")
        elif has_context(_PHONE_WORDS, text, *match.span(), before=40, after=0):
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


# --- IP addresses ---

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


def ip_addresses(text: str) -> Spans:
    """Addresses in public networks, of either version."""
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
            and (max(octets) >= 32 or has_context(_IP_WORDS, text, *match.span()))
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


# --- street addresses ---

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


def street_addresses(text: str, lowered: str) -> Spans:
    """Streets with a number, before a postcode or behind words such as "lives at"."""
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
