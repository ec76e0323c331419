"""A small guillotina application with two tasks; its README says how to try it."""

from __future__ import annotations

from typing import Any

from guillotina import configure

app_settings: dict[str, Any] = {"applications": ["guillotina_bridge"]}


def includeme(root: Any) -> None:
    configure.scan("guillotina_site.services")
