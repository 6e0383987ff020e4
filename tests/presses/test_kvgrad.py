import pytest
import torch
from transformers import DynamicCache

import cachepress as cp
from cachepress.cache.batch import compressed_layers
from cachepress.presses.kvgrad import KVgradPress
from tests.bounds import close
from tests.presses.test_kvzip import asked
from tests.tiny import exact_tiny as tiny
from tests.tiny import tokens
from tests.tiny_cache import forward


def reference(ids):
    """The scores of the one chunk, from a plain model's matrices and autograd."""
    model = tiny()
    model.set_attn_implementation("eager")
    layers, n, cache = model.model.layers, ids.shape[1], DynamicCache()
    with torch.no_grad():
        model(ids, past_key_values=cache)
    text = torch.cat([asked(ids, 0), ids], dim=1)
    added, last = {}, []
    hooks = [
        layer.self_attn.register_forward_hook(
            lambda m, _, out: added.__setitem__(m.layer_idx, out[0])
        )
        for layer in layers
    ]
    hooks.append(model.model.norm.register_forward_pre_hook(lambda _, args: last.append(args[0])))
    embeds = model.model.embed_tokens(text).detach().requires_grad_()
    out = model(inputs_embeds=embeds, past_key_values=cache, output_attentions=True)
    gradients = torch.autograd.grad((last[0] ** 2).sum(), [added[i] for i in range(4)])
    for hook in hooks:
        hook.remove()
    found = torch.zeros(4, 2, n, dtype=torch.float64)
    for i, layer in enumerate(layers):
        size = gradients[i][0].norm(dim=-1)
        for head in range(4):
            part = layer.self_attn.o_proj.weight[:, 8 * head : 8 * head + 8]
            value = (cache.layers[i].values[0, head // 2, :n] @ part.T).norm(dim=-1)
            weights = out.attentions[i][0, head] * size[:, None]
            most = (weights[:, :n] * value).amax(0)
            found[i, head // 2] = torch.maximum(found[i, head // 2], most)
    return found.detach()


def test_scores_are_those_of_plain_autograd():
    ids = tokens(30)
    cache, wanted = cp.prefill(tiny(), ids, KVgradPress(0.01, layerwise=True)), reference(ids)
    for layer, store in enumerate(compressed_layers(cache)):
        for head in range(2):
            held = [p for p in store.positions[0, head].tolist() if p >= 0]
            assert len(held) >= 28
            close(
                store.snapshot.rows().token_state[0, head][: len(held)], wanted[layer, head][held]
            )


def test_weights_keep_their_gradients_and_inference_mode_works():
    model = tiny()
    before = [p.requires_grad for p in model.parameters()]
    plain = cp.prefill(model, tokens(30), KVgradPress(0.5))
    cache = DynamicCache()
    with torch.inference_mode(), KVgradPress(0.5)(model):
        forward(model, cache, input_ids=tokens(30))
    assert [p.requires_grad for p in model.parameters()] == before
    assert all(p.grad is None for p in model.parameters())
    for ours, wanted in zip(compressed_layers(cache), compressed_layers(plain), strict=True):
        assert torch.equal(ours.positions, wanted.positions)


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "gpt_oss", "phi3"])
def test_other_architectures(name):
    cache = cp.prefill(tiny(name), tokens(30), KVgradPress(0.5, chunk_size=12))
    rows = sum(int(store.lengths.sum()) for store in compressed_layers(cache))
    assert rows == 15 * 2 * len(compressed_layers(cache))
