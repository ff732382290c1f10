"""All checks, in the order in which things depend on each other."""

from collections.abc import Iterator, Mapping

from klatch_workers.doctor.cluster import cluster
from klatch_workers.doctor.findings import Finding, Findings, Setup
from klatch_workers.doctor.machine import machine
from klatch_workers.doctor.servers import servers
from klatch_workers.settings import PREFIX, Settings, UnknownSetting, read_settings


async def examine(setup: Setup) -> Findings:
    """Every finding, as it is made."""
    for finding in settings_findings(setup.environment):
        yield finding
    for part in (machine, cluster, servers):
        async for finding in part(setup):
            yield finding


def misspelt(environment: Mapping[str, str]) -> list[str]:
    """The `KLATCH_` variables that no setting has."""
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    return sorted(name for name in environment if name.startswith(PREFIX) and name.upper() not in known)


def settings_findings(environment: Mapping[str, str]) -> Iterator[Finding]:
    """What is wrong with the environment."""
    wrong = misspelt(environment)
    for name in wrong:
        try:
            read_settings({name: environment[name]})
        except UnknownSetting as error:
            yield Finding(
                "settings", "problem", str(error), f"unset {name}, or mend its name: no process starts with it"
            )
    if not wrong:
        count = sum(name.startswith(PREFIX) for name in environment)
        yield Finding("settings", "ok", f"{count or 'no'} {PREFIX} variables are set, none misspelt")
