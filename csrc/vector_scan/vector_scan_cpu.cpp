// The scan of codes: packs rows as the kernels want them, decides where level 1 pays, and keeps the bounds of each
// query.
//
// What it should cost, written down before tuning. Two Zen 4 cores at 2.6 GHz with AVX-512: VPDPBUSD starts once a
// cycle (64 products), a float32 multiply-add of 16 lanes as well: 333 G products/s against 83 G on both cores. d =
// 512:
//
//   dense   Q N 512 / 333 G              1,000 queries in 10 million: 15 s (float32 products: 62 s)
//   lead    Q N 64 / 333 G, and a test   the same with a steep spectrum: 2 s, 3 s with the test
//   bytes   N 536 once per 4,096 queries 10 million: 5.4 GB, 0.3 s from memory (20 GB/s), 3 to 10 s from a disk
//   few     1 to 32 queries: the bytes
//   AVX2    VPMADDUBSW, VPMADDWD, VPADDD for 32 products in a cycle: 166 G
//
// The error of the code of a vector without large coordinates is 0.75 % of its length (127 levels up to 3.5 standard
// deviations), so that the bounds of two such vectors lie 3 % of their length apart, and of white noise at d = 512 some
// 30 rows of a million remain per query where two are the answer.
//
// What was measured: dense 345 G products/s (AVX-512), 169 G (AVX2), 4.6 G (portable), bounds and lists included, 1,000
// queries in 100,000 rows of white noise; encoding 100,000 rows 0.06 s. With AVX-512 from intrinsics 184 G: GCC moves
// accumulators about, which assembly stops.
#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>
#include <vector>

#include "cpu/aligned.h"
#include "cpu/features.h"
#include "cpu/share.h"
#include "vector_scan/vector_scan.h"

namespace diffmem::vector_scan {
namespace {

using cpu::Aligned;

const Kernels& kernels() {
  return *cpu::best<Kernels>({.portable = portable_kernels(), .avx2 = avx2_kernels(), .avx512 = avx512_kernels()});
}

std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

constexpr std::int64_t kBlockPanels = 64;  // 1,024 rows: their code fits the L2 cache at d = 512
constexpr std::int64_t kBlockRows = kBlockPanels * kPanel;
constexpr std::int64_t kFew = 48;  // queries per thread below which the threads share the rows instead
constexpr double kDense = 0.25;    // share of pairs beyond level 1 from which products of all pairs are cheaper
constexpr std::int64_t kLookAgain =
    16;  // blocks after which a dense chunk tries level 1 again, and 1, 2, 4, 8 at first

// Queries first … first + count - 1, in strips.
class Strips {
 public:
  Strips(const Kernels& k, const Points& queries, Shape shape, std::int64_t first, std::int64_t count)
      : k_(k),
        queries_(queries),
        shape_(shape),
        first_(first),
        strips_(divide_up(count, k.strip_rows)),
        packed_(strips_ * k.strip_rows * shape.width),
        lead_start_(strips_ * k.strip_rows, 0),
        tail_start_(strips_ * k.strip_rows, 0) {
    const std::int64_t rows = k.strip_rows;
    std::memset(packed_.data(), 0, strips_ * rows * shape.width);
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int8_t* code = query(i);
      std::int8_t* strip = packed_.data() + i / rows * rows * shape.width;
      std::int32_t sum = 0;
      for (int j = 0; j < kLead; ++j) sum += code[j];
      lead_start_[i] = -128 * sum;
      sum = 0;
      for (int j = kLead; j < shape.width; ++j) sum += code[j];
      tail_start_[i] = -128 * sum;
      for (int s = 0; s < shape.width / 4; ++s) std::memcpy(strip + 4 * (s * rows + i % rows), code + 4 * s, 4);
    }
    for (auto& factors : factors_) factors.resize(strips_ * rows, 0);
    // What fills the last strip finds nothing.
    for (int l = 4; l < 6; ++l) {
      std::fill(factors_[l].begin(), factors_[l].end(), std::numeric_limits<float>::infinity());
    }
  }
  Strips(const Strips&) = delete;
  Strips& operator=(const Strips&) = delete;

  std::int64_t strips() const { return strips_; }
  const std::int8_t* query(std::int64_t i) const {
    return reinterpret_cast<const std::int8_t*>(queries_.code) + (first_ + i) * shape_.width;
  }
  const Terms& terms(std::int64_t i) const { return queries_.terms[first_ + i]; }
  std::int32_t dot(std::int64_t i, const std::uint8_t* row) const {
    return k_.dot(query(i), row, shape_.width, shape_.shift, lead_start_[i], tail_start_[i]);
  }

  void set_reach(std::int64_t i, double reach) {
    const Terms& x = terms(i);
    factors_[0][i] = 2 * x.s;
    factors_[1][i] = 2 * x.r;
    set(reach + x.e1, x.sq1, factors_[2][i], factors_[4][i]);
    set(reach + x.e2, x.sq2, factors_[3][i], factors_[5][i]);
  }

  Kernels::Strip strip(std::int64_t s, int level) {
    const std::int64_t rows = k_.strip_rows;
    const std::int64_t at = s * rows;
    const std::int8_t* lead = packed_.data() + at * shape_.width;
    return {lead,
            lead + kLead * rows,
            lead_start_.data() + at,
            tail_start_.data() + at,
            factors_[0].data() + at,
            (level == 1 ? factors_[1] : zeros_).data() + (level == 1 ? at : 0),
            factors_[level == 1 ? 2 : 3].data() + at,
            factors_[level == 1 ? 4 : 5].data() + at};
  }

 private:
  static void set(double t, double square, float& c, float& threshold) {
    c = static_cast<float>(2 * t * (1 + 1e-7));
    threshold = static_cast<float>(square * (1 - kRounding) - t * t * (1 + kRounding));
  }

  const Kernels& k_;
  const Points& queries_;
  Shape shape_;
  std::int64_t first_;
  std::int64_t strips_;
  Aligned<std::int8_t> packed_;
  std::vector<std::int32_t> lead_start_;
  std::vector<std::int32_t> tail_start_;
  std::vector<float> factors_[6];  // a, b, c of levels 1 and 2, thresholds of levels 1 and 2
  std::vector<float> zeros_ = std::vector<float>(16, 0.0F);
};

// Up to kBlockRows rows as the kernels want them.
class Block {
 public:
  Block(const Kernels& k, Shape shape)
      : k_(k),
        shape_(shape),
        tail_((shape.width - kLead) / 4),
        lead_bytes_(kBlockRows * kLead),
        tail_bytes_(kBlockRows * std::max(shape.width - kLead, 1)),
        factors_(7 * kBlockRows) {}

  void load(const Points& rows, std::int64_t from, std::int64_t count) {
    code_ = rows.code + from * shape_.width;
    terms_ = rows.terms + from;
    count_ = count;
    panels_ = divide_up(divide_up(count, kPanel), k_.tile_panels) * k_.tile_panels;
    tail_there_ = false;
    pack(0, kLead / 4, lead_bytes_.data());
    float* f = factors_.data();
    for (std::int64_t i = 0; i < panels_ * kPanel; ++i) {
      // What fills the last panel finds nothing.
      const Terms y = i < count ? terms_[i] : Terms{0, 0, 0, 1e37F, 0, 1e37F};
      f[i] = y.s;
      f[kBlockRows + i] = y.r;
      f[2 * kBlockRows + i] = y.e1;
      f[3 * kBlockRows + i] = y.e1 * y.e1 * (1 + kRounding) - y.sq1 * (1 - kRounding);
      f[4 * kBlockRows + i] = y.e2;
      f[5 * kBlockRows + i] = y.e2 * y.e2 * (1 + kRounding) - y.sq2 * (1 - kRounding);
      f[6 * kBlockRows + i] = 0;
    }
  }

  Kernels::Block level(int level) {
    float* f = factors_.data();
    if (level == 1) {
      return {lead_bytes_.data(),
              nullptr,
              0,
              f,
              f + kBlockRows,
              f + 2 * kBlockRows,
              f + 3 * kBlockRows,
              static_cast<std::size_t>(panels_),
              shape_.shift};
    }
    if (!tail_there_) pack(kLead / 4, tail_, tail_bytes_.data());
    tail_there_ = true;
    return {lead_bytes_.data(), tail_bytes_.data(), static_cast<std::size_t>(tail_),   f,           f + 6 * kBlockRows,
            f + 4 * kBlockRows, f + 5 * kBlockRows, static_cast<std::size_t>(panels_), shape_.shift};
  }

  std::int64_t count() const { return count_; }
  const std::uint8_t* code(std::int64_t i) const { return code_ + i * shape_.width; }
  const Terms& terms(std::int64_t i) const { return terms_[i]; }

 private:
  void pack(std::int64_t from, std::int64_t steps, std::uint8_t* out) {
    for (std::int64_t p = 0; p < panels_; ++p) {
      const std::int64_t first = p * kPanel;
      std::uint8_t* panel = out + p * steps * 4 * kPanel;
      if (first + kPanel <= count_) {
        k_.pack(code_ + first * shape_.width, shape_.width, from, steps, panel);
        continue;
      }
      std::memset(panel, 128, steps * 4 * kPanel);
      for (std::int64_t i = 0; first + i < count_; ++i) {
        for (std::int64_t s = 0; s < steps; ++s) {
          std::memcpy(panel + (s * kPanel + i) * 4, code_ + (first + i) * shape_.width + 4 * (from + s), 4);
        }
      }
    }
  }

  const Kernels& k_;
  Shape shape_;
  std::int64_t tail_;
  Aligned<std::uint8_t> lead_bytes_;
  Aligned<std::uint8_t> tail_bytes_;
  Aligned<float> factors_;
  const std::uint8_t* code_ = nullptr;
  const Terms* terms_ = nullptr;
  std::int64_t count_ = 0;
  std::int64_t panels_ = 0;
  bool tail_there_ = false;
};

// One chunk of queries over one range of rows.
class Scanner {
 public:
  Scanner(const Points& rows, std::int64_t first, const Points& queries, Shape shape, double stretch, int k,
          std::int64_t from_query, std::int64_t count, double* upper, Work& work)
      : k_(kernels()),
        rows_(rows),
        first_(first),
        stretch_(stretch),
        neighbors_(k),
        from_query_(from_query),
        count_(count),
        upper_(upper),
        work_(work),
        strips_(k_, queries, shape, from_query, count),
        block_(k_, shape),
        masks_(k_.strip_rows * kBlockPanels),
        lead_only_(shape.width == kLead) {
    for (std::int64_t i = 0; i < count; ++i) strips_.set_reach(i, reach(i));
  }

  void run(std::int64_t from, std::int64_t to) {
    std::int64_t blocks = 0;
    double passing = 0;  // share of pairs beyond level 1, of late
    for (std::int64_t at = from; at < to; at += kBlockRows, ++blocks) {
      const std::int64_t here = std::min(kBlockRows, to - at);
      block_.load(rows_, at, here);
      work_.bounded += count_ * here;
      std::int64_t passed = 0;
      std::int64_t looked = 0;
      for (std::int64_t s = 0; s < strips_.strips(); ++s) {
        const std::int64_t queries = std::min<std::int64_t>(k_.strip_rows, count_ - s * k_.strip_rows);
        bool dense = lead_only_ || (passing > kDense && (s > 0 || !looks_again(blocks)));
        if (!dense) {
          k_.scan(strips_.strip(s, 1), block_.level(1), masks_.data(), kBlockPanels);
          const std::int64_t there = survivors(queries);
          passed += there;
          looked += queries * here;
          dense = static_cast<double>(there) > kDense * static_cast<double>(queries * here);
          if (!dense) work_.fine += there;
        }
        if (dense) {
          k_.scan(strips_.strip(s, 2), block_.level(2), masks_.data(), kBlockPanels);
          work_.fine += queries * here;
          work_.dense += queries * here;
        }
        for (std::int64_t i = 0; i < queries; ++i) look(s * k_.strip_rows + i, masks_.data() + i * kBlockPanels, at);
      }
      if (looked > 0) passing = static_cast<double>(passed) / static_cast<double>(looked);
    }
  }

 private:
  // The first blocks are seen with the loosest bounds.
  static bool looks_again(std::int64_t block) {
    return block % kLookAgain == 0 || std::has_single_bit(static_cast<std::uint64_t>(block));
  }
  double reach(std::int64_t i) const { return upper_[i * neighbors_ + neighbors_ - 1]; }

  std::int64_t survivors(std::int64_t queries) const {
    std::int64_t found = 0;
    const std::int64_t panels = divide_up(block_.count(), kPanel);
    for (std::int64_t i = 0; i < queries; ++i) {
      for (std::int64_t p = 0; p < panels; ++p) found += std::popcount(masks_[i * kBlockPanels + p]);
    }
    return found;
  }

  // The rows whose bits are set, one by one: dot, both bounds, and what follows from them.
  void look(std::int64_t query, const std::uint16_t* masks, std::int64_t base) {
    const Terms& x = strips_.terms(query);
    bool nearer = false;
    for (std::int64_t p = 0; p < divide_up(block_.count(), kPanel); ++p) {
      for (std::uint32_t bits = masks[p]; bits != 0; bits &= bits - 1) {
        const std::int64_t i = p * kPanel + std::countr_zero(bits);
        if (i >= block_.count()) break;
        const Terms& y = block_.terms(i);
        const double dot = strips_.dot(query, block_.code(i));
        const double squares = static_cast<double>(x.sq2) + y.sq2;
        const double square = squares - 2.0 * x.s * y.s * dot;
        const double errors = static_cast<double>(x.e2) + y.e2;
        // sq is rounded to float32.
        const double rounding = squares * 0x1p-22;
        const double lower = std::sqrt(std::max(0.0, square - rounding)) - errors;
        if (lower > reach(query)) continue;
        work_.query.push_back(static_cast<std::int32_t>(from_query_ + query));
        work_.row.push_back(first_ + base + i);
        work_.lower.push_back(below(lower));
        const double most = stretch_ * (std::sqrt(std::max(0.0, square + rounding)) + errors);
        nearer |= offer(query, most);
      }
    }
    if (nearer) strips_.set_reach(query, reach(query));
  }

  static float below(double value) {
    return std::nextafter(static_cast<float>(value), -std::numeric_limits<float>::infinity());
  }

  bool offer(std::int64_t query, double value) {
    double* list = upper_ + query * neighbors_;
    if (value >= list[neighbors_ - 1]) return false;
    int at = neighbors_ - 1;
    for (; at > 0 && list[at - 1] > value; --at) list[at] = list[at - 1];
    list[at] = value;
    return true;
  }

  const Kernels& k_;
  const Points& rows_;
  std::int64_t first_;
  double stretch_;
  int neighbors_;
  std::int64_t from_query_;
  std::int64_t count_;
  double* upper_;
  Work& work_;
  Strips strips_;
  Block block_;
  std::vector<std::uint16_t> masks_;
  bool lead_only_;
};

void append(Work& to, const Work& from) {
  to.bounded += from.bounded;
  to.fine += from.fine;
  to.dense += from.dense;
  to.query.insert(to.query.end(), from.query.begin(), from.query.end());
  to.row.insert(to.row.end(), from.row.begin(), from.row.end());
  to.lower.insert(to.lower.end(), from.lower.begin(), from.lower.end());
}

}  // namespace

void encode(const float* v, std::int64_t count, std::int64_t d, Shape shape, bool queries, double eta,
            std::uint8_t* code, Terms* terms, int threads) {
  const Kernels& k = kernels();
  constexpr std::int64_t kRows = 256;
  cpu::share(divide_up(count, kRows), threads, [&] {
    return [&](std::int64_t block) {
      for (std::int64_t i = block * kRows; i < std::min(count, (block + 1) * kRows); ++i) {
        k.encode(v + i * d, d, shape.width, shape.shift, queries ? k.levels : 127, queries ? 0 : 128, eta,
                 code + i * shape.width, terms + i);
      }
    };
  });
}

Work scan(const Points& rows, std::int64_t first, const Points& queries, Shape shape, double stretch, int k,
          double* upper, int threads) {
  // By queries, or, where these are few, by rows: each thread then starts from the same upper bounds.
  const bool by_queries = threads == 1 || queries.count >= kFew * threads;
  const std::int64_t blocks = divide_up(rows.count, kBlockRows);
  const std::int64_t parts = by_queries ? threads : std::clamp<std::int64_t>(blocks, 1, threads);
  std::vector<Work> works(parts);
  std::vector<std::vector<double>> uppers(by_queries ? 0 : parts,
                                          std::vector<double>(upper, upper + queries.count * k));
  cpu::share(parts, threads, [&] {
    return [&](std::int64_t part) {
      if (by_queries) {
        const std::int64_t from = queries.count * part / parts;
        const std::int64_t count = queries.count * (part + 1) / parts - from;
        if (count == 0) return;
        Scanner(rows, first, queries, shape, stretch, k, from, count, upper + from * k, works[part]).run(0, rows.count);
      } else {
        Scanner(rows, first, queries, shape, stretch, k, 0, queries.count, uppers[part].data(), works[part])
            .run(blocks * part / parts * kBlockRows, std::min(rows.count, blocks * (part + 1) / parts * kBlockRows));
      }
    };
  });
  if (!by_queries) {
    // The k smallest of what was there before and of what each thread added: each of them has the former list in its
    // own.
    for (std::int64_t q = 0; q < queries.count; ++q) {
      const std::vector<double> before(upper + q * k, upper + (q + 1) * k);
      std::vector<double> all = before;
      for (const std::vector<double>& part : uppers) {
        // A multiset difference: what of the former list is left in this thread's, in ascending order.
        std::size_t old = 0;
        for (int i = 0; i < k; ++i) {
          const double value = part[q * k + i];
          while (old < before.size() && before[old] < value) ++old;
          if (old < before.size() && before[old] == value) {
            ++old;
          } else {
            all.push_back(value);
          }
        }
      }
      std::nth_element(all.begin(), all.begin() + (k - 1), all.end());
      std::sort(all.begin(), all.begin() + k);
      std::copy(all.begin(), all.begin() + k, upper + q * k);
    }
  }
  Work total = std::move(works[0]);
  for (std::int64_t part = 1; part < parts; ++part) append(total, works[part]);
  return total;
}

}  // namespace diffmem::vector_scan
