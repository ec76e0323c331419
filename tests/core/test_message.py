"""Messages: what a producer writes a worker reads, and nothing that comes can break it."""

from __future__ import annotations

import datetime as dt
import json
import math
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pamqp.decode
import pamqp.encode
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from amqp_tasks.core.message import (
    MAX_TASK_ID_LENGTH,
    Message,
    check_task_id,
    decode,
    error_headers,
    task_id_problem,
)
from amqp_tasks.core.outcome import Failure, Reason
from amqp_tasks.core.retry import RetryPolicy
from amqp_tasks.core.settlement import Effect, Publish, Rules, dead_letter, unreadable
from amqp_tasks.core.topology import Topology
from amqp_tasks.exceptions import AmqpTasksError, ArgumentsError, DecodeError

CALL = b'{"func": "add", "task_id": "t"}'
TOPOLOGY = Topology(exchange="x", queue="q")
RULES = Rules(topology=TOPOLOGY, retry=RetryPolicy(), state_ttl=60.0)
FRAME = 131_072
"""Bytes of a frame, RabbitMQ's default; all headers of a message share one."""
FRAME_REST = 600
"""Bytes for what else is in that frame: its own header, message_id, content type, ..."""

TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**4000), 10**4000)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=8,
)
OBJECTS = st.dictionaries(TEXT, JSON, max_size=4)
PRINTABLE = st.characters(codec="utf-8", exclude_categories=["C", "Z"]) | st.just(" ")
IDS = st.text(PRINTABLE, min_size=1, max_size=50) | st.just("i" * MAX_TASK_ID_LENGTH)
TIMES = st.none() | st.floats(min_value=-1e10, max_value=1e10)
ANYTHING: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=10)
    | st.binary(max_size=10)
    | st.datetimes()
    | st.decimals()
    | st.sampled_from([10**400, -(10**400), 2**31, 2**63, "x" * 5000]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
NUMBERS = ("task-attempt", "task-parked")
TIMES_OF = ("task-due", "task-deadline", "task-timeout")
NAMES = ("task-parent", "task-parent-owner")
OUR_HEADERS = (*NUMBERS, *TIMES_OF, *NAMES)


@st.composite
def messages(draw: st.DrawFn) -> Message:
    ours = {"func", "args", "kwargs", "task_id"}
    return Message.compose(
        task_id=draw(IDS),
        func=draw(TEXT.filter(lambda text: bool(text) and text.isprintable())),
        args=draw(st.lists(JSON, max_size=4)),
        kwargs=draw(OBJECTS),
        extra={key: value for key, value in draw(OBJECTS).items() if key not in ours},
        attempt=draw(st.integers(1, 2**31 - 1)),
        due=draw(TIMES),
        deadline=draw(TIMES),
        timeout=draw(TIMES),
        parent=draw(st.none() | IDS),
        parent_owner=draw(st.none() | IDS),
        parked=draw(st.integers(0, 2**31 - 1)),
        foreign=draw(st.dictionaries(TEXT.filter(is_foreign), TEXT, max_size=4)),
    )


def is_foreign(key: str) -> bool:
    return not key.startswith(("task-", "error-", "x-")) and key not in ("CC", "BCC")


def decoded(body: bytes, headers: dict[str, Any] | None = None) -> Message | DecodeError:
    """The message, or the one error that may be raised in its place."""
    try:
        return decode(body, headers)
    except DecodeError as error:
        return error


def over_the_wire(headers: dict[str, Any]) -> dict[str, Any]:
    """Return headers as they arrive after the AMQP library has written and read them."""
    return dict(pamqp.decode.field_table(pamqp.encode.field_table(headers))[1])


# -------------------------------------------------------------------- round trips


@given(message=messages())
def test_what_is_composed_is_decoded_field_by_field_and_goes_on_unchanged(
    message: Message,
) -> None:
    arrived = decode(message.body, message.headers())
    assert arrived == message
    assert arrived.body == message.body
    assert arrived.headers() == message.headers()


@given(attempt=st.integers(1, 2**31 - 1), parent=st.none() | IDS, traceparent=TEXT)
def test_attempt_parent_and_foreign_headers_survive_the_wire(
    attempt: int, parent: str | None, traceparent: str
) -> None:
    message = Message.compose(
        task_id="t",
        func="add",
        args=[],
        attempt=attempt,
        parent=parent,
        foreign={"traceparent": traceparent},
    )
    assert decode(message.body, over_the_wire(message.headers())) == message


@given(moment=st.floats(min_value=1.7e9, max_value=2.5e9))
@example(moment=1_763_900_000.123)
def test_times_survive_the_wire_to_the_millisecond(moment: float) -> None:
    # The library writes a float with the 24 bits of a single: of a time, that is ± 64 s.
    message = Message.compose(task_id="t", func="add", due=moment, deadline=moment)
    arrived = decode(message.body, over_the_wire(message.headers()))
    assert arrived.due == pytest.approx(moment, abs=0.001, rel=0)
    assert arrived.deadline == pytest.approx(moment, abs=0.001, rel=0)
    why = error_headers(Failure(type="E", message=""), attempt=1, worker="w", at=moment)
    assert float(over_the_wire(why)["error-at"]) == pytest.approx(moment, abs=0.001, rel=0)


@given(seconds=st.floats(min_value=0.001, max_value=1e7))
def test_a_timeout_survives_the_wire(seconds: float) -> None:
    message = Message.compose(task_id="t", func="add", timeout=seconds)
    arrived = decode(message.body, over_the_wire(message.headers()))
    assert arrived.timeout == pytest.approx(seconds, rel=1e-6)


def test_not_a_number_and_infinity_survive() -> None:
    message = Message.compose(task_id="t", func="f", args=[math.inf, -math.inf, math.nan])
    infinite, negative, undefined = decode(message.body).args
    assert (infinite, negative) == (math.inf, -math.inf)
    assert math.isnan(undefined)


@given(message=messages(), attempt=st.integers(1, 100), due=TIMES)
def test_another_attempt_is_the_same_call_at_another_time(
    message: Message, attempt: int, due: float | None
) -> None:
    again = message.for_attempt(attempt, due=due)
    assert again == replace(message, attempt=attempt, due=due, parked=0)


def test_headers_that_have_no_value_are_not_sent() -> None:
    assert Message.compose(task_id="t", func="f").headers() == {"task-attempt": 1}


def test_a_foreign_header_cannot_pass_for_one_of_ours() -> None:
    message = Message.compose(task_id="t", func="f", attempt=2, foreign={"task-attempt": "9"})
    assert message.headers()["task-attempt"] == 2


def test_a_body_of_guillotina_amqp_is_read_with_its_members_in_extra() -> None:
    body = {
        "func": "package.module.function",
        "args": [1, "two", {"three": 3}],
        "kwargs": {"four": None},
        "db_id": "db",
        "container_id": "container",
        "req_data": {"url": "http://localhost/db/container", "headers": {"Host": "localhost"}},
        "task_id": "task:package.module.function-6f1c",
    }
    message = decode(json.dumps(body).encode())
    assert message.func == body["func"]
    assert message.args == body["args"]
    assert message.kwargs == body["kwargs"]
    assert message.task_id == body["task_id"]
    assert message.extra == {key: body[key] for key in ("db_id", "container_id", "req_data")}
    assert (message.attempt, message.due, message.parent) == (1, None, None)


def test_arguments_may_be_left_out() -> None:
    message = decode(CALL)
    assert (message.args, message.kwargs, message.extra) == ([], {}, {})


# ------------------------------------------------------------------ what comes in


@given(body=st.binary(max_size=200))
@example(body=b"")
@example(body=b"\xff\xfe{}")
@example(body=b'{"func": "add", "task_id": "\xff"}')
@example(body=b'{"func": "add", "task_id": "\\ud800"}')
@example(body=CALL[:-1])
@example(body=CALL + b"}")
@example(body=b"null")
def test_bytes_that_are_no_message_raise_only_decode_errors(body: bytes) -> None:
    with pytest.raises(DecodeError) as caught:
        decode(body)
    assert len(str(caught.value)) < 400


@given(
    content=st.fixed_dictionaries({}, optional=dict.fromkeys(["func", "task_id"], JSON | IDS))
    | st.fixed_dictionaries(
        {"task_id": IDS}, optional=dict.fromkeys(["func", "args", "kwargs", "other"], JSON)
    )
    | JSON
)
def test_any_json_is_a_message_or_raises_only_decode_errors(content: Any) -> None:
    message = decoded(json.dumps(content).encode())
    if isinstance(message, DecodeError):
        assert len(str(message)) < 400
    else:
        assert task_id_problem(message.task_id) is None
        assert message.func
        assert isinstance(message.args, list)
        assert isinstance(message.kwargs, dict)


@given(
    headers=st.dictionaries(
        st.sampled_from(OUR_HEADERS) | st.sampled_from(["x-death", "traceparent"]) | TEXT,
        ANYTHING,
        max_size=6,
    )
)
def test_any_headers_are_read_or_raise_only_decode_errors(headers: dict[str, Any]) -> None:
    message = decoded(CALL, headers)
    if isinstance(message, DecodeError):
        assert len(str(message)) < 400
        assert message.task_id == "t"
    else:
        assert 1 <= message.attempt < 2**31
        for moment in (message.due, message.deadline, message.timeout):
            assert moment is None or math.isfinite(moment)
        assert all(isinstance(value, str) for value in message.foreign.values())


WRONG_NUMBERS = [
    True, "soon", "", b"1", math.nan, math.inf, -math.inf, [1], {"a": 1}, Decimal(1),
    dt.datetime(2025, 1, 1, tzinfo=dt.UTC),
]  # fmt: skip


@pytest.mark.parametrize("value", [*WRONG_NUMBERS, None, 0, -1, 1.0, 2**31])
def test_an_attempt_that_is_no_whole_number_from_1_is_named(value: object) -> None:
    with pytest.raises(DecodeError, match=r"task-attempt=.*must be a whole number from 1"):
        decode(CALL, {"task-attempt": value})


@pytest.mark.parametrize("value", [*WRONG_NUMBERS, -1, 1.0, 2**31])
def test_a_count_that_is_no_whole_number_is_named(value: object) -> None:
    with pytest.raises(DecodeError, match=r"task-parked=.*must be a whole number from 0"):
        decode(CALL, {"task-parked": value})


@pytest.mark.parametrize("key", TIMES_OF)
@pytest.mark.parametrize("value", [*WRONG_NUMBERS, "nan", "inf", "1e999"])
def test_a_time_that_is_no_number_of_seconds_is_named(key: str, value: object) -> None:
    with pytest.raises(DecodeError, match=f"{key}=.*must be a number of seconds"):
        decode(CALL, {key: value})


@pytest.mark.parametrize("value", [1_763_900_000, 1_763_900_000.0, "1763900000.0"])
def test_a_time_may_be_a_number_or_its_text(value: object) -> None:
    assert decode(CALL, {"task-due": value}).due == 1_763_900_000


@pytest.mark.parametrize("key", OUR_HEADERS)
@pytest.mark.parametrize("size", [400, 5000], ids="10**{}".format)
def test_a_number_too_long_to_be_written_out_is_refused_like_any_other(key: str, size: int) -> None:
    with pytest.raises(DecodeError, match=f"{key}="):
        decode(CALL, {key: 10**size})


@pytest.mark.parametrize("key", OUR_HEADERS)
def test_a_header_nested_as_deep_as_can_be_is_refused_like_any_other(key: str) -> None:
    with pytest.raises(DecodeError, match=f"{key}="):
        decode(CALL, {key: nested(20_000)})


@pytest.mark.parametrize("key", NAMES)
@pytest.mark.parametrize("value", ["", "a\nb", "a\x00", "i" * 401, 7, b"parent", ["p"], True])
def test_a_parent_that_cannot_be_an_id_is_named(key: str, value: object) -> None:
    with pytest.raises(DecodeError, match=f"{key}="):
        decode(CALL, {key: value})


@pytest.mark.parametrize("depth", [10, 100, 190, 1_000, 100_000])
def test_nesting_is_read_or_refused_at_any_depth(depth: int) -> None:
    body = b'{"func": "f", "task_id": "t", "args": ' + b"[" * depth + b"]" * depth + b"}"
    message = decoded(body)
    if isinstance(message, DecodeError):
        assert depth > 190
        assert len(str(message)) < 400
    else:
        assert message.args == nested(depth)


@pytest.mark.parametrize("depth", [1, 150, 197, 200, 225, 250, 300, 10_000])
def test_nesting_that_a_producer_may_write_a_worker_can_read(depth: int) -> None:
    value = nested(depth)
    try:
        body = Message.compose(task_id="t", func="f", args=value).body
    except ArgumentsError:
        return
    assert decode(body).args == value


@pytest.mark.parametrize("digits", [4_000, 4_299, 4_300, 4_301, 5_000])
def test_a_number_that_a_producer_may_write_a_worker_can_read(digits: int) -> None:
    value = 10 ** (digits - 1)
    try:
        body = Message.compose(task_id="t", func="f", args=[value]).body
    except ArgumentsError:
        return
    assert decode(body).args == [value]


def test_a_body_of_10_megabytes_is_read() -> None:
    text = "ä" * 5_000_000
    message = Message.compose(task_id="t", func="f", args=[text])
    assert decode(message.body).args == [text]


@pytest.mark.parametrize("member", ["task_id", "func", "args", "kwargs"], ids="10 MB of {}".format)
def test_a_huge_wrong_value_makes_a_short_error(member: str) -> None:
    content = {"task_id": "t", "func": "f", member: {"a": "b" * 10_000_000}}
    if member == "kwargs":
        content[member] = "b" * 10_000_000
    with pytest.raises(DecodeError, match=f"^{member}=.*bbb") as caught:
        decode(json.dumps(content).encode())
    assert len(str(caught.value)) < 250


def test_of_a_duplicated_key_the_last_one_counts() -> None:
    message = decode(b'{"func": "a", "task_id": "1", "func": "b", "task_id": "2"}')
    assert (message.func, message.task_id) == ("b", "2")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({}, "task_id=None: must be a text"),
        ({"task_id": ""}, "task_id='': must be a text that is not empty"),
        ({"task_id": 7}, "task_id=7: must be a text"),
        ({"task_id": "a\nb"}, r"task_id='a\nb': must not contain line breaks"),
        ({"task_id": "a" * 401}, "401 characters; at most 400"),
        ({"task_id": "t"}, "func=None: must be the name of a task"),
        ({"task_id": "t", "func": ""}, "func='': must be the name of a task"),
        ({"task_id": "t", "func": 7}, "func=7: must be the name of a task"),
        ({"task_id": "t", "func": "f", "args": {"a": 1}}, "args={'a': 1}: must be a list"),
        ({"task_id": "t", "func": "f", "args": None}, "args=None: must be a list"),
        ({"task_id": "t", "func": "f", "kwargs": [1]}, "kwargs=[1]: must be an object"),
        ({"task_id": "t", "func": "f", "kwargs": ""}, "kwargs='': must be an object"),
        ([1, 2], "JSON list; must be an object"),
    ],
)
def test_an_error_names_the_part_its_value_and_what_would_be_right(
    content: object, said: str
) -> None:
    with pytest.raises(DecodeError) as caught:
        decode(json.dumps(content).encode())
    assert said in str(caught.value)


def test_an_error_knows_the_task_where_that_much_could_be_read() -> None:
    for content, headers, task_id in [
        (b'{"task_id": "t"}', {}, "t"),
        (CALL, {"task-attempt": 0}, "t"),
        (b'{"func": "f"}', {}, None),
        (b"{", {}, None),
    ]:
        with pytest.raises(DecodeError) as caught:
            decode(content, headers)
        assert caught.value.task_id == task_id


def test_what_the_broker_added_does_not_survive() -> None:
    death = [{"queue": "q-delay", "reason": "expired", "count": 3, "routing-keys": ["q"]}]
    came = {
        "x-death": death,
        "x-first-death-queue": "q-delay",
        "x-delivery-count": 2,
        "error-reason": "exception",
        "traceparent": "00-1-2-03",
        "task-attempt": 2,
    }
    message = decode(CALL, came)
    assert message.headers() == {"traceparent": "00-1-2-03", "task-attempt": 2}


# ---------------------------------------------------------------------------- ids


@given(task_id=IDS)
def test_any_printable_text_can_be_a_task_id(task_id: str) -> None:
    assert check_task_id(task_id) == task_id


@given(value=ANYTHING)
def test_what_is_no_task_id_is_refused_in_few_words(value: object) -> None:
    if task_id_problem(value) is None:
        assert isinstance(value, str)
        assert 0 < len(value) <= MAX_TASK_ID_LENGTH
        assert value.isprintable()
        return
    with pytest.raises(ArgumentsError, match=r"^task_id=") as caught:
        check_task_id(value)
    assert isinstance(caught.value, AmqpTasksError)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    "value",
    [object(), {1: object()}, "\udc80", {("a", "b"): object()}, [b"\xff"]],
    ids=["object", "object in a dict", "surrogate", "key that is a tuple", "bytes"],
)
def test_arguments_that_json_does_not_have_are_refused_with_the_tasks_name(value: object) -> None:
    with pytest.raises(ArgumentsError, match="task 'add': cannot be written as JSON"):
        Message.compose(task_id="t", func="add", args=[value])


def test_arguments_that_contain_themselves_are_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(ArgumentsError, match="task 'add'"):
        Message.compose(task_id="t", func="add", args=loop)


# ------------------------------------------------------------------ the error queue

LONG = {"ascii": "x" * 10**6, "chinese": "错" * 10**6, "emoji": "\N{SNAKE}" * 10**6}
BYTES_THAT_ARE_NO_TEXT = "no such file: \udcff"
"""How Python spells a file name that is not UTF-8, as in any FileNotFoundError."""


@pytest.mark.parametrize("text", LONG.values(), ids=LONG.keys())
def test_error_headers_fit_into_a_frame_whatever_the_failures_size(text: str) -> None:
    failure = Failure(type=text, message=text, traceback=text)
    headers = error_headers(failure, attempt=3, worker="worker-1", at=1.7e9)
    assert len(pamqp.encode.field_table(headers)) < FRAME - FRAME_REST


def published(effects: tuple[Effect, ...]) -> dict[str, Any]:
    (publication,) = [each.publication for each in effects if isinstance(each, Publish)]
    return publication.headers


@pytest.mark.parametrize("text", LONG.values(), ids=LONG.keys())
def test_what_the_broker_delivered_can_be_dead_lettered_whatever_it_carries(text: str) -> None:
    # Otherwise the broker answers with a closed connection, delivers the message again,
    # and the next worker's connection is closed.
    failure = Failure(type=text, message=text, traceback=text)
    carried = {f"baggage-{n}": "b" * 10_000 for n in range(12)}
    message = decode(CALL, carried)
    assert message.foreign == carried
    headers = published(dead_letter(message, failure, "worker-1", RULES, now=1.7e9))
    assert len(pamqp.encode.field_table(headers)) < FRAME - FRAME_REST
    headers = published(unreadable(b"?", carried, failure, "worker-1", TOPOLOGY, now=1.7e9))
    assert len(pamqp.encode.field_table(headers)) < FRAME - FRAME_REST


@given(text=st.text(st.characters(), max_size=10))
@example(text=BYTES_THAT_ARE_NO_TEXT)
def test_error_headers_can_be_sent_whatever_the_failure_says(text: str) -> None:
    failure = Failure(type=text, message=text, traceback=text)
    headers = error_headers(failure, attempt=1, worker="worker-1", at=1.7e9)
    assert over_the_wire(headers).keys() == headers.keys()


@pytest.mark.parametrize(
    "header",
    [b"\x03oddS\x00\x00\x00\x01\xff", b"\x03oddA\x00\x00\x00\x06S\x00\x00\x00\x01\xff"],
    ids=["text", "list"],
)
def test_what_arrived_can_be_sent_to_the_error_queue_even_if_it_is_not_utf_8(
    header: bytes,
) -> None:
    arrived = pamqp.decode.field_table(len(header).to_bytes(4, "big") + header)[1]
    failure = Failure(type="DecodeError", message="no JSON", reason=Reason.UNDECODABLE)
    headers = published(unreadable(b"?", arrived, failure, "worker-1", TOPOLOGY, now=1.7e9))
    assert over_the_wire(headers)["error-message"] == "no JSON"


@pytest.mark.parametrize("key", ["CC", "BCC"])
def test_a_header_that_routes_a_message_elsewhere_does_not_survive(key: str) -> None:
    # RabbitMQ also delivers to the routing keys in these two: back to the main queue, say.
    failure = Failure(type="DecodeError", message="no JSON", reason=Reason.UNDECODABLE)
    effects = unreadable(b"?", {key: ["q"]}, failure, "worker-1", TOPOLOGY, now=1.7e9)
    assert key not in published(effects)


def test_error_headers_tell_reason_type_message_place_and_time() -> None:
    failure = Failure(
        type="builtins.ValueError",
        message="wrong",
        traceback="Traceback ...",
        reason=Reason.TIMEOUT,
    )
    headers = error_headers(failure, attempt=2, worker="worker-1", at=5.0)
    assert float(headers.pop("error-at")) == 5.0
    assert headers == {
        "error-reason": "timeout",
        "error-type": "builtins.ValueError",
        "error-message": "wrong",
        "error-traceback": "Traceback ...",
        "error-attempt": 2,
        "error-worker": "worker-1",
    }


def test_a_failure_without_a_reason_is_an_exception() -> None:
    failure = Failure(type="ValueError", message="wrong")
    assert error_headers(failure, attempt=1, worker="w", at=0.0)["error-reason"] == "exception"


def test_of_a_long_traceback_the_end_is_kept() -> None:
    failure = Failure(type="ValueError", message="wrong", traceback="x" * 10**6 + "the place")
    headers = error_headers(failure, attempt=1, worker="w", at=0.0)
    assert headers["error-traceback"].endswith("the place")


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    return value
