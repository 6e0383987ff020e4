"""Maps tokens to the pieces of text that they were made from."""

from dataclasses import dataclass
from itertools import pairwise

from cachepress.hf.types import PreTrainedTokenizerBase

SPECIAL, TEMPLATE, CONTEXT, QUESTION = "special", "template", "context", "question"
_UNFINISHED = "\ufffd"
"""What bytes decode to that are no whole character yet."""


@dataclass(frozen=True)
class Piece:
    """Token with its part of the text.

    Attributes:
        gap: text before it that no token stands for, such as a space that was split at.
        text: its own text; empty for a further part of the character before it. The name of a
            token that is in no text.
        zone: what it belongs to: "special", "template", "context" or "question".
    """

    gap: str
    text: str
    zone: str


@dataclass(frozen=True)
class Part:
    """Zone of a text, such as the question, up to character ``end``."""

    end: int
    zone: str


def pieces_of(
    tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int], parts: list[Part], special: bool
) -> tuple[list[Piece], str]:
    """Split a text into the pieces of its tokens.

    Args:
        tokenizer: made the tokens.
        text: the text.
        ids: its first tokens, or all.
        parts: what is where in the text, in order.
        special: whether the tokenizer put its own special tokens around the text.

    Returns:
        A piece for each token, and the text after the last one.
    """
    spans = _spans(tokenizer, text, ids, special)
    names = tokenizer.convert_ids_to_tokens(ids)
    outside = set(tokenizer.all_special_ids) if special else set()
    pieces, end = [], 0
    for number, token, (start, stop), name in zip(range(len(ids)), ids, spans, names, strict=True):
        if start == stop and token in outside and number in (0, len(ids) - 1):
            pieces.append(Piece("", name, SPECIAL))
            continue
        start, stop = max(start, end), max(stop, end)
        zone = next((part.zone for part in parts if stop <= part.end), parts[-1].zone)
        pieces.append(Piece(text[end:start], text[start:stop], zone))
        end = stop
    return pieces, text[end:]


def _spans(
    tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int], special: bool
) -> list[tuple[int, int]]:
    """Find the character span ``[start, stop)`` of each token."""
    if tokenizer.is_fast:
        made = tokenizer(
            text, add_special_tokens=special, return_offsets_mapping=True, verbose=False
        )
        return made["offset_mapping"][: len(ids)]
    outside = set(tokenizer.all_special_ids) if special else set()
    ends = [0]
    for piece, token in zip(_decoded(tokenizer, ids), ids, strict=True):
        # Decoding is not always the text again, so each piece is looked for.
        at = text.find(piece, ends[-1]) if piece else -1
        own = at >= 0 and token not in outside
        ends.append(at + len(piece) if own else ends[-1])
    return list(pairwise(ends))


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """Decode the text that each token adds; a character of several tokens is with its first."""
    texts = [""] * len(ids)
    start = done = 0
    for stop in range(1, len(ids) + 1):
        whole, before = (_decode(tokenizer, ids[start:end]) for end in (stop, done))
        if not whole.endswith(_UNFINISHED):
            texts[done] = whole[len(before) :]
            start, done = done, stop
    return texts


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
