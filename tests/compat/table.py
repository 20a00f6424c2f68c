"""Makes docs/compatibility.md from tests/compat/vllm.yaml: `python tests/compat/table.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

CASES = Path(__file__).with_name("vllm.yaml")
BEHAVIOURS = Path(__file__).with_name("vllm_behaviours.yaml")
PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
STATUSES = ("same", "better", "partly", "not yet")
_HEAD = """# Compatibility with vLLM

Every endpoint, request field and flag of `vllm serve` 0.32 that is known here, and how far it is: *same*; *better*,
with what is more; *partly*, with what is missing; *not yet*, which is answered with an error that names it. Made from
`tests/compat/vllm.yaml` by `python tests/compat/table.py`, and held to the code by the tests in `tests/compat`.
[The HTTP API](api.md) says the same in words.
"""


def load_cases() -> dict[str, Any]:
    """The cases: endpoints and flags by name, fields by path and name; each is (status, note)."""
    cases = yaml.safe_load(CASES.read_text(encoding="utf-8"))
    return {
        "endpoints": _pairs(cases["endpoints"]),
        "fields": {path: _pairs(fields) for path, fields in cases["fields"].items()},
        "flags": _pairs(cases["flags"]),
    }


def _pairs(cases: dict[str, Any]) -> dict[str, tuple[str, str]]:
    return {name: tuple(case) if isinstance(case, list) else (case, "") for name, case in cases.items()}  # type: ignore[misc]


def page(cases: dict[str, Any]) -> str:
    """The text of docs/compatibility.md."""
    counts = [_count(cases["endpoints"]), _count(cases["flags"])]
    fields: dict[str, tuple[str, str]] = {}
    for path, by_name in cases["fields"].items():
        fields |= {f"{path} {name}": case for name, case in by_name.items()}
    rows = zip(("Endpoints", "Fields", "Flags"), (counts[0], _count(fields), counts[1]), strict=True)
    parts = [_HEAD, "| | " + " | ".join(STATUSES) + " |", "|---" * (len(STATUSES) + 1) + "|"]
    parts += [f"| {name} | " + " | ".join(str(count[status]) for status in STATUSES) + " |" for name, count in rows]
    parts += ["", *_behaviours()]
    parts += ["", "## Endpoints", "", *_table("Endpoint", cases["endpoints"])]
    for path, by_name in cases["fields"].items():
        parts += ["", f"## Fields of {path}", "", *_table("Field", by_name)]
    parts += ["", "## Flags of serve", "", *_table("Flag", cases["flags"])]
    return "\n".join(parts) + "\n"


def _behaviours() -> list[str]:
    """How many of the behaviours that vLLM's own tests ask for are tested here, and which are not."""
    entries = yaml.safe_load(BEHAVIOURS.read_text(encoding="utf-8"))
    missing = [entry for entry in entries if "not" in entry]
    num_tested = len(entries) - len(missing)
    share = f"{100 * num_tested / len(entries):.1f} %"
    return [
        "## What vLLM's own tests ask for",
        "",
        f"Of {len(entries)} behaviours that vLLM's black-box tests of its OpenAI server check and that are in scope",
        f"here (text; no LoRA, media or harmony), {num_tested} are tested here too, {share};",
        "`tests/compat/vllm_behaviours.yaml` says by which test. They were read from vLLM's tests, whose code was not",
        "run. Not so here:",
        "",
        *(f"- {entry['is']}: {entry['not']}" for entry in missing),
    ]


def _count(cases: dict[str, tuple[str, str]]) -> dict[str, int]:
    return {status: sum(case[0] == status for case in cases.values()) for status in STATUSES}


def _table(title: str, cases: dict[str, tuple[str, str]]) -> list[str]:
    rows = [f"| `{name}` | {status} | {note} |" for name, (status, note) in cases.items()]
    return [f"| {title} | Status | Notes |", "|---|---|---|", *rows]


if __name__ == "__main__":
    PAGE.write_text(page(load_cases()), encoding="utf-8")
