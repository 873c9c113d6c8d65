"""For apps of coordinators before 0.2, which import two names from here; nothing else may (docs/decisions/0110)."""

from fl_shared.adapters.safetensors import MAX_BYTES, digest

__all__ = ["MAX_BYTES", "digest"]
