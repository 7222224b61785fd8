"""A zeroth-order run, killed at random instants and going on from its log each time; `test_resume.py` starts it.

    python killed.py FOLDER NUM_KILLS SETTING...

This process only forks: it never computes itself, so that what it forks is as good as new, and quick to start.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import transformers.models.llama.modeling_llama  # noqa: F401  # what takes long to import

import horizon.engine
import horizon.zo.host_kernel  # noqa: F401
from horizon.config.compose import compose
from horizon.trainer import Trainer


def child(out, settings):
    """A run in a process of its own; its id."""
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            Trainer(compose(settings), out).run()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    return pid


def is_alive(pid):
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def num_lines(path):
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def main(folder, num_kills, settings):
    dice, out = random.Random(0), folder / "stopped"
    os.waitpid(child(folder / "whole", settings), 0)
    killed, log = 0, out / "replay.jsonl"
    while killed < num_kills:
        before, pid = num_lines(log), child(out, [*settings, "resume=auto"])
        while killed % 4 and num_lines(log) <= before and is_alive(pid):  # or at any instant before
            time.sleep(0.001)
        time.sleep(dice.uniform(0.0, 0.05 if killed % 4 else 2.0))
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        if os.WIFSIGNALED(status):
            killed += 1
        elif status == 0:  # it ended before: begin again, from nothing
            out.rename(folder / f"ended-{time.monotonic_ns()}")
        else:
            sys.exit(f"the run failed before kill {killed}")
    if os.waitpid(child(out, [*settings, "resume=auto"]), 0)[1]:
        sys.exit("the last one failed")
    print(f"{killed} kills, {before} lines before the last")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
