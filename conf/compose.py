"""From key=value on a command line to a Config, by Hydra; and what Hydra refuses, in one sentence."""

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import cache
from itertools import islice
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, QuotedString, RangeSweep
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from conf import clusters, meshes
from conf.groups import BY_CHOICES, CHOSEN, HERE, OPEN, options, written
from conf.keys import HUGE, Config, RopeScaling, keys
from conf.words import Invalid, did_you_mean, in_a_line, one_of

REFUSED = (HydraException, OmegaConfBaseException, Invalid, AssertionError)  # the last is OmegaConf's of null sections
MOST_SWEPT = 10_000  # configurations in a sweep
LONGEST_WORD = 10_000  # of a command line, in characters
PLUGINS = {"joblib": "hydra-joblib-launcher", "optuna": "hydra-optuna-sweeper"}  # of Hydra, which may not be here


@cache
def register() -> None:
    """Tell Hydra the keys, and the groups that are not yaml files of this folder."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for name in meshes.names():
        ranks = {"world_size": 1} if meshes.alone in meshes.footing_of(name).needs else {}
        store.store(group="strategy", name=name, node={"strategy": {"name": name}, **ranks}, package="_global_")
    for group in BY_CHOICES:
        for name in options(group):
            store.store(group=group, name=name, node={"name": name})
    store.store(group="cluster", name="none", node={"cluster": None}, package="_global_")
    chosen = [{group: keys()[path].default} for group, path in CHOSEN.items()]
    store.store(name="keys", node={"defaults": ["schema", "_self_", *chosen, *({group: None} for group in OPEN)]})


def configuration(overrides: Sequence[str]) -> Config:
    """The configuration that `python -m bench OVERRIDES` runs. Raises one of REFUSED."""
    check_overrides(overrides)
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(HERE), version_base="1.3"):
        return config_of(compose("keys", overrides=list(overrides)))


def check_overrides(overrides: Sequence[str], multirun: bool = False) -> None:
    """What Hydra would take for something else, do somewhere else, or answer at length."""
    configurations = 1
    for override in parsed(overrides):
        said, values = override.input_line, values_of(override)
        check_word(override, values)
        if not multirun and (override.is_sweep_override() or (override.key_or_group == "sweep" and values != [None])):
            raise Invalid(f"{said} is a sweep; python -m bench -m {shlex.join(overrides)} would do")
        if (configurations := configurations * len(values)) > MOST_SWEPT:
            raise Invalid(f"{said}: these are more than {MOST_SWEPT} configurations; fewer values would do")


def check_word(override: Override, values: list[Any]) -> None:
    """Does it name a key, a group or what is left of Hydra's, and could these be its values?"""
    name, said = override.key_or_group, str(override.input_line)
    inside = [path for path in paths() if path.startswith(f"{name}.")]
    if not name:
        raise Invalid(f"{said!r} names no key")
    if name.partition(".")[0].partition("/")[0] == "hydra":
        check_hydra(said)
    elif not (inside or name in (*CHOSEN, *OPEN, *paths())) or override.package is not None:
        raise Invalid(no_such_key(name if override.package is None else f"{name}@{override.package}"))
    elif override.is_delete():
        raise Invalid(f"{name} cannot be taken away; a value of it would do")
    elif name in (*CHOSEN, *OPEN):
        for value in values:
            word = value.text if isinstance(value, QuotedString) else "null" if value is None else value
            if name == "cluster" and clusters.is_file(str(word)):
                clusters.offer(str(word))
            elif word not in options(name) and (name, value) != ("sweep", None):
                raise Invalid(one_of(name, word, options(name)))
    elif written(name) != name:
        raise Invalid(f"{said}: {written(name)}=... chooses it, with all that belongs to it")
    elif inside and not (name in keys() and values == [None]):
        raise Invalid(f"{said}: {name} holds {', '.join(inside)}; {inside[0]}=... would do")
    elif name == "name":
        for value in values:
            check_name(value.text if isinstance(value, QuotedString) else str(value))
    elif any(isinstance(number, int) and abs(number) >= HUGE for number in flat(values)):
        raise Invalid(f"{said}: no key takes so large a number")


def check_hydra(said: str) -> None:
    """Who launches and who sweeps can be chosen. Where Hydra writes, and which code it calls, cannot."""
    if re.match(r"\+*hydra\.(run|sweep)\.", said):
        raise Invalid(f"{said}: results go to runs/<name>/; name=mine would do")
    ours = re.match(r"\+*hydra(/(launcher|sweeper)(/\w+)*=\w+$|\.(launcher|sweeper)\.)", said)
    if not ours or re.search(r"_target_|custom_search_space|storage|temp_folder|\bname\b|\$\{", said):
        raise Invalid(f"{said}: of Hydra's own only hydra/launcher, hydra/sweeper and their keys can be chosen")


def check_name(name: str) -> None:
    if not re.fullmatch(r"(?!\.)[\w.+=, -]{1,100}", name) or len(name.encode()) > 200:
        raise Invalid(f"name={name[:40]!r} is no name of a folder in runs/; letters, digits, - and _ would do")


@cache
def paths() -> list[str]:
    """Whatever can stand before =, but groups."""
    return [*keys(), *(f"model.rope_scaling.{field.name}" for field in fields(RopeScaling))]


def parsed(overrides: Sequence[str]) -> list[Override]:
    """The words of a command line. Raises Invalid for what is no key=value."""
    for word in overrides:
        if len(word) > LONGEST_WORD:
            raise Invalid(f"{word[:40]}... has {len(word)} characters, and at most {LONGEST_WORD} are read")
    parser = OverridesParser.create()
    found = []
    for word in overrides:
        try:
            found.append(parser.parse_override(word))
        except (HydraException, ValueError, RecursionError):  # the latter for long numbers, and many brackets
            raise Invalid(f"{word!r} is no key=value") from None
    return found


def values_of(override: Override) -> list[Any]:
    """The value, or every value of a sweep over several."""
    value = override.value()
    if isinstance(value, RangeSweep):
        try:
            return list(islice(value.range(), MOST_SWEPT + 1))
        except (ValueError, ArithmeticError):
            raise Invalid(f"{override.input_line} is no range of numbers") from None
    return list(value.list) if isinstance(value, ChoiceSweep) else [value]


def flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        yield from flat(value) if isinstance(value, list) else [value]


def config_of(composed: DictConfig) -> Config:
    """What Hydra has composed, if it is all there and nothing else."""
    names = [str(name) for name in composed if name != "hydra"]
    values: Any = OmegaConf.to_container(OmegaConf.masked_copy(composed, names), resolve=True)
    check_known(values, schema())
    config = Config.of(values)
    check_name(config.name)
    config.device = {"gpu": "cuda"}.get(config.device, config.device)
    return config


@cache
def schema() -> Any:
    return OmegaConf.to_container(OmegaConf.structured(Config))


def check_known(values: Mapping, schema: Any, path: str = "") -> None:
    """`+key=value` adds and `~key` takes away; neither has a meaning here."""
    for name, value in values.items():
        if isinstance(schema, Mapping) and name not in schema:
            raise Invalid(no_such_key(f"{path}{name}"))
        if isinstance(value, Mapping) and isinstance(schema.get(name), Mapping):
            check_known(value, schema[name], f"{path}{name}.")
    for name in schema if isinstance(schema, Mapping) else ():
        if name not in values:
            raise Invalid(f"{path}{name} cannot be taken away; a value of it would do")


def no_such_key(path: str) -> str:
    known = [*CHOSEN, *OPEN, *(path for path in keys() if path not in CHOSEN.values())]
    return f"there is no key {path}{did_you_mean(path, known)}"


def sentence(error: Exception) -> str:
    """What was refused, in one sentence: the key, what is wrong with it, and the nearest that would do."""
    return in_a_line(explained(error))


def explained(error: Exception) -> str:
    if isinstance(error, MissingConfigException) and error.options:
        group, _, choice = (error.missing_cfg_file or "").rpartition("/")
        if choice in PLUGINS:
            return f"{group}={choice} needs a package; pip install {PLUGINS[choice]} would do"
        return one_of(group, choice, error.options)
    if isinstance(error, AssertionError):
        return (
            "a key of a section that is null cannot be changed; cluster=h100, model=llama3_8b (rope_scaling) have one"
        )
    cause = error.__cause__ or error
    if isinstance(cause, (ConfigKeyError, ConfigAttributeError)):
        return no_such_key(str(cause.full_key or cause.key))
    first_lines = [str(error).splitlines()[0], str(cause).splitlines()[0]]
    said = ": ".join(dict.fromkeys(line.rstrip(".") for line in first_lines))
    key = getattr(cause, "full_key", None) or ""
    return said if key in said else f"{key}: {said}"
