"""A node without the files gets its shard's tensors from the head: those, once, and checked."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
import torch
from shared_models import ALL, DIMS, FIRST_HALF, SECOND_HALF, Head, head_of, make_model

from shoal.compute.linear import Scheme
from shoal.errors import DownloadError, InternalError, PeerLost, SourceError
from shoal.models.config import decoder_config
from shoal.parallel.channel import Channel
from shoal.parallel.communicator import Solo
from shoal.parallel.partition import Dims, Shard, Span, shards_of
from shoal.weights import provider, shared_build
from shoal.weights.fetch_shard import fetch_shard
from shoal.weights.loader import load_decoder
from shoal.weights.needed import needed_tensors
from shoal.weights.provider import WeightsProvider
from shoal.weights.shared_build import hashed_model, model_folder
from shoal.weights.shared_index import SharedExtent, SharedFile, SharedIndex
from shoal.weights.shared_messages import AskExtents, AskIndex
from shoal.weights.source import ModelFiles, open_source, resolve


class Cut(Exception):
    """Stands for a worker that is killed."""


@pytest.fixture
def model(tmp_path: Path) -> ModelFiles:
    return make_model("single", tmp_path / "model")


@pytest.fixture
def head(model: ModelFiles, tmp_path: Path) -> Iterator[Head]:
    with head_of(model, tmp_path / "head") as head:
        yield head
    assert not [t for t in threading.enumerate() if t.name.startswith("shoal-")]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "worker"


def needed_bytes(files: ModelFiles, shard: Shard) -> int:
    with closing(open_source(files)) as source:
        tensors = source.layout().tensors
        return sum(tensors[name].num_bytes for name in needed_tensors(source, shard))


def opening_bytes(files: ModelFiles) -> int:
    with closing(open_source(files)) as source:
        return sum(extent.num_bytes for extent in source.layout().opening)


def tensor_place(files: ModelFiles, name: str) -> tuple[Path, int]:
    """The file that holds a tensor, and where in it."""
    with closing(open_source(files)) as source:
        extent = source.layout().tensors[name]
    return model_folder(files) / extent.file, extent.offset


def overwrite(path: Path, offset: int, new: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(new)


def disk_bytes(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def assert_same_tensors(copy: ModelFiles, original: ModelFiles, shard: Shard) -> None:
    with closing(open_source(copy)) as ours, closing(open_source(original)) as theirs:
        assert ours.config == theirs.config
        names = needed_tensors(theirs, shard)
        assert names == needed_tensors(ours, shard)
        assert all(torch.equal(ours.dense(name), theirs.dense(name)) for name in names)


@pytest.mark.parametrize("layout", ["gguf", "single", "sharded"])
def test_only_the_shards_tensors_travel_and_they_load(
    layout: str, tmp_path: Path, cache: Path
) -> None:
    model = make_model(layout, tmp_path / "model")
    total_bytes = sum(path.stat().st_size for path in model_folder(model).iterdir())
    with head_of(model, tmp_path / "head") as head:
        copy = head.fetch(FIRST_HALF, cache)
        wanted = needed_bytes(model, FIRST_HALF)
        # The header and the index are a dozen KB each.
        assert wanted < head.sent_bytes < wanted + 50_000 < 0.75 * total_bytes
        assert disk_bytes(model_folder(copy)) < 0.75 * total_bytes
        assert_same_tensors(copy, model, FIRST_HALF)
        with closing(open_source(copy)) as source:
            load_decoder(source, FIRST_HALF, scheme=Scheme(), communicator=Solo())


def test_a_second_start_transfers_nothing(head: Head, cache: Path) -> None:
    head.fetch(FIRST_HALF, cache)
    before = head.sent_messages
    copy = head.fetch(FIRST_HALF, cache)
    assert head.sent_messages == before + 1  # the index
    assert copy.path.is_relative_to(cache)


def test_another_shard_adds_what_lacks(head: Head, model: ModelFiles, cache: Path) -> None:
    head.fetch(FIRST_HALF, cache)
    before = head.sent_bytes
    copy = head.fetch(ALL, cache)
    added = needed_bytes(model, ALL) - needed_bytes(model, FIRST_HALF)
    assert added < head.sent_bytes - before < added + 20_000
    assert_same_tensors(copy, model, ALL)


def test_damage_is_noticed_and_mended(head: Head, model: ModelFiles, cache: Path) -> None:
    copy = head.fetch(FIRST_HALF, cache)
    path, offset = tensor_place(copy, "model.layers.1.self_attn.q_proj.weight")
    overwrite(path, offset + 100, b"damage")
    overwrite(path, 0, b"\xff" * 16)
    before = head.sent_bytes
    copy = head.fetch(FIRST_HALF, cache)
    assert 256 * 256 * 2 < head.sent_bytes - before < 256 * 256 * 2 + 30_000
    assert_same_tensors(copy, model, FIRST_HALF)


def test_a_copy_cut_off_or_emptied_is_mended(head: Head, model: ModelFiles, cache: Path) -> None:
    copy = head.fetch(ALL, cache)
    os.truncate(copy.path / "model.safetensors", 100_000)
    (copy.path / "config.json").write_text("")
    assert_same_tensors(head.fetch(ALL, cache), model, ALL)


@pytest.mark.parametrize("max_extent_bytes", [1 << 24, 50_000])
def test_what_was_cut_short_goes_on(
    max_extent_bytes: int,
    head: Head,
    model: ModelFiles,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shared_build, "MAX_EXTENT_BYTES", max_extent_bytes)

    def cut(what: str, done_bytes: int, total_bytes: int | None) -> None:
        if "fetching" in what and total_bytes and done_bytes > 500_000:
            raise Cut

    with pytest.raises(Cut):
        head.fetch(ALL, cache, report=cut)
    seen: list[int | None] = []
    copy = head.fetch(ALL, cache, report=lambda _what, _done, total: seen.append(total))
    assert_same_tensors(copy, model, ALL)
    left = seen[-1]
    assert left is not None
    largest_bytes = min(max_extent_bytes, 512 * 256 * 2)
    assert left <= needed_bytes(model, ALL) - 500_000 + largest_bytes


def test_progress_ends_at_its_total(head: Head, model: ModelFiles, cache: Path) -> None:
    seen: list[tuple[str, int, int | None]] = []
    head.fetch(ALL, cache, report=lambda *progress: seen.append(progress))
    what, done_bytes, total_bytes = seen[-1]
    assert what == f"fetching {model.name} from the head"
    assert done_bytes == total_bytes == needed_bytes(model, ALL)


def test_workers_of_one_node_fetch_once(head: Head, model: ModelFiles, cache: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        copies = list(pool.map(lambda _: head.fetch(FIRST_HALF, cache), range(3)))
    assert len({copy.path for copy in copies}) == 1
    assert head.sent_bytes < needed_bytes(model, FIRST_HALF) + 3 * 30_000


def test_bytes_that_are_not_those_of_the_index_are_refused(
    head: Head, model: ModelFiles, cache: Path
) -> None:
    head.fetch(FIRST_HALF, cache)
    path, offset = tensor_place(model, "model.layers.3.mlp.up_proj.weight")
    state, right = path.stat(), path.read_bytes()
    overwrite(path, offset, b"wrong!")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    with pytest.raises(DownloadError, match=r"head sent wrong bytes .* SHA-256"):
        head.fetch(SECOND_HALF, cache)
    path.write_bytes(right)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert_same_tensors(head.fetch(SECOND_HALF, cache), model, SECOND_HALF)


def test_files_that_change_under_the_head(head: Head, model: ModelFiles, cache: Path) -> None:
    head.fetch(FIRST_HALF, cache)
    os.utime(model.path / "model.safetensors", ns=(0, 0))
    with pytest.raises(DownloadError, match="changed while in use: restart the head"):
        head.fetch(SECOND_HALF, cache)


def test_a_head_whose_model_is_damaged_says_so(head: Head, model: ModelFiles, cache: Path) -> None:
    os.truncate(model.path / "model.safetensors", 1000)
    with pytest.raises(DownloadError, match="damaged or truncated"):
        head.fetch(ALL, cache)


def test_a_tensor_that_was_not_fetched_is_not_read_as_zeros(head: Head, cache: Path) -> None:
    with closing(open_source(head.fetch(FIRST_HALF, cache))) as source:
        with pytest.raises(InternalError, match="not fetched"):
            source.dense("lm_head.weight")
        with pytest.raises(SourceError, match="no tensor named x"):
            source.dense("x")


def test_ranks_of_a_stage_need_the_same_tensors(model: ModelFiles) -> None:
    ranks = shards_of(DIMS, FIRST_HALF.layers, [2.0, 1.0])
    with closing(open_source(model)) as source:
        assert {needed_tensors(source, rank) for rank in ranks} == {
            needed_tensors(source, FIRST_HALF)
        }


def test_a_worker_hears_that_the_head_is_hashing(
    model: ModelFiles, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provider, "_KEEPALIVE_S", 0.01)
    heard = threading.Event()

    def hash_slowly(*_: object) -> None:
        assert heard.wait(timeout=5)

    head = Head(WeightsProvider(model, tmp_path / "head", hash_slowly))
    with closing(head):
        head.fetch(ALL, cache, report=lambda what, *_: "hash" in what and heard.set())


def test_closing_breaks_off_the_hashing(model: ModelFiles, tmp_path: Path, cache: Path) -> None:
    hashing, closed = threading.Event(), threading.Event()

    def stand_still(*_: object) -> None:
        hashing.set()
        assert closed.wait(timeout=5)

    head = Head(WeightsProvider(model, tmp_path / "head", stand_still))
    with ThreadPoolExecutor(2) as pool:
        fetching = pool.submit(head.fetch, ALL, cache)
        assert hashing.wait(timeout=5)
        closing_head = pool.submit(head.provider.close)
        while not head.provider._digests._is_closed:
            time.sleep(0.001)
        closed.set()
        closing_head.result(timeout=5)
        with pytest.raises(DownloadError, match="stopping"):
            fetching.result(timeout=5)
    head.close()
    assert not list((tmp_path / "head" / "digests").glob("*.json"))


def test_a_silent_head_is_given_up(cache: Path) -> None:
    ends = [socket.socketpair() for _ in range(2)]
    channels = [Channel(end, "head") for end, _ in ends]
    with pytest.raises(PeerLost):
        fetch_shard(*channels, ALL, cache, timeout_s=0.05)
    for channel in channels:
        channel.close()
    for _, end in ends:
        end.close()


@pytest.mark.parametrize(
    "request_bytes",
    [
        msgspec.msgpack.encode(AskExtents(extents=(0, 10_000))),
        msgspec.msgpack.encode(AskExtents(extents=(-1,))),
        msgspec.msgpack.encode({"type": "ask-file", "path": "/etc/passwd"}),
        b"\xc1garbage",
    ],
)
def test_a_request_for_anything_else_ends_the_connection(head: Head, request_bytes: bytes) -> None:
    down, up = head.call()
    up.send(request_bytes)
    header, body = down.receive(timeout_s=5)
    assert msgspec.msgpack.decode(header)["type"] == "refused"
    assert not body
    with pytest.raises(PeerLost):
        down.receive(timeout_s=5)
    others = head.call()
    others[1].send(msgspec.msgpack.encode(AskIndex()))
    assert msgspec.msgpack.decode(others[0].receive(timeout_s=5)[0])["type"] == "index"
    for channel in (down, up, *others):
        channel.close()


@pytest.mark.parametrize(
    "name", ["../x", "/x", "a/../../x", "", ".", "..", "a//b", "./a", "a\\..\\b", "a\0b", "a\nb"]
)
def test_a_name_that_leaves_the_folder_is_refused(name: str) -> None:
    index = SharedIndex(kind="huggingface", main=".", files=(), extents=(), opening=(), tensors={})
    wire = msgspec.to_builtins(index) | {"files": [{"name": name, "num_bytes": 1}]}
    with pytest.raises(SourceError, match="folder"):
        msgspec.msgpack.decode(msgspec.msgpack.encode(wire), type=SharedIndex)


def test_a_link_in_the_copy_is_not_followed(head: Head, cache: Path, tmp_path: Path) -> None:
    copy = head.fetch(FIRST_HALF, cache)
    outside = tmp_path / "outside"
    outside.write_text("precious")
    (copy.path / "model.safetensors").unlink()
    (copy.path / "model.safetensors").symlink_to(outside)
    with pytest.raises(SourceError, match="cannot be written"):
        head.fetch(FIRST_HALF, cache)
    assert outside.read_text() == "precious"


@pytest.mark.parametrize(
    ("extent", "tensors", "main"),
    [
        (SharedExtent(0, 8, 3, "0" * 64), {}, "."),
        (SharedExtent(0, -1, 3, "0" * 64), {}, "."),
        (SharedExtent(1, 0, 3, "0" * 64), {}, "."),
        (SharedExtent(0, 0, 3, "0"), {}, "."),
        (SharedExtent(0, 0, 3, "0" * 64), {"a": (0, 1)}, "."),
        (SharedExtent(0, 0, 3, "0" * 64), {}, "other"),
    ],
)
def test_an_index_that_contradicts_itself(
    extent: SharedExtent, tensors: dict[str, tuple[int, ...]], main: str
) -> None:
    with pytest.raises(SourceError, match="index"):
        SharedIndex(
            kind="huggingface",
            main=main,
            files=(SharedFile("m", 10),),
            extents=(extent,),
            opening=(0,),
            tensors=tensors,
        )


def test_files_are_hashed_once_until_they_change(model: ModelFiles, tmp_path: Path) -> None:
    def fail(*_: object) -> None:
        raise Cut

    first = hashed_model(model, tmp_path)
    assert hashed_model(model, tmp_path, fail) == first
    os.utime(model.path / "config.json", ns=(0, 0))
    with pytest.raises(Cut):
        hashed_model(model, tmp_path, fail)
    record = next((tmp_path / "digests").glob("*.json"))
    record.write_bytes(b"{")
    assert hashed_model(model, tmp_path).index == first.index


def test_what_the_copy_holds_is_private(head: Head, cache: Path) -> None:
    copy = head.fetch(FIRST_HALF, cache)
    assert copy.path.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in copy.path.iterdir()} == {0o600}


@pytest.mark.slow
def test_half_of_a_real_model(tmp_path: Path) -> None:
    """SmolLM2's first 15 of 30 layers and its embedding."""
    model = resolve("smollm2-135m")
    with closing(open_source(model)) as source:
        config = decoder_config(source.config)
    dims = Dims(
        num_layers=config.num_layers,
        num_query_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        num_mlp_columns=config.mlp_size,
        vocab_size=config.vocab_size,
    )
    half, quarter = config.num_layers // 2, config.num_layers // 4
    seconds = []
    with head_of(model, tmp_path / "head") as head:
        for layers in (Span(0, half), Span(0, half), Span(quarter, quarter + half)):
            shard = shards_of(dims, layers, [1.0])[0]
            before, start_s = head.sent_bytes, time.monotonic()
            copy = head.fetch(shard, tmp_path / f"worker-{layers.start}")
            seconds.append(time.monotonic() - start_s)
            print(
                f"layers {layers.start} to {layers.stop}: sent {head.sent_bytes - before:,} of "
                f"{model.path.stat().st_size:,} bytes in {seconds[-1]:.2f} s; "
                f"{disk_bytes(copy.path.parent):,} on disk"
            )
            assert_same_tensors(copy, model, shard)
        wanted = needed_bytes(model, shard) + opening_bytes(model)
    assert wanted < head.sent_bytes - before < wanted + 200_000
    assert disk_bytes(copy.path.parent) < wanted + 1_000_000
