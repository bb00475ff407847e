/* cpuid.c: which of the compiled instruction sets this processor runs. */

#if defined(__x86_64__)
#include <cpuid.h>
#endif

int runs_avx512(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma");
#else
    return 0;
#endif
}

int runs_avx512_bf16(void) {
#if defined(__x86_64__)
    unsigned a, b, c, d; /* leaf 7, subleaf 1, bit 5 of EAX; older compilers do not know its name */
    return runs_avx512() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
#else
    return 0;
#endif
}

int runs_avx2(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); /* every AVX2 processor has F16C */
#else
    return 0;
#endif
}
