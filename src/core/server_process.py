"""What runs in a fork server (core/fork_server.py describes it): wait for jobs, fork, report how each child ended.

control socket   message: job (JSON), payload, descriptors (the first one is the job's report socket)
report socket    -> pid, then the exit code;  <- closed or shut down: kill the child
"""

import contextlib
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import struct
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from core.processes import can_fork, exit_now, exit_with_parent

LENGTH = struct.Struct("!Q")  # of a message's content
NUMBER = struct.Struct("!i")  # a pid or an exit code
MAX_DESCRIPTORS = 16  # in one message


def send_message(connection: socket.socket, content: bytes, descriptors: Sequence[int] = ()) -> None:
    """Send bytes and up to MAX_DESCRIPTORS file descriptors over a Unix socket."""
    socket.send_fds(connection, [LENGTH.pack(len(content))], list(descriptors))
    if content:
        connection.sendall(content)


def receive_message(connection: socket.socket) -> tuple[bytes, list[int]] | None:
    """Return what `send_message` sent; None if the other end is closed."""
    header, descriptors, _, _ = socket.recv_fds(connection, LENGTH.size, MAX_DESCRIPTORS)
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    if not header:
        return None
    content = bytearray()
    while missing := LENGTH.unpack(header)[0] - len(content):
        piece = connection.recv(min(missing, 2**20))
        if not piece:
            return None
        content += piece
    return bytes(content), descriptors


def main(settings: dict[str, Any]) -> None:
    """Serve in a Python that `ForkServer` has executed."""
    exit_with_parent(settings["parent"])
    serve(socket.socket(fileno=settings["control"]), settings["preload"])


def serve(control: socket.socket, preload: Sequence[str]) -> None:
    """Fork a child for each job and report its exit code, until no job can come and all children have ended."""
    for module in preload:
        importlib.import_module(module)
    woken, wake = os.pipe()  # neither is inherited by a Python that a child executes
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    children: dict[int, socket.socket] = {}
    selector = selectors.DefaultSelector()
    selector.register(woken, selectors.EVENT_READ)
    selector.register(control, selectors.EVENT_READ)
    accepting = True
    gc.collect()
    gc.freeze()  # the collector of no child touches these pages, so that they stay shared
    while accepting or children:
        for key, _ in selector.select():
            if key.fileobj is control:
                accepting = _start_child(control, selector, children)
            elif key.fd == woken:
                os.read(woken, 4096)
                _reap(selector, children)
            elif key.data in children:  # its report socket is closed: the child is no longer needed
                os.kill(key.data, signal.SIGKILL)
                selector.unregister(key.fileobj)


def _start_child(control: socket.socket, selector: selectors.BaseSelector, children: dict[int, socket.socket]) -> bool:
    """Fork the child of the next job; False if no further job can come."""
    message = receive_message(control)
    if message is None:
        selector.unregister(control)
        return False
    content, [report_descriptor, *descriptors] = message
    (length,) = LENGTH.unpack(content[: LENGTH.size])
    job = json.loads(content[LENGTH.size : LENGTH.size + length])
    for module in job["preload"]:
        importlib.import_module(module)
    if not can_fork():
        raise RuntimeError("a process with threads or CUDA cannot be forked safely")
    parent = os.getpid()
    report = socket.socket(fileno=report_descriptor)
    pid = os.fork()
    if pid == 0:
        for connection in (control, report, *children.values()):
            connection.close()
        selector.close()
        _run_child(job["target"], content[LENGTH.size + length :], descriptors, parent)
    for descriptor in descriptors:
        os.close(descriptor)
    children[pid] = report
    selector.register(report, selectors.EVENT_READ, pid)
    with contextlib.suppress(OSError):
        report.sendall(NUMBER.pack(pid))
    return True


def _run_child(target: str, payload: bytes, descriptors: list[int], parent: int) -> NoReturn:
    code = 1
    try:
        exit_with_parent(parent)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        module, _, name = target.rpartition(".")
        code = getattr(importlib.import_module(module), name)(payload, descriptors) or 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    exit_now(code)


def _reap(selector: selectors.BaseSelector, children: dict[int, socket.socket]) -> None:
    """Report the exit codes of the children that have ended."""
    for pid in list(children):
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            report = children.pop(pid)
            with contextlib.suppress(KeyError):
                selector.unregister(report)
            with contextlib.suppress(OSError):
                report.sendall(NUMBER.pack(os.waitstatus_to_exitcode(status)))
            report.close()
