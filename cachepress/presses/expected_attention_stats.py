"""Expected attention with query statistics that were measured beforehand."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from cachepress.artefacts.kept import find_artefact
from cachepress.artefacts.reading import check_shapes, fitted_layers, load_artefact, sizes
from cachepress.hf.types import PreTrainedModel
from cachepress.ops import wide_dtype
from cachepress.presses._checks import either, fill
from cachepress.presses.expected_attention import ExpectedAttentionPress
from cachepress.view import LayerView, Moments, Needs

KIND = "query_stats"
_PUBLISHED = ("kmfoda/booksum", 100, 1000)
"""Data set, samples and letters of each, of the statistics that are published."""


@dataclass(frozen=True)
class ExpectedAttentionStatsPress(ExpectedAttentionPress, alias="expected_attention_stats"):
    """Keeps the tokens that queries with statistics measured beforehand are expected to attend to.

    Devoto et al., "Expected Attention: KV Cache Compression by Estimating Attention from Future
    Queries Distribution" (arXiv:2510.00636), with the mean and the covariance of the queries
    before RoPE of a text that was read beforehand: ``cachepress train query_stats``. Needs the
    layer's rotary embedding. Best for short prompts, and for prompts whose own queries say little
    about those to come.

    Attributes:
        n_future_positions: positions after the prompt that the rotation is averaged over.
        n_sink: first tokens, which always stay.
        use_covariance: whether the covariance of the queries enters.
        use_vnorm: whether the score is multiplied by the norm of the value.
        epsilon: added to the score before that multiplication.
        stats: the file, its folder or a hub repository with it, as ``cachepress train`` or the
            authors wrote it, where {model} stands for the model's name; None for the one trained on
            this machine.
        layers: which layers of the file are the model's full-attention layers; None to find out.
    """

    stats: str | None = field(default=None, kw_only=True)
    layers: tuple[int, ...] | None = field(default=None, kw_only=True)

    def __init__(
        self,
        compression_ratio: float = 0.0,
        n_future_positions: int = 512,
        n_sink: int = 4,
        use_covariance: bool = True,
        use_vnorm: bool = True,
        epsilon: float = 0.0,
        *,
        n_kept: int | None = None,
        max_bytes: int | str | None = None,
        stats: str | None = None,
        layers: tuple[int, ...] | None = None,
        stats_folder: str | None = None,
        dataset_name: str | None = None,
        num_samples: int | None = None,
        sample_seq_len: int | None = None,
    ) -> None:
        """Take the ways in which kvpress names a file of statistics, too."""
        text = (dataset_name, num_samples, sample_seq_len)
        given = any(x is not None for x in text)
        values = {
            "compression_ratio": compression_ratio,
            "n_kept": n_kept,
            "max_bytes": max_bytes,
            "n_future_positions": n_future_positions,
            "n_sink": n_sink,
            "use_covariance": use_covariance,
            "use_vnorm": use_vnorm,
            "epsilon": epsilon,
            "stats": either("stats", stats, "stats_folder", stats_folder),
            "layers": layers,
        }
        if values["stats"] is None and given:
            parts = [x if x is not None else y for x, y in zip(text, _PUBLISHED, strict=True)]
            name = "_".join(str(x).replace("/", "_") for x in (*parts, n_sink))
            values["stats"] = f"alessiodevoto/exp_att_stats_{{model}}_{name}"
        fill(self, values)

    @property
    def needs(self) -> Needs:
        """The rotary embedding."""
        return Needs(rotary=True)

    @property
    def learned(self) -> Mapping[str, str]:
        """The option that names the trained file, and the kind of file."""
        return {"stats": KIND}

    def for_model(self, model: PreTrainedModel) -> "ExpectedAttentionStatsPress":
        """Find the trained file for a model, and check that it fits."""
        path = find_artefact(KIND, self.stats, model)
        layers, (n, h, g, d, _) = fitted_layers(path, KIND, model), sizes(model)
        learned = load_artefact(path, KIND, layers=layers)
        # Published statistics are by query head, ours by KV head as well.
        heads = (h * g,) if learned["mean"].ndim == 3 else (h, g)
        wanted = {"mean": (n, *heads, d), "covariance": (n, *heads, d, d)}
        check_shapes(learned, wanted, path)
        return replace(self, stats=path, layers=layers)

    def moments(self, view: LayerView) -> Moments:
        """Return the moments that were measured beforehand, the same for every sequence."""
        if self.stats is None:
            raise TypeError("the press was not made ready for a model")
        learned = load_artefact(self.stats, KIND, view.keys.device, self.layers)
        b, h, _, d = view.keys.shape
        mean, covariance = (
            learned[name][view.depth].to(wide_dtype(view.keys)) for name in ("mean", "covariance")
        )
        mean = mean.view(h, -1, d).expand(b, -1, -1, -1)
        return Moments(mean, covariance.view(h, -1, d, d).expand(b, -1, -1, -1, -1))
