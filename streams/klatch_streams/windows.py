"""Amounts of the last minute, as a sliding window of seconds.

What was added in second `s` counts while the current second is at most `s + 60`. So no interval of 60 s ever holds
more than what was counted when its last amount was added, and an amount leaves at most a second late. Times are
record times and never go back.
"""

import msgspec

SLOT_MS = 1_000
SLOTS = 60


class Window(msgspec.Struct, frozen=True):
    """What was added in each second that still counts, oldest first."""

    slots: tuple[tuple[int, int], ...] = ()
    """(second since the epoch, amount)."""
    total: int = 0

    @classmethod
    def of(cls, slots: tuple[tuple[int, int], ...]) -> "Window":
        """The window that holds these slots."""
        return cls(slots, sum(amount for _, amount in slots))

    def at(self, now_ms: int) -> "Window":
        """The window without what no longer counts."""
        first = now_ms // SLOT_MS - SLOTS
        if not self.slots or self.slots[0][0] >= first:
            return self
        return Window.of(tuple(slot for slot in self.slots if slot[0] >= first))

    def add(self, now_ms: int, amount: int) -> "Window":
        """Count `amount` now, which is no earlier than anything counted before."""
        second = now_ms // SLOT_MS
        if self.slots and self.slots[-1][0] == second:
            slots = (*self.slots[:-1], (second, self.slots[-1][1] + amount))
        else:
            slots = (*self.slots, (second, amount))
        return Window(slots, self.total + amount)

    def correct(self, then_ms: int, by: int) -> "Window":
        """Change what was added at `then_ms`; what has left the window is not corrected."""
        second = then_ms // SLOT_MS
        for at, (slot, amount) in enumerate(self.slots):
            if slot == second:
                slots = (*self.slots[:at], (slot, amount + by), *self.slots[at + 1 :])
                return Window(slots, self.total + by)
        return self

    def wait_for(self, now_ms: int, amount: int, limit: int) -> int | None:
        """Milliseconds until `amount` fits under `limit` if nothing else comes; None: it never will."""
        excess = self.total + amount - limit
        if excess <= 0:
            return 0
        for second, held in self.slots:
            excess -= held
            if excess <= 0:
                return (second + SLOTS + 1) * SLOT_MS - now_ms
        return None
