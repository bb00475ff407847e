"""kernels/compile_peer.py: bitsandbytes' shipped kernels are found and counted, and cost more a weight than ours."""

from __future__ import annotations

import pytest

from kernels.compile_check import check
from kernels.compile_peer import newest_library, peer_rows


@pytest.fixture(scope="module")
def theirs() -> dict[str, float]:
    rows = peer_rows([80, 942])
    assert {row.target for row in rows} == {"sm_80"}
    assert all(row.kernel.startswith("bitsandbytes 0.") and row.spills == 0 for row in rows)
    return {row.config: row.per_weight for row in rows if row.per_weight is not None}


def test_the_library_is_found() -> None:
    library = newest_library()
    assert library is not None
    assert library.is_file()


def test_figures_agree_with_a_count_by_hand(theirs: dict[str, float]) -> None:
    assert theirs["dequantize"] == pytest.approx(23.2, abs=1.5)
    assert theirs["forward simt M=1"] == pytest.approx(8.4, abs=0.5)
    assert theirs["forward 128x128x64"] == pytest.approx(10.8, abs=0.5)
    assert sum(name.startswith("forward") for name in theirs) >= 8
    assert all(7 < figure < 15 for name, figure in theirs.items() if name.startswith("forward"))


def test_ours_take_fewer_instructions_a_weight(theirs: dict[str, float]) -> None:
    ours = {row.kernel: row.per_weight for row in check(80, "dequantize words|decode|^forward 64x128")}
    assert ours["dequantize words"] < 0.4 * theirs["dequantize"]
    assert ours["decode"] < theirs["forward simt M=1"]
    assert ours["forward"] < theirs["forward 64x128x64"]
