"""`klatch doctor`: says what is wrong with a set-up, and how to mend it.

It looks at what a running `klatch up` wrote down, or at what options and the environment name. It ends with 0 when
there is no problem (warnings are none), else with 1. With `--json` each finding is an object.
"""

import os
from dataclasses import asdict
from typing import Any, Final, cast

import click

from klatch_workers.cli.context import (
    FAILED,
    Context,
    door_options,
    kafka_options,
    perform,
    read_run_file,
    say_json,
    shared_options,
)
from klatch_workers.doctor.examine import examine, misspelt
from klatch_workers.doctor.findings import Endpoint, Finding, Setup

_MARKS: Final = {"ok": ("ok", "green"), "warning": ("warn", "yellow"), "problem": ("PROBLEM", "red")}


@click.command()
@kafka_options
@door_options
@shared_options
def doctor(as_json: bool, **options: Any) -> None:
    """Check this machine, Kafka, the stages and the servers, and say how to mend what is wrong."""

    async def work() -> int:
        wrong = set(misspelt(os.environ))
        readable = {name: value for name, value in os.environ.items() if name not in wrong}
        setup = _setup(Context.read(readable, **options))
        problems = warnings = 0
        async for finding in examine(setup):
            problems += finding.level == "problem"
            warnings += finding.level == "warning"
            _say(finding, as_json=as_json)
        if not as_json:
            click.echo(f"\n{problems or 'no'} problems, {warnings or 'no'} warnings")
        return FAILED if problems else 0

    perform(work, as_json=as_json)


def _say(finding: Finding, *, as_json: bool) -> None:
    if as_json:
        say_json(asdict(finding))
        return
    mark, color = _MARKS[finding.level]
    click.echo(f"{click.style(f'{mark:<8}', fg=color)} {finding.check:<14} {finding.says}")
    if finding.fix:
        click.echo(f"{'':<23} {click.style('→ ' + finding.fix, dim=True)}")


def _setup(context: Context) -> Setup:
    settings, run = context.settings, context.run
    internal = settings.internal_key.get_secret_value() if settings.internal_key else run.get("internal_key")
    model_key = settings.model_key.get_secret_value() if settings.model_key else run.get("model_key")
    return Setup(
        settings=context.model_settings,
        environment=os.environ,
        data=settings.data,
        # They are of this folder, whichever Kafka is named.
        pids=cast("dict[str, int]", read_run_file(settings.data).get("pids") or {}),
        bootstrap=context.bootstrap,
        own_kafka="kafka" not in settings.model_fields_set,
        namespace=context.namespace,
        door=Endpoint(context.door_url, context.api_key),
        model=Endpoint(settings.model_url or run.get("model_url"), model_key),
        memory=Endpoint(settings.memory_url or run.get("memory_url"), internal),
        views=Endpoint(settings.views_url or run.get("views_url"), internal),
    )
