#include "fiber.h"

#ifdef __SANITIZE_ADDRESS__
#include <pthread.h>
#endif

namespace assay {
namespace emu {

#ifdef __x86_64__
// Saves the callee's registers on this stack, leaves this stack in *from, takes the other.
extern "C" void assay_emu_switch(void **from, void *to);
asm(R"(
.text
.p2align 4
.globl assay_emu_switch
.hidden assay_emu_switch
.type assay_emu_switch, @function
assay_emu_switch:
    endbr64
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size assay_emu_switch, .-assay_emu_switch
)");
#endif

void fiber_adopt(Fiber &main) {
    (void)main;
#ifdef __SANITIZE_THREAD__
    main.tsan = __tsan_get_current_fiber();
#endif
#ifdef __SANITIZE_ADDRESS__
    pthread_attr_t attributes;
    void *bottom;
    if (pthread_getattr_np(pthread_self(), &attributes) == 0) {
        pthread_attr_getstack(&attributes, &bottom, &main.bottom_bytes);
        main.bottom = bottom;
        pthread_attr_destroy(&attributes);
    }
#endif
}

void fiber_start(Fiber &fiber, void *stack, size_t stack_bytes, void (*entry)()) {
    fiber.stack = stack;
    fiber.stack_bytes = stack_bytes;
#ifdef __x86_64__
    // As after a call: the stack is 8 short of a multiple of 16 when entry begins.
    void **top = reinterpret_cast<void **>((reinterpret_cast<uintptr_t>(stack) + stack_bytes) & ~uintptr_t{15});
    *--top = nullptr;
    *--top = reinterpret_cast<void *>(entry);
    for (int i = 0; i < 6; i++) *--top = nullptr;
    fiber.sp = top;
#else
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stack;
    fiber.context.uc_stack.ss_size = stack_bytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
#endif
#ifdef __SANITIZE_THREAD__
    fiber.tsan = __tsan_create_fiber(0);
#endif
#ifdef __SANITIZE_ADDRESS__
    fiber.bottom = stack;
    fiber.bottom_bytes = stack_bytes;
#endif
}

void fiber_switch(Fiber &from, Fiber &to) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&from.fake_stack, to.bottom, to.bottom_bytes);
#endif
#ifdef __SANITIZE_THREAD__
    __tsan_switch_to_fiber(to.tsan, 1);   // 1: the switch itself orders nothing
#endif
#ifdef __x86_64__
    assay_emu_switch(&from.sp, to.sp);
#else
    swapcontext(&from.context, &to.context);
#endif
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void fiber_entered(Fiber &self) {
    (void)self;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

void fiber_end(Fiber &fiber) {
    (void)fiber;
#ifdef __SANITIZE_THREAD__
    if (fiber.tsan) __tsan_destroy_fiber(fiber.tsan);
    fiber.tsan = nullptr;
#endif
}

}  // namespace emu
}  // namespace assay
