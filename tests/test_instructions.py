"""What is in the objects of a class: the instructions of that class and of no higher one."""

import re
import shutil
import subprocess

import pytest

import setup as builder

EVEX = r"%zmm|%k[0-7]\b|%[xy]mm(1[6-9]|2\d|3[01])"
TILES = r"%tmm|^tile|^tdp|^(ld|st)tilecfg|^vdpbf16ps|^vcvtne2?ps2bf16|^vcvtneps2bf16"
FORBIDDEN = {"plain": rf"^v|%ymm|{EVEX}|{TILES}", "avx2": f"{EVEX}|{TILES}", "avx512": TILES}


def instructions(path) -> list[str]:
    """Mnemonic and operands, without the names of functions that a jump leads to."""
    command = ["objdump", "-d", "--no-show-raw-insn", str(path)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = (line.split("\t") for line in text.splitlines())
    return [parts[1].split("<")[0] for parts in lines if len(parts) > 1]


def objects(name: str) -> list:
    if builder.platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the classes are those of x86-64")
    if not shutil.which("objdump"):
        pytest.skip("no objdump here (binutils)")
    found = sorted(builder.OBJECTS.glob(f"*.{name}.o"))
    if not found:
        pytest.skip(f"no objects of class {name} in build/objects: the extension was not built here")
    return found


@pytest.mark.parametrize("name", FORBIDDEN)
def test_a_class_holds_no_instruction_of_a_higher_one(name):
    for path in objects(name):
        wrong = [line for line in instructions(path) if re.search(FORBIDDEN[name], line)]
        assert not wrong, f"{path.name}: {wrong[:3]}, {len(wrong)} in all"


@pytest.mark.parametrize(
    "name,its_own", [("avx2", "%ymm"), ("avx512", "%zmm"), ("amx", "^tdpbf16ps.*%tmm")]
)
def test_a_class_holds_its_own(name, its_own):
    """Or the test above would pass on objects of any flags."""
    gemm = [path for path in objects(name) if path.name.startswith("gemm.")]
    assert any(re.search(its_own, line) for line in instructions(gemm[0]))


def test_no_flag_is_for_the_machine_that_builds():
    flags = [*builder.FLAGS, *(flag for flags in builder.CLASSES.values() for flag in flags)]
    wrong = [flag for flag in flags if re.match(r"-m(arch|tune|cpu)=", flag)]
    assert not wrong


@pytest.mark.skipif(builder.compiler() is None or not shutil.which("nm"), reason="no C++ compiler or no nm")
def test_a_file_that_is_gone_is_gone_from_its_batch(tmp_path, monkeypatch):
    """Though the batch is called by its first and last file, and no file is newer than its object."""
    monkeypatch.setattr(builder, "OBJECTS", tmp_path)
    sources = [tmp_path / f"{name}.cpp" for name in ("first", "middle", "last")]
    for source in sources:
        source.write_text(f"int of_{source.stem}() {{ return 1; }}\n")
    header = tmp_path / "none.h"
    header.write_text("")

    def functions(chosen) -> set[str]:
        made = builder.compile_batch(chosen, header)
        said = subprocess.run(["nm", "-C", made], check=True, capture_output=True, text=True).stdout
        return set(re.findall(r"of_(\w+)", said))

    assert functions(sources) == {"first", "middle", "last"}
    assert functions([sources[0], sources[2]]) == {"first", "last"}
