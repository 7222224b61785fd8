"""Init in the virtual machine: binds, touches and looks up memory with horizon's own code; prints JSON lines."""

import collections
import ctypes
import json
import mmap
import sys
import traceback

sys.path.insert(0, "/repo")
LIBC = ctypes.CDLL(None, use_errno=True)
SIZE = 24 << 20


def mount(kind, where):
    if LIBC.mount(kind.encode(), where.encode(), kind.encode(), 0, None):
        raise OSError(ctypes.get_errno(), f"mount {kind}")


def tell(what, **facts):
    print("PROOF " + json.dumps({"what": what, **facts}), flush=True)


def mapped(num_bytes, huge):
    space = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    space.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
    return space, ctypes.addressof(ctypes.c_char.from_buffer(space))


def touch(space):
    for start in range(0, len(space), mmap.PAGESIZE):
        space[start] = 1


def places(numa, address, num_bytes):
    """Every page, not a sample."""
    pages = [address + start for start in range(0, num_bytes, mmap.PAGESIZE)]
    return {str(node): count for node, count in sorted(collections.Counter(numa.locate(pages)).items())}


def prove():
    from horizon.errors import HorizonError
    from horizon.plan.topology import read_topology
    from horizon.store import numa

    topology = read_topology()
    tell(
        "topology",
        cpus=[len(node.cpus) for node in topology.nodes],
        auto=topology.cxl_nodes("auto"),
        dram=topology.dram_nodes(topology.cxl_nodes("auto")),
        distances=[list(node.distances.values()) for node in topology.nodes],
    )

    def refused(work):
        try:
            work()
        except HorizonError as error:
            return f"{type(error).__name__}: {error}"
        return None

    def place(nodes, huge, num_bytes=SIZE):
        space, address = mapped(num_bytes, huge)
        if nodes:
            numa.bind(address, num_bytes, nodes, "weights")
        touch(space)
        return space, address

    for huge in (False, True):
        for nodes in ([], [0], [1], [2], [3], [2, 3], [0, 1, 2, 3]):
            space, address = place(nodes, huge)
            wrong = refused(lambda: numa.verify(address, SIZE, nodes or [2], "weights"))  # noqa: B023
            tell("placed", nodes=nodes, huge=huge, pages=places(numa, address, SIZE), wrong=wrong)
            space.madvise(mmap.MADV_DONTNEED)

    space, address = mapped(SIZE, False)
    tell("absent", wrong=refused(lambda: numa.bind(address, SIZE, [2, 9], "weights")))
    tell("no room", wrong=refused(lambda: numa.bind(address, 1 << 30, [2], "weights")))
    numa.bind(address, SIZE, [3], "weights")
    touch(space)
    tell("other node", wrong=refused(lambda: numa.verify(address, SIZE, [2], "weights")))

    # Node 2 all but full: what is striped over 2 and 3 spills, and that must not go unseen.
    room = topology.free_bytes([2]) - (16 << 20)
    filler, _ = place([2], False, room)
    striped = 64 << 20
    space, address = place([2, 3], False, striped)
    pages = places(numa, address, striped)
    tell("spilled", pages=pages, wrong=refused(lambda: numa.verify(address, striped, [2, 3], "weights")))
    filler.madvise(mmap.MADV_DONTNEED)


try:
    mount("proc", "/proc")
    mount("sysfs", "/sys")
    prove()
except BaseException:
    traceback.print_exc(file=sys.stdout)
finally:
    print("PROOF-END", flush=True)
    LIBC.sync()
    LIBC.reboot(0x4321FEDC)  # power off
