"""Caches on disk: the same next tokens in another process, and clear errors."""

import copy
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache

import cachepress as cp
from cachepress.artefacts import fingerprint as fingerprint_of
from cachepress.artefacts.fingerprint import fingerprint, other_model, weights_digest
from cachepress.cache.batch import compressed_layers, text_of
from tests.bounds import near, no_close_answers, no_near_ties, rounding
from tests.exact import doubled
from tests.forging import forge, made, rewritten, use
from tests.tiny import ARCHITECTURES, exact_tiny, tiny, tokenizer, tokens, words
from tests.tiny_cache import forward, kept

GOLDEN = Path(__file__).parent / "golden"
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
    with torch.no_grad(), no_close_answers(terms=400, depth=4):
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
    model, ids = exact_tiny(name), tokens(60)
    cache = cp.prefill(model, ids, PRESS)
    forward(model, cache, input_ids=tokens(3, seed=2))
    cp.save_cache(cache, tmp_path / "c", model)
    fresh = exact_tiny(name)
    loaded = cp.load_cache(tmp_path / "c", fresh)
    assert kept(loaded) == kept(cache)
    assert loaded.get_seq_length() == 63
    for step in range(3):
        token = tokens(1, seed=step)
        ours = forward(fresh, loaded, input_ids=token).logits
        assert torch.equal(ours, forward(model, cache, input_ids=token).logits)
    with PRESS(fresh):
        forward(fresh, loaded, input_ids=tokens(14))
    assert compressed_layers(loaded)[0].lengths.float().mean() == 40


def test_a_padded_batch_comes_back(tmp_path):
    model, ids = exact_tiny(), tokens(40, batch=2)
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


def with_config(**changes):
    """The same weights in a model of another config."""
    model = tiny()
    config = copy.deepcopy(model.config)
    for name, value in changes.items():
        setattr(config, name, value)
    other = type(model)(config)
    other.load_state_dict(model.state_dict())
    return other.eval()


def with_weights(change):
    model = tiny()
    with torch.no_grad():
        change(model)
    return model


def swap(model):
    layers = model.model.layers
    layers[0], layers[1] = layers[1], layers[0]


def swap_tensors(model):
    one, other = (layer.self_attn.k_proj.weight for layer in model.model.layers[:2])
    kept = one.clone()
    one.copy_(other)
    other.copy_(kept)


def beyond_the_first(model):
    for weight in model.parameters():
        flat = weight.view(-1)
        flat[64:] = torch.randn_like(flat[64:])


def of_k(model):
    return model.model.layers[0].self_attn.k_proj.weight


OTHERS = {
    "rope_theta": lambda: with_config(rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
    "rope_parameters.*": lambda: with_config(
        rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    ),
    "rms_norm_eps": lambda: with_config(rms_norm_eps=0.5),
    "hidden_act": lambda: with_config(hidden_act="gelu"),
    "max_position_embeddings": lambda: with_config(max_position_embeddings=1024),
    "negated": lambda: with_weights(lambda m: of_k(m)[4:].mul_(-1)),
    "all but the first": lambda: with_weights(beyond_the_first),
    "layers": lambda: with_weights(swap),
    "tensors": lambda: with_weights(swap_tensors),
    "rows": lambda: with_weights(lambda m: of_k(m).copy_(of_k(m).flip(0))),
    "columns": lambda: with_weights(lambda m: of_k(m).copy_(of_k(m).flip(1))),
    "last bit": lambda: with_weights(lambda m: of_k(m)[-1, -1].mul_(1 + 2**-23)),
    "bfloat16": lambda: tiny().bfloat16(),
    "one in bfloat16": lambda: with_weights(lambda m: m.model.layers[1].bfloat16()),
}


@pytest.mark.parametrize("name", OTHERS)
def test_whatever_acts_tells_models_apart(tmp_path, name):
    _, path = save(tmp_path)
    with pytest.raises(cp.CachepressError, match="filled by another model"):
        cp.load_cache(path, OTHERS[name]())


@pytest.mark.parametrize(
    "changes",
    [
        {"name_or_path": "elsewhere", "transformers_version": "4.0"},
        {"use_cache": False, "pad_token_id": 5, "architectures": ["X"]},
        {"_attn_implementation": "sdpa"},
    ],
)
def test_what_does_not_act_is_no_other_model(tmp_path, changes):
    _, path = save(tmp_path)
    assert cp.load_cache(path, with_config(**changes)).get_seq_length() == 40


def test_fields_that_another_transformers_does_not_know_do_not_count(tmp_path):
    model = tiny()
    saved = fingerprint(model)
    config = dict(saved["config"], unheard_of=1)
    assert other_model({**saved, "config": config}, model) == "its config has another unheard_of"
    assert other_model({**saved, "config": config, "transformers": "5.0"}, model) is None
    config["rms_norm_eps"] = 0.5
    different = other_model({**saved, "config": config, "transformers": "5.0"}, model)
    assert different == "its config has another rms_norm_eps"


def test_sums_are_remembered_until_a_weight_changes(monkeypatch):
    model, counted, sums = tiny(), [], fingerprint_of._sums

    def spied(x, dtype):
        counted.append(x.numel())
        return sums(x, dtype)

    monkeypatch.setattr(fingerprint_of, "_sample", lambda x: torch.zeros(2, dtype=torch.int64))
    monkeypatch.setattr(fingerprint_of, "_sums", spied)
    first = weights_digest(model)
    n = len(counted)
    assert n == len(model.state_dict()) and weights_digest(model) == first and len(counted) == n
    with torch.no_grad():
        of_k(model)[3, 3] += 1
    second = weights_digest(model)
    assert second != first and len(counted) == n + 1
    of_k(model).data = of_k(model).data.clone()
    assert weights_digest(model) == second and len(counted) == n + 2


def test_weights_of_inference_mode_are_summed_each_time(monkeypatch):
    monkeypatch.setattr(fingerprint_of, "_sample", lambda x: torch.zeros(2, dtype=torch.int64))
    model = tiny()
    first = weights_digest(model)
    with torch.inference_mode():
        for x in model.parameters():
            x.data = x.clone()
        assert weights_digest(model) == first
        of_k(model)[3, 3] += 1
        assert weights_digest(model) != first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("n", [0, 1, 3, 8, 8191, 8193, 3_000_001])
def test_a_sum_is_that_of_integers(dtype, n):
    octets = torch.randint(0, 256, (n * dtype.itemsize,), dtype=torch.uint8)
    x = octets.view(dtype)
    words = numpy.frombuffer(octets.numpy().tobytes() + bytes(-len(octets) % 8), numpy.int64)
    with numpy.errstate(over="ignore"):
        wanted = [words.sum(), (words * numpy.arange(len(words))).sum()]
    assert fingerprint_of._sums(x, None).tolist() == [int(w) for w in wanted]


def test_the_wrong_text_is_noticed(tmp_path):
    from transformers import pipeline

    model, made, text = tiny(), tokenizer(), words(40)
    pipe = pipeline("kv-press-text-generation", model=model, tokenizer=made)
    cache = DynamicCache()
    asked = {"question": "w8 w9", "max_new_tokens": 4}
    answer = pipe(text, press=PRESS, cache=cache, **asked)["answer"]
    cp.save_cache(cache, tmp_path / "c", model)
    loaded = cp.load_cache(tmp_path / "c", model)
    assert pipe(text, cache=loaded, **asked)["answer"] == answer
    other = text.split()
    other[20] = "w3" if other[20] != "w3" else "w4"
    with pytest.raises(cp.CachepressError, match="holds another text"):
        pipe(" ".join(other), cache=loaded, **asked)


def test_token_ids_follow_the_text():
    model, ids = tiny(), tokens(50)
    cache = cp.prefill(model, ids[:, :30], PRESS)
    assert torch.equal(text_of(cache), ids[:, :30])
    cp.prefill(model, ids[:, 30:45], PRESS, cache)
    assert torch.equal(text_of(cache), ids[:, :45])
    forward(model, cache, input_ids=ids[:, 45:46])
    assert torch.equal(text_of(cp.fork(cache)), ids[:, :45])
    cp.prefill(model, ids[:, 46:], PRESS, cache)
    assert torch.equal(text_of(cache), ids[:, :45])
    assert text_of(cp.prefill(model, tokens(9, batch=2), PRESS)) is None
    assert torch.equal(text_of(cp.prefill(model, ids)), ids)
    watched = DynamicCache()
    with PRESS(model):
        model(ids, past_key_values=watched)
    assert torch.equal(text_of(watched), ids)
    forward(model, watched, input_ids=ids[:, :8])
    watched.crop(-10 if cp.cache.batch.compressed_layers(watched)[0]._compressed_at < 48 else -8)
    assert torch.equal(text_of(watched), ids)


FLOAT32 = {"dtype": torch.float32, "terms": 400, "depth": 4}


@pytest.mark.parametrize("name", ["cache", "cache_int4"])
def test_caches_of_0_1_0_still_load(name, caplog):
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "llama_model").eval()
    path = GOLDEN / "version_0.1.0" / f"{name}.safetensors"
    with caplog.at_level("WARNING"):
        loaded = cp.load_cache(path, model)
    (said,) = [record.message for record in caplog.records]
    assert "version 0.1.0, whose header nothing protects" in said and "\n" not in said
    # Another processor wrote it, in float32: its pairs are those of float64 but for rounding.
    n, press = (50, PRESS) if name == "cache" else (120, cp.AdaKVPress(cp.KnormPress(0.25)))
    exact, step = doubled(model), tokens(4, seed=3)
    text = torch.randint(3, 96, (1, n), generator=torch.Generator().manual_seed(0))
    with no_near_ties(rounding(**FLOAT32)):
        cache = cp.prefill(exact, text, press)
    assert kept(loaded) == kept(cache)
    if name == "cache":
        near(
            forward(model, loaded, input_ids=step).logits,
            forward(exact, cache, input_ids=step).logits,
            **FLOAT32,
        )
    for store, wanted in zip(compressed_layers(loaded), compressed_layers(cache), strict=True):
        assert_rows_are_alike(store, wanted)


FORMAT_2 = GOLDEN / "format_2"


@pytest.mark.parametrize(
    "name", ["plain", "int4", "pages", "channels", "turned", "carried", "padded"]
)
def test_caches_of_the_second_format_still_load(name, caplog):
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "llama_model").eval()
    loaded = cp.load_cache(FORMAT_2 / f"{name}.safetensors", model)
    assert not caplog.records
    batch, seen = (2 if name == "padded" else 1), loaded.get_seq_length()
    mask = torch.ones(batch, seen + 2, dtype=torch.long)
    if name == "padded":
        mask[0, :7] = 0
    ids = tokens(2, seed=9, batch=batch)
    logits = forward(model, loaded, input_ids=ids, attention_mask=mask).logits
    near(logits, load_file(FORMAT_2 / "logits.safetensors")[name], **FLOAT32)


def assert_rows_are_alike(store, wanted):
    """The pairs of a float32 layer against those of float64; quantized ones to half a step."""
    held, exact = store.snapshot.rows(), wanted.snapshot.rows()
    size = max(float(exact.keys.abs().max()), float(exact.values.abs().max()))
    limit = rounding(**FLOAT32) * max(1.0, size)
    if store.codec is not None:
        steps = 2**store.codec.bits - 1
        limit += 2 * size * (0.5 / steps + torch.finfo(torch.float16).eps)
    ours_held, exact_held = held.text_positions() >= 0, exact.text_positions() >= 0
    for head in range(2):
        for ours, other in ((held.keys, exact.keys), (held.values, exact.values)):
            one, two = ours[0, head][ours_held[0, head]], other[0, head][exact_held[0, head]]
            assert (one - two).abs().max() <= limit


def flips(content):
    """A file with one bit of its header changed, in many places."""
    (length,) = struct.unpack("<Q", content[:8])
    for place in range(0, 8 + length, 5):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 7
        yield bytes(changed)


def test_no_flipped_bit_of_the_header_gives_another_cache(tmp_path):
    model = tiny()
    cache = cp.prefill(model, tokens(20), PRESS)
    path = tmp_path / "c"
    cp.save_cache(cache, path, model)
    wanted, other = (kept(cache), text_of(cache).tolist()), []
    for changed in flips(path.read_bytes()):
        path.write_bytes(changed)
        try:
            loaded = cp.load_cache(path, model)
        except cp.CachepressError:
            continue
        if (kept(loaded), text_of(loaded).tolist()) != wanted or loaded.get_seq_length() != 20:
            other.append(changed)
    assert not other


def of_layer(layers, name, i=0):
    """The pair of a field's name and value."""
    return next(pair for pair in layers[i][1]["dict"] if pair[0] == name)


def set_(name, value, layers=(0,)):
    def change(found, tensors):
        for i in layers:
            of_layer(found, name, i)[1] = value

    return change


def of_block(found, name):
    segment = of_layer(found, "_blocks")[1]["tuple"][0]
    return next(pair for pair in segment["of"]["dict"] if pair[0] == name)


def first(tensors, ending):
    return next(name for name in tensors if name.endswith(ending))


def position(place, value):
    def change(found, tensors):
        tensors[first(tensors, "positions")].view(-1)[place] = value

    return change


def lengths(found, tensors):
    layout = of_block(found, "layout")[1]["of"]["dict"]
    next(pair for pair in layout if pair[0] == "lengths")[1]["tuple"][0] = 10**9


def crossed(found, tensors):
    of_block(found, "keys")[1]["tensor"] = "1._blocks.0.keys"


DAMAGES = {
    "seen in one layer": set_("_seen", 41),
    "seen is less than rows": set_("_seen", 5, range(4)),
    "seen is a text": set_("_seen", "40", range(4)),
    "seen is true": set_("_seen", True, range(4)),
    "no sequences": set_("_batch", 0, range(4)),
    "three sequences": set_("_batch", 3),
    "settled later": set_("_settled_at", 50),
    "no rows": set_("_blocks", {"tuple": []}),
    "a codec is a text": set_("codec", "int4"),
    "pages": set_("reads", -1),
    "groups": lambda found, _: found[0][1]["dict"].append(["_groups", {"tuple": [1]}]),
    "flags": set_("_encoded", 2),
    "a mask": set_("known", 5),
    "a layer less": lambda found, _: found.pop(),
    "a layer more": lambda found, _: found.append(found[0]),
    "another kind": lambda found, _: found[0].__setitem__(0, "DynamicLayer"),
    "an unknown kind": lambda found, _: found[0].__setitem__(0, "Nothing"),
    "position beyond the text": position(-32, 77),
    "position is below 0": position(0, -5),
    "positions fall": position(0, 39),
    "lengths": lengths,
    "a tensor twice": crossed,
    "shape": lambda found, _: of_block(found, "shape").__setitem__(1, {"tuple": [1, 3]}),
    "width": lambda found, _: of_block(found, "width").__setitem__(1, 9),
    "a dtype": lambda found, _: of_block(found, "keys").__setitem__(1, {"dtype": "load"}),
    "a part": lambda found, _: of_block(found, "keys").__setitem__(1, {"part": "x", "of": {}}),
    "deep": lambda found, _: found.__setitem__(0, ["Store", deep()]),
    "keys of another shape": lambda _, t: t.update(
        {(n := first(t, "keys")): t[n][..., :4].clone()}
    ),
    "keys are integers": lambda _, t: t.update({(n := first(t, "keys")): t[n].int()}),
    "a tensor more": lambda _, t: t.update({"9.x": torch.zeros(1)}),
    "a tensor less": lambda _, t: t.pop(first(t, "values")),
}


def deep():
    value = 0
    for _ in range(300):
        value = {"tuple": [value]}
    return value


@pytest.mark.parametrize("name", DAMAGES)
def test_counts_positions_shapes_and_layers_are_checked(tmp_path, name):
    model, path = save(tmp_path)
    rewritten(path, lambda layers, tensors: None)
    assert kept(cp.load_cache(path, model)) == kept(cp.prefill(model, tokens(40), PRESS))
    rewritten(path, DAMAGES[name])
    with pytest.raises(cp.CachepressError, match="is damaged: "):
        cp.load_cache(path, model)


def fields(value):
    """Every field of a packed layer, at any depth, as the pair of its name and value."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from inner if name == "dict" else ()
            yield from fields(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from fields(inner)


def header_field(name, value):
    """Another value of a field, wherever there is one."""

    def change(layers, tensors):
        found = [pair for pair in fields(layers) if pair[0] == name]
        assert found
        for pair in found:
            pair[1] = value

    return change


def all_tensors(ending, of):
    """Other tensors in place of those whose names end so."""

    def change(layers, tensors):
        found = [name for name in tensors if name.endswith(ending)]
        assert found
        for name in found:
            tensors[name] = of(tensors[name])

    return change


def seen_by_all(n):
    def change(layers, tensors):
        for name in ("_seen", "_settled_at", "looked_at"):
            header_field(name, n)(layers, tensors)

    return change


def halved(x):
    return x.half() if x.is_floating_point() else x


FORGED = {
    "values in float64": ("plain", all_tensors("values", torch.Tensor.double)),
    "keys and values in float16": (
        "plain",
        all_tensors("s", lambda x: x.half() if x.ndim == 3 else x),
    ),
    "longer values": ("plain", all_tensors("values", lambda x: torch.cat([x, x], -1))),
    "a longer tail": ("decoded", all_tensors("_tail.values", lambda x: torch.cat([x, x], -1))),
    "heads of a tail": ("decoded", all_tensors("_tail.keys", lambda x: torch.cat([x, x], 1))),
    "room in a tail": (
        "decoded",
        lambda layers, _: of_layer(layers, "_tail")[1]["tail"].append(10**12),
    ),
    "rows are missing": (
        "decoded",
        lambda _, t: t.update({n: t[n][:, :, 1:] for n in t if "_tail" in n}),
    ),
    "layers of several lengths": (
        "whole",
        lambda _, t: t.update({n: t[n][:, :, 1:] for n in t if n.startswith("1.")}),
    ),
    "tokens are missing": ("decoded", header_field("_settled_at", 0)),
    "zero in float64": ("int4", all_tensors("zero", torch.Tensor.double)),
    "zero of another shape": ("int4", all_tensors("zero", lambda x: x[:, :1, :1])),
    "scales are whole numbers": ("int4", all_tensors("scale", torch.Tensor.int)),
    "a huge group": ("int2", header_field("group", 10**12)),
    "bits": ("int4", header_field("bits", 2)),
    "quantized to another type": ("int4", header_field("dtype", {"dtype": "float64"})),
    "pages grow": ("plain", header_field("_encoded", True)),
    "bounds": ("pages", all_tensors("bounds", torch.Tensor.double)),
    "channels": ("channels", all_tensors("channels", lambda x: x + 5)),
    "channels in int32": ("channels", all_tensors("channels", torch.Tensor.int)),
    "rotated to no number": ("turned", all_tensors("rope", lambda x: x * float("nan"))),
    "rotated beyond the text": ("turned", all_tensors("rope", lambda x: x + 1)),
    "carried whole numbers": ("carried", all_tensors("carried", torch.Tensor.int)),
    "a bias of whole numbers": ("biased", all_tensors("bias", torch.Tensor.int)),
    "a bias in float64": ("biased", all_tensors("bias", torch.Tensor.double)),
    "a bias of fewer pairs": ("biased", all_tensors("bias", lambda x: x[1:])),
    "a mask of numbers": ("padded", all_tensors("known", torch.Tensor.float)),
    "a mask that is too short": ("padded", all_tensors("known", lambda x: x[:, 1:])),
    "a mask of one": ("padded", all_tensors("known", lambda x: x[:1])),
    "ids beyond the vocabulary": ("plain", all_tensors("text_ids", lambda x: x + 90)),
    "ids below 0": ("plain", all_tensors("text_ids", lambda x: x - 90)),
    "more tokens than any text has": ("plain", seen_by_all(2**31 - 1)),
    "more tokens than positions": ("gpt2", seen_by_all(513)),
    "a window of another size": ("gemma3", header_field("sliding_window", 17)),
    "more keys than the window": (
        "gemma3",
        lambda _, t: t.update({n: torch.cat([t[n], t[n]], 2) for n in ("0.keys", "0.values")}),
    ),
    "keys of a window in float64": ("gemma3", all_tensors("0.keys", torch.Tensor.double)),
    "a window is not filled": ("gemma3", header_field("is_initialized", False)),
    "a window saw more": ("gemma3", header_field("cumulative_length", 41)),
    "recurrent states of another size": (
        "qwen3_next",
        lambda _, t: t.update({(n := next(n for n in t if "recurrent" in n)): t[n][:, 1:]}),
    ),
    "two values of a name": (
        "plain",
        lambda layers, _: layers[0][1]["dict"].append(["_encoded", False]),
    ),
    "our layer in place of a window": (
        "gemma3",
        lambda layers, _: layers[0].__setitem__(0, "Store"),
    ),
}


@pytest.fixture(scope="module")
def every_form():
    return made()


@pytest.mark.parametrize("name", FORGED)
def test_what_does_not_fit_the_model_or_itself_is_damage(tmp_path, every_form, name):
    form, change = FORGED[name]
    model, cache = every_form[form]
    cp.save_cache(cache, tmp_path / "c", model)
    rewritten(tmp_path / "c", lambda layers, tensors: None)
    assert kept(cp.load_cache(tmp_path / "c", model)) == kept(cache)
    rewritten(tmp_path / "c", change)
    with pytest.raises(cp.CachepressError, match="is damaged: ValueError") as refused:
        cp.load_cache(tmp_path / "c", model)
    assert "\n" not in str(refused.value)


def test_every_form_is_of_use_when_it_is_loaded(tmp_path, every_form):
    for model, cache in every_form.values():
        cp.save_cache(cache, tmp_path / "c", model)
        loaded = cp.load_cache(tmp_path / "c", model)
        use(model, loaded, tmp_path)
        again = cp.load_cache(tmp_path / "again", model)
        assert kept(again) == kept(cache) and again.get_seq_length() == cache.get_seq_length()


def test_a_forged_cache_is_refused_or_of_use(tmp_path, every_form):
    refused = 0
    for seed in range(150):
        draw = random.Random(seed)
        model, cache = every_form[draw.choice(list(every_form))]
        cp.save_cache(cache, tmp_path / "c", model)
        rewritten(tmp_path / "c", lambda layers, tensors, draw=draw: forge(draw, layers, tensors))
        try:
            loaded = cp.load_cache(tmp_path / "c", model)
        except cp.CachepressError as error:
            refused += "is damaged" in str(error)
            continue
        use(model, loaded, tmp_path)
    assert refused >= 100


@pytest.mark.skipif(not hasattr(DynamicCache, "activate_past_recording"), reason="is newer")
@pytest.mark.parametrize("press", [PRESS, None])
def test_windows_that_keep_more_for_assisted_decoding_come_back(tmp_path, press):
    model = exact_tiny("gemma3")
    cache = cp.prefill(model, tokens(40), press)
    cache.activate_past_recording()
    forward(model, cache, input_ids=tokens(6, seed=3))
    cp.save_cache(cache, tmp_path / "c", model)
    loaded = cp.load_cache(tmp_path / "c", model)
    assert loaded.layers[0].record_past and loaded.layers[0].keys.shape[2] == 15 + 6
    for step in range(3):
        token = tokens(1, seed=step)
        ours = forward(model, loaded, input_ids=token).logits
        assert torch.equal(ours, forward(model, cache, input_ids=token).logits)


def test_types_are_those_that_the_model_makes_where_it_is_loaded(tmp_path):
    model = tiny()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache = cp.prefill(model, tokens(40), PRESS)
        assert compressed_layers(cache)[0].values.dtype == torch.bfloat16
        cp.save_cache(cache, tmp_path / "c", model)
        assert kept(cp.load_cache(tmp_path / "c", model)) == kept(cache)
    with pytest.raises(cp.CachepressError, match="pages of torch.float32, as the model makes"):
        cp.load_cache(tmp_path / "c", model)


def test_a_cache_loads_while_a_press_observes(tmp_path):
    model, path = save(tmp_path)
    with cp.SnapKVPress(0.5, window_size=4)(model):
        loaded = cp.load_cache(path, model)
        assert kept(loaded) == kept(cp.load_cache(path, model))
        forward(model, loaded, input_ids=tokens(20, seed=1))
    assert compressed_layers(loaded)[0].lengths.tolist() == [[30, 30]]


@pytest.mark.parametrize("name", ["", ".", "/", "a\0b", "x" * 300, "nothing/x"])
def test_a_path_that_is_none_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    model = tiny()
    cache = cp.prefill(model, tokens(20), PRESS)
    with pytest.raises(cp.CachepressError, match="cannot write the cache to"):
        cp.save_cache(cache, name, model)
    with pytest.raises(cp.CachepressError, match="no such file|damaged or not"):
        cp.load_cache(name, model)
    assert list(tmp_path.iterdir()) == []


def test_a_saved_cache_follows_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        _, path = save(tmp_path)
    finally:
        os.umask(before)
    assert oct(path.stat().st_mode)[-3:] == "640"
