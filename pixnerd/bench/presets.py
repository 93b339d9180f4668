"""What the benchmark measures, as one configuration, and the named ones. Nothing here needs torch."""

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from typing_extensions import Doc

from ..checks import Count, Positive, check_fields
from ..config import TrainConfig
from ..data import NAMES
from ..errors import InputError
from ..model_config import SIZES, FieldKernel, ModelConfig, Recompute, TextModelConfig, check_fused
from ..recipes import RECIPES

Precision = Literal["float32", "bfloat16"]
Compile = Literal["off", "on"]


@dataclass(frozen=True)
class BenchConfig:
    """What is measured, and how often. Raises InputError when a value is outside its range."""

    model: ModelConfig
    """the network; its channels are set to those of the data"""
    recipe: str = "imagenet-256"
    """whose optimiser, clipping, random draws and moving averages"""
    data: Annotated[str, Doc(f"one of {NAMES}")] = "synthetic"
    batch_size: Count = 32
    """images a training step, and a sampling step of many"""
    precisions: tuple[Precision, ...] = ("float32", "bfloat16")
    """of every network; bfloat16 is autocast"""
    compile: tuple[Compile, ...] = ("off", "on")
    """every network as it is, compiled, or both"""
    recompute: tuple[Recompute, ...] = ("none", "head", "all")
    """the ways in which the package saves memory; the first is the one that sampling and parts are measured with"""
    kernels: tuple[FieldKernel, ...] = ("torch",)
    """what computes the package's field blocks; fused needs a GPU, and goes without recomputing the head alone"""
    rounds: Count = 15
    """measurements of each contestant, after three that warm up"""
    factors: tuple[Positive, ...] = (0.5, 1.0, 2.0)
    """by which image size, patch, width and batch are multiplied to fit an exponent; fewer than two: none is"""
    largest: bool = False
    """on a GPU: also look for the largest batch that fits, and measure with it"""

    def __post_init__(self):
        check_fields(self)
        for name in ("precisions", "compile", "recompute", "kernels"):
            if not getattr(self, name):
                raise InputError(f"{name} is empty; name at least one to measure")
        if isinstance(self.model, TextModelConfig) or isinstance(RECIPES[self.recipe].model, TextModelConfig):
            raise InputError("the benchmark is of class-conditional networks; this one reads captions")
        if "fused" in self.kernels:
            check_fused(self.model)
        if self.model.student:
            raise InputError("model.student is True; the benchmark is of velocity networks: leave it out")

    def training(self, precision: Precision, recompute: Recompute) -> TrainConfig:
        """The training run that a step is taken of; its rate is too small to lead the weights anywhere."""
        return replace(
            RECIPES[self.recipe],
            model=self.model,
            data=self.data,
            batch_size=self.batch_size,
            precision=precision,
            recompute=recompute,
            compile="off",  # the benchmark compiles
            learning_rate=1e-6,
            warmup_steps=0,
            decay="constant",
            steps=2**31,
            workers=0,
        )


class Presets(dict[str, BenchConfig]):
    """Benchmarks by name; an unknown name raises an InputError that lists the known ones."""

    def __missing__(self, name: str) -> BenchConfig:
        raise InputError(f"benchmark {name!r} is unknown; known benchmarks: {', '.join(self)}")


TINY = ModelConfig(width=16, heads=2, blocks=1, patch_size=4, image_size=16, field_width=4, field_blocks=1)
L_SHORT = replace(SIZES["L/16"], blocks=4)
GPU = {"precisions": ("bfloat16",), "kernels": ("fused", "torch")}
PRESETS = Presets(
    {
        # a rehearsal of seconds, whose figures say nothing
        "tiny": BenchConfig(TINY, batch_size=4, precisions=("float32",), compile=("off",), rounds=2),
        # for a CPU: what the quickstart trains, and the width of L/16 with four of its blocks and both field blocks
        "digits": BenchConfig(
            RECIPES["digits-cpu"].model, "digits-cpu", "digits", batch_size=64, recompute=("none", "head")
        ),
        "l-short": BenchConfig(L_SHORT, batch_size=1, recompute=("none", "head"), rounds=7),
        # for a GPU, with 32 images and with as many as fit
        "l16": BenchConfig(SIZES["L/16"], **GPU),
        "l16-largest": BenchConfig(SIZES["L/16"], **GPU, largest=True),
        "xl16": BenchConfig(SIZES["XL/16"], **GPU),
        "xl16-largest": BenchConfig(SIZES["XL/16"], **GPU, largest=True),
    }
)
