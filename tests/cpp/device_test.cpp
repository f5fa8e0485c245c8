// What the library says of itself: it must answer wherever it runs, GPU or none.
#include <string>

#include "sparse24/sparse24.h"
#include "testing.h"

using namespace sparse24;

TEST(version_is_that_of_the_build) {
  CHECK_EQ(std::string(version()), std::string(SPARSE24_VERSION));
}

TEST(device_info_never_throws) {
  for (int device : {-1, 0, 7, 1000000}) {
    const DeviceInfo info = device_info(device);
#ifdef SPARSE24_WITH_CUDA
    CHECK(info.cuda_built && !info.gemm_archs.empty() && !info.cuda_archs.empty());
    if (device == 1000000) CHECK(!info.reason.empty());
#else
    CHECK(!info.cuda_built && info.gemm_archs.empty() && info.cuda_archs.empty());
    CHECK(info.reason.find("SPARSE24_CUDA=1") != std::string::npos);
#endif
  }
}

TEST(backend_cuda_fails_with_a_message_where_there_is_none) {
  if (device_info(0).reason.empty()) SKIP("a GPU is here");
  int64_t bad = 0;
  const uint16_t mask = 0xC3C3;
  CHECK_THROWS(count_bad_blocks(&mask, 1, &bad, Context{Backend::kCuda, 0, nullptr}), "CUDA");
}

TEST_MAIN()
