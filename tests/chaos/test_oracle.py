"""The oracle finds what it is there to find."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from .oracle import Ended, Line, Oracle, note, tally


def line(word: str, fence: int) -> Line:
    return Line(word, "a", fence, attempt=1, pid=1, at=float(fence))


def finished(fence: int) -> Ended:
    return Ended("finished", fence, attempt=1)


WELL = [line("start", 5), line("end", 5)]


def test_lines_are_read_as_they_come(tmp_path: Path) -> None:
    path = tmp_path / "oracle"
    oracle = Oracle(path)
    assert oracle.lines() == []
    note(str(path), "start", "a", 5, 1)
    with path.open("a") as file:
        file.write("end a ")
        file.flush()
        assert [found.word for found in oracle.lines()] == ["start"]
        file.write("5 1 99 4.5\n")
    first, second = oracle.lines()
    assert (first.task_id, first.fence, first.attempt, first.pid) == ("a", 5, 1, os.getpid())
    assert second == Line("end", "a", 5, 1, 99, 4.5)
    assert oracle.ended() == {"a"}


def test_what_a_worker_has_not_finished(tmp_path: Path) -> None:
    path = tmp_path / "oracle"
    for word, task in (("start", "a"), ("start", "b"), ("end", "a")):
        note(str(path), word, task, 1, 1)
    assert Oracle(path).unfinished(os.getpid()) == {"b": 1}
    assert Oracle(path).unfinished(os.getpid() + 1) == {}


def test_an_attempt_counts_as_whole_if_it_started_late_enough(tmp_path: Path) -> None:
    path = tmp_path / "oracle"
    lines = ["start a 1 1 7 10", "end a 1 1 7 20", "start b 2 1 7 21", "end b 2 1 7 22.5"]
    path.write_text("".join(f"{text}\n" for text in lines))
    assert Oracle(path).first_whole_attempt(7, since=9) == 20
    assert Oracle(path).first_whole_attempt(7, since=11) == 22.5
    assert Oracle(path).first_whole_attempt(8, since=9) is None


def test_orphans_are_taken_over_by_a_higher_fence(tmp_path: Path) -> None:
    path = tmp_path / "oracle"
    lines = ["start a 1 1 7 10", "start b 2 1 7 11", "start a 3 1 8 12", "start c 4 1 8 13"]
    path.write_text("".join(f"{text}\n" for text in lines))
    oracle = Oracle(path)
    orphans = oracle.unfinished(7)
    assert orphans == {"a": 1, "b": 2}
    assert oracle.taken_over(orphans, since=9) == {"a": 12, "b": None}
    assert [found.at for found in oracle.since(12)] == [12, 13]


def test_all_is_well() -> None:
    counted = tally(WELL, ["a"], {"a": finished(5)})
    assert not counted.wrong()
    assert (counted.accepted, counted.starts, counted.ends, counted.recorded) == (1, 1, 1, 1)


def test_what_was_done_again_under_a_new_fence_is_not_doubled() -> None:
    counted = tally([*WELL, line("start", 6), line("end", 6)], ["a"], {"a": finished(6)})
    assert not counted.wrong()
    assert counted.reruns == 1


def test_a_zombie_that_starts_late_does_no_harm() -> None:
    lines = [line("start", 6), line("start", 5), line("end", 5), line("end", 6)]
    assert not tally(lines, ["a"], {"a": finished(6)}).wrong()


@pytest.mark.parametrize(
    ("lines", "states", "wrong"),
    [
        (WELL, {}, "lost"),
        (WELL, {"a": Ended("running", None, 1)}, "lost"),
        ([*WELL, line("end", 5)], {"a": finished(5)}, "doubled"),
        (WELL, {"a": Ended("errored", None, 1)}, "not_finished"),
        ([line("start", 5)], {"a": finished(5)}, "unproved"),
        ([*WELL, line("start", 6)], {"a": finished(5)}, "restarted"),
        ([line("start", 5), *WELL], {"a": finished(5)}, "shared"),
    ],
)
def test_what_is_wrong_is_named(lines: list[Line], states: Mapping[str, Ended], wrong: str) -> None:
    assert tally(lines, ["a"], states).wrong() == {wrong: ["a"]}
