"""Compress a prompt and go on generating with transformers' own generate().

A press observes the model inside its ``with`` block. The forward that reads the prompt leaves a
cache with a quarter of its key-value pairs, and generate() continues from it as from any other.
"""

import torch
from transformers import DynamicCache

import cachepress as cp
from cachepress.models import load

model, tokenizer = load("smollm2-135m")  # or any model and tokenizer of transformers
text = "The harbour opens at 6 in the morning. The name of the ship is Aurora. " * 20
ids = tokenizer(text, return_tensors="pt").input_ids

cache = DynamicCache()
press = cp.KVzipPress(compression_ratio=0.75)
with torch.no_grad(), press(model, tokenizer=tokenizer):
    model(ids, past_key_values=cache)

size = cp.size_of(cache)
print(f"tokens read: {cache.get_seq_length()}")
print(f"MiB: {size.bytes_before / 2**20:.1f} before, {size.bytes_after / 2**20:.1f} after")

# The whole text goes into generate(), as transformers wants it; only what is new is computed.
whole = tokenizer(text + "The ship is called", return_tensors="pt").input_ids
answer = model.generate(whole, past_key_values=cache, max_new_tokens=3, do_sample=False)
print("The ship is called", tokenizer.decode(answer[0, whole.shape[1] :]).strip())
