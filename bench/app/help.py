"""`python -m bench --help`: every key with its default and its meaning, from their declaration."""

from conf.groups import CHOSEN, OPEN, options
from conf.keys import MISSING, keys
from conf.labels import text

HEAD = """bench: run one configuration, or with -m a sweep, of sequence-parallel Llama training.

  python -m bench strategy=ring seq_len=4096 world_size=4
  python -m bench -m strategy=tp_sp,ulysses,ring seq_len=1024,2048 name=mine
  python -m bench -m sweep=quickstart
"""
FOOT = """
Results: runs/<name>/results.csv, one row per configuration, and a folder each with record.json and comm.csv
(python -m analysis columns says what each column means).
Hydra's own options: python -m bench --hydra-help.
Tab completion, of the installed command: eval "$(bench -sc install=bash)"
"""
WIDTH = 34  # of a key and its default


def help() -> str:
    """Groups, keys and what they mean."""
    lines = [HEAD, "Groups (GROUP=CHOICE)", ""]
    lines += [f"  {group}: {', '.join(options(group))}" for group in (*CHOSEN, *OPEN)]
    lines += ["", "Keys and defaults (KEY=VALUE)", ""]
    for path, key in keys().items():
        if path not in CHOSEN.values() and not path.startswith("cluster."):
            said = f"  {path}: {'' if key.default == MISSING else text(key.default) or 'null'}"
            told = all(str(choice) in key.says for choice in key.choices)
            choices = "" if told else f" ({' | '.join(map(str, key.choices))})"
            lines.append(f"{said:{WIDTH}}  {key.says}{choices}")
    return "\n".join(lines) + "\n" + FOOT
