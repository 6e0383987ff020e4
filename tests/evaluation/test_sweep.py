"""A sweep: the answers of separate runs, from one prefill of a context; resumed by sample."""

import csv
import json
from pathlib import Path

import cachepress as cp
from cachepress.evaluation import EvaluationConfig, EvaluationRunner
from cachepress.evaluation.cell import METRICS, PREDICTIONS
from cachepress.evaluation.sweep import SweepConfig, run_sweep

PRESSES = (
    "knorm",
    "SnapKVPress(window_size=6)",
    "AdaKVPress(SnapKVPress(0.5, window_size=6))",
    "KIVIPress(KnormPress(0.5), residual=5)",
    "KVzipPress(chunk_size=16)",
    "FinchPress(split_size=1)" if hasattr(cp.FinchPress, "split_size") else "finch",
    "DecodingPress(KnormPress(), 2, 20)",
    "QuestPress(KnormPress(0.25), pages=1)",
    "think",
)


def sweep(model_dir, data_file, folder, **changes):
    options = {"output_dir": str(folder), "device": "cpu", **changes.pop("options", {})}
    config = {"presses": PRESSES, "ratios": (0.5, 0.75), "datasets": [data_file]}
    config |= {"models": [model_dir], "batch_size": 8, **changes}
    return SweepConfig(**config, options=options)


def rows_of(folder):
    return {
        path.parent.name: list(csv.DictReader(path.open()))
        for path in sorted(Path(folder).glob(f"*/{PREDICTIONS}"))
    }


def test_the_answers_are_those_of_separate_runs(model_dir, data_file, tmp_path):
    results = run_sweep(sweep(model_dir, data_file, tmp_path / "sweep"), quiet=True)
    cells = [result.cell for group in results for result in group]
    assert len(cells) == 1 + 2 * 8 + 1  # The decoding press has no ratio.
    for cell in cells:
        config = {**vars(cell.config), "output_dir": str(tmp_path / "apart")}
        metrics = EvaluationRunner(EvaluationConfig(**config), quiet=True).run_evaluation()
        ours = json.loads((cell.folder / METRICS).read_text())
        assert ours["score"] == metrics["score"]
        for name in ("compression_ratio", "cache_bytes_after", "context_tokens", "query_aware"):
            assert ours[name] == metrics[name], (cell.label, name)
    assert rows_of(tmp_path / "sweep") == rows_of(tmp_path / "apart")
