# The demo's detector: Cascade Mask R-CNN with a narrow MambaVision on drawn shapes (128² images,
# tools/make_shapes.py), sized to learn from scratch within minutes on one CPU core.
_base_ = [
    "./_base_/models/cascade_mask_rcnn.py",
    "./_base_/datasets/coco_instance.py",
    "./_base_/schedules/schedule.py",
    "./_base_/default_runtime.py",
]

# model: the published one with fewer channels, layers, anchors and proposals
_width = 48
_roi_head = _base_.model.roi_head
_box_heads = [
    dict(
        head,
        num_shared_convs=1,
        in_channels=_width,
        conv_out_channels=_width,
        fc_out_channels=192,
        num_classes=6,
    )
    for head in _roi_head.bbox_head
]
_rcnn = _base_.model.train_cfg.rcnn
for _stage in _rcnn:
    _stage.sampler.num = 32
    _stage.mask_size = 20
# shapes are small: 16 to 64 pixels
_strides = [4, 8, 16, 32]
# torchvision's RoIAlign gives the same and is several times faster on a CPU
_roi_layer = dict(sampling_ratio=1, use_torchvision=True)
model = dict(
    backbone=dict(
        arch=dict(_delete_=True, dim=32, in_dim=16, depths=(1, 1, 2, 2), num_heads=(1, 2, 4, 8)),
        # maps of 8² and 4² at the last two stages: both are padded, to 2×2 windows and to one
        window_size=(8, 8, 5, 5),
        drop_path_rate=0.0,
    ),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=_width, num_outs=4),
    rpn_head=dict(
        in_channels=_width,
        feat_channels=_width,
        anchor_generator=dict(scales=[4], strides=_strides),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(roi_layer=_roi_layer, out_channels=_width, finest_scale=28),
        bbox_head=_box_heads,
        mask_roi_extractor=dict(roi_layer=dict(_roi_layer, output_size=10), out_channels=_width),
        mask_head=dict(num_convs=2, in_channels=_width, conv_out_channels=32, num_classes=6),
    ),
    train_cfg=dict(
        # shapes cut off by the border need anchors that cross it
        rpn=dict(allowed_border=-1, sampler=dict(num=128)),
        rpn_proposal=dict(nms_pre=200, max_per_img=100),
        rcnn=_rcnn,
    ),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=100), rcnn=dict(max_per_img=50)),
)

# data
data_root = "data/shapes/coco/"
metainfo = dict(
    classes=("circle", "square", "triangle", "star", "cross", "ring"),
    palette=[
        (230, 60, 60),
        (60, 160, 240),
        (70, 190, 80),
        (250, 200, 40),
        (170, 80, 210),
        (250, 130, 30),
    ],
)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="RandomFlip", prob=[0.25, 0.25], direction=["horizontal", "vertical"]),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    # the anchors are made for this size
    dict(type="Resize", scale=(128, 128), keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(
        type="PackDetInputs",
        meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
    ),
]
train_dataloader = dict(
    batch_size=4,
    num_workers=1,
    dataset=dict(
        data_root=data_root,
        metainfo=metainfo,
        filter_cfg=dict(filter_empty_gt=True, min_size=4),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=1,
    dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "annotations/instances_val2017.json")
test_evaluator = val_evaluator
tta_pipeline = _base_.tta_pipeline
tta_pipeline[1].transforms[0] = [
    dict(type="Resize", scale=(side, side), keep_ratio=True) for side in (128, 160)
]

# schedule
max_epochs = 2
train_cfg = dict(max_epochs=max_epochs, val_interval=1)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(
        type="CosineAnnealingLR",
        eta_min_ratio=0.01,
        begin=0,
        end=max_epochs,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
optim_wrapper = dict(optimizer=dict(lr=1e-3), clip_grad=dict(max_norm=5.0))
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(max_keep_ckpts=2, save_best=None))

del _width, _roi_head, _box_heads, _rcnn, _stage, _strides, _roi_layer
