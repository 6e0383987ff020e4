"""Read a prompt far beyond the budget, in chunks.

In exact mode a prompt is computed in chunks and compressed once, at its end. In online mode the
cache is compressed after each chunk: it never holds more than budget and chunk together, and later
tokens do not see what is gone. Kept pairs may also be stored in 4 bits.
"""

import cachepress as cp
from cachepress.models import load

model, tokenizer = load("smollm2-135m")
text = "The harbour opens at 6 in the morning. The name of the ship is Aurora. " * 30
ids = tokenizer(text, return_tensors="pt").input_ids
press = cp.KeyDiffPress(n_kept=128)

for options in (
    {"chunk_size": 128},
    {"chunk_size": 128, "mode": "online"},
    {"chunk_size": 128, "mode": "online", "storage": "int4"},
):
    cache = cp.prefill(model, ids, press, **options)
    size = cp.size_of(cache)
    share = size.bytes_after / size.bytes_before
    print(f"{options}: {ids.shape[1]} tokens in {share:.1%} of the bytes")
    print(" ", cp.ask(model, tokenizer, cache, "What is the ship called?", max_new_tokens=12))
