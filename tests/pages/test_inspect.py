"""The page of a context: what it says was kept is what the layers hold, and the text is whole."""

import base64

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, pipeline
from transformers.cache_utils import DynamicCache

import cachepress as cp
from cachepress.cache.batch import compressed_layers
from cachepress.generation.pipeline import TASK
from cachepress.pages.inspect import kept_of, write_inspection
from cachepress.pages.pieces import Part, Piece, pieces_of
from tests.pages.results import HOSTILE, Page
from tests.tiny import tiny, tokenizer, words

CONTEXT = f"{words(30)}\n\n  {HOSTILE} w9\t{words(8, seed=1)} \n"
QUESTION = "w5 w6 <i>w7</i>"
ADA = cp.AdaKVPress(cp.SnapKVPress(0.6, window_size=4))


def page_of(folder, press, context=CONTEXT, arch="llama", **options):
    path = folder / "new" / "inspect.html"
    made = write_inspection(
        tiny(arch), tokenizer(), press, context, QUESTION, path, max_new_tokens=5, **options
    )
    assert made == path
    return Page(path.read_text(encoding="utf-8"))


def masks_of(data):
    """The page's bits, ``[layer][H, T]``."""
    n = len(data["texts"])
    return [
        np.stack([unpacked(head, n) for head in layer["heads"]]).astype(bool)
        for layer in data["layers"]
    ]


def unpacked(text, n):
    return np.unpackbits(
        np.frombuffer(base64.b64decode(text), dtype=np.uint8), count=n, bitorder="little"
    )


def read(press, context=CONTEXT, arch="llama"):
    """The cache and answer as the pipeline gives them."""
    model = tiny(arch)
    cache = DynamicCache(config=model.get_decoder().config)
    pipe = pipeline(TASK, model=model, tokenizer=tokenizer())
    result = pipe(
        context, question=QUESTION, press=press, cache=cache, max_new_tokens=5, return_stats=True
    )
    return cache, result["stats"]


@pytest.mark.parametrize("press", [cp.KnormPress(0.5), ADA, cp.FinchPress(0.5)], ids=repr)
def test_the_bits_are_what_the_stores_hold(tmp_path, press):
    (data,) = page_of(tmp_path, press).data["data"]
    cache, _ = read(press)
    masks = masks_of(data)
    assert len(masks) == 4
    for mask, store in zip(masks, compressed_layers(cache), strict=True):
        assert mask.shape == (2, cache.get_seq_length())
        for row, positions in zip(mask, store.positions[0], strict=True):
            assert np.flatnonzero(row).tolist() == sorted(positions[positions >= 0].tolist())
    assert 0 < np.concatenate(masks).mean() < 1


def test_at_ratio_0_all_is_kept(tmp_path):
    page = page_of(tmp_path, cp.KnormPress(0.0))
    (data,) = page.data["data"]
    assert np.concatenate(masks_of(data)).all()
    assert f"0 of {len(data['texts'])} tokens" in page.texts and "0.000" in page.texts


def test_layers_with_sliding_windows_are_not_shown(tmp_path):
    (data,) = page_of(tmp_path, cp.KnormPress(0.5), arch="gemma3").data["data"]
    assert [layer["layer"] for layer in data["layers"]] == [1, 3]


def test_the_text_reads_like_the_original(tmp_path):
    (data,) = page_of(tmp_path, cp.KnormPress(0.5)).data["data"]
    assert whole(data) == "w3 w4 " + CONTEXT
    assert data["zones"][:3] == ["template", "template", "context"]
    assert set(data["zones"]) == {"template", "context"}


def whole(data):
    gaps = data["gaps"]
    return "".join(gaps.get(str(i), "") + t for i, t in enumerate(data["texts"])) + data["rest"]


def test_a_press_that_needs_the_question_shows_it(tmp_path):
    page = page_of(tmp_path, cp.FinchPress(0.5))
    (data,) = page.data["data"]
    # The last token of the template is what the answer starts from.
    assert whole(data) == "w3 w4 " + CONTEXT + QUESTION + " w5 w6 "
    asked = [t for t, zone in zip(data["texts"], data["zones"], strict=True) if zone == "question"]
    assert asked == ["w5", "w6", "<", "i", ">", "w7", "</", "i", ">"]
    assert data["zones"][-1] == "template"
    assert "query-aware: the press saw the question" in page.texts


def test_query_aware_moves_the_question(tmp_path):
    page = page_of(tmp_path, cp.KnormPress(0.5), query_aware=True)
    (data,) = page.data["data"]
    assert whole(data) == f"w3 w4 {CONTEXT}{QUESTION}"
    asked = [t for t, zone in zip(data["texts"], data["zones"], strict=True) if zone == "question"]
    assert asked == ["w5", "w6", "<", "i", ">", "w7", "</", "i", ">"]
    assert "query-aware: the press saw the question" in page.texts
    with pytest.raises(cp.CachepressError, match="leave query_aware out"):
        page_of(tmp_path, cp.FinchPress(0.5), query_aware=True)


def test_both_answers_and_the_bytes_are_in_the_page(tmp_path):
    page = page_of(tmp_path, ADA)
    (_, plain), (_, pressed) = read(None), read(ADA)
    assert plain.texts[0] in page.texts and pressed.texts[0] in page.texts
    assert f"{pressed.cache.bytes_before:,} bytes" in page.texts
    assert f"{pressed.cache.bytes_after:,} bytes" in page.texts
    assert f"{plain.cache.bytes_after:,} bytes" in page.texts
    assert f"{pressed.cache.ratio:.3f}" in page.texts


def test_the_page_is_one_file_and_texts_stay_texts(tmp_path):
    page = page_of(tmp_path, cp.KnormPress(0.5))
    assert page.refers_to_nothing()
    assert page.tags.count("script") == 2
    assert QUESTION in page.texts


def test_the_kept_share_of_each_layer(tmp_path):
    page = page_of(tmp_path, ADA)
    for mask in masks_of(page.data["data"][0]):
        assert f"{100 * mask.mean():.1f} %" in page.texts


def test_a_cut_context_ends_where_reading_ended(tmp_path):
    model, options = tiny(), {"truncation": True}
    long = words(600)
    path = write_inspection(
        model, tokenizer(), cp.KnormPress(0.5), long, QUESTION, tmp_path / "x.html", 5, **options
    )
    (data,) = Page(path.read_text(encoding="utf-8")).data["data"]
    assert len(data["texts"]) < 512 and ("w3 w4 " + long).startswith(whole(data))


def test_an_empty_slot_is_not_a_token():
    cache, _ = read(ADA)
    assert any((store.positions < 0).any() for store in compressed_layers(cache))
    for mask, store in zip(kept_of(cache).values(), compressed_layers(cache), strict=True):
        assert torch.equal(mask.sum(-1), store.lengths[0])


def bytes_tokenizer():
    """A token for each byte, and one at the beginning."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, **{c: i for i, c in enumerate(alphabet, start=1)}}
    made = Tokenizer(BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")


class Slow:
    """The same without places, as tokenizers in Python are."""

    is_fast = False

    def __init__(self, inner):
        self._inner = inner
        self.all_special_ids = inner.all_special_ids
        self.decode = inner.decode
        self.convert_ids_to_tokens = inner.convert_ids_to_tokens


@pytest.mark.parametrize("slow", [False, True])
def test_characters_of_several_tokens(slow):
    fast, text = bytes_tokenizer(), "a 🎉\nש b"
    ids = fast(text).input_ids
    parts = [Part(2, "template"), Part(len(text), "context")]
    pieces, rest = pieces_of(Slow(fast) if slow else fast, text, ids, parts, special=True)
    assert len(pieces) == len(ids) == 1 + len(text.encode())
    assert pieces[0] == Piece("", "<s>", "special")
    assert "".join(p.gap + p.text for p in pieces[1:]) + rest == text
    assert sorted(p.text for p in pieces[3:7]) == ["", "", "", "🎉"]
    assert [p.zone for p in pieces[1:4]] == ["template", "template", "context"]
