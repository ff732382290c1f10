"""What can go wrong before a Kafka of our own answers. Each message says what to do.

KafkaChildError
├── JavaNotFoundError     no Java runtime that can run it
├── JarsError             the jars are not here and cannot be fetched, or are not what the lock says
├── DataFolderError       the data folder belongs to something else, or is in use
└── BrokerFailedError     a node ended, or did not answer in time
"""


class KafkaChildError(Exception):
    """Base of all of them."""


class JavaNotFoundError(KafkaChildError):
    pass


class JarsError(KafkaChildError):
    pass


class DataFolderError(KafkaChildError):
    pass


class BrokerFailedError(KafkaChildError):
    pass
