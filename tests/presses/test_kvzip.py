from dataclasses import dataclass

import pytest
import torch
from transformers import DynamicCache, pipeline

import cachepress as cp
from cachepress.cache.batch import compressed_layers
from cachepress.hf.chunks import opening_of
from cachepress.presses._reconstructing import FIRST, LATER
from cachepress.presses.kvzip import KVzipPress
from tests.bounds import close
from tests.tiny import exact_tiny as tiny
from tests.tiny import tokenizer, tokens, words
from tests.tiny_cache import forward, kept

SEEN: dict[int, torch.Tensor] = {}


@dataclass(frozen=True)
class _Watching(KVzipPress):
    """Records its token states."""

    def score(self, view):
        SEEN[view.depth] = self.token_state(view)
        return super().score(view)


def scores(press, ids, model=None, **options):
    SEEN.clear()
    cp.prefill(model or tiny(), ids, press, tokenizer=tokenizer(), **options)
    return [SEEN[depth] for depth in range(4)]


def asked(ids, start, opening=0):
    """What the model is fed before it repeats a chunk, written out."""
    make = tokenizer()
    text = FIRST if start == opening else LATER
    said = make(text, add_special_tokens=False).input_ids
    lead = ids[0, max(0, start - 8) : start].tolist() if start > opening else []
    after = make(" w5 w6 ", add_special_tokens=False).input_ids
    return torch.tensor([[*said, *lead, *after]])


def reference(model, ids, chunk_size, n_sink, plus=False, opening=0):
    """Whole attention matrices of context and reconstruction, one chunk after the other."""
    model.set_attn_implementation("eager")
    n, n_sink = ids.shape[1], max(n_sink, opening)
    found = torch.zeros(4, 2, n, dtype=torch.float64)
    found[..., :opening] = float("inf")
    for start in range(opening, n, chunk_size):
        stop = min(start + chunk_size, n)
        text = torch.cat([ids, asked(ids, start, opening), ids[:, start:stop]], dim=1)
        hidden = {}
        hooks = [
            layer.self_attn.register_forward_pre_hook(
                lambda m, a, k, h=hidden: h.__setitem__(m.layer_idx, k["hidden_states"]),
                with_kwargs=True,
            )
            for layer in model.model.layers
        ]
        cache = DynamicCache()
        with torch.no_grad():
            out = model(text, output_attentions=True, past_key_values=cache)
        for hook in hooks:
            hook.remove()
        sinks = list(range(min(n_sink, start)))
        columns = [*sinks, *range(start, stop), *range(n, text.shape[1])]
        for layer in range(4):
            weights = out.attentions[layer][0][:, n:][..., columns]  # [heads, repeated, columns]
            weights = weights / weights.sum(-1, keepdim=True)
            if plus:
                weights = weights / hidden[layer][0, n:].norm(dim=-1).clamp(min=1e-9)[None, :, None]
                output = model.model.layers[layer].self_attn.o_proj.weight  # [M, heads * E]
                for head in range(4):
                    part = output[:, 8 * head : 8 * head + 8]
                    values = cache.layers[layer].values[0, head // 2][columns]
                    weights[head] *= (values @ part.T).norm(dim=-1)
            for head in range(2):
                most = weights[2 * head : 2 * head + 2].amax((0, 1))
                found[layer, head, start:stop] = most[len(sinks) :][: stop - start]
    return found


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("chunk_size", [64, 16])
def test_scores_are_those_of_whole_attention_matrices(chunk_size, plus):
    ids = tokens(40)
    press = _Watching(0.5, chunk_size=chunk_size, kvzip_plus_normalization=plus)
    wanted = reference(tiny(), ids, chunk_size, 4, plus)
    ours = torch.cat(scores(press, ids))
    close(ours, wanted)


def in_template(n, seed=0):
    """Tokens that stand where the chat template of the tests puts a context, template first."""
    return torch.cat([torch.tensor([[3, 4]]), tokens(n - 2, seed=seed)], dim=1)


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize(("chunk_size", "n_sink"), [(64, 0), (16, 1), (16, 4)])
def test_the_template_before_the_context_is_not_repeated_and_stands_for_sinks(
    chunk_size, n_sink, plus
):
    ids = in_template(40)
    options = {"chunk_size": chunk_size, "n_sink": n_sink, "kvzip_plus_normalization": plus}
    wanted = reference(tiny(), ids, chunk_size, n_sink, plus, opening=2)
    ours = torch.cat(scores(_Watching(0.5, **options), ids))
    close(ours, wanted)


@pytest.mark.parametrize("kind", [KVzipPress, cp.KVgradPress])
def test_the_template_before_the_context_is_never_evicted(kind):
    """In a further turn neither, nor in a padded batch; the budget is what it was."""
    model, press = tiny(), kind(0.9, n_sink=0)
    ids, other = in_template(40), in_template(30, seed=5)
    batch = torch.cat([ids, torch.cat([torch.zeros(1, 10, dtype=torch.long), other], dim=1)])
    cache = cp.prefill(model, batch, press, attention_mask=(batch > 0).long())
    for layer in kept(cache):
        assert all(head[:2] == [0, 1] for head in layer[0])
        assert all(head[:2] == [10, 11] for head in layer[1])
    lengths = torch.stack([store.lengths for store in compressed_layers(cache)])
    assert lengths.sum((0, 2)).tolist() == [4 * 2 * 4, 4 * 2 * 3]
    cache = DynamicCache()
    with press(model):
        forward(model, cache, input_ids=ids)
        forward(model, cache, input_ids=in_template(20, seed=7))
    held = [head for layer in kept(cache) for head in layer[0]]
    assert all(head[:2] == [0, 1] for head in held)
    assert not all({40, 41} <= set(head) for head in held)


def test_a_text_of_the_template_alone_keeps_its_first_pairs():
    cache = cp.prefill(tiny(), torch.tensor([[3, 4]]), KVzipPress(0.5, n_sink=0))
    assert kept(cache) == [[[[0]] * 2]] * 4


def test_what_the_template_put_before_a_context_is_found_in_its_tokens():
    make = tokenizer()

    def opening(*ids, bos=None):
        make.bos_token = bos
        return opening_of(torch.tensor([ids]), make)

    assert opening(3, 4, 7, 8) == opening(3, 4) == 2
    assert opening(3, 9, 7, 8) == 1  # Its last token went on into the context.
    assert opening(7, 3, 4, 8) == opening(4, 3, 4) == 0
    assert opening(1, 3, 4, 7, bos="<bos>") == 3
    assert opening(1, 3, 4, 7) == 0
    assert opening_of(torch.tensor([[3, 4, 7]]), tokenizer(chat=False)) == 0
    assert opening_of(torch.tensor([[3, 4, 7]]), None) == 0


def test_the_best_pairs_of_the_whole_model_stay():
    ids = tokens(40)
    wanted = reference(tiny(), ids, 2048, 4)
    wanted[..., :4] = 2.0
    best = wanted.flatten().argsort(descending=True)[: 40 * 2 * 4 // 2]
    mask = torch.zeros(4 * 2 * 40, dtype=torch.bool)
    mask[best] = True
    cache = cp.prefill(tiny(), ids, KVzipPress(0.5), tokenizer=tokenizer())
    held = kept(cache)
    for layer in range(4):
        for head in range(2):
            rows = mask.view(4, 2, 40)[layer, head].nonzero()[:, 0].tolist()
            assert held[layer][0][head] == rows
    assert cache.get_seq_length() == 40


def test_chunks_of_prefill_and_padding_change_nothing():
    press = KVzipPress(0.5, layerwise=True, chunk_size=16)
    texts = [tokens(n, seed=n) for n in (40, 23)]
    ids = torch.zeros(2, 40, dtype=torch.long)
    for row, text in zip(ids, texts, strict=True):
        row[40 - text.shape[1] :] = text[0]
    batch = cp.prefill(
        tiny(), ids, press, attention_mask=(ids > 0).long(), tokenizer=tokenizer(), chunk_size=11
    )
    for b, text in enumerate(texts):
        alone = kept(cp.prefill(tiny(), text, press, tokenizer=tokenizer()))
        pad = 40 - text.shape[1]
        for layer, layer_alone in zip(kept(batch), alone, strict=True):
            assert [[p - pad for p in head] for head in layer[b]] == layer_alone[0]


def test_generate_compresses_and_continues_from_what_is_left():
    model, ids = tiny(), tokens(40)
    cache = DynamicCache()
    with KVzipPress(0.5)(model, tokenizer=tokenizer()):
        model.generate(
            ids,
            past_key_values=cache,
            max_new_tokens=4,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    rows = sum(int(store.lengths.sum()) for store in compressed_layers(cache))
    assert rows == 40 * 2 * 4 // 2 + 3 * 2 * 4
    assert cache.get_seq_length() == 43


def test_the_pipeline_lends_its_tokenizer():
    pipe = pipeline("kv-press-text-generation", model=tiny(), tokenizer=tokenizer())
    result = pipe(words(50), questions=["w3"], press=KVzipPress(0.5), return_stats=True)
    size = result["stats"].cache
    assert (size.pairs_seen, size.pairs_held) == (8 * 52, 8 * 26)


def test_a_second_turn_keeps_the_scores_of_the_first():
    model, ids = tiny(), tokens(40)
    press = _Watching(0.5, layerwise=True)
    cache = DynamicCache()
    with press(model, tokenizer=tokenizer()):
        SEEN.clear()
        forward(model, cache, input_ids=ids[:, :24])
        first = SEEN[2].clone()
        rows = kept(cache)[2][0][0]
        forward(model, cache, input_ids=ids[:, 24:])
    again = SEEN[2][0, 0]
    again = again[-16 - len(rows) : -16]
    close(again, first[0, 0][rows])
    assert all(int(store.lengths.sum()) == 40 for store in compressed_layers(cache))


def test_decoded_pairs_count_as_average_in_a_further_turn():
    model, cache = tiny(), DynamicCache()
    with KVzipPress(0.5, layerwise=True, n_sink=0)(model, tokenizer=tokenizer()):
        forward(model, cache, input_ids=tokens(20))
        for step in range(6):
            forward(model, cache, input_ids=tokens(1, seed=step))
        forward(model, cache, input_ids=tokens(10, seed=9))
    decoded = [sum(20 <= p < 26 for p in head) for layer in kept(cache) for head in layer[0]]
    assert min(decoded) > 0


def test_nothing_is_repeated_when_nothing_will_be_evicted():
    model, calls = tiny(), []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    cp.prefill(model, tokens(40), KVzipPress(0.0), tokenizer=tokenizer())
    assert len(calls) == 1
    cp.prefill(model, tokens(40), KVzipPress(0.5, chunk_size=16), tokenizer=tokenizer())
    assert len(calls) == 1 + 1 + 3


def test_without_a_tokenizer_it_is_refused_before_any_work():
    model, calls = tiny(), []
    model.config.name_or_path = ""
    model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(cp.CachepressError, match="give press.model, tokenizer=tokenizer"):
        cp.prefill(model, tokens(40), KVzipPress(0.5))
    assert not calls


def test_embeddings_cannot_be_reconstructed():
    model = tiny()
    embeds = model.get_input_embeddings()(tokens(12))
    with (
        pytest.raises(cp.CachepressError, match="give input_ids"),
        KVzipPress(0.5)(model, tokenizer=tokenizer()),
    ):
        forward(model, DynamicCache(), inputs_embeds=embeds)


def test_it_does_not_score_decoded_pairs():
    with pytest.raises(cp.CachepressError, match="use PrefillDecodingPress"):
        cp.DecodingPress(KVzipPress(0.5))


@pytest.mark.parametrize("options", [{"chunk_size": 0}, {"n_sink": -1}])
def test_bad_options(options):
    with pytest.raises(cp.CachepressError, match="wanted a whole number"):
        KVzipPress(**options)
