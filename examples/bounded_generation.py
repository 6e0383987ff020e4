"""Generate without end in bounded memory.

DecodingPress compresses while tokens are decoded: after every ``compression_interval`` tokens
the cache is brought back to ``target_size`` pairs a head, and never holds more than both together.
"""

import torch
from transformers import DynamicCache

import cachepress as cp
from cachepress.models import load

model, tokenizer = load("smollm2-135m")
prompt = "The sailor sat down by the fire and began to tell a very long story. Once upon a time"
ids = tokenizer(prompt, return_tensors="pt").input_ids

press = cp.DecodingPress(cp.SnapKVPress(window_size=16), compression_interval=16, target_size=32)
cache = DynamicCache()
options = {"max_new_tokens": 60, "do_sample": True, "suppress_tokens": [tokenizer.eos_token_id]}
torch.manual_seed(0)
with press(model):
    text = model.generate(ids, past_key_values=cache, **options)

heads = cache.layers[0].lengths[0].tolist()
print(f"tokens in the text: {text.shape[1]}, of which the cache has seen {cache.get_seq_length()}")
print(f"pairs in each head of the first layer: {heads}, never more than {32 + 16}")
print(tokenizer.decode(text[0, -12:]))
