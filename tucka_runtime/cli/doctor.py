"""`tucka doctor`: versions, device and memory, and what a server started here would use."""

import importlib.metadata
import os
import platform
import shutil

from tucka_runtime import __version__, machine
from tucka_runtime.embedded import FOLDER
from tucka_runtime.extras import EXTRAS, how_to_install, installed

_PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "fastapi", "uvicorn", "peft", "openai")


def doctor() -> int:
    """Prints; returns 0 always: what a server needs depends on how it is started."""
    import torch

    print(f"tucka         {__version__}, Python {platform.python_version()}, {platform.platform()}")
    for package in _PACKAGES:
        print(f"{package:13} {_version(package)}")
    cores, memory = machine.cores(), machine.memory()
    print(f"CPU           {cores.count} cores, by {cores.limited_by}")
    total = machine.total_memory() / 2**30
    print(f"memory        {memory.available / 2**30:.1f} of {total:.1f} GiB available, by {memory.limited_by}")
    cuda = torch.cuda.is_available()
    if cuda:
        for i in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(i)
            print(
                f"GPU {i}         {torch.cuda.get_device_name(i)}, "
                f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free, CUDA {torch.version.cuda}"
            )
    else:
        print("GPU           none that torch can use")
    print(f"disk          {shutil.disk_usage(os.getcwd()).free / 2**30:.1f} GiB free here")
    for extra, what in EXTRAS.items():
        state = "installed" if installed(extra) else f"not installed: {how_to_install(extra)}"
        print(f"extra         {extra}, for {what.used_by}: {state}")
    print(f"will use      --device {'cuda' if cuda else 'cpu'}, kernels: {_kernels(cuda)}")
    embedded = (FOLDER / "base" / "config.json").is_file()
    print(f"default model {'embedded' if embedded else 'none: tucka serve needs --model DIR'}")
    return 0


def _kernels(cuda: bool) -> str:
    import torch

    from tucka_runtime.kernels import dispatch

    return dispatch.describe(dispatch.best(torch.device("cuda" if cuda else "cpu")))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
