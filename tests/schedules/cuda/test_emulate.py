"""The emulator runs correct kernels as they are, and shows what is wrong with others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax, tirx

from schedules.builder import const, load
from schedules.cuda.emulate import EmulationError, Emulator
from schedules.cuda.lower import lower
from schedules.cuda.target import resolve_cuda_target
from schedules.cuda.writer import CudaWriter, pointer
from tests.helpers.cuda import TRUE, emulator, kernel, matmul_data, tiled_matmul, words

SHAPE = (128, 128, 96)


def barrier_of_one_warp(w: CudaWriter, x: Any) -> None:
    with w.when(tirx.EQ(w.warp, const(0, "int32"))):
        w.barrier()
    w.store(x, w.thread, w.thread)


def shuffle_of_half_a_warp(w: CudaWriter, x: Any) -> None:
    with w.when(w.lane < 16):
        w.store(x, w.value("vitq_shuffle_xor", w.lane, 1), w.thread)


def shuffle(w: CudaWriter, x: Any) -> None:
    w.store(x, w.value("vitq_shuffle_xor", w.lane, 1), w.thread)


def shifted(by: int) -> Any:
    """Read as many elements further on, through a pointer: TVM checks no bounds there."""
    def write(w: CudaWriter, x: Any) -> None:
        held = w.registers("held", 1)
        w.call("vitq_load4", pointer(held, 0), pointer(x, w.thread + by))
        w.store(x, load(held, 0), w.thread)
    return write


def written_after(w: CudaWriter, x: Any) -> None:
    held = w.registers("held", 1)
    w.store(held, const(7, "int32"), 0)
    with w.when(w.thread < 4):
        w.call("vitq_store4", pointer(x, w.thread), pointer(held, 0))


def beyond_shared(w: CudaWriter, x: Any) -> None:
    shared, held = w.shared("s", 64, "int32"), w.registers("held", 1)
    w.call("vitq_load4", pointer(held, 0), pointer(shared, w.thread + 64))
    w.store(x, load(held, 0), w.thread)


def misaligned(w: CudaWriter, x: Any) -> None:
    shared = w.shared("s", 256, "int32")
    w.call("vitq_copy16", pointer(shared, w.thread * 4 + 1), pointer(x, w.thread % 4 * 4), TRUE)


def not_shared(w: CudaWriter, x: Any) -> None:
    held = w.registers("held", 1)
    w.call("vitq_ldmatrix1", pointer(held, 0), pointer(x, w.lane))
    w.store(x, load(held, 0), w.thread)


def untouched_registers(w: CudaWriter, x: Any) -> None:
    held = w.registers("held", 2)
    with w.when(w.thread < 0):
        w.call("vitq_load8", pointer(held, 0), pointer(x, 0))
    w.store(x, load(held, 1), w.thread)


def untouched_shared(w: CudaWriter, x: Any) -> None:
    shared, held = w.shared("s", 64, "int32"), w.registers("held", 1)
    w.call("vitq_load4", pointer(held, 0), pointer(shared, w.thread))
    w.store(x, load(held, 0), w.thread)


WRONG = {
    "one_warp": (barrier_of_one_warp, 64, 64, "wait at .*while others"),
    "half_warp": (shuffle_of_half_a_warp, 32, 32, "wait at .*while others"),
    "few_threads": (shuffle, 32, 16, "fewer than 32 threads"),
    "behind": (shifted(32), 32, 32, r"access at byte \d+ of x .*block \(0, 0, 0\), thread"),
    "before": (shifted(-32), 32, 32, "access at byte -.* of x"),
    "gap": (written_after, 3, 32, "bytes before or after x were written"),
    "beyond_shared": (beyond_shared, 64, 64, "bytes after shared memory"),
    "misaligned": (misaligned, 64, 32, "address is not aligned.*vitq_copy16"),
    "not_shared": (not_shared, 64, 32, "address is not in shared memory.*vitq_ldmatrix1"),
}


@pytest.fixture(scope="module")
def wrong() -> Emulator:
    funcs = {name: kernel(write, [words("x", size)], threads=threads)
             for name, (write, size, threads, _) in WRONG.items()}
    funcs["registers"] = kernel(untouched_registers, [words("x", 32)])
    funcs["shared"] = kernel(untouched_shared, [words("x", 32)])
    return emulator(funcs)


@pytest.fixture(scope="module")
def matmuls() -> Emulator:
    return emulator({"right": tiled_matmul(SHAPE),
                     "no_barrier": tiled_matmul(SHAPE, barrier=False),
                     "no_wait": tiled_matmul(SHAPE, wait=False)})


def different(matmuls: Emulator, name: str, seed: int) -> int:
    x, w, expected = matmul_data(SHAPE)
    out = np.zeros_like(expected)
    matmuls.run(name, x, w, out, seed=seed)
    return int((out != expected).sum())


@pytest.mark.parametrize("seed", range(6))
def test_right_matmul_under_every_order(matmuls: Emulator, seed: int) -> None:
    assert different(matmuls, "right", seed) == 0


@pytest.mark.parametrize("name", ["no_barrier", "no_wait"])
def test_what_is_missing_shows(matmuls: Emulator, name: str) -> None:
    assert any(different(matmuls, name, seed) for seed in range(6))


def test_counts(matmuls: Emulator) -> None:
    x, w, out = matmul_data(SHAPE)
    counts = matmuls.run("right", x, w, out)
    blocks, steps = 4, 3
    assert counts.mma == blocks * 4 * steps * 8
    assert counts.ldmatrix == blocks * 4 * steps * 9
    assert counts.barriers == blocks * steps * 2
    assert counts.copies == blocks * steps * 256
    assert counts.conflicts == 0  # rows are 48 bytes apart


@pytest.mark.parametrize("name", WRONG)
def test_wrong_kernels(wrong: Emulator, name: str) -> None:
    _, size, _, message = WRONG[name]
    seed = 1 if name == "before" else 0
    for _ in range(2):  # the emulator goes on after an error
        with pytest.raises(EmulationError, match=f"^{name}: .*{message}") as error:
            wrong.run(name, np.zeros(size, np.int32), seed=seed)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["registers", "shared"])
def test_memory_begins_with_rubbish(wrong: Emulator, name: str) -> None:
    x = np.zeros(32, np.int32)
    wrong.run(name, x)
    assert (x != 0).all()


def test_arguments_are_checked(matmuls: Emulator) -> None:
    x, w, out = matmul_data(SHAPE)
    with pytest.raises(ValueError, match="takes 3 arrays, not 2"):
        matmuls.run("right", x, w)
    with pytest.raises(ValueError, match="c is int32"):
        matmuls.run("right", x, w, out.astype(np.int64))
    with pytest.raises(ValueError, match="x is int8"):
        matmuls.run("right", x[:-1], w, out)
    with pytest.raises(ValueError, match="not C-contiguous"):
        matmuls.run("right", np.repeat(x, 2)[::2], w, out)


def test_relax_calls_emulated_kernels(matmuls: Emulator) -> None:
    x, w, expected = matmul_data(SHAPE)
    matmuls.register("test_emulate.", seed=2)
    builder = relax.BlockBuilder()
    a, b = (relax.Var(name, relax.TensorType(value.shape, "int8"))
            for name, value in (("a", x), ("b", w)))
    with builder.function("main", [a, b]):
        call = relax.call_dps_packed("test_emulate.right", (a, b),
                                     out_ty=relax.TensorType(expected.shape, "int32"))
        builder.emit_func_output(builder.emit(call))
    machine = relax.VirtualMachine(tvm.compile(builder.get(), "llvm"), tvm.cpu())
    result = machine["main"](tvm.runtime.tensor(x), tvm.runtime.tensor(w)).numpy()
    assert (result == expected).all()


def test_kernels_that_cannot_be_lowered() -> None:
    target = resolve_cuda_target("sm_80")
    same = [words("x", 32), words("x", 32)]
    func = kernel(lambda w, x, y: w.store(y, load(x, w.thread), w.thread), same)
    with pytest.raises(ValueError, match="parameters of k have the same name"):
        lower({"k": func}, target)
    long = [words("x", 2**31, "int8")]
    func = kernel(lambda w, x: w.store(x, const(0, "int8"), w.thread), long)
    with pytest.raises(ValueError, match=r"k: x has 2147483648 elements.* a smaller batch"):
        lower({"k": func}, target)


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ValueError, match=r"needs a C\+\+17 compiler"):
        emulator({"k": kernel(shuffle, [words("x", 32)])})
