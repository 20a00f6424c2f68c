"""A request's masks: behind tokens and behind drafts, in reasoning, at a budget's end, and at the end of all."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

import omni_engine
from omni_engine.engine.structured.compiler import GrammarCompiler
from omni_engine.engine.structured.constraint import RowConstraint, Vocabulary
from omni_engine.engine.structured.grammar_request import grammar_request
from omni_engine.models.tokenizer import load_tokenizer
from omni_engine.scheduler.structured_outputs import ReasoningSpan, StructuredOutputsParams

TOKENIZER = load_tokenizer(Path(omni_engine.__file__).parent / "models" / "demo" / "deepseek")
EOS = 1
SIZE = TOKENIZER.vocab_size + 21  # a padded vocabulary
GRAMMARS = [
    {"json": {"type": "object", "properties": {"a": {"type": "array", "items": {"enum": [1, "two", None]}},
                                               "b": {"type": "string", "pattern": "^[a-c]+$"}}}},
    {"regex": "(ab|cd){2,30}x?"},
    {"grammar": 'root ::= "[" root "]" | "a" root "b" | "."'},
    {"structural_tag": {"structures": [{"begin": "<f>", "schema": {"type": "integer"}, "end": "</f>"}],
                        "triggers": ["<f"]}},
]  # fmt: skip


@pytest.fixture(scope="module")
def vocabulary():
    return Vocabulary(TOKENIZER, SIZE)


@pytest.fixture(scope="module")
def compiler():
    return GrammarCompiler(TOKENIZER, SIZE, [])


@pytest.fixture
def constrain(vocabulary, compiler):
    def make(grammar=None, *, ending=(EOS,), stopping=(EOS,), **options):
        matcher = None
        if grammar is not None:
            request = grammar_request(StructuredOutputsParams(**grammar))
            matcher = compiler.compile(compiler.translate(request))
        return RowConstraint(vocabulary, matcher, ending=ending, stopping=stopping, **options)

    return make


def masks_of(constraint, drafts=()):
    masks = np.zeros((1 + len(drafts), -(-SIZE // 32)), np.int32)
    constraint.fill_masks(drafts, masks)
    return masks


def allowed(constraint):
    bits = np.unpackbits(masks_of(constraint)[0].view(np.uint8), bitorder="little")
    return bits.nonzero()[0].tolist()


def ids(text):
    return TOKENIZER.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("grammar", GRAMMARS, ids=lambda grammar: next(iter(grammar)))
@pytest.mark.parametrize("reasoning", [None, ReasoningSpan(ends=["</think>"])], ids=["", "thinking"])
def test_masks_behind_drafts_are_those_behind_the_same_tokens(constrain, grammar, reasoning):
    """Walking drafts, some of them impossible, changes nothing; each mask is that of a request that got the tokens."""
    draw = random.Random(str(grammar))
    budget = None if reasoning is None else 4
    walker = constrain(grammar, reasoning=reasoning, budget=budget)
    tokens = []
    for _ in range(14):
        own = constrain(grammar, reasoning=reasoning, budget=budget)
        own.accept(tokens)
        choices = allowed(own)
        assert choices
        draft, behind = [], list(tokens)
        for _ in range(3):
            following = constrain(grammar, reasoning=reasoning, budget=budget)
            following.accept(behind)
            assert following.error is None
            draft.append(draw.choice(allowed(following)) if draw.random() < 0.8 else draw.randrange(SIZE))
            behind.append(draft[-1])
            if draft[-1] not in allowed(following):
                break
        masks = masks_of(walker, [*draft, -1])
        for place in range(1 + len(draft)):
            reference = constrain(grammar, reasoning=reasoning, budget=budget)
            reference.accept([*tokens, *draft[:place]])
            expected = masks_of(reference)[0]
            assert (masks[place] == expected).all(), (place, draft)
            if place < len(draft) and draft[place] not in allowed(reference):
                assert (masks[place + 1 :] == -1).all(), "behind what cannot stand everything is allowed"
                break
        token = draw.choice(choices)
        tokens.append(token)
        walker.accept([token])
        assert walker.error is None


def test_the_end_is_allowed_where_the_grammar_may_end_and_not_before(constrain):
    stop = ids("q")[0]
    constraint = constrain({"regex": "a{2,4}"}, ending=[EOS, stop], stopping=[stop])
    assert not {EOS, stop} & set(allowed(constraint))
    constraint.accept(ids("aaa"))
    assert {EOS, stop} < set(allowed(constraint))
    constraint.accept([EOS])
    assert constraint.error is None and allowed(constraint) == sorted([EOS, stop])
    constraint.accept(ids("a"))
    assert constraint.error is not None and len(allowed(constraint)) > SIZE, "what went wrong masks nothing"


def test_min_tokens_delay_the_end_unless_it_is_all_that_is_left(constrain):
    constraint = constrain({"regex": "a{1,3}"}, min_tokens=5)
    constraint.accept(ids("a"))
    assert EOS not in allowed(constraint)
    constraint.accept(ids("aa"))
    assert allowed(constraint) == [EOS]


def test_a_token_outside_the_grammar_is_an_error(constrain):
    constraint = constrain({"regex": "ab"})
    constraint.accept(ids("x"))
    assert "no token is left" in constraint.error


def text_of(tokens):
    return TOKENIZER.decode(tokens, skip_special_tokens=False)


def test_nothing_but_the_end_of_reasoning_crosses_into_the_grammar(constrain):
    """The demo writes its tags in several tokens; a token that goes on behind the tag is barred."""
    constraint = constrain({"regex": "yes"}, reasoning=ReasoningSpan(ends=["ve,"]))
    constraint.accept(ids("I ha"))
    tails = {TOKENIZER.token_bytes(token_id) for token_id in range(TOKENIZER.vocab_size)}
    crossing = [i for i in range(TOKENIZER.vocab_size) if b"ve," in TOKENIZER.token_bytes(i)[:-1]]
    assert b"ve" in tails and not set(crossing) & set(allowed(constraint))
    constraint.accept(ids("ve"))
    longer = [i for i in range(TOKENIZER.vocab_size) if TOKENIZER.token_bytes(i).startswith(b",")
              and len(TOKENIZER.token_bytes(i)) > 1]  # fmt: skip
    assert not set(longer) & set(allowed(constraint))
    assert ids(",")[0] in allowed(constraint)
    constraint.accept([ids(",")[0]])
    assert all(b"yes".startswith(TOKENIZER.token_bytes(token_id)) for token_id in allowed(constraint))


@pytest.mark.parametrize("budget", [0, 1, 5])
def test_a_spent_budget_writes_the_end(constrain, budget):
    closing = ids("</think>")
    constraint = constrain(reasoning=ReasoningSpan(ends=["</think>"]), budget=budget)
    for _ in range(budget):
        assert len(allowed(constraint)) > 1000
        constraint.accept(ids("a"))
    for token_id in closing:
        assert allowed(constraint) == [token_id]
        constraint.accept([token_id])
    assert len(allowed(constraint)) >= SIZE and constraint.error is None


def test_reasoning_that_ends_by_itself_spends_no_budget(constrain):
    constraint = constrain({"regex": "ok"}, reasoning=ReasoningSpan(ends=["</think>"]), budget=50)
    constraint.accept([*ids("so"), *ids("</think>")])
    assert all(b"ok".startswith(TOKENIZER.token_bytes(token_id)) for token_id in allowed(constraint))


def test_special_tokens_mark_reasoning_and_are_barred_from_it(constrain):
    """With tags that are tokens: the start is no thought, the end is one token, and no call begins before it."""
    start, end, call = "<|system|>", "<|assistant|>", "<|user|>"
    span = ReasoningSpan(ends=[end], starts=[start], barred=[call])
    constraint = constrain({"regex": "ok"}, reasoning=span, budget=2)
    constraint.accept(ids(start))
    assert ids(call)[0] not in allowed(constraint) and ids(end)[0] in allowed(constraint)
    constraint.accept(ids("a"))
    assert len(allowed(constraint)) > 1000
    constraint.accept(ids("a"))
    assert allowed(constraint) == ids(end)
    constraint.accept(ids(end))
    assert all(b"ok".startswith(TOKENIZER.token_bytes(token_id)) for token_id in allowed(constraint))


def test_the_end_of_the_answer_in_its_reasoning_is_the_end(constrain):
    constraint = constrain({"regex": "ok"}, reasoning=ReasoningSpan(ends=["</think>"]))
    assert EOS in allowed(constraint)
    constraint.accept([EOS])
    assert allowed(constraint) == [EOS]
    ignoring = constrain({"regex": "ok"}, stopping=(), reasoning=ReasoningSpan(ends=["</think>"]))
    ignoring.accept([EOS])
    assert len(allowed(ignoring)) > 1000, "it goes on thinking"


def test_a_costly_grammar_ends_its_request(constrain, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr("omni_engine.engine.structured.constraint.time.thread_time", lambda: next(clock) * 0.2)
    constraint = constrain({"regex": "a*"})
    for _ in range(4):
        masks_of(constraint)
        constraint.accept(ids("a"))
    assert "costs too much time" in constraint.error
