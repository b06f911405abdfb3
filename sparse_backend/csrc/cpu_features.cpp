#include "cpu_features.h"

#include <atomic>
#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace sparse_backend {
namespace {

#if defined(__x86_64__)
struct Registers {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  Registers r;
  if (!__get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx)) r = Registers();
  return r;
}

uint64_t read_xcr0() {
  uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

bool bit(uint32_t word, int index) { return (word >> index) & 1U; }

CpuFeatures detect() {
  CpuFeatures f;
  const Registers leaf1 = cpuid(1, 0);
  const bool osxsave = bit(leaf1.ecx, 27);
  const bool avx = bit(leaf1.ecx, 28);
  if (!osxsave || !avx) return f;

  const uint64_t xcr0 = read_xcr0();
  const bool os_ymm = (xcr0 & 0x6) == 0x6;              // SSE and AVX state
  const bool os_zmm = os_ymm && (xcr0 & 0xE0) == 0xE0;  // opmask, ZMM_Hi256, Hi16_ZMM
  const bool os_tile = (xcr0 & 0x60000) == 0x60000;     // XTILECFG, XTILEDATA

  const bool fma = bit(leaf1.ecx, 12), f16c = bit(leaf1.ecx, 29), popcnt = bit(leaf1.ecx, 23);
  const Registers leaf7 = cpuid(7, 0);
  const Registers leaf7_1 = leaf7.eax >= 1 ? cpuid(7, 1) : Registers();

  f.avx2 = os_ymm && fma && f16c && popcnt && bit(leaf7.ebx, 5);
  f.avx_vnni = f.avx2 && bit(leaf7_1.eax, 4);
  const bool avx512_base =
      bit(leaf7.ebx, 16) && bit(leaf7.ebx, 17) && bit(leaf7.ebx, 30) && bit(leaf7.ebx, 31);  // F, DQ, BW, VL
  const bool byte_shuffles = bit(leaf7.ecx, 1) && bit(leaf7.ecx, 6);                         // VBMI, VBMI2
  f.avx512 = f.avx2 && os_zmm && avx512_base && byte_shuffles && bit(leaf7.ecx, 11);
  f.avx512_vnni = f.avx512;
  f.avx512_bf16 = f.avx512 && bit(leaf7_1.eax, 5);
  const bool amx_tile = os_tile && bit(leaf7.edx, 24);
  f.amx_bf16 = amx_tile && bit(leaf7.edx, 22);
  f.amx_int8 = amx_tile && bit(leaf7.edx, 25);
  return f;
}
#else
CpuFeatures detect() { return CpuFeatures(); }
#endif

std::atomic<int>& active_level() {
  static std::atomic<int> level{static_cast<int>(best_isa())};
  return level;
}

bool made_by_amd() {
#if defined(__x86_64__)
  constexpr uint32_t kAuthenticAmd = 0x68747541;  // "Auth"
  return cpuid(0, 0).ebx == kAuthenticAmd;
#else
  return false;
#endif
}

// Asks Linux for the tile state.
bool tiles_granted() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}

std::atomic<bool>& one_stream() {
  static std::atomic<bool> one{made_by_amd()};
  return one;
}

}  // namespace

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = detect();
  return features;
}

bool reads_one_stream() { return one_stream().load(std::memory_order_relaxed); }
void set_reads_one_stream(bool one) { one_stream().store(one, std::memory_order_relaxed); }

Isa best_isa() {
  const CpuFeatures& f = cpu_features();
  if (f.avx512_bf16 && f.amx_bf16 && f.amx_int8 && tiles_granted()) return Isa::kAmx;
  if (f.avx512) return Isa::kAvx512;
  if (f.avx2) return Isa::kAvx2;
  return Isa::kScalar;
}

Isa active_isa() { return static_cast<Isa>(active_level().load(std::memory_order_relaxed)); }

bool set_isa(Isa isa) {
  if (isa > best_isa() || isa < Isa::kScalar) return false;
  active_level().store(static_cast<int>(isa), std::memory_order_relaxed);
  return true;
}

}  // namespace sparse_backend
