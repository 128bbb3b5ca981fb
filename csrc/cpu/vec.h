// Vectors of one class: GCC/Clang vector extensions, so that one source serves every width. Only for files compiled
// with ENGINE_CLASS. Everything lies in the class's own namespace (see dispatch.h).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

// The width follows from the flags. Given on the command line, without the flags, it makes the class of that width from
// the compiler's own vectors, and ENGINE_TILES the tiles' from a stand-in: tests then run what the machine cannot.
#if defined(ENGINE_LANES)
#elif defined(__AVX512F__)
#define ENGINE_LANES 16
#elif defined(__AVX2__)
#define ENGINE_LANES 8
#else
#define ENGINE_LANES 4
#endif

#if defined(__AMX_BF16__)
#define ENGINE_TILES
#elif defined(ENGINE_TILES)
#include "tiles_emulated.h"
#endif

#define ENGINE_INLINE static inline __attribute__((always_inline))

namespace engine::ENGINE_CLASS {

constexpr int kLanes = ENGINE_LANES;
typedef float vfloat __attribute__((vector_size(4 * ENGINE_LANES)));
typedef int32_t vint __attribute__((vector_size(4 * ENGINE_LANES)));
typedef uint32_t vuint __attribute__((vector_size(4 * ENGINE_LANES)));
typedef uint16_t vbits16 __attribute__((vector_size(2 * ENGINE_LANES)));
// (vfloat)bits keeps the bits: a cast between vectors of one size. Through a reference it would break aliasing.

constexpr float kInf = __builtin_inff();

ENGINE_INLINE vfloat load(const float* p) {
  vfloat v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
ENGINE_INLINE void store(float* p, vfloat v) { std::memcpy(p, &v, sizeof(v)); }
ENGINE_INLINE vfloat splat(float x) { return x - vfloat{}; }
ENGINE_INLINE vfloat vmax(vfloat a, vfloat b) { return a > b ? a : b; }
ENGINE_INLINE vfloat vmin(vfloat a, vfloat b) { return a < b ? a : b; }

// The first n lanes from memory, the rest `fill`.
ENGINE_INLINE vfloat load_part(const float* p, int64_t n, float fill) {
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = i < n ? p[i] : fill;
  return load(lanes);
}
ENGINE_INLINE void store_part(float* p, vfloat v, int64_t n) {
  float lanes[kLanes];
  store(lanes, v);
  for (int i = 0; i < kLanes && i < n; ++i) p[i] = lanes[i];
}

// bfloat16 is the upper half of a float32. Rounding is to nearest even; NaN stays NaN.
ENGINE_INLINE float from_bf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}
ENGINE_INLINE uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
// Halves of words to words and back: one instruction each, where __builtin_convertvector makes five of two halves.
ENGINE_INLINE vuint widen(const uint16_t* p) {
#if defined(__AVX512F__)
  return (vuint)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return (vuint)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vbits16 half;
  std::memcpy(&half, p, sizeof(half));
  return __builtin_convertvector(half, vuint);
#endif
}
ENGINE_INLINE void narrow(uint16_t* p, vuint words) {  // the high halves are 0
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16((__m512i)words));
#elif defined(__AVX2__)
  const __m256i halves = _mm256_packus_epi32((__m256i)words, (__m256i)words);  // each twice, by quarters
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(_mm256_permute4x64_epi64(halves, 0x08)));
#else
  const vbits16 half = __builtin_convertvector(words, vbits16);
  std::memcpy(p, &half, sizeof(half));
#endif
}

// Past the caches, for what is written once and read long after: an ordinary store reads the line first. Where the
// address is not a multiple of the size, an ordinary one. stream_fence() before another thread reads it.
ENGINE_INLINE void stream(void* p, vuint v) {
#if defined(__AVX512F__)
  if (reinterpret_cast<uintptr_t>(p) % 64 == 0) return _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)v);
#elif defined(__AVX2__)
  if (reinterpret_cast<uintptr_t>(p) % 32 == 0) return _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)v);
#endif
  std::memcpy(p, &v, sizeof(v));
}
ENGINE_INLINE void stream(float* p, vfloat v) { stream(static_cast<void*>(p), (vuint)v); }
ENGINE_INLINE void stream_fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

ENGINE_INLINE vfloat load(const uint16_t* p) {
  const vuint wide = widen(p) << 16;
  return (vfloat)wide;
}
ENGINE_INLINE void store(uint16_t* p, vfloat v) {
  const vuint bits = (vuint)v;
  const vuint rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const vuint quiet = vuint{} + 0x7fc0;
  narrow(p, v == v ? rounded : quiet);
}
ENGINE_INLINE void stream(uint16_t* p, vfloat v) {
  uint16_t rounded[kLanes];
  store(rounded, v);
#if defined(__AVX512F__)
  if (reinterpret_cast<uintptr_t>(p) % 32 == 0)
    return _mm256_stream_si256(reinterpret_cast<__m256i*>(p),
                               _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rounded)));
#elif defined(__AVX2__)
  if (reinterpret_cast<uintptr_t>(p) % 16 == 0)
    return _mm_stream_si128(reinterpret_cast<__m128i*>(p), _mm_loadu_si128(reinterpret_cast<const __m128i*>(rounded)));
#endif
  std::memcpy(p, rounded, sizeof(rounded));
}
ENGINE_INLINE vfloat load_part(const uint16_t* p, int64_t n, float fill) {
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = i < n ? from_bf16(p[i]) : fill;
  return load(lanes);
}
ENGINE_INLINE void store_part(uint16_t* p, vfloat v, int64_t n) {
  float lanes[kLanes];
  store(lanes, v);
  for (int i = 0; i < kLanes && i < n; ++i) p[i] = to_bf16(lanes[i]);
}

// Horizontal results, always in the same order (a tree over the lanes).
ENGINE_INLINE float hsum(vfloat v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}
ENGINE_INLINE float hmax(vfloat v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
  return lanes[0];
}

// e^x: x = n ln 2 + r, |r| <= ln 2 / 2, degree-6 polynomial (Cephes expf), then the exponent. exp(0) = 1 and
// exp(-inf) = 0 exactly; below -87.33 the result is 0, above 88.72 it is inf; NaN stays NaN.
ENGINE_INLINE vfloat vexp(vfloat x) {
  const vfloat low = splat(-87.33654f), high = splat(88.72283f);
  const vfloat inside = vmin(vmax(x, low), high);
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const vfloat n = (inside * 1.44269504088896341f + magic) - magic;
  const vfloat r = (inside - n * 0.693359375f) - n * -2.12194440e-4f;
  vfloat p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r) * r + r + 1.0f;
  // 2^n in two steps: n = 128 has no float of its own.
  const vint whole = __builtin_convertvector(n, vint);
  const vint half = whole >> 1;
  const vint scale1 = (half + 127) << 23, scale2 = (whole - half + 127) << 23;
  vfloat y = p * (vfloat)scale1 * (vfloat)scale2;
  y = x < low ? splat(0.0f) : y;
  y = x > high ? splat(kInf) : y;
  return x == x ? y : x;
}

}  // namespace engine::ENGINE_CLASS
