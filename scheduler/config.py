"""The limits a scheduler keeps: `SchedulerConfig`."""

from __future__ import annotations

from dataclasses import dataclass

POLICIES = ("fcfs", "priority")


@dataclass(frozen=True)
class SchedulerConfig:
    """Resolved limits, all in tokens or requests; None means no limit."""

    max_num_seqs: int  # rows of the runner's batch: most requests running at once
    max_num_batched_tokens: int  # most tokens computed in one step
    max_model_len: int  # longest sequence, prompt and output together
    enable_chunked_prefill: bool = True
    long_prefill_token_threshold: int = 0  # most tokens of one request per step; 0: no limit of its own
    max_prefill_share: float = 1.0  # of the time that prompts may take while other requests decode; 1: no limit
    policy: str = "fcfs"
    max_num_queued_reqs: int | None = None
    max_num_queued_tokens: int | None = None  # counts prompt tokens

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1: {getattr(self, name)}")
        for name in ("long_prefill_token_threshold", "max_num_queued_reqs", "max_num_queued_tokens"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must not be negative: {getattr(self, name)}")
        if not 0 < self.max_prefill_share <= 1:
            raise ValueError(f"max_prefill_share must be in (0, 1]: {self.max_prefill_share}")
        if self.policy not in POLICIES:
            raise ValueError(f"scheduling policy must be one of {', '.join(POLICIES)}: {self.policy}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            # Otherwise requests late in the order would get no token in any step.
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be greater than or equal to "
                f"max_num_seqs, one token for each; raise it or lower max_num_seqs: {self.max_num_seqs}"
            )
        if self.long_prefill_token_threshold and not self.enable_chunked_prefill:
            raise ValueError(
                "long_prefill_token_threshold splits prompts and needs enable_chunked_prefill; set it to 0: "
                f"{self.long_prefill_token_threshold}"
            )
