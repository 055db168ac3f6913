"""The fork server: its threads and descriptors, reported exit codes, and the end of all processes with the parent."""

import contextlib
import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from core.fork_server import Child, ForkServer
from core.processes import can_fork
from core.server_process import receive_message, send_message

pytestmark = pytest.mark.thorough

HERE = str(Path(__file__).parent)
SOURCE = str(Path(__file__).resolve().parents[1] / "src")


# Functions that children run


def exits(payload: bytes, descriptors: Sequence[int]) -> int:
    return int(payload)


def fails(payload: bytes, descriptors: Sequence[int]) -> None:
    raise ValueError("on purpose")


def sleeps(payload: bytes, descriptors: Sequence[int]) -> None:
    time.sleep(600)


def runs(payload: bytes, descriptors: Sequence[int]) -> None:
    """Execute the statements in the payload and send the value of `result`."""
    names: dict[str, str] = {}
    exec(payload.decode(), names)
    with socket.socket(fileno=descriptors[0]) as line:
        send_message(line, str(names["result"]).encode())


def result_of(server: ForkServer, program: str) -> str:
    receiver, sender = socket.socketpair()
    with receiver, sender:
        child = server.start("test_fork_server.runs", program.encode(), [sender.fileno()])
        sender.close()
        message = receive_message(receiver)
        child.end()
    assert message is not None
    return message[0].decode()


def is_alive(process: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def have_exited(processes: Sequence[int], *, within: float = 5) -> bool:
    end = time.monotonic() + within
    while time.monotonic() < end:
        if not any(map(is_alive, processes)):
            return True
        time.sleep(0.01)
    return False


def exit_code_of(child: Child) -> int | None:
    code = child.exit_code(10)
    child.end()
    return code


@pytest.fixture(params=["executed", "forked"])
def server(request, monkeypatch) -> Iterator[ForkServer]:
    """Yield a server, started in each of the two ways. (The forked one has one thread, independent of this process.)"""
    monkeypatch.setattr("core.fork_server.can_fork", lambda: request.param == "forked")
    fork_server = ForkServer(["test_fork_server"])
    yield fork_server
    fork_server.close()


def test_fork_server_has_one_thread_and_starts_several_children(server):
    children = [server.start("test_fork_server.sleeps", b"") for _ in range(3)]
    assert len({child.pid for child in children}) == 3 and server.pid is not None
    assert len(list(Path(f"/proc/{server.pid}/task").iterdir())) == 1
    for child in children:
        assert Path(f"/proc/{child.pid}/exe").samefile(sys.executable)
        assert f"PPid:\t{server.pid}\n" in Path(f"/proc/{child.pid}/status").read_text()
        child.end()
        assert not is_alive(child.pid or 0) and child.exit_code(0) == -signal.SIGKILL
    assert exit_code_of(server.start("test_fork_server.exits", b"0")) == 0


def test_fork_server_reports_exit_codes_of_children(server, capfd):
    for code in (0, 7):
        assert exit_code_of(server.start("test_fork_server.exits", str(code).encode())) == code
    for number in (signal.SIGKILL, signal.SIGSEGV):
        child = server.start("test_fork_server.sleeps", b"")
        os.kill(child.pid or 0, number)
        assert exit_code_of(child) == -number
    assert exit_code_of(server.start("test_fork_server.fails", b"")) == 1
    assert "ValueError: on purpose" in capfd.readouterr().err
    running = server.start("test_fork_server.sleeps", b"")
    assert running.exit_code(0.05) is None and is_alive(running.pid or 0)
    running.end()


def test_stop_signals_are_blocked_in_the_server_and_its_children(server):
    child = server.start("test_fork_server.sleeps", b"")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        for process in (server.pid, child.pid):
            os.kill(process, number)
    time.sleep(0.1)
    assert is_alive(child.pid) and server.is_alive()
    child.end()
    # The signal mask of this process has not changed.
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


def test_fork_server_inherits_only_the_passed_descriptors(server, tmp_path):
    with (tmp_path / "lock").open("w") as lock, (tmp_path / "passed").open("w") as passed:
        server.pass_fds = (passed.fileno(),)
        open_files = result_of(
            server,
            "import os\nresult = [os.readlink(f'/proc/self/fd/{d}') for d in os.listdir('/proc/self/fd')"
            "\n          if os.path.exists(f'/proc/self/fd/{d}')]",
        )
        assert str(tmp_path / "passed") in open_files and lock.name not in open_files


def test_killed_fork_server_is_replaced_and_its_children_end(server):
    child = server.start("test_fork_server.sleeps", b"")
    first_pid, pid = server.pid, child.pid
    assert first_pid is not None and pid is not None
    os.kill(first_pid, signal.SIGKILL)
    assert have_exited([pid])
    assert child.exit_code(5) is None  # unknown: the server that reports it was killed
    child.end()
    assert exit_code_of(server.start("test_fork_server.exits", b"3")) == 3
    assert server.pid != first_pid and not is_alive(first_pid)


def test_close_finish_and_garbage_collection_end_server_and_children(server):
    for end in ("close", "finish", "collect"):
        fork_server = ForkServer(["test_fork_server"])
        child = fork_server.start("test_fork_server.sleeps", b"")
        pids = [child.pid or 0, fork_server.pid or 0]
        if end == "close":
            fork_server.close()
        elif end == "finish":
            fork_server.finish()
            time.sleep(0.1)
            assert all(map(is_alive, pids))  # the server ends after its last child
            child.kill()
        else:
            del fork_server
            gc.collect()
        assert have_exited(pids), end
        child.end()


def test_forked_process_starts_its_own_server(server):
    running = server.start("test_fork_server.sleeps", b"")
    read_end, write_end = os.pipe()
    process = os.fork()
    if process == 0:
        with contextlib.suppress(BaseException):
            assert server.pid is None
            code = exit_code_of(server.start("test_fork_server.exits", b"5"))
            os.write(write_end, f"{server.pid} {code}".encode())
            server.close()
            running.end()
        os._exit(0)
    os.waitpid(process, 0)
    other_pid, code = os.read(read_end, 100).split()
    assert int(other_pid) != server.pid and int(code) == 5
    assert is_alive(running.pid or 0) and server.is_alive()  # not affected by the fork
    running.end()
    os.close(read_end), os.close(write_end)


PARENT = """
import os, signal, sys
sys.path[:0] = {path!r}
from core.fork_server import ForkServer
server = ForkServer(["test_fork_server"])
children = [server.start("test_fork_server.sleeps", b"") for _ in range(2)]
print(server.pid, *(child.pid for child in children), flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("cause", ["SIGKILL", "end of the program", "exception"])
def test_server_and_children_end_with_the_parent(cause):
    program = PARENT.format(path=[HERE, SOURCE]) + ("1 / 0\n" if cause == "exception" else "")
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None and parent.stdin is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 3 and all(map(is_alive, pids))
        if cause == "SIGKILL":
            parent.kill()
        else:
            parent.stdin.close()
        parent.wait()
        assert have_exited(pids, within=2)


def test_executed_server_does_not_import_from_the_working_directory(tmp_path, monkeypatch):
    for name in ("yaml", "models", "torch", "json"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from the working directory')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])  # as in `python -c` and notebooks
    monkeypatch.setattr("core.fork_server.can_fork", lambda: False)
    with contextlib.closing(ForkServer(["yaml", "models"])) as server:
        program = (
            "import json, os, sys, yaml, models\nresult = yaml.__file__, models.__file__, os.getcwd(), '' in sys.path"
        )
        result = result_of(server, program)
    assert f"{tmp_path}/" not in result and repr(str(tmp_path)) in result and result.endswith("False)")


def test_process_with_threads_executes_its_server(monkeypatch):
    """The executed server still has one thread, and a second server can start children after it."""
    release = threading.Event()
    thread = threading.Thread(target=release.wait)
    thread.start()
    try:
        assert not can_fork()
        forks: list[int] = []
        monkeypatch.setattr(ForkServer, "_fork", lambda *_: forks.append(1))
        with contextlib.closing(ForkServer(["torch", "test_fork_server"])) as server:
            result = result_of(
                server, "import os, sys\nresult = len(os.listdir('/proc/self/task')), 'torch' in sys.modules"
            )
            assert result == "(1, True)"
            with contextlib.closing(ForkServer(["test_fork_server"])) as second:
                assert exit_code_of(second.start("test_fork_server.exits", b"4")) == 4
        assert not forks
    finally:
        release.set()
        thread.join()


def test_server_with_threads_refuses_to_fork(tmp_path, monkeypatch):
    (tmp_path / "threaded.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    errors = tmp_path / "errors.txt"
    with contextlib.closing(ForkServer(["threaded"], errors=errors)) as server:
        child = server.start("test_fork_server.exits", b"0")
        assert child.pid is None and child.exit_code(5) is None
        child.end()
    assert "a process with threads or CUDA cannot be forked safely" in errors.read_text()


def test_server_that_cannot_start_writes_the_import_error(tmp_path):
    errors = tmp_path / "errors.txt"
    with contextlib.closing(ForkServer(["no_such_module"], errors=errors)) as server:
        child = server.start("test_fork_server.exits", b"0")
        assert child.pid is None
        child.end()
    assert "No module named 'no_such_module'" in errors.read_text()
