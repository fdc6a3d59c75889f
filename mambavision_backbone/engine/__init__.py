"""What plugs into mmengine's runner."""

from .hooks import CheckBackboneWeightsHook, NameBadSampleHook

__all__ = ["CheckBackboneWeightsHook", "NameBadSampleHook"]
