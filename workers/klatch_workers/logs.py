"""Logs: one named fact a line with its fields, to stderr; JSON unless a person is looking.

Message text and keys are never among the fields: callers do not pass them. What an exception says of itself may quote
them (pydantic names the wrong value, a JSON parser its text), so tracebacks tell the types and the places, and words
only of the operating system.
"""

import logging
import sys
import traceback
from collections.abc import Iterator
from types import TracebackType
from typing import cast

import structlog

Failure = tuple[type[BaseException], BaseException, TracebackType | None]


def configure_logs(level: str, *, human: bool | None = None) -> None:
    """Set up structlog and the libraries' logging for this process."""
    number = logging.getLevelNamesMapping()[level.upper()]
    looking = sys.stderr.isatty() if human is None else human
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer() if looking else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.ExceptionRenderer(_of_failure),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        # A few microseconds a line; cached, a logger would keep what was configured when it first spoke.
        cache_logger_on_first_use=False,
    )
    # The Kafka client logs every reconnect of a broker that restarts; what matters of it is a fact of ours.
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Wordless("%(name)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("aiokafka").setLevel(logging.ERROR)


def trace_of(error: BaseException) -> str:
    """The traceback of an error and of what caused it, first things first, without their own words."""
    return "\n".join(_lines(error, set())).rstrip()


def _lines(error: BaseException, told: set[int]) -> Iterator[str]:
    told.add(id(error))
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    for earlier in (before, *_within(error)):
        if earlier and id(earlier) not in told:
            yield from _lines(earlier, told)
            yield "then:"
    yield from (line.rstrip() for line in traceback.format_tb(error.__traceback__))
    yield f"{type(error).__name__}: {error}" if isinstance(error, OSError) else type(error).__name__


def _within(error: BaseException) -> tuple[BaseException, ...]:
    return cast("BaseExceptionGroup[BaseException]", error).exceptions if isinstance(error, BaseExceptionGroup) else ()


def _of_failure(exc_info: Failure) -> str:
    return trace_of(exc_info[1])


class _Wordless(logging.Formatter):
    """The same for what libraries log."""

    def formatException(self, ei: Failure | tuple[None, None, None]) -> str:  # noqa: N802 - the library's name
        return trace_of(ei[1]) if ei[1] else ""
