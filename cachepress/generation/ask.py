"""Asks a question about the text that a cache holds already."""

from collections.abc import Mapping

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer

from cachepress.cache.batch import fork, sequences_of, text_of
from cachepress.errors import CachepressError
from cachepress.generation.answering import generate
from cachepress.generation.options import check_generation
from cachepress.hf import trained_length
from cachepress.limits import check_whole, shown
from cachepress.models.chat import encode, template


def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cache: Cache,
    question: str,
    *,
    answer_prefix: str = "",
    max_new_tokens: int = 50,
    chat: bool = True,
    enable_thinking: bool = False,
    streamer: BaseStreamer | None = None,
    generation: Mapping[str, object] | None = None,
) -> str:
    """Answer a question about the text that a cache holds; the cache itself is not changed.

    Args:
        model: the model that filled the cache.
        tokenizer: its tokenizer.
        cache: a cache of one sequence, filled by ``prefill``, the pipeline, or ``load_cache``.
        question: the question, which follows right after the text.
        answer_prefix: the beginning of the answer; it is not part of what is returned.
        max_new_tokens: most tokens of the answer.
        chat: whether the chat template's end of a user turn follows the question, if the tokenizer
            has a template.
        enable_thinking: passed to the chat template.
        streamer: gets the tokens as they come, such as transformers'
            ``TextStreamer(tokenizer, skip_prompt=True)``.
        generation: options of transformers' ``GenerationConfig``; greedy by default.

    Returns:
        The answer.

    Raises:
        CachepressError: if the cache is empty or holds several sequences, there is no question, or
            no room for an answer.
    """
    if not isinstance(cache, Cache):
        raise CachepressError(f"cache: got {shown(cache)}, wanted one that holds a text")
    for name, text in (("question", question), ("answer_prefix", answer_prefix)):
        if not isinstance(text, str):
            raise CachepressError(f"{name}: got {shown(text)}, wanted a text")
    check_generation({} if generation is None else generation, several=False)
    check_whole("max_new_tokens", max_new_tokens)
    seen, sequences = cache.get_seq_length(), sequences_of(cache)
    if not seen:
        raise CachepressError("the cache is empty: fill it with cachepress.prefill, or load one")
    if sequences != 1:
        raise CachepressError(
            f"the cache holds {sequences} sequences: ask one that holds a single text"
        )
    after = template(tokenizer, enable_thinking)[1] if chat else ""
    ids = encode(tokenizer, question + after + answer_prefix, special=False)
    if not ids.shape[1]:
        raise CachepressError(f"question: got {shown(question)}, wanted a text that has tokens")
    most = trained_length(model)
    if most is not None and seen + ids.shape[1] + max_new_tokens > most:
        raise CachepressError(
            f"no room for an answer: {seen} tokens of text, {ids.shape[1]} of question and "
            f"{max_new_tokens} of answer, where the model has {most} positions"
        )
    forked = fork(cache)
    text = text_of(cache)
    text = None if text is None or text.shape[1] != seen else text
    (tokens,) = generate(
        model, tokenizer, forked, [ids], max_new_tokens, generation or {}, streamer, text
    ).tokens
    return str(tokenizer.decode(tokens, skip_special_tokens=True))
