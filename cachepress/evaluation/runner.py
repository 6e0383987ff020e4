"""The run of an evaluation: one prefill a context, every answer on disk as soon as it is there."""

import hashlib
import json
import logging
import platform
import resource
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
import transformers
import yaml
from filelock import FileLock, Timeout
from tqdm import tqdm
from transformers import pipeline

import cachepress
from cachepress.errors import CachepressError
from cachepress.evaluation.config import EvaluationConfig
from cachepress.evaluation.records import Records, write_atomically
from cachepress.evaluation.registry import METRIC_REGISTRY, find_dataset
from cachepress.evaluation.statistics import estimate
from cachepress.models import load
from cachepress.pipeline import TASK, Answers, PromptOptions, make_prompt
from cachepress.presses import BasePress

logger = logging.getLogger(__name__)
RECORDS, PREDICTIONS, METRICS, CONFIG = (
    "records.jsonl",
    "predictions.csv",
    "metrics.json",
    "config.yaml",
)


class EvaluationRunner:
    """Evaluates one press at one ratio on one data set.

    Args:
        config: what to evaluate.
        model: a loaded model and tokenizer, to share between runs; None to load the config's.
        quiet: no progress bar.
    """

    def __init__(
        self, config: EvaluationConfig, model: tuple | None = None, quiet: bool = False
    ) -> None:
        self.config, self._model, self._quiet = config, model, quiet
        self.results_dir = config.get_results_dir()

    def run_evaluation(self) -> dict:
        """Run what is not done yet.

        Returns:
            The metrics, as they stand in metrics.json.

        Raises:
            CachepressError: for every input that cannot work; nothing computed is lost.
        """
        find_dataset(self.config.dataset)
        self._setup_directories()
        with _only_one(self.results_dir):
            if self.config.overwrite:
                self._remove_results()
            self._check_config()
            if (metrics := self._finished()) is not None:
                logger.info("already done: %s (--overwrite to do it again)", self.results_dir)
                return metrics
            press = self._setup_press()
            pipe = self._setup_model_pipeline()
            table = self._load_and_prepare_dataset(pipe.tokenizer)
            self._check_contexts(pipe, table)
            self.save_config()
            records = self._run_inference(pipe, press, table)
            predictions = self._save_results(table, records)
            return self._calculate_and_save_metrics(predictions, records)

    def _setup_directories(self) -> None:
        self.results_dir.mkdir(parents=True, exist_ok=True)

    def _remove_results(self) -> None:
        for name in (RECORDS, PREDICTIONS, METRICS, CONFIG):
            (self.results_dir / name).unlink(missing_ok=True)

    def _check_config(self) -> None:
        """Refuse to mix the answers of two different configs in one folder."""
        path = self.results_dir / CONFIG
        if not path.exists():
            return
        there = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        here = {**self.config.identity(), **_versions()}
        for name, value in here.items():
            if there.get(name) != value:
                raise CachepressError(
                    f"{path} has {name}={there.get(name)!r} but this run has {value!r}: use "
                    "another --output-dir, or --overwrite to start over"
                )

    def _finished(self) -> dict | None:
        path = self.results_dir / METRICS
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def _setup_press(self) -> BasePress | None:
        return self.config.make_press()

    def _setup_model_pipeline(self) -> transformers.Pipeline:
        config = self.config
        if self._model is None:
            self._model = load(
                config.model,
                dtype=config.dtype,
                device=config.device,
                model_kwargs=config.model_kwargs,
            )
        model, tokenizer = self._model
        return pipeline(TASK, model=model, tokenizer=tokenizer, device=model.device)

    def _load_and_prepare_dataset(
        self, tokenizer: transformers.PreTrainedTokenizerBase
    ) -> pd.DataFrame:
        config = self.config
        table = find_dataset(config.dataset).table(config, tokenizer)
        if config.query_aware:
            table["context"] = table["context"] + "\n" + table["question"]
            table["question"] = ""
        if config.max_new_tokens is not None:
            table["max_new_tokens"] = config.max_new_tokens
        if config.fraction < 1:
            contexts = pd.Series(table["context"].unique())
            count = max(1, round(len(contexts) * config.fraction))
            chosen = set(contexts.sample(count, random_state=config.seed))
            table = table[table["context"].isin(chosen)]
        return table

    def _options(self, group: pd.DataFrame) -> dict[str, object]:
        return {
            "questions": list(group["question"]),
            "answer_prefix": list(group["answer_prefix"]),
            "max_new_tokens": [int(n) for n in group["max_new_tokens"]],
            "max_context_length": self.config.max_context_length,
            "truncation": self.config.truncation,
            "beyond_trained_length": self.config.beyond_trained_length,
        }

    def _check_contexts(self, pipe: transformers.Pipeline, table: pd.DataFrame) -> None:
        """Refuse a context that is too long before the first one is computed."""
        for context, group in table.groupby("context", sort=False):
            try:
                make_prompt(
                    pipe.tokenizer, pipe.model, str(context), PromptOptions(**self._options(group))
                )
            except CachepressError as error:
                raise CachepressError(f"sample {group.index[0]}: {error}") from error

    def _run_inference(
        self, pipe: transformers.Pipeline, press: BasePress | None, table: pd.DataFrame
    ) -> dict[str, dict]:
        """Answer context by context; what is on disk already is not computed again."""
        records = Records(self.results_dir / RECORDS)
        groups = {
            _key(group): (str(context), group)
            for context, group in table.groupby("context", sort=False)
        }
        done = {key: records.done[key] for key in groups if key in records.done}
        scores = [
            score
            for key, record in done.items()
            for score in _scores(record["answers"], groups[key][1])
        ]
        if done:
            logger.info("resuming: %d of %d contexts are done", len(done), len(groups))
        bar = tqdm(total=len(groups), initial=len(done), unit="context", disable=self._quiet)
        with bar:
            for key, (context, group) in groups.items():
                if key in done:
                    continue
                answers = self._answer(pipe, press, context, group)
                done[key] = _record(answers)
                records.append(key, done[key])
                scores += _scores(answers.texts, group)
                bar.set_postfix_str(f"score {statistics.fmean(scores):.3f}", refresh=False)
                bar.update()
        return {key: done[key] for key in groups}

    def _answer(
        self,
        pipe: transformers.Pipeline,
        press: BasePress | None,
        context: str,
        group: pd.DataFrame,
    ) -> Answers:
        names = ("prefill_chunk_size", "prefill_mode", "storage")
        how = {name: getattr(self.config, name) for name in names}
        return pipe(context, press=press, return_stats=True, **how, **self._options(group))["stats"]

    def _save_results(self, table: pd.DataFrame, records: Mapping[str, dict]) -> pd.DataFrame:
        answers: dict[int, str] = {}
        context_of: dict[int, int] = {}
        groups = table.groupby("context", sort=False)
        for number, ((_, group), record) in enumerate(zip(groups, records.values(), strict=True)):
            answers |= dict(zip(group.index, record["answers"], strict=True))
            context_of |= dict.fromkeys(group.index, number)
        table = table.drop(columns="context")
        table["predicted_answer"] = pd.Series(answers)
        table["compression_ratio"] = self.config.ratio
        written = table.assign(
            **{
                name: [json.dumps(texts, ensure_ascii=False) for texts in table[name]]
                for name in ("answer", "choices")
            }
        )
        text = written.to_csv(index_label="sample_id", lineterminator="\n")
        write_atomically(self.results_dir / PREDICTIONS, text)
        return table.assign(context_number=pd.Series(context_of))

    def _calculate_and_save_metrics(
        self, predictions: pd.DataFrame, records: Mapping[str, dict]
    ) -> dict:
        scored = predictions.assign(
            score=_scores(list(predictions["predicted_answer"]), predictions)
        )
        tasks = {
            str(task): asdict(estimate(list(rows["score"]), list(rows["context_number"])))
            for task, rows in scored.groupby("task", sort=False)
        }
        metrics = {
            "metrics": sorted(set(scored["metric"])),
            "query_aware": self.config.query_aware or self.config.sees_question,
            "score": asdict(estimate(list(scored["score"]), list(scored["context_number"]))),
            "tasks": tasks,
            **_costs(list(records.values()), self._model[0].device),
        }
        write_atomically(self.results_dir / METRICS, json.dumps(metrics, indent=2) + "\n")
        return metrics

    def save_config(self) -> None:
        """Write what this run is, with the versions that computed it."""
        place = {name: getattr(self.config, name) for name in ("device", "data_path")}
        values = {**self.config.identity(), **place, **_versions()}
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        write_atomically(self.results_dir / CONFIG, text)


def _versions() -> dict[str, str]:
    return {
        "cachepress_version": cachepress.__version__,
        "torch_version": str(torch.__version__),
        "transformers_version": transformers.__version__,
        "python_version": platform.python_version(),
    }


def _key(group: pd.DataFrame) -> str:
    """What a context's answers depend on, besides the config."""
    columns = ["context", "question", "answer_prefix", "max_new_tokens"]
    rows = json.dumps([[str(i), *map(str, row)] for i, *row in group[columns].itertuples()])
    return hashlib.sha256(rows.encode()).hexdigest()


def _scores(predictions: Sequence[str], rows: pd.DataFrame) -> list[float]:
    columns = zip(predictions, rows["answer"], rows["choices"], rows["metric"], strict=True)
    return [METRIC_REGISTRY[name](text, wanted, of) for text, wanted, of, name in columns]


def _record(answers: Answers) -> dict:
    return {
        "answers": answers.texts,
        "context_tokens": answers.context_tokens,
        "prefill_seconds": answers.prefill_seconds,
        "decode_seconds": answers.decode_seconds,
        "decode_tokens": answers.decode_tokens,
        **asdict(answers.cache),
    }


def _costs(records: list[dict], device: torch.device) -> dict[str, object]:
    """Measured bytes and seconds of all contexts; medians, since a machine is never quiet."""

    def total(name: str) -> float:
        return sum(record[name] for record in records)

    speeds = [r["decode_tokens"] / r["decode_seconds"] for r in records if r["decode_seconds"]]
    return {
        "compression_ratio": 1 - total("rows_held") / total("rows_seen"),
        "cache_bytes_before": total("bytes_before") / len(records),
        "cache_bytes_after": total("bytes_after") / len(records),
        "context_tokens": total("context_tokens") / len(records),
        "prefill_seconds": statistics.median(r["prefill_seconds"] for r in records),
        "decode_tokens_per_second": statistics.median(speeds),
        "peak_memory_bytes": _peak_memory(device),
    }


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Hold the results folder, so that two runs do not write into each other."""
    try:
        with FileLock(folder / ".lock", blocking=False):
            yield
    except Timeout as error:
        raise CachepressError(
            f"another run is writing to {folder}: wait for it, or use another --output-dir"
        ) from error
