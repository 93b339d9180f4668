"""How long a training step takes in each arm of a study, which a study at equal time needs for its steps.

python -m tests.measure.arm_times notebooks/studies/budget-digits.yaml 25 rate=0.004

The arms, of which those of equal speed can be left out by fixing an axis, are training runs of the first seed that take
turns step by step in this process. The first steps compile and do not count.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from pixnerd.bench.clock import median_and_quartiles, take_turns
from pixnerd.bench.measure import separate_graphs
from pixnerd.studies.study import expand, read_study
from pixnerd.training import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("rounds", type=int)
    parser.add_argument("fixed", nargs="*", metavar="AXIS=VALUE", help="only the arms that have this value")
    asked = parser.parse_args()
    study, fixed = read_study(asked.study), dict(entry.split("=") for entry in asked.fixed)
    with tempfile.TemporaryDirectory() as folder, separate_graphs():
        plan = [run for run in expand(study, Path(folder)) if run.repeat == str(study.seeds[0])]
        runs = {run.arm: train(run.config) for run in plan if fixed.items() <= run.choices.items()}
        readings = take_turns({arm: lambda run=run: next(run) for arm, run in runs.items()}, asked.rounds)
        for run in runs.values():
            run.close()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, median milliseconds of {asked.rounds} steps")
    for arm, taken in readings.items():
        wall = median_and_quartiles([1000 * reading.wall for reading in taken])
        print(f"{arm:24}{wall.median:8.1f}   ({wall.low:.1f} to {wall.high:.1f})")


if __name__ == "__main__":
    main()
