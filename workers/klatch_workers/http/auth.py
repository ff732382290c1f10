"""Who is asking: `Authorization: Bearer KEY`, looked up by its hash.

Keys are random and known only by their sha256. What is looked up is the digest of what was sent: how long a lookup
takes tells about digests, which nobody can steer, and nothing about keys. Keys are never logged.
"""

import hashlib
from collections.abc import Mapping

from klatch_schemas.errors import Unauthorized
from klatch_schemas.ids import Tenant


def tenant_of(authorization: str | None, keys: Mapping[str, Tenant]) -> Tenant:
    """The tenant whose key this is. Raises Unauthorized."""
    if not authorization:
        raise Unauthorized("no API key: send it as `Authorization: Bearer KEY`")
    scheme, _, key = authorization.partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise Unauthorized("the Authorization header is not `Bearer KEY`")
    digest = hashlib.sha256(key.strip().encode()).hexdigest()
    tenant = keys.get(digest)
    if tenant is None:
        raise Unauthorized("no tenant has this API key; ask your operator for one")
    return tenant
