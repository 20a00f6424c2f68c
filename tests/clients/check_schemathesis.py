"""schemathesis on /openapi.json: `python check_schemathesis.py BASE_URL [--api-key KEY] [--cases 2000]`.

No made-up request may be answered with a 5xx, hang for more than a second, or leave something running. Answers are kept
short by the server's own limit: start it with `--override-generation-config '{"max_new_tokens": 4}'`.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import argparse
import collections
import sys
import time
import urllib.request
from typing import Any

import hypothesis
import schemathesis

MAX_SECONDS = 1.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base_url")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--cases", type=int, default=2000, help="requests with bodies, over all routes together")
    arguments = parser.parse_args()
    url = arguments.base_url.rstrip("/")
    headers = {"x-api-key": arguments.api_key}
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json", headers=headers)
    operations = [found.ok() for found in schema.get_all_operations()]
    with_body = [operation for operation in operations if operation.body]
    each = -(-arguments.cases // len(with_body))
    statuses: collections.Counter[int] = collections.Counter()
    slowest, failures = 0.0, []
    for operation in operations:

        @hypothesis.given(case=operation.as_strategy())
        @hypothesis.settings(
            max_examples=each, deadline=None, database=None, derandomize=True,
            suppress_health_check=list(hypothesis.HealthCheck),
        )  # fmt: skip
        def call(case: Any) -> None:
            nonlocal slowest
            for _ in range(2):  # a machine that is busy with something else is no hang: it must be slow twice
                started = time.perf_counter()
                response = case.call(base_url=url, headers=headers, timeout=30)
                seconds = time.perf_counter() - started
                if seconds < MAX_SECONDS:
                    break
            slowest = max(slowest, seconds)
            statuses[response.status_code] += 1
            assert response.status_code < 500, f"{response.status_code}: {case.as_curl_command()}"
            assert seconds < MAX_SECONDS, f"{seconds:.2f} s: {case.as_curl_command()}"

        try:
            call()
        except Exception as error:
            failures.append(f"{operation.label}: {str(error)[:1000]}")
    request = urllib.request.Request(f"{url}/metrics", headers=headers)
    metrics = urllib.request.urlopen(request, timeout=10).read().decode()
    running = [line for line in metrics.splitlines() if line.startswith("vllm:num_requests_running")]
    print(f"{sum(statuses.values())} requests to {len(operations)} routes, by status {dict(sorted(statuses.items()))}, "
          f"slowest {slowest:.2f} s; {running}")  # fmt: skip
    for failure in failures:
        print("FAIL", failure)
    return 1 if failures or any(not line.endswith(" 0.0") for line in running) else 0


if __name__ == "__main__":
    sys.exit(main())
