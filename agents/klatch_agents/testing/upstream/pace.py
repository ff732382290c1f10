"""Many paced streams on few timers: what is due in the same millisecond shares one."""

import asyncio
import math
from collections.abc import Callable


class Wheel:
    """Calls back at a time of the loop's clock, at most a millisecond late."""

    def __init__(self) -> None:
        self._slots: dict[int, list[Callable[[], None]]] = {}

    def at(self, when: float, call: Callable[[], None]) -> None:
        slot = math.ceil(when * 1000)
        waiting = self._slots.get(slot)
        if waiting is None:
            self._slots[slot] = [call]
            asyncio.get_running_loop().call_at(slot / 1000, self._turn, slot)
        else:
            waiting.append(call)

    def _turn(self, slot: int) -> None:
        for call in self._slots.pop(slot):
            call()
