"""Collectives in the texts of compiled programs, by hand from what compilers wrote."""

import pytest

from sret_jax.plan.collectives import Collectives, find_collectives

HEADER = "HloModule jit_step, is_scheduled=true, num_partitions=16, frontend_attributes={}\n\n"


def entry(*lines: str) -> str:
    return HEADER + "ENTRY %main.0_spmd (param: bf16[256,1024]) -> f32[] {\n" + "\n".join(lines) + "\n}\n"


PARAM = "  %param = bf16[256,1024]{1,0:T(8,128)(2,1)} parameter(0), sharding={devices=[4,1]<=[4]}"


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("mesh['axis_0'=4,'axis_1'=1] {'axis_0'}", 4),
        ("mesh['axis_0'=4,'axis_1'=1,'axis_2'=4], device_ids=([4,4]T(1,0)) {'axis_2'}", 4),
        ("mesh['axis_0'=2,'axis_1'=8] {'axis_0','axis_1'}", 16),
        ("mesh['axis_0'=16] {'axis_0':(2)8}", 8),
        ("{{0,1,2},{3,4,5}}", 3),
        ("[2,8]<=[16]", 8),
        ("[8,2]<=[2,8]T(1,0)", 2),
        ("{}", 16),
    ],
)
def test_groups_are_read_however_they_are_written(groups: str, size: int) -> None:
    line = (
        f"  ROOT %ar = bf16[256,1024]{{1,0}} all-reduce(%param), channel_id=1, replica_groups={groups}, to_apply=%add"
    )
    assert find_collectives(entry(PARAM, line)) == [Collectives("all-reduce", 1, size, 2 * 256 * 1024)]


def test_each_kind_counts_its_whole_array() -> None:
    found = find_collectives(
        entry(
            PARAM,
            "  %ag = bf16[4096,1024]{1,0:T(8,128)(2,1)S(1)} all-gather(%param), channel_id=1, replica_groups={}",
            "  %rs = bf16[64,1024]{1,0} reduce-scatter(%param), channel_id=2, replica_groups=[4,4]<=[16]",
            "  %bitcast.2 = bf16[4,64,1024]{2,1,0} bitcast(%param)",
            "  %a2a = bf16[4,64,1024]{2,1,0} all-to-all(%bitcast.2), channel_id=3, replica_groups=[4,4]<=[16]",
            "  %cp-start = (bf16[256,1024]{1,0}, bf16[256,1024]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) "
            "collective-permute-start(%param), channel_id=4, source_target_pairs={{0,4},{4,0}}",
            "  %cp-done = bf16[256,1024]{1,0} collective-permute-done(%cp-start)",
        )
    )
    size = 2 * 256 * 1024
    assert {c.kind: (c.count, c.group, c.bytes) for c in found} == {
        "all-gather": (1, 16, 16 * size),
        "reduce-scatter": (1, 4, size),
        "all-to-all": (1, 4, size),
        "collective-permute": (1, 16, size),
    }


def test_several_arrays_in_one_and_several_of_a_kind_are_summed() -> None:
    found = find_collectives(
        entry(
            PARAM,
            "  %count = s32[] constant(0)",
            "  %flags = pred[3]{0} broadcast(%count)",
            "  %ar.1 = (bf16[256,1024]{1,0}, s32[], pred[3]{0}, /*index=3*/bf16[256,1024]{1,0}) "
            "all-reduce(%param, %count, %flags, /*index=3*/%param), channel_id=1, replica_groups={}, to_apply=%add",
            "  %ar.2 = s32[] all-reduce(%count), channel_id=2, replica_groups={}, to_apply=%add",
            "  %ar.3 = s32[] all-reduce(%count), channel_id=3, replica_groups=[8,2]<=[16], to_apply=%add",
        )
    )
    size = 2 * 256 * 1024
    assert found == [Collectives("all-reduce", 2, 16, 2 * size + 4 + 3 + 4), Collectives("all-reduce", 1, 2, 4)]


def test_an_asynchronous_one_counts_once() -> None:
    found = find_collectives(
        entry(
            PARAM,
            "  %ag-start = (bf16[256,1024]{1,0}, bf16[4096,1024]{1,0}) all-gather-start(%param), replica_groups={}",
            "  ROOT %ag-done = bf16[4096,1024]{1,0} all-gather-done(%ag-start)",
        )
    )
    assert found == [Collectives("all-gather", 1, 16, 16 * 2 * 256 * 1024)]


def fused(name: str, line: str) -> str:
    parameter = f"  %p.{name} = bf16[256,1024] parameter(0)"
    return f"%{name} (p.{name}: bf16[256,1024]) -> bf16[4096,1024] {{\n{parameter}\n{line}\n}}\n"


def test_the_pieces_of_one_that_runs_beside_other_operations_count_once() -> None:
    pieces = [
        fused(f"piece{i}", f"  %ag.{i} = bf16[4096,1024] all-gather(%p.piece{i}), channel_id=3, replica_groups={{}}")
        for i in range(3)
    ]
    other = fused("other", "  %ag.9 = bf16[4096,1024] all-gather(%p.other), channel_id=4, replica_groups={}")
    (found,) = find_collectives(HEADER + "\n".join([*pieces, other]))
    assert found.count == 2


def test_an_all_reduce_of_which_each_device_keeps_its_part_is_a_reduce_scatter() -> None:
    line = "  %ar = bf16[256,1024] all-reduce(%p.all-reduce-scatter.1), channel_id=5, replica_groups={{0,1,2,3}}"
    (found,) = find_collectives(HEADER + fused("all-reduce-scatter.1", line))
    assert found == Collectives("reduce-scatter", 1, 4, 2 * 256 * 1024)


def test_a_program_for_one_device_has_none() -> None:
    text = "HloModule jit_f\n\nENTRY %main (p: f32[8]) -> f32[8] {\n  ROOT %p = f32[8]{0} parameter(0)\n}\n"
    assert find_collectives(text) == []


@pytest.mark.parametrize(
    ("kind", "sent"),
    [
        ("all-reduce", 2 * 3 / 4 * 100),  # a ring: three quarters to reduce, three quarters to gather
        ("all-gather", 3 / 4 * 100),
        ("reduce-scatter", 3 / 4 * 100),
        ("all-to-all", 3 / 4 * 100),
        ("collective-permute", 100),
    ],
)
def test_the_least_that_a_device_sends_is_the_closed_form(kind: str, sent: float) -> None:
    assert Collectives(kind, 1, 4, 100).sent_bytes == sent
    assert Collectives("all-reduce", 1, 1, 100).sent_bytes == 0
