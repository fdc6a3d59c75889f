"""Checkpoints: getting them, reading them safely, and what of them belongs to a backbone."""

from .catalog import LICENCE, PUBLISHED, SCHEME, find_published
from .errors import WeightsError
from .fetching import file_sha256, local_file
from .fitting import backbone_weights, check_weights, guess_variant, load_pretrained
from .reading import read_checkpoint, read_state_dict, state_dict_of
from .writing import write_weights

__all__ = [
    "LICENCE",
    "PUBLISHED",
    "SCHEME",
    "WeightsError",
    "backbone_weights",
    "check_weights",
    "file_sha256",
    "find_published",
    "guess_variant",
    "load_pretrained",
    "local_file",
    "read_checkpoint",
    "read_state_dict",
    "state_dict_of",
    "write_weights",
]
