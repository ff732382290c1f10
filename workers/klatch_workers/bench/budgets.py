"""The budgets of the design beside what one run measured, ratios wherever the design says ratios.

What a run cannot show (a peer that was not installed, an hour of memory) is listed as not measured, not left out.
"""

from collections.abc import Iterator

import msgspec

from klatch_workers.bench.report import DIRECT, KLATCH, PEER, RELAY, Budget, FirstToken, Report, ratio

_STAGE_MB = 120.0
_WITHOUT_MODELS = ("admission", "screening", "generation", "http", "views")


def budgets(report: Report) -> Report:
    """The report, completed."""
    made = [
        *_first_token(report),
        *_chunk_cpu(report),
        *_pace(report),
        *_admission(report),
        _fairness(report),
        _memory(report),
        *_recovery(report),
        *_start(report),
    ]
    return msgspec.structs.replace(report, budgets=made)


def _first_token(report: Report) -> list[Budget]:
    idle: FirstToken = report.first_token[0]
    added = idle.added[KLATCH]
    of_hops = ratio(added.p50, report.hops_ms.p50)
    found = [
        Budget(
            "added time to first token, idle, p50",
            "≤ 1.3 x three bare hops",
            f"{added.p50:.1f} ms = {of_hops:.2f} x {report.hops_ms.p50:.1f} ms",
            of_hops <= 1.3,
        ),
        Budget("the same, p95", "≤ 25 ms", f"{added.p95:.1f} ms", added.p95 <= 25),
    ]
    peer = idle.added.get(PEER)
    of_peer = ratio(added.p50, peer.p50) if peer else 0.0
    said = f"{of_peer:.2f} x {peer.p50:.1f} ms" if peer else "not measured"
    return [*found, Budget("the same, p50, beside LiteLLM's proxy", "≤ 1/2", said, of_peer <= 0.5 if peer else None)]


def _chunk_cpu(report: Report) -> list[Budget]:
    ours, relay = report.streams[KLATCH].total_cpu_us, report.streams[RELAY].total_cpu_us
    of_relay = ratio(ours, relay)
    peer = report.streams.get(PEER)
    of_peer = ratio(ours, peer.total_cpu_us) if peer else 0.0
    said = f"1/{ratio(1, of_peer):.1f} of {peer.total_cpu_us:.0f} µs" if peer else "not measured"
    known = ours > 0
    return [
        Budget(
            "CPU of all klatch processes a chunk",
            "≤ 2 x a bare relay through Kafka",
            f"{ours:.0f} µs = {of_relay:.2f} x {relay:.0f} µs" if known else "not measured",
            of_relay <= 2 if known else None,
        ),
        Budget("the same, beside LiteLLM's proxy", "≤ 1/8 (mark: 1/12)", said, of_peer <= 1 / 8 if peer else None),
    ]


def _pace(report: Report) -> list[Budget]:
    ours, direct = report.streams[KLATCH], report.streams[DIRECT]
    share, late = ratio(ours.got_per_s, direct.got_per_s), ours.gaps_ms.p99 - direct.gaps_ms.p99
    many = f"{ours.streams} streams at {ratio(ours.asked_per_s, ours.streams):.0f} tokens a second"
    return [
        Budget(f"{many}, chunks that came in time", "≥ 0.97 of direct", f"{share:.3f} of direct", share >= 0.97),
        Budget("the same, gap between tokens, p99", "≤ 30 ms above direct", f"{late:.1f} ms above", late <= 30),
    ]


def _admission(report: Report) -> Iterator[Budget]:
    what = "admission's decisions on one core"
    scoped = f"{what}, with limits for each person and model"
    for name, per_s in ((what, report.admission_per_s), (scoped, report.admission_scoped_per_s)):
        yield Budget(name, "≥ 20,000 a second", f"{per_s:,.0f} a second", per_s >= 20_000)


def _fairness(report: Report) -> Budget:
    found = report.flooded_ratio
    what = "p99 wait for a first token beside a tenant that floods 100 times as much (simulated)"
    return Budget(what, "< 2 x alone", f"{found:.2f} x" if found else "not measured", found < 2 if found else None)


def _memory(report: Report) -> Budget:
    limit = f"≤ {_STAGE_MB:.0f} MB each"
    resident = {name: report.rss_mb_end[name] for name in _WITHOUT_MODELS if name in report.rss_mb_end}
    if not resident:
        return Budget("memory of workers without models", limit, "not measured", None)
    largest = max(resident, key=lambda name: resident[name])
    return Budget(
        "memory of workers without models, after the load",
        limit,
        f"at most {resident[largest]:.0f} MB ({largest})",
        resident[largest] <= _STAGE_MB,
    )


def _recovery(report: Report) -> list[Budget]:
    found = report.recovery
    what = "kill -9 of generation: first new token after the group noticed"
    if found is None:
        return [Budget(what, "≤ 2 s", "not measured", None)]
    return [
        Budget(what, "≤ 2 s", f"{found.after_notice_s:.1f} s", found.after_notice_s <= 2),
        Budget(
            "the same: streams read complete", "all", f"{found.whole} of {found.streams}", found.whole == found.streams
        ),
    ]


def _start(report: Report) -> list[Budget]:
    if not report.starts:
        return [Budget("start of `klatch up`", "≤ 8 s", "not measured", None)]
    return [
        Budget(
            f"start of `klatch up` to its first answer, {start.data} data folder",
            "≤ 8 s",
            f"{start.first_token_s:.1f} s",
            start.first_token_s <= 8,
        )
        for start in report.starts
    ]
