"""Made-up result folders, as an evaluation leaves them, and what a page refers to."""

import json
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import yaml

from cachepress.evaluation.statistics import estimate, interval

HOSTILE = '</script><script>alert("1")</script> & <b>x</b> \u2028 שלום 🎉 | $x_1$'
CONFIG = {
    "dataset": "builtin",
    "data_dir": "multi_key-500",
    "model": "tiny",
    "query_aware": False,
    "storage": "full",
    "seed": 0,
    "dtype": None,
    "model_kwargs": {},
    "device": "cpu",
    "cachepress_version": "0.1.0",
}


def write_run(
    folder: Path,
    press: str,
    ratio: float,
    scores: list[float] | None,
    *,
    kept: float | None = None,
    speed: float | None = 10.0,
    noise: float | None = 0.01,
    answers: list[str] | None = None,
    contexts: list[int] | None = None,
    places: list[tuple[float, float]] | None = None,
    query_aware: bool = False,
    kl: list[float] | None = None,
    **config: object,
) -> Path:
    """A result folder with a sample for each score, and quartiles of the speed ``noise`` away."""
    n = len(scores or answers or [])
    answers = answers or [f"answer {score:g}" for score in scores or []]
    contexts = contexts or list(range(n))
    cell = folder / "__".join([press.replace("/", "-"), f"{ratio:g}", *map(str, config.values())])
    cell.mkdir(parents=True)
    table = pd.DataFrame(
        {
            "sample_id": range(n),
            "question": [f"question {i} {HOSTILE}" for i in range(n)],
            "answer": [json.dumps([f"wanted {i}", HOSTILE]) for i in range(n)],
            "task": [["easy", "hard"][i % 2] for i in range(n)],
            "metric": "contains",
            "choices": "[]",
            "length": [place[0] for place in places] if places else "",
            "depth": [place[1] for place in places] if places else "",
            "context_id": contexts,
            "predicted_answer": answers,
            "score": scores if scores is not None else "",
            "kl": kl if kl is not None else "",
            "compression_ratio": ratio,
        }
    )
    table.to_csv(cell / "predictions.csv", index=False)
    before = 1_000_000
    score = None if scores is None else asdict(estimate(scores, contexts))
    metrics = {
        "metrics": ["contains"],
        "query_aware": query_aware,
        "score": score,
        "tasks": {"all": score},
        "compression_ratio": ratio,
        "cache_bytes_before": before,
        "cache_bytes_after": before * (1 - ratio if kept is None else kept),
        "context_tokens": 100,
        "prefill_seconds": 1.5,
        "press_seconds": None if press == "no_press" else 0.25,
        "decode_tokens_per_second": speed,
        "decode_tokens_per_second_low": speed and noise and speed * (1 - noise),
        "decode_tokens_per_second_high": speed and noise and speed * (1 + noise),
        "peak_memory_bytes": 2**30,
        "kl": None if kl is None else asdict(interval(kl, contexts)),
        "perplexity": None,
        "machine": "2 cores",
    }
    (cell / "metrics.json").write_text(json.dumps(metrics))
    spelling = press if press == "no_press" else f"Press({press!r}, {ratio})"
    named = {"press": spelling, "press_name": press, "compression_ratio": ratio}
    (cell / "config.yaml").write_text(yaml.safe_dump({**CONFIG, **config, **named}))
    return cell


class Page(HTMLParser):
    """A page taken apart: addresses, JSON of its scripts, texts and tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.styles: list[str] = []
        self.data: dict[str, list[object]] = {}
        self.texts: list[str] = []
        self._inside: str | None = None
        self._name: str | None = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.append(tag)
        self.addresses += [given[name] for name in ("src", "href") if name in given]
        self._inside = tag
        json_inside = given.get("type") == "application/json"
        self._name = (given.get("id") or given["data-role"]) if json_inside else None

    def handle_endtag(self, tag):
        self._inside = self._name = None

    def handle_data(self, data):
        if self._name is not None:
            self.data.setdefault(self._name, []).append(json.loads(data))
        elif self._inside == "style":
            self.styles.append(data)
        elif self._inside != "script":
            self.texts.append(data)

    def refers_to_nothing(self) -> bool:
        """Whether the page needs no other file and no network."""
        inside = all(address.startswith(("#", "data:")) for address in self.addresses)
        return inside and not any("@import" in s or "url(" in s for s in self.styles)
