"""Keys of model servers: from where a keys file says, current, and in no error."""

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import pytest
import uvloop
from structlog.testing import capture_logs

from klatch_agents.gateway.errors import MisconfiguredError, RefusedError
from klatch_agents.gateway.openai_compatible import Endpoint, OpenAICompatible
from klatch_agents.testing.upstream import Upstream
from klatch_workers.model_keys import ModelKeys

SECRET = "sk-very-secret-value"  # noqa: S105 - of this test alone


def keys_file(folder: Path, text: str) -> Path:
    path = folder / "keys.toml"
    path.write_text(text)
    return path


async def test_a_key_comes_from_the_file_itself_or_from_where_it_says(tmp_path: Path) -> None:
    (tmp_path / "one").write_text(SECRET + "\n")
    os.environ["TEST_OF_MODEL_KEYS"] = "from the environment"
    text = f"""
    [keys]
    plain = "{SECRET}"
    file = {{ file = "{tmp_path / "one"}" }}
    env = {{ env = "TEST_OF_MODEL_KEYS" }}
    command = {{ command = ["printf", "from a command"] }}
    """
    try:
        keys = ModelKeys(keys_file(tmp_path, text))
        said = [await keys.named(name)() for name in ("plain", "file", "env", "command")]
    finally:
        del os.environ["TEST_OF_MODEL_KEYS"]
    assert said == [SECRET, SECRET, "from the environment", "from a command"]
    assert SECRET not in repr(keys)
    assert SECRET not in str(vars(keys))


async def test_a_key_that_is_renewed_is_used_without_a_restart(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("old")
    path = keys_file(tmp_path, f'[keys]\ntoken = {{ file = "{token}" }}\nplain = "old"')
    keys = ModelKeys(path)
    assert [await keys.named("token")(), await keys.named("plain")()] == ["old", "old"]
    token.write_text("new")
    path.write_text(path.read_text().replace('"old"', '"new"'))
    os.utime(path, (0, 0))
    assert [await keys.named("token")(), await keys.named("plain")()] == ["new", "new"]


async def test_a_command_is_run_again_only_after_its_time(tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    command = f'["sh", "-c", "echo x >> {counter}; wc -l < {counter}"]'
    text = f"[keys]\nkept = {{ command = {command}, every_s = 1000 }}"
    keys = ModelKeys(keys_file(tmp_path, text))
    assert [await keys.named("kept")() for _ in range(3)] == ["1", "1", "1"]
    brief = ModelKeys(keys_file(tmp_path, text.replace("1000", "1e-9")))
    assert [await brief.named("kept")() for _ in range(2)] == ["2", "3"]


@dataclass
class Clock:
    """Moves when a test says so."""

    now: float = 1_000.0

    def __call__(self) -> float:
        return self.now


def command_of(folder: Path, then: str, every_s: float = 100) -> str:
    """A command that counts its runs in `runs`."""
    return f"{{ command = ['sh', '-c', 'echo run >> {folder}/runs; {then}'], every_s = {every_s} }}"


def runs_in(folder: Path) -> int:
    return len((folder / "runs").read_text().splitlines())


async def test_a_command_that_hangs_is_run_once_for_all_who_wait_and_holds_up_no_other_key(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    hangs = command_of(tmp_path, f"cat {tmp_path}/fifo; exit 1")
    keys = ModelKeys(keys_file(tmp_path, f"[keys]\nhangs = {hangs}\nother = {{ command = ['echo', 'b'] }}"), Clock())
    waiting: list[asyncio.Future[str]] = [asyncio.ensure_future(keys.named("hangs")()) for _ in range(4)]
    await asyncio.sleep(0)
    assert [await keys.named("other")() for _ in range(2)] == ["b", "b"]
    assert not any(one.done() for one in waiting)
    # Who leaves takes nothing from the others.
    waiting[0].cancel()
    await asyncio.to_thread((tmp_path / "fifo").write_text, SECRET)
    left, *failed = cast("list[object]", await asyncio.gather(*waiting, return_exceptions=True))
    assert isinstance(left, asyncio.CancelledError)
    assert {type(one) for one in failed} == {MisconfiguredError}
    with pytest.raises(MisconfiguredError, match="ended with 1"):
        await keys.named("hangs")()
    assert runs_in(tmp_path) == 1


async def test_a_token_that_is_not_renewed_is_used_for_as_long_again_and_its_command_rests(tmp_path: Path) -> None:
    token, clock = tmp_path / "token", Clock()
    keys = ModelKeys(keys_file(tmp_path, f"[keys]\nkept = {command_of(tmp_path, f'cat {token}')}"), clock, renewal_s=30)
    told = list[tuple[str, int]]()

    async def ask(after_s: float) -> None:
        clock.now += after_s
        told.append((await keys.named("kept")(), runs_in(tmp_path)))

    token.write_text(SECRET)
    with capture_logs() as logged:
        await ask(0)
        token.unlink()
        for after_s in (99, 1, 9, 1):
            await ask(after_s)
        token.write_text("new")
        for after_s in (9, 1):
            await ask(after_s)
    assert told == [*((SECRET, runs) for runs in (1, 1, 2, 2, 3, 3)), ("new", 4)]
    assert [one["event"] for one in logged if one["log_level"] == "warning"] == ["model_key.not_renewed"] * 2
    assert SECRET not in str(logged)
    token.unlink()
    await ask(199)
    clock.now += 10
    with pytest.raises(MisconfiguredError, match="ended with 1"):
        await keys.named("kept")()


async def test_while_a_command_hangs_the_last_token_is_used_and_the_run_goes_on(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    clock, path = Clock(), tmp_path / "fifo"
    then = f"test $(wc -l < {tmp_path}/runs) = 1 && echo {SECRET} || cat {path}"
    keys = ModelKeys(keys_file(tmp_path, f"[keys]\nkept = {command_of(tmp_path, then)}"), clock, renewal_s=0)
    assert await keys.named("kept")() == SECRET
    clock.now += 100
    assert [await keys.named("kept")() for _ in range(3)] == [SECRET] * 3
    assert "model-key" in {task.get_name() for task in asyncio.all_tasks()}, "the run goes on"
    pipe = await asyncio.to_thread(path.open, "w")
    clock.now += 99
    assert await keys.named("kept")() == SECRET
    # Then it is used up, and calls wait.
    clock.now += 1
    waiting: list[asyncio.Future[str]] = [asyncio.ensure_future(keys.named("kept")()) for _ in range(2)]
    await asyncio.sleep(0)
    assert not any(one.done() for one in waiting)
    with pipe:
        pipe.write("new")
    assert await asyncio.gather(*waiting) == ["new", "new"]
    assert await keys.named("kept")() == "new"
    assert runs_in(tmp_path) == 2


async def test_a_command_in_time_gives_its_new_token_to_the_call_that_began_it(tmp_path: Path) -> None:
    clock = Clock()
    then = f"wc -l < {tmp_path}/runs"
    keys = ModelKeys(keys_file(tmp_path, f"[keys]\nkept = {command_of(tmp_path, then)}"), clock, renewal_s=30)
    said = [await keys.named("kept")()]
    clock.now += 100
    said += await asyncio.gather(*(keys.named("kept")() for _ in range(2)))
    assert said == ["1", "2", "2"]


async def test_a_token_that_its_server_refuses_is_made_anew_for_the_next_call(tmp_path: Path) -> None:
    clock = Clock()
    keys = ModelKeys(keys_file(tmp_path, f"[keys]\nkept = {command_of(tmp_path, f'wc -l < {tmp_path}/runs')}"), clock)
    async with Upstream(key="2") as server:
        endpoint = Endpoint(server.url, key_of=keys.named("kept"))
        async with OpenAICompatible(endpoint) as gateway, OpenAICompatible(endpoint) as other:
            clock.now += 10
            for one in (gateway, other):
                with pytest.raises(RefusedError):
                    await one.models()
            clock.now += 10
            await asyncio.gather(*(one.models() for one in (gateway, other) * 4))
    assert runs_in(tmp_path) == 2


async def test_a_token_that_is_refused_again_and_again_is_made_once_in_a_while(tmp_path: Path) -> None:
    clock = Clock()
    path = keys_file(tmp_path, f"[keys]\nkept = {command_of(tmp_path, 'echo the same')}")
    key = ModelKeys(path, clock).named("kept")
    await key()
    for _ in range(20):
        clock.now += 1
        assert tuple(await asyncio.gather(key("the same"), key("an older one"), key())) == ("the same",) * 3
    assert runs_in(tmp_path) == 3, "one in ten seconds"


async def test_where_a_refused_token_cannot_be_made_anew_the_others_use_it_on(tmp_path: Path) -> None:
    """Another server may take it."""
    clock = Clock()
    then = f"test $(wc -l < {tmp_path}/runs) = 1 && echo {SECRET}"
    key = ModelKeys(keys_file(tmp_path, f"[keys]\nkept = {command_of(tmp_path, then)}"), clock).named("kept")
    await key()
    clock.now += 10
    for _ in range(3):
        assert tuple(await asyncio.gather(key(SECRET), key())) == (SECRET, SECRET)
    assert runs_in(tmp_path) == 2


LOOPS = pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])


@LOOPS
def test_when_a_process_stops_so_does_what_the_shell_of_a_command_started(
    tmp_path: Path, loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    os.mkfifo(tmp_path / "fifo")
    path = keys_file(
        tmp_path, f"[keys]\nhangs = {command_of(tmp_path, f'(sleep 20; echo left) > {tmp_path}/fifo; true')}"
    )

    async def stopped() -> IO[str]:
        asking = asyncio.ensure_future(ModelKeys(path).named("hangs")())
        pipe = await asyncio.to_thread((tmp_path / "fifo").open)
        assert not asking.done()
        return pipe

    with asyncio.Runner(loop_factory=loop) as runner:
        pipe = runner.run(stopped())
    with pipe:
        assert pipe.read() == "", "it ended without a word"


@LOOPS
def test_no_stop_waits_for_what_has_left_the_session_of_its_command(
    tmp_path: Path, loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """`timeout` makes a process group of its own, and has the command's output open."""
    os.mkfifo(tmp_path / "fifo")
    path = keys_file(tmp_path, f"[keys]\nhangs = {command_of(tmp_path, f'timeout 20 cat {tmp_path}/fifo; true')}")

    async def stopped() -> int:
        asking = asyncio.ensure_future(ModelKeys(path).named("hangs")())
        pipe = await asyncio.to_thread(os.open, tmp_path / "fifo", os.O_WRONLY)
        assert not asking.done()
        return pipe

    with asyncio.Runner(loop_factory=loop) as runner:
        pipe = runner.run(stopped())
    # Nobody would read from it if `cat` had been waited for.
    assert os.write(pipe, b"\n") == 1
    os.close(pipe)


@pytest.mark.parametrize("source", ['"""{text}"""', "{{ file = '{path}' }}", "{{ command = ['cat', '{path}'] }}"])
async def test_a_key_loses_the_space_around_it_and_may_hold_no_line_end(tmp_path: Path, source: str) -> None:
    path = tmp_path / "key"

    async def key(text: str) -> str:
        path.write_text(text)
        return await ModelKeys(keys_file(tmp_path, f"[keys]\nwanted = {source.format(text=text, path=path)}")).named(
            "wanted"
        )()

    assert await key(f"{SECRET}\n") == SECRET
    with pytest.raises(MisconfiguredError, match="'wanted' has a line end") as refused:
        await key(f"{SECRET}\n{SECRET}")
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[keys]\n", "has no key 'wanted': add it"),
        ("[keys]\nwanted = { file = '/dev/null' }", "in /dev/null, which is empty"),
        ("[keys]\nwanted = { file = '/no/such/file' }", "cannot be read from /no/such/file"),
        ("[keys]\nwanted = { env = 'NO_SUCH_VARIABLE_HERE' }", r"\$NO_SUCH_VARIABLE_HERE, which is not set"),
        ("[keys]\nwanted = { command = ['false'] }", "ended with 1"),
        ("[keys]\nwanted = { command = ['/no/such/program'] }", "cannot be run"),
        ("[keys]\nwanted = { url = 'x' }", "wanted"),
        (f"[keys]\nwanted = '{SECRET}", "is not TOML"),
    ],
)
async def test_a_key_that_cannot_be_had_says_what_to_mend_and_no_secret(tmp_path: Path, text: str, says: str) -> None:
    keys = ModelKeys(keys_file(tmp_path, text))
    with pytest.raises(MisconfiguredError, match=says) as refused:
        await keys.named("wanted")()
    assert SECRET not in f"{refused.value!r}{refused.value.__cause__!r}"


async def test_without_a_keys_file_it_says_which_setting_is_missing() -> None:
    with pytest.raises(MisconfiguredError, match="KLATCH_KEYS_FILE"):
        await ModelKeys(None).named("wanted")()


def test_a_file_that_is_not_there_is_found_when_the_process_starts(tmp_path: Path) -> None:
    with pytest.raises(MisconfiguredError, match="cannot be read"):
        ModelKeys(tmp_path / "none.toml").check()
