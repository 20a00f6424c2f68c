"""benchmarks/peers/gguf_export.py: what it writes is read back by transformers, and computes what the checkpoint does.

What llama.cpp itself makes of the files was compared by hand (docs/benchmarks.md); it is not built here.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

PEERS = Path(__file__).parents[2] / "benchmarks" / "peers"
COMMON = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
GROUPED = {**COMMON, "num_key_value_heads": 2, "head_dim": 32}
CONFIGS = {
    "llama": GROUPED,
    "qwen3": {**GROUPED, "tie_word_embeddings": True},
    "qwen3_moe": {**GROUPED, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    | {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "deepseek_v3": {**COMMON, "num_key_value_heads": 4, "kv_lora_rank": 32, "q_lora_rank": 48, "qk_rope_head_dim": 16}
    | {"qk_nope_head_dim": 24, "v_head_dim": 40, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 4}
    | {"topk_group": 2, "n_shared_experts": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1}
    | {"routed_scaling_factor": 2.5, "norm_topk_prob": True},
}


@pytest.fixture
def export(monkeypatch):
    monkeypatch.syspath_prepend(str(PEERS))
    yield importlib.import_module("gguf_export")
    sys.modules.pop("gguf_export", None)


def checkpoint(folder, kind, **changes):
    """A random checkpoint in bfloat16, its config as written, and the model in float32 of the same values."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, rope_parameters={"rope_type": "default", "rope_theta": 1e4}, **CONFIGS[kind] | changes
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, values in model.state_dict().items():
            if values.ndim == 1:  # norms are ones and biases zeros, which would hide where they go
                values.copy_(torch.rand(values.shape) + (0.5 if "norm" in name else 0.0))
    path = folder / kind
    model.save_pretrained(path)
    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={word: index + 3 for index, word in enumerate(words)}, merges=[]))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.save(str(path / "tokenizer.json"))
    return path, json.loads((path / "config.json").read_text()), model.float().eval()


def tensors_of(export, config, model):
    from safetensors import safe_open

    with safe_open(model / "model.safetensors", framework="pt") as file:
        return dict(export.gguf_tensors(config, list(file.keys()), file.get_tensor))


def turned_halves(x, positions):
    """Rope as checkpoints of llama have it: element i is turned with i + dim/2. x [tokens, heads, dim]."""
    half = x.shape[-1] // 2
    angle = positions[:, None, None] * 1e4 ** (-torch.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()), -1)


def turned_neighbours(x, positions):
    """The same of elements 2i and 2i + 1, as llama.cpp turns those of its architecture llama."""
    half = x.shape[-1] // 2
    angle = positions[:, None, None] * 1e4 ** (-torch.arange(half) / half)
    first, second = x[..., 0::2], x[..., 1::2]
    return torch.stack(
        (first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()), -1
    ).flatten(-2)


def test_reordered_rows_give_the_same_scores_where_neighbours_are_turned(export):
    torch.manual_seed(1)
    heads, dim, positions = 3, 16, torch.arange(7.0)
    hidden = torch.randn(7, 20)
    query, key = torch.randn(2, heads * dim, 20)

    def scores(turn, *weights):
        queries, keys = (turn((hidden @ weight.T).unflatten(-1, (heads, dim)), positions) for weight in weights)
        return torch.einsum("qhd,khd->hqk", queries, keys)

    wanted = scores(turned_halves, query, key)
    reordered = [export.neighbours_from_halves(weight, heads) for weight in (query, key)]
    torch.testing.assert_close(scores(turned_neighbours, *reordered), wanted, rtol=1e-4, atol=1e-3)
    assert (scores(turned_neighbours, query, key) - wanted).abs().max() > 1


def test_a_latents_up_projection_is_split_so_that_absorbed_attention_is_the_expanded_one(export, tmp_path):
    path, config, model = checkpoint(tmp_path, "deepseek_v3")
    written = tensors_of(export, config, path)
    heads, nope, value, rank = 4, 24, 40, 32
    keys, values = written["blk.1.attn_k_b.weight"].float(), written["blk.1.attn_v_b.weight"].float()
    assert keys.shape == (heads, rank, nope) and values.shape == (heads, value, rank)
    latent, query = torch.randn(9, rank), torch.randn(heads, nope)
    expanded = model.model.layers[1].self_attn.kv_b_proj(latent).detach().unflatten(-1, (heads, nope + value))
    wanted = torch.einsum("hn,thn->ht", query, expanded[..., :nope])
    torch.testing.assert_close(torch.einsum("hrn,hn->hr", keys, query) @ latent.T, wanted, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(torch.einsum("hvr,tr->thv", values, latent), expanded[..., nope:], rtol=1e-4, atol=1e-3)


def test_experts_are_stacked_and_the_bias_of_their_choice_is_float32(export, tmp_path):
    path, config, model = checkpoint(tmp_path, "deepseek_v3")
    written = tensors_of(export, config, path)
    layer = model.model.layers[1].mlp
    assert "blk.0.ffn_gate.weight" in written and "blk.0.ffn_gate_inp.weight" not in written
    assert written["blk.1.ffn_down_exps.weight"].shape == (8, 64, 32)
    assert written["blk.1.exp_probs_b.bias"].dtype == written["blk.1.ffn_gate_inp.weight"].dtype == torch.float32
    torch.testing.assert_close(written["blk.1.exp_probs_b.bias"], layer.gate.e_score_correction_bias.float())
    hidden = torch.randn(5, 64)
    gate, up = (written[f"blk.1.ffn_{name}_shexp.weight"].float() for name in ("gate", "up"))
    shared = (functional.silu(hidden @ gate.T) * (hidden @ up.T)) @ written["blk.1.ffn_down_shexp.weight"].float().T
    torch.testing.assert_close(shared, layer.shared_experts(hidden).detach(), rtol=1e-4, atol=1e-3)


def test_the_keys_of_a_latent_model_are_those_its_reader_asks_for(export, tmp_path):
    path, config, _ = checkpoint(tmp_path, "deepseek_v3")
    keys = export.gguf_metadata(config, json.loads((path / "tokenizer.json").read_text()), "x")
    wanted = {
        "attention.head_count": 4, "attention.head_count_kv": 1, "attention.key_length": 48,
        "attention.value_length": 32, "attention.key_length_mla": 40, "attention.value_length_mla": 40,
        "attention.q_lora_rank": 48, "attention.kv_lora_rank": 32, "rope.dimension_count": 16,
        "leading_dense_block_count": 1, "expert_count": 8, "expert_used_count": 2, "expert_shared_count": 2,
        "expert_gating_func": 2, "expert_weights_scale": 2.5, "expert_weights_norm": True, "expert_group_count": 4,
        "expert_group_used_count": 2, "block_count": 2, "vocab_size": 300, "rope.freq_base": 1e4,
    }  # fmt: skip
    assert {name: keys[f"deepseek2.{name}"] for name in wanted} == wanted
    assert len(keys["tokenizer.ggml.tokens"]) == 300 and len(set(keys["tokenizer.ggml.tokens"])) == 300
    assert keys["tokenizer.ggml.token_type"].count(export.CONTROL) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "GGUF files are written for llama, .*: gpt2$"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "must be default: yarn$"),
        ({"norm_topk_prob": False}, "needs norm_topk_prob to be True: False$"),
        ({"mlp_only_layers": [0]}, r"needs mlp_only_layers to be \[\]: \[0\]$"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(export, tmp_path, change, message):
    path, config, _ = checkpoint(tmp_path, "qwen3_moe")
    with pytest.raises(ValueError, match=message):
        export.gguf_metadata(config | change, json.loads((path / "tokenizer.json").read_text()), "x")


def test_a_tensor_that_has_no_place_is_refused_by_name(export):
    with pytest.raises(ValueError, match=r"no place for the tensor: model\.layers\.0\.self_attn\.q_proj\.bias$"):
        list(export.gguf_tensors(GROUPED | {"model_type": "llama"}, ["model.layers.0.self_attn.q_proj.bias"], None))


@pytest.mark.parametrize("kind", ["llama", "qwen3", "qwen3_moe"])
def test_transformers_reads_the_file_and_computes_the_same(export, tmp_path, kind):
    pytest.importorskip("gguf")
    from transformers import AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import (
        load_gguf_checkpoint,
    )  # what gguf_file= calls, but no accelerate

    path, _, model = checkpoint(tmp_path, kind)
    read = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32).eval()
    loaded = load_gguf_checkpoint(str(export.write_gguf(path)), return_tensors=True, model_to_load=read)
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "rms_norm_eps"):
        assert loaded["config"][name] == pytest.approx(getattr(model.config, name)), name
    report = read.load_state_dict(loaded["tensors"], strict=False)
    assert set(report.missing_keys) <= {"lm_head.weight"} and not report.unexpected_keys  # the head that is tied
    tokens = torch.arange(5, 25)[None]
    with torch.inference_mode():
        wanted = model(tokens).logits
        torch.testing.assert_close(read(tokens).logits, wanted, rtol=1e-4, atol=1e-3)
        query = read.model.layers[0].self_attn.q_proj.weight
        query.copy_(export.neighbours_from_halves(query, 4))
        assert (read(tokens).logits - wanted).abs().max() > 0.01


def test_the_file_holds_every_tensor_of_a_latent_model_as_it_was_given(export, tmp_path):
    gguf = pytest.importorskip("gguf")
    path, config, _ = checkpoint(tmp_path, "deepseek_v3")
    file = gguf.GGUFReader(export.write_gguf(path))
    given = tensors_of(export, config, path)
    found = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in file.tensors}
    assert found.keys() == given.keys()
    for name, values in given.items():
        assert (torch.from_numpy(found[name].copy()) == values.float()).all(), name
    assert file.fields["deepseek2.expert_weights_scale"].contents() == 2.5
    assert file.fields["deepseek2.expert_weights_norm"].contents() is True


def test_without_gguf_the_command_says_what_to_install(tmp_path):
    program = "import sys; sys.modules['gguf'] = None; sys.argv = sys.argv[1:]; import runpy; "
    program += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", program, str(PEERS / "gguf_export.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "pip install gguf for: " in done.stderr.splitlines()[-1]
