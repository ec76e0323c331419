"""Print the README's table of settings, made of their fields.

``python scripts/settings_table.py --write`` puts it into README.md, between its marks.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from amqp_tasks.settings import ENV_PREFIX, Settings, hide_password

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- settings: begin -->", "<!-- settings: end -->"


def table() -> str:
    """Return the table in Markdown."""
    rows = ["| setting | default | meaning |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = _shown(name, field.default)
        rows.append(f"| `{name}` | {default} | {field.description} |")
    return "\n".join(rows)


def within(text: str) -> str:
    """Return the part of a README that is the table."""
    return text.split(BEGIN)[1].split(END)[0].strip()


def _shown(name: str, value: Any) -> str:
    if value is None or value == ():
        return ""
    if name.endswith("_url"):
        value = hide_password(value)
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


if __name__ == "__main__":
    assert ENV_PREFIX == "AMQP_TASKS_", "the README names it"
    if "--write" in sys.argv:
        before, rest = README.read_text().split(BEGIN)
        README.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.split(END)[1]}")
    else:
        print(table())
