// AVX2. One token: eight rows at a time, their activations loaded one by one from L1. Cycles per
// entry of one token at 90% zeros on Ice Lake, losers in brackets: about 2 as it stands; [4.0] vgatherdps,
// which microcode against Downfall has slowed; [2.8] one entry at a time, mispredicting the lengths of
// steps. Batches: a register is 8 tokens.
#include <immintrin.h>

#include <type_traits>

#include "../unstructured/decode_avx2.h"
#include "kernel_impl.h"

namespace sparse_backend::sell {
namespace {

// kFirstLanes + 8 - n: the first n of eight lanes.
alignas(64) constexpr int32_t kFirstLanes[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};

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
  // The words in the lower (kSecond: upper) halves of eight lanes, as multiply_add() takes them.
  template <bool kSecond>
  static inline __m256i one_of_two(__m256i pairs) {
    if constexpr (kKind == Values::kBf16 || kKind == Values::kBf16x12) {
      return kSecond ? _mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xFFFF0000U)))
                     : _mm256_slli_epi32(pairs, 16);
    }
    const __m256i words =
        kSecond ? _mm256_srli_epi32(pairs, 16) : _mm256_and_si256(pairs, _mm256_set1_epi32(0xFFFF));
    if constexpr (kInteger) return words;
    const __m128i packed =
        _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    return _mm256_castps_si256(_mm256_cvtph_ps(packed));
  }

  // acc += weights * x[columns[0, 2, ..., 14]], eight rows. x: floats, or int32 in their place.
  static inline Vector multiply_add_rows(__m256i weights, const uint8_t* columns, const float* x,
                                         Vector acc) {
    const __m256 found = _mm256_setr_ps(x[columns[0]], x[columns[2]], x[columns[4]], x[columns[6]],
                                        x[columns[8]], x[columns[10]], x[columns[12]], x[columns[14]]);
    if constexpr (kInteger) {
      return _mm256_add_epi32(acc, _mm256_madd_epi16(weights, _mm256_castps_si256(found)));
    } else {
      return _mm256_fmadd_ps(_mm256_castsi256_ps(weights), found, acc);
    }
  }
};

// Two entries of each of `rows` (at most 8) rows. What follows the last row is read as columns up to
// 255, of the next block's activations, and multiplied by zero.
template <class Simd>
inline auto step(const uint8_t* columns, const uint16_t* values, int rows, const float* x,
                 typename Simd::Vector acc) {
  const __m256i lanes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kFirstLanes + 8 - rows));
  const __m256i pairs = _mm256_maskload_epi32(reinterpret_cast<const int*>(values), lanes);
  acc = Simd::multiply_add_rows(Simd::template one_of_two<false>(pairs), columns, x, acc);
  return Simd::multiply_add_rows(Simd::template one_of_two<true>(pairs), columns + 1, x, acc);
}

template <Values kKind>
void gemv(const UnitArgs& args) {
  using Simd = Avx2<kKind>;
  const ExponentTable table = *args.exponents;
  uint16_t* words = static_cast<uint16_t*>(args.scratch);
  const uint8_t* stream[kUnitStrips];
  for (int s = 0; s < args.strips; ++s) stream[s] = args.strip[s];
  for (int i = 0; i < args.strips * kStripRows; ++i) args.out[i] = 0;
  const float* x = static_cast<const float*>(args.x);
  for (int64_t b = 0; b < args.blocks; ++b, x += kBlockColumns) {
    for (int s = 0; s < args.strips; ++s) {
      Block<Simd> block;
      stream[s] = block.read(stream[s], table, words);
      const uint8_t* columns = block.columns;
      const uint16_t* values = block.values;
      const uint8_t* active = block.active;
      alignas(32) int32_t sums[kStripRows];
      for (int slice = 0; slice < kSlices; ++slice) {
        typename Simd::Vector acc[4] = {Simd::zero(), Simd::zero(), Simd::zero(), Simd::zero()};
        for (int j = block.header->steps[slice]; j > 0; --j) {
          const int count = *active++;
          block.prefetch(count);
          const auto eight = [&](int i) {
            const int rows = count - 8 * i < 8 ? count - 8 * i : 8;
            acc[i] = step<Simd>(columns + 16 * i, values + 16 * i, rows, x, acc[i]);
          };
          eight(0);
          if (count > 8) eight(1);
          if (count > 16) eight(2);
          if (count > 24) eight(3);
          columns += 2 * count;
          values += 2 * count;
        }
        for (int i = 0; i < 4; ++i) {  // to their slots
          int32_t* to = sums + slice * kSliceRows;
          std::memcpy(to + slot(8 * i), &acc[i], 16);
          std::memcpy(to + slot(8 * i + 4), reinterpret_cast<const uint8_t*>(&acc[i]) + 16, 16);
        }
      }
      const float* scales = block_scales<Simd>(args, b, s);
      float* out = args.out + s * kStripRows;
      for (int r = 0; r < kStripRows; r += 8) {
        const __m256i rank =
            _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(block.header->rank + r)));
        const __m256i mine = _mm256_i32gather_epi32(sums, rank, 4);
        if constexpr (Simd::kInteger) {
          _mm256_storeu_ps(out + r, Simd::added(_mm256_loadu_ps(out + r), mine, _mm256_loadu_ps(scales + r)));
        } else {
          _mm256_storeu_ps(out + r, _mm256_add_ps(_mm256_loadu_ps(out + r), _mm256_castsi256_ps(mine)));
        }
      }
    }
  }
}

// Activations as floats, or as int32 for integer values; a block of zeros after the last.
template <Values kKind>
float prepare(const void* x, DType dtype, int64_t k, int limit, int, int, int16_t* spare, void* out) {
  const int64_t padded = round_up(k, kBlockColumns) + kBlockColumns;
  if constexpr (unstructured::is_integer(kKind)) {
    const float scale = unstructured::quantise_int16(x, dtype, k, padded, limit, spare);
    auto* wide = static_cast<int32_t*>(out);
    for (int64_t i = 0; i < padded; ++i) wide[i] = spare[i];
    return scale;
  }
  float* floats = static_cast<float*>(out);
  for (int64_t i = 0; i < k; ++i) floats[i] = load_as_float(x, dtype, i);
  for (int64_t i = k; i < padded; ++i) floats[i] = 0;
  return 1.0F;
}

template <Values kKind>
constexpr Kernels make() {
  return {"avx2", gemv<kKind>, 1, [](DType) { return true; }, 4, prepare<kKind>, batch<Avx2<kKind>>, 8};
}

}  // namespace

const Kernels& avx2_kernels(Values values) {
  static constexpr Kernels table[] = {make<Values::kBf16>(), make<Values::kFp16>(), make<Values::kBf16x12>(),
                                      make<Values::kInt8>(), make<Values::kInt4>()};
  return table[static_cast<int>(values)];
}

}  // namespace sparse_backend::sell
