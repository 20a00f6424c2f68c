"""An engine core with nothing to compute prepares the next steps' memory, and stops when there is news."""

from __future__ import annotations

import socket

from omni_engine import Engine, SamplingParams
from omni_engine.engine.core_process import CoreChannel, _step_until_told
from omni_engine.engine.heartbeat import StepClock
from omni_engine.engine.messages import Stop, frame

MOST_PIECES = 50


def test_memory_is_prepared_a_step_ahead_of_the_blocks_given_out(make_checkpoint, monkeypatch):
    engine = Engine(
        str(make_checkpoint("LlamaForCausalLM")),
        dtype="float32",
        block_size=16,
        max_model_len=256,
        max_num_batched_tokens=72,
        max_num_seqs=4,
        num_gpu_blocks_override=20,
        enforce_eager=True,
    )
    core = engine._core
    asked = []
    bring = core._pages.bring
    monkeypatch.setattr(core._pages, "bring", lambda num_blocks: asked.append(num_blocks) or bring(num_blocks))

    def wanted() -> int:
        for _ in range(MOST_PIECES):
            if not core.prepare():
                return asked[-1]
        raise AssertionError("the pages never end")

    params = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
    assert wanted() == 1 + 5  # the null block, and those of 72 tokens
    engine.generate([list(range(5, 45))], params)
    assert wanted() == 1 + 3 + 5
    engine.generate([list(range(105, 305))], params)
    assert wanted() == 20  # all there are
    assert not core.prepare()


def test_messages_are_read_between_two_pieces():
    near, far = socket.socketpair()

    class Core:
        has_unfinished = False
        pieces = 0

        def prepare(self) -> bool:
            self.pieces += 1
            assert self.pieces < MOST_PIECES
            if self.pieces == 3:
                far.sendall(frame(Stop()))
            return True

    core = Core()
    with near, far:
        _step_until_told(core, CoreChannel(near), StepClock())
    assert core.pieces == 3
