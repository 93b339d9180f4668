"""A run's folder, its checkpoints, and the authors' released weights."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["checkpoints", "released", "run"],
    submod_attrs={
        "checkpoints": ["load", "load_model", "newest_checkpoint", "save_checkpoint", "save_model"],
        "released": ["load_released"],
        "run": ["Run"],
    },
)
