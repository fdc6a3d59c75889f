# The same with averaged weights: they are what is evaluated and, as state_dict, saved.
# Any config can have them: --cfg-options default_hooks.ema.type=EMAHook
_base_ = "./cascade_mambavision_t_fit.py"

# Under default_hooks it joins the base's hooks; a list of custom_hooks would replace them.
default_hooks = dict(
    ema=dict(
        type="EMAHook",
        momentum=0.0002,  # averages about the last 5000 iterations; more for short runs
        update_buffers=True,  # the running statistics of batch norms too
    )
)
