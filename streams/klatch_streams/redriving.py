"""Records that go from `dead.letters` back to where they came from, and the receipts that say so.

A redriven record is the original: key, value and headers, so every id in it is the same, and whoever has done its
work before can know. What happened to it since stands in `dead-*` headers, and is carried on into its effects.
"""

from klatch_schemas.records import Draft, Record
from klatch_streams import dead_headers as dead
from klatch_streams.addresses import MOVED_FROM


def redriven(letter: Record, value: bytes | None) -> Draft:
    """The record of a letter, to be written again with the whole `value`.

    It goes where Kafka's partitioner puts its key, and without a key where it came from. A record that a stage has
    moved to its place may be moved once more.
    """
    headers = [
        *((name, said) for name, said in letter.headers if name not in dead.OURS and name != MOVED_FROM),
        (dead.FIRST_SEEN, b"%d" % dead.number_in(letter, dead.FIRST_SEEN)),
        (dead.REDRIVEN, b"%d" % (dead.times_redriven(letter) + 1)),
        (dead.ATTEMPTS, b"%d" % dead.number_in(letter, dead.ATTEMPTS)),
        (dead.ORIGIN, origin_of_letter(letter).encode()),
    ]
    number = dead.number_in(letter, dead.PARTITION) if letter.key is None else None
    return Draft(topic_of(letter), letter.key, value, headers, number)


def topic_of(letter: Record) -> str:
    """The full name of the topic that a letter's record came from."""
    return (letter.header(dead.TOPIC) or b"").decode(errors="replace")


def origin_of_letter(letter: Record) -> str:
    """Of which record a letter tells: letters of one origin are one record's history."""
    if said := letter.header(dead.ORIGIN):
        return said.decode(errors="replace")
    parts = (letter.header(name) or b"" for name in (dead.TOPIC, dead.PARTITION, dead.OFFSET))
    return b"/".join(parts).decode(errors="replace")


def receipt(letter: Record) -> Draft:
    """The note that `letter` was redriven, beside it in `dead.letters`."""
    headers = [
        (dead.RECEIPT, b"%d" % letter.offset),
        (dead.ORIGIN, origin_of_letter(letter).encode()),
        (dead.REDRIVEN, b"%d" % (dead.times_redriven(letter) + 1)),
    ]
    return Draft(letter.partition.topic, letter.key, None, headers, letter.partition.number)
