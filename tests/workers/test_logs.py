"""Logs tell what failed and where, and never in the words of who was failed: these may quote a message."""

import subprocess
import sys
from typing import Final

import pytest
import structlog
from pydantic import BaseModel, ValidationError

from klatch_workers.logs import trace_of

WORDS: Final = "my mother's maiden name"

LOGGING: Final = f"""
import logging, structlog
from klatch_workers.logs import configure_logs

configure_logs("info", human={{human}})
try:
    int({WORDS!r})
except ValueError as error:
    structlog.get_logger().warning("supervisor.failed", exc_info=error)
    logging.getLogger("a.library").exception("it failed")
"""


class Asked(BaseModel):
    count: int


def fail() -> Exception:
    """A failure behind a failure, each with the words of a message."""
    failed = RuntimeError(WORDS)
    try:
        try:
            Asked.model_validate({"count": WORDS})
        except ValidationError as error:
            raise failed from error
    except RuntimeError:
        return failed
    return AssertionError("nothing failed")


def test_a_trace_tells_the_types_and_places_of_what_failed_and_of_its_cause() -> None:
    trace = trace_of(fail())
    assert WORDS in str(fail().__cause__), "otherwise this tests nothing"
    assert WORDS not in trace
    assert trace.index("ValidationError") < trace.index("then:") < trace.index("RuntimeError")
    assert "test_logs.py" in trace


def test_of_a_group_every_failure_is_told() -> None:
    trace = trace_of(ExceptionGroup(WORDS, [fail(), ValueError(WORDS)]))
    assert WORDS not in trace
    assert all(name in trace for name in ("ValidationError", "RuntimeError", "ValueError", "ExceptionGroup"))


def test_an_error_that_is_its_own_cause_is_told_once() -> None:
    error = ValueError(WORDS)
    error.__cause__ = error
    assert trace_of(error) == "ValueError"


def test_the_operating_system_may_speak() -> None:
    assert trace_of(ConnectionRefusedError(111, "Connection refused")) == (
        "ConnectionRefusedError: [Errno 111] Connection refused"
    )


@pytest.mark.parametrize("human", [False, True])
def test_a_process_logs_failures_without_their_words(human: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOGGING.format(human=human)], capture_output=True, text=True, check=True, timeout=60
    )
    assert "supervisor.failed" in done.stderr
    assert done.stderr.count("ValueError") == 2
    assert WORDS not in done.stderr


def test_what_is_logged_while_a_test_runs_is_not_what_a_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    """A log line may come late, of something that an earlier test has left to end by itself."""
    structlog.get_logger("klatch.test").warning("late")
    assert capsys.readouterr().out == ""
