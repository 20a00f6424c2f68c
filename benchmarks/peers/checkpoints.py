"""Writes the checkpoints of the comparison: published shapes in small, random weights in bfloat16.

    python benchmarks/peers/checkpoints.py FOLDER [llama-160m ...] [--openvino PYTHON]

Needs transformers. The weights are drawn from a fixed seed, so that all engines and all runs compute the same.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_COMMON: dict[str, Any] = {
    "dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
}
_SMALL = {"vocab_size": 32000, "max_position_embeddings": 8192, "tie_word_embeddings": False}
_EXPERTS = {"hidden_size": 512, "intermediate_size": 1536, "moe_intermediate_size": 256, "num_hidden_layers": 8}
_DEEPSEEK = {
    **_SMALL,
    **_EXPERTS,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "n_shared_experts": 1,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "first_k_dense_replace": 1,
    "q_lora_rank": 256,
}
# model type, rope's base, everything else
SHAPES: dict[str, tuple[str, float, dict[str, Any]]] = {
    "llama-160m": (
        "llama",
        1e4,
        {
            **_SMALL,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "num_key_value_heads": 12,
            "head_dim": 64,
        },
    ),
    "qwen3-0.6b": (
        "qwen3",
        1e6,
        {
            "vocab_size": 151936,
            "max_position_embeddings": 40960,
            "tie_word_embeddings": True,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
    ),
    "deepseek-tiny": (
        "deepseek_v3",
        1e4,
        {**_DEEPSEEK, "kv_lora_rank": 128, "qk_rope_head_dim": 32, "qk_nope_head_dim": 64, "v_head_dim": 64},
    ),
    "deepseek-tiny576": (
        "deepseek_v3",
        1e4,
        {**_DEEPSEEK, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128},
    ),
    "qwen3-moe-tiny": (
        "qwen3_moe",
        1e6,
        {
            **_SMALL,
            **_EXPERTS,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 64,
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
    ),
}


def write_checkpoint(folder: Path, name: str) -> Path:
    """`folder`/`name` with config.json, model.safetensors and a tokenizer of words without meaning; left as it is if it
    is there."""
    path = folder / name
    if (path / "model.safetensors").exists():
        return path
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, theta, shape = SHAPES[name]
    rope = {"rope_type": "default", "rope_theta": theta}
    config = AutoConfig.for_model(kind, rope_parameters=rope, **shape, **_COMMON)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(list(SHAPES).index(name))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * _COMMON["initializer_range"])
    path.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path, max_shard_size="20GB")
    written = json.loads((path / "config.json").read_text())
    # for readers of both spellings: transformers 4 and 5
    written |= {"torch_dtype": "bfloat16", "rope_theta": theta}
    if kind == "deepseek_v3":
        written |= {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1, "ep_size": 1}
    (path / "config.json").write_text(json.dumps(written, indent=1))
    _write_tokenizer(path, config.vocab_size)
    return path


def _write_tokenizer(path: Path, size: int) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = special + characters
    vocabulary = {word: index for index, word in enumerate(words + [f"Ġw{n}" for n in range(size - len(words))])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(path / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": special[2], "pad_token": special[0]}
    (path / "tokenizer_config.json").write_text(json.dumps(names, indent=1))


def export_for_openvino(path: Path, python: str) -> Path:
    """`path`-openvino, made by optimum-intel under the given interpreter; left as it is if it is there. Raises
    RuntimeError with the reason where it cannot export the model."""
    target = path.with_name(f"{path.name}-openvino")
    if not (target / "openvino_model.xml").exists():
        program = (
            "import sys; from optimum.intel import OVModelForCausalLM as M;"
            "from transformers import AutoTokenizer as T;"
            "from openvino_tokenizers import convert_tokenizer as c; import openvino as o; s, d = sys.argv[1:];"
            "M.from_pretrained(s, export=True, compile=False, load_in_8bit=False, dtype='auto', stateful=True)"
            ".save_pretrained(d); t = T.from_pretrained(s); t.save_pretrained(d);"
            "a, b = c(t, with_detokenizer=True); o.save_model(a, d + '/openvino_tokenizer.xml');"
            "o.save_model(b, d + '/openvino_detokenizer.xml')"
        )
        done = subprocess.run([python, "-c", program, str(path), str(target)], stderr=subprocess.PIPE, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
            raise RuntimeError(f"optimum-intel does not export {path.name}: {reason}")
    return target


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Writes the checkpoints of the comparison.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", help=f"default: all of {', '.join(SHAPES)}")
    parser.add_argument("--openvino", metavar="PYTHON", help="export them too, with this environment's optimum-intel")
    options = parser.parse_args(arguments)
    for name in options.names or SHAPES:
        if name not in SHAPES:
            parser.error(f"a checkpoint must be one of {', '.join(SHAPES)}: {name}")
        path = write_checkpoint(options.folder, name)
        print(path)
        if options.openvino:
            try:
                print(export_for_openvino(path, options.openvino))
            except RuntimeError as error:
                print(f"not exported: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
