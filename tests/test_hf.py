"""The wiring: contexts leave nothing behind, caches are recognised, what cannot work is refused."""

import pytest
import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, StaticCache

import cachepress as cp
from cachepress.cache.batch import compressed_layers
from cachepress.hf import attach
from cachepress.hf.rotary import PairRotary, find_rotary
from tests.bounds import close
from tests.presses.test_snapkv import recording, transcription
from tests.tiny import ARCHITECTURES, exact_tiny, tiny, tokens
from tests.tiny_cache import forward, kept, pressed

PRESS = cp.KnormPress(0.5)


def hooks(model):
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._forward_hooks_always_called)
        for m in model.modules()
    )


def attributes(model):
    return {name: sorted(vars(module)) for name, module in model.named_modules()}


@pytest.mark.parametrize(
    "press",
    [
        PRESS,
        cp.ExpectedAttentionPress(0.5),
        cp.CriticalKVPress(PRESS),
        cp.AdaKVPress(PRESS, scope="model"),
        cp.DecodingPress(cp.TOVAPress()),
    ],
    ids=str,
)
def test_leaving_leaves_nothing(press):
    model, ids = tiny(), tokens(20)
    before, n_hooks = attributes(model), hooks(model)
    with press(model):
        assert attributes(model) != before
        forward(model, input_ids=ids)
        assert hooks(model) == n_hooks
    assert attributes(model) == before


def test_leaving_by_an_exception_leaves_an_ordinary_model():
    model, ids = tiny(), tokens(20)
    plain = forward(model, input_ids=ids).logits
    n_hooks = hooks(model)
    with pytest.raises(KeyError), PRESS(model):
        forward(model, input_ids=ids)
        raise KeyError
    assert hooks(model) == n_hooks
    cache = DynamicCache()
    assert torch.equal(forward(model, cache, input_ids=ids).logits, plain)
    assert not compressed_layers(cache)
    assert cache.layers[0].keys.shape[2] == 20


def test_an_exception_inside_the_forward_is_survived():
    model = tiny()
    with PRESS(model):
        with pytest.raises(IndexError):
            forward(model, input_ids=torch.tensor([[10**6, 1, 2]]))
        cache = DynamicCache()
        forward(model, cache, input_ids=tokens(20))
    assert compressed_layers(cache)[0].lengths.tolist() == [[10, 10]]


def test_detach_restores_exactly_and_the_store_refuses():
    model, ids = tiny(), tokens(20)
    before = model.config._attn_implementation
    cache = pressed(model, PRESS, ids)
    cp.detach(model)
    assert model.config._attn_implementation == before
    with pytest.raises(cp.ForeignAttentionError, match="with press\\(model\\)"):
        forward(model, cache, input_ids=tokens(1))
    with PRESS(model):
        pass
    assert forward(model, pressed(model, PRESS, ids), input_ids=tokens(1)).logits.isfinite().all()


def test_a_foreign_attention_function_is_refused():
    model = tiny()
    cache = pressed(model, PRESS, tokens(20))
    model.set_attn_implementation("eager")
    with pytest.raises(cp.ForeignAttentionError):
        forward(model, cache, input_ids=tokens(1))


def test_the_function_that_is_selected_anyway_may_be_selected_again():
    model = tiny()
    cache = pressed(model, PRESS, tokens(20))
    wanted = forward(model, cp.fork(cache), input_ids=tokens(1)).logits
    model.set_attn_implementation("sdpa")
    assert torch.equal(forward(model, cache, input_ids=tokens(1)).logits, wanted)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_eager_and_sdpa_decode_alike(name):
    model, ids = exact_tiny(name), tokens(30)
    logits = []
    for base in ("eager", "sdpa"):
        cp.detach(model)
        try:
            model.set_attn_implementation(base)
        except ValueError:
            pytest.skip(f"{name} has no {base}")
        if name in ("gemma2", "gpt_oss") and base == "sdpa":
            pytest.skip(f"{name} computes something else under sdpa")
        cache = pressed(model, PRESS, ids)
        logits.append(forward(model, cache, input_ids=tokens(2)).logits)
    close(*logits)


def test_a_score_has_no_cap_where_attention_has_none():
    """Older versions choose an attention for Gemma 2 that leaves out the cap it asks for."""
    model = exact_tiny("gemma2")
    if not model._supports_sdpa:
        pytest.skip("this version refuses it")
    model.set_attn_implementation("sdpa")
    press, seen = recording(cp.SnapKVPress(0.5, window_size=4, kernel_size=3))
    pressed(model, press, tokens(22))
    assert len(seen) == 2
    for depth, [(view, score)] in seen.items():
        close(score[..., :-4], transcription(view, depth, 4, 3, "avg", None, None)[..., :-4])


def test_two_models_that_share_a_config_do_not_disturb_each_other():
    first = tiny()
    second = type(first)(first.config).eval()
    ids = tokens(20)
    plain = forward(second, input_ids=ids).logits
    with PRESS(first):
        cache = DynamicCache()
        assert torch.equal(forward(second, cache, input_ids=ids).logits, plain)
        assert not compressed_layers(cache)
    compressed = pressed(first, PRESS, ids)
    assert torch.equal(forward(second, input_ids=ids).logits, plain)
    assert forward(first, compressed, input_ids=tokens(1)).logits.isfinite().all()


def test_the_innermost_context_presses_and_the_outer_one_comes_back():
    model, ids = tiny(), tokens(20)
    outer, inner = cp.KnormPress(0.5), cp.StreamingLLMPress(0.75)
    with outer(model):
        with inner(model):
            innermost = pressed_by_open_context(model, ids)
        again = pressed_by_open_context(model, ids)
    assert kept(innermost) == kept(pressed(model, inner, ids))
    assert kept(again) == kept(pressed(model, outer, ids))


def pressed_by_open_context(model, ids):
    cache = DynamicCache()
    forward(model, cache, input_ids=ids)
    return cache


def test_two_caches_and_sequential_contexts_do_not_disturb_each_other():
    model, one, two = tiny(), tokens(20, seed=1), tokens(30, seed=2)
    first, second = DynamicCache(), DynamicCache()
    with PRESS(model):
        forward(model, first, input_ids=one)
        forward(model, second, input_ids=two)
        forward(model, first, input_ids=tokens(1))
    with cp.KnormPress(0.9)(model):
        pass
    assert compressed_layers(first)[0].lengths.tolist() == [[11, 11]]
    assert kept(second) == kept(pressed(model, PRESS, two))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_way_to_a_forward_is_alike(name):
    model, ids = tiny(name), tokens(30)
    wanted = kept(pressed(model, PRESS, ids))
    decoder = model.get_decoder()
    with PRESS(model):
        made = forward(model, input_ids=ids)
        with_config = DynamicCache(config=model.config)
        forward(model, with_config, input_ids=ids)
        through_decoder = DynamicCache()
        forward(decoder, through_decoder, input_ids=ids)
        old_name = DynamicCache()
        with torch.no_grad():
            model(ids, past_key_values=old_name)
            generated = model.generate(
                ids, max_new_tokens=1, return_dict_in_generate=True, do_sample=False
            )
    own = made["cache"] if "cache" in made else made["past_key_values"]
    used = generated["cache"] if "cache" in generated else generated["past_key_values"]
    for cache in (own, with_config, through_decoder, old_name, used):
        assert kept(cache) == wanted


def test_no_cache_means_nothing_to_press():
    with PRESS(tiny()) as nothing:
        assert nothing is None
    model = tiny()
    with PRESS(model):
        out = forward(model, input_ids=tokens(9), use_cache=False)
    assert out.get("cache") is None and out.get("past_key_values") is None


def test_a_filled_ordinary_cache_is_taken_over_on_the_next_turn():
    model, ids = tiny(), tokens(30)
    cache = DynamicCache()
    forward(model, cache, input_ids=ids[:, :20])
    with PRESS(model):
        forward(model, cache, input_ids=ids[:, 20:])
    assert kept(cache) == kept(pressed(model, PRESS, ids))


@pytest.mark.parametrize("name", ["gemma3", "qwen3_next"])
def test_only_full_attention_layers_are_compressed(name):
    model = tiny(name)
    cache = pressed(model, PRESS, tokens(30))
    plain = DynamicCache(config=model.config)
    forward(model, plain, input_ids=tokens(30))
    assert [type(a) is type(b) for a, b in zip(cache.layers, plain.layers, strict=True)] == [
        True,
        False,
    ] * 2
    assert len(compressed_layers(cache)) == 2


def test_inference_mode_and_no_grad_mix():
    model, ids = tiny(), tokens(20)
    cache = DynamicCache()
    with torch.inference_mode(), PRESS(model):
        model(ids, past_key_values=cache)
    first = model(tokens(1), past_key_values=cache).logits
    assert first.requires_grad
    with torch.inference_mode():
        model(tokens(70, seed=2), past_key_values=cache)
    assert not compressed_layers(cache)[0].keys.requires_grad
    assert compressed_layers(cache)[0].lengths.tolist() == [[81, 81]]


def test_a_graph_can_be_taken_through_the_prefill():
    model, ids = tiny(), tokens(20)
    with PRESS(model):
        model(ids).logits.sum().backward()
    assert model.get_decoder().embed_tokens.weight.grad.abs().sum() > 0


def test_a_model_without_full_attention_is_refused_by_name():
    model = tiny("mistral")
    model.config.sliding_window = 8
    with pytest.raises(cp.UnsupportedError, match="MistralForCausalLM has no full-attention"):
        PRESS(model)


def test_an_architecture_that_bypasses_the_interface_is_refused_by_name():
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=50))
    with pytest.raises(cp.UnsupportedError, match="BloomForCausalLM does not use"), PRESS(model):
        pass


def test_an_encoder_decoder_is_refused_by_name():
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(
        T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=50)
    )
    with pytest.raises(cp.UnsupportedError, match="T5ForConditionalGeneration is an encoder"):
        PRESS(model)


@pytest.mark.parametrize(
    "make",
    [
        lambda c: StaticCache(config=c, max_cache_len=64),
        lambda c: StaticCache(config=c, max_cache_len=64, offloading=True),
    ],
)
def test_other_caches_are_refused_before_any_work(make):
    model = tiny()
    with pytest.raises(cp.UnsupportedError, match="DynamicCache"), PRESS(model):
        forward(model, make(model.config), input_ids=tokens(9))


def test_what_cannot_be_verified_is_refused_by_name():
    class Reversed(torch.nn.Module):
        def forward(self, x, position_ids):
            cos = torch.cos(position_ids[..., None] * torch.arange(1.0, 9.0))
            return cos, cos

    model = tiny()
    real = model.model.rotary_emb
    model.model.rotary_emb = Reversed()
    with (
        pytest.raises(cp.UnsupportedError, match=r"ExpectedAttentionPress.*LlamaForCausalLM"),
        cp.ExpectedAttentionPress(0.5)(model),
    ):
        forward(model, input_ids=tokens(20))
    model.model.rotary_emb = real


def test_turns_is_checked():
    with pytest.raises(cp.CachepressError, match="turns: got 'none'"):
        PRESS(tiny(), turns="none")


def test_something_else_than_a_model_is_refused():
    with pytest.raises(cp.UnsupportedError, match="got Linear"):
        PRESS(torch.nn.Linear(2, 2))


def test_importing_and_attaching_change_no_other_model():
    first, second = tiny(), tiny()
    selection = attach(first)
    names = [model.config._attn_implementation for model in (first, second)]
    assert names == ["sdpa", "sdpa"]
    assert [type(name) is str for name in names] == [False, True]
    del selection
    assert type(first.config._attn_implementation) is str


def test_gpt2_position_table_is_the_identity_rotation():
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=97)).eval()
    cache = pressed(model, cp.ExpectedAttentionPress(0.5), tokens(30))
    assert compressed_layers(cache)[0].lengths.tolist() == [[15, 15]]


def test_a_rotary_module_that_takes_other_positions_is_passed_over():
    def refusing(x, positions):
        raise IndexError("too many indices")

    def angles(x, positions):
        table = positions[..., None].double() * torch.tensor([1.0, 0.1, 1.0, 0.1])
        return table.cos(), table.sin()

    torch.manual_seed(0)
    raw, rope = torch.randn(1, 2, 5, 4, dtype=torch.float64), torch.arange(5)[None]
    key = PairRotary(lambda x, p: tuple(t[..., :2] for t in angles(x, p)), False)(raw, rope)
    outputs = {torch.nn.Identity(): raw}
    assert find_rotary([refusing], outputs, 2, key, rope) is None
    found = find_rotary([refusing, angles], outputs, 2, key, rope)
    assert torch.equal(found.rotary(raw, rope), key)
