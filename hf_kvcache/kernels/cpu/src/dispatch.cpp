// Chooses the instruction set for the CPU at hand when the library is loaded, and exports the C interface (api.h). Each call
// goes to the functions that kernels.inc defines for that instruction set.
#include <cstring>

#include "api.h"

#if defined(HFKV_X86)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#define HFKV_DECLARE(isa)                                                                                          \
    int hfkv_attend_##isa(const HfkvAttend*);                                                                      \
    int hfkv_latent_attend_##isa(const HfkvLatent*);                                                               \
    int hfkv_project_##isa(const HfkvProject*);                                                                    \
    int hfkv_latent_step_##isa(const HfkvLatentStep*);                                                             \
    int hfkv_attend_picked_##isa(const HfkvLatentPicked*);                                                        \
    void hfkv_decode_side_##isa(const HfkvLayout*, int, const int64_t*, int64_t, float*, int);                     \
    int hfkv_encode_##isa(const HfkvEncode*);                                                                      \
    int hfkv_choose_##isa(const HfkvChoose*);

#define HFKV_KERNELS(isa)                                                                             \
    hfkv_attend_##isa, hfkv_latent_attend_##isa, hfkv_project_##isa, hfkv_latent_step_##isa,         \
        hfkv_attend_picked_##isa, hfkv_decode_side_##isa, hfkv_encode_##isa, hfkv_choose_##isa

HFKV_DECLARE(portable)
#if defined(HFKV_X86)
HFKV_DECLARE(avx2)
HFKV_DECLARE(avx512)
HFKV_DECLARE(vnni)
HFKV_DECLARE(amx)
#endif

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
    int (*choose)(const HfkvChoose*);
};

#if defined(HFKV_X86)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }

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

// Best first.
const Isa kIsas[] = {
#if defined(HFKV_X86)
    {"avx512-amx", has_amx(), HFKV_KERNELS(amx)},
    {"avx512-vnni", has_vnni(), HFKV_KERNELS(vnni)},
    {"avx512", has_avx512(), HFKV_KERNELS(avx512)},
    {"avx2", has_avx2(), HFKV_KERNELS(avx2)},
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

int32_t hfkv_choose(const HfkvChoose* call) { return current->choose(call); }
}
