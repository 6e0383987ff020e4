"""Read a document today, and ask it tomorrow in another process.

A saved cache is a safetensors file with a checksum. It is refused where it is damaged, and by any
other model than the one that filled it.
"""

import tempfile
import time
from pathlib import Path

import cachepress as cp
from cachepress.models import load

model, tokenizer = load("smollm2-135m")
text = "The harbour opens at 6 in the morning. The name of the ship is Aurora. " * 40
ids = tokenizer(text, return_tensors="pt").input_ids

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, "harbour.safetensors")

    start = time.perf_counter()
    cache = cp.prefill(model, ids, cp.KeyDiffPress(0.75), storage="int4")
    reading = time.perf_counter() - start
    cp.save_cache(cache, path, model)
    whole = cp.size_of(cache).bytes_before
    print(f"{path.stat().st_size / whole:.1%} of an uncompressed cache's bytes on disk")

    # From here on, all that is needed is the file and the model.
    start = time.perf_counter()
    cache = cp.load_cache(path, model)
    loading = time.perf_counter() - start
    print(f"read in {reading:.1f} s, loaded in {loading:.1f} s")
    print(cp.ask(model, tokenizer, cache, "What is the ship called?"))
