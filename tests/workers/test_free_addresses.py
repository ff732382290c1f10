"""Addresses that `klatch up` chooses for its own processes, seconds before these listen there."""

from klatch_workers.kafka.folder import is_free
from klatch_workers.up.everything import free_address


def test_what_is_chosen_is_free_and_stands_below_what_systems_hand_out() -> None:
    chosen = [int(free_address().rpartition(":")[2]) for _ in range(20)]
    assert all(is_free(port) for port in chosen)
    # Whoever asks for any port gets one above 32768 (Linux) or 49152 (macOS), unless the system was told otherwise.
    assert max(chosen) < 32_768
