"""Whether a model's files are those they were, without reading them."""

from __future__ import annotations

from pathlib import Path

from shoal.errors import SourceError


def stamp_of(path: Path) -> str:
    """Names, sizes and times of the .gguf file, or of all files in the folder. SourceError."""
    try:
        files = [path] if path.is_file() else sorted(each for each in path.iterdir())
        stats = [(file.name, file.stat()) for file in files]
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error
    return ";".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats)
