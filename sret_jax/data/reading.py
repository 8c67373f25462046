"""Reading from disks that fail for a while, as those over a network do."""

import errno
import logging
import os
import time
from collections.abc import Callable
from typing import TypeVar

_LOG = logging.getLogger(__name__)

_T = TypeVar("_T")

# Seconds: between tries, one longer than the other.
_PAUSES = (0.1, 1.0, 10.0, 60.0)

# That a pause does not mend. ArrayRecord has no numbers for its errors, but the system's words in their text.
_NUMBERS = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP)
_LASTING = (*map(os.strerror, _NUMBERS), "Corrupted")


class UnreadableError(Exception):
    """The disk does not give what was asked for; the message is its reason, in a few words."""


def read_patiently(read: Callable[[], _T], what: str) -> _T:
    """What a function reads; where it fails for a reason that may pass, tried again for over a minute.

    Args:
      read: may raise OSError, or RuntimeError as ArrayRecord does.
      what: is read, for the log.

    Raises:
      UnreadableError: it failed for a reason that stays, or every time.
    """
    for pause in _PAUSES:
        try:
            return read()
        except (OSError, RuntimeError) as error:
            reason = _reason(error)
            if any(words in reason for words in _LASTING):
                raise UnreadableError(reason) from error
            if pause >= 10:
                _LOG.warning("%s cannot be read (%s): tried again in %.0f seconds", what, reason, pause)
            time.sleep(pause)
    try:
        return read()
    except (OSError, RuntimeError) as error:
        raise UnreadableError(_reason(error)) from error


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)
