"""The operations page names every setting, and no other."""

import re
from pathlib import Path

from klatch_workers.settings import PREFIX, Settings

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"
NOT_A_SETTING = {"KLATCH_LOCAL_API_KEY"}
"""Set by `klatch up` for a child process of its own."""


def test_the_operations_page_names_every_setting_and_no_other() -> None:
    named = set(re.findall(r"KLATCH_[A-Z_]+", PAGE.read_text()))
    assert named - NOT_A_SETTING == {PREFIX + name.upper() for name in Settings.model_fields}
