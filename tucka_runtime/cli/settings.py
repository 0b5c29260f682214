"""The two configs from flags, environment and file. A flag wins over `TUCKA_<FIELD>`, that over --config, that over the
default. All three are read from the fields of `tucka_runtime.config`.
"""

import argparse
import os
import re
import typing
from collections.abc import Mapping
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from tucka_runtime.config import EngineConfig, ServerConfig
from tucka_runtime.errors import ConfigError

C = TypeVar("C", EngineConfig, ServerConfig)

SOURCES = (
    "Every setting is a flag, an environment variable (TUCKA_MAX_NUM_SEQS for --max-num-seqs) and a key of the "
    "--config file (max_num_seqs). A flag wins over the environment, that over the file, that over the default. "
    "Several values: the flag again for each, commas in the variable (TUCKA_ADAPTER=law=/a/law,fin=/a/fin), a list in "
    "the file."
)

_SWITCHES = {"true": True, "1": True, "false": False, "0": False}
_PLAIN = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string (in quotes, if it looks like something else)",
}
_FOR_CLIENTS = {"TUCKA_CLIENT_KEY"}
_SOURCE_TOKEN = "TUCKA_SOURCE_TOKEN_"  # adapters/readers.py
_SERVICE_LINK = re.compile(r"_SERVICE_(HOST|PORT)|_PORT_\d+_")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One flag per field; what is not given stays out of the namespace."""
    for kind, title in ((EngineConfig, "engine"), (ServerConfig, "server")):
        group = parser.add_argument_group(title)
        for field in fields(kind):
            repeatable = field.default == () or isinstance(field.default, tuple)
            text = field.metadata["help"]
            if field.default is not None and not repeatable:
                text += f" (default: {field.default})"
            if _kind(field) is bool:
                action = argparse.BooleanOptionalAction
                group.add_argument(_flag(field), dest=field.name, action=action, default=argparse.SUPPRESS, help=text)
                continue
            metavar = field.metadata.get("metavar") or ("N" if _kind(field) is int else None)
            choices = field.metadata.get("choices")
            group.add_argument(
                _flag(field),
                dest=field.name,
                type=_kind(field),
                action="append" if repeatable else "store",
                choices=choices,
                metavar=None if choices else metavar or field.name.upper(),
                default=argparse.SUPPRESS,
                help=text.replace("%", "%%"),
            )
    parser.add_argument("--config", metavar="FILE", help="YAML file of these settings, named as the flags are")


def read_settings(
    flags: Mapping[str, Any], environment: Mapping[str, str], file: Mapping[str, Any] | None = None
) -> tuple[EngineConfig, ServerConfig]:
    """Builds both configs. `file` is what stands in the place of --config, of another file. Raises ConfigError."""
    if file is not None:
        file = _with_fields(file)
    else:
        file = _read_file(flags["config"]) if flags.get("config") else {}
    if unknown := sorted(set(file) - _names()):
        raise ConfigError(f"The configuration file has unknown settings: {', '.join(unknown)}. See tucka serve --help.")
    return _build(EngineConfig, flags, environment, file), _build(ServerConfig, flags, environment, file)


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """TUCKA_* variables that set nothing: a misspelt one must not pass unseen. What Kubernetes says of Services whose
    name begins with `tucka` is left out."""
    known = {f"TUCKA_{name.upper()}" for name in _names()} | _FOR_CLIENTS
    return sorted(
        name
        for name, value in environment.items()
        if name.startswith("TUCKA_")
        and name not in known
        and not (name.startswith(_SOURCE_TOKEN) or _SERVICE_LINK.search(name) or _is_link(value))
    )


def _names() -> set[str]:
    return {field.name for kind in (EngineConfig, ServerConfig) for field in fields(kind)}


def _is_link(value: str) -> bool:
    """Whether it is what Kubernetes puts into NAME_PORT for a Service."""
    return value.startswith(("tcp://", "udp://", "sctp://"))


def _build(kind: type[C], flags: Mapping[str, Any], environment: Mapping[str, str], file: Mapping[str, Any]) -> C:
    values: dict[str, Any] = {}
    for field in fields(kind):
        variable = f"TUCKA_{field.name.upper()}"
        if field.name in flags:
            values[field.name] = flags[field.name]
        elif environment.get(variable) or (variable in environment and "secret" in field.metadata):
            values[field.name] = _from_text(field, environment[variable], variable)
        elif file.get(field.name) is not None:
            values[field.name] = _from_yaml(field, file[field.name])
        if isinstance(field.default, tuple) and field.name in values:
            values[field.name] = tuple(values[field.name])
    return kind(**values)


def _from_text(field: Field[Any], text: str, variable: str) -> Any:
    if isinstance(field.default, tuple):
        # an empty key is refused later: dropped, it would leave the server open
        return [item for item in text.split(",") if item or "secret" in field.metadata]
    if _kind(field) is bool:
        if text.lower() not in _SWITCHES:
            raise ConfigError(f"{variable} must be true or false.")
        return _SWITCHES[text.lower()]
    if variable == "TUCKA_PORT" and _is_link(text):
        raise ConfigError(
            "TUCKA_PORT is an address: Kubernetes sets it in every pod beside a Service named `tucka`. Rename the "
            "Service, or write `enableServiceLinks: false` into the pod's spec."
        )
    try:
        return _kind(field)(text)
    except ValueError:
        raise ConfigError(f"{variable} must be {_PLAIN[_kind(field)]}.") from None


def _from_yaml(field: Field[Any], value: Any) -> Any:
    if isinstance(field.default, tuple):
        items = value if isinstance(value, list) else [value]
        if all(isinstance(item, str) for item in items):
            return items
        form = f"{field.name}: [{field.metadata.get('metavar') or field.name.upper()}, ...]"
        raise ConfigError(f"{field.name} in the configuration file must be a list of strings, as `{form}`.")
    if type(value) is _kind(field):
        return value
    if _kind(field) is float and type(value) is int:
        return float(value)
    raise ConfigError(f"{field.name} in the configuration file must be {_PLAIN[_kind(field)]}.")


def _read_file(path: str) -> dict[str, Any]:
    try:
        value = yaml.safe_load(Path(path).read_text("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"The configuration file {path} cannot be read: {error.strerror}.") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ConfigError(f"The configuration file {path} is not valid YAML{where}: {error.problem}.") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise ConfigError(f"The configuration file {path} is not valid YAML: it is not a text file.") from None
    except ValueError as error:  # a date that no calendar has
        raise ConfigError(f"The configuration file {path} is not valid YAML: {error}.") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"The configuration file {path} must be a mapping of settings to values.")
    return _with_fields(value)


def _with_fields(settings: Mapping[str, Any]) -> dict[str, Any]:
    """By the fields' names: a file may have those of the flags."""
    return {str(name).replace("-", "_"): item for name, item in settings.items()}


def _kind(field: Field[Any]) -> type:
    """int, float, str or bool: of the field itself, of its items, or beside None."""
    inner = [item for item in typing.get_args(field.type) if item not in (type(None), Ellipsis)]
    return inner[0] if inner else field.type  # type: ignore[return-value]


def _flag(field: Field[Any]) -> str:
    return "--" + field.name.replace("_", "-")


def from_environment(
    flags: argparse.Namespace, file: Mapping[str, Any] | None = None
) -> tuple[EngineConfig, ServerConfig]:
    return read_settings(vars(flags), os.environ, file)
