"""Settings: the environment, read once; a misspelt name is found when a process starts."""

import pytest
from pydantic import ValidationError

from klatch_workers.settings import UnknownSetting, host_port, read_settings


def test_a_misspelt_setting_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(UnknownSetting, match="did you mean KLATCH_MODEL_URL"):
        read_settings({"KLATCH_MODLE_URL": "http://127.0.0.1/v1"})


def test_options_go_over_the_environment() -> None:
    settings = read_settings({"KLATCH_KAFKA": "one:9092", "KLATCH_NAMESPACE": "test"}, kafka="two:9092", namespace=None)
    assert (settings.kafka, settings.namespace) == ("two:9092", "test")


def test_a_value_of_the_wrong_form_is_an_error_that_names_the_setting() -> None:
    with pytest.raises(ValidationError, match="max_in_flight"):
        read_settings({"KLATCH_MAX_IN_FLIGHT": "many"})


@pytest.mark.parametrize("level", ["inof", "", "20"])
def test_a_level_of_logs_that_is_none_is_told_with_those_that_are(level: str) -> None:
    with pytest.raises(ValidationError, match="KLATCH_LOG_LEVEL is one of debug, info, warning, error, critical"):
        read_settings({"KLATCH_LOG_LEVEL": level})
    assert read_settings({"KLATCH_LOG_LEVEL": "Warning"}).log_level == "warning"


def test_secrets_are_not_shown() -> None:
    assert "very-secret" not in repr(read_settings({"KLATCH_MODEL_KEY": "sk-very-secret"}))


@pytest.mark.parametrize(
    ("listen", "pair"),
    [("127.0.0.1:80", ("127.0.0.1", 80)), (":0", ("127.0.0.1", 0)), ("[::1]:80", ("::1", 80))],
)
def test_addresses_are_read(listen: str, pair: tuple[str, int]) -> None:
    assert host_port(listen) == pair


@pytest.mark.parametrize(
    "listen",
    ["localhost", "localhost:", "localhost:http", "localhost:65536", "localhost:²", "http://localhost:80"],
)
def test_an_address_that_is_none_says_what_is_wanted(listen: str) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        host_port(listen)
    with pytest.raises(ValidationError, match="HOST:PORT"):
        read_settings(http=listen)
