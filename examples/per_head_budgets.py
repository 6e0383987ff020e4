"""Let the heads of a layer compete for one budget, and look at what each of them kept.

Some heads attend to a few tokens, others to many. With AdaKVPress around a press, a layer keeps as
many key-value pairs as before, and its heads share them by their scores. What a head does not keep
is not in memory: heads are not padded to the longest of their layer.
"""

import cachepress as cp
from cachepress.models import load

model, tokenizer = load("smollm2-135m")
text = "The harbour opens at 6 in the morning. The name of the ship is Aurora. " * 20
ids = tokenizer(text, return_tensors="pt").input_ids

even = cp.SnapKVPress(compression_ratio=0.75)
presses = {
    "as many in each head": even,
    "heads of a layer compete": cp.AdaKVPress(even),
    "all heads of the model compete": cp.AdaKVPress(even, scope="model"),
}
for name, press in presses.items():
    cache = cp.prefill(model, ids, press)
    print(f"{name}: {cp.size_of(cache).bytes_after / 2**20:.1f} MiB")
    for depth in (0, 15, 29):
        heads = cache.layers[depth].lengths[0].tolist()
        print(f"  layer {depth}: {heads} pairs, {sum(heads)} in all")
