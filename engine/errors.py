"""The errors this engine raises on purpose.

Every message says what was given, what is wanted and what to do. All of them are ``ValueError``
too, so a caller that knows nothing of this module can still catch what it did wrong.
"""

from __future__ import annotations


class EngineError(ValueError):
    """Base of every error that the engine raises on purpose."""


class ConfigError(EngineError):
    """A setting is unknown, has a value outside its range, or contradicts another one."""


class ModelError(EngineError):
    """A model folder, its ``config.json`` or one of its tensors is not what is wanted."""


class CheckpointError(EngineError):
    """A checkpoint is incomplete, damaged, or belongs to another run."""


class OutputError(EngineError):
    """The disk, or a folder's rights, refuse what the engine has to write."""


class OpError(EngineError):
    """An op got shapes, types or values that it does not take, or a backend that cannot run it."""


class DataError(EngineError):
    """A row or a file of data cannot be used.

    ``where`` names the file and line (or the row of a table), ``reason`` what is wrong with it,
    ``kind`` a short stable name of the reason, under which rows left out are counted.
    """

    def __init__(self, where: str, reason: str, kind: str = "bad row") -> None:
        super().__init__(where, reason, kind)  # all three in args: the error survives pickling
        self.where = where
        self.reason = reason
        self.kind = kind

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"
