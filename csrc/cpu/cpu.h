// cpu.h: the CPU backend, one function for each of the public API, without the context.
//
// Plain loops over the same per-block functions that the CUDA kernels call, so masks, packed
// values, E and MVUE draws have the same bits. Any strides are taken, row-major, column-major or
// neither. Arguments have been checked by csrc/api.
#pragma once

#include <cstdint>

#include "sparse24/sparse24.h"

namespace sparse24::cpu {

void search_mask(const PackArgs* weights, int count);
void pack_by_mask(const PackArgs* weights, int count);
void search_and_pack(const PackArgs* weights, int count);
void mvue_pack(const MvueArgs& args);
/// The tile_sums of mvue_pack alone.
void sum_tiles(const ConstMatrix& dy, float* tile_sums);
void quantize(const QuantizeArgs& args);
void unpack(const UnpackArgs& args);
void unpack_mask(const uint16_t* mask, uint8_t* out, int64_t rows, int64_t cols);
void count_bad_blocks(const uint16_t* mask, int64_t blocks, int64_t* bad);
void count_bad_metadata(DType dtype, const uint8_t* E, int64_t m, int64_t k, int64_t* bad);

void activation_forward(const ActivationArgs& args);
void activation_forward_outputs(const ActivationArgs& args);
void activation_backward(const ActivationBackwardArgs& args);
void activation_pack(const ActivationPackArgs& args);
void activation_pack_backward(const ActivationPackBackwardArgs& args);

void masked_decay(const MaskedDecayArgs* tensors, int count);
void mask_flips(const MaskFlipsArgs* tensors, int count);
void mask_gap(const ConstMatrix& w, float* gap);

/// The plain product, summed in double: what the GPU kernels are compared with.
void sparse_gemm(const SparseGemmArgs& args);

}  // namespace sparse24::cpu
