"""Loads a model and its tokenizer: a built-in one, from a folder, or from the hub."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
import transformers
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from cachepress.errors import CachepressError, out_of_memory
from cachepress.files import expanded
from cachepress.limits import is_out_of_memory
from cachepress.models.builtin import (
    BUILTIN_MODELS,
    ModelError,
    _build,
    _is_ready,
    _locked,
    _need,
    cache_home,
)

_DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}
_SHARED = ("cache_dir", "local_files_only", "revision", "subfolder", "token", "trust_remote_code")


_UNLOADABLE = (
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
)
"""What from_pretrained raises for a model that is damaged, of another kind or too large."""


def load(
    name: str,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    model_kwargs: Mapping[str, object] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model, in eval mode, and its tokenizer.

    Args:
        name: a built-in name, a folder, or a name on the Hugging Face hub.
        dtype: float16, bfloat16, float32, float64 or "auto"; by default float32 on the CPU and
            "auto" elsewhere.
        device: the device of the model; by default CUDA if there is any, else the CPU. A
            ``device_map`` in ``model_kwargs`` takes precedence.
        model_kwargs: further arguments of ``AutoModelForCausalLM.from_pretrained``; those that
            say where files come from, such as ``revision``, apply to the tokenizer too.

    Raises:
        ModelError: if there is no such model or dtype, the folder holds no model, or the built-in
            model cannot be downloaded or converted.
    """
    place = _device(device)
    options = {"dtype": _dtype(dtype, place), "trust_remote_code": False, **(model_kwargs or {})}
    source = resolve(name)
    local = Path(source).is_dir()
    if local and not Path(source, str(options.get("subfolder", "")), "config.json").is_file():
        raise ModelError(
            f"{source} is no model: wanted a folder with a config.json, as save_pretrained writes"
        )
    if not local and "local_files_only" not in options:
        options["local_files_only"] = not hub_answers(source)
    shared = {key: options[key] for key in _SHARED if key in options}
    try:
        model = AutoModelForCausalLM.from_pretrained(source, **options)
        tokenizer = AutoTokenizer.from_pretrained(source, **shared)
    except _UNLOADABLE as error:
        wanted = f"a built-in model ({', '.join(BUILTIN_MODELS)}), a folder or a name on the hub"
        what = f"the model in {source}" if local else f"{name!r}, wanted {wanted}"
        raise _unloadable(what, error) from error
    if "device_map" not in options:
        try:
            model.to(place)  # pyright: ignore[reportArgumentType]
        except (RuntimeError, AssertionError) as error:
            if is_out_of_memory(error):
                raise out_of_memory(error) from error
            raise ModelError(f"device {str(place)!r}: {_first_line(error)}") from error
    return model.eval(), tokenizer


def load_tokenizer(
    name: str, model_kwargs: Mapping[str, object] | None = None
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model without the model.

    Raises:
        ModelError: if there is none.
    """
    source = resolve(name)
    shared: dict[str, object] = {"trust_remote_code": False}
    shared |= {key: value for key, value in (model_kwargs or {}).items() if key in _SHARED}
    if not Path(source).is_dir() and "local_files_only" not in shared:
        shared["local_files_only"] = not hub_answers(source)
    try:
        return AutoTokenizer.from_pretrained(source, **shared)
    except _UNLOADABLE as error:
        raise _unloadable(f"the tokenizer of {name!r}", error) from error


def _unloadable(what: str, error: Exception) -> CachepressError:
    if is_out_of_memory(error):
        return out_of_memory(error)
    if "trust_remote_code" in str(error):
        return ModelError(
            f"could not load {what}: it brings code of its own, which runs only if you say so, "
            "after reading it: --trust-remote-code, or in Python "
            'model_kwargs={"trust_remote_code": True}'
        )
    return ModelError(f"could not load {what}: {_first_line(error)}")


def be_quiet() -> None:
    """Have transformers log errors only, and show no progress bars."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def groups_of(name: str) -> int | None:
    """Return the query heads per KV head of a model from its config; None if it is not known."""
    with suppress(OSError, ValueError, AttributeError, TypeError, CachepressError):
        config = AutoConfig.from_pretrained(
            resolve(name), local_files_only=True, trust_remote_code=False
        ).get_text_config()
        keys = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return config.num_attention_heads // keys
    return None


def positions_of(name: str, model_kwargs: Mapping[str, object] | None = None) -> int | None:
    """Return how many positions a model has by its config, without loading its weights.

    None where it has no such limit, or no config can be read; loading the model then says why.
    """
    source = resolve(name)
    # Arguments of from_pretrained may override the config.
    named = (*_SHARED, "max_position_embeddings")
    shared = {key: value for key, value in (model_kwargs or {}).items() if key in named}
    if not Path(source).is_dir() and "local_files_only" not in shared:
        shared["local_files_only"] = not hub_answers(source)
    try:
        config = AutoConfig.from_pretrained(source, **{"trust_remote_code": False, **shared})
    except (OSError, ValueError, TypeError):
        return None
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return positions if isinstance(positions, int) else None


def resolve(name: str) -> str:
    """Return the folder of a built-in model, or another name with its ``~`` expanded.

    A built-in model is downloaded and converted on first use.

    Raises:
        ModelError: if the built-in model cannot be downloaded or converted.
    """
    spec = BUILTIN_MODELS.get(name)
    if spec is None:
        return expanded(name)
    home = cache_home()
    if not _is_ready(home / name, spec):
        _need("accelerate", "filelock", "gguf")
        try:
            home.mkdir(parents=True, exist_ok=True)
            with _locked(home / f"{name}.lock"):
                if not _is_ready(home / name, spec):
                    _build(spec, home)
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"could not make model {name!r} in {home}: {_first_line(error)}; see that there "
                "is space, or set CACHEPRESS_HOME to another folder"
            ) from error
    return str(home / name)


def _device(device: str | torch.device | None) -> torch.device:
    try:
        return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ModelError(f"device: got {device!r}, wanted for example cpu or cuda:0") from error


def _dtype(dtype: str | torch.dtype | None, place: torch.device) -> str | torch.dtype:
    if dtype is None:
        dtype = "float32" if place.type == "cpu" else "auto"
    if dtype == "auto" or dtype in _DTYPES.values():
        return dtype
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ModelError(f"unknown dtype: got {dtype!r}, wanted one of auto, {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def hub_answers(name: str) -> bool:
    """Tell whether the hub answers, by one short request.

    When it does not, from_pretrained is told so: it would retry for half a minute.
    """
    try:
        HfApi().model_info(name, timeout=5)
    except (HfHubHTTPError, HFValidationError):
        return True
    except Exception:  # which HTTP library raises differs between versions of the hub's client
        return False
    return True


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
