"""Fixtures that every test folder may use."""

import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
import structlog
from hypothesis import settings

from klatch_workers.kafka import Cluster

# A run that a shell began in the background has SIGINT ignored, and so would have the processes that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes says how busy the machine is.
settings.register_profile("klatch", settings.default, deadline=None)
settings.load_profile("klatch")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of this project's own."""
    parser.addoption("--model-size", type=int, default=1, help="How large the small model is (tests/model): 1, 2 or 3.")
    parser.addoption(
        "--reply-minutes",
        type=float,
        default=0.5,
        help="How long the long reply lasts (tests/broker/test_long_generation.py).",
    )
    parser.addoption(
        "--vllm",
        metavar="PYTHON|URL",
        help="Run tests/vllm with the vLLM of this Python, or against this server; `make vllm` does.",
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """The vLLM lane takes an environment of its own: it is on demand."""
    return True if collection_path == _VLLM_LANE and not config.getoption("--vllm") else None


_VLLM_LANE = Path(__file__).with_name("vllm")


@pytest.fixture(autouse=True)
def _plain_logs() -> Iterator[None]:
    """A command that a test runs in this process sets up its logs: the next test must not inherit them."""
    _log_to_stderr()
    yield
    _log_to_stderr()


def _log_to_stderr() -> None:
    structlog.reset_defaults()
    # stdout is what commands print, and may be read by the next test when an earlier one's line comes late. Not
    # `sys.stderr`: of a test that captures it, it is closed by then.
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.__stderr__))


@pytest.fixture
def model_size(request: pytest.FixtureRequest) -> int:
    """How large the small model is to be."""
    size = request.config.getoption("--model-size", default=1)
    assert isinstance(size, int)
    return size


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def kafka(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    """One Kafka node for the whole session, started by the first test that asks: `kafka.bootstrap`.

    Tests share it: name topics and groups uniquely, or use a namespace of your own.
    """
    data: Path = tmp_path_factory.mktemp("kafka")
    async with Cluster(data) as cluster:
        yield cluster
