"""A bias of each pair and head: one pair stands for many, or for none, through all that is done."""

import copy
from itertools import product
from math import log

import pytest
import torch
from transformers import DynamicCache

import cachepress as cp
from cachepress.cache.batch import compressed_layers, size_of
from cachepress.cache.joined import join
from cachepress.cache.masks import TextMask
from cachepress.cache.pairs import Pairs
from cachepress.cache.segment import Segment
from cachepress.cache.snapshot import Snapshot
from cachepress.cache.tail import Tail
from cachepress.ops import AttentionRule
from cachepress.ops.paged_attention.naive import naive_attention
from tests.bounds import EXACT, close, near
from tests.counting import CountingPress, HidingPress
from tests.dense import REFERENCE, dense_logits, hiding, mask_and_positions
from tests.laws.test_matrix import batch
from tests.tiny import exact_tiny, rand, randn, tokens
from tests.tiny_cache import allocated, forward, kept, pressed

H, G, D, T = 2, 3, 8, 50
RULES = {
    "plain": AttentionRule(0.5),
    "softcap": AttentionRule(0.7, softcap=2.0),
    "sinks": AttentionRule(0.5, sinks=torch.linspace(-1, 2, H * G, dtype=torch.float64)),
}
COUNTING = CountingPress(0.5)
PRESSES = {
    "alone": COUNTING,
    "uneven": cp.AdaKVPress(COUNTING),
    "uneven layers": cp.AdaKVPress(COUNTING, scope="model"),
    "chunks": cp.ChunkPress(COUNTING, 10),
    "blocks": cp.BlockPress(COUNTING, 10),
    "merged": cp.MergingPress(COUNTING),
    "turned": cp.KeyRerotationPress(COUNTING),
    "composed": cp.ComposedPress([cp.KnormPress(0.3), COUNTING]),
    "composed, first": cp.ComposedPress([COUNTING, cp.KnormPress(0.3)]),
    "channels": cp.ComposedPress([COUNTING, cp.ThinKPress(0.5, window_size=6)]),
    "few bits": cp.KIVIPress(COUNTING, residual=5),
    "pages": cp.QuestPress(COUNTING, 99),
    "with states": cp.ComposedPress([cp.H2OPress(0.3), COUNTING]),
    "while decoding": cp.PrefillDecodingPress(COUNTING, cp.DecodingPress(cp.KnormPress(), 8, 30)),
    "per layer": cp.PerLayerCompressionPress(COUNTING, [0.1, 0.3, 0.6, 0.8]),
}
by_press = pytest.mark.parametrize("name", PRESSES)
alone_or_padded = pytest.mark.parametrize("company", ["alone", "padded"])


def biases(cache):
    """Bias of each held pair by layer, sequence, head and position."""
    found = {}
    for i, layer in enumerate(compressed_layers(cache)):
        rows = layer.snapshot.rows()
        where, bias = rows.text_positions(), rows.bias
        for b, h, t in (where >= 0).nonzero().tolist():
            found[i, b, h, int(where[b, h, t])] = 0.0 if bias is None else float(bias[b, h, t])
    return found


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("even", [True, False], ids=["even", "uneven"])
@pytest.mark.parametrize("name", RULES)
def test_one_pair_with_the_logarithm_of_k_attends_as_k_equal_ones(name, even, n):
    keys, values = randn(2, H, T, D), randn(2, H, T, D)
    copies = torch.randint(1, 6, (2, H, T))
    order = rand(2, H, T).argsort(-1).argsort(-1)
    mask = order < (40 if even else torch.tensor([[33, 1], [0, 50]])[..., None])
    bias = copies.double().log()
    tail = Tail.of(randn(2, H, n, D), randn(2, H, n, D)).read()
    query = randn(2, H * G, n, D)
    held = Snapshot((Segment.of(Pairs(keys, values, bias=bias), mask),), tail, T + n, 2, None)
    ours = held.attend(query, TextMask(None, n), RULES[name])
    for q in range(n):
        rows = []
        for b in range(2):
            rows.append([])
            for h in range(H):
                times = copies[b, h][mask[b, h]]
                pairs = [x[b, h][mask[b, h]].repeat_interleave(times, 0) for x in (keys, values)]
                new = [x[b, h, : q + 1] for x in (tail.keys, tail.values)]
                rows[b].append(tuple(torch.cat(both) for both in zip(pairs, new, strict=True)))
        some = query.view(2, H, G, n, D)[..., q : q + 1, :]
        close(ours[:, q], naive_attention(some, rows, RULES[name]).view(2, H * G, D))


@alone_or_padded
@by_press
def test_a_compressed_layer_attends_as_if_each_pair_were_there_so_often(name, company):
    _, ids, mask = batch(company)
    cache = cp.prefill(exact_tiny(), ids, PRESSES[name], attention_mask=mask)
    for store in compressed_layers(cache):
        rows, b = store.snapshot.rows(), len(ids)
        copies = rows.bias.exp().round().long()
        close(rows.bias, copies.double().log())
        real = rows.text_positions() >= 0
        assert int((copies * real).max()) > 1
        query = randn(b, 2 * H, 2, D)
        columns = [
            [
                tuple(
                    x[i, j][real[i, j]].repeat_interleave(copies[i, j][real[i, j]], 0)
                    for x in (rows.keys, rows.values)
                )
                for j in range(H)
            ]
            for i in range(b)
        ]
        rule = AttentionRule(0.3)
        wanted = naive_attention(query.view(b, H, 2, 2, D), columns, rule)
        ours = store.snapshot.attend(query, TextMask(None, 2), rule)
        close(ours.transpose(1, 2), wanted.view(b, 2 * H, 2, D))
        assert store.nbytes == allocated(store)


@alone_or_padded
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("n", [3, 20])
@pytest.mark.parametrize("name", ["alone", "uneven", "uneven layers"])
def test_a_model_goes_on_as_a_dense_reference_with_the_bias(name, n, attention, company):
    model = exact_tiny()
    model.set_attn_implementation(attention)
    _, ids, mask = batch(company)
    cache, question = DynamicCache(), tokens(n, batch=len(ids), seed=n)
    with PRESSES[name](model):
        forward(model, cache, input_ids=ids, **mask_and_positions(mask, 0, ids.shape[1]))
    _, wanted = dense_logits(model, cache, ids, question, mask)
    longer = None if mask is None else torch.cat([mask, torch.ones_like(question)], dim=1)
    given = mask_and_positions(longer, ids.shape[1], n)
    close(forward(model, cache, input_ids=question, **given).logits, wanted.detach())


@pytest.mark.parametrize("bias", [torch.finfo(torch.float32).min, float("-inf")])
def test_the_lowest_bias_equals_eviction(bias):
    model, ids = exact_tiny(), tokens(40)
    for n in (1, 20):
        hidden, gone = (
            pressed(model, press, ids) for press in (HidingPress(bias=bias), cp.KnormPress(0.5))
        )
        assert compressed_layers(hidden)[0].lengths.tolist() == [[40, 40]]
        ours, wanted = (
            forward(model, cache, input_ids=tokens(n, seed=n)).logits for cache in (hidden, gone)
        )
        close(ours, wanted)


@by_press
def test_at_ratio_0_the_bias_is_0_and_nothing_changes(name):
    if name not in ("alone", "uneven", "uneven layers", "chunks", "turned", "merged", "pages"):
        pytest.skip("it has a ratio of its own")
    model, ids = exact_tiny(), tokens(40)
    plain, cache = DynamicCache(), DynamicCache()
    wanted = forward(model, plain, input_ids=ids).logits
    press = PRESSES[name].with_ratio(0.0)
    with press(model):
        assert torch.equal(forward(model, cache, input_ids=ids).logits, wanted)
        for step in range(3):
            given = {"input_ids": tokens(1, seed=step)}
            close(forward(model, cache, **given).logits, forward(model, plain, **given).logits)
    assert set(biases(cache).values()) == {0.0}


@alone_or_padded
def test_what_a_pair_stands_for_is_added_up_in_further_turns(company):
    model, press = exact_tiny(), cp.AdaKVPress(COUNTING)
    _, ids, mask = batch(company)
    cache, seen = DynamicCache(), ids.shape[1]
    with press(model):
        forward(model, cache, input_ids=ids, **mask_and_positions(mask, 0, seen))
        before = kept(cache)
        more = tokens(20, batch=len(ids))
        longer = None if mask is None else torch.cat([mask, torch.ones_like(more)], dim=1)
        forward(model, cache, input_ids=more, **mask_and_positions(longer, seen, 20))
    found, after = biases(cache), kept(cache)
    for layer, b, h in product(range(4), range(len(ids)), range(2)):
        first = 0 if mask is None else seen - int(mask[b].sum())
        times = counted(before[layer][b][h], dict.fromkeys(range(first, seen), 1))
        times |= dict.fromkeys(range(seen, seen + 20), 1)
        for p, n in counted(after[layer][b][h], times).items():
            assert found[layer, b, h, p] == pytest.approx(log(n), abs=EXACT)


def counted(positions, times):
    """What each position stands for: all that came since the one before it."""
    each = zip([-1, *positions], positions, strict=False)
    return {q: sum(n for at, n in times.items() if p < at <= q) for p, q in each}


@pytest.mark.parametrize("wrap", [lambda p: p, cp.AdaKVPress, cp.KeyRerotationPress])
def test_a_press_without_one_leaves_each_pair_its_bias(wrap):
    model = exact_tiny()
    cache = pressed(model, COUNTING, tokens(40))
    before = biases(cache)
    assert any(before.values())
    with wrap(cp.KnormPress(0.5))(model):
        forward(model, cache, input_ids=tokens(20, seed=1))
    after = biases(cache)
    assert len(after) < len(before) + 4 * 2 * 20 and any(after.values())
    assert after == {place: before.get(place, 0.0) for place in after}


def test_a_press_that_keeps_all_leaves_each_pair_its_bias():
    model = exact_tiny()
    cache = pressed(model, COUNTING, tokens(40))
    before = biases(cache)
    for press in (cp.KnormPress(0.0), cp.AdaKVPress(cp.KnormPress(0.0), scope="model")):
        with press(model, storage="int8"):
            forward(model, cache, input_ids=tokens(20, seed=1))
    assert {place: biases(cache)[place] for place in before} == before


@pytest.mark.parametrize("storage", ["full", cp.Codec(8, residual=5), cp.Codec(4, residual=5)])
def test_it_is_saved_and_loaded(storage, tmp_path):
    model = exact_tiny()
    cache = cp.prefill(model, tokens(90), cp.AdaKVPress(COUNTING), storage=storage)
    cp.save_cache(cache, tmp_path / "c", model)
    loaded = cp.load_cache(tmp_path / "c", model)
    assert biases(loaded) == biases(cache) and any(biases(cache).values())
    for n in (1, 20):
        given = {"input_ids": tokens(n, seed=n)}
        assert torch.equal(
            forward(model, loaded, **given).logits, forward(model, cache, **given).logits
        )


@pytest.mark.parametrize("storage", ["full", "int8"])
@pytest.mark.parametrize("name", ["alone", "uneven"])
def test_it_goes_with_forks_joined_batches_and_crops(name, storage):
    model = exact_tiny()
    caches = [cp.prefill(model, tokens(90, seed=i), PRESSES[name], storage=storage) for i in (0, 1)]
    wanted = [
        forward(model, cp.fork(cache), input_ids=tokens(1, seed=i)).logits[0]
        for i, cache in enumerate(caches)
    ]
    joined = join([caches], 2)
    ids = torch.cat([tokens(1, seed=0), tokens(1, seed=1)]).repeat(2, 1)
    ours = forward(model, joined, input_ids=ids).logits
    for i, row in enumerate(ours):
        close(row, wanted[i % 2])
    many = cp.fork(caches[0], 3)
    forward(model, many, input_ids=tokens(70, seed=2).expand(3, -1))
    for layer in compressed_layers(many):
        layer.crop(-70)
    assert biases(cp.fork(many)) == biases(many)
    for row in forward(model, many, input_ids=tokens(1).expand(3, -1)).logits:
        close(row, wanted[0])


def test_a_reordered_batch_has_the_bias_of_its_sequences():
    model, ids = exact_tiny(), tokens(60, batch=3)
    cache = pressed(model, cp.AdaKVPress(COUNTING), ids)
    before = biases(cache)
    cache.reorder_cache(torch.tensor([2, 0, 0, 1]))
    order = {0: 2, 1: 0, 2: 0, 3: 1}
    assert biases(cache) == {
        (i, b, *rest): before[i, old, *rest]
        for b, old in order.items()
        for (i, was, *rest) in before
        if was == old
    }


def test_beams_are_those_of_the_reference():
    model, ids = exact_tiny(), tokens(60)
    reference, whole = copy.deepcopy(model), DynamicCache()
    cache = pressed(model, cp.AdaKVPress(COUNTING), ids[:, :-1])
    forward(reference, whole, input_ids=ids[:, :-1])
    whole.batch_repeat_interleave(3)
    reference.set_attn_implementation(REFERENCE)
    options = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    options |= {"return_dict_in_generate": True, "output_scores": True, "eos_token_id": None}
    with torch.no_grad():
        ours = model.generate(ids, past_key_values=cp.fork(cache), **options)
        with hiding(reference, cache, 59):
            wanted = reference.generate(ids, past_key_values=whole, **options)
    assert torch.equal(ours.sequences, wanted.sequences)
    near(ours.sequences_scores, wanted.sequences_scores, torch.float32, terms=20)


def test_bytes_are_counted_and_a_limit_holds():
    model, ids = exact_tiny(), tokens(300)
    biased, plain = (
        cp.prefill(model, ids, press) for press in (COUNTING, cp.StreamingLLMPress(0.5))
    )
    pages = sum(s.layout.n_pages for x in compressed_layers(biased) for s in x.snapshot.segments)
    assert size_of(biased).bytes_after == size_of(plain).bytes_after + pages * 32 * 8
    limit = 130_000
    for storage in ("full", cp.Codec(8, residual=5)):
        cache = cp.prefill(model, ids, CountingPress(max_bytes=limit), storage=storage)
        assert 0.6 * limit < size_of(cache).bytes_after <= limit
        with cp.StreamingLLMPress(max_bytes=limit)(model, storage=storage):
            forward(model, cache, input_ids=tokens(40))
        assert 0.6 * limit < size_of(cache).bytes_after <= limit
        assert any(biases(cache).values())


def test_two_presses_that_give_one_are_refused():
    with pytest.raises(cp.CachepressError, match="a pair has one bias"):
        cp.ComposedPress([COUNTING, CountingPress(0.3)])


def test_a_bias_of_another_shape_is_refused():
    class Short(CountingPress):
        def pair_bias(self, view, mask):
            return torch.zeros(mask.shape[:2])

    with pytest.raises(cp.CachepressError, match=r"shape \(1, 2\), wanted \(1, 2, 40"):
        pressed(exact_tiny(), Short(0.5), tokens(40))


def test_what_is_stored_is_a_part_of_no_graph():
    model = exact_tiny()
    cache = DynamicCache()
    with COUNTING(model):
        model(tokens(40), past_key_values=cache)
    assert not any(x.snapshot.rows().bias.requires_grad for x in compressed_layers(cache))
    logits = model(tokens(3), past_key_values=cache).logits
    logits.square().mean().backward()
    assert all(p.grad is not None for p in model.model.layers[0].self_attn.parameters())
