"""Log lines: their level from the environment, their format for people or machines."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import logging
from omni_engine.engine.logs import set_up_logging
set_up_logging()
logging.getLogger("a.b").debug("detail")
logging.getLogger("a.b").info("two\\nlines %s", "ü")
try:
    1 / 0
except ZeroDivisionError:
    logging.getLogger("a.b").exception("bad")
"""


def log_lines(**variables):
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("VLLM_", "OMNI_"))}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env={**environment, **variables}, capture_output=True, text=True, check=True
    )
    return done.stderr.splitlines()


def test_json_lines_are_one_object_each():
    first, second = (json.loads(line) for line in log_lines(OMNI_ENGINE_LOG_FORMAT="json"))
    assert (first["level"], first["logger"], first["message"]) == ("INFO", "a.b", "two\nlines ü")
    assert first["time"].endswith("+00:00")
    assert isinstance(first["process"], int)
    assert "traceback" not in first
    assert "ZeroDivisionError" in second["traceback"]


@pytest.mark.parametrize(
    ("variables", "first"),
    [
        ({}, "INFO a.b: two"),
        ({"VLLM_LOGGING_LEVEL": "DEBUG"}, "DEBUG a.b: detail"),
        ({"VLLM_LOGGING_LEVEL": "DEBUG", "OMNI_ENGINE_LOG_LEVEL": "error"}, "ERROR a.b: bad"),
        ({"VLLM_LOGGING_LEVEL": "loud"}, "INFO a.b: two"),
    ],
)
def test_the_level_comes_from_the_environment(variables, first):
    assert log_lines(**variables)[0] == first
