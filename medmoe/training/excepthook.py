# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""What the user sees of an error that ends a bundle: the message, not the forty lines of traceback around it."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from types import TracebackType

from medmoe.errors import MedMoEError
from medmoe.files import write_text


def find_error(error: BaseException | None) -> MedMoEError | None:
    """The outermost ``MedMoEError`` in the chain of causes: MONAI wraps what is raised in an expression or component.

    Only ``raise ... from`` counts. Following ``__context__`` too would hide a mistake in our own handling of an error.
    """
    while error is not None and not isinstance(error, MedMoEError):
        error = error.__cause__
    return error


class ShortErrors:
    """A ``sys.excepthook`` that prints ``Error: ...`` for a ``MedMoEError`` and ends the process with 2.

    The whole traceback goes to ``error.log`` in ``output_dir`` where that folder exists. Any other error is left to the
    hook that was there before.
    """

    def __init__(self, output_dir: Path | None) -> None:
        self.output_dir = output_dir
        self.previous = sys.excepthook

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        ours = find_error(error)
        if ours is None:
            self.previous(kind, error, trace)
            return
        print(f"Error: {ours}", file=sys.stderr)
        if log := self.keep("".join(traceback.format_exception(kind, error, trace))):
            print(f"(The full traceback is in {log})", file=sys.stderr)
        # Python ends with this status when the hook itself raises SystemExit; atexit still runs.
        raise SystemExit(2)

    def keep(self, text: str) -> Path | None:
        """Where the traceback was written, or ``None``: an error report must not fail for a full disk."""
        if self.output_dir is None or not self.output_dir.is_dir():
            return None
        try:
            write_text(self.output_dir / "error.log", text)
        except OSError:
            return None
        return self.output_dir / "error.log"


def install(output_dir: Path | None) -> None:
    """Installs the hook, or points the installed one to another folder."""
    if isinstance(sys.excepthook, ShortErrors):
        sys.excepthook.output_dir = output_dir
    else:
        sys.excepthook = ShortErrors(output_dir)
