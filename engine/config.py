"""What an engine is told: `EngineArgs`, with vLLM's names, and the resolved, frozen `EngineConfig`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

LOAD_FORMATS = ("auto", "safetensors", "dummy")
DTYPES = ("auto", "float32", "bfloat16", "float16", "half", "float")
LOGPROBS_MODES = ("raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits")


def _arg(default: Any, help_text: str, **metadata: Any) -> Any:
    """A field that the command line shows with this help."""
    metadata["help"] = help_text
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class EngineArgs:
    """Arguments of an engine. Each field is a keyword of `Engine`, `LLM` and `AsyncEngine`, and a `serve` flag."""

    model: str = _arg("", "checkpoint directory, or a model id in the local hub cache")
    tokenizer: str | None = _arg(None, "directory or model id of the tokenizer, if not the model's own")
    skip_tokenizer_init: bool = _arg(False, "load no tokenizer: prompts and outputs are token ids only")
    revision: str | None = _arg(None, "branch, tag or commit of the model in the hub cache")
    download_dir: str | None = _arg(None, "hub cache folder, if not the default one")
    load_format: str = _arg("auto", "dummy: seeded random weights without files", choices=LOAD_FORMATS)
    dtype: str = _arg("auto", "type of weights and activations; auto: the checkpoint's own", choices=DTYPES)
    device: str = _arg("auto", "cpu, cuda or cuda:N; auto: cuda where there is one")
    max_model_len: int | str | None = _arg(
        None, "longest sequence, prompt and output together; auto or -1: as long as the KV cache holds", size=True
    )
    seed: int = _arg(0, "seeds dummy weights and the requests that bring no seed of their own")
    max_logprobs: int = _arg(20, "most logprobs a request may ask for; -1: the whole vocabulary")
    logprobs_mode: str = _arg("raw_logprobs", "what logprobs hold: before or after penalties, temperature and masks",
                              choices=LOGPROBS_MODES)  # fmt: skip
    generation_config: str = _arg(
        "auto", "where default sampling parameters come from: auto (the model), vllm (none), or a folder"
    )
    override_generation_config: dict[str, Any] = _arg(
        {}, "JSON of sampling defaults that go before the model's", json=True
    )
    hf_overrides: dict[str, Any] = _arg({}, "JSON merged into config.json", json=True)
    gpu_memory_utilization: float = _arg(0.92, "share of the device's memory that may be used (accelerators)")
    kv_cache_memory_bytes: int | None = _arg(
        None, "size of the KV cache in bytes (default: from free memory)", size=True
    )
    num_gpu_blocks_override: int | None = _arg(None, "number of KV blocks, whatever the memory")
    block_size: int | None = _arg(None, "tokens per KV block (default 16)")
    enable_prefix_caching: bool = _arg(True, "reuse the KV blocks of equal prompt prefixes")
    max_num_seqs: int | None = _arg(
        None, "most requests computed in one step (default 128 on CPU, 256 otherwise)", size=True
    )
    max_num_batched_tokens: int | None = _arg(None, "most tokens computed in one step (default 2048)", size=True)
    enable_chunked_prefill: bool = _arg(True, "split long prompts over several steps")
    long_prefill_token_threshold: int = _arg(
        0, "most prompt tokens of one request per step; 0: no limit of its own", size=True
    )
    scheduling_policy: str = _arg("fcfs", "order of waiting requests", choices=("fcfs", "priority"))
    max_num_queued_reqs: int | None = _arg(None, "refuse requests (503) while this many wait", size=True)
    max_num_queued_tokens: int | None = _arg(
        None, "refuse requests (503) while this many prompt tokens wait", size=True
    )
    disable_log_stats: bool = _arg(False, "print no periodic statistics")
    trust_remote_code: bool = _arg(False, "accepted for compatibility; code of a checkpoint is never run")

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}: {value}")


_CHOICES = {f.name: f.metadata["choices"] for f in fields(EngineArgs) if "choices" in f.metadata}
AsyncEngineArgs = EngineArgs
