"""An initial RAM disk with a Python interpreter, some modules of horizon, and a script that the kernel starts as init.

    initrd(script, ["horizon.store.numa"]) -> bytes

Which files that takes is asked of this interpreter: a child imports the modules and lists what it has loaded.
"""

from __future__ import annotations

import gzip
import os
import stat
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LOADED = """
import sys
sys.path.insert(0, {root!r})
for name in {modules!r}:
    __import__(name)
import encodings.utf_8, encodings.ascii, os
paths = {{getattr(m, "__file__", None) for m in list(sys.modules.values())}}
paths |= {{line.split()[-1] for line in open("/proc/self/maps") if "/" in line.split()[-1]}}
print("\\n".join(sorted(p for p in paths if p and os.path.isfile(p) and not p.startswith(("/dev", "/memfd")))))
"""


def initrd(script: Path, modules: list[str]) -> bytes:
    """A compressed archive in which `script` is /init, run by a copy of this interpreter with horizon in /repo."""
    interpreter = os.path.realpath(sys.executable)
    code = LOADED.format(root=str(ROOT), modules=modules)
    listed = subprocess.run([interpreter, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    files = {"/init": (f"#!{interpreter} -S\n" + script.read_text()).encode()}
    for name in (interpreter, *listed.stdout.split("\n")[:-1]):
        path = Path(name)
        inside = f"/repo/{path.relative_to(ROOT)}" if path.is_relative_to(ROOT) else name
        files[inside] = path.read_bytes()
        if path.name.startswith("ld-linux"):
            files[f"/lib64/{path.name}"] = files[inside]  # where programs ask for the loader
        elif ".so." in path.name:  # the loader looks for the name of a link to it
            links = (link for link in path.parent.glob(path.name.split(".so.")[0] + ".so*") if link.is_symlink())
            files |= {str(link): files[inside] for link in links if link.resolve() == path}
    return gzip.compress(_archive(files), compresslevel=1)


def _archive(files: dict[str, bytes]) -> bytes:
    """The files, their folders, and a console, in the format that the kernel unpacks (cpio, "newc")."""
    folders = {str(parent) for name in files for parent in Path(name).parents} | {"/dev", "/proc", "/sys"}
    entries = [_entry(name, stat.S_IFDIR | 0o755, b"") for name in sorted(folders - {"/"})]
    entries.append(_entry("/dev/console", stat.S_IFCHR | 0o600, b"", device=(5, 1)))
    entries += [_entry(name, stat.S_IFREG | 0o755, content) for name, content in sorted(files.items())]
    return b"".join([*entries, _entry("TRAILER!!!", 0, b"")])


def _entry(name: str, mode: int, content: bytes, device: tuple[int, int] = (0, 0)) -> bytes:
    encoded = name.lstrip("/").encode() + b"\0"
    fields = (0, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(encoded), 0)
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + encoded
    return head + b"\0" * (-len(head) % 4) + content + b"\0" * (-len(content) % 4)
