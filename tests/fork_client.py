"""Has the fork server at a socket run a program with the words, variables, folder and streams of this process."""

import json
import os
import signal
import socket
import struct
import sys


def main(path: str, *words: str) -> int:
    """The exit status of the program; where this process is ended, the program is too."""
    order = json.dumps({"words": words, "environment": dict(os.environ), "cwd": os.getcwd()}).encode()
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        socket.send_fds(server, [len(order).to_bytes(8, "big")], [0, 1, 2])
        server.sendall(order)
        (process,) = struct.unpack("q", server.recv(8))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda received, _: os.kill(process, received))
        return struct.unpack("q", server.recv(8))[0]


if __name__ == "__main__":
    status = main(*sys.argv[1:])
    if status < 0:  # ended by a signal, as this process is then
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)
