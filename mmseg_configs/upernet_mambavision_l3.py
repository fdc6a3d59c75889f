# UPerNet 160k with MambaVision-L3; published result on ADE20K val, single scale: 53.2 mIoU.
# No AMP: training at this size is unstable in half precision.
# The backbone started from ImageNet weights: tools/train.py --pretrained.
_base_ = [
    "./_base_/models/upernet.py",
    "./_base_/datasets/ade20k_640.py",
    "./_base_/schedules/schedule_160k_no_amp.py",
    "./_base_/default_runtime.py",
]

model = dict(
    data_preprocessor=dict(size=(640, 640)),
    backbone=dict(arch="L3"),
    decode_head=dict(in_channels=[256, 512, 1024, 2048]),
    auxiliary_head=dict(in_channels=1024),
)
optim_wrapper = dict(optimizer=dict(lr=8e-5, weight_decay=0.05))
