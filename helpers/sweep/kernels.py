"""Kernels forked from a process that has imported torch and its like already: they start in a fraction of a second."""

from __future__ import annotations

import multiprocessing
import os
import sys
from importlib.metadata import EntryPoint
from multiprocessing.connection import Connection
from typing import Any

from jupyter_client.provisioning import KernelProvisionerFactory, LocalProvisioner

from helpers.notebooks import LocalKernel

PROVISIONER = "forked"


class Waiting:
    """A process forked now, before this one has threads or an event loop, that becomes a kernel once it is told to."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("fork")
        theirs, self._orders = context.Pipe(duplex=False)
        self._process = context.Process(target=_serve, args=(theirs, self._orders))
        self._process.start()
        theirs.close()
        # what jupyter_client asks of a process
        self.pid, self.stdin, self.stdout, self.stderr = self._process.pid, None, None, None

    def become(self, arguments: list[str], cwd: str | None, env: dict[str, str]) -> None:
        self._orders.send((arguments, cwd or os.getcwd(), env))

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int | None:
        self._process.join()
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


class ForkedProvisioner(LocalProvisioner):
    """Gives the kernel that waits instead of starting a new interpreter."""

    async def launch_kernel(self, cmd: list[str], **options: Any) -> dict[str, Any]:
        self.process = self.parent.waiting
        self.process.become(cmd[cmd.index("-f") :], options.get("cwd"), options["env"])
        self.pid, self.cwd = self.process.pid, options.get("cwd")
        return self.connection_info


def manager(waiting: Waiting) -> type[LocalKernel]:
    """A kernel manager class for one kernel: the process that waits."""

    class ForkedKernel(LocalKernel):
        async def start_kernel(self, **options: Any) -> None:
            self.kernel_spec.metadata["kernel_provisioner"] = {"provisioner_name": PROVISIONER}
            group = KernelProvisionerFactory.GROUP_NAME
            entry = EntryPoint(PROVISIONER, f"{ForkedProvisioner.__module__}:{ForkedProvisioner.__name__}", group)
            KernelProvisionerFactory.instance().provisioners[PROVISIONER] = entry
            await super().start_kernel(**options)

    ForkedKernel.waiting = waiting
    return ForkedKernel


def _serve(orders: Connection, others: Connection) -> None:
    others.close()
    try:
        arguments, cwd, env = orders.recv()
    except EOFError:  # the notebook never got as far as asking for a kernel
        return
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    if "torch" in sys.modules and "OMP_NUM_THREADS" in env:
        sys.modules["torch"].set_num_threads(int(env["OMP_NUM_THREADS"]))
    from ipykernel.kernelapp import IPKernelApp

    app = IPKernelApp.instance()
    # with a parent to watch the kernel ends when that is killed
    app.initialize([*arguments, f"--IPKernelApp.parent_handle={os.getppid()}"])
    app.start()
