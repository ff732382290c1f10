"""Apache Kafka by way of aiokafka: what `klatch_streams.kafka_log` is made of.

Everything that touches aiokafka is in this package. It uses aiokafka's connections, protocol, record batches, producer
and group coordinator, and its own fetcher (`fetching`), because a stage must never wait for another partition's poll.
"""
