"""The run of an evaluation: one prefill a context, every answer on disk as soon as it is there."""

import logging
import math
import statistics
from collections.abc import Sequence

import pandas as pd
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cachepress.artefacts import model_name
from cachepress.digests import model_digests
from cachepress.errors import CachepressError
from cachepress.evaluation.cell import Cell, say_versions
from cachepress.evaluation.config import EvaluationConfig
from cachepress.evaluation.reader import Reader
from cachepress.evaluation.registry import find_dataset, find_metric
from cachepress.evaluation.samples import Context, contexts_of, load_table
from cachepress.fingerprint import loaded_digests
from cachepress.models import load, load_tokenizer, resolve

logger = logging.getLogger(__name__)
Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


class EvaluationRunner:
    """Evaluates one press at one ratio on one data set.

    Args:
        config: what to evaluate.
        model: a loaded model and tokenizer, to share between runs; None to load the config's.
        quiet: no progress bar.
    """

    def __init__(
        self, config: EvaluationConfig, model: Loaded | None = None, quiet: bool = False
    ) -> None:
        self.config, self._model, self._quiet = config, model, quiet
        self.cell = Cell(config)
        self.results_dir = config.get_results_dir()

    def run_evaluation(self) -> dict:
        """Run what is not done yet.

        Returns:
            The metrics, as they stand in metrics.json.

        Raises:
            CachepressError: for every input that cannot work; nothing computed is lost.
        """
        find_dataset(self.config.dataset)
        if self.config.metric is not None:
            find_metric(self.config.metric)
        with self.cell.held():
            self.cell.check_folder()
            table = self._load_and_prepare_dataset()
            contexts = contexts_of(table)
            self.cell.identify(*self._what_answers())
            self.cell.adopt(contexts)
            say_versions([self.cell], contexts)
            if all(map(self.cell.has, contexts)):
                logger.info("already done: %s (--overwrite to do it again)", self.results_dir)
                return self._save_results(table, contexts)
            reader = self._setup_model_pipeline()
            for reason in reader.check([self.cell], contexts).values():
                raise CachepressError(reason)
            self.cell.begin()
            self._run_inference(reader, contexts)
            return self._save_results(table, contexts)

    def _what_answers(self) -> tuple[dict[str, str], str]:
        """Digests of the model, and its name."""
        config = self.config
        if self._model is not None:
            return loaded_digests(*self._model), model_name(self._model[0])
        return model_digests(config.model, config.model_kwargs), resolve(config.model)

    def _setup_model_pipeline(self) -> Reader:
        config = self.config
        if self._model is None:
            self._model = load(
                config.model,
                dtype=config.dtype,
                device=config.device,
                model_kwargs=config.loading,
            )
        return Reader(*self._model)

    def _load_and_prepare_dataset(self) -> pd.DataFrame:
        config = self.config
        if self._model is not None:
            return load_table(config, self._model[1])
        return load_table(config, load_tokenizer(config.model, config.loading))

    def _run_inference(self, reader: Reader, contexts: Sequence[Context]) -> None:
        """Answer context by context; what is on disk already is not computed again."""
        cell, total = self.cell, len(contexts)
        left = [context for context in contexts if not cell.has(context)]
        done = total - len(left)
        if done:
            logger.info("resuming: %d of %d contexts are done", done, total)
        scores = [x for context in contexts if cell.has(context) for x in cell.scores(context)]
        with tqdm(total=total, initial=done, unit="context", disable=self._quiet) as bar:
            for context in left:
                cell.save(context, reader.alone(cell, context))
                scores += cell.scores(context)
                judged = [x for x in scores if not math.isnan(x)]
                if judged:
                    bar.set_postfix_str(f"score {statistics.fmean(judged):.3f}", refresh=False)
                bar.update()

    def _save_results(self, table: pd.DataFrame, contexts: list[Context]) -> dict:
        return self.cell.write_views(self.cell.predictions(table, contexts))
