"""The ids that a decider has seen in the last 24 hours, or up to an hour longer, of record time.

Ids are kept in buckets of at most `BUCKET`, and of one hour, in order of arrival. Only the newest bucket changes, so a
snapshot rewrites only that one; a bucket is forgotten whole, when its newest id is old enough. All operations are O(1)
in the number of ids.
"""

from __future__ import annotations  # rpds classes take type arguments in annotations only

import msgspec
from rpds import HashTrieMap, HashTrieSet

HOUR_MS = 3_600_000
MEMORY_MS = 24 * HOUR_MS
LONGEST_MS = MEMORY_MS + HOUR_MS
"""For how long an id may be known, as the first of its bucket."""
BUCKET = 256
"""Keeps a bucket's snapshot under 40 kB, whatever the ids."""


class Bucket(msgspec.Struct, frozen=True):
    """Ids that came one after another."""

    newest_ms: int
    ids: tuple[str, ...]


class Seen(msgspec.Struct, frozen=True):
    """A set of ids that forgets."""

    ids: HashTrieSet[str] = HashTrieSet()
    buckets: HashTrieMap[int, Bucket] = HashTrieMap()
    """By number, without gaps; once all are forgotten they begin anew."""
    oldest: int = 0
    newest: int = 0

    @classmethod
    def of(cls, buckets: dict[int, Bucket]) -> Seen:
        """The set whose buckets these are."""
        if not buckets:
            return cls()
        ids = HashTrieSet([one for bucket in buckets.values() for one in bucket.ids])
        return cls(ids, HashTrieMap(buckets), min(buckets), max(buckets))

    def __contains__(self, one: str) -> bool:
        return one in self.ids

    def insert(self, now_ms: int, one: str) -> Seen:
        """Remember `one`, which is not remembered yet."""
        newest = self.newest
        bucket = self.buckets.get(newest)
        if bucket and (len(bucket.ids) >= BUCKET or bucket.newest_ms // HOUR_MS != now_ms // HOUR_MS):
            newest, bucket = newest + 1, None
        grown = Bucket(now_ms, (*bucket.ids, one) if bucket else (one,))
        return Seen(self.ids.insert(one), self.buckets.insert(newest, grown), self.oldest, newest)

    def forget(self, now_ms: int) -> Seen:
        """Forget the oldest buckets if they are old enough, of so many ids at a time that no event pays for many."""
        left = self
        while (bucket := left.buckets.get(left.oldest)) and bucket.newest_ms < now_ms - MEMORY_MS:
            if len(self.ids) - len(left.ids) + len(bucket.ids) > BUCKET:
                break
            left = left._without_oldest(bucket)
        return left

    def _without_oldest(self, bucket: Bucket) -> Seen:
        ids = self.ids
        for one in bucket.ids:
            ids = ids.discard(one)
        oldest = self.oldest + 1
        if self.newest < oldest:
            return Seen()  # as `of` makes it again: both go on with the same numbers
        return Seen(ids, self.buckets.discard(self.oldest), oldest, self.newest)
