"""The trust policy: what is done with what judges find, per use case, read from a TOML file.

`decide` is a pure function of findings, policy and use case, so that a verdict can be replayed. A policy file is
checked whole when it is read: a misspelt name is an error that says where it stands and what is allowed there.
"""

import hashlib
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Final, Literal, TypeVar, cast

from klatch_agents.trust.redact import merge
from klatch_agents.trust.rules import CATEGORIES
from klatch_schemas.events import Decision, Finding

OnFailure = Literal["closed", "open"]
_Name = TypeVar("_Name", bound=str)

_ACTIONS: Final[tuple[Decision, ...]] = ("allow", "redact", "escalate", "block")
"""From the weakest to the strongest."""
_FAILURES: Final[tuple[OnFailure, ...]] = ("closed", "open")

JUDGE_FAILURE = "judge_failure"
"""The category of a verdict that a failed judge led to."""


class PolicyError(ValueError):
    """A policy file that cannot be used; the message names the field and the fix."""


@dataclass(frozen=True, slots=True)
class UseCasePolicy:
    """What one use case does; `other` is for categories that nobody named."""

    actions: Mapping[str, Decision]
    other: Decision
    on_judge_failure: OnFailure

    def action(self, category: str) -> Decision:
        """What is done with a finding of `category`."""
        return self.actions.get(category, self.other)


@dataclass(frozen=True, slots=True)
class Policy:
    """A whole policy file."""

    version: str
    default: UseCasePolicy
    use_cases: Mapping[str, UseCasePolicy]

    def of(self, use_case: str) -> UseCasePolicy:
        """The policy of `use_case`, which is the default's where the file does not name it."""
        return self.use_cases.get(use_case, self.default)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a policy decided: the fields of `TrustVerdict` that do not depend on the request.

    `categories` names all that was found and not allowed; `findings` holds them merged, ready for `redact`.
    """

    decision: Decision
    categories: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    policy: str = ""
    degraded: bool = False


def decide(findings: Iterable[Finding], policy: Policy, use_case: str) -> Verdict:
    """The strongest action of all findings; what is allowed leaves no trace."""
    rules = policy.of(use_case)
    kept = [finding for finding in findings if rules.action(finding.category) != "allow"]
    strongest = max((_ACTIONS.index(rules.action(finding.category)) for finding in kept), default=0)
    return Verdict(
        decision=_ACTIONS[strongest],
        categories=tuple(sorted({finding.category for finding in kept})),
        findings=tuple(merge(kept)),
        policy=policy.version,
    )


def decide_unjudged(policy: Policy, use_case: str) -> Verdict:
    """What happens to a request that no judge could answer for."""
    closed = policy.of(use_case).on_judge_failure == "closed"
    return Verdict("block" if closed else "allow", (JUDGE_FAILURE,), (), policy.version, degraded=True)


def load_policy(path: Path | None = None) -> Policy:
    """The policy in the file at `path`, or the one that ships with klatch; raises `PolicyError`."""
    if path is None:
        return parse_policy(files("klatch_agents.trust").joinpath("policy.toml").read_bytes(), "the default policy")
    try:
        return parse_policy(path.read_bytes(), str(path))
    except OSError as error:
        raise PolicyError(f"{path} cannot be read ({error.strerror}): name a readable TOML file") from error


def parse_policy(content: bytes, source: str = "policy") -> Policy:
    """The policy written in `content`; `source` is what messages call it. Raises `PolicyError`."""
    try:
        document = tomllib.loads(content.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise PolicyError(f"{source} is not TOML in UTF-8: {error}") from error
    reader = _Reader(source, frozenset(CATEGORIES) | _own_categories(document, source))
    reader.only(document, "", {"version", "judge_categories", "default", "use_case"})
    default = reader.use_case(reader.table(document, "default", required=True), "default", None)
    cases = reader.table(document, "use_case")
    return Policy(
        version=_version(document, content, source),
        default=default,
        use_cases={name: reader.use_case(reader.table(cases, name), f"use_case.{name}", default) for name in cases},
    )


def _version(document: Mapping[str, object], content: bytes, source: str) -> str:
    version = document.get("version", hashlib.sha256(content).hexdigest()[:12])
    if not isinstance(version, str) or not version.strip():
        raise PolicyError(f'{source}: version is {version!r}: write a string, such as version = "2026-11"')
    return version


def _own_categories(document: Mapping[str, object], source: str) -> frozenset[str]:
    names = document.get("judge_categories", [])
    if isinstance(names, list) and all(isinstance(name, str) for name in cast("list[object]", names)):
        return frozenset(cast("list[str]", names))
    raise PolicyError(f'{source}: judge_categories is {names!r}: write a list of names, such as ["toxicity"]')


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads tables of one file; every error names the file, the field and what may stand there."""

    source: str
    categories: frozenset[str]

    def use_case(self, table: Mapping[str, object], place: str, default: UseCasePolicy | None) -> UseCasePolicy:
        self.only(table, place, {"categories", "other", "on_judge_failure"})
        named = self.table(table, "categories", place=place)
        self.only(named, f"{place}.categories", self.categories)
        actions = {} if default is None else dict(default.actions)
        for category, action in named.items():
            actions[category] = self.choice(action, f"{place}.categories.{category}", _ACTIONS)
        other = table.get("other", default.other if default else "block")
        failure = table.get("on_judge_failure", default.on_judge_failure if default else "closed")
        return UseCasePolicy(
            actions=actions,
            other=self.choice(other, f"{place}.other", _ACTIONS),
            on_judge_failure=self.choice(failure, f"{place}.on_judge_failure", _FAILURES),
        )

    def table(
        self, holder: Mapping[str, object], key: str, *, place: str = "", required: bool = False
    ) -> Mapping[str, object]:
        name = f"{place}.{key}" if place else key
        if required and key not in holder:
            raise PolicyError(f"{self.source}: there is no [{name}]: add it, as in the default policy")
        value = holder.get(key, {})
        if not isinstance(value, dict):
            raise PolicyError(f"{self.source}: {name} is {value!r}: write a table, [{name}]")
        return cast("dict[str, object]", value)

    def only(self, table: Mapping[str, object], place: str, known: Iterable[str]) -> None:
        for key in table:
            if key not in known:
                name = f"{place}.{key}" if place else key
                hint = " or list it in judge_categories" if place.endswith("categories") else ""
                raise PolicyError(f"{self.source}: {name} is not known: use {_listed(known)}{hint}")

    def choice(self, value: object, place: str, allowed: tuple[_Name, ...]) -> _Name:
        for name in allowed:
            if value == name:
                return name
        raise PolicyError(f"{self.source}: {place} is {value!r}: use {_listed(allowed)}")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f'"{name}"' for name in sorted(names))
