"""How long a step's random draws take, from torch's generators and from Philox.

python -m tests.measure.draw_time

On a GPU if there is one; both ways interleaved in one run, medians of the processor's time, or of the clock's on a GPU.
Images of one number show what the decisions beside the noise cost.
"""

import statistics
import time

import torch

from pixnerd.distributed import default_device
from pixnerd.training import TrainConfig, draw_step

ROUNDS = 7
SIZES = (128, (1, 1, 1)), (64, (1, 32, 32)), (128, (3, 32, 32)), (32, (3, 256, 256))


def main() -> None:
    device = default_device()
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, median of {ROUNDS}")
    for images, shape in SIZES:
        seconds: dict[str, list[float]] = {"torch": [], "philox": []}
        for step in range(ROUNDS + 1):
            for noise, times in seconds.items():
                config = TrainConfig(noise=noise)
                synchronize()
                begin = clock()
                draw_step(config, step, range(images), shape, device)
                synchronize()
                times.append(clock() - begin)
        of_torch, philox = (1000 * statistics.median(times[1:]) for times in seconds.values())  # the first warms up
        print(f"{images:4} images of {shape}: torch {of_torch:.2f} ms, philox {philox:.2f} ms")


if __name__ == "__main__":
    main()
