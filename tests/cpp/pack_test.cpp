// Masks, packing and unpacking through the public API, on the CPU backend.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "common/metadata.h"
#include "matrices.h"
#include "testing.h"

using namespace testing;

namespace {

struct Shape {
  int64_t rows, cols;
};
// Smallest, one metadata block, one and a step, ragged both ways, tall, wide.
constexpr Shape kShapes[] = {{4, 4},    {4, 8},   {64, 64},  {68, 64},  {64, 68},
                             {60, 132}, {256, 8}, {12, 516}, {192, 128}};

bool is_kept(const std::vector<uint16_t>& mask, int64_t cols, int64_t r, int64_t c) {
  return mask[static_cast<size_t>(r / 4 * (cols / 4) + c / 4)] >> (4 * (r % 4) + c % 4) & 1;
}

/// Every nibble of E, those of the padding too, by the order that common_test.cpp establishes.
uint32_t nibble_at(const std::vector<uint8_t>& E, int64_t rows_m, int64_t m, int64_t group) {
  const int64_t k = 4 * group;
  return E[static_cast<size_t>(meta_byte_offset(m, k & ~int64_t{7}, rows_m))] >> (k & 4 ? 4 : 0) &
         0xFu;
}

void check_padding(const std::vector<uint8_t>& E, int64_t rows_m, int64_t cols_k) {
  for (int64_t m = 0; m < round_up(rows_m, 64); ++m)
    for (int64_t group = 0; group < round_up(cols_k, 64) / 4; ++group) {
      const uint32_t nibble = nibble_at(E, rows_m, m, group);
      CHECK(meta_is_valid(nibble));
      if (m >= rows_m || 4 * group >= cols_k) CHECK_EQ(nibble, kPaddingNibble);
    }
}

}  // namespace

TEST(what_is_packed_comes_back_both_ways) {
  std::mt19937 random(1);
  for (const Shape& shape : kShapes)
    for (DType in : kDTypes)
      for (DType out : kDTypes)
        for (Order layout : kOrders) {
          TestMatrix w(shape.rows, shape.cols, in, layout, 3);
          w.fill_normal(random);
          Packed packed(shape.rows, shape.cols, out);
          const PackArgs args = packed.args(w, out);
          search_and_pack(&args, 1, kCpu);

          for (bool transposed : {false, true}) {
            TestMatrix dense(shape.rows, shape.cols, out, Order::kRowMajor, transposed ? 5 : 0);
            UnpackArgs back;
            back.packed = transposed ? packed.values_t.data() : packed.values.data();
            back.E = transposed ? packed.E_t.data() : packed.E.data();
            back.transposed = transposed;
            back.out = dense.view();
            unpack(back, kCpu);
            TestMatrix expected(1, 1, out);
            for (int64_t r = 0; r < shape.rows; ++r)
              for (int64_t c = 0; c < shape.cols; ++c) {
                expected.set(0, 0, w.get(r, c));  // rounds to `out`
                const bool kept = is_kept(packed.mask, shape.cols, r, c);
                CHECK_EQ(dense.get(r, c), kept ? expected.get(0, 0) : 0.0f);
              }
          }
          check_padding(packed.E, shape.rows, shape.cols);
          check_padding(packed.E_t, shape.cols, shape.rows);
        }
}

TEST(searching_first_and_packing_then_is_the_same) {
  std::mt19937 random(2);
  for (const Shape& shape : kShapes) {
    TestMatrix w(shape.rows, shape.cols, DType::kFloat32);
    w.fill_normal(random);
    Packed together(shape.rows, shape.cols, DType::kBFloat16), apart(together);
    const PackArgs one = together.args(w, DType::kBFloat16), two = apart.args(w, DType::kBFloat16);
    search_and_pack(&one, 1, kCpu);
    search_mask(&two, 1, kCpu);
    CHECK(together.mask == apart.mask);
    CHECK(std::all_of(apart.E.begin(), apart.E.end(), [](uint8_t b) { return b == 0xFF; }));
    pack_by_mask(&two, 1, kCpu);
    CHECK(together.values == apart.values && together.values_t == apart.values_t);
    CHECK(together.E == apart.E && together.E_t == apart.E_t);
  }
}

TEST(positions_come_from_the_mask_and_never_from_values) {
  TestMatrix w(64, 64, DType::kBFloat16);
  for (int64_t r = 0; r < 64; ++r)
    for (int64_t c = 0; c < 64; ++c) w.set(r, c, r % 2 ? -0.0f : 0.0f);
  Packed packed(64, 64, DType::kBFloat16);
  std::fill(packed.mask.begin(), packed.mask.end(), uint16_t{0x5A5A});
  const PackArgs args = packed.args(w, DType::kBFloat16);
  pack_by_mask(&args, 1, kCpu);
  for (int64_t m = 0; m < 64; ++m)
    for (int64_t group = 0; group < 16; ++group)
      CHECK_EQ(nibble_at(packed.E, 64, m, group), m % 2 ? 0u | 2u << 2 : 1u | 3u << 2);
}

TEST(one_direction_can_be_left_out) {
  std::mt19937 random(3);
  TestMatrix w(68, 132, DType::kFloat16);
  w.fill_normal(random);
  Packed both(68, 132, DType::kFloat16), rows(both), columns(both);
  const PackArgs all = both.args(w, DType::kFloat16);
  PackArgs rows_only = rows.args(w, DType::kFloat16),
           columns_only = columns.args(w, DType::kFloat16);
  rows_only.packed_t = nullptr, rows_only.E_t = nullptr;
  columns_only.packed = nullptr, columns_only.E = nullptr;
  search_and_pack(&all, 1, kCpu);
  search_and_pack(&rows_only, 1, kCpu);
  search_and_pack(&columns_only, 1, kCpu);
  CHECK(both.values == rows.values && both.E == rows.E);
  CHECK(both.values_t == columns.values_t && both.E_t == columns.E_t);
}

TEST(a_nan_of_the_same_dtype_keeps_its_bits) {
  TestMatrix w(4, 4, DType::kBFloat16);
  std::fill_n(static_cast<uint16_t*>(w.data()), 16, uint16_t{0xFFA5});
  Packed packed(4, 4, DType::kBFloat16);
  const PackArgs args = packed.args(w, DType::kBFloat16);
  search_and_pack(&args, 1, kCpu);
  const uint16_t* values = reinterpret_cast<const uint16_t*>(packed.values.data());
  for (int i = 0; i < 8; ++i) CHECK_EQ(values[i], 0xFFA5);
}

TEST(mvue_prunes_every_group_as_the_block_function_says) {
  std::mt19937 random(4);
  const int64_t seed[2] = {-5, int64_t{1} << 40};
  const PhiloxKey key = philox_key(seed[0], seed[1]);
  for (const Shape& shape :
       {Shape{1, 4}, Shape{7, 8}, Shape{31, 66}, Shape{64, 64}, Shape{130, 20}})
    for (DType dtype : kDTypes)
      for (Order layout : kOrders) {
        const int64_t tokens = shape.rows, features = shape.cols;
        TestMatrix dy(tokens, features, dtype, layout, 1);
        dy.fill_normal(random);
        const auto [padded, packed, E] = PrunedGradient(dy, seed);

        TestMatrix rounded(1, 1, dtype);
        for (int64_t group = 0; group < padded / 4; ++group)
          for (int64_t f = 0; f < features; ++f) {
            const MvuePick pick = expected_pick(dy, expected_words(key, group, f), group, f);
            rounded.set(0, 0, pick.first_value);
            CHECK_EQ(packed.get(2 * group, f), rounded.get(0, 0));
            rounded.set(0, 0, pick.second_value);
            CHECK_EQ(packed.get(2 * group + 1, f), rounded.get(0, 0));
            CHECK_EQ(nibble_at(E, features, f, group), pick.nibble);
          }
        check_padding(E, features, padded);
      }
}

TEST(a_gradient_of_any_width_comes_back) {
  std::mt19937 random(7);
  const int64_t seed[2] = {1, 2}, tokens = 10;
  for (int64_t features : {1, 3, 7, 66}) {
    TestMatrix dy(tokens, features, DType::kBFloat16);
    dy.fill_normal(random);
    PrunedGradient pruned(dy, seed);
    const TestMatrix dense = pruned.unpacked();
    for (int64_t t = 0; t < pruned.padded; ++t)
      for (int64_t f = 0; f < features; ++f) {
        const uint32_t nibble = nibble_at(pruned.E, features, f, t / 4);
        const bool first = meta_first(nibble) == t % 4, second = meta_second(nibble) == t % 4;
        const float kept = pruned.packed.get(t / 4 * 2 + (second ? 1 : 0), f);
        CHECK_EQ(dense.get(t, f), first || second ? kept : 0.0f);
        if (t >= tokens) CHECK_EQ(dense.get(t, f), 0.0f);
      }
  }
}

TEST(results_do_not_depend_on_threads) {
  std::mt19937 random(5);
  constexpr int64_t kRows = 7 * 64 - 8, kCols = 11 * 64 - 12;  // 7 x 11 tiles: uneven shares
  TestMatrix w(kRows, kCols, DType::kFloat32);
  w.fill_normal(random);
  const int64_t seed[2] = {1, 2};
  std::vector<Packed> packed;
  std::vector<std::vector<uint8_t>> mvue;
  for (int threads : {1, 2, 3, 5, 16}) {
    set_cpu_threads(threads);
    packed.emplace_back(kRows, kCols, DType::kBFloat16);
    const PackArgs args = packed.back().args(w, DType::kBFloat16);
    search_and_pack(&args, 1, kCpu);
    const PrunedGradient pruned(w, seed);
    mvue.push_back(pruned.packed.bytes());
    mvue.push_back(pruned.E);
  }
  set_cpu_threads(1);
  for (size_t i = 1; i < packed.size(); ++i) {
    CHECK(packed[i].mask == packed[0].mask);
    CHECK(packed[i].values == packed[0].values && packed[i].values_t == packed[0].values_t);
    CHECK(packed[i].E == packed[0].E && packed[i].E_t == packed[0].E_t);
    CHECK(mvue[2 * i] == mvue[0] && mvue[2 * i + 1] == mvue[1]);
  }
}

TEST(unpacked_masks_show_their_bits) {
  std::mt19937 random(6);
  std::vector<uint16_t> mask(3 * 5);
  for (uint16_t& m : mask) m = static_cast<uint16_t>(random());
  std::vector<uint8_t> bits(12 * 20);
  unpack_mask(mask.data(), bits.data(), 12, 20, kCpu);
  for (int64_t r = 0; r < 12; ++r)
    for (int64_t c = 0; c < 20; ++c)
      CHECK_EQ(bits[static_cast<size_t>(r * 20 + c)], is_kept(mask, 20, r, c) ? 1 : 0);
}

TEST(bad_masks_and_metadata_are_counted) {
  std::vector<uint16_t> mask(1000, 0xC3C3);
  mask[3] = 0xC3C2, mask[500] = 0xFFFF, mask[999] = 0;
  int64_t bad = -1;
  count_bad_blocks(mask.data(), 1000, &bad, kCpu);
  CHECK_EQ(bad, 3);
  count_bad_blocks(nullptr, 0, &bad, kCpu);
  CHECK_EQ(bad, 0);

  std::vector<uint8_t> E(static_cast<size_t>(metadata_bytes(68, 72)), 0x44);
  count_bad_metadata(E.data(), 68, 72, &bad, kCpu);
  CHECK_EQ(bad, 0);
  E[static_cast<size_t>(meta_byte_offset(67, 64, 68))] = 0x04;  // upper group: 0, 0
  E[static_cast<size_t>(meta_byte_offset(0, 8, 68))] = 0x11;    // both groups: 1, 0
  count_bad_metadata(E.data(), 68, 72, &bad, kCpu);
  CHECK_EQ(bad, 3);
}

TEST(empty_inputs_do_nothing) {
  PackArgs empty;
  empty.w.rows = 0, empty.w.cols = 64;
  search_and_pack(&empty, 1, kCpu);
  search_mask(nullptr, 0, kCpu);
  mvue_pack(MvueArgs{}, kCpu);
  unpack(UnpackArgs{}, kCpu);
  unpack_mask(nullptr, nullptr, 0, 8, kCpu);
  CHECK_EQ(metadata_bytes(0, 64), 0);
  CHECK_EQ(padded_tokens(0), 0);
  CHECK_EQ(padded_tokens(9), 16);
}

TEST(bad_arguments_are_named) {
  TestMatrix w(8, 8, DType::kBFloat16);
  Packed packed(8, 8, DType::kBFloat16);
  const PackArgs good = packed.args(w, DType::kBFloat16);
  const auto changed = [&](auto change) {
    PackArgs args = good;
    change(args);
    return args;
  };
  PackArgs bad = changed([](PackArgs& a) { a.w.rows = 6; });
  CHECK_THROWS(search_and_pack(&bad, 1, kCpu), "multiples of 4, got [6, 8]");
  bad = changed([](PackArgs& a) { a.w.col_stride = 2; });
  CHECK_THROWS(search_and_pack(&bad, 1, kCpu), "row- or column-major, got strides (8, 2)");
  bad = changed([](PackArgs& a) { a.E = nullptr; });
  CHECK_THROWS(pack_by_mask(&bad, 1, kCpu), "packed and E must be given together");
  bad = changed([](PackArgs& a) { a.mask = nullptr; });
  CHECK_THROWS(pack_by_mask(&bad, 1, kCpu), "mask must not be null");
  PackArgs mixed[2] = {good, good};
  mixed[1].out_dtype = DType::kFloat16;
  CHECK_THROWS(search_and_pack(mixed, 2, kCpu), "out_dtype must be the same");
  MvueArgs mvue;
  mvue.dy = w.const_view();
  CHECK_THROWS(mvue_pack(mvue, kCpu), "seed must not be null");
  CHECK_THROWS(metadata_bytes(-1, 4), "m must not be negative, got -1");
#ifndef SPARSE24_WITH_CUDA
  const Context cuda{Backend::kCuda, 0, nullptr};
  CHECK_THROWS(search_and_pack(&good, 1, cuda), "built without CUDA; rebuild with SPARSE24_CUDA=1");
#endif
}

TEST_MAIN()
