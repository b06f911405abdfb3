// Attention of new tokens over a paged KV cache with pages of one token.
#pragma once

#include <cstdint>

#include "../common.h"

namespace sparse_backend::layers {

struct AttentionArgs {
  const void* q;  // [tokens][heads][head_dim]
  DType type;     // of q and of the result
  int64_t q_stride;
  int64_t heads, kv_heads;
  int head_dim, v_dim;
  const void* k_cache;  // [slots][kv_heads][head_dim]
  const void* v_cache;  // [slots][kv_heads][v_dim]
  DType cache_type;
  int64_t slots;
  const int32_t* slot_table;  // [rows][row_length]: the slot of each position
  int64_t rows, row_length;
  int64_t sequences;
  const int64_t* row_of;      // [sequences]
  const int64_t* lengths;     // [sequences] positions, the new tokens' included
  const int64_t* new_tokens;  // [sequences]; nullptr: one each
  int64_t tokens;             // their sum
  float scale;
  int64_t window;  // a token sees this many positions before its own; negative: all
  float logit_cap;
  bool causal;
  void* out;  // [tokens][heads][v_dim]
};

// What is wrong with the arguments, or nullptr.
const char* attention(const AttentionArgs& args, const ThreadPool& pool);

}  // namespace sparse_backend::layers
