"""Hooks for mmengine's runner: clear errors for silent or nameless failures, and bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from torch import nn

from ..backbone import MambaVision
from ..checkpoint import WeightsError, backbone_weights, check_weights, state_dict_of
from ..inference import FastBackbone


@HOOKS.register_module()
class CheckBackboneWeightsHook(Hook):
    """Stop when a checkpoint's backbone does not fit the model's.

    mmengine loads what fits and logs the rest, so a run with the wrong variant goes on from random
    weights. This hook raises ``WeightsError`` with the first tensors that differ and the variant
    that the checkpoint looks like.
    """

    priority = "HIGH"  # before a hook that loads from the checkpoint itself, as EMAHook does

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Compare the checkpoint with the model before mmengine loads it."""
        backbone = _backbone(runner)
        if isinstance(backbone, MambaVision):
            source = str(runner._load_from or "checkpoint")
            # mmengine loads by whole names, so weights without the prefix would all be left out
            weights = backbone_weights(state_dict_of(checkpoint), "backbone.")
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


@HOOKS.register_module()
class BFloat16DetectionHook(Hook):
    """Let detectors train and test in bfloat16: what mmdet and mmcv lack there is done in float32.

    mmcv's RoIAlign and its NMS on a CPU have no bfloat16; mmdet rounds boxes to the dtype of the
    maps before RoIAlign (to steps of 8 pixels at the end of a 1333 pixel side), and ranks scores of
    8 bits. So RoI extractors get float32 maps, and what heads return becomes float32. Tensors of
    other dtypes are left as they are.
    """

    def before_run(self, runner: Any) -> None:
        """Put guards around the model's RoI extractors and heads."""
        for module in runner.model.modules():
            is_extractor = hasattr(module, "roi_layers")
            if is_extractor and _cast_inputs not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(_cast_inputs)
            is_head = hasattr(module, "predict_by_feat")
            if is_head and _cast_outputs not in module._forward_hooks.values():
                module.register_forward_hook(_cast_outputs)


@HOOKS.register_module()
class FastInferenceHook(Hook):
    """Run the backbone's fast copy during tests.

    The model keeps its own backbone, which other hooks (EMA's) may exchange the weights of before:
    the copy is made after them, and the backbone calls it.

    Args:
        dtype: ``float16``, ``bfloat16`` or ``float32``; see ``inference.accelerate``.
    """

    priority = "LOWEST"

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype

    def before_test_epoch(self, runner: Any) -> None:
        """Put the copy's forward pass in the place of the backbone's."""
        backbone = _backbone(runner)
        fast = FastBackbone(backbone, getattr(torch, self.dtype))
        backbone.forward = lambda x: fast(x)
        self.compiled = backbone._compiled_call_impl  # it would not ask forward
        backbone._compiled_call_impl = None

    def after_test_epoch(self, runner: Any, metrics: Any = None) -> None:  # noqa: ARG002
        """Take it away again."""
        backbone = _backbone(runner)
        del backbone.forward
        backbone._compiled_call_impl = self.compiled


def _backbone(runner: Any) -> Any:
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    return getattr(model, "backbone", None)


def _cast_inputs(_module: nn.Module, args: tuple[Any, ...]) -> Any:
    return _without_bfloat16(args)


def _cast_outputs(_module: nn.Module, _args: tuple[Any, ...], outputs: Any) -> Any:
    return _without_bfloat16(outputs)


def _without_bfloat16(value: Any) -> Any:
    """The same tensor, or tuples, lists and dicts of them, with float32 in bfloat16's place."""
    if type(value) in (tuple, list):
        return type(value)(_without_bfloat16(v) for v in value)
    if type(value) is dict:
        return {k: _without_bfloat16(v) for k, v in value.items()}
    if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16:
        return value.float()
    return value


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
