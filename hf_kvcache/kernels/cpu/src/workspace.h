// Memory for the partial results of a call, which each thread reuses from call to call. attention.h, latent_attention.h,
// latent_projection.h and encode.h allocate by it: freed memory may go back to the system, and every page of new memory costs a
// page fault.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace {

constexpr size_t kMostReused = 64 << 20;  // more than this is freed after the call

struct ThreadMemory {
    char* memory = nullptr;
    size_t bytes = 0;
    ~ThreadMemory() { std::free(memory); }
};

inline ThreadMemory& thread_memory() {
    static thread_local ThreadMemory own;
    return own;
}

// Room for a call, aligned to a cache line; one at a time in a thread.
class Workspace {
public:
    explicit Workspace(size_t bytes) {
        ThreadMemory& own = thread_memory();
        bytes += kLine;
        if (own.bytes < bytes) {
            std::free(own.memory);
            own.memory = (char*)std::malloc(bytes);
            own.bytes = own.memory ? bytes : 0;
        }
        at_ = own.memory ? (char*)(((uintptr_t)own.memory + kLine - 1) & ~(uintptr_t)(kLine - 1)) : nullptr;
    }
    ~Workspace() {
        ThreadMemory& own = thread_memory();
        if (own.bytes <= kMostReused) return;
        std::free(own.memory);
        own.memory = nullptr, own.bytes = 0;
    }
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;

    // Null if memory ran out.
    char* at() const { return at_; }

private:
    static constexpr size_t kLine = 64;
    char* at_;
};

}  // namespace
