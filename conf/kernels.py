"""Which attention kernel runs where."""

from importlib import metadata

from conf.words import Invalid

PACKAGES = {  # of FlashAttention's versions: as pip calls it, and its major version
    "flash_attn_3": ("flash-attn-3", "3"),
    "flash_attn_4": ("flash-attn-4", "4"),
    "flash_attn": ("flash-attn", "2"),
}
GPUS = {"flash_attn_3": "a Hopper GPU, ", "flash_attn_4": "a Hopper or Blackwell GPU, "}  # where not all since Ampere
HOPPER, BLACKWELL = 9, (10, 11, 12)  # the first numbers of compute capabilities


def kernel_that_runs(name: str, device: str, dtype: str, head_dim: int, generation: int = 0) -> str:
    """The kernel called `name`; for `auto` the fastest that runs on this device, dtype and head_dim.

    generation: of the GPU, the first number of its compute capability. The fastest is the first: on Hopper
    FlashAttention-2 reaches half of what its successors do. Raises Invalid if the named kernel does not run there.
    """
    flash = device == "cuda" and dtype in ("float16", "bfloat16") and head_dim % 8 == 0 and head_dim <= 256
    able = {
        "flash_attn_3": flash and generation == HOPPER and installed("flash_attn_3"),
        "flash_attn_4": flash and tiles_of_4(generation, head_dim) and installed("flash_attn_4"),
        "flash_attn": flash and installed("flash_attn"),
        "sdpa": device == "cpu" or flash,
        "math": True,
    }
    if name == "auto":
        name = next(kernel for kernel, runs in able.items() if runs)
    if not able[name]:
        fits = ", ".join(kernel for kernel, runs in able.items() if runs)
        needs = f" and the {PACKAGES[name][0]} package" if name in PACKAGES and not installed(name) else ""
        raise Invalid(
            f"attention.kernel={name} needs CUDA, {GPUS.get(name, '')}a 16-bit dtype, head_dim a multiple of 8 up to "
            f"256{needs}; on {device} with {dtype} and head_dim {head_dim} these run: {fits}"
        )
    return name


def tiles_of_4(generation: int, head_dim: int) -> bool:
    """As its _validate_head_dims has it; what it does not look at, consumers' Blackwell, up to what all have."""
    return generation == HOPPER or (
        generation in BLACKWELL and (head_dim <= 128 or (head_dim == 256 and generation != 12))
    )


def installed(kernel: str) -> bool:
    """Is a FlashAttention's package here? pip is asked, as to look for a module in a package imports that, and torch.

    And flash-attn has a folder of an early flash-attn-4 in it. The major version is that of no placeholder on PyPI.
    """
    package, major = PACKAGES[kernel]
    try:
        return metadata.version(package).split(".")[0] == major
    except metadata.PackageNotFoundError:
        return False
