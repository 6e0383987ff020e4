"""A pressed model is an ordinary model: copied, pickled, compiled, in the block and after it."""

import copy
import functools
import gc
import inspect
import io
import pickle
import subprocess
import sys

import pytest
import torch
from transformers import DynamicCache

import cachepress as cp
from cachepress.cache.batch import compressed_layers
from cachepress.hf import cache_argument, session
from cachepress.hf.around import Around, put_around, take_away
from tests.tiny import tiny, tokens
from tests.tiny_cache import forward, pressed

PRESS = cp.CriticalKVPress(cp.ExpectedAttentionPress(0.5))
IDS = tokens(20)


def states(model):
    """The model in a block, with a compressed cache that lives, and after both."""
    with PRESS(model):
        cache = DynamicCache()
        forward(model, cache, input_ids=IDS)
        yield "in the block"
    yield "with a compressed cache"
    assert compressed_layers(cache)
    del cache
    yield "after"


def is_plain(model) -> bool:
    plain = all("forward" not in vars(m) and "generate" not in vars(m) for m in model.modules())
    return plain and type(model.config._attn_implementation) is str


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_copies_and_pickles_are_models_that_were_never_pressed(attention):
    model = tiny()
    model.set_attn_implementation(attention)
    wanted = forward(model, input_ids=IDS).logits
    for state in states(model):
        data = pickle.dumps(model)
        assert b"cachepress.hf" not in data, state
        for other in (copy.deepcopy(model), pickle.loads(data)):
            assert all(type(m.forward).__name__ == "method" for m in other.modules()), state
            assert type(other.config._attn_implementation) is str
            assert other.config._attn_implementation == attention
            assert torch.equal(forward(other, input_ids=IDS).logits, wanted)
            cache = pressed(other, PRESS, IDS)
            assert compressed_layers(cache)[0].lengths.tolist() == [[10, 10]]
            assert torch.equal(forward(model, input_ids=IDS).logits, wanted)
    assert is_plain(model)


def test_a_pickle_needs_no_cachepress():
    model, file = tiny(), io.BytesIO()
    with PRESS(model):
        torch.save(model, file)
    code = (
        "import io, sys, torch; sys.modules['cachepress'] = None\n"
        "model = torch.load(io.BytesIO(sys.stdin.buffer.read()), weights_only=False)\n"
        "print(model(torch.tensor([[5, 6, 7]])).logits.sum().item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=file.getvalue(), capture_output=True, check=True
    )
    wanted = forward(model, input_ids=torch.tensor([[5, 6, 7]])).logits.sum()
    assert float(done.stdout) == pytest.approx(float(wanted), rel=1e-4)


def test_a_compressed_cache_that_lives_keeps_only_its_own_models_function_selected():
    model, other = tiny(), tiny()
    cache = pressed(model, PRESS, IDS)
    assert type(model.config._attn_implementation) is not str
    assert is_plain(other)
    branch = cp.fork(cache, 3)
    del cache
    assert forward(model, branch, input_ids=tokens(1).expand(3, 1)).logits.isfinite().all()
    del branch
    assert is_plain(model)


def test_two_models_of_one_config_share_what_is_selected():
    model = tiny()
    other = type(model)(model.config).eval()
    caches = [pressed(m, PRESS, IDS) for m in (model, other)]
    wanted = forward(other, cp.fork(caches[1]), input_ids=tokens(1)).logits
    del caches[0]
    assert torch.equal(forward(other, caches[0], input_ids=tokens(1)).logits, wanted)
    caches.clear()
    assert is_plain(model)
    assert is_plain(other)


def test_the_name_of_the_function_reads_as_before_in_every_state():
    model = tiny()
    for state in states(model):
        name = model.config._attn_implementation
        assert name == "sdpa", state
        assert name in ("eager", "sdpa")
        assert name != "eager"
        assert "sdpa" in name
        assert f"{name}" == "sdpa"
        assert "_attn_implementation" not in model.config.to_json_string()


def test_the_signature_stays_in_the_block():
    model = tiny()
    wanted = [inspect.signature(f) for f in (model.forward, model.model.forward, model.generate)]
    with PRESS(model):
        found = [inspect.signature(f) for f in (model.forward, model.model.forward, model.generate)]
        assert model.forward.__name__ == "forward"
    assert found == wanted


@pytest.mark.parametrize("outer_leaves_first", [False, True])
def test_another_wrapper_around_the_forward_stays(outer_leaves_first):
    """As accelerate puts one, before the block or in it."""
    model, calls = tiny(), []
    own = model.model.forward

    def wrapper(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    if outer_leaves_first:
        with PRESS(model):
            own = model.model.forward
            model.model.forward = wrapper
    else:
        model.model.forward = wrapper
        with PRESS(model):
            pass
    assert model.model.forward is wrapper
    calls.clear()  # Those in which the model was tried out.
    cache = pressed(model, PRESS, IDS)
    assert compressed_layers(cache)[0].lengths.tolist() == [[10, 10]]
    assert model.model.forward is wrapper
    assert len(calls) == 1


def test_a_forward_that_is_put_back_in_the_block_is_told_of():
    """As accelerate does where it removes a hook that was there before the block."""
    model = tiny()
    own = model.model.forward
    model.model.forward = functools.wraps(own)(lambda *args, **kwargs: own(*args, **kwargs))
    with pytest.raises(cp.CachepressError, match="was replaced while"), PRESS(model):
        forward(model, input_ids=IDS)
        model.model.forward = own
        forward(model, input_ids=IDS)


def test_a_function_is_put_around_once_and_taken_away_by_the_last():
    def passing(call):
        return call.run()

    module, users = torch.nn.Linear(2, 2), [object(), object()]
    first, second = (put_around(module, "forward", passing, user) for user in users)
    assert first is second
    for _ in range(2):
        take_away(module, "forward", first, users[0])
        assert isinstance(module.forward, Around)
    take_away(module, "forward", first, users[1])
    assert "forward" not in vars(module)


@pytest.mark.parametrize("step", ["enter", "put_around", "leave", "take_away"])
@pytest.mark.parametrize("after", [False, True])
def test_an_interrupt_while_a_block_is_entered_or_left_leaves_nothing(step, after, monkeypatch):
    model, real, calls = tiny(), getattr(session, step), []
    with PRESS(model):
        pass

    def interrupted(*args):
        calls.append(1)
        found = real(*args) if after or len(calls) > 1 else None
        if len(calls) == 1:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(session, step, interrupted)
    with pytest.raises(KeyboardInterrupt), PRESS(model):
        pass
    gc.collect()
    cache = DynamicCache()
    forward(model, cache, input_ids=IDS)
    assert not compressed_layers(cache)
    if (step, after) != ("put_around", True):
        assert is_plain(model)


def test_a_compiled_model_is_whole_again_after_the_block():
    model = tiny()
    with PRESS(model):
        forward(model, input_ids=IDS)
    wanted = forward(model, input_ids=IDS, use_cache=False).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(forward(compiled, input_ids=IDS, use_cache=False).logits, wanted)


@torch.no_grad()
def test_a_model_that_was_compiled_before_the_block_is_pressed_in_it():
    model = tiny()
    torch._dynamo.reset()
    compiled, name = torch.compile(model, backend="eager"), cache_argument(model)
    caches = [DynamicCache(config=model.config) for _ in range(3)]
    compiled(input_ids=IDS, **{name: caches[0]})
    with PRESS(model):
        compiled(input_ids=IDS, **{name: caches[1]})
    compiled(input_ids=IDS, **{name: caches[2]})
    assert [len(compressed_layers(cache)) for cache in caches] == [0, 4, 0]
    assert compressed_layers(caches[1])[0].lengths.tolist() == [[10, 10]]
