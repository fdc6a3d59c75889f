# UPerNet 160k with MambaVision-T; published result on ADE20K val, single scale: 46.0 mIoU.
# The backbone started from ImageNet weights: tools/train.py --pretrained.
_base_ = [
    "./_base_/models/upernet.py",
    "./_base_/datasets/ade20k.py",
    "./_base_/schedules/schedule_160k.py",
    "./_base_/default_runtime.py",
]
