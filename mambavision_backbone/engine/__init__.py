"""What plugs into mmengine's runner."""

from .hooks import (
    BFloat16DetectionHook,
    CheckBackboneWeightsHook,
    FastInferenceHook,
    NameBadSampleHook,
)
from .optim import LayerDecayOptimWrapperConstructor
from .pickles import admit_history
from .runner import SafeRunner

admit_history()

__all__ = [
    "BFloat16DetectionHook",
    "CheckBackboneWeightsHook",
    "FastInferenceHook",
    "LayerDecayOptimWrapperConstructor",
    "NameBadSampleHook",
    "SafeRunner",
]
