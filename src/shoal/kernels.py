"""The native kernels of csrc/, or None where nobody could build them."""

from __future__ import annotations

try:
    import shoal_kernels as kernels
except ImportError:
    kernels = None

__all__ = ["kernels"]
