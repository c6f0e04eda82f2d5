// How every call of the mock driver begins: counted, failed where a test asked for it, refused where the driver would refuse.
#ifndef ASSAY_MOCK_CALLS_H
#define ASSAY_MOCK_CALLS_H

#include "mock.h"

namespace mock {

using Hold = std::lock_guard<std::recursive_mutex>;

// Counts the call; answers for it when a test asked for a failure.
inline bool injected(const char *call, int *result) {
    machine->calls[call]++;
    const auto found = machine->failures.find(call);
    if (found == machine->failures.end()) return false;
    if (found->second.second-- > 0) return false;
    *result = found->second.first;
    machine->failures.erase(found);
    return true;
}

inline Context *top() { return current.empty() ? nullptr : current.back(); }

#define ENTER(call)                          \
    Hold hold(machine->lock);                \
    int answer = OK;                         \
    if (injected(#call, &answer)) return answer; \
    if (!machine->initialized) return NOT_INITIALIZED
#define ENTER_CONTEXT(call)                  \
    ENTER(call);                             \
    Context *const context = top();          \
    if (!context) return INVALID_CONTEXT;    \
    if (context->destroyed) return CONTEXT_IS_DESTROYED; \
    if (context->sticky) return context->sticky
#define FORBIDDEN_IN_CAPTURE() \
    if (capture_forbids()) return CAPTURE_UNSUPPORTED
#define STREAM(name, handle)                                            \
    Result found_##name = OK;                                           \
    const std::shared_ptr<Stream> name = stream_of(handle, context, &found_##name); \
    if (found_##name != OK) return found_##name

}  // namespace mock

#endif
