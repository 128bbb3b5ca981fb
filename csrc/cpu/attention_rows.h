// What the kernels of attention share: how keys are addressed, and the one function that computes rows of attention,
// for whole segments (attention.cpp) and for decoding over pages (attention_decode.cpp).
//
// Keys are counted from the start of what a row sees: first the prefix's, then the own ones. They are taken in blocks
// of 64 at fixed places of that count (position / 64), each with one running maximum and one rescaling; sums run over
// the channels of a head, the keys of a block and the blocks in order. What a row does not see counts as exactly
// nothing. A row's result is therefore a function of its own query and keys, however they are packed or paged.
//
// Pages hold keys and values as the loops read them, in words of 32 bits: w = 1 float or w = 2 bf16.
//   keys    [page][key head][D / w][16][w]    a word: w channels of one key
//   values  [page][key head][16 / w][D][w]    a word: one channel of w keys
#pragma once

#include <cstdint>

#include "dispatch.h"

// Also called from the loops of each class: inlined, so that no copy of one class is shared with another.
#define ENGINE_EVERYWHERE __attribute__((always_inline)) inline

namespace engine {

constexpr int64_t kKeyBlock = 64;    // keys with one running maximum: 16 KiB of keys at 64 channels, in cache level 1
constexpr int64_t kChunkRows = 256;  // rows that go over a block of keys together
constexpr int64_t kMaxTile = 8;      // the most rows a tile of any class has
constexpr int64_t kPage = 16;        // keys of a page: a vector of the widest class
constexpr int64_t kBlockPages = kKeyBlock / kPage;

ENGINE_EVERYWHERE int64_t padded(int64_t size) { return (size + 15) / 16 * 16; }

// Row i of a tensor (rows, heads, size), head h, starts at element (i * heads + h) * size.
struct Heads {
  bool bf16;
  int64_t query_heads, key_heads, size;
  ENGINE_EVERYWHERE int64_t group() const { return query_heads / key_heads; }
  ENGINE_EVERYWHERE int64_t chunk_tokens() const { return group() >= kChunkRows ? 1 : kChunkRows / group(); }
  ENGINE_EVERYWHERE int64_t chunk_rows() const {  // whole tiles
    return (chunk_tokens() * group() + kMaxTile - 1) / kMaxTile * kMaxTile;
  }
};

// Keys at `length` positions on end that lie one after the other, from `row` on.
struct Run {
  int64_t row, length;
};

// Where the keys lie: in a prefix and then in the own segment, rows of (rows, key heads, size); or in pages.
struct Keys {
  bool bf16;
  int64_t prefix_begin, prefix_length, own_begin;
  const int32_t* pages;           // page numbers of this row, or null
  const int32_t* then = nullptr;  // of what the thread reads next, to be fetched
  int64_t then_pages = 0;
  ENGINE_EVERYWHERE Run run(int64_t position) const {
    if (position < prefix_length) return {prefix_begin + position, prefix_length - position};
    return {own_begin + position - prefix_length, INT64_MAX / 2};  // as far as the row sees
  }
};

// `tokens` rows from `token` on, their query heads of one key head; the first sees `visible` keys, each next one more.
struct Rows {
  int64_t token, tokens, visible;
};

// Decoding rows token, token + 1, ... that lie in the same pages with their first `shared` keys, whole blocks.
struct RowGroup {
  int64_t token, rows, shared;
  const int64_t* position;  // of each row: it sees one key more
  const int32_t* pages;     // of each row, `most_pages` apart
  int64_t most_pages;
};

struct Attention {
  const void *q, *k, *v;
  void* out;
  float* lse;  // (rows, query heads), or null
};

// Floats of scratch memory for attention_rows.
ENGINE_EVERYWHERE int64_t attention_scratch(const Heads& heads) {
  const int64_t wide = padded(heads.size);
  return kKeyBlock * 2 * wide + kMaxTile * kKeyBlock + heads.chunk_rows() * (2 * wide + 16 + 2);
}

// Floats of scratch memory for attention_decode_row and attention_decode_group: keys that rows share, then own ones.
ENGINE_EVERYWHERE int64_t attention_decode_scratch(const Heads& heads) {
  const int64_t wide = padded(heads.size), rows = (heads.group() + kMaxTile - 1) / kMaxTile * kMaxTile;
  return attention_scratch(heads) + kMaxTile * kKeyBlock + heads.key_heads * rows * (2 * wide + 16 + 2);
}

// Bytes of one key head's keys (or values) in a page.
ENGINE_EVERYWHERE int64_t page_head_bytes(int64_t size, bool bf16) { return kPage * size * (bf16 ? 2 : 4); }

}  // namespace engine

// At most heads.chunk_tokens() tokens at once.
ENGINE_KERNEL(void, attention_rows,
              (const engine::Attention& job, const engine::Heads& heads, const engine::Keys& keys,
               const engine::Rows& rows, int64_t key_head, float* scratch))
// The row of one token with `visible` keys in pages, its key heads [head0, head1): the same bits as attention_rows.
ENGINE_KERNEL(void, attention_decode_row,
              (const engine::Attention& job, const engine::Heads& heads, const engine::Keys& keys, int64_t token,
               int64_t visible, int64_t head0, int64_t head1, float* scratch))
// Rows over the keys that they share together, then each over its own; one key head. The same bits as row by row. At most
// heads.chunk_tokens() rows.
ENGINE_KERNEL(void, attention_decode_group,
              (const engine::Attention& job, const engine::Heads& heads, bool pages_bf16,
               const engine::RowGroup& group, int64_t key_head, float* scratch))
// One row's keys and values (key heads, size), of the activations' dtype, to place `slot` of their page.
ENGINE_KERNEL(void, attention_page_write,
              (const void* k, const void* v, const engine::Heads& heads, bool pages_bf16, int64_t slot, void* k_page,
               void* v_page))
