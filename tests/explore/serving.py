"""Voila as a process that serves a notebook."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request


@contextlib.contextmanager
def voila(path):
    """Serve the notebook at `path` while the block runs; yields the address, as soon as it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "voila", str(path), "--no-browser", f"--port={port}", "--show_tracebacks=True"]
    with path.with_name("voila.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ)
    try:
        address = f"http://127.0.0.1:{port}/"
        _wait(address, server)
        yield address
    finally:
        server.terminate()
        server.wait(300)


def _wait(address, server):
    for _ in range(600):
        assert server.poll() is None, "Voila stopped by itself"
        try:
            return urllib.request.urlopen(f"{address}voila/static/", timeout=5).close()
        except urllib.error.HTTPError:
            return None  # it responds
        except OSError:
            time.sleep(0.5)
    raise AssertionError("Voila does not answer")
