"""Errors of sparse24. Every message names the argument, the rule, the value and the remedy."""


class Sparse24Error(ValueError):
    """A bad argument, shape, setting or file."""


class Sparse24DtypeError(Sparse24Error, TypeError):
    """A dtype or Python type that a function does not take, or two dtypes that do not fit together."""


class Sparse24BuildError(Sparse24Error, RuntimeError):
    """The compiled library is missing, of another version, or lacks kernels for this GPU."""


class Sparse24FileError(Sparse24Error, OSError):
    """A file or folder that the operating system refuses: a full disk, a read-only one, no permission."""

    reason = ""  # the system's words, without the name of the file


class Sparse24MissingFileError(Sparse24FileError, FileNotFoundError):
    """A file to be read is not there."""


class Sparse24Warning(UserWarning):
    """Something works, but more slowly or otherwise than one may expect."""
