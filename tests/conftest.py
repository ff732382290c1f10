"""Fixtures that every test folder may use."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from klatch_workers.kafka import Cluster


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of this project's own."""
    parser.addoption("--model-size", type=int, default=1, help="How large the small model is (tests/model): 1, 2 or 3.")


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
