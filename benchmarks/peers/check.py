"""Checks what a comparison measures: the tokens that omni-engine makes of W1's prompts, by the graphs it is timed with.

    python benchmarks/peers/check.py FOLDER --models llama-160m

In float32 beside transformers on the same checkpoint, in bfloat16 beside this engine's own eager steps, which run the
plain torch bodies of all ops. A reference is given the prompt and the tokens at once; each token must be the one that
it holds likeliest, or all but that: `BOUNDS`. Random weights give many tokens nearly the same probability, and sums in
another order then choose another one; so equal texts would say less, and fail more often. compare.py does this before
it measures. Needs transformers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints import SHAPES, write_checkpoint
from report import OURS
from running import Worker
from workloads import WORKLOADS, Prompts, draw_prompts

WORKLOAD, SEED = "W1", 0
REQUESTS = {"float32": 32, "bfloat16": 4}  # of the 32: plain bfloat16 products are slow
# By dtype: how far, in nats, a token's logarithm of the probability may be below the likeliest one's, and the share of
# the tokens that must keep to it. With experts that is less in bfloat16: where two have nearly one score, its rounding
# chooses, and all that follows is another sum.
BOUNDS = {"float32": (1e-3, 1.0), "bfloat16": (0.05, 0.98)}
SHARE_WITH_EXPERTS = 0.9
KERNELS = "OMNI_ENGINE_CPU_KERNELS"


@dataclass(frozen=True)
class Check:
    """`tokens` were looked at, `likeliest` of them are the reference's own; `worst` is the farthest below, in nats."""

    dtype: str
    tokens: int
    likeliest: int
    within: int
    worst: float
    wanted: float

    @classmethod
    def of(cls, dtype: str, margins: Sequence[float], *, experts: bool = False) -> Check:
        bound, wanted = BOUNDS[dtype]
        return cls(
            dtype,
            len(margins),
            sum(margin <= 0 for margin in margins),
            sum(margin <= bound for margin in margins),  # a NaN is not
            max(margins),
            min(wanted, SHARE_WITH_EXPERTS) if experts and dtype == "bfloat16" else wanted,
        )

    @property
    def passed(self) -> bool:
        return self.within >= self.wanted * self.tokens > 0

    def text(self) -> str:
        reference = "transformers" if self.dtype == "float32" else "plain eager steps"
        bound, _ = BOUNDS[self.dtype]
        return (
            f"{self.dtype}: {self.likeliest} of {self.tokens} tokens are the likeliest of {reference}, {self.within} "
            f"within {bound} of it (wanted {self.wanted:.0%}), farthest {self.worst:.4f}: "
            f"{'ok' if self.passed else 'FAILED'}"
        )


def transformers_margins(model: Path, prompts: Prompts, answers: Prompts) -> list[float]:
    """How far each token of the answers is below the likeliest one, by transformers in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    margins: list[float] = []
    with torch.inference_mode():
        for prompt, answer in zip(prompts, answers, strict=True):
            count = len(answer)
            logits = reference(torch.tensor([prompt + answer[:-1]]), logits_to_keep=count).logits[0, -count:]
            chosen = logits.gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)
            margins += (logits.max(dim=1).values - chosen).tolist()
    return margins


def plain_margins(model: Path, prompts: Prompts, answers: Prompts) -> list[float]:
    """The same by this engine without graphs and, where the environment says so, without kernels, in bfloat16."""
    from omni_engine import LLM, SamplingParams

    length = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)) + 1
    llm = LLM(str(model), dtype="bfloat16", enforce_eager=True, max_model_len=length, max_num_seqs=len(prompts))
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, prompt_logprobs=1, detokenize=False)
    whole: list[Any] = [{"prompt_token_ids": prompt + answer} for prompt, answer in zip(prompts, answers, strict=True)]
    margins: list[float] = []
    for output, prompt, answer in zip(llm.generate(whole, params, use_tqdm=False), prompts, answers, strict=True):
        assert output.prompt_logprobs is not None, "they were asked for"
        for token, found in zip(answer, output.prompt_logprobs[len(prompt) :], strict=True):
            assert found is not None, "only the first token has none"
            margins.append(max(entry.logprob for entry in found.values()) - found[token].logprob)
    return margins


# By dtype; each runs in a process of its own, so that a comparison's holds no torch.
REFERENCES = {"float32": transformers_margins, "bfloat16": plain_margins}


def reference_margins(model: Path, dtype: str, prompts: Prompts, answers: Prompts) -> list[float]:
    """Of the reference for that dtype. Raises RuntimeError if its process fails."""
    asked = json.dumps({"prompts": prompts, "answers": answers})
    command = [sys.executable, __file__, str(model), "--reference", dtype]
    environment = {**os.environ, KERNELS: "0"}
    done = subprocess.run(command, input=asked, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"the reference for {dtype} failed with status {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def check(model: Path, dtype: str, extra: dict[str, Any]) -> Check:
    """Of one checkpoint; `extra` are further arguments of the engine. Raises RuntimeError if a process fails."""
    prompts = draw_prompts(WORKLOADS[WORKLOAD], SEED)
    largest = {"cudagraph_capture_sizes": [len(prompts)]} if dtype == "float32" else {}  # no others are needed then
    worker = Worker.start(OURS, sys.executable, OURS, model, {}, json.dumps({**extra, "dtype": dtype, **largest}))
    try:
        answers = worker.tokens(WORKLOAD, SEED)
    finally:
        worker.end()
    count = REQUESTS[dtype]
    experts = any("experts" in key for key in json.loads((model / "config.json").read_text()))
    return Check.of(dtype, reference_margins(model, dtype, prompts[:count], answers[:count]), experts=experts)


def main() -> None:
    parser = argparse.ArgumentParser(description="Checks the tokens that a comparison measures.")
    parser.add_argument("folder", type=Path, help="of the checkpoints")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="MODEL")
    parser.add_argument("--dtypes", nargs="+", choices=BOUNDS, default=list(BOUNDS), metavar="DTYPE")
    parser.add_argument("--extra", type=json.loads, default={}, help="JSON: further arguments of omni-engine")
    parser.add_argument("--reference", choices=REFERENCES, help=argparse.SUPPRESS)  # the other process, of one model
    options = parser.parse_args()
    if options.reference:
        print(json.dumps(REFERENCES[options.reference](options.folder, **json.load(sys.stdin))))
        return
    checks = []
    for name in options.models:
        model = write_checkpoint(options.folder, name)
        for dtype in options.dtypes:
            checks.append(check(model, dtype, options.extra))
            print(f"{name} {checks[-1].text()}", flush=True)
    if not all(each.passed for each in checks):
        sys.exit("what these graphs compute is not what they should; nothing measured with them counts")


if __name__ == "__main__":
    main()
