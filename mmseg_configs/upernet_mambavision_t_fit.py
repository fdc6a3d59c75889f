# The same with windows fitted to the map: no padded tokens, the same weights, faster;
# and trained by a CUDA graph: docs/speed.md.
_base_ = "./upernet_mambavision_t.py"

model = dict(backbone=dict(window_mode="fit", graphs=32))
