"""Logs: one named fact a line with its fields, to stderr; JSON unless a person is looking.

Message text and keys are never among the fields: callers do not pass them.
"""

import logging
import sys

import structlog


def configure_logs(level: str, *, human: bool | None = None) -> None:
    """Set up structlog and the libraries' logging for this process."""
    number = logging.getLevelNamesMapping().get(level.upper(), logging.INFO)
    looking = sys.stderr.isatty() if human is None else human
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer() if looking else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        # A few microseconds a line; cached, a logger would keep what was configured when it first spoke.
        cache_logger_on_first_use=False,
    )
    # The Kafka client logs every reconnect of a broker that restarts; what matters of it is a fact of ours.
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(name)s %(levelname)s %(message)s")
    logging.getLogger("aiokafka").setLevel(logging.ERROR)
