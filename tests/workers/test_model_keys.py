"""Keys of model servers: from where a keys file says, current, and in no error."""

import os
from pathlib import Path

import pytest

from klatch_agents.gateway.errors import MisconfiguredError
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


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[keys]\n", "has no key 'wanted': add it"),
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
