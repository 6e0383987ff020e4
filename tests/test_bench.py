"""``cachepress bench``: what it reports on a tiny model, and what it refuses."""

import json

import pytest
import torch

import cachepress as cp
from cachepress import measure
from cachepress.bench import BenchOptions, BenchResult, Timing, bench_table, run_bench
from cachepress.cli import main
from cachepress.errors import CachepressError
from cachepress.measure import bytes_of_step, copy_bandwidth
from tests.tiny import tiny, tokens

PAIR = 2 * 8 * 4
"""Bytes of a pair of a tiny model's head in float32."""


def options(model_dir, **more):
    sizes = {"lengths": (60,), "steps": 3, "repeats": 2, "ratios": (0.5,)}
    return BenchOptions(model=model_dir, **{**sizes, **more})


def test_every_press_and_context_is_timed_and_weighed(model_dir):
    result = run_bench(
        options(model_dir, presses=("knorm", "AdaKVPress(KnormPress())")), quiet=True
    )
    cells = result.cells
    assert [c.press.split("(")[0] for c in cells] == ["no_press", "KnormPress", "AdaKVPress"]
    for cell in cells:
        assert [len(getattr(cell, k)) for k in ("prefill", "scoring", "decode")] == [2, 2, 6]
        assert min(cell.prefill) > 0 and min(cell.decode) > 0
    assert cells[0].scoring == [0, 0]
    assert 0 < cells[1].scoring[0] < cells[1].prefill[0]
    assert cells[0].held == 4 * 2 * 60 * PAIR
    assert cells[1].held == 4 * 2 * 32 * (PAIR + 4)
    assert [c.read - cells[0].read for c in cells] == [0, *2 * (-4 * 2 * 30 * PAIR,)]
    assert result.copy > 0
    assert result.options["lengths"] == (60,)
    assert "LlamaForCausalLM" in bench_table(result)


def test_the_last_column_is_the_bandwidth_of_a_step_as_a_share_of_that_of_a_copy():
    cell = Timing("knorm", 60, 1, 1, [1.0], [0.5], [0.2, 0.1, 0.3], read=3 * 10**9)
    assert cell.bandwidth == 15e9
    table = bench_table(BenchResult("a machine", {}, [cell], copy=60e9))
    heading, _, line = table.splitlines()[2:]
    assert heading.endswith("% of copy") and line.split()[-1] == "25"
    assert table.startswith("a machine; a copy moves 60 GB/s\n")


def test_a_step_reads_the_weights_and_the_pairs_that_are_held():
    model, ids = tiny(), tokens(60)
    weights = 4 * (sum(x.numel() for x in model.parameters()) - 97 * 32)

    def pairs(cache):
        return bytes_of_step(model, cache) - weights

    half = cp.prefill(model, ids, cp.KnormPress(0.5))
    assert pairs(cp.prefill(model, ids)) == 4 * 2 * 60 * PAIR
    assert pairs(half) == 4 * 2 * 30 * PAIR
    # A fork shares its pairs with the others: a page of 32 slots for each head, with positions.
    assert pairs(cp.fork(half, 5)) == 4 * 2 * 32 * (PAIR + 4)
    packed = cp.prefill(model, ids, cp.KnormPress(0.0), storage="int8")
    assert pairs(packed) == cp.size_of(packed).bytes_after
    long = cp.prefill(model, tokens(200), cp.QuestPress(pages=1, skip_layers=1))
    # Of 7 pages of a head the bounds are read, each as large as a pair, and one page's pairs.
    assert pairs(long) == 2 * PAIR * (200 + 3 * (32 + 7))


def test_a_tied_table_of_embeddings_is_read_as_the_head():
    model = tiny()
    cache = cp.prefill(model, tokens(8))
    before = bytes_of_step(model, cache)
    model.get_output_embeddings().weight = model.get_input_embeddings().weight
    assert bytes_of_step(model, cache) == before


def test_the_bandwidth_of_a_copy_is_that_of_the_best_of_some(monkeypatch):
    taken = iter([4.0, 0.5, 2.0])

    class Stopwatch:
        def __init__(self, device):
            assert device.type == "cpu"

        def __enter__(self):
            self.seconds = next(taken)
            return self

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(measure, "Stopwatch", Stopwatch)
    monkeypatch.setitem(measure.COPIED, "cpu", 1000)
    assert copy_bandwidth(torch.device("cpu"), 3) == 2 * 1000 / 0.5


def test_forks_batches_chunks_and_storage(model_dir):
    forks = run_bench(options(model_dir, presses=("knorm",), forks=(1, 4)), quiet=True).cells
    assert [c.forks for c in forks] == [1, 1, 4, 4]
    both = run_bench(
        options(
            model_dir,
            presses=("knorm",),
            batch_sizes=(2,),
            lengths=(200,),
            prefill_chunk_size=32,
            storage="int8",
            baseline=False,
        ),
        quiet=True,
    ).cells
    assert len(both) == 1
    assert both[0].held < 2 * 4 * 2 * 100 * 68


def test_a_shape_with_random_weights():
    result = run_bench(
        BenchOptions(
            presses=("knorm",), config="smollm2-135m", layers=1, lengths=(32,), steps=1, repeats=1
        ),
        quiet=True,
    )
    assert result.machine.startswith("LlamaForCausalLM of 60M")
    assert result.cells[0].held == 1 * 3 * 32 * 2 * 64 * 4


def test_the_command_prints_a_table_and_writes_json(model_dir, tmp_path, capsys):
    path = tmp_path / "bench.json"
    arguments = ["bench", "--model", model_dir, "--presses", "knorm", "--ratios", "0.5", "0.9"]
    arguments += ["--lengths", "50", "--steps", "2", "--repeats", "1", "--json", str(path)]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "ms a step" in out and "no_press" in out
    assert len(json.loads(path.read_text())["cells"]) == 3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"presses": ("snapvk",)}, "did you mean 'snapkv'"),
        ({"ratios": (1.2,)}, "got 1.2"),
        ({"lengths": (0,)}, "lengths: got 0"),
        ({"steps": 0}, "steps: got 0"),
        ({"storage": "int3"}, "storage: got 'int3'"),
        ({"batch_sizes": (2,), "forks": (2,)}, "give batch size 1"),
        ({"prefill_mode": "online"}, "give a chunk size"),
    ],
)
def test_wrong_options_are_one_clear_line(more, message):
    with pytest.raises(CachepressError, match=message):
        BenchOptions(**more)


def test_a_length_beyond_the_trained_one_must_be_asked_for(model_dir):
    longer = {"lengths": (600,), "presses": ("knorm",), "repeats": 1, "steps": 1}
    with pytest.raises(CachepressError, match="got 600, but the model was trained for 512"):
        run_bench(options(model_dir, **longer), quiet=True)
    asked = options(model_dir, **longer, baseline=False, beyond_trained_length=True)
    result = run_bench(asked, quiet=True)
    assert result.cells[0].length == 600
    assert "nan" not in bench_table(result)


def test_an_unknown_shape_is_refused():
    with pytest.raises(CachepressError, match="config: got 'llama-9', wanted one of llama-3.1-8b"):
        run_bench(BenchOptions(config="llama-9"), quiet=True)
