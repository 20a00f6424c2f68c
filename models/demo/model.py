"""The dense demo model: transformers' DeepSeek-V3 with one layer for multi-token prediction, and its checkpoint.

The prediction layer is plain torch after the paper (arXiv:2412.19437, section 2.2), so that the checkpoint tests the
engine's own decoders independently.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from corpus import BOS, CHAT_TEMPLATE, EOS, SPECIAL_TOKENS
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
LAYERS: int = CONFIG["num_hidden_layers"]
CONTEXT: int = CONFIG["max_position_embeddings"]


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Causal attention for transformers. torch's fast kernel wants values as wide as keys: they get zeros."""
    width = value.shape[-1]
    value = functional.pad(value, (0, key.shape[-1] - width))
    output = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return output[..., :width].transpose(1, 2), None


class Prediction(nn.Module):
    """Multi-token prediction: makes of a decoder layer one over the embedding of the next token joined to a state.

    `hidden` [batch, tokens, hidden] are the body's states behind its last norm, or this layer's own output, for a draft
    one token deeper; `embedded` are the embeddings of the tokens that follow. The output is behind the shared norm; the
    body's head makes logits of it. The names of its tensors are those of the published checkpoints.
    """

    def __init__(self, config: Any, layer_index: int) -> None:
        super().__init__(config, layer_index)
        self.enorm = DeepseekV3RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = DeepseekV3RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.shared_head = nn.ModuleDict({"norm": DeepseekV3RMSNorm(config.hidden_size, config.rms_norm_eps)})

    def predict(self, hidden: Tensor, embedded: Tensor, rotary: nn.Module, mask: Tensor | None) -> Tensor:
        joined = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden)], dim=-1))
        positions = torch.arange(joined.shape[1])[None]
        output = self(joined, mask, position_embeddings=rotary(joined, positions), position_ids=positions)
        return self.shared_head["norm"](output)


class DensePrediction(Prediction, DeepseekV3DecoderLayer):
    pass


class DemoModel(nn.Module):
    """A body and its prediction layer; made by `dense_model` here, and by `sparse_model` in sparse.py."""

    def __init__(self, body: Any, mtp: Any) -> None:
        super().__init__()
        self.body = body
        self.mtp = mtp
        for tensor in self.mtp.parameters():
            if tensor.dim() > 1:
                tensor.data.normal_(0, CONFIG["initializer_range"])
        self.routers = [layer.mlp.gate for layer in self.decoder_layers() if hasattr(layer.mlp, "gate")]
        self.load = torch.zeros(len(self.routers), CONFIG["n_routed_experts"])
        for index, router in enumerate(self.routers):
            router.register_forward_hook(lambda _, __, output, index=index: self._count(index, output[2]))

    def decoder_layers(self) -> list[Any]:
        return [*self.body.model.layers, self.mtp]

    def _count(self, index: int, chosen: Tensor) -> None:
        self.load[index] += torch.bincount(chosen.flatten(), minlength=self.load.shape[1])

    def balance(self, rate: float) -> None:
        """Balancing without a loss (arXiv:2408.15664): the biases move against the load counted since the last call."""
        for router, load in zip(self.routers, self.load, strict=True):
            router.e_score_correction_bias += rate * torch.sign(load.mean() - load)
        self.load.zero_()

    def mask(self, tokens: int) -> Tensor | None:
        """What the attention function takes as a mask: none, `attend` is causal by itself."""
        return None

    def hidden(self, tokens: Tensor) -> Tensor:
        """States behind the last norm, [batch, tokens, hidden]."""
        return self.body.model(tokens, self.mask(tokens.shape[1]), use_cache=False).last_hidden_state

    def predict(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        return self.mtp.predict(hidden, embedded, self.body.model.rotary_emb, self.mask(hidden.shape[1]))

    def losses(self, tokens: Tensor, depth: int) -> list[Tensor]:
        """Mean cross entropies in nats: of the body's next token, and of `depth` tokens beyond it."""
        hidden = self.hidden(tokens)
        losses = [self._loss(hidden[:, :-1], tokens[:, 1:])]
        embedded = self.body.model.embed_tokens(tokens)
        for deeper in range(1, depth + 1):
            hidden = self.predict(hidden[:, :-1], embedded[:, deeper:])
            losses.append(self._loss(hidden[:, :-1], tokens[:, deeper + 1 :]))
        return losses

    def draft_losses(self, tokens: Tensor, depth: int, temperature: float) -> list[Tensor]:
        """Mean Kullback-Leibler divergences in nats, of the `depth` tokens beyond the body's next one, from the body's
        own distribution at `temperature`, which is what verification holds drafts against."""
        with torch.no_grad():
            hidden = self.hidden(tokens)
            embedded = self.body.model.embed_tokens(tokens)
            wanted = (self.body.lm_head(hidden) / temperature).softmax(-1)
        losses = []
        for deeper in range(1, depth + 1):
            hidden = self.predict(hidden[:, :-1], embedded[:, deeper:])
            logits = self.body.lm_head(hidden).flatten(0, 1)
            targets = wanted[:, deeper:].flatten(0, 1)
            losses.append(functional.kl_div(logits.log_softmax(-1), targets, reduction="batchmean"))
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
            output = self.predict(hidden, embedded)[:, -1:]
            drafts.append(int(self.body.lm_head(output).argmax()))
            hidden = torch.cat([hidden, output], dim=1)
            embedded = torch.cat([embedded, self.body.model.embed_tokens(torch.tensor([[drafts[-1]]]))], dim=1)
        return drafts


def dense_model() -> DemoModel:
    AttentionInterface.register("padded_causal", attend)
    config = DeepseekV3Config(**CONFIG)
    config._attn_implementation = "padded_causal"
    config._experts_implementation = "grouped_mm"
    return DemoModel(DeepseekV3ForCausalLM(config), DensePrediction(config, LAYERS))


# The checkpoint


def published_tensors(model: DemoModel) -> dict[str, Tensor]:
    """Views of the model's tensors under the published names, an expert's matrices apart.

    The prediction layer is model.layers.{LAYERS}; its copies of the embedding and the head, which equal the body's, are
    left out.
    """
    state = dict(model.body.state_dict())
    state |= {f"model.layers.{LAYERS}.{name}": tensor for name, tensor in model.mtp.state_dict().items()}
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
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
    return tensors


@torch.no_grad()
def load_published(model: DemoModel, folder: Path) -> list[str]:
    """Fills the model from a checkpoint; returns the names of the tensors that the checkpoint does not have."""
    stored = load_file(folder / "model.safetensors")
    absent = []
    for name, tensor in published_tensors(model).items():
        if name in stored:
            tensor.copy_(stored[name])
        else:
            absent.append(name)
    return absent


@torch.no_grad()
def export(model: DemoModel, tokenizer: Tokenizer, output: Path, settings: dict[str, Any]) -> None:
    """Writes a checkpoint: bfloat16, the routers' biases float32. Rounds `model` likewise."""
    stored: dict[str, Tensor] = {}
    for name, tensor in published_tensors(model).items():
        if name.endswith("e_score_correction_bias"):
            stored[name] = tensor.clone()
        else:
            stored[name] = tensor.bfloat16().contiguous()
            tensor.copy_(stored[name])
    weights = output / "model.safetensors"
    save_file(stored, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # safetensors makes files for their owner only
    config = {
        **settings,
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
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[BOS],
        "eos_token": SPECIAL_TOKENS[EOS],
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    generation = {"bos_token_id": BOS, "eos_token_id": EOS, "do_sample": True, "temperature": 0.7, "top_p": 0.95}
    write_json(output / "config.json", config)
    write_json(output / "tokenizer_config.json", tokenizer_config)
    write_json(output / "generation_config.json", generation)


def write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=1) + "\n")
