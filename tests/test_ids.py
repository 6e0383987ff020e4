"""Token ids are taken as tokenizers return them; what is no ids is refused with what to write."""

import pytest
import torch
from transformers import BatchEncoding, DynamicCache

import cachepress as cp
from cachepress.cache.batch import compressed_layers
from tests.tiny import tiny, tokenizer, tokens, words

PRESS = cp.KnormPress(0.5)


def held(input_ids, **options):
    cache = cp.prefill(tiny(), input_ids, PRESS, **options)
    return [layer.positions.tolist() for layer in compressed_layers(cache)]


def test_what_a_tokenizer_returns_is_read_with_its_mask():
    text = tokenizer()
    text.padding_side = "left"
    both = [words(20), words(12, seed=1)]
    encoded = text(both, padding=True, return_tensors="pt")
    mask = encoded["attention_mask"]
    wanted = held(encoded["input_ids"], attention_mask=mask)
    assert mask[1].sum() == 12 and wanted != held(encoded["input_ids"])
    assert held(encoded) == held(text(both, padding=True)) == wanted
    assert held(encoded, attention_mask=torch.ones_like(mask)) == held(encoded["input_ids"])


def test_lists_and_the_ids_of_one_text_are_read():
    ids = tokens(20)
    wanted = held(ids)
    for given in (ids[0], ids.tolist(), ids[0].tolist(), {"input_ids": ids}, ids.numpy()):
        assert held(given) == wanted
    assert held(tokens(20, batch=2).tolist()) == held(tokens(20, batch=2))


WANTED = 'wanted token ids [B, T], such as tokenizer(text, return_tensors="pt") gives'
WRONG = {
    "text": ("a text", f"input_ids: got a text, {WANTED}"),
    "texts": (["a text", "another"], f"input_ids: got a text, {WANTED}"),
    "floats": (torch.zeros(1, 5), f"input_ids: got torch.float32, {WANTED}"),
    "nothing": (None, f"input_ids: got None, {WANTED}"),
    "mapping": (BatchEncoding({"ids": [1]}), f"input_ids: got ['ids'], {WANTED}"),
    "empty": ([], "input_ids: got shape (1, 0), wanted [B, T] with T > 0"),
    "ragged": (
        [[5, 6, 7], [5, 6]],
        "input_ids: got 2 lists, which are no table of whole numbers: pad texts, "
        'tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")',
    ),
    "picture": (
        {"input_ids": [[5, 6]], "pixel_values": torch.zeros(1, 3)},
        "input_ids: got pixel_values besides, and only tokens are read: use the pipeline, with "
        "messages, or `with press(model): model(**inputs)`",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_ids_is_refused_with_what_to_write(name):
    given, said = WRONG[name]
    with pytest.raises(cp.CachepressError) as error:
        cp.prefill(tiny(), given, PRESS)
    assert str(error.value) == said


@pytest.mark.parametrize(
    ("cache", "got"), [(DynamicCache, "the class DynamicCache"), ((), r"\(\)")]
)
def test_a_cache_is_one_of_transformers(cache, got):
    with pytest.raises(cp.CachepressError, match=f"cache: got {got}, wanted .* DynamicCache"):
        cp.prefill(tiny(), tokens(5), PRESS, cache)
