// Fibers: a stack and a place to go on. On x86-64 a switch saves the six registers that calls preserve; elsewhere ucontext.
// The sanitizers are told of every switch.
#ifndef ASSAY_EMU_FIBER_H
#define ASSAY_EMU_FIBER_H

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#ifndef __x86_64__
#include <ucontext.h>
#endif

#ifdef __SANITIZE_THREAD__
extern "C" {
void *__tsan_get_current_fiber(void);
void *__tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void *fiber);
void __tsan_switch_to_fiber(void *fiber, unsigned flags);
void __tsan_acquire(void *object);
void __tsan_release(void *object);
void AnnotateIgnoreReadsBegin(const char *file, int line);
void AnnotateIgnoreReadsEnd(const char *file, int line);
void AnnotateIgnoreWritesBegin(const char *file, int line);
void AnnotateIgnoreWritesEnd(const char *file, int line);
}
#endif
#ifdef __SANITIZE_ADDRESS__
extern "C" {
void __sanitizer_start_switch_fiber(void **fake_stack, const void *bottom, size_t size);
void __sanitizer_finish_switch_fiber(void *fake_stack, const void **bottom, size_t *size);
}
#endif

namespace assay {
namespace emu {

// Within its life, the emulator's own accesses to memory are no kernel's and race with nothing.
struct Quiet {
#ifdef __SANITIZE_THREAD__
    Quiet() {
        AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
        AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
    }
    ~Quiet() {
        AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
        AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
    }
#else
    Quiet() {}
    ~Quiet() {}
#endif
    Quiet(const Quiet &) = delete;
    Quiet &operator=(const Quiet &) = delete;
};

// What happened before a release of an object is seen after an acquire of it.
inline void release(void *object) {
#ifdef __SANITIZE_THREAD__
    __tsan_release(object);
#else
    (void)object;
#endif
}
inline void acquire(void *object) {
#ifdef __SANITIZE_THREAD__
    __tsan_acquire(object);
#else
    (void)object;
#endif
}

struct Fiber {
    void *stack = nullptr;
    size_t stack_bytes = 0;
#ifdef __x86_64__
    void *sp = nullptr;
#else
    ucontext_t context;
#endif
#ifdef __SANITIZE_THREAD__
    void *tsan = nullptr;
#endif
#ifdef __SANITIZE_ADDRESS__
    void *fake_stack = nullptr;
    const void *bottom = nullptr;
    size_t bottom_bytes = 0;
#endif
};

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 128 << 10;
#else
constexpr size_t kStackBytes = 64 << 10;
#endif

// The fiber of whoever calls: to come back to.
void fiber_adopt(Fiber &main);
// entry never returns.
void fiber_start(Fiber &fiber, void *stack, size_t stack_bytes, void (*entry)());
void fiber_switch(Fiber &from, Fiber &to);
// First thing that a fiber does.
void fiber_entered(Fiber &self);
void fiber_end(Fiber &fiber);

}  // namespace emu
}  // namespace assay

#endif
