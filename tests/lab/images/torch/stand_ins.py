#!/usr/bin/env python3
"""Lets torch of PyPI load without its four gigabytes of CUDA libraries, for machines that have no GPU.

The wheel's libraries are linked against libcudart, libcublas and others, and the dynamic loader insists on each of them.
This writes libraries of those names into torch/lib, with the symbols and version nodes that torch asks for. All their
functions return 100, CUDA's "no device", so that torch.cuda.is_available() is False and the CPU works as ever; those few
that CPU code asks for something else are written out.

Needs readelf, nm and gcc. Of no use, and in the way, on a machine with a GPU.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

CUDA_LIBRARY = re.compile(r"lib(?:cu|nv|nccl)\w*\.so\.\d+")
UNVERSIONED = {
    "libnccl.": r"p?nccl",
    "libcufile.": r"cuFile",
    "libcusparseLt.": r"cusparseLt",
    "libcuda.": r"cu[A-Z]",
    "libnvshmem_host.": r"nvshmemx?(mi?)?_",
}
"""Library -> how the names of its functions begin, where its symbols carry no version that would tell."""
NO_DEVICE = 100
ANSWERS = {
    # transformers asks this before it builds a mask
    "cudaStreamIsCapturing": "int cudaStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }",
}
TEXT = re.compile(r"\w*Get(Last)?(Error|Status)(String|Name)")
"""Functions whose result is a text, which is printed with an error."""

Symbols = dict[str, str]
"""Symbol -> its version node, or an empty word."""


def main() -> None:
    torch = importlib.util.find_spec("torch")
    assert torch and torch.origin, "torch is not installed in this Python"
    package = Path(torch.origin).parent
    for library, symbols in sorted(asked_for(package).items()):
        write(package / "lib" / library, symbols)
        print(f"{library}: {len(symbols)} symbols")


def asked_for(package: Path) -> dict[str, Symbols]:
    """The CUDA libraries that torch's own libraries need, with what they need from each."""
    wanted: dict[str, Symbols] = defaultdict(dict)
    unversioned: set[str] = set()
    objects = [*(package / "lib").glob("*.so*"), *package.glob("_C*.so")]
    for path in objects:
        for library in re.findall(r"\(NEEDED\).*\[(.+)\]", output("readelf", "-dW", path)):
            if CUDA_LIBRARY.fullmatch(library):
                wanted.setdefault(library, {})  # also a library of which no symbol is used
        library_of = version_nodes(path)
        for line in output("nm", "-D", "--undefined-only", path).splitlines():
            symbol, _, version = line.split()[-1].partition("@")
            version = version.lstrip("@")
            if not version:
                unversioned.add(symbol)
            elif CUDA_LIBRARY.fullmatch(library_of.get(version, "")):
                wanted[library_of[version]][symbol] = version
    for start, beginning in UNVERSIONED.items():
        for library in wanted:
            if library.startswith(start):
                wanted[library] = {s: "" for s in unversioned if re.match(beginning, s)} | wanted[library]
    return wanted


def version_nodes(path: Path) -> dict[str, str]:
    """Version node -> the library that an object expects it from."""
    found, library = {}, ""
    for line in output("readelf", "-VW", path).splitlines():
        if match := re.search(r"File: (\S+)", line):
            library = match[1]
        elif library and (match := re.search(r"Name: (\S+)", line)):
            found[match[1]] = library
    return found


def write(path: Path, symbols: Symbols) -> None:
    """Links a library of that file name which defines the symbols, each under its version node."""
    nodes: dict[str, list[str]] = defaultdict(list)
    for symbol, version in sorted(symbols.items()):
        nodes[version].append(symbol)
    with tempfile.TemporaryDirectory() as folder:
        source, script = Path(folder, "stand_in.c"), Path(folder, "stand_in.map")
        source.write_text("\n".join(function(symbol) for symbol in sorted(symbols)))
        script.write_text("".join(version_script(nodes)))
        options = ["-w", "-shared", "-fPIC", "-nostdlib", f"-Wl,-soname,{path.name}", f"-Wl,--version-script={script}"]
        output("gcc", *options, "-o", path, source)


def function(symbol: str) -> str:
    if TEXT.fullmatch(symbol):
        return f'const char *{symbol}(void) {{ return "no CUDA here: a stand-in"; }}'
    return ANSWERS.get(symbol, f"int {symbol}(void) {{ return {NO_DEVICE}; }}")


def version_script(nodes: dict[str, list[str]]) -> Iterable[str]:
    versions = [version for version in nodes if version]
    if not versions:
        yield "{ global: *; };\n"
    for version in versions:
        yield f"{version} {{ global: {'; '.join(nodes[version])}; }};\n"


def output(*command: object) -> str:
    return subprocess.run([str(word) for word in command], check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    main()
