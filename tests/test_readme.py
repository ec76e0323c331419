"""The README says what is true."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_its_table_of_settings_is_made_of_the_fields() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "settings_table.py"))
    assert script["within"]((ROOT / "README.md").read_text()) == script["table"](), (
        "run: python scripts/settings_table.py --write"
    )
