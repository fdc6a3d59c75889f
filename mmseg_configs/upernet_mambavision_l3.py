# UPerNet 160k with MambaVision-L3; published result on ADE20K val, single scale: 53.2 mIoU.
# For ImageNet weights: model.backbone.init_cfg=dict(type='Pretrained', checkpoint=FILE).
_base_ = [
    "./_base_/models/upernet.py",
    "./_base_/datasets/ade20k_640.py",
    "./_base_/schedules/schedule_160k.py",
    "./_base_/default_runtime.py",
]

model = dict(
    data_preprocessor=dict(size=(640, 640)),
    backbone=dict(arch="L3"),
    decode_head=dict(in_channels=[256, 512, 1024, 2048]),
    auxiliary_head=dict(in_channels=1024),
)
# No AMP: training at this size is unstable in half precision.
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=8e-5, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg={{_base_.optim_wrapper.paramwise_cfg}},
)
