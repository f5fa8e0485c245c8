"""Reading the settings that a run was saved with, and comparing them with those that are asked for now."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

from ..errors import Sparse24Error
from ..files import read_json
from ..options import fits
from .settings import Settings


def load_config(out: Path) -> dict[str, Any]:
    """config.json of a run: `sparse24` (version), `data` (digest) and `settings`.

    Raises Sparse24Error when it is missing or not of this kind.
    """
    path = out / "config.json"
    try:
        config = read_json(path)
        _ = config["data"], from_json(config["settings"])
    except OSError as e:
        raise Sparse24Error(
            f"--out {out} holds no run ({path}: {e.strerror}); check the path, or leave --resume out to start one"
        ) from e
    except (Sparse24Error, KeyError, TypeError, AttributeError) as e:
        raise Sparse24Error(f"{path} is not the config.json of a run ({e}); name another --out") from e
    return config


def from_json(values: dict[str, Any]) -> Settings:
    """Settings as `to_json` gave them; names that this version does not know are left out.

    Raises Sparse24Error for a value that is not of its field's type.
    """
    hints = typing.get_type_hints(Settings)
    known = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in hints}
    for name, value in known.items():
        if not fits(value, hints[name]):
            raise Sparse24Error(f"{name} is {value!r}")
    return Settings(**known)


def differences(saved: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Settings that decide the weights and are not equal, each as 'name was a, is b'."""
    free = {f.name for f in dataclasses.fields(Settings) if f.metadata["free"]}
    plain = json.loads(json.dumps(wanted))  # tuples become lists, as in the saved ones
    saved = json.loads(json.dumps(saved))
    return [f"{k} was {saved.get(k)!r}, is {v!r}" for k, v in plain.items() if k not in free and saved.get(k) != v]
