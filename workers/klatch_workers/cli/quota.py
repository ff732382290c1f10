"""`klatch quota set|show|history`: what a tenant may use, has used, and who decided so.

Exit codes: 0 done, 1 it failed, 2 misused, 3 Kafka cannot be reached.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from typing import Any, Final

import click
from pydantic import ValidationError

from klatch_schemas.codec import explain
from klatch_schemas.events import Limits, TenantConfigured
from klatch_schemas.ids import Tenant
from klatch_streams.quota.changes import Change as Changed
from klatch_streams.quota.changes import scope_text
from klatch_streams.quota.ledger import Ledger
from klatch_streams.quota.report import Standing, standings
from klatch_workers.cli.context import (
    MISUSED,
    CommandFailed,
    Context,
    log_options,
    opened_log,
    perform,
    say_json,
)
from klatch_workers.quotas import Change, UnknownTenant, read_quota, set_quota
from klatch_workers.tenants import limits_money

COUNTS: Final = (
    "requests_per_minute",
    "tokens_per_minute",
    "tokens_per_day",
    "tokens_per_month",
    "concurrent_requests",
    "burst_requests",
    "burst_tokens",
)
MONEY: Final = ("cost_per_day", "cost_per_month")
_MOST: Final = 10**15
"""Of what is counted, millionths of a dollar too: far beyond any use, and exact wherever JSON is read."""
_MICROS: Final = 1_000_000
_CITED: Final = 40
_SHOWN: Final = 20
_NONE: Final = "none"


@click.group()
def quota() -> None:
    """What a tenant may use: set limits, show what is used of them, and who changed them."""


class _Count(click.ParamType):
    """A whole number, or `none` for no limit."""

    name = "N|none"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value == _NONE:
            return _NONE
        digits = str(value).lstrip("0") or "0"
        if not str(value).isdecimal():
            self.fail(f"{_cited(value)} is neither a whole number nor `none` (no limit)", param, ctx)
        if len(digits) > len(str(_MOST)) or int(digits) > _MOST:
            self.fail(f"{_cited(value)} is not between 0 and {_MOST:,}; `none` is no limit", param, ctx)
        return int(digits)


class _Dollars(click.ParamType):
    """US dollars, kept in millionths; or `none` for no limit."""

    name = "USD|none"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value == _NONE:
            return _NONE
        try:
            dollars = Decimal(value)
        except InvalidOperation:
            told = "is neither an amount of US dollars, such as 12.50, nor `none` (no limit)"
            self.fail(f"{_cited(value)} {told}", param, ctx)
        if dollars.is_finite() and not 0 <= dollars <= _MOST // _MICROS:
            self.fail(f"{_cited(value)} is not between 0 and {_MOST // _MICROS:,}; `none` is no limit", param, ctx)
        if not dollars.is_finite() or dollars != round(dollars, 6):
            self.fail(f"{_cited(value)} is no amount of US dollars that can be counted in millionths", param, ctx)
        return int(dollars * _MICROS)


def _cited(value: object) -> str:
    said = str(value)
    return repr(said if len(said) <= _CITED else f"{said[:_CITED]}…")


def _limit_options(command: Any) -> Any:
    for name in reversed((*COUNTS, *MONEY)):
        kind = _Dollars() if name in MONEY else _Count()
        command = click.option(f"--{name.replace('_', '-')}", name, type=kind)(command)
    return command


def _common(command: Any) -> Any:
    return click.argument("tenant")(log_options(command))


@quota.command(name="set")
@_common
@click.option("--use-case", metavar="NAME|*", help="Only requests of this use case; *: of each by itself.")
@click.option("--person", metavar="NAME|*", help="Only requests of this person; *: of each by itself.")
@click.option("--model", metavar="NAME|*", help="Only requests for this model; *: for each by itself.")
@_limit_options
@click.option("--weight", type=float, help="Its share where a model's capacity is the bottleneck: 0.01 to 100.")
@click.option("--priority", type=click.IntRange(0, 9), help="The best priority that its requests get; 0 is the best.")
@click.option("--again", is_flag=True, help="Write TENANT's settings into its log also if nothing changes.")
@click.option("--by", default="klatch quota", show_default=True, help="Who changes it; stands in the history.")
def set_(tenant: str, again: bool, by: str, as_json: bool, **options: Any) -> None:
    """Change what TENANT may use; in force for its next request. What is not named stays, `none` takes a limit away.

    \b
    klatch quota set acme --tokens-per-day 1000000 --cost-per-month 250 --weight 2
    klatch quota set acme --person '*' --tokens-per-day 20000
    klatch quota set acme --use-case support --model gpt-5 --requests-per-minute 60 --burst-requests 30
    """
    named = {dimension: options.pop(dimension) for dimension in ("use_case", "person", "model")}
    change = _change({name: value for name, value in named.items() if value is not None}, options, again=again)

    async def work() -> int:
        context = Context.read(**options)
        async with opened_log(context) as log:
            try:
                said = await set_quota(log, context.namespace, Tenant(tenant), change, by, again=again)
            except UnknownTenant as error:
                raise CommandFailed(str(error), MISUSED) from error
            except ValidationError as error:
                raise CommandFailed(explain(error), MISUSED) from error
        if as_json:
            say_json(_settings(said))
        else:
            click.echo("\n".join(_setting_lines(said)))
        return 0

    perform(work, as_json=as_json)


@quota.command()
@_common
@click.option("--all", "all_", is_flag=True, help=f"Every person and model, not only the {_SHOWN} that used most.")
def show(tenant: str, all_: bool, as_json: bool, **options: Any) -> None:
    """What TENANT may use, and what it has used, as admission would count it now."""

    def say(ledger: Ledger) -> None:
        found = sorted(standings(ledger), key=lambda one: (bool(one.scope), -one.used))
        if as_json:
            settings = ledger.rules.settings
            limits = [_standing(one) for one in found]
            rules = [rule.model_dump(exclude_none=True) for rule in settings.rules]
            said = {"weight": settings.weight, "priority": settings.priority, "limits": limits, "rules": rules}
            say_json({"tenant": tenant, **said})
        else:
            click.echo("\n".join(_standing_lines(ledger, found, None if all_ else _SHOWN)))

    _read(tenant, say, as_json=as_json, **options)


@quota.command()
@_common
def history(tenant: str, as_json: bool, **options: Any) -> None:
    """Who changed TENANT's quotas, when and how: the last 100 changes, oldest first."""

    def say(ledger: Ledger) -> None:
        for change in ledger.changes:
            when = datetime.fromtimestamp(change.at_ms / 1_000, UTC).isoformat(timespec="seconds")
            if as_json:
                say_json({"tenant": tenant, "at_ms": change.at_ms, "by": change.by, "changes": list(change.what)})
            else:
                click.echo("\n".join(_change_lines(when, change)))
        if not ledger.changes and not as_json:
            click.echo(f"nobody has changed the quotas of {tenant}")

    _read(tenant, say, as_json=as_json, **options)


def _read(tenant: str, say: Callable[[Ledger], None], *, as_json: bool, **options: Any) -> None:
    async def work() -> int:
        context = Context.read(**options)
        async with opened_log(context) as log:
            try:
                ledger = await read_quota(log, context.namespace, Tenant(tenant), int(time.time() * 1_000))
            except UnknownTenant as error:
                raise CommandFailed(str(error), MISUSED) from error
        say(ledger)
        return 0

    perform(work, as_json=as_json)


# --- reading options --------------------------------------------------------------------------------------------------


def _change(scope: Mapping[str, str], options: dict[str, Any], *, again: bool) -> Change:
    """The change that options ask for; takes them out of `options`."""
    limits: dict[str, int | None] = {}
    for name in (*COUNTS, *MONEY):
        value = options.pop(name)
        if value is not None:
            field = name.replace("cost_", "cost_micros_") if name in MONEY else name
            limits[field] = None if value == _NONE else value
    weight, priority = options.pop("weight"), options.pop("priority")
    if scope and (weight is not None or priority is not None):
        raise click.UsageError(
            "--weight and --priority are the whole tenant's: leave out --use-case, --person, --model"
        )
    if not limits and weight is None and priority is None and not again:
        raise click.UsageError("nothing to set: name a limit, such as --tokens-per-day 100000, --weight or --priority")
    return Change(scope, limits, weight, priority)


# --- showing ----------------------------------------------------------------------------------------------------------


def _settings(tenant: TenantConfigured) -> dict[str, Any]:
    return {
        "tenant": tenant.tenant,
        "limits": tenant.limits.model_dump(exclude_none=True),
        "rules": [rule.model_dump(exclude_none=True) for rule in tenant.rules],
        "weight": tenant.weight,
        "priority": tenant.priority,
    }


def _setting_lines(tenant: TenantConfigured) -> list[str]:
    lines = [f"{tenant.tenant}: weight {tenant.weight:g}, priority {tenant.priority}"]
    if tenant.limits != Limits():
        lines += _limit_lines("all of it", tenant.limits)
    for rule in tenant.rules:
        lines += _limit_lines(scope_text(rule), rule.limits)
    if limits_money(tenant) and not tenant.prices:
        lines.append("  no route has a price: nothing is reserved and no money counted until one has")
    return lines


def _limit_lines(scope: str, limits: Limits) -> list[str]:
    """What limits a scope; a rule without limits excepts it from a broader one."""
    said = [_amount(name, most) for name, most in limits.model_dump(exclude_none=True).items()]
    return [f"  {scope:<32} {limit}" for limit in said or ["no limits"]]


def _standing(one: Standing) -> dict[str, Any]:
    return {"scope": one.scope, "limit": one.limit, "most": one.most, "used": one.used, "left": one.left}


def _standing_lines(ledger: Ledger, found: Sequence[Standing], most: int | None) -> list[str]:
    settings = ledger.rules.settings
    lines = [f"{ledger.tenant}: weight {settings.weight:g}, priority {settings.priority}"]
    whole = [one for one in found if not one.scope]
    parts = [one for one in found if one.scope]
    for one in (*whole, *parts[:most]):
        scope = " ".join(f"{dimension}={name}" for dimension, name in one.scope.items()) or "all of it"
        lines.append(f"  {scope:<32} {_amount(one.limit, one.most):<44} used {_plain(one.limit, one.used)}")
    if len(parts) > len(parts[:most]):
        lines.append(f"  and {len(parts) - len(parts[:most])} more: --all shows them")
    if not settings.rules and not whole:
        lines.append("  no limits")
    lines += [
        f"  rule {line.lstrip()}" for rule in settings.rules for line in _limit_lines(scope_text(rule), rule.limits)
    ]
    return lines


def _change_lines(when: str, change: Changed) -> list[str]:
    return [f"{when}  {change.by or '?'}", *(f"    {line}" for line in change.what)]


def _amount(name: str, most: int) -> str:
    return f"{name.replace('cost_micros', 'cost').replace('_', ' ')}: {_plain(name, most)}"


def _plain(name: str, amount: int) -> str:
    return f"${amount / 1_000_000:,.6f}" if name.startswith("cost") else f"{amount:,}"
