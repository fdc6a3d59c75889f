# The demo's segmenter: UPerNet with a narrow MambaVision on drawn shapes (128² images,
# tools/make_shapes.py), sized to learn from scratch within minutes on one CPU core.
_base_ = [
    "./_base_/models/upernet.py",
    "./_base_/datasets/ade20k.py",
    "./_base_/schedules/schedule_160k.py",
    "./_base_/default_runtime.py",
]

# model: the published one with fewer channels
# In short trials a larger start than mmseg's 0.01 told the shapes apart sooner.
_classifier = dict(type="Normal", std=0.1, override=dict(name="conv_seg"))
crop_size = (128, 128)
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(
        arch=dict(_delete_=True, dim=32, in_dim=16, depths=(2, 4, 2, 2), num_heads=(1, 2, 4, 8)),
        # maps of 8² and 4² at the last two stages: both are padded, to 2×2 windows and to one
        window_size=(8, 8, 5, 5),
        drop_path_rate=0.0,
    ),
    decode_head=dict(
        in_channels=[32, 64, 128, 256],
        channels=48,
        num_classes=7,
        # most pixels are background, which is learnt at once
        loss_decode=dict(class_weight=[0.3] + [1.0] * 6),
        init_cfg=_classifier,
    ),
    auxiliary_head=dict(in_channels=128, channels=48, num_classes=7, init_cfg=_classifier),
)

# data
dataset_type = "BaseSegDataset"
data_root = "data/shapes/ade"
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="RandomFlip", prob=[0.25, 0.25], direction=["horizontal", "vertical"]),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=crop_size, keep_ratio=True),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="PackSegInputs"),
]
_shapes = dict(
    type=dataset_type,
    data_root=data_root,
    reduce_zero_label=True,
    metainfo=dict(
        classes=("background", "circle", "square", "triangle", "star", "cross", "ring"),
        palette=[
            (90, 90, 90),
            (230, 60, 60),
            (60, 160, 240),
            (70, 190, 80),
            (250, 200, 40),
            (170, 80, 210),
            (250, 130, 30),
        ],
    ),
)
train_dataloader = dict(batch_size=4, num_workers=1, dataset=dict(_shapes, pipeline=train_pipeline))
val_dataloader = dict(batch_size=8, num_workers=1, dataset=dict(_shapes, pipeline=test_pipeline))
test_dataloader = val_dataloader
tta_pipeline = _base_.tta_pipeline
tta_pipeline[1].transforms[0] = [
    dict(type="Resize", scale=(side, side), keep_ratio=True) for side in (128, 160)
]

# schedule
max_iters = 1200
train_cfg = dict(max_iters=max_iters, val_interval=600)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type="PolyLR", eta_min=0.0, power=1.0, begin=100, end=max_iters, by_epoch=False),
]
optim_wrapper = dict(
    optimizer=dict(lr=1.5e-3),
    paramwise_cfg=dict(
        custom_keys={
            "decode_head": dict(lr_mult=4.0),
            "decode_head.conv_seg": dict(lr_mult=1.0),
        }
    ),
    clip_grad=dict(max_norm=5.0),
)
default_hooks = dict(
    logger=dict(interval=50), checkpoint=dict(interval=250, max_keep_ckpts=2, save_best=None)
)

del _shapes, _classifier
