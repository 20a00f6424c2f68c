"""What an engine is told: `EngineArgs`, with vLLM's names, and the resolved, frozen `EngineConfig`."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from ..models.chat_encodings import CHAT_ENCODINGS
from ..models.checkpoint import Checkpoint, open_checkpoint, resolve_model
from ..models.config import ModelConfig
from ..models.config_parser import parse_config
from ..models.generation_config import extra_eos_token_ids, sampling_defaults
from ..models.pooling_config import PoolingConfig
from ..models.speculation import check_multi_token_prediction
from ..scheduler.sampling_params import SamplingParams
from .graphs.config import GRAPH_BACKENDS, choose_graphs
from .pooling.choice import CONVERSIONS, RUNNERS, choose_pooling
from .profiling import choose_profiler
from .speculation.config import Speculation, check_draft_model, choose_speculation, with_shorthands

logger = logging.getLogger(__name__)
DEMO_MODEL = Path(__file__).parents[1] / "models" / "demo" / "deepseek"
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

    model: str = _arg("", "checkpoint directory, or a model id in the local hub cache; none: the demo model")
    tokenizer: str | None = _arg(None, "directory or model id of the tokenizer, if not the model's own")
    skip_tokenizer_init: bool = _arg(False, "load no tokenizer: prompts and outputs are token ids only")
    runner: str = _arg(
        "auto", "generate text, or pool prompts into embeddings and scores; auto: pool what is made for it",
        choices=RUNNERS,
    )  # fmt: skip
    convert: str = _arg("auto", "what a model that generates is made into for pooling: embed or classify",
                        choices=CONVERSIONS)  # fmt: skip
    pooler_config: dict[str, Any] | None = _arg(
        None, "JSON that goes before the model's own files: seq_pooling_type (LAST, CLS, MEAN) and, for embeddings, "
        "use_activation (whether they are normalised)",
        json=True,
    )  # fmt: skip
    revision: str | None = _arg(None, "branch, tag or commit of the model in the hub cache")
    download_dir: str | None = _arg(None, "hub cache folder, if not the default one")
    load_format: str = _arg("auto", "dummy: seeded random weights without files", choices=LOAD_FORMATS)
    dtype: str = _arg("auto", "type of weights and activations; auto: the checkpoint's own", choices=DTYPES)
    device: str = _arg("auto", "cpu, cuda, cuda:N, npu or npu:N; auto: cuda or npu where there is one")
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
        None, "bytes of the KV cache; on a CPU all is brought in beforehand (default: from free memory)", size=True
    )
    num_gpu_blocks_override: int | None = _arg(None, "number of KV blocks, whatever the memory")
    block_size: int | None = _arg(None, "tokens per KV block (default 16, on an NPU 128)")
    enable_prefix_caching: bool = _arg(True, "reuse the KV blocks of equal prompt prefixes")
    max_num_seqs: int | None = _arg(
        None, "most requests computed in one step (default 128 on CPU, 256 otherwise)", size=True
    )
    max_num_batched_tokens: int | None = _arg(None, "most tokens computed in one step (default 2048)", size=True)
    enable_chunked_prefill: bool = _arg(True, "split long prompts over several steps")
    long_prefill_token_threshold: int = _arg(
        0, "most prompt tokens of one request per step; 0: no limit of its own", size=True
    )
    max_prefill_share: float = _arg(
        1.0, "share of the time that prompts may take while other requests decode; below 1 tokens come more evenly, "
        "and first tokens later where prompts come close together; 1: no limit",
    )  # fmt: skip
    scheduling_policy: str = _arg("fcfs", "order of waiting requests", choices=("fcfs", "priority"))
    max_num_queued_reqs: int | None = _arg(None, "refuse requests (503) while this many wait", size=True)
    max_num_queued_tokens: int | None = _arg(
        None, "refuse requests (503) while this many prompt tokens wait", size=True
    )
    profiler_config: dict[str, Any] | None = _arg(
        None, 'JSON: {"profiler": "torch", "torch_profiler_dir": FOLDER} to profile steps, from /start_profile to '
        "/stop_profile", json=True,
    )  # fmt: skip
    disable_log_stats: bool = _arg(False, "write no periodic line about throughput, queues and cache")
    enforce_eager: bool = _arg(False, "compile no graphs: every step runs eager")
    graph_backend: str = _arg(
        "auto",
        "how decode steps become static graphs: inductor on a CPU, cudagraph on an NVIDIA GPU, torchair or npugraph_ex "
        "on an Ascend NPU; eager: padded to the same shapes, not compiled",
        choices=GRAPH_BACKENDS,
    )
    cudagraph_capture_sizes: list[int] | None = _arg(
        None, "batch sizes to make graphs for (default: up to 64 on a CPU and an NPU, 6 of them; up to 256 on a GPU)"
    )
    max_cudagraph_capture_size: int | None = _arg(None, "largest default batch size to make a graph for", size=True)
    compilation_config: dict[str, Any] = _arg(
        {}, "JSON in vLLM's spelling: mode, cudagraph_mode, cudagraph_capture_sizes, max_cudagraph_capture_size, and "
        "cache_dir, where compiled graphs are kept",
        json=True,
    )  # fmt: skip
    require_graph: bool = _arg(False, "start only when every graph is there, and fail if one cannot be made")
    async_scheduling: bool = _arg(True, "plan and launch the next step before the tokens of the last one are read")
    speculative_config: dict[str, Any] | None = _arg(
        {}, "JSON in vLLM's spelling: method (mtp, ngram, draft_model), num_speculative_tokens, model, "
        "prompt_lookup_min, prompt_lookup_max; and adaptive_depth, whether steps may verify fewer drafts where that "
        "pays (true)",
        json=True,
    )  # fmt: skip
    spec_method: str | None = _arg(None, "short for method in speculative_config")
    spec_model: str | None = _arg(None, "short for model in speculative_config: the draft model's checkpoint")
    spec_tokens: int | None = _arg(None, "short for num_speculative_tokens in speculative_config")
    trust_remote_code: bool = _arg(False, "for compatibility: code of a checkpoint is never run, trusted or not")
    tokenizer_mode: str = _arg(
        "auto", "deepseek_v32: write conversations in that model's built-in chat format, whatever template there is",
        choices=("auto", *CHAT_ENCODINGS),
    )  # fmt: skip
    quantization: str | None = _arg(None, "fp8 block checkpoints are recognised by themselves; nothing else is built")
    tensor_parallel_size: int = _arg(1, "ranks that share each layer; only 1 is supported so far")
    pipeline_parallel_size: int = _arg(1, "ranks that share the layers; only 1 is supported so far")
    data_parallel_size: int = _arg(1, "replicas of the engine; only 1 is supported so far")

    def __post_init__(self) -> None:
        self.model = os.fspath(self.model)  # a Path will do
        if self.model == "":
            self.model = str(DEMO_MODEL)
            # a warning, so that it is seen where nobody has set up logging
            logger.warning("no model is given, using the bundled demo: %s", DEMO_MODEL)
        for field_ in fields(self):
            _check_type(field_.name, getattr(self, field_.name))
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}: {value}")
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be a positive integer: {value}")
        if self.max_logprobs < -1:
            raise ValueError(f"max_logprobs must be at least 0, or -1 for the whole vocabulary: {self.max_logprobs}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(f"gpu_memory_utilization must be in (0, 1]: {self.gpu_memory_utilization}")
        if not 0 < self.max_prefill_share <= 1:
            raise ValueError(f"max_prefill_share must be in (0, 1]: {self.max_prefill_share}")
        if self.profiler_config is not None:
            choose_profiler(self.profiler_config)
        choose_graphs(self)
        self.speculative_config = with_shorthands(
            self.speculative_config, method=self.spec_method, model=self.spec_model, num_drafts=self.spec_tokens
        )
        choose_speculation(self.speculative_config)
        for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
            if getattr(self, name) != 1:
                raise ValueError(
                    f"{name} is not supported yet, the engine starts no other ranks; use 1: {getattr(self, name)}"
                )
        if self.quantization not in (None, "fp8"):
            raise ValueError(
                "quantization is not supported yet but for fp8 block checkpoints, which need no flag: "
                f"{self.quantization}"
            )


_HINTS = get_type_hints(EngineArgs)


def _check_type(name: str, value: Any) -> None:
    """ValueError unless `value` has one of the types of the field `name`; an integer is a number too."""
    hint = _HINTS[name]
    kinds = tuple(get_origin(kind) or kind for kind in get_args(hint) if get_origin(hint) not in (dict, list)) or (
        get_origin(hint) or hint,
    )
    if isinstance(value, kinds) and (not isinstance(value, bool) or bool in kinds):
        return
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        return
    names = " or ".join("nothing" if kind is type(None) else _TYPE_NAMES[kind] for kind in kinds)
    raise ValueError(f"{name} must be {names}: {value!r}")


_TYPE_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "text", dict: "a mapping",
               list: "a list"}  # fmt: skip
_POSITIVE = (
    "block_size",
    "kv_cache_memory_bytes",
    "max_cudagraph_capture_size",
    "max_num_batched_tokens",
    "max_num_seqs",
    "num_gpu_blocks_override",
)
_CHOICES = {f.name: f.metadata["choices"] for f in fields(EngineArgs) if "choices" in f.metadata}
AsyncEngineArgs = EngineArgs


@dataclass(frozen=True)
class EngineConfig:
    """`EngineArgs` resolved against the checkpoint. Torch-free: both sides of the process boundary build it."""

    args: EngineArgs
    checkpoint: Checkpoint
    tokenizer_path: Path | None
    model: ModelConfig
    dtype: str  # float32 | bfloat16 | float16
    max_model_len: int | None  # None: as long as the KV cache holds
    sampling_defaults: dict[str, Any]
    extra_eos_token_ids: tuple[int, ...]
    speculation: Speculation | None = None
    pooling: PoolingConfig | None = None  # None: the model generates

    @classmethod
    def from_args(cls, args: EngineArgs) -> EngineConfig:
        """Read config.json and its neighbours; raises ValueError or OSError with what to change."""
        path = resolve_model(args.model, args.revision, args.download_dir)
        checkpoint = open_checkpoint(path, hf_overrides=args.hf_overrides, with_weights=args.load_format != "dummy")
        model = parse_config(checkpoint.config)
        tokenizer_path = None
        if not args.skip_tokenizer_init:
            tokenizer_path = path if args.tokenizer is None else resolve_model(args.tokenizer, None, args.download_dir)
        pooling = choose_pooling(args, checkpoint, model, tokenizer_path)
        if pooling is not None and pooling.max_length is not None:
            length = min(model.derived_max_model_len, pooling.max_length)
            model = replace(model, derived_max_model_len=length)
        defaults = sampling_defaults(checkpoint, args.generation_config, args.override_generation_config)
        SamplingParams.from_optional(**defaults)  # a wrong default is the operator's to hear of, not every request's
        return cls(
            args=args,
            checkpoint=checkpoint,
            tokenizer_path=tokenizer_path,
            model=model,
            dtype=_resolve_dtype(args.dtype, model.dtype, checkpoint),
            max_model_len=_resolve_max_model_len(args.max_model_len, model),
            sampling_defaults=defaults,
            extra_eos_token_ids=extra_eos_token_ids(checkpoint, args.generation_config),
            speculation=_resolve_speculation(args, model),
            pooling=pooling,
        )

    @property
    def block_size(self) -> int:
        return self.args.block_size or 16

    @property
    def max_num_batched_tokens(self) -> int:
        least = 0
        if self.model.encoder is not None:  # computes every prompt whole
            least = self.max_model_len or self.model.derived_max_model_len
        return self.args.max_num_batched_tokens or max(2048, least)

    def max_num_seqs(self, device_type: str) -> int:
        """Rows of the persistent batch; the default depends on the device, which only the core knows.

        Every running request must be able to get a token in each step, so the default yields to the token budget.
        """
        return self.args.max_num_seqs or min(128 if device_type == "cpu" else 256, self.max_num_batched_tokens)


def _resolve_dtype(wanted: str, config_dtype: str, checkpoint: Checkpoint) -> str:
    """`auto` keeps the checkpoint's own type, so that it computes as it was saved: config.json's, else the tensors'."""
    says_dtype = any(checkpoint.config.get(key) is not None for key in ("dtype", "torch_dtype"))
    own = config_dtype if says_dtype else checkpoint.stored_dtype or config_dtype
    return {"auto": own, "half": "float16", "float": "float32"}.get(wanted, wanted)


def _resolve_speculation(args: EngineArgs, model: ModelConfig) -> Speculation | None:
    """What speculates, checked against the model; ValueError or OSError with what to change."""
    choice = choose_speculation(args.speculative_config)
    if choice is None:
        return None
    if choice.method == "mtp":
        check_multi_token_prediction(model)
    if choice.model is None:
        return Speculation(choice)
    path = resolve_model(choice.model, choice.revision, args.download_dir)
    checkpoint = open_checkpoint(path, with_weights=args.load_format != "dummy")
    draft = parse_config(checkpoint.config)
    check_draft_model(model, draft)
    return Speculation(choice, checkpoint, draft)


def _resolve_max_model_len(wanted: int | str | None, model: ModelConfig) -> int | None:
    """The length asked for, the model's own by default, or None for `auto`."""
    if wanted in (-1, "auto"):
        return None
    if wanted is None:
        return model.derived_max_model_len
    if isinstance(wanted, str) or wanted < 2:
        raise ValueError(f"max_model_len must be at least 2 (a prompt and an output token), -1 or auto: {wanted}")
    if wanted > model.derived_max_model_len:
        raise ValueError(
            f"max_model_len is greater than the {model.derived_max_model_len} positions this model was made for; "
            "lower it, or raise max_position_embeddings with hf_overrides if you know that longer works: "
            f"{wanted}"
        )
    return wanted
