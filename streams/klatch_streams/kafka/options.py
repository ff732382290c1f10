"""What a connection to Kafka can be told, in one frozen object with defaults that were measured or reasoned for."""

import ssl
from dataclasses import dataclass
from typing import Any, Final

from klatch_schemas.topics import MAX_RECORD_BYTES

_HANDING_OVER_S: Final = 15.0


def rebalance_ms_for(drain_s: float) -> int:
    """How long a group waits in a rebalance for members that drain for `drain_s`; in ms.

    To hear of the rebalance takes a heartbeat (3 s), and to write state and offsets behind the drain may take as long
    as a partition's new leader (8-9 s). A member that takes longer, while its heartbeats go on, is left behind: until
    then nobody in the group has any partition.
    """
    return int((drain_s + _HANDING_OVER_S) * 1000)


@dataclass(frozen=True, slots=True)
class KafkaOptions:
    """How to reach a cluster, and how patient to be with it. Times are in seconds or milliseconds as named."""

    bootstrap: str
    """host:port, several with commas."""
    client_id: str = "klatch"
    security_protocol: str = "PLAINTEXT"
    ssl_context: ssl.SSLContext | None = None
    sasl_mechanism: str = "PLAIN"
    sasl_username: str | None = None
    sasl_password: str | None = None

    startup_s: float = 15.0
    """How long `KafkaLog.open` tries while the broker comes up."""
    patience_s: float = 30.0
    """How long a question or a silent partition may take before it is an error; brokers fail over in 8-9 s."""

    delivery_s: float = 30.0
    """How long an append may take, retries included, before it is AppendFailed."""
    idempotent: bool = True
    """docs/decisions/0002-producer-settings.md."""
    compression: str | None = None
    max_record_bytes: int = MAX_RECORD_BYTES
    """Below the topics' `max.message.bytes`, which counts the whole batch."""

    fetch_wait_ms: int = 250
    """How long an idle poll stays with the broker: the cost of an idle reader is four requests a second."""
    pause_ms: int = 5
    """How long a reader rests after a fetch that brought something, under load: fewer, larger fetches."""
    read_limit: int = 500
    """The most records one `read` gives."""

    session_ms: int = 10_000
    heartbeat_ms: int = 3_000
    rebalance_ms: int = 25_000
    """The group's patience with `revoked` (and `assigned`) of its members, see `rebalance_ms_for`."""
    instance_id: str | None = None
    """Static membership: stable for a slot, so that a restart within `session_ms` costs no rebalance."""

    def security(self) -> dict[str, Any]:
        """The arguments that every aiokafka client takes."""
        return {
            "security_protocol": self.security_protocol,
            "ssl_context": self.ssl_context,
            "sasl_mechanism": self.sasl_mechanism,
            "sasl_plain_username": self.sasl_username,
            "sasl_plain_password": self.sasl_password,
        }
