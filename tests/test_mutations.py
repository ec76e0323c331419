"""The deliberate bugs can still be applied; that they are found, `tests.mutations` sees to."""

from __future__ import annotations

import ast

import pytest

from .mutations import MUTATIONS, ROOT, Mutation, occurrences


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_deliberate_bug_has_its_place(mutation: Mutation) -> None:
    assert occurrences(mutation) == 1
    source = (ROOT / "amqp_tasks" / mutation.file).read_text()
    ast.parse(source.replace(mutation.old, mutation.new))


def test_deliberate_bugs_differ_and_say_what_they_do() -> None:
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS) >= 12
    assert all(mutation.why and mutation.old != mutation.new for mutation in MUTATIONS)
