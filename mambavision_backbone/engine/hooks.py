"""Hooks that turn silent or nameless failures of a run into one clear error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS

from ..backbone import MambaVision
from ..checkpoint import WeightsError, backbone_weights, check_weights


@HOOKS.register_module()
class CheckBackboneWeightsHook(Hook):
    """Stop when a checkpoint's backbone does not fit the model's.

    mmengine loads what fits and logs the rest, so a run with the wrong variant goes on from random
    weights. This hook raises ``WeightsError`` with the first tensors that differ and the variant
    that the checkpoint looks like.
    """

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Compare the checkpoint with the model before mmengine loads it."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        backbone = getattr(model, "backbone", None)
        if isinstance(backbone, MambaVision):
            source = str(runner._load_from or "checkpoint")
            # mmengine loads by whole names, so weights without the prefix would all be left out
            weights = backbone_weights(checkpoint.get("state_dict", checkpoint), "backbone.")
            if not weights:
                raise WeightsError(
                    f"{source!r} holds no weights named backbone.*: it is not a detector or "
                    "segmenter. An ImageNet file belongs in model.backbone.init_cfg"
                )
            check_weights(backbone, weights, source)


@HOOKS.register_module()
class NameBadSampleHook(Hook):
    """Name the file when a sample cannot be read or prepared in the middle of a run."""

    priority = "LOWEST"

    def before_train(self, runner: Any) -> None:
        """Guard the training data."""
        _guard(runner.train_dataloader.dataset)

    def before_val(self, runner: Any) -> None:
        """Guard the validation data."""
        _guard(runner.val_dataloader.dataset)

    def before_test(self, runner: Any) -> None:
        """Guard the test data."""
        _guard(runner.test_dataloader.dataset)


class _NamingPipeline:
    """A dataset's pipeline that says which sample it failed on."""

    def __init__(self, pipeline: Callable[[dict[str, Any]], Any]) -> None:
        self.pipeline = pipeline

    def __call__(self, sample: dict[str, Any]) -> Any:
        """Prepare the sample."""
        files = _files(sample)
        try:
            return self.pipeline(sample)
        except Exception as error:
            raise RuntimeError(
                f"cannot prepare the sample {files}: {type(error).__name__}: {error}. Replace or "
                "remove the file; tools/check_data.py finds all such files beforehand"
            ) from error


def _files(sample: Mapping[str, Any]) -> str:
    names = [str(sample[k]) for k in ("img_path", "seg_map_path") if sample.get(k)]
    return " / ".join(names) or f"number {sample.get('sample_idx')}"


def _guard(dataset: Any) -> None:
    """Wrap the pipelines of a dataset and of the datasets that it wraps."""
    for inner in [getattr(dataset, "dataset", None), *getattr(dataset, "datasets", [])]:
        if inner is not None:
            _guard(inner)
    pipeline = getattr(dataset, "pipeline", None)
    if callable(pipeline) and not isinstance(pipeline, _NamingPipeline):
        dataset.pipeline = _NamingPipeline(pipeline)
