# The same with windows fitted to the map: no padded tokens, the same weights, much faster;
# and trained by CUDA graphs of up to 256 image sizes: docs/speed.md.
_base_ = "./cascade_mambavision_t.py"

model = dict(backbone=dict(window_mode="fit", graphs=256))
