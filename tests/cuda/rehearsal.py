"""Run programs on a CUDA device that computes nothing, see `device_stub.c`.

Judged are structure and memory: kernels and copies by name and number, synchronizations, the peaks of PyTorch's own
allocator, graph breaks, errors. Not judged: values (device memory is never written), the time of kernels, cuDNN (which
is switched off), NCCL itself, operators whose output has a size that the device computes.
"""

import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

COUNTERS = (
    "kernels",
    "products",
    "collectives",
    "copies_to_device",
    "copies_to_host",
    "copies_on_device",
    "pageable_copies",
    "synchronizations",
    "event_waits",
)

# What nvcc's own header defines for host compilers; the wheels of the runtime do not include it.
_HOST_DEFINES = """
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_align__(n) __align__(n)
#define __forceinline__ __inline__ __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define CUDARTAPI
#define CUDARTAPI_CDECL
#define __cdecl
#define __host__
#define __device__
#define __global__
#define __shared__
#define __constant__
#define __managed__
#define __device_builtin__
#define __device_builtin_texture_type__
#define __device_builtin_surface_type__
#define __cudart_builtin__
"""

_DRIVER = """
cuCtxGetDevice cuCtxSetCurrent cuCtxSetLimit cuDeviceGetName cuFuncGetAttribute cuFuncSetAttribute cuFuncSetCacheConfig
cuGetErrorName cuInit cuLibraryLoadData cuLinkAddData_v2 cuLinkComplete cuLinkCreate_v2 cuMemcpyDtoHAsync_v2
cuModuleGetGlobal_v2 cuModuleLoad cuModuleLoadData cuModuleLoadDataEx cuModuleUnload cuOccupancyMaxActiveClusters
cuPointerGetAttributes cuStreamGetCtx cuTensorMapEncodeIm2col cuTensorMapEncodeTiled
"""
"""Functions of the driver that compilers load by name, in addition to those of the stub."""

_PREFIXES = ("cuda", "__cuda", "cublas", "cusolver", "nccl")


def can_build() -> bool:
    """Whether this machine has a compiler and PyTorch is built for CUDA."""
    import torch

    return all(map(shutil.which, ("gcc", "nm"))) and torch.version.cuda is not None


def build(folder: Path) -> Path:
    """Build the library for the installed PyTorch.

    Returns:
        The library, `libcuda.so.1` in `folder`: compilers load it under this name.
    """
    import torch

    torch_libraries = sorted((Path(torch.__file__).parent / "lib").glob("*.so"))
    [header] = Path(torch.__file__).parents[1].glob("nvidia/*/include/cuda_runtime_api.h")
    (folder / "crt").mkdir(parents=True)
    (folder / "crt" / "host_defines.h").write_text(_HOST_DEFINES)
    stub, rest, library = folder / "stub.o", folder / "rest.c", folder / "libcuda.so.1"
    options = ["gcc", "-O1", "-fPIC", "-w", f"-I{folder}", f"-I{header.parent}"]
    subprocess.run([*options, "-c", HERE / "device_stub.c", "-o", stub], check=True)
    wanted = {name for path in torch_libraries for name in _symbols(path, "U", "--dynamic", "--undefined-only")}
    wanted = {name for name in wanted if name.startswith(_PREFIXES)} | set(_DRIVER.split())
    missing = sorted(wanted - _symbols(stub, "T"))
    rest.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in missing))
    link = ["-fno-builtin", "-shared", "-Wl,-soname,libcuda.so.1", stub, rest, "-o", library, "-lpthread", "-ldl"]
    subprocess.run([*options, *link], check=True)
    return library


def _symbols(path: Path, kind: str, *options: str) -> set[str]:
    """Names of the symbols of one kind (`T` defined, `U` undefined) in an object file or library."""
    output = subprocess.run(["nm", *options, path], check=True, capture_output=True, text=True).stdout
    return {fields[-1].partition("@")[0] for line in output.splitlines() if (fields := line.split())[-2:-1] == [kind]}


def environment(library: Path, num_devices: int = 1) -> dict[str, str]:
    """Environment variables of a process that sees `num_devices` GPUs; compiled code is kept beside the library."""
    folder = library.parent
    return os.environ | {
        "LD_PRELOAD": str(library),
        "LD_LIBRARY_PATH": str(folder),
        "TRITON_LIBCUDA_PATH": str(folder),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "PYTHONPATH": f"{HERE / 'on_device'}{os.pathsep}{HERE}{os.pathsep}{ROOT}",
        "REHEARSAL_DEVICES": str(num_devices),
        "OMP_NUM_THREADS": "1",
    }


def run(library: Path, *words: str | Path, num_devices: int = 1, timeout: float = 300) -> str:
    """Run a Python script or module with arguments on the device; returns its standard output.

    Raises:
        RuntimeError: It fails; the message ends with its output.
    """
    command = [sys.executable, *map(str, words)]
    result = subprocess.run(
        command, cwd=ROOT, env=environment(library, num_devices), capture_output=True, text=True, timeout=timeout
    )
    if result.returncode:
        raise RuntimeError(
            f"{command} failed with status {result.returncode}: {(result.stdout + result.stderr)[-4000:]}"
        )
    return result.stdout


def run_json(library: Path, *words: str | Path, **options: Any) -> Any:
    """Like `run`; returns the JSON that the last line of the output has."""
    return json.loads(run(library, *words, **options).splitlines()[-1])


# --- On the device ---------------------------------------------------------------------------------------------------


def reset() -> None:
    """Set all counters to zero."""
    ctypes.CDLL(None).rehearsal_reset()


def counters() -> dict[str, int]:
    """Number of calls since the last reset, by kind."""
    values = (ctypes.c_ulonglong * len(COUNTERS))()
    ctypes.CDLL(None).rehearsal_counters(values)
    return dict(zip(COUNTERS, values, strict=True))


def calls() -> Counter[str]:
    """Number of calls since the last reset, by the name of a kernel or library function."""
    with tempfile.NamedTemporaryFile("r") as file:
        ctypes.CDLL(None).rehearsal_write_calls(file.name.encode())
        lines = (line.rstrip("\n").partition(" ") for line in Path(file.name).read_text().splitlines())
        return Counter({name: int(number) for number, _, name in lines})


def num_calls(*words: str) -> int:
    """Number of calls of functions whose names contain all words."""
    return sum(number for name, number in calls().items() if all(word in name for word in words))
