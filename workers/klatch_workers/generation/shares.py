"""Which requests of a partition may begin: at most so many at once, and of one tenant only what leaves others room.

A tenant's next request is let in if fewer of its own are let in than there is room for besides: alone it may have half
of the room, beside another that floods a third, and so on, so that there is always room for one more. From: Choudhury,
Hahne, "Dynamic Queue Length Thresholds for Shared-Memory Packet Switches", IEEE/ACM Transactions on Networking, 1998,
with its factor 1.
"""

from bisect import bisect_left, insort
from collections import Counter


class Shares:
    """How much of the room each tenant has, and who waits for a share; requests are named by their offsets."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._held = Counter[str]()
        self._tenants = dict[int, str]()
        """Of the requests that have been let in."""
        self._waiting = dict[str, list[int]]()
        """In the order of admission."""

    def ask(self, tenant: str, offset: int) -> None:
        """Put a request in line."""
        insort(self._waiting.setdefault(tenant, []), offset)

    def has(self, offset: int) -> bool:
        """Whether the request was let in."""
        return offset in self._tenants

    def next(self) -> int | None:
        """Let in the first request of whoever has least, and of these the oldest, if there is room for one more."""
        if not self._waiting:
            return None
        tenant = min(self._waiting, key=lambda tenant: (self._held[tenant], self._waiting[tenant][0]))
        if self._held[tenant] >= self._room - len(self._tenants):
            return None
        offset = self._waiting[tenant][0]
        self._withdraw(tenant, offset)
        self._held[tenant] += 1
        self._tenants[offset] = tenant
        return offset

    def leave(self, tenant: str, offset: int) -> None:
        """The request needs no share any more, whether it has one, waits for one or never asked."""
        if self._tenants.pop(offset, None) is None:
            self._withdraw(tenant, offset)
            return
        self._held[tenant] -= 1
        if not self._held[tenant]:
            del self._held[tenant]

    def _withdraw(self, tenant: str, offset: int) -> None:
        line = self._waiting.get(tenant, [])
        at = bisect_left(line, offset)
        if at < len(line) and line[at] == offset:
            del line[at]
            if not line:
                del self._waiting[tenant]
