// Tensor-core products of 8-bit integers: one wrapper per instruction, its plain equivalent beside it.
//
// A warp multiplies A [16, 32] by Bᵀ, B [8, 32], both int8, and adds to C [16, 8], int32 (m16n8k32, from sm_80 on).
// Sums wrap modulo 2³²; they are exact while they fit. Which element a lane holds, with g = lane / 4 and t = lane % 4:
//   A: a[0] row g     columns 4t…4t+3    a[2] row g     columns 16+4t…16+4t+3
//      a[1] row g + 8 columns 4t…4t+3    a[3] row g + 8 columns 16+4t…16+4t+3     (four bytes each, lowest column
//      first)
//   B: b[0] row g     columns 4t…4t+3    b[1] row g     columns 16+4t…16+4t+3
//   C: c[0], c[1] row g columns 2t, 2t+1; c[2], c[3] row g + 8 columns 2t, 2t+1
#pragma once

#include "simt/simt.h"

namespace simt {

// Loads four 8 × 16-byte matrices from shared memory. Lane i gives the address of row i % 8 of matrix i / 8, aligned to
// 16 bytes; it receives, of each matrix, bytes 4(i % 4)…4(i % 4)+3 of row i / 4. That is the layout of A and B above.
__device__ __forceinline__ void load_matrix_x4(std::uint32_t (&parts)[4], const void* row) {
#ifdef __CUDACC__
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(parts[0]), "=r"(parts[1]), "=r"(parts[2]), "=r"(parts[3])
               : "r"(address)
               : "memory");
#else
  if (reinterpret_cast<std::uintptr_t>(row) % 16 != 0) fail("load_matrix_x4: a row is not aligned to 16 bytes");
  const Slot* slots = exchange(Collective::matrix_load, row);
  for (int matrix = 0; matrix < 4; ++matrix) {
    const void* source = peek<const void*>(slots, 8 * matrix + lane().number / 4);
    parts[matrix] = static_cast<const std::uint32_t*>(source)[lane().number % 4];
  }
#endif
}

__device__ __forceinline__ void multiply_add_s8(std::int32_t (&c)[4], const std::uint32_t (&a)[4],
                                                const std::uint32_t b0, const std::uint32_t b1) {
#ifdef __CUDACC__
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  struct Fragments {
    std::uint32_t a[4], b[2];
  };
  const Slot* slots = exchange(Collective::matrix_product, Fragments{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const int g = lane().number / 4, t = lane().number % 4;
  for (int part = 0; part < 4; ++part) {  // columns of A and B in the order in which the lanes 4g…4g+3 hold them
    const Fragments rows = peek<Fragments>(slots, 4 * g + part);
    for (int j = 0; j < 2; ++j) {
      const Fragments columns = peek<Fragments>(slots, 4 * (2 * t + j) + part);
      for (int half = 0; half < 2; ++half) {
        c[j] = __dp4a(static_cast<int>(rows.a[2 * half]), static_cast<int>(columns.b[half]), c[j]);
        c[2 + j] = __dp4a(static_cast<int>(rows.a[2 * half + 1]), static_cast<int>(columns.b[half]), c[2 + j]);
      }
    }
  }
#endif
}

}  // namespace simt
