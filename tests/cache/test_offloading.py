"""Offloaded caches: they go on as any other does, with their segments in host memory.

Segments are moved on a CPU, too, where the host counts as another device than the one that models
compute on.
"""

import copy
import pickle
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, StaticCache, pipeline

import cachepress as cp
from cachepress.cache import host
from cachepress.cache.batch import compressed_layers
from cachepress.cache.bytes import allocated_bytes
from cachepress.cache.host import HostSegment
from cachepress.cache.joined import form_of, join
from cachepress.cache.offloading import OffloadedHybridLayer, OffloadedLayer
from cachepress.cache.stepping import can_step
from cachepress.hf import cache_argument
from tests.bounds import close
from tests.tiny import exact_tiny, tokenizer, tokens, words
from tests.tiny_cache import allocated, forward, go_on, goes_on_as, kept

MODEL = exact_tiny()
KNORM = cp.KnormPress(0.5)
PRESSES = {
    "even": KNORM,
    "uneven": cp.AdaKVPress(cp.SnapKVPress(0.5, window_size=6)),
    "in few bits": cp.KIVIPress(KNORM, residual=5),
    "uneven, in few bits": cp.KIVIPress(cp.AdaKVPress(KNORM), bits=4, residual=0),
    "by page": cp.QuestPress(cp.KnormPress(0.0), pages=1, skip_layers=0),
    "thin": cp.ComposedPress([cp.ThinKPress(0.5, window_size=6), KNORM]),
    "turned": cp.KeyRerotationPress(cp.AdaKVPress(KNORM)),
    "with a number of each token": cp.H2OPress(0.5),
    "all layers for one budget": cp.AdaKVPress(KNORM, scope="model"),
    "whole": cp.KnormPress(0.0),
    "after a reconstruction": cp.KVzipPress(0.5, chunk_size=16, layerwise=True),
}
by_press = pytest.mark.parametrize("press", PRESSES.values(), ids=list(PRESSES))
OPTIONS = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def moves(request, monkeypatch):
    """Whether segments are moved: on a CPU there is nowhere to."""
    moved = getattr(request, "param", True)
    if moved:
        monkeypatch.setattr(host, "_HOST", torch.device("cpu", 0))
    return moved


def read(press, offload=True, seed=0, n=80, **options):
    return cp.prefill(MODEL, tokens(n, seed=seed), press, offload=offload, **options)


def same(ours, wanted, ids, model=MODEL):
    """Both caches hold the same, and go on in the same way."""
    assert all(isinstance(layer, OffloadedLayer) for layer in compressed_layers(ours))
    assert not any(isinstance(layer, OffloadedLayer) for layer in compressed_layers(wanted))
    for a, b in zip(go_on(model, ours, ids), go_on(model, wanted, ids), strict=True):
        close(a, b)
    assert kept(ours) == kept(wanted)


def is_on_host(cache, moves):
    """Every segment is on the host, nothing of it on the device, and the bytes are told."""
    layers, size = compressed_layers(cache), cp.size_of(cache)
    segments = [x for layer in layers for x in vars(layer)["_segments"]]
    assert segments
    assert {isinstance(x, HostSegment) for x in segments} == {moves}
    assert all(layer._prefetch.ahead is None for layer in layers)
    own = allocated_bytes(x for layer in layers for x in layer.tensors())
    assert own == allocated(layers)
    there = [x for layer in layers if layer._tail is not None for x in layer._tail.tensors()]
    there += [layer.text_valid for layer in layers if layer.text_valid is not None]
    there += [x for s in segments if moves for x in s.packed.layout.tensors()]
    assert size.bytes_offloaded == own - allocated_bytes(there) > 0


@by_press
@pytest.mark.parametrize("how", [{}, {"chunk_size": 12}, {"chunk_size": 12, "mode": "online"}])
def test_it_goes_on_as_the_same_cache_on_the_device(press, how, moves):
    if press.needs.reconstruction is not None and "mode" in how:
        how = {"chunk_size": 30, **how}
    ours, wanted = read(press, **how), read(press, offload=False, **how)
    is_on_host(ours, moves)
    same(ours, wanted, tokens(45, seed=5))
    is_on_host(ours, moves)


@by_press
@pytest.mark.parametrize("moves", [False], indirect=True)
def test_on_a_cpu_nothing_is_moved(press, moves, tmp_path):
    ours, wanted = read(press), read(press, offload=False)
    is_on_host(ours, moves)
    if press is not PRESSES["whole"]:
        assert cp.size_of(ours).bytes_after == cp.size_of(wanted).bytes_after
    same(ours, wanted, tokens(20, seed=5))
    cp.save_cache(ours, tmp_path / "c", MODEL)
    again = cp.load_cache(tmp_path / "c", MODEL, offload=True)
    is_on_host(again, moves)
    same(again, wanted, tokens(3, seed=6))


@pytest.mark.parametrize("storage", ["full", "int8", cp.Codec(4, residual=5), "int2"])
@pytest.mark.parametrize("press", [KNORM, PRESSES["uneven"], PRESSES["whole"]])
def test_a_padded_batch_goes_on_as_on_the_device(press, storage, moves):
    ids, mask = tokens(41, batch=3), torch.ones(3, 41, dtype=torch.long)
    mask[1, :15] = mask[2, :18] = 0
    both = [
        cp.prefill(
            MODEL, ids, press, attention_mask=mask, storage=storage, offload=x, chunk_size=16
        )
        for x in (True, False)
    ]
    is_on_host(both[0], moves)
    for step in range(4):
        mask = torch.cat([mask, mask.new_ones(3, 1)], dim=1)
        given = {"input_ids": tokens(1, batch=3, seed=step), "attention_mask": mask}
        given["position_ids"] = mask.sum(-1, keepdim=True) - 1
        logits = [forward(MODEL, cache, **given).logits for cache in both]
        close(*logits)
    assert kept(both[0]) == kept(both[1])


@pytest.mark.parametrize("name", ["qwen2", "gemma3", "gpt_oss", "gpt2", "qwen3_next"])
def test_windows_and_states_stay_where_they_are(name, moves):
    model = exact_tiny(name)
    ours, wanted = (cp.prefill(model, tokens(60), KNORM, offload=x) for x in (True, False))
    is_on_host(ours, moves)
    same(ours, wanted, tokens(5, seed=1), model)


def test_a_layer_with_a_recurrent_state_is_offloaded(moves):
    import transformers as hf

    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 97}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    small |= {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8}
    small |= {"mamba_n_groups": 1, "mamba_chunk_size": 16, "initializer_range": 0.2}
    model = hf.FalconH1ForCausalLM(hf.FalconH1Config(**small, pad_token_id=0)).eval()
    ours, wanted = (cp.prefill(model, tokens(40), KNORM, offload=x) for x in (True, False))
    layers = compressed_layers(ours)
    assert [type(layer) for layer in layers] == [OffloadedHybridLayer] * 2
    ids = tokens(4, seed=1)
    for a, b in zip(go_on(model, ours, ids), go_on(model, wanted, ids), strict=True):
        torch.testing.assert_close(a, b)
    assert kept(cp.fork(ours)) == kept(wanted)


def test_while_decoding_what_is_compressed_goes_to_the_host(moves):
    both = []
    for offload in (True, False):
        press = cp.DecodingPress(cp.SnapKVPress(window_size=6), 8, 20)
        cache = cp.prefill(MODEL, tokens(40), press, offload=offload)
        with press(MODEL):
            both.append((cache, go_on(MODEL, cache, tokens(20, seed=3))))
    for a, b in zip(both[0][1], both[1][1], strict=True):
        close(a, b)
    for layer in compressed_layers(both[0][0]):
        layer.query_stats = None
    is_on_host(both[0][0], moves)
    assert kept(both[0][0]) == kept(both[1][0])


@by_press
def test_copies_share_what_is_on_the_host_and_go_on_apart(press, moves):
    ours, wanted = read(press), read(press, offload=False)
    go_on(MODEL, ours, tokens(70, seed=2))
    go_on(MODEL, wanted, tokens(70, seed=2))
    copies = [(cp.fork(ours), cp.fork(wanted)), (copy.deepcopy(ours), copy.deepcopy(wanted))]
    for layer, copied in zip(compressed_layers(ours), compressed_layers(copies[0][0]), strict=True):
        for segment in vars(copied)["_segments"]:
            assert segment in vars(layer)["_segments"]
    many = cp.fork(ours, 3)
    for seed, (one, other) in enumerate(copies):
        same(one, other, tokens(3, seed=seed + 5))
    wide = cp.fork(wanted, 3)
    many.reorder_cache(torch.tensor([2, 0]))
    wide.reorder_cache(torch.tensor([2, 0]))
    same(many, wide, tokens(3, batch=2, seed=8))
    same(ours, wanted, tokens(3, seed=9))
    is_on_host(ours, moves)


@by_press
def test_sequences_of_a_batch_change_places_on_the_host(press, moves):
    both = [cp.prefill(MODEL, tokens(50, batch=3), press, offload=x) for x in (True, False)]
    for cache in both:
        go_on(MODEL, cache, tokens(2, batch=3))
        cache.reorder_cache(torch.tensor([2, 0, 0, 1]))
    is_on_host(both[0], moves)
    same(*both, tokens(3, batch=4, seed=4))


@by_press
def test_a_cropped_cache_goes_on(press):
    both = [read(press, offload=x) for x in (True, False)]
    for i, cache in enumerate(both):
        forward(MODEL, cache, input_ids=tokens(30, seed=5))
        both[i] = cp.fork(cache)
        both[i].crop(-27)
    same(*both, tokens(3, seed=4))


@by_press
def test_it_is_saved_and_loaded_where_it_is_asked_for(press, tmp_path, moves):
    ours, wanted = read(press), read(press, offload=False)
    for cache in (ours, wanted):
        go_on(MODEL, cache, tokens(40, seed=2))
    cp.save_cache(ours, tmp_path / "c", MODEL)
    cp.save_cache(wanted, tmp_path / "d", MODEL)
    again = cp.load_cache(tmp_path / "d", MODEL, offload=True)
    is_on_host(again, moves)
    plain = cp.load_cache(tmp_path / "c", MODEL)
    assert cp.size_of(plain).bytes_offloaded == 0
    same(again, wanted, tokens(3, seed=5))
    same(ours, plain, tokens(3, seed=5))


@by_press
def test_joined_caches_go_on_as_each_by_itself(press, moves):
    caches = [read(press, seed=seed) for seed in (1, 2)]
    ids, joined = tokens(5, batch=4, seed=3), join([caches], 2)
    is_on_host(joined, moves)
    goes_on_as(MODEL, joined, caches * 2, ids)


def test_groups_of_caches_are_offloaded_as_well():
    groups = [[read(PRESSES["uneven"], seed=1)], [read(KNORM, seed=seed) for seed in (2, 3)]]
    ids, joined = tokens(5, batch=6, seed=3), join(groups, 2)
    order = [groups[0][0]] * 2 + groups[1] * 2
    goes_on_as(MODEL, joined, order, ids)
    size = cp.size_of(joined)
    assert 0 < size.bytes_offloaded < size.bytes_after


def test_an_offloaded_cache_is_not_joined_with_another():
    caches = [read(KNORM, seed=1), read(KNORM, offload=False, seed=2)]
    assert form_of(caches[0]) != form_of(caches[1])
    with pytest.raises(cp.CachepressError, match="groups of 2 forms"):
        join([caches])


def test_a_pickled_cache_goes_on(moves):
    ours, wanted = read(PRESSES["uneven, in few bits"]), read(PRESSES["uneven, in few bits"], False)
    again = pickle.loads(pickle.dumps(ours))
    assert cp.size_of(again) == cp.size_of(ours)
    is_on_host(again, moves)
    same(again, wanted, tokens(3, seed=5))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "batch": 2}])
def test_generate_goes_on_from_it(options):
    options = dict(options)
    batch = options.pop("batch", 1)
    expanded = torch.arange(batch).repeat_interleave(options.get("num_beams", 1))
    question, found = tokens(3, batch=batch, seed=7), []
    for offload in (True, False):
        cache = cp.prefill(MODEL, tokens(50, batch=batch), PRESSES["uneven"], offload=offload)
        cache.reorder_cache(expanded)
        with torch.no_grad():
            found.append(
                MODEL.generate(
                    question,
                    attention_mask=torch.ones(batch, 53, dtype=torch.long),
                    **{cache_argument(MODEL): cache},
                    **OPTIONS,
                    **options,
                ).tolist()
            )
    assert found[0] == found[1]


def test_the_pipeline_and_ask_answer_as_ever(moves):
    text, made = words(40), tokenizer()
    pipe = pipeline("kv-press-text-generation", model=MODEL, tokenizer=made)
    caches = [DynamicCache(config=MODEL.config) for _ in range(2)]
    asked = {"questions": ["w8 w9", "w20"], "press": PRESSES["uneven"], "max_new_tokens": 6}
    ours, wanted = (
        pipe(text, cache=cache, offload=offload, **asked)
        for cache, offload in zip(caches, (True, False), strict=True)
    )
    assert ours == wanted
    is_on_host(caches[0], moves)
    answers = [cp.ask(MODEL, made, cache, "w8 w9", max_new_tokens=6) for cache in caches]
    assert answers[0] == answers[1]


def test_what_transformers_would_offload_is_offloaded_here(moves):
    """Filled by a press, or before."""
    ids, wanted = tokens(60), read(KNORM, offload=False, n=60)
    fresh, filled = DynamicCache(offloading=True), DynamicCache()
    forward(MODEL, filled, input_ids=ids[:, :20])
    filled.offloading = True
    with KNORM(MODEL):
        forward(MODEL, fresh, input_ids=ids)
        forward(MODEL, filled, input_ids=ids[:, 20:])
    for ours in (fresh, filled):
        is_on_host(ours, moves)
        assert not ours.offloading
        same(cp.fork(ours), cp.fork(wanted), tokens(3, seed=5))


def test_generate_offloads_where_it_is_asked_to():
    ids, wanted = tokens(30), DynamicCache()
    with torch.no_grad(), KNORM(MODEL):
        ours = MODEL.generate(
            ids, cache_implementation="offloaded", return_dict_in_generate=True, **OPTIONS
        )
        plain = MODEL.generate(ids, **{cache_argument(MODEL): wanted}, **OPTIONS)
    assert torch.equal(ours.sequences, plain)
    cache = ours["cache"] if "cache" in ours else ours["past_key_values"]
    assert cp.size_of(cache).bytes_offloaded > 0 == cp.size_of(wanted).bytes_offloaded


def test_an_offloaded_cache_stays_so_and_another_becomes_one(moves):
    more = tokens(20, seed=4)
    caches = [read(KNORM), read(KNORM, offload=False), read(KNORM, offload=False)]
    for cache, offload in zip(caches, (False, True, False), strict=True):
        cp.prefill(MODEL, more, KNORM, cache, offload=offload)
    is_on_host(caches[0], moves)
    is_on_host(caches[1], moves)
    for cache in caches[:2]:
        same(cp.fork(cache), cp.fork(caches[2]), tokens(3, seed=5))


def test_its_steps_are_not_recorded():
    assert not can_step(read(KNORM).layers, 1, frozenset())
    assert can_step(read(KNORM, offload=False).layers, 1, frozenset())


def test_gradients_go_through_what_is_decoded_and_not_through_what_is_offloaded():
    logits = [
        MODEL(tokens(2, seed=1), **{cache_argument(MODEL): read(KNORM, offload)}).logits
        for offload in (True, False)
    ]
    weight = MODEL.get_input_embeddings().weight
    close(*(torch.autograd.grad(x.sum(), weight)[0] for x in logits))
    with pytest.raises(cp.UnsupportedError, match=r"torch\.no_grad"), KNORM(MODEL):
        MODEL(tokens(20), **{cache_argument(MODEL): DynamicCache(offloading=True)})


def test_what_cannot_be_offloaded_is_refused_in_one_line():
    with pytest.raises(cp.CachepressError, match=r"offload=True needs a press: KnormPress\(0\.0\)"):
        cp.prefill(MODEL, tokens(9), offload=True)
    with pytest.raises(cp.UnsupportedError, match=r"prefill\(\.\.\., offload=True\)"):
        read(KNORM).layers[0].offload()
    static = StaticCache(config=MODEL.config, max_cache_len=64, offloading=True)
    with (
        pytest.raises(cp.UnsupportedError, match=r"got StaticCache.*prefill\(\.\.\., offload=True"),
        KNORM(MODEL),
    ):
        forward(MODEL, static, input_ids=tokens(9))


class Gpu:
    """A device with streams that say what they wait for."""

    type = "cuda"

    def __init__(self, monkeypatch) -> None:
        self.said: list[str] = []
        self.current = Stream(self, "the model's stream")
        cuda = SimpleNamespace(
            Stream=lambda device: Stream(device, "another stream"),
            Event=Event,
            current_stream=lambda device: device.current,
            stream=self.on,
        )
        made = SimpleNamespace(cuda=cuda, uint8=torch.uint8, empty=self.empty)
        monkeypatch.setattr(host, "torch", made)
        monkeypatch.setattr(host, "_copy", lambda *_: self.said.append(f"copy: {self.current}"))

    @contextmanager
    def on(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def empty(self, n, dtype, device, pin_memory=False):
        self.said.append("pinned" if pin_memory else f"memory: {self.current}")
        return torch.empty(n, dtype=dtype)


class Stream:
    def __init__(self, device, name) -> None:
        self.device, self.name = device, name

    def __str__(self) -> str:
        return self.name

    def wait_stream(self, other):
        self.device.said.append(f"{self} waits for {other}")

    def wait_event(self, event):
        self.device.said.append(f"{self} waits for what was done on {event.stream}")


class Event:
    def record(self, stream):
        self.stream = stream

    def synchronize(self):
        self.stream.device.said.append(f"the host waits for {self.stream}")


def test_on_a_gpu_nothing_is_read_before_it_arrived_nor_free_while_it_is_written(monkeypatch):
    layer = read(KNORM, offload=False).layers[0]
    gpu = Gpu(monkeypatch)
    ours, said = OffloadedLayer(), gpu.said
    ours._prefetch.device = gpu
    ours._segments = layer._segments
    held = vars(ours)["_segments"]
    assert said == ["pinned"]
    assert ours._segments is held  # As the host may read them now.
    assert said == ["pinned", "the host waits for the model's stream"]
    began = [
        "memory: the model's stream",
        "another stream waits for the model's stream",
        "copy: another stream",
    ]
    arrived = "the model's stream waits for what was done on another stream"
    said.clear()
    ours.bring_ahead()
    ours.bring_ahead()
    assert said == began
    assert len(ours.bring(held, forward=True)) == 1
    assert said == [*began, arrived]
    said.clear()
    ours.bring(held, forward=True)  # What was not asked for ahead is copied by the reader itself.
    assert said == ["memory: the model's stream", "copy: the model's stream"]
    said.clear()
    ours.bring_ahead()
    ours._prefetch.ahead = None  # Nobody reads it.
    assert said == [*began, arrived]
    said.clear()
    ours.bring_ahead()
    gpu.current = Stream(gpu, "a third stream")
    ours.bring(held, forward=True)
    own = ["memory: a third stream", "copy: a third stream"]
    assert said == [*began, *own, arrived]
