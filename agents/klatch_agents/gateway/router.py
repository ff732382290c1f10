"""The gateway over all deployments: carries out `routing.py`'s policy, and does everything that it must not.

It implements the same port as the adapter of one server. Entering `stream` may take several calls: until a chunk
speaks, whatever fails is tried again as the policy says, and nothing of it is seen; from then on the reply is its
deployment's, and so is its failure. Entering therefore waits for the first token, not only for the status line.
A route that changes is in force for the next call, also of a request that waits; calls under way end where they began.
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
from klatch_agents.gateway.places import Place, Places, hold
from klatch_agents.gateway.port import Chunk, Embedded, Finished, ModelCall, ModelReply, Timeouts
from klatch_agents.gateway.routing import (
    NothingLeft,
    Outcome,
    Try,
    able_in,
    choose_until_served,
    judge,
    who_did_not_continue,
)
from klatch_schemas.events import ModelRouted, RouteTimeouts

log = structlog.get_logger(__name__)

T = TypeVar("T")

MOST_HELD_BACK = 64
"""Batches without a word that are held back, so that a call can still be made anew unseen."""


_NOWHERE = ModelRouted(alias="none", deployments=())
"""The route of a model that has none."""

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

    async def changed(self) -> None:
        """Wait for the next change after this call."""
        ...


def timeouts_of(route: RouteTimeouts) -> Timeouts:
    """A route's time-outs as a call bears them."""
    return Timeouts(connect=route.connect_s, first_token=route.first_token_s, idle=route.idle_s)


def listing_of(route: RouteTimeouts) -> Timeouts:
    """A route's time-outs for a list of models."""
    return replace(timeouts_of(route), first_token=min(route.first_token_s, LISTING_S))


class _Asked(NamedTuple):
    """A call as the policy needs to know it."""

    alias: str
    seed: str
    claim: Claim
    continuing: bool = False
    avoid: frozenset[str] = frozenset()
    failed: Callable[[ModelError], None] | None = None


class _Seat(NamedTuple):
    """A place at a deployment, and the call that may be made there now."""

    line: Line
    run: Run
    place: Place


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
        self._now = now
        self._wall = wall
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
            yield await self._served(asked, partial(_stream, asked, call), held)

    def continues(self, call: ModelCall) -> bool:
        """See `Gateway.continues`."""
        return bool(able_in(self._route(_alias(call)), continuing=True))

    async def embed(self, call: ModelCall) -> Embedded:
        """What a deployment answers to `POST /embeddings` with the call's body. Raises ModelError, ExpiredError where
        the call's deadline passes while it waits for a place."""
        asked = self._asked(call)
        async with AsyncExitStack() as held:
            return await self._served(asked, partial(_embed, asked, call), held)

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
        claim = Claim(call.tenant, call.weight, call.priority, call.deadline, since=self._wall())
        seed = call.request or str(next(self._numbers))
        return _Asked(_alias(call), seed, claim, bool(call.prefix), call.avoid, call.failed)

    def _route(self, alias: str) -> ModelRouted:
        return self._routes.find(alias) or self._default or _NOWHERE

    async def _served(
        self, asked: _Asked, make: Callable[[_Seat, AsyncExitStack], Awaitable[T]], held: AsyncExitStack
    ) -> T:
        """What the first deployment gives that serves; its place is given back when `held` is left. Raises the last
        failure when none does."""
        route = self._route(asked.alias)
        view = self._lines.view(route)
        policy = choose_until_served(route, asked.seed, view, continuing=asked.continuing, avoid=asked.avoid)
        outcome: Outcome | None = None
        failure: ModelError | None = None
        while True:
            try:
                step = next(policy) if outcome is None else policy.send(outcome)
            except StopIteration as over:
                last: ModelError = failure or _unroutable(asked.alias, route, over.value)
                if asked.continuing:
                    last.anew_but = who_did_not_continue(route, last, self._lines.view(route))
                raise last from None
            tried = await self._tried(asked, step, make, held)
            if not isinstance(tried, Outcome):
                return tried
            outcome, route, failure = tried, tried.routed, tried.error or failure

    async def _tried(
        self, asked: _Asked, step: Try, make: Callable[[_Seat, AsyncExitStack], Awaitable[T]], held: AsyncExitStack
    ) -> T | Outcome:
        """What a deployment of the step gives; an Outcome where it gives nothing."""
        called, began, moved = step.deployment.name, self._now(), False
        error: ModelError | None = None
        if step.after:
            pause = step.after + self._jitter() * step.spread
            moved = await self._moved_within(asked.alias, self._route(asked.alias), pause)
        choice = {} if moved else self._choice(asked, step)
        try:
            async with AsyncExitStack() as opened:
                place = await opened.enter_async_context(hold(asked.claim, choice, self._worth_a_look(asked, step)))
                if place:
                    called = place.at
                moved = moved or (bool(choice) and not place)
                # A change may have given it more places and another server in one moment: it is called as it is now.
                if place and (line := self._line(asked, called)) and (run := line.begin()):
                    opened.callback(run.left)
                    served = await make(_Seat(line, run, place), opened)
                    held.push_async_exit(opened.pop_all())
                    return served
        except ModelError as failed:
            error = failed
            self._tell(asked, called, failed)
        route = self._route(asked.alias)
        return Outcome(error, self._lines.view(route), route, called, self._now() - began, moved)

    def _choice(self, asked: _Asked, step: Try) -> dict[str, Places]:
        """The places at those of the step's deployments that may be called."""
        able = {one.name: one for one in able_in(self._route(asked.alias), continuing=asked.continuing)}
        named = [able[one.name] for one in (step.deployment, *step.twins) if one.name in able]
        return {one.name: self._lines.places(one) for one in named if not self._lines.cooling(one)}

    def _line(self, asked: _Asked, name: str) -> Line | None:
        """A deployment as the route has it by now; None: the call may not go there. Raises MisconfiguredError."""
        route = self._route(asked.alias)
        able = able_in(route, continuing=asked.continuing)
        return next((self._lines.line(route, one) for one in able if one.name == name), None)

    def _worth_a_look(self, asked: _Asked, step: Try) -> Callable[[], Awaitable[object]]:
        """Something to wait for: another route is in force, or something better may have recovered."""
        route = self._route(asked.alias)
        if step.look_after is None:
            return partial(self._moved, asked.alias, route)
        return partial(self._moved_within, asked.alias, route, step.look_after)

    async def _moved_within(self, alias: str, route: ModelRouted, seconds: float) -> bool:
        """Wait so long, or until another route is in force; whether there is one."""
        resting = asyncio.ensure_future(self._sleep(seconds))
        moving = asyncio.ensure_future(self._moved(alias, route))
        try:
            await asyncio.wait({resting, moving}, return_when=asyncio.FIRST_COMPLETED)
            return moving.done()
        finally:
            resting.cancel()
            moving.cancel()

    async def _moved(self, alias: str, route: ModelRouted) -> None:
        """Returns once another route is in force.

        Its deployments have the places that it gives them by then: these go to those who wait in their order, before
        anybody leaves to choose anew.
        """
        while (found := self._route(alias)) == route:
            await self._routes.changed()
        self._lines.resize(found)

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


async def _stream(asked: _Asked, call: ModelCall, seat: _Seat, opened: AsyncExitStack) -> ModelReply:
    """Call, and wait for a word."""
    line, run, place = seat
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
    return RoutedReply(reply, rest, run, line.deployment.name, begun)


async def _first_words(reply: AsyncIterator[list[Chunk]]) -> list[list[Chunk]]:
    begun = list[list[Chunk]]()
    async for chunks in reply:
        begun.append(chunks)
        if any(chunk.speaks for chunk in chunks) or len(begun) >= MOST_HELD_BACK:
            break
    return begun


async def _embed(asked: _Asked, call: ModelCall, seat: _Seat, _: AsyncExitStack) -> Embedded:
    line, run, place = seat
    look = partial(call.before_send, line.deployment.name) if call.before_send else None
    place.used = True
    try:
        named = {**call.body, "model": _model_of(line, asked)}
        answer = await line.server.embed(named, timeouts_of(line.routed.timeouts), look)
    except ModelError as error:
        run.failed(error)
        raise
    run.finished()
    return Embedded(answer, line.deployment.name)


def _alias(call: ModelCall) -> str:
    return str(call.model or call.body.get("model") or "")


def _call_of(line: Line, asked: _Asked, call: ModelCall) -> ModelCall:
    within = timeouts_of(line.routed.timeouts)
    return replace(call, model=_model_of(line, asked), deployment=line.deployment.name, timeouts=within)


def _model_of(line: Line, asked: _Asked) -> str:
    return line.deployment.model or asked.alias


def _unroutable(alias: str, route: ModelRouted, nothing: NothingLeft) -> UnroutableError:
    if route is _NOWHERE:
        return UnroutableError(
            f"no route names the model {alias!r}: `klatch models list` shows those there are", status=404
        )
    return UnroutableError(
        f"no deployment of {alias!r} can be called just now: `klatch models test` says why",
        status=503,
        retry_after=nothing.retry_after,
    )
