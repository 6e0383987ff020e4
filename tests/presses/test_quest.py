"""Quest: the pages that are read are those of the paper's bound, and everything else goes on."""

from dataclasses import replace
from math import ceil

import pytest
import torch
from transformers import DynamicCache

import cachepress as cp
from cachepress.cache.batch import compressed_layers
from cachepress.cache.masks import TextMask
from cachepress.ops import AttentionRule
from cachepress.ops.paged_attention import PAGE
from cachepress.ops.paged_attention.naive import naive_attention
from cachepress.presses.quest import QuestPress
from tests.bounds import EXACT, close
from tests.counting import CountingPress
from tests.tiny import exact_tiny as tiny
from tests.tiny import randn, tokens
from tests.tiny import tiny as single
from tests.tiny_cache import allocated, forward, kept, pressed

# Of a token that comes twice, keys are equally long but for rounding; their directions, and what
# looks at them, differ.
ADAPTIVE = cp.AdaKVPress(cp.KeyDiffPress(0.4), alpha_safeguard=0.0)
CLEAR = cp.SnapKVPress(0.3, window_size=8)
RULE = AttentionRule(0.3)


def pages_of(store, b, h, queries, page_budget):
    """Pairs of one head that its queries read, page after page, the compressed ones first."""
    pages = []
    for block in store._segments:
        rows = block.rows()
        i = b if block.shape[0] > 1 else 0
        real = rows.text_positions()[i, h] >= 0
        keys, values = rows.keys[i, h][real], rows.values[i, h][real]
        pages += zip(keys.split(PAGE), values.split(PAGE), strict=True)
    pages = [page for page in pages if len(page[0])]
    bounds = []
    for keys, _ in pages:
        low, high = keys.float().amin(0), keys.float().amax(0)
        each = [torch.maximum(q * low, q * high).sum() for q in queries]
        bounds.append(max(float(x) for x in each))
    bounds[-1] = float("inf")
    return [pages[i] for i in sorted(range(len(pages)), key=lambda i: -bounds[i])[:page_budget]]


def assert_reads_the_best_pages(store, page_budget, seed=0):
    torch.manual_seed(seed)
    held, b = store.snapshot, store.batch_size
    query = randn(b, 2, 2, 1, 8)
    rows = []
    for i in range(b):
        rows.append([])
        for h in range(2):
            read = pages_of(store, i, h, query[i, h, :, 0], page_budget)
            if held.tail is not None:
                read.append((held.tail.keys[i, h], held.tail.values[i, h]))
            keys, values = zip(*read, strict=True)
            rows[-1].append((torch.cat(keys), torch.cat(values)))
    wanted = naive_attention(query, rows, RULE)
    ours = held.attend(query.view(b, 4, 1, 8), TextMask(None, 1), RULE)
    close(ours.transpose(1, 2), wanted.view(b, 4, 1, 8))
    return ours


@pytest.mark.parametrize("page_budget", [1, 2, 5])
@pytest.mark.parametrize("press", [cp.KnormPress(0.0), ADAPTIVE], ids=["all rows", "uneven"])
def test_one_query_reads_the_pages_that_promise_most(press, page_budget):
    model = tiny()
    cache = pressed(model, QuestPress(press, page_budget, skip_layers=0), tokens(300))
    for step in range(3):
        if step:
            forward(model, cache, input_ids=tokens(1))
        for store in compressed_layers(cache):
            some = assert_reads_the_best_pages(store, page_budget, seed=step)
            torch.manual_seed(step)
            query = randn(1, 2, 2, 1, 8).view(1, 4, 1, 8)
            every = store.snapshot.whole().attend(query, TextMask(None, 1), RULE)
            assert (some - every).abs().max() > 1e-3


def test_the_bound_is_one():
    """No pair of a page is worth more than the page promises, also where keys are quantized."""
    for codec in (None, cp.Codec(4, residual=0)):
        inner = cp.KnormPress(0.0) if codec is None else cp.KIVIPress(cp.KnormPress(0.0), 4, 0)
        cache = pressed(tiny(), QuestPress(inner, 1, skip_layers=0), tokens(200))
        block = compressed_layers(cache)[0]._segments[0]
        query = randn(2, 3, 8)
        products = (block.rows().keys[0].unsqueeze(1) * query.unsqueeze(2)).sum(-1)  # [H, 3, T]
        pages = [part.amax((1, 2)) for part in products.split(PAGE, dim=-1)]
        worth = block.worth(query, None)
        assert worth.shape == (2, ceil(200 / PAGE))
        assert (torch.stack(pages, dim=1) <= worth + EXACT).all()


@pytest.mark.parametrize("rule", [RULE, AttentionRule(0.7, softcap=2.0)], ids=["plain", "capped"])
@pytest.mark.parametrize("even", [True, False], ids=["even", "uneven"])
def test_the_bound_is_one_where_pairs_have_a_bias(even, rule):
    press = CountingPress(0.3) if even else cp.AdaKVPress(CountingPress(0.3))
    cache = pressed(tiny(), QuestPress(press, 1, skip_layers=0), tokens(200))
    block = compressed_layers(cache)[0]._segments[0]
    rows, query = block.rows(), randn(2, 3, 8)
    logits = rule.logits((rows.keys[0].unsqueeze(1) * query.unsqueeze(2)).sum(-1))
    logits = (logits + rows.bias[0].unsqueeze(1)).masked_fill(rows.positions[0, :, None] < 0, -1e9)
    pages = torch.stack([part.amax((1, 2)) for part in logits.split(PAGE, dim=-1)], dim=1)
    worth = block.worth(query, None, rule)
    assert (pages <= worth + EXACT).all()
    # No tighter bound of a page goes without the bias of each of its pairs.
    highest = torch.stack([part.amax(-1) for part in rows.bias[0].split(PAGE, dim=-1)], dim=1)
    if even:
        close(worth - rule.logits(block.worth(query, None)), highest)


def test_a_bias_can_make_a_page_the_one_that_is_read():
    model = tiny()
    cache = pressed(model, QuestPress(cp.KnormPress(0.0), 2, 0), tokens(160))
    layer = compressed_layers(cache)[0]
    (block,) = layer._segments
    query, rows = randn(1, 4, 1, 8), block.rows()
    for page in range(4):
        bias = torch.zeros_like(rows.positions, dtype=torch.float64)
        bias[:, :, page * PAGE + 7] = 50.0
        layer._segments = (replace(block, bias=bias.view(-1, PAGE)),)
        part = [*range(page * PAGE, page * PAGE + PAGE), *range(128, 160)]
        chosen = [(rows.keys[0, h, part], rows.values[0, h, part]) for h in range(2)]
        added = [[torch.cat([bias[0, 0, page * PAGE :][:PAGE], torch.zeros(PAGE)])] * 2]
        wanted = naive_attention(query.view(1, 2, 2, 1, 8), [chosen], RULE, added)
        ours = layer.snapshot.attend(query, TextMask(None, 1), RULE)
        close(ours.transpose(1, 2), wanted.view(1, 4, 1, 8))


@pytest.mark.parametrize(
    "press",
    [
        cp.KnormPress(0.0),
        ADAPTIVE,
        cp.KIVIPress(ADAPTIVE, 8, residual=40),
        cp.ComposedPress([cp.ThinKPress(0.5), CLEAR]),
        cp.KeyRerotationPress(CLEAR),
    ],
    ids=repr,
)
def test_as_many_pages_as_there_are_equal_full_attention(press):
    model, ids = tiny(), tokens(200, seed=1)
    quest, plain = (pressed(model, p, ids) for p in (QuestPress(press, 12), press))
    for step in range(100):
        token = tokens(1, seed=step)
        ours = forward(model, quest, input_ids=token).logits
        wanted = forward(model, plain, input_ids=token).logits
        close(ours, wanted)
    assert kept(quest) == kept(plain)
    assert len(compressed_layers(quest)[3]._segments) == (3 if press.needs.storage else 2)


def test_pages_of_uneven_heads_differ_in_number():
    """Where the longest head reads some of its pages, short ones read all of theirs."""
    cache = pressed(tiny(), QuestPress(ADAPTIVE, 6, skip_layers=0), tokens(300))
    store = compressed_layers(cache)[3]
    assert store._segments[0].layout.pages_of == (5, 7)
    for page_budget in (6, 5, 3):
        store.page_budget = page_budget
        assert_reads_the_best_pages(store, page_budget)


def test_first_layers_and_forwards_of_several_tokens_read_all():
    model, ids = tiny(), tokens(200)
    quest = pressed(model, QuestPress(cp.KeyDiffPress(0.5), 1), ids)
    plain = pressed(model, cp.KeyDiffPress(0.5), ids)
    assert [store.page_budget for store in compressed_layers(quest)] == [None, None, 1, 1]
    assert [store._segments[0].bounded for store in compressed_layers(quest)] == [
        False,
        False,
        True,
        True,
    ]
    several = [forward(model, cp.fork(c), input_ids=ids[:, :3]).logits for c in (quest, plain)]
    close(*several)
    one = [forward(model, cp.fork(c), input_ids=ids[:, :1]).logits for c in (quest, plain)]
    assert (one[0] - one[1]).abs().max() > 1e-2


@pytest.mark.parametrize("mode", ["exact", "online"])
def test_chunks_of_one_token_are_no_decoding(mode):
    """The last chunk of a prompt, and all chunks of a second turn, read every pair."""
    model, ids = tiny(), tokens(120)
    caches = []
    for press in (QuestPress(cp.KnormPress(0.0), 1, 0), cp.KnormPress(0.0)):
        cache = cp.prefill(model, ids[:, :100], press, chunk_size=33, mode=mode)
        cache = cp.prefill(model, ids[:, 100:], press, cache, chunk_size=1, mode=mode)
        caches.append(cache)
    for ours, wanted in zip(*map(compressed_layers, caches), strict=True):
        close(ours.values, wanted.values)


def test_forks_share_pages_and_beams_are_reordered():
    model, ids = tiny(), tokens(200, seed=1)
    cache = pressed(model, QuestPress(ADAPTIVE, 2, skip_layers=0), ids)
    forked = cp.fork(cache, 3)
    assert forked.layers[0]._segments[0].keys is cache.layers[0]._segments[0].keys
    steps = [tokens(1, batch=3, seed=i) for i in range(40)]
    for step in steps[:5]:
        forward(model, forked, input_ids=step)
    assert_reads_the_best_pages(compressed_layers(forked)[2], 2)
    own = [cp.fork(cache) for _ in range(3)]
    for b, one in enumerate(own):
        for step in steps[:5]:
            forward(model, one, input_ids=step[b : b + 1])
    forked.reorder_cache(torch.tensor([2, 0, 0]))
    for step in steps[5:]:
        logits = forward(model, forked, input_ids=step[:1].expand(3, -1)).logits
        first, other = (forward(model, own[b], input_ids=step[:1]).logits for b in (2, 0))
        wanted = torch.cat([first, other, other])
        close(logits, wanted)


def test_a_batch_of_sequences_is_selected_from():
    model, ids = tiny(), tokens(150, batch=3)
    cache = pressed(model, QuestPress(ADAPTIVE, 2, skip_layers=0), ids)
    cache.reorder_cache(torch.tensor([2, 0]))
    for store in compressed_layers(cache):
        assert_reads_the_best_pages(store, 2)
    for b, row in enumerate((2, 0)):
        alone = pressed(model, QuestPress(ADAPTIVE, 2, skip_layers=0), ids[row : row + 1])
        ours = forward(model, cp.fork(cache), input_ids=tokens(1).expand(2, -1)).logits[b]
        close(ours, forward(model, alone, input_ids=tokens(1)).logits[0])


def test_generation_goes_on_with_beams():
    model = tiny()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "num_beams": 2}
    ids, outs = tokens(140), []
    for press in (QuestPress(cp.KnormPress(0.0), 99), cp.KnormPress(0.0)):
        cache = cp.prefill(model, ids[:, :-1], press)
        with torch.no_grad():
            outs.append(model.generate(ids, past_key_values=cache, eos_token_id=None, **options))
    assert torch.equal(*outs)


def test_a_fork_after_many_tokens_and_a_crop_have_bounds_too():
    model, ids = tiny(), tokens(100)
    with QuestPress(cp.KnormPress(0.0), 2, 0)(model, turns="first"):
        cache = DynamicCache()
        forward(model, cache, input_ids=ids)
        forward(model, cache, input_ids=tokens(70))
        cache = cp.fork(cache)  # The tail is frozen into a block.
        for step in range(100):
            forward(model, cache, input_ids=tokens(1, seed=step))
    for store in compressed_layers(cache):
        assert [block.bounded for block in store._segments] == [True] * 3
        assert store._tail.n < 64 + PAGE
        for page_budget in (1, 2, 4):
            store.page_budget = page_budget
            assert_reads_the_best_pages(store, page_budget)
        store.crop(150)
        assert store.lengths.tolist() == [[150, 150]] and store._segments[0].bounded
        assert_reads_the_best_pages(store, 4)


def test_a_saved_cache_reads_the_same_pages(tmp_path):
    model = tiny()
    cache = pressed(model, QuestPress(ADAPTIVE, 2, skip_layers=1), tokens(200, seed=1))
    cp.save_cache(cache, tmp_path / "cache", model)
    loaded = cp.load_cache(tmp_path / "cache", model)
    assert [store.page_budget for store in compressed_layers(loaded)] == [None, 2, 2, 2]
    for step in range(3):
        token = tokens(1, seed=step)
        ours, wanted = (forward(model, c, input_ids=token).logits for c in (loaded, cache))
        assert torch.equal(ours, wanted)


def test_a_sequence_of_a_padded_batch_reads_what_it_reads_alone():
    press = QuestPress(cp.AdaKVPress(CLEAR, alpha_safeguard=0.0), 2, skip_layers=0)
    model, texts = tiny(), [tokens(n, seed=n) for n in (160, 97, 20)]
    ids = torch.zeros(3, 160, dtype=torch.long)
    for row, text in zip(ids, texts, strict=True):
        row[160 - text.shape[1] :] = text[0]
    mask = (ids > 0).long()
    batch = cp.prefill(model, ids, press, attention_mask=mask)
    alone = [cp.prefill(model, text, press) for text in texts]
    for step in range(100):
        mask = torch.cat([mask, mask.new_ones(3, 1)], dim=1)
        logits = forward(
            model,
            batch,
            input_ids=tokens(1, seed=step).expand(3, -1),
            attention_mask=mask,
            position_ids=mask.sum(-1, keepdim=True) - 1,
        ).logits
        for b, cache in enumerate(alone):
            wanted = forward(model, cache, input_ids=tokens(1, seed=step)).logits[0]
            close(logits[b], wanted)


def test_pages_that_a_mask_hides_are_not_read():
    model, ids = tiny(), tokens(160)
    cache = pressed(model, QuestPress(cp.KnormPress(0.0), 2, 0), ids)
    held = compressed_layers(cache)[0].snapshot
    mask = torch.ones(1, 161, dtype=torch.long)
    mask[0, 40:128] = 0  # All of the third and fourth page, most of the second.
    forward(model, cache, input_ids=tokens(1), attention_mask=mask)
    hidden = torch.cat([mask[:, :160], mask[:, 160:]], dim=1)
    query = randn(1, 4, 1, 8)
    read = TextMask(hidden, 1)
    held = compressed_layers(cache)[0].snapshot
    spans = query.view(2, 2, 8)
    worth = held.segments[0].worth(spans, read.of_rows(held.start, held.text_valid))
    lowest = torch.finfo(torch.float32).min
    assert (worth == lowest).tolist() == [[False, False, True, True, False]] * 2
    ours = held.attend(query, read, RULE)
    rows = held.rows()
    every = [
        [(rows.keys[0, h][part], rows.values[0, h][part]) for h in range(2)]
        for part in ([*range(32), *range(128, 161)], [*range(32, 40), *range(128, 161)])
    ]
    first = (worth[:, 0] >= worth[:, 1]).tolist()
    picked = [[every[0 if first[h] else 1][h] for h in range(2)]]
    wanted = naive_attention(query.view(1, 2, 2, 1, 8), picked, RULE)
    close(ours.transpose(1, 2), wanted.view(1, 4, 1, 8))


def test_bytes_are_measured():
    ids = tokens(300)
    quest, plain = (
        cp.prefill(single(), ids, p) for p in (QuestPress(ADAPTIVE, 4, skip_layers=1), ADAPTIVE)
    )
    for store, same in zip(compressed_layers(quest), compressed_layers(plain), strict=True):
        pages = store._segments[0].layout.n_pages
        bounds = 0 if store.page_budget is None else pages * 2 * 8 * 4
        assert allocated(store) == store.nbytes == allocated(same) + bounds
    assert cp.size_of(quest).bytes_after == allocated(compressed_layers(quest))


@pytest.mark.parametrize("wrap", [lambda p: p, cp.AdaKVPress, lambda p: cp.KIVIPress(p, 4, 8)])
def test_max_bytes_count_the_bounds(wrap):
    limit = 60_000
    press = QuestPress(wrap(cp.KnormPress(max_bytes=limit)), 4, skip_layers=0)
    cache = cp.prefill(single(), tokens(490), press)
    assert 0.55 * limit < allocated(compressed_layers(cache)) <= limit


def test_it_goes_with_presses_for_decoding():
    for press in (
        cp.DecodingPress(QuestPress(cp.KnormPress(), 1, 0), 8, 70),
        QuestPress(cp.DecodingPress(cp.KnormPress(), 8, 70), 1, 0),
        QuestPress(cp.PrefillDecodingPress(None, cp.DecodingPress(cp.KnormPress(), 8, 70)), 1, 0),
    ):
        cache, model = DynamicCache(), tiny()
        with press(model):
            forward(model, cache, input_ids=tokens(60))
            for step in range(30):
                forward(model, cache, input_ids=tokens(1, seed=step))
        assert compressed_layers(cache)[0].page_budget == 1
        assert compressed_layers(cache)[0].lengths[0, 0] <= 78
        assert_reads_the_best_pages(compressed_layers(cache)[0], 1)


def test_the_spelling_and_bad_options():
    press = QuestPress()
    assert repr(press) == (
        "QuestPress(press=KnormPress(compression_ratio=0.0), pages=None, skip_layers=2)"
    )
    assert cp.parse("quest") == press == cp.parse(repr(press))
    other = QuestPress(cp.SnapKVPress(0.5), token_budget=100)
    assert cp.parse(repr(other)) == other
    assert [other.needs.pages_read(depth) for depth in range(4)] == [None, None, 4, 4]
    assert press.needs.pages_read(2) == 32 and QuestPress(pages=3).needs.pages_read(5) == 3
    assert cp.AdaKVPress(other).needs.pages_read(2) == 4
    assert cp.ComposedPress([other, QuestPress(pages=3)]).needs.pages_read(2) == 3
    assert other.with_ratio(0.25).compression_ratio == 0.25
    for bad in ({"pages": 0}, {"token_budget": 0}, {"skip_layers": -1}):
        with pytest.raises(cp.CachepressError, match=f"{next(iter(bad))}: got"):
            QuestPress(**bad)
    with pytest.raises(cp.CachepressError, match="got both pages and token_budget"):
        QuestPress(pages=2, token_budget=64)
