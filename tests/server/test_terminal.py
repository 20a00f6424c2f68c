"""`omni-engine generate` and `chat` over a fake embedded engine."""

from __future__ import annotations

import io
import os
import signal

import pytest

from omni_engine.engine.config import DEMO_MODEL
from omni_engine.engine.outputs import CompletionOutput, RequestOutput
from omni_engine.scheduler.sampling_params import RequestOutputKind, SamplingParams, ValidationError
from omni_engine.server import terminal
from omni_engine.server.arguments import engine_args
from omni_engine.server.cli import main


class FakeEngine:
    """Streams "one two three", a word at a time."""

    def __init__(self) -> None:
        self.tokenizer = self
        self.prompts = []
        self.params: list[SamplingParams] = []
        self.conversations = []
        self.interrupts = False
        self.closed = 0

    def get_default_sampling_params(self) -> SamplingParams:
        return SamplingParams(temperature=0.7)

    def encode(self, text, add_special_tokens=True):
        assert not add_special_tokens
        return [ord(char) for char in text]

    def chat_prompt(self, messages, chat_template=None):
        self.conversations.append([dict(message) for message in messages])
        if messages[-1]["content"] == "long":
            raise ValidationError("the conversation is too long", parameter="input_tokens", value=9)
        return "|".join(message["content"] for message in messages)

    def stream(self, prompt, params):
        self.prompts.append(prompt)
        self.params.append(params)
        try:
            for place, word in enumerate(("one ", "two ", "three")):
                if self.interrupts and place == 1:
                    os.kill(os.getpid(), signal.SIGINT)
                yield RequestOutput("0", None, [1], None, [CompletionOutput(0, word, [place])], place == 2)
        finally:
            self.closed += 1


@pytest.fixture
def engine(monkeypatch):
    fake = FakeEngine()
    monkeypatch.setattr(terminal, "_load_engine", lambda _arguments: fake)
    return fake


def type_lines(monkeypatch, *lines):
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_generate_prints_the_text_alone(engine, capsys):
    assert main(["generate", "--model", "m", "Once upon", "--max-tokens", "9", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == "one two three\n"
    assert engine.prompts == ["Once upon"]
    params = engine.params[0]
    assert (params.max_tokens, params.temperature, params.output_kind) == (9, 0.0, RequestOutputKind.DELTA)


def test_generate_takes_the_model_by_position_and_the_models_defaults(engine):
    assert main(["generate", "m", "Once"]) == 0
    assert engine.prompts == ["Once"]
    assert engine.params[0].temperature == 0.7


def test_one_argument_with_spaces_is_a_prompt_for_the_demo(engine, monkeypatch):
    loaded = []
    monkeypatch.setattr(terminal, "_load_engine", lambda arguments: loaded.append(engine_args(arguments)) or engine)
    assert main(["generate", "In the beginning"]) == 0
    assert engine.prompts == ["In the beginning"]
    assert [args.model for args in loaded] == [str(DEMO_MODEL)]


def test_generate_reads_the_prompt_from_the_input(engine, monkeypatch):
    type_lines(monkeypatch, "from a pipe")
    assert main(["generate", "m"]) == 0
    assert engine.prompts == ["from a pipe\n"]


def test_ctrl_c_stops_an_answer_after_its_current_step(engine, capsys):
    engine.interrupts = True
    before = signal.getsignal(signal.SIGINT)
    assert main(["generate", "m", "Once"]) == 0
    assert capsys.readouterr().out == "one two \n"
    assert engine.closed == 1
    assert signal.getsignal(signal.SIGINT) is before


def test_chat_remembers_both_sides_until_reset(engine, monkeypatch, capsys):
    type_lines(monkeypatch, "hi", "", "and?", "/reset", "again", "/exit", "never read")
    assert main(["chat", "m", "--system", "be"]) == 0
    system = {"role": "system", "content": "be"}
    first = {"role": "user", "content": "hi"}
    answer = {"role": "assistant", "content": "one two three"}
    assert engine.conversations == [
        [system, first],
        [system, first, answer, {"role": "user", "content": "and?"}],
        [system, {"role": "user", "content": "again"}],
    ]
    assert capsys.readouterr().out == "one two three\n" * 3
    assert engine.prompts[0] == {"prompt_token_ids": [ord(char) for char in "be|hi"]}
    assert engine.params[0].max_tokens is None


def test_chat_ends_with_the_input(engine, monkeypatch):
    type_lines(monkeypatch, "hi")
    assert main(["chat", "m"]) == 0


def test_a_message_that_cannot_be_answered_is_told_and_forgotten(engine, monkeypatch, capsys):
    type_lines(monkeypatch, "long", "hi")
    assert main(["chat", "m"]) == 0
    assert "the conversation is too long" in capsys.readouterr().err
    assert engine.conversations[-1] == [{"role": "user", "content": "hi"}]
