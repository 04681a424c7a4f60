"""What a worker draws for a chunk, of an imaginary model."""

from __future__ import annotations

from collections.abc import Callable

from shoal.messages import Chunk


def drawn(chunk: Chunk, draw: Callable[[list[int]], int]) -> list[int]:
    """`draw` gives the token after a context, of which it sees the chunk's part."""
    if chunk.sampling is None:
        return []
    num_known = len(chunk.tokens) - chunk.num_drafted
    tokens: list[int] = []
    for number in range(num_known, len(chunk.tokens) + 1):
        tokens.append(draw(chunk.tokens[:number]))
        if tokens != chunk.tokens[num_known : num_known + len(tokens)]:
            break
    return tokens
