"""What `shoal models` shows: the catalogue and what the cache holds, as values."""

from __future__ import annotations

from pathlib import Path

import msgspec

from shoal.weights.catalogue import CATALOGUE
from shoal.weights.manifest import list_models


class StoredModel(msgspec.Struct, frozen=True, kw_only=True):
    """`num_bytes` is what lies on disk, or what there is to fetch while `path` is None."""

    name: str
    num_bytes: int
    licence: str
    description: str
    path: str | None


def known_models() -> list[StoredModel]:
    """The catalogue's models in its order, then whatever else the cache holds, by name."""
    cached = {manifest.name: (folder, manifest) for folder, manifest in list_models()}
    known = []
    for model in CATALOGUE.values():
        entry = cached.pop(model.name, None)
        known.append(
            StoredModel(
                name=model.name,
                num_bytes=entry[1].num_bytes if entry else model.num_bytes,
                licence=model.licence,
                description=model.description,
                path=str(entry[0] / entry[1].main) if entry else None,
            )
        )
    known += [
        StoredModel(
            name=name,
            num_bytes=manifest.num_bytes,
            licence=manifest.licence,
            description=f"fetched from {manifest.source}",
            path=str(folder / manifest.main),
        )
        for name, (folder, manifest) in cached.items()
    ]
    return known


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(entry.stat().st_size for entry in path.rglob("*") if entry.is_file())
