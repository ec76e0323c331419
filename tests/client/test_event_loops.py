"""One app on one event loop after the other, in real time."""

from __future__ import annotations

import anyio
import pytest

from ..runtime import shop
from ..runtime.harness import MakeApp


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_an_app_can_be_used_on_one_event_loop_after_the_other(
    make_app: MakeApp, backend: str
) -> None:
    app = make_app()
    add = app.task(shop.add)

    async def use() -> int:
        async with app.worker():
            return await (await add(1)).result(timeout=10)

    for _ in range(2):
        assert anyio.run(use, backend=backend) == 2
