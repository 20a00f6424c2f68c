"""Whether an engine generates or pools, and how it pools: --runner, --convert and --pooler-config."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...models.checkpoint import Checkpoint
from ...models.config import ModelConfig
from ...models.pooling_config import PoolingConfig, has_pooling_files, pools_only, read_pooling

if TYPE_CHECKING:
    from ..config import EngineArgs

RUNNERS = ("auto", "generate", "pooling")
CONVERSIONS = ("auto", "none", "embed", "classify")


def choose_pooling(
    args: EngineArgs, checkpoint: Checkpoint, model: ModelConfig, tokenizer_path: Path | None
) -> PoolingConfig | None:
    """How the model is pooled, or None where it generates. Raises ValueError for flags that do not fit it.

    `auto` pools what cannot generate, what sentence-transformers saved, and what `convert` makes into something else.
    """
    never_generates = pools_only(model.architecture)
    converts = args.convert in ("embed", "classify")
    pools = args.runner == "pooling" or (
        args.runner == "auto" and (never_generates or converts or has_pooling_files(checkpoint.path))
    )
    if not pools:
        if never_generates:
            raise ValueError(f"this architecture cannot generate; use runner pooling or auto: {model.architecture}")
        if converts:
            raise ValueError(f"convert makes a pooling model; use it with runner pooling or auto: {args.convert}")
        if args.pooler_config:
            raise ValueError(f"pooler_config needs runner pooling: {args.pooler_config}")
        return None
    if args.convert == "none" and not never_generates:
        raise ValueError(f"convert none leaves a model that generates; use embed or classify: {model.architecture}")
    if args.speculative_config:
        raise ValueError(f"a pooling model generates nothing to speculate on: {args.speculative_config}")
    if args.require_graph:
        raise ValueError("a pooling model has no decode steps to make graphs of; leave out require_graph: True")
    token_ids = _answer_ids(checkpoint.config.get("classifier_from_token"), args, tokenizer_path)
    return read_pooling(checkpoint, model, convert=args.convert, overrides=args.pooler_config, token_ids=token_ids)


def _answer_ids(tokens: Any, args: EngineArgs, tokenizer_path: Path | None) -> tuple[int, ...]:
    """The ids of classifier_from_token, e.g. ["no", "yes"]: tokens whose logits are the scores of a reranker."""
    if tokens is None or args.convert == "embed":
        return ()
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise ValueError(f"classifier_from_token in config.json must be a list of tokens: {tokens!r}")
    if tokenizer_path is None:
        raise ValueError(f"classifier_from_token needs a tokenizer; leave out skip_tokenizer_init: {tokens}")
    from ...models.tokenizer import load_tokenizer  # slow to import, and a server listens before it needs one

    tokenizer = load_tokenizer(tokenizer_path)
    ids = [tokenizer.token_to_id(token) for token in tokens]
    unknown = [token for token, token_id in zip(tokens, ids, strict=True) if token_id is None]
    if unknown:
        raise ValueError(f"classifier_from_token names what is no token of this tokenizer: {', '.join(unknown)}")
    return tuple(token_id for token_id in ids if token_id is not None)
