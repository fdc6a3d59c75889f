"""What goes wrong with weights."""


class WeightsError(ValueError):
    """Weights that cannot be had or do not belong to this network; the message says what to do."""
