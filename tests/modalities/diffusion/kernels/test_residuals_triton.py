"""The Triton form without a GPU: its kernels under the interpreter, and compiled ahead of time."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from residual_checks import SIZES, assert_at_most_twice_the_error_of_the_reference, make

triton = pytest.importorskip("triton", reason="triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from triptych.modalities.diffusion.kernels import triton_kernels  # noqa: E402

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
KERNELS = {
    "difference": (triton_kernels.reduce_kernel, {"HAS_REF": True}),
    "squared": (triton_kernels.reduce_kernel, {"HAS_REF": False}),
    "differentiate": (triton_kernels.differentiate_kernel, {}),
}
# Always float32, whatever the inputs are.
WIDE = {"partial_ptr": "*fp32", "upstream_ptr": "*fp32", "scale": "fp32"}
DTYPES = {
    "bf16": {"*": "*bf16"},
    "fp32": {"*": "*fp32"},
    "mixed": {"*": "*bf16", "prediction_ptr": "*fp32", "grad_ptr": "*fp32"},
}


def test_kernels_under_the_interpreter():
    cases = Path(__file__).with_name("interpreted_residuals.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def _compiled(kernel, constants, dtypes, target, *, aligned):
    constants = {**constants, "BLOCK": triton_kernels.BLOCK}
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        kind = {**WIDE, **dtypes}.get(name, dtypes["*"] if name.endswith("_ptr") else "i32")
        signature[name] = "constexpr" if name in constants else kind
        # What a launch finds out by itself: addresses and distances that are multiples of 16.
        if aligned and (name.endswith(("_ptr", "_stride")) or name == "row_size"):
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options={"num_warps": triton_kernels.NUM_WARPS})


def _spills(compiled, target, folder):
    """Every count that would show a register spilled to memory."""
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        pattern = r"\.[vs]gpr_spill_count:\s*(\d+)|\.private_segment_fixed_size:\s*(\d+)"
    else:
        cubin = folder / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        command = [str(tool), "--dump-resource-usage", str(cubin)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        pattern = r"STACK:(\d+)|LOCAL:(\d+)"
    return [int(a or b) for a, b in re.findall(pattern, text)]


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "ragged"])
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("kernel", "constants"), KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_kernels_compile_without_spills(target, kernel, constants, dtypes, aligned, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    compiled = _compiled(kernel, constants, dtypes, target, aligned=aligned)
    spills = _spills(compiled, target, tmp_path)
    assert len(spills) >= 2
    assert set(spills) == {0}
    assert compiled.metadata.num_warps == triton_kernels.NUM_WARPS


@pytest.mark.parametrize(("kernel", "constants"), KERNELS.values(), ids=KERNELS)
def test_aligned_half_precision_rows_are_loaded_sixteen_bytes_at_a_time(
    kernel, constants, tmp_path, monkeypatch
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    compiled = _compiled(kernel, constants, DTYPES["bf16"], TARGETS["sm_90"], aligned=True)
    loads = re.findall(r"ld\.global[.\w:]*\.v4\.b32", compiled.asm["ptx"])
    assert len(loads) == (3 if constants.get("HAS_REF") else 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")
@pytest.mark.parametrize("with_ref", [True, False], ids=["difference", "squared"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("num", [0, 1, 3])
def test_triton_on_the_device_keeps_the_2x_rule(num, size, dtype, with_ref):
    inputs = make(num, size, dtype, with_ref=with_ref, device="cuda")
    assert_at_most_twice_the_error_of_the_reference(inputs, "triton")
