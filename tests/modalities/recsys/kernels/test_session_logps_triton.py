import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from triptych.modalities.recsys.kernels import session_logps, triton_kernels  # noqa: E402

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
KERNELS = {"score": triton_kernels.score_kernel, "differentiate": triton_kernels.differentiate_kernel}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Arguments that are no multiple of 16: of a usual batch, and of odd widths and addresses as well.
COUNTS = {"num_rows", "num_cols"}
ODD = {
    "aligned": set(),
    "counts": COUNTS,
    "ragged": {*KERNELS["score"].arg_names, *KERNELS["differentiate"].arg_names},
}


def test_kernels_under_the_interpreter():
    cases = Path(__file__).with_name("interpreted_session_logps.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def spills(kernel, dtype, target, folder, *, odd):
    """Every count that would show a register spilled to memory."""
    constants = {name: getattr(triton_kernels, name) for name in ("ROWS", "COLS", "DEPTH")}
    if kernel is triton_kernels.score_kernel:
        constants["DEPTH"] = triton_kernels.score_depth(DTYPES[dtype])
    typed = dict.fromkeys(("hidden_ptr", "weight_ptr", "tile_ptr"), f"*{dtype}")
    typed |= {"codes_ptr": "*i64"} | dict.fromkeys(("num_rows", "stride", "num_cols", "depth"), "i32")
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else typed.get(name, "*fp32")
        if name not in odd and name not in constants:
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=target, options={"num_warps": triton_kernels.NUM_WARPS})
    if target.backend == "hip":
        pattern = r"\.[vs]gpr_spill_count:\s*(\d+)|\.private_segment_fixed_size:\s*(\d+)"
        text = compiled.asm["amdgcn"]
    else:
        cubin = folder / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        command = [str(tool), "--dump-resource-usage", str(cubin)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        pattern = r"STACK:(\d+)|LOCAL:(\d+)"
    return [int(a or b) for a, b in re.findall(pattern, text)]


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_kernels_compile_without_spills(target, kernel, dtype, odd, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    found = spills(kernel, dtype, target, tmp_path, odd=odd)
    assert len(found) >= 2
    assert set(found) == {0}


@pytest.mark.skipif(torch.cuda.is_available(), reason="here triton can run")
def test_triton_without_a_device_is_refused_and_says_what_can_run():
    hidden, weight = torch.ones(2, 1, 4), torch.ones(3, 4)
    with pytest.raises(ValueError, match="impl 'triton' cannot run: it needs a CUDA or ROCm device"):
        session_logps(hidden, [weight], torch.zeros(2, 1, dtype=torch.int64), impl="triton")
