"""Tiny random checkpoints saved by transformers, the oracle that reads them, shared by all tests."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Padded to the graphs' shapes and not compiled: what a compiler adds is tested where it is the subject.
os.environ.setdefault("OMNI_ENGINE_GRAPH_BACKEND", "eager")
# Where torch-npu is installed without CANN, importing torch fails otherwise.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for models this small, threads only get in each other's way

# The commit tier must give the same verdict twice; the full tier (--hypothesis-profile=full) looks further each time.
settings.register_profile("commit", derandomize=True, deadline=None)
settings.register_profile("full", derandomize=False, deadline=None)
settings.load_profile("commit")


def pytest_configure(config: pytest.Config) -> None:
    """Build the C++ kernels before the first test: an engine does not wait for them, and would change bodies midway."""
    if not hasattr(config, "workerinput"):
        from omni_engine.ops.cpu.build import available

        available()


SPECIAL_TOKENS = ["<|bos|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # ids 0 to 3

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TOKENIZER_TEXT = (
    "The harbour lies below the town, and every morning the boats go out before the light comes over the hill.",
    "A request has tokens that were computed and tokens that should be; each step gives it some more of them.",
    "Was man nicht weiß, das eben brauchte man, und was man weiß, kann man nicht brauchen.",
    "Three plus four is seven; seven times eight is fifty-six; the answer is written on the last page.",
    "今天天气很好，我们去海边走走。 Привет, мир! 🚢 naïve café",
    "def step(self):\n    plan = self.schedule()\n    return self.execute(plan)\n",
)

# Small, ragged, far from the defaults: no size is a power of two where the architecture allows another.
COMMON = {
    "vocab_size": 515,
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
DEEPSEEK = {
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "q_lora_rank": 40,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 20,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 12,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
}
# Enough heads that ReLU leaves hardly a score at exactly zero, where transformers breaks ties in no promised order.
INDEXER = {"index_n_heads": 12, "index_head_dim": 20, "index_topk": 8}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {"sliding_window": 11},
    "Qwen2ForCausalLM": {},
    "Qwen3ForCausalLM": {"head_dim": 24},
    "Qwen3MoeForCausalLM": {
        "head_dim": 24,
        "num_experts": 10,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
    },
    "DeepseekV2ForCausalLM": {
        **DEEPSEEK,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 1.7,
    },
    "DeepseekV3ForCausalLM": {**DEEPSEEK, "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 0},
    "DeepseekV32ForCausalLM": {**DEEPSEEK, **INDEXER, "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 0},
    "GlmMoeDsaForCausalLM": {**DEEPSEEK, **INDEXER, "n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0},
}


def randomise(model: Any, seed: int) -> None:
    """Draws every weight anew, away from what an initialisation leaves: norms near 1, biases 0 and small projections
    make a model that hardly notices a missing rope or bias."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    tensors = dict(model.named_parameters())
    tensors.update({name: tensor for name, tensor in model.named_buffers() if name.endswith("correction_bias")})
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name.endswith("correction_bias"):
                tensor.normal_(0, 0.3, generator=generator)
            elif name.endswith(("norm.weight", "LayerNorm.weight")):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif name.endswith("bias"):
                tensor.normal_(0, 0.5, generator=generator)
            else:
                tensor.normal_(0, 1.5 / tensor.shape[-1] ** 0.5, generator=generator)


def save_tokenizer(directory: Path, vocab_size: int) -> None:
    """A byte-level BPE tokenizer of at most `vocab_size` tokens, with a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocab_size, 400),
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TOKENIZER_TEXT, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|im_end|>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    generation = {"bos_token_id": 0, "eos_token_id": [3, 1], "do_sample": False}
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2))


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make_checkpoint(architecture, seed=0, max_shard_size="1GB", **config_overrides) -> directory`.

    A tiny model of the architecture with random float32 weights, a tokenizer (bos 0, eos 3 and 1) and a generation
    config; made once per set of arguments, so treat the directory as read-only.
    """
    made: dict[str, Path] = {}

    def make(architecture: str, seed: int = 0, max_shard_size: str = "1GB", **config_overrides: Any) -> Path:
        settings = {**COMMON, **ARCHITECTURES[architecture], **config_overrides}
        key = json.dumps([architecture, seed, max_shard_size, settings], sort_keys=True)
        if key not in made:
            import torch
            import transformers

            transformers.logging.set_verbosity_error()
            transformers.logging.disable_progress_bar()
            model_class = getattr(transformers, architecture)
            config = model_class.config_class(**settings)
            with torch.random.fork_rng(devices=[]):
                model = model_class(config)
            randomise(model, seed)
            directory = tmp_path_factory.mktemp(architecture)
            model.save_pretrained(directory, max_shard_size=max_shard_size)
            save_tokenizer(directory, settings["vocab_size"])
            made[key] = directory
        return made[key]

    return make


ENCODER = {
    "vocab_size": 515, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 130, "type_vocab_size": 2, "layer_norm_eps": 1e-6,
}  # fmt: skip
POOLING_MODULES = {
    "Transformer": "sentence_transformers.models.Transformer",
    "Pooling": "sentence_transformers.models.Pooling",
    "Dense": "sentence_transformers.models.Dense",
    "Normalize": "sentence_transformers.models.Normalize",
}


def save_pair_tokenizer(directory: Path, *, begin: str, end: str, pair: str, eos_only: bool = False) -> None:
    """A byte-level BPE tokenizer whose texts stand between special tokens; `pair` joins two, with their types."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [begin, "<pad>", end, "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(TOKENIZER_TEXT, trainer)
    tokenizer.add_tokens(["no", "yes"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}" if eos_only else f"{begin} $A {end}",
        pair=pair,
        special_tokens=[(begin, 0), (end, 2)],
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "unk_token": "<unk>", "eos_token": end,
        "bos_token": begin, "clean_up_tokenization_spaces": False, "model_max_length": 1000,
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
    }  # fmt: skip
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


@pytest.fixture(scope="session")
def make_pooling_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make_pooling_checkpoint(architecture, modules=(), prompts=None, **config_overrides) -> directory`.

    A tiny random pooling model as transformers saves it, float32, with a tokenizer that puts special tokens around
    texts; `modules` are those of sentence-transformers behind the transformer: (kind, its config.json). Made once per
    set of arguments.
    """
    made: dict[str, Path] = {}

    def make(
        architecture: str,
        modules: tuple[tuple[str, dict[str, Any]], ...] = (),
        prompts: dict[str, Any] | None = None,
        saved_by: str | None = None,
        **config_overrides: Any,
    ) -> Path:
        key = json.dumps([architecture, modules, prompts, saved_by, config_overrides], sort_keys=True)
        if key in made:
            return made[key]
        import torch
        import transformers
        from safetensors.torch import save_file

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        encodes = "ert" in architecture
        model_class = getattr(transformers, saved_by or architecture)
        settings = {**(ENCODER if encodes else {**COMMON, "pad_token_id": 1}), **config_overrides}
        if architecture.startswith("Qwen3"):
            settings["head_dim"] = 24
        with torch.random.fork_rng(devices=[]):
            model = model_class(model_class.config_class(**settings))
        randomise(model, 3)
        directory = tmp_path_factory.mktemp(architecture)
        model.save_pretrained(directory)
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | {"architectures": [architecture]}))
        begin, end = ("<s>", "</s>") if "Rob" in architecture or not encodes else ("[CLS]", "[SEP]")
        pair = f"{begin} $A {end} {end} $B {end}" if begin == "<s>" else f"{begin} $A {end} $B:1 {end}:1"
        save_pair_tokenizer(directory, begin=begin, end=end, pair=pair, eos_only=not encodes)
        if modules:
            entries = [{"idx": 0, "name": "0", "path": "", "type": POOLING_MODULES["Transformer"]}]
            generator = torch.Generator().manual_seed(11)
            for index, (kind, module) in enumerate(modules, 1):
                folder = directory / f"{index}_{kind}"
                folder.mkdir()
                (folder / "config.json").write_text(json.dumps(module))
                if kind == "Dense":
                    size, inputs = module["out_features"], module["in_features"]
                    tensors = {"linear.weight": torch.randn(size, inputs, generator=generator) / inputs**0.5}
                    if module["bias"]:
                        tensors["linear.bias"] = torch.randn(size, generator=generator)
                    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
                entries.append({"idx": index, "name": str(index), "path": folder.name, "type": POOLING_MODULES[kind]})
            (directory / "modules.json").write_text(json.dumps(entries))
            length = {"max_seq_length": config["max_position_embeddings"] - 4, "do_lower_case": False}
            (directory / "sentence_bert_config.json").write_text(json.dumps(length))
            (directory / "config_sentence_transformers.json").write_text(json.dumps(prompts or {"prompts": {}}))
        made[key] = directory
        return directory

    return make


@pytest.fixture(scope="session")
def make_predicting_checkpoint(
    make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """`make_predicting_checkpoint(architecture, **config_overrides) -> directory`: as `make_checkpoint` for a DeepSeek
    architecture, with a random layer for multi-token prediction behind the decoder, under the published names.

    It is made of the last layer of a decoder with one layer more, so it is routed or dense as that one is.
    """
    made: dict[str, Path] = {}

    def make(architecture: str, **config_overrides: Any) -> Path:
        key = json.dumps([architecture, config_overrides], sort_keys=True)
        if key not in made:
            import torch
            from safetensors.torch import load_file, save_file

            layers = {**COMMON, **ARCHITECTURES[architecture], **config_overrides}["num_hidden_layers"]
            source = make_checkpoint(architecture, **{**config_overrides, "num_hidden_layers": layers + 1})
            tensors = load_file(source / "model.safetensors")
            hidden = tensors["model.norm.weight"].shape[0]
            generator = torch.Generator().manual_seed(5)
            prefix = f"model.layers.{layers}."
            for name in ("enorm", "hnorm", "shared_head.norm"):
                tensors[f"{prefix}{name}.weight"] = torch.rand(hidden, generator=generator) + 0.5
            scale = 1.5 / (2 * hidden) ** 0.5
            tensors[f"{prefix}eh_proj.weight"] = torch.randn(hidden, 2 * hidden, generator=generator) * scale
            directory = tmp_path_factory.mktemp("predicting") / architecture
            shutil.copytree(source, directory)
            save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
            config = json.loads((source / "config.json").read_text())
            for name in ("layer_types", "mlp_layer_types", "indexer_types"):
                config.pop(name, None)  # one entry too many; without them the numbers count
            config |= {"num_hidden_layers": layers, "num_nextn_predict_layers": 1}
            (directory / "config.json").write_text(json.dumps(config))
            made[key] = directory
        return made[key]

    return make


@pytest.fixture(scope="session")
def reference_model() -> Callable[[Path], Any]:
    """`reference_model(directory)`: the checkpoint in transformers, float32, eager attention and experts."""
    loaded: dict[Path, Any] = {}

    def load(directory: Path) -> Any:
        if directory not in loaded:
            import torch
            import transformers

            loaded[directory] = transformers.AutoModelForCausalLM.from_pretrained(
                directory, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
            ).eval()
        return loaded[directory]

    return load


@pytest.fixture(scope="session")
def config_only(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with nothing but the config.json of a very small model, for dummy weights."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 96, "hidden_size": 16,
        "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1,
        "max_position_embeddings": 512, "dtype": "float32",
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("config-only")
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@contextmanager
def running_servers(args: Any, settings: dict[str, Any]) -> Iterator[Callable[..., Any]]:
    """Servers of one engine in a thread of their own, on loopback: those of `settings` (by name), for `args`.

    Gives `serve(name, scenario, timeout)`, which waits for what the coroutine `scenario(session, engine)` returns.
    """
    from aiohttp import ClientSession, web
    from prometheus_client import CollectorRegistry

    from omni_engine import AsyncEngine
    from omni_engine.server.app import build_app

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def wait(coroutine: Any, timeout: float = 240) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(timeout)

    async def start() -> tuple[AsyncEngine, dict[str, web.AppRunner]]:
        engine = AsyncEngine(args)
        await engine.wait_ready()
        engine.warm_up_grammars()
        runners = {}
        for name, chosen in settings.items():
            engine.metrics_registry = CollectorRegistry()  # each server's own metrics go by the same names
            app = build_app(engine, chosen)
            runners[name] = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1)
            await runners[name].setup()
            await web.TCPSite(runners[name], "127.0.0.1", 0).start()
        return engine, runners

    engine, runners = wait(start())

    async def serve(name: str, scenario: Callable[..., Any], timeout: float) -> Any:
        async with ClientSession(f"http://127.0.0.1:{runners[name].addresses[0][1]}") as session:
            return await asyncio.wait_for(scenario(session, engine), timeout)

    async def stop() -> None:
        for runner in runners.values():
            await runner.cleanup()
        await engine.shutdown()

    yield lambda name, scenario, timeout=200: wait(serve(name, scenario, timeout), timeout + 40)
    wait(stop())
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture(scope="session")
def servers() -> Callable[..., Any]:
    """`running_servers`."""
    return running_servers
