"""From a deployment in the ledger to a gateway to its server: the keys and the local server come from the settings."""

from klatch_agents.gateway.dialect import Dialect
from klatch_agents.gateway.openai_compatible import Endpoint, OpenAICompatible
from klatch_agents.gateway.routing import how_it_continues
from klatch_schemas.events import CircuitBreaker, Deployment, ModelRouted
from klatch_workers.books import DEFAULT
from klatch_workers.model_keys import ModelKeys
from klatch_workers.settings import Settings


class ModelServers:
    """Opens the servers that routes name."""

    def __init__(self, settings: Settings) -> None:
        """Raises MisconfiguredError for a keys file that cannot be used."""
        self._settings = settings
        self._keys = ModelKeys(settings.keys_file)
        self._keys.check()

    def open(self, deployment: Deployment) -> OpenAICompatible:
        """A gateway to a deployment's server. Raises ValueError for one that there is no way to."""
        if deployment.kind == "local":
            return OpenAICompatible(self._local(deployment))
        dialect = Dialect(deployment.kind, deployment.api_version, deployment.auth, deployment.priority)
        key_of = self._keys.named(deployment.key) if deployment.key else None
        continues = how_it_continues(deployment)
        return OpenAICompatible(Endpoint(deployment.url, dialect=dialect, key_of=key_of, continues=continues))

    def default_route(self) -> ModelRouted | None:
        """Where models without a route go: to the server of `KLATCH_MODEL_URL`, if there is one.

        Its breaker never opens: with nowhere else to go, what one request meets must not decide for the others.
        """
        if self._settings.model_url is None:
            return None
        continues = self._settings.model_continues
        own = Deployment(name=DEFAULT, kind="local", model=self._settings.model, continues=continues)
        return ModelRouted(alias="*", deployments=(own,), breaker=CircuitBreaker(failures=0))

    def _local(self, deployment: Deployment) -> Endpoint:
        settings = self._settings
        if settings.model_url is None:
            raise ValueError("`local` is the server that KLATCH_MODEL_URL names, and it is not set here")
        key = settings.model_key.get_secret_value() if settings.model_key else ""
        return Endpoint(settings.model_url, key, continues=how_it_continues(deployment))
