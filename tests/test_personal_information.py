"""Personal information, in rows where it was planted and in rows that only look like it."""

import random
import re
from collections import Counter
from importlib import import_module

import pytest

from gemma2_post.curation.personal_information import Finding, find, replace

LETTERS, DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789"


def drawn(form: str, chance: random.Random) -> str:
    """`#` becomes a digit, `@` a letter, `*` either; all else stays."""
    choices = {"#": DIGITS, "@": LETTERS, "*": DIGITS + LETTERS}
    return "".join(chance.choice(choices.get(character, character)) for character in form)


def valid(module: str, form: str, chance: random.Random, right: bool = True) -> str:
    """A number of this form whose check digits are right, or wrong."""
    is_valid = import_module(f"stdnum.{module}").is_valid
    while True:
        number = drawn(form, chance)
        if is_valid(number) is right and len(set(re.sub(r"\D", "", number))) > 3:
            return number


CARDS = ["4###############", "4### #### #### ####", "53##-####-####-####", "37#############", "6011 #### #### ####"]
CARDS += ["37## ###### #####", "3530 #### #### ####", "36############", "22##############"]
CARD_TEXTS = ["My card is {}, valid until 04/29.", "Please charge {} for the order", "{}", "Kartennummer: {}.", "({})"]
IBANS = [
    "DE####################",
    "DE## #### #### #### #### ##",
    "FR## #### #### ##** **** **** *##",
    "GB## @@@@ #### #### #### ##",
]
IBANS += [
    "NL##@@@@##########",
    "ES## #### #### #### #### ####",
    "IT## @### #### #### **** **** ***",
    "PL## #### #### #### #### #### ####",
]
IBAN_TEXTS = ["Please transfer it to {}.", "IBAN: {}", "My account {} at the bank", "Meine IBAN ist {} BIC COBADEFF"]
IDS = [
    ("us.ssn", ["###-##-####"], ["My SSN is {}.", "{}", "social security number: {}, born 1980"]),
    ("us.ssn", ["#########"], ["Her social security number is {}."]),
    ("gb.nhs", ["### ### ####", "##########"], ["NHS number {}", "His NHS no. is {}."]),
    ("ca.sin", ["### ### ###", "###-###-###"], ["My SIN is {}", "social insurance number {}."]),
    ("in_.aadhaar", ["#### #### ####", "############"], ["Aadhaar: {}", "My aadhaar number is {}."]),
    ("de.idnr", ["## ### ### ###", "###########"], ["Meine Steuer-ID lautet {}.", "IdNr.: {}"]),
    ("nl.bsn", ["#########"], ["Mijn BSN is {}.", "burgerservicenummer {}"]),
    ("fr.nir", ["1 ## 0# 75 ### ### ##", "2##1275########"], ["Mon numéro de sécurité sociale est {}.", "NIR {}"]),
    ("es.dni", ["########@", "########-@"], ["Mi DNI es {}.", "NIF: {}"]),
    ("es.nie", ["*#######@", "Y-#######-@"], ["Mi NIE es {}.", "{}"]),
    ("it.codicefiscale", ["@@@@@@##@##@###@"], ["Il mio codice fiscale è {}.", "{}"]),
    ("br.cpf", ["###.###.###-##"], ["Meu CPF é {}.", "{}"]),
    ("br.cpf", ["###########"], ["CPF: {}"]),
    ("pl.pesel", ["###########"], ["Mój PESEL to {}.", "PESEL: {}"]),
    ("be.nn", ["##.##.##-###.##"], ["Rijksregisternummer {}.", "{}"]),
    ("ch.ssn", ["756.####.####.##"], ["AHV-Nummer {}", "{}"]),
    ("se.personnummer", ["######-####"], ["Mitt personnummer är {}."]),
    ("no.fodselsnummer", ["###########"], ["Fødselsnummeret er {}."]),
    ("fi.hetu", ["######-###*"], ["Henkilötunnus {}", "{}"]),
    ("tr.tckimlik", ["###########"], ["T.C. kimlik numaram {}."]),
    ("cn.ric", ["11010119##########"], ["我的身份证号码是 {}。", "{}"]),
    ("za.idnr", ["#############"], ["My South African ID number is {}."]),
    ("mx.curp", ["@@@@######HDF@@@*#"], ["Mi CURP es {}."]),
    ("kr.rrn", ["######-1######"], ["주민등록번호는 {} 입니다."]),
]
EMAILS = [
    "anna.schmidt@web.de",
    "j.p.doe+news@gmail.com",
    "MARIA_99@hotmail.co.uk",
    "o'brien@mail.ie",
    "li-wei@qq.com",
    "info@shop.example-store.fr",
]
EMAILS += [
    "jörg@müller.de",
    "x@ibm.com",
    "first.last@sub.dept.university.edu",
    "karl [at] posteo [dot] de",
    "tom(at)gmail.com",
]
EMAIL_TEXTS = [
    "Write to {}.",
    "{}",
    "<{}>",
    "E-mail:{}, please",
    '"{}"',
    "mailto:{}",
    "Contact ({}) or not",
    "我的邮箱是 {}。",
]
LOOKALIKES = [
    "The code ran in 0.{16} seconds",
    "ISBN 978-3-16-{6}-9 is on page {3}",
    "See commit {7}abc{9}def and issue #{5}",
    "On 2023-{2}-{2} at {2}:{2}:{2}.{6} the job ended",
    "Upgrade to version 4.{1}.{1}.{2} or v1.{2}.{1}.{1}",
    "{4} + {4} = {5}, and {3} * {3} = {6}",
    "The population grew from {7} to {8} between 1990 and 2005",
    "Chrome/69.0.{4}.{2} Safari/{3}.{2}",
    "$ {3},{3},{3}.{2} were spent, {2}% more",
    "pi is 3.{20}",
    "Order {10} was shipped; tracking 1Z{3}AA{10}",
    "UUID {8}-{4}-4{3}-8{3}-{12}",
    "Coordinates {2}.{6}, -{2}.{6}",
    "Follow @user{4} and @{5} on the site, decorators like @app.route too",
    "git clone git@github.com:org/repo{2}.git",
    "Use name@example.com, test@example.org or admin@localhost",
    "Servers at 192.168.{2}.{2}, 10.{1}.{1}.{2} and 192.0.2.{2}, name server 8.8.8.8",
    "The test card 4111 1111 1111 1111 and the IBAN DE89 3704 0044 0532 0130 00",
    "Call 555-01{2} or (212) 555-01{2}; support: 1-800-{3}-{4}",
    "api_key = 'YOUR_API_KEY_HERE_{4}', AKIAIOSFODNN7EXAMPLE",
    "Scores: {2}-{2}, {2}-{2}, {3}-{3} and {4}-{4}",
    "The years 1914-1918 and 1939-1945; pages {3}-{3}",
    "In 1998 {3} Main characters met 12 Angry Men on the Road",
    "x = [{3}, {3}, {3}, {3}, {3}, {3}]",
    "std::vector<int> a({4}); b::c::d({2})",
    "Chapter 1.2.3.{1} and section 4.1.1.{1} of the law",
    "The timestamp {10} or {13} in milliseconds",
    "sha256: {16}abcdef{16}",
]


def lookalike(template: str, chance: random.Random) -> str:
    return re.sub(r"\{(\d+)\}", lambda match: drawn("#" * int(match[1]), chance), template)


def planted(chance: random.Random, copies: int) -> list[tuple[str, str, str]]:
    """Kind, what was planted, and the row."""
    rows = []
    for _ in range(copies):
        for kind, module, forms, texts in [
            *(("payment_card", "luhn", CARDS, CARD_TEXTS), ("iban", "iban", IBANS, IBAN_TEXTS)),
            *(("national_id", module, forms, texts) for module, forms, texts in IDS),
        ]:
            for form in forms:
                number = number_of(module, form, chance)
                rows.append((kind, number, chance.choice(texts).format(number)))
        rows += [("email", email, chance.choice(EMAIL_TEXTS).format(email)) for email in EMAILS]
    return rows


def number_of(module: str, form: str, chance: random.Random) -> str:
    if module == "luhn":
        while True:
            number = drawn(form[:-1], chance)
            number += import_module("stdnum.luhn").calc_check_digit(re.sub(r"\D", "", number))
            if len(set(number)) > 4 and (form[:2] != "22" or "2221" <= number[:4] <= "2720"):
                return number
    if module == "iban":
        number = drawn(form, chance)
        check = import_module("stdnum.iban").calc_check_digits(number)
        return number[:2] + check + number[4:]
    return valid(module, form, chance)


def measure(rows: list[tuple[str, str, str]], negatives: list[str]) -> tuple[dict[str, float], float]:
    """Recall of each kind, and precision over all findings."""
    found, all_, wrong = Counter[str](), Counter[str](), Counter[str]()
    for kind, value, text in rows:
        all_[kind] += 1
        findings = find(text)
        right = [each for each in findings if each.kind == kind and each.text == value]
        found[kind] += bool(right)
        wrong.update(each.kind for each in findings if each not in right)
    for text in negatives:
        wrong.update(each.kind for each in find(text))
    return {kind: found[kind] / all_[kind] for kind in all_}, found.total() / (found.total() + wrong.total())


@pytest.mark.parametrize("seed", [0, 1])
def test_planted_rows_are_found_and_others_are_not(seed: int) -> None:
    chance = random.Random(seed)
    rows = planted(chance, 8)
    negatives = [lookalike(template, chance) for template in LOOKALIKES for _ in range(20)]
    recall, precision = measure(rows, negatives)
    assert min(recall.values()) >= 0.98, recall
    assert precision >= 0.98


def test_a_wrong_check_digit_is_no_finding() -> None:
    chance = random.Random(0)
    for _ in range(20):
        assert not find(f"My card is {valid('luhn', '4###############', chance, right=False)}.")
        assert not find(f"Meu CPF é {valid('br.cpf', '###.###.###-##', chance, right=False)}.")
        assert not [
            each
            for each in find(f"IBAN {valid('iban', 'DE####################', chance, right=False)}")
            if each.kind == "iban"
        ]


def test_each_finding_says_where_it_is_and_how_severe() -> None:
    text = "Write to anna@web.de or call +49 30 901820, IBAN DE44 5001 0517 5407 3249 31."
    findings = find(text)
    assert [(each.kind, each.severity) for each in findings] == [
        ("email", "personal"),
        ("phone_number", "personal"),
        ("iban", "sensitive"),
    ]
    assert all(text[each.start : each.end] == each.text for each in findings)
    assert replace(text, findings) == "Write to [EMAIL] or call [PHONE_NUMBER], IBAN [IBAN]."
    assert find(replace(text, findings)) == []


@pytest.mark.parametrize(
    "text",
    [
        "Ring me on 020 7123 4567 tonight.",
        "Call (415) 867-5309.",
        "+1 415-867-5309",
        "WhatsApp: +91 98765 43210",
        "Tel. 030 901820",
        "0049 30 901820",
        "Mon téléphone : 01 42 68 53 00",
        "Mi móvil es 612 34 56 78",
        "+86 138 1234 5678",
    ],
)
def test_phone_numbers(text: str) -> None:
    assert [each.kind for each in find(text)] == ["phone_number"]


@pytest.mark.parametrize(
    "text",
    [
        "Call 911.",
        "555-0123",
        "+44 7700 900123",
        "1-800-273-8255",
        "988",
        "2019-2020",
        "3600-1200=2400",
        "1,000,000,000",
        "call quantize('+35236450.6')",
        "Phone: (123) 456-7891",
        "Call 123-456-7890 today.",
        "Sender: alerts@info6.citi.com",
        "from no-reply@accounts.google.com",
    ],
)
def test_numbers_and_addresses_that_are_nobodys(text: str) -> None:
    assert find(text) == []


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("He logged in from 83.12.4.9 yesterday", 1),
        ("2a02:908:1b3::42 was blocked", 1),
        ("version 83.12.4.9", 0),
        ("2001:db8::1 and 192.0.2.7 are for documentation", 0),
        ("127.0.0.1 10.0.0.3 255.255.255.0", 0),
        ("section 2.3.1.4", 0),
        ("the host at \u0661\u0662\u0663.\u0662.\u0663.\u0664 in Arabic digits", 0),
        ('the sections "8.2.4.44 Bogus comment state"', 0),
        ("the multicast address 224.1.2.3", 0),
        ("it came from 2a02:908::, our network", 1),
        ("the host at 2.3.1.4", 1),
    ],
)
def test_ip_addresses(text: str, count: int) -> None:
    assert [each.kind for each in find(text)] == ["ip_address"] * count


@pytest.mark.parametrize(
    "text",
    [
        "I live at 12 Rose Lane, Leeds LS1 4AB.",
        "Ship it to 2475 Berkshire Valley Rd, Easton, PA 18042",
        "Ich wohne in der Hauptstraße 12, 10115 Berlin.",
        "J'habite 14 rue de la Paix, 75002 Paris",
        "Vivo en la Calle Mayor 12, 28013 Madrid",
        "Il mio indirizzo è Via Garibaldi 7, 20121 Milano",
        "Moro na Rua das Flores, 123, 01310-100 São Paulo",
    ],
)
def test_street_addresses(text: str) -> None:
    assert [each.kind for each in find(text)] == ["street_address"]


@pytest.mark.parametrize(
    "text",
    [
        "221B Baker Street, London NW1 6XE",
        "The 12 Angry Men Drive home",
        "He won 3 Open titles",
        "20 Questions Way to win",
    ],
)
def test_places_that_are_nobodys(text: str) -> None:
    assert find(text) == []


def secret(form: str) -> str:
    return drawn(form, random.Random(7))


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("-----BEGIN RSA PRIVATE KEY-----\n" + secret("*" * 64) + "\n-----END RSA PRIVATE KEY-----", "private_key"),
        ("key: sk-proj-" + secret("*" * 40), "api_key"),
        ("AKIA" + secret("*" * 16), "api_key"),
        ("token ghp_" + secret("*" * 36), "access_token"),
        ("hf_" + secret("*" * 34), "access_token"),
        ("AIza" + secret("*" * 35), "api_key"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiI4ODEyIn0." + secret("*" * 43), "access_token"),
        ("postgres://anna:" + secret("*" * 12) + "@db.acme.io/main", "password"),
        ("API_KEY=" + secret("*" * 32), "api_key"),
        ('"client_secret": "' + secret("*" * 28) + '"', "api_key"),
    ],
)
def test_secrets(text: str, kind: str) -> None:
    assert [(each.kind, each.severity) for each in find(text)] == [(kind, "sensitive")]


@pytest.mark.parametrize(
    "text",
    [
        "openai.api_key = 'sk-your-key-here-xxxxxxxxxxxxxxxx'",
        "AKIAIOSFODNN7EXAMPLE",
        "postgres://user:password@localhost/db",
        "http://evil:thing@example.com",
        "the secret of a good_long_lasting_friendship_is_trust",
        "token: one_of_many_words_joined_by_underscores",
        "a task-oriented-dialogue-systems-for-customer-support",
    ],
)
def test_placeholders_are_no_secrets(text: str) -> None:
    assert find(text) == []


def test_countries_decide_whose_ids_are_looked_for() -> None:
    text = "CPF: 529.982.247-25"
    assert find(text, ["br"]) == [Finding("national_id", "sensitive", 5, 19, "529.982.247-25")]
    assert find(text, ["de"]) == []
