/* Reads memory as fast as it comes: every line is touched, two streams for each thread,
   prefetched across the ends of pages. Compiled by bench/cpu_peers.py. */

#include <immintrin.h>
#include <stdint.h>

int64_t read_all(const char *from, int64_t bytes, int threads) {
  int64_t total = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : total) schedule(static)
  for (int64_t part = 0; part < bytes / (1 << 17); ++part) {
    const char *a = from + part * (1 << 17), *b = a + (1 << 16);
    __m256i sum = _mm256_setzero_si256();
    for (int i = 0; i < 1 << 16; i += 64) {
      _mm_prefetch(a + i + 2048, _MM_HINT_T0);
      _mm_prefetch(b + i + 2048, _MM_HINT_T0);
      sum = _mm256_add_epi64(sum, _mm256_load_si256((const __m256i *)(a + i)));
      sum = _mm256_add_epi64(sum, _mm256_load_si256((const __m256i *)(a + i + 32)));
      sum = _mm256_add_epi64(sum, _mm256_load_si256((const __m256i *)(b + i)));
      sum = _mm256_add_epi64(sum, _mm256_load_si256((const __m256i *)(b + i + 32)));
    }
    total += _mm256_extract_epi64(sum, 0) + _mm256_extract_epi64(sum, 1) +
             _mm256_extract_epi64(sum, 2) + _mm256_extract_epi64(sum, 3);
  }
  return total;
}
