#include "cpu/features.h"

#include <cstdlib>
#include <stdexcept>

namespace diffmem::cpu {

#if defined(__x86_64__) && defined(__GNUC__)
// The compiler's own run-time test includes the operating system's support for the wider registers (XGETBV).
#define DIFFMEM_HAS(feature) (__builtin_cpu_init(), __builtin_cpu_supports(feature) != 0)
#else
#define DIFFMEM_HAS(feature) false
#endif

Level supported() {
  static const Level found = [] {
    if (!(DIFFMEM_HAS("avx2") && DIFFMEM_HAS("fma") && DIFFMEM_HAS("bmi2"))) return Level::portable;
    const bool wide = DIFFMEM_HAS("avx512f") && DIFFMEM_HAS("avx512bw") && DIFFMEM_HAS("avx512vl") &&
                      DIFFMEM_HAS("avx512dq") && DIFFMEM_HAS("avx512vnni");
    return wide ? Level::avx512 : Level::avx2;
  }();
  return found;
}

const char* name(Level level) {
  switch (level) {
    case Level::avx512: return "avx512";
    case Level::avx2: return "avx2";
    default: return "portable";
  }
}

Level level() {
  const char* wanted = std::getenv("DIFFMEM_CPU");
  if (wanted == nullptr || *wanted == '\0') return supported();
  for (Level candidate : {Level::portable, Level::avx2, Level::avx512}) {
    if (std::string(wanted) != name(candidate)) continue;
    if (candidate > supported()) {
      throw std::invalid_argument("DIFFMEM_CPU=" + std::string(wanted) + ": this processor supports at most " +
                                  name(supported()));
    }
    return candidate;
  }
  throw std::invalid_argument("DIFFMEM_CPU=" + std::string(wanted) + ": choose portable, avx2 or avx512");
}

std::vector<std::string> features() {
  std::vector<std::string> found;
#define DIFFMEM_NOTE(feature) \
  if (DIFFMEM_HAS(feature)) found.emplace_back(feature)
  DIFFMEM_NOTE("sse4.2");
  DIFFMEM_NOTE("avx2");
  DIFFMEM_NOTE("fma");
  DIFFMEM_NOTE("bmi2");
  DIFFMEM_NOTE("avx512f");
  DIFFMEM_NOTE("avx512bw");
  DIFFMEM_NOTE("avx512vl");
  DIFFMEM_NOTE("avx512dq");
  DIFFMEM_NOTE("avx512vnni");
#undef DIFFMEM_NOTE
  return found;
}

}  // namespace diffmem::cpu
