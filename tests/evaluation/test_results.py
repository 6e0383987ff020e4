"""metrics.json: what is written is read again, by this version and of earlier ones."""

import json
import math
from pathlib import Path

import pytest

from cachepress.errors import CachepressError
from cachepress.evaluation.results import METRICS, Metrics
from cachepress.evaluation.statistics import Estimate

EARLIER = Path(__file__).parents[1] / "golden" / "version_0.1.0" / "facts__model__knorm__0.50"


def test_metrics_of_0_1_0_are_read_and_written_with_a_schema(tmp_path):
    metrics = Metrics.read(EARLIER)
    assert metrics.score == Estimate(0.0, 0.0, 0.657619772493, 4, 2)
    assert metrics.tasks["hard"].samples == 2 and metrics.reported == {}
    assert metrics.cut_contexts is None and metrics.speeds == (157.6208333127539, None, None)
    metrics.write(tmp_path)
    written = json.loads((tmp_path / METRICS).read_text())
    told = json.loads((EARLIER / METRICS).read_text())
    assert {name: written[name] for name in told} == told
    assert written["schema"] == 1 and next(iter(written)) == "schema"
    assert Metrics.read(tmp_path) == metrics


def test_an_end_that_is_not_known_is_null(tmp_path):
    told = json.loads((EARLIER / METRICS).read_text())
    told["kl"] = {"mean": 0.5, "low": None, "high": math.inf, "samples": 4, "contexts": 1}
    (tmp_path / METRICS).write_text(json.dumps(told))
    kl = Metrics.read(tmp_path).kl
    assert kl.mean == 0.5 and math.isnan(kl.low) and kl.high == math.inf
    assert Metrics.read(tmp_path).to_json()["kl"] == {**told["kl"], "high": None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 2}, "metrics.json: schema: got 2, wanted 1, which this version knows"),
        ({"prefill_seconds": None}, "prefill_seconds is None, wanted a number"),
        ({"prefill_seconds": True}, "prefill_seconds is True, wanted a number"),
        ({"query_aware": 1}, "query_aware is 1, wanted true or false"),
        ({"metrics": "x"}, "metrics is 'x', wanted a list of names"),
        ({"score": 3}, "score is 3, wanted a mapping"),
        ({"score": {"mean": 1}}, "samples is nothing, wanted a whole number"),
        ({"tasks": {"easy": {"mean": "x"}}}, "mean is 'x', wanted a number"),
        ({"reported": {"easy": 1}}, "easy is 1, wanted a mapping"),
        ({"machine": 1}, "machine is 1, wanted a text"),
    ],
)
def test_what_is_not_of_its_type_is_told_in_one_line(tmp_path, changes, message):
    told = json.loads((EARLIER / METRICS).read_text())
    (tmp_path / METRICS).write_text(json.dumps(told | changes))
    with pytest.raises(CachepressError) as caught:
        Metrics.read(tmp_path)
    assert message in str(caught.value) and str(tmp_path / METRICS) in str(caught.value)


def test_a_field_that_lacks_is_told(tmp_path):
    told = json.loads((EARLIER / METRICS).read_text())
    del told["context_tokens"]
    (tmp_path / METRICS).write_text(json.dumps(told))
    with pytest.raises(CachepressError, match="context_tokens is nothing, wanted a number"):
        Metrics.read(tmp_path)
