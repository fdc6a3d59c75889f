"""mmengine's base class and registry, or stand-ins where mmengine is not installed.

Everything registered here goes to mmengine's root registry, which mmdet and mmseg both search as
their parent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:

    class BaseModule(nn.Module):
        """What the backbone uses of mmengine's BaseModule."""

        init_cfg: Any

        def __init__(self, init_cfg: Any = None) -> None: ...
        def init_weights(self) -> None:
            """Initialise as init_cfg says."""

    def register_model(cls: type) -> type:
        """Register a class in mmengine's root registry."""

else:
    try:
        from mmengine.model import BaseModule
        from mmengine.registry import MODELS

        register_model: Callable[[type], type] = MODELS.register_module()
    except ImportError:

        class BaseModule(nn.Module):
            """The part of mmengine's BaseModule that the backbone needs."""

            def __init__(self, init_cfg: Any = None) -> None:
                super().__init__()
                self.init_cfg = init_cfg

            def init_weights(self) -> None:
                """Nothing to do: parameters are initialised when they are made."""

        def register_model(cls: type) -> type:
            """Nothing to register in."""
            return cls
