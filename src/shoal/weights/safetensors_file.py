"""A Hugging Face folder of safetensors files, one or sharded, as a tensor source."""

from __future__ import annotations

import json
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from shoal.compute.affine import Affine4
from shoal.errors import SourceError, UnsupportedModel
from shoal.weights.tensors import Extent, Layout

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_LENGTH_BYTES = 8
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")


class SafetensorsFolder:
    """A `TensorSource`. A shard is opened when the first of its tensors is asked for."""

    def __init__(self, folder: Path) -> None:
        """Raises SourceError (missing or damaged files), UnsupportedModel (quantised weights)."""
        self._folder = folder
        self.config = read_json(folder / CONFIG)
        self.bytes_read = 0
        self._counting = Lock()
        _refuse_quantised(folder, self.config)
        self._open_files: dict[str, Any] = {}
        self._file_of = self._find_tensors()

    def names(self) -> frozenset[str]:
        return frozenset(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dense(
        self, name: str, rows: slice | None = None, columns: slice | None = None
    ) -> torch.Tensor:
        part = self._slice(name)
        num_dims = len(part.get_shape())
        wanted = (rows or slice(None), columns or slice(None))[:num_dims]
        try:
            tensor: torch.Tensor = part[wanted] if wanted else self._file(name).get_tensor(name)
        except (SafetensorError, ValueError, TypeError) as error:
            raise SourceError(f"{self._folder}: cannot read tensor {name}: {error}") from error
        with self._counting:
            self.bytes_read += tensor.nbytes
        return tensor

    def affine4(
        self,
        name: str,  # noqa: ARG002
        rows: slice | None = None,  # noqa: ARG002
        columns: slice | None = None,  # noqa: ARG002
    ) -> Affine4 | None:
        """None: such a folder holds floats."""
        return None

    def layout(self) -> Layout:
        small = [name for name in (CONFIG, INDEX) if (self._folder / name).is_file()]
        opening = [Extent(name, 0, (self._folder / name).stat().st_size) for name in small]
        tensors: dict[str, Extent] = {}
        for file in sorted(set(self._file_of.values())):
            self._open(file)  # checks the header that is read below
            header, num_bytes = _read_header(self._folder / file)
            opening.append(Extent(file, 0, num_bytes))
            for name in (name for name, its_file in self._file_of.items() if its_file == file):
                if name not in header:
                    raise self._lacks(name)
                start, stop = header[name]["data_offsets"]
                tensors[name] = Extent(file, num_bytes + start, stop - start)
        return Layout(tuple(opening), tensors)

    def close(self) -> None:
        self._open_files.clear()

    def _find_tensors(self) -> dict[str, str]:
        if (self._folder / INDEX).is_file():
            file_of = read_json(self._folder / INDEX).get("weight_map")
            if not isinstance(file_of, dict) or not file_of:
                raise SourceError(f"{self._folder / INDEX} holds no weight_map: fetch it again")
            missing = sorted(
                file for file in set(file_of.values()) if not (self._folder / file).is_file()
            )
            if missing:
                raise SourceError(f"{self._folder} lacks {', '.join(missing)}: fetch them again")
            return file_of
        if not (self._folder / SINGLE).is_file():
            raise _no_weights(self._folder)
        return dict.fromkeys(self._open(SINGLE).keys(), SINGLE)

    def _file(self, name: str) -> Any:
        file = self._file_of.get(name)
        if file is None:
            raise SourceError(f"{self._folder} holds no tensor named {name}")
        return self._open(file)

    def _open(self, file: str) -> Any:
        if file not in self._open_files:
            try:
                self._open_files[file] = safe_open(self._folder / file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise SourceError(
                    f"{self._folder / file} is damaged or truncated ({error}): fetch it again"
                ) from error
        return self._open_files[file]

    def _slice(self, name: str) -> Any:
        try:
            return self._file(name).get_slice(name)
        except SafetensorError as error:
            raise self._lacks(name) from error

    def _lacks(self, name: str) -> SourceError:
        return SourceError(
            f"{self._folder / self._file_of[name]} lacks {name}, which the index names: "
            "fetch it again"
        )


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """What a safetensors file says of its tensors, and where their data begins."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    return header, _LENGTH_BYTES + length


def read_json(path: Path) -> dict[str, Any]:
    """Raises SourceError when the file is missing or is no JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SourceError(f"{path.parent} has no {path.name}: is it a model's folder?") from error
    except (OSError, ValueError) as error:
        raise SourceError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise SourceError(f"{path} must hold a JSON object")
    return value


def _refuse_quantised(folder: Path, config: dict[str, Any]) -> None:
    quantised = config.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else "?"
        raise UnsupportedModel(
            f"{folder} holds weights quantised with '{method}'; Shoal quantises by itself: "
            "use the original checkpoint, or a GGUF file"
        )


def _no_weights(folder: Path) -> SourceError:
    if any((folder / name).is_file() for name in _PICKLED):
        return SourceError(
            f"{folder} holds pickled weights (.bin) only, which can run code when read; convert "
            "them: AutoModel.from_pretrained(folder).save_pretrained(folder) in transformers"
        )
    return SourceError(f"{folder} holds neither {SINGLE} nor {INDEX}")
