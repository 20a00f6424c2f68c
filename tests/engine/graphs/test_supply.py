"""What can be wrong with the making of graphs: the engine says so and serves eager, or refuses if they are required."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest

from omni_engine import Engine, SamplingParams
from omni_engine.engine.graphs.supply import SCRATCH_PREFIX, GraphError, _sweep_scratch
from omni_engine.ops.cache_folder import cache_root
from omni_engine.ops.cpu.build import available, describe

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def make_engine(path, **options):
    settings = {"dtype": "float32", "max_num_seqs": 2, "max_model_len": 64, "num_gpu_blocks_override": 16}
    return Engine(str(path), **settings, graph_backend="inductor", **options)


def tokens(engine):
    return engine.generate({"prompt_token_ids": [5, 6, 7]}, GREEDY)[0].outputs[0].token_ids


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint):
    return make_checkpoint("LlamaForCausalLM")


@pytest.fixture(scope="module")
def expected(checkpoint):
    return tokens(Engine(str(checkpoint), dtype="float32", max_model_len=64, enforce_eager=True))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of graphs, with the kernels that are built already."""
    root = tmp_path / "cache"
    root.mkdir(mode=0o700)
    if (cache_root() / "kernels").is_dir():
        shutil.copytree(cache_root() / "kernels", root / "kernels")
    monkeypatch.setenv("OMNI_ENGINE_CACHE", str(root))
    return root


def test_without_a_compiler_steps_run_eager(checkpoint, expected, cache, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with caplog.at_level(logging.WARNING):
        engine = make_engine(checkpoint)
        assert engine._core.runner.graphs.wait(30)
    assert tokens(engine) == expected
    assert "steps run eager: $CXX names no program" in caplog.text


def test_without_a_compiler_required_graphs_are_refused(checkpoint, cache, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(GraphError, match=r"6 of 6 graphs cannot be made .*no-such-compiler.*without require_graph"):
        make_engine(checkpoint, require_graph=True)


def test_kernels_that_are_switched_off_leave_the_plain_operators(checkpoint, expected, cache, monkeypatch, caplog):
    """In a process of its own, since a library stays loaded."""
    script = f"""
        from omni_engine import Engine, SamplingParams
        engine = Engine({str(checkpoint)!r}, dtype="float32", max_model_len=64, max_num_seqs=2,
                        num_gpu_blocks_override=16, graph_backend="inductor")
        from omni_engine.ops.table import PLAIN
        assert engine._core.runner.graphs.wait(30)
        assert engine._core.runner.model.ops.table is PLAIN
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        print(engine.generate({{"prompt_token_ids": [5, 6, 7]}}, params)[0].outputs[0].token_ids)
    """
    environment = os.environ | {"OMNI_ENGINE_CPU_KERNELS": "0"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=200, env=environment
    )
    assert done.stdout.strip() == str(expected), done.stderr
    assert "switched off" in done.stderr


def test_a_cache_that_others_may_write_to_is_not_used(checkpoint, expected, cache, caplog):
    (cache / "graphs").mkdir(mode=0o700)
    (cache / "graphs").chmod(0o777)
    with caplog.at_level(logging.WARNING):
        engine = make_engine(checkpoint)
        assert engine._core.runner.graphs.wait(30)
    assert tokens(engine) == expected
    assert "no compiled graphs" in caplog.text
    with pytest.raises(GraphError, match="chmod"):
        make_engine(checkpoint, require_graph=True)


def test_a_cache_that_is_no_folder_is_not_used(checkpoint, expected, cache, caplog):
    (cache / "graphs").write_text("")
    with caplog.at_level(logging.WARNING):
        engine = make_engine(checkpoint)
        assert engine._core.runner.graphs.wait(30)
    assert tokens(engine) == expected
    assert "no compiled graphs" in caplog.text


@pytest.mark.full
def test_a_full_disk_ends_the_compiling_and_costs_no_request(
    compiler, checkpoint, expected, cache, monkeypatch, caplog
):
    """The limit on file sizes stands for the disk; the compiling process inherits it and the compiler's files are
    smaller than the package."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with caplog.at_level(logging.WARNING):
        engine = make_engine(checkpoint, cudagraph_capture_sizes=[1])
        backend = engine._core.runner.graphs.backend
        wait_for(lambda: backend._worker is not None)
        resource.prlimit(backend._worker.pid, resource.RLIMIT_FSIZE, (4096, limit[1]))
        assert engine._core.runner.graphs.wait(200)
    assert tokens(engine) == expected
    assert not engine._core.runner.graphs.reports
    assert "steps run eager" in caplog.text
    assert not list((cache / "graphs").glob("*/graph.pt2"))


@pytest.fixture
def compiler():
    if not available():
        pytest.skip(f"there are no C++ kernels: {describe()}")


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_end_of_the_compiling_process_is_told_and_costs_no_request(compiler, checkpoint, expected, cache, caplog):
    with caplog.at_level(logging.WARNING):
        engine = make_engine(checkpoint)
        backend = engine._core.runner.graphs.backend
        wait_for(lambda: backend.current is not None)
        backend._worker.kill()
        assert engine._core.runner.graphs.wait(30)
    assert tokens(engine) == expected
    assert "the compiling process ended" in caplog.text


def session(leader):
    """Its processes that live."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, of = path.read_text().rpartition(")")[2].split()[:4]
            if int(of) == leader and state != "Z":
                found.append(path)
    return found


def test_what_a_killed_compiling_process_has_started_ends_with_it():
    code = (
        "import subprocess\nfrom omni_engine.engine.graphs.worker import end_session_with_this_process\n"
        "end_session_with_this_process()\nsubprocess.Popen(['sleep', '600']).wait()"
    )
    worker = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    wait_for(lambda: len(session(worker.pid)) == 3)
    worker.kill()
    wait_for(lambda: not session(worker.pid))
    worker.wait()


def test_closing_an_engine_ends_its_compiling_process(compiler, checkpoint, cache):
    engine = make_engine(checkpoint)
    backend = engine._core.runner.graphs.backend
    wait_for(lambda: backend.current is not None)
    assert tokens(engine)  # steps while it compiles
    engine.close()
    assert backend._worker.poll() is not None
    assert not list((cache / "graphs").glob(".tmp-*/graph.pt2"))


def test_what_killed_engines_left_is_swept(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dead = subprocess.Popen(["true"])
    dead.wait()
    for name in (f"{SCRATCH_PREFIX}{dead.pid}-x", f"{SCRATCH_PREFIX}{os.getpid()}-y", "omni-engine-other"):
        (tmp_path / name).mkdir()
    _sweep_scratch()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"{SCRATCH_PREFIX}{os.getpid()}-y",
        "omni-engine-other",
    ]


def test_the_graph_that_steps_ask_for_is_made_first(checkpoint, cache):
    engine = make_engine(checkpoint)
    graphs = engine._core.runner.graphs
    backend = graphs.backend
    params = [SamplingParams(temperature=1.0, seed=1, max_tokens=4, ignore_eos=True)] * 2
    engine.generate([{"prompt_token_ids": [5, 6, 7]}] * 2, params)
    assert backend._demanded[0] == graphs.key_for(2, "gumbel")
    engine.close()


@pytest.mark.full
def test_an_altered_entry_is_compiled_again(compiler, checkpoint, expected, cache, caplog):
    options = {"cudagraph_capture_sizes": [1], "require_graph": True}
    engine = make_engine(checkpoint, **options)
    assert engine._core.runner.graphs.backend.num_compiled == 3
    package = next((cache / "graphs").glob("*/graph.pt2"))
    content = bytearray(package.read_bytes())
    content[len(content) // 2] ^= 1
    package.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        second = make_engine(checkpoint, **options)
    assert second._core.runner.graphs.backend.num_compiled == 1
    assert package.parent.name[:12] in caplog.text
    assert tokens(second) == expected


def test_an_engine_that_is_dropped_ends_its_compiling_process(compiler, checkpoint, cache):
    engine = make_engine(checkpoint)
    backend = engine._core.runner.graphs.backend
    wait_for(lambda: backend.current is not None)
    del engine
    gc.collect()
    assert backend._worker.poll() is not None
