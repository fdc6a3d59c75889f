"""Building blocks of the backbone, from the stem to the windows."""
