"""The same weights for engines that want them in other blocks: a GGUF file, rounded again."""

from __future__ import annotations

import subprocess
from pathlib import Path

import gguf

from bench.peers.process import ROOT
from shoal.weights.cache import locked

AS_SHIPPED = "as shipped"


def in_blocks(path: Path, kind: str, folder: Path) -> Path:
    """The file itself, or one in `folder` whose matrices are all blocks of `kind` (Q8_0, Q4_0).

    Raises RuntimeError for a kind that cannot be written.
    """
    if kind == AS_SHIPPED:
        return path
    target = folder / f"{path.stem}.as-{kind}.gguf"
    with locked(folder / f"{target.name}.lock"):
        if not target.is_file():
            part = target.with_suffix(".part")
            write(path, part, kind)
            part.replace(target)
    return target


def as_folder(path: Path, folder: Path, python: Path) -> Path:
    """The file's values in float32, as transformers writes them. Raises RuntimeError."""
    target = folder / f"{path.stem}.float32"
    with locked(folder / f"{target.name}.lock"):
        if not (target / "tokenizer.json").is_file():
            command = [str(python), "-m", "bench.peers.write_folder", str(path), str(target)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return target


def write(path: Path, target: Path, kind: str) -> None:
    blocks = _blocks(kind)
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    _copy_metadata(reader, writer)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    for tensor in reader.tensors:
        if tensor.tensor_type == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(tensor.name, tensor.data)
            continue
        dense = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, gguf.quants.quantize(dense, blocks), raw_dtype=blocks)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def described(path: Path) -> str:
    """Which types a file's matrices have, the most elements first: `Q4_1 and Q8_0`."""
    elements: dict[str, int] = {}
    for tensor in gguf.GGUFReader(path).tensors:
        if len(tensor.shape) > 1:
            name = tensor.tensor_type.name
            elements[name] = elements.get(name, 0) + int(tensor.n_elements)
    return " and ".join(sorted(elements, key=lambda name: -elements[name]))


def _copy_metadata(reader: gguf.GGUFReader, writer: gguf.GGUFWriter) -> None:
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in (
            "general.architecture",
            "general.file_type",
        ):
            continue
        is_array = field.types[0] == gguf.GGUFValueType.ARRAY
        inside = field.types[-1] if is_array else None
        writer.add_key_value(field.name, field.contents(), field.types[0], inside)


def _blocks(kind: str) -> gguf.GGMLQuantizationType:
    if kind not in ("Q8_0", "Q4_0", "Q4_1", "F16"):
        raise RuntimeError(f"weights can be written as Q8_0, Q4_0, Q4_1 or F16, not as '{kind}'")
    return gguf.GGMLQuantizationType[kind]
