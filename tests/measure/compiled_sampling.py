"""What torch.compile costs and gains in sampling: seconds to compile, time of a batch, images that pay for it.

python -m tests.measure.compiled_sampling RUN [IMAGES]

A batch of IMAGES (64) with the run's own sampling settings, eager and compiled in turns.
"""

import sys

import torch

from pixnerd import load, sample
from pixnerd.bench.clock import median_and_quartiles, ratios, take_turns
from pixnerd.compiling import compile_to_sample
from pixnerd.cost import clock
from pixnerd.runs import Run

ROUNDS = 5


def main(folder: str, images: int = 64) -> None:
    config, eager, compiled = Run(folder).config().sampling, load(folder), load(folder)
    labels = torch.arange(images) % eager.num_classes
    compile_to_sample("on", compiled, None, images, config)
    begin = clock()
    difference = (sample(compiled, labels, config) - sample(eager, labels, config)).abs().max()
    first = clock() - begin
    actions = {"eager": lambda: sample(eager, labels, config), "compiled": lambda: sample(compiled, labels, config)}
    times = take_turns(actions, ROUNDS, warm=0)
    one, other = (median_and_quartiles([reading.wall for reading in times[name]]).median for name in actions)
    ratio, seconds = ratios(times["compiled"], times["eager"]), first - one - other
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {config.steps} steps of {config.solver}")
    print(f"largest difference {difference:.1e}, compiling {seconds:.0f} s, {images} images: eager {one:.1f} s,")
    print(f"compiled {ratio['wall'].median:.2f} of it, {ratio['processor'].median:.2f} by processor time;")
    print(f"compiling has paid after {seconds / (one - other) * images:.0f} images" if other < one else "never pays")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
