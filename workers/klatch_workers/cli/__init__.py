"""The command line. Each command is a module, imported when it is named: the bare install lacks some of their parts.

Exit codes, for all commands: 0 done, 1 it failed, 2 misused, 3 something that is needed cannot be reached.
"""

from importlib import import_module
from importlib.metadata import version
from typing import Final

import click

from klatch_workers.imports import import_structlog

_COMMANDS: Final = {
    "up": ("klatch_workers.cli.up", "Run everything on this machine: Kafka, all stages, the HTTP door, a local model."),
    "chat": ("klatch_workers.cli.chat", "Chat in the terminal."),
    "publish": ("klatch_workers.cli.publish", "Publish chat requests from JSON lines."),
    "tail": ("klatch_workers.cli.tail", "Follow streams while they are made."),
    "cancel": ("klatch_workers.cli.cancel", "Cancel a request."),
    "prompts": ("klatch_workers.cli.prompts", "Publish and list prompts."),
    "models": ("klatch_workers.cli.models", "Route model names to deployments, and try them."),
    "tenants": ("klatch_workers.cli.tenants", "Write tenants, their keys and limits, and list them."),
    "quota": ("klatch_workers.cli.quota", "What tenants may use: set it, show what is used, and who changed it."),
    "topics": ("klatch_workers.cli.topics", "Create, describe and check klatch's topics."),
    "worker": ("klatch_workers.cli.worker", "Run one stage, or all, on a Kafka that exists."),
    "kafka": ("klatch_workers.cli.kafka", "Run an Apache Kafka on this machine, without Docker."),
    "top": ("klatch_workers.cli.top", "What happens, by tenant and model, live."),
    "redrive": ("klatch_workers.cli.redrive", "Show dead letters, and write their records back."),
    "doctor": ("klatch_workers.cli.doctor", "Say what is wrong with a set-up, and how to mend it."),
    "bench": ("klatch_workers.cli.bench", "Measure klatch on this machine against baselines in the same run."),
    "torture": ("klatch_workers.cli.torture", "Kill and stop klatch's processes under load, then recount."),
}
"""Name to module and help. The module holds a click command called like the command."""


class _Commands(click.Group):
    """Imports a command's module when the command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _COMMANDS:
            return None
        module, _ = _COMMANDS[cmd_name]
        try:
            import_structlog()
            command: click.Command = getattr(import_module(module), cmd_name)
        except ModuleNotFoundError as error:
            if error.name and error.name.startswith("klatch_"):
                raise
            raise click.ClickException(
                f"`klatch {cmd_name}` needs the package {error.name!r}, which the bare install leaves out: "
                "pip install 'klatch[local]' (or klatch[worker], without the embedded Kafka and the local models)"
            ) from error
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(version("klatch"), prog_name="klatch")
def main() -> None:
    """klatch: an open GenAI application stack on Kafka.

    `klatch up` runs everything on this machine. Settings come from the environment (KLATCH_…) and from options.
    """
