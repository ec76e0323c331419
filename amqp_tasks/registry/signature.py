"""A function's arguments and result as JSON, by its annotations.

pydantic does the work: whatever it can write as JSON and read back can be an argument or
a result (datetime, UUID, Decimal, dataclasses, models, ...). Arguments are checked where
the task is called, so that mistakes show up there, and again where it runs, because
messages come from anywhere.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, NotRequired

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from pydantic_core import to_json
from typing_extensions import TypedDict

from ..exceptions import ArgumentsError, DefinitionError

__all__ = ["CallSignature"]


class CallSignature:
    """How one task's arguments and result travel.

    Annotations are looked at when they are first needed: they may name what is defined
    further down in the module.

    Args:
        name: the task's name, for error messages.
        collects: the function is a generator, whose result is the list of what it yields.
    """

    def __init__(self, func: Callable[..., Any], name: str, *, collects: bool) -> None:
        self._func = func
        self._name = name
        self._collects = collects
        self._signature = inspect.signature(func)

    def encode_arguments(
        self, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        """Check a call and return its arguments as values that JSON has.

        Raises:
            ArgumentsError: they do not fit the signature or the annotations, or cannot
                be written as JSON.
            DefinitionError: an annotation is none that can be worked with.
        """
        bound, adapter = self._bind(args, kwargs), self._arguments
        try:
            values = adapter.validate_python(bound.arguments)
            plain = adapter.dump_python(values, mode="json", by_alias=True, round_trip=True)
        except ValidationError as error:
            raise ArgumentsError(f"task {self._name!r}: {_explain(error)}") from error
        except Exception as error:  # validators and serializers are the user's code
            raise ArgumentsError(
                f"task {self._name!r}: an argument cannot be written as JSON: {error}"
            ) from error
        bound.arguments.update(plain)
        return list(bound.args), dict(bound.kwargs)

    def decode_arguments(
        self, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments to call the function with.

        Raises:
            ArgumentsError: they do not fit the signature or the annotations.
            DefinitionError: an annotation is none that can be worked with.
        """
        bound, adapter = self._bind(args, kwargs), self._arguments
        try:
            # By way of JSON text: there pydantic reads, say, a strict datetime from a text.
            values = adapter.validate_json(to_json(bound.arguments, inf_nan_mode="constants"))
        except ValidationError as error:
            raise ArgumentsError(f"task {self._name!r}: {_explain(error)}") from error
        except Exception as error:  # validators are the user's code
            raise ArgumentsError(
                f"task {self._name!r}: an argument cannot be read: {type(error).__name__}: {error}"
            ) from error
        bound.arguments.update(values)
        return bound.args, bound.kwargs

    def encode_result(self, value: Any) -> str:
        """Return a result as JSON text.

        Raises:
            ArgumentsError: it does not fit the annotation or cannot be written as JSON.
            DefinitionError: the annotation is none that can be worked with.
        """
        adapter = self._result
        try:
            checked = adapter.validate_python(value)
            return adapter.dump_json(checked, by_alias=True, round_trip=True).decode()
        except ValidationError as error:
            raise ArgumentsError(
                f"task {self._name!r}: its result does not fit its annotation: {_explain(error)}"
            ) from error
        except Exception as error:  # validators and serializers are the user's code
            raise ArgumentsError(
                f"task {self._name!r}: its result cannot be written as JSON: {error}"
            ) from error

    def decode_result(self, text: str) -> Any:
        """Return the result that a JSON text stands for."""
        return self._result.validate_json(text)

    def _bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
        try:
            return self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise ArgumentsError(
                f"task {self._name!r}: {error}; its signature is {self._signature}"
            ) from error

    @cached_property
    def _hints(self) -> dict[str, Any]:
        try:
            return typing.get_type_hints(self._func, include_extras=True)
        except Exception as error:  # annotations are evaluated, and can raise anything
            raise DefinitionError(
                f"task {self._name!r}: an annotation cannot be evaluated: "
                f"{type(error).__name__}: {error}"
            ) from error

    @cached_property
    def _arguments(self) -> TypeAdapter[Any]:
        fields: dict[str, Any] = {}
        for name, parameter in self._signature.parameters.items():
            hint: Any = self._hints.get(name, Any)
            if parameter.kind is parameter.VAR_POSITIONAL:
                hint = NotRequired[types.GenericAlias(tuple, (hint, ...))]
            elif parameter.kind is parameter.VAR_KEYWORD:
                hint = NotRequired[types.GenericAlias(dict, (str, hint))]
            elif parameter.default is not parameter.empty:
                hint = NotRequired[hint]
            fields[name] = hint
        return self._adapter(_typed_dict("Arguments", fields))

    @cached_property
    def _result(self) -> TypeAdapter[Any]:
        return self._adapter(list[Any] if self._collects else self._hints.get("return", Any))

    def _adapter(self, hint: Any) -> TypeAdapter[Any]:
        try:
            return TypeAdapter(hint)
        except PydanticUserError as error:
            raise DefinitionError(
                f"task {self._name!r}: an annotation has a type that cannot travel as JSON: "
                f"{str(error).splitlines()[0]}"
            ) from error


_typed_dict: Any = TypedDict
"""Under another name, because type checkers want the fields of a `TypedDict` literally."""


def _explain(error: ValidationError) -> str:
    """Say in one line what is wrong where; at most three places."""
    details = error.errors(include_url=False, include_context=False)
    lines = [
        f"{'.'.join(map(str, detail['loc'])) or 'value'}={_short(detail['input'])}: {detail['msg']}"
        for detail in details[:3]
    ]
    if len(details) > len(lines):
        lines.append(f"and {len(details) - len(lines)} more")
    return "; ".join(lines)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
