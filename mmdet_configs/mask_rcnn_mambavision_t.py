# Mask R-CNN 1x with MambaVision-T and fitted windows: for smaller budgets; trained by CUDA
# graphs of up to 32 image sizes (docs/speed.md). No published result.
# The backbone started from ImageNet weights: tools/train.py --pretrained.
_base_ = [
    "./_base_/models/mask_rcnn.py",
    "./_base_/datasets/coco_instance.py",
    "./_base_/schedules/schedule.py",
    "./_base_/default_runtime.py",
]

model = dict(backbone=dict(window_mode="fit", graphs=32))
