"""Figures of the trained demo models: held-out loss, drafts, load of the experts, attention the indexers capture."""

from __future__ import annotations

import math
from typing import Any

import torch
from corpus import BOS, EOS, Corpus, excerpt
from model import CONTEXT, DemoModel
from sparse import INDEX_CONFIG, SparseModel
from tokenizers import Tokenizer
from torch.nn import functional


@torch.no_grad()
def evaluate_text(model: DemoModel, tokenizer: Tokenizer, texts: list[str]) -> dict[str, float]:
    """Cross entropy of whole texts, each between its bos and eos, cut at the context; nats per token, bits per byte."""
    nats = [0.0, 0.0]  # the body's, the prediction layer's
    counts = [0, 0]
    agreed = 0
    for tokens in pieces(tokenizer, texts):
        hidden = model.hidden(tokens)
        deeper = model.predict(hidden[:, :-1], model.body.model.embed_tokens(tokens)[:, 1:])
        logits = [model.body.lm_head(hidden[0, :-1]), model.body.lm_head(deeper[0, :-1])]
        for index, values in enumerate(logits):
            targets = tokens[0, index + 1 :]
            nats[index] += functional.cross_entropy(values, targets, reduction="sum").item()
            counts[index] += len(targets)
        agreed += int((logits[0][1:].argmax(-1) == logits[1].argmax(-1)).sum())
    size = sum(len(text.encode()) for text in texts)
    return {
        "bytes": size,
        "tokens": counts[0],
        "loss": round(nats[0] / counts[0], 5),
        "bits_per_byte": round(nats[0] / math.log(2) / size, 5),
        "mtp_loss": round(nats[1] / counts[1], 5),
        "mtp_agrees_with_greedy": round(agreed / counts[1], 4),
    }


def pieces(tokenizer: Tokenizer, texts: list[str]) -> list[torch.Tensor]:
    """int64 [1, up to CONTEXT]: a piece begins with the last token of the one before, so every token is predicted."""
    cut = []
    for text in texts:
        ids = [BOS, *tokenizer.encode(text, add_special_tokens=False).ids, EOS]
        cut += [torch.tensor([ids[start : start + CONTEXT]]) for start in range(0, len(ids) - 2, CONTEXT - 1)]
    return cut


@torch.no_grad()
def evaluate_drafts(model: DemoModel, tokenizer: Tokenizer, texts: list[str], depth: int = 3) -> list[float]:
    """Share of greedy drafts that the body's greedy text confirms, where those before it were confirmed; by depth."""
    prompts = [[BOS, *tokenizer.encode(text, add_special_tokens=False).ids][:48] for text in texts]
    tokens = torch.tensor([prompt for prompt in prompts if len(prompt) == 48])
    for _ in range(64):
        tokens = torch.cat([tokens, model.body.lm_head(model.hidden(tokens)[:, -1:]).argmax(-1)], dim=1)
    drafted, confirmed = [0] * depth, [0] * depth
    for row, states in zip(tokens, model.hidden(tokens), strict=True):
        ends = (row == EOS).nonzero()
        stop = int(ends[0]) if len(ends) else len(row)
        for known in range(48, stop - depth, 3):
            for index, token in enumerate(model.draft(row[: known + 1], states[:known], depth)):
                drafted[index] += 1
                if token != int(row[known + 1 + index]):
                    break
                confirmed[index] += 1
    return [round(hit / max(1, all_), 4) for hit, all_ in zip(confirmed, drafted, strict=True)]


def evaluate(model: DemoModel, tokenizer: Tokenizer, corpus: Corpus) -> dict[str, Any]:
    """Held-out figures of the rounded model."""
    model.eval()
    texts = ["\n".join(chapter) for chapter in corpus.held_out]
    model.load.zero_()
    held_out = evaluate_text(model, tokenizer, texts)
    load = model.load / model.load.mean(dim=1, keepdim=True)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "held_out": held_out,
        "excerpt": evaluate_text(model, tokenizer, excerpt(corpus)),
        "mtp_acceptance_by_depth": evaluate_drafts(model, tokenizer, texts),
        "expert_load_lowest": [round(float(layer.min()), 3) for layer in load],  # 1: an equal share; by layer
        "expert_load_highest": [round(float(layer.max()), 3) for layer in load],
    }


@torch.no_grad()
def evaluate_sparse(model: SparseModel, tokenizer: Tokenizer, corpus: Corpus) -> dict[str, Any]:
    """The same with the indexers' choice, the losses without it, and what it captures of the attention."""
    topk = INDEX_CONFIG["index_topk"]
    texts = ["\n".join(chapter) for chapter in corpus.held_out]
    model.set_indexers("run", topk)
    report = evaluate(model, tokenizer, corpus)
    model.set_indexers("run", CONTEXT)
    report["held_out_dense"] = evaluate_text(model, tokenizer, texts)
    report["excerpt_dense"] = evaluate_text(model, tokenizer, excerpt(corpus))
    model.set_indexers("measure", topk)
    rows = 0
    sums: dict[str, list[float]] = {}
    for tokens in pieces(tokenizer, texts):
        sparse_rows = tokens.shape[1] - topk - 1  # of the prediction layer, which has a row less
        if sparse_rows <= 0:
            continue
        model.losses(tokens, 1)
        rows += sparse_rows
        for layer, indexer in enumerate(model.indexers()):
            for name, share in indexer.shares.items():
                sums.setdefault(name, [0.0] * len(model.indexers()))[layer] += share * sparse_rows
    # shares of attention on as many tokens as are read, where there are more; by layer, the prediction layer last
    report["attention_captured"] = {name: [round(value / rows, 4) for value in sums[name]] for name in sums}
    return report
