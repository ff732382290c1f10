"""Fixtures that every test folder may use."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from klatch_workers.kafka import Cluster


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def kafka(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    """One Kafka node for the whole session, started by the first test that asks: `kafka.bootstrap`.

    Tests share it: name topics and groups uniquely, or use a namespace of your own.
    """
    data: Path = tmp_path_factory.mktemp("kafka")
    async with Cluster(data) as cluster:
        yield cluster
