"""Where tasks are scheduled: each answers with the task's id, and does not wait for it."""

from __future__ import annotations

from typing import Any

from guillotina import configure
from guillotina.content import Item
from guillotina.interfaces import IContainer, IItem
from guillotina.request import Request

from .tasks import import_items, set_title


def body(required: str, **properties: Any) -> dict[str, Any]:
    """Describe a JSON object, for guillotina to check and swagger to show."""
    schema = {"type": "object", "properties": properties, "required": [required]}
    return {"required": True, "content": {"application/json": {"schema": schema}}}


@configure.service(
    method="POST",
    name="@import",
    context=IContainer,
    permission="guillotina.AddContent",
    summary="Creates items in the background",
    validate=True,
    requestBody=body(
        "names",
        names={"type": "array", "items": {"type": "string"}},
        pause={"type": "number", "minimum": 0, "maximum": 3600},
    ),
)
async def post_import(context: IContainer, request: Request) -> dict[str, str]:
    wanted = await request.json()
    state = await import_items(wanted["names"], pause=wanted.get("pause", 0))
    return {"task_id": state.task_id}


@configure.service(
    method="POST",
    name="@set-title",
    context=IItem,
    permission="guillotina.ModifyContent",
    summary="Changes the title in the background",
    validate=True,
    requestBody=body("title", title={"type": "string"}),
)
async def post_set_title(context: Item, request: Request) -> dict[str, str]:
    wanted = await request.json()
    state = await set_title(context, wanted["title"])
    return {"task_id": state.task_id}
