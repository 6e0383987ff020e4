"""Checked options of an evaluation, and the folder of its results."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from decimal import Decimal
from pathlib import Path
from types import UnionType
from typing import Union, get_args, get_origin, get_type_hints

from cachepress.budgets import check_ratio
from cachepress.errors import CachepressError
from cachepress.evaluation.prompts import read_prompts
from cachepress.files import expanded, real_path
from cachepress.generation.prefill import check_prefill
from cachepress.generation.prompt import END, MIDDLE
from cachepress.given import spelling_of
from cachepress.limits import MOST, check_whole, shown
from cachepress.models.builtin import BUILTIN_MODELS
from cachepress.options import EvaluationFields, bounds_of
from cachepress.press import with_real_paths
from cachepress.presses import BasePress
from cachepress.spec import NO_PRESS, brief, parse
from cachepress.structured import read_mapping

CONFIG = "config.yaml"
"""The file in a folder of results that says what they are of."""
FREE_FIELDS = ("output_dir", "log_level", "overwrite", "device", "data_path", "metric")
"""Fields that may differ when a run is resumed: they do not change an answer."""
PLACES = ("dataset", "data_path", "model", "prompts", "output_dir")
"""Fields that may name a file or a folder."""
IDLE_KWARGS = frozenset(
    (
        *("cache_dir", "force_download", "local_files_only", "proxies", "resume_download"),
        *("token", "use_auth_token"),
        *("device_map", "low_cpu_mem_usage", "max_memory", "offload_buffers", "offload_folder"),
        "offload_state_dict",
    )
)
"""Arguments of from_pretrained that change no answer, and are no part of what a run is.

The first ones say from where files come and who may have them: what the files hold is in the digest
of the model. The others say where weights lie, as ``device`` does. None of them is written into
results, the token least of all. What is left chooses files, types or code.
"""
ADDED_FIELDS = ("trust_remote_code", "chat", "prompts")
"""Fields that came later: results from before them have their defaults."""
BOUNDS = bounds_of(EvaluationFields)
"""The least and the most that fields may be which are whole numbers."""
TRUNCATIONS = (MIDDLE, END)
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


@dataclass(frozen=True)
class EvaluationConfig(EvaluationFields):
    """Options of one evaluation: a press at a ratio, on a data set, with a model.

    Its fields are those of ``cachepress.options.EvaluationFields``, of which each is checked; names
    of files and folders may begin with ``~``. ``dataclasses.replace`` makes a changed one.
    """

    def __post_init__(self) -> None:
        object.__setattr__(self, "press", spelling_of(self.press))
        for name, kind in get_type_hints(type(self)).items():
            _check_type(name, getattr(self, name), kind)
        for name in PLACES:
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, expanded(value))
        _check_json("model_kwargs", self.model_kwargs)
        places = {k: v for k, v in self.model_kwargs.items() if k in IDLE_KWARGS and type(v) is str}
        told = {k: expanded(v) for k, v in places.items() if k.endswith(("_dir", "_folder"))}
        object.__setattr__(self, "model_kwargs", {**self.model_kwargs, **told})
        press = self.make_press()
        if press is None and self.compression_ratio:
            raise CachepressError(
                f"no_press cannot have compression_ratio={self.compression_ratio}: name a press"
            )
        if not 0 < self.fraction <= 1:
            raise CachepressError(f"fraction: got {self.fraction}, wanted 0 < fraction <= 1")
        if self.query_aware and self.sees_question:
            raise CachepressError(
                f"query_aware moves the question into the context, and {self.press} looks for it "
                "where it is: leave query_aware out"
            )
        check_prefill(press, self.prefill_chunk_size, self.prefill_mode, self.storage)
        if self.truncation not in (True, False, *TRUNCATIONS):
            raise CachepressError(
                f"truncation: got {self.truncation!r}, wanted one of {', '.join(TRUNCATIONS)}, or "
                "true for where the data's benchmark cuts"
            )
        if self.log_level.upper() not in LOG_LEVELS:
            wanted = ", ".join(LOG_LEVELS)
            raise CachepressError(f"log_level: got {self.log_level!r}, wanted one of {wanted}")

    @property
    def sees_question(self) -> bool:
        """Whether the press scores by the question, wherever that stands."""
        press = self.make_press()
        return press is not None and press.needs.question

    def make_press(self) -> BasePress | None:
        """Make the press at its ratio; None for no press."""
        press = self._spelled_press()
        return None if press is None else with_real_paths(press)

    def _spelled_press(self) -> BasePress | None:
        press = parse(self.press)
        if self.compression_ratio is None:
            return press
        check_ratio(self.compression_ratio)
        return None if press is None else press.with_ratio(self.compression_ratio)

    @property
    def loading(self) -> dict[str, object]:
        """The arguments of from_pretrained."""
        return {"trust_remote_code": self.trust_remote_code, **self.model_kwargs}

    @property
    def ratio(self) -> float:
        """The nominal ratio."""
        return getattr(self.make_press(), "compression_ratio", self.compression_ratio) or 0.0

    def get_results_dir(self) -> Path:
        """Name the folder of results: dataset__data_dir__model__press__ratio, and other options."""
        names = (same_data(self.dataset), same_model(self.model), self.press_name)
        folder = self._folder(*names, _safe, acting_kwargs(self.model_kwargs))
        earlier = self._earlier_results_dir()
        if earlier != folder and not folder.exists() and self._is_here(earlier):
            return earlier
        return _of_its_own(folder)

    def _earlier_results_dir(self) -> Path:
        """Name the folder as version 0.1.0 did, which did not resolve paths."""
        press = self._spelled_press()
        name = NO_PRESS if press is None else brief(press, self.ratio)
        return self._folder(self.dataset, self.model, name, _clean, self.model_kwargs)

    def _folder(
        self,
        dataset: str,
        model: str,
        press: str,
        safe: Callable[[str], str],
        model_kwargs: Mapping[str, object],
    ) -> Path:
        data = Path(dataset).stem if Path(self.dataset).suffix else dataset
        parts = [data, self.data_dir or "", Path(model).name, press]
        parts += [_decimals(self.ratio), *self._further_parts(model_kwargs)]
        name = "__".join(safe(part) for part in parts if part)
        return Path(self.output_dir) / (
            name if len(name) <= 240 else f"{name[:230]}-{_digest(name)}"
        )

    def _is_here(self, folder: Path) -> bool:
        """Tell whether a folder has results of the same options."""
        try:
            return self.difference(read_mapping(folder / CONFIG)) is None
        except CachepressError:
            return False

    @property
    def press_name(self) -> str:
        """The press's shortest spelling, without its ratio."""
        press = self.make_press()
        return NO_PRESS if press is None else brief(press, self.ratio)

    def _further_parts(self, model_kwargs: Mapping[str, object]) -> list[str]:
        parts = []
        numbers = ("fraction", "seed", "max_new_tokens", "max_context_length", "dtype")
        for name in (*numbers, "prefill_chunk_size"):
            value = getattr(self, name)
            if value != _DEFAULTS[name]:
                parts.append(f"{name}{value}")
        for name in ("prefill_mode", "storage"):
            if getattr(self, name) != _DEFAULTS[name]:
                parts.append(getattr(self, name))
        if self.prompts is not None:
            read = read_prompts(self.prompts)
            parts.append(f"prompts-{Path(read.name).stem}-{read.digest[:8]}")
        if self.chat is not None:
            parts.append("chat" if self.chat else "no-chat")
        if isinstance(self.truncation, str):
            parts.append(f"truncation-{self.truncation}")
        flags = ("trust_remote_code", "query_aware", "truncation", "beyond_trained_length")
        parts += [name for name in flags if getattr(self, name) is True]
        if model_kwargs:
            parts.append("model_kwargs-" + _digest(model_kwargs))
        return parts

    @property
    def prompts_label(self) -> str | None:
        """Name and hash of the user's prompts."""
        return None if self.prompts is None else read_prompts(self.prompts).label

    def identity(self) -> dict[str, object]:
        """Return every field that can change an answer, the press by its full spelling."""
        values = {k: v for k, v in asdict(self).items() if k not in FREE_FIELDS}
        values["press"] = repr(press) if (press := self.make_press()) else NO_PRESS
        values["compression_ratio"] = self.ratio
        values["prompts"] = self.prompts_label
        values["model_kwargs"] = acting_kwargs(self.model_kwargs)
        for name in ADDED_FIELDS:
            if values[name] == _DEFAULTS[name]:
                del values[name]
        values["dataset"], values["model"] = same_data(self.dataset), same_model(self.model)
        return values

    def difference(self, there: Mapping[str, object]) -> str | None:
        """Return the first field that differs from saved options; None if they are equivalent."""
        own = {name: _DEFAULTS[name] for name in ADDED_FIELDS} | self.identity()
        for name, value in own.items():
            saved = there.get(name, _DEFAULTS.get(name))
            if saved != value and _meant(name, saved) != value:
                return name
        return None


_DEFAULTS = {f.name: f.default for f in fields(EvaluationConfig)}


def load_config(path: str | None, options: Mapping[str, object]) -> EvaluationConfig:
    """Read a config from a YAML file, which given options override; ``press_name`` is ``press``.

    Raises:
        CachepressError: if the file is missing, is not YAML, or has an unknown or wrong field.
    """
    values: dict[str, object] = {}
    if path is not None:
        values |= _named(read_mapping(Path(path)))
    values |= _named(options)
    known = [f.name for f in fields(EvaluationConfig)]
    for name in values:
        if name not in known:
            raise CachepressError(f"unknown option {shown(name)}: wanted one of {', '.join(known)}")
    return replace(EvaluationConfig(), **values)


def _named(values: Mapping[str, object]) -> dict[str, object]:
    """Rename options to the names of their fields."""
    return {"press" if name == "press_name" else name: value for name, value in values.items()}


def _check_json(name: str, values: Mapping[str, object]) -> None:
    """Raise CachepressError unless a mapping has texts as keys and values that JSON can hold."""
    try:
        json.dumps(values, sort_keys=True)
        fits = all(isinstance(key, str) for key in values)
    except (TypeError, ValueError, RecursionError):
        fits = False
    if not fits:
        raise CachepressError(f"{name}: got {shown(values)}, wanted names with values as in JSON")


def _check_type(name: str, value: object, kind: type | UnionType) -> None:
    several = get_args(kind) if get_origin(kind) in (Union, UnionType) else [kind]
    kinds = [k for one in several if isinstance(k := get_origin(one) or one, type)]
    fits = any(
        isinstance(value, k) and (k is bool or not isinstance(value, bool)) for k in kinds
    ) or (float in kinds and isinstance(value, int) and not isinstance(value, bool))
    if not fits:
        wanted = " or ".join("nothing" if k is type(None) else k.__name__ for k in kinds)
        raise CachepressError(f"{name}: got {shown(value)}, wanted {wanted}")
    if isinstance(value, int) and not isinstance(value, bool):
        check_whole(name, value, *BOUNDS.get(name, (-MOST, MOST)))
    if isinstance(value, str) and "\0" in value:
        raise CachepressError(f"{name}: got {shown(value)}, wanted a text without NUL")


def _decimals(ratio: float) -> str:
    """Format a ratio with two decimals, or as many as it needs."""
    exact = Decimal(str(ratio))
    digits = max(2, -int(exact.as_tuple().exponent))
    return f"{exact:.{digits}f}"


def acting_kwargs(model_kwargs: Mapping[str, object]) -> dict[str, object]:
    """Select the arguments of from_pretrained that can change an answer."""
    return {name: value for name, value in model_kwargs.items() if name not in IDLE_KWARGS}


def same_model(name: str) -> str:
    """Return a model's name; for a folder, its real path."""
    return name if name in BUILTIN_MODELS else real_path(name)


def same_data(name: str) -> str:
    """Return a data set's name; for a file, its real path."""
    return real_path(name) if Path(name).suffix else name


def _meant(name: str, saved: object) -> object:
    """Convert a saved field to the form in which this version saves it."""
    if name == "model_kwargs" and isinstance(saved, Mapping):
        return acting_kwargs(saved)
    if not isinstance(saved, str):
        return saved
    if name == "press":
        try:
            press = parse(saved)
        except CachepressError:
            return saved
        return saved if press is None else repr(with_real_paths(press))
    return {"dataset": same_data, "model": same_model}.get(name, str)(saved)


def _safe(part: str) -> str:
    """Make a text a part of a folder name on every file system, unique by a hash if changed."""
    clean = _clean(part)
    if part.isascii() or clean.endswith(_digest(part)):
        return clean
    return f"{clean[:70]}-{_digest(part)}".strip("-")


def _clean(part: str) -> str:
    clean = re.sub(r"[^A-Za-z0-9_.=-]+", "-", part).strip("-")
    return clean if len(clean) <= 80 else f"{clean[:70]}-{_digest(part)}"


def _of_its_own(folder: Path) -> Path:
    """Rename a folder if another one's name differs in case only, on disks that ignore case."""
    aside = folder.with_name(f"{folder.name}-{_digest(folder.name)}")
    if aside.exists():
        return aside
    taken = folder.exists() and folder not in folder.parent.iterdir()
    return aside if taken else folder


def _digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
