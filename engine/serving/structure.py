"""Constrained decoding: which tokens may come next where an answer must follow a JSON schema. The grammar is llguidance's.

V vocabulary. A guide follows one sequence: it gives the mask of the next token, ceil(V / 8) bytes with one bit a token, the lowest
bit first, and takes in the token that was drawn. Knows no model and no schedule.
"""

import importlib.util
from collections.abc import Iterable
from typing import Any

MOST_LINES = 200  # of an error message of the library, in characters
OPTIONS = {
    "whitespace_pattern": r"[ \n\r\t]{0,20}"
}  # without a bound, a model may write blanks to its last token


class StructureError(ValueError):
    """A schema that cannot be followed, with a sentence on why."""


def is_available() -> bool:
    """Whether the library is installed (the extra `structured`)."""
    return importlib.util.find_spec("llguidance") is not None


class Structures:
    """Guides for one tokenizer."""

    def __init__(self, document_json: str, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        """`document_json`: the text of a tokenizer.json. `eos_token_ids`: the tokens that end an answer, which may come once it is complete."""
        if not is_available():
            raise StructureError(
                "Answers in a given form need the package llguidance: pip install 'turbomind-quant[structured]'."
            )
        import llguidance

        self._library: Any = llguidance
        self._eos = sorted(i for i in set(eos_token_ids) if i < vocab_size)
        self._tokenizer = llguidance.LLTokenizer(
            document_json, n_vocab=vocab_size, eos_token=self._eos or None
        )

    def grammar(self, schema: str) -> str:
        """The grammar of a JSON schema. Raises StructureError for one that cannot be followed."""
        try:
            grammar = self._library.LLMatcher.grammar_from_json_schema(schema, overrides=OPTIONS)
            problem = self._library.LLMatcher.validate_grammar(grammar, self._tokenizer)
        except ValueError as error:
            problem = str(error)
        if problem:
            raise StructureError(f"This schema cannot be followed: {' '.join(problem.split())[:MOST_LINES]}")
        return str(grammar)

    def guide(self, schema: str, output_ids: list[int]) -> "Guide":
        """A guide for a sequence that has drawn `output_ids` already."""
        matcher = self._library.LLMatcher(self._tokenizer, self.grammar(schema), log_level=0)
        guide = Guide(matcher, self._eos)
        for token in output_ids:
            guide.take(token)
        return guide


class Guide:
    """The state of one sequence in its grammar."""

    def __init__(self, matcher: Any, eos_token_ids: list[int]) -> None:
        self._matcher, self._eos = matcher, eos_token_ids

    def mask(self) -> bytes:
        """The tokens that may come next. Raises StructureError where the grammar takes too much."""
        mask = bytearray(self._matcher.compute_bitmask())
        self._check()
        # A token that ends the answer ends it whatever else it may stand for: not before the answer is complete.
        may_end = self._matcher.is_accepting()
        for token in self._eos:
            bit = 1 << token % 8
            mask[token // 8] = mask[token // 8] | bit if may_end else mask[token // 8] & ~bit
        return bytes(mask)

    def take(self, token: int) -> bool:
        """Go on by one token; True where the answer is complete."""
        self._matcher.consume_token(token)
        self._check()
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise StructureError("This schema is too complex to be followed.")
