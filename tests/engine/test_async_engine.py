"""`AsyncEngine` with its core in a real process of its own: streams, aborts, failures and ends."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from omni_engine import AsyncEngine, Engine, EngineArgs, RequestOutputKind, SamplingParams, ValidationError
from omni_engine.engine.errors import EngineDeadError, EngineRestartError, RequestRejectedError
from omni_engine.engine.output_processor import new_state

PROMPT = [(5 * i) % 400 + 4 for i in range(40)]


def arguments(path, **options):
    return EngineArgs(**{"model": str(path), "dtype": "float32", "max_model_len": 192, "max_num_seqs": 8, **options})


def greedy(**fields):
    return SamplingParams(**{"temperature": 0, "max_tokens": 20, "ignore_eos": True, **fields})


@pytest.fixture(scope="module")
def path(make_checkpoint):
    return make_checkpoint("LlamaForCausalLM")


@pytest.fixture(scope="module")
def run():
    """Runs a coroutine on one event loop that lives as long as the module."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield lambda coroutine: asyncio.run_coroutine_threadsafe(coroutine, loop).result(120)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)


@pytest.fixture(scope="module")
def shared_engine(path, run):
    async def make():
        engine = AsyncEngine.from_engine_args(arguments(path))
        await engine.wait_ready()
        return engine

    engine = run(make())
    yield engine
    run(engine.shutdown())


async def settled(engine):
    """Wait until the core has nothing left to do, then check that it holds no block."""
    for _ in range(200):
        stats = await engine.stats()
        if not stats["num_running"] and not stats["num_waiting"]:
            break
        await asyncio.sleep(0.02)
    assert stats["num_running"] == stats["num_waiting"] == 0
    assert stats["kv_cache_usage"] == 0


@pytest.fixture
def engine(shared_engine, run):
    yield shared_engine
    run(settled(shared_engine))
    assert not shared_engine._streams
    assert not shared_engine._front.outputs.requests


async def collect(stream):
    return [output async for output in stream]


def test_tokens_equal_the_embedded_engine(engine, path, run):
    params = [greedy(), SamplingParams(seed=4, max_tokens=20, ignore_eos=True), greedy(n=1, logprobs=2)]
    embedded = Engine(args=arguments(path)).generate([PROMPT] * 3, params)

    async def all_at_once():
        return await asyncio.gather(*(collect(engine.generate(PROMPT, p, f"r{i}")) for i, p in enumerate(params)))

    for outputs, expected in zip(run(all_at_once()), embedded, strict=True):
        assert outputs[-1].outputs == expected.outputs
        assert outputs[-1].finished


def test_streaming_yields_as_tokens_come(engine, run):
    outputs = run(collect(engine.generate(PROMPT, greedy(output_kind=RequestOutputKind.DELTA), "s")))
    assert len(outputs) > 5
    assert sum(len(output.outputs[0].token_ids) for output in outputs) == 20


def test_the_same_request_id_may_run_twice(engine, run):
    async def twice():
        return await asyncio.gather(*(collect(engine.generate(PROMPT, greedy(), "same")) for _ in range(2)))

    first, second = run(twice())
    assert first[-1].outputs == second[-1].outputs


def test_leaving_the_generator_aborts(engine, run):
    async def leave():
        stream = engine.generate(PROMPT, greedy(max_tokens=150), "left")
        async for _ in stream:
            break
        await stream.aclose()

    run(leave())


def test_cancelling_at_any_time_aborts(engine, run):
    async def cancel_many():
        tasks = [
            asyncio.create_task(collect(engine.generate(PROMPT[i % 7 :], SamplingParams(n=2, max_tokens=100), str(i))))
            for i in range(40)
        ]
        for index, task in enumerate(tasks):
            await asyncio.sleep(0.003 * (index % 5))
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert any(isinstance(result, asyncio.CancelledError) for result in results)

    run(cancel_many())


def test_abort_by_id_ends_the_stream_with_reason_abort(engine, run):
    async def abort():
        outputs = []
        async for output in engine.generate(PROMPT, greedy(max_tokens=150), "to-abort"):
            outputs.append(output)
            if len(outputs) == 2:
                await engine.abort("to-abort")
        return outputs

    outputs = run(abort())
    assert outputs[-1].finished
    assert outputs[-1].outputs[0].finish_reason == "abort"
    assert len(outputs[-1].outputs[0].token_ids) < 150


def test_bad_input_raises_before_the_core_hears_of_it(engine, run):
    with pytest.raises(ValidationError, match="out of vocabulary"):
        run(collect(engine.generate([9999], greedy(), "bad")))
    with pytest.raises(ValidationError, match="maximum context length"):
        run(collect(engine.generate("word " * 3000, greedy(), "long")))


def test_chat_messages_are_a_prompt(engine, run):
    messages = [{"role": "user", "content": "Where are the boats?"}]
    output = run(collect(engine.generate(messages, greedy(), "chat")))[-1]
    assert output.prompt == "<|im_start|>user\nWhere are the boats?<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(ValidationError, match="role"):
        run(collect(engine.generate({"messages": [{"content": "x"}]}, greedy(), "bad")))


@pytest.mark.parametrize(
    "request_fields", [{"priority": 2**80}, {"priority": None}, {"prompt": {"prompt": "a", "cache_salt": "\ud800"}}]
)
def test_what_cannot_be_sent_to_the_core_is_refused(engine, run, request_fields):
    fields = {"prompt": "The harbour", "priority": 0, **request_fields}
    prompt = fields.pop("prompt")
    with pytest.raises(ValidationError):
        run(collect(engine.generate(prompt, greedy(), "bad", **fields)))


def test_the_core_refuses_a_request_it_cannot_read_and_goes_on(engine, run):
    """The front checks everything; should it ever miss something, that must cost one request and no more."""

    async def unreadable():
        request = await engine._process("bad", PROMPT, greedy(), 0)
        request.core_requests[0].params.top_p = 7.0  # set behind the validation's back
        stream = engine._submit(new_state(request, engine.tokenizer))
        try:
            return await asyncio.wait_for(stream.get(), 10)
        finally:
            engine._forget(request.key)

    error = run(unreadable())
    assert isinstance(error, ValueError)
    assert "top_p" in str(error)
    assert len(run(collect(engine.generate(PROMPT, greedy(), "good")))[-1].outputs[0].token_ids) == 20


def test_starting_twice_starts_one_core(path, run):
    async def start():
        engine = AsyncEngine.from_engine_args(arguments(path), start=True)
        await asyncio.gather(engine.start(), engine.start(), engine.wait_ready())
        outputs = await collect(engine.generate(PROMPT, greedy(), "r"))
        await engine.shutdown()
        return outputs

    assert run(start())[-1].finished


def test_a_long_text_is_tokenized_like_a_short_one(engine, run):
    text = " ".join(["harbour"] * 800)  # over the length that is tokenized in a thread
    params = greedy(truncate_prompt_tokens=30)
    output = run(collect(engine.generate(text, params, "long")))[-1]
    assert output.prompt_token_ids == engine.tokenizer.encode(text)[-30:]
    assert output.prompt == text


def test_a_full_queue_refuses_and_serves_the_others(path, run):
    async def crowd():
        engine = AsyncEngine(arguments(path, max_num_queued_reqs=2, max_num_seqs=1))
        tasks = [asyncio.create_task(collect(engine.generate(PROMPT, greedy(), str(i)))) for i in range(12)]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        await engine.shutdown()
        return results

    results = run(crowd())
    refused = [result for result in results if isinstance(result, RequestRejectedError)]
    served = [result for result in results if isinstance(result, list)]
    assert len(refused) + len(served) == 12
    assert len(refused) >= 8
    assert all(len(result[-1].outputs[0].token_ids) == 20 for result in served)


def test_a_killed_core_fails_every_stream_and_every_later_request(path, run):
    async def kill():
        engine = AsyncEngine(arguments(path))
        await engine.wait_ready()
        tasks = [
            asyncio.create_task(collect(engine.generate(PROMPT, greedy(max_tokens=150), str(i)))) for i in range(4)
        ]
        await asyncio.sleep(0.1)
        os.kill(engine._client.process.pid, signal.SIGKILL)
        results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
        assert all(isinstance(result, EngineDeadError) for result in results)
        assert engine.errored and not engine.is_ready
        with pytest.raises(EngineDeadError):
            await collect(engine.generate(PROMPT, greedy(), "late"))
        await engine.shutdown()

    run(kill())


def test_a_core_lost_twice_is_replaced_twice_without_leaks(path, run):
    async def lose():
        engine = AsyncEngine(arguments(path), restart_core=True)
        await engine.wait_ready()
        files = len(os.listdir("/proc/self/fd"))
        for _ in range(2):
            running = asyncio.create_task(collect(engine.generate(PROMPT, greedy(max_tokens=150), "r")))
            while not engine._streams:
                await asyncio.sleep(0.01)
            os.kill(engine._client.process.pid, signal.SIGKILL)
            with pytest.raises(EngineRestartError):
                await running
            later = await asyncio.wait_for(collect(engine.generate(PROMPT, greedy(), "later")), 60)
            assert len(later[-1].outputs[0].token_ids) == 20
        assert not engine.errored
        assert len(os.listdir("/proc/self/fd")) == files
        await engine.shutdown()

    run(lose())


def test_a_core_that_is_lost_while_it_loads_is_not_replaced(path, run):
    async def lose():
        engine = AsyncEngine(arguments(path), restart_core=True)
        await engine.start()
        os.kill(engine._client.process.pid, signal.SIGKILL)
        with pytest.raises(EngineDeadError):
            await asyncio.wait_for(engine.wait_ready(), 10)
        await engine.shutdown()

    run(lose())


def test_a_folder_that_is_no_checkpoint_is_said_at_start(tmp_path, run):
    async def start():
        engine = AsyncEngine(arguments(tmp_path))
        with pytest.raises(OSError, match=r"config\.json"):
            await engine.wait_ready()
        assert engine.errored
        await engine.shutdown()

    run(start())


def test_a_cache_too_small_is_said_with_the_arithmetic(path, run):
    async def start():
        engine = AsyncEngine(arguments(path, num_gpu_blocks_override=3))
        with pytest.raises(EngineDeadError, match="lower max_model_len"):
            await engine.wait_ready()
        await engine.shutdown()

    run(start())


def test_shutdown_ends_streams_with_reason_abort_and_refuses_new_ones(path, run):
    async def stop():
        engine = AsyncEngine(arguments(path))
        await engine.wait_ready()
        task = asyncio.create_task(collect(engine.generate(PROMPT, greedy(max_tokens=150), "r")))
        await asyncio.sleep(0.05)
        pid = engine._client.process.pid
        await engine.shutdown()
        outputs = await asyncio.wait_for(task, 5)
        assert outputs[-1].outputs[0].finish_reason == "abort"
        with pytest.raises(EngineDeadError):
            await collect(engine.generate(PROMPT, greedy(), "late"))
        return pid

    assert not alive(run(stop()))


def test_shutdown_with_a_timeout_lets_requests_end(path, run):
    async def stop():
        engine = AsyncEngine(arguments(path))
        await engine.wait_ready()
        task = asyncio.create_task(collect(engine.generate(PROMPT, greedy(), "r")))
        await asyncio.sleep(0)
        while not engine._streams:
            await asyncio.sleep(0)
        await engine.shutdown(timeout=20)
        return await task

    assert run(stop())[-1].outputs[0].finish_reason == "length"


def test_the_core_dies_with_its_front(path):
    script = (
        "import asyncio, sys\n"
        "from omni_engine import AsyncEngine, EngineArgs\n"
        "async def main():\n"
        "    engine = AsyncEngine(EngineArgs(model=sys.argv[1]))\n"
        "    await engine.start()\n"
        "    print(engine._client.process.pid, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    front = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert front.stdout is not None
        pid = int(front.stdout.readline())
        assert alive(pid)
    finally:
        front.kill()
        front.wait()
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
