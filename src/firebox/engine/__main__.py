"""`python -m firebox.engine FOLDER WATCH_FD`: one engine process. Started by `engine.client.EngineProcess`,
never by hand."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import msgspec

from firebox.config import Config
from firebox.engine.loop import Connection, run
from firebox.engine.messages import Failed, LoadProgress
from firebox.engine.start import start
from firebox.errors import FireboxError


def main(folder: str, watch_fd: int) -> int:
    """Loads, says Ready, serves. Exit status 0 after a drain or when the server is gone, 1 if it could not
    start."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server decides when to stop
    connection = Connection(folder, watch_fd)
    config = msgspec.json.decode(Path(folder, "config.json").read_bytes(), type=Config)
    try:
        scheduler, runner, ready = start(
            config, lambda loaded, total: connection.send(LoadProgress(loaded, total))
        )
    except FireboxError as error:
        connection.send(Failed(type(error).__name__, str(error), error.hint))
        connection.close()
        return 1
    connection.send(ready)
    try:
        run(connection, scheduler, runner)
    except EOFError:
        return 0
    connection.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
