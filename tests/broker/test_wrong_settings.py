"""A stage that cannot start says which setting it is, and what may be said there."""

import asyncio
from pathlib import Path

import pytest

from klatch_workers.kafka import Cluster
from klatch_workers.settings import Settings
from klatch_workers.wiring import MissingSetting, run_stage

pytestmark = pytest.mark.broker


@pytest.mark.parametrize("embedder", ["sentence-transformers:", "mini"])
async def test_an_embedder_that_is_none_is_told_what_there_is(kafka: Cluster, tmp_path: Path, embedder: str) -> None:
    async def begin() -> Settings:
        return Settings(kafka=kafka.bootstrap, data=tmp_path, embedder=embedder)

    with pytest.raises(MissingSetting, match="none of: minilm, sentence-transformers:NAME"):
        await run_stage("memory", begin, asyncio.Event(), lambda _facts: pytest.fail("it has no embedder"))
