#include "cpu/features.h"

#include <cstddef>
#include <cstdlib>
#include <stdexcept>

#if defined(_M_X64) && !defined(__GNUC__)
#include <immintrin.h>
#include <intrin.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(_WIN32) && (defined(__aarch64__) || defined(_M_ARM64))
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#endif

namespace diffmem::cpu {

namespace {

struct Feature {
  const char* name;
  bool found;
};

#if defined(__x86_64__) && defined(__GNUC__)

// The compiler's own run-time test includes the operating system's support for the wider registers (XGETBV).
std::vector<Feature> probe() {
  __builtin_cpu_init();
#define DIFFMEM_FEATURE(feature) {feature, __builtin_cpu_supports(feature) != 0}
  return {DIFFMEM_FEATURE("sse4.2"),   DIFFMEM_FEATURE("avx2"),     DIFFMEM_FEATURE("fma"),
          DIFFMEM_FEATURE("bmi2"),     DIFFMEM_FEATURE("avx512f"),  DIFFMEM_FEATURE("avx512bw"),
          DIFFMEM_FEATURE("avx512vl"), DIFFMEM_FEATURE("avx512dq"), DIFFMEM_FEATURE("avx512vnni")};
#undef DIFFMEM_FEATURE
}

#elif defined(_M_X64)

// MSVC has no such test: the bits of CPUID, and XGETBV for what the operating system saves of the wider registers.
std::vector<Feature> probe() {
  int basic[4] = {}, extended[4] = {}, highest[4] = {};
  __cpuid(highest, 0);
  __cpuid(basic, 1);
  if (highest[0] >= 7) __cpuidex(extended, 7, 0);
  const auto bit = [](int word, int place) { return ((word >> place) & 1) != 0; };
  const unsigned long long saved = bit(basic[2], 27) ? _xgetbv(0) : 0;
  const bool ymm = (saved & 0x06) == 0x06, zmm = (saved & 0xe6) == 0xe6;
  return {{"sse4.2", bit(basic[2], 20)},
          {"avx2", ymm && bit(extended[1], 5)},
          {"fma", ymm && bit(basic[2], 12)},
          {"bmi2", bit(extended[1], 8)},
          {"avx512f", zmm && bit(extended[1], 16)},
          {"avx512bw", zmm && bit(extended[1], 30)},
          {"avx512vl", zmm && bit(extended[1], 31)},
          {"avx512dq", zmm && bit(extended[1], 17)},
          {"avx512vnni", zmm && bit(extended[2], 11)}};
}

#elif defined(__aarch64__) || defined(_M_ARM64)

bool has_dotprod() {
#if defined(__linux__)
  return (getauxval(AT_HWCAP) >> 20 & 1) != 0;  // HWCAP_ASIMDDP
#elif defined(__APPLE__)
  int found = 0;
  std::size_t size = sizeof found;
  return sysctlbyname("hw.optional.arm.FEAT_DotProd", &found, &size, nullptr, 0) == 0 && found != 0;
#elif defined(_WIN32)
  return IsProcessorFeaturePresent(43) != 0;  // PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE
#else
  return false;
#endif
}

std::vector<Feature> probe() { return {{"neon", true}, {"dotprod", has_dotprod()}}; }

#else

std::vector<Feature> probe() { return {}; }

#endif

const std::vector<Feature>& found() {
  static const std::vector<Feature> features = probe();
  return features;
}

template <class... Names>
bool has(Names... names) {
  const auto one = [](const std::string& wanted) {
    for (const Feature& feature : found())
      if (wanted == feature.name) return feature.found;
    return false;
  };
  return (one(names) && ...);
}

}  // namespace

std::vector<Level> levels() {
  std::vector<Level> usable{Level::portable};
  if (has("avx2", "fma", "bmi2")) {
    usable.push_back(Level::avx2);
    if (has("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni")) usable.push_back(Level::avx512);
  }
  if (has("neon")) {
    usable.push_back(Level::neon);
    if (has("dotprod")) usable.push_back(Level::neon_dotprod);
  }
  return usable;
}

const char* name(Level level) {
  switch (level) {
    case Level::avx2: return "avx2";
    case Level::avx512: return "avx512";
    case Level::neon: return "neon";
    case Level::neon_dotprod: return "neon-dotprod";
    default: return "portable";
  }
}

Level level() {
  static const std::vector<Level> usable = levels();
  const char* wanted = std::getenv("DIFFMEM_CPU");
  if (wanted == nullptr || *wanted == '\0') return usable.back();
  std::string choices;
  for (const Level candidate : usable) {
    if (std::string(wanted) == name(candidate)) return candidate;
    choices += (choices.empty() ? "" : candidate == usable.back() ? " or " : ", ") + std::string(name(candidate));
  }
  bool known = false;
  for (const Level other : {Level::avx2, Level::avx512, Level::neon, Level::neon_dotprod})
    known = known || std::string(wanted) == name(other);
  throw std::invalid_argument("DIFFMEM_CPU=" + std::string(wanted) + (known ? ": this processor lacks it;" : ":") +
                              " choose " + choices);
}

std::vector<std::string> features() {
  std::vector<std::string> names;
  for (const Feature& feature : found())
    if (feature.found) names.emplace_back(feature.name);
  return names;
}

}  // namespace diffmem::cpu
