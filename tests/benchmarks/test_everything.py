"""benchmarks/peers/everything.py: its commands are ones that the programs take, and one that fails is told."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest


def options(tmp_path, **changes):
    places = {"vllm": "v/python", "openvino": "o/python", "llama_cpp": "l/bin"}
    return argparse.Namespace(folder=tmp_path, pairs=3, **{**places, **changes})


def test_every_flag_is_one_of_its_program(peers, tmp_path):
    for name, part in peers.everything.all_parts(options(tmp_path)).items():
        for command in part.commands:
            flags = [word.partition("=")[0] for word in command if word.startswith("--")]
            program = command[:2] if command[0] == sys.executable else command[:3]
            assert Path(program[-1]).suffix == ".py" or program[-2:] == ["bench", "host"], name
            told = subprocess.run([*program, "--help"], capture_output=True, text=True, check=True).stdout
            assert set(flags) <= set(re.findall(r"--[a-z-]+", told)), name


def test_models_are_named_by_their_checkpoints(peers, tmp_path):
    for command in peers.everything.all_parts(options(tmp_path))["starts"].commands:
        place = command.index("--pairs")
        assert all(word.startswith(("--", str(tmp_path), "v/", "o/", "l/")) for word in command[2:place]), command


def test_the_demo_is_served_with_the_positions_that_it_has(peers):
    given = argparse.Namespace(model=peers.servers.DEMO_MODEL, port=1, vllm=None, llama_cpp=None, serve_flag=[])
    command, _ = peers.servers.server_commands(given)["omni-engine"]
    assert "--max-model-len" not in command
    given.model = Path("other")
    command, _ = peers.servers.server_commands(given)["omni-engine"]
    assert command[command.index("--max-model-len") + 1] == "4096"


def test_peers_that_are_not_given_are_not_asked_for(peers, tmp_path):
    parts = peers.everything.all_parts(options(tmp_path, vllm=None, openvino=None))
    words = [word for part in parts.values() for command in part.commands for word in command]
    assert "--llama-cpp" in words and not {"--vllm", "--openvino"} & set(words)


def test_a_part_that_fails_is_told_and_the_others_are_run(peers, tmp_path, capsys):
    def part(*programs):
        return peers.everything.Part("what it finds", [[sys.executable, "-c", program] for program in programs])

    report = tmp_path / "report.md"
    report.write_text("before\n")
    parts = {"one": part("print('first'); raise SystemExit(3)", "print('second')"), "two": part("print('third')")}
    assert peers.everything.run_parts(parts, report) == ["one"]
    text = report.read_text()
    assert re.findall(r"^(before|first|second|third)$", text, re.M) == ["before", "first", "second", "third"]
    assert text.count("one: a command ended with status 3") == 1
    out, err = capsys.readouterr()
    assert out == "first\nsecond\nthird\n" and "[2/2] two" in err


def test_a_part_that_does_not_exist_is_refused_by_name(peers, tmp_path):
    arguments = [str(tmp_path / "new"), "--parts", "models", "nothing"]
    done = subprocess.run([sys.executable, peers.everything.__file__, *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and "no such part: nothing; there are models, starts" in done.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.full
def test_a_part_by_the_command(peers, tmp_path):
    """The quickest one, as a user runs it."""
    arguments = [str(tmp_path), "--parts", "scheduler"]
    done = subprocess.run([sys.executable, peers.everything.__file__, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^ +100000 +[0-9.]+", (tmp_path / "report.md").read_text(), re.M)
