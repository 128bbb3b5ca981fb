// The class of CPU in use, and how a kernel that is compiled once a class is declared and picked.
//
// An op's file has two halves. With ENGINE_CLASS defined (setup.py compiles it once a class, with that class's
// flags) it holds the loops, in namespace engine::ENGINE_CLASS, on raw pointers: no ATen and no standard templates,
// since an inline function that the linker merges across classes would run one class's instructions on another.
// Without ENGINE_CLASS it holds the checks, the threads and the registration.
#pragma once

namespace engine {

enum class CpuClass : int { plain = 0, avx2 = 1, avx512 = 2, amx = 3 };

CpuClass detected_class();  // the best this machine can run
CpuClass current_class();   // the one in use: the detected one, or a lower one that was asked for
void set_current_class(CpuClass wanted);
const char* class_name(CpuClass cpu_class);

}  // namespace engine

// ENGINE_TILED_KERNEL: class amx has loops of its own, on tiles. Of ENGINE_KERNEL's it runs those of avx512: nothing else
// tells the two apart.
#if defined(__x86_64__)
#define ENGINE_KERNEL(ret, name, args)             \
  namespace engine::plain { ret name args; }       \
  namespace engine::avx2 { ret name args; }        \
  namespace engine::avx512 { ret name args; }      \
  namespace engine {                               \
  inline auto pick_##name() {                      \
    switch (current_class()) {                     \
      case CpuClass::amx:                          \
      case CpuClass::avx512: return &avx512::name; \
      case CpuClass::avx2: return &avx2::name;     \
      default: return &plain::name;                \
    }                                              \
  }                                                \
  }
#define ENGINE_TILED_KERNEL(ret, name, args)       \
  namespace engine::plain { ret name args; }       \
  namespace engine::avx2 { ret name args; }        \
  namespace engine::avx512 { ret name args; }      \
  namespace engine::amx { ret name args; }         \
  namespace engine {                               \
  inline auto pick_##name() {                      \
    switch (current_class()) {                     \
      case CpuClass::amx: return &amx::name;       \
      case CpuClass::avx512: return &avx512::name; \
      case CpuClass::avx2: return &avx2::name;     \
      default: return &plain::name;                \
    }                                              \
  }                                                \
  }
#else
#define ENGINE_KERNEL(ret, name, args)       \
  namespace engine::plain { ret name args; } \
  namespace engine {                         \
  inline auto pick_##name() { return &plain::name; } \
  }
#define ENGINE_TILED_KERNEL ENGINE_KERNEL
#endif
