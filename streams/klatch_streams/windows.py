"""Amounts of the last minute or hour, as a sliding window of sixty slots.

What was added in slot `s` counts while the current slot is at most `s + 60`. So no interval of sixty slots' length
ever holds more than what was counted when its last amount was added, and an amount leaves at most a slot late. Times
are record times and never go back.
"""

from bisect import bisect_left

import msgspec

SLOT_MS = 1_000
HOUR_SLOT_MS = 60_000
SLOTS = 60


class Window(msgspec.Struct, frozen=True, array_like=True):
    """What was added in each slot that still counts, oldest first."""

    slots: tuple[tuple[int, int], ...] = ()
    """(slot since the epoch, amount)."""
    total: int = 0
    slot_ms: int = SLOT_MS
    since_ms: int = -1
    """What was added up to then was not counted here."""

    @classmethod
    def of(cls, slots: tuple[tuple[int, int], ...], slot_ms: int = SLOT_MS, since_ms: int = -1) -> "Window":
        """The window that holds these slots."""
        return cls(slots, sum(amount for _, amount in slots), slot_ms, since_ms)

    def at(self, now_ms: int) -> "Window":
        """The window without what no longer counts."""
        first = now_ms // self.slot_ms - SLOTS
        if not self.slots or self.slots[0][0] >= first:
            return self
        kept = tuple(slot for slot in self.slots if slot[0] >= first)
        return Window.of(kept, self.slot_ms, self.since_ms)

    def add(self, now_ms: int, amount: int) -> "Window":
        """Count `amount` now, which is no earlier than anything counted before."""
        slot = now_ms // self.slot_ms
        if self.slots and self.slots[-1][0] == slot:
            slots = (*self.slots[:-1], (slot, self.slots[-1][1] + amount))
        else:
            slots = (*self.slots, (slot, amount))
        return Window(slots, self.total + amount, self.slot_ms, self.since_ms)

    def correct(self, then_ms: int, by: int) -> "Window":
        """Change what was added at `then_ms`; what has left the window, or came before it, is not corrected."""
        then = then_ms // self.slot_ms
        if then_ms <= self.since_ms:
            return self
        slots = self.slots
        at = bisect_left(slots, (then,))
        if at == len(slots) or slots[at][0] != then:
            return self
        corrected = (*slots[:at], (then, slots[at][1] + by), *slots[at + 1 :])
        return Window(corrected, self.total + by, self.slot_ms, self.since_ms)

    def wait_for(self, now_ms: int, amount: int, limit: int) -> int | None:
        """Milliseconds until `amount` fits under `limit` if nothing else comes; None: it never will."""
        excess = self.total + amount - limit
        if excess <= 0:
            return 0
        for slot, held in self.slots:
            excess -= held
            if excess <= 0:
                return (slot + SLOTS + 1) * self.slot_ms - now_ms
        return None

    def empty_after(self, now_ms: int) -> int:
        """Milliseconds until nothing that was added so far counts any more."""
        return (self.slots[-1][0] + SLOTS + 1) * self.slot_ms - now_ms if self.slots else 0
