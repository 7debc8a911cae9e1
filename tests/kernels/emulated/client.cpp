// The side of the tests: a library with the functions of api.h, each of which is called in an emulated process (server.cpp).
//
// functions.inc, written by run.py, has FUNCTION(index, name) or TEXT_FUNCTION(index, name) for each function. The variable
// HF_KVCACHE_EMULATOR names a program that starts the server, given the number of this process.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <sys/prctl.h>
#include <sys/wait.h>

#include "protocol.h"

namespace {

constexpr uint64_t kMargin = 16ull << 30;  // how much memory either process may still map beside what it has

struct Server {
    pid_t process = 0, client = 0;
    int requests = -1, answers = -1;
};

// Whether the emulator itself lies where memory of this process is, or may come to lie: its kernels could not see that.
bool overlap(pid_t other) {
    char path[64];
    std::snprintf(path, sizeof path, "/proc/%d/maps", other);
    struct Range {
        unsigned long first, last;
    };
    static Range own[1 << 14];
    size_t count = 0;
    for (const char* from : {"/proc/self/maps", (const char*)path}) {
        FILE* file = std::fopen(from, "r");
        if (!file) return true;
        const bool mine = from != path;
        for (char line[4096]; std::fgets(line, sizeof line, file);) {
            unsigned long first, last;
            if (std::sscanf(line, "%lx-%lx", &first, &last) != 2 || first >> 47) continue;
            const bool fixed = std::strstr(line, "[stack]") || std::strstr(line, "[v");  // these do not grow
            if (mine && count < sizeof own / sizeof *own) own[count++] = {fixed ? first : first - kMargin, fixed ? last : last + kMargin};
            for (size_t i = 0; !mine && i < count; i++)
                if (!fixed && first < own[i].last && own[i].first < last) return std::fclose(file), true;
        }
        std::fclose(file);
    }
    return false;
}

Server start() {
    const char* program = std::getenv("HF_KVCACHE_EMULATOR");
    if (!program) std::fprintf(stderr, "HF_KVCACHE_EMULATOR is not set\n"), std::abort();
    char number[32];
    std::snprintf(number, sizeof number, "%d", getpid());
    prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0);  // where only a parent may read the memory of a process
    int in[2], out[2];
    if (pipe(in) || pipe(out)) std::abort();
    const pid_t process = fork();
    if (process == 0) {
        dup2(in[0], 0), dup2(out[1], 1);
        for (int file : {in[0], in[1], out[0], out[1]}) close(file);
        execl(program, program, number, (char*)nullptr);
        _exit(127);
    }
    close(in[0]), close(out[1]);
    return {process, getpid(), in[1], out[0]};
}

void stop(const Server& server) {
    close(server.requests), close(server.answers);
    waitpid(server.process, nullptr, 0);
}

Answer ask(const Server& server, const Request& request) {
    Answer answer;
    if (!send(server.requests, request) || !receive(server.answers, answer)) {
        std::fprintf(stderr, "the emulated kernels are gone, see above\n");
        std::abort();
    }
    return answer;
}

// Keeps the process until the end; a forked process starts one of its own. The emulator lies at random addresses: one that
// overlaps with this process is replaced.
Answer call(const Request& request) {
    static std::mutex mutex;
    static Server server;
    const std::lock_guard<std::mutex> lock(mutex);
    for (int tries = 0; server.client != getpid(); tries++) {
        if (tries == 50) std::fprintf(stderr, "the emulator lies in the memory of the tests\n"), std::abort();
        const Server next = start();
        ask(next, {0, {}});  // it has loaded its library then; function 0 is hfkv_abi_version
        if (overlap(next.process)) stop(next);
        else server = next;
    }
    return ask(server, request);
}

}  // namespace

#define FUNCTION(index, name)                                                                                           \
    extern "C" int64_t name(int64_t a, int64_t b, int64_t c, int64_t d, int64_t e, int64_t f) {                         \
        return call({index, {a, b, c, d, e, f}}).value;                                                                 \
    }
#define TEXT_FUNCTION(index, name)                                                                                      \
    extern "C" const char* name() {                                                                                     \
        static thread_local char text[sizeof(Answer::text)];                                                            \
        return std::strcpy(text, call({index, {}}).text);                                                               \
    }
#include "functions.inc"
