"""MambaVision for dense prediction: a multi-scale backbone for mmdet and mmseg.

Importing the package registers ``MambaVision`` and ``MM_mamba_vision`` in mmengine's root registry,
where mmdet and mmseg find them.
"""

from importlib.util import find_spec

from .backbone import MambaVision
from .published import MM_mamba_vision
from .variants import VARIANTS, Arch
from .version import __version__

if find_spec("mmengine"):
    from . import engine  # noqa: F401 (registers the hooks)

__all__ = ["VARIANTS", "Arch", "MM_mamba_vision", "MambaVision", "__version__"]
