"""`omni-engine graph`: what it prints, what it refuses, and its exit status."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from omni_engine.engine.graphs.cache import GraphCache
from omni_engine.engine.graphs.entry import GraphEntry
from omni_engine.engine.graphs.key import CacheKey, installed_versions
from omni_engine.server.cli import main
from omni_engine.server.graph_commands import format_age, format_bytes, format_table, printable


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GraphCache:
    monkeypatch.setenv("OMNI_ENGINE_CACHE", str(tmp_path / "cache"))
    return GraphCache()


def store(cache: GraphCache, num_requests: int = 8, model: str = "tiny", **fields: object) -> GraphEntry:
    key = {
        "num_requests": num_requests, "tokens_per_request": 1, "sampler": "greedy", "backend": "inductor",
        **installed_versions(), "torch": "2.13.0", **fields,
    }  # fmt: skip
    return cache.store(CacheKey(key), lambda path: path.write_bytes(b"x" * 1536) and None, {"model": model})


def damage(entry: GraphEntry) -> None:
    entry.path.write_bytes(b"y" * entry.num_bytes)


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    status = main(["graph", *map(str, words)])
    output, errors = capsys.readouterr()
    return status, output, errors


def test_the_list_shows_what_a_graph_is_of(cache, capsys):
    entry = store(cache)
    status, output, _ = run(capsys, "list")
    head, row, total = output.splitlines()
    assert status == 0
    assert head.split() == ["graph", "model", "gear", "sampler", "backend", "size", "age", "torch", "status"]
    assert row.split()[0] == entry.digest[:12]
    assert re.split("  +", row)[1:6] == ["tiny", "8 x 1", "greedy", "inductor", "1.5 KiB"]
    assert row.split()[-2:] == ["2.13.0", "ok"]
    assert total == f"1 graph (1.5 KiB): {cache.folder}"


def test_an_empty_cache_lists_nothing(cache, capsys):
    assert run(capsys, "list") == (0, f"0 graphs (0 B): {cache.folder}\n", "")
    assert run(capsys, "verify")[0] == 0
    assert json.loads(run(capsys, "list", "--json")[1]) == []


def test_json_has_keys_details_and_paths(cache, capsys):
    entry = store(cache)
    (record,) = json.loads(run(capsys, "list", "--json")[1])
    assert (record["digest"], record["path"], record["bytes"]) == (entry.digest, str(entry.path), 1536)
    assert (record["status"], record["problem"]) == ("ok", None)
    assert record["key"] == entry.fields and record["details"] == entry.details


def test_verify_fails_where_something_is_broken(cache, capsys):
    store(cache, 8)
    assert run(capsys, "verify")[0] == 0
    broken = store(cache, 16)
    damage(broken)
    status, output, errors = run(capsys, "verify")
    assert status == 1 and errors.startswith("1 of 2 graphs are broken; omni-engine graph prune removes them")
    assert "ok" in output
    (line,) = [line for line in output.splitlines() if "broken: the content of graph.pt2" in line]
    assert line.startswith(broken.digest[:12])
    assert {record["status"] for record in json.loads(run(capsys, "verify", "--json")[1])} == {"ok", "broken"}
    assert broken.path.exists()  # to look is not to change


def test_the_list_shows_what_is_visibly_broken(cache, capsys):
    (store(cache).folder / "manifest.json").unlink()
    status, output, _ = run(capsys, "list")
    assert status == 0 and "broken: manifest.json is missing" in output


def test_graphs_go_to_another_cache_through_a_file(cache, capsys, tmp_path):
    entries = [store(cache, 8), store(cache, 16)]
    status, output, _ = run(capsys, "export", tmp_path / "graphs.tar")
    assert (status, output) == (0, f"2 graphs exported (3.0 KiB): {tmp_path / 'graphs.tar'}\n")
    there = ("--cache-dir", tmp_path / "other")
    status, output, _ = run(capsys, "import", tmp_path / "graphs.tar", "--trust", *there)
    assert (status, output) == (0, f"2 graphs imported, 0 there already: {tmp_path / 'other' / 'graphs'}\n")
    record = json.loads(run(capsys, "import", tmp_path / "graphs.tar", "--trust", "--json", *there)[1])
    assert record["stored"] == [] and set(record["kept"]) == {entry.digest for entry in entries}


def test_chosen_graphs_are_exported(cache, capsys, tmp_path):
    store(cache, 8)
    chosen = store(cache, 16)
    output = run(capsys, "export", tmp_path / "graphs.tar", chosen.digest[:12], "--json")[1]
    assert json.loads(output)["graphs"] == [chosen.digest]


def test_import_needs_trust(cache, capsys, tmp_path):
    store(cache)
    run(capsys, "export", tmp_path / "graphs.tar")
    status, output, error = run(capsys, "import", tmp_path / "graphs.tar", "--cache-dir", tmp_path / "other")
    assert (status, output) == (1, "")
    assert "executable code" in error and "--trust" in error and error.endswith(f": {tmp_path / 'graphs.tar'}\n")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("rules", "gone"),
    [
        (["--older-than", "30d"], [1]),
        (["--older-than", "4h"], [1, 2]),
        (["--max-size", "3K"], [1]),
        (["--stale"], [2]),
        (["--all"], [1, 2, 3]),
        ([], []),
    ],
)
def test_prune_rules(cache, capsys, rules, gone):
    torch = installed_versions()["torch"]
    entries = [store(cache, 1, torch=torch), store(cache, 2, torch="0.1"), store(cache, 3, torch=torch)]
    for entry, age in zip(entries, (31 * 86400, 5 * 3600, 60), strict=True):
        os.utime(entry.folder, (time.time() - age,) * 2)
    would = run(capsys, "prune", *rules, "--dry-run")[1].splitlines()
    assert len(cache.entries()) == 3 and "would be removed" in would[-1]
    status, output, _ = run(capsys, "prune", *rules)
    assert status == 0 and output.splitlines()[:-1] == would[:-1]
    assert [number for number, entry in enumerate(entries, start=1) if not entry.folder.exists()] == gone


def test_prune_takes_names_and_removes_what_is_broken(cache, capsys):
    kept, chosen, broken = store(cache, 1), store(cache, 2), store(cache, 3)
    damage(broken)
    removed = json.loads(run(capsys, "prune", chosen.digest[:10], "--json")[1])
    reasons = {record["digest"]: record["reason"].split(":")[0] for record in removed}
    assert reasons == {chosen.digest: "named", broken.digest: "broken"}
    assert [entry.digest for entry in cache.entries()] == [kept.digest]


def test_a_name_must_fit_one_graph(cache, capsys):
    store(cache, 8)
    store(cache, 16)
    status, _, error = run(capsys, "prune", "")
    assert status == 1 and "more than one graph has this name, give more of its characters" in error
    assert run(capsys, "prune", "xyz")[2] == "omni-engine graph: error: there is no graph: xyz\n"
    assert len(cache.entries()) == 2


def test_nothing_to_export_is_an_error(cache, capsys, tmp_path):
    status, _, error = run(capsys, "export", tmp_path / "graphs.tar")
    assert status == 1 and "there is no graph to export" in error
    assert not (tmp_path / "graphs.tar").exists()


def test_a_file_that_cannot_be_written_is_named(cache, capsys, tmp_path):
    store(cache)
    status, _, error = run(capsys, "export", tmp_path / "none" / "graphs.tar")
    assert status == 1 and str(tmp_path / "none" / "graphs.tar") in error and "No such file" in error


def test_a_cache_that_others_can_write_to_is_refused(cache, capsys):
    store(cache)
    cache.folder.chmod(0o777)
    status, _, error = run(capsys, "list")
    assert status == 1 and "chmod 700" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["prune", "--older-than", "soon"], "not a time such as 90s, 30m, 12h, 30d or 8w: soon"),
        (["prune", "--max-size", "-1"], "must not be negative: -1"),
        (["list", "--trust"], "unknown flag"),
        (["import"], "required: FILE"),
    ],
)
def test_wrong_usage_is_told_in_one_line(cache, capsys, words, problem):
    with pytest.raises(SystemExit) as raised:
        run(capsys, *words)
    error = capsys.readouterr().err
    assert raised.value.code == 2 and problem in error and error.count("\n") == 1


def test_an_unknown_command_is_told(capsys):
    status, _, error = run(capsys, "show")
    assert status == 2 and error.endswith("choose from list, verify, export, import, prune, lower: show\n")


def test_names_from_an_archive_cannot_steer_the_terminal(cache, capsys):
    store(cache, model="evil\x1b[2J\nname" + "x" * 100)
    lines = run(capsys, "list")[1].splitlines()
    assert len(lines) == 3 and "evil?[2J?name" in lines[1] and "\x1b" not in lines[1]
    assert len(printable("x" * 100)) == 80


def test_figures_are_short():
    assert [format_bytes(size) for size in (0, 1023, 1536, 7 * 2**20, 3 * 2**40)] == [
        "0 B", "1023 B", "1.5 KiB", "7.0 MiB", "3072.0 GiB",
    ]  # fmt: skip
    assert [format_age(seconds) for seconds in (-1, 59, 60, 7200, 864000)] == ["0 s", "59 s", "1 m", "2 h", "10 d"]
    assert format_table(("a", "bb"), [("long", "x")]) == "a     bb\nlong  x"


def test_the_commands_import_no_torch(cache):
    code = "import sys; from omni_engine.server.cli import main; main(['graph', 'list']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


# --- lower: what it refuses; what it does is in tests/npu ------------------------------------------------------------


def test_lowering_without_its_tools_says_what_to_install(capsys, monkeypatch):
    from omni_engine.ops.npu.simulator import build

    def missing():
        raise build.SimulatorUnavailable("the NPU simulator is built with gcc, which is not installed")

    monkeypatch.setattr(build, "load", missing)
    status, _, errors = run(capsys, "lower", "--gear", 4, "--target", "npu")
    assert status == 1
    assert "install gcc and binutils" in errors and "omni-engine[npu]" in errors
    assert errors.endswith("the NPU simulator is built with gcc, which is not installed\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--target", "npu"], "--gear"),
        (["--gear", "0", "--target", "npu"], "positive integer: 0"),
        (["--gear", "4", "--target", "gpu"], "--target"),
        (["--gear", "4", "--target", "npu", "--chip", "H100"], "--chip"),
    ],
)
def test_wrong_words_of_lower_are_refused(capsys, words, message):
    with pytest.raises(SystemExit) as ended:
        main(["graph", "lower", *words])
    assert ended.value.code == 2 and message in capsys.readouterr().err
