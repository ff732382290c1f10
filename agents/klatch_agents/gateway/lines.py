"""What this process knows of each deployment: how to call it, how it has fared, and who holds its places.

Servers are kept by what they are, so that deployments on one server share its connections; health by name, server and
model, since what one did says nothing about another; places by the name alone, so that nobody loses its turn where a
deployment is pointed elsewhere. No server is forgotten before the end: one that no route names any more holds no
connection after a few idle seconds.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from klatch_agents.gateway.errors import MisconfiguredError, ModelError
from klatch_agents.gateway.health import Breaker
from klatch_agents.gateway.places import Places
from klatch_agents.gateway.port import Catalogue, Gateway
from klatch_agents.gateway.routing import View, is_servers_doing
from klatch_schemas.events import Deployment, ModelRouted


class Server(Gateway, Catalogue, Protocol):
    """All that a model server answers."""


OpenServer = Callable[[Deployment], Server]
"""Makes a gateway to a deployment's server. Raises ValueError for one that cannot be."""

MOST_KNOWN = 10_000
"""Deployments whose health is kept: those that were called last."""
PAUSE_S = 1.0
"""How long a deployment is left alone that refused for its rate and did not say for how long."""


_Identity = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Line:
    """One deployment, ready to be called."""

    routed: ModelRouted
    deployment: Deployment
    server: Server
    breaker: Breaker

    def begin(self) -> "Run | None":
        """A call is about to be made; None: it must not be, the deployment cools down by now, or another probes it."""
        # Asked and begun in one step of the loop, so that of many who were let through only one probes.
        return None if self.breaker.cooling() else Run(self.breaker, probe=self.breaker.begin())


class Run:
    """What one call tells about a deployment's health; the first that is said of its end counts."""

    def __init__(self, breaker: Breaker, *, probe: bool) -> None:
        self._breaker = breaker
        self._probe = probe
        self._over = False

    def spoke(self) -> None:
        """The first token came."""
        self._breaker.spoke(probe=self._probe)
        self._probe = False

    def finished(self) -> None:
        """It came to its end."""
        if self._ends():
            self._breaker.finished(probe=self._probe)

    def failed(self, error: ModelError) -> None:
        """It failed."""
        if not self._ends():
            return
        if error.status == 429:
            pause = PAUSE_S if error.retry_after is None else error.retry_after
            self._breaker.told_to_wait(pause, probe=self._probe)
        elif is_servers_doing(error):
            self._breaker.failed(probe=self._probe)
        else:
            self._breaker.left(probe=self._probe)

    def left(self) -> None:
        """The caller left it."""
        if self._ends():
            self._breaker.left(probe=self._probe)

    def _ends(self) -> bool:
        over, self._over = self._over, True
        return not over


class Lines:
    """Every deployment that was ever called from here."""

    def __init__(
        self,
        open_server: OpenServer,
        now: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """`now` is for breakers, `wall` for places."""
        self._open_server = open_server
        self._now = now
        self._wall = wall
        self._servers: dict[_Identity, Server] = {}
        self._breakers: dict[_Identity, Breaker] = {}
        """Those that were called last come last."""
        self._places: dict[str, Places] = {}

    def line(self, routed: ModelRouted, deployment: Deployment) -> Line:
        """A deployment as its route has it now. Raises MisconfiguredError."""
        return Line(routed, deployment, self._server(deployment), self._breaker(routed, deployment))

    def cooling(self, deployment: Deployment) -> float:
        """Seconds until a deployment may be called; 0: now."""
        known = self._breakers.get(_known_as(deployment))
        return known.cooling() if known else 0.0

    def places(self, deployment: Deployment) -> Places:
        """Those at a deployment, as many as its route gives it now."""
        places = self._places.setdefault(deployment.name, Places(deployment.concurrency, self._wall))
        places.resize(deployment.concurrency)
        return places

    def resize(self, routed: ModelRouted) -> None:
        """Have as many places at a route's deployments as it gives them now, where anybody ever wanted one."""
        for one in routed.deployments:
            if one.name in self._places:
                self.places(one)

    def view(self, routed: ModelRouted) -> View:
        """How a route's deployments are, as of now."""
        names = [one.name for one in routed.deployments]
        known = {one.name: breaker for one in routed.deployments if (breaker := self._breakers.get(_known_as(one)))}
        cooling = {name: left for name, breaker in known.items() if (left := breaker.cooling()) > 0}
        full = frozenset(name for name in names if name in self._places and self._places[name].queue.full)
        return View(cooling, full, frozenset(name for name in cooling if known[name].probed))

    def servers(self) -> Iterable[Server]:
        """Every server that was opened."""
        return self._servers.values()

    def _server(self, one: Deployment) -> Server:
        identity = _identity(one)
        if identity not in self._servers:
            try:
                self._servers[identity] = self._open_server(one)
            except ValueError as error:
                raise MisconfiguredError(f"deployment {one.name}: {error}") from error
        return self._servers[identity]

    def _breaker(self, routed: ModelRouted, one: Deployment) -> Breaker:
        known_as = _known_as(one)
        breaker = self._breakers.get(known_as) or Breaker(routed.breaker, self._now)
        self._breakers.pop(known_as, None)
        self._breakers[known_as] = breaker
        breaker.terms = routed.breaker
        if len(self._breakers) > MOST_KNOWN:
            del self._breakers[next(iter(self._breakers))]
        return breaker


def _identity(one: Deployment) -> _Identity:
    return one.kind, one.url, one.key, one.auth, one.api_version, one.priority, one.continues


def _known_as(one: Deployment) -> _Identity:
    """Whose health it is."""
    return one.name, one.model, *_identity(one)
