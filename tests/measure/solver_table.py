"""How far each solver ends from the true path: python -m tests.measure.solver_table RUN

The truth is Euler with 1,000 steps from the same noise; the distance is the root mean square over all pixels of 20
images (two of each class, unguided), in units where images run from −1 to 1.
"""

import sys

import torch
from tqdm import tqdm

from pixnerd import load, sample
from pixnerd.solvers import SOLVERS, STUDENT_SOLVER

STEPS = (5, 10, 25, 50, 100)


def main(run: str) -> None:
    model = load(run)
    labels = torch.arange(model.num_classes).repeat(2)
    truth = sample(model, labels, steps=1000, guidance=1.0)
    print("| solver |" + "".join(f" {steps} steps |" for steps in STEPS))
    print("|---|" + "---|" * len(STEPS))
    for solver in tqdm([name for name in SOLVERS if name not in ("sde", STUDENT_SOLVER)]):
        ends = (sample(model, labels, steps=steps, solver=solver, guidance=1.0) for steps in STEPS)
        distances = [float((end - truth).square().mean().sqrt()) for end in ends]
        print(f"| `{solver}` |" + "".join(f" {distance:.4f} |" for distance in distances))


if __name__ == "__main__":
    main(sys.argv[1])
