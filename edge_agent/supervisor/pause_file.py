"""A pause outlives the daemon: the file FOLDER/paused exists from the reply to pause until resume.

Without it, a daemon that dies and is started again by systemd would act although a controller had stopped it.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from edge_agent.supervisor.log import log_line

NAME = "paused"


def was_paused(folder: Path) -> bool:
    """Whether the daemon before this one was paused and not resumed. What cannot be read counts as a pause."""
    try:
        (folder / NAME).lstat()
    except FileNotFoundError:
        return False
    except OSError as error:
        log_line(f"{folder / NAME}: {error.strerror}; starts paused")
    return True


def keep_pause(folder: Path, paused: bool) -> bool:
    """Make or remove the file. False: it could not be done. Then a restart forgets the pause, or the resume."""
    try:
        if paused:
            with contextlib.suppress(FileExistsError):
                os.mknod(folder / NAME, stat.S_IFREG | 0o640)  # needs no descriptor: there may be none
        else:
            (folder / NAME).unlink(missing_ok=True)
    except OSError as error:
        log_line(f"{folder / NAME}: {error.strerror}; a restarted daemon will not know of this")
        return False
    return True
