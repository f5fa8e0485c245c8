// testing.h: the few lines that our C++ tests need of a test framework.
//
//   TEST(what_holds) { CHECK(condition); CHECK_EQ(got, expected); CHECK_THROWS(call(), "words"); }
//   TEST_MAIN()   once a file; a program's arguments choose the tests whose names contain one of
//                 them
//
// A failed check reports itself and ends its test; the others run on. SKIP("reason") ends a test;
// a program that skipped all its tests exits with 77, which ctest counts as skipped.
#pragma once

#include <cstdio>
#include <cstring>
#include <exception>
#include <sstream>
#include <string>
#include <type_traits>
#include <vector>

namespace testing {

struct Failure {
  std::string text;
};
struct Skipped {
  std::string reason;
};

struct Case {
  const char* name;
  void (*run)();
};

inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

struct Registration {
  Registration(const char* name, void (*run)()) { cases().push_back({name, run}); }
};

template <typename T>
std::string show(const T& value) {
  std::ostringstream text;
  text.precision(9);
  if constexpr (std::is_enum_v<T>) {
    text << static_cast<long long>(value);
  } else {
    text << +value;
  }
  return text.str();
}
inline std::string show(const std::string& value) { return "\"" + value + "\""; }
inline std::string show(const char* value) { return show(std::string(value)); }

[[noreturn]] inline void fail(const char* file, int line, const std::string& what) {
  throw Failure{std::string(file) + ":" + std::to_string(line) + ": " + what};
}

template <typename Got, typename Expected>
void check_equal(const Got& got, const Expected& expected, const char* text, const char* file,
                 int line) {
  if (got == expected) return;
  fail(file, line, std::string(text) + " is " + show(got) + ", expected " + show(expected));
}

template <typename Call>
void check_throws(const Call& call, const char* words, const char* text, const char* file,
                  int line) {
  try {
    call();
  } catch (const std::exception& error) {
    if (std::strstr(error.what(), words) == nullptr) {
      fail(file, line,
           std::string(text) + " says \"" + error.what() + "\", without \"" + words + "\"");
    }
    return;
  }
  fail(file, line, std::string(text) + " does not throw");
}

inline bool is_chosen(const char* name, int argc, char** argv) {
  if (argc < 2) return true;
  for (int i = 1; i < argc; ++i)
    if (std::strstr(name, argv[i]) != nullptr) return true;
  return false;
}

inline int run_all(int argc, char** argv) {
  int passed = 0, failed = 0, skipped = 0;
  for (const Case& test : cases()) {
    if (!is_chosen(test.name, argc, argv)) continue;
    try {
      test.run();
      ++passed;
      std::printf("ok    %s\n", test.name);
    } catch (const Skipped& skip) {
      ++skipped;
      std::printf("skip  %s: %s\n", test.name, skip.reason.c_str());
    } catch (const Failure& failure) {
      ++failed;
      std::printf("FAIL  %s\n      %s\n", test.name, failure.text.c_str());
    } catch (const std::exception& error) {
      ++failed;
      std::printf("FAIL  %s\n      exception: %s\n", test.name, error.what());
    }
    std::fflush(stdout);
  }
  std::printf("%d passed, %d failed, %d skipped\n", passed, failed, skipped);
  if (failed > 0 || passed + skipped == 0) return 1;
  return passed == 0 ? 77 : 0;
}

}  // namespace testing

#define TEST(name)                                                            \
  static void test_##name();                                                  \
  static const testing::Registration registration_##name(#name, test_##name); \
  static void test_##name()

#define CHECK(condition) \
  if (!(condition)) testing::fail(__FILE__, __LINE__, "false: " #condition)

#define CHECK_EQ(got, expected) testing::check_equal(got, expected, #got, __FILE__, __LINE__)

#define CHECK_THROWS(call, words) \
  testing::check_throws([&] { call; }, words, #call, __FILE__, __LINE__)

#define SKIP(reason_text) \
  throw testing::Skipped { reason_text }

#define TEST_MAIN() \
  int main(int argc, char** argv) { return testing::run_all(argc, argv); }
