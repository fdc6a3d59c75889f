"""mmengine's runner with checkpoints that are read without executing them, and written whole."""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.model import is_model_wrapper
from mmengine.registry import RUNNERS
from mmengine.runner import CheckpointLoader, Runner
from mmengine.runner.checkpoint import load_state_dict

from ..checkpoint import SCHEME, WeightsError, read_checkpoint, state_dict_of


@CheckpointLoader.register_scheme(SCHEME)
def load_from_mambavision(filename: str, map_location: Any = None) -> Any:
    """Let mmengine find ``mambavision://NAME`` wherever it takes a checkpoint."""
    return read_checkpoint(filename, map_location or "cpu")


@RUNNERS.register_module()
class SafeRunner(Runner):
    """mmengine's runner, safe against what a checkpoint may hold.

    mmengine unpickles checkpoints (or does so when the safe way fails), and when it resumes it
    executes the config text of one and deletes the file that one names as its best. Here they are
    read by ``checkpoint.read_checkpoint``, the config text is dropped, and only files of this run's
    work folder are taken over as its own.

    Checkpoints are written beside their place and moved there, so a process killed while saving
    leaves no half of one.

    Attributes:
        trust_checkpoint: unpickle whatever a checkpoint holds; see docs/security.md.
    """

    trust_checkpoint = False

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
        checkpoint = dict(read_checkpoint(filename, map_location, trust=self.trust_checkpoint))
        if "state_dict" not in checkpoint:  # weights alone
            checkpoint = {"state_dict": state_dict_of(checkpoint)}
        for part, cleaned in (
            ("meta", self._without_config),
            ("message_hub", self._without_foreign_files),
        ):
            if isinstance(checkpoint.get(part), dict):
                checkpoint[part] = cleaned(checkpoint[part])
        self.call_hook("after_load_checkpoint", checkpoint=checkpoint)
        model = self.model.module if is_model_wrapper(self.model) else self.model
        old = checkpoint["state_dict"]
        state = OrderedDict(old)
        for pattern, replacement in revise_keys:
            state = OrderedDict((re.sub(pattern, replacement, k), v) for k, v in state.items())
        state._metadata = getattr(old, "_metadata", OrderedDict())  # type: ignore[attr-defined]
        load_state_dict(model, state, strict, self.logger)
        self._has_loaded = True
        self.logger.info(f"Load checkpoint from {filename}")
        return checkpoint

    @staticmethod
    def _without_config(meta: dict[str, Any]) -> dict[str, Any]:
        """The facts but the config text, which resume() would execute."""
        return {k: v for k, v in meta.items() if k != "config"}

    def _without_foreign_files(self, messages: dict[str, Any]) -> dict[str, Any]:
        """The notes but those on files outside the work folder, which CheckpointHook deletes."""
        home = Path(self.work_dir).resolve()

        def own(key: str, value: Any) -> bool:
            if key == "keep_ckpt_ids":
                return all(type(step) is int for step in value)
            if not key.startswith(("best_ckpt", "last_ckpt")):
                return True
            path = Path(str(value)).resolve()
            return path.suffix == ".pth" and path.is_relative_to(home)

        info = messages.get("runtime_info") or {}
        return {**messages, "runtime_info": {k: v for k, v in info.items() if own(k, v)}}

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
        place = Path(out_dir, filename)
        partial = place.with_name(f".{place.name}.partial")
        super().save_checkpoint(str(partial.parent), partial.name, *args, **kwargs)
        if is_main_process():
            os.replace(partial, place)
