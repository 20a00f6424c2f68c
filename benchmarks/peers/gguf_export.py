"""Writes MODEL.gguf beside a checkpoint, for llama.cpp: llama, qwen3, qwen3moe, and deepseek2 with latent attention.

    python benchmarks/peers/gguf_export.py FOLDER/llama-160m ...

Needs the package gguf. Nothing is quantized: matrices stay bfloat16; norms, routers and their biases are float32, as in
the files that llama.cpp's own converter makes. Its readers (`src/models/*.cpp`) say which tensors and keys there must
be; what a config asks for beyond them is refused.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

ARCHITECTURES = {"llama": "llama", "qwen3": "qwen3", "qwen3_moe": "qwen3moe", "deepseek_v3": "deepseek2"}
MOSTLY_BFLOAT16 = 32  # general.file_type
SIGMOID = 2  # expert_gating_func
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # tokenizer.ggml.token_type
_OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_IN_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")


def gguf_metadata(config: Mapping[str, Any], tokenizer: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The file's keys, of config.json and tokenizer.json; whole numbers are uint32, others float32, lists arrays.

    Raises ValueError for what llama.cpp's graph of the architecture does not compute, or what is not written here.
    """
    kind = config["model_type"]
    if kind not in ARCHITECTURES:
        raise ValueError(f"GGUF files are written for {', '.join(ARCHITECTURES)}: {kind}")
    rope = config.get("rope_parameters") or {"rope_type": "default", "rope_theta": config["rope_theta"]}
    if rope["rope_type"] != "default":
        raise ValueError(f"rope is written without scaling, rope_type must be default: {rope['rope_type']}")
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    fields: dict[str, Any] = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": hidden,
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.freq_base": float(rope["rope_theta"]),
        "vocab_size": config["vocab_size"],
    }
    fields |= _latent_fields(config) if kind == "deepseek_v3" else _grouped_fields(config)
    if kind != "deepseek_v3" and kind.endswith("_moe"):
        fields |= _softmax_expert_fields(config)
    prefixed = {f"{ARCHITECTURES[kind]}.{key}": value for key, value in fields.items()}
    return {"general.name": name, "general.file_type": MOSTLY_BFLOAT16, **prefixed, **_vocabulary(config, tokenizer)}


def _grouped_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return {
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": dim,
        "attention.value_length": dim,
        "rope.dimension_count": dim,
    }


def _softmax_expert_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    for key, wanted in (("norm_topk_prob", True), ("decoder_sparse_step", 1), ("mlp_only_layers", [])):
        if config.get(key, wanted) != wanted:
            raise ValueError(f"llama.cpp's qwen3moe needs {key} to be {wanted}: {config[key]}")
    return {
        "expert_count": _num_experts(config),
        "expert_used_count": config["num_experts_per_tok"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
    }


def _num_experts(config: Mapping[str, Any]) -> int:
    """By the names of deepseek_v3, of qwen3_moe, and of qwen3_moe as transformers 5 writes it."""
    return next(config[key] for key in ("n_routed_experts", "num_experts", "num_local_experts") if key in config)


def _latent_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """One key-value head of the latent and the rotated part; the lengths `_mla` are those of the expanded heads."""
    if not config.get("rope_interleave", True):
        raise ValueError("deepseek2 turns neighbouring elements, rope_interleave must be true: False")
    rank, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
    return {
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": config["q_lora_rank"],
        "attention.kv_lora_rank": rank,
        "attention.key_length": rank + rope,
        "attention.value_length": rank,
        "attention.key_length_mla": config["qk_nope_head_dim"] + rope,
        "attention.value_length_mla": config["v_head_dim"],
        "rope.dimension_count": rope,
        "leading_dense_block_count": config["first_k_dense_replace"],
        "expert_count": _num_experts(config),
        "expert_used_count": config["num_experts_per_tok"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_shared_count": config["n_shared_experts"],
        "expert_weights_scale": float(config["routed_scaling_factor"]),
        "expert_weights_norm": bool(config["norm_topk_prob"]),
        "expert_gating_func": SIGMOID,
        "expert_group_count": config["n_group"],
        "expert_group_used_count": config["topk_group"],
    }


def _vocabulary(config: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """Of a byte-level BPE; ids that the tokenizer leaves out get made-up spellings."""
    model = tokenizer["model"]
    if model["type"] != "BPE":
        raise ValueError(f"the tokenizer must be a byte-level BPE: {model['type']}")
    added = {token["id"]: token for token in tokenizer.get("added_tokens", [])}
    spellings = {index: word for word, index in model["vocab"].items()}
    spellings |= {index: token["content"] for index, token in added.items()}
    types = [NORMAL if index in spellings else UNUSED for index in range(config["vocab_size"])]
    for index, token in added.items():
        types[index] = CONTROL if token["special"] else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    fields: dict[str, Any] = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": [spellings.get(index, f"<unused {index}>") for index in range(config["vocab_size"])],
        "token_type": types,
        # The format has no empty list, and llama.cpp takes no vocabulary without merges. This one makes no token.
        "merges": merges or ["<unused <unused"],
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": config["eos_token_id"],
        "add_bos_token": False,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items()}


def gguf_tensors(
    config: Mapping[str, Any], names: Iterable[str], read: Callable[[str], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Name and values of every tensor of the file, for a checkpoint's tensors `names`; sizes in torch's order.

    Experts of a layer are stacked, [experts, out, in]. A latent's up-projection is split into `attn_k_b` [heads,
    latent, key], transposed for absorption, and `attn_v_b` [heads, value, latent]. The rows of llama's queries and keys
    change their order, since it turns neighbouring elements there and the checkpoint has halves. Layers behind the last
    one, which predict further tokens, are left out.
    """
    import torch

    kind, heads = config["model_type"], config["num_attention_heads"]
    for name in names:
        if name in _OUTSIDE:
            if not (name == "lm_head.weight" and config.get("tie_word_embeddings")):
                yield _OUTSIDE[name], _stored(read(name), is_matrix=name != "model.norm.weight")
            continue
        found = _LAYER.fullmatch(name)
        if not found:
            raise ValueError(f"a GGUF file has no place for the tensor: {name}")
        if int(found[1]) >= config["num_hidden_layers"]:
            continue
        prefix, rest = f"blk.{found[1]}.", found[2]
        if expert := _EXPERT.fullmatch(rest):
            if expert[1] == "0":
                of_expert = [name.replace(".experts.0.", f".experts.{index}.") for index in range(_num_experts(config))]
                yield f"{prefix}ffn_{expert[2]}_exps.weight", _stored(torch.stack([read(each) for each in of_expert]))
        elif rest == "self_attn.kv_b_proj.weight":
            nope, value = config["qk_nope_head_dim"], config["v_head_dim"]
            keys, values = read(name).unflatten(0, (heads, nope + value)).split([nope, value], dim=1)
            yield f"{prefix}attn_k_b.weight", _stored(keys.transpose(1, 2))
            yield f"{prefix}attn_v_b.weight", _stored(values)
        elif rest not in _IN_LAYER:
            raise ValueError(f"a GGUF file has no place for the tensor: {name}")
        else:
            values = read(name)
            if kind == "llama" and rest in ("self_attn.q_proj.weight", "self_attn.k_proj.weight"):
                count = heads if "q_proj" in rest else config["num_key_value_heads"]
                values = neighbours_from_halves(values, count)
            yield prefix + _IN_LAYER[rest], _stored(values, is_matrix=values.ndim > 1 and rest != "mlp.gate.weight")


def neighbours_from_halves(weight: Tensor, heads: int) -> Tensor:
    """[heads * dim, in]: rows i and i + dim/2 of each head, which rope turns together, become rows 2i and 2i + 1."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _stored(values: Tensor, is_matrix: bool = True) -> Tensor:
    import torch

    return values.to(torch.bfloat16 if is_matrix else torch.float32).contiguous()


def write_gguf(path: Path) -> Path:
    """`path`.gguf of the checkpoint in `path`; left as it is if it is there. Raises RuntimeError without gguf."""
    target = path.with_name(f"{path.name}.gguf")
    if target.exists():
        return target
    try:
        import gguf  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise RuntimeError(
            f"MODEL.gguf is written by the package gguf; pip install gguf for: {sys.executable}"
        ) from error
    import torch
    from safetensors import safe_open

    config, tokenizer = (json.loads((path / name).read_text()) for name in ("config.json", "tokenizer.json"))
    metadata = gguf_metadata(config, tokenizer, path.name)
    unfinished = target.with_name(f"{target.name}.part")
    writer = gguf.GGUFWriter(unfinished, ARCHITECTURES[config["model_type"]])
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in metadata.items():
        add.get(type(value), writer.add_array)(key, value)
    with safe_open(path / "model.safetensors", framework="pt") as file:
        for name, values in gguf_tensors(config, list(file.keys()), file.get_tensor):
            if values.dtype == torch.float32:
                writer.add_tensor(name, values.numpy())
            else:
                raw = values.view(torch.uint8).numpy()  # numpy has no bfloat16
                writer.add_tensor(name, raw, raw_shape=raw.shape, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.rename(target)
    return target


def main() -> int:
    parser = argparse.ArgumentParser(description="Writes MODEL.gguf beside each checkpoint.")
    parser.add_argument("models", nargs="+", type=Path)
    for path in parser.parse_args().models:
        try:
            print(write_gguf(path), flush=True)
        except (RuntimeError, ValueError, OSError) as error:
            print(f"{path}: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
