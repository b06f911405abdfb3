// AVX-512 with VBMI and VNNI. One token: the 128 activations of a block are a table in four
// registers, which vpermi2w looks 32 entries' columns up in. Batches: a register is 16 tokens.
//
// Cycles per 32 entries, one token, Ice Lake: bf16 by port counts 11 (9 of them on port 5); no bf16
// dot product even where there is one, so that sums are the same everywhere.
#include <immintrin.h>

#include <type_traits>

#include "../unstructured/decode_avx512.h"
#include "kernel_impl.h"

namespace sparse_backend::sell {
namespace {

template <Values kKind>
struct Avx512 {
  static constexpr Values kValues = kKind;
  static constexpr bool kInteger = unstructured::is_integer(kKind);
  using Decoder = unstructured::Avx512Decoder;
  using Stored = std::conditional_t<kInteger, uint8_t, uint16_t>;
  static constexpr int kLanes = 16;
  using Vector = std::conditional_t<kInteger, __m512i, __m512>;

  static inline Vector zero() {
    if constexpr (kInteger) {
      return _mm512_setzero_si512();
    } else {
      return _mm512_setzero_ps();
    }
  }
  static inline Vector multiply_add(uint32_t weight, const uint8_t* x, Vector acc) {
    if constexpr (kInteger) {
      return _mm512_dpwssd_epi32(acc, _mm512_set1_epi32(static_cast<int>(weight)), _mm512_load_si512(x));
    } else {
      return _mm512_fmadd_ps(_mm512_set1_ps(float_from_bits(weight)), _mm512_load_ps(x), acc);
    }
  }
  static inline __m512 added(__m512 out, Vector acc, __m512 scale) {
    if constexpr (kInteger) {
      return _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc), scale, out);
    } else {
      return _mm512_add_ps(out, acc);
    }
  }
  static inline void add_scaled(float* out, Vector acc, float scale) {
    _mm512_storeu_ps(out, added(_mm512_loadu_ps(out), acc, _mm512_set1_ps(scale)));
  }

  // Two values of each of the first `active` rows; zeros for the others.
  static inline __m512i load_values(const Stored* values, int active) {
    if constexpr (kInteger) {
      const auto rows = static_cast<__mmask16>((1U << active) - 1);
      return _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi16(rows, values));
    } else {
      return _mm512_maskz_loadu_epi32(static_cast<__mmask16>((1U << active) - 1), values);
    }
  }

  // acc += values * x: the first of a row's two entries, then the second.
  static inline Vector two_entries(__m512i w, __m512i x, Vector acc) {
    if constexpr (kInteger) {
      return _mm512_dpwssd_epi32(acc, w, x);
    } else if constexpr (kKind == Values::kFp16) {
      const auto floats = [](__m512i v) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(v)); };
      acc = _mm512_fmadd_ps(floats(w), floats(x), acc);
      return _mm512_fmadd_ps(floats(_mm512_srli_epi32(w, 16)), floats(_mm512_srli_epi32(x, 16)), acc);
    } else {
      const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000U));
      const auto first = [](__m512i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)); };
      const auto second = [&](__m512i v) { return _mm512_castsi512_ps(_mm512_and_si512(v, upper)); };
      acc = _mm512_fmadd_ps(first(w), first(x), acc);
      return _mm512_fmadd_ps(second(w), second(x), acc);
    }
  }
};

template <Values kKind>
void gemv(const UnitArgs& args) {
  using Simd = Avx512<kKind>;
  const ExponentTable table = *args.exponents;
  uint16_t* words = static_cast<uint16_t*>(args.scratch);
  const uint8_t* stream[kUnitStrips];
  for (int s = 0; s < args.strips; ++s) stream[s] = args.strip[s];
  for (int i = 0; i < args.strips * kStripRows; ++i) args.out[i] = 0;
  const uint16_t* x = static_cast<const uint16_t*>(args.x);
  for (int64_t b = 0; b < args.blocks; ++b, x += kBlockColumns) {
    const __m512i x0 = _mm512_load_si512(x), x1 = _mm512_load_si512(x + 32);
    const __m512i x2 = _mm512_load_si512(x + 64), x3 = _mm512_load_si512(x + 96);
    for (int s = 0; s < args.strips; ++s) {
      Block<Simd> block;
      stream[s] = block.read(stream[s], table, words);
      const uint8_t* columns = block.columns;
      const typename Simd::Stored* values = block.values;
      const uint8_t* active = block.active;
      typename Simd::Vector sums[kSlices];
#pragma GCC unroll 4
      for (int slice = 0; slice < kSlices; ++slice) {
        auto acc = Simd::zero();
        for (int j = block.header->steps[slice]; j > 0; --j) {
          const int count = *active++;
          block.prefetch(count);
          const __m512i index =
              _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(columns)));
          const __m512i low = _mm512_permutex2var_epi16(x0, index, x1);
          const __m512i high = _mm512_permutex2var_epi16(x2, index, x3);
          const __mmask32 upper = _mm512_test_epi16_mask(index, _mm512_set1_epi16(64));
          const __m512i found = _mm512_mask_blend_epi16(upper, low, high);
          acc = Simd::two_entries(Simd::load_values(values, count), found, acc);
          columns += 2 * count;
          values += 2 * count;
        }
        sums[slice] = acc;
      }
      const float* scales = block_scales<Simd>(args, b, s);
      float* out = args.out + s * kStripRows;
#pragma GCC unroll 4
      for (int quarter = 0; quarter < 4; ++quarter) {
        const __m512i rank = _mm512_cvtepu8_epi32(
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(block.header->rank + 16 * quarter)));
        const __mmask16 upper = _mm512_test_epi32_mask(rank, _mm512_set1_epi32(32));
        const auto bits = [](auto v) {
          if constexpr (Simd::kInteger) {
            return v;
          } else {
            return _mm512_castps_si512(v);
          }
        };
        const __m512i low = _mm512_permutex2var_epi32(bits(sums[0]), rank, bits(sums[1]));
        const __m512i high = _mm512_permutex2var_epi32(bits(sums[2]), rank, bits(sums[3]));
        const __m512i mine = _mm512_mask_blend_epi32(upper, low, high);
        const __m512 before = _mm512_loadu_ps(out + 16 * quarter);
        if constexpr (Simd::kInteger) {
          _mm512_storeu_ps(out + 16 * quarter,
                           Simd::added(before, mine, _mm512_loadu_ps(scales + 16 * quarter)));
        } else {
          _mm512_storeu_ps(out + 16 * quarter, _mm512_add_ps(before, _mm512_castsi512_ps(mine)));
        }
      }
    }
  }
}

// Activations as the 16-bit words of the table: as they are, or int16.
template <Values kKind>
float prepare(const void* x, DType dtype, int64_t k, int limit, void* out) {
  const int64_t padded = round_up(k, kBlockColumns);
  if constexpr (unstructured::is_integer(kKind)) {
    return unstructured::quantise_int16(x, dtype, k, padded, limit, static_cast<int16_t*>(out));
  }
  uint16_t* words = static_cast<uint16_t*>(out);
  std::memcpy(words, x, 2 * k);
  std::memset(words + k, 0, 2 * (padded - k));
  return 1.0F;
}

template <Values kKind>
bool gemv_takes(DType x_type) {
  if constexpr (unstructured::is_integer(kKind)) return true;
  return x_type == (kKind == Values::kFp16 ? DType::kFp16 : DType::kBf16);
}

template <Values kKind>
constexpr Kernels make() {
  return {"avx512", gemv<kKind>, 4, gemv_takes<kKind>, 2, prepare<kKind>, batch<Avx512<kKind>>, 16};
}

}  // namespace

const Kernels& avx512_kernels(Values values) {
  static constexpr Kernels table[] = {make<Values::kBf16>(), make<Values::kFp16>(), make<Values::kBf16x12>(),
                                      make<Values::kInt8>(), make<Values::kInt4>()};
  return table[static_cast<int>(values)];
}

}  // namespace sparse_backend::sell
