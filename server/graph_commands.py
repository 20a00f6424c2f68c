"""The commands under `omni-engine graph`, which list, check and carry the compiled graphs on disk."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..engine.graphs.cache import GraphCache
from ..engine.graphs.entry import GraphEntry
from ..engine.graphs.key import installed_versions
from .arguments import CommandParser, parse_size

_COMMANDS = {
    "list": "show the compiled graphs in the cache",
    "verify": "read every graph and tell which are broken",
    "export": "write graphs into one file",
    "import": "take graphs from such a file: executable code",
    "prune": "remove graphs that are broken, old or too many",
    "lower": "show what a decode step becomes on an NPU, without one",
}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smhdw])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_COLUMNS = ("graph", "model", "gear", "sampler", "backend", "size", "age", "torch", "status")
_SHORT = 12  # characters of a digest that are shown


def run_graph(words: Sequence[str]) -> int:
    """Run `omni-engine graph` with these words; returns the exit status."""
    if not words or words[0] in ("-h", "--help"):
        print(_overview(), file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    command = words[0]
    if command not in _COMMANDS:
        print(
            f"omni-engine graph: error: unknown command, choose from {', '.join(_COMMANDS)}: {command}",
            file=sys.stderr,
        )
        return 2
    if command == "lower":
        from .lower_command import run_lower

        return run_lower(words[1:])
    parser = _parser(command)
    arguments = parser.parse(words[1:])
    run = {"list": _list, "verify": _verify, "export": _export, "import": _import, "prune": _prune}[command]
    return run(GraphCache(arguments.cache_dir), arguments)


def _overview() -> str:
    commands = "\n".join(f"  {name:<10}{text}" for name, text in _COMMANDS.items())
    hint = "omni-engine graph COMMAND --help shows its options."
    return f"usage: omni-engine graph COMMAND [options]\n\n{commands}\n\n{hint}"


def _parser(command: str) -> CommandParser:
    takes = {"export": "FILE [GRAPH ...]", "import": "FILE", "prune": "[GRAPH ...]"}.get(command, "")
    parser = CommandParser(f"graph {command}", takes, _COMMANDS[command].capitalize() + ".")
    add = parser.add_argument
    if command in ("export", "import"):
        add("file", metavar="FILE", type=Path, help="the archive, a tar file")
    if command in ("export", "prune"):
        add("graphs", metavar="GRAPH", nargs="*", help="first characters of a graph's name, as list shows it")
    if command == "import":
        add("--trust", action="store_true", help="yes, run the code in this file with my rights")
    if command == "prune":
        add("--older-than", metavar="TIME", type=_duration, help="those not used for so long: 12h, 30d, 8w")
        add("--max-size", metavar="BYTES", type=_size, help="all but those used last that fit in, as 500m or 20G")
        add("--stale", action="store_true", help="those made with another torch or another omni-engine than these")
        add("--all", action="store_true", help="all of them")
        add("--dry-run", action="store_true", help="only tell which")
    add("--cache-dir", metavar="DIR", type=Path, help="folder of all caches (default: as the environment says)")
    add("--json", action="store_true", help="print JSON")
    return parser


def _duration(text: str) -> float:
    match = _DURATION.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"not a time such as 90s, 30m, 12h, 30d or 8w: {text}")
    return float(match[1]) * _SECONDS[match[2]]


def _size(text: str) -> int:
    size = parse_size(text)
    if size < 0:
        raise argparse.ArgumentTypeError(f"must not be negative: {text}")
    return size


def _list(cache: GraphCache, arguments: argparse.Namespace) -> int:
    _show(cache, cache.verify(contents=False), arguments.json)
    return 0


def _verify(cache: GraphCache, arguments: argparse.Namespace) -> int:
    found = cache.verify()
    _show(cache, found, arguments.json)
    num_broken = sum(problem is not None for _, problem in found)
    if num_broken:
        print(
            f"{num_broken} of {len(found)} graphs are broken; omni-engine graph prune removes them, and they are "
            "compiled again when they are needed",
            file=sys.stderr,
        )
    return 1 if num_broken else 0


def _export(cache: GraphCache, arguments: argparse.Namespace) -> int:
    entries = _named(cache.entries(), arguments.graphs) if arguments.graphs else cache.entries()
    if not entries:
        raise ValueError(f"there is no graph to export: {cache.folder}")
    cache.export(arguments.file, entries)
    if arguments.json:
        _print_json({"file": str(arguments.file), "graphs": [entry.digest for entry in entries]})
    else:
        size = format_bytes(sum(entry.num_bytes for entry in entries))
        print(f"{count_graphs(entries)} exported ({size}): {arguments.file}")
    return 0


def _import(cache: GraphCache, arguments: argparse.Namespace) -> int:
    result = cache.import_(arguments.file, trust=arguments.trust)
    if arguments.json:
        _print_json({name: [entry.digest for entry in entries] for name, entries in result._asdict().items()})
    else:
        print(f"{count_graphs(result.stored)} imported, {len(result.kept)} there already: {cache.folder}")
    return 0


def _prune(cache: GraphCache, arguments: argparse.Namespace) -> int:
    named = _named([entry for entry, _ in cache.verify(contents=False)], arguments.graphs)
    removed = cache.prune(
        digests={entry.digest for entry in named},
        older_than=arguments.older_than,
        keep_current=installed_versions() if arguments.stale else None,
        max_bytes=arguments.max_size,
        all=arguments.all,
        dry_run=arguments.dry_run,
    )
    if arguments.json:
        _print_json([{**_record(entry, None), "reason": reason} for entry, reason in removed])
        return 0
    for entry, reason in removed:
        print(f"{entry.digest[:_SHORT]}  {format_bytes(entry.num_bytes):>9}  {printable(reason)}")
    size = format_bytes(sum(entry.num_bytes for entry, _ in removed))
    print(f"{count_graphs(removed)} {'would be ' * arguments.dry_run}removed ({size}): {cache.folder}")
    return 0


def _named(entries: Sequence[GraphEntry], names: Sequence[str]) -> list[GraphEntry]:
    """The entries whose digests begin with these names; ValueError for a name that fits none or several."""
    found = []
    for name in names:
        fitting = [entry for entry in entries if entry.digest.startswith(name.lower())]
        if len(fitting) != 1:
            hint = "more than one graph has this name, give more of its characters" if fitting else "there is no graph"
            raise ValueError(f"{hint}: {name}")
        found += fitting
    return list(dict.fromkeys(found))


def _show(cache: GraphCache, found: Sequence[tuple[GraphEntry, str | None]], as_json: bool) -> None:
    if as_json:
        _print_json([_record(entry, problem) for entry, problem in found])
        return
    if found:
        now = time.time()
        print(format_table(_COLUMNS, [_row(entry, problem, now) for entry, problem in found]))
    size = format_bytes(sum(entry.num_bytes for entry, _ in found))
    print(f"{count_graphs(found)} ({size}): {cache.folder}")


def _record(entry: GraphEntry, problem: str | None) -> dict[str, Any]:
    return {
        "digest": entry.digest,
        "path": str(entry.path),
        "bytes": entry.num_bytes,
        "last_used": entry.last_used,
        "status": "ok" if problem is None else "broken",
        "problem": problem,
        "key": entry.fields,
        "details": entry.details,
    }


def _row(entry: GraphEntry, problem: str | None, now: float) -> tuple[str, ...]:
    def told(name: str) -> str:
        return printable(str(entry.details.get(name, entry.fields.get(name, "-"))))

    gear = f"{told('num_requests')} x {told('tokens_per_request')}"
    return (
        entry.digest[:_SHORT],
        told("model"),
        "-" if gear == "- x -" else gear,
        told("sampler"),
        told("backend"),
        format_bytes(entry.num_bytes),
        format_age(now - entry.created) if entry.created else "-",
        told("torch"),
        "ok" if problem is None else f"broken: {printable(problem)}",
    )


def format_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns, as wide as their widest cell, two spaces apart."""
    lines = [columns, *rows]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def format_bytes(size: int) -> str:
    value, units = float(size), ["B", "KiB", "MiB", "GiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{size} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


def format_age(seconds: float) -> str:
    for unit in ("d", "h", "m"):
        if seconds >= _SECONDS[unit]:
            return f"{int(seconds / _SECONDS[unit])} {unit}"
    return f"{max(0, int(seconds))} s"


def count_graphs(found: Sequence[Any]) -> str:
    return f"{len(found)} graph{'s' * (len(found) != 1)}"


def printable(text: str) -> str:
    """The text on one line of at most 80 characters, with nothing that steers a terminal: graphs may be imported."""
    text = "".join(char if char.isprintable() else "?" for char in text)
    return text if len(text) <= 80 else f"{text[:79]}…"


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))
