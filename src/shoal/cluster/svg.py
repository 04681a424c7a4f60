"""A placement as a standalone SVG: a row for each replica, stages from left to right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from xml.sax.saxutils import escape

from shoal.cluster.drawing import heads_of, layers_of, stages_of
from shoal.cluster.proposal import NodeUse, Proposal

_STAGE_WIDTH, _NODE_HEIGHT, _GAP, _MARGIN = 230, 62, 46, 24
_HEAD_HEIGHT, _TITLE_HEIGHT, _REPLICA_GAP = 30, 74, 30
_MOST_NAME_LETTERS = 22
_GIB = 2**30

_STYLE = """
text { font-family: system-ui, 'Segoe UI', Roboto, sans-serif; font-size: 13px; fill: #1f2933 }
.title { font-size: 18px; font-weight: 600 }
.quiet { fill: #616e7c; font-size: 12px }
.layers { font-weight: 600 }
.stage { fill: #ffffff; stroke: #9aa5b1 }
.room { fill: #e4e7eb }
.weights { fill: #2680c2 }
.tables { fill: #8bc4ea }
.cache { fill: #f0b429 }
.arrow { stroke: #616e7c; stroke-width: 1.5; marker-end: url(#tip) }
"""


def as_svg(proposal: Proposal, model: str) -> str:
    """The picture as text."""
    rows = [stages_of(proposal, i) for i in range(len(proposal.placement.replicas))]
    longest = max(map(len, rows))
    width = max(640, 2 * _MARGIN + longest * _STAGE_WIDTH + (longest - 1) * _GAP)
    parts = list(_title(proposal, model))
    top = _MARGIN + _TITLE_HEIGHT
    for row in rows:
        parts += _replica(row, top)
        top += _height(row) + _REPLICA_GAP
    height = top + _MARGIN - _REPLICA_GAP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" role="img">\n'
        f"<title>{escape(model)} over {len(proposal.nodes)} nodes</title>\n"
        f"<style>{_STYLE}</style>\n"
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" '
        'markerHeight="8" orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="#616e7c"/></marker>'
        "</defs>\n"
        f'<rect width="{width}" height="{height}" fill="#f5f7fa"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _title(proposal: Proposal, model: str) -> Iterator[str]:
    made = proposal.prediction
    yield _text(_MARGIN, _MARGIN + 16, model, "title")
    yield _text(
        _MARGIN,
        _MARGIN + 38,
        f"for {proposal.goal.objective}: {made.one_stream:,.1f} tokens/s for one stream, "
        f"{made.many_streams:,.0f} for {made.num_streams} streams a replica",
    )
    left = _MARGIN
    for style, label in (("weights", "weights"), ("tables", "embedding, head"), ("cache", "cache")):
        yield _rect(left, _MARGIN + 51, 10, 10, style)
        yield _text(left + 16, _MARGIN + 60, label, "quiet")
        left += 40 + 7 * len(label)


def _replica(stages: Sequence[Sequence[NodeUse]], top: int) -> Iterator[str]:
    for place, uses in enumerate(stages):
        left = _MARGIN + place * (_STAGE_WIDTH + _GAP)
        height = _HEAD_HEIGHT + len(uses) * _NODE_HEIGHT
        yield _rect(left, top, _STAGE_WIDTH, height, "stage", radius=6)
        yield _text(left + 12, top + 20, layers_of(uses[0]), "layers")
        for rank, use in enumerate(uses):
            yield from _node(use, left + 12, top + _HEAD_HEIGHT + rank * _NODE_HEIGHT)
        if place:
            middle = top + 15
            yield (
                f'<line class="arrow" x1="{left - _GAP + 4}" y1="{middle}" '
                f'x2="{left - 4}" y2="{middle}"/>'
            )


def _node(use: NodeUse, left: int, top: int) -> Iterator[str]:
    yield _text(left, top + 12, _short(use.node))
    yield _text(left, top + 28, heads_of(use), "quiet")
    used, room = use.used_bytes / _GIB, use.memory_bytes / _GIB
    right = left + _STAGE_WIDTH - 24
    yield _text(right, top + 28, f"{used:.1f} of {room:.1f} GiB", "quiet", anchor="end")
    full = _STAGE_WIDTH - 24
    yield _rect(left, top + 36, full, 10, "room")
    start = float(left)
    for style, num_bytes in (
        ("weights", use.weight_bytes),
        ("tables", use.table_bytes),
        ("cache", use.kv_bytes),
    ):
        wide = full * num_bytes / use.memory_bytes
        yield _rect(start, top + 36, wide, 10, style)
        start += wide


def _height(stages: Sequence[Sequence[NodeUse]]) -> int:
    return _HEAD_HEIGHT + _NODE_HEIGHT * max(map(len, stages))


def _short(name: str) -> str:
    return name if len(name) <= _MOST_NAME_LETTERS else f"{name[: _MOST_NAME_LETTERS - 1]}…"


def _text(left: float, bottom: float, text: str, style: str = "", *, anchor: str = "start") -> str:
    return (
        f'<text x="{left:g}" y="{bottom:g}" class="{style}" text-anchor="{anchor}">'
        f"{escape(text)}</text>"
    )


def _rect(
    left: float, top: float, width: float, height: float, style: str, *, radius: int = 2
) -> str:
    return (
        f'<rect class="{style}" x="{left:.1f}" y="{top:g}" width="{width:.1f}" '
        f'height="{height:g}" rx="{radius}"/>'
    )
