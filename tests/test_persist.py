"""Caches on disk: the same next tokens in another process, and clear errors."""

import subprocess
import sys

import pytest
import torch
from transformers import DynamicCache

import cachepress as cp
from cachepress.cache import stores
from tests.tiny import ARCHITECTURES, tiny, tokens
from tests.tiny_cache import forward, kept

PRESS = cp.AdaKVPress(cp.KnormPress(0.5))
NEXT_TOKENS = """
import sys, torch, cachepress as cp
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
cache = cp.load_cache(sys.argv[2], model)
ids = torch.tensor([[int(t) for t in sys.argv[3].split()]])
with torch.no_grad():
    out = model.generate(
        ids, past_key_values=cache, attention_mask=torch.ones(1, cache.get_seq_length() + 2),
        max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0,
    )
print(*out[0].tolist())
"""


@pytest.mark.parametrize("storage", ["full", "int4"])
def test_a_new_process_gives_the_same_next_tokens(tmp_path, model_dir, storage):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    cache = cp.prefill(model, tokens(150), PRESS, storage=storage)
    path, question = tmp_path / "document.safetensors", tokens(2, seed=4)
    cp.save_cache(cache, path, model)
    with torch.no_grad():
        wanted = model.generate(
            question,
            past_key_values=cache,
            attention_mask=torch.ones(1, 152),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0].tolist()
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            NEXT_TOKENS,
            model_dir,
            path,
            " ".join(map(str, question[0].tolist())),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert [int(t) for t in done.stdout.split()] == wanted


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_kind_of_layer_comes_back(tmp_path, name):
    model, ids = tiny(name), tokens(60)
    cache = cp.prefill(model, ids, PRESS)
    forward(model, cache, input_ids=tokens(3, seed=2))
    cp.save_cache(cache, tmp_path / "c", model)
    fresh = tiny(name)
    loaded = cp.load_cache(tmp_path / "c", fresh)
    assert kept(loaded) == kept(cache)
    assert loaded.get_seq_length() == 63
    for step in range(3):
        token = tokens(1, seed=step)
        ours = forward(fresh, loaded, input_ids=token).logits
        assert torch.equal(ours, forward(model, cache, input_ids=token).logits)
    with PRESS(fresh):
        forward(fresh, loaded, input_ids=tokens(14))
    assert stores(loaded)[0].lengths.float().mean() == 40


def test_a_padded_batch_comes_back(tmp_path):
    model, ids = tiny(), tokens(40, batch=2)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :13] = 0
    cache = cp.prefill(model, ids, PRESS, attention_mask=mask)
    cp.save_cache(cache, tmp_path / "c", model)
    assert kept(cp.load_cache(tmp_path / "c", model)) == kept(cache)


def save(tmp_path):
    model = tiny()
    cp.save_cache(cp.prefill(model, tokens(40), PRESS), tmp_path / "c", model)
    return model, tmp_path / "c"


def test_another_model_is_refused(tmp_path):
    model, path = save(tmp_path)
    model.lm_head.weight.data[0, 0] += 1
    with pytest.raises(cp.CachepressError, match="filled by another model"):
        cp.load_cache(path, model)
    with pytest.raises(cp.CachepressError, match=r"another model \(LlamaForCausalLM.*Qwen2"):
        cp.load_cache(path, tiny("qwen2"))
    with pytest.raises(cp.CachepressError, match="or dtype"):
        cp.load_cache(path, tiny().bfloat16())


def test_a_damaged_file_is_refused(tmp_path):
    model, path = save(tmp_path)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(cp.CachepressError, match="damaged: its content does not match"):
        cp.load_cache(path, model)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(cp.CachepressError, match="damaged or not a safetensors file"):
        cp.load_cache(path, model)
    path.write_text("hello")
    with pytest.raises(cp.CachepressError, match="damaged or not a safetensors file"):
        cp.load_cache(path, model)
    with pytest.raises(cp.CachepressError, match="there is no such file"):
        cp.load_cache(tmp_path / "nothing", model)


def test_weights_are_no_cache(tmp_path, model_dir):
    from pathlib import Path

    with pytest.raises(cp.CachepressError, match="not a cache that save_cache wrote"):
        cp.load_cache(Path(model_dir) / "model.safetensors", tiny())


def test_what_cannot_be_written_leaves_nothing(tmp_path):
    model = tiny()
    with pytest.raises(cp.CachepressError, match="the cache is empty"):
        cp.save_cache(DynamicCache(), tmp_path / "c", model)
    (tmp_path / "file").write_text("")
    with pytest.raises(cp.CachepressError, match="cannot write the cache"):
        cp.save_cache(cp.prefill(model, tokens(9), PRESS), tmp_path / "file" / "c", model)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
