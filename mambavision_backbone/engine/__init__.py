"""What plugs into mmengine's runner."""

from .hooks import (
    BFloat16DetectionHook,
    CheckBackboneWeightsHook,
    FastInferenceHook,
    NameBadSampleHook,
)
from .pickles import admit_history

admit_history()

__all__ = [
    "BFloat16DetectionHook",
    "CheckBackboneWeightsHook",
    "FastInferenceHook",
    "NameBadSampleHook",
]
