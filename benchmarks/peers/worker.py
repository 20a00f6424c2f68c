"""One engine with one model in one process: it loads, says so, and answers each line on stdin with a sample of a
workload, or with the tokens that it makes of the workload's prompts.

    PYTHON worker.py --engine vllm --model checkpoints/llama-160m

Runs under the interpreter of that engine, so it imports nothing but the standard library and the engine.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import importlib.metadata
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

from workloads import WORKLOADS, Generate, Prompts, draw_prompts, measure

THREADS = 2
MAX_LENGTH, MAX_REQUESTS, KV_BYTES = 4096, 32, 2 * 2**30
BATCH_SIZES = [1, 8, 32]
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG: also while this process is stopped


def start_vllm(model: str, extra: dict[str, Any]) -> tuple[str, Generate]:
    """vLLM in this process; its key-value memory is set by VLLM_CPU_KVCACHE_SPACE."""
    module = importlib.import_module("vllm")
    llm = _load(module, {"model": model, "distributed_executor_backend": "uni", **extra})
    return module.__version__, _vllm_like(module, llm)


def start_omni_engine(model: str, extra: dict[str, Any]) -> tuple[str, Generate]:
    """omni-engine in this process, not before its graphs are there."""
    torch = importlib.import_module("torch")
    torch.set_num_threads(THREADS)
    module = importlib.import_module("omni_engine")
    arguments = {"kv_cache_memory_bytes": KV_BYTES, "cudagraph_capture_sizes": BATCH_SIZES, **extra}
    llm = _load(module, {"model": model, **arguments})
    graphs = llm.llm_engine._core.runner.graphs
    keys = [graphs.key_for(size, "greedy") for size in BATCH_SIZES]
    while any(key is not None and not graphs.is_ready(key) for key in keys):  # not all graphs: other ways to sample too
        for key in keys:
            if key is not None and not graphs.is_ready(key):
                graphs.backend.demand(key)
        if graphs.wait(1.0) and not all(key is None or graphs.is_ready(key) for key in keys):
            raise RuntimeError("graphs of greedy steps could not be made; the log says why")
    graphs.close()
    return module.__version__, _vllm_like(module, llm)


def _load(module: Any, arguments: dict[str, Any]) -> Any:
    common = {"dtype": "bfloat16", "max_model_len": MAX_LENGTH, "max_num_seqs": MAX_REQUESTS, "seed": 0}
    return module.LLM(**common | arguments)


def _vllm_like(module: Any, llm: Any) -> Generate:

    def generate(prompts: Prompts, output: int) -> Sequence[Sequence[int]]:
        sampling = module.SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True, detokenize=False)
        answers = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        return [list(answer.outputs[0].token_ids) for answer in answers]

    return generate


def start_openvino(model: str, extra: dict[str, Any]) -> tuple[str, Generate]:
    """OpenVINO GenAI's continuous batching over the export beside the checkpoint, `MODEL-openvino`."""
    genai, openvino, numpy = (importlib.import_module(name) for name in ("openvino_genai", "openvino", "numpy"))
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = KV_BYTES // 2**30
    scheduler.max_num_seqs = MAX_REQUESTS
    scheduler.max_num_batched_tokens = 2048
    scheduler.enable_prefix_caching = True
    # Without bfloat16 instructions it computes in float32, and takes no bfloat16 cache; its own default is 8 bits.
    has_bfloat16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    dtype = openvino.Type.bf16 if has_bfloat16 else openvino.Type.f32
    properties = {
        "INFERENCE_NUM_THREADS": THREADS,
        "INFERENCE_PRECISION_HINT": dtype,
        "KV_CACHE_PRECISION": dtype,
        **extra,
    }
    pipeline = genai.ContinuousBatchingPipeline(f"{model}-openvino", scheduler, "CPU", properties)

    def generate(prompts: Prompts, output: int) -> Sequence[Sequence[int]]:
        config = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = output
        config.ignore_eos, config.do_sample = True, False
        inputs = [openvino.Tensor(numpy.array([prompt], dtype=numpy.int64)) for prompt in prompts]
        return [list(each.m_generation_ids[0]) for each in pipeline.generate(inputs, [config] * len(prompts))]

    return importlib.metadata.version("openvino-genai"), generate


ENGINES = {"omni-engine": start_omni_engine, "vllm": start_vllm, "openvino": start_openvino}


def main() -> None:
    parser = argparse.ArgumentParser(description="Answers lines of JSON on stdin with samples of one engine.")
    parser.add_argument("--engine", choices=ENGINES, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--extra", type=json.loads, default={}, help="JSON: further arguments of the engine")
    arguments = parser.parse_args()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # engines print; stdout is for the answers

    def answer(**fields: Any) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    begin = time.perf_counter()
    version, generate = ENGINES[arguments.engine](arguments.model, arguments.extra)
    loaded = time.perf_counter()
    generate([list(range(100, 116))] * 2, 4)
    answer(version=version, load_seconds=loaded - begin, first_seconds=time.perf_counter() - loaded)
    for line in sys.stdin:
        order = json.loads(line)
        workload = WORKLOADS[order["workload"]]
        if order.get("tokens"):
            answer(tokens=generate(draw_prompts(workload, order["seed"]), workload.output))
            continue
        value = measure(workload, order["seed"], generate)
        answer(value=value, peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


if __name__ == "__main__":
    main()
