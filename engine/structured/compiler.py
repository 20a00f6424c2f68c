"""The grammar library's side: a tokenizer as llguidance wants it, grammars translated, compiled, and tried out."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from typing import Any

import llguidance
from llguidance.gbnf_to_lark import any_to_lark

from ...models.tokenizer import Tokenizer
from .grammar_request import MEAN_MASK_SECONDS, GrammarRequest
from .structural_tags import TagGrammar

# What one step of a grammar may cost, in the library's own units: about 15 ms of regular expressions, and 10 to 50 ms
# of an ambiguous grammar. Lexer states are 1 to 2 kB each.
LIMITS = llguidance.LLParserLimits(step_lexer_fuel=200_000, step_max_items=20_000, max_lexer_states=50_000,
                                   verbose_errors=False)  # fmt: skip
# Without an end to it, a model may write spaces for ever; a line break and deep indentation must fit.
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,32}"
TRIAL_TOKENS = 48  # that are walked at random, to see what steps cost
TRIAL_SECONDS = 0.2
EXTRA_MASK_SECONDS = 0.05  # beyond their mean, once


class GrammarError(ValueError):
    """A grammar that cannot be served; the text is for its author."""


class GrammarCompiler:
    """Compiles grammars for one tokenizer. `vocab_size` is the model's, of which the tokenizer's may be a part, and
    `eos_token_ids` are those of its config."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        if tokenizer.decoder.name == "other":
            raise GrammarError("structured outputs need a byte-level or byte-fallback tokenizer: other")
        known = [token_id for token_id in (tokenizer.eos_token_id, *eos_token_ids) if token_id is not None]
        if not known or known[0] >= vocab_size:
            raise GrammarError(f"structured outputs need an end-of-sequence token of the model's vocabulary: {known}")
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.special_tokens = {
            text: token_id
            for token_id in sorted(tokenizer.all_special_ids)
            if token_id < vocab_size and (text := tokenizer.id_to_token(token_id))
        }
        wrapped = llguidance.TokenizerWrapper(_Vocabulary(tokenizer, vocab_size, known[0]))
        self._library = llguidance.LLTokenizer(wrapped, n_vocab=vocab_size)
        self.eos_token_ids = frozenset(self._library.eos_tokens)

    def translate(self, request: GrammarRequest) -> str:
        """The request in llguidance's own format; GrammarError where it is not well-formed."""
        try:
            if request.kind == "structural_tag":
                tags = TagGrammar(lambda kind, text: self._entry(GrammarRequest(kind, text)), self.special_tokens)
                return tags.build(json.loads(request.text))
            return json.dumps({"grammars": [self._entry(request)]})
        except GrammarError:
            raise
        except RecursionError:
            raise GrammarError("the grammar is nested too deeply") from None
        except ValueError as error:
            raise GrammarError(str(error)) from error

    def _entry(self, request: GrammarRequest) -> dict[str, Any]:
        """One grammar of llguidance's list."""
        matcher = llguidance.LLMatcher
        if request.kind == "json":
            options: Any = {"whitespace_pattern": request.whitespace_pattern or WHITESPACE}
            if request.disable_any_whitespace:
                options = {"whitespace_flexible": False}
            text = matcher.grammar_from_json_schema(request.text, options)
        elif request.kind == "regex":
            text = matcher.grammar_from_regex(request.text)
        elif request.kind == "choice":
            # One terminal and not as many rules: the library makes one automaton of it.
            alternatives = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in json.loads(request.text))
            return {"lark_grammar": f"start: CHOICE\nCHOICE: {alternatives}"}
        else:
            try:
                return {"lark_grammar": any_to_lark(request.text)}
            except Exception as error:  # its parser raises classes of its own
                raise GrammarError(f"the grammar is neither Lark nor GBNF, {error}") from error
        return json.loads(text)["grammars"][0]

    def compile(self, grammar: str) -> llguidance.LLMatcher:
        """A matcher at its beginning, to be copied; GrammarError where the library refuses it."""
        matcher = llguidance.LLMatcher(self._library, grammar, log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise GrammarError(reason(matcher))
        return matcher

    def try_out(self, matcher: llguidance.LLMatcher) -> None:
        """Walk some tokens at random; GrammarError where nothing can be written, or a step costs too much."""
        walk = matcher.deep_copy()
        draw = random.Random(0)
        spent = 0.0
        for count in range(1, TRIAL_TOKENS + 1):
            start = time.thread_time()
            mask = walk.compute_bitmask()
            spent += time.thread_time() - start
            if walk.is_error():
                raise GrammarError(reason(walk))
            if spent > count * MEAN_MASK_SECONDS + EXTRA_MASK_SECONDS:
                raise GrammarError(f"the grammar is too costly, in seconds for one token: {spent / count:.3f}")
            if count == 1 and (not any(mask) or (walk.is_stopped() and not walk.is_accepting())):
                raise GrammarError("nothing can be written that the grammar matches")
            allowed = [token_id for token_id in _token_ids(mask, draw) if token_id not in self.eos_token_ids]
            if not allowed or spent > TRIAL_SECONDS:
                return
            if not walk.consume_token(draw.choice(allowed)):
                raise GrammarError(reason(walk))


def _token_ids(mask: bytes, draw: random.Random) -> list[int]:
    """The token ids of a byte of `mask` that has some, or of two, so that EOS is never alone by chance."""
    filled = [place for place, byte in enumerate(mask) if byte]
    places = draw.sample(filled, min(2, len(filled)))
    return [8 * place + bit for place in places for bit in range(8) if mask[place] >> bit & 1]


class _Vocabulary:
    """What the library reads of a tokenizer."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_id: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = eos_token_id
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in range(vocab_size)]
        special = tokenizer.all_special_ids | {eos_token_id}
        self.special_token_ids = sorted(token_id for token_id in special if token_id < vocab_size)

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text.decode(), add_special_tokens=False)


def reason(matcher: llguidance.LLMatcher) -> str:
    """The library's words, without its internals."""
    text = matcher.get_error().partition("<state>")[0].partition("<non-verbose/>")[0]
    text = " ".join(text.split())[:500]
    return "nothing can be written that the grammar matches" if text in ("", "NoExtension", "NoExtensionBias") else text
