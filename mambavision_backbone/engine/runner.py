"""mmengine's runner with checkpoints that are read without executing them, and written whole."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

from mmengine.dist import is_main_process
from mmengine.model import is_model_wrapper
from mmengine.registry import RUNNERS
from mmengine.runner import CheckpointLoader, Runner
from mmengine.runner.checkpoint import load_state_dict

from ..checkpoint import SCHEME, WeightsError, read_checkpoint, state_dict_of

_PARTIAL = ".saving.pth"  # replaced by the next one where a process was killed while saving


@CheckpointLoader.register_scheme(SCHEME)
def load_from_mambavision(filename: str, map_location: Any = None) -> Any:
    """Let mmengine find ``mambavision://NAME`` wherever it takes a checkpoint."""
    return read_checkpoint(filename, map_location or "cpu")


@RUNNERS.register_module()
class SafeRunner(Runner):
    """mmengine's runner, safe against what a checkpoint may hold.

    mmengine unpickles checkpoints (or does so when the safe way fails), and executes the config
    text of one that is resumed from. Here they are read by ``checkpoint.read_checkpoint`` and the
    config text is dropped. ``trust_checkpoint = True`` in the config allows any pickle again.

    Checkpoints are written beside their place and moved there, so a process killed while saving
    leaves the older ones and no half of a new one.
    """

    def load_checkpoint(
        self,
        filename: str,
        map_location: Any = "cpu",
        strict: bool = False,
        revise_keys: Sequence[tuple[str, str]] = ((r"^module\.", ""),),
    ) -> dict[str, Any]:
        """Read a checkpoint into the model; see mmengine's Runner.

        Raises:
            FileNotFoundError: no such file.
            WeightsError: it is not a checkpoint, or holds more than tensors and plain data.
        """
        trust = bool(self.cfg.get("trust_checkpoint", False))
        checkpoint = dict(read_checkpoint(filename, map_location, trust=trust))
        if "state_dict" not in checkpoint:  # weights alone
            checkpoint = {"state_dict": state_dict_of(checkpoint)}
        if "meta" in checkpoint:  # resume() would execute its config
            checkpoint["meta"] = {k: v for k, v in checkpoint["meta"].items() if k != "config"}
        self.call_hook("after_load_checkpoint", checkpoint=checkpoint)
        model = self.model.module if is_model_wrapper(self.model) else self.model
        state = checkpoint["state_dict"]
        for pattern, replacement in revise_keys:
            state = {re.sub(pattern, replacement, k): v for k, v in state.items()}
        load_state_dict(model, state, strict, self.logger)
        self._has_loaded = True
        self.logger.info(f"Load checkpoint from {filename}")
        return checkpoint

    def resume(self, filename: str, *args: Any, **kwargs: Any) -> None:
        """Go on from a checkpoint; see mmengine's Runner.

        Raises:
            WeightsError: a file of weights alone, which cannot be resumed from.
        """
        try:
            super().resume(filename, *args, **kwargs)
        except KeyError as error:
            if error.args and error.args[0] in ("meta", "epoch", "iter", "message_hub"):
                raise WeightsError(
                    f"{filename!r} is no checkpoint of a training (it lacks {error}): to start "
                    "from its weights, give it as load_from without --resume"
                ) from error
            raise

    def save_checkpoint(self, out_dir: str, filename: str, *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint; see mmengine's Runner."""
        if "://" in out_dir:
            super().save_checkpoint(out_dir, filename, *args, **kwargs)
            return
        super().save_checkpoint(out_dir, _PARTIAL, *args, **kwargs)
        if is_main_process():
            os.replace(os.path.join(out_dir, _PARTIAL), os.path.join(out_dir, filename))
