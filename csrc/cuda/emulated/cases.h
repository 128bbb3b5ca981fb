// What the drivers in this folder share: cases read from a file, results written to one, arrays between guards.
//
// A file is a sequence of records: int64 count of bytes, then the bytes. Python's side is tests/cuda/emulation.py.
#pragma once

#include <cstdio>
#include <string>
#include <vector>

#include "cuda_on_cpu.h"

namespace emulated {

class Reader {
 public:
  explicit Reader(const char* path) : file_(std::fopen(path, "rb")) {
    if (file_ == nullptr) stop("cannot be opened: ", path);
  }
  ~Reader() { std::fclose(file_); }

  bool at_end() {
    const int next = std::fgetc(file_);
    if (next != EOF) std::ungetc(next, file_);
    return next == EOF;
  }

  template <class T>
  std::vector<T> array() {
    int64_t bytes = 0;
    const bool read_size = std::fread(&bytes, sizeof bytes, 1, file_) == 1;
    if (!read_size || bytes % static_cast<int64_t>(sizeof(T)) != 0) stop("bad record", "");
    std::vector<T> read(static_cast<size_t>(bytes) / sizeof(T));
    if (bytes != 0 && std::fread(read.data(), 1, static_cast<size_t>(bytes), file_) != static_cast<size_t>(bytes))
      stop("record cut short", "");
    return read;
  }

 private:
  std::FILE* file_;
  [[noreturn]] static void stop(const char* what, const char* path) {
    std::fprintf(stderr, "cases: %s%s\n", what, path);
    std::exit(2);
  }
};

// count values between guard bands. Fresh memory is NaN in float32 and float64 and a wild number as an integer.
template <class T>
class Guarded {
 public:
  static constexpr size_t kGuard = 256;

  explicit Guarded(size_t count) : bytes_(count * sizeof(T)), memory_(bytes_ + 2 * kGuard, 0xA5) {
    std::memset(memory_.data() + kGuard, 0xFF, bytes_);
    watch(true);
  }
  explicit Guarded(const std::vector<T>& values) : Guarded(values.size()) {
    if (!values.empty()) std::memcpy(data(), values.data(), bytes_);
    given_.assign(memory_.begin() + kGuard, memory_.begin() + static_cast<long>(kGuard + bytes_));
    constant_ = true;
  }
  ~Guarded() { check("at its end"); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  T* data() { return reinterpret_cast<T*>(memory_.data() + kGuard); }

  // Ends the process if a guard, or an input, was written. Afterwards the guards are no longer watched.
  void check(const char* name) {
    watch(false);
    for (size_t i = 0; i < memory_.size(); ++i)
      if ((i < kGuard || i >= kGuard + bytes_) && memory_[i] != 0xA5) machine().fail("wrote outside of %s", name);
    if (constant_ && bytes_ != 0 && std::memcmp(given_.data(), memory_.data() + kGuard, bytes_) != 0)
      machine().fail("wrote its input %s", name);
  }

  void write(std::FILE* file) {
    const auto bytes = static_cast<int64_t>(bytes_);
    std::fwrite(&bytes, sizeof bytes, 1, file);
    std::fwrite(data(), 1, bytes_, file);
  }

 private:
  size_t bytes_;
  std::vector<unsigned char> memory_, given_;
  bool constant_ = false;

  void watch([[maybe_unused]] bool on) {
#if EMULATED_ASAN
    unsigned char *begin = memory_.data(), *after = begin + kGuard + bytes_;
    on ? __asan_poison_memory_region(begin, kGuard) : __asan_unpoison_memory_region(begin, kGuard);
    on ? __asan_poison_memory_region(after, kGuard) : __asan_unpoison_memory_region(after, kGuard);
#endif
  }
};

// Each case starts with the machine's own numbers: order (0 forward, 1 reverse, 2 random), seed, threads a block.
inline unsigned set_machine(Reader& reader) {
  const std::vector<int64_t> numbers = reader.array<int64_t>();
  machine().order = static_cast<Order>(numbers.at(0));
  machine().seed = static_cast<uint64_t>(numbers.at(1));
  return static_cast<unsigned>(numbers.at(2));
}

}  // namespace emulated
