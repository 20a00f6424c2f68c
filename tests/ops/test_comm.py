"""Collectives between two processes over Gloo, eager and compiled, against sums and orders written out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from omni_engine.ops import comm
from omni_engine.ops.rank_group import RankGroup

PROGRAM = """
import sys
import torch
import torch.distributed as dist
from omni_engine.ops import comm
from omni_engine.ops.rank_group import RankGroup

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{store}")
group = RankGroup(2, rank, dist.distributed_c10d._get_default_group().group_name)

def tensor(of):  # [4, 3], another on each rank
    return torch.arange(12.0).view(4, 3) + 100 * of

both = torch.cat((tensor(0), tensor(1)))
expected = {
    "all_reduce": tensor(0) + tensor(1),
    "all_gather": both,
    "reduce_scatter": (tensor(0) + tensor(1))[2 * rank : 2 * rank + 2],
    "all_to_all": torch.cat((tensor(0)[2 * rank : 2 * rank + 2], tensor(1)[2 * rank : 2 * rank + 2])),
}
for name, wanted in expected.items():
    function = getattr(comm, name)
    mine = tensor(rank)
    for call in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        assert torch.equal(call(mine, group), wanted), (name, rank, call(mine, group))
        assert torch.equal(call(mine.T.contiguous().T, group), wanted), (name, "strides")
    assert torch.equal(mine, tensor(rank)), name
    assert not torch.equal(wanted, mine)
print("done")
"""


def test_two_processes_agree(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM]
    store = str(tmp_path / "store")
    ranks = [
        subprocess.Popen([*command, str(rank), store], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for rank in ranks:
        output, errors = rank.communicate(timeout=240)
        assert output == "done\n", errors[-2000:]


COLLECTIVES = (comm.all_reduce, comm.all_gather, comm.reduce_scatter, comm.all_to_all)


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_a_group_of_one_communicates_nothing(collective) -> None:
    tensor = torch.arange(6.0).view(3, 2)
    assert collective(tensor, RankGroup()) is tensor


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_a_group_without_a_name_is_refused(collective) -> None:
    with pytest.raises(ValueError, match="needs the name of its process group"):
        collective(torch.zeros(4, 2), RankGroup(2, 1))


@pytest.mark.parametrize("collective", [comm.reduce_scatter, comm.all_to_all])
def test_parts_must_be_equal(collective) -> None:
    with pytest.raises(ValueError, match=rf"{collective.__name__} needs .* multiple of its 2 ranks: 3"):
        collective(torch.zeros(3, 2), RankGroup(2, 1, "group"))


def test_a_rank_is_one_of_its_group() -> None:
    with pytest.raises(ValueError, match=r"\[0, size of its group\): 2 of 2"):
        RankGroup(2, 2)
