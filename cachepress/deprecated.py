"""Deprecated names of attributes, which work with a warning through version 0.2."""

import warnings
from operator import attrgetter


class Renamed:
    """A deprecated name of an attribute: reading it warns and returns the one with the new name.

    Args:
        new: the new name, with dots where it is an attribute of an attribute.
    """

    def __init__(self, new: str) -> None:
        self.new, self.old = new, ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.old = name

    def __get__(self, instance: object, owner: type) -> object:
        if instance is None:
            return self
        _warn(owner, self)
        return attrgetter(self.new)(instance)


def adopt_renamed(cls: type, base: type) -> None:
    """Rename methods that a subclass defines under a deprecated name.

    Raises:
        TypeError: if it defines one that is a field of another object by now.
    """
    for name, value in list(vars(cls).items()):
        renamed = vars(base).get(name)
        if not isinstance(renamed, Renamed):
            continue
        if "." in renamed.new:
            raise TypeError(
                f"{cls.__name__} defines {name}, which is declared as {renamed.new} since version "
                f"0.2: let its {renamed.new.split('.')[0]} say so"
            )
        _warn(cls, renamed)
        delattr(cls, name)
        setattr(cls, renamed.new, value)


def _warn(owner: type, renamed: Renamed) -> None:
    warnings.warn(
        f"{owner.__name__}.{renamed.old} is called {renamed.new} since version 0.2",
        DeprecationWarning,
        stacklevel=3,
    )
