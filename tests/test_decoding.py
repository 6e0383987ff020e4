"""Compression of a running generation: bounds at every step, true positions, state of its own."""

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

import cachepress as cp
from cachepress.cache.batch import compressed_layers
from tests.bounds import no_near_ties
from tests.laws.presses import SMALL, every_press, name_of
from tests.tiny import exact_tiny as tiny
from tests.tiny import tokenizer, tokens, words
from tests.tiny_cache import forward, kept

INTERVAL, TARGET = 32, 48
SCORERS = every_press(0.5)


class Watch(LogitsProcessor):
    """Records the pairs that each layer holds, at every step of generate()."""

    def __init__(self, cache):
        self.cache, self.snapshot = cache, []

    def __call__(self, input_ids, scores):
        self.snapshot.append(
            [float(s.lengths.sum(-1).max()) for s in compressed_layers(self.cache)]
        )
        return scores


@pytest.mark.parametrize("adaptive", [False, True], ids=["even", "AdaKV"])
@pytest.mark.parametrize("scorer", SCORERS, ids=name_of)
def test_the_cache_never_exceeds_its_bound(scorer, adaptive):
    model = tiny()
    model.config.max_position_embeddings = 2048
    inner = cp.AdaKVPress(scorer) if adaptive else scorer
    press = cp.DecodingPress(inner, INTERVAL, TARGET, hidden_states_buffer_size=16)
    n = 1000 if name_of(scorer) == "KnormPress" else 150
    cache = DynamicCache()
    watch = Watch(cache)
    with torch.no_grad(), press(model):
        out = model.generate(
            tokens(100),
            past_key_values=cache,
            max_new_tokens=n,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            logits_processor=LogitsProcessorList([watch]),
        )
    assert out.shape == (1, 100 + n)
    assert len(watch.snapshot) == n
    assert watch.snapshot[0] == [TARGET * 2] * 4
    most = max(max(step) for step in watch.snapshot)
    assert most == (TARGET + INTERVAL - 1) * 2
    assert min(min(step) for step in watch.snapshot) == TARGET * 2
    assert cache.get_seq_length() == 100 + n - 1


def test_a_short_prompt_grows_to_the_bound_and_stays_below_it():
    model, press = tiny(), cp.DecodingPress(cp.SnapKVPress(window_size=6), INTERVAL, TARGET)
    cache = DynamicCache()
    with press(model):
        forward(model, cache, input_ids=tokens(10))
        held = []
        for step in range(150):
            forward(model, cache, input_ids=tokens(1, seed=step))
            held.append(int(compressed_layers(cache)[0].lengths.max()))
    assert held[:20] == list(range(11, 31))
    assert max(held) < TARGET + INTERVAL
    assert held[-1] >= TARGET


def test_queries_keep_their_true_positions():
    """What is chosen while decoding is what one prefill of the same text would choose."""
    model, ids = tiny(), tokens(64)
    for scorer in (cp.SnapKVPress(window_size=6), cp.TOVAPress(), cp.KnormPress()):
        cache, press = DynamicCache(), cp.DecodingPress(scorer, 14, 30)
        with press(model):
            forward(model, cache, input_ids=ids[:, :20])
            for i in range(20, 34):
                forward(model, cache, input_ids=ids[:, i : i + 1])
        once = type(scorer)(n_kept=30, **SMALL.get(type(scorer), {}))
        assert kept(cache) == kept(cp.prefill(model, ids[:, :34], once))


def test_moments_of_decoded_queries_are_undone_with_their_positions():
    model, ids = tiny(), tokens(64)
    scorer = cp.ExpectedAttentionPress(n_future_positions=16, n_sink=20)
    cache, press = DynamicCache(), cp.DecodingPress(scorer, 14, 30)
    with press(model):
        forward(model, cache, input_ids=ids[:, :20])
        for i in range(20, 34):
            forward(model, cache, input_ids=ids[:, i : i + 1])
    once = cp.ExpectedAttentionPress(n_future_positions=16, n_sink=20, n_kept=30)
    assert kept(cache) == kept(cp.prefill(model, ids[:, :34], once))


def test_the_buffer_limits_what_a_score_sees():
    model, ids = tiny(), tokens(64)
    sums = {}
    for size in (4, 12):
        cache = DynamicCache()
        press = cp.DecodingPress(cp.ObservedAttentionPress(), 12, 25, size)
        with press(model):
            forward(model, cache, input_ids=ids[:, :20])
            for i in range(20, 32):
                forward(model, cache, input_ids=ids[:, i : i + 1])
        sums[size] = kept(cache)
    assert sums[4] != sums[12]


def test_state_belongs_to_a_sequence_and_resets_with_it():
    model, press = tiny(), cp.DecodingPress(cp.SnapKVPress(window_size=6), 8, 20)
    wanted = {}
    for seed in (1, 2):
        cache = DynamicCache()
        with press(model):
            for i in range(20):
                part = slice(0, 12) if not i else slice(11 + i, 12 + i)
                forward(model, cache, input_ids=tokens(40, seed=seed)[:, part])
        wanted[seed] = kept(cache)
    first, second = DynamicCache(), DynamicCache()
    with press(model):
        for i in range(20):
            part = slice(0, 12) if not i else slice(11 + i, 12 + i)
            for seed, cache in ((1, first), (2, second)):
                forward(model, cache, input_ids=tokens(40, seed=seed)[:, part])
        assert [kept(first), kept(second)] == [wanted[1], wanted[2]]
        first.reset()
        for i in range(20):
            part = slice(0, 12) if not i else slice(11 + i, 12 + i)
            forward(model, first, input_ids=tokens(40, seed=2)[:, part])
    assert kept(first) == wanted[2]


def test_a_batch_with_padding_is_compressed_text_by_text():
    model, press = tiny(), cp.DecodingPress(cp.SnapKVPress(window_size=6), 8, 20)
    texts = [tokens(30, seed=1), tokens(18, seed=2)]
    ids = torch.zeros(2, 30, dtype=torch.long)
    for row, text in zip(ids, texts, strict=True):
        row[30 - text.shape[1] :] = text[0]
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad(), press(model):
        both = model.generate(ids, attention_mask=(ids > 0).long(), **options)
        for row, text in zip(both, texts, strict=True):
            alone = model.generate(text, **options)
            assert row[30:].tolist() == alone[0, text.shape[1] :].tolist()


def test_several_questions_decode_under_the_bound():
    from transformers import pipeline

    pipe = pipeline("kv-press-text-generation", model=tiny(), tokenizer=tokenizer())
    # A norm would not do: a token that comes twice has it twice, but for rounding.
    press = cp.DecodingPress(cp.KeyDiffPress(), 8, 20)
    questions = [words(3, seed=5), words(3, seed=6)]
    options = {"press": press, "max_new_tokens": 30, "eos_token_id": []}
    with no_near_ties():
        both = pipe(words(60), questions=questions, **options)["answers"]
        alone = [pipe(words(60), question=q, **options)["answer"] for q in questions]
    assert both == alone
    assert both != pipe(words(60), questions=questions, **{**options, "press": None})["answers"]


def test_prefill_and_decoding_have_presses_of_their_own():
    model = tiny()
    press = cp.PrefillDecodingPress(cp.KnormPress(0.5), cp.DecodingPress(cp.TOVAPress(), 8, 12))
    cache = DynamicCache()
    with press(model):
        forward(model, cache, input_ids=tokens(40))
        assert kept(cache) == kept(cp.prefill(model, tokens(40), cp.KnormPress(0.5)))
        for step in range(8):
            forward(model, cache, input_ids=tokens(1, seed=step))
    assert compressed_layers(cache)[0].lengths.tolist() == [[12, 12]]


def test_a_ratio_of_what_was_seen():
    model, press = tiny(), cp.CompressionRatioDecodingPress(cp.KnormPress(), 10, 0.75)
    cache = DynamicCache()
    with press(model):
        forward(model, cache, input_ids=tokens(40))
        assert compressed_layers(cache)[0].lengths.tolist() == [[10, 10]]
        for step in range(20):
            forward(model, cache, input_ids=tokens(1, seed=step))
    assert compressed_layers(cache)[0].lengths.tolist() == [[15, 15]]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: cp.DecodingPress(cp.DecodingPress(cp.KnormPress())), "does so already"),
        (lambda: cp.DecodingPress(cp.KnormPress(), 0), "compression_interval: got 0"),
        (lambda: cp.DecodingPress(cp.KnormPress(), target_size=0), "target_size: got 0"),
        (lambda: cp.DecodingPress(cp.KnormPress()).with_ratio(0.5), "give target_size"),
        (lambda: cp.PrefillDecodingPress(), "got neither"),
        (lambda: cp.PrefillDecodingPress(decoding_press=cp.KnormPress()), "decoding_press: got"),
        (lambda: cp.ComposedPress([cp.DecodingPress(cp.KnormPress())]), "wrap the ComposedPress"),
        (lambda: cp.ComposedPress([]), "wanted a list of presses"),
        (
            lambda: cp.CriticalKVPress(cp.AdaKVPress(cp.KnormPress(), scope="model")),
            "wrap the other way round",
        ),
        (lambda: cp.AdaKVPress(cp.KnormPress(), scope="row"), 'wanted "layer" or "model"'),
        (lambda: cp.AdaKVPress(cp.KnormPress(), alpha_safeguard=2), "alpha_safeguard: got 2"),
        (lambda: cp.KnormPress(0.5, n_kept=4), "got both compression_ratio and n_kept"),
        (lambda: cp.KnormPress(max_bytes="many"), "max_bytes: got 'many'"),
    ],
)
def test_what_cannot_work_is_refused_when_it_is_built(build, message):
    with pytest.raises(cp.CachepressError, match=message):
        build()


def test_what_a_press_for_prompts_stores_and_reads_holds_beside_one_for_decoding():
    later = cp.DecodingPress(cp.KnormPress(), 8, 70)
    quantized = cp.PrefillDecodingPress(cp.KIVIPress(cp.KnormPress(0.5)), later)
    sparse = cp.PrefillDecodingPress(cp.QuestPress(pages=3), later)
    assert quantized.needs.storage == cp.Codec(2, 128, value_group=32)
    assert (sparse.needs.pages_read(0), sparse.needs.pages_read(2)) == (None, 3)
    with pytest.raises(cp.CachepressError, match="store pairs in different ways"):
        cp.PrefillDecodingPress(
            cp.KIVIPress(cp.KnormPress(0.5)),
            cp.DecodingPress(cp.KIVIPress(cp.KnormPress(), bits=4)),
        )


@pytest.mark.parametrize("chunk", [None, 64])
def test_an_interval_counts_decoded_tokens_only(chunk):
    """A prompt that is left whole, one after other tokens, and one that was read before."""
    model, press = tiny(), cp.DecodingPress(cp.KnormPress(), 16, 20)
    whole = cp.PrefillDecodingPress(None, press)
    cache = cp.prefill(model, tokens(100), whole, chunk_size=chunk)

    def decode(n):
        for step in range(n):
            forward(model, cache, input_ids=tokens(1, seed=step))
        return compressed_layers(cache)[0].lengths[0, 0].item()

    with whole(model):
        assert [decode(n) for n in (1, 9, 5, 1, 1, 14, 1)] == [101, 110, 115, 20, 21, 35, 20]
        assert decode(10) == 30
        forward(model, cache, input_ids=tokens(40))
        assert [decode(n) for n in (5, 1)] == [75, 20]
    cache = cp.prefill(model, tokens(100))
    with press(model):
        assert [decode(n) for n in (15, 1)] == [115, 20]


def test_several_tokens_that_are_left_alone_do_not_bring_the_next_compression_closer():
    model, cache = tiny(), DynamicCache()
    press = cp.DecodingPress(cp.KnormPress(), 16, 20)
    with press(model, turns="first"):
        forward(model, cache, input_ids=tokens(100))
        forward(model, cache, input_ids=tokens(30))
        held = []
        for step in range(16):
            forward(model, cache, input_ids=tokens(1, seed=step))
            held.append(compressed_layers(cache)[0].lengths[0, 0].item())
    assert held == [*range(51, 66), 20]
