"""A run that saves after every step, killed at random instants and going on each time; `test_crashes.py` starts it.

    python killed.py FOLDER NUM_KILLS       at random instants
    python killed.py FOLDER commit          at each step of a checkpoint's way to disk

This process only forks: it never computes itself, so that what it forks is as good as new, and quick to start. Each
child first looks at what the one before has left: whatever there is must be the state of the run that nobody killed.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import tensorstore  # noqa: F401  # what takes long to import
import torch
import transformers.models.llama.modeling_llama  # noqa: F401

import horizon.engine
import horizon.optim.kernel
from horizon import runtime
from horizon.checkpoint.folder import list_checkpoints, remove_left_overs, step_folder
from horizon.checkpoint.reader import Checkpoint
from horizon.checkpoint.schedule import prune
from horizon.plan.cost import Rates
from tests.checkpoint.engines import build, load, make_batch, states

STEPS = 40
RATES = Rates(up_bytes_per_s=1e9, down_bytes_per_s=1e9, device_bytes_per_s=1e9, updates_per_s=1e9, overlaps=False)


def digest(engine):
    digest = hashlib.sha256()
    for tensor in states(engine).values():
        digest.update(tensor.numpy().data)
    return digest.hexdigest()


def train(folder, expected, save_every_step, ready=lambda: None):
    """Go on from the last checkpoint, which must be as `expected` says; the digest after each step.

    `ready` is called when the first step begins.
    """
    torch.set_num_threads(1)
    runtime.measure_rates = lambda *args: RATES
    remove_left_overs(folder)
    found = list_checkpoints(folder)
    for step, path in found:
        Checkpoint(path).verify()
        assert Checkpoint(path).manifest.step == step
    settings = {"optimizer": horizon.AdamW(lr=1e-2), "memory": horizon.MemoryConfig(hbm_blocks=1, update_threads=1)}
    with load(found[-1][1], **settings) if found else build(**settings) as engine:
        digests = {engine.num_steps: digest(engine)}
        assert expected is None or digests[engine.num_steps] == expected[str(engine.num_steps)], "another state"
        ready()
        while engine.num_steps < STEPS:
            engine.step(make_batch(engine.num_steps))
            if save_every_step:
                engine.save_checkpoint(step_folder(folder, engine.num_steps))  # waits for the one before
                prune(folder, 3, keep_best=False)
            else:
                digests[engine.num_steps] = digest(engine)
    return digests


def child(work):
    """Run `work` in a process of its own; its id."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    return pid


def is_alive(pid):
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def check(status, what):
    if not (os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0):
        sys.exit(f"{what}: status {status}")


def main(folder, num_kills):
    reference = folder / "reference.json"

    def note():
        reference.write_text(json.dumps(train(folder / "none", None, save_every_step=False)))

    check(os.waitpid(child(note), 0)[1], "the run that nobody kills")
    expected, dice = json.loads(reference.read_text()), random.Random(0)
    checkpoints, killed, seen = folder / "checkpoints", 0, set()
    while killed < num_kills:
        before = [step for step, _ in list_checkpoints(checkpoints)]
        if before and before[-1] >= STEPS - 2:  # begin again, from nothing
            for path in checkpoints.iterdir():
                path.rename(folder / f"old-{killed}-{path.name}")
        reading, writing = os.pipe()
        pid = child(lambda end=writing: train(checkpoints, expected, True, lambda: os.write(end, b".")))
        os.close(writing)
        if killed % 5:  # or at any instant before
            os.read(reading, 1)
        os.close(reading)
        while killed % 5 in (1, 2) and [s for s, _ in list_checkpoints(checkpoints)] == before and is_alive(pid):
            time.sleep(0.001)  # or with another checkpoint there, however slow the machine is
        time.sleep(dice.uniform(0.0, 0.5))
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        if not os.WIFSIGNALED(status):
            check(status, f"before kill {killed}")
            continue
        killed += 1
        seen |= {step for step, _ in list_checkpoints(checkpoints)}
    check(os.waitpid(child(lambda: train(checkpoints, expected, save_every_step=True)), 0)[1], "the last one")
    last = list_checkpoints(checkpoints)[-1][0]
    print(json.dumps({"killed": killed, "last": last, "checkpoints_seen": len(seen)}))


def kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def kill_later(after, function):
    """`function`, until it was called so often."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(None)
        if len(calls) > after:
            kill()
        return function(*args, **kwargs)

    return counted


def write_half(path, text):
    path.write_text(text[: len(text) // 2])
    kill()


def and_kill(function):
    def killed(*args, **kwargs):
        function(*args, **kwargs)
        kill()

    return killed


def commit_points():
    """What -> (object, attribute, what takes its place, the last checkpoint that is there afterwards)."""
    from horizon.checkpoint import arrays, saves
    from horizon.checkpoint import folder as folders

    partial, writer = folders.PartialFolder, arrays.ArrayWriter
    return {
        "before the first array": (arrays, "open_array", kill, 2),
        "before the tenth chunk": (writer, "_do", kill_later(10, writer._do), 2),
        "when the arrays are written": (writer, "finish", and_kill(writer.finish), 2),
        "before the manifest": (saves, "write_flushed", kill, 2),
        "in the middle of the manifest": (saves, "write_flushed", write_half, 2),
        "when the manifest is written": (saves, "write_flushed", and_kill(saves.write_flushed), 2),
        "before names are on disk": (folders, "flush_folders", kill, 2),
        "before the name is given": (folders.os, "rename", kill, 2),
        "when the name is given": (folders.os, "rename", and_kill(os.rename), 3),
        "when all is done": (partial, "commit", and_kill(partial.commit), 3),
        "while an old one is removed": (folders, "remove_tree", and_kill(folders.remove_tree), 3),
    }


def commit(folder):
    """Kill a child at each step of saving step 3; another looks at what they have left."""
    points = commit_points()
    for number, (what, (owner, attribute, replaced, _)) in enumerate(points.items()):

        def save(checkpoints=folder / str(number), owner=owner, attribute=attribute, replaced=replaced):
            torch.set_num_threads(1)
            runtime.measure_rates = lambda *args: RATES
            with build() as engine:
                for step in (1, 2, 3):
                    engine.step(make_batch(step))
                    if step == 3:
                        setattr(owner, attribute, replaced)
                    if step > 1:
                        engine.save_checkpoint(step_folder(checkpoints, step)).wait()
                prune(checkpoints, 1, keep_best=False)

        status = os.waitpid(child(save), 0)[1]
        if not os.WIFSIGNALED(status):
            sys.exit(f"{what}: was not killed, status {status}")

    def look():
        torch.set_num_threads(1)
        for number, (what, (*_, last)) in enumerate(points.items()):
            checkpoints = folder / str(number)
            remove_left_overs(checkpoints)
            found = [step for step, _ in list_checkpoints(checkpoints)]
            assert found[-1] == last, (what, found)
            assert sorted(path.name for path in checkpoints.iterdir()) == [f"step-{step:08d}" for step in found], what
            for step, path in list_checkpoints(checkpoints):
                Checkpoint(path).verify()
                with load(path) as engine:
                    assert engine.num_steps == step, what
                    engine.step(make_batch(step))
            print(what, flush=True)

    check(os.waitpid(child(look), 0)[1], "what is left")


if __name__ == "__main__":
    if sys.argv[2] == "commit":
        commit(Path(sys.argv[1]))
    else:
        main(Path(sys.argv[1]), int(sys.argv[2]))
