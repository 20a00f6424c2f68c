"""Building what an engine computes with: the model, and whoever drafts for it, with the cache that both need."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..kvcache.spec import KVCacheSpec, KVGroup
from ..kvcache.tensors import TORCH_DTYPES
from ..models.checkpoint import Checkpoint
from ..models.config import ModelConfig
from ..models.dummy_weights import initialise_dummy_weights
from ..models.kv_spec import kv_cache_spec
from ..models.layers.decoder import CausalDecoder
from ..models.layers.mtp import MultiTokenPredictor
from ..models.layers.placement import Placement
from ..models.npu_weights import pack_for_npu
from ..models.parallel import ONE_RANK, ParallelLayout
from ..models.registry import resolve
from ..models.weights import load_weights
from ..ops.table import OpTable
from .config import EngineConfig
from .speculation.buffers import Drafting, allocate_drafting
from .speculation.drafting import Drafter, ModelDrafter, MTPDrafter, NgramDrafter, tokens_to_remember
from .speculation.verification import SyntheticAcceptance, accept_equal


@dataclass(frozen=True)
class Models:
    """A model and its drafter, on one device."""

    decoder: CausalDecoder
    drafter: Drafter | None

    def tensors(self) -> Iterator[Tensor]:
        """Every parameter and buffer, each once."""
        seen: set[int] = set()
        for module in (self.decoder, self.drafter):
            if isinstance(module, nn.Module):
                for tensor in (*module.parameters(), *module.buffers()):
                    if id(tensor) not in seen:
                        seen.add(id(tensor))
                        yield tensor

    def pack(self) -> None:
        """Bring weights that are there into the form that the ops of their device take."""
        if next(self.tensors()).device.type == "npu":
            for module in (self.decoder, self.drafter):
                if isinstance(module, nn.Module):
                    pack_for_npu(module)

    def bind(self, table: OpTable) -> None:
        """Let all layers call through this table."""
        self.decoder.ops.table = table
        if isinstance(self.drafter, ModelDrafter):  # the other kinds share the decoder's layers or have none
            self.drafter.model.ops.table = table


def build_models(config: EngineConfig, device: torch.device, layout: ParallelLayout = ONE_RANK) -> Models:
    """The modules of a rank, their memory allocated and not filled."""
    dtype = TORCH_DTYPES[config.dtype]
    decoder = _build_decoder(config.model, layout, dtype, device)
    drafter: Drafter | None = None
    if config.speculation is not None:
        choice = config.speculation.choice
        if choice.method == "mtp":
            predictor = MultiTokenPredictor(decoder, Placement(layout, dtype, device, decoder.ops))
            row_bytes = config.model.hidden_size * dtype.itemsize
            window = tokens_to_remember(config.max_num_seqs(device.type), row_bytes) if choice.remembers else 0
            drafter = MTPDrafter(predictor, window)
        elif choice.method == "ngram":
            drafter = NgramDrafter(choice.min_n, choice.max_n)
        else:
            assert config.speculation.draft_model is not None
            drafter = ModelDrafter(_build_decoder(config.speculation.draft_model, layout, dtype, device))
    return Models(decoder, drafter)


def _build_decoder(
    config: ModelConfig, layout: ParallelLayout, dtype: torch.dtype, device: torch.device
) -> CausalDecoder:
    decoder = resolve(config.architecture).load_class()(config, layout, dtype=dtype, device=device)
    return decoder.eval()


def load_models(config: EngineConfig, device: torch.device) -> Models:
    """The modules with their weights. Raises ValueError where a checkpoint has not what it should."""
    models = build_models(config, device)
    _fill(models.decoder, config, config.checkpoint, config.model)
    if isinstance(models.drafter, MTPDrafter):
        _fill(models.drafter.predictor, config, config.checkpoint, config.model)
    elif isinstance(models.drafter, ModelDrafter):
        assert config.speculation is not None and config.speculation.draft_checkpoint is not None
        checkpoint, draft = config.speculation.draft_checkpoint, config.speculation.draft_model
        assert draft is not None
        _fill(models.drafter.model, config, checkpoint, draft)
    models.pack()
    return models


def _fill(
    module: CausalDecoder | MultiTokenPredictor, config: EngineConfig, checkpoint: Checkpoint, model: ModelConfig
) -> None:
    if config.args.load_format == "dummy":
        initialise_dummy_weights(module, config.args.seed)
    else:
        load_weights(module, checkpoint, config=model)


def cache_spec(config: EngineConfig, layout: ParallelLayout = ONE_RANK) -> KVCacheSpec:
    """What a rank stores per token, by the model and by the drafter in layers behind the model's."""
    speculation = config.speculation
    if speculation is not None and speculation.choice.method == "mtp":
        return replace(kv_cache_spec(config.model, layout, config.dtype, num_extra_layers=1), lookahead=1)
    spec = kv_cache_spec(config.model, layout, config.dtype)
    if speculation is None or speculation.draft_model is None:
        return spec
    first = config.model.num_layers
    of_draft = tuple(
        KVGroup(tuple(first + layer for layer in group.layers), group.parts)
        for group in kv_cache_spec(speculation.draft_model, layout, config.dtype).groups
    )
    return KVCacheSpec(spec.groups + of_draft, config.dtype, one_table=True)


def make_drafting(
    config: EngineConfig,
    drafter: Drafter | None,
    max_num_seqs: int,
    max_model_len: int,
    device: torch.device,
    acceptance_rates: tuple[float, ...] | None,
) -> Drafting | None:
    """The drafter with its buffers. `acceptance_rates` put a lottery in place of verification, for benchmarks."""
    if drafter is None or config.speculation is None:
        return None
    return allocate_drafting(
        drafter,
        config.speculation.choice.depths,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        hidden_size=config.model.hidden_size,
        dtype=TORCH_DTYPES[config.dtype],
        device=device,
        acceptance=accept_equal if acceptance_rates is None else SyntheticAcceptance(acceptance_rates),
    )
