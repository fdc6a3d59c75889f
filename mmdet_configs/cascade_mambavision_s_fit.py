# The same with windows fitted to the map: no padded tokens, the same weights, much faster.
_base_ = "./cascade_mambavision_s.py"

model = dict(backbone=dict(window_mode="fit"))
