"""One colour and one marker a strategy, in every picture: Okabe and Ito's palette, safe for colour-blind readers."""

COLOURS = {
    "single": "#000000",
    "zero": "#7f7f7f",
    "tp": "#e69f00",
    "tp_sp": "#d55e00",
    "ulysses": "#0072b2",
    "ring": "#009e73",
    "usp": "#56b4e9",
    "tp_usp": "#cc79a7",
    "odysseus": "#8c6d00",
}
MARKERS = {
    "single": "x",
    "zero": "+",
    "tp": "v",
    "tp_sp": "^",
    "ulysses": "o",
    "ring": "s",
    "usp": "D",
    "tp_usp": "P",
    "odysseus": "*",
}
KINDS = {  # collectives
    "all_gather": "#0072b2",
    "reduce_scatter": "#56b4e9",
    "all_reduce": "#e69f00",
    "all_to_all": "#009e73",
    "p2p": "#cc79a7",
}
PARTS = {  # of memory
    "param": "#0072b2",
    "grad": "#56b4e9",
    "optimizer": "#009e73",
    "activation": "#e69f00",
    "other": "#bbbbbb",
}


def colour(strategy: str) -> str:
    return COLOURS.get(strategy, "#444444")


def marker(strategy: str) -> str:
    return MARKERS.get(strategy, ".")
