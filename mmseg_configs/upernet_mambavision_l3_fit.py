# The same with windows fitted to the map: no padded tokens, the same weights, faster.
# Without CUDA graphs, which keep the gradients once more: 3 GB.
_base_ = "./upernet_mambavision_l3.py"

model = dict(backbone=dict(window_mode="fit"))
