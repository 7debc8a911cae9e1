// What the library in the process of the tests and the emulated process say to each other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <unistd.h>

constexpr int kMostArguments = 6;  // as many as both calling conventions pass in registers

struct Request {
    int64_t function, arguments[kMostArguments];
};

struct Answer {
    int64_t value;
    char text[64];  // what a function that returns a string returns
};

inline bool transfer(ssize_t (*one)(int, void*, size_t), int file, void* data, size_t bytes) {
    for (size_t done = 0; done < bytes;) {
        const ssize_t now = one(file, (char*)data + done, bytes - done);
        if (now <= 0) return false;
        done += (size_t)now;
    }
    return true;
}

template <class T>
bool receive(int file, T& what) {
    return transfer(read, file, &what, sizeof what);
}

template <class T>
bool send(int file, const T& what) {
    return transfer([](int f, void* data, size_t bytes) { return write(f, data, bytes); }, file, (void*)&what, sizeof what);
}
