"""Facts read from the HLO text of a compiled program."""

import pytest

from ovis_jax.plan.hlo_analysis import (
    collective_counts_and_bytes,
    count_kernel_calls,
    count_weight_sized_operations,
    max_all_reduces_per_block,
    parse_out_of_memory_bytes,
)


def test_collectives_by_kind():
    hlo = """
      %a = bf16[8,4]{1,0} all-gather(%x), dimensions={0}
      %b = (f32[2]{0}, f32[3]{0}) all-reduce(%y, %z), to_apply=%add
      %c = (bf16[4]{0}, bf16[4]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x)
      %d = bf16[4]{0} collective-permute-done(%c)
      %s = (f32[2]{0}, f32[1]{0}) all-reduce-start(%y, %z), to_apply=%add
      %d2 = (f32[2]{0}, f32[1]{0}) all-reduce-done(%s)
      %e = ((bf16[2]{0:T(8,128)}, bf16[1]{0}), (bf16[16]{0}, bf16[8]{0})) all-gather-start(%x, %y)
      %f = s4[6,3]{1,0:E(4)} all-gather(%x), dimensions={0}
      %g = pred[2]{0} all-gather(%x), dimensions={0}
    """
    assert collective_counts_and_bytes(hlo) == {
        "all-gather": {"count": 4, "bytes": 64 + 48 + 9 + 2},
        "all-reduce": {"count": 2, "bytes": 32},
        "collective-permute": {"count": 1, "bytes": 8},
    }


WEIGHTS = [(256, 3584), (2048, 3584), (14336, 3584)]
PROGRAM = """
  %copy.1 = bf16[3584,256]{1,0:T(8,128)} copy(%p), metadata={op_name="x"}
  %copy.2 = bf16[8,3584]{1,0} copy(%p)
  ROOT %t = f32[1,2048,3584]{2,1,0} transpose(%p), dimensions={0,2,1}
  %c.3 = (bf16[256,3584]{1,0:S(1)}, bf16[256,3584]{1,0}, u32[]{:S(2)}) copy-start(%p)
  %r.1 = bf16[8,3584]{1,0} all-reduce(%a), metadata={op_name="jit(decode)/Decoder/block_0/attn/d"}
  %r.2 = bf16[8,3584]{1,0} all-reduce(%a), metadata={op_name="jit(decode)/Decoder/block_0/mlp/d"}
  %r.3 = bf16[8,3584]{1,0} all-reduce(%a), metadata={op_name="jit(decode)/Decoder/block_1/mlp/d"}
  %r.4 = bf16[8,3584]{1,0} all-reduce(%a), metadata={op_name="jit(decode)/gather"}
  %g.1 = bf16[14336,3584]{1,0} all-gather(%w), dimensions={0}
  %k.1 = bf16[8,256]{1,0} custom-call(%q), custom_call_target="tpu_custom_call", operand_layout={}
  ROOT %k = bf16[8,256]{1,0} custom-call(%q), custom_call_target="tpu_custom_call", metadata={}
  %cublas-gemm.2.1 = (bf16[8]{0}, s8[4]{0}) custom-call(%q), custom_call_target="__cublas$gemm"
  %k.3 = bf16[8,256]{1,0} custom-call(%q), custom_call_target="ConcatBitcast"
"""


def test_weight_sized_operations():
    """Prefetching into fast memory (copy-start) is not a copy."""
    assert count_weight_sized_operations(PROGRAM, WEIGHTS) == {
        "copies": 2,
        "dequantized": 0,
        "all-gathers": 1,
        "all-reduces": 0,
    }
    assert count_weight_sized_operations(PROGRAM, [(8, 3584)]) == {
        "copies": 1,
        "dequantized": 0,
        "all-gathers": 0,
        "all-reduces": 4,
    }


FUSIONS = """
%inside (p: s8[2048,3584]) -> bf16[8,2048] {
  %p = s8[2048,3584]{1,0} parameter(0)
  %copy.inside = s8[2048,3584]{0,1} copy(%p)
  %convert.inside = bf16[2048,3584]{0,1} convert(%copy.inside)
  ROOT %dot = bf16[8,2048]{1,0} dot(%convert.inside, %convert.inside)
}

%relayout (q: s8[2048,3584]) -> s8[2048,3584] {
  %q = s8[2048,3584]{1,0} parameter(0)
  %transpose.1 = s8[3584,2048]{1,0} transpose(%q), dimensions={1,0}
  ROOT %bitcast.1 = s8[1,2048,3584]{1,2,0} bitcast(%transpose.1)
}

%two (r: s8[2048,3584]) -> (f32[8], bf16[14336,3584]) {
  %r = s8[14336,3584]{1,0} parameter(0)
  %reduce.1 = f32[8]{0} reduce(%r)
  %multiply.1 = bf16[14336,3584]{1,0} multiply(%r, %r)
  ROOT %tuple.1 = (f32[8]{0}, bf16[14336,3584]{1,0}) tuple(%reduce.1, %multiply.1)
}

ENTRY %main (w: s8[2048,3584], g: s4[28,256,128]) -> bf16[8] {
  %w = s8[2048,3584]{1,0} parameter(0), metadata={op_name="params['k'].q"}
  %v = s8[14336,3584]{1,0} parameter(1)
  %g = s4[28,256,128]{2,1,0:E(4)} parameter(2)
  %x = bf16[2048,3584]{1,0} parameter(3)
  %a = bf16[8,2048]{1,0} fusion(%w), kind=kOutput, calls=%inside
  %b = s8[1,2048,3584]{1,2,0} fusion(%w), kind=kLoop, calls=%relayout
  %c = (f32[8]{0}, bf16[14336,3584]{1,0}) fusion(%v), kind=kLoop, calls=%two
  %d = bf16[28,256,128]{2,1,0} convert(%g), metadata={op_name="k"}
  %e = bf16[2048,3584]{1,0:T(8,128)(2,1)S(1)} convert(%w)
  %h = s8[2048,3584]{1,0} gather(%v, %x)
  %i = bf16[2048,3584]{1,0} convert(%h)
  %j = s8[2048,3584]{1,0:T(8,128)(4,1)S(1)} fusion(%w), kind=kLoop, calls=%relayout
  %k = s8[2048,3584]{1,0:T(8,128)(4,1)} copy(%j)
  %l = f32[2048,3584]{1,0} custom-call(%x, %w), custom_call_target="__gpu$xla.gpu.triton"
  ROOT %f = f32[2048,3584]{1,0} convert(%x)
}
"""


def test_what_a_fusion_writes_is_counted():
    """What stays inside a fusion or in fast memory is not, nor are rows of a table or products."""
    shapes = [(28, 256, 128), *WEIGHTS]
    found = count_weight_sized_operations(FUSIONS, shapes)
    assert found == {"copies": 1, "dequantized": 2, "all-gathers": 0, "all-reduces": 0}
    found = count_weight_sized_operations(FUSIONS, WEIGHTS)
    assert found["dequantized"] == 1


def test_all_reduces_and_kernels():
    assert max_all_reduces_per_block(PROGRAM) == 2
    assert max_all_reduces_per_block("") == 0
    assert count_kernel_calls(PROGRAM) == {"k tpu_custom_call": 2, "cublas-gemm __cublas$gemm": 1}


@pytest.mark.parametrize(
    ("message", "size"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO"
            " temporaries (1.88T) exceeds available HBM (15.75G).",
            1.88 * 2**40,
        ),
        (
            "XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 17.02G of"
            " 15.75G hbm. Exceeded hbm capacity by 1.27G.",
            17.02 * 2**30,
        ),
        ("Ran out of memory in memory space vmem. Used 17.02M of 16M.", None),
        ("RESOURCE_EXHAUSTED: out of HBM", None),
    ],
)
def test_out_of_memory_messages(message, size):
    assert parse_out_of_memory_bytes(message) == (size and int(size))
