"""How long a step's random draws take, from torch's generators and from Philox.

python -m tests.measure.draw_time

On a GPU if there is one; both ways interleaved in one run, medians, with torch's time for the same images as the unit.
"""

import statistics
import time

import torch

from pixnerd.distributed import default_device
from pixnerd.training import TrainConfig, draw_step

ROUNDS = 7
SHAPE = 3, 256, 256


def main() -> None:
    device = default_device()
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, median of {ROUNDS}")
    for images in (32, 128):
        seconds: dict[str, list[float]] = {"torch": [], "philox": []}
        for step in range(ROUNDS + 1):
            for noise, times in seconds.items():
                synchronize()
                begin = time.perf_counter()
                draw_step(TrainConfig(noise=noise), step, range(images), SHAPE, device)
                synchronize()
                times.append(time.perf_counter() - begin)
        unit, philox = (statistics.median(times[1:]) for times in seconds.values())  # the first round warms up
        print(f"{images:4} images: torch {1000 * unit:.1f} ms, philox {philox / unit:.2f} times as long")


if __name__ == "__main__":
    main()
