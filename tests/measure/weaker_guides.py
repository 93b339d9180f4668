"""Guides and averages for digits: guided by the missing label, by an earlier checkpoint, and by averages of any length.

pixnerd train --recipe digits-cpu --compile on --checkpoint-every 100 --keep-every 100 --power-averages 0.05 0.1 \\
    --out runs/kept
python -m tests.measure.weaker_guides runs/kept

500 digits from each of three noises, in the grid of the recipe; the guides are earlier checkpoints of the same run.
"""

import dataclasses
import sys
from pathlib import Path

from pixnerd.config import SamplingConfig
from pixnerd.model_source import find_model, synthesise
from pixnerd.sampling import network_passes

from .few_steps import SEEDS, TITLES, measure, row

GUIDES = {"": (1.0, 2.0, 3.0), "100": (1.5, 2.0, 3.0), "300": (1.5, 2.0, 3.0), "1000": (2.0, 3.0)}  # "": no label
WIDTHS = (0.02, 0.05, 0.1, 0.15, 0.25)


def print_row(title: str, name: str, sampling: SamplingConfig, folder: Path, average: str = "ema") -> None:
    trials = [measure(name, sampling, seed, folder, average) for seed in SEEDS]
    print(f"{title:20}{row(network_passes(sampling), trials)}", flush=True)


def main(name: str) -> None:
    source = find_model(name).settled()
    folder, sampling = source.results.folder, source.sampling
    print(f"{'':20}{TITLES}   of each noise: agreement, KID")
    for step, scales in GUIDES.items():
        for w in scales:
            guided = dataclasses.replace(sampling, guidance=w, guide=f"{name}@{step}" if step else "")
            print_row(f"{f'step {step}' if step else 'no label'}, w = {w:g}", name, guided, folder)
    print_row("last weights", name, sampling, folder, "model")
    for width in WIDTHS:
        print_row(f"width {width:g}", name, sampling, folder, synthesise(source, width).stem)


if __name__ == "__main__":
    main(*sys.argv[1:])
