"""The process that tries grammars out: `python -m omni_engine.engine.structured.worker`.

It reads a `WorkerJob`, says that it is ready, and then answers each `GrammarRequest`, a line of JSON each way. Its
memory is limited from then on; what takes too long is for its parent to end. It ends with its input.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import threading

import msgspec

from .grammar_request import GrammarRequest

PR_SET_PDEATHSIG = 1
EXTRA_BYTES = 512 << 20  # for a grammar, on top of what the process has when it is ready
# Less than a thread gets in the engine's process: what does not overflow here does not overflow there.
STACK_BYTES = 4 << 20


class WorkerJob(msgspec.Struct, frozen=True):
    """Which tokens a grammar speaks of."""

    tokenizer_path: str
    vocab_size: int
    eos_token_ids: list[int]  # by the model's config


class WorkerAnswer(msgspec.Struct, frozen=True):
    """The grammar in the library's format, or why it is refused. The first answer, without either, means: ready."""

    grammar: str | None = None
    error: str | None = None


def work() -> None:
    """Serve standard input until it ends."""
    # Whatever the libraries print belongs to the log, not among the answers.
    answers = os.dup(1)
    os.dup2(2, 1)

    from ...models.tokenizer import load_tokenizer
    from .compiler import GrammarCompiler, GrammarError

    def answer(message: WorkerAnswer) -> None:
        data = memoryview(msgspec.json.encode(message) + b"\n")
        while data:
            data = data[os.write(answers, data) :]

    job = msgspec.json.decode(sys.stdin.buffer.readline(), type=WorkerJob)
    try:
        compiler = GrammarCompiler(load_tokenizer(job.tokenizer_path), job.vocab_size, job.eos_token_ids)
    except (ValueError, OSError) as error:
        answer(WorkerAnswer(error=str(error)))
        return
    limit = _address_space() + EXTRA_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answer(WorkerAnswer())
    for line in iter(sys.stdin.buffer.readline, b""):
        request = msgspec.json.decode(line, type=GrammarRequest)
        try:
            grammar = compiler.translate(request)
            compiler.try_out(compiler.compile(grammar))
            answer(WorkerAnswer(grammar))
        except GrammarError as error:
            answer(WorkerAnswer(error=str(error)))
        except MemoryError:
            answer(WorkerAnswer(error="the grammar needs too much memory"))
        except Exception as error:  # a fault of the library's, or of ours, in one grammar
            answer(WorkerAnswer(error=f"{type(error).__name__}: {error}"[:500]))


def _address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def main() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()
