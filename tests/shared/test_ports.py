"""Ports that tests take: nobody else may get one in between."""

from __future__ import annotations

import subprocess
import sys

from helpers.ports import free_port

TAKE = "from helpers.ports import free_port\nprint(*[free_port() for _ in range(40)], flush=True)\ninput()\n"


def test_processes_side_by_side_never_get_the_same_port() -> None:
    """Four processes and this one take 200 ports: all differ, and the kernel gives out none of them."""
    with open("/proc/sys/net/ipv4/ip_local_port_range", encoding="ascii") as source:
        kernels = int(source.read().split()[0])
    mine = [free_port() for _ in range(40)]
    others = [
        subprocess.Popen([sys.executable, "-c", TAKE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                         env={"PYTHONPATH": ":".join(sys.path)})
        for _ in range(4)
    ]  # fmt: skip
    taken = list(mine)
    for process in others:
        assert process.stdout is not None
        taken += [int(word) for word in process.stdout.readline().split()]
    for process in others:
        process.communicate("\n", timeout=60)
    assert len(set(taken)) == len(taken) == 200
    assert max(taken) < kernels
