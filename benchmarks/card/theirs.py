"""Measures kvpress in the interpreter of an environment that has it; stands alone.

python theirs.py cuda 32 48 8192 32768 SHAPE     # device, layers, steps, lengths; JSON lines
"""

import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable


def main(device: str, layers: int, steps: int, lengths: list[int], shape: dict[str, int]) -> None:
    """Measure prefill, peak and decoded steps of some presses at every length."""
    import kvpress
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    values = {**shape, "num_hidden_layers": layers, "max_position_embeddings": 262144}
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        config = transformers.AutoConfig.for_model("llama", **values)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    presses = {
        "none": lambda: None,
        "SnapKV 0.9": lambda: kvpress.SnapKVPress(compression_ratio=0.9),
        "AdaKV(SnapKV) 0.9": lambda: kvpress.AdaKVPress(kvpress.SnapKVPress(0.9)),
    }
    with torch.inference_mode():
        for length in lengths:
            for name, make in presses.items():
                try:
                    found = measured(model, make, length, steps)
                except Exception as error:
                    found = {
                        "line": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                    }
                found = {"press": name, "length": length, **found}
                print(json.dumps({"cell": f"{name}, {length}", **found}), flush=True)


def measured(
    model: object, make: Callable[[], object], length: int, steps: int
) -> dict[str, object]:
    """Measure one press: each is decoded right after its prefill, since it masks its modules."""
    import torch
    from transformers import DynamicCache

    device = model.device  # type: ignore
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    ids = torch.randint(5, 200, (1, length), device=device)
    prefills, peak = [], 0
    for _ in range(2):
        for module in model.modules():  # type: ignore
            if hasattr(module, "masked_key_indices"):
                module.masked_key_indices = None
        cache, before = DynamicCache(), 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        press = make()
        wait()
        start = time.perf_counter()
        with contextlib.nullcontext() if press is None else press(model):  # type: ignore
            model.model(input_ids=ids, past_key_values=cache)  # type: ignore
        wait()
        prefills.append(time.perf_counter() - start)
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated() - before
    token, times = ids[:, :1], []
    for i in range(steps + 4):
        position = torch.full((1, 1), length + i, device=device)
        wait()
        start = time.perf_counter()
        out = model(input_ids=token, past_key_values=cache, position_ids=position)  # type: ignore
        token = out.logits[:, -1:].argmax(-1)
        wait()
        times.append(time.perf_counter() - start)
    return {
        "seconds": min(prefills),
        "peak_mib": peak / 2**20,
        "ms": 1e3 * statistics.median(times[4:]),
    }


if __name__ == "__main__":
    _, device, *numbers, shape = sys.argv
    layers, steps, *lengths = map(int, numbers)
    main(device, layers, steps, lengths, json.loads(shape))
