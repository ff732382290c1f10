"""The topology of the stories: real admission, real rules and policy of trust, real policy of generation."""

from collections.abc import Iterator
from typing import cast

import pytest

from klatch_agents.trust.passages import passages
from klatch_agents.trust.policy import decide, load_policy
from klatch_agents.trust.redact import redact
from klatch_agents.trust.rules import RulesJudge
from klatch_schemas.codec import loads
from klatch_schemas.events import ChatRequested, Event, TrustVerdict
from klatch_schemas.ids import Conversation, RequestId, Tenant
from klatch_schemas.records import Record
from klatch_schemas.topics import TRUST_VERDICTS
from klatch_streams import topology
from klatch_streams.admission import Admission
from klatch_streams.driver import DeciderStage, DoerStage, Driver
from klatch_streams.driver_generation import Chunk, GenerationStage, ModelRefused, Wait
from klatch_streams.kernel import Emit

ACME = Tenant("acme")


class Story:
    """A driver, and the words of the stories."""

    def __init__(self) -> None:
        self.judge, self.policy = RulesJudge(), load_policy()
        self.asked = list[str]()
        """What the model was asked, last user message by last user message."""
        self.admission = DeciderStage(Admission())
        self.driver = Driver(
            self.admission,
            DoerStage(topology.SCREENING, self._screen),
            GenerationStage(self._answer),
        )

    def request(
        self, text: str = "a b c", request: str = "r1", *, conversation: str = "c1", deadline_ms: int | None = None
    ) -> ChatRequested:
        """A request; the model repeats its words. The word `wait` takes it a second, `fail` breaks it."""
        return ChatRequested(
            request=RequestId(request),
            tenant=ACME,
            conversation=Conversation(conversation),
            body={"model": "echo", "max_tokens": 50, "messages": [{"role": "user", "content": text}]},
            deadline_ms=deadline_ms,
        )

    def text(self, request: str = "r1") -> str:
        """The text that stands, as a reader who comes now puts it together."""
        return "".join(str(loads(bytes(said.chunk))["text"]) for said in self.driver.reply(request).standing)

    def status(self, request: str = "r1") -> str | None:
        return self.driver.reply(request).state.status

    def _screen(self, _: Record, event: Event) -> list[Emit]:
        if not isinstance(event, ChatRequested):
            return []
        findings = [finding for passage in passages(event.body) for finding in self.judge.find(passage)]
        said = decide(findings, self.policy, event.use_case)
        verdict = TrustVerdict(
            request=event.request,
            tenant=event.tenant,
            conversation=event.conversation,
            stage="input",
            decision=said.decision,
            categories=said.categories,
            findings=said.findings,
            policy=said.policy,
        )
        return [Emit(TRUST_VERDICTS, event.conversation, verdict)]

    def _answer(self, asked: ChatRequested, verdict: TrustVerdict) -> Iterator[Chunk | Wait]:
        body = redact(asked.body, verdict.findings) if verdict.decision == "redact" else asked.body
        text = cast("list[dict[str, str]]", body["messages"])[-1]["content"]
        self.asked.append(text)
        for word in text.split():
            if word == "fail":
                raise ModelRefused("the model server is on fire")
            yield Wait(1_000) if word == "wait" else {"text": f"{word} "}


@pytest.fixture
def story() -> Story:
    return Story()
