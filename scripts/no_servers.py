"""A pytest plugin for ``make unit``: what would start a server is skipped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NoReturn

import pytest


def _skip(*args: object, **kwargs: object) -> NoReturn:
    pytest.skip("starts a server")


@pytest.fixture(scope="session", autouse=True)
def no_servers() -> Iterator[None]:
    from tests.servers.process import ServerProcess

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ServerProcess, "__init__", _skip)
        yield
