"""Compiles the kernel for GPUs, which needs none: what is in its code, a line for each variant."""

import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cachepress.ops.paged_attention.triton_kernels import attend, merge

PLAIN = {
    **{"D": 128, "E": 128, "BLOCK_D": 128, "BLOCK_E": 128, "BLOCK_M": 16, "BLOCK_N": 64},
    **{"STORED": tl.bfloat16, "ROUNDS": tl.bfloat16, "WORK": tl.bfloat16, "PRECISION": "tf32"},
    **{"BITS": 0, "KEY_STEPS": tl.float16, "VALUE_STEPS": tl.float16, "VALUE_GROUP": 0},
    **{"CAPPED": False, "MASKED": False, "BIASED": False, "PAGED": False, "APPENDS": False},
    **{"CAUSAL": False, "WINDOW": 0},
}
VARIANTS = [
    ("plain", 80, {}),
    ("plain", 90, {}),
    ("masked", 90, {"MASKED": True, "CAPPED": True, "BIASED": True}),
    ("coded", 90, {"BITS": 4, "BLOCK_N": 32}),
    ("paged", 90, {"PAGED": True}),
    ("appends", 90, {"APPENDS": True, "CAUSAL": True}),
    ("window", 90, {"APPENDS": True, "WINDOW": 1024}),
]
KINDS = {"table": "*i64", "added_ptr": "*i32", "scaling": "fp32", "softcap": "fp32"}
KINDS |= dict.fromkeys(("out_ptr", "lse_ptr", "mask_ptr", "sink_ptr"), "*fp32")
KINDS |= dict.fromkeys(("query_ptr", "new_key_ptr", "new_value_ptr", "result_ptr"), "*bf16")


def code_of(kernel, constants, arch):
    names = [p.name for p in kernel.params]
    kinds = {n: "constexpr" if n in constants else KINDS.get(n, "i32") for n in names}
    fixed = {(i,): constants[n] for i, n in enumerate(names) if n in constants}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if "*" in kinds[n]}
    source = ASTSource(kernel, kinds, fixed, aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32)).asm["ptx"]


def main() -> None:
    for name, arch, options in VARIANTS:
        code = code_of(attend, {**PLAIN, **options}, arch)
        copies = len(re.findall(r"cp\.async\.cg.*0x10", code))
        products = len(re.findall(r"mma\.sync|wgmma\.mma", code))
        print(name, copies, products)
    code_of(merge, {"E": 128, "BLOCK_E": 128, "SPLITS": 64, "SINKS": True}, 90)


if __name__ == "__main__":
    main()
