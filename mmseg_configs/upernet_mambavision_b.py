# UPerNet 160k with MambaVision-B; published result on ADE20K val, single scale: 49.1 mIoU.
# The backbone started from ImageNet weights: tools/train.py --pretrained.
_base_ = [
    "./_base_/models/upernet.py",
    "./_base_/datasets/ade20k.py",
    "./_base_/schedules/schedule_160k.py",
    "./_base_/default_runtime.py",
]

model = dict(
    backbone=dict(arch="B"),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
