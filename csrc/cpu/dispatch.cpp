// Which class of CPU this is, which one is in use, and the Python module's few functions.
#include "dispatch.h"

#include <c10/util/Exception.h>
#include <pybind11/pybind11.h>

#include <atomic>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace engine {
namespace {

#if defined(__x86_64__)
// The kernel hands out the AMX tile state on request (Linux 5.16): ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA.
bool request_amx_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

bool has_amx_bf16() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool tile = (d >> 24) & 1, bf16 = (d >> 22) & 1;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d)) return false;
  const bool avx512_bf16 = (a >> 5) & 1;
  return tile && bf16 && avx512_bf16;
}
#endif

CpuClass detect() {
#if defined(ENGINE_EVERY_CLASS)  // all were compiled for this machine: tests/checked_build.py
  return CpuClass::amx;
#elif defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && has_amx_bf16() && request_amx_tiles()) return CpuClass::amx;
  if (avx512) return CpuClass::avx512;
  if (avx2) return CpuClass::avx2;
#endif
  return CpuClass::plain;
}

std::atomic<int>& current() {
  static std::atomic<int> value{static_cast<int>(detected_class())};
  return value;
}

CpuClass class_from_name(const std::string& name) {
  for (int i = 0; i <= static_cast<int>(CpuClass::amx); ++i)
    if (name == class_name(static_cast<CpuClass>(i))) return static_cast<CpuClass>(i);
  TORCH_CHECK_VALUE(false, "cpu_class: got '", name, "', want one of plain, avx2, avx512, amx");
}

}  // namespace

CpuClass detected_class() {
  static const CpuClass value = detect();
  return value;
}

CpuClass current_class() { return static_cast<CpuClass>(current().load(std::memory_order_relaxed)); }

void set_current_class(CpuClass wanted) {
  TORCH_CHECK_VALUE(wanted <= detected_class(), "cpu_class: got '", class_name(wanted), "', this machine runs '",
                    class_name(detected_class()), "' and the classes below it");
  current().store(static_cast<int>(wanted), std::memory_order_relaxed);
}

const char* class_name(CpuClass cpu_class) {
  constexpr const char* kNames[] = {"plain", "avx2", "avx512", "amx"};
  return kNames[static_cast<int>(cpu_class)];
}

}  // namespace engine

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace engine;
  m.doc() = "The C++ kernels of the engine; importing it registers them with torch.ops.engine.";
  m.def("detected_class", [] { return std::string(class_name(detected_class())); });
  m.def("cpu_class", [] { return std::string(class_name(current_class())); });
  m.def("set_cpu_class", [](const std::string& name) { set_current_class(class_from_name(name)); });
}
