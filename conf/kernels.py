"""Which attention kernel runs where."""

import importlib.util

from conf.words import Invalid


def kernel_that_runs(name: str, device: str, dtype: str, head_dim: int) -> str:
    """The kernel called `name`; for `auto` the fastest that runs on this device, dtype and head_dim.

    Raises Invalid if the named kernel does not run there.
    """
    flash_shape = device == "cuda" and dtype in ("float16", "bfloat16") and head_dim % 8 == 0 and head_dim <= 256
    has_package = importlib.util.find_spec("flash_attn") is not None
    able = {
        "flash_attn": flash_shape and has_package,
        "sdpa": device == "cpu" or flash_shape,
        "math": True,
    }
    if name == "auto":
        name = next(kernel for kernel, runs in able.items() if runs)
    if not able[name]:
        fits = ", ".join(kernel for kernel, runs in able.items() if runs)
        needs = " and the flash-attn package" if name == "flash_attn" and not has_package else ""
        raise Invalid(
            f"attention.kernel={name} needs CUDA, a 16-bit dtype, head_dim a multiple of 8 up to 256{needs}; "
            f"on {device} with {dtype} and head_dim {head_dim} these run: {fits}"
        )
    return name
