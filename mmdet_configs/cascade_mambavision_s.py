# Cascade Mask R-CNN 3x with MambaVision-S; published result on COCO val: 52.3 / 45.2.
# The backbone started from ImageNet weights: tools/train.py --pretrained.
_base_ = [
    "./_base_/models/cascade_mask_rcnn.py",
    "./_base_/datasets/coco_instance_multiscale.py",
    "./_base_/schedules/schedule_3x.py",
    "./_base_/default_runtime.py",
]

model = dict(backbone=dict(arch="S"), neck=dict(in_channels=[96, 192, 384, 768]))
