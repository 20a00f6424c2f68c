"""The process that tries grammars out: `python -m omni_engine.engine.structured.worker`.

Standard input is a socket of whole messages. It brings a `WorkerJob`, and once that is answered, numbers: with the end
of another socket, a trial begins there; alone, the trial of that number is to end. Each trial is a child of its own,
made from what this process has loaded: it reads a `GrammarRequest`, answers it and is gone. So trials run side by side,
and none has to be waited for. Memory is limited; what takes too long is for the parent to end. All ends with the input.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
import signal
import socket
import threading
from typing import TYPE_CHECKING

import msgspec

from .grammar_request import GrammarRequest

if TYPE_CHECKING:
    from .compiler import GrammarCompiler

PR_SET_PDEATHSIG = 1
EXTRA_BYTES = 512 << 20  # for a grammar, on top of what the process has when it is ready
# Less than a thread gets in the engine's process: what does not overflow here does not overflow there.
STACK_BYTES = 4 << 20
JOB_BYTES = 1 << 16  # a path and a few numbers
BEGUN = b"\n"
NICENESS = 5  # the engine goes first


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
    control = socket.socket(fileno=os.dup(0))
    from ...models.tokenizer import load_tokenizer
    from .compiler import GrammarCompiler

    job = msgspec.json.decode(control.recv(JOB_BYTES), type=WorkerJob)
    try:
        compiler = GrammarCompiler(load_tokenizer(job.tokenizer_path), job.vocab_size, job.eos_token_ids)
        compiler.compile(compiler.translate(GrammarRequest("regex", "a")))  # what is made once, is made here
    except (ValueError, OSError) as error:
        control.send(msgspec.json.encode(WorkerAnswer(error=str(error))))
        return
    limit = _address_space() + EXTRA_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    gc.freeze()  # a child's collection must not touch, and so copy, what all of them share
    control.send(msgspec.json.encode(WorkerAnswer()))
    _serve(control, compiler)


def _serve(control: socket.socket, compiler: GrammarCompiler) -> None:
    children: dict[int, int] = {}  # process by number; until it is waited for, its id is nobody else's
    while True:
        data, descriptors, _, _ = socket.recv_fds(control, 64, 1)
        if not data:
            return
        for number, process in list(children.items()):
            if os.waitpid(process, os.WNOHANG)[0]:
                del children[number]
        number = int(data)
        if not descriptors:
            if number in children:
                os.kill(children[number], signal.SIGKILL)
            continue
        with socket.socket(fileno=descriptors[0]) as trial:
            process = os.fork()
            if process:
                children[number] = process
                continue
            try:
                ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
                os.nice(NICENESS)
                control.close()
                _try_out(trial, compiler)
            finally:
                os._exit(0)


def _try_out(trial: socket.socket, compiler: GrammarCompiler) -> None:
    """Read a request, answer it; `BEGUN` goes before, since from then on what happens is the grammar's fault."""
    text = bytearray()
    trial.sendall(BEGUN)
    while piece := trial.recv(1 << 16):
        text += piece
    try:
        grammar = compiler.translate(msgspec.json.decode(text, type=GrammarRequest))
        compiler.try_out(compiler.compile(grammar))
        answer = WorkerAnswer(grammar)
    except ValueError as error:
        answer = WorkerAnswer(error=str(error))
    except MemoryError:
        answer = WorkerAnswer(error="the grammar needs too much memory")
    except Exception as error:  # a fault of the library's, or of ours, in one grammar
        answer = WorkerAnswer(error=f"{type(error).__name__}: {error}"[:500])
    with contextlib.suppress(OSError):  # nobody waits any more
        trial.sendall(msgspec.json.encode(answer) + b"\n")


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
