"""What a compiled program moves, by hand from what the TPU compiler writes."""

import pytest

from sret_jax.plan.hlo import array_bytes, main_memory_bytes

KB = 1024
ON_CHIP = "{0:T(256)S(1)}"


def program(*lines, other=""):
    body = "".join(f"  {line}\n" for line in lines)
    return f"HloModule jit_f\n\n{other}ENTRY %main (x: u8[1024]) -> u8[1024] {{\n{body}}}\n"


X = "%x = u8[1024]{0:T(256)} parameter(0)"


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("bf16[256,3]{1,0:T(8,128)(2,1)}", 256 * 3 * 2),
        ("f32[]", 4),
        ("pred[7]{0}", 7),
        ("f8e4m3fn[16]", 16),
        ("s4[16]", 8),
        ("(f32[2,2]{1,0}, u32[]{:S(2)}, /*index=2*/(bf16[4]), token[])", 16 + 4 + 8),
    ],
)
def test_bytes_of_a_shape(shape, size):
    assert array_bytes(shape) == size


def test_operands_are_read_and_results_written():
    assert main_memory_bytes(program(X, "ROOT %y = f32[1024]{0} fusion(%x, %x), kind=kLoop, calls=%f")) == (2 + 4) * KB


def test_memory_on_the_chip_does_not_count():
    lines = [X, f"%y = u8[1024]{ON_CHIP} fusion(%x), calls=%f", "ROOT %z = u8[1024]{0} fusion(%y), calls=%g"]
    assert main_memory_bytes(program(*lines)) == 2 * KB


def test_a_copy_ahead_of_time_reads_what_it_writes_on_the_chip():
    lines = [
        X,
        f"%s = ((u8[1024]{{0:T(256)}}), u8[256]{ON_CHIP}, s32[]{{:S(2)}}) slice-start(%x), slice={{[0:256]}}",
        f"%d = u8[256]{ON_CHIP} slice-done(%s)",
    ]
    assert main_memory_bytes(program(*lines)) == KB / 4


def test_a_copy_back_from_the_chip_writes():
    lines = [
        f'%y = u8[1024]{ON_CHIP} custom-call(), custom_call_target="AllocateBuffer"',
        f"%s = (u8[1024]{{0:T(256)}}, u8[1024]{ON_CHIP}, u32[]{{:S(2)}}) copy-start(%y)",
        "ROOT %d = u8[1024]{0:T(256)} copy-done(%s)",
    ]
    assert main_memory_bytes(program(*lines)) == KB


def test_names_for_the_same_memory_move_nothing():
    lines = [
        X,
        "%b = s8[1024]{0:T(256)} bitcast(%x)",
        '%c = u8[2,512]{1,0} custom-call(%b), custom_call_target="ConcatBitcast"',
        "%t = (s8[1024]{0}) tuple(%b)",
        "ROOT %g = s8[1024]{0} get-tuple-element(%t), index=0",
    ]
    assert main_memory_bytes(program(*lines)) == 0


def test_a_loops_body_counts_once_and_the_inside_of_a_fusion_not_at_all():
    def inside(name):
        lines = [f"%{name} (p: u8[1024]) -> u8[1024] {{", f"  %p.{name} = u8[1024] parameter(0)"]
        return "\n".join([*lines, f"  ROOT %q.{name} = u8[1024] negate(%p.{name})", "}\n\n"])

    loop = "%w = u8[1024] while(%x), condition=%test, body=%again"
    fusion = "ROOT %y = u8[1024] fusion(%w), kind=kLoop, calls=%inner"
    other = inside("again") + inside("inner")
    assert main_memory_bytes(program(X, loop, fusion, other=other)) == (2 + 2) * KB
