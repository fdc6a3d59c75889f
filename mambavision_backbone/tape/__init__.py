"""A computation as the calls that PyTorch and Triton are given: recorded once, made again at will.

``recording`` sees operators and kernels as they run and notes them as steps, ``assembling`` turns
steps into calls, with the memory planned by ``slabs``, and ``playing`` makes the calls.
"""

from .playing import Slots, Tape
from .recording import Recorder

__all__ = ["Recorder", "Slots", "Tape"]
