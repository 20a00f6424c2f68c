"""benchmarks/peers: loads of W5 and their table; a server leaves nothing behind, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# A server that starts two helpers, one in a session of its own, which ignore SIGTERM, and then does what it is told.
SERVER = """
import subprocess, sys, time
stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('on', flush=True); time.sleep(99)"
helpers = [subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE, start_new_session=own)
           for own in (False, True)]
for helper in helpers:
    helper.stdout.readline()
print(*(helper.pid for helper in helpers), flush=True)
time.sleep(99)
"""


def result(**changes):
    """What `bench serve` saves, of four requests."""
    times = {"p50_ttft_ms": 80.0, "p99_ttft_ms": 90.0, "p50_tpot_ms": 20.0, "p99_tpot_ms": 25.0}
    return {"completed": 4, "total_output_tokens": 4 * 64, "request_throughput": 2.5, **times, **changes}


def record(engine, number, traffic="Poisson", **metrics):
    labels = {"engine": engine, "round": f"x/{number}", "traffic": traffic, "rate": 2.0, "foreign": 0.01,
              "flags": ""}  # fmt: skip
    times = {
        "ttft_p50_ms": 100.0,
        "tpot_p50_ms": 20.0,
        "ttft_p99_ms": 150.0,
        "tpot_p99_to_p50": 1.2,
        "requests_per_second": 2.0,
    }
    return {**labels, **times, **metrics}


def test_a_load_is_told_by_its_medians_and_the_tail_of_the_time_per_token(peers):
    metrics = peers.server_load.load_metrics(result(), 4)
    assert metrics == {
        "ttft_p50_ms": 80.0,
        "tpot_p50_ms": 20.0,
        "ttft_p99_ms": 90.0,
        "tpot_p99_to_p50": 1.25,
        "requests_per_second": 2.5,
    }


@pytest.mark.parametrize("change", [{"completed": 3}, {"total_output_tokens": 255}])
def test_a_load_that_is_not_answered_in_full_is_none(peers, change):
    with pytest.raises(RuntimeError, match="4 requests must be answered with 64 tokens each"):
        peers.server_load.load_metrics(result(**change), 4)


def test_the_table_compares_within_rounds_and_with_the_best_peer_of_each(peers):
    records = []
    for number, (ours, one, other) in enumerate([(50.0, 100.0, 200.0), (90.0, 300.0, 100.0), (40.0, 80.0, 160.0)]):
        for engine, value in (("omni-engine", ours), ("vllm", one), ("llama.cpp", other)):
            records.append(record(engine, number, ttft_p50_ms=value))
    records.append(record("vllm", 3, ttft_p50_ms=1.0))  # of a round that omni-engine has not
    table = peers.server_load.load_table(records)
    rows = {line.split(" | ")[1]: line for line in table.splitlines() if line.startswith("| Poisson")}
    assert (
        "| 50.0 (40.0 to 90.0) | 20.00 (20.00 to 20.00) | 150 (150 to 150) | 1.20 (1.20 to 1.20) | 2.00"
        in rows["omni-engine"]
    )
    assert rows["vllm"].endswith("| 4 | 0.50 (0.30 to 0.50) | 1.00 (1.00 to 1.00) |")
    assert rows["llama.cpp"].endswith("| 3 | 0.25 (0.25 to 0.90) | 1.00 (1.00 to 1.00) |")
    assert rows["best of the peers"].endswith("| 0.50 (0.50 to 0.90) | 1.00 (1.00 to 1.00) |")
    assert "closed loop" not in table
    assert "| closed loop | vllm |" in peers.server_load.load_table([*records, record("vllm", 0, "closed loop")])


def test_loads_of_other_rates_and_flags_are_tables_of_their_own(peers):
    records = [record("omni-engine", 0), record("omni-engine", 1, rate=0.5), record("omni-engine", 2, flags="--x")]
    tables = peers.server_load.load_tables([*records, record("vllm", 1, rate=0.5)])
    assert [line.split()[3] for line in tables.splitlines() if line.startswith("Poisson")] == ["2.00", "0.50", "2.00"]
    assert tables.count("| vllm |") == 1 and tables.count("| 1 |") == 4 and "our server: --x." in tables


@pytest.mark.parametrize("ends_by_itself", [False, True])
def test_nothing_of_a_server_is_left_over(peers, tmp_path, ends_by_itself):
    log = tmp_path / "log"
    with (
        pytest.raises(RuntimeError, match="on purpose"),
        peers.server_process.running([sys.executable, "-c", SERVER], {}, log) as process,
    ):
        deadline = time.monotonic() + 20
        while len(log.read_text().split()) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        pids = [int(pid) for pid in log.read_text().split()]
        assert len(pids) == 2 and all(is_alive(pid) for pid in pids)
        if ends_by_itself:
            process.kill()
            process.wait()
        raise RuntimeError("on purpose")
    deadline = time.monotonic() + 5
    while any(is_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.returncode is not None and not any(is_alive(pid) for pid in pids)


def is_alive(pid):
    """Not ended; one that has ended and that nobody has waited for is not alive."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_server_is_ended_with_the_command_that_started_it(peers, tmp_path):
    """By SIGTERM to the command while it waits for the server."""
    (tmp_path / "model").mkdir()
    program = (
        "import sys; folder, script = sys.argv[1:3]; del sys.argv[1:3]; sys.path.insert(0, folder); import servers\n"
        "servers.compile_graphs = print\n"
        "servers.server_commands = lambda options: {'omni-engine': ([sys.executable, '-c', script], {})}\n"
        "servers.main()"
    )
    words = [
        str(Path(peers.servers.__file__).parent),
        SERVER,
        str(tmp_path / "model"),
        "--logs",
        str(tmp_path),
        "--port",
        "9",
    ]
    with subprocess.Popen([sys.executable, "-c", program, *words]) as command:
        log = tmp_path / "omni-engine.log"
        deadline = time.monotonic() + 30
        while not (log.exists() and len(log.read_text().split()) == 2) and time.monotonic() < deadline:
            time.sleep(0.05)
        pids = [int(pid) for pid in log.read_text().split()]
        os.kill(command.pid, signal.SIGTERM)
        assert command.wait(40) == 143
    assert len(pids) == 2 and not any(is_alive(pid) for pid in pids)
