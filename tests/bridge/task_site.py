"""An application of guillotina's for tests of what a task sees."""

from __future__ import annotations

from typing import Any

from guillotina import configure, task_vars
from guillotina.addons import Addon
from guillotina.component import get_utility
from guillotina.interfaces import IAbsoluteURL, IApplication, IContainer, IDefaultLayer, ILayers
from guillotina.request import Request
from guillotina.utils import get_authenticated_user, get_current_request, get_security_policy

from guillotina_bridge.context import request_data

app_settings: dict[str, Any] = {
    "auth_user_identifiers": ["tests.bridge.site.UserIdentifier"],
    "site_users": {},
}


class ILayerOfTests(IDefaultLayer):
    """The layer of an addon."""


@configure.addon(name="layered", title="Has a layer")
class Layered(Addon):
    @classmethod
    async def install(cls, container: Any, request: Request) -> None:
        layers = task_vars.registry.get().for_interface(ILayers)
        layers["active_layers"] |= {f"{ILayerOfTests.__module__}.{ILayerOfTests.__name__}"}


async def what_is_seen() -> dict[str, Any]:
    """All that guillotina says about who asks what."""
    request, user = get_current_request(), get_authenticated_user()
    container = task_vars.container.get()
    policy = get_security_policy(user)
    return {
        "db": task_vars.db.get().id,
        "same_tm": task_vars.tm.get() is task_vars.db.get().get_transaction_manager(),
        "container": container.id,
        "container_url": IAbsoluteURL(container)(),
        "container_url_for_request": IAbsoluteURL(container, request)(),
        "may_add": policy.check_permission("guillotina.AddContent", container),
        "user": user.id,
        "is_root": user is get_utility(IApplication, name="root").root_user,
        "user_type": type(user).__name__,
        "roles": sorted(name for name, setting in user.roles.items() if setting),
        "groups": list(user.groups),
        "user_data": getattr(user, "data", {}),
        "txn_user": task_vars.txn.get().user,
        "layer": ILayerOfTests.providedBy(request),
        "active_layers": sorted(task_vars.registry.get().for_interface(ILayers)["active_layers"]),
        "method": request.method,
        "url": str(request.url),
        "scheme": request.scheme,
        "host": request.host,
        "path": request.path,
        "query": list(request.query.items()),
        "query_string": request.query_string,
        "headers": sorted((name.lower(), value) for name, value in request.headers.items()),
        "annotations": request.annotations,
        "application": request.application is get_utility(IApplication, name="root"),
    }


@configure.service(
    method="POST", name="@scheduling", context=IContainer, permission="guillotina.AccessContent"
)
async def post_scheduling(context: Any, request: Request) -> dict[str, Any]:
    """What a request sees that schedules a task, and what goes into the task's message."""
    request.annotations = {"from": "a view", "list": [1, None]}
    get_authenticated_user().data = {"colour": "blue"}
    return {
        "seen": await what_is_seen(),
        "extra": {
            "db_id": task_vars.db.get().id,
            "container_id": context.id,
            "req_data": request_data(request),
        },
    }
