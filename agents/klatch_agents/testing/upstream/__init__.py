"""A real OpenAI-compatible server on a local port that says what a test tells it to say."""

from klatch_agents.testing.upstream.exchange import Call
from klatch_agents.testing.upstream.script import Script
from klatch_agents.testing.upstream.server import Upstream

__all__ = ["Call", "Script", "Upstream"]
