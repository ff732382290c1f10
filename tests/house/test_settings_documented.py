"""The operations page names every setting, and no other."""

import re
from pathlib import Path

from klatch_workers.settings import PREFIX, Settings

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"


def test_the_operations_page_names_every_setting_and_no_other() -> None:
    named = set(re.findall(r"KLATCH_[A-Z_]+", PAGE.read_text()))
    assert named == {PREFIX + name.upper() for name in Settings.model_fields}
