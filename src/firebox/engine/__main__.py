"""`python -m firebox.engine FOLDER WATCH_FD`: one engine process. Started by `engine.client.EngineProcess`,
never by hand."""

from __future__ import annotations

import logging
import shutil
import signal
import sys
from pathlib import Path

import msgspec

from firebox.config import Config
from firebox.engine.loop import Connection, run
from firebox.engine.messages import Failed, LoadProgress
from firebox.engine.start import start
from firebox.env import read
from firebox.errors import FireboxError

SLOW_SERVER_S = 60.0  # an engine may fail while the server is still busy with its own imports


def main(folder: str, watch_fd: int) -> int:
    """Loads, says Ready, serves. Exit status 0 after a drain or when the server is gone, 1 if it could not
    start."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server decides when to stop
    connection = Connection(folder, watch_fd)
    config = msgspec.json.decode(Path(folder, "config.json").read_bytes(), type=Config)

    def on_progress(loaded_bytes: int, total_bytes: int) -> None:
        connection.require_server()
        connection.send(LoadProgress(loaded_bytes, total_bytes))

    try:
        _log_to_stderr(read().log_level)
        scheduler, runner, ready = start(config, on_progress)
        connection.send(ready)
        run(connection, scheduler, runner)
    except FireboxError as error:
        connection.send(Failed(type(error).__name__, str(error), error.hint))
        connection.close(SLOW_SERVER_S)
        return 1
    except EOFError:
        shutil.rmtree(folder, ignore_errors=True)  # the server was killed and could not do it
    connection.close()  # also without a server: outputs that nobody reads would keep the process alive
    return 0


def _log_to_stderr(level: str) -> None:
    """Firebox's own log lines from `level` on; the libraries' keep to their warnings."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log = logging.getLogger("firebox")
    log.addHandler(handler)
    log.setLevel(level.upper())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
