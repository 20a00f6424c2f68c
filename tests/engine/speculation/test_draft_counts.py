"""Acceptance as an engine tells it: exact counts, by request and in all, against what each step verified."""

from __future__ import annotations

import pytest

from omni_engine.engine.config import DEMO_MODEL
from omni_engine.engine.engine import Engine
from omni_engine.scheduler.sampling_params import SamplingParams

PROMPTS = ["And it came to pass in those days, that", "In the beginning", "And Jesus said unto them,", "The fear of"]
MTP = {"method": "mtp", "num_speculative_tokens": 3, "adaptive_depth": False}
NGRAM = {
    "method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_min": 1, "prompt_lookup_max": 3,
    "adaptive_depth": False,
}  # fmt: skip


class Watched:
    """An engine, and what its device said of each step: (drafts there, tokens that came) by entry that decodes."""

    def __init__(self, config, **settings):
        self.engine = Engine(
            str(DEMO_MODEL), speculative_config=config, max_num_seqs=4, cudagraph_capture_sizes=[4], device="cpu",
            max_model_len=128, **settings,
        )  # fmt: skip
        self.verified = []
        runner = self.engine._core.runner
        read = runner.read

        def watch(step):
            output = read(step)
            if step.plan.num_drafts:
                self.verified += zip(output.num_drafts, map(len, output.token_ids), strict=False)
            return output

        runner.read = watch

    def counts(self):
        drafts = self.engine.stats().drafts
        return None if drafts is None else (drafts.num_draft_tokens, drafts.num_accepted_tokens)


def told(outputs):
    """Sums of what the requests tell."""
    stats = [output.metrics for output in outputs]
    return sum(each.num_draft_tokens for each in stats), sum(each.num_accepted_tokens for each in stats)


@pytest.fixture(scope="module")
def mtp():
    return Watched(MTP)


def test_without_speculation_there_is_nothing_to_tell():
    plain = Watched({})
    (output,) = plain.engine.generate(PROMPTS[:1], SamplingParams(temperature=0, max_tokens=4))
    assert plain.counts() is None and told([output]) == (0, 0)


@pytest.mark.parametrize("config", [MTP, NGRAM], ids=["mtp", "ngram"])
def test_the_counters_are_those_of_the_steps(config):
    # With overlap a step may be computed for a request that has ended; its drafts count nowhere.
    watched = Watched(config, async_scheduling=False)
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    (output,) = watched.engine.generate(PROMPTS[:1], params)
    drafts = watched.engine.stats().drafts
    *whole, (_, num_last) = watched.verified
    assert whole and all(tokens <= 1 + there for there, tokens in watched.verified)
    num_tokens = 1 + sum(tokens for _, tokens in whole)  # before the last step, the first of them by the prompt
    num_kept = 40 - num_tokens  # of the last step
    assert 0 < num_kept <= num_last
    last = watched.verified[-1]
    there, accepted = (num_kept, num_kept) if num_kept < num_last else (last[0], num_last - 1)
    assert drafts.num_draft_tokens == sum(there for there, _ in whole) + there
    assert drafts.num_accepted_tokens == sum(tokens - 1 for _, tokens in whole) + accepted
    assert drafts.num_drafts == sum(there > 0 for there, _ in whole) + (there > 0)
    assert sum(drafts.num_accepted_per_position) == drafts.num_accepted_tokens > 0
    assert drafts.num_accepted_per_position == sorted(drafts.num_accepted_per_position, reverse=True)
    assert told([output]) == (drafts.num_draft_tokens, drafts.num_accepted_tokens)


def grown(watched, run):
    """(what the requests tell, how the counters have grown)."""
    before = watched.counts()
    outputs = run(watched.engine)
    after = watched.counts()
    return told(outputs), (after[0] - before[0], after[1] - before[1])


def test_the_requests_sum_up_to_the_counters(mtp):
    params = [SamplingParams(temperature=temperature, max_tokens=30, seed=5) for temperature in (0, 1, 0.5, 0)]
    own, all_ = grown(mtp, lambda engine: engine.generate(PROMPTS, params))
    assert own == all_ and own[0] > own[1] > 0


def test_the_sequences_of_a_request_are_told_together(mtp):
    params = SamplingParams(temperature=1, seed=3, n=3, max_tokens=20, ignore_eos=True)
    own, all_ = grown(mtp, lambda engine: engine.generate(PROMPTS[:1], params))
    assert own == all_ and own[0] >= 3 * 6


def test_a_request_that_a_stop_string_ends_tells_its_drafts_too(mtp):
    params = SamplingParams(temperature=0, max_tokens=60, stop=["the"])
    own, all_ = grown(mtp, lambda engine: engine.generate(PROMPTS, params))
    assert own == all_ and own[0] > 0


def test_an_aborted_request_tells_its_drafts_too(mtp):
    def run(engine):
        engine.add_request("a", PROMPTS[0], SamplingParams(temperature=0, max_tokens=90, ignore_eos=True))
        last = None
        for _ in range(12):
            last = (engine.step() or [last])[-1]
        engine.abort_request("a")
        return [(engine.step() or [last])[-1]]

    own, all_ = grown(mtp, run)
    assert own == all_ and own[0] > 0
    assert not mtp.engine.has_unfinished_requests()


def test_requests_that_preempt_each_other_sum_up_to_the_counters():
    watched = Watched(MTP, num_gpu_blocks_override=12)
    params = SamplingParams(temperature=0, max_tokens=80, ignore_eos=True)
    outputs = watched.engine.generate(PROMPTS, params)
    assert watched.engine.stats().num_preemptions
    assert told(outputs) == watched.counts()


def test_a_step_without_drafts_is_counted_nowhere():
    watched = Watched({"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 8})
    ids = list(range(40, 60))  # nothing repeats itself
    (output,) = watched.engine.generate([{"prompt_token_ids": ids}], SamplingParams(temperature=0, max_tokens=2))
    assert watched.verified and told([output]) == watched.counts() == (0, 0)
