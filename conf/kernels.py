"""Which attention kernel runs where."""

import importlib.util

from conf.words import Invalid

PACKAGES = {  # of FlashAttention's versions, the module that has it
    "flash_attn_3": "flash_attn_interface",
    "flash_attn_4": "flash_attn.cute.interface",
    "flash_attn": "flash_attn.flash_attn_interface",
}
GENERATIONS = {"flash_attn_3": (9,), "flash_attn_4": (9, 10, 11, 12)}  # of GPUs, where not all since Ampere's will do
WIDEST = {"flash_attn_4": 128}  # head_dim, where not 256


def kernel_that_runs(name: str, device: str, dtype: str, head_dim: int, generation: int = 0) -> str:
    """The kernel called `name`; for `auto` the fastest that runs on this device, dtype and head_dim.

    generation: of the GPU, the first number of its compute capability. The fastest is the first: on Hopper
    FlashAttention-2 reaches half of what its successors do. Raises Invalid if the named kernel does not run there.
    """
    flash_shape = device == "cuda" and dtype in ("float16", "bfloat16") and head_dim % 8 == 0 and head_dim <= 256
    able = {
        **{
            flash: flash_shape and head_dim <= WIDEST.get(flash, 256) and is_here(flash, generation)
            for flash in PACKAGES
        },
        "sdpa": device == "cpu" or flash_shape,
        "math": True,
    }
    if name == "auto":
        name = next(kernel for kernel, runs in able.items() if runs)
    if not able[name]:
        fits = ", ".join(kernel for kernel, runs in able.items() if runs)
        most, where = WIDEST.get(name, 256), f"on {device} with {dtype} and head_dim {head_dim}"
        raise Invalid(
            f"attention.kernel={name} needs CUDA, a 16-bit dtype, head_dim a multiple of 8 up to {most}"
            f"{package_of(name)}; {where} these run: {fits}"
        )
    return name


def package_of(name: str) -> str:
    if name not in PACKAGES:
        return ""
    of_gpu = f", a GPU of compute capability {GENERATIONS[name][0]}.0 or more" if name in GENERATIONS else ""
    return f"{of_gpu} and the {name.replace('_', '-')} package"


def is_here(name: str, generation: int) -> bool:
    """Its package, and a GPU for it."""
    try:
        found = importlib.util.find_spec(PACKAGES[name]) is not None
    except ModuleNotFoundError:  # of the package that the module is in
        return False
    return found and generation in GENERATIONS.get(name, (generation,))
