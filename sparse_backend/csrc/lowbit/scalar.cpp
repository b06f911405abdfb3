// Plain C++ for machines without AVX2, and the kernels that tests hold the others against.
#include "common_impl.h"

namespace sparse_backend::lowbit {
namespace {

// The codes of one row of a line: columns[slot][byte].
inline void codes_of(Storage storage, const uint8_t* line, int row, int32_t codes[5][4]) {
  for (int j = 0; j < 4; ++j) {
    int32_t value = line[4 * row + j];
    for (int slot = 0; slot < 5; ++slot) {
      codes[slot][j] = storage == Storage::kInt8      ? value
                       : storage == Storage::kTwoBits ? value & 3
                                                      : value % 3;
      value = storage == Storage::kTwoBits ? value >> 2 : value / 3;
    }
  }
}

struct Out {
  const UnitArgs& a;
  int panel, row;
  void add(int64_t column, const int32_t codes[4]) const {
    const Plan& plan = *a.plan;
    const int64_t segment = plan.segment > 0 ? column / plan.segment : 0;
    for (int r = 0; r < a.rows; ++r) {
      int32_t sum = 0;
      for (int j = 0; j < 4; ++j) sum += codes[j] * a.x[r * a.x_stride + column + j];
      a.out[(segment * a.rows + r) * kUnitRows + panel * kPanelRows + row] += sum;
    }
  }
};

void multiply(const UnitArgs& a) {
  const Plan& plan = *a.plan;
  std::memset(a.out, 0, plan.segments * a.rows * kUnitRows * sizeof(int32_t));
  const int block_lines = plan.span / 4;
  int32_t codes[5][4];
  uint8_t tail[kLine];
  for (int panel = 0; panel < a.panels; ++panel) {
    for (int row = 0; row < kPanelRows; ++row) {
      const Out out{a, panel, row};
      const uint8_t* w = a.panel[panel];
      for (int64_t i = 0; i < plan.lines5; ++i, w += kLine) {
        codes_of(Storage::kFiveTrits, w, row, codes);
        const int64_t block = i / block_lines;
        for (int slot = 0; slot < 5; ++slot) {
          out.add((block * 5 + slot) * plan.span + i % block_lines * 4, codes[slot]);
        }
      }
      int64_t column = plan.lines5 * 20;
      const int64_t lines = plan.lines2 + (plan.tail_bytes > 0 ? 1 : 0);
      for (int64_t i = 0; i < lines; ++i, w += kLine, column += 16) {
        if (i == plan.lines2) expand_tail(w, plan.tail_bytes, tail);
        codes_of(Storage::kTwoBits, i == plan.lines2 ? tail : w, row, codes);
        for (int slot = 0; slot < 4; ++slot) {
          if (column + 4 * slot < plan.columns) out.add(column + 4 * slot, codes[slot]);
        }
      }
      for (int64_t i = 0; i < plan.lines8; ++i, w += kLine) {
        codes_of(Storage::kInt8, w, row, codes);
        out.add(4 * i, codes[0]);
      }
    }
  }
}

}  // namespace

const Kernels& scalar_kernels() {
  static constexpr Kernels kernels{"scalar", kGemmRows, prepare, multiply, multiply, finish<128>};
  return kernels;
}

}  // namespace sparse_backend::lowbit
