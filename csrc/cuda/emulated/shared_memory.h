// Shared memory of the emulated block, watched.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define EMULATED_ASAN 1
#else
#define EMULATED_ASAN 0
#endif

namespace emulated {

// Shared memory of a block: each array between guard bytes, filled with 0xCD when the block starts.
class SharedMemory {
 public:
  static constexpr size_t kGuard = 64, kLimit = size_t{227} << 10;
  static constexpr unsigned char kGuardByte = 0xA5, kPoison = 0xCD;

  // The array of this name; made by the first thread of the block that comes to it.
  void* array(const std::string& name, size_t bytes) {
    for (const Array& each : arrays_)
      if (each.name == name) return each.data();
    const size_t padded = (bytes + 15) / 16 * 16;  // what lies behind the last byte is guarded from there on
    Array made{name, bytes, std::unique_ptr<unsigned char[]>(new unsigned char[padded + 2 * kGuard + 16])};
    made.begin = made.memory.get() + (16 - reinterpret_cast<uintptr_t>(made.memory.get()) % 16) % 16;
    std::memset(made.begin, kGuardByte, padded + 2 * kGuard);
    std::memset(made.data(), kPoison, bytes);
    made.size = padded + 2 * kGuard;
    made.watch(true);
    arrays_.push_back(std::move(made));
    return arrays_.back().data();
  }

  size_t bytes() const {
    size_t total = 0;
    for (const Array& each : arrays_) total += each.bytes;
    return total;
  }

  // The name of an array whose guard bytes were written, or nothing. Forgets all arrays.
  std::string end_block() {
    std::string broken;
    for (Array& each : arrays_) {
      each.watch(false);
      const unsigned char *data = static_cast<unsigned char*>(each.data()), *end = each.begin + each.size;
      for (const unsigned char* p = each.begin; p < end; ++p)
        if ((p < data || p >= data + each.bytes) && *p != kGuardByte) broken = each.name;
    }
    arrays_.clear();
    return broken;
  }

 private:
  struct Array {
    std::string name;
    size_t bytes;
    std::unique_ptr<unsigned char[]> memory;
    unsigned char* begin = nullptr;
    size_t size = 0;
    void* data() const { return begin + kGuard; }
    void watch([[maybe_unused]] bool on) const {
#if EMULATED_ASAN
      unsigned char* after = static_cast<unsigned char*>(data()) + bytes;
      const size_t rest = static_cast<size_t>(begin + size - after);
      on ? __asan_poison_memory_region(begin, kGuard) : __asan_unpoison_memory_region(begin, kGuard);
      on ? __asan_poison_memory_region(after, rest) : __asan_unpoison_memory_region(after, rest);
#endif
    }
  };
  std::vector<Array> arrays_;
};

}  // namespace emulated
