"""`omni-engine generate` and `omni-engine chat`: a model on the terminal, in this process."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..scheduler.sampling_params import RequestOutputKind, SamplingParams
from .arguments import CommandParser, add_engine_arguments, add_sampling_arguments, engine_args, sampling_fields
from .serve_arguments import read_chat_template, take_model_argument

if TYPE_CHECKING:
    from ..engine.engine import Engine
    from ..engine.inputs import PromptType

GENERATE_MAX_TOKENS = 256
_HELP = "/reset forgets the conversation, /exit or Ctrl-D ends, Ctrl-C stops an answer"


def generate_parser() -> CommandParser:
    parser = CommandParser("generate", "[MODEL] [PROMPT]", "Complete a prompt and print the text as it comes.")
    words = (
        "the model, unless --model names it, and the prompt, else read from the standard input; one argument with "
        "spaces is a prompt for the demo model"
    )
    parser.add_argument("words", metavar="MODEL PROMPT", nargs="*", help=words)
    add_sampling_arguments(parser)
    add_engine_arguments(parser)
    return parser


def chat_parser() -> CommandParser:
    parser = CommandParser("chat", "[MODEL]", f"Talk to a model on the terminal: {_HELP}.")
    parser.add_argument(
        "model_argument", metavar="MODEL", nargs="?", help="checkpoint directory or model id; none: the demo"
    )
    parser.add_argument("--system", help="system prompt")
    parser.add_argument("--chat-template", help="Jinja file, or the template itself, if not the model's own")
    add_sampling_arguments(parser)
    add_engine_arguments(parser)
    return parser


def run_generate(parser: CommandParser, arguments: argparse.Namespace) -> int:
    words = list(arguments.words)
    # No model id holds a space, and hardly a folder does.
    prompt_only = len(words) == 1 and " " in words[0] and not Path(words[0]).is_dir()
    arguments.model_argument = words.pop(0) if words and "model" not in arguments and not prompt_only else None
    take_model_argument(parser, arguments)
    if len(words) > 1:
        parser.error(f"one prompt at a time; quote it if it holds spaces: {words[1]}")
    prompt = words[0] if words else sys.stdin.read()
    engine = _load_engine(arguments)
    params = _sampling_params(engine, {"max_tokens": GENERATE_MAX_TOKENS, **sampling_fields(arguments)})
    with _interruptible() as interrupt:
        _print_answer(engine, prompt, params, interrupt)
    return 0


def run_chat(parser: CommandParser, arguments: argparse.Namespace) -> int:
    take_model_argument(parser, arguments)
    template = read_chat_template(arguments.chat_template)
    engine = _load_engine(arguments)
    params = _sampling_params(engine, {"max_tokens": None, **sampling_fields(arguments)})
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives input() line editing)
        print(_HELP)
    Conversation(engine, params, system=arguments.system, chat_template=template).run()
    return 0


class Conversation:
    """A chat in turns, read from the standard input; keeps the messages of both sides."""

    def __init__(
        self, engine: Engine, params: SamplingParams, *, system: str | None = None, chat_template: str | None = None
    ) -> None:
        self.engine = engine
        self.params = params
        self.chat_template = chat_template
        self.opening: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self.opening)

    def run(self) -> None:
        """Read and answer lines until /exit or the end of the input."""
        shown = "> " if sys.stdin.isatty() else ""
        while True:
            try:
                line = input(shown).strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                print(f"\n{_HELP}")
                continue
            if line in ("/exit", "/quit"):
                return
            if line == "/reset":
                self.messages = list(self.opening)
            elif line.startswith("/"):
                print(_HELP)
            elif line:
                self.answer(line)

    def answer(self, text: str) -> None:
        """Answer one message and print the answer; a message that cannot be answered is forgotten."""
        self.messages.append({"role": "user", "content": text})
        try:
            rendered = self.engine.chat_prompt(self.messages, chat_template=self.chat_template)
            tokenizer = self.engine.tokenizer
            assert tokenizer is not None  # chat_prompt needs it
            # The template writes the special tokens itself.
            token_ids = tokenizer.encode(rendered, add_special_tokens=False)
            with _interruptible() as interrupt:
                answer = _print_answer(self.engine, {"prompt_token_ids": token_ids}, self.params, interrupt)
        except ValueError as error:
            self.messages.pop()
            print(f"{error}\n(/reset forgets the conversation so far)", file=sys.stderr)
            return
        self.messages.append({"role": "assistant", "content": answer})


class _Interrupt:
    """Whether Ctrl-C was pressed since the answer began."""

    pressed = False


@contextlib.contextmanager
def _interruptible() -> Iterator[_Interrupt]:
    """The first Ctrl-C inside is only noted, so that no step is cut in two; the second one ends the program."""
    interrupt = _Interrupt()

    def note(_number: int, _frame: Any) -> None:
        interrupt.pressed = True
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)


def _print_answer(engine: Engine, prompt: PromptType, params: SamplingParams, interrupt: _Interrupt) -> str:
    """Print the answer as it comes; returns it, as far as it came."""
    answer = ""
    with contextlib.closing(engine.stream(prompt, params)) as outputs:  # type: ignore[type-var]  (a generator)
        for output in outputs:
            piece = output.outputs[0].text
            answer += piece
            print(piece, end="", flush=True)
            if interrupt.pressed:
                break
    print()
    return answer


def _load_engine(arguments: argparse.Namespace) -> Engine:
    from ..engine.engine import Engine  # brings torch

    return Engine(args=engine_args(arguments))


def _sampling_params(engine: Engine, fields: dict[str, Any]) -> SamplingParams:
    return engine.get_default_sampling_params().clone(**fields, output_kind=RequestOutputKind.DELTA)
