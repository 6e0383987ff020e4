"""Which ``with press(model)`` acts on a forward, in threads, tasks and generators."""

import asyncio
import contextvars
import logging
import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

import cachepress as cp
from cachepress.cache.batch import compressed_layers
from tests.tiny import tiny, tokens

N = 60
PRESSES = [
    cp.KnormPress(0.5),
    cp.KeyDiffPress(0.75),
    cp.StreamingLLMPress(0.25),
    cp.ExpectedAttentionPress(0.5),
    cp.CriticalKVPress(cp.SnapKVPress(0.8, window_size=8)),
    cp.AdaKVPress(cp.SnapKVPress(0.7, window_size=8), scope="model"),
]
TEXTS = [tokens(N, seed=seed) for seed in range(5)]


class Interrupted(BaseException):
    """Is raised inside a forward, as Ctrl-C is."""


class Interrupting:
    """Raises in a layer of a model, in the threads that asked for it."""

    def __init__(self, module):
        self.wanted = threading.local()
        module.register_forward_pre_hook(self)

    def __call__(self, *_):
        if getattr(self.wanted, "next", False):
            self.wanted.next = False
            raise Interrupted


@pytest.fixture
def switching():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def read(model, ids) -> DynamicCache:
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
    return cache


def pressed(model, press, ids) -> DynamicCache:
    with press(model):
        return read(model, ids)


def kept(cache) -> object:
    """The positions that a cache holds; "all" where nothing was compressed."""
    layers = compressed_layers(cache)
    return [layer.positions.tolist() for layer in layers] if layers else "all"


def answer(model, cache) -> list[int]:
    ids = torch.tensor([[7]])
    found = []
    with torch.no_grad():
        for _ in range(4):
            ids = model(input_ids=ids, past_key_values=cache).logits[:, -1:].argmax(-1)
            found.append(int(ids))
    return found


def held(cache) -> int | str:
    layers = compressed_layers(cache)
    return int(layers[0].lengths[0, 0]) if layers else "all"


def test_300_calls_in_threads_each_get_their_own_press_or_none(switching):
    """Own blocks, prefills, plain requests, decoding and interrupts, beside each other."""
    model = tiny()
    interrupting = Interrupting(model.model.layers[1])
    wanted = {
        (p, t): kept(pressed(model, PRESSES[p], TEXTS[t])) for p in range(6) for t in range(5)
    }
    caches = {key: pressed(model, PRESSES[key[0]], TEXTS[key[1]]) for key in wanted}
    answers = {key: answer(model, cp.fork(cache)) for key, cache in caches.items()}

    def call(number: int) -> bool:
        rng = random.Random(number)
        key = p, t = rng.randrange(6), rng.randrange(5)
        kind = number % 6
        if kind == 0:
            return kept(pressed(model, PRESSES[p], TEXTS[t])) == wanted[key]
        if kind == 1:
            return kept(cp.prefill(model, TEXTS[t], PRESSES[p], chunk_size=25)) == wanted[key]
        if kind == 2:
            return kept(read(model, TEXTS[t])) == "all"
        if kind == 3:
            return answer(model, cp.fork(caches[key])) == answers[key]
        if kind == 4:
            with PRESSES[p](model):
                inner = kept(pressed(model, PRESSES[(p + 1) % 6], TEXTS[t]))
                return (
                    inner == wanted[(p + 1) % 6, t] and kept(read(model, TEXTS[t])) == wanted[key]
                )
        with PRESSES[p](model):
            interrupting.wanted.next = True
            with pytest.raises(Interrupted):
                read(model, TEXTS[t])
            return kept(read(model, TEXTS[t])) == wanted[key]

    with ThreadPoolExecutor(6) as pool:
        right = list(pool.map(call, range(300)))
    assert sum(right) == 300
    caches.clear()
    assert type(model.config._attn_implementation) is str
    assert "forward" not in vars(model.model)


def test_gradients_of_a_context_that_is_repeated_are_those_of_its_own_thread(switching):
    model, press = tiny(), cp.KVgradPress(0.5)
    wanted = [kept(pressed(model, press, ids)) for ids in TEXTS]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: kept(pressed(model, press, TEXTS[i % 5])), range(40)))
    assert found == [wanted[i % 5] for i in range(40)]


def test_threads_under_one_block_of_the_main_thread_are_compressed_by_it(switching):
    model, press = tiny(), PRESSES[0]
    wanted = [kept(pressed(model, press, ids)) for ids in TEXTS]
    with press(model), ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: kept(read(model, TEXTS[i % 5])), range(60)))
    assert found == [wanted[i % 5] for i in range(60)]


def test_generate_in_a_helper_thread_is_compressed_by_the_main_threads_block():
    model, found = tiny(), []

    def stream():
        options = {"max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True}
        found.append(model.generate(TEXTS[0], **options).past_key_values)

    with PRESSES[0](model):
        thread = threading.Thread(target=stream)
        thread.start()
        thread.join()
    assert held(found[0]) == N // 2 + 1


def test_a_block_of_another_thread_never_acts_and_one_line_says_so(caplog):
    model, entered, done = tiny(), threading.Event(), threading.Event()

    def hold():
        with PRESSES[0](model):
            entered.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    with caplog.at_level(logging.WARNING, "cachepress"):
        thread.start()
        entered.wait(60)
        plain = [kept(read(model, TEXTS[0])) for _ in range(3)]
        with ThreadPoolExecutor(1) as pool:
            plain.append(pool.submit(lambda: kept(read(model, TEXTS[0]))).result())
        done.set()
        thread.join()
    assert plain == ["all"] * 4
    assert [record.message.count("copy_context().run") for record in caplog.records] == [1]


def test_decoding_from_a_compressed_cache_is_nothing_to_tell_of(caplog):
    model = tiny()
    cache = pressed(model, PRESSES[0], TEXTS[0])
    context = PRESSES[1](model)
    thread = threading.Thread(target=context.__enter__)
    with caplog.at_level(logging.WARNING, "cachepress"):
        thread.start()
        thread.join()
        answer(model, cache)
        assert not caplog.records
        read(model, TEXTS[0])
    context.__exit__(None, None, None)
    assert len(caplog.records) == 1


def test_what_copies_the_context_of_a_thread_is_compressed_by_its_block():
    model, found = tiny(), []

    def request():
        with PRESSES[0](model):
            run = partial(contextvars.copy_context().run, lambda: held(read(model, TEXTS[0])))
            with ThreadPoolExecutor(1) as pool:
                found.append(pool.submit(run).result())

    thread = threading.Thread(target=request)
    thread.start()
    thread.join()
    assert found == [N // 2]


def test_tasks_that_interleave_each_have_their_own_press_or_none():
    model = tiny()

    async def one(press, pause) -> int | str:
        if press is None:
            await asyncio.sleep(pause)
            return held(read(model, TEXTS[0]))
        with press(model):
            await asyncio.sleep(pause)
            first = held(read(model, TEXTS[0]))
            await asyncio.sleep(pause)
            in_a_thread = await asyncio.to_thread(lambda: held(read(model, TEXTS[0])))
        assert first == in_a_thread
        return first

    async def together() -> list[int | str]:
        rng = random.Random(0)
        presses = [cp.KnormPress(ratio) for ratio in (0.5, 0.75, 0.9)]
        jobs = [one([None, *presses][i % 4], rng.random() / 100) for i in range(40)]
        return await asyncio.gather(*jobs)

    assert asyncio.run(together()) == ["all", 30, 15, 6] * 10


def test_a_thread_cannot_tell_which_of_two_tasks_blocks_is_meant(caplog):
    model = tiny()

    async def hold(ratio, others: asyncio.Barrier) -> None:
        with cp.KnormPress(ratio)(model):
            await others.wait()
            await others.wait()

    async def together() -> int | str:
        barrier, loop = asyncio.Barrier(3), asyncio.get_running_loop()
        tasks = [asyncio.create_task(hold(ratio, barrier)) for ratio in (0.5, 0.9)]
        await barrier.wait()
        found = await loop.run_in_executor(None, lambda: held(read(model, TEXTS[0])))
        await barrier.wait()
        await asyncio.gather(*tasks)
        return found

    with caplog.at_level(logging.WARNING, "cachepress"):
        assert asyncio.run(together()) == "all"
    assert len(caplog.records) == 1


def test_generators_may_be_left_in_any_order():
    model = tiny()

    def block(ratio):
        with cp.KnormPress(ratio)(model):
            yield

    first, second, third = block(0.5), block(0.75), block(0.9)
    found = []
    for generator in (first, second, third):
        next(generator)
        found.append(held(read(model, TEXTS[0])))
    second.close()
    found.append(held(read(model, TEXTS[0])))
    third.close()
    found.append(held(read(model, TEXTS[0])))
    first.close()
    found.append(held(read(model, TEXTS[0])))
    assert found == [30, 15, 6, 6, 30, "all"]


def test_a_block_that_another_thread_leaves_is_over():
    model = tiny()
    context = PRESSES[0](model)
    context.__enter__()
    thread = threading.Thread(target=context.__exit__, args=(None, None, None))
    thread.start()
    thread.join()
    assert held(read(model, TEXTS[0])) == "all"
    assert "forward" not in vars(model.model)


def test_one_context_entered_again_acts_once_until_its_outermost_exit():
    model = tiny()
    context, other = PRESSES[0](model), cp.KnormPress(0.9)(model)
    found = []
    with context:
        with context:
            found.append(held(read(model, TEXTS[0])))
        found.append(held(read(model, TEXTS[0])))
        with other, context:
            found.append(held(read(model, TEXTS[0])))
        with other:
            found.append(held(read(model, TEXTS[0])))
        found.append(held(read(model, TEXTS[0])))
    found.append(held(read(model, TEXTS[0])))
    assert found == [30, 30, 30, 6, 30, "all"]


def test_one_context_may_be_entered_by_several_threads(switching):
    model = tiny()
    context = PRESSES[0](model)

    def request(i: int) -> int | str:
        with context:
            return held(read(model, TEXTS[i % 5]))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(request, range(40))) == [30] * 40
    assert held(read(model, TEXTS[0])) == "all"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt, Interrupted])
@pytest.mark.parametrize("place", ["model.layers.1", "model.norm", "lm_head"])
def test_an_error_in_a_forward_leaves_nothing_behind(error, place):
    model = tiny()
    with PRESSES[4](model):
        hook = model.get_submodule(place).register_forward_pre_hook(
            lambda *_: (_ for _ in ()).throw(error("here"))
        )
        cache = DynamicCache()
        with pytest.raises(error), torch.no_grad():
            model(input_ids=TEXTS[0], past_key_values=cache)
        hook.remove()
        if place == "model.layers.1":
            with pytest.raises(cp.CachepressError, match="forward that did not end"):
                model(input_ids=TEXTS[0], past_key_values=cache)
        assert kept(read(model, TEXTS[0])) == kept(pressed(tiny(), PRESSES[4], TEXTS[0]))
    assert kept(read(model, TEXTS[0])) == "all"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_error_in_a_score_leaves_nothing_behind():
    class Broken(cp.ScorerPress):
        def score(self, view):
            if view.layer:
                raise RuntimeError("no score")
            return view.keys.norm(dim=-1)

    model = tiny()
    with PRESSES[0](model):
        with pytest.raises(RuntimeError, match="no score"), Broken(0.5)(model):
            read(model, TEXTS[0])
        assert held(read(model, TEXTS[0])) == 30


def test_a_checkpointed_forward_is_compressed_again_in_the_backward():
    """The forward is run a second time, by the thread that runs the backward."""
    model, lengths = tiny(), []

    def run(embeds):
        cache = DynamicCache()
        out = model(inputs_embeds=embeds, past_key_values=cache).logits
        lengths.append(held(cache))
        return out

    embeds = model.get_input_embeddings()(TEXTS[0]).detach().requires_grad_()
    with PRESSES[0](model):
        loss = checkpoint(run, embeds, use_reentrant=True).sum()
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
    assert lengths == [30, 30]


def test_a_press_without_a_model_says_what_to_write():
    said = r"got KnormPress\(compression_ratio=0.5\) without a model: write `with press\(model\):`"
    with pytest.raises(cp.CachepressError, match=said), cp.KnormPress(0.5):
        pytest.fail("entered")


def test_another_press_inside_a_block_names_what_composes_them_once(caplog):
    model, outer, inner = tiny(), cp.KnormPress(0.5), cp.RandomPress(0.25, seed=7)
    with outer(model):
        with outer(model):
            assert caplog.text == ""
        for _ in range(2):
            with inner(model):
                cache = DynamicCache()
                model(tokens(20), past_key_values=cache)
    with inner(model), outer(tiny()):
        pass
    (record,) = caplog.records
    assert f"{inner!r} is entered inside the block of {outer!r}" in record.getMessage()
    assert f"write ComposedPress([{outer!r}, {inner!r}])" in record.getMessage()
    assert {int(n) for layer in compressed_layers(cache) for n in layer.lengths.flatten()} == {15}


@pytest.mark.parametrize(("given", "got"), [("gpt2", "'gpt2'"), (dict, "the class dict")])
def test_what_is_no_model_is_refused(given, got):
    with pytest.raises(cp.UnsupportedError, match=f"got {got}, wanted a transformers PreTrained"):
        cp.prefill(given, tokens(5))
