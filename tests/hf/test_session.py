"""What a session takes: caches under either name, prompts in chunks, embeddings."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaModel

import cachepress as cp
from cachepress.cache.batch import text_of
from cachepress.hf import cache_argument
from tests.bounds import near
from tests.tiny import SMALL, exact_tiny, tiny, tokenizer, tokens
from tests.tiny_cache import kept

PRESS = cp.SnapKVPress(0.75, window_size=8)
IDS = tokens(60)


class Old(LlamaModel):
    """A decoder that knows its cache by the old name only."""

    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=None):
        return self._read(input_ids, attention_mask, past_key_values, use_cache)

    def _read(self, ids, mask, cache, use_cache):
        layers, hidden = self.layers[: self.config.num_hidden_layers], self.embed_tokens(ids)
        start = 0 if cache is None else cache.get_seq_length()
        positions = torch.arange(start, start + ids.shape[1])[None]
        angles = self.rotary_emb(hidden, positions)
        mask = torch.ones(1, 1, ids.shape[1], start + ids.shape[1], dtype=torch.bool).tril(start)
        for layer in layers:
            name = cache_argument(layer)  # Of the transformers that is installed.
            options = {name: cache, "position_embeddings": angles, "attention_mask": mask}
            hidden = layer(hidden, **options)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return self.norm(hidden), cache if use_cache else None

    name = "past_key_values"


class New(Old):
    """A decoder that knows its cache by the new name only."""

    def forward(self, input_ids, attention_mask=None, cache=None, use_cache=None):
        return self._read(input_ids, attention_mask, cache, use_cache)

    name = "cache"


@pytest.mark.parametrize("kind", [Old, New])
def test_a_cache_is_found_under_either_name_and_made_where_none_is_given(kind):
    model = kind(LlamaConfig(**SMALL)).eval()
    given, by_position = DynamicCache(), DynamicCache()
    with torch.no_grad(), PRESS(model):
        model(IDS, **{kind.name: given})
        model(IDS, None, by_position)
        made = model(IDS, None, None, True)[1]
        assert model(IDS, use_cache=False)[1] is None
    wanted = kept(cp.prefill(model, IDS, PRESS))
    assert kept(given) == kept(by_position) == kept(made) == wanted
    assert {len(head) for layer in wanted for row in layer for head in row} == {15}


def generated(model, press, **options):
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, **options}
    with press(model, tokenizer=tokenizer()):
        found = model.generate(IDS, output_logits=True, **options)
    return found.past_key_values, torch.stack(found.logits)


@pytest.mark.parametrize("size", [16, 59, 60, 100])
@pytest.mark.parametrize("press", [PRESS, cp.KVzipPress(0.5), cp.AdaKVPress(PRESS)], ids=repr)
def test_generate_in_chunks_is_generate_in_one_go(press, size):
    model = exact_tiny()
    (cache, logits), (chunked, found) = (
        generated(model, press, **options) for options in ({}, {"prefill_chunk_size": size})
    )
    assert kept(chunked) == kept(cache)
    near(found, logits, torch.float32, 1)
    assert text_of(chunked).tolist() == IDS.tolist()


def test_chunks_of_the_models_own_config_are_exact_too_and_a_later_text_is_read_in_one_go():
    model = exact_tiny()
    wanted, _ = generated(model, PRESS)
    model.generation_config.prefill_chunk_size = 16
    cache, _ = generated(model, PRESS)
    model.generation_config.prefill_chunk_size = None
    assert kept(cache) == kept(wanted)
    longer = torch.cat([IDS, tokens(40, seed=1)], 1)
    caches = [cp.fork(wanted), cp.fork(wanted)]
    for again, size in zip(caches, (None, 16), strict=True):
        mask = torch.ones_like(longer)
        with PRESS(model):
            model.generate(
                longer,
                attention_mask=mask,
                past_key_values=again,
                prefill_chunk_size=size,
                max_new_tokens=1,
            )
    assert kept(caches[1]) == kept(caches[0])


def test_embeddings_of_tokens_stand_for_the_tokens():
    model, other = tiny(), tiny()
    embeds = model.get_input_embeddings()(IDS).detach()
    cache = DynamicCache()
    with torch.no_grad(), cp.KVzipPress(0.5)(model, tokenizer=tokenizer()):
        model.model(input_ids=IDS, past_key_values=cache)
        with pytest.raises(cp.CachepressError, match="give input_ids, not embeddings"):
            model(inputs_embeds=embeds, past_key_values=DynamicCache())
    assert kept(cache) == kept(cp.prefill(other, IDS, cp.KVzipPress(0.5), tokenizer=tokenizer()))


def test_two_caches_are_refused():
    model = tiny()
    with pytest.raises(cp.CachepressError, match="got two caches"), PRESS(model):
        model(input_ids=IDS, past_key_values=DynamicCache(), cache=DynamicCache())


@pytest.mark.parametrize("options", [{"assistant_model": tiny}, {"prompt_lookup_num_tokens": 3}])
def test_assisted_decoding_in_a_block_is_refused_at_once(options):
    model = tiny()
    options = {name: x() if callable(x) else x for name, x in options.items()}
    with (
        pytest.raises(cp.CachepressError, match="do assisted decoding after the block"),
        PRESS(model),
    ):
        model.generate(IDS, max_new_tokens=2, **options)
    assert model.generate(IDS, max_new_tokens=2, do_sample=False, **options).shape[1] == 62
