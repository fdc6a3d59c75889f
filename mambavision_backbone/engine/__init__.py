"""What plugs into mmengine's runner."""

from .hooks import (
    BFloat16DetectionHook,
    CheckBackboneWeightsHook,
    FastInferenceHook,
    NameBadSampleHook,
)
from .log import forward_to_mmengine
from .optim import LayerDecayOptimWrapperConstructor
from .pickles import admit_history
from .runner import SafeRunner

admit_history()
forward_to_mmengine()

__all__ = [
    "BFloat16DetectionHook",
    "CheckBackboneWeightsHook",
    "FastInferenceHook",
    "LayerDecayOptimWrapperConstructor",
    "NameBadSampleHook",
    "SafeRunner",
]
