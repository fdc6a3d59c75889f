# Cascade Mask R-CNN 3x with MambaVision-T; published result on COCO val: 51.1 box / 44.3 mask AP.
# The backbone started from ImageNet weights: tools/train.py --pretrained.
_base_ = [
    "./_base_/models/cascade_mask_rcnn.py",
    "./_base_/datasets/coco_instance_multiscale.py",
    "./_base_/schedules/schedule_3x.py",
    "./_base_/default_runtime.py",
]
