"""The laws over presses, wrappers, storages and modes: every pair, or with ``make laws`` all.

``CACHEPRESS_LAWS`` says which: "all" combinations, "pairs" or a "few" of those.
"""

import os
import re
from functools import cache
from itertools import product

import pytest
import torch
from allpairspy import AllPairs
from transformers import DynamicCache

import cachepress as cp
from cachepress.cache.batch import compressed_layers
from cachepress.cache.masks import TextMask
from cachepress.cache.tail import SLACK
from cachepress.ops import AttentionRule
from cachepress.ops.paged_attention import PAGE
from cachepress.ops.paged_attention.naive import naive_attention
from tests.bounds import EXACT, close
from tests.laws.presses import (
    HEADS,
    LAYERS,
    RATIO,
    UNSUPPORTED,
    WRAPPERS,
    every_scorer,
    every_wrapper,
    name_of,
)
from tests.tiny import exact_tiny, tokens
from tests.tiny_cache import allocated, forward, kept

SCORERS = {name_of(press): press for press in every_scorer(RATIO)}
STORAGES = {"full": "full", "int8": cp.Codec(8, residual=5), "int4": cp.Codec(4, residual=5)}
FACTORS = [
    list(SCORERS),
    list(WRAPPERS),
    list(STORAGES),
    ["one shot", "chunked"],
    ["alone", "padded"],
]
LENGTHS = (41, 26, 23)
CHUNK = 12
QUESTION = 3


SELECTION = os.environ.get("CACHEPRESS_LAWS", "pairs")
ALL, STEP = SELECTION == "all", 8 if SELECTION == "few" else 1


def combinations():
    every = product(*FACTORS) if ALL else AllPairs(FACTORS)
    return [
        tuple(row)
        for row in every
        if (row[0], row[1]) not in UNSUPPORTED and (row[2] == "full" or not WRAPPERS[row[1]].stores)
    ][::STEP]


def pairs():
    """Scorers and wrappers: of those that can go together a quarter, every one in several pairs."""
    numbered = product(enumerate(SCORERS), enumerate(WRAPPERS))
    return [
        (scorer, wrapper)
        for (i, scorer), (j, wrapper) in numbered
        if (scorer, wrapper) not in UNSUPPORTED and (ALL or wrapper == "none" or (i + j) % 4 == 0)
    ][::STEP]


def each():
    """Scorers and wrappers, every one of them once or twice."""
    wrapped = [(scorer, wrapper) for scorer, wrapper in pairs() if wrapper != "none"]
    once = {wrapper: (scorer, wrapper) for scorer, wrapper in wrapped}
    return [*((scorer, "none") for scorer in SCORERS), *once.values()]


matrix = pytest.mark.parametrize(
    ("scorer", "wrapper", "storage", "going", "company"), combinations()
)
in_pairs = pytest.mark.parametrize(("scorer", "wrapper"), pairs())
of_each = pytest.mark.parametrize(("scorer", "wrapper"), each())


def build(scorer, wrapper, ratio=RATIO):
    return WRAPPERS[wrapper].build(SCORERS[scorer].with_ratio(ratio), ratio)


@cache
def model():
    return exact_tiny()


def batch(company):
    """Texts, and how they stand in a batch: ids and mask."""
    if company == "alone":
        ids = tokens(LENGTHS[0], seed=LENGTHS[0])
        return [ids], ids, None
    texts = [tokens(n, seed=n) for n in LENGTHS]
    ids = torch.zeros(len(texts), LENGTHS[0], dtype=torch.long)
    for row, text in zip(ids, texts, strict=True):
        row[LENGTHS[0] - text.shape[1] :] = text[0]
    return texts, ids, (ids > 0).long()


def compress(press, ids, mask, going, storage="full", mode="exact"):
    chunk = CHUNK if going == "chunked" else None
    return cp.prefill(
        model(),
        ids,
        press,
        attention_mask=mask,
        chunk_size=chunk,
        mode=mode,
        storage=STORAGES[storage],
        question=QUESTION,
    )


@matrix
def test_the_laws(scorer, wrapper, storage, going, company):
    press = build(scorer, wrapper)
    texts, ids, mask = batch(company)
    cache = compress(press, ids, mask, going, storage)
    _counts_are_exact(cache, scorer, wrapper, texts)
    _each_text_is_as_if_alone(cache, press, texts, ids)
    _positions_rise(cache, ids)
    _bytes_are_those_allocated(cache, ids, storage, WRAPPERS[wrapper])
    _attends_like_the_reference(cache, ids)
    _rows_are_those_of_the_text(cache, ids, mask, press, storage, WRAPPERS[wrapper])
    assert cp.parse(repr(press)) == press


def _counts_are_exact(cache, scorer, wrapper, texts):
    promised = WRAPPERS[wrapper]
    if promised.counts is None:
        return
    scope = promised.scope or SCORERS[scorer].budget.scope
    lengths = torch.stack([store.lengths for store in compressed_layers(cache)])  # [layers, B, H]
    for b, text in enumerate(texts):
        counts = torch.tensor(promised.counts(text.shape[1]))
        if scope == "head":
            assert torch.equal(lengths[:, b], counts[:, None].expand(-1, HEADS))
        elif scope == "layer":
            assert torch.equal(lengths[:, b].sum(-1), counts * HEADS)
        else:
            assert lengths[:, b].sum() == counts.sum() * HEADS


def _each_text_is_as_if_alone(cache, press, texts, ids):
    for b, text in enumerate(texts):
        alone = kept(compress(press, text, None, "one shot"))
        pad = ids.shape[1] - text.shape[1]
        for layer, layer_alone in zip(kept(cache), alone, strict=True):
            assert [[p - pad for p in head] for head in layer[b]] == layer_alone[0]


def _positions_rise(cache, ids):
    assert cache.get_seq_length() == ids.shape[1]
    for layer in kept(cache):
        for row in layer:
            for head in row:
                assert head == sorted(set(head))


def _bytes_are_those_allocated(cache, ids, storage, wrapper):
    store_bytes = [allocated(store) for store in compressed_layers(cache)]
    assert cp.size_of(cache).bytes_after == allocated(compressed_layers(cache))
    if storage == "full" and not wrapper.stores:
        for store, nbytes in zip(compressed_layers(cache), store_bytes, strict=True):
            rows, spans = int(store.lengths.sum()), store.lengths.numel()
            held = store.snapshot.rows()
            row = (
                (8 + wrapper.channels) * 8
                + 4
                + 4 * (held.rope is not None)
                + 8 * (held.token_state is not None)
            )
            index = 16 * (rows // PAGE + spans) + 160 * spans + ids.numel()
            assert rows * row <= nbytes <= (rows + (PAGE - 1) * spans) * row + index


def _attends_like_the_reference(cache, ids):
    for store in compressed_layers(cache):
        rows, b = store.snapshot.rows(), ids.shape[0]
        valid = rows.text_positions() >= 0
        query = torch.randn(b, 2 * HEADS, 3, 8, dtype=torch.float64)
        columns = [
            [(rows.keys[i, j][valid[i, j]], rows.values[i, j][valid[i, j]]) for j in range(HEADS)]
            for i in range(b)
        ]
        rule = AttentionRule(0.3)
        wanted = naive_attention(query.view(b, HEADS, 2, 3, 8), columns, rule)
        ours = store.snapshot.attend(query, TextMask(None, 3), rule)
        close(ours.transpose(1, 2), wanted.view(b, 2 * HEADS, 3, 8))


def _rows_are_those_of_the_text(cache, ids, mask, press, storage, wrapper):
    whole = compress(None, ids, mask, "one shot")
    for store, layer in zip(compressed_layers(cache), whole.layers, strict=True):
        rows = store.snapshot.rows()
        where = rows.text_positions()
        column = where.clamp(min=0).long()[..., None].expand_as(rows.keys)
        valid = (where >= 0)[..., None].expand_as(rows.keys)
        values = layer.values.gather(2, column)
        tolerance = _rounding_of(STORAGES[storage], layer)
        if wrapper.values:
            assert (rows.values - values)[valid].abs().max() <= tolerance
        if wrapper.keys and not press.needs.compaction:
            assert (rows.keys - layer.keys.gather(2, column))[valid].abs().max() <= tolerance


def _rounding_of(codec, layer):
    """The most that a number is off: half a step of the widest page, whose ends are float16."""
    if codec == "full":
        return EXACT
    size = 2 * max(float(x.abs().max()) for x in (layer.keys, layer.values))
    return size * (0.5 / (2**codec.bits - 1) + 2 * torch.finfo(torch.float16).eps)


@in_pairs
def test_ratio_0_equals_no_press(scorer, wrapper):
    if WRAPPERS[wrapper].stores:
        pytest.skip("stores rows in few bits, also those that it does not drop")
    ids = tokens(40)
    plain, cache = DynamicCache(), DynamicCache()
    wanted = forward(model(), plain, input_ids=ids).logits
    with build(scorer, wrapper, ratio=0.0)(model(), question=QUESTION):
        assert torch.equal(forward(model(), cache, input_ids=ids).logits, wanted)
        for step in range(12):
            ours = forward(model(), cache, input_ids=tokens(1, seed=step)).logits
            expected = forward(model(), plain, input_ids=tokens(1, seed=step)).logits
            close(ours, expected)
    assert compressed_layers(cache)[0].lengths.tolist() == [[52, 52]]


@pytest.mark.counts
@in_pairs
def test_online_chunks_and_a_second_turn_end_at_the_same_counts(scorer, wrapper):
    press = build(scorer, wrapper)
    texts, ids, mask = batch("padded")
    cache = compress(press, ids, mask, "chunked", mode="online")
    _counts_are_exact(cache, scorer, wrapper, texts)
    _positions_rise(cache, ids)
    cache, ids = DynamicCache(), tokens(40)
    with press(model(), question=QUESTION):
        forward(model(), cache, input_ids=ids[:, :23])
        forward(model(), cache, input_ids=ids[:, 23:])
    _counts_are_exact(cache, scorer, wrapper, [ids])
    _positions_rise(cache, ids)


def test_unsupported_pairs_are_refused_when_they_are_built():
    refused = set()
    for scorer, wrapper in product(SCORERS, WRAPPERS):
        try:
            build(scorer, wrapper)
        except cp.CachepressError as error:
            assert re.search("use ChunkPress|use PrefillDecodingPress", str(error))
            refused.add((scorer, wrapper))
    assert refused == UNSUPPORTED


def test_the_matrix_has_every_wrapper():
    assert every_wrapper() <= set(WRAPPERS)
    assert (
        len(compressed_layers(compress(cp.KnormPress(0.5), tokens(8), None, "one shot"))) == LAYERS
    )


def test_slack_is_what_the_docs_say():
    assert PAGE - 1 + SLACK <= 128
