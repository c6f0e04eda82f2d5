// The driver's calls on streams, graphs and events; see mock_libcuda.cpp.
#include "mock_calls.h"

using namespace mock;

extern "C" {

// ---- streams -------------------------------------------------------------------------------------------------------
int cuStreamCreate(void **handle, unsigned flags) {
    ENTER_CONTEXT(cuStreamCreate);
    const auto stream = std::make_shared<Stream>();
    stream->context = context;
    stream->blocking = !(flags & 1);
    context->streams.push_back(stream);
    machine->streams[stream.get()] = stream;
    *handle = stream.get();
    return OK;
}
int cuStreamDestroy_v2(void *handle) {
    ENTER(cuStreamDestroy_v2);
    const auto found = machine->streams.find(handle);
    if (found == machine->streams.end()) return INVALID_HANDLE;
    if (found->second->capture) found->second->capture->invalid = true;
    found->second->capture.reset();
    found->second->destroyed = true;   // its work still runs
    machine->streams.erase(found);
    return OK;
}
int cuStreamSynchronize(void *handle) {
    ENTER_CONTEXT(cuStreamSynchronize);
    STREAM(stream, handle);
    if (stream->capture) {
        stream->capture->invalid = true;
        return CAPTURE_UNSUPPORTED;
    }
    const Result result = run_until(stream, stream->submitted);
    if (stream->time_s > machine->host_s) machine->host_s = stream->time_s;
    return result;
}
int cuStreamIsCapturing(void *handle, int *status) {
    ENTER_CONTEXT(cuStreamIsCapturing);
    STREAM(stream, handle);
    *status = !stream->capture ? 0 : stream->capture->invalid ? 2 : 1;
    return OK;
}
int cuStreamBeginCapture_v2(void *handle, int mode) {
    ENTER_CONTEXT(cuStreamBeginCapture_v2);
    STREAM(stream, handle);
    if (stream->legacy) return CAPTURE_UNSUPPORTED;
    if (stream->capture) return INVALID_VALUE;
    stream->capture = std::make_shared<Capture>();
    stream->capture->mode = mode;
    stream->capture->thread = this_thread();
    stream->capture->origin = stream.get();
    stream->capture->members.insert(stream.get());
    return OK;
}
int cuStreamEndCapture(void *handle, void **graph) {
    ENTER_CONTEXT(cuStreamEndCapture);
    STREAM(stream, handle);
    *graph = nullptr;
    const std::shared_ptr<Capture> capture = stream->capture;
    if (!capture) return INVALID_VALUE;
    if (capture->origin != stream.get()) return CAPTURE_UNMATCHED;
    for (auto &other : context->streams)
        if (other->capture == capture) other->capture.reset();
    if (capture->invalid) return CAPTURE_INVALIDATED;
    if (!capture->loose.empty()) return CAPTURE_UNJOINED;
    std::unique_ptr<Graph> made(new Graph{capture->nodes});
    *graph = made.get();
    machine->graphs[*graph] = std::move(made);
    return OK;
}
int cuStreamWaitEvent(void *handle, void *event_handle, unsigned) {
    ENTER_CONTEXT(cuStreamWaitEvent);
    STREAM(stream, handle);
    const auto found = machine->events.find(event_handle);
    if (found == machine->events.end()) return INVALID_HANDLE;
    const Event &event = *found->second;
    if (event.captured) {
        if (stream->capture && stream->capture != event.captured) return INVALID_VALUE;
        stream->capture = event.captured;   // joins the capture
        event.captured->members.insert(stream.get());
        if (stream.get() == event.captured->origin) event.captured->loose.erase(event.captured_stream);
        return OK;
    }
    if (stream->capture) {
        stream->capture->invalid = true;   // an event from outside of the capture
        return CAPTURE_UNSUPPORTED;
    }
    if (!event.stream) return OK;
    Work work;
    work.run = [] { return OK; };
    work.after.push_back({event.stream, event.number});
    return submit(stream, work);
}

// ---- graphs -------------------------------------------------------------------------------------------------------
int cuGraphInstantiateWithFlags(void **exec, void *graph, unsigned long long) {
    ENTER_CONTEXT(cuGraphInstantiateWithFlags);
    const auto found = machine->graphs.find(graph);
    if (found == machine->graphs.end()) return INVALID_VALUE;
    std::unique_ptr<Graph> made(new Graph(*found->second));
    *exec = made.get();
    machine->execs[*exec] = std::move(made);
    return OK;
}
int cuGraphDestroy(void *graph) {
    ENTER(cuGraphDestroy);
    return machine->graphs.erase(graph) ? OK : INVALID_VALUE;
}
int cuGraphExecDestroy(void *exec) {
    ENTER(cuGraphExecDestroy);
    return machine->execs.erase(exec) ? OK : INVALID_VALUE;
}
int cuGraphLaunch(void *exec, void *handle) {
    ENTER_CONTEXT(cuGraphLaunch);
    STREAM(stream, handle);
    const auto found = machine->execs.find(exec);
    if (found == machine->execs.end()) return INVALID_VALUE;
    const std::vector<Work> nodes = found->second->nodes;
    const int device = context->device;
    Work work;
    const auto total = std::make_shared<double>(0);
    work.run = [nodes, total, device]() -> Result {
        *total = setting("launch_s", device);
        for (const Work &node : nodes) {
            machine->replaying = true;
            const Result result = node.run();
            machine->replaying = false;
            if (result != OK) return result;
            // A node of a graph costs node_s where a launch of its own costs launch_s.
            *total += (node.seconds ? node.seconds() : 0) - setting("launch_s", device) + setting("node_s", device);
        }
        return OK;
    };
    work.seconds = [total] { return *total; };
    return submit(stream, work);
}

// ---- events -------------------------------------------------------------------------------------------------------
int cuEventCreate(void **handle, unsigned flags) {
    ENTER_CONTEXT(cuEventCreate);
    std::unique_ptr<Event> event(new Event);
    event->context = context;
    event->timed = !(flags & 2);
    *handle = event.get();
    machine->events[*handle] = std::move(event);
    return OK;
}
int cuEventDestroy_v2(void *handle) {
    ENTER(cuEventDestroy_v2);
    return machine->events.erase(handle) ? OK : INVALID_HANDLE;
}
int cuEventRecord(void *handle, void *stream_handle) {
    ENTER_CONTEXT(cuEventRecord);
    STREAM(stream, stream_handle);
    const auto found = machine->events.find(handle);
    if (found == machine->events.end() || found->second->context != context) return INVALID_HANDLE;
    Event &event = *found->second;
    if (stream->capture) {
        event.captured = stream->capture;
        event.captured_stream = stream.get();
        return OK;
    }
    event.captured.reset();
    event.time_s = std::make_shared<double>(0);
    const auto time_s = event.time_s;
    Stream *const raw = stream.get();
    Work work;
    work.run = [time_s, raw] {
        *time_s = raw->time_s;
        return OK;
    };
    const Result result = submit(stream, work);
    event.stream = stream;
    event.number = stream->submitted;
    return result;
}
int cuEventSynchronize(void *handle) {
    ENTER_CONTEXT(cuEventSynchronize);
    FORBIDDEN_IN_CAPTURE();
    const auto found = machine->events.find(handle);
    if (found == machine->events.end()) return INVALID_HANDLE;
    if (found->second->captured) return CAPTURED_EVENT;
    if (!found->second->stream) return OK;
    const Result result = run_until(found->second->stream, found->second->number);
    if (*found->second->time_s > machine->host_s) machine->host_s = *found->second->time_s;
    return result;
}
int cuEventElapsedTime(float *ms, void *begin, void *end) {
    ENTER_CONTEXT(cuEventElapsedTime);
    const auto a = machine->events.find(begin), b = machine->events.find(end);
    if (a == machine->events.end() || b == machine->events.end()) return INVALID_HANDLE;
    for (const Event *e : {a->second.get(), b->second.get()}) {
        if (!e->timed || !e->stream || e->captured) return INVALID_HANDLE;
        if (e->stream->done < e->number) return NOT_READY;
    }
    *ms = static_cast<float>(1e3 * (*b->second->time_s - *a->second->time_s));
    return OK;
}

}
