"""What a press adds grows with the text as its page says, and so does the memory that it takes.

Work is counted, not timed: every number that an operation writes, and every product of a matrix
multiplication.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import cachepress as cp
from cachepress.catalogue import grows
from cachepress.press import BasePress, ScorerPress, all_presses
from tests.laws.presses import SOURCES
from tests.tiny import tokenizer, tokens

SHORT, LONG, PROMPT = 4000, 16000, 64
MIDDLE = 8000
"""Long enough where work grows with the square."""
FACTOR = LONG / SHORT
MATMULS = (torch.ops.aten.mm, torch.ops.aten.bmm)


class Work(TorchDispatchMode):
    """Counts numbers written, and the bytes of the largest new piece of memory."""

    def __init__(self):
        super().__init__()
        self.numbers = self.largest = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        given = {id_of(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in (x for x in tree_leaves(out) if isinstance(x, torch.Tensor)):
            if id_of(x) not in given:
                self.largest = max(self.largest, x.untyped_storage().nbytes())
            if id_of(x) not in given or operation._schema.is_mutable:
                self.numbers += x.numel()
        if operation.overloadpacket in MATMULS:
            self.numbers += out.numel() * args[0].shape[-1]
        return out


def id_of(x):
    return x.untyped_storage().data_ptr()


def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=10**6,
    )
    return LlamaForCausalLM(config).eval()


MODEL = model()


def work(press, n):
    """What it takes to read a short prompt behind ``n`` pairs, and to compress all of them."""
    generator = torch.Generator().manual_seed(1)
    cache = DynamicCache(config=MODEL.config)
    # Keys with a direction in common, as real ones have.
    keys = torch.randn(1, 1, n, 8, generator=generator) + 0.5
    cache.layers[0].update(keys, torch.randn(1, 1, n, 8, generator=generator))
    question = 5 if press.needs.question else None
    counted = Work()
    with counted:
        cp.prefill(MODEL, tokens(PROMPT), press, cache, question=question, tokenizer=tokenizer())
    return counted


def scorers():
    kinds = {k for k in all_presses(ScorerPress) if k.__module__.startswith("cachepress.")}
    kinds = sorted((k for k in kinds if k.alias), key=lambda k: k.__name__)
    return [k(0.5) for k in kinds if k not in SOURCES]


SNAP, KNORM = cp.SnapKVPress(0.5, window_size=16), cp.KnormPress(0.5)
WRAPPED: list[BasePress] = [
    cp.AdaKVPress(SNAP),
    cp.AdaKVPress(SNAP, scope="model"),
    cp.CriticalKVPress(SNAP),
    cp.CriticalAdaKVPress(SNAP),
    cp.KeyRerotationPress(KNORM),
    cp.ComposedPress([KNORM, SNAP]),
    cp.CAMPress(KNORM, 8, 1000),
    cp.ChunkKVPress(KNORM),
    cp.EntropyGatedChunkKVPress(KNORM),
    cp.DMSPress(KNORM, -3.0),
    cp.DuoAttentionPress(1.0, ((0.5,),), 128, 256),
    cp.HeadKVPress(KNORM, ((0.5,),)),
    cp.KIVIPress(KNORM),
    cp.MergingPress(KNORM),
    cp.QuestPress(KNORM),
    cp.SimLayerKVPress(0.9),
    cp.ThinKPress(0.5),
    cp.ChunkPress(SNAP),
    cp.ChunkPress(cp.SnapKVPress(0.5), chunk_length=64),
    cp.BlockPress(KNORM),
    cp.DecodingPress(KNORM, 8, 100),
    cp.CompressionRatioDecodingPress(KNORM, 8, 0.5),
]


@pytest.mark.parametrize("press", [*scorers(), *WRAPPED], ids=lambda p: f"{type(p).__name__}")
def test_work_grows_with_the_text_or_the_page_says_how(press):
    short, long = work(press, SHORT), work(press, LONG)
    ratio = long.numbers / short.numbers
    if ratio > 1.15 * FACTOR:
        assert grows(type(press)) is not None, f"{ratio:.1f} times the work for 4 times the text"
    scores = 4 * (LONG + PROMPT)
    assert long.largest <= 8 * scores + 2**25


def test_presses_whose_work_grows_faster_say_so():
    quicker = [cp.MergingPress(KNORM), cp.BlockPress(KNORM)]
    for press in quicker:
        assert work(press, MIDDLE).numbers > 1.5 * FACTOR * work(press, MIDDLE // 4).numbers
        assert "time that grows with" in type(press).__doc__
    assert grows(cp.KnormPress) is None
    assert grows(cp.H2OPress) == "the square of the prompt, as attention itself does"


def test_pairs_that_are_like_others_cost_rkv_no_square():
    """And pairs that are like none do, which takes time, and no memory."""
    alike, unlike = cp.RKVPress(0.5), cp.RKVPress(0.5, threshold=1.0)
    assert work(alike, LONG).numbers < 1.15 * FACTOR * work(alike, SHORT).numbers
    short, long = work(unlike, MIDDLE // 4), work(unlike, MIDDLE)
    assert long.numbers > 2 * FACTOR * short.numbers
    assert long.largest <= 2**25
