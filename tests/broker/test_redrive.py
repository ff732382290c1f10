"""`klatch redrive` on a running stack: what nobody mended dies again, what may be answered is answered once."""

import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest

from klatch_schemas import codec
from klatch_schemas.events import ChatRequested
from klatch_schemas.ids import Conversation, RequestId, Tenant
from klatch_schemas.records import Draft, Record
from klatch_schemas.topics import CHAT_REQUESTS, DEAD_LETTERS
from klatch_streams import dead_headers as dead
from klatch_streams.addresses import MOVED_FROM

if TYPE_CHECKING:
    from tests.broker.conftest import Stack

pytestmark = pytest.mark.broker


async def redrive(stack: "Stack", *options: str) -> list[dict[str, Any]]:
    """`klatch redrive --json` as an operator runs it beside `klatch up`."""
    main = "from klatch_workers.cli import main; main(prog_name='klatch')"
    ours = {name: value for name, value in os.environ.items() if not name.startswith("KLATCH_")}
    command = (sys.executable, "-c", main, "redrive", "--json", "--data", str(stack.up.data), *options)
    process = await asyncio.create_subprocess_exec(*command, stdout=PIPE, stderr=PIPE, env=ours)
    async with asyncio.timeout(120):
        out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return [json.loads(line) for line in out.decode().splitlines()]


async def died(stack: "Stack", what: str, times: int) -> Record:
    """The letter of the record with this `what` header that had been redriven so often."""
    return await stack.until_record(
        DEAD_LETTERS,
        lambda record: record.header("what") == what.encode() and record.header(dead.REDRIVEN) == b"%d" % times,
    )


async def test_a_record_that_nobody_mended_dies_again_and_one_that_can_be_answered_is_answered_once(
    stack: "Stack",
) -> None:
    topic, what = stack.namespace.of(CHAT_REQUESTS), uuid4().hex
    request = ChatRequested(
        request=RequestId(uuid4().hex),
        tenant=Tenant("acme"),
        conversation=Conversation(what),
        body={"model": "fake?text=after all", "messages": [{"role": "user", "content": "hi"}]},
    )
    # Said to have been moved, and under a wrong key: nobody moves it once more, until it is redriven.
    moved = [("what", what.encode()), (MOVED_FROM, b"elsewhere/0/0")]
    await stack.log.append(
        [
            Draft(topic, f"{what}-bad".encode(), b"{bad", [("what", b"bad" + what.encode())]),
            Draft(topic, f"{what}-lost".encode(), codec.encode(request), moved),
        ]
    )
    bad, lost = await asyncio.gather(died(stack, f"bad{what}", 0), died(stack, what, 0))
    assert (bad.header(dead.REASON), lost.header(dead.REASON)) == (b"unreadable", b"mis-keyed")
    ours = ("--key", f"{what}-bad", "--key", f"{what}-lost")

    shown = await redrive(stack, *ours)
    assert [one["state"] for one in shown[:-1]] == ["ready", "ready"]
    assert shown[-1]["dry_run"] is True

    done = await redrive(stack, *ours, "--yes")
    assert done[-1] == {"letters": 2, "redriven": 2, "dry_run": False}
    again = await died(stack, f"bad{what}", 1)
    assert (again.value, again.header(dead.ATTEMPTS)) == (b"{bad", b"2")
    assert again.header(dead.ORIGIN) == bad.header(dead.ORIGIN)
    assert (await stack.story(request.request)).ends[0].status == "completed"

    known = await redrive(stack, *ours, "--yes", "--max-redrives", "1")
    assert sorted(one["state"] for one in known[:-1]) == ["answered", "guarded"]
    # Two operators at once, who insist.
    await asyncio.gather(*(redrive(stack, "--key", f"{what}-lost", "--yes", "--again") for _ in range(2)))
    assert await stack.text("fake?text=next", conversation=what) == "next"
    story = await stack.story(request.request)
    assert len(story.ends) == len(story.settlements) == len(story.told) == 1
    assert story.said_by(1) == "after all"
