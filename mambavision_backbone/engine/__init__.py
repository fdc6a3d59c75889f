"""What plugs into mmengine's runner."""

from .hooks import CheckBackboneWeightsHook, NameBadSampleHook
from .pickles import admit_history

admit_history()

__all__ = ["CheckBackboneWeightsHook", "NameBadSampleHook"]
