"""The aggregation of views, pure: an event's tally, and `row + event -> row`.

A `Row` is what one table holds for one minute, tenant, model and input partition, with the offset of the last record
it counted: records of a partition come in order, so one that comes again changes nothing. Tallies form a commutative
monoid: rows of partitions, minutes and processes add up in any order.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import msgspec

from klatch_schemas.events import (
    ChatRefused,
    ChatRequested,
    EmbeddingRequested,
    Event,
    Status,
    TrustVerdict,
    UsageSettled,
)
from klatch_workers.views.histogram import Histogram

Counts = Mapping[str, int]

NAME_LENGTH = 100
"""A model's name is whatever a producer wrote, and becomes part of every key: longer names are cut."""


class Tally(msgspec.Struct, frozen=True, omit_defaults=True):
    """What happened."""

    requests: int = 0
    ended: Counts = {}
    """By `Status`; a refusal is a `rejected`."""
    refusals: Counts = {}
    """By the limit that refused, or else by the refusal's code."""
    verdicts: Counts = {}
    """By decision."""
    blocks: Counts = {}
    """By category; a verdict counts in each of its categories."""
    redactions: Counts = {}
    """Likewise."""
    served: Counts = {}
    """By the deployment that answered or was asked last; a request that reached none is not in it."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_micros: int = 0
    """Millionths of a US dollar."""
    estimated: int = 0
    """How many settlements klatch counted itself."""
    first_token: Histogram = Histogram()
    total: Histogram = Histogram()

    def merge(self, other: "Tally") -> "Tally":
        """Both together."""
        return Tally(
            requests=self.requests + other.requests,
            ended=_add(self.ended, other.ended),
            refusals=_add(self.refusals, other.refusals),
            verdicts=_add(self.verdicts, other.verdicts),
            blocks=_add(self.blocks, other.blocks),
            redactions=_add(self.redactions, other.redactions),
            served=_add(self.served, other.served),
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
            cost_micros=self.cost_micros + other.cost_micros,
            estimated=self.estimated + other.estimated,
            first_token=self.first_token.merge(other.first_token),
            total=self.total.merge(other.total),
        )


class Group(NamedTuple):
    """What is counted apart."""

    tenant: str
    model: str
    """Empty for verdicts, which know no model, and for requests that name none."""


class Row(msgspec.Struct, frozen=True):
    """A table's value: a tally, and the offset of the last record in it."""

    offset: int
    tally: Tally


COUNTED = (ChatRequested, EmbeddingRequested, UsageSettled, ChatRefused, TrustVerdict)
"""What `measure` counts: all else need not be decoded."""


def measure(event: Event) -> tuple[Group, Tally] | None:
    """What an event adds to which group; None for an event that views do not count."""
    match event:
        case ChatRequested():
            return Group(event.tenant, _name(event.body.get("model"))), Tally(requests=1)
        case EmbeddingRequested():
            return Group(event.tenant, _name(event.model)), Tally(requests=1)
        case UsageSettled():
            return Group(event.tenant, _name(event.model)), _settled(event)
        case ChatRefused():
            rejected: Status = "rejected"
            refusals = {event.refusal.limit or event.refusal.code: 1}
            return Group(event.tenant, _name(event.model)), Tally(ended={rejected: 1}, refusals=refusals)
        case TrustVerdict():
            return Group(event.tenant, ""), _judged(event)
        case _:
            return None


def count(row: Row | None, offset: int, tally: Tally) -> Row:
    """The row with `tally` of the record at `offset` in it; the same row if it has been counted."""
    if row is None:
        return Row(offset, tally)
    if offset <= row.offset:
        return row
    return Row(offset, row.tally.merge(tally))


def by_group(tallies: Iterable[tuple[Group, Tally]]) -> dict[Group, Tally]:
    """One tally a group."""
    merged = dict[Group, Tally]()
    for group, tally in tallies:
        merged[group] = merged[group].merge(tally) if group in merged else tally
    return merged


def _settled(event: UsageSettled) -> Tally:
    first = event.first_token_ms
    return Tally(
        ended={event.status: 1},
        served={_name(event.deployment): 1} if event.deployment else {},
        prompt_tokens=event.usage.prompt_tokens,
        completion_tokens=event.usage.completion_tokens,
        cost_micros=event.cost_micros,
        estimated=int(event.usage.estimated),
        first_token=Histogram() if first is None else Histogram.of(first),
        total=Histogram.of(event.total_ms),
    )


def _judged(event: TrustVerdict) -> Tally:
    categories = dict.fromkeys(event.categories, 1)
    return Tally(
        verdicts={event.decision: 1},
        blocks=categories if event.decision == "block" else {},
        redactions=categories if event.decision == "redact" else {},
    )


def _name(name: object) -> str:
    return "".join(filter(str.isprintable, name))[:NAME_LENGTH] if isinstance(name, str) else ""


def _add(one: Counts, two: Counts) -> Counts:
    if not one or not two:
        return one or two
    return {name: one.get(name, 0) + two.get(name, 0) for name in one.keys() | two.keys()}
