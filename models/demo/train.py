"""Trains the bundled demo model: a small DeepSeek-V3 with one layer for multi-token prediction.

    python models/demo/train.py kjv.txt models/demo/deepseek --work demo-training

It is no part of the package; README.md beside it says where the text comes from. The body is transformers'
DeepseekV3ForCausalLM and the prediction layer plain torch after the paper (arXiv:2412.19437, section 2.2), so that the
checkpoint tests the engine's own decoders independently.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from corpus import BOS, CHAT_TEMPLATE, EOS, SPECIAL_TOKENS, Corpus, documents, read_corpus, train_tokenizer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer, DeepseekV3RMSNorm

CONFIG: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 192,
    "intermediate_size": 448,
    "moe_intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.04,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
SHORT, LONG = 256, 1024  # tokens of a training sequence at first, and in the last tenth of the steps
TOKENS_PER_STEP = 4096
MTP_WEIGHT = 0.3
BIAS_RATE = 0.003  # how far a step moves the bias of an expert that has too much or too little load
MUON_RATE, ADAM_RATE = 0.02, 3e-3
EXCERPT_BYTES = 3000  # a chapter of the excerpt is shorter


def batches(corpus: Corpus, tokenizer: Tokenizer, seed: int, steps: int, skip: int) -> Iterator[Tensor]:
    """int64 [sequences, length], of TOKENS_PER_STEP tokens, cut from documents in a row."""
    stream = documents(corpus, seed)
    tokens: list[int] = []
    for step in range(steps):
        length = sequence_length(step, steps)
        while len(tokens) < TOKENS_PER_STEP:
            tokens += tokenizer.encode(next(stream), add_special_tokens=False).ids
        batch, tokens = tokens[:TOKENS_PER_STEP], tokens[TOKENS_PER_STEP:]
        if step >= skip:
            yield torch.tensor(batch).view(-1, length)


def sequence_length(step: int, steps: int) -> int:
    return SHORT if step < steps * 9 // 10 else LONG


# The model


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Causal attention for transformers. torch's fast kernel wants values as wide as keys: they get zeros."""
    width = value.shape[-1]
    value = functional.pad(value, (0, key.shape[-1] - width))
    output = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return output[..., :width].transpose(1, 2), None


def make_config() -> DeepseekV3Config:
    AttentionInterface.register("padded_causal", attend)
    config = DeepseekV3Config(**CONFIG)
    config._attn_implementation = "padded_causal"
    config._experts_implementation = "grouped_mm"
    return config


class PredictionLayer(DeepseekV3DecoderLayer):
    """Multi-token prediction: a decoder layer over the embedding of the next token joined to the hidden state.

    `hidden` [batch, tokens, hidden] are the body's states behind its last norm, or this layer's own output, for a draft
    one token deeper; `embedded` are the embeddings of the tokens that follow. The output is behind the shared norm; the
    body's head makes logits of it. The names of its tensors are those of the published checkpoints.
    """

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__(config, config.num_hidden_layers)
        self.enorm = DeepseekV3RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = DeepseekV3RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.shared_head = nn.ModuleDict({"norm": DeepseekV3RMSNorm(config.hidden_size, config.rms_norm_eps)})

    def predict(self, hidden: Tensor, embedded: Tensor, rotary: nn.Module) -> Tensor:
        joined = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden)], dim=-1))
        positions = torch.arange(joined.shape[1])[None]
        output = self(joined, position_embeddings=rotary(joined, positions), position_ids=positions)
        return self.shared_head["norm"](output)


class DemoModel(nn.Module):
    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.body = DeepseekV3ForCausalLM(config)
        self.mtp = PredictionLayer(config)
        for tensor in self.mtp.parameters():
            if tensor.dim() > 1:
                tensor.data.normal_(0, config.initializer_range)
        self.routers = [layer.mlp.gate for layer in [*self.body.model.layers, self.mtp] if hasattr(layer.mlp, "gate")]
        self.load = torch.zeros(len(self.routers), config.n_routed_experts)
        for index, router in enumerate(self.routers):
            router.register_forward_hook(lambda _, __, output, index=index: self._count(index, output[2]))

    def _count(self, index: int, chosen: Tensor) -> None:
        self.load[index] += torch.bincount(chosen.flatten(), minlength=self.load.shape[1])

    def balance(self, rate: float) -> None:
        """Balancing without a loss (arXiv:2408.15664): the biases move against the load counted since the last call."""
        for router, load in zip(self.routers, self.load, strict=True):
            router.e_score_correction_bias += rate * torch.sign(load.mean() - load)
        self.load.zero_()

    def losses(self, tokens: Tensor, depth: int) -> list[Tensor]:
        """Mean cross entropies in nats: of the body's next token, and of `depth` tokens beyond it."""
        hidden = self.body.model(tokens, use_cache=False).last_hidden_state
        losses = [self._loss(hidden[:, :-1], tokens[:, 1:])]
        embedded = self.body.model.embed_tokens(tokens)
        for deeper in range(1, depth + 1):
            hidden = self.mtp.predict(hidden[:, :-1], embedded[:, deeper:], self.body.model.rotary_emb)
            losses.append(self._loss(hidden[:, :-1], tokens[:, deeper + 1 :]))
        return losses

    def _loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(self.body.lm_head(hidden).flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def draft(self, tokens: Tensor, hidden: Tensor, depth: int) -> list[int]:
        """Greedy drafts of `depth` tokens behind `tokens` [n + 1], from the body's states `hidden` [n, hidden] of all
        but the last. As in serving: a draft attends to the entries of the known tokens and of the drafts before it."""
        embedded = self.body.model.embed_tokens(tokens)[None, 1:]
        hidden = hidden[None]
        drafts: list[int] = []
        for _ in range(depth):
            output = self.mtp.predict(hidden, embedded, self.body.model.rotary_emb)[:, -1:]
            drafts.append(int(self.body.lm_head(output).argmax()))
            hidden = torch.cat([hidden, output], dim=1)
            embedded = torch.cat([embedded, self.body.model.embed_tokens(torch.tensor([[drafts[-1]]]))], dim=1)
        return drafts


class Muon(torch.optim.Optimizer):
    """Momentum whose update is brought near an orthogonal matrix by Newton-Schulz steps (Keller Jordan, 2024); for
    matrices, and for stacks of them, the experts."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                momentum.lerp_(gradient, 0.05)
                update = orthogonal(gradient.lerp(momentum, 0.95))
                rows, columns = parameter.shape[-2:]
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def orthogonal(matrix: Tensor) -> Tensor:
    """[…, rows, columns] -> the same singular vectors with singular values near 1."""
    wide = matrix.shape[-2] <= matrix.shape[-1]
    value = matrix if wide else matrix.mT
    value = value / (value.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = value @ value.mT
        value = 3.4445 * value + (-4.7750 * square + 2.0315 * square @ square) @ value
    return value if wide else value.mT


# Training


def rate_factor(step: int, steps: int) -> float:
    """Warm-up, constant, and linear to zero over the last half."""
    return min(1.0, (step + 1) / 20, (steps - step) / (0.5 * steps))


def train(model: DemoModel, data: Iterator[Tensor], first: int, arguments: argparse.Namespace, spent: float) -> float:
    """Trains from step `first`; returns the seconds it took in all, `spent` of them before."""
    inner = [p for name, p in model.named_parameters() if p.dim() > 1 and not re.search(r"embed|lm_head|gate\.w", name)]
    chosen = {id(parameter) for parameter in inner}
    outer = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    muon = Muon(inner, MUON_RATE, weight_decay=0.05)
    adam = torch.optim.AdamW(outer, ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    state_file: Path = arguments.work / "state.safetensors"
    if first:
        restore_optimizers(load_file(state_file), muon, adam)
    started = saved = time.monotonic()
    steps = arguments.steps
    for step, tokens in enumerate(data, first):
        for optimizer, rate in ((muon, MUON_RATE), (adam, ADAM_RATE)):
            for group in optimizer.param_groups:
                group["lr"] = rate * rate_factor(step, steps)
        depth = 1 if step < steps * 0.85 else 3  # deeper drafts are the same layer on its own output
        losses = model.losses(tokens, depth)
        total = losses[0] + MTP_WEIGHT * sum(losses[1:]) / depth
        total.backward()
        nn.utils.clip_grad_norm_(outer, 1.0)
        muon.step()
        adam.step()
        model.zero_grad(set_to_none=True)
        if step % 50 == 0:
            elapsed = spent + time.monotonic() - started
            share = (model.load / model.load.mean(dim=1, keepdim=True)).max()
            shown = " ".join(f"{loss.item():.3f}" for loss in losses)
            print(f"step {step} of {steps}: loss {shown}, largest expert {share:.2f}, {elapsed:.0f} s", flush=True)
        model.balance(BIAS_RATE if step < 0.9 * steps else 0.0)
        elapsed = spent + time.monotonic() - started
        if time.monotonic() - saved > 60 or step == steps - 1:
            save_state(state_file, model, muon, adam, step + 1, elapsed)
            saved = time.monotonic()
        if elapsed > 60 * arguments.minutes and step < steps - 1:
            raise SystemExit(f"the time was spent at step {step}; give fewer --steps, or more --minutes")
    return spent + time.monotonic() - started


def save_state(file: Path, model: DemoModel, muon: Muon, adam: torch.optim.AdamW, step: int, elapsed: float) -> None:
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors["progress"] = torch.tensor([step, elapsed], dtype=torch.float64)
    for kind, optimizer in (("muon", muon), ("adam", adam)):
        for index, values in optimizer.state_dict()["state"].items():
            tensors |= {f"{kind}.{index}.{name}": torch.as_tensor(value) for name, value in values.items()}
    partial = file.with_suffix(".partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
    partial.replace(file)


def restore_optimizers(tensors: dict[str, Tensor], muon: Muon, adam: torch.optim.AdamW) -> None:
    for kind, optimizer in (("muon", muon), ("adam", adam)):
        state = optimizer.state_dict()
        for name, tensor in tensors.items():
            owner, _, rest = name.partition(".")
            if owner == kind:
                index, _, field = rest.partition(".")
                state["state"].setdefault(int(index), {})[field] = tensor
        optimizer.load_state_dict(state)


# Export and evaluation


def export(model: DemoModel, tokenizer: Tokenizer, output: Path) -> None:
    """Writes the checkpoint with the published names: bfloat16, the routers' biases float32. Rounds `model` likewise.

    The prediction layer is model.layers.{num_hidden_layers}; its copies of the embedding and the head, which equal the
    body's, are left out.
    """
    state = dict(model.body.state_dict())
    prefix = f"model.layers.{CONFIG['num_hidden_layers']}."
    state |= {prefix + name: tensor for name, tensor in model.mtp.state_dict().items()}
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not name.endswith("e_score_correction_bias"):
            tensor.copy_(tensor.bfloat16())
        stem, _, kind = name.partition("experts.")
        if kind not in ("gate_up_proj", "down_proj"):
            tensors[name] = tensor
            continue
        for expert, matrix in enumerate(tensor):
            if kind == "down_proj":
                parts = {"down_proj": matrix}
            else:
                parts = dict(zip(("gate_proj", "up_proj"), matrix.chunk(2), strict=True))
            tensors |= {f"{stem}experts.{expert}.{part}.weight": value for part, value in parts.items()}
    stored = {
        name: tensor.clone() if name.endswith("e_score_correction_bias") else tensor.bfloat16().contiguous()
        for name, tensor in tensors.items()
    }
    weights = output / "model.safetensors"
    save_file(stored, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # safetensors makes files for their owner only
    config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        **{name: value for name, value in CONFIG.items() if name != "rope_parameters"},
        "rope_theta": CONFIG["rope_parameters"]["rope_theta"],
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "dtype": "float32",  # what to compute in: a CPU without bfloat16 instructions is several times slower in it
    }
    tokenizer.save(str(output / "tokenizer.json"), pretty=False)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[BOS],
        "eos_token": SPECIAL_TOKENS[EOS],
        "model_max_length": CONFIG["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    generation = {"bos_token_id": BOS, "eos_token_id": EOS, "do_sample": True, "temperature": 0.7, "top_p": 0.95}
    write_json(output / "config.json", config)
    write_json(output / "tokenizer_config.json", settings)
    write_json(output / "generation_config.json", generation)


def write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=1) + "\n")


@torch.no_grad()
def evaluate_text(model: DemoModel, tokenizer: Tokenizer, texts: list[str]) -> dict[str, float]:
    """Cross entropy of whole texts, each between its bos and eos, cut at the context; nats per token, bits per byte."""
    nats = [0.0, 0.0]  # the body's, the prediction layer's
    counts = [0, 0]
    agreed = 0
    for text in texts:
        ids = [BOS, *tokenizer.encode(text, add_special_tokens=False).ids, EOS]
        for start in range(0, len(ids) - 2, LONG - 1):
            tokens = torch.tensor([ids[start : start + LONG]])
            hidden = model.body.model(tokens, use_cache=False).last_hidden_state
            embedded = model.body.model.embed_tokens(tokens)
            deeper = model.mtp.predict(hidden[:, :-1], embedded[:, 1:], model.body.model.rotary_emb)
            logits = [model.body.lm_head(hidden[0, :-1]), model.body.lm_head(deeper[0, :-1])]
            for index, values in enumerate(logits):
                targets = tokens[0, index + 1 :]
                nats[index] += functional.cross_entropy(values, targets, reduction="sum").item()
                counts[index] += len(targets)
            agreed += int((logits[0][1:].argmax(-1) == logits[1].argmax(-1)).sum())
    size = sum(len(text.encode()) for text in texts)
    return {
        "bytes": size,
        "tokens": counts[0],
        "loss": round(nats[0] / counts[0], 5),
        "bits_per_byte": round(nats[0] / math.log(2) / size, 5),
        "mtp_loss": round(nats[1] / counts[1], 5),
        "mtp_agrees_with_greedy": round(agreed / counts[1], 4),
    }


@torch.no_grad()
def evaluate_drafts(model: DemoModel, tokenizer: Tokenizer, texts: list[str], depth: int = 3) -> list[float]:
    """Share of greedy drafts that the body's greedy text confirms, where those before it were confirmed; by depth."""
    prompts = [[BOS, *tokenizer.encode(text, add_special_tokens=False).ids][:48] for text in texts]
    tokens = torch.tensor([prompt for prompt in prompts if len(prompt) == 48])
    for _ in range(64):
        hidden = model.body.model(tokens, use_cache=False).last_hidden_state
        tokens = torch.cat([tokens, model.body.lm_head(hidden[:, -1:]).argmax(-1)], dim=1)
    drafted, confirmed = [0] * depth, [0] * depth
    hidden = model.body.model(tokens, use_cache=False).last_hidden_state
    for row, states in zip(tokens, hidden, strict=True):
        ends = (row == EOS).nonzero()
        stop = int(ends[0]) if len(ends) else len(row)
        for known in range(48, stop - depth, 3):
            for index, token in enumerate(model.draft(row[: known + 1], states[:known], depth)):
                drafted[index] += 1
                if token != int(row[known + 1 + index]):
                    break
                confirmed[index] += 1
    return [round(hit / max(1, all_), 4) for hit, all_ in zip(confirmed, drafted, strict=True)]


def evaluate(model: DemoModel, tokenizer: Tokenizer, corpus: Corpus, output: Path) -> dict[str, Any]:
    """Held-out figures of the rounded model; writes the excerpt that tests measure again."""
    model.eval()
    texts = ["\n".join(chapter) for chapter in corpus.held_out]
    model.load.zero_()
    held_out = evaluate_text(model, tokenizer, texts)
    load = model.load / model.load.mean(dim=1, keepdim=True)
    excerpt = [text for text in texts if len(text) < EXCERPT_BYTES][:2]
    (output / "held_out.txt").write_text("\n\n".join(excerpt) + "\n")
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "held_out": held_out,
        "excerpt": evaluate_text(model, tokenizer, excerpt),
        "mtp_acceptance_by_depth": evaluate_drafts(model, tokenizer, texts),
        "expert_load_lowest": [round(float(layer.min()), 3) for layer in load],  # 1: an equal share; by layer
        "expert_load_highest": [round(float(layer.max()), 3) for layer in load],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the bundled demo model.")
    parser.add_argument("text", type=Path, help="lines of a reference and a verse, as `bible -f` prints them")
    parser.add_argument("output", type=Path, help="folder of the checkpoint")
    parser.add_argument("--work", type=Path, required=True, help="folder of the training state, to go on from")
    parser.add_argument("--steps", type=int, default=370)
    parser.add_argument("--minutes", type=float, default=60, help="stop with an error when these are over")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    arguments.work.mkdir(parents=True, exist_ok=True)
    corpus = read_corpus(arguments.text)
    tokenizer = train_tokenizer(corpus, CONFIG["vocab_size"])
    model = DemoModel(make_config())
    state_file = arguments.work / "state.safetensors"
    step, elapsed = 0, 0.0
    if state_file.is_file():
        state = load_file(state_file)
        step, elapsed = int(state["progress"][0]), float(state["progress"][1])
        model.load_state_dict({name[6:]: value for name, value in state.items() if name.startswith("model.")})
    data = batches(corpus, tokenizer, arguments.seed, arguments.steps, step)
    if step < arguments.steps:
        elapsed = train(model, data, step, arguments, elapsed)
    arguments.output.mkdir(parents=True, exist_ok=True)
    export(model, tokenizer, arguments.output)
    report = {
        "command": f"train.py {arguments.text.name} --steps {arguments.steps} --seed {arguments.seed}",
        "hours": round(elapsed / 3600, 3),
        "threads": arguments.threads,
        "trained_tokens": arguments.steps * TOKENS_PER_STEP,
        "text_sha256": hashlib.sha256(arguments.text.read_bytes()).hexdigest(),
        **evaluate(model, tokenizer, corpus, arguments.output),
    }
    write_json(arguments.output / "training.json", report)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
