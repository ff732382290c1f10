"""`python -m klatch_agents.testing.upstream`: the scripted model server as a process of its own."""

import asyncio
import json
import signal

import click

from klatch_agents.testing.upstream.server import Upstream


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=0, help="0 takes a free one.")
@click.option("--key", default="", help="API key to require.")
@click.option("--json", "as_json", is_flag=True, help="Say that it is ready as a JSON line.")
def main(host: str, port: int, key: str, *, as_json: bool) -> None:
    """A scripted OpenAI-compatible model server, for tests and benchmarks. Ends on SIGTERM.

    A request says what it wants in the model's name, e.g. `fake?tokens=20&rate=50`.
    """
    asyncio.run(_serve(host, port, key, as_json=as_json))


async def _serve(host: str, port: int, key: str, *, as_json: bool) -> None:
    ending = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ending.set)
    async with Upstream(host=host, port=port, key=key) as upstream:
        ready = {"event": "ready", "url": upstream.url}
        click.echo(json.dumps(ready) if as_json else f"serving {upstream.url}")
        await ending.wait()


if __name__ == "__main__":
    main()
