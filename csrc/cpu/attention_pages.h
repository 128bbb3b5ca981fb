// Reading and writing pages of keys and values: the layout is in attention_rows.h. Only with ENGINE_CLASS.
#pragma once

#include "attention_tiles.h"

namespace engine::ENGINE_CLASS {

template <typename S>
constexpr int kOfWord = 4 / static_cast<int>(sizeof(S));  // channels or keys of a word

// One of a word's numbers, as floats.
template <typename S>
ENGINE_INLINE vfloat part_of(const char* words, int part) {
  vuint bits;
  std::memcpy(&bits, words, sizeof(bits));
  if constexpr (sizeof(S) == 2) bits = part == 0 ? bits << 16 : bits & 0xffff0000u;
  return (vfloat)bits;
}

// The same of the first `count` words, the rest 0.
template <typename S>
ENGINE_INLINE vfloat part_of_up_to(const char* words, int part, int64_t count) {
  if (count >= kLanes) return part_of<S>(words, part);
  char whole[4 * kLanes] = {};
  std::memcpy(whole, words, 4 * count);
  return part_of<S>(whole, part);
}

// A page's keys, transposed as they lie: to[d * kKeyBlock + i] = key i [d]. What no key has filled is finite and unseen.
template <typename S>
ENGINE_INLINE void unpack_keys(const char* page, int64_t size, float* to) {
  constexpr int w = kOfWord<S>;
  for (int64_t word = 0; word < size / w; ++word, page += 4 * kPage)
#pragma GCC unroll 2
    for (int part = 0; part < w; ++part)
#pragma GCC unroll 4
      for (int i = 0; i < kPage; i += kLanes)
        store(to + (word * w + part) * kKeyBlock + i, part_of<S>(page + 4 * i, part));
}

// A page's first `count` values: to[i * padded(size) + d] = value i [d], with zeros behind them.
template <typename S>
ENGINE_INLINE void unpack_values(const char* page, int64_t size, int64_t count, float* to) {
  constexpr int w = kOfWord<S>;
  const int64_t wide = padded(size);
  for (int64_t i = 0; i < kPage; ++i, to += wide) {
    const char* row = page + i / w * size * 4;
    for (int64_t d = 0; d < wide; d += kLanes)
      store(to + d, i < count && d < size ? part_of_up_to<S>(row + 4 * d, i % w, size - d) : vfloat{});
  }
}

// One key head's row: keys a word apart by 16, values by w.
template <typename T, typename S>
ENGINE_INLINE void write_head(const T* k, const T* v, int64_t size, int64_t slot, S* k_page, S* v_page) {
  constexpr int w = kOfWord<S>;
  constexpr int64_t kPart = 64;  // channels converted together
  S keys[kPart], values[kPart];
  S* const value = v_page + slot / w * size * w + slot % w;
  for (int64_t first = 0; first < size; first += kPart) {
    const int64_t count = size - first < kPart ? size - first : kPart;
    for (int64_t d = 0; d < count; d += kLanes) {
      store_up_to(keys + d, load_up_to(k + first + d, count - d), count - d);
      store_up_to(values + d, load_up_to(v + first + d, count - d), count - d);
    }
    for (int64_t d = 0; d < count; d += w) std::memcpy(k_page + ((first + d) / w * kPage + slot) * w, keys + d, 4);
    for (int64_t d = 0; d < count; ++d) value[(first + d) * w] = values[d];
  }
}

}  // namespace engine::ENGINE_CLASS
