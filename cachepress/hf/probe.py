"""Tries a model out on a few tokens before its cache is compressed for the first time.

Models differ in what they do to keys between the cache and attention, in what they tell attention
besides keys, and in how often they fill a layer. No list of model classes says that of the next
one, but one forward does: it is run with transformers' own cache and with one whose layers watch,
and both must give the same. What does not is refused, in one line that names the model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, LinearAttentionLayer

from cachepress.errors import CachepressError, UnsupportedError
from cachepress.hf.blocks import unobserved
from cachepress.hf.watching import Fault, WatchedLayer, close
from cachepress.hf.wiring import (
    attach,
    full_attention,
    run_alone,
    sample_tokens,
    text_decoder,
    unwrapped,
)

_TOKENS = (5, 1)
"""Tokens of each forward: a prompt, and one that is decoded."""
_LOCK = RLock()
_PASSED: WeakKeyDictionary[PreTrainedModel, set[str]] = WeakKeyDictionary()
"""The attention functions with which each decoder was tried out."""
_CONTINUES: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()
"""Whether the recurrent layers of each decoder go on where an earlier forward ended."""
_LOST = 0.05
"""A token that recurrent layers read without what came before differs by more than this, relative
to its size. Rounding in half types stays below for most tokens."""


def try_out(model: nn.Module) -> None:
    """Run a few tokens through a model with our attention function, once for each model.

    Raises:
        UnsupportedError: if the model gives something else with compressed layers.
    """
    decoder = text_decoder(model)
    base = str.__str__(decoder.config._attn_implementation or "eager")
    with _LOCK:
        passed = _PASSED.setdefault(decoder, set())
        if base in passed or decoder.device.type == "meta":
            return
        if "flex" in base:
            raise UnsupportedError(
                f"{type(unwrapped(model)).__name__} uses {base}, whose masks a compressed cache "
                'cannot read: call model.set_attn_implementation("sdpa") before'
            )
        selection = attach(model)
        try:
            with _evaluating(decoder), torch.no_grad(), unobserved(decoder):
                _compare(decoder)
        except Fault as fault:
            name = type(unwrapped(model)).__name__
            raise UnsupportedError(f"{name} {fault}") from fault.__cause__
        finally:
            del selection  # An error that somebody keeps would keep it.
        passed.add(base)


def check_continues(model: nn.Module, cache: Cache) -> None:
    """Raise UnsupportedError if recurrent layers forget their state in a forward of several tokens.

    transformers' own layers of some models (Jamba) go on from a state by one token at a time only:
    chunks of a prompt, and a question after a text, would be read without what came before.
    """
    if not any(isinstance(layer, LinearAttentionLayer) for layer in cache.layers):
        return
    decoder = text_decoder(model)
    with _LOCK:
        if decoder not in _CONTINUES:
            with _evaluating(decoder), torch.no_grad(), unobserved(decoder):
                _CONTINUES[decoder] = _continues(decoder)
    if not _CONTINUES[decoder]:
        raise UnsupportedError(
            f"the recurrent layers of {type(unwrapped(model)).__name__} forget what they have read "
            "when a further forward has several tokens: read a text in one forward, without "
            "chunks, and what follows token by token"
        )


def _continues(decoder: PreTrainedModel) -> bool:
    """Compare the last tokens of a text that is read in one forward and in two."""
    tokens = sample_tokens(decoder, 1, sum(_TOKENS))
    half = sum(_TOKENS) // 2
    whole, parts = (DynamicCache(config=decoder.config) for _ in range(2))
    wanted = run_alone(decoder, tokens, whole)[:, half:].float()
    found = [run_alone(decoder, chunk, parts) for chunk in tokens.split(half, dim=1)]
    errors = (found[1].float() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    return not float(errors.min()) > _LOST


def _compare(decoder: PreTrainedModel) -> None:
    """Compare forwards with layers that watch to forwards with transformers' own cache."""
    tokens = sample_tokens(decoder, 1, sum(_TOKENS))
    plain, watched = (DynamicCache(config=decoder.config) for _ in range(2))
    full = [i for i, is_full in enumerate(full_attention(decoder.config)) if is_full]
    layers = {i: WatchedLayer.instead_of(watched.layers[i], i) for i in full}
    for i, layer in layers.items():
        watched.layers[i] = layer
    for chunk in tokens.split(_TOKENS, dim=1):
        try:
            wanted = run_alone(decoder, chunk, plain)
        except Exception as error:
            raise Fault(
                f"does not run on a few tokens with a DynamicCache: {_first(error)}"
            ) from error
        try:
            ours = run_alone(decoder, chunk, watched)
        except (Fault, CachepressError):
            raise
        except Exception as error:
            raise Fault(
                f"does something with its cache that a compressed cache cannot do: {_first(error)}"
            ) from error
        for layer in layers.values():
            layer.check()
        if not _same(ours, wanted):
            raise Fault("gives something else with a compressed cache, although nothing is evicted")


@contextmanager
def _evaluating(decoder: nn.Module) -> Iterator[None]:
    """Switch dropout off: nothing is drawn at random, and training goes on as before."""
    training = [module for module in decoder.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _same(ours: Tensor, wanted: Tensor) -> bool:
    return torch.equal(ours, wanted) or close(ours, wanted, torch.finfo(wanted.dtype).eps ** 0.5)


def _first(error: Exception) -> str:
    """Return the first line of an error, with its kind."""
    line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}, {line}" if line else type(error).__name__
