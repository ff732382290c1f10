"""Baselines as systems under torture: one sort of worker that answers requests straight from their topic."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from typing import Final

from klatch_workers.torture.baselines.reading import Careful, Usual, reading
from klatch_workers.torture.system import Command, Place, Read


@dataclass(frozen=True, slots=True)
class Baseline:
    """A minimal worker on a framework. It stands where klatch's generation stands, and is struck as that is."""

    name: str
    distribution: str
    """Of the framework, as it is installed."""
    requirement: str
    stages: tuple[str, ...] = ("generation",)
    bare: bool = True

    @property
    def readings(self) -> Mapping[str, Callable[[], Read]]:
        """As such streams are usually read, and as a careful consumer reads them."""
        return {"usual": lambda: reading(Usual), "careful": lambda: reading(Careful)}

    @property
    def installed(self) -> bool:
        """Whether the framework is."""
        try:
            distribution(self.distribution)
        except PackageNotFoundError:
            return False
        return True

    def worker(self, stage: str, place: Place) -> Command:
        """The worker's own module."""
        del stage  # There is one.
        arguments = {
            "--kafka": place.kafka,
            "--model-url": place.model_url,
            "--partitions": str(place.partitions),
            "--drain-s": str(place.drain_s),
        }
        module = f"klatch_workers.torture.baselines.{self.name}_worker"
        return Command(module, tuple(word for pair in arguments.items() for word in pair))


BASELINES: Final = (
    Baseline("faststream", "faststream", "faststream[kafka]>=0.7.8,<0.8"),
    Baseline("faust", "faust-streaming", "faust-streaming==0.15.3"),
)
