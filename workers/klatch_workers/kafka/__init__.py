"""Apache Kafka as a child process: fetched once, started on loopback, gone when we are gone.

One KRaft node by default, three for the fault kit. Linux and macOS; every listener is on 127.0.0.1.
"""

from klatch_workers.kafka.cluster import Cluster
from klatch_workers.kafka.errors import (
    BrokerFailedError,
    DataFolderError,
    JarsError,
    JavaNotFoundError,
    KafkaChildError,
)
from klatch_workers.kafka.jars import Fetched, Progress, ensure_jars
from klatch_workers.kafka.node import Node
from klatch_workers.kafka.places import Places
from klatch_workers.kafka.properties import Options

__all__ = [
    "BrokerFailedError",
    "Cluster",
    "DataFolderError",
    "Fetched",
    "JarsError",
    "JavaNotFoundError",
    "KafkaChildError",
    "Node",
    "Options",
    "Places",
    "Progress",
    "ensure_jars",
]
