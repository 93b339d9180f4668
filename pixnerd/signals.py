"""What asks a program to stop: Ctrl-C, a cluster before it takes a machine away, a closed terminal."""

import signal
from collections.abc import Callable
from types import FrameType

STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
STOPPED = 75  # exit code of a program that a signal ended early: EX_TEMPFAIL of <sysexits.h>, "try again"


def on_stop_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    """From now on call `handler` when the program is asked to stop, but not for what it ignores, as nohup SIGHUP."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)
