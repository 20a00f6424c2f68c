"""Trains the bundled demo models: a small DeepSeek-V3 with multi-token prediction, and from it a DeepSeek-V3.2.

    python models/demo/train.py dense kjv.txt models/demo/deepseek --work demo-training
    python models/demo/train.py sparse kjv.txt models/demo/deepseek-v32 --work demo-training \\
        --dense models/demo/deepseek
    python models/demo/train.py drafts kjv.txt models/demo/deepseek --work demo-training \\
        --dense models/demo/deepseek

It is no part of the package; README.md beside it says where the text comes from. The same command goes on after an
interruption.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from corpus import Corpus, documents, excerpt, read_corpus, train_tokenizer
from model import CONFIG, CONTEXT, DemoModel, dense_model, export, load_published, write_json
from optimizer import Muon
from report import evaluate, evaluate_sparse
from safetensors.torch import load_file, save_file
from sparse import INDEX_CONFIG, SparseModel, sparse_model
from tokenizers import Tokenizer
from torch import Tensor, nn

MTP_WEIGHT = 0.3
MUON_RATE, ADAM_RATE = 0.02, 3e-3
BIAS_RATE = 0.003  # how far a step moves the bias of an expert that has too much or too little load

DENSE_TOKENS, DENSE_STEPS = 4096, 370  # tokens of a step; steps
SHORT = 256  # tokens of a training sequence at first; in the last tenth of the steps they are as long as the context

DRAFTS_TOKENS, DRAFTS_STEPS = 4096, 420
DRAFTS_SHARE = 0.5  # of the dense model's rates, to begin with
DRAFTS_TEMPERATURE = 0.7  # that of generation_config.json

SPARSE_TOKENS = 2048
WARM_UP_STEPS, SPARSE_STEPS = 50, 30  # steps of the indexers alone, steps of the whole
INDEXER_RATE = 3e-3
SPARSE_SHARE = 0.1  # of the dense model's rates, to begin the steps of the whole with


def batches(corpus: Corpus, tokenizer: Tokenizer, seed: int, size: int, lengths: list[int]) -> Iterator[Tensor]:
    """For every length int64 [sequences, length], of `size` tokens, cut from documents in a row."""
    stream = documents(corpus, seed)
    tokens: list[int] = []
    for length in lengths:
        while len(tokens) < size:
            tokens += tokenizer.encode(next(stream), add_special_tokens=False).ids
        batch, tokens = tokens[:size], tokens[size:]
        yield torch.tensor(batch).view(-1, length)


class Clock:
    """Seconds of wall time and of processor time, counted on from those of an earlier run."""

    def __init__(self, wall: float = 0.0, processor: float = 0.0) -> None:
        self.starts = time.monotonic() - wall, time.process_time() - processor

    def read(self) -> tuple[float, float]:
        return time.monotonic() - self.starts[0], time.process_time() - self.starts[1]


@dataclass
class Training:
    """What the loop needs: `rates` gives the learning rates of a step by the optimizers' names, `loss` computes the
    gradients of a step and returns what the log shows, `after` runs behind the optimizers."""

    model: DemoModel
    optimizers: dict[str, torch.optim.Optimizer]
    clipped: list[nn.Parameter]
    rates: Callable[[int], dict[str, float]]
    loss: Callable[[int, Tensor], str]
    after: Callable[[int], None]
    steps: int

    def run(self, data: Iterator[Tensor], state_file: Path, minutes: float) -> Clock:
        first, clock = self.restore(state_file) if state_file.is_file() else (0, Clock())
        saved = time.monotonic()
        for step, tokens in enumerate(data):
            if step < first:
                continue
            rates = self.rates(step)
            for name, optimizer in self.optimizers.items():
                for group in optimizer.param_groups:
                    group["lr"] = rates[name]
            shown = self.loss(step, tokens)
            nn.utils.clip_grad_norm_(self.clipped, 1.0)
            for optimizer in self.optimizers.values():
                optimizer.step()
            self.model.zero_grad(set_to_none=True)
            if step % 10 == 0 or step == self.steps - 1:
                print(f"step {step} of {self.steps}: {shown}, {clock.read()[0]:.0f} s", flush=True)
            self.after(step)
            if time.monotonic() - saved > 60 or step == self.steps - 1:
                self.save(state_file, step + 1, clock)
                saved = time.monotonic()
            if clock.read()[0] > 60 * minutes and step < self.steps - 1:
                raise SystemExit(f"the time was spent at step {step}; give fewer --steps, or more --minutes")
        return clock

    def save(self, file: Path, step: int, clock: Clock) -> None:
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors["progress"] = torch.tensor([step, *clock.read()], dtype=torch.float64)
        for kind, optimizer in self.optimizers.items():
            for index, values in optimizer.state_dict()["state"].items():
                tensors |= {f"{kind}.{index}.{name}": torch.as_tensor(value) for name, value in values.items()}
        partial = file.with_suffix(".partial")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
        partial.replace(file)

    def restore(self, file: Path) -> tuple[int, Clock]:
        """The step to go on with, and the clock."""
        tensors = load_file(file)
        self.model.load_state_dict(
            {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
        )
        for kind, optimizer in self.optimizers.items():
            state = optimizer.state_dict()
            for name, tensor in tensors.items():
                owner, _, rest = name.partition(".")
                if owner == kind:
                    index, _, field = rest.partition(".")
                    state["state"].setdefault(int(index), {})[field] = tensor
            optimizer.load_state_dict(state)
        return int(tensors["progress"][0]), Clock(*tensors["progress"][1:].tolist())


def parameter_kinds(model: DemoModel) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """The matrices inside the model, what else it has, and the indexers."""
    inner, outer, indexers = [], [], []
    for name, parameter in model.named_parameters():
        if ".indexer." in name:
            indexers.append(parameter)
        elif parameter.dim() > 1 and not re.search(r"embed|lm_head|gate\.w", name):
            inner.append(parameter)
        else:
            outer.append(parameter)
    return inner, outer, indexers


def adam(parameters: list[nn.Parameter]) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0)


def dense_training(model: DemoModel, steps: int) -> Training:
    inner, outer, _ = parameter_kinds(model)

    def rates(step: int) -> dict[str, float]:
        """Warm-up, constant, and linear to zero over the last half."""
        factor = min(1.0, (step + 1) / 20, (steps - step) / (0.5 * steps))
        return {"muon": MUON_RATE * factor, "adam": ADAM_RATE * factor}

    def loss(step: int, tokens: Tensor) -> str:
        depth = 1 if step < steps * 0.85 else 3  # deeper drafts are the same layer on its own output
        losses = model.losses(tokens, depth)
        (losses[0] + MTP_WEIGHT * sum(losses[1:]) / depth).backward()
        largest = (model.load / model.load.mean(dim=1, keepdim=True)).max()
        return f"loss {' '.join(f'{value.item():.3f}' for value in losses)}, largest expert {largest:.2f}"

    def after(step: int) -> None:
        model.balance(BIAS_RATE if step < 0.9 * steps else 0.0)

    optimizers = {"muon": Muon(inner, MUON_RATE, weight_decay=0.05), "adam": adam(outer)}
    return Training(model, optimizers, outer, rates, loss, after, steps)


def sparse_training(model: SparseModel) -> Training:
    inner, outer, indexers = parameter_kinds(model)
    topk = INDEX_CONFIG["index_topk"]

    def rates(step: int) -> dict[str, float]:
        """The indexers': warm-up, constant, from the first step of the whole linear to zero. The others': linear."""
        factor = min(1.0, (WARM_UP_STEPS + SPARSE_STEPS - step) / SPARSE_STEPS)
        share = SPARSE_SHARE * factor
        return {
            "muon": MUON_RATE * share,
            "adam": ADAM_RATE * share,
            "indexers": INDEXER_RATE * min((step + 1) / 20, factor),
        }

    def loss(step: int, tokens: Tensor) -> str:
        if step < WARM_UP_STEPS:  # the model is frozen and attention reads everything
            model.set_indexers("learn", CONTEXT)
            with torch.no_grad():
                losses = model.losses(tokens, 1)
            divergence = model.divergence()
            divergence.backward()
        else:
            model.set_indexers("learn", topk)
            losses = model.losses(tokens, 1)
            divergence = model.divergence()
            # no gradient of one comes to what the others train
            (losses[0] + MTP_WEIGHT * losses[1] + divergence).backward()
        return f"loss {' '.join(f'{value.item():.3f}' for value in losses)}, divergence {divergence.item():.4f}"

    optimizers = {"muon": Muon(inner, MUON_RATE, weight_decay=0.0), "adam": adam(outer), "indexers": adam(indexers)}
    return Training(model, optimizers, outer, rates, loss, lambda _: model.balance(0.0), WARM_UP_STEPS + SPARSE_STEPS)


def drafts_training(model: DemoModel, steps: int) -> Training:
    """The prediction layer alone, to draft what the trained body would say."""
    model.requires_grad_(False)
    model.mtp.requires_grad_(True)
    inner, outer, _ = parameter_kinds(model)
    inner, outer = ([each for each in kind if each.requires_grad] for kind in (inner, outer))

    def rates(step: int) -> dict[str, float]:
        """Warm-up, then linear to zero."""
        share = DRAFTS_SHARE * min((step + 1) / 20, (steps - step) / steps)
        return {"muon": MUON_RATE * share, "adam": ADAM_RATE * share}

    def loss(step: int, tokens: Tensor) -> str:
        losses = model.draft_losses(tokens, 3, DRAFTS_TEMPERATURE)
        (losses[0] + 0.5 * losses[1] + 0.25 * losses[2]).backward()  # a deeper draft counts where those before it do
        return f"loss {' '.join(f'{value.item():.3f}' for value in losses)}"

    optimizers = {"muon": Muon(inner, MUON_RATE, weight_decay=0.0), "adam": adam(outer)}
    return Training(model, optimizers, outer, rates, loss, lambda _: model.balance(0.0), steps)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the bundled demo models.")
    parser.add_argument("kind", choices=("dense", "sparse", "drafts"))
    parser.add_argument("text", type=Path, help="lines of a reference and a verse, as `bible -f` prints them")
    parser.add_argument("output", type=Path, help="folder of the checkpoint")
    parser.add_argument("--work", type=Path, required=True, help="folder of the training state, to go on from")
    parser.add_argument("--dense", type=Path, help="checkpoint of the dense model, for the others to begin with")
    parser.add_argument("--steps", type=int, help=f"of the dense model ({DENSE_STEPS}) or the drafts ({DRAFTS_STEPS})")
    parser.add_argument("--minutes", type=float, default=60, help="stop with an error when these are over")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if (arguments.kind == "dense") != (arguments.dense is None):
        parser.error("--dense goes with the sparse model and with drafts, and they need one")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    for folder in (arguments.work, arguments.output):
        folder.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}
    corpus = read_corpus(arguments.text)
    tokenizer = train_tokenizer(corpus, CONFIG["vocab_size"])
    if arguments.kind == "dense":
        model = dense_model()
        training = dense_training(model, arguments.steps or DENSE_STEPS)
        steps = training.steps
        lengths = [SHORT if step < steps * 9 // 10 else CONTEXT for step in range(steps)]
        data = batches(corpus, tokenizer, arguments.seed, DENSE_TOKENS, lengths)
        size = DENSE_TOKENS
    elif arguments.kind == "drafts":
        model = dense_model()
        absent = load_published(model, arguments.dense)
        if absent:
            raise SystemExit(f"the dense checkpoint must have all tensors, it lacks: {absent}")
        training = drafts_training(model, arguments.steps or DRAFTS_STEPS)
        data = batches(corpus, tokenizer, arguments.seed + 2, DRAFTS_TOKENS, [SHORT] * training.steps)
        size = DRAFTS_TOKENS
    else:
        model = sparse_model()
        absent = [name for name in load_published(model, arguments.dense) if ".indexer." not in name]
        if absent:
            raise SystemExit(f"the dense checkpoint must have all tensors but the indexers', it lacks: {absent}")
        training = sparse_training(model)
        # another seed than the dense model's, whose order of the text this model has been through
        data = batches(corpus, tokenizer, arguments.seed + 1, SPARSE_TOKENS, [CONTEXT] * training.steps)
        size = SPARSE_TOKENS
        settings = {"architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32", **INDEX_CONFIG}
    clock = training.run(data, arguments.work / f"{arguments.kind}.safetensors", arguments.minutes)
    wall, processor = clock.read()
    export(model, tokenizer, arguments.output, settings)
    if arguments.kind == "dense":
        (arguments.output / "held_out.txt").write_text("\n\n".join(excerpt(corpus)) + "\n")
    report = {
        "steps": training.steps,
        "seed": arguments.seed,
        "threads": arguments.threads,
        "minutes": round(wall / 60, 1),
        "processor_minutes": round(processor / 60, 1),
        "trained_tokens": training.steps * size,
        "text_sha256": hashlib.sha256(arguments.text.read_bytes()).hexdigest(),
    }
    if isinstance(model, SparseModel):
        report |= evaluate_sparse(model, tokenizer, corpus)
    else:
        report |= evaluate(model, tokenizer, corpus)
    if arguments.kind == "drafts":  # the last steps of a model that has a report
        earlier = json.loads((arguments.dense / "training.json").read_text())
        report = {**report, "dense_training": earlier.get("dense_training", earlier)}
    write_json(arguments.output / "training.json", report)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
