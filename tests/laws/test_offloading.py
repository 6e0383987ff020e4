"""Where segments of an offloaded cache are, on devices that there are none of: a model over two.

Each is copied to the host once, when its layer is compressed, and to its device once in a forward,
one layer ahead; those of at most two layers are on the devices at once, and none afterwards.
"""

from weakref import WeakSet

import pytest
import torch
from transformers import DynamicCache

import cachepress as cp
from cachepress.cache import host, offloading
from cachepress.cache.batch import compressed_layers
from cachepress.cache.offloading import OffloadedLayer
from cachepress.hf import cache_argument
from tests.bounds import close
from tests.laws.presses import LAYERS
from tests.placed import MOVES, devices, spread
from tests.tiny import exact_tiny, tokens

KNORM = cp.KnormPress(0.5)
PRESSES = {
    "even": KNORM,
    "uneven": cp.AdaKVPress(KNORM),
    "in few bits": cp.KIVIPress(cp.AdaKVPress(KNORM), bits=4, residual=3),
    "by page": cp.QuestPress(cp.KnormPress(0.0), pages=1, skip_layers=0),
    "thin": cp.ComposedPress([cp.ThinKPress(0.5, window_size=6), KNORM]),
    "with a number of each token": cp.H2OPress(0.5),
    "whole": cp.KnormPress(0.0),
}
OVER = ("meta:0", "meta:1")
STEPS, CPU = 3, torch.device("cpu")


class Traced:
    """What happens to the segments of a cache, by the number of its layer, in order.

    Attributes:
        events: ``("reached", layer)``, ``("kept", copies to the host)``, ``("there", layer)``.
        most: layers of which segments were on a device at once, at most.
        there: the segments that are on a device.
    """

    def __init__(self, monkeypatch) -> None:
        self.events: list[tuple[str, int]] = []
        self.layers: list[OffloadedLayer] = []
        self.there: dict[int, WeakSet] = {}
        self.most = 0
        append, keep, start = OffloadedLayer._append, offloading.to_host, host.Transfer.__init__

        def appended(layer, *new):
            if layer not in self.layers:
                self.layers.append(layer)
            self.events.append(("reached", self.layers.index(layer)))
            append(layer, *new)

        def kept(segment, device):
            before = len(MOVES)
            made = keep(segment, device)
            if made is not segment:
                moved = [there for _, there, _ in MOVES[before:]]
                assert moved == [CPU] * len(moved)
                self.events.append(("kept", len(moved)))
            return made

        def started(transfer, segments, device, ahead):
            start(transfer, segments, device, ahead)
            (place,) = (i for i, x in enumerate(self.layers) if set(segments) <= set(x._segments))
            self.events.append(("there", place))
            made = list(transfer._there.values())
            assert {x.device for one in made for x in one.tensors()} == {device}
            self.there.setdefault(place, WeakSet()).update(made)
            self.most = max(self.most, sum(bool(x) for x in self.there.values()))

        monkeypatch.setattr(OffloadedLayer, "_append", appended)
        monkeypatch.setattr(offloading, "to_host", kept)
        monkeypatch.setattr(host.Transfer, "__init__", started)


def run(model, press, device, offload):
    """Logits of some decoded tokens."""
    cache = DynamicCache()
    cp.prefill(model, tokens(60).to(device), press, cache, offload=offload)
    yield cache
    for seed in range(STEPS):
        ids = tokens(1, seed=seed).to(device)
        with torch.no_grad():
            yield model(ids, **{cache_argument(model): cache}).logits.cpu()


@pytest.mark.parametrize("press", PRESSES.values(), ids=list(PRESSES))
def test_segments_move_once_there_and_once_in_a_forward(press, monkeypatch):
    _, *wanted = run(exact_tiny(), press, "cpu", offload=False)
    MOVES.clear()
    with devices():
        steps, traced = run(spread(exact_tiny(), OVER), press, OVER[0], True), Traced(monkeypatch)
        cache = next(steps)
        layers = compressed_layers(cache)
        assert traced.layers == layers
        copies = [[x for s in layer._segments for x in tensors(s)] for layer in layers]
        n = [len(layer._segments) for layer in layers]
        events = iter(traced.events)
        for i, (of_layer, copied) in enumerate(zip(n, copies, strict=True)):
            # It has left before the next layer is reached.
            assert next(events) == ("reached", i)
            found = [next(events) for _ in range(of_layer)]
            assert [name for name, _ in found] == ["kept"] * of_layer
            assert sum(number for _, number in found) == len(copied)
        assert not list(events)
        for i, layer in enumerate(layers):
            place = torch.device(OVER[i >= LAYERS // 2])
            assert all(x.device == CPU for x in layer.host_tensors())
            assert {s.packed.layout.device for s in layer._segments} == {place}
        for logits in wanted:
            traced.events.clear()
            MOVES.clear()
            close(next(steps), logits)
            order = [("reached", 0), ("there", 0)]
            for i in range(1, LAYERS):
                order += [("there", i), ("reached", i)]
            assert traced.events == order
            assert not any(traced.there.values())
            # No keys and values come back to the host.
            assert not [shape for _, there, shape in MOVES if there == CPU and len(shape) > 3]
        assert traced.most == 2


def tensors(segment):
    """The numbers of a segment, without its index."""
    index = {id(x) for x in [*segment.layout.tensors(), *segment.packed.layout.tensors()]}
    return [x for x in segment.tensors() if id(x) not in index]


def test_what_is_read_outside_of_a_forward_leaves_nothing_there(monkeypatch):
    with devices():
        steps, traced = run(spread(exact_tiny(), OVER), KNORM, OVER[0], True), Traced(monkeypatch)
        layers = compressed_layers(next(steps))
        held = [layer.keys.cpu() for layer in layers]
        assert traced.events[-LAYERS:] == [("there", i) for i in range(LAYERS)]
        assert not any(traced.there.values()) and traced.most == 1
        assert {x.shape for x in held} == {(1, 2, 30, 8)}


def test_copies_are_prefetched_as_well(monkeypatch):
    with devices():
        model = spread(exact_tiny(), OVER)
        steps, traced = run(model, KNORM, OVER[0], True), Traced(monkeypatch)
        cache = next(steps)
        copied = cp.fork(cache)
        traced.layers[:] = compressed_layers(copied)
        traced.events.clear()
        with torch.no_grad():
            model(tokens(1).to(OVER[0]), **{cache_argument(model): copied})
        assert [i for name, i in traced.events if name == "there"] == list(range(LAYERS))
        assert traced.events[:3] == [("reached", 0), ("there", 0), ("there", 1)]
        assert traced.most == 2


def test_of_a_forward_that_ends_early_the_layer_that_was_ahead_is_used_by_the_next(monkeypatch):
    with devices():
        model = spread(exact_tiny(), OVER)
        steps, traced = run(model, KNORM, OVER[0], True), Traced(monkeypatch)
        cache = next(steps)
        traced.events.clear()

        class Ended(Exception):
            pass

        def end(*_):
            raise Ended

        heard = model.get_decoder().layers[1].register_forward_pre_hook(end)
        branch = cp.fork(cache)
        traced.layers[:] = compressed_layers(branch)
        name = cache_argument(model)
        with torch.no_grad(), pytest.raises(Ended):
            model(tokens(1).to(OVER[0]), **{name: branch})
        heard.remove()
        assert traced.events == [("reached", 0), ("there", 0), ("there", 1)]
        assert [i for i, x in enumerate(traced.layers) if x._prefetch.ahead is not None] == [1]
        ahead = traced.layers[1]._prefetch.ahead.tensors()
        assert all(any(x is y for y in traced.layers[1].tensors()) for x in ahead)
        assert traced.layers[1].keys.shape == (1, 2, 30, 8)
        assert traced.layers[1]._prefetch.ahead is None
        assert len([name for name, _ in traced.events if name == "there"]) == 2
