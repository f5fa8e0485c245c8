// Masked decay, flip counts and gaps through the public API, on the CPU backend.
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "mask/patterns.h"
#include "matrices.h"
#include "testing.h"

using namespace testing;

TEST(decay_pulls_pruned_elements_only) {
  std::mt19937 random(1);
  const float scale = 1024.0f;
  for (DType grad_dtype : kDTypes)
    for (DType w_dtype : kDTypes)
      for (Order grad_layout : kOrders)
        for (Order w_layout : kOrders)
          for (bool scaled : {false, true}) {
            const int64_t rows = 68, cols = 76;
            TestMatrix grad(rows, cols, grad_dtype, grad_layout, 2),
                w(rows, cols, w_dtype, w_layout, 1);
            grad.fill_normal(random);
            w.fill_normal(random);
            grad.set(0, 0, -0.0f);
            std::vector<uint16_t> mask(static_cast<size_t>(rows / 4 * (cols / 4)));
            for (uint16_t& m : mask) m = kPatternTable.mask[random() % kPatterns];
            const TestMatrix before = grad;

            MaskedDecayArgs args;
            args.grad = grad.view();
            args.w = w.const_view();
            args.mask = mask.data();
            args.decay = 0.01f;
            args.grad_scale = scaled ? &scale : nullptr;
            masked_decay(&args, 1, kCpu);

            TestMatrix rounded(1, 1, grad_dtype);
            for (int64_t r = 0; r < rows; ++r)
              for (int64_t c = 0; c < cols; ++c) {
                const bool kept =
                    mask[static_cast<size_t>(r / 4 * (cols / 4) + c / 4)] >> (4 * (r % 4) + c % 4) &
                    1;
                const float pull = (scaled ? 0.01f * scale : 0.01f) * w.get(r, c);
                rounded.set(0, 0, before.get(r, c) + pull);
                const float expected = kept ? before.get(r, c) : rounded.get(0, 0);
                CHECK_EQ(float_bits(grad.get(r, c)), float_bits(expected));
              }
          }
}

TEST(flips_are_counted_per_tensor) {
  std::vector<uint16_t> a(70000, 0xC3C3), b(a);
  b[0] = 0x3C3C, b[69999] = 0xC3C0;
  int64_t flips[3] = {-1, -1, -1};
  const MaskFlipsArgs tensors[3] = {{a.data(), b.data(), 70000, &flips[0]},
                                    {a.data(), a.data(), 70000, &flips[1]},
                                    {nullptr, nullptr, 0, &flips[2]}};
  mask_flips(tensors, 3, kCpu);
  CHECK_EQ(flips[0], 16 + 2);
  CHECK_EQ(flips[1], 0);
  CHECK_EQ(flips[2], 0);
}

TEST(gaps_are_those_of_the_blocks) {
  std::mt19937 random(2);
  for (Order layout : kOrders) {
    TestMatrix w(12, 20, DType::kFloat16, layout, 3);
    w.fill_normal(random);
    std::vector<float> gap(3 * 5);
    mask_gap(w.const_view(), gap.data(), kCpu);
    for (int64_t r = 0; r < 3; ++r)
      for (int64_t c = 0; c < 5; ++c) {
        float block[4][4];
        for (int i = 0; i < 4; ++i)
          for (int j = 0; j < 4; ++j) block[i][j] = w.get(4 * r + i, 4 * c + j);
        CHECK_EQ(gap[static_cast<size_t>(r * 5 + c)], block_gap(block, kPatternTable));
      }
  }
}

TEST(bad_recipe_arguments_are_named) {
  TestMatrix grad(8, 8, DType::kFloat32), w(8, 12, DType::kFloat32);
  MaskedDecayArgs args;
  args.grad = grad.view();
  args.w = w.const_view();
  CHECK_THROWS(masked_decay(&args, 1, kCpu),
               "grad and w must have the same extents, got [8, 8] and [8, 12]");
}

TEST_MAIN()
