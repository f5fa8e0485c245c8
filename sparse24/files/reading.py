"""Reading JSON files, whoever wrote or damaged them."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import Sparse24Error


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises OSError when it cannot be read, Sparse24Error when it is anything else."""
    return parse_json(path.read_bytes(), str(path))


def parse_json(text: str | bytes, where: str) -> dict:
    """The object in `text`; Sparse24Error, naming `where`, for whatever hostile or damaged text does to a parser."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # not JSON or UTF-8, thousands of digits, or of nested brackets
        raise Sparse24Error(f"{where} is not JSON ({(str(error).splitlines() or ['no detail'])[0]})") from error
    if not isinstance(value, dict):
        raise Sparse24Error(f"{where} is not a JSON object but {type(value).__name__}")
    return value
