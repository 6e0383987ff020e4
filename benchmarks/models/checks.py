"""Checks a model under a press: each compares with the model itself, without a press."""

import copy
import inspect
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

import cachepress as cp
from benchmarks.models.reference import masked
from benchmarks.models.tiny import tiny
from cachepress.cache.batch import compressed_layers
from cachepress.hf import cache_argument, text_decoder
from cachepress.hf.wiring import full_attention

NEAR = 2e-3
"""How far logits of float32 may be apart, by the size of the largest."""
LENGTH = 40
WHOLE, SOME = cp.KeyDiffPress(0.0), cp.AdaKVPress(cp.KeyDiffPress(0.5))
EVEN = cp.KeyDiffPress(0.5)
RIGHT, ITSELF = "right", "not without a press either"
STEPS = (1, 3, 1)


class Different(Exception):
    """Says where a pressed model gives something else than it should."""


class Trial:
    """A tiny model, and a text for it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.decoder = text_decoder(self.model)
        self.vocabularies = getattr(self.decoder.config, "num_codebooks", 1)
        self.ids = self.text(LENGTH, 0)

    def text(self, n: int, seed: int) -> Tensor:
        """Draw the token ids of a text, ``[1, n]``, or ``[C, n]`` with C vocabularies."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, 100, (self.vocabularies, n), generator=generator)

    def ordinary(self) -> Cache:
        """Make an ordinary cache."""
        return DynamicCache(config=self.decoder.config)

    @torch.no_grad()
    def logits(self, ids: Tensor, cache: Cache, **options: Tensor) -> Tensor:
        """Run a forward."""
        return self.model(ids, **{cache_argument(self.model): cache}, **options).logits

    def pressed(self, press: cp.BasePress, ids: Tensor, **options: Tensor) -> Cache:
        """Fill a cache under a press."""
        cache = self.ordinary()
        with press(self.model):
            self.logits(ids, cache, **options)
        return cache

    def filled(self, ids: Tensor, **options: Tensor) -> Cache:
        """Fill an ordinary cache."""
        cache = self.ordinary()
        self.logits(ids, cache, **options)
        return cache

    def kept(self, cache: Cache) -> dict[int, Tensor]:
        """Tell which tokens each head of each compressed layer keeps, ``[1, H, T]``."""
        full = [i for i, is_full in enumerate(full_attention(self.decoder.config)) if is_full]
        found = {}
        for i, layer in zip(full, compressed_layers(cache), strict=True):
            kept = torch.zeros(*layer.positions.shape[:2], LENGTH + 1, dtype=torch.bool)
            column = layer.positions.long().where(layer.positions >= 0, LENGTH)
            found[i] = kept.scatter_(-1, column, True)[..., :LENGTH]
        return found


def near(what: str, ours: Tensor, wanted: Tensor) -> None:
    """Raise Different unless logits are the same but for rounding."""
    size = max(1.0, float(wanted.abs().max()))
    error = float((ours - wanted).abs().max()) / size
    if not error <= NEAR:
        raise Different(f"{what}: off by {error:.1e}")


def ratio_0(trial: Trial) -> None:
    """Nothing evicted is no press: a prompt, and some steps."""
    plain, cache = trial.ordinary(), trial.ordinary()
    wanted = trial.logits(trial.ids, plain)
    with WHOLE(trial.model):
        near("prompt", trial.logits(trial.ids, cache), wanted)
    for n in STEPS:
        step = trial.text(n, n)
        near("step", trial.logits(step, cache), trial.logits(step, plain))


def masked_reference(trial: Trial) -> None:
    """Decoding is that of the uncompressed model with the evicted pairs masked, head by head."""
    cache, plain = trial.pressed(SOME, trial.ids), trial.filled(trial.ids)
    kept = trial.kept(cache)
    for i, layer in kept.items():
        if int(layer.sum()) != LENGTH // 2 * layer.shape[1]:
            raise Different(f"layer {i} keeps {int(layer.sum())} pairs")
    for n in STEPS:
        step = trial.text(n, n)
        ours = trial.logits(step, cache)
        with masked(trial.decoder, plain, kept):
            near("step", ours, trial.logits(step, plain))


def padding(trial: Trial) -> None:
    """A row of a padded batch is that row alone, in a prompt and a step."""
    texts = [trial.text(n, n) for n in (31, 17)]
    rows = [torch.cat([torch.zeros(len(x), 31 - x.shape[1]).long(), x], dim=1) for x in texts]
    ids, steps = torch.cat(rows), [trial.text(1, 9 + i) for i in range(2)]
    mask = torch.stack([torch.arange(31) >= 31 - x.shape[1] for x in texts]).long()
    batch = _padded(trial, mask)
    longer = _padded(trial, torch.cat([mask, torch.ones(2, 1).long()], dim=1), last=True)

    def compare(fill: Callable[..., Cache]) -> None:
        found = trial.logits(torch.cat(steps), fill(ids, **batch), **longer)
        for i, text in enumerate(texts):
            own = slice(i * len(text), (i + 1) * len(text))
            near("row", found[own], trial.logits(steps[i], fill(text)))

    with _by_itself():
        compare(trial.filled)
    compare(partial(trial.pressed, EVEN))


def _padded(trial: Trial, mask: Tensor, last: bool = False) -> dict[str, Tensor]:
    """Return the arguments of a padded forward, of its last token only or of all."""
    given = {"attention_mask": mask}
    if "position_ids" in inspect.signature(trial.model.forward).parameters:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        given["position_ids"] = positions[:, -1:] if last else positions
    return given


def chunks(trial: Trial) -> None:
    """A prompt in chunks is the prompt in one forward."""
    parts = trial.ids.split(13, dim=1)
    step = trial.text(1, 5)
    with _by_itself():
        plain = trial.ordinary()
        for part in parts:
            trial.logits(part, plain)
        near("chunks", trial.logits(step, plain), trial.logits(step, trial.filled(trial.ids)))
    cache = cp.prefill(trial.model, trial.ids, SOME, chunk_size=13)
    whole = trial.pressed(SOME, trial.ids)
    near("step", trial.logits(step, cache), trial.logits(step, whole))


def save_and_load(trial: Trial) -> None:
    """A loaded cache is the one that was saved."""
    cache, step = trial.pressed(SOME, trial.ids), trial.text(1, 5)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "cache.safetensors")
        cp.save_cache(cache, path, trial.model)
        loaded = cp.load_cache(path, trial.model)
    near("step", trial.logits(step, loaded), trial.logits(step, cache))


def forks(trial: Trial) -> None:
    """Each row of a fork is its original, which stays as it is."""
    cache, step = trial.pressed(SOME, trial.ids), trial.text(1, 5)
    forked = cp.fork(cache, 2)
    ours = trial.logits(step.repeat(2, 1), forked)
    wanted = trial.logits(step, cache)
    near("rows", ours, wanted.repeat(2, 1, 1))


def beams(trial: Trial) -> None:
    """Beams over what is left are those of the uncompressed model with the rest masked."""
    options = {"num_beams": 3, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    options |= {"eos_token_id": None, "pad_token_id": 0}
    whole = torch.cat([trial.ids, trial.text(1, 5)], dim=1)

    def answer(cache: Cache) -> Tensor:
        given = {cache_argument(trial.model): cache}
        return trial.model.generate(whole, **given, **options)[:, -5:]

    cache, plain = trial.pressed(SOME, trial.ids), trial.filled(trial.ids)
    for one in (cache, plain):
        one.reorder_cache(torch.zeros(3, dtype=torch.long))
    with _by_itself():
        answer(copy.deepcopy(plain))
    with masked(trial.decoder, plain, trial.kept(cache)):
        wanted = answer(plain)
    ours = answer(cache)
    if not torch.equal(ours, wanted):
        raise Different(f"tokens {ours.tolist()} for {wanted.tolist()}")


CHECKS: dict[str, Callable[[Trial], None]] = {
    "ratio 0": ratio_0,
    "masked reference": masked_reference,
    "padding": padding,
    "chunks": chunks,
    "save and load": save_and_load,
    "fork": forks,
    "beams": beams,
}


class ItselfError(Exception):
    """Says that a model does not do something even without a press."""


@contextmanager
def _by_itself() -> Iterator[None]:
    """What fails within is not for the press to get right."""
    try:
        yield
    except Exception as error:
        raise ItselfError from error


def check(trial: Trial, name: str) -> str:
    """Run one check, and say in a line how it ended."""
    try:
        CHECKS[name](trial)
    except ItselfError:
        return ITSELF
    except Different as found:
        return f"wrong: {found}"
    except cp.UnsupportedError as refusal:
        return f"refused: {_line(refusal)}"
    except Exception as error:
        return f"fails: {type(error).__name__}, {_line(error)}"
    return RIGHT


def record_of(kind: str) -> dict[str, object]:
    """Build a model of a type, enter a block, and run all checks."""
    try:
        model = tiny(kind)
    except Exception as error:
        reason = f"{type(error).__name__}, {_line(error)}"
        return {"status": "cannot be built", "reason": reason}
    try:
        with EVEN(model):
            pass
    except cp.UnsupportedError as refusal:
        return {"status": "refused", "reason": _line(refusal)}
    trial = Trial(model)
    found = {name: check(trial, name) for name in CHECKS}
    bad = {name: line for name, line in found.items() if line not in (RIGHT, ITSELF)}
    wrong = any(not line.startswith("refused") for line in bad.values())
    status = "wrong" if wrong else "in part" if bad else "works"
    reason = "; ".join(f"{name} {line}" for name, line in bad.items())
    return {"status": status, "reason": reason, "checks": found}


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
