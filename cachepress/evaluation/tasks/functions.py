"""Metric of functions that a model is to repeat from a repository."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

from cachepress.evaluation.metrics import bleu

if TYPE_CHECKING:
    from tree_sitter import Node, Parser

ALIKE = 0.8
"""BLEU from which on a function counts as repeated."""
BLOCK = re.compile(r"^```\w*\s*\n(.*?)^```", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class _Language:
    """Programming language: its grammar, and the node types of functions.

    Attributes:
        module: the package of the grammar.
        grammar: its function that gives the grammar.
        function: the kind of node that is a function with a name.
    """

    module: str
    function: str
    grammar: str = "language"


LANGUAGES = {
    "python": _Language("tree_sitter_python", "function_definition"),
    "java": _Language("tree_sitter_java", "method_declaration"),
    "typescript": _Language(
        "tree_sitter_typescript", "function_declaration", "language_typescript"
    ),
    "rust": _Language("tree_sitter_rust", "function_item"),
    "cpp": _Language("tree_sitter_cpp", "function_definition"),
    "go": _Language("tree_sitter_go", "function_declaration"),
}


def repeated_function(
    prediction: str, answers: Sequence[str], choices: Sequence[str] = (), language: str = "python"
) -> float:
    """Score 1 if a function is repeated well enough, and better than all others, else 0.

    Args:
        prediction: an answer with a code block.
        answers: the function; with several, those of the same name.
        choices: all functions that are asked for in the repository.
        language: a key of ``LANGUAGES``.
    """
    repeated = _first_function(prediction.strip(), language)
    scores = {code: _bleu(repeated, code) for code in choices}
    best = max(scores, key=lambda code: scores[code])
    return float(best in answers and scores[best] >= ALIKE)


def _first_function(text: str, language: str) -> str:
    """Find the first function in a code block, else the first block, else the text."""
    blocks = BLOCK.findall(text)
    how = LANGUAGES[language]
    for block in blocks:
        source = block.encode()
        nodes = [_parser(language).parse(source).root_node]
        while nodes:
            node = nodes.pop()
            if node.type == how.function and _has_name(node, language):
                return source[node.start_byte : node.end_byte].decode()
            nodes += reversed(node.children)
    return blocks[0] if blocks else text


def _has_name(node: "Node", language: str) -> bool:
    if language != "cpp":
        return node.child_by_field_name("name") is not None
    # Methods, operators, and functions that return pointers are not looked for.
    inner = node.child_by_field_name("declarator")
    if inner is None or inner.type != "function_declarator":
        return False
    name = inner.child_by_field_name("declarator")
    return name is not None and name.type == "identifier"


@cache
def _parser(language: str) -> "Parser":
    from tree_sitter import Language, Parser

    how = LANGUAGES[language]
    return Parser(Language(getattr(import_module(how.module), how.grammar)()))


def _bleu(text: str, reference: str) -> float:
    """Compute BLEU of texts that are split at white space."""
    tokens, wanted = (re.split(r"\s+", each.strip()) for each in (text, reference))
    return bleu(tokens, wanted, smooth=True)
