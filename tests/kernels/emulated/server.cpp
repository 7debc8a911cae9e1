// The emulated side: loads the kernels of another processor and calls them on the memory of the process of the tests.
//
//     server <library> <process of the tests> <names of functions>...
//
// Both processes use the same addresses. Where a kernel touches memory that is not there, the handler below fetches that page
// from the other process; after the call, bytes that have changed are written back and all fetched pages are given up. So a
// kernel may read and write what the tests' own process may, and nothing else.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <csignal>
#include <atomic>
#include <dlfcn.h>
#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>

#include "protocol.h"

namespace {

constexpr size_t kPage = 4096, kMostPages = 1 << 17;

int memory = -1, store_file = -1;  // the memory of the other process; the pages fetched from it
char *store, *snapshot;            // the pages as kernels see them, and as they were fetched
uintptr_t addresses[kMostPages];
uint32_t places[2 * kMostPages];  // hash table of addresses: place + 1, or 0
size_t held = 0;
std::atomic_flag busy = ATOMIC_FLAG_INIT;

[[noreturn]] void give_up(const char* why, uintptr_t address) {
    char text[160];
    const int n = std::snprintf(text, sizeof text, "emulated kernels: %s, address %#zx\n", why, (size_t)address);
    if (write(2, text, (size_t)n) < 0) _exit(2);
    _exit(1);
}

uint32_t& place_of(uintptr_t page) {
    size_t at = page / kPage * 0x9e3779b97f4a7c15u % (2 * kMostPages);
    while (places[at] && addresses[places[at] - 1] != page) at = (at + 1) % (2 * kMostPages);
    return places[at];
}

// A page has to appear with its content, since another thread may be reading it. QEMU maps a file in two steps, with a page of
// zeros between them; so the page can be accessed only afterwards.
void fetch(uintptr_t page) {
    uint32_t& place = place_of(page);
    if (place) return;  // another thread was faster
    if (held == kMostPages) give_up("a call uses too much memory", page);
    const size_t at = held * kPage;
    if (pread(memory, store + at, kPage, (off_t)page) != (ssize_t)kPage) give_up("no such memory", page);
    std::memcpy(snapshot + at, store + at, kPage);
    if (mmap((void*)page, kPage, PROT_NONE, MAP_SHARED, store_file, (off_t)at) != (void*)page)
        give_up("taken by the emulator", page);
    if (mprotect((void*)page, kPage, PROT_READ | PROT_WRITE)) give_up("no access to the memory", page);
    addresses[held++] = page;
    place = (uint32_t)held;
}

void handle(int, siginfo_t* info, void*) {
    while (busy.test_and_set(std::memory_order_acquire)) sched_yield();
    fetch((uintptr_t)info->si_addr & ~(kPage - 1));
    busy.clear(std::memory_order_release);
}

void write_back() {
    for (size_t i = 0; i < held; i++) {
        const char *now = store + i * kPage, *before = snapshot + i * kPage;
        for (size_t first = 0, last; first < kPage; first = last + 1) {
            last = first;
            while (last < kPage && now[last] != before[last]) last++;
            if (last > first && pwrite(memory, now + first, last - first, (off_t)(addresses[i] + first)) < 0)
                give_up("memory that may not be written", addresses[i] + first);
        }
        munmap((void*)addresses[i], kPage);
    }
    held = 0;
    std::memset(places, 0, sizeof places);
}

char* pages(int file) {
    return (char*)mmap(nullptr, kMostPages * kPage, PROT_READ | PROT_WRITE, file < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED, file, 0);
}

}  // namespace

// In place of the C library's, for the kernels too: that one zeroes by `dc zva`, and QEMU 7.2 does not say right where that
// instruction failed. volatile: a compiler would make a call of memset of it.
extern "C" void* memset(void* to, int value, size_t count) {
    volatile char* at = (volatile char*)to;
    for (size_t i = 0; i < count; i++) at[i] = (char)value;
    return to;
}

int main(int count, char** arguments) {
    char path[64];
    std::snprintf(path, sizeof path, "/proc/%s/mem", arguments[2]);
    memory = open(path, O_RDWR);
    store_file = memfd_create("pages", 0);
    if (memory < 0 || store_file < 0 || ftruncate(store_file, (off_t)(kMostPages * kPage))) give_up("no access to the memory", 0);
    store = pages(store_file), snapshot = pages(-1);
    void* library = dlopen(arguments[1], RTLD_NOW);
    if (!library) std::fprintf(stderr, "emulated kernels: %s\n", dlerror());
    if (!library || store == MAP_FAILED || snapshot == MAP_FAILED) return 1;
    struct sigaction action = {};
    action.sa_sigaction = handle, action.sa_flags = SA_SIGINFO;
    sigaction(SIGSEGV, &action, nullptr);
    for (Request r; receive(0, r);) {
        const char* name = 3 + r.function < count ? arguments[3 + r.function] : "";
        const bool text = name[0] == '*';  // a function that returns a string
        typedef int64_t (*Function)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);
        const Function function = (Function)dlsym(library, name + text);
        if (!function) give_up(name, 0);
        const int64_t* a = r.arguments;
        Answer answer = {function(a[0], a[1], a[2], a[3], a[4], a[5]), {}};
        if (text) std::snprintf(answer.text, sizeof answer.text, "%s", (const char*)answer.value);
        write_back();
        if (!send(1, answer)) return 1;
    }
    return 0;
}
