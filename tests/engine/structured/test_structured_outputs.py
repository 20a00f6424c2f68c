"""Answers keep to their grammars under random sampling, and nothing about how they are computed changes a token."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import lark
import pytest

import omni_engine
from omni_engine import Engine, SamplingParams
from omni_engine.engine.constrained_rows import StepMasks

DEMO = Path(omni_engine.__file__).parent / "models" / "demo" / "deepseek"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["boat", "harbour", 7, None]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
        "next": {"$ref": "#/$defs/place"},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
    "$defs": {
        "place": {
            "type": "object",
            "properties": {"at": {"type": "number"}},
            "required": ["at"],
            "additionalProperties": False,
        }
    },
}
TREE = {"type": "array", "items": {"$ref": "#"}, "maxItems": 2}
SUMS = """start: sum
sum: product | sum "+" product
product: NUMBER | "(" sum ")"
NUMBER: /[0-9]{1,3}/
"""
PAIRS = 'root ::= "<" root ">" | [a-c]{2,4}'
CHOICES = ["yes", "no", "perhaps not", 'both "of" them\n']
KINDS = {
    "schema": {"json": SCHEMA, "disable_any_whitespace": True},
    "recursive": {"json": TREE},
    "object": {"json_object": True, "disable_any_whitespace": True},
    "regex": {"regex": r"(\w{2,5} ){3}[^a-z\n]{2}\.$"},
    "choice": {"choice": CHOICES},
    "lark": {"grammar": SUMS},
    "gbnf": {"grammar": PAIRS},
}
QUOTES = {6: 9.0, 97: 14.0}  # " and }: so that a string, and an object, end some time
PROMPTS = [[7 + index] * (3 + 9 * index) for index in range(2)]


def holds(kind, text):
    """Whether a complete text is what was asked for, by somebody else's word."""
    try:
        if kind in ("schema", "recursive", "object"):
            schema = {"schema": SCHEMA, "recursive": TREE, "object": {"type": "object"}}[kind]
            jsonschema.validate(json.loads(text), schema)
        elif kind == "lark":
            lark.Lark(SUMS).parse(text)
        else:
            if kind == "choice":
                return text in CHOICES
            pattern = KINDS["regex"]["regex"] if kind == "regex" else r"(<*)[a-c]{2,4}(>*)"
            match = re.fullmatch(str(pattern), text)
            return bool(match) and (kind != "gbnf" or len(match[1]) == len(match[2]))
    except (ValueError, jsonschema.ValidationError, lark.exceptions.LarkError):
        return False
    return True


def make_engine(speculative=None, **options):
    settings = {
        "dtype": "float32", "max_num_seqs": 4, "max_model_len": 128, "max_num_batched_tokens": 64,
        "enforce_eager": True, "generation_config": "vllm",
    }  # fmt: skip
    return Engine(str(DEMO), speculative_config=speculative, **(settings | options))


def requests(kinds=KINDS, **fields):
    """Each kind behind each prompt, at temperatures at which a model says anything."""
    return [
        (kind, {"prompt_token_ids": prompt}, SamplingParams(
            structured_outputs=constraint, temperature=1.0 + 0.4 * place, seed=10 * place + number,
            **({"max_tokens": 110, "logit_bias": QUOTES if kind == "object" else None} | fields)))
        for number, (kind, constraint) in enumerate(kinds.items()) for place, prompt in enumerate(PROMPTS)
    ]  # fmt: skip


def run(engine, asked):
    outputs = engine.generate([prompt for _, prompt, _ in asked], [params for _, _, params in asked])
    engine.check_integrity()
    return outputs


def told(outputs):
    return [[(one.token_ids, one.text, one.finish_reason, one.stop_reason) for one in out.outputs] for out in outputs]


@pytest.fixture(scope="module")
def engine():
    engine = make_engine(async_scheduling=False, num_gpu_blocks_override=200)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def plain(engine):
    return run(engine, requests())


def test_every_complete_answer_is_what_was_asked_for(plain):
    complete = dict.fromkeys(KINDS, 0)
    for (kind, _, _), output in zip(requests(), plain, strict=True):
        (one,) = output.outputs
        if one.finish_reason == "stop":
            complete[kind] += 1
            assert holds(kind, one.text), (kind, one.text)
            assert one.token_ids[-1] == 1, "the end is the model's own EOS"
        else:
            assert len(one.token_ids) == 110
    assert all(complete.values()), complete


def test_without_masks_no_answer_is(engine, monkeypatch):
    """The control: the same requests with every token allowed."""
    make = StepMasks._make

    def unmasked(self):
        rows, masks = make(self)
        masks[:] = -1
        return rows, masks

    monkeypatch.setattr(StepMasks, "_make", unmasked)
    monkeypatch.setattr("omni_engine.engine.structured.constraint.RowConstraint.accept", lambda self, ids: None)
    asked = requests(max_tokens=30)
    assert not any(
        holds(kind, out.outputs[0].text) for (kind, _, _), out in zip(asked, run(engine, asked), strict=True)
    )


WAYS = {
    "overlap": {},
    "one after another, padded": {
        "async_scheduling": False, "enforce_eager": False, "graph_backend": "eager", "cudagraph_capture_sizes": [2, 4],
    },
    "preemption": {"num_gpu_blocks_override": 12},
    "stream": {"stream": True},
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_scheduling_changes_no_token(plain, way):
    options = dict(WAYS[way])
    stream = options.pop("stream", False)
    engine = make_engine(**options)
    if stream:  # as on a device that computes by itself: step n + 1 is launched before step n is read
        engine._core._thread.shutdown()
        engine._core._thread = None
    assert told(run(engine, requests())) == told(plain)
    if way == "preemption":
        assert engine.stats().num_preemptions
    engine.close()


@pytest.mark.parametrize("method", [
    ("mtp", 1), ("mtp", 3), pytest.param(("mtp", 2), marks=pytest.mark.full),
    pytest.param(("ngram", 3), marks=pytest.mark.full),
])  # fmt: skip
@pytest.mark.parametrize("stream", [False, True], ids=["thread", "stream"])
def test_speculation_changes_no_token(plain, method, stream):
    name, num_drafts = method
    config = {"method": name, "num_speculative_tokens": num_drafts, "adaptive_depth": False}
    engine = make_engine(config, num_gpu_blocks_override=12)
    if stream:
        engine._core._thread.shutdown()
        engine._core._thread = None
    assert told(run(engine, requests())) == told(plain)
    assert engine.stats().drafts.num_accepted_tokens > 5, "nothing was accepted, so this shows little"
    assert engine.stats().num_preemptions
    engine.close()


def test_the_comparison_sees_masks_that_do_not_walk_the_drafts(plain, monkeypatch):
    """The control: every place of a step gets the first one's mask."""
    make = StepMasks._make

    def standing(self):
        rows, masks = make(self)
        width = 1 + self._num_drafts
        if len(masks) % width == 0 and self._num_drafts:
            masks = masks.reshape(-1, width, masks.shape[1])[:, :1].repeat(width, axis=1).reshape(masks.shape)
        return rows, masks

    monkeypatch.setattr(StepMasks, "_make", standing)
    engine = make_engine({"method": "mtp", "num_speculative_tokens": 3, "adaptive_depth": False})
    try:
        different = told(run(engine, requests())) != told(plain)
    except ValueError as error:
        different = "no token is left" in str(error)
    assert different
    engine.close()


def test_n_sequences_have_their_own_place_in_the_grammar(engine):
    kinds = ("schema", "regex", "gbnf")
    settings = {kind: {"structured_outputs": KINDS[kind], "max_tokens": 60} for kind in kinds}
    outputs = engine.generate([PROMPTS[1]] * 3, [SamplingParams(n=3, seed=3, **settings[kind]) for kind in kinds])
    places = [(kind, index) for kind in kinds for index in range(3)]
    params = [SamplingParams(seed=3 + index, **settings[kind]) for kind, index in places]
    alone = engine.generate([PROMPTS[1]] * len(params), params)
    for (kind, index), one in zip(places, alone, strict=True):
        among = outputs[kinds.index(kind)].outputs[index]
        assert among.token_ids == one.outputs[0].token_ids
        assert among.finish_reason == "length" or holds(kind, among.text)
    assert all(len({one.text for one in output.outputs}) > 1 for output in outputs)


def test_logprobs_are_of_what_the_grammar_leaves(engine):
    params = SamplingParams(structured_outputs={"choice": ["a", "bb"]}, logprobs=5, seed=1)
    (one,) = engine.generate([PROMPTS[0]], params)[0].outputs
    first = {entry.decoded_token: entry.logprob for entry in one.logprobs[0].values()}
    allowed = {token: value for token, value in first.items() if value > -1e9}
    assert set(allowed) <= {"a", "b", "bb"}
    assert sum(pow(2.718281828, value) for value in allowed.values()) == pytest.approx(1, abs=1e-4)
    assert one.logprobs[-1][1].logprob == pytest.approx(0, abs=1e-4), "only the end is left"


def test_the_end_waits_for_min_tokens_unless_nothing_else_is_left(engine):
    loose = SamplingParams(structured_outputs={"regex": "[ab]*"}, min_tokens=9, max_tokens=40, seed=2)
    tight = SamplingParams(structured_outputs={"choice": ["a"]}, min_tokens=6, max_tokens=40, seed=2)
    first, second = (out.outputs[0] for out in engine.generate([PROMPTS[0]] * 2, [loose, tight]))
    assert len(first.token_ids) > 9 and re.fullmatch("[ab]{9,}", first.text)
    assert second.text == "a" and second.finish_reason == "stop"


def test_stop_tokens_end_where_the_grammar_may_and_eos_is_not_the_end_if_ignored(engine):
    stop = engine.tokenizer.encode(" the", add_special_tokens=False)[0]
    params = SamplingParams(structured_outputs={"regex": "x{4,}"}, stop_token_ids=[stop], logit_bias={stop: 100.0})
    (one,) = engine.generate([PROMPTS[0]], params)[0].outputs
    assert (one.finish_reason, one.stop_reason) == ("stop", stop) and re.fullmatch("x{4,}", one.text)
    ignoring = SamplingParams(structured_outputs={"choice": ["yes"]}, ignore_eos=True, max_tokens=9)
    (one,) = engine.generate([PROMPTS[0]], ignoring)[0].outputs
    assert (one.finish_reason, one.text, len(one.token_ids)) == ("length", "yes", 9)


def test_a_request_whose_masks_leave_nothing_ends_alone(engine):
    digit = engine.tokenizer.encode("7", add_special_tokens=False)
    nothing = SamplingParams(structured_outputs={"choice": ["yes"]}, allowed_token_ids=digit)
    engine.add_request("bad", PROMPTS[0], nothing)
    engine.add_request("good", PROMPTS[0], SamplingParams(structured_outputs={"choice": ["yes"]}))
    finished, failures = [], []
    while engine.has_unfinished_requests():
        try:
            finished += [output for output in engine.step() if output.finished]
        except ValueError as error:
            failures.append(str(error))
    assert [output.request_id for output in finished] == ["good"] and finished[0].outputs[0].text == "yes"
    assert len(failures) == 1 and "no token is left" in failures[0]
    engine.check_integrity()


def test_constrained_and_free_requests_share_steps(engine):
    free = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    alone = engine.generate([PROMPTS[1]], free)[0].outputs[0].token_ids
    asked = [free, SamplingParams(structured_outputs=KINDS["schema"], seed=1, max_tokens=60)]
    assert engine.generate([PROMPTS[1]] * 2, asked)[0].outputs[0].token_ids == alone
