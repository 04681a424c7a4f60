"""`shoal plan`: what it prints, draws and refuses; and what a model costs by its header."""

from __future__ import annotations

from math import prod
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest
import torch
from planner_samples import node, small_model
from typer.testing import CliRunner, Result

from shoal.cli import plan
from shoal.cli.app import app
from shoal.cluster.cluster_file import decode_cluster
from shoal.cluster.drawing import draw
from shoal.cluster.goal import Goal
from shoal.cluster.hardware import Cluster
from shoal.cluster.planner import propose
from shoal.cluster.proposal import Proposal
from shoal.cluster.svg import as_svg
from shoal.compute import native
from shoal.compute.linear import Scheme
from shoal.errors import ConfigError, PlacementError
from shoal.fleet.costing import cost_of
from shoal.models.config import decoder_config
from shoal.parallel.partition import whole_shard
from shoal.weights.model_cost import model_cost
from shoal.weights.source import open_source, resolve

EXAMPLE = Path(__file__).parents[2] / "examples" / "cluster.json"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_cost", lambda *_, **__: small_model())


def run(*arguments: str) -> Result:
    environment = {"COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"}
    return CliRunner().invoke(app, ["plan", "small", *arguments], env=environment)


def two_stages() -> Proposal:
    nodes = (node("left", 1e9, 12), node("<right> & co", 2e9, 14))
    return propose(Cluster(nodes=nodes), small_model(), Goal(objective="throughput", kv_tokens=1))


def changed_example(tmp_path: Path, old: str, new: str) -> str:
    path = tmp_path / "cluster.json"
    path.write_text(EXAMPLE.read_text().replace(old, new, 1))
    return str(path)


def test_the_example_is_planned_and_explained() -> None:
    result = run("--cluster", str(EXAMPLE), "--objective", "latency")
    assert result.exit_code == 0, result.output
    for said in ("layers 0–7", "desktop", "tokens/s for one stream", "why", "not chosen"):
        assert said in result.stdout
    assert "node old-box: left out: it would slow the rest by" in result.stdout
    assert "every placement was looked at" in result.stdout


def test_json_is_the_proposal_itself() -> None:
    result = run(
        "--cluster", str(EXAMPLE), "--objective", "throughput", "--context", "77", "--json"
    )
    proposal = msgspec.json.decode(result.stdout, type=Proposal)
    assert proposal.goal == Goal(objective="throughput", kv_tokens=77)
    assert [use.node for use in proposal.nodes][:2] == ["desktop", "laptop"]
    assert len(result.stdout.splitlines()) == 1


def test_the_drawing_is_a_file_that_browsers_read(tmp_path: Path) -> None:
    path = tmp_path / "plan.svg"
    result = run("--cluster", str(EXAMPLE), "--svg", str(path))
    assert result.exit_code == 0
    assert ElementTree.parse(path).getroot().tag == f"{SVG}svg"
    assert str(path) in result.stderr
    refused = run("--cluster", str(EXAMPLE), "--svg", str(tmp_path / "no" / "plan.svg"))
    assert refused.exit_code == 1 and "cannot write" in refused.stderr


def test_what_does_not_fit_is_one_red_line() -> None:
    result = run("--cluster", str(EXAMPLE), "--context", "9000000")
    assert result.exit_code == 1
    assert "The 3 nodes offer 18.12 GiB" in result.stderr


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            '"memory_bytes": 6442450944',
            '"memory_bytes": "6 GB"',
            "nodes[1].memory_bytes` (node lap",
        ),
        (
            '"memory_bytes": 6442450944',
            '"memory_bytes": 0',
            "node laptop: memory_bytes must be pos",
        ),
        ('"laptop",', '"desktop",', "2 nodes are named 'desktop'"),
        ('"target": "laptop"', '"target": "tablet"', "there is no node 'tablet'"),
        ('"rows": 4', '"rows": 40', "node desktop: rows of matrix_rates.auto must rise"),
        ('"num_cores"', '"cores"', "unknown field `cores`"),
        ("12500000000", "-1", "node laptop: matrix_rates.auto.weights_per_s must be positive"),
        ("0.0004", "-0.1", "node old-box: layer_overhead_s must be 0 or more"),
        ("{", "[", "is no cluster file"),
    ],
)
def test_a_wrong_cluster_file_says_where(old: str, new: str, said: str, tmp_path: Path) -> None:
    result = run("--cluster", changed_example(tmp_path, old, new))
    assert result.exit_code == 1
    assert said in result.stderr
    assert "cluster.json" in result.stderr


def test_a_cluster_file_needs_nodes() -> None:
    with pytest.raises(ConfigError, match="no nodes"):
        decode_cluster(b'{"nodes": []}', "x.json")


# ---- drawings ------------------------------------------------------------------------------


def test_stages_stand_side_by_side_where_there_is_room() -> None:
    proposal = two_stages()
    wide, narrow = draw(proposal, 120), draw(proposal, 30)
    assert any("left" in line and "<right> & co" in line for line in wide)
    assert not any("left" in line and "<right> & co" in line for line in narrow)
    arrows = [line.count("─▶") for line in (*wide, *narrow)]
    assert sum(arrows) == 2 and max(arrows) == 1
    assert len({len(line) for line in wide if "┌" in line or "└" in line}) == 1


def test_the_svg_holds_every_node_and_its_memory_to_scale() -> None:
    proposal = two_stages()
    root = ElementTree.fromstring(as_svg(proposal, "a <model>"))
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert {"left", "<right> & co", "a <model>"} <= set(texts)
    bars = [rect for rect in root.iter(f"{SVG}rect") if rect.get("height") == "10"]
    rooms = [float(bar.get("width", 0)) for bar in bars if bar.get("class") == "room"]
    weights = [float(bar.get("width", 0)) for bar in bars if bar.get("class") == "weights"][1:]
    for room, weight, use in zip(rooms, weights, proposal.nodes, strict=True):
        assert weight / room == pytest.approx(use.weight_bytes / use.memory_bytes, abs=0.01)
    assert len(list(root.iter(f"{SVG}line"))) == 1


# ---- what a model costs --------------------------------------------------------------------

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "vocab_size": 100,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize(
    ("scheme", "in_4_bits", "bytes_per_weight", "tables_bytes"),
    [
        (Scheme(), False, 4, 4),
        (Scheme(dtype=torch.bfloat16), False, 2, 2),
        (Scheme(many="float16", few="as_stored", few_rows=3), True, 2 + 0.625, 2 + 3),
        (Scheme(many="float16", few="as_stored", few_rows=3), False, 3, 2 + 3),
        (Scheme(many="int8", few="int8", few_rows=1), False, 2, 2 + 2),
        (Scheme(many="int8", few="int4", few_rows=3), False, 1 + 0.625, 2 + 2),
    ],
)
@pytest.mark.parametrize(
    ("kv_dtype", "head_bytes"), [(torch.float32, 64), (torch.float16, 32), (torch.int8, 18)]
)
def test_a_model_costs_what_its_scheme_holds(
    scheme: Scheme,
    in_4_bits: bool,
    bytes_per_weight: float,
    tables_bytes: float,
    kv_dtype: torch.dtype,
    head_bytes: int,
) -> None:
    config = decoder_config(CONFIG)
    cost = model_cost(config, scheme, kv_dtype, name="m", precision="auto", in_4_bits=in_4_bits)
    whole = whole_shard(cost.dims).slice
    # QKV, output, gate and up, down.
    weights = 64 * (64 + 32 + 32) + 64 * 64 + 64 * 192 + 96 * 64
    assert cost.layer_weights(whole) == weights
    kv_bytes = 2 * 2 * head_bytes
    assert cost.layer_bytes(whole, 10) == weights * bytes_per_weight + 10 * kv_bytes
    held = cost.table_bytes(whole, is_first=True, is_last=True)
    assert held == 100 * 64 * tables_bytes


@pytest.mark.slow
def test_the_header_of_a_real_model_is_enough() -> None:
    files = resolve("smollm2-135m")
    source = open_source(files)
    names = [name for name in source.names() if "_proj" in name]
    elements = sum(prod(source.shape(name)) for name in names)
    cost = cost_of(files, "auto", "auto")
    assert 30 * cost.layer_weights(whole_shard(cost.dims).slice) == elements
    assert cost.weight_bytes == (0.625 if native.is_available() else 2 + 0.625)
    with pytest.raises(PlacementError, match="is an encoder"):
        cost_of(resolve("minilm-l6"), "auto", "auto")
