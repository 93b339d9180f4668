"""Training as a program in the foreground: a progress bar, and signals that end it with a checkpoint."""

import signal
import threading
from types import FrameType

from tqdm import tqdm

from ..config import TrainConfig
from ..distributed import World
from ..signals import on_stop_signals
from .loop import StoppedEarly, train


def train_until_stopped(config: TrainConfig, world: World) -> int:
    """Train to the end, or until SIGTERM, SIGHUP or Ctrl-C; returns the last step.

    It has a checkpoint, unless the teacher's paths were still followed. A second Ctrl-C does not wait for the end of
    the step. Raises what `train` raises.
    """
    stop = threading.Event()

    def request_stop(number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and stop.is_set() and world.size == 1:
            raise KeyboardInterrupt
        stop.set()

    records, last = train(config, stop_asked=stop.is_set), config.steps
    on_stop_signals(request_stop)  # to the end of the program: a cluster may ask again while it ends
    with tqdm(total=last, unit="step", mininterval=1, disable=not world.leads) as bar:
        try:
            for record in records:
                if not bar.n:  # steps before an interruption took none of this program's time
                    bar.initial = bar.n = bar.last_print_n = record.step - 1
                if record.step < last and world.any(stop.is_set()):  # all have to stop at the same step
                    records.close()  # writes a checkpoint
                    return record.step
                bar.update(record.step - bar.n)
                if record.step % config.log_every == 0:
                    bar.set_postfix(loss=f"{float(record.loss):.4f}")
        except StoppedEarly as stopped:
            return stopped.args[0]
    return last
