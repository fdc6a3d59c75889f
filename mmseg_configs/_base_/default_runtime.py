# What every segmentation run shares: scope, logging, and the plugin itself.
default_scope = "mmseg"
custom_imports = dict(imports=["mambavision_backbone"], allow_failed_imports=False)
runner_type = "SafeRunner"  # executes nothing that a checkpoint holds

custom_hooks = [
    dict(type="CheckBackboneWeightsHook"),  # a checkpoint of another variant stops the run
    dict(type="NameBadSampleHook"),  # an unreadable image is named
]

env_cfg = dict(
    cudnn_benchmark=True,
    mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
    dist_cfg=dict(backend="nccl"),
)

vis_backends = [dict(type="LocalVisBackend")]
visualizer = dict(type="SegLocalVisualizer", vis_backends=vis_backends, name="visualizer")
log_processor = dict(by_epoch=False)

log_level = "INFO"
load_from = None
resume = False
auto_scale_lr = dict(enable=False, base_batch_size=16)
