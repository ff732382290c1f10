"""The reading side of views over HTTP, for klatch's own processes and for scrapers.

Every answer but `/healthz` needs `Authorization: Bearer` with the internal key: views know all tenants. While tables
are restored or handed over the answer is 503, never a count that misses some.
"""

import hmac
import time
from collections.abc import Awaitable, Callable

from aiohttp import web

from klatch_schemas.errors import InvalidRequest, KlatchError, Unauthorized, Unavailable
from klatch_workers.views.aggregate import by_group
from klatch_workers.views.app import Views
from klatch_workers.views.report import exposition, rows_of
from klatch_workers.views.tables import KEPT_S, MINUTE_S

_MOST_MINUTES = KEPT_S // MINUTE_S
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def reading_side(views: Views, internal_key: str | None) -> web.Application:
    """The web application. Without a key it answers nobody."""

    async def health(_: web.Request) -> web.Response:
        _refuse_recovering(views)
        return web.json_response({"status": "ok"})

    async def usage(request: web.Request) -> web.Response:
        _authorize(request, internal_key)
        _refuse_recovering(views)
        return web.json_response(_usage(views, request.query.get("tenant"), _minutes(request), time.time()))

    async def metrics(request: web.Request) -> web.Response:
        _authorize(request, internal_key)
        text = exposition(views.totals, views.skipped)
        return web.Response(text=text, headers={"content-type": "text/plain; version=0.0.4; charset=utf-8"})

    application = web.Application(middlewares=[_errors])
    application.router.add_get("/healthz", health)
    application.router.add_get("/v1/views/usage", usage)
    application.router.add_get("/metrics", metrics)
    return application


def _usage(views: Views, tenant: str | None, minutes: int, now_s: float) -> dict[str, object]:
    # The minute that is under way counts as one.
    start_s = (now_s // MINUTE_S - minutes + 1) * MINUTE_S
    tallies = by_group(pair for pair in views.since(start_s) if tenant in (None, pair[0].tenant))
    return {
        "from_ms": int(start_s * 1000),
        "until_ms": int(now_s * 1000),
        "complete": views.complete,
        "rows": rows_of(tallies),
    }


def _minutes(request: web.Request) -> int:
    said = request.query.get("minutes", "5")
    if not said.isascii() or not said.isdigit() or not 1 <= int(said[:9]) <= _MOST_MINUTES:
        raise InvalidRequest(f"minutes is a whole number from 1 to {_MOST_MINUTES}", param="minutes")
    return int(said)


def _authorize(request: web.Request, key: str | None) -> None:
    if key is None:
        raise Unauthorized("the views worker has no key to check: set KLATCH_INTERNAL_KEY for it and for its callers")
    given = request.headers.get("authorization", "").encode()
    if not hmac.compare_digest(given, f"Bearer {key}".encode()):
        raise Unauthorized("send the internal key as `Authorization: Bearer KEY`")


def _refuse_recovering(views: Views) -> None:
    if views.recovering:
        raise Unavailable("the tables are being restored; try again", retry_after_ms=1000)


@web.middleware
async def _errors(request: web.Request, handler: _Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except KlatchError as error:
        said = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
        wait = {} if error.retry_after_ms is None else {"retry-after": str(-(-error.retry_after_ms // 1000))}
        return web.json_response({"error": said}, status=error.status, headers=wait)
