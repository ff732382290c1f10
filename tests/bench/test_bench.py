"""`klatch bench` end to end, in its smallest size: that it measures everything it tells of. No figure is judged."""

import asyncio
import re
import sys
from pathlib import Path

import msgspec
import psutil
import pytest
from click.testing import CliRunner

from klatch_agents.testing.upstream import Upstream
from klatch_workers.bench import admission, fairness, render
from klatch_workers.bench.budgets import budgets
from klatch_workers.bench.client import Gaps, Reply, ReplyFailed, Target
from klatch_workers.bench.load import Seen, crowd
from klatch_workers.bench.peer import Peer, PeerFailed
from klatch_workers.bench.profile import table
from klatch_workers.bench.report import BROKER, DIRECT, KLATCH, PEER, RELAY, Report, quantiles
from klatch_workers.bench.run import TINY, measure
from klatch_workers.cli.bench import bench
from klatch_workers.up.everything import STAGES, free_address


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Of one run."""
    said = list[str]()
    found = asyncio.run(measure(tmp_path_factory.mktemp("bench"), TINY, said.append))
    assert said[0] == "deciding admissions"
    return found


@pytest.mark.broker
@pytest.mark.timeout(240)
def test_a_run_tells_of_every_side_process_and_budget(report: Report) -> None:
    sides = {DIRECT, KLATCH, RELAY}
    assert [found.concurrent for found in report.first_token] == [1, *TINY.concurrent]
    for found in report.first_token:
        assert set(found.sides) == sides
        assert set(found.added) == sides - {DIRECT}
        assert all(side.n for side in found.sides.values())
    assert report.hops_ms.n == TINY.idle_requests
    assert [step for step, found in report.path_ms.items() if found.n == TINY.idle_requests] == [
        *("requested", "admitted", "verdict", "opened", "first delta", "client")
    ]
    assert set(report.streams) == set(report.replies) == set(report.throughput) == sides
    assert all(side.got_per_s > 0 and side.gaps_ms.n for side in report.streams.values())
    assert set(report.streams[KLATCH].cpu_us) == {*STAGES, BROKER}
    assert set(report.streams[RELAY].cpu_us) == {"front", "back", BROKER}
    assert {*STAGES, BROKER} <= set(report.rss_mb_end)
    assert all(megabytes > 1 for megabytes in report.rss_mb_end.values())
    assert report.admission_per_s > report.admission_scoped_per_s > 0
    assert {budget.met for budget in report.budgets if budget.measured == "not measured"} == {None}
    assert any(budget.met is not None for budget in report.budgets)


@pytest.mark.broker
@pytest.mark.timeout(240)
def test_a_report_comes_back_from_json_and_into_a_page_between_its_marks(report: Report, tmp_path: Path) -> None:
    file, page = tmp_path / "bench.json", tmp_path / "page.md"
    file.write_bytes(msgspec.json.encode(report))
    page.write_text(f"# Mine\n\n{render.BEGIN}\nold figures\n{render.END}\n\nMine too.\n")
    shown = CliRunner().invoke(bench, ["--from", str(file), "--doc", str(page), "--json"], catch_exceptions=False)
    assert shown.exit_code == 0
    assert msgspec.json.decode(shown.stdout, type=Report) == report
    written = page.read_text()
    assert written.startswith(f"# Mine\n\n{render.BEGIN}\n")
    assert written.endswith(f"{render.END}\n\nMine too.\n")
    assert "old figures" not in written
    for budget in report.budgets:
        assert budget.measured in written
    assert "64 paced streams" not in written
    assert f"{TINY.streams} paced streams" in written


@pytest.mark.broker
@pytest.mark.timeout(240)
def test_a_page_without_marks_is_left_alone(report: Report, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Mine\n")
    with pytest.raises(render.NoMarks, match="no place for the figures"):
        render.write_into(page, report)
    assert page.read_text() == "# Mine\n"


@pytest.mark.broker
@pytest.mark.timeout(240)
def test_a_budget_that_is_missed_is_told_as_missed(report: Report) -> None:
    slow = msgspec.structs.replace(report, admission_per_s=20_000.0, admission_scoped_per_s=19_999.0)
    fast = msgspec.structs.replace(report, admission_per_s=19_999.0, admission_scoped_per_s=20_000.0)
    met = [[one.met for one in budgets(each).budgets if "admission" in one.what] for each in (slow, fast)]
    assert met == [[True, False], [False, True]]


@pytest.mark.broker
@pytest.mark.timeout(240)
def test_a_peer_is_judged_beside_klatch(report: Report) -> None:
    """Eight times klatch's CPU a chunk is what it may at least cost, twice the added time to first token."""
    ours, idle = report.streams[KLATCH], report.first_token[0]
    added = idle.added[KLATCH]
    verdicts = list[list[bool | None]]()
    for factor in (1.01, 0.99):
        theirs = msgspec.structs.replace(ours, total_cpu_us=ours.total_cpu_us * 8 * factor)
        slow = msgspec.structs.replace(added, p50=added.p50 * 2 * factor)
        beside = msgspec.structs.replace(
            report,
            streams={**report.streams, PEER: theirs},
            first_token=[msgspec.structs.replace(idle, added={**idle.added, PEER: slow})],
        )
        verdicts.append([one.met for one in budgets(beside).budgets if "LiteLLM" in one.what])
    assert verdicts == [[True, True], [False, False]]


async def test_a_peer_is_started_asked_and_stopped(tmp_path: Path) -> None:
    port = free_address().rpartition(":")[2]
    command = [sys.executable, "-m", "klatch_agents.testing.upstream", "--port", port]
    peer = Peer("fake", command, f"http://127.0.0.1:{port}", "/health", tmp_path / "fake.log")
    async with peer.running():
        assert (await (await peer.target.ask("fake?tokens=3")).whole()).chunks == 5
        assert psutil.pid_exists(peer.pid)
    assert not psutil.pid_exists(peer.pid)


async def test_a_peer_that_does_not_start_says_where_to_read_why(tmp_path: Path) -> None:
    log_file = tmp_path / "gone.log"
    peer = Peer("gone", [sys.executable, "-c", "print('no room')"], "http://127.0.0.1:9", "/", log_file)
    with pytest.raises(PeerFailed, match=r"gone ended with 0 .*gone\.log"):
        async with peer.running():
            raise AssertionError("it never serves")
    assert log_file.read_text() == "no room\n"


def test_quantiles_are_values_that_were_seen() -> None:
    found = quantiles([float(value) for value in range(100, 0, -1)])
    assert (found.n, found.p50, found.p95, found.p99) == (100, 50.0, 95.0, 99.0)
    assert quantiles([7.0]).p99 == 7.0
    assert quantiles([]).n == 0


@pytest.mark.parametrize("size", [1, 7, 1000])
async def test_the_client_counts_events_however_reads_cut_them(size: int) -> None:
    gaps = Gaps([], open=True)
    reply = Reply("fake", gaps)
    opening = b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
    token = b'data: {"choices":[{"delta":{"content":"word"}}]}\n\n'
    sent = b"HTTP/1.1 200 OK\r\n\r\n" + opening + token * 30 + b"data: [DONE]\n\n"
    for at in range(0, len(sent), size):
        reply.data_received(sent[at : at + size])
    await reply.whole()
    assert reply.chunks == 31
    assert reply.first_at is not None
    assert len(gaps.seconds) <= 30


async def test_the_client_reads_a_reply_to_its_end() -> None:
    async with Upstream() as upstream:
        reply = await (await Target("fake", upstream.url).ask("fake?tokens=30")).whole()
    assert reply.chunks == 32  # the opening, 30 tokens, the closing
    assert reply.first_token_ms > 0


async def test_a_crowd_asks_once_each_however_late_it_begins() -> None:
    seen = Seen()
    async with Upstream() as upstream:
        await crowd(Target("fake", upstream.url), "fake?tokens=3", 2, 0.0, dict[str, int], seen)
    assert (seen.replies, len(seen.first_token_ms), seen.chunks) == (2, 2, 10)


@pytest.mark.parametrize("script", ["status=500", "fault=drop", "fault=error-event", "fault=no-done"])
async def test_the_client_refuses_a_side_that_does_not_answer_to_the_end(script: str) -> None:
    async with Upstream() as upstream:
        reply = await Target("fake", upstream.url).ask(f"fake?tokens=4&{script}")
        with pytest.raises(ReplyFailed, match=r"^fake"):
            await reply.whole()


def test_admission_is_measured_on_requests_that_are_admitted() -> None:
    found = admission.measure(200)
    assert found["per_s"] > 0
    assert found["dump_bytes"] > 1_000


@pytest.mark.parametrize("case", fairness.CASES, ids=repr)
def test_a_tenant_that_floods_does_not_double_anothers_wait_for_a_first_token(case: fairness.Case) -> None:
    found = fairness.find(case, 300.0)
    assert found.calls > 100
    assert found.ratio < 2
    assert found.first_come.first_token > 20 * found.alone.first_token, "it is the queue that shields, not the load"


def test_a_profile_adds_up_to_the_time_that_was_spent() -> None:
    handle = "asyncio/events.py:Handle._run"
    stacks = {f"a.py:leaf;a.py:work;{handle};main": 3, "selectors.py:select;main": 1}
    told = table("generation", stacks, us_a_chunk=40.0)
    assert re.findall(r"([\d.]+)  (a.py:work|the event loop itself)$", told, re.MULTILINE)[:2] == [
        ("30.0", "a.py:work"),
        ("10.0", "the event loop itself"),
    ]
