"""Where the settings of `tucka train` come from: flags, a --config file, a --jobs file, a --sweep."""

import argparse
import contextlib
import itertools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from tucka_runtime.cli.train_flags import FLAGS, Flag
from tucka_runtime.errors import ConfigError, TuckaError

KNOWN = {flag.name: flag for flag in FLAGS}
COMMON = ("model", "dtype", "load_in", "device", "num_threads", "gradient_checkpointing")
"""What jobs that go through one base together have in common."""
SWEPT = [
    f.name
    for f in FLAGS
    if f.of_run and f.name not in COMMON and not isinstance(f.default, list) and f.type is not Path
]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def complete(given: argparse.Namespace) -> argparse.Namespace:
    """What was given, else what the --config file says, else the default. Raises ConfigError for the file."""
    args = _complete(given, _config(given))
    _check(args)
    return args


def jobs_of(given: argparse.Namespace) -> dict[str, argparse.Namespace]:
    """The settings of each job by its name, of a --jobs file or a --sweep. Raises ConfigError."""
    if given.jobs and (given.sweep or given.config):
        raise ConfigError("--jobs says all of its jobs' settings: give it without --sweep and --config.")
    jobs = _swept(given) if given.sweep else _listed(given)
    for name, args in jobs.items():
        with named(name):
            _check(args)
    for setting in COMMON:
        if len({str(getattr(args, setting)) for args in jobs.values()}) > 1:
            raise ConfigError(
                f"{setting} must be the same for all jobs, which go through one base: it belongs into `defaults`."
            )
    first: dict[Path, str] = {}
    for name, args in jobs.items():
        other = first.setdefault(args.out.resolve(), name)
        if other != name:
            raise ConfigError(f"job {name}: its out is that of job {other}.")
    published = [args.name or args.out.resolve().name for args in jobs.values() if args.publish]
    if len(set(published)) < len(published):
        raise ConfigError("Several jobs would be published under one name: give each its own `name`, or none.")
    return jobs


@contextlib.contextmanager
def named(job: str) -> Iterator[None]:
    """What is refused inside is said with the job's name."""
    try:
        yield
    except TuckaError as error:
        raise ConfigError(f"job {job}: {error.message}") from error


def _complete(given: argparse.Namespace, file: Mapping[str, Any]) -> argparse.Namespace:
    """A file's `overwrite` says how it begins, and --resume how it goes on: what is given wins, and the reverse."""
    for flag, other in (("resume", "overwrite"), ("overwrite", "resume")):
        if getattr(given, flag, False):
            file = {name: value for name, value in file.items() if name != other}
    return argparse.Namespace(**{f.name: getattr(given, f.name, file.get(f.name, f.default)) for f in FLAGS})


def _check(args: argparse.Namespace) -> None:
    for name in ("data", "out"):
        if getattr(args, name) is None:
            raise ConfigError(f"--{name} is missing: give it here or in the --config file.")
    if args.resume and args.overwrite:
        raise ConfigError("--resume continues what is in --out, and --overwrite replaces it: give one of the two.")


def _listed(given: argparse.Namespace) -> dict[str, argparse.Namespace]:
    table = _mapping(given.jobs)
    if unknown := sorted(str(key) for key in table if key not in ("defaults", "jobs")):
        raise ConfigError(f"{given.jobs} has `defaults` and `jobs` at its top, not {', '.join(unknown)}.")
    listed = table.get("jobs")
    if not isinstance(listed, dict) or not listed:
        raise ConfigError(f"{given.jobs} must have `jobs`: a mapping of names to their settings.")
    defaults = _settings(table.get("defaults") or {}, f"{given.jobs}: defaults")
    jobs = {}
    for key, own in listed.items():
        name = str(key)
        if not _NAME.fullmatch(name):
            raise ConfigError(f"{given.jobs}: a job's name has letters, digits, '.', '_' and '-', not {name!r}.")
        settings = _settings(own or {}, f"{given.jobs}: job {name}")
        args = jobs[name] = _complete(given, defaults | settings)
        if args.out is not None and (hasattr(given, "out") or "out" not in settings):
            args.out = args.out / name
    return jobs


def _swept(given: argparse.Namespace) -> dict[str, argparse.Namespace]:
    axes: dict[str, dict[str, Any]] = {}
    for text in given.sweep:
        key, _, listed = text.partition("=")
        name = key.strip().replace("-", "_")
        if name not in SWEPT:
            raise ConfigError(f"--sweep {key}: not a setting that can be swept. These can: {', '.join(SWEPT)}.")
        words = [word.strip() for word in listed.split(",")]
        if name in axes or len(set(words)) < len(words) or not all(map(_NAME.fullmatch, words)):
            raise ConfigError(f"--sweep {name} must be given once, with different values: --sweep {name}=A,B.")
        axes[name] = {word: _converted(KNOWN[name], yaml.safe_load(word)) for word in words}
    whole = complete(given)
    jobs = {}
    for values in itertools.product(*(axis.items() for axis in axes.values())):
        name = "_".join(f"{axis}-{word}" for axis, (word, _) in zip(axes, values, strict=True))
        chosen = {axis: value for axis, (_, value) in zip(axes, values, strict=True)}
        jobs[name] = argparse.Namespace(**vars(whole) | chosen | {"out": whole.out / name})
    return jobs


def _config(given: argparse.Namespace) -> dict[str, Any]:
    return _settings(_mapping(given.config), str(given.config)) if given.config else {}


def _mapping(path: Path) -> dict[Any, Any]:
    """A YAML file that is a mapping. Raises ConfigError."""
    try:
        table = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"The configuration file {path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, ValueError):
        raise ConfigError(f"The configuration file {path} is not valid YAML.") from None
    if not isinstance(table, dict):
        raise ConfigError(f"The configuration file {path} must be a mapping of flags to values, as `lr: 0.002`.")
    return table


def _settings(table: Any, where: str) -> dict[str, Any]:
    """Settings of the types that the flags have. Raises ConfigError."""
    if not isinstance(table, dict):
        raise ConfigError(f"{where} must be a mapping of flags to values, as `lr: 0.002`.")
    values = {str(name).replace("-", "_"): value for name, value in table.items()}
    if unknown := sorted(set(values) - set(KNOWN)):
        raise ConfigError(
            f"{where} names what is no flag of tucka train: {', '.join(unknown)}. There are {', '.join(KNOWN)}."
        )
    return {name: _converted(KNOWN[name], value) for name, value in values.items() if value is not None}


def _converted(flag: Flag, value: Any) -> Any:
    wanted = flag.type
    if isinstance(flag.default, list):
        names = value if isinstance(value, list) else [value]
        if not all(isinstance(name, str) for name in names):
            raise ConfigError(f"{flag.name} in the configuration file must be a name or a list of names.")
        for name in names:
            _check_choice(flag, name)
        return names or flag.default
    if wanted is float and isinstance(value, str):  # YAML reads 2e-3, without a point, as text
        with contextlib.suppress(ValueError):
            value = float(value)
    if wanted is float and type(value) is int:
        value = float(value)
    if not isinstance(value, str if wanted is Path else wanted) or (wanted is int and isinstance(value, bool)):
        raise ConfigError(f"{flag.name} in the configuration file must be a {wanted.__name__.lower()}.")
    _check_choice(flag, value)
    return Path(str(value)) if wanted is Path else value


def _check_choice(flag: Flag, value: Any) -> None:
    if flag.choices and value not in flag.choices:
        raise ConfigError(f"{flag.name} in the configuration file must be one of {', '.join(flag.choices)}.")
