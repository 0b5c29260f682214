"""One exposition of several servers' metrics: each figure says whose it is."""

import re
from collections.abc import Mapping

_SAMPLE = re.compile(r"([A-Za-z_:][\w:]*)(?:\{(.*)\})? (.+)")


def merged(expositions: Mapping[str, str]) -> str:
    """Prometheus' text format, with the label `replica`. What belongs to a family stands together, as the format asks,
    below the comments that the first replica has for it."""
    families: dict[str, tuple[dict[str, str], list[str]]] = {}
    for replica, text in expositions.items():
        comments: dict[str, str] = {}
        samples: list[str] = []
        for line in text.splitlines():
            if line.startswith("# "):
                _, kind, family, _ = line.split(" ", 3)
                comments, samples = families.setdefault(family, ({}, []))
                comments.setdefault(kind, line)
            elif (sample := _SAMPLE.fullmatch(line)) is not None:
                labels = f"{sample[2]}," if sample[2] else ""
                samples.append(f'{sample[1]}{{{labels}replica="{replica}"}} {sample[3]}')
    return "".join(f"{line}\n" for kinds, samples in families.values() for line in (*kinds.values(), *samples))
