"""From key=value on a command line to a Config, by Hydra; and what Hydra refuses, in one sentence."""

import re
import shlex
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, QuotedString
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from conf import meshes
from conf.groups import CHOSEN, HERE, OPEN, options, written
from conf.keys import Config, keys
from conf.words import Invalid, did_you_mean, one_of

REFUSED = (HydraException, OmegaConfBaseException, Invalid, AssertionError)  # the last is OmegaConf's of null sections


@cache
def register() -> None:
    """Tell Hydra the keys, and the groups that are not yaml files of this folder: strategies and data."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for name in meshes.names():
        ranks = {"world_size": 1} if meshes.alone in meshes.footing_of(name).needs else {}
        store.store(group="strategy", name=name, node={"strategy": {"name": name}, **ranks}, package="_global_")
    for name in keys()["data.name"].choices:
        store.store(group="data", name=name, node={"name": name})
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
    """What Hydra would take for something else, or answer at length."""
    for override in parsed(overrides):
        name, said, values = override.key_or_group, override.input_line, values_of(override)
        inside = [path for path in keys() if path.startswith(f"{name}.")]
        if not name:
            raise Invalid(f"{said!r} names no key")
        if name in (*CHOSEN, *OPEN) and not (override.is_delete() or name == "sweep"):
            for value in values:
                if not isinstance(value, (str, QuotedString)):
                    raise Invalid(one_of(name, "null" if value is None else value, options(name)))
        elif written(name) != name:
            raise Invalid(f"{said}: {written(name)}=... chooses it, with all that belongs to it")
        elif inside and not all(isinstance(value, dict) for value in values):
            raise Invalid(f"{said}: {name} holds {', '.join(inside)}; {inside[0]}=... would do")
        if not multirun and (override.is_sweep_override() or (name == "sweep" and override.value() is not None)):
            raise Invalid(f"{said} is a sweep; python -m bench -m {shlex.join(overrides)} would do")


def parsed(overrides: Sequence[str]) -> list[Override]:
    """The words of a command line. Raises Invalid for what is no key=value."""
    try:
        return OverridesParser.create().parse_overrides(list(overrides))
    except OverrideParseException as error:
        raise Invalid(f"{error.override!r} is no key=value") from None


def values_of(override: Override) -> list[Any]:
    """The value, or every value of a sweep over several."""
    value = override.value()
    return list(value.list) if isinstance(value, ChoiceSweep) else [value]


def config_of(composed: DictConfig) -> Config:
    """What Hydra has composed, if it is all there and nothing else."""
    names = [str(name) for name in composed if name != "hydra"]
    values: Any = OmegaConf.to_container(OmegaConf.masked_copy(composed, names), resolve=True)
    check_known(values, schema())
    config = Config.of(values)
    if not re.fullmatch(r"(?!\.)[\w.+=, -]{1,100}", config.name):
        raise Invalid(f"name={config.name[:40]!r} is no name of a folder in runs/; letters, digits, - and _ would do")
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
    if isinstance(error, MissingConfigException) and error.options:
        group, _, choice = (error.missing_cfg_file or "").rpartition("/")
        return one_of(group, choice, error.options)
    if isinstance(error, AssertionError):
        return (
            "a key of a section that is null cannot be changed; cluster=h100, model=llama3_8b (rope_scaling) have one"
        )
    cause = error.__cause__ or error
    if isinstance(cause, (ConfigKeyError, ConfigAttributeError)):
        return no_such_key(str(cause.full_key or cause.key))
    first_lines = [str(error).splitlines()[0], str(cause).splitlines()[0]]
    return ": ".join(dict.fromkeys(line.rstrip(".") for line in first_lines))
