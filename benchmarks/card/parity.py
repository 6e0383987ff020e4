"""Compares what the device computes with what the CPU does, on tiny models of many architectures.

So are steps that are recorded with those that are not. What is equal is the pairs that every head
keeps, the tokens, and the logits but for rounding.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, pipeline

import cachepress as cp
from benchmarks.card.lab import (
    EAGER,
    RECORDED,
    Cells,
    Lab,
    press_options,
    replays,
    stepping,
)
from benchmarks.card.records import Values
from cachepress.hf import cache_argument
from cachepress.press import BasePress
from tests.laws.presses import UNSUPPORTED, WRAPPERS, every_scorer, name_of
from tests.tiny import ARCHITECTURES, tiny, tokenizer, tokens, words
from tests.tiny_cache import kept

CLOSE = 1e-3
"""What float32 logits of a tiny model may differ by: they are some units large."""
WRAPPED = ("SnapKVPress", "KnormPress", "ExpectedAttentionPress", "ObservedAttentionPress")
COMPARED = ("llama", "qwen3", "gemma3", "gpt_oss")
STEPS = 12
SNAP = cp.SnapKVPress(0.5, window_size=6)
ADA = cp.AdaKVPress(SNAP)
EXPECTED = cp.ExpectedAttentionPress(0.5, n_future_positions=32)
PLAIN = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
Way = Callable[[PreTrainedModel], object]


def parity(lab: Lab) -> Cells:
    """Give a cell for each comparison; steps first, then ways of use, then every press."""
    yield from _steps(lab)
    yield from _ways(lab)
    yield from list(_presses(partial(of_press, lab)))[:: lab.sizes.every]


@cache
def model(name: str, device: str) -> PreTrainedModel:
    """Make the tiny model of an architecture on a device."""
    return tiny(name).to(device)


def compared(ours: tuple[object, Tensor], theirs: tuple[object, Tensor]) -> Values:
    """Compare what was kept or generated, and logits."""
    apart = (ours[1].float().cpu() - theirs[1].float().cpu()).abs().max().item()
    same = ours[0] == theirs[0]
    return {"equal": same and apart <= CLOSE, "same_pairs": same, "logits_apart": apart}


def _steps(lab: Lab) -> Cells:
    """Compare recorded with eager steps, for every architecture."""
    some = list(ARCHITECTURES) if lab.sizes.every == 1 else ["llama", "gemma3", "gpt_oss"]
    for name in some:
        yield f"recorded and eager steps, {name}", partial(recorded, lab, name)


def recorded(lab: Lab, name: str) -> Values:
    """Decode with and without recorded steps: logits of a loop, and tokens of beams."""
    found, before = [], replays()
    for mode in (RECORDED, EAGER):
        with stepping(mode):
            own = model(name, lab.job.device)
            ids = tokens(40, batch=2).to(own.device)
            cache = cp.prefill(own, ids[:, :-1], ADA)
            logits = decoded(own, cp.fork(cache), 2)
            options = {**PLAIN, "max_new_tokens": STEPS, cache_argument(own): cp.fork(cache)}
            greedy = own.generate(ids, attention_mask=torch.ones_like(ids), **options)
            with ADA(own):
                beams = own.generate(ids, num_beams=3, max_new_tokens=STEPS, **PLAIN)
        found.append(([greedy.tolist(), beams.tolist()], logits))
    return {"kind": "steps", **compared(*found), "replayed": replays() - before}


def decoded(own: PreTrainedModel, cache: DynamicCache, batch: int) -> Tensor:
    """Decode given tokens, and return the logits ``[steps, B, vocabulary]`` on the CPU."""
    out, name = [], cache_argument(getattr(own, "_orig_mod", own))  # As of a compiled model.
    with torch.no_grad():
        for i in range(STEPS):
            step = tokens(1, batch=batch, seed=100 + i).to(own.device)
            out.append(own(input_ids=step, **{name: cache}).logits[:, -1].cpu())
    return torch.stack(out)


def _presses(compare: Callable[..., Values]) -> Cells:
    """List comparisons of presses: every scorer, wrappers, architectures, storages, chunks."""
    scorers = every_scorer(0.5)
    for press in scorers:
        yield name_of(press), partial(compare, "llama", press)
    for press in (p for p in scorers if name_of(p) in WRAPPED):
        for name, wrapper in WRAPPERS.items():
            if (name_of(press), name) not in UNSUPPORTED and name != "none":
                wrapped = partial(wrapper.build, press, 0.5)
                yield f"{name}({name_of(press)})", partial(compare, "llama", wrapped)
    for name in COMPARED:
        for press in (cp.KnormPress(0.0), SNAP, ADA, EXPECTED):
            yield f"{name}, {name_of(press)}", partial(compare, name, press)
    for press in (SNAP, ADA):
        for storage in ("int8", "int4", "int2"):
            yield f"{storage}, {name_of(press)}", partial(compare, "llama", press, storage, 200)
        for mode in ("exact", "online"):
            work = partial(compare, "llama", press, chunk_size=16, mode=mode)
            yield f"chunks, {mode}, {name_of(press)}", work
        yield f"batch of 3, {name_of(press)}", partial(compare, "llama", press, batch=3)


def of_press(
    lab: Lab,
    name: str,
    press: BasePress | Callable[[], BasePress],
    storage: str = "full",
    length: int = 60,
    batch: int = 1,
    chunk_size: int | None = None,
    mode: str = "exact",
) -> Values:
    """Compare what a press keeps, and the logits after it."""
    press = press if isinstance(press, BasePress) else press()
    options = {**press_options(press, storage), "chunk_size": chunk_size, "mode": mode}
    found = []
    for device in (lab.job.device, "cpu"):
        own, ids = model(name, device), tokens(length, batch=batch)
        cache = cp.prefill(own, ids.to(device), **options)
        found.append((kept(cache), decoded(own, cache, batch)))
    return {"kind": "presses", **compared(*found)}


def _ways(lab: Lab) -> Cells:
    """Compare ways of use."""
    ways: dict[str, Way] = {
        "generate()": partial(generated, ids=tokens(60)),
        "beams": partial(generated, ids=tokens(60), num_beams=3),
        "several sequences": partial(
            generated, ids=tokens(60), num_beams=3, num_return_sequences=2
        ),
        "padded batch": padded,
        "forks": forked,
        "pipeline": piped,
        "save and load": saved,
    }
    for name, way in ways.items():
        yield name, partial(of_way, lab, way)
    yield "a file of another device", partial(moved, lab)
    yield "torch.compile", partial(compiled, lab)
    yield "bfloat16", partial(halved, lab)


def of_way(lab: Lab, way: Way) -> Values:
    """Compare a way of use: tokens or words."""
    ours, theirs = (way(model("llama", device)) for device in (lab.job.device, "cpu"))
    return {"kind": "ways", "equal": ours == theirs}


def generated(
    own: PreTrainedModel, ids: Tensor, mask: Tensor | None = None, **options: object
) -> object:
    """Generate under a press."""
    options |= {} if mask is None else {"attention_mask": mask.to(own.device)}
    with ADA(own):
        return own.generate(ids.to(own.device), max_new_tokens=STEPS, **PLAIN, **options).tolist()


def padded(own: PreTrainedModel) -> object:
    """Generate for texts of three lengths."""
    ids = torch.zeros(3, 31, dtype=torch.long)
    for row, n in zip(ids, (31, 17, 4), strict=True):
        row[31 - n :] = tokens(n, seed=n)[0]
    return generated(own, ids, (ids > 0).long())


def forked(own: PreTrainedModel) -> object:
    """Generate for five questions on one text."""
    ids, questions = tokens(60), tokens(7, batch=5, seed=4)
    cache = cp.fork(cp.prefill(own, ids.to(own.device), ADA), 5)
    whole = torch.cat([ids.expand(5, -1), questions], dim=1).to(own.device)
    options = {**PLAIN, "max_new_tokens": STEPS, cache_argument(own): cache}
    return own.generate(whole, attention_mask=torch.ones_like(whole), **options).tolist()


def piped(own: PreTrainedModel) -> object:
    """Answer questions in the pipeline."""
    name = "kv-press-text-generation"
    pipe = pipeline(name, model=own, tokenizer=tokenizer(), device=own.device)
    questions = [words(4, seed=1), words(5, seed=2)]
    return pipe(words(80), questions=questions, press=ADA, max_new_tokens=6)["answers"]


def saved(own: PreTrainedModel) -> object:
    """Save and load a cache, and decode from it; whether that changes nothing."""
    cache = cp.prefill(own, tokens(60).to(own.device), ADA)
    with file_of(cache, own) as path:
        loaded = cp.load_cache(path, own)
    return torch.equal(decoded(own, cache, 1), decoded(own, loaded, 1))


def moved(lab: Lab) -> Values:
    """Load the file of one device's cache on the other."""
    own, other = model("llama", lab.job.device), model("llama", "cpu")
    cache = cp.prefill(own, tokens(60).to(own.device), ADA)
    with file_of(cache, own) as path:
        loaded = cp.load_cache(path, other)
    ours, theirs = (kept(cache), decoded(own, cache, 1)), (kept(loaded), decoded(other, loaded, 1))
    return {"kind": "ways", **compared(ours, theirs)}


@contextmanager
def file_of(cache: object, own: PreTrainedModel) -> Iterator[str]:
    """Save a cache to a file that is gone after the block."""
    with TemporaryDirectory() as folder:
        path = str(Path(folder, "cache.safetensors"))
        cp.save_cache(cache, path, own)  # type: ignore
        yield path


def compiled(lab: Lab) -> Values:
    """Decode with a compiled model."""
    own = tiny().to(lab.device)
    cache = cp.prefill(own, tokens(60).to(lab.device), ADA)
    backend = "inductor" if lab.is_gpu else "eager"
    ours = decoded(torch.compile(own, backend=backend), cp.fork(cache), 1)  # type: ignore
    return {"kind": "ways", **compared(([], ours), ([], decoded(own, cache, 1)))}


def halved(lab: Lab) -> Values:
    """Decode in a half type: logits differ by its rounding."""
    found = []
    for device in (lab.job.device, "cpu"):
        own = tiny().to(device, torch.bfloat16)
        cache = cp.prefill(own, tokens(60).to(device), cp.StreamingLLMPress(0.5))
        found.append((kept(cache), decoded(own, cache, 1)))
    values = compared(*found)
    scale = found[1][1].float().abs().max().item()
    close = values["logits_apart"] <= 0.1 * scale  # type: ignore
    return {"kind": "ways", **values, "equal": values["same_pairs"] and close}
