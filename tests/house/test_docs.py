"""Docs that cannot drift: links lead somewhere, and every command, option, setting and target they name exists."""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from klatch_workers.cli import main
from klatch_workers.settings import PREFIX, Settings

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md")))

LINK = re.compile(r"(?<!!)\[[^\]]*\]\((?!https?:|mailto:)([^)\s]*)\)")
HEADING = re.compile(r"^#+ (.+?)\s*$", re.MULTILINE)
FENCE = re.compile(r"^(?:```|~~~).*?^(?:```|~~~)\s*$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"^```(?:sh|bash|console|shell)?\b[^\n]*\n(.*?)^```|`([^`\n]+)`", re.MULTILINE | re.DOTALL)
# Up to what a shell would read as the end of the command.
COMMAND = re.compile(r"(?:^|[\s$(;&|])klatch((?: +[^\s`|;&#<>()\"']+)+)")
PATH = re.compile(r"^(?:schemas|streams|agents|workers|tests|docs|compose|\.ci)/[\w./-]+$")
SETTING = re.compile(rf"\b{PREFIX}[A-Z_]+\b")


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def snippets(page: Path) -> Iterator[str]:
    """Code in a page: fenced blocks of shell, and inline."""
    for fenced, inline in CODE.findall(text(page)):
        yield (fenced or inline).replace("\\\n", " ")


def slug(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def inner(command: click.Command, name: str) -> click.Command | None:
    """A command of a group; klatch's own group imports it only now."""
    return command.get_command(click.Context(command), name) if isinstance(command, click.Group) else None


def names(command: click.Command) -> list[str]:
    return command.list_commands(click.Context(command)) if isinstance(command, click.Group) else []


def unknown(words: list[str]) -> str | None:
    """What of `klatch WORDS` does not exist: a command or an option of it."""
    command: click.Command = main
    options = {"--help"}
    for word in words:
        options |= {option for known in command.params for option in (*known.opts, *known.secondary_opts)}
        if word.startswith("-"):
            if word.split("=")[0] not in options:
                return f"{command.name} has no option {word}"
        elif names(command) and not stands_for_another(word):
            found = inner(command, word)
            if found is None:
                return f"{command.name} has no command {word}"
            command = found
    return None


def stands_for_another(word: str) -> bool:
    """`COMMAND`, `<stage>`, `start|stop` and `…` in a page are not meant to be typed."""
    return word.isupper() or not word.isascii() or word[0] in "<["


def explain(command: click.Command, path: tuple[str, ...]) -> Iterator[str]:
    """What is wrong with the help of a command and of all below it."""
    shown = CliRunner().invoke(main, [*path, "--help"])
    paragraphs = shown.output.split("\n\n")
    if shown.exit_code != 0 or "Usage: " not in paragraphs[0]:
        yield f"{path}: {shown.output}"
    elif len(paragraphs) < 2 or paragraphs[1].startswith("Options:"):
        yield f"{path} has no help text"
    for name in names(command):
        found = inner(command, name)
        assert found, f"{path} lists {name} and does not have it"
        yield from explain(found, (*path, name))


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_every_link_leads_to_a_file_and_a_heading_that_exist(page: Path) -> None:
    assert [link for link in LINK.findall(FENCE.sub("", text(page))) if not leads_somewhere(page, link)] == []


def leads_somewhere(page: Path, link: str) -> bool:
    file, _, anchor = link.partition("#")
    target = (page.parent / file).resolve() if file else page
    return target.exists() and (not anchor or anchor in anchors(target))


def anchors(page: Path) -> set[str]:
    return {slug(heading) for heading in HEADING.findall(FENCE.sub("", text(page)))}


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_every_path_that_a_page_names_exists(page: Path) -> None:
    named = {snippet for snippet in snippets(page) if PATH.match(snippet)}
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_every_klatch_command_that_a_page_names_exists_with_its_options(page: Path) -> None:
    named = [words.split() for snippet in snippets(page) for words in COMMAND.findall(snippet)]
    assert [wrong for words in named if (wrong := unknown(words))] == []


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_every_setting_that_a_page_names_is_one(page: Path) -> None:
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    assert set(SETTING.findall(text(page))) - known == set()


@pytest.mark.parametrize("page", [*PAGES, ROOT / ".ci" / "run"], ids=label)
def test_every_make_target_that_a_page_names_exists(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", text(ROOT / "Makefile"), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)`|^make ([a-z-]+)$", text(page))) <= {(name, "") for name in targets}


def test_a_command_or_option_that_does_not_exist_is_found() -> None:
    assert unknown(["kafka", "start"]) is None
    assert unknown(["kafka", "begin"]) == "kafka has no command begin"
    assert unknown(["kafka", "start", "--colour"]) == "start has no option --colour"


def test_ci_runs_the_test_command_of_the_readme() -> None:
    last = text(ROOT / ".ci" / "run").strip().splitlines()[-1]
    assert last.removeprefix("exec ") in text(ROOT / "README.md")


def test_make_lists_what_can_be_made() -> None:
    makefile = text(ROOT / "Makefile")
    [phony] = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert set(phony.split()) == set(re.findall(r"^([a-z-]+):.*## .", makefile, re.MULTILINE))


@pytest.mark.parametrize("name", names(main))
def test_every_command_explains_itself(name: str) -> None:
    command = inner(main, name)
    assert command, f"klatch lists {name} and does not have it"
    assert list(explain(command, (name,))) == []
