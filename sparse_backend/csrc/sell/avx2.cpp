// AVX2. A few tokens: 32 entries' columns are looked up in a block's activations, low bytes and high bytes
// apart, 16 at a time. vpshufb finds zero where a byte of the index is negative, and tables stand as
// differences: the first 16, those from the first to the second, and so on. So exclusive or of look-ups by c,
// c - 16, c - 32, ... is what stands at c, without comparing or selecting. More tokens: a register is 8 of
// them.
//
// Instructions per 32 entries of bf16 in 12 bits: 95. (One by one, loaded from L1 into a register of rows:
// about 280.)
#include <immintrin.h>

#include <type_traits>

#include "../unstructured/decode_avx2.h"
#include "gemv_impl.h"

namespace sparse_backend::sell {
namespace {

constexpr int kGroupRows = 16,
              kGroups = kSliceRows / kGroupRows;  // a register is two entries of so many rows

struct AfterBytes {
  alignas(64) uint8_t mask[64];
  constexpr AfterBytes() : mask() {
    for (int i = 0; i < 64; ++i) mask[i] = i < 32 ? 0 : 0xFF;
  }
  // All but the first 2 `rows` bytes: what stands after two entries of each row.
  inline __m256i of(int rows) const {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(mask + 32 - 2 * rows));
  }
};
constexpr AfterBytes kAfter;

// kFirstLanes + 8 - n: the first n of eight lanes.
alignas(64) constexpr int32_t kFirstLanes[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};

inline __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

// Of the two entries of 16 rows, which stand side by side in dwords: rows 0-3 and 8-11 in `first`, the others
// in `last`. Past the active rows they are finite numbers, of other weights.
template <Values kValues>
class Weights {
 public:
  Weights(const Block& block, const ExponentTable& table, int64_t ahead, bool to_l2)
      : at_(block, ahead, to_l2),
        exponents_(
            _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table.exponent)))) {}

  // Group `g` of a step of `active` rows.
  inline void group(int g, int active, __m256i& first, __m256i& last) const {
    if constexpr (kValues == Values::kBf16x12) {
      const __m256i high =
          _mm256_shuffle_epi8(exponents_, unstructured::half_bytes(at_.codes + kGroupRows * g));
      const __m256i low = load(at_.run + 2 * kGroupRows * g);
      first = rotated(_mm256_unpacklo_epi8(low, high));
      last = rotated(_mm256_unpackhi_epi8(low, high));
    } else if constexpr (unstructured::is_integer(kValues)) {
      __m256i v;
      if constexpr (kValues == Values::kInt8) {
        v = load(at_.run + 2 * kGroupRows * g);
      } else {
        v = unstructured::int4_bytes(at_.run + kGroupRows * g);
      }
      first = _mm256_srai_epi16(_mm256_unpacklo_epi8(v, v), 8);
      last = _mm256_srai_epi16(_mm256_unpackhi_epi8(v, v), 8);
    } else {  // what follows the active rows might be taken for infinities
      const int rows = active - kGroupRows * g;
      const auto eight = [&](int from) {
        const int n = rows - from < 0 ? 0 : rows - from < 8 ? rows - from : 8;
        return _mm256_maskload_epi32(reinterpret_cast<const int*>(at_.run) + kGroupRows * g + from,
                                     load(kFirstLanes + 8 - n));
      };
      const __m256i a = eight(0), b = eight(8);
      first = _mm256_permute2x128_si256(a, b, 0x20);
      last = _mm256_permute2x128_si256(a, b, 0x31);
    }
  }
  // To the next step.
  inline void skip(int active) { at_.skip(active); }
  inline void unpack(int active, __m256i* words) {
    group(0, active, words[0], words[1]);
    if (active > kGroupRows) group(1, active, words[2], words[3]);
    skip(active);
  }

 private:
  static inline __m256i rotated(__m256i v) {
    return _mm256_or_si256(_mm256_srli_epi16(v, 1), _mm256_slli_epi16(v, 15));
  }

  ValueStream<kValues> at_;
  __m256i exponents_;
};

// Weights that were unpacked before.
struct Unpacked {
  const __m256i* words;
  inline void group(int g, int, __m256i& first, __m256i& last) const {
    first = words[2 * g];
    last = words[2 * g + 1];
  }
  inline void skip(int) { words += 2 * kGroups; }
};

template <Values kKind>
struct Avx2 {
  static constexpr Values kValues = kKind;
  static constexpr bool kInteger = unstructured::is_integer(kKind);
  using Decoder = unstructured::Avx2Decoder;
  using Stored = uint16_t;
  static constexpr int kLanes = 8;
  using Vector = std::conditional_t<kInteger, __m256i, __m256>;

  static inline Vector zero() {
    if constexpr (kInteger) {
      return _mm256_setzero_si256();
    } else {
      return _mm256_setzero_ps();
    }
  }
  static inline Vector multiply_add(uint32_t weight, const uint8_t* x, Vector acc) {
    if constexpr (kInteger) {
      const __m256i v = _mm256_load_si256(reinterpret_cast<const __m256i*>(x));
      return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_set1_epi32(static_cast<int>(weight)), v));
    } else {
      const __m256 v = _mm256_load_ps(reinterpret_cast<const float*>(x));
      return _mm256_fmadd_ps(_mm256_set1_ps(float_from_bits(weight)), v, acc);
    }
  }
  static inline __m256 added(__m256 out, Vector acc, __m256 scale) {
    if constexpr (kInteger) {
      return _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc), scale, out);
    } else {
      return _mm256_add_ps(out, acc);
    }
  }
  static inline void add_scaled(float* out, Vector acc, float scale) {
    _mm256_storeu_ps(out, added(_mm256_loadu_ps(out), acc, _mm256_set1_ps(scale)));
  }

  // acc += w * x: the first of a row's two entries, then the second.
  static inline Vector two_entries(__m256i w, __m256i x, Vector acc) {
    if constexpr (kInteger) {
      return _mm256_add_epi32(acc, _mm256_madd_epi16(w, x));
    } else if constexpr (kKind == Values::kFp16) {
      const auto floats = [](__m256i words) {
        return _mm256_cvtph_ps(
            _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
      };
      const __m256i lower = _mm256_set1_epi32(0xFFFF);
      acc = _mm256_fmadd_ps(floats(_mm256_and_si256(w, lower)), floats(_mm256_and_si256(x, lower)), acc);
      return _mm256_fmadd_ps(floats(_mm256_srli_epi32(w, 16)), floats(_mm256_srli_epi32(x, 16)), acc);
    } else {
      const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xFFFF0000U));
      const auto first = [](__m256i v) { return _mm256_castsi256_ps(_mm256_slli_epi32(v, 16)); };
      const auto second = [&](__m256i v) { return _mm256_castsi256_ps(_mm256_and_si256(v, upper)); };
      acc = _mm256_fmadd_ps(first(w), first(x), acc);
      return _mm256_fmadd_ps(second(w), second(x), acc);
    }
  }
};

struct Avx2Level {
  using Word = __m256i;
  using Unpacked = sell::Unpacked;
  template <Values kValues>
  using Weights = sell::Weights<kValues>;
  static constexpr int kStepWords = 2 * kGroups, kTogether = 2;
  static constexpr bool kDifferences = true;

  // Adds two entries of each of 16 rows, of which `rows` have some: acc[token][first rows, last rows].
  template <class Simd, int kTokens>
  static inline void group(const uint8_t* columns, int rows, __m256i first, __m256i last, const uint8_t* x,
                           typename Simd::Vector acc[kTokens][2]) {
    __asm__ volatile("" : "+r"(x));  // or all tables would be copied to the stack first
    __m256i at = _mm256_or_si256(load(columns), kAfter.of(rows)), low[kTokens], high[kTokens];
    const __m256i sixteen = _mm256_set1_epi8(16);
#pragma GCC unroll 8
    for (int i = 0; i < kBlockColumns / 16; ++i) {
#pragma GCC unroll 2
      for (int t = 0; t < kTokens; ++t) {
        const auto found = [&](int plane) {
          const auto* table =
              reinterpret_cast<const __m128i*>(x + t * kTableBytes + plane * kBlockColumns + 16 * i);
          return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128(table)), at);
        };
        low[t] = i == 0 ? found(0) : _mm256_xor_si256(low[t], found(0));
        high[t] = i == 0 ? found(1) : _mm256_xor_si256(high[t], found(1));
        // In this order: GCC would make a tree of it, for which there are not registers enough.
        __asm__ volatile("" : "+x"(low[t]), "+x"(high[t]));
      }
      at = _mm256_sub_epi8(at, sixteen);
    }
#pragma GCC unroll 2
    for (int t = 0; t < kTokens; ++t) {
      acc[t][0] = Simd::two_entries(first, _mm256_unpacklo_epi8(low[t], high[t]), acc[t][0]);
      acc[t][1] = Simd::two_entries(last, _mm256_unpackhi_epi8(low[t], high[t]), acc[t][1]);
    }
  }

  template <class Simd, int kTokens, class Source>
  static inline void multiply(const Block& block, Source source, const uint8_t* x, float* out,
                              int64_t out_stride, const float* scales) {
    using Vector = typename Simd::Vector;
    alignas(32) int32_t sums[kTokens][kStripRows];
    const uint8_t* active = block.active;
    const uint8_t* columns = block.columns;
    for (int s = 0; s < kSlices; ++s) {
      Vector acc[kGroups][kTokens][2];
      for (auto& of_group : acc) {
        for (auto& of_token : of_group) of_token[0] = of_token[1] = Simd::zero();
      }
      for (int j = block.header->steps[s]; j > 0; --j) {
        const int rows = *active++;
        __m256i first, last;
        source.group(0, rows, first, last);
        group<Simd, kTokens>(columns, rows < kGroupRows ? rows : kGroupRows, first, last, x, acc[0]);
        if (rows > kGroupRows) {
          source.group(1, rows, first, last);
          group<Simd, kTokens>(columns + 2 * kGroupRows, rows - kGroupRows, first, last, x, acc[1]);
        }
        source.skip(rows);
        columns += 2 * rows;
      }
      for (int g = 0; g < kGroups; ++g) {  // to their slots
        for (int t = 0; t < kTokens; ++t) {
          int32_t* to = sums[t] + s * kSliceRows + 8 * g;
          std::memcpy(to, &acc[g][t][0], 32);
          std::memcpy(to + kGroupRows, &acc[g][t][1], 32);
        }
      }
    }
    for (int t = 0; t < kTokens; ++t) {
      // One by one: microcode against Downfall has slowed vpgatherdd.
      alignas(32) int32_t mine[kStripRows];
#pragma GCC unroll 8
      for (int r = 0; r < kStripRows; ++r) mine[r] = sums[t][block.header->rank[r]];
      float* to = out + t * out_stride;
#pragma GCC unroll 2
      for (int r = 0; r < kStripRows; r += 8) {
        Vector sum;
        std::memcpy(&sum, mine + r, 32);
        __m256 scale = _mm256_setzero_ps();
        if constexpr (Simd::kInteger) scale = _mm256_loadu_ps(scales + r);
        _mm256_storeu_ps(to + r, Simd::added(_mm256_loadu_ps(to + r), sum, scale));
      }
    }
  }
};

// More are faster in registers of 8.
constexpr int kGemvTokens = 4;

template <Values kKind>
constexpr Kernels make() {
  using Simd = Avx2<kKind>;
  return {
      "avx2", gemv<Avx2Level, Simd>, kGemvTokens, gemv_takes<kKind>, prepare<Avx2Level, Simd>, batch<Simd>,
      8};
}

}  // namespace

const Kernels& avx2_kernels(Values values) {
  static constexpr Kernels table[] = {make<Values::kBf16>(), make<Values::kFp16>(), make<Values::kBf16x12>(),
                                      make<Values::kInt8>(), make<Values::kInt4>()};
  return table[static_cast<int>(values)];
}

}  // namespace sparse_backend::sell
