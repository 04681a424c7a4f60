"""From a checkpoint's configuration to the family that can run it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from shoal.errors import UnsupportedModel
from shoal.models.families import (
    ENCODER_ARCHITECTURES,
    ENCODER_MODEL_TYPES,
    FAMILIES,
    Family,
)

ModelKind = Literal["decoder", "encoder"]


def model_kind(config: Mapping[str, Any]) -> ModelKind:
    """Whether the checkpoint generates text or encodes it. Raises UnsupportedModel."""
    if _matches(config, ENCODER_MODEL_TYPES, ENCODER_ARCHITECTURES):
        return "encoder"
    find_family(config)
    return "decoder"


def find_family(config: Mapping[str, Any]) -> Family:
    """The decoder family of a Hugging Face style configuration. Raises UnsupportedModel."""
    for family in FAMILIES:
        if _matches(config, family.model_types, family.architectures):
            return family
    raise UnsupportedModel(
        f"{_described(config)} is not supported. Supported are {', '.join(supported())}"
    )


def supported() -> list[str]:
    """Every supported architecture, by its Hugging Face name."""
    decoders = [name for family in FAMILIES for name in family.architectures]
    return [*decoders, *ENCODER_ARCHITECTURES]


def _matches(
    config: Mapping[str, Any], model_types: tuple[str, ...], architectures: tuple[str, ...]
) -> bool:
    named = config.get("architectures") or []
    model_type = config.get("model_type")
    # A classifier shares its family's model_type; only the architecture tells them apart.
    if named and not set(named) & set(architectures):
        return False
    return model_type in model_types if model_type else bool(named)


def _described(config: Mapping[str, Any]) -> str:
    named = config.get("architectures") or []
    model_type = config.get("model_type")
    if not named and not model_type:
        return "a configuration with neither 'architectures' nor 'model_type'"
    return f"architecture {', '.join(named) or 'unnamed'} (model_type {model_type or 'unnamed'})"
