"""What views say: rows, Prometheus' text, and the table of `klatch top`."""

import json
import socket
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from click.testing import CliRunner, Result
from pydantic import SecretStr

from klatch_workers.cli.context import Context, ServerAddress
from klatch_workers.cli.top import table, top
from klatch_workers.settings import Settings
from klatch_workers.views.aggregate import Group, Tally
from klatch_workers.views.histogram import BOUNDS_MS, Histogram
from klatch_workers.views.report import exposition, rows_of

TALLIES = {
    Group("zeta", ""): Tally(verdicts={"block": 3, "redact": 1}, blocks={"injection": 3}),
    Group("acme", "m"): Tally(
        requests=12_345,
        ended={"completed": 9, "rejected": 2},
        served={"east": 7, "west": 2},
        prompt_tokens=2_500_000,
        cost_micros=31,
        first_token=Histogram.of(80),
        total=Histogram.of(2_000).merge(Histogram.of(900)),
    ),
}


def test_rows_are_sorted_and_have_every_status() -> None:
    first, second = rows_of(TALLIES)
    assert (first["tenant"], second["tenant"]) == ("acme", "zeta")
    assert [first[status] for status in ("completed", "rejected", "failed")] == [9, 2, 0]
    assert (first["served"], first["cost_micros"]) == ({"east": 7, "west": 2}, 31)
    assert second["first_token_ms"] == {"count": 0, "p50": None, "p95": None}


def test_metrics_are_counters_with_labels() -> None:
    lines = exposition(TALLIES, skipped=2).splitlines()
    assert 'klatch_requests_total{tenant="acme",model="m"} 12345' in lines
    assert 'klatch_ended_total{tenant="acme",model="m",status="rejected"} 2' in lines
    assert 'klatch_blocks_total{tenant="zeta",model="",category="injection"} 3' in lines
    assert 'klatch_served_total{tenant="acme",model="m",deployment="west"} 2' in lines
    assert 'klatch_cost_micros_total{tenant="acme",model="m"} 31' in lines
    assert "klatch_views_skipped_total 2" in lines


def test_a_histogram_ends_with_all_that_it_counts() -> None:
    lines = [line for line in exposition(TALLIES, 0).splitlines() if line.startswith("klatch_reply_seconds")]
    assert len(lines) == len(BOUNDS_MS) + 1 + 2
    assert lines[-3:] == [
        'klatch_reply_seconds_bucket{tenant="acme",model="m",le="+Inf"} 2',
        'klatch_reply_seconds_sum{tenant="acme",model="m"} 2.900',
        'klatch_reply_seconds_count{tenant="acme",model="m"} 2',
    ]


def test_a_label_cannot_break_out_of_its_quotes() -> None:
    lines = exposition({Group("acme", 'a"} 1\\'): Tally(requests=1)}, 0).splitlines()
    assert r'klatch_requests_total{tenant="acme",model="a\"} 1\\"} 1' in lines


def test_the_table_lines_up_and_shortens_numbers() -> None:
    lines = list(table({"complete": True, "rows": rows_of(TALLIES)}, "5"))
    assert lines == [
        "klatch: last 5 minutes",
        "",
        "TENANT  MODEL   REQS  DONE  CANC  FAIL  EXPD  REFUSED  BLOCKED  REDACTED  TOKENS IN  OUT"
        "  FIRST p50    p95  TOTAL p50    p95",
        "acme    m      12.3k     9     0     0     0        2        0         0    2500.0k    0"
        "      88 ms  99 ms      1.0 s  1.9 s",
        "zeta    (any)      0     0     0     0     0        0        3         1          0    0"
        "          -      -          -      -",
    ]


def test_the_table_says_when_others_count_the_rest() -> None:
    lines = list(table({"complete": False, "rows": []}, "1"))
    assert lines[:2] == ["klatch: this minute", "other views workers count the rest: ask each of them"]
    assert lines[-1] == "nothing yet"


def invoke(*options: str, data: Path, **environment: str) -> Result:
    return CliRunner().invoke(top, ["--once", "--data", str(data), *options], env=environment)


def test_without_a_key_top_says_where_to_get_one(tmp_path: Path) -> None:
    shown = invoke(data=tmp_path)
    assert shown.exit_code == 2
    assert "KLATCH_INTERNAL_KEY" in shown.output


def test_top_takes_its_source_from_what_klatch_up_wrote(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"views_url": "http://127.0.0.1:7/", "internal_key": "k"}))
    assert Context(Settings(data=tmp_path)).views() == ServerAddress("http://127.0.0.1:7", "k")


def test_settings_go_over_what_klatch_up_wrote(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"views_url": "http://127.0.0.1:7", "internal_key": "k"}))
    settings = Settings(data=tmp_path, views_url="http://views:8082", internal_key=SecretStr("other"))
    assert Context(settings).views() == ServerAddress("http://views:8082", "other")


def test_the_key_of_the_running_klatch_is_sent_to_no_other_views_worker(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"views_url": "http://127.0.0.1:7", "internal_key": "k"}))
    shown = invoke("--views-url", "http://127.0.0.1:9", data=tmp_path)
    assert (shown.exit_code, "KLATCH_INTERNAL_KEY" in shown.output) == (2, True)
    own = invoke("--views-url", "http://localhost:7/", data=tmp_path)
    assert (own.exit_code, "does not answer" in own.output) == (3, True)


def test_a_broken_run_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{")
    shown = invoke(data=tmp_path)
    assert (shown.exit_code, "run.json" in shown.output) == (2, True)


def test_a_worker_that_is_not_there_is_told_apart(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    shown = invoke("--json", data=tmp_path, KLATCH_VIEWS_URL=f"http://127.0.0.1:{port}", KLATCH_INTERNAL_KEY="k")
    assert shown.exit_code == 3
    assert "klatch worker views" in json.loads(shown.output)["error"]


def test_something_else_that_answers_is_told_apart(tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{other.server_port}"
        shown = invoke(data=tmp_path, KLATCH_VIEWS_URL=url, KLATCH_INTERNAL_KEY="k")
        other.shutdown()
    assert (shown.exit_code, "not klatch's views worker" in shown.output) == (1, True)


def test_a_misspelt_setting_is_misuse(tmp_path: Path) -> None:
    assert invoke(data=tmp_path, KLATCH_VIEW_URL="http://127.0.0.1:7").exit_code == 2
