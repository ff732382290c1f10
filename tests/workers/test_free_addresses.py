"""Addresses that `klatch up` chooses for its own processes, seconds before these listen there."""

import socket

from klatch_workers.kafka.folder import is_free
from klatch_workers.up.everything import free_address


def handed_out() -> int:
    """A port that the system chose for somebody who asked for any."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_nobody_who_asks_the_system_for_any_port_is_given_one_that_was_chosen() -> None:
    chosen = [int(free_address().rpartition(":")[2]) for _ in range(20)]
    assert all(is_free(port) for port in chosen)
    # Systems hand out what is above 32768 (Linux) or 49152 (macOS).
    assert max(chosen) < 32_768 <= min(handed_out() for _ in range(20))
