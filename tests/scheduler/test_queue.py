"""The waiting queue: order, counts, removal anywhere, and that removed requests are let go of."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from omni_engine.kvcache.manager import RequestBlocks
from omni_engine.scheduler.queue import WaitingQueue
from omni_engine.scheduler.request import Request, RequestInput
from omni_engine.scheduler.sampling_params import SamplingParams


def request(priority: int, sequence: int, num_tokens: int = 1) -> Request:
    source = RequestInput(f"r{sequence}", [0] * num_tokens, SamplingParams(), priority=priority)
    return Request(source, (priority, sequence), 100, RequestBlocks([], 0), 0.0)


def test_smaller_priority_goes_first_then_arrival():
    queue = WaitingQueue()
    for priority, sequence in [(1, 0), (0, 1), (1, 2), (0, 3)]:
        queue.add(request(priority, sequence))
    assert [queue.pop().order for _ in range(4)] == [(0, 1), (0, 3), (1, 0), (1, 2)]
    assert queue.peek() is None


def test_request_that_comes_back_takes_its_old_place():
    queue = WaitingQueue()
    requests = [request(0, sequence) for sequence in range(3)]
    for waiting in requests:
        queue.add(waiting)
    first = queue.pop()
    queue.add(first)
    assert queue.pop() is first


def test_removed_requests_leave_the_heap():
    queue = WaitingQueue()
    requests = [request(0, sequence) for sequence in range(1000)]
    for waiting in requests:
        queue.add(waiting)
    for waiting in requests[1:]:
        queue.remove(waiting)
    assert len(queue) == 1
    assert len(queue._heap) < 100


@given(st.lists(st.tuples(st.sampled_from(["add", "pop", "remove"]), st.integers(0, 3), st.integers(1, 5))))
def test_queue_agrees_with_a_sorted_list(operations):
    queue, expected = WaitingQueue(), []
    for sequence, (operation, number, num_tokens) in enumerate(operations):
        if operation == "add":
            expected.append(request(number, sequence, num_tokens))
            queue.add(expected[-1])
            expected.sort(key=lambda waiting: waiting.order)
        elif expected and operation == "pop":
            assert queue.pop() is expected.pop(0)
        elif expected:
            queue.remove(expected.pop(number % len(expected)))
        assert queue.peek() is (expected[0] if expected else None)
        assert len(queue) == len(expected)
        assert queue.num_prompt_tokens == sum(waiting.num_prompt_tokens for waiting in expected)
