"""What the rules look for: one scanner a category, each a generator of spans, linear in the length of the text.

Linear is meant literally, for hostile text too: repetition is bounded or possessive, a pattern cannot begin in the
middle of the run it consumes, and no two adjacent parts match the same character. The rules know forms, not
meanings: a number that passes for a card is called one.
"""

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple


class Span(NamedTuple):
    """A half-open range of code points, and what a redaction puts in its place."""

    start: int
    end: int
    replacement: str


Scanner = Callable[[str], Iterator[Span]]

# --- encoding -------------------------------------------------------------------------------------------------------

# Control characters but tab, line feed, carriage return and next line; halves of surrogate pairs; and long runs of
# the invisible tag characters, which carry hidden instructions (the flags that use them need six at most).
_BROKEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f]++|[\ud800-\udfff]++|[\U000e0020-\U000e007f]{8,}+")


def encoding(text: str) -> Iterator[Span]:
    """NUL and other control characters, lone surrogates, text hidden in tag characters."""
    if text.isascii() and text.isprintable():
        return
    for match in _BROKEN.finditer(text):
        yield Span(match.start(), match.end(), "\ufffd")


# --- people and accounts --------------------------------------------------------------------------------------------

_DOMAIN = re.compile(r"(?:[^\W_][\w-]{0,62}\.){1,8}+")
_TOP_LEVEL = re.compile(r"(?:xn--[a-z0-9-]{2,59}|[^\W\d_]{2,24})(?![\w-])", re.IGNORECASE)
# Fewer than RFC 5322 allows: `=`, `&` and quotes stand before an address more often than in one.
_LOCAL = re.compile(r"[\w.%+~-]")


def email(text: str) -> Iterator[Span]:
    """E-mail addresses, found from their `@`: at most 64 characters before it, a domain with a dot after."""
    at = text.find("@")
    floor = 0
    while at >= 0:
        end = _domain_end(text, at + 1)
        start = at
        while end and start > floor and at - start < 64 and _LOCAL.match(text, start - 1):
            start -= 1
        if end and start < at:
            yield Span(start, end, "[EMAIL]")
            floor = at + 1
        at = text.find("@", at + 1)


def _domain_end(text: str, start: int) -> int:
    """Where the domain that begins at `start` ends, or 0."""
    labels = _DOMAIN.match(text, start)
    # The last label but one may have been the top level, when a full stop ends the sentence: step back a label.
    position = labels.end() if labels else start
    while position > start:
        top = _TOP_LEVEL.match(text, position)
        if top:
            return top.end()
        position = text.rfind(".", start, position - 1) + 1
    return 0


_GROUPS = re.compile(r"(?<![0-9])[0-9]++(?:[ -][0-9]++)*+")
_GROUP = re.compile(r"[0-9]++")
_ISSUER = re.compile(r"3[0-9]|[45]|6|2[2-7]")
_DOUBLED = (0, 2, 4, 6, 8, 1, 3, 5, 7, 9)


def payment_card(text: str) -> Iterator[Span]:
    """Card numbers: 13 to 19 digits that begin as a card does and pass Luhn, whole or in groups of 3 to 7."""
    for run in _GROUPS.finditer(text):
        groups = [match.span() for match in _GROUP.finditer(text, run.start(), run.end())]
        first = 0
        while first < len(groups):
            last = _card_from(text, groups, first)
            if last is None:
                first += 1
            else:
                yield Span(groups[first][0], groups[last][1], "[CARD]")
                first = last + 1


def _card_from(text: str, groups: list[tuple[int, int]], first: int) -> int | None:
    """The last group of the longest card number that begins with group `first`."""
    if not _ISSUER.match(text, groups[first][0]):
        return None
    digits = ""
    found: int | None = None
    for index in range(first, min(first + 6, len(groups))):
        start, end = groups[index]
        size = end - start
        if len(digits) + size > 19 or (index > first and not 3 <= size <= 7):
            break
        digits += text[start:end]
        if len(digits) >= 13 and luhn(digits):
            found = index
        if size < 3:
            break
    return found


def luhn(digits: str) -> bool:
    """The check digit of ISO/IEC 7812-1, and not one digit repeated."""
    numbers = [ord(digit) - 48 for digit in reversed(digits)]
    total = sum(numbers[::2]) + sum(_DOUBLED[number] for number in numbers[1::2])
    return total % 10 == 0 and len(set(numbers)) > 1


# Lengths by country, from the SWIFT IBAN registry (release 99).
_IBAN_LENGTH = {
    country: length
    for length, countries in {
        15: "NO", 16: "BE", 18: "DK FI FO GL NL FK SD", 19: "MK SI",
        20: "AT BA EE KZ LT LU XK MN", 21: "CH HR LI LV", 22: "BG BH CR DE GB GE IE ME RS VA",
        23: "AE GI IL IQ OM SO TL", 24: "AD CZ ES MD PK RO SA SE SK TN VG", 25: "LY PT ST",
        26: "IS TR", 27: "BI DJ FR GR IT MC MR SM", 28: "AL AZ BY CY DO GT HU LB PL SV NI",
        29: "BR EG PS QA UA", 30: "JO KW MU YE", 31: "MT SC", 32: "LC", 33: "RU",
    }.items()
    for country in countries.split()
}  # fmt: skip
_IBAN_START = re.compile(r"(?<![A-Za-z0-9])([A-Za-z]{2})[0-9]{2}")
_IBAN_CHARACTER = re.compile(r" ?[A-Za-z0-9]")


def iban(text: str) -> Iterator[Span]:
    """Account numbers of a known country's length that pass modulo 97 (ISO 13616), in groups or not."""
    for start in _IBAN_START.finditer(text):
        length = _IBAN_LENGTH.get(start[1].upper())
        end = start.end()
        for _ in range((length or 4) - 4):
            character = _IBAN_CHARACTER.match(text, end)
            if character is None:
                break
            end = character.end()
        else:
            if length and not text[end : end + 1].isalnum() and _mod97(text[start.start() : end]):
                yield Span(start.start(), end, "[IBAN]")


def _mod97(account: str) -> bool:
    compact = account.replace(" ", "")
    return int("".join(str(int(digit, 36)) for digit in compact[4:] + compact[:4])) % 97 == 1


_PHONE = re.compile(
    r"(?<![\w+])(?:\+[1-9](?:[ .()/-]{0,2}[0-9]){6,14}+(?![0-9])"
    r"|\([2-9][0-9]{2}\) ?[2-9][0-9]{2}[-. ][0-9]{4}(?![\w-])"
    r"|[2-9][0-9]{2}([-.])[2-9][0-9]{2}\1[0-9]{4}(?![\w-]))"
)


def phone(text: str) -> Iterator[Span]:
    """Telephone numbers with a country code (`+41 44 668 18 00`), and North American ones with separators."""
    for match in _PHONE.finditer(text):
        yield Span(match.start(), match.end(), "[PHONE]")


# --- secrets --------------------------------------------------------------------------------------------------------

_SECRET = re.compile(
    r"(?<![A-Za-z0-9_-])(?:"
    r"(?:sk|pk|rk)[-_][A-Za-z0-9_-]{20,}+"  # OpenAI, Anthropic, Stripe and others that followed
    r"|klatch[-_][A-Za-z0-9_-]{20,}+"
    r"|(?:AKIA|ASIA)[0-9A-Z]{16}(?![0-9A-Za-z])"  # AWS access key ids
    r"|gh[pousr]_[A-Za-z0-9]{36,}+"
    r"|github_pat_[A-Za-z0-9_]{22,}+"
    r"|glpat-[A-Za-z0-9_-]{20,}+"
    r"|hf_[A-Za-z0-9]{30,}+"
    r"|xox[abeoprs]-[A-Za-z0-9-]{10,}+"  # Slack
    r"|AIza[A-Za-z0-9_-]{35,}+"  # Google
    r"|eyJ[A-Za-z0-9_-]{8,}+\.eyJ[A-Za-z0-9_-]{8,}+\.[A-Za-z0-9_-]*+"  # JSON web tokens
    r")"
)
_KEY_BEGIN = re.compile(r"-----BEGIN [A-Z0-9 ]{0,40}?PRIVATE KEY(?: BLOCK)?-----")
_KEY_END = re.compile(r"-----END [A-Z0-9 ]{0,40}?PRIVATE KEY(?: BLOCK)?-----")


def secret(text: str) -> Iterator[Span]:
    """API keys and tokens by their prefixes, JSON web tokens, private key blocks (to the end when not closed)."""
    for match in _SECRET.finditer(text):
        yield Span(match.start(), match.end(), "[SECRET]")
    begin = _KEY_BEGIN.search(text)
    while begin:
        end = _KEY_END.search(text, begin.end())
        yield Span(begin.start(), end.end() if end else len(text), "[PRIVATE KEY]")
        begin = _KEY_BEGIN.search(text, end.end()) if end else None


# --- attacks --------------------------------------------------------------------------------------------------------

_OVERRIDE = re.compile(
    r"\b(?:ignore|disregard|forget|override|bypass)\s{1,20}+(?:(?:about|all|any|everything|of|the|your|my|these"
    r"|those|in|from)\s{1,20}+){0,4}(?:previous|prior|above|earlier|preceding|foregoing|system|original)\s{1,20}+"
    r"(?:\w{1,20}+\s{1,20}+)?(?:instruction|prompt|rule|direction|guideline)s?\b"
    r"|\b(?:reveal|print|show|repeat|output|leak)\s{1,20}+(?:me\s{1,20}+)?(?:your|the)\s{1,20}+"
    r"(?:system|hidden|initial|secret|original)\s{1,20}+(?:prompt|instruction|message)s?\b"
    r"|\byou\s{1,20}+are\s{1,20}+now\s{1,20}+(?:in\s{1,20}+)?(?:DAN|developer|jailbroken|unrestricted)\b"
    r"|\bdo\s{1,20}+anything\s{1,20}+now\b"
    r"|<\|(?:im_start|im_end|system|user|assistant|begin_of_text|end_of_text|eot_id|start_header_id)\|>"
    r"|\[/?INST\]|<</?SYS>>",
    re.IGNORECASE,
)


def instruction_override(text: str) -> Iterator[Span]:
    """Common English wordings that try to void the system prompt, and control tokens of chat templates."""
    for match in _OVERRIDE.finditer(text):
        yield Span(match.start(), match.end(), "[REMOVED]")


SCANNERS: dict[str, Scanner] = {
    "encoding": encoding,
    "email": email,
    "payment_card": payment_card,
    "iban": iban,
    "phone": phone,
    "secret": secret,
    "instruction_override": instruction_override,
}
