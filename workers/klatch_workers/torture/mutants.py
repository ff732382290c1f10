"""Planted bugs: each breaks one promise of klatch by a small replacement in one module, and the kit has to find it.

A mutant is planted into a copy of the four packages, which the workers then import before the installed ones; the kit
itself, its readers and its judge stay as they are. `mutants.toml` holds them, each with the faults that find it
fastest. A mutant whose text is not in its module any more is an error, and a test looks at all of them. The first one
is none: the control, in whose run nothing may be found.
"""

import re
import shutil
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, get_args

from klatch_workers.torture.load import USUAL, Shape
from klatch_workers.torture.run import Orders
from klatch_workers.torture.schedule import Fault, Kind
from klatch_workers.torture.system import Command, Klatch, Place, Read
from klatch_workers.up.everything import PARTITIONS

PACKAGES: Final = ("klatch_schemas", "klatch_streams", "klatch_agents", "klatch_workers")
_FAULT: Final = re.compile(
    r"^(?P<at>[\d.]+) (?P<kind>\w+)(?: (?P<target>[a-z/-]+))?(?: x (?P<count>\d+))?(?: for (?P<lasts>[\d.]+) s)?$"
)
_PATIENCE_S: Final = 60.0
"""A run that loses requests need not wait for them as long as one that must not; but longer than a recovery takes. That
without the bug has no more: it is to be the same run."""


class MutantLost(ValueError):
    """The text that a mutant replaces is not once in its module: the code has changed, and the mutant must follow."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """A planted bug."""

    name: str
    breaks: str
    """The promise, in a few words."""
    module: str
    """Such as `klatch_streams/lane.py`."""
    old: str
    new: str
    faults: Sequence[Fault]
    minutes: float
    seed: int
    static: bool
    requests_per_second: float = 8.0
    partitions: int = PARTITIONS
    shape: Shape = USUAL

    @property
    def control(self) -> bool:
        """Whether nothing is planted: the run has to stay green."""
        return not self.module

    def unplanted(self) -> "Mutant":
        """Its load and its faults without the bug: the control of this one."""
        return replace(self, breaks="nothing: no bug is planted, and nothing may be found", module="", old="", new="")

    def orders(self, packages: Path) -> Orders:
        """The run on workers that import from `packages`: to turn red, or without a bug to stay green."""
        return Orders(
            self.seed,
            self.minutes,
            self.faults,
            requests_per_second=self.requests_per_second,
            static=self.static,
            partitions=self.partitions,
            shape=self.shape,
            system=Mutated(packages),
            patience_s=_PATIENCE_S,
        )


@dataclass(frozen=True, slots=True)
class Mutated:
    """klatch, from other packages than those that are installed."""

    packages: Path
    name: str = "klatch, mutated"
    stages: tuple[str, ...] = Klatch().stages
    bare: bool = False

    @property
    def readings(self) -> Mapping[str, Callable[[], Read]]:
        """The contract's, as it is installed."""
        return Klatch().readings

    def worker(self, stage: str, place: Place) -> Command:
        """See `System.worker`."""
        command = Klatch().worker(stage, place)
        ours = {"PYTHONPATH": str(self.packages), "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        return replace(command, settings={**command.settings, **ours})


def mutants() -> list[Mutant]:
    """All of them, in the order of their file."""
    listed: Mapping[str, Any] = tomllib.loads(Path(__file__).with_name("mutants.toml").read_text())
    return [_mutant(name, fields) for name, fields in listed.items()]


def _mutant(name: str, fields: Mapping[str, Any]) -> Mutant:
    return Mutant(
        name=name,
        breaks=fields["breaks"],
        module=fields.get("module", ""),
        old=fields.get("old", ""),
        new=fields.get("new", ""),
        faults=[fault_of(text) for text in fields.get("faults", ())],
        minutes=fields.get("minutes", 0.5),
        seed=fields.get("seed", 1),
        static=fields.get("static", True),
        requests_per_second=fields.get("requests_per_second", 8.0),
        partitions=fields.get("partitions", PARTITIONS),
        shape=Shape(**fields.get("shape", {})),
    )


def fault_of(text: str) -> Fault:
    """`12 stop generation for 12.5 s`, or `9 twin generation x 3 for 1 s`, as a fault. Raises ValueError."""
    found = _FAULT.match(text)
    if found is None or found["kind"] not in get_args(Kind):
        raise ValueError(f"{text!r} is no fault")
    kind: Any = found["kind"]
    return Fault(
        float(found["at"]),
        kind,
        found["target"] or "",
        lasts_s=float(found["lasts"] or 0),
        count=int(found["count"] or 0),
    )


def changed(mutant: Mutant, source: str) -> str:
    """The module's text with the bug. Raises MutantLost."""
    if (times := source.count(mutant.old)) != 1:
        raise MutantLost(f"{mutant.name}: {mutant.module} holds its text {times} times, not once:\n{mutant.old}")
    return source.replace(mutant.old, mutant.new)


def source_of(mutant: Mutant) -> Path:
    """The module as it is installed. Raises MutantLost."""
    package, _, rest = mutant.module.partition("/")
    module = _folder(package) / rest
    if not module.is_file():
        raise MutantLost(f"{mutant.name}: there is no module {mutant.module} any more")
    return module


def plant(mutant: Mutant, folder: Path) -> Path:
    """Copy the packages into `folder`, with the bug if there is one; returns what to import from. Raises MutantLost."""
    bug = "" if mutant.control else changed(mutant, source_of(mutant).read_text())
    for package in PACKAGES:
        shutil.copytree(_folder(package), folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    if not mutant.control:
        (folder / mutant.module).write_text(bug)
    return folder


def _folder(package: str) -> Path:
    spec = find_spec(package)
    assert spec  # noqa: S101 - they are installed together
    assert spec.origin  # noqa: S101 - each has an __init__.py
    return Path(spec.origin).parent
