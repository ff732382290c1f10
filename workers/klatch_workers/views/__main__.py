"""`python -m klatch_workers.views`: the views process alone, told by the environment, ended by SIGTERM or Ctrl-C."""

import asyncio
import signal
import sys

import structlog

from klatch_streams.log import LogError
from klatch_workers import event_loop
from klatch_workers.logs import configure_logs
from klatch_workers.settings import Settings, read_settings, what_is_wrong
from klatch_workers.views.run import ViewsFailed, run_views

log = structlog.get_logger(__name__)


async def _main(settings: Settings) -> int:
    configure_logs(settings.log_level)
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        await run_views(settings, stop, lambda facts: log.info("views.ready", **facts))
    except (LogError, ViewsFailed, OSError) as error:
        # The reason says what to do; where it was noticed says nothing.
        log.error("views.failed", reason=str(error))  # noqa: TRY400
        return 1
    return 0


if __name__ == "__main__":
    try:
        told = read_settings()
    except ValueError as wrong:
        sys.exit(f"error: {what_is_wrong(wrong)}")
    sys.exit(event_loop.run(_main(told)))
