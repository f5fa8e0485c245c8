"""Faults in C++ that once were seen by few tests or none: (file, text, text with the fault)."""

NAMED = [
    ("activation/functions.h", "x > 0.0f ? 1.0f : 0.0f}", "x >= 0.0f ? 1.0f : 0.0f}"),
    ("activation/functions.h", "(density == 0.0f ? 0.0f : x * density)", "x * density"),
    ("activation/functions.h", "(tail == 0.0f ? 0.0f : tail * dz)", "tail * dz"),
    ("cpu/parallel.cpp", "return items * part / parts;", "return items / parts * part;"),
    ("common/convert.h", "if (magnitude >= 0x477FF000u)", "if (magnitude >= 0x477FE000u)"),
    ("common/convert.h", "if ((bits & 0x7fffffffu) > 0x7F800000u) return {kNan16};\n  return", "return"),
    ("pack/mvue_group.h", "multiply_add(1.0f - 0x1p-22f, base", "multiply_add(1.0f, base"),
    ("pack/mvue_group.h", "(128.0f - 0x1p-17f);", "128.0f;"),
    ("mask/block_search.h", "bits < kLargeBits ? bits : kLargeBits", "bits"),
    ("mask/block_search.h", "in_row == 2 && in_column == 2", "in_row == 2"),
]
