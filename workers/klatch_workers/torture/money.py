"""Whether a request was billed once, for what it really used, at the price that it has.

What it used is known from the model server: the tokens of a reply that was completed, and those of the prompt of the
call that made it. Of a reply that was cut, only bounds are known: what stands, and what was written.
"""

from collections.abc import Iterator
from fractions import Fraction
from math import ceil

from klatch_schemas.events import ChatAdmitted, Usage, UsageSettled
from klatch_workers.torture.case import Case
from klatch_workers.torture.report import Violation
from klatch_workers.torture.tenants import PRICES
from klatch_workers.torture.tokens import tokens_of


def missettled(case: Case) -> Iterator[Violation]:
    """What is wrong with the bill of one request."""
    admitted = any(isinstance(entry.said, ChatAdmitted) for entry in case.decisions)
    ids = {entry.event_id for entry in case.settlements}
    if len(ids) != admitted:
        yield case.broke("missettled", f"{len(ids)} settlements, not {int(admitted)}", *case.settlements)
    settled = [entry.said for entry in case.settlements if isinstance(entry.said, UsageSettled)]
    if len({(one.status, one.usage.model_dump_json(), one.cost_micros) for one in settled}) > 1:
        yield case.broke("missettled", "a repeated settlement says something else", *case.settlements)
    if settled and (problem := _wrong_amount(case, settled[0]) or _wrong_price(case, settled[0])):
        # The first in the log counts: admission drops the reservation with it.
        yield case.broke("missettled", problem, case.settlements[0])


def _wrong_amount(case: Case, settled: UsageSettled) -> str | None:
    told, charged = case.told, settled.usage.completion_tokens
    end = told.assembly.end
    if settled.status != told.outcome:
        return f"settled as {settled.status}, ended as {told.outcome}"
    if end and end.usage and end.usage != settled.usage:
        return "settled is another usage than the end's"
    if told.outcome == "completed" and not (settled.usage.estimated or case.stopped):
        if charged != case.asked.turn.tokens:
            return f"{charged} tokens settled of {case.asked.turn.tokens}"
        prompt, counted = settled.usage.prompt_tokens, _prompt_of(case)
        if counted is not None and prompt != counted:
            return f"{prompt} tokens of the prompt settled, and {counted} counted by the model server"
    spoke = len(tokens_of(told.text))
    if not spoke <= charged <= max(told.written, spoke):
        return f"{charged} tokens settled; {spoke} stand, and {told.written} deltas were written"
    return None


def _prompt_of(case: Case) -> int | None:
    """What the model server counted in the prompt of the call that made the whole reply, if there is one."""
    tokens = tokens_of(case.told.text)
    if case.told.continued or not tokens:
        return None
    return next((call.prompt_tokens for call in case.calls if call.id == tokens[-1].call), None)


def _wrong_price(case: Case, settled: UsageSettled) -> str | None:
    due = _due(case, settled.usage)
    if settled.cost_micros == due or unpriced(case, settled):
        return None
    return f"{settled.cost_micros} micros settled for tokens that cost {due}"


def unpriced(case: Case, settled: UsageSettled) -> bool:
    """Whether nothing was billed for a prompt with a price since no deployment answered it.

    So it is with what every deployment refused, or was cut before one was asked. Text that stands is somebody's.
    """
    nobodys = not (settled.cost_micros or settled.deployment or tokens_of(case.told.text))
    return nobodys and _due(case, settled.usage) > 0


def _due(case: Case, usage: Usage) -> int:
    """In millionths of a dollar, rounded up: only the model of people has a price, for all its tokens alike."""
    if not case.asked.turn.person:
        return 0
    return ceil(Fraction(PRICES.prompt) * usage.prompt_tokens + Fraction(PRICES.completion) * usage.completion_tokens)
