// What this processor can run, and which kernel level is in use.
//
// A feature counts only when CPUID reports it *and* the operating system saves its
// registers (XCR0): CPUID alone is how wheels die of SIGILL inside virtual machines.
#pragma once

namespace sparse_backend {

// Kernel levels, ordered: a level may be forced down, never up.
enum class Isa : int { kScalar = 0, kAvx2 = 1, kAvx512 = 2, kAmx = 3 };

struct CpuFeatures {
  bool avx2 = false;    // AVX2 with FMA, F16C and POPCNT
  bool avx512 = false;  // AVX-512 F, BW, DQ, VL, VNNI, VBMI and VBMI2: Ice Lake, Zen 4 and later
  bool avx512_bf16 = false;
  bool avx512_vnni = false;  // always with `avx512`: no processor has VBMI2 without it
  bool avx_vnni = false;
  bool amx_bf16 = false;
  bool amx_int8 = false;
};

// Read once; the values cannot change while the process lives.
const CpuFeatures& cpu_features();

// Whether one stream of memory at a time, asked for 8 KB ahead, is as fast as memory gets for a thread: so on
// AMD's processors (Zen 5: one 41 GB/s, four in turn 24); Intel's want several (Ice Lake: one 9.5,
// four 13.2).
bool reads_one_stream();
// For tests: results do not depend on it.
void set_reads_one_stream(bool one);

// The highest level this machine runs: `amx` is AVX-512 with BF16 and tiles of bf16 and int8, for which Linux
// has been asked (a process that never asks is killed at its first tile instruction).
Isa best_isa();

// The level the kernels use now; best_isa() until set_isa() lowers it.
Isa active_isa();

// Returns false, and changes nothing, for a level the machine lacks.
bool set_isa(Isa isa);

}  // namespace sparse_backend
