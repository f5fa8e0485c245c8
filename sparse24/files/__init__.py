"""Files and folders: whole or not there, known by their digests, written by one process at a time."""

from .digests import DIGESTS, check_seal, seal, sha256
from .locks import LOCK, locked
from .reading import parse_json, read_json
from .writing import (
    empty,
    refusals_named,
    remove_folder,
    remove_unfinished,
    write_atomically,
    write_folder_atomically,
    write_text_atomically,
)

__all__ = [
    "DIGESTS",
    "LOCK",
    "check_seal",
    "empty",
    "locked",
    "parse_json",
    "read_json",
    "refusals_named",
    "remove_folder",
    "remove_unfinished",
    "seal",
    "sha256",
    "write_atomically",
    "write_folder_atomically",
    "write_text_atomically",
]
