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
from cachepress.evaluation.answering import Answerer
from cachepress.evaluation.config import EvaluationConfig
from cachepress.evaluation.registry import find_dataset, find_metric
from cachepress.evaluation.run import Run, say_versions
from cachepress.evaluation.samples import Context, contexts_of, load_table
from cachepress.fingerprint import loaded_digests
from cachepress.models.loading import load, load_tokenizer, resolve

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
        self.run = Run(config)
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
        with self.run.held():
            self.run.check_folder()
            table = self._load_and_prepare_dataset()
            contexts = contexts_of(table)
            self.run.identify(*self._what_answers())
            self.run.adopt(contexts)
            say_versions([self.run], contexts)
            if all(map(self.run.has, contexts)):
                logger.info("already done: %s (--overwrite to do it again)", self.results_dir)
                return self._save_results(table, contexts)
            reader = self._setup_model_pipeline()
            for reason in reader.check([self.run], contexts).values():
                raise CachepressError(reason)
            self.run.begin()
            self._run_inference(reader, contexts)
            return self._save_results(table, contexts)

    def _what_answers(self) -> tuple[dict[str, str], str]:
        """Digests of the model, and its name."""
        config = self.config
        if self._model is not None:
            return loaded_digests(*self._model), model_name(self._model[0])
        return model_digests(config.model, config.model_kwargs), resolve(config.model)

    def _setup_model_pipeline(self) -> Answerer:
        config = self.config
        if self._model is None:
            self._model = load(
                config.model,
                dtype=config.dtype,
                device=config.device,
                model_kwargs=config.loading,
            )
        return Answerer(*self._model)

    def _load_and_prepare_dataset(self) -> pd.DataFrame:
        config = self.config
        if self._model is not None:
            return load_table(config, self._model[1])
        return load_table(config, load_tokenizer(config.model, config.loading))

    def _run_inference(self, reader: Answerer, contexts: Sequence[Context]) -> None:
        """Answer context by context; what is on disk already is not computed again."""
        run, total = self.run, len(contexts)
        left = [context for context in contexts if not run.has(context)]
        done = total - len(left)
        if done:
            logger.info("resuming: %d of %d contexts are done", done, total)
        scores = [x for context in contexts if run.has(context) for x in run.scores(context)]
        with tqdm(total=total, initial=done, unit="context", disable=self._quiet) as bar:
            for context in left:
                run.save(context, reader.alone(run, context))
                scores += run.scores(context)
                judged = [x for x in scores if not math.isnan(x)]
                if judged:
                    bar.set_postfix_str(f"score {statistics.fmean(judged):.3f}", refresh=False)
                bar.update()

    def _save_results(self, table: pd.DataFrame, contexts: list[Context]) -> dict:
        return self.run.write_views(self.run.predictions(table, contexts))
