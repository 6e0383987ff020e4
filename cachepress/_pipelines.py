"""Registers ``pipeline("kv-press-text-generation")``, whichever library is imported first."""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType

_PIPELINES = "transformers.pipelines"


def register_when_loaded() -> None:
    """Register the task with transformers' pipelines: now if they are loaded, else with them.

    Importing them here would take seconds, which a program that never asks for them cannot spare.
    """
    if _PIPELINES in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    import_module("cachepress.generation.pipeline")


class _Finder:
    """Import hook that registers the task as soon as transformers' pipelines are imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the pipelines' import spec, with a loader that registers the task at its end."""
        if fullname != _PIPELINES:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    load = _then_register(spec.loader.exec_module)
                    setattr(spec.loader, "exec_module", load)  # noqa: B010
                return spec
        return None


def _then_register(load: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
    def load_and_register(module: ModuleType) -> None:
        load(module)
        _register()

    return load_and_register
