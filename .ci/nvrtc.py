#!/usr/bin/env python3
"""Stands in for nvcc 12, of which PyPI has no driver program: compiles a kernel file by NVRTC.

    CUDA12_ROOT=DIR .ci/nvrtc.py -std=c++17 -O3 -I DIR -fatbin -gencode arch=compute_70,code=[sm_70,compute_70] FILE -o OUT

DIR is where .ci/cuda.sh has unpacked the wheels. Takes what build.rs passes and nothing else.
Several targets are put into one fat binary by `fatbinary` (of any newer CUDA); one alone is
written as it is, which the driver loads as well. -Xptxas -v prints registers and spills.
"""

import argparse
import ctypes
import os
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(os.environ.get("CUDA12_ROOT", "target/cuda12")) / "nvidia"
INCLUDES = [ROOT / package / "include" for package in ("cuda_runtime", "cuda_nvcc", "cuda_cccl")]


def options():
    parser = argparse.ArgumentParser(prefix_chars="-", allow_abbrev=False)
    parser.add_argument("source", type=pathlib.Path)
    parser.add_argument("-o", dest="output", type=pathlib.Path, required=True)
    parser.add_argument("-I", dest="includes", action="append", default=[])
    parser.add_argument("-D", dest="defines", action="append", default=[])
    parser.add_argument("-gencode", action="append", required=True)
    parser.add_argument("-std", default="c++17")
    parser.add_argument("-fatbin", action="store_true")
    parser.add_argument("-O3", action="store_true")  # NVRTC's default
    parser.add_argument("-Xptxas", default="")
    return parser.parse_args()


def targets(gencode):
    """'arch=compute_70,code=[sm_70,compute_70]' as ['sm_70', 'compute_70']."""
    found = re.fullmatch(r"arch=compute_\d+a?,code=\[?([a-z0-9_,]+)\]?", gencode)
    if not found:
        sys.exit(f"nvrtc.py: -gencode {gencode} is not understood")
    return found[1].split(",")


class Nvrtc:
    """Compiles one source for one target at a time."""

    def __init__(self):
        self.library = ctypes.CDLL(str(ROOT / "cuda_nvrtc/lib/libnvrtc.so.12"))
        self.library.nvrtcGetErrorString.restype = ctypes.c_char_p

    def call(self, name, *arguments):
        status = getattr(self.library, name)(*arguments)
        return None if status == 0 else self.library.nvrtcGetErrorString(status).decode()

    def get(self, program, what):
        """A text or image of the program: NVRTC tells its size first."""
        size = ctypes.c_size_t()
        self.call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self.call(f"nvrtcGet{what}", program, buffer)
        return buffer.raw

    def compile(self, given, target):
        flags = [f"--gpu-architecture={target}", f"--std={given.std}"]
        flags += [f"-I{folder}" for folder in [*given.includes, given.source.parent, *INCLUDES]]
        flags += [f"-D{name}" for name in given.defines]
        if given.Xptxas and target.startswith("sm_"):
            flags.append(f"--ptxas-options={given.Xptxas}")
        program = ctypes.c_void_p()
        source, name = given.source.read_bytes(), str(given.source).encode()
        failed = self.call("nvrtcCreateProgram", ctypes.byref(program), source, name, 0, None, None)
        if failed:
            sys.exit(f"nvrtc.py: {given.source}: {failed}")
        array = (ctypes.c_char_p * len(flags))(*[flag.encode() for flag in flags])
        failed = self.call("nvrtcCompileProgram", program, len(flags), array)
        log = self.get(program, "ProgramLog").rstrip(b"\0\n").decode()
        if failed or (log and given.Xptxas):
            print(log, file=sys.stderr)
        if failed:
            sys.exit(f"nvrtc.py: {given.source} for {target}: {failed}")
        return self.get(program, "CUBIN" if target.startswith("sm_") else "PTX")


def fatbinary():
    for candidate in [os.environ.get("FATBINARY"), ROOT / "cu13/bin/fatbinary", "fatbinary"]:
        try:
            subprocess.run([candidate, "--version"], capture_output=True, check=True)
            return candidate
        except (OSError, TypeError, subprocess.CalledProcessError):
            pass
    sys.exit("nvrtc.py: several targets need the program fatbinary, which .ci/cuda.sh unpacks; or name one target")


def pack(images, output):
    with tempfile.TemporaryDirectory() as folder:
        # PTX stays uncompressed: older drivers do not know the newer forms.
        command = [fatbinary(), "-64", "--compress=false", f"--create={output}"]
        for target, image in images.items():
            kind, number = ("elf" if target.startswith("sm_") else "ptx"), target.split("_")[1]
            file = pathlib.Path(folder) / target
            file.write_bytes(image)
            command.append(f"--image3=kind={kind},sm={number},file={file}")
        subprocess.run(command, check=True)


def main():
    if "--version" in sys.argv:
        print("nvrtc.py, Cuda compilation tools, release 12.9")
        return
    given, nvrtc = options(), Nvrtc()
    wanted = [target for gencode in given.gencode for target in targets(gencode)]
    images = {target: nvrtc.compile(given, target) for target in wanted}
    if len(images) == 1:
        given.output.write_bytes(*images.values())
    else:
        pack(images, given.output)


main()
