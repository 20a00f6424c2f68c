"""How alike a query and a document are: the prompts that a score needs, and the scores that their vectors come to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import mul
from typing import Any

from ...models.pooling_config import PoolingConfig
from ...scheduler.pooling_params import PoolingParams
from ...scheduler.sampling_params import ValidationError
from ..errors import WrongRunnerError
from .outputs import PoolingOutput, PoolingRequestOutput, ScoringOutput


@dataclass(frozen=True)
class ScoringPlan:
    """Prompts to pool. With a cross-encoder one of each pair; else each text alone, the queries first."""

    prompts: list[dict[str, Any]]
    task: str
    num_queries: int
    num_pairs: int

    def params(self, given: PoolingParams | None) -> PoolingParams:
        """The parameters of every prompt."""
        return (given or PoolingParams()).clone(task=self.task)

    def scores(
        self, outputs: Sequence[PoolingRequestOutput[PoolingOutput]]
    ) -> list[PoolingRequestOutput[ScoringOutput]]:
        """One score for each pair, from the outputs of the prompts, in their order."""
        if self.task == "classify":
            return [output.holding(ScoringOutput(output.outputs.tolist()[0])) for output in outputs]
        vectors: list[list[float]] = [output.outputs.tolist() for output in outputs]
        scored = []
        for pair in range(self.num_pairs):
            query = pair if self.num_queries > 1 else 0
            document = self.num_queries + pair
            first, second = outputs[query], outputs[document]
            scored.append(
                PoolingRequestOutput(
                    f"{first.request_id}_{second.request_id}",
                    ScoringOutput(cosine_similarity(vectors[query], vectors[document])),
                    first.prompt_token_ids + second.prompt_token_ids,
                    first.num_cached_tokens + second.num_cached_tokens,
                )
            )
        return scored


def plan_scores(
    pooling: PoolingConfig | None,
    queries: str | Sequence[str],
    documents: str | Sequence[str],
    render_pair: Callable[[str, str], str] | None = None,
) -> ScoringPlan:
    """What to pool in order to score one query against every document, or as many queries as documents in pairs.

    `render_pair` writes a query and a document as one prompt, for a model that was trained with a template. Without it
    a cross-encoder reads the two texts as its tokenizer joins them, and a language model one behind the other. Raises
    `ValidationError` for numbers of texts that do not pair, and for a model that does not score.
    """
    if pooling is None:
        raise WrongRunnerError("this model generates; scores need --runner pooling")
    first, second = _texts(queries, "queries"), _texts(documents, "documents")
    if len(first) > 1 and len(first) != len(second):
        raise ValidationError(
            "Input lengths must be either 1:1, 1:N or N:N", parameter="queries", value=f"{len(first)}:{len(second)}"
        )
    classifier = pooling.classifier
    if classifier is None:
        prompts: list[dict[str, Any]] = [{"prompt": text} for text in (*first, *second)]
        return ScoringPlan(prompts, "embed", len(first), len(second))
    if classifier.num_labels != 1:
        raise ValidationError(
            "only a model with one label scores pairs", parameter="num_labels", value=classifier.num_labels
        )
    pairs = zip(first * len(second) if len(first) == 1 else first, second, strict=True)
    if render_pair is not None:
        prompts = [{"prompt": render_pair(query, document)} for query, document in pairs]
    elif classifier.kind == "tokens":
        prompts = [{"prompt": query + document} for query, document in pairs]
    else:
        prompts = [{"prompt": query, "text_pair": document} for query, document in pairs]
    return ScoringPlan(prompts, "classify", len(first), len(second))


def _texts(given: str | Sequence[str], name: str) -> list[str]:
    texts = [given] if isinstance(given, str) else list(given)
    if not texts:
        raise ValidationError(f"{name}: at least one text must be given", parameter=name)
    for text in texts:
        if not isinstance(text, str):
            raise ValidationError(f"{name} must be texts, not {type(text).__name__}", parameter=name)
    return texts


def cosine_similarity(first: Sequence[float], second: Sequence[float]) -> float:
    """Of two vectors of one length; 0 where one of them is all zeros."""
    lengths = math.sqrt(sum(map(mul, first, first))) * math.sqrt(sum(map(mul, second, second)))
    return sum(map(mul, first, second)) / lengths if lengths else 0.0
