"""A server in a few lines, for tests of what starts and ends servers.

    python tiny_server.py PORT [BEHAVIOUR …]

sick: never healthy; deaf: ignores SIGTERM; child, detached: starts a worker that ignores SIGTERM, the second
in a session of its own and without a parent; exits: at once; orphans: ends without its workers;
dies-when-asked: at GET /work; says-on-term: a frightening last word at SIGTERM. Standard library only, so
that it starts in 50 ms.
"""

from __future__ import annotations

import http.server
import os
import signal
import subprocess
import sys
import time


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        status = 503 if "sick" in sys.argv else 200
        self.send_response(status)
        self.end_headers()
        if "dies-when-asked" in sys.argv and self.path == "/work":
            print("an illegal instruction was encountered", flush=True)
            os._exit(5)

    def log_message(self, *_: object) -> None:
        pass


def child(how: str) -> subprocess.Popen:
    """A worker that ignores SIGTERM and lives for long."""
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(300)"
    if how == "detached":  # a grandchild in a session of its own, whose parent is gone
        start = f"subprocess.Popen([sys.executable, '-c', {code!r}], start_new_session=True)"
        outer = f"import subprocess, sys; {start}"
        return subprocess.Popen([sys.executable, "-c", outer])
    return subprocess.Popen([sys.executable, "-c", code])


def main() -> None:
    port, *behaviours = sys.argv[1:]
    if "deaf" in behaviours:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for how in ("child", "detached"):
        if how in behaviours:
            child(how)
    if "says-on-term" in behaviours:

        def last_words(*_: object) -> None:
            print("an illegal instruction was encountered", flush=True)
            os._exit(0)

        signal.signal(signal.SIGTERM, last_words)
    if "exits" in behaviours:
        print("I cannot go on", flush=True)
        sys.exit(3)
    if "orphans" in behaviours:
        time.sleep(0.3)
        os._exit(4)
    print("ready", flush=True)
    http.server.ThreadingHTTPServer(("127.0.0.1", int(port)), Handler).serve_forever()


if __name__ == "__main__":
    main()
