"""PixNerd: pixel-space diffusion with a neural field per patch (arXiv 2507.23268). t = 0 is noise, t = 1 is data.

Everything is imported on first use: `import pixnerd` alone does not load torch.
"""

import ctypes
import os
import platform

import lazy_loader

# OpenMP's threads wait for one another by spinning. Where another process needs the cores, that keeps them from the
# very thread that is waited for. A short spin is as fast alone. The libraries read it when torch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "700")  # rounds, of GNU's OpenMP: torch's wheels for Linux
    os.environ.setdefault("KMP_BLOCKTIME", "1")  # milliseconds, of Intel's and LLVM's: conda, macOS

# glibc returns a large tensor's memory to the kernel when the tensor is freed, and the next one of the same step pays
# for new, zeroed pages. Here blocks of up to 256 MiB stay with the process, and up to 1 GiB at the end of its heap.
if platform.libc_ver()[0] == "glibc" and not any(
    name.startswith("MALLOC_") or (name == "GLIBC_TUNABLES" and "malloc" in value) for name, value in os.environ.items()
):
    _mallopt, _TRIM_THRESHOLD, _MMAP_THRESHOLD = ctypes.CDLL(None).mallopt, -1, -3
    _mallopt(_MMAP_THRESHOLD, 256 << 20)
    _mallopt(_TRIM_THRESHOLD, 1 << 30)

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
