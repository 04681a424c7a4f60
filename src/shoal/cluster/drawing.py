"""A placement drawn with characters: stages from left to right, one row of boxes a replica."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from shoal.cluster.proposal import NodeUse, Proposal

_BAR_WIDTH = 10
_ARROW, _NO_ARROW = " ─▶ ", "    "


def draw(proposal: Proposal, width: int) -> list[str]:
    """Lines of at most `width` characters, unless a single box is wider."""
    lines: list[str] = []
    for replica in range(len(proposal.placement.replicas)):
        if len(proposal.placement.replicas) > 1:
            lines.append(f"replica {replica + 1}")
        boxes = [_box(uses) for uses in stages_of(proposal, replica)]
        for row in _rows(boxes, width):
            lines += _side_by_side(row, goes_on=row[-1] is not boxes[-1])
    return lines


def stages_of(proposal: Proposal, replica: int) -> list[list[NodeUse]]:
    """What the nodes of each stage hold, in rank order."""
    stages: list[list[NodeUse]] = [[] for _ in proposal.placement.replicas[replica].stages]
    for use in proposal.nodes:
        if use.replica == replica:
            stages[use.stage].append(use)
    return stages


def layers_of(use: NodeUse) -> str:
    if use.first_layer == use.last_layer:
        return f"layer {use.first_layer}"
    return f"layers {use.first_layer}–{use.last_layer}"


def heads_of(use: NodeUse) -> str:
    return f"{use.num_query_heads} + {use.num_kv_heads} heads"


def _box(uses: Sequence[NodeUse]) -> list[str]:
    content = [layers_of(uses[0])]
    for use in uses:
        part = use.used_bytes / use.memory_bytes
        filled = round(part * _BAR_WIDTH)
        bar = "█" * filled + "░" * (_BAR_WIDTH - filled)
        content += [f"{use.node}: {heads_of(use)}", f"{bar} {part:.0%}"]
    width = max(map(len, content))
    sides = [f"│ {line:<{width}} │" for line in content]
    return [f"┌{'─' * (width + 2)}┐", *sides, f"└{'─' * (width + 2)}┘"]


def _rows(boxes: Sequence[list[str]], width: int) -> Iterator[list[list[str]]]:
    row: list[list[str]] = []
    used = 0
    for box in boxes:
        wide = len(box[0]) + len(_ARROW)
        if row and used + wide > width:
            yield row
            row, used = [], 0
        row.append(box)
        used += wide
    yield row


def _side_by_side(boxes: Sequence[list[str]], *, goes_on: bool) -> list[str]:
    height = max(map(len, boxes))
    lines = []
    for line in range(height):
        between = _ARROW if line == 1 else _NO_ARROW
        parts = [box[line] if line < len(box) else " " * len(box[0]) for box in boxes]
        end = between if goes_on else ""
        lines.append((between.join(parts) + end).rstrip())
    return lines
