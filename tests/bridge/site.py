"""The tests' site: an application of guillotina's, with users and tasks for everybody's tests.

Its users are in the setting `site_users`; see `Site.add_user`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from guillotina import app_settings as settings
from guillotina import configure
from guillotina.auth.users import GuillotinaUser
from guillotina.interfaces import IApplicationInitializedEvent

from guillotina_bridge import task

app_settings: dict[str, Any] = {
    "applications": ["guillotina_bridge"],
    "auth_user_identifiers": ["tests.bridge.site.UserIdentifier"],
    "site_users": {},
}


class UserIdentifier:
    """Finds the users of the setting `site_users`, for guillotina."""

    async def get_user(self, token: dict[str, Any]) -> GuillotinaUser | None:
        known = settings["site_users"].get(token.get("id"))
        if known is None:
            return None
        user = GuillotinaUser(
            token["id"], groups=known["groups"], roles=dict.fromkeys(known["roles"], 1)
        )
        user.password = known["password"]
        return user


AT_START: list[Callable[[], Awaitable[Any]]] = []
"""What this application does when guillotina has started."""


@configure.subscriber(for_=IApplicationInitializedEvent)
async def at_start(event: object) -> None:
    for do in AT_START:
        await do()


@task
async def add(one: int, two: int, three: str = "blah") -> int:
    return one + two
