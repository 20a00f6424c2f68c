"""Reads config.json of the DeepSeek families V2, V3 (R1, V3.1, Kimi-K2, Moonlight) and V3.2, and of GLM-5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import IndexerConfig, MLAConfig, ModelConfig, MoEConfig
from .common import finish, layer_windows, read_position, read_sizes
from .reader import ConfigReader

# MLA has no heads of its own for keys and values, and its head sizes have their own keys: the general ones that
# transformers derives and saves are without effect.
DERIVED = ("head_dim", "qk_head_dim")
# Where GlmMoeDsaConfig has other defaults than DeepSeek-V3.2.
GLM_DEFAULTS: dict[str, Any] = {
    "q_lora_rank": 2048,
    "qk_nope_head_dim": 192,
    "v_head_dim": 256,
    "n_group": 1,
    "topk_group": 1,
    "rms_norm_eps": 1e-5,
    "index_n_heads": 32,
}


def parse_deepseek_v2(raw: Mapping[str, Any]) -> ModelConfig:
    """Softmax routing, greedy or limited to the groups with the best expert. Defaults: DeepseekV2Config.

    norm_topk_prob is refused: the published model code normalises instead of scaling, transformers ignores the key,
    and no published checkpoint sets it.
    """
    reader = ConfigReader(raw)
    reader.require_neutral(
        {
            "scoring_func": ("softmax",),
            "norm_topk_prob": (False,),
            "num_nextn_predict_layers": (0,),
            "rope_interleave": (True,),
        }
    )
    sizes = _sizes(reader, vocab_size=102_400, max_position=2048)
    method = reader.choice("topk_method", ("greedy", "group_limited_greedy"), "greedy")
    routed = _Routed(reader, sizes["num_layers"], experts=64, per_token=None, shared=2, size=1407, scale=1.0, dense=0)
    groups = routed.groups(None, None) if method == "group_limited_greedy" else routed.ignore_groups()
    moe = routed.config(groups, scoring="softmax", norm_topk_prob=False, group_score="max", has_correction_bias=False)
    return _model(reader, sizes, moe=moe, interleaved=True, mlp_bias=reader.boolean("mlp_bias", False))


def parse_deepseek_v3(raw: Mapping[str, Any]) -> ModelConfig:
    """Sigmoid routing with a correction bias, limited to the groups with the best two experts ("noaux_tc").
    Defaults: DeepseekV3Config."""
    reader = ConfigReader(raw)
    sizes, fields = _biased_routing(reader, vocab_size=129_280, max_position=4096)
    return _model(reader, sizes, interleaved=reader.boolean("rope_interleave", True), **fields)


def parse_deepseek_v32(raw: Mapping[str, Any]) -> ModelConfig:
    """V3 with an indexer in every layer, which rotates halves. Defaults: DeepseekV32Config."""
    return _sparse(ConfigReader(raw), vocab_size=129_280, max_position=163_840, interleaved_indexer=False)


def parse_glm_moe_dsa(raw: Mapping[str, Any]) -> ModelConfig:
    """V3.2 whose indexers rotate pairs side by side. Defaults: GlmMoeDsaConfig. GLM-5.2's layers share the selection of
    an earlier one (indexer_types and its other spellings)."""
    present = {key: value for key, value in raw.items() if value is not None or key not in GLM_DEFAULTS}
    reader = ConfigReader({**GLM_DEFAULTS, **present, "q_lora_rank": raw.get("q_lora_rank", 2048)})
    reader.get("index_share_for_mtp_iteration")  # drafts do not change what is said: each selects for itself here
    num_layers = reader.integer("num_hidden_layers", 78)
    sharing = _sharing_layers(reader, num_layers)
    return _sparse(reader, vocab_size=154_880, max_position=202_752, interleaved_indexer=True, sharing_layers=sharing)


def _sharing_layers(reader: ConfigReader, num_layers: int) -> frozenset[int]:
    """The layers without an indexer of their own: by a type for each layer, else by a pattern of F and S, else all but
    each `index_topk_freq`-th from the offset on, as GlmMoeDsaConfig reads them."""
    key, types = "indexer_types", reader.strings("indexer_types")
    pattern = reader.get("index_topk_pattern")
    frequency = reader.integer("index_topk_freq", 1, minimum=0)
    offset = reader.integer("index_skip_topk_offset", 2, minimum=0)
    if types is None and pattern is not None:
        key, names = "index_topk_pattern", {"F": "full", "S": "shared"}
        if isinstance(pattern, str):
            types = tuple(names.get(letter, letter) for letter in pattern)
        else:
            types = reader.strings(key)
    if types is None:
        types = tuple("shared" if max(i - offset + 1, 0) % max(frequency, 1) else "full" for i in range(num_layers))
        key = "index_skip_topk_offset"
    if len(types) != num_layers or types[0] != "full" or set(types) - {"full", "shared"}:
        raise reader.error(key, f"full or shared for each of {num_layers} layers, the first one full")
    return frozenset(i for i, kind in enumerate(types) if kind == "shared")


def _sparse(
    reader: ConfigReader,
    *,
    vocab_size: int,
    max_position: int,
    interleaved_indexer: bool,
    sharing_layers: frozenset[int] = frozenset(),
) -> ModelConfig:
    reader.require_neutral({"rope_interleave": (True,)})
    sizes, fields = _biased_routing(reader, vocab_size=vocab_size, max_position=max_position)
    types = reader.strings("layer_types")
    if types is not None and set(types) != {"indexed_attention"}:
        raise reader.unsupported("layer_types", "supported: null, or indexed_attention for every layer")
    indexer = IndexerConfig(
        num_heads=reader.integer("index_n_heads", 64),
        head_dim=reader.integer("index_head_dim", 128),
        topk=reader.integer("index_topk", 2048),
        interleaved=reader.boolean("indexer_rope_interleave", interleaved_indexer),
        sharing_layers=sharing_layers,
    )
    config = _model(reader, sizes, interleaved=True, indexer=indexer, **fields)
    assert config.mla is not None
    if config.mla.q_lora_rank is None:
        raise reader.error("q_lora_rank", "an integer: the indexer's queries are made of the low-rank query")
    if indexer.head_dim < config.rope.dim:
        raise reader.error("index_head_dim", f"at least qk_rope_head_dim {config.rope.dim}")
    return config


def _biased_routing(
    reader: ConfigReader, *, vocab_size: int, max_position: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What V3 and its successors have in common beside attention: the fields of `read_sizes`, and others."""
    reader.require_neutral({"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)})
    sizes = _sizes(reader, vocab_size=vocab_size, max_position=max_position)
    mtp = reader.integer("num_mtp_layers", 1, minimum=0, maximum=64)  # transformers' name for the next
    mtp = reader.integer("num_nextn_predict_layers", mtp, minimum=0, maximum=64)
    routed = _Routed(
        reader,
        sizes["num_layers"],
        mtp_layers=mtp,
        experts=256,
        per_token=8,
        shared=1,
        size=2048,
        scale=2.5,
        dense=3,
    )
    norm = reader.boolean("norm_topk_prob", True)
    moe = routed.config(
        routed.groups(8, 4), scoring="sigmoid", norm_topk_prob=norm, group_score="top2", has_correction_bias=True
    )
    return sizes, {"moe": moe, "num_mtp_layers": mtp}


def _sizes(reader: ConfigReader, *, vocab_size: int, max_position: int) -> dict[str, Any]:
    heads = reader.integer("num_attention_heads")
    shared = ConfigReader({**reader.raw, "num_key_value_heads": heads}, reader.where)
    sizes = read_sizes(shared, vocab_size=vocab_size, max_position=max_position, kv_heads=None)
    reader.read |= shared.read
    return sizes


def _model(reader: ConfigReader, sizes: dict[str, Any], *, interleaved: bool, **fields: Any) -> ModelConfig:
    """The attention half, the same in both families. attention_bias covers the down projections and o."""
    mla = MLAConfig(
        q_lora_rank=reader.optional_integer("q_lora_rank", 1536),
        kv_lora_rank=reader.integer("kv_lora_rank", 512),
        qk_nope_head_dim=reader.integer("qk_nope_head_dim", 128),
        qk_rope_head_dim=reader.integer("qk_rope_head_dim", 64),
        v_head_dim=reader.integer("v_head_dim", 128),
    )
    bias = reader.boolean("attention_bias", False)
    for key in DERIVED:
        reader.get(key)
    if "indexer" not in fields:
        fields |= layer_windows(reader, sizes["num_layers"], None, 0)
    config = ModelConfig(
        **sizes,
        **read_position(reader, sizes, dim=mla.qk_rope_head_dim, interleaved=interleaved),
        head_dim=mla.qk_nope_head_dim + mla.qk_rope_head_dim,
        qkv_bias=bias,
        o_bias=bias,
        mla=mla,
        **fields,
    )
    finish(reader)
    return config


class _Routed:
    """The expert keys of both families; keyword arguments are the family's defaults."""

    def __init__(
        self,
        reader: ConfigReader,
        num_layers: int,
        *,
        mtp_layers: int = 0,
        experts: int,
        per_token: int | None,
        shared: int,
        size: int,
        scale: float,
        dense: int,
    ) -> None:
        self.reader = reader
        self.experts = experts if "n_routed_experts" not in reader.raw else 0  # null: a dense model
        self.experts = reader.integer("n_routed_experts", self.experts, minimum=0)
        for name in ("num_experts", "num_local_experts"):  # transformers' names for the same number
            if reader.get(name) not in (None, self.experts):
                raise reader.error(name, f"equal to n_routed_experts {self.experts} where both are there")
        first = reader.integer("first_k_dense_replace", dense, minimum=0)
        every = reader.integer("moe_layer_freq", 1)
        # A prediction layer is what a decoder layer of its number would be (published code of V3).
        self.layers = frozenset(layer for layer in range(first, num_layers + mtp_layers) if layer % every == 0)
        kinds = reader.strings("mlp_layer_types")  # transformers' spelling, which counts where both are there
        if kinds is not None:
            if len(kinds) != num_layers or set(kinds) - {"dense", "sparse"}:
                raise reader.error("mlp_layer_types", f"a list of num_hidden_layers = {num_layers} dense or sparse")
            kinds += (
                kinds[-1:] * mtp_layers
            )  # the list ends with the decoder; published layers behind it are as its last
            self.layers = frozenset(layer for layer, kind in enumerate(kinds) if kind == "sparse")
        self.present = bool(self.experts and self.layers)
        self.per_token = reader.optional_integer("num_experts_per_tok", per_token) or 0
        if self.present and not 1 <= self.per_token <= self.experts:
            raise reader.error("num_experts_per_tok", f"an integer in [1, n_routed_experts = {self.experts}]")
        self.size = reader.integer("moe_intermediate_size", size)
        self.scale = reader.number("routed_scaling_factor", scale)
        self.shared = shared if "n_shared_experts" not in reader.raw else 0  # null: none
        self.shared = reader.integer("n_shared_experts", self.shared, minimum=0)

    def ignore_groups(self) -> tuple[int, int]:
        """Greedy routing: the group keys may be there and have no effect."""
        self.reader.get("n_group")
        self.reader.get("topk_group")
        return 1, 1

    def groups(self, default_groups: int | None, default_kept: int | None) -> tuple[int, int]:
        """(n_group, topk_group); null means one group."""
        reader = self.reader
        groups = reader.optional_integer("n_group", default_groups) or 1
        kept = reader.optional_integer("topk_group", default_kept if groups > 1 else 1) or 1
        if not self.present:
            return groups, kept
        if self.experts % groups:
            raise reader.error("n_group", f"a divisor of n_routed_experts {self.experts}")
        if kept > groups:
            raise reader.error("topk_group", f"at most n_group {groups}")
        if kept * (self.experts // groups) < self.per_token:
            raise reader.error("topk_group", f"so many that they hold num_experts_per_tok {self.per_token} experts")
        return groups, kept

    def config(self, groups: tuple[int, int], *, group_score: str, **fields: Any) -> MoEConfig | None:
        if not self.present:
            return None
        if group_score == "top2" and groups[0] > 1 and self.experts // groups[0] < 2:
            raise self.reader.error("n_group", f"so few that a group has two of the {self.experts} experts")
        return MoEConfig(
            num_experts=self.experts,
            experts_per_token=self.per_token,
            intermediate_size=self.size,
            num_groups=groups[0],
            groups_per_token=groups[1],
            group_score=group_score,
            routed_scaling_factor=self.scale,
            num_shared_experts=self.shared,
            layers=self.layers,
            **fields,
        )
