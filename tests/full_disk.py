"""A disk that is full from the n-th write into a folder on."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any


class FullDisk:
    """From the n-th write into a folder on every one fails, as on a disk that is full."""

    EVENTS = frozenset({"os.rename", "os.mkdir"})

    def __init__(self) -> None:
        self.folder, self.left = "", 0
        sys.addaudithook(self)  # cannot be removed: without a folder it does nothing

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.folder:
            return
        writes = (
            event == "open"
            and isinstance(arguments[2], int)
            and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if (writes or event in self.EVENTS) and str(arguments[0]).startswith(self.folder):
            self.count()

    def count(self) -> None:
        if not self.folder:
            return
        self.left -= 1
        if self.left < 0:
            raise OSError(28, "No space left on device", self.folder)

    def unannounced(self, put: Callable[[Any, str, Any], None] = setattr) -> None:
        """What Python's own functions do not announce counts as a write too: tensors and syncs."""
        from engine.run import checkpoint, files

        for owner, name in ((checkpoint, "save_file"), (files.os, "fsync")):
            call = getattr(owner, name)

            def counted(*arguments: Any, call: Callable[..., Any] = call, **options: Any) -> Any:
                self.count()
                return call(*arguments, **options)

            put(owner, name, counted)
