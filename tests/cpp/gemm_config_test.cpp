// The choice of a GEMM kernel: a pure function, tried on many shapes without a GPU.
#include <cstdint>
#include <random>
#include <set>
#include <string>

#include "gemm/config.h"
#include "testing.h"

using namespace sparse24;
using namespace sparse24::gemm;

namespace {

constexpr GemmPass kPasses[] = {GemmPass::kForward, GemmPass::kGradInput, GemmPass::kGradWeight};
constexpr DType kHalves[] = {DType::kBFloat16, DType::kFloat16};

bool is_compiled(const GemmDesc& desc, const GemmConfig& config) {
  int count = 0;
  const KernelEntry* table = kernel_table(&count);
  for (int i = 0; i < count; ++i) {
    const KernelEntry& e = table[i];
    if (e.pass == desc.pass && e.dtype == desc.dtype && e.out_dtype == desc.out_dtype &&
        e.tile_m == config.tile_m && e.tile_n == config.tile_n && e.tile_k == config.tile_k &&
        e.cluster_m == config.cluster_m && e.cluster_n == config.cluster_n)
      return true;
  }
  return false;
}

}  // namespace

TEST(every_kernel_is_listed_once) {
  int count = 0;
  const KernelEntry* table = kernel_table(&count);
  CHECK(count > 0);
  std::set<std::string> seen;
  for (int i = 0; i < count; ++i) {
    const KernelEntry& e = table[i];
    CHECK(e.tile_m > 0 && e.tile_n > 0 && e.tile_k > 0 && e.cluster_m > 0 && e.cluster_n > 0);
    CHECK(e.dtype != DType::kFloat32);
    CHECK(e.out_dtype == e.dtype || e.out_dtype == DType::kFloat32);
    const GemmConfig config{e.tile_m, e.tile_n, e.tile_k, e.cluster_m, e.cluster_n, {}, 1};
    CHECK(
        seen.insert(to_string(GemmDesc{e.pass, 0, 0, 0, e.dtype, e.out_dtype}) + to_string(config))
            .second);
  }
}

TEST(a_compiled_kernel_is_chosen_for_every_shape) {
  std::mt19937 random(1);
  for (int n = 0; n < 3000; ++n) {
    // From one token to the largest models, in steps of 4.
    const auto extent = [&]() -> int64_t {
      return int64_t{4} << (random() % 15) | 4 * (random() % 4096);
    };
    for (GemmPass pass : kPasses)
      for (DType dtype : kHalves)
        for (DType out_dtype : {dtype, DType::kFloat32}) {
          const GemmDesc desc{pass, extent(), extent(), extent(), dtype, out_dtype};
          for (int multiprocessors : {1, 78, 114, 132}) {
            const GemmConfig config = choose_config(desc, multiprocessors);
            CHECK(is_compiled(desc, config));
            CHECK(config.swizzle >= 1);
            CHECK_EQ(to_string(config), to_string(choose_config(desc, multiprocessors)));
          }
        }
  }
}

TEST(what_is_not_compiled_is_named) {
  const GemmDesc desc{GemmPass::kForward, 64, 8, 128, DType::kFloat32, DType::kFloat32};
  CHECK_THROWS(choose_config(desc, 132), "forward m=64 n=8 k=128 float32");
}

TEST_MAIN()
