"""Prompts of exact lengths: token ids, or text adjusted until a tokenizer counts as many tokens as wanted."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np

from ...models.tokenizer import Tokenizer

# Rounds of adjusting a text's length. Words are tokens of their own in nearly all vocabularies, so that most texts
# need none.
_ROUNDS = 10
_WORD = re.compile(rb" [A-Za-z]{2,}")
_PRINTABLE = re.compile(rb"[ -~]+")
# Fewer words than this make prompts that repeat too much; then other tokens are taken too.
_FEWEST_WORDS = 32
_MOST_WORDS = 4096
_WORDS = (
    "the of and to in that is was he for it with as his on be at by had not are but from or have an they which one "
    "you were her all she there would their we him been has when who will more no if out so said what up its about "
    "into than them can only other new some could time these two may then do first any my now such like our over man "
    "me even most made after also did many before must through back years where much your way well down should "
    "because each just those people how too little state good very make world still own see men work long get here "
    "between both life being under never day same another know while last might us great old year off come since "
    "against go came right used take three states himself few house use during without again place around however"
)
_SERVER_TIMEOUT_SECONDS = 60.0

Prompt = str | np.ndarray  # text, or int32 token ids


@dataclass(frozen=True, eq=False)
class BenchRequest:
    """One request of a benchmark; `arrival` in seconds after the first one, where the data set says it."""

    prompt: Prompt
    prompt_len: int
    output_len: int
    arrival: float | None = None


class Tokens(Protocol):
    """A vocabulary: which ids prompts may be made of, and text to ids and back where that is possible."""

    name: str

    def ids(self) -> np.ndarray:
        """int32 ids of ordinary tokens."""
        ...

    def words(self) -> np.ndarray:
        """int32 ids of which texts are made: tokens that keep their borders when a text is tokenized again."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class LocalTokens:
    """A tokenizer in this process. `vocab_size` is the model's, if it is known and smaller than the tokenizer's."""

    def __init__(self, tokenizer: Tokenizer, name: str, vocab_size: int | None = None) -> None:
        self.name = name
        self._tokenizer = tokenizer
        self._end = min(vocab_size or tokenizer.max_token_id + 1, tokenizer.max_token_id + 1)

    def ids(self) -> np.ndarray:
        special = self._tokenizer.all_special_ids
        return np.array([i for i in range(self._end) if i not in special], dtype=np.int32)

    def words(self) -> np.ndarray:
        shuffled = np.random.default_rng(0).permutation(self.ids()).tolist()
        spellings = {token_id: self._tokenizer.token_bytes(token_id) for token_id in shuffled}
        words = (i for i, spelling in spellings.items() if _WORD.fullmatch(spelling) and self._is_stable(i, spelling))
        chosen = list(islice(words, _MOST_WORDS))
        if len(chosen) < _FEWEST_WORDS:
            # Not all tokens: a byte that is no character by itself would become U+FFFD, which is other tokens.
            chosen = [i for i, spelling in spellings.items() if _PRINTABLE.fullmatch(spelling)]
        return np.array(sorted(chosen or shuffled), dtype=np.int32)

    def _is_stable(self, token_id: int, spelling: bytes) -> bool:
        """Whether the word is one token also between others; sentencepiece may put a token of its own at the start."""
        text = spelling.decode("ascii") * 3
        return self._tokenizer.encode(text, add_special_tokens=False)[-2:] == [token_id] * 2

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids)


class ServerTokens:
    """The tokenizer of a server, by its /tokenize and /detokenize. Raises ValueError where it has none.

    A server does not tell its vocabulary, so prompts are made of the tokens of common English words.
    """

    def __init__(self, base_url: str, model: str, headers: Mapping[str, str]) -> None:
        self.name = f"{base_url}/tokenize"
        self._base_url = base_url
        self._model = model
        self._headers = {"Content-Type": "application/json", **headers}
        text = "".join(f" {word}" for word in _WORDS.split())
        self._ids = np.array(sorted(set(self.encode(text, add_special_tokens=False))), dtype=np.int32)

    def ids(self) -> np.ndarray:
        return self._ids

    def words(self) -> np.ndarray:
        return self._ids

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        answer = self._ask("/tokenize", {"prompt": text, "add_special_tokens": add_special_tokens})
        return _field(answer, "tokens", list)

    def decode(self, ids: Sequence[int]) -> str:
        return _field(self._ask("/detokenize", {"tokens": list(ids)}), "prompt", str)

    def _ask(self, path: str, fields: Mapping[str, object]) -> object:
        body = json.dumps({"model": self._model, **fields}).encode()
        request = urllib.request.Request(self._base_url + path, body, self._headers)
        try:
            with urllib.request.urlopen(request, timeout=_SERVER_TIMEOUT_SECONDS) as response:
                return json.load(response)
        except (OSError, ValueError) as error:
            raise ValueError(
                "no tokenizer: name a checkpoint folder or a cached model id with --tokenizer, for the server does not "
                f"tokenize ({error}): {self._base_url}{path}"
            ) from error


def _field(answer: object, name: str, kind: type[Any]) -> Any:
    value = answer.get(name) if isinstance(answer, dict) else None
    if not isinstance(value, kind):
        raise ValueError(
            f"the server's /tokenize and /detokenize are not like vLLM's, use --tokenizer; no field: {name}"
        )
    return value


class IdsOnly:
    """The ids of a model without a tokenizer."""

    def __init__(self, vocab_size: int) -> None:
        self.name = f"none, ids under {vocab_size}"
        self._ids = np.arange(vocab_size, dtype=np.int32)

    def ids(self) -> np.ndarray:
        return self._ids

    def words(self) -> np.ndarray:
        return self._ids

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        raise ValueError("this data set is text, which needs a tokenizer: leave out --skip-tokenizer-init")

    def decode(self, ids: Sequence[int]) -> str:
        raise ValueError("text needs a tokenizer: leave out --skip-tokenizer-init")


class PromptMaker:
    """Makes prompts of drawn tokens. `as_text`: as text, else as token ids.

    `adds_special_tokens`: the server puts special tokens (BOS) around a text; they count as part of its length.
    `num_inexact` counts the texts whose length could not be met.
    """

    def __init__(self, tokens: Tokens, *, as_text: bool, adds_special_tokens: bool = True) -> None:
        self.tokens = tokens
        self.as_text = as_text
        self.num_inexact = 0
        self._vocabulary = tokens.words() if as_text else tokens.ids()
        if not len(self._vocabulary):
            raise ValueError(f"the tokenizer has no ordinary tokens to make prompts of: {tokens.name}")
        self._adds_special_tokens = adds_special_tokens
        self._num_special = len(tokens.encode("", add_special_tokens=True)) if as_text and adds_special_tokens else 0

    def draw(self, generator: np.random.Generator, length: int) -> np.ndarray:
        """`length` tokens, int32."""
        return self._vocabulary[generator.integers(len(self._vocabulary), size=length)]

    def build(self, parts: Sequence[np.ndarray]) -> tuple[Prompt, int]:
        """The prompt of these tokens, and its length in tokens.

        Prompts with equal first parts begin alike: only the last part is adjusted. Equal parts give equal prompts.
        """
        ids = np.concatenate(parts)
        if not self.as_text:
            return ids, len(ids)
        wanted = max(1, len(ids) - self._num_special)
        fixed = min(len(ids) - len(parts[-1]), wanted)
        fill = np.random.default_rng(len(ids))  # of its own, so that equal parts give equal texts
        used = ids[:wanted]
        for _ in range(_ROUNDS):
            text = self.tokens.decode(used.tolist())
            surplus = len(self.tokens.encode(text, add_special_tokens=False)) - wanted
            if not surplus:
                return text, wanted + self._num_special
            if surplus < 0:
                used = np.concatenate([used, self.draw(fill, -surplus)])
            elif len(used) - surplus < fixed:
                break  # the shared part alone is too long
            else:
                used = used[: len(used) - surplus]
        self.num_inexact += 1
        text = self.tokens.decode(used.tolist())
        return text, self.text_length(text)

    def text_length(self, text: str) -> int:
        """Tokens of a text as the server counts them."""
        return len(self.tokens.encode(text, add_special_tokens=self._adds_special_tokens))
