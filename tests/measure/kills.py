"""How many kills and requests to stop a training run survives, in all combinations of processes and loaders.

python -m tests.measure.kills [TIMES]     20 of each by default

SIGKILL: every step that `latest` has named is kept, nothing half-written is read, and the resumed run ends with the
bytes of one that was never killed. SIGTERM, SIGHUP: every completed step is kept.
"""

import signal
import sys
import tempfile
import time
from pathlib import Path

from ..training.killed_worker import EVERY, Server, final_tensors, kill_again_and_again, stop_again_and_again


def main() -> None:
    times = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    with tempfile.TemporaryDirectory() as root, Server() as server:
        for ranks, workers, sharded in [(1, 0, False), (1, 2, False), (3, 0, False), (3, 1, False), (3, 0, True)]:
            name = f"{ranks} process{'es' * (ranks > 1)}, {workers} loaders each{', sharded' * sharded}"
            settings = {"batch_size": 6, "workers": workers, "shard": sharded, "keep_checkpoints": 2}
            killed, straight, stopped = (Path(root) / f"{name} {what}" for what in ("killed", "straight", "stopped"))
            begin = time.monotonic()
            half, reached = kill_again_and_again(server, killed, times, ranks, **settings)
            steps = reached + EVERY
            for folder in (killed, straight):
                server.start(folder, ranks, steps=steps, checkpoint_every=EVERY, log_every=1, **settings)
                assert server.end() == [0] * ranks
            tensors = final_tensors(killed, steps)
            equal = bool(tensors) and tensors == final_tensors(straight, steps)
            print(f"{name}: {times} of {times} SIGKILL keep the announced step, {half} hit a half-written checkpoint;")
            print(
                f"    the end is {'bit for bit the same' if equal else 'DIFFERENT'}; {time.monotonic() - begin:.0f} s"
            )
            signals = [(signal.SIGTERM, signal.SIGHUP)[i % 2] for i in range(times)]
            begin, at = time.monotonic(), stop_again_and_again(server, stopped, signals, ranks, **settings)
            print(
                f"    {len(at)} of {times} SIGTERM or SIGHUP keep every step; {time.monotonic() - begin:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
