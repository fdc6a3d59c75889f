"""What the package logs, in mmengine's log."""

from __future__ import annotations

import logging

from mmengine.logging import MMLogger


class ForwardingHandler(logging.Handler):
    """Hands records to mmengine's current logger: a runner's console and its file.

    Where there is none yet, warnings go to stderr, as Python does it without handlers.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Pass a record on."""
        if MMLogger._instance_dict:
            MMLogger.get_current_instance().handle(record)
        elif logging.lastResort and record.levelno >= logging.lastResort.level:
            logging.lastResort.handle(record)


_HANDLER = ForwardingHandler()


def forward_to_mmengine() -> None:
    """Have the package's records, from INFO on, in mmengine's log too."""
    logger = logging.getLogger("mambavision_backbone")
    logger.addHandler(_HANDLER)  # which does nothing the second time
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
