# The 160k schedule in float32.
_base_ = "./schedule_160k.py"

optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer={{_base_.optim_wrapper.optimizer}},
    constructor={{_base_.optim_wrapper.constructor}},
    paramwise_cfg={{_base_.optim_wrapper.paramwise_cfg}},
)
