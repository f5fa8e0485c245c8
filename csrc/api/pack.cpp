// pack.cpp: public functions of pack.h: check, then dispatch.
#include "sparse24/pack.h"

#include "api/checks.h"
#include "api/dispatch.h"
#include "common/metadata.h"

#ifdef SPARSE24_WITH_CUDA
#include "fused/fused_cuda.h"
#include "mask/mask_cuda.h"
#include "pack/pack_cuda.h"
#endif

namespace sparse24 {
namespace {

using namespace api;

enum class Packs { kNothing, kSomething };

void check_pack(const PackArgs* weights, int count, Packs packs, const Context& context) {
  check_extent(count, "count");
  for (int i = 0; i < count; ++i) {
    const PackArgs &args = weights[i], &first = weights[0];
    check_extents(args.w, "w");
    check_blocks(args.w, "w");
    check_same_dtype(args.w, "w", first.w, "w of the call's first weight");
    if (is_empty(args.w)) continue;
    check_major(args.w, "w");
    check_pointer(args.mask, "mask");
    if (packs == Packs::kNothing) continue;
    SP24_CHECK(args.out_dtype == first.out_dtype,
               "out_dtype must be the same for all weights of a call, got ",
               name_of(args.out_dtype), " and ", name_of(first.out_dtype));
    SP24_CHECK((args.packed == nullptr) == (args.E == nullptr),
               "packed and E must be given together, or neither");
    SP24_CHECK((args.packed_t == nullptr) == (args.E_t == nullptr),
               "packed_t and E_t must be given together, or neither");
    if (context.backend == Backend::kCuda) check_gpu_packed_dtype(args.out_dtype, "out_dtype");
    SP24_CHECK(is_float8(args.out_dtype) ||
                   (args.scale == nullptr && args.amax == nullptr && args.counters == nullptr),
               "scale, amax and counters go with a float8 out_dtype, got ",
               name_of(args.out_dtype));
  }
}

}  // namespace

int64_t metadata_bytes(int64_t m, int64_t k) {
  check_extent(m, "m");
  check_extent(k, "k");
  return meta_bytes(m, k);
}

int64_t padded_tokens(int64_t tokens) {
  check_extent(tokens, "tokens");
  return round_up(tokens, 8);
}

int64_t metadata_bytes(DType dtype, int64_t m, int64_t k) {
  check_extent(m, "m");
  check_extent(k, "k");
  return meta_bytes_for(dtype, m, k);
}

int64_t padded_tokens(DType dtype, int64_t tokens) {
  check_extent(tokens, "tokens");
  return padded_tokens_for(dtype, tokens);
}

void search_mask(const PackArgs* weights, int count, const Context& context) {
  check_pack(weights, count, Packs::kNothing, context);
  SP24_DISPATCH(context, search_mask, weights, count);
}

void pack_by_mask(const PackArgs* weights, int count, const Context& context) {
  check_pack(weights, count, Packs::kSomething, context);
  SP24_DISPATCH(context, pack_by_mask, weights, count);
}

void search_and_pack(const PackArgs* weights, int count, const Context& context) {
  check_pack(weights, count, Packs::kSomething, context);
  SP24_DISPATCH(context, search_and_pack, weights, count);
}

void mvue_pack(const MvueArgs& args, const Context& context) {
  check_extents(args.dy, "dy");
  if (is_empty(args.dy)) return;
  MvueArgs checked = args;
  checked.dy = as_major(args.dy, "dy");
  check_mvue(args, args.dy.dtype, context, "dy");
  check_float8(args.float8, args.dy.rows, args.dy.cols);
  SP24_DISPATCH(context, mvue_pack, checked);
}

void unpack(const UnpackArgs& args, const Context& context) {
  check_extents(args.out, "out");
  // Only the packed axis comes in groups of four: an MVUE-packed gradient has any number of
  // columns.
  const int64_t packed_extent = args.transposed ? args.out.rows : args.out.cols;
  SP24_CHECK(packed_extent % 4 == 0, "out must have ", args.transposed ? "rows" : "columns",
             " in multiples of 4, got ", packed_extent);
  if (is_empty(args.out)) return;
  check_pointer(args.out.data, "out");
  SP24_CHECK(is_row_major(args.out), "out must be row-major, got strides (", args.out.row_stride,
             ", ", args.out.col_stride, ") for ", args.out.cols, " columns");
  check_pointer(args.packed, "packed");
  check_pointer(args.E, "E");
  const DType packed = args.packed_dtype.value_or(args.out.dtype);
  SP24_CHECK(packed == args.out.dtype || is_float8(packed), "packed_dtype must be that of out, ",
             name_of(args.out.dtype), ", or a float8 format, got ", name_of(packed));
  SP24_CHECK(args.scale == nullptr || is_float8(packed),
             "scale goes with a float8 packed_dtype, got ", name_of(packed));
  SP24_DISPATCH(context, unpack, args);
}

void unpack_mask(const uint16_t* mask, uint8_t* out, int64_t rows, int64_t cols,
                 const Context& context) {
  check_extent(rows, "rows");
  check_extent(cols, "cols");
  SP24_CHECK(rows % 4 == 0 && cols % 4 == 0, "rows and cols must be multiples of 4, got ", rows,
             " and ", cols);
  if (rows == 0 || cols == 0) return;
  check_pointer(mask, "mask");
  check_pointer(out, "out");
  SP24_DISPATCH(context, unpack_mask, mask, out, rows, cols);
}

void count_bad_blocks(const uint16_t* mask, int64_t blocks, int64_t* bad, const Context& context) {
  check_extent(blocks, "blocks");
  check_pointer(bad, "bad");
  if (blocks > 0) check_pointer(mask, "mask");
  SP24_DISPATCH(context, count_bad_blocks, mask, blocks, bad);
}

void count_bad_metadata(const uint8_t* E, int64_t m, int64_t k, int64_t* bad,
                        const Context& context) {
  count_bad_metadata(DType::kBFloat16, E, m, k, bad, context);
}

void count_bad_metadata(DType dtype, const uint8_t* E, int64_t m, int64_t k, int64_t* bad,
                        const Context& context) {
  check_extent(m, "m");
  check_extent(k, "k");
  check_pointer(bad, "bad");
  if (m > 0 && k > 0) check_pointer(E, "E");
  SP24_DISPATCH(context, count_bad_metadata, dtype, E, m, k, bad);
}

}  // namespace sparse24
