"""The named facts of every GPU, proved: small kernels are compiled for each target and read back, and what is
found is what the files claim, no more and no less. Nothing runs; no GPU is asked for."""

from __future__ import annotations

import pytest

from firebox.hardware._families import FAMILIES
from firebox.hardware.base import Gpu, known_gpus
from firebox.kernels.compile import Compiled, CompileRequest, compile_all
from tests.support.triton_kernels import PLAIN, SCALED, copy_tile, dependent, dot_request, narrow, total

KINDS = (*PLAIN, *SCALED)
# A warp's instruction at few rows, a warp group's at 64 or more, a block-scaled one of tcgen05 at 128.
SMALL, MEDIUM, LARGE = (16, 32, 64), (64, 64, 64), (128, 128, 128)
MATRIX = ("mma", "wgmma", "tcgen05")
GPUS = {str(gpu.triton_target): gpu for gpu in FAMILIES.values()}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[Compiled]]:
    """(target, what was tried) → results; everything compiles once, in one go."""
    requests = {
        (target, fact, number): request
        for target, gpu in GPUS.items()
        for fact, tried in probes(gpu).items()
        for number, request in enumerate(tried)
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FIREBOX_CACHE_DIR", str(tmp_path_factory.mktemp("facts")))
        results = compile_all(list(requests.values()))
    grouped: dict[tuple[str, str], list[Compiled]] = {}
    for (target, fact, _), result in zip(requests, results, strict=True):
        grouped.setdefault((target, fact), []).append(result)
    return grouped


def probes(gpu: Gpu) -> dict[str, list[CompileRequest]]:
    """What is compiled to find out about a fact."""
    tiles = (SMALL, LARGE if gpu.capability == (10, 0) else MEDIUM)
    tile = {"source": "tensordesc<bf16[64, 64]>", "target": "*bf16"}
    return {
        **{kind: [dot_request(kind, gpu, tile) for tile in tiles] for kind in KINDS},
        "fp8 type": [CompileRequest(narrow, {"source": "*fp32", "target": "*fp8e4nv"}, {"N": 256}, gpu)],
        "tma": [CompileRequest(copy_tile, tile, {"BM": 64, "BN": 64}, gpu, aligned=("target",))],
        "clusters": [
            CompileRequest(
                total, {"source": "*fp32", "target": "*fp32"}, {"N": 1024}, gpu, options={"num_ctas": 2}
            )
        ],
        "pdl": [CompileRequest(dependent, {"target": "*fp32"}, {"N": 256}, gpu)],
    }


@pytest.mark.parametrize("target", GPUS)
def test_matrix_instructions_are_the_claimed_ones(target: str, compiled) -> None:
    results = [result for kind in KINDS for result in compiled[target, kind]]
    assert all(result.machine_code or result.error for result in results)
    found = {name for result in results for name in result.instructions}
    found |= {name.split(".")[0] for name in found} & {"wgmma", "tcgen05"}
    assert found == {fact for fact in GPUS[target].facts if fact.split(".")[0] in MATRIX}


@pytest.mark.parametrize("target", GPUS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_dot_is_native_where_a_matrix_fact_of_its_kind_says_so(target: str, kind: str, compiled) -> None:
    """And where no fact does, it is emulated or refused."""
    # bf16 and f16 are one instruction of tcgen05
    names = {f"{instruction}.{kind}" for instruction in MATRIX} | (
        {"tcgen05.f16"} if kind == "bf16" else set()
    )
    claimed = bool(names & GPUS[target].facts)
    assert any(result.native for result in compiled[target, kind]) is claimed


@pytest.mark.parametrize("target", GPUS)
def test_the_fp8_type_exists_where_claimed(target: str, compiled) -> None:
    (result,) = compiled[target, "fp8 type"]
    assert (result.error is None) is ("fp8" in GPUS[target].facts), result.error
    if result.error:
        assert "fp8e4nv not supported" in result.error


@pytest.mark.parametrize("target", GPUS)
@pytest.mark.parametrize("fact", ["tma", "clusters", "pdl"])
def test_other_facts(target: str, fact: str, compiled) -> None:
    """Claimed: the instruction is in the binary. Not claimed: it is not, or the compiler refuses."""
    (result,) = compiled[target, fact]
    assert (fact in result.features) is (fact in GPUS[target].facts), result


def test_every_gpu_has_the_facts_of_a_proved_family() -> None:
    for name, gpu in known_gpus().items():
        assert gpu.facts == GPUS[str(gpu.triton_target)].facts, name
        assert gpu.capability == GPUS[str(gpu.triton_target)].capability, name
