// Chooses the instruction set for the CPU at hand when the library is loaded, and exports the C interface (api.h). Each call
// goes to the functions that kernels.inc defines for that instruction set.
#include <cstring>

#include "api.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#define HFKV_DECLARE(isa)                                                                                          \
    int hfkv_attend_##isa(const HfkvAttend*);                                                                      \
    int hfkv_latent_attend_##isa(const HfkvLatent*);                                                               \
    int hfkv_project_##isa(const HfkvProject*);                                                                    \
    int hfkv_latent_step_##isa(const HfkvLatentStep*);                                                             \
    int hfkv_attend_picked_##isa(const HfkvLatentPicked*);                                                        \
    void hfkv_decode_side_##isa(const HfkvLayout*, int, const int64_t*, int64_t, float*, int);                     \
    int hfkv_encode_##isa(const HfkvEncode*);                                                                      \
    int hfkv_key_mean_##isa(const HfkvKeyMean*);                                                                   \
    int hfkv_key_scale_##isa(const HfkvKeyScale*);                                                                 \
    int hfkv_choose_##isa(const HfkvChoose*);

#define HFKV_KERNELS(isa)                                                                             \
    hfkv_attend_##isa, hfkv_latent_attend_##isa, hfkv_project_##isa, hfkv_latent_step_##isa,         \
        hfkv_attend_picked_##isa, hfkv_decode_side_##isa, hfkv_encode_##isa, hfkv_key_mean_##isa,       \
        hfkv_key_scale_##isa, hfkv_choose_##isa

// build.py defines HFKV_WITH_<unit> for each unit kernels_<unit>.cpp that it compiles.
HFKV_DECLARE(portable)
HFKV_DECLARE(avx2)
HFKV_DECLARE(vnni)
HFKV_DECLARE(amx)
HFKV_DECLARE(dotprod)
HFKV_DECLARE(i8mm)

namespace {

struct Isa {
    const char* name;
    bool available;
    int (*attend)(const HfkvAttend*);
    int (*latent_attend)(const HfkvLatent*);
    int (*project)(const HfkvProject*);
    int (*latent_step)(const HfkvLatentStep*);
    int (*attend_picked)(const HfkvLatentPicked*);
    void (*decode_side)(const HfkvLayout*, int, const int64_t*, int64_t, float*, int);
    int (*encode)(const HfkvEncode*);
    int (*key_mean)(const HfkvKeyMean*);
    int (*key_scale)(const HfkvKeyScale*);
    int (*choose)(const HfkvChoose*);
};

#if defined(HFKV_WITH_AVX2)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }
#endif

#if defined(HFKV_WITH_VNNI) || defined(HFKV_WITH_AMX)
bool has_vnni() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
           __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
}
#endif

#if defined(HFKV_WITH_AMX)
// Linux gives the 8 KiB of state of the tiles only to processes that ask for them.
bool has_amx() {
#if defined(__linux__)
    constexpr unsigned kTile = 1u << 24, kInt8 = 1u << 25, kBFloat16 = 1u << 22;
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    unsigned a, b, c, d;
    if (!has_vnni() || !__builtin_cpu_supports("avx512vbmi") || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    return (d & kTile) && (d & kInt8) && (d & kBFloat16) && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}
#endif

#if defined(__aarch64__) && defined(__APPLE__)
bool has_feature(const char* name) {
    int there = 0;
    size_t size = sizeof there;
    return sysctlbyname(name, &there, &size, nullptr, 0) == 0 && there;
}
bool has_dotprod() { return has_feature("hw.optional.arm.FEAT_DotProd"); }
bool has_i8mm() { return has_dotprod() && has_feature("hw.optional.arm.FEAT_I8MM"); }
#elif defined(__aarch64__) && defined(__linux__)
// The numbers of HWCAP_ASIMDDP and HWCAP2_I8MM, which old headers lack.
bool has_dotprod() { return getauxval(AT_HWCAP) >> 20 & 1; }
bool has_i8mm() { return has_dotprod() && (getauxval(AT_HWCAP2) >> 13 & 1); }
#elif defined(__aarch64__)
bool has_dotprod() { return false; }
bool has_i8mm() { return false; }
#endif

// Best first.
const Isa kIsas[] = {
#if defined(HFKV_WITH_AMX)
    {"avx512-amx", has_amx(), HFKV_KERNELS(amx)},
#endif
#if defined(HFKV_WITH_VNNI)
    {"avx512-vnni", has_vnni(), HFKV_KERNELS(vnni)},
#endif
#if defined(HFKV_WITH_AVX2)
    {"avx2", has_avx2(), HFKV_KERNELS(avx2)},
#endif
#if defined(HFKV_WITH_I8MM)
    {"neon-i8mm", has_i8mm(), HFKV_KERNELS(i8mm)},
#endif
#if defined(HFKV_WITH_DOTPROD)
    {"neon-dotprod", has_dotprod(), HFKV_KERNELS(dotprod)},
#endif
    {"portable", true, HFKV_KERNELS(portable)},
};

const Isa* best() {
    for (const Isa& isa : kIsas)
        if (isa.available) return &isa;
    return nullptr;  // never: the last one is always there
}

const Isa* current = best();

}  // namespace

extern "C" {

int32_t hfkv_abi_version() { return HFKV_ABI_VERSION; }

const char* hfkv_isa() { return current->name; }

int32_t hfkv_set_isa(const char* name) {
    for (const Isa& isa : kIsas)
        if (isa.available && std::strcmp(isa.name, name) == 0) {
            current = &isa;
            return 0;
        }
    return 1;
}

int32_t hfkv_attend(const HfkvAttend* call) { return current->attend(call); }

int32_t hfkv_latent_attend(const HfkvLatent* call) { return current->latent_attend(call); }

int32_t hfkv_project(const HfkvProject* call) { return current->project(call); }

int32_t hfkv_latent_step(const HfkvLatentStep* call) { return current->latent_step(call); }

int32_t hfkv_attend_picked(const HfkvLatentPicked* call) { return current->attend_picked(call); }

void hfkv_decode_side(const HfkvLayout* layout, int32_t values, const int64_t* addresses, int64_t n, float* out, int32_t threads) {
    current->decode_side(layout, values, addresses, n, out, threads);
}

int32_t hfkv_encode(const HfkvEncode* call) { return current->encode(call); }

int32_t hfkv_key_mean(const HfkvKeyMean* call) { return current->key_mean(call); }

int32_t hfkv_key_scale(const HfkvKeyScale* call) { return current->key_scale(call); }

int32_t hfkv_choose(const HfkvChoose* call) { return current->choose(call); }
}
