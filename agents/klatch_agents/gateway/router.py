"""The gateway over all deployments: carries out `routing.py`'s policy, and does everything that it must not.

It implements the same port as the adapter of one server. Entering `stream` may take several calls: until a chunk
speaks, whatever fails is tried again as the policy says, and nothing of it is seen; from then on the reply is its
deployment's, and so is its failure. Entering therefore waits for the first token, not only for the status line.
A route that changes is in force for the next call; calls under way end where they began.
"""

import asyncio
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from typing import NamedTuple, Protocol, Self, TypeVar

import structlog

from klatch_agents.gateway.errors import ModelError, UnroutableError
from klatch_agents.gateway.fair import Claim
from klatch_agents.gateway.lines import Line, Lines, OpenServer, Run
from klatch_agents.gateway.port import Chunk, Embedded, Finished, ModelCall, ModelReply, Timeouts
from klatch_agents.gateway.routing import (
    NothingLeft,
    Outcome,
    choose_until_served,
    how_it_continues,
    judge,
    who_did_not_continue,
)
from klatch_schemas.events import ModelRouted, RouteTimeouts

log = structlog.get_logger(__name__)

T = TypeVar("T")

MOST_HELD_BACK = 64
"""Batches without a word that are held back, so that a call can still be made anew unseen."""


LISTING_S = 10.0
"""The longest that the default server's list of models is waited for: there is an answer without it."""


class Routes(Protocol):
    """The routes in force."""

    def find(self, alias: str) -> ModelRouted | None:
        """The route of a model name."""
        ...

    def aliases(self) -> Collection[str]:
        """The model names that have routes."""
        ...


def timeouts_of(route: RouteTimeouts) -> Timeouts:
    """A route's time-outs as a call bears them."""
    return Timeouts(connect=route.connect_s, first_token=route.first_token_s, idle=route.idle_s)


def listing_of(route: RouteTimeouts) -> Timeouts:
    """A route's time-outs for a list of models."""
    return replace(timeouts_of(route), first_token=min(route.first_token_s, LISTING_S))


class _Asked(NamedTuple):
    """A call as the policy needs to know it."""

    route: ModelRouted
    alias: str
    seed: str
    claim: Claim
    continuing: bool = False
    avoid: frozenset[str] = frozenset()
    failed: Callable[[ModelError], None] | None = None


class Router:
    """The `Gateway` to whatever the routes name. Use it inside one event loop, `async with` or with `close`."""

    def __init__(
        self,
        routes: Routes,
        open_server: OpenServer,
        default: ModelRouted | None = None,
        *,
        now: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """`default` takes the models that have no route, under their own names; None refuses them. `wall` is in seconds
        since 1970, as deadlines are; places are shared by it.
        """
        self._routes = routes
        self._default = default
        self._lines = Lines(open_server, now, wall)
        self._sleep = sleep
        self._jitter = jitter
        self._numbers = count()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @asynccontextmanager
    async def stream(self, call: ModelCall) -> AsyncGenerator[ModelReply]:
        """See `Gateway.stream`. Raises ModelError."""
        asked = self._asked(call)
        async with AsyncExitStack() as held:

            async def attempt(line: Line) -> ModelReply | None:
                return await _stream(line, asked, call, held)

            yield await self._served(asked, attempt)

    def continues(self, call: ModelCall) -> bool:
        """See `Gateway.continues`."""
        route = self._routes.find(_alias(call)) or self._default
        return route is not None and any(how_it_continues(one) != "none" for one in route.deployments if one.weight)

    async def embed(self, call: ModelCall) -> Embedded:
        """What a deployment answers to `POST /embeddings` with the call's body. Raises ModelError, ExpiredError where
        the call's deadline passes while it waits for a place."""
        asked = self._asked(call)

        async def attempt(line: Line) -> Embedded | None:
            answer = await _embed(line, asked, call)
            return None if answer is None else Embedded(answer, line.deployment.name)

        return await self._served(asked, attempt)

    async def models(self) -> list[str]:
        """The aliases, and what the default server lists, if it does so in time. Raises its ModelError where there is
        no alias."""
        names = sorted(self._routes.aliases())
        if self._default is None:
            return names
        try:
            line = self._lines.line(self._default, self._default.deployments[0])
            listed = await line.server.models(listing_of(self._default.timeouts))
        except ModelError as error:
            if not names:
                raise
            log.info("models.unlisted", code=error.code)
            return names
        return [*names, *(name for name in listed if name not in names)]

    async def close(self) -> None:
        """See `Gateway.close`."""
        for server in self._lines.servers():
            await server.close()

    def _asked(self, call: ModelCall) -> _Asked:
        alias = _alias(call)
        route = self._routes.find(alias) or self._default
        if route is None:
            raise UnroutableError(
                f"no route names the model {alias!r}: `klatch models list` shows those there are", status=404
            )
        claim = Claim(call.tenant, call.weight, call.priority, call.deadline)
        seed = call.request or str(next(self._numbers))
        return _Asked(route, alias, seed, claim, bool(call.prefix), call.avoid, call.failed)

    async def _served(self, asked: _Asked, attempt: Callable[[Line], Awaitable[T | None]]) -> T:
        """What the first deployment gives that serves; of an attempt None: no call was made. Raises the last failure
        when none does."""
        route = asked.route
        view = self._lines.view(route)
        policy = choose_until_served(route, asked.seed, view, continuing=asked.continuing, avoid=asked.avoid)
        outcome, failure = None, None
        while True:
            try:
                step = next(policy) if outcome is None else policy.send(outcome)
            except StopIteration as over:
                last: ModelError = failure or _unroutable(asked, over.value)
                if asked.continuing:
                    last.anew_but = who_did_not_continue(route, last)
                raise last from None
            if step.after:
                await self._sleep(step.after + self._jitter() * step.spread)
            error: ModelError | None = None
            try:
                line = self._lines.line(route, step.deployment)
                if not line.breaker.cooling() and (served := await attempt(line)) is not None:
                    return served
            except ModelError as failed:
                failure = error = failed
                self._tell(asked, step.deployment.name, failed)
            outcome = Outcome(error, self._lines.view(route))

    def _tell(self, asked: _Asked, deployment: str, error: ModelError) -> None:
        if asked.failed:
            asked.failed(error)
        log.info(
            "model.failed",
            request=asked.seed,
            deployment=deployment,
            code=error.code,
            then=judge(error),
            spoke=error.spoke,
        )


class RoutedReply:
    """A reply that has begun, with what was held back of it until it did."""

    def __init__(
        self, reply: ModelReply, rest: AsyncIterator[list[Chunk]], run: Run, deployment: str, begun: list[list[Chunk]]
    ) -> None:
        self.deployment = deployment
        self.model = reply.model
        self.upstream_request_id = reply.upstream_request_id
        self._reply = reply
        self._run = run
        self._begun = begun[::-1]
        self._rest = rest

    @property
    def finished(self) -> Finished | None:
        """See `ModelReply.finished`."""
        return self._reply.finished

    def __aiter__(self) -> "RoutedReply":
        return self

    async def __anext__(self) -> list[Chunk]:
        if self._begun:
            return self._begun.pop()
        try:
            return await anext(self._rest)
        except ModelError as error:
            self._run.failed(error)
            raise
        except StopAsyncIteration:
            self._run.finished()
            raise


async def _stream(line: Line, asked: _Asked, call: ModelCall, held: AsyncExitStack) -> ModelReply | None:
    """Have a place, call, and wait for a word; all of it is left when `held` is. None: no call was made, for the
    deployment began to cool down while its place was waited for."""
    async with AsyncExitStack() as opened:
        place = await opened.enter_async_context(line.places.hold(asked.claim))
        run = line.begin()
        if run is None:
            return None
        opened.callback(run.left)
        if call.before_try:
            await call.before_try()
        place.used = True
        try:
            reply = await opened.enter_async_context(line.server.stream(_call_of(line, asked, call)))
            rest = aiter(reply)
            begun = await _first_words(rest)
        except ModelError as error:
            run.failed(error)
            raise
        run.spoke()
        held.push_async_exit(opened.pop_all())
        return RoutedReply(reply, rest, run, line.deployment.name, begun)


async def _first_words(reply: AsyncIterator[list[Chunk]]) -> list[list[Chunk]]:
    begun = list[list[Chunk]]()
    async for chunks in reply:
        begun.append(chunks)
        if any(chunk.speaks for chunk in chunks) or len(begun) >= MOST_HELD_BACK:
            break
    return begun


async def _embed(line: Line, asked: _Asked, call: ModelCall) -> bytes | None:
    """As `_stream`, for an embedding."""
    look = partial(call.before_send, line.deployment.name) if call.before_send else None
    async with line.places.hold(asked.claim) as place:
        run = line.begin()
        if run is None:
            return None
        place.used = True
        try:
            named = {**call.body, "model": _model_of(line, asked)}
            answer = await line.server.embed(named, timeouts_of(asked.route.timeouts), look)
        except ModelError as error:
            run.failed(error)
            raise
        else:
            run.finished()
            return answer
        finally:
            run.left()


def _alias(call: ModelCall) -> str:
    return str(call.model or call.body.get("model") or "")


def _call_of(line: Line, asked: _Asked, call: ModelCall) -> ModelCall:
    within = timeouts_of(asked.route.timeouts)
    return replace(call, model=_model_of(line, asked), deployment=line.deployment.name, timeouts=within)


def _model_of(line: Line, asked: _Asked) -> str:
    return line.deployment.model or asked.alias


def _unroutable(asked: _Asked, nothing: NothingLeft) -> UnroutableError:
    return UnroutableError(
        f"no deployment of {asked.alias!r} can be called just now: `klatch models test` says why",
        status=503,
        retry_after=nothing.retry_after,
    )
