"""One door to models: names of every kind, wrong ones, and copies in the cache."""

from __future__ import annotations

import json
from pathlib import Path

import fsspec
import huggingface_hub
import msgspec
import pytest
import torch
from gguf_samples import write_gguf
from safetensors.torch import save_file

from shoal.errors import DownloadError, SourceError
from shoal.weights import manifest
from shoal.weights.cache import cache_root
from shoal.weights.catalogue import CATALOGUE
from shoal.weights.source import open_source, resolve, terms


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    (tmp_path / "one").mkdir()
    return write_gguf(tmp_path / "one" / "m.gguf")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "hf"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({"a": torch.ones(2, 3)}, path / "model.safetensors")
    (path / "train.log").write_text("not part of the model")
    return path


def test_a_gguf_file_and_a_folder_that_holds_one(gguf_file: Path) -> None:
    for place in (gguf_file, gguf_file.parent):
        files = resolve(str(place))
        assert (files.kind, files.path) == ("gguf", gguf_file)
    assert terms(files) is None
    source = open_source(files)
    assert "model.embed_tokens.weight" in source.names()
    source.close()


def test_a_hugging_face_folder(folder: Path) -> None:
    files = resolve(str(folder))
    assert (files.kind, files.path) == ("huggingface", folder)
    assert open_source(files).names() == {"a"}


def test_a_folder_with_several_gguf_files_wants_a_choice(gguf_file: Path) -> None:
    write_gguf(gguf_file.with_name("n.gguf"))
    with pytest.raises(SourceError, match=r"2 GGUF files \(m\.gguf, n\.gguf\)"):
        resolve(str(gguf_file.parent))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("smolm2-135m", "did you mean 'smollm2-135m'"),
        ("Gemma3-270M", "did you mean 'gemma3-270m'"),
        ("zzz", "The catalogue has smollm2-135m, gemma3-270m, minilm-l6"),
        ("./nothing", "no file or folder"),
        ("nothing.gguf", r"no file or folder nothing\.gguf"),
        ("a/b/c", "there is no model 'a/b/c'"),
        ("", "there is no model ''"),
        ("nowhere://bucket/model", "nowhere"),
        ("memory://empty", "memory://empty"),
    ],
)
def test_wrong_names_are_answered(name: str, words: str) -> None:
    with pytest.raises(SourceError, match=words):
        resolve(name)


def test_files_that_are_no_models(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"")
    with pytest.raises(SourceError, match=r"not a \.gguf file"):
        resolve(str(tmp_path / "x.safetensors"))
    with pytest.raises(SourceError, match=r"neither a config\.json nor"):
        resolve(str(tmp_path))


def test_a_url_is_copied_once_with_its_sums(gguf_file: Path, own_cache: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/m.gguf", gguf_file.read_bytes())
    files = resolve("memory://bucket/m.gguf")
    assert files.kind == "gguf"
    assert files.path.is_relative_to(own_cache)
    assert files.path.read_bytes() == gguf_file.read_bytes()
    memory.rm("/bucket/m.gguf")
    assert resolve("memory://bucket/m.gguf") == files

    [(place, listed)] = manifest.list_models()
    assert listed.num_bytes == gguf_file.stat().st_size
    assert manifest.verify(place, listed) == []
    content = bytearray(files.path.read_bytes())
    content[100] ^= 1
    files.path.write_bytes(content)
    assert manifest.verify(place, listed) == ["m.gguf is not what was fetched"]
    manifest.remove(place)
    assert manifest.list_models() == []


def test_a_folder_url_brings_the_model_and_nothing_else(folder: Path) -> None:
    files = resolve(folder.as_uri())
    assert files.kind == "huggingface"
    assert open_source(files).names() == {"a"}
    assert not (files.path / "train.log").exists()


def test_a_copy_cut_short_is_not_taken_for_a_model(gguf_file: Path) -> None:
    files = resolve(gguf_file.as_uri())
    files.path.write_bytes(b"short")
    assert manifest.list_models() == []
    assert resolve(gguf_file.as_uri()).path.read_bytes() == gguf_file.read_bytes()


def test_passwords_in_urls_stay_out_of_errors() -> None:
    with pytest.raises(SourceError) as caught:
        resolve("ftp://me:secret@127.0.0.1:9/model.gguf")
    assert "secret" not in str(caught.value)


def test_the_hub_out_of_reach_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(repo_id: str, allow_patterns: list[str]) -> str:
        assert "*.safetensors" in allow_patterns
        raise ConnectionError(f"no route to {repo_id}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(DownloadError, match=r"'org/name' could not be fetched .* network"):
        resolve("org/name")


def test_the_hub_in_reach(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder))
    assert resolve("org/name").path == folder


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_root() == tmp_path / "cache" / "shoal"
    monkeypatch.delenv("SHOAL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_root() == Path("/somewhere/shoal")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_root() == Path("/home/me/.cache/shoal")


def test_a_cache_that_cannot_be_written_is_explained(
    tmp_path: Path, gguf_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "file"))
    with pytest.raises(SourceError, match="set SHOAL_CACHE"):
        resolve(gguf_file.as_uri())


def test_catalogue_entries_are_complete() -> None:
    for name, model in CATALOGUE.items():
        assert name == model.name
        assert model.num_bytes > 1_000_000
        assert model.unzip or set(model.files) == {model.main}
        for piece in (*model.pieces, *([model.terms] if model.terms else [])):
            assert len(piece.wheel.sha256) == 64
        assert all(len(sha256) == 64 for sha256 in model.files.values())
        assert model.licence == "Apache-2.0" or model.terms is not None


def test_a_damaged_manifest_says_what_to_delete(tmp_path: Path) -> None:
    (tmp_path / manifest.FILE_NAME).write_text("{")
    with pytest.raises(SourceError, match="delete"):
        manifest.read(tmp_path)


def test_model_files_are_values(folder: Path) -> None:
    files = resolve(str(folder))
    with pytest.raises(AttributeError):
        files.name = "other"
    assert msgspec.structs.replace(files, name="other").path == folder
