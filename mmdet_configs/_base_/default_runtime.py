# What every detection run shares: scope, logging, checkpoints, and the plugin itself.
default_scope = "mmdet"
custom_imports = dict(imports=["mambavision_backbone"], allow_failed_imports=False)
runner_type = "SafeRunner"  # executes nothing that a checkpoint holds

default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=50),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(type="CheckpointHook", interval=1, max_keep_ckpts=3, save_best="auto"),
    sampler_seed=dict(type="DistSamplerSeedHook"),
    visualization=dict(type="DetVisualizationHook"),
)
custom_hooks = [
    dict(type="CheckBackboneWeightsHook"),  # a checkpoint of another variant stops the run
    dict(type="NameBadSampleHook"),  # an unreadable image is named
    dict(type="BFloat16DetectionHook"),  # mmcv and mmdet lack parts of it
]

env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
    dist_cfg=dict(backend="nccl"),
)

vis_backends = [dict(type="LocalVisBackend")]
visualizer = dict(type="DetLocalVisualizer", vis_backends=vis_backends, name="visualizer")
log_processor = dict(type="LogProcessor", window_size=50, by_epoch=True)

log_level = "INFO"
load_from = None
resume = False
auto_scale_lr = dict(enable=False, base_batch_size=16)
