"""Bytes and tokens as they are read: in units of 1024, held and sent alike. Rates are in GB/s, as links are sold."""

GIB = 2**30
UNITS = ((2**40, "TiB"), (GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))


def unit(n: float) -> tuple[int, str]:
    """The largest unit of which n bytes are one or more: its bytes and its name."""
    return next((each for each in UNITS if n >= each[0]), UNITS[-1])


def size(n: float) -> str:
    """512 B, 1.5 KiB, 3.194 TiB"""
    of, name = unit(n)
    return f"{n / of:.4g} {name}"


def tokens(n: float, _: object = None) -> str:
    """512, 64K, 1M: of those that are round. As a formatter of axes, too."""
    for of, name in ((2**20, "M"), (2**10, "K")):
        if n >= of and n % of == 0:
            return f"{n / of:g}{name}"
    return f"{n:g}"


def about(n: float) -> str:
    """112K, 1.03M of any; a dash for none."""
    for of, name in ((2**20, "M"), (2**10, "K")):
        if n >= of:
            return f"{n / of:.3g}{name}"
    return f"{n:g}" if n else "-"
