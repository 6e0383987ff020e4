"""A model is tried out when a block is entered: it works, or one true line says why not."""

import threading

import pytest
import torch
import transformers as hf

import cachepress as cp
from benchmarks.models.tiny import tiny as tiny_type
from cachepress.cache.batch import compressed_layers
from cachepress.hf import probe, watching
from cachepress.hf.probe import try_out
from tests.bounds import close
from tests.tiny import ARCHITECTURES, SMALL, tiny, tokens
from tests.tiny_cache import forward, kept, pressed

PRESS = cp.KnormPress(0.5)


def altered(change) -> hf.PreTrainedModel:
    """A Llama whose first layer's attention is something else."""
    model = tiny()
    attention = model.model.layers[0].self_attn
    attention.forward = change(attention, attention.forward)
    return model


REFUSED = {
    "computes mul": lambda: altered(touching),
    "does not run": lambda: altered(failing),
    "fills layer 0 of its cache more than once": lambda: altered(looped),
    "does not fill layer 0": lambda: altered(skipped),
    "does not take keys from its cache": lambda: altered(own_attention),
    "gives attention other values": lambda: altered(other_values),
    "tells attention more": lambda: altered(told_more),
    "reads keys in its cache itself": lambda: altered(reading),
    "gives something else": lambda: altered(asking_the_kind),
}


def failing(module, forward):
    def run(*args, **kwargs):
        raise ValueError("no picture")

    return run


def touching(module, forward):
    return with_update(forward, lambda keys, values: (keys * 2, values))


def looped(module, forward):
    def run(*args, **kwargs):
        forward(*args, **kwargs)
        return forward(*args, **kwargs)

    return run


def skipped(module, forward):
    return lambda hidden_states, **kwargs: (hidden_states, None)


def own_attention(module, forward):
    """Attention over the tokens of the forward only, past the interface."""

    def run(hidden_states, **kwargs):
        keys = module.k_proj(hidden_states).view(*hidden_states.shape[:2], -1, 8).transpose(1, 2)
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        cache.update(keys, keys, module.layer_idx)
        return hidden_states, None

    return run


def other_values(module, forward):
    return with_update(forward, lambda keys, values: (keys, keys))


def with_update(forward, change):
    """The forward, for which the cache's ``update`` gives something else."""

    def run(*args, **kwargs):
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        own = cache.update
        cache.update = lambda *a, **kw: change(*own(*a, **kw))
        try:
            return forward(*args, **kwargs)
        finally:
            del cache.update

    return run


def told_more(module, forward):
    """An attention function with an option of its own."""
    function = hf.AttentionInterface()["sdpa"]

    def tempered(m, q, k, v, mask, temper=1.0, **kw):
        return function(m, q * temper, k, v, mask, **kw)

    hf.AttentionInterface.register("tempered", tempered)
    hf.AttentionMaskInterface.register("tempered", hf.masking_utils.sdpa_mask)
    module.config._attn_implementation = "tempered"
    return lambda *args, **kwargs: forward(*args, temper=3.0, **kwargs)


def reading(module, forward):
    def run(*args, **kwargs):
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        if cache is not None and cache.get_seq_length():
            assert cache.layers[0].keys.shape[2] >= 0
        return forward(*args, **kwargs)

    return run


def asking_the_kind(module, forward):
    def run(*args, **kwargs):
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        hidden, weights = forward(*args, **kwargs)
        ordinary = cache is not None and type(cache.layers[0]) is hf.cache_utils.DynamicLayer
        return (hidden if ordinary else -hidden), weights

    return run


@pytest.mark.parametrize("reason", REFUSED)
def test_what_does_not_work_is_refused_when_the_block_is_entered(reason):
    model = REFUSED[reason]()
    name, before = type(model).__name__, model.config._attn_implementation
    wanted = "does not run on a few tokens with a DynamicCache: ValueError, no picture"
    wanted = wanted if reason == "does not run" else reason
    with pytest.raises(cp.UnsupportedError, match=f"^{name} {wanted}") as error, PRESS(model):
        pytest.fail("the block was entered")
    assert "\n" not in str(error.value)
    assert type(model.config._attn_implementation) is str
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_type_of_numbers_passes(name, dtype):
    try_out(tiny(name, dtype))


def test_nothing_is_drawn_and_nothing_left(monkeypatch):
    model = tiny().train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    state, hooks = torch.get_rng_state(), []
    model.model.register_forward_hook(lambda *_: hooks.append(1))
    with PRESS(model):
        assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not hooks
    assert all(p.grad is None for p in model.parameters())
    assert not any("forward" in vars(module) for module in model.modules())


def test_an_interrupt_leaves_nothing_and_is_not_remembered(monkeypatch):
    model = tiny().train()

    def interrupted(decoder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(probe, "_compare", interrupted)
        with pytest.raises(KeyboardInterrupt), PRESS(model):
            pass
    assert model.model.training and type(model.config._attn_implementation) is str
    assert model.model not in probe._PASSED or not probe._PASSED[model.model]
    with PRESS(model):
        pass


@pytest.fixture
def seen(monkeypatch):
    """The decoders that are tried out."""
    found, compare = [], probe._compare
    monkeypatch.setattr(probe, "_compare", lambda d: (found.append(d), compare(d)))
    return found


def test_a_model_is_tried_out_once_for_each_attention_function(seen):
    model = tiny()
    for _ in range(2):
        with PRESS(model):
            pass
    assert seen == [model.model]
    model.set_attn_implementation("eager")
    with PRESS(model):
        pass
    assert seen == [model.model] * 2


def test_flex_attention_is_refused_when_the_block_is_entered():
    model = tiny()
    model.set_attn_implementation("flex_attention")
    with (
        pytest.raises(cp.UnsupportedError, match='ForCausalLM uses flex_attention.*"sdpa"'),
        PRESS(model),
    ):
        pytest.fail("the block was entered")
    model.set_attn_implementation("sdpa")
    with PRESS(model):
        pass


def test_threads_that_enter_together_try_it_out_once(seen):
    model = tiny()
    threads = [threading.Thread(target=lambda: PRESS(model).__enter__()) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [model.model]


def mllama() -> tuple[hf.PreTrainedModel, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    text = {**SMALL, "cross_attention_layers": [1, 3]}
    text.pop("head_dim")
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    vision |= {"num_global_layers": 1, "attention_heads": 4, "image_size": 28, "patch_size": 14}
    vision |= {"max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]]}
    vision |= {"intermediate_layers_indices": [0, 1], "vision_output_dim": 96}
    config = hf.MllamaConfig(text_config=text, vision_config=vision, image_token_index=90)
    model = hf.MllamaForConditionalGeneration(config).double().eval()
    ids = torch.cat([torch.tensor([[90]]), tokens(47).clamp(max=88)], 1)
    inputs = {"pixel_values": torch.randn(1, 1, 1, 3, 28, 28).double(), "input_ids": ids}
    inputs |= {"aspect_ratio_ids": torch.tensor([[1]])}
    inputs |= {"aspect_ratio_mask": torch.ones(1, 1, 1, dtype=torch.long)}
    return model, {**inputs, "cross_attention_mask": torch.ones(1, 48, 1, 1, dtype=torch.long)}


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_layers_that_attend_to_a_picture_are_left_alone(ratio):
    model, inputs = mllama()
    plain, cache = hf.DynamicCache(), hf.DynamicCache()
    wanted = forward(model, plain, **inputs).logits
    with cp.KnormPress(ratio)(model):
        ours = forward(model, cache, **inputs).logits
    close(ours, wanted)
    assert [layer.lengths.tolist() for layer in compressed_layers(cache)] == [
        [[int(48 * (1 - ratio))] * 2]
    ] * 2
    for i in (1, 3):
        assert type(cache.layers[i]) is hf.cache_utils.DynamicLayer
        assert torch.equal(cache.layers[i].keys, plain.layers[i].keys)
    if not ratio:
        options = {**inputs, "max_new_tokens": 3, "do_sample": False}
        with cp.KnormPress(0.0)(model):
            ours = model.generate(**options)
        assert torch.equal(ours, model.generate(**options))


def test_a_text_without_a_picture_is_compressed_too():
    model, inputs = mllama()
    cache = pressed(model, PRESS, inputs["input_ids"][:, 1:])
    assert [len(head) for layer in kept(cache) for head in layer[0]] == [23] * 4


def test_a_model_without_weights_is_refused_unless_hooks_bring_them():
    model = tiny().to("meta")
    with pytest.raises(cp.UnsupportedError, match="is on the meta device and has no weights"):
        PRESS(model)
    model.lm_head._hf_hook = object()
    with PRESS(model):
        pass


def test_hooks_of_the_model_hear_nothing_of_the_trial():
    model, heard = tiny(), []
    for module in model.modules():
        module.register_forward_hook(lambda *_: heard.append(1))
        module.register_forward_pre_hook(lambda *_: heard.append(1))
    state = {name: x.clone() for name, x in model.named_buffers()}
    try_out(model)
    assert heard == []
    assert all(torch.equal(x, state[name]) for name, x in model.named_buffers())
    model(tokens(3))
    assert heard


@pytest.mark.parametrize("kind", ["jamba", "zamba"])
def test_recurrent_layers_that_forget_are_refused_where_a_text_is_not_read_in_one_forward(kind):
    model, ids = tiny_type(kind), tokens(12)
    cache = pressed(model, PRESS, ids)
    for press in (PRESS, None):
        with pytest.raises(cp.CachepressError, match=r"recurrent layers of \w+ForCausalLM forget"):
            cp.prefill(model, ids, press, chunk_size=5)
        with pytest.raises(cp.CachepressError, match="forget"):
            cp.prefill(model, ids, press, cp.fork(cache))
    with pytest.raises(cp.CachepressError, match="forget"), PRESS(model):
        model(ids, past_key_values=cp.fork(cache))
    with pytest.raises(cp.CachepressError, match="forget"), PRESS(model):
        model.generate(ids, prefill_chunk_size=5, max_new_tokens=2)
    by_token = cp.prefill(model, ids, PRESS, chunk_size=1)
    assert same_step(model, by_token, cache)


def test_recurrent_layers_that_go_on_are_read_in_chunks():
    model, ids = tiny("qwen3_next"), tokens(24)
    in_chunks = cp.prefill(model, ids, PRESS, chunk_size=9)
    whole = pressed(model, PRESS, ids)
    assert same_step(model, in_chunks, whole)


def same_step(model, *caches) -> bool:
    """Whether a further token gives the same after each of two caches, but for rounding."""
    ours, wanted = (forward(model, cache, input_ids=tokens(1)).logits for cache in caches)
    return watching.close(ours, wanted, 1e-3)
