"""Options of transformers' ``GenerationConfig``, and which of them fit an answer from a cache."""

from collections.abc import Mapping, Sequence

from transformers import GenerationConfig
from transformers.cache_utils import Cache

from cachepress.errors import CachepressError
from cachepress.limits import check_whole, shown

_OFF = (None, False)
_CACHE = "the cache is given"
_ASSISTANT = "it needs an assistant model, which cannot be given"
_HUB = "transformers has moved it to the Hub"
_ENCODERS = "it is for encoder-decoder models"
_LENGTH = "it counts the tokens of the prompt"
_UNFIT: Mapping[str, tuple[Sequence[object], str]] = {
    "max_new_tokens": ((), "give it beside these options"),
    "max_length": ((None,), f"{_LENGTH}: give max_new_tokens"),
    "min_length": ((None,), f"{_LENGTH}: give min_new_tokens"),
    "use_cache": ((None, True), "answers come from the cache"),
    "cache_implementation": ((None,), _CACHE),
    "cache_config": ((None,), _CACHE),
    "max_cache_len": ((None,), _CACHE),
    "prefill_chunk_size": ((None,), "the context is read already"),
    "compile_config": ((None,), "a compressed cache is not compiled with the model"),
    "token_healing": (_OFF, "it would change the end of the prompt, which is read already"),
    "forced_bos_token_id": ((None,), _ENCODERS),
    "decoder_start_token_id": ((None,), _ENCODERS),
    "is_assistant": (_OFF, _ASSISTANT),
    "num_assistant_tokens": ((None,), _ASSISTANT),
    "num_assistant_tokens_schedule": ((None,), _ASSISTANT),
    "assistant_confidence_threshold": ((None,), _ASSISTANT),
    "assistant_early_exit": ((None,), _ASSISTANT),
    "assistant_lookbehind": ((None,), _ASSISTANT),
    "target_lookbehind": ((None,), _ASSISTANT),
    "assistant_ensemble_weight": ((None,), _ASSISTANT),
    "speculation_type": ((None,), _ASSISTANT),
    "use_mtp": (_OFF, _ASSISTANT),
    "low_memory": (_OFF, _HUB),
    "penalty_alpha": ((None,), _HUB),
    "dola_layers": ((None,), _HUB),
    "diversity_penalty": ((None,), _HUB),
    "num_beam_groups": ((None,), _HUB),
    "constraints": ((None,), _HUB),
    "force_words_ids": ((None,), _HUB),
    "continuous_batching_config": ((None,), "it is for generate_batch()"),
    "transformers_version": ((None,), "it is a note in a file, and changes nothing"),
}
"""Options that cannot be given here, with the values that they may have, and why."""
_OUTPUTS = ("output_attentions", "output_hidden_states", "output_scores", "output_logits")
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "repetition_penalty": (None, 1.0),
    "encoder_repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
}
"""Options that read the tokens of the prompt, with the values at which they do not."""


def check_generation(generation: Mapping[str, object], several: bool = True) -> None:
    """Check options of transformers' ``GenerationConfig``.

    Args:
        generation: the options.
        several: whether a question may have several answers, and outputs besides.

    Raises:
        CachepressError: if one is unknown, or means nothing where answers come from a cache.
    """
    if not isinstance(generation, Mapping):
        raise CachepressError(
            f"generation: got {shown(generation)}, wanted a mapping of options of GenerationConfig"
        )
    known = known_options()
    for name, value in generation.items():
        if name not in known:
            raise CachepressError(f"generation: {shown(name)} is no option of GenerationConfig")
        allowed, why = _UNFIT.get(name, ((value,), ""))
        if not any(value is same for same in allowed):
            raise CachepressError(
                f"generation: {name}={shown(value)} does not go here, because {why}: leave it out"
            )
        if name in _OUTPUTS and value and not generation.get("return_dict_in_generate"):
            raise CachepressError(
                f"generation: {name}={shown(value)} needs return_dict_in_generate=True"
            )
    if looks_up(generation) and not hasattr(Cache, "activate_past_recording"):
        raise CachepressError(
            "generation: prompt_lookup_num_tokens needs a later version of transformers: this one "
            "would cut a given cache down to the question"
        )
    if generation.get("num_return_sequences") is not None:
        check_whole("num_return_sequences", generation["num_return_sequences"])
    if not several and (generation.get("return_dict_in_generate") or answers_each(generation) > 1):
        raise CachepressError(
            "generation: num_return_sequences and return_dict_in_generate do not go here, where a "
            "question gets one text: use the pipeline"
        )


def known_options() -> set[str]:
    """Return the names of all options of this version of transformers."""
    return {name for name in GenerationConfig().to_dict() if not name.startswith("_")}


def answers_each(generation: Mapping[str, object]) -> int:
    """Count the answers that each question gets."""
    n = generation.get("num_return_sequences")
    return n if isinstance(n, int) else 1


def one_by_one(generation: Mapping[str, object]) -> bool:
    """Tell whether questions are answered one by one: outputs have no padding, or no batch."""
    return bool(generation.get("return_dict_in_generate")) or looks_up(generation)


def looks_up(generation: Mapping[str, object]) -> bool:
    """Tell whether tokens are guessed by looking them up in the question and the answer."""
    return generation.get("prompt_lookup_num_tokens") is not None


def text_reader(generation: Mapping[str, object]) -> str | None:
    """Find an option that reads the tokens of the prompt; None if none does."""
    return next((name for name in _NEUTRAL if _active(generation, name)), None)


def reads_order(generation: Mapping[str, object]) -> bool:
    """Tell whether an option reads the order of the prompt's tokens, which padding would change."""
    return any(_active(generation, name) for name in _NEUTRAL if "ngram" in name)


def _active(generation: Mapping[str, object], name: str) -> bool:
    return generation.get(name) not in _NEUTRAL[name]
