"""The doctor's processes: whatever a check does to its own, the others are run and reported."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from omni_engine.engine.npu import machine as npu_machine
from omni_engine.engine.npu.doctor import DEVICE_GROUP, START, Finding, Report, examine
from omni_engine.engine.npu.machine import machine_facts
from omni_engine.server.cli import main

# The worker's own loop over checks that do what operators may do.
WORKER = """
import os, signal, sys, time
from omni_engine.engine.npu.doctor_worker import Bench, Reported, run_checks, telling

def crashes(bench):
    print("the operator's last words", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)

def hangs(bench):
    time.sleep(600)

def leaves(bench):
    os._exit(0)

def wrong(bench):
    return bench.compared(lambda: 0.5, 0.1)

def raises(bench):
    raise ValueError("a contract")

def breaks_the_device(bench):
    raise RuntimeError("error 507015") from OSError("the cause")

def right(bench):
    return bench.compared(lambda: 0.05, 0.1)

def once(bench):
    bench.compile(None)
    return right(bench)

descriptor, group, first, device = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
with telling(descriptor) as tell:
    def compile(function):
        tell({"question": {"operator": "Op", "optional": ["a", "b"], "refusal": "no"}})
    if group == "no start":
        os.kill(os.getpid(), signal.SIGKILL)
    names = group.split()
    tell({"checks": names})
    bench = Bench(None, device == "simulated", compile)
    run_checks([(name, globals()[name]) for name in names], first, lambda: bench, tell)
"""


@pytest.fixture
def run(tmp_path: Path):
    (tmp_path / "worker.py").write_text(WORKER)

    def run(*groups: str, is_simulated: bool = False, timeout: float = 30.0) -> Report:
        command = (sys.executable, str(tmp_path / "worker.py"))
        return examine(groups, is_simulated=is_simulated, timeout=timeout, worker=command)

    return run


def told(report: Report) -> list[tuple[str, str]]:
    return [(finding.name, finding.status) for finding in report.findings]


def test_a_crash_costs_one_check(run) -> None:
    report = run("right crashes right", "right")
    assert told(report) == [("right", "pass"), ("crashes", "crash"), ("right", "pass"), ("right", "pass")]
    assert report.findings[1].detail == "SIGSEGV. the operator's last words"
    assert report.is_wrong


def test_a_hang_costs_one_check_and_its_time(run) -> None:
    start = time.monotonic()
    report = run("hangs right", timeout=5.0)
    assert told(report) == [("hangs", "timeout"), ("right", "pass")]
    assert time.monotonic() - start < 30 and report.findings[0].seconds >= 5


def test_a_process_that_leaves_quietly_has_crashed(run) -> None:
    report = run("leaves right")
    assert told(report) == [("leaves", "crash"), ("right", "pass")]
    assert report.findings[0].detail == "exit status 0"


def test_after_an_error_of_the_device_another_process_goes_on(run) -> None:
    report = run("right breaks_the_device right raises right")
    assert [status for _, status in told(report)] == ["pass", "fail", "pass", "fail", "pass"]
    assert report.findings[1].detail == "RuntimeError: error 507015 (because of OSError: the cause)"
    assert report.findings[3].detail == "ValueError: a contract"


def test_a_result_that_is_wrong_fails(run) -> None:
    report = run("wrong right")
    assert told(report) == [("wrong", "fail"), ("right", "pass")] and report.is_wrong
    assert report.findings[0].detail == "relative error 0.5, allowed is 0.1"
    assert not run("right").is_wrong


def test_nothing_passes_and_nothing_is_wrong_where_nothing_is_computed(run) -> None:
    report = run("right wrong crashes", is_simulated=True)
    assert told(report) == [("right", "ran"), ("wrong", "ran"), ("crashes", "crash")]


def test_a_process_that_does_not_start_is_told(run) -> None:
    report = run("no start", "right")
    assert told(report) == [(START, "crash"), ("right", "pass")]
    assert report.findings[0].detail == "SIGKILL"


def test_without_a_device_the_rest_is_not_run(tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import json, os, sys\n"
        "tell = lambda message: os.write(int(sys.argv[1]), json.dumps(message).encode() + b'\\n')\n"
        "tell({'checks': ['import torch and torch-npu', 'devices', 'copies']})\n"
        "tell({'begin': 0})\ntell({'end': 0, 'status': 'pass', 'detail': ''})\n"
        "tell({'begin': 1})\ntell({'end': 1, 'status': 'fail', 'detail': 'none'})\n"
        "tell({'begin': 2})\ntell({'end': 2, 'status': 'pass', 'detail': ''})\n"
    )
    report = examine((DEVICE_GROUP, "attention"), is_simulated=False, timeout=30, worker=(sys.executable, str(worker)))
    assert told(report) == [("import torch and torch-npu", "pass"), ("devices", "fail"), (START, "not run")]
    assert report.findings[-1] == Finding("attention", START, "not run", "devices: fail", 0.0)


def test_what_cann_refuses_is_kept(run) -> None:
    assert run("once").questions == {("Op", "a, b"): "no"}


# --- the machine ---


def facts(monkeypatch, tmp_path: Path, torch: str, torch_npu: str) -> dict[str, npu_machine.Fact]:
    versions = {"torch": torch, "torch-npu": torch_npu}
    monkeypatch.setattr(npu_machine, "_installed", lambda name: versions.get(name, "1.0"))
    monkeypatch.setattr(npu_machine, "DRIVER_VERSION", tmp_path / "version.info")
    monkeypatch.setattr(npu_machine, "DEVICES", tmp_path)
    return {fact.name: fact for fact in machine_facts(False)}


def test_a_machine_that_has_all(monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "version.info").write_text("Version=25.5.0\nascendhal_version=7.35\n")
    (tmp_path / "cann" / "aarch64-linux").mkdir(parents=True)
    (tmp_path / "cann" / "aarch64-linux" / "ascend_toolkit_install.info").write_text("package=toolkit\nversion=9.1.0\n")
    (tmp_path / "cann" / "libascendcl.so").touch()
    for name in ("davinci0", "davinci1", "davinci_manager"):
        (tmp_path / name).touch()
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path / "cann"))
    monkeypatch.setenv("LD_LIBRARY_PATH", f"/none:{tmp_path}/cann")
    found = facts(monkeypatch, tmp_path, "2.13.0+cpu", "2.13.0.post2")
    assert [fact for fact in found.values() if fact.problem] == []
    assert found["CANN"].value.startswith("9.1.0, ") and found["driver"].value.startswith("25.5.0, ")
    assert found["devices"].value.startswith("2 in ")


def test_what_a_machine_lacks_is_told_with_what_to_do(monkeypatch, tmp_path: Path) -> None:
    for variable in (*npu_machine.CANN_VARIABLES, "LD_LIBRARY_PATH"):
        monkeypatch.delenv(variable, raising=False)
    found = facts(monkeypatch, tmp_path, "2.12.0", "2.13.0")
    assert {name for name, fact in found.items() if fact.problem} == {
        "torch-npu", "CANN", "libascendcl.so", "driver", "devices",
    }  # fmt: skip
    assert found["torch-npu"].problem == "it needs torch 2.13.0; install that, or the torch-npu of torch 2.12.0"


# --- the command ---


def test_a_machine_without_npus_fails_and_claims_nothing(capsys, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(npu_machine, "DEVICES", tmp_path)
    assert main(["doctor", "--npu", "--json", "--timeout", "120"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["tier"] == "Nothing has been shown to work on hardware." and report["simulated"] is False
    assert report["checks"][0]["status"] == "fail" and "pass" not in report["counts"]
    assert {check["status"] for check in report["checks"][1:]} == {"not run"}


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "--npu"),
        (["--npu", "--only", "nothing"], "--only must be part of one of device, norms and rotation"),
        (["--npu", "--timeout", "0"], "must be a number of seconds above 0: 0"),
    ],
)
def test_wrong_usage_is_told(words: list[str], text: str, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", *words])
    assert stopped.value.code == 2 and text in capsys.readouterr().err
