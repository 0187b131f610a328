"""Whether a call is still running."""

import sys
from types import FrameType


def is_running(frame: FrameType | None) -> bool:
    """Whether the caller was called, directly or not, from the call that `frame` belongs to.

    The call stack is asked, since no hook is called after a forward that Ctrl-C has ended. False
    for None.
    """
    caller: FrameType | None = None if frame is None else sys._getframe(1)
    while caller is not None and caller is not frame:
        caller = caller.f_back
    return caller is not None
