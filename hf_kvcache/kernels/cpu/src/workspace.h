// Memory for partial results that a thread keeps from call to call: what is freed may go back to the system, and every page
// of what comes from there costs a fault.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace {

constexpr size_t kMostKept = 64 << 20;  // larger pieces are given back

struct Kept {
    char* memory = nullptr;
    size_t bytes = 0;
    ~Kept() { std::free(memory); }
};

inline Kept& kept_memory() {
    static thread_local Kept kept;
    return kept;
}

// Room for a call, aligned to a cache line; one at a time in a thread.
class Workspace {
public:
    explicit Workspace(size_t bytes) {
        Kept& kept = kept_memory();
        bytes += kLine;
        if (kept.bytes < bytes) {
            std::free(kept.memory);
            kept.memory = (char*)std::malloc(bytes);
            kept.bytes = kept.memory ? bytes : 0;
        }
        at_ = kept.memory ? (char*)(((uintptr_t)kept.memory + kLine - 1) & ~(uintptr_t)(kLine - 1)) : nullptr;
    }
    ~Workspace() {
        Kept& kept = kept_memory();
        if (kept.bytes <= kMostKept) return;
        std::free(kept.memory);
        kept.memory = nullptr, kept.bytes = 0;
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
