# Mask R-CNN 1x with MambaVision-T and fitted windows: for smaller budgets. No published result.
# The backbone started from ImageNet weights: tools/train.py --pretrained.
_base_ = [
    "./_base_/models/mask_rcnn.py",
    "./_base_/datasets/coco_instance.py",
    "./_base_/schedules/schedule.py",
    "./_base_/default_runtime.py",
]

model = dict(backbone=dict(window_mode="fit"))
