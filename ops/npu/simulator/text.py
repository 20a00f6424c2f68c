"""A lowered graph as text: a line per node, in order, with its inputs and attributes."""

from __future__ import annotations

from .graphs import FRAME, Lowered, Node


def graph_text(graph: Lowered) -> str:
    """Inputs first, each with its shape and what it is; then the nodes. Constants of up to four values are shown."""
    lines = []
    for name, given in sorted(graph.inputs.items(), key=lambda item: item[1].index):
        kinds = [kind for kind in ("frozen", "mutated") if getattr(given, kind)]
        shape = "x".join(map(str, given.shape))
        lines.append(
            f"{name} = Data[{given.index}] {shape or 'scalar'} format {given.format} {' '.join(kinds)}".rstrip()
        )
    lines += [_line(node) for node in graph.nodes if node.type not in ("Data", "RefData")]
    return "\n".join(lines) + "\n"


def _line(node: Node) -> str:
    if node.type in FRAME and node.constant is not None:
        values = node.constant.flatten().tolist()
        return f"{node.name} = Const {values if len(values) <= 4 else f'{len(values)} values'}"
    told = [f"{key}={value}" for key, value in sorted(node.attributes.items()) if value not in (None, "", [])]
    stream = f" @{node.stream}" if node.stream else ""
    return f"{node.name} = {node.type}({', '.join(node.inputs)}){' ' * bool(told)}{' '.join(told)}{stream}"
