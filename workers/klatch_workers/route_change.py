"""A route with one deployment changed, as `klatch models set` is told; all else of it stays.

What is not told is kept, with two exceptions: a key goes to no host that it was not given for, and what only one kind
of server has is not carried to another kind. To take something away, or for several deployments at once, `apply` a
file.
"""

from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import urlsplit

from klatch_schemas.events import Deployment, ModelRouted
from klatch_workers.models_file import ModelsFileError, checked

_OF_A_KIND: Final = ("auth", "api_version", "priority", "continues")


def with_one_changed(route: ModelRouted | None, alias: str, told: Mapping[str, Any], by: str = "") -> ModelRouted:
    """The route of an alias, new or as it stands, with what is told of a deployment.

    `told["name"]` says which, and may be left out where there is no more than one. Raises ModelsFileError;
    ValidationError for an alias that cannot be.
    """
    if route is None:
        return ModelRouted(alias=alias, deployments=(checked({"name": _name_from(alias), **told}),), by=by)
    old = _meant(route, told.get("name"))
    new = checked({**_kept(old, told), **told})
    deployments = tuple(new if one is old else one for one in route.deployments)
    return route.model_copy(update={"deployments": deployments, "by": by})


def _meant(route: ModelRouted, name: str | None) -> Deployment:
    names = [one.name for one in route.deployments]
    if name is None and len(names) == 1:
        return route.deployments[0]
    if name in names:
        return route.deployments[names.index(name)]
    wrong = "goes to more than one deployment" if name is None else f"has no deployment {name}"
    raise ModelsFileError(
        f"{route.alias} {wrong}: give --name with one of {', '.join(names)}, or `klatch models apply` a file"
    )


def _kept(old: Deployment, told: Mapping[str, Any]) -> dict[str, Any]:
    kept = old.model_dump()
    kind, url = told.get("kind", old.kind), told.get("url", old.url)
    if kind != old.kind:
        kept = {name: value for name, value in kept.items() if name not in _OF_A_KIND}
    if kind == "local":
        kept.pop("url")
    if kind == "local" or urlsplit(url)[:2] != urlsplit(old.url)[:2]:
        kept.pop("key")
    return kept


def _name_from(alias: str) -> str:
    said = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "-" for letter in alias)
    return said.strip("._-")[:64] or "deployment"
