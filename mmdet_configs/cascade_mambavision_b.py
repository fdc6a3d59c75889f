# Cascade Mask R-CNN 3x with MambaVision-B; published result on COCO val: 52.8 / 45.7.
# The backbone started from ImageNet weights: tools/train.py --pretrained.
_base_ = [
    "./_base_/models/cascade_mask_rcnn.py",
    "./_base_/datasets/coco_instance_multiscale.py",
    "./_base_/schedules/schedule_3x.py",
    "./_base_/default_runtime.py",
]

model = dict(backbone=dict(arch="B"), neck=dict(in_channels=[128, 256, 512, 1024]))
optim_wrapper = dict(optimizer=dict(lr=2e-4))
