// mvue_outputs.cu: MVUE packing to 8 bits, and MVUE packing of either kind with an e4m3 copy of the
// gradient from the same read. Plain 16-bit packing is mvue_pack.cu.
//
//   dy       [tokens, features] bf16 or fp16; row-major in whole vectors is the fast way
//   packed   16 bits: [padded/2, features], as in mvue_pack.cu, with the same bits
//            8 bits:  [features, padded/2], padded = tokens rounded up to 32, and E in the order of
//            8 bits: the 16-bit values rounded at random (mvue8_patch.cuh)
//   x8, x8_t, amax, counters of dy: quantize.h;  tile_sums: tile_sums.cuh
//
// Work     Row-major dy to x8 and packed in 8 bits, which is what 8-bit layers want: mvue8_rows.cuh.
//          Else tile_outputs.cuh: 128 x 128 elements a block, 8 x 8 a thread.
// Traffic  2 B read, 0.625 B packed8 or 1.125 B packed16, 1 B x8. fp8 at 8192 x 4096: 3.625 B an
//          element, 122 MB, 29 us at 4.2 TB/s.
#include <cuda_runtime.h>

#include "common/cuda_check.h"
#include "pack/mvue8_rows.cuh"
#include "pack/pack_cuda.h"
#include "pack/tile_outputs.cuh"

namespace sparse24 {
namespace {

struct MvueOutputsParams {
  ConstMatrix dy;
  bool vectors;
  TileOutputs to;
};

template <typename T, typename Packed>
__global__ void __launch_bounds__(kTile8Threads, 2)
    mvue_outputs_kernel(const __grid_constant__ MvueOutputsParams p) {
  __shared__ alignas(16) TileMemory<Packed> memory;
  const PatchPlace at = patch_place(p.to);
  write_outputs<T, Packed>(
      p.to, memory, load_dense<T>(p.dy, p.vectors, at.token(), at.feature(), p.to.features), at);
}

struct MvueRowsParams {
  PatchOperand dy;
  TileOutputs to;
};

// Four blocks an SM: 64 registers.
template <typename T, bool kSums>
__global__ void __launch_bounds__(kRowThreads, 4)
    mvue8_rows_kernel(const __grid_constant__ MvueRowsParams p) {
  __shared__ alignas(16) RowStage stage;
  __shared__ uint32_t of_warp[kRowThreads / 32];
  [[maybe_unused]] __shared__ alignas(16) OctetSums octet_sums;

  const RowPlace at = RowPlace::here(p.to.tile_cols);
  const int token = at.token(), feature = at.feature();
  const int valid = feature < p.to.features ? p.to.tokens - token : 0;
  uint2 rows[8];
  load_rows(row_address<T>(p.dy, token, feature), p.dy.line_bytes, valid, rows);

  const PhiloxKey key = philox_key(p.to.seed[0], p.to.seed[1]);
  const Philox4 random =
      mvue_random(key, static_cast<uint32_t>(token) / 8, static_cast<uint32_t>(feature) / 4);
  RowQuantizer<T> quantize = {inverse_of(p.to.scale)};
  const RowRounding rounding = RowRounding::of(p.to.rounding, inverse_of(p.to.packed_scale));

  const uint32_t x8_bytes = static_cast<uint32_t>(p.to.x8_ld);
  uint8_t* x8 = advance(p.to.x8 + feature, x8_bytes, token);
  uint32_t meta[2];
  [[maybe_unused]] float sums[4] = {};
  SP24_UNROLL
  for (int group = 0; group < 2; ++group) {
    uint2 tokens[4];
    SP24_UNROLL
    for (int i = 0; i < 4; ++i) {
      tokens[i] = rows[4 * group + i];
      const uint32_t codes = quantize(tokens[i]);
      if (4 * group + i < valid) store4(advance(x8, x8_bytes, 4 * group + i), codes);
      if constexpr (kSums) {
        add_pair<T>(tokens[i].x, sums[0], sums[1]);
        add_pair<T>(tokens[i].y, sums[2], sums[3]);
      }
    }
    const uint32_t bits[2] = {random.word[2 * group], random.word[2 * group + 1]};
    meta[group] = stage_group<T>(stage, tokens, bits, at.col, at.octet, group, rounding);
  }
  stage_row_meta(stage, choose(0x0F0F0F0Fu, meta[0], meta[1]), at.col, at.octet);
  if constexpr (kSums) octet_sums.put(at.octet * 8, at.col, sums);
  stage_amax(float_bits(quantize.amax()), of_warp);
  __syncthreads();  // all that waits in shared memory is there
  store_row_stage(p.to, stage, at, 0);
  if constexpr (kSums) store_row_sums(p.to, octet_sums, at);
  if (p.to.amax != nullptr) store_staged_amax<kRowThreads>(of_warp, p.to.amax);
}

template <typename T>
void launch_rows(const MvueOutputsParams& outputs, cudaStream_t stream) {
  const MvueRowsParams p = {patch_operand(outputs.dy, Layout::kRowMajor), outputs.to};
  const auto kernel =
      p.to.tile_sums != nullptr ? mvue8_rows_kernel<T, true> : mvue8_rows_kernel<T, false>;
  kernel<<<static_cast<uint32_t>(row_blocks(p.to)), kRowThreads, 0, stream>>>(p);
}

}  // namespace

namespace cuda {

void mvue_outputs(const MvueArgs& args, cudaStream_t stream) {
  const ConstMatrix& dy = args.dy;
  const DType packed_dtype = args.packed_dtype.value_or(dy.dtype);
  MvueOutputsParams p = {dy, vector_layout(dy) == Layout::kRowMajor,
                         tile_outputs(dy.rows, dy.cols, 1, args.float8)};
  add_packing(p.to, args, packed_dtype);
  p.to.tile_sums = args.tile_sums;
  with_packed16(dy.dtype, [&](auto format) {
    using T = typename decltype(format)::Storage;
    if (p.vectors && rows8_fit(p.to, packed_dtype)) return launch_rows<T>(p, stream);
    with_packing<T>(true, packed_dtype, [&](auto packed) {
      if constexpr (!std::is_same_v<decltype(packed), NoPacking>) {
        mvue_outputs_kernel<T, decltype(packed)>
            <<<p.to.tile_rows * p.to.tile_cols, kTile8Threads, 0, stream>>>(p);
      }
    });
  });
  SP24_CHECK_LAUNCH("mvue_pack of ", name_of(dy.dtype), " to ", name_of(packed_dtype), " [",
                    dy.rows, ", ", dy.cols, "]");
}

}  // namespace cuda
}  // namespace sparse24
