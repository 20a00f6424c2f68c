"""What drafts came to in a benchmark: a server's counters read, and figures under vLLM's labels and JSON keys."""

from __future__ import annotations

from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from ...scheduler.draft_stats import DraftStats

_PREFIX = "vllm:spec_decode_num_"
_PER_POSITION = "accepted_tokens_per_pos"
_WIDTH = 50


def read_counters(text: str) -> DraftStats | None:
    """The counters in what `/metrics` of a server answered, of all its engines together; None where it does not
    speculate. Raises ValueError where the text is of another format."""
    counts = dict.fromkeys(("drafts", "draft_tokens", "accepted_tokens"), 0)
    positions: dict[int, int] = {}
    found = False
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if not (sample.name.startswith(_PREFIX) and sample.name.endswith("_total")):
                continue
            found = True
            name = sample.name.removeprefix(_PREFIX).removesuffix("_total")
            if name == _PER_POSITION:
                position = int(sample.labels["position"])
                positions[position] = positions.get(position, 0) + int(sample.value)
            elif name in counts:
                counts[name] += int(sample.value)
    if not found:
        return None
    per_position = [positions.get(position, 0) for position in range(max(positions, default=-1) + 1)]
    return DraftStats(counts["drafts"], counts["draft_tokens"], counts["accepted_tokens"], per_position)


def acceptance_lines(drafts: DraftStats | None) -> list[str]:
    """The lines that vLLM's `bench serve` prints of speculation; none without it."""
    if drafts is None:
        return []
    per_position = [f"{f'  Position {i}:':<40} {100 * r:<10.2f}" for i, r in enumerate(drafts.acceptance_per_position)]
    return [
        "Speculative Decoding".center(_WIDTH, "-"),
        f"{'Acceptance rate (%):':<40} {100 * drafts.acceptance_rate:<10.2f}",
        f"{'Acceptance length:':<40} {drafts.acceptance_length:<10.2f}",
        f"{'Drafts:':<40} {drafts.num_drafts:<10}",
        f"{'Draft tokens:':<40} {drafts.num_draft_tokens:<10}",
        f"{'Accepted tokens:':<40} {drafts.num_accepted_tokens:<10}",
        *(["Per-position acceptance (%):", *per_position] if per_position else []),
    ]


def acceptance_fields(drafts: DraftStats | None) -> dict[str, Any]:
    """The keys that vLLM saves of speculation: the first in percent, the last as shares; none without it."""
    if drafts is None:
        return {}
    return {
        "spec_decode_acceptance_rate": 100 * drafts.acceptance_rate,
        "spec_decode_acceptance_length": drafts.acceptance_length,
        "spec_decode_num_drafts": drafts.num_drafts,
        "spec_decode_draft_tokens": drafts.num_draft_tokens,
        "spec_decode_accepted_tokens": drafts.num_accepted_tokens,
        "spec_decode_per_position_acceptance_rates": drafts.acceptance_per_position,
    }
