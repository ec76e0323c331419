"""Letters of the error queue as text, for a terminal and for scripts."""

from __future__ import annotations

from datetime import UTC, datetime

from rich.table import Table

from ..client.errors import ErrorLetter

__all__ = ["as_dict", "everything", "named", "new_table", "plain", "row"]


def new_table() -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("#", justify="right", no_wrap=True)
    for column in ("task id", "task", "reason", "error"):
        table.add_column(column, overflow="fold")
    table.add_column("attempts", justify="right")
    table.add_column("worker", overflow="fold")
    table.add_column("when", no_wrap=True)
    return table


def row(letter: ErrorLetter) -> list[str]:
    return [
        str(letter.position),
        plain(letter.task_id or "-"),
        plain(letter.name or "-"),
        plain(letter.reason),
        plain(_first_line(letter)),
        "-" if letter.attempt is None else str(letter.attempt),
        plain(letter.worker or "-"),
        _when(letter.at),
    ]


def _first_line(letter: ErrorLetter) -> str:
    line = letter.message.strip().partition("\n")[0]
    return f"{letter.type}: {line}" if letter.type and line else letter.type or line


def as_dict(letter: ErrorLetter) -> dict[str, object]:
    return {
        "position": letter.position,
        "task_id": letter.task_id,
        "name": letter.name,
        "reason": letter.reason,
        "type": letter.type,
        "message": letter.message,
        "attempt": letter.attempt,
        "worker": letter.worker,
        "at": letter.at,
        "problem": letter.problem,
    }


def everything(letter: ErrorLetter, traceback: str) -> str:
    """Return all there is to say about a letter, for a terminal."""
    error = f"{letter.type}: {letter.message}" if letter.type else letter.message
    lines = [
        f"task id:   {plain(letter.task_id or '-')}",
        f"task:      {plain(letter.name or '-')}",
        f"reason:    {plain(letter.reason)}",
        "error:     " + plain(error, keep="\n\t"),
        f"attempts:  {'-' if letter.attempt is None else letter.attempt}",
        f"worker:    {plain(letter.worker or '-')}",
        f"when:      {_when(letter.at)}",
        f"position:  {letter.position}",
    ]
    if letter.problem is not None:
        lines.append(f"problem:   no message of ours: {plain(letter.problem)}")
    lines += ["", "traceback:", plain(traceback.rstrip("\n"), keep="\n\t") or "-"]
    lines += ["", "body:", plain(letter.body.decode("utf-8", "backslashreplace"))]
    lines += ["", "headers:"]
    for key, value in sorted(letter.headers.items()):
        if key != "error-traceback":  # has been shown
            lines.append(f"  {plain(key)}: {plain(str(value))}")
    return "\n".join(lines)


def _when(at: float | None) -> str:
    try:
        return "-" if at is None else f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%SZ}"
    except (ValueError, OverflowError, OSError):
        return f"{at:g}"


def named(letter: ErrorLetter) -> str:
    return "" if letter.task_id is None else f" (task {letter.task_id!r})"


def plain(text: str, keep: str = "") -> str:
    """Return a text that does nothing to a terminal: what is in a queue anybody may have
    written."""
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() or each in keep else each.encode("unicode_escape").decode()
        for each in text
    )
