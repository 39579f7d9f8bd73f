"""Checks of the arguments of public functions, run before the function does anything.

    @public(path=a_folder, layers=optional(layer_numbers), batch_size=count(1))
    def function(path, *, layers=None, batch_size=8): ...

A check takes the argument's name and value, and returns the value that the function gets instead. Defaults are not
checked. An OSError inside the function is raised as one of our errors.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import os
from collections.abc import Callable, Mapping
from operator import index as whole
from typing import Any, ParamSpec, TypeAlias, TypeVar

import numpy as np

from mmcache.errors import ArgumentError, MmcacheError
from mmcache.system.os_errors import our_error
from mmcache.urls import is_url

__all__ = [
    "Check",
    "a_callable",
    "a_device",
    "a_folder",
    "a_list",
    "a_name",
    "a_path",
    "a_switch",
    "a_tokenizer",
    "an_index",
    "choice",
    "count",
    "either",
    "instance",
    "layer_numbers",
    "names",
    "optional",
    "outside",
    "public",
    "shown",
    "token_ids",
    "whole_numbers",
]

P = ParamSpec("P")
T = TypeVar("T")
Check: TypeAlias = Callable[[str, Any], Any]

# The longest file name and path on Linux, in bytes.
_NAME, _PATH = 255, 4095
# The longest list that is kept in a root or passed in one call; no model has as many layers.
_MOST = 1 << 20
_LARGEST = 2**63 - 1
# OSErrors that are raised unchanged.
_NOT_OURS = (MmcacheError, ConnectionError, TimeoutError, InterruptedError, ChildProcessError)


def shown(value: object) -> str:
    """The value as text for an error message, truncated to 98 characters if it has more than 100."""
    try:
        text = repr(value)
    except ValueError:
        # Python refuses to print integers with thousands of digits.
        text = f"a {type(value).__name__} too long to be written"
    return text if len(text) <= 100 else f"{text[:97]}…"


def outside() -> int:
    """The `stacklevel` with which a warning names the line that called this package."""
    level, frame = 1, inspect.currentframe()
    frame = None if frame is None else frame.f_back
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "mmcache":
        level, frame = level + 1, frame.f_back
    return level


def public(**checks: Check) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A decorator that checks arguments and turns an OSError of the system into one of our errors."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        places = {name: at for at, name in enumerate(inspect.signature(function).parameters)}
        if not set(checks) <= set(places):
            raise AssertionError(f"{function.__qualname__} has no {set(checks) - set(places)}")
        in_order = [(name, places[name], check) for name, check in checks.items()]

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            given: list[Any] = list(args)
            for name, at, check in in_order:
                if name in kwargs:
                    kwargs[name] = check(name, kwargs[name])
                elif at < len(given):
                    given[at] = check(name, given[at])
            try:
                return function(*given, **kwargs)
            except OSError as error:
                # Without an errno it is not the system's: a callback of the caller or a network library raised it.
                if isinstance(error, _NOT_OURS) or error.errno is None:
                    raise
                raise our_error(error) from error

        return call

    return decorate


def optional(check: Check) -> Check:
    """A check that also accepts None."""
    return lambda name, value: None if value is None else check(name, value)


def either(word: str, check: Check) -> Check:
    """A check that also accepts one word."""
    return lambda name, value: value if isinstance(value, str) and value == word else check(name, value)


def a_path(name: str, value: Any) -> Any:
    """A path, or an object storage URL."""
    try:
        text = os.fspath(value)
        encoded = os.fsencode(text)
    except (TypeError, UnicodeError) as error:
        raise ArgumentError(f"{name} is {shown(value)}: expected a path") from error
    if not isinstance(text, str) or not text or "\0" in text:
        raise ArgumentError(f"{name} is {shown(value)}: expected a path, as text without a NUL")
    if len(encoded) > _PATH or max(map(len, encoded.split(b"/"))) > _NAME:
        raise ArgumentError(
            f"{name} is {text[:60]!r}…, {len(encoded)} bytes: expected a path of at most {_PATH}, each part of at "
            f"most {_NAME}"
        )
    return value


def a_folder(name: str, value: Any) -> Any:
    """A path on this machine."""
    a_path(name, value)
    if is_url(value) or "://" in str(value):
        raise ArgumentError(
            f"{name} is {shown(value)}, an address: expected a folder (mmcache.push copies a store to an address)"
        )
    return value


def a_switch(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool | np.bool_):
        raise ArgumentError(f"{name} is {shown(value)}: expected True or False")
    return bool(value)


def a_name(name: str, value: Any) -> str:
    """A text."""
    text: str | None = value if isinstance(value, str) else None
    try:
        # Fails on a lone surrogate, which no file name and no tokenizer accepts.
        (text or "").encode()
    except UnicodeError:
        text = None
    if text is None:
        raise ArgumentError(f"{name} is {shown(value)}: expected a text")
    return text


def a_callable(name: str, value: Any) -> Any:
    """A callable."""
    if not callable(value):
        raise ArgumentError(f"{name} is {shown(value)}: expected a function")
    return value


def a_tokenizer(name: str, value: Any) -> Any:
    """A Hugging Face tokenizer."""
    if not (callable(value) and hasattr(value, "all_special_ids")):
        raise ArgumentError(f"{name} is {shown(value)}: expected a Hugging Face tokenizer")
    return value


def instance(kind: type, source: str) -> Check:
    """A check for an object of a class of ours; `source` names the function that returns one."""

    def check(name: str, value: Any) -> Any:
        if not isinstance(value, kind):
            raise ArgumentError(f"{name} is a {type(value).__name__}: expected what {source} gives")
        return value

    return check


def choice(*choices: object) -> Check:
    """A check for one of a few values."""

    def check(name: str, value: Any) -> Any:
        if not any(value is one or (isinstance(value, str) and value == one) for one in choices):
            raise ArgumentError(f"{name} is {shown(value)}: expected {' or '.join(map(repr, choices))}")
        return value

    return check


def _bounds(least: int, most: int) -> str:
    if most < _LARGEST:
        return f" from {least} to {most}"
    return f", {least} or more" if least >= 0 else ""


def count(least: int, most: int = _LARGEST) -> Callable[[str, Any], int]:
    """A check for an integer of any type, converted to int; True and False are refused."""

    def check(name: str, value: Any) -> int:
        try:
            found = None if isinstance(value, bool | np.bool_) else whole(value)
        except TypeError:
            found = None
        if found is None or not least <= found <= most:
            bounds = (
                f"from {least} to {most}" if most < _LARGEST else f"of {least} or more" if least >= 0 else "of 64 bits"
            )
            raise ArgumentError(f"{name} is {shown(value)}: expected a whole number {bounds}")
        return found

    return check


def a_list(name: str, value: Any, what: str = "values") -> list[Any]:
    """A list made from any iterable of at most 2^20 values."""
    # Strings and mappings can be iterated over too, but are a mistake here.
    given = None if isinstance(value, str | bytes | Mapping) else value
    try:
        found = list(itertools.islice(given, _MOST + 1))  # type: ignore[arg-type]
    except TypeError as error:
        raise ArgumentError(f"{name} is {shown(value)}: expected a list of {what}") from error
    if len(found) > _MOST:
        raise ArgumentError(f"{name} has more than {_MOST} of {what}: expected fewer")
    return found


def whole_numbers(least: int, most: int) -> Check:
    """A check for a list of integers of any type, converted to a tuple of ints."""
    number = count(least, most)

    def check(name: str, value: Any) -> tuple[int, ...]:
        return tuple(number(f"{name}[{at}]", one) for at, one in enumerate(a_list(name, value, "whole numbers")))

    return check


# A position or index; a negative one counts from the end.
an_index = count(-_LARGEST)
# Layer numbers of the model, and token ids: both are stored as int32.
layer_numbers = whole_numbers(-(2**31), 2**31 - 1)
token_ids = whole_numbers(0, 2**31 - 1)


def names(name: str, value: Any) -> tuple[str, ...]:
    """A tuple of names, such as those of sites; a single string is refused."""
    if isinstance(value, str):
        raise ArgumentError(f"{name} is the string {shown(value)}: expected a list of names, [{shown(value)}]")
    return tuple(a_name(f"{name}[{at}]", one) for at, one in enumerate(a_list(name, value, "names")))


@functools.lru_cache(maxsize=64)
def _device(device: Any) -> Any:
    import torch  # noqa: PLC0415 -- most of a second, which those that only describe a store do without

    found = torch.device(device)
    if found.type == "meta":
        raise ValueError("it has no data")
    torch.empty(0, device=found)
    return found


def a_device(name: str, value: Any) -> Any:
    """The `torch.device`, which must exist on this machine."""
    try:
        # torch would accept True as device 1.
        return _device(repr(value) if isinstance(value, bool) else value)
    except (RuntimeError, TypeError, ValueError, AssertionError, NotImplementedError) as error:
        said = " ".join(str(error).split())[:200]
        raise ArgumentError(
            f"{name} is {shown(value)}, which this machine does not have ({said}): try 'cpu'"
        ) from error
