// Whose kernels run on which GPU: those of Hopper, or those that every later GPU can run.
#include "common/kernel_arch.h"

#include "testing.h"

using namespace sparse24;

TEST(hopper_runs_its_own_kernels_and_others_those_of_sm_80) {
  CHECK_EQ(kernel_arch(9, 0, "", true, true), KernelArch::kSm90);
  for (const auto& [major, minor] : {std::pair{8, 0}, {8, 6}, {8, 9}, {10, 0}, {12, 0}})
    CHECK_EQ(kernel_arch(major, minor, "", true, true), KernelArch::kSm80);
  CHECK_EQ(kernel_arch(9, 0, "", true, false), KernelArch::kSm80);  // as that build can
}

TEST(sparse24_arch_asks_for_kernels_of_older_gpus) {
  for (const char* asked : {"sm80", "sm86", "sm89"})
    CHECK_EQ(kernel_arch(9, 0, asked, true, true), KernelArch::kSm80);
  CHECK_EQ(kernel_arch(9, 0, "sm90", true, true), KernelArch::kSm90);
  CHECK_THROWS(kernel_arch(8, 6, "sm90", true, true), "needs a GPU of compute capability 9.0");
  CHECK_THROWS(kernel_arch(9, 0, "sm75", true, true),
               "must be sm80, sm86, sm89 or sm90, got 'sm75'");
}

TEST(kernels_that_were_not_built_are_named_with_the_remedy) {
  CHECK_THROWS(kernel_arch(9, 0, "sm80", false, true), "SPARSE24_CUDA_ARCHS=all, or unset");
  CHECK_THROWS(kernel_arch(9, 0, "sm90", true, false), "without kernels for sm_90a");
  CHECK_THROWS(kernel_arch(8, 0, "", false, true), "build it with SPARSE24_CUDA_ARCHS=all");
}

TEST(code_runs_on_later_gpus_of_its_kind_and_ptx_on_all_later_ones) {
  const std::string all = "80, 86, 89, 90a, 89-virtual";
  for (const auto& [major, minor] : {std::pair{8, 0}, {8, 6}, {8, 7}, {8, 9}, {9, 0}, {12, 0}})
    CHECK(has_code_for(major, minor, all));
  CHECK(!has_code_for(7, 5, all));
  CHECK(has_code_for(8, 9, "80") && !has_code_for(8, 0, "86") && !has_code_for(9, 0, "80"));
  CHECK(has_code_for(9, 0, "90a") && !has_code_for(10, 0, "90a") && !has_code_for(8, 9, "90a"));
  CHECK(has_code_for(9, 0, "80-virtual") && !has_code_for(8, 6, "89-virtual"));
}

TEST_MAIN()
