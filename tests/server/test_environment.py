"""Numbers and flags in environment variables."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from omni_engine.server.environment import read_count, read_flag, read_number


@pytest.mark.parametrize(("text", "value"), [("1", True), ("true", True), ("TRUE", True), ("0", False), ("", False)])
def test_flags(monkeypatch, text, value):
    monkeypatch.setenv("X", text)
    assert read_flag("X") is value


def test_what_is_not_set_has_its_default(monkeypatch):
    monkeypatch.delenv("X", raising=False)
    assert (read_flag("X"), read_number("X", 2.5), read_count("X", 7)) == (False, 2.5, 7)


def test_numbers(monkeypatch):
    monkeypatch.setenv("X", "12")
    assert (read_number("X", 0), read_count("X", 1)) == (12, 12)


@pytest.mark.parametrize("text", ["many", "-1", "nan"])
def test_what_is_no_number_is_said_with_the_variable(monkeypatch, text):
    monkeypatch.setenv("X", text)
    for read in (read_number, read_count):
        with pytest.raises(ValueError, match=f"X must be .*: {text}"):
            read("X", 1)


@pytest.mark.parametrize("variable", ["VLLM_MAX_N_SEQUENCES", "VLLM_MAX_COMPLETION_PROMPTS", "VLLM_MAX_STOP_STRINGS"])
@pytest.mark.parametrize("text", ["many", "0"])
def test_a_limit_that_is_no_count_ends_the_server_with_its_name(variable, text, tmp_path):
    command = [sys.executable, "-m", "omni_engine.server.cli", "serve", "--uds", str(tmp_path / "s")]
    done = subprocess.run(command, env={**os.environ, variable: text}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"omni-engine serve: error: {variable} must be a whole number, 1 or more: {text}"
    )
