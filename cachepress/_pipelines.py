"""Makes ``pipeline("kv-press-text-generation")`` known, whichever library is imported first."""

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
    """Finds nothing by itself; it has the task registered after the pipelines are loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The pipelines' own spec, whose loader registers the task as its last act."""
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
