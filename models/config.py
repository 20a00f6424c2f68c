"""The typed form of a checkpoint's config.json: what the decoders are built from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding. `kind`: default | linear | dynamic | llama3 | yarn."""

    theta: float
    dim: int  # rotated elements per head
    kind: str = "default"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn: scale of cos and sin; None: from mscale and factor
    mscale: float | None = None  # yarn, DeepSeek
    mscale_all_dim: float | None = None  # yarn, DeepSeek: also scales the softmax
    truncate: bool = True  # yarn: round the correction range to whole dimensions
    interleaved: bool = False  # pairs (0,1),(2,3)… instead of halves


@dataclass(frozen=True)
class MLAConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434)."""

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    norm_eps: float = 1e-6  # of the norms on the low ranks: fixed in the published code, not rms_norm_eps


@dataclass(frozen=True)
class IndexerConfig:
    """The lightning indexer of DeepSeek Sparse Attention (DeepSeek-V3.2, arXiv:2512.02556)."""

    num_heads: int
    head_dim: int  # of the one key per token and of each query; the first qk_rope_head_dim elements are rotated
    topk: int  # tokens that a token attends to
    interleaved: bool  # rotated pairs (0,1),(2,3)… instead of halves
    norm_eps: float = 1e-6  # of the norm on the keys: fixed in the published code
    sharing_layers: frozenset[int] = frozenset()  # have none of their own: what the layer before attends to (GLM-5.2)


@dataclass(frozen=True)
class MoEConfig:
    """Routed experts. `scoring`: softmax | sigmoid. `group_score`: max | top2 (of the scores in a group)."""

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    scoring: str
    norm_topk_prob: bool
    num_groups: int = 1
    groups_per_token: int = 1
    group_score: str = "max"
    has_correction_bias: bool = False
    routed_scaling_factor: float = 1.0
    num_shared_experts: int = 0
    layers: frozenset[int] = frozenset()  # whose MLP is routed; prediction layers count on behind the decoder's


@dataclass(frozen=True)
class EncoderConfig:
    """A bidirectional encoder of BERT's kind (arXiv:1810.04805): every token sees every other, nothing is cached."""

    layer_norm_eps: float
    activation: str  # gelu | gelu_tanh | relu
    num_token_types: int
    first_position: int  # of the first token, in the table of positions; RoBERTa's begin behind its padding id


@dataclass(frozen=True)
class Fp8BlockConfig:
    """Weights stored as float8 e4m3 with one scale per block of [rows, columns]; dequantised at load."""

    block_rows: int
    block_columns: int


@dataclass(frozen=True)
class ModelConfig:
    """Everything the engine reads from config.json. `dtype` is the checkpoint's: float32 | bfloat16 | float16."""

    architecture: str
    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    intermediate_size: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    dtype: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeConfig
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_windows: tuple[int | None, ...] = ()  # per layer: tokens attended to, itself included; None: all
    mla: MLAConfig | None = None
    indexer: IndexerConfig | None = None  # with mla: attention is sparse
    moe: MoEConfig | None = None
    encoder: EncoderConfig | None = None  # then rope, norms' eps and windows are not looked at
    quantization: Fp8BlockConfig | None = None
    num_mtp_layers: int = 0  # for multi-token prediction, stored behind the decoder layers; read to speculate
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    derived_max_model_len: int = 0  # max_position_embeddings, stretched by rope scaling
