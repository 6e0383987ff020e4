"""Checks that presses make of each other, and options that have two names."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from typing import TypeVar

from cachepress.budgets import TopK
from cachepress.errors import CachepressError
from cachepress.press import BasePress, WrapperPress

T = TypeVar("T")


def reconstructs(press: BasePress) -> bool:
    """Tell whether a press reconstructs prompts, at its own ratio or at one that evicts."""
    with suppress(CachepressError):
        press = press.with_ratio(0.5)
    return press.needs.reconstruction is not None


def fill(press: BasePress, values: Mapping[str, object]) -> None:
    """Set the fields of a frozen press whose ``__init__`` is its own, and check them."""
    for own in fields(press):  # type: ignore
        object.__setattr__(press, own.name, values[own.name])
    press.__post_init__()  # type: ignore


def either(name: str, value: T | None, other_name: str, other: T | None) -> T | None:
    """Return the value of an option that has two names.

    Raises:
        CachepressError: if both are given.
    """
    if value is not None and other is not None:
        raise CachepressError(
            f"got both {name} and {other_name}, which are one option: give {name}"
        )
    return other if value is None else value


def counted(wrapper: WrapperPress) -> TopK:
    """Return the inner budget of a wrapper that changes how many pairs are kept, or who competes.

    Raises:
        CachepressError: if the inner press has no budget of a number of pairs.
    """
    budget = wrapper.press.budget
    if not isinstance(budget, TopK):
        name = type(wrapper).__name__
        raise CachepressError(
            f"{name} changes a number of pairs, and {wrapper.press!r} keeps as many as its own "
            f"rule says: wrap a press with a budget, such as {name}(SnapKVPress(0.5))"
        )
    return budget


def check_by_layer(wrapper: WrapperPress) -> None:
    """Raise if a wrapper that chooses layer by layer is around a budget of the whole model."""
    name = type(wrapper).__name__
    if wrapper.press.budget.scope == "model":
        raise CachepressError(
            f'{name} chooses layer by layer and cannot wrap a budget of scope="model": wrap the '
            f'other way round, AdaKVPress({name}(...), scope="model")'
        )
