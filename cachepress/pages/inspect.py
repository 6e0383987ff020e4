"""Shows which tokens of a context a press keeps (``cachepress inspect``)."""

import base64
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import cachepress
from cachepress.cache.layer import CompressedLayer
from cachepress.errors import CachepressError
from cachepress.evaluation.answering import answers_of, pipeline_of
from cachepress.evaluation.records import write_atomically
from cachepress.generation.pipeline import Answers
from cachepress.generation.prompt import Prompt, PromptOptions, make_prompt
from cachepress.given import press_of
from cachepress.hf import text_decoder
from cachepress.hf.types import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from cachepress.models.chat import encode, template
from cachepress.pages.html import render
from cachepress.pages.pieces import CONTEXT, QUESTION, TEMPLATE, Part, Piece, pieces_of
from cachepress.presses import BasePress


@dataclass(frozen=True)
class Inspection:
    """Result of an inspection: the tokens that a press kept, and the answers with and without it.

    Attributes:
        pieces: what the press read, token by token.
        rest: text after the last token that it read.
        kept: ``[H, T]`` which tokens each head holds, for each compressed layer.
        plain: the answer without the press.
        pressed: the answer with it.
        options: how it was asked.
    """

    pieces: list[Piece]
    rest: str
    kept: dict[int, Tensor]
    plain: Answers
    pressed: Answers
    options: PromptOptions


def write_inspection(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    press: BasePress | str,
    context: str,
    question: str,
    output: Path,
    max_new_tokens: int = 50,
    *,
    answer_prefix: str = "",
    query_aware: bool = False,
    storage: str = "full",
    truncation: bool = False,
    chat: bool = True,
) -> Path:
    """Write a page that shows which tokens of a context a press kept, and both answers.

    Args:
        model: a model with its attention under transformers' interface.
        tokenizer: its tokenizer.
        press: reads the context; a press or its spelling.
        context: the text.
        question: what is asked about it.
        output: the file.
        max_new_tokens: most tokens of an answer.
        answer_prefix: how answers begin.
        query_aware: put the question into the context, so that any press sees it.
        storage: how kept pairs are stored: "full", "int8", "int4" or "int2".
        truncation: cut the end of a context that is too long instead of refusing it.
        chat: put context and question into the model's chat template, if it has one.

    Returns:
        ``output``.

    Raises:
        CachepressError: if the context is empty or too long, if the press looks at the question
            and it is moved, or if the press cannot work on the model.
    """
    press = _needed(press)
    options = PromptOptions(
        answer_prefix=answer_prefix, max_new_tokens=max_new_tokens, truncation=truncation, chat=chat
    )
    text, options = _asked(press, context, question, query_aware, options)
    seen = inspect(model, tokenizer, press, text, options, storage)
    about = {"press": repr(press), "storage": storage, "model": _name(model)}
    sees = query_aware or press.needs.question
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, _page(seen, {**about, "question": question, "query_aware": sees}))
    return output


def _asked(
    press: BasePress, context: str, question: str, query_aware: bool, options: PromptOptions
) -> tuple[str, PromptOptions]:
    """Return the context and the prompt options; a question that presses see is in the context."""
    if not query_aware:
        return context, replace(options, question=question)
    if press.needs.question:
        raise CachepressError(
            f"query_aware moves the question into the context, and {press!r} looks for it where "
            "it is: leave query_aware out"
        )
    return context + question, replace(options, question="", suffix=question)


def _needed(given: object) -> BasePress:
    press = press_of(given)
    if press is None:
        raise CachepressError("press: got none, and without one every token is kept: give a press")
    return press


def _name(model: PreTrainedModel) -> str:
    return Path(model.config.name_or_path or "").name or type(model).__name__


def inspect(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    press: BasePress,
    context: str,
    options: PromptOptions,
    storage: str = "full",
) -> Inspection:
    """Prefill a context with a press and without it, answer, and find the tokens that were kept."""
    pipe, how = pipeline_of(model, tokenizer), asdict(options)
    cache = DynamicCache(config=text_decoder(model).config)
    plain = answers_of(pipe, context, how)
    pressed = answers_of(pipe, context, {"press": press, "cache": cache, "storage": storage, **how})
    kept = kept_of(cache)
    if not kept:
        raise CachepressError(f"{press!r} leaves this model's cache as it is: nothing to see")
    prompt = make_prompt(tokenizer, model, context, options)
    pieces, rest = _pieces(tokenizer, context, options, prompt, press.needs.question)
    return Inspection(pieces, rest, kept, plain, pressed, options)


def kept_of(cache: Cache) -> dict[int, Tensor]:
    """Find which tokens of the text each head of each compressed layer holds, ``[H, T]``."""
    kept: dict[int, Tensor] = {}
    for number, layer in enumerate(cache.layers):
        if not isinstance(layer, CompressedLayer):
            continue
        positions = layer.positions[0].cpu().long()
        # Empty slots go to a column of their own, which is then left out.
        mask = torch.zeros(len(positions), layer.get_seq_length() + 1, dtype=torch.bool)
        kept[number] = mask.scatter_(1, positions % mask.shape[1], True)[:, :-1]
    return kept


def _pieces(
    tokenizer: PreTrainedTokenizerBase,
    context: str,
    options: PromptOptions,
    prompt: Prompt,
    with_question: bool,
) -> tuple[list[Piece], str]:
    """Split the prompt that the press read into tokens as pieces of its text."""
    plain = not tokenizer.chat_template or not options.chat
    before, after = ("", "") if plain else template(tokenizer, options.enable_thinking)
    text = before + context.removesuffix(options.suffix)
    parts = [Part(len(before), TEMPLATE), Part(len(text), CONTEXT)]
    (asked,), (prefix,) = options.asked, options.prefixes
    ids, further = prompt.context_ids[0].tolist(), asked + after + prefix
    moved = encode(tokenizer, options.suffix, special=False).shape[1]
    # Where nothing follows, the last token is not read with the others: the answer starts from it.
    own = len(ids) - max(0, moved - (not further))
    read = pieces_of(tokenizer, text, ids[:own], parts, special=plain)
    if prompt.cut:
        read = read[0], ""
    if options.suffix:
        parts = [Part(len(options.suffix), QUESTION)]
        read = _joined(read, pieces_of(tokenizer, options.suffix, ids[own:], parts, special=False))
    if with_question:
        parts = [Part(len(asked), QUESTION), Part(len(further), TEMPLATE)]
        ids = prompt.question_ids[0][0, :-1].tolist()
        read = _joined(read, pieces_of(tokenizer, further, ids, parts, special=False))
    return read


def _joined(
    first: tuple[list[Piece], str], second: tuple[list[Piece], str]
) -> tuple[list[Piece], str]:
    """Join the pieces of two texts that follow each other, with the text after them."""
    (pieces, rest), (more, end) = first, second
    if not more:
        return pieces, rest + end
    more[0] = Piece(rest + more[0].gap, more[0].text, more[0].zone)
    return pieces + more, end


def _page(seen: Inspection, about: dict[str, object]) -> str:
    heads = sum(len(mask) for mask in seen.kept.values())
    dropped = ~torch.cat(list(seen.kept.values())).any(0)
    values = {
        **about,
        "version": cachepress.__version__,
        "tokens": len(seen.pieces),
        "heads": heads,
        "dropped": int(dropped.sum()),
        "plain": seen.plain,
        "pressed": seen.pressed,
        "cut": seen.pressed.cut_tokens,
        "chat": seen.options.chat,
        "answer_prefix": seen.options.answer_prefix,
        "shares": {layer: float(mask.float().mean()) for layer, mask in seen.kept.items()},
        "most_heads": max(len(mask) for mask in seen.kept.values()),
        "data": page_data(seen),
    }
    return render("inspect.html.jinja", values)


def page_data(seen: Inspection) -> dict[str, object]:
    """Make the data of the page: texts, and a bit for each token of each head."""
    return {
        "texts": [piece.text for piece in seen.pieces],
        "zones": [piece.zone for piece in seen.pieces],
        "gaps": {number: piece.gap for number, piece in enumerate(seen.pieces) if piece.gap},
        "rest": seen.rest,
        "layers": [
            {"layer": layer, "heads": [_bits(head) for head in mask]}
            for layer, mask in seen.kept.items()
        ],
    }


def _bits(mask: Tensor) -> str:
    """Encode a mask in base64, a bit for each token, the lowest bit of a byte first."""
    return base64.b64encode(np.packbits(mask.numpy(), bitorder="little").tobytes()).decode()
