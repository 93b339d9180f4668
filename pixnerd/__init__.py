"""PixNerd: pixel-space diffusion with a neural field per patch (arXiv 2507.23268). t = 0 is noise, t = 1 is data.

Everything is imported on first use: `import pixnerd` alone does not load torch.
"""

import os

import lazy_loader

# OpenMP's threads wait for one another by spinning. Where another process needs the cores, that keeps them from the
# very thread that is waited for: two trainings side by side take tenfold the time. A short spin is as fast alone.
# libgomp reads this when torch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=[
        *("conditions", "config", "cost", "data", "distributed", "encodings", "evaluation", "fields", "flow", "frozen"),
        *("launch", "layers", "metrics", "model", "plots", "randomness", "recipes", "sampling", "solvers", "text"),
        *("checkpoints", "model_source", "planning", "released", "runs", "training"),
    ],
    submod_attrs={
        "errors": ["InputError"],
        "model": ["PixNerd"],
        "model_config": ["SIZES", "ModelConfig", "TextModelConfig"],
        "model_source": ["load"],
        "released": ["load_released"],
        "sampling": ["sample"],
        "text": ["TextPixNerd"],
    },
)
