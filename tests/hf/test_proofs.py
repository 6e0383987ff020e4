"""Rotary embeddings are proven on every token that they are used for, in every form they have."""

from collections.abc import Callable

import pytest
import torch
import transformers as hf
from torch import nn
from transformers import DynamicCache

import cachepress as cp
from cachepress.cache.batch import compressed_layers
from tests.hf.rotated import LENGTHENS, LONG, UndoPress, bare_keys, error, long_model
from tests.tiny import SMALL, exact_tiny, tokens
from tests.tiny_cache import forward

REFUSED = r"needs the position embedding of layer \d of \w+, "
NO_ANGLES = REFUSED + "and no known rotary embedding gives the layer's own keys"
NOT_BY_ONE = REFUSED + "and positions here do not rise by one"
NOT_KNOWN = REFUSED + "and where the tokens stand that the cache holds already is not known"
OTHER_FREQUENCIES = REFUSED + "whose frequencies change with the length of the text"
KINDS = ["sliding_attention", "full_attention"] * 2


def made(family: str, **options: object) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(hf, f"{family}TextConfig", None) or getattr(hf, f"{family}Config")
    return getattr(hf, f"{family}ForCausalLM")(config(**{**SMALL, **options})).eval()


def llama4(**options: object) -> hf.PreTrainedModel:
    experts = {"intermediate_size_mlp": 48, "num_local_experts": 4, "num_experts_per_tok": 1}
    kinds = ["chunked_attention", "full_attention"] * 2
    options = {"layer_types": kinds, "attention_chunk_size": 16, **options}
    return made("Llama4", **experts, **options)


FORMS: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "halves": lambda: made("Llama"),
    "a norm before": lambda: made("Qwen3"),
    "neighbours": lambda: made("Cohere"),
    "a part of the channels": lambda: made("Phi", partial_rotary_factor=0.5),
    "a part, neighbours": lambda: made("Glm4", partial_rotary_factor=0.5),
    "one complex number": lambda: llama4(no_rope_layers=[1] * 4, use_qk_norm=False),
    "each layer type": lambda: made("Gemma3", layer_types=KINDS, sliding_window=16),
    "scaled": lambda: made(
        "Llama", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    ),
    "each angle once": lambda: made(
        "GptOss", num_local_experts=4, num_experts_per_tok=2, layer_types=KINDS, sliding_window=16
    ),
    "none in this layer": lambda: llama4(no_rope_layers=[1, 0] * 2),
    "none, after a norm": lambda: made("Exaone4", layer_types=KINDS, sliding_window=16),
}


@pytest.mark.parametrize("form", FORMS)
def test_keys_are_undone_in_every_form(form):
    model, press = FORMS[form](), UndoPress(0.5)
    bare = bare_keys(model)
    cp.prefill(model, tokens(90), press)
    assert error(press, bare) < 1e-4


@pytest.mark.parametrize(
    "make",
    [
        lambda: llama4(no_rope_layers=[1] * 4, use_qk_norm=True),
        lambda: made("HunYuanDenseV1"),
    ],
)
def test_keys_that_are_normed_after_they_were_rotated_are_refused(make):
    with pytest.raises(cp.UnsupportedError, match=NO_ANGLES):
        cp.prefill(make(), tokens(40), cp.KeyRerotationPress(cp.KnormPress(0.5)))


def test_one_wrong_key_between_others_is_found():
    model, hit = exact_tiny(), []

    class Twisted(type(model.model.rotary_emb)):
        def forward(self, x, position_ids):
            cos, sin = super().forward(x, position_ids)
            hit.append(x.shape[1] > 500)
            if hit[-1]:
                cos, sin = cos.clone(), sin.clone()
                cos[:, 333], sin[:, 333] = cos[:, 332], sin[:, 332]
            return cos, sin

    cp.prefill(model, tokens(600), cp.KeyRerotationPress(cp.KnormPress(0.5)))
    model.model.rotary_emb.__class__ = Twisted
    with pytest.raises(cp.UnsupportedError, match=NO_ANGLES):
        cp.prefill(model, tokens(600), cp.KeyRerotationPress(cp.KnormPress(0.5)))
    assert any(hit)


def test_positions_with_a_gap_are_refused():
    positions = torch.cat([torch.arange(20), torch.arange(50, 70)])[None]
    model, press = exact_tiny(), cp.KeyRerotationPress(cp.KnormPress(0.5))
    with pytest.raises(cp.UnsupportedError, match=NOT_BY_ONE), press(model):
        forward(model, DynamicCache(), input_ids=tokens(40), position_ids=positions)


@pytest.mark.parametrize("first", [None, cp.KnormPress(0.5), UndoPress(0.5)])
@pytest.mark.parametrize("start", [0, 100])
def test_positions_of_an_earlier_turn_must_be_known(first, start):
    model, press, cache = exact_tiny(), cp.KeyRerotationPress(cp.KnormPress(0.5)), DynamicCache()
    ids, positions = tokens(60), torch.arange(start, start + 60)[None]
    halves = [{"input_ids": ids[:, x], "position_ids": positions[:, x]} for x in (H1, H2)]
    if first is None:
        forward(model, cache, **halves[0])
    else:
        with first(model):
            forward(model, cache, **halves[0])
    if start and not isinstance(first, UndoPress):
        with pytest.raises(cp.UnsupportedError, match=NOT_KNOWN), press(model):
            forward(model, cache, **halves[1])
        return
    with press(model):
        forward(model, cache, **halves[1])
    rope = compressed_layers(cache)[0].snapshot.rows().rope
    assert rope[0, 0].tolist() == list(range(start + 30, start + 60))


H1, H2 = slice(0, 30), slice(30, 60)


def test_another_start_of_a_later_turn_is_refused():
    model, press, cache = exact_tiny(), UndoPress(0.5), DynamicCache()
    with press(model):
        forward(model, cache, input_ids=tokens(30))
        with pytest.raises(cp.UnsupportedError, match=NOT_KNOWN):
            positions = torch.arange(40, 60)[None]
            forward(model, cache, input_ids=tokens(20), position_ids=positions)


@pytest.mark.parametrize("by_column", [False, True])
def test_padded_turns_are_proven_for_every_sequence(by_column):
    model, press, cache = exact_tiny(), UndoPress(0.0), DynamicCache()
    press = UndoPress(0.2)
    bare = bare_keys(model)
    ids, mask = tokens(60, batch=2), torch.ones(2, 60, dtype=torch.long)
    mask[1, :7] = 0
    counted = (mask.cumsum(-1) - 1).clamp(min=0)
    positions = torch.arange(60).expand(2, 60) if by_column else counted
    for turn in (H1, H2):
        forwarded = {"attention_mask": mask[:, : turn.stop], "position_ids": positions[:, turn]}
        with press(model):
            forward(model, cache, input_ids=ids[:, turn], **forwarded)
        (view, given) = (press.undone[0], bare[0][-1])
        wanted = given.unflatten(-1, (2, -1)).transpose(1, 2)
        assert torch.allclose(view[:, :, -20:], wanted[:, :, -20:], atol=1e-9)


def test_a_text_that_ends_before_the_last_chunk_is_rerotated_as_alone():
    model, press = exact_tiny(), cp.KeyRerotationPress(cp.KnormPress(0.5))
    ids, mask = tokens(60, batch=2), torch.ones(2, 60, dtype=torch.long)
    mask[1, 25:] = 0
    cache = cp.prefill(model, ids, press, attention_mask=mask, chunk_size=20)
    alone = cp.prefill(model, ids[1:, :25], press)
    for both, one in zip(compressed_layers(cache), compressed_layers(alone), strict=True):
        ours, wanted = both.snapshot.rows(), one.snapshot.rows()
        for head in range(2):
            held = ours.positions[1, head] >= 0
            assert ours.rope[1, head][held].tolist() == wanted.rope[0, head].tolist()
            assert torch.allclose(ours.keys[1, head][held], wanted.keys[0, head], atol=1e-9)


@pytest.mark.parametrize("kind", LONG)
@pytest.mark.parametrize(("first", "second"), [(40, 20), (40, 60), (90, 60)])
@pytest.mark.parametrize("proven", [False, True])
def test_turns_across_a_change_of_frequencies_are_refused(kind, first, second, proven):
    model, cache = long_model(kind), DynamicCache()
    press, before = UndoPress(0.5), UndoPress(0.5) if proven else cp.KnormPress(0.5)
    with before(model):
        forward(model, cache, input_ids=tokens(first))
    changes = kind in LENGTHENS and first + second > 64 and (first < 64 or kind == "dynamic")
    if kind == "longrope" and first > 64 and not proven:
        changes = True  # Nobody knows in how many forwards the first turn was read.
    if changes:
        with pytest.raises(cp.UnsupportedError, match=OTHER_FREQUENCIES), press(model):
            forward(model, cache, input_ids=tokens(second))
        return
    with press(model):
        forward(model, cache, input_ids=tokens(second))
    assert press.undone[1].shape[2] == first // 2 + second


@pytest.mark.parametrize("kind", LONG)
@pytest.mark.parametrize(("prompt", "refused"), [(40, LENGTHENS), (90, ("dynamic",))])
def test_decoded_tokens_across_a_change_of_frequencies_are_refused(kind, prompt, refused):
    model, ids = long_model(kind), tokens(prompt)
    press = cp.DecodingPress(
        cp.KeyRerotationPress(cp.KnormPress()), compression_interval=30, target_size=30
    )

    def decode() -> DynamicCache:
        cache = cp.prefill(model, ids, UndoPress(0.0))
        with press(model):
            for token in tokens(40, seed=1)[0]:
                forward(model, cache, input_ids=token.view(1, 1))
        return cache

    if kind in refused:
        with pytest.raises(cp.UnsupportedError, match=OTHER_FREQUENCIES):
            decode()
    else:
        assert compressed_layers(decode())[0].lengths.unique().tolist() == [40]


def test_a_module_of_another_kind_is_passed_over():
    class Picture(nn.Module):
        def forward(self, x, position_ids):
            raise KeyError("no such picture")

    model, press = exact_tiny(), UndoPress(0.5)
    model.model.picture = Picture()
    bare = bare_keys(model)
    cp.prefill(model, tokens(40), press)
    assert error(press, bare) < 1e-9


def qwen2_vl(kind: str) -> tuple[hf.PreTrainedModel, dict[str, object]]:
    torch.manual_seed(0)
    text = {**SMALL, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    text["rope_parameters"]["mrope_section"] = [2, 1, 1]
    eye = {"depth": 1, "num_heads": 2, "patch_size": 14, "in_channels": 3}
    if kind == "Qwen2VL":
        eye |= {"embed_dim": 32, "hidden_size": 32}
    else:
        eye |= {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48}
    marks = {"image_token_id": 90, "vision_start_token_id": 93, "vision_end_token_id": 94}
    config = getattr(hf, f"{kind}Config")(text_config=text, vision_config=eye, **marks)
    return getattr(hf, f"{kind}ForConditionalGeneration")(config).eval(), marks


@pytest.mark.parametrize("kind", ["Qwen2VL", "Qwen2_5_VL"])
@pytest.mark.parametrize("before", [5, 80, 180])
def test_a_picture_anywhere_in_a_text_is_refused(kind, before):
    model, _ = qwen2_vl(kind)
    words = torch.randint(3, 88, (1, 186))
    picture = torch.tensor([[93, 90, 90, 90, 90, 94]])
    ids = torch.cat([words[:, :before], picture, words[:, before:]], 1)
    inputs = {"input_ids": ids, "pixel_values": torch.randn(16, 3 * 2 * 14 * 14)}
    inputs |= {"image_grid_thw": torch.tensor([[1, 4, 4]])}
    inputs |= {"mm_token_type_ids": (ids == 90).long()}
    with pytest.raises(cp.UnsupportedError, match=REFUSED), UndoPress(0.5)(model.get_decoder()):
        model.generate(**inputs, max_new_tokens=1, do_sample=False)


@pytest.mark.parametrize("kind", ["Qwen2VL", "Qwen2_5_VL"])
def test_a_text_without_pictures_is_undone(kind):
    model, _ = qwen2_vl(kind)
    decoder, press = model.get_decoder(), UndoPress(0.5)
    bare = bare_keys(decoder)
    with press(decoder):
        model.generate(tokens(60), max_new_tokens=1, do_sample=False)
    assert error(press, bare) < 1e-4
