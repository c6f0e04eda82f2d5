/* Kernels by name: their table, their loading, their launch.
 *
 * A launch looks the kernel up in this context's list of functions. What is not there yet is loaded, in steps that are done
 * once each: the image of a unit (from the caller's source), its library (for every GPU of that architecture), the kernel's
 * function in this context. After that a launch costs three cheap driver calls and the launch itself, and can be captured. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "driver.h"

enum { MAX_DYNAMIC_SHARED_SIZE = 8, MOST_DEVICES = 64 };

typedef struct {
    const char *name, *unit;
    size_t args_bytes;
    unsigned threads;
    size_t smem_bytes;
    unsigned min_blocks;
} kernel_entry;

static const kernel_entry kernels[] = {
#define KERNEL(name, file, instance, args_struct, threads, smem_bytes, min_blocks) \
    {#name, #file, sizeof(args_struct), threads, smem_bytes, min_blocks},
#include "kernels.def"
#undef KERNEL
};
enum { KERNELS = sizeof kernels / sizeof *kernels };

/* A unit on a device: its library, or why there is none. */
typedef struct {
    int tried, status;
    void *library;
    char why[256];
} unit_state;

/* A context, by its unchanging number: the functions of the kernels that were warmed in it. */
typedef struct context_state {
    uint64_t id;
    struct context_state *next;
    _Atomic(void *) functions[KERNELS];
} context_state;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static int sorted[KERNELS];      /* indices of kernels, by name */
static int unit_of[KERNELS];     /* index of the first kernel of the same unit */
static unit_state units[MOST_DEVICES][KERNELS];
static _Atomic(context_state *) contexts;
static assay_cuda_source source;

static int by_name(const void *a, const void *b) { return strcmp(kernels[*(const int *)a].name, kernels[*(const int *)b].name); }

static void prepare(void) {
    for (int i = 0; i < KERNELS; i++) {
        sorted[i] = i;
        unit_of[i] = 0;
        while (strcmp(kernels[unit_of[i]].unit, kernels[i].unit)) unit_of[i]++;
    }
    qsort(sorted, KERNELS, sizeof *sorted, by_name);
}

static int index_of(const char *name) {
    pthread_once(&once, prepare);
    int low = 0, high = KERNELS;
    while (low < high) {
        const int middle = (low + high) / 2, order = strcmp(kernels[sorted[middle]].name, name);
        if (!order) return sorted[middle];
        if (order < 0) low = middle + 1;
        else high = middle;
    }
    return -1;
}

int assay_cuda_kernel_count(void) { return KERNELS; }

int assay_cuda_kernel_info(int i, const char **name, const char **unit, size_t *args_bytes, unsigned *threads,
                           size_t *smem_bytes, unsigned *min_blocks) {
    if (i < 0 || i >= KERNELS) return ASSAY_EINVAL;
    *name = kernels[i].name;
    *unit = kernels[i].unit;
    *args_bytes = kernels[i].args_bytes;
    *threads = kernels[i].threads;
    *smem_bytes = kernels[i].smem_bytes;
    *min_blocks = kernels[i].min_blocks;
    return ASSAY_OK;
}

void assay_cuda_set_source(assay_cuda_source new_source) {
    pthread_mutex_lock(&lock);
    source = new_source;
    pthread_mutex_unlock(&lock);
}

/* Contexts and what they hold are only let go of here: launches walk the list without a lock. */
void assay_cuda_forget_kernels(void) {
    pthread_mutex_lock(&lock);
    for (context_state *c = contexts; c;) {
        context_state *next = c->next;
        free(c);
        c = next;
    }
    contexts = NULL;
    memset(units, 0, sizeof units);
    pthread_mutex_unlock(&lock);
}

static context_state *find_context(uint64_t id) {
    context_state *c = contexts;
    while (c && c->id != id) c = c->next;
    return c;
}

/* The compute capability that a unit is made for alone, as 10 major + minor: "..._sm90a" is 90; 0: any. */
static int only_for(const char *unit) {
    const char *mark = strstr(unit, "_sm");
    int capability = 0, end = 0;
    return mark && sscanf(mark, "_sm%da%n", &capability, &end) == 1 && end && !mark[end] ? capability : 0;
}

static int fits(const kernel_entry *kernel, const assay_cuda_device *device) {
    const int wanted = only_for(kernel->unit), has = 10 * device->major + device->minor;
    if (has < 80)
        return assay_cuda_fail(ASSAY_CUDA_EARCH, "cuda:%d, %s, has compute capability %d.%d: 8.0 (A100, RTX 30) or newer is needed",
                               device->ordinal, device->name, device->major, device->minor);
    if (wanted && wanted != has)
        return assay_cuda_fail(ASSAY_CUDA_EARCH, "%s is made for compute capability %d.%d alone; cuda:%d, %s, has %d.%d", kernel->name,
                               wanted / 10, wanted % 10, device->ordinal, device->name, device->major, device->minor);
    return ASSAY_OK;
}

/* With the lock held: the library of a unit on a device. */
static int load_unit(int kernel, const assay_cuda_device *device, void **library) {
    unit_state *state = &units[device->ordinal][unit_of[kernel]];
    if (!state->tried) {
        const void *image = NULL;
        size_t bytes = 0;
        int status = source ? source(kernels[kernel].unit, device, &image, &bytes) : ASSAY_CUDA_EIMAGE;
        if (status) {
            const char *why = image ? image : "no source of compiled kernels was set";
            assay_cuda_fail(status, "%s, cuda:%d (%s, sm_%d%d): %s", kernels[kernel].unit, device->ordinal, device->name, device->major,
                            device->minor, why);
            if (status != ASSAY_CUDA_EIMAGE) return status;
            snprintf(state->why, sizeof state->why, "%s", assay_cuda_message());
        } else {
            status = ASSAY_CUDA_CALL(cuLibraryLoadData, &state->library, image, NULL, NULL, 0, NULL, NULL, 0);
            if (status) return status;
        }
        state->status = status;
        state->tried = 1;
    }
    if (state->status) return assay_cuda_fail(state->status, "%s", state->why);
    *library = state->library;
    return ASSAY_OK;
}

/* With the lock held: the function of a kernel in the current context. */
static int load_kernel(int i, context_state *c, const assay_cuda_device *device) {
    if (c->functions[i]) return ASSAY_OK;
    void *library = NULL, *kernel = NULL, *function = NULL;
    int handle = 0;
    int status = load_unit(i, device, &library);
    if (!status) status = ASSAY_CUDA_CALL(cuLibraryGetKernel, &kernel, library, kernels[i].name);
    if (!status) status = ASSAY_CUDA_CALL(cuDeviceGet, &handle, device->ordinal);
    if (!status && kernels[i].smem_bytes > (size_t)device->smem_optin)
        status = assay_cuda_fail(ASSAY_CUDA_EARCH, "%s takes %zu bytes of shared memory, cuda:%d, %s, has %d a block", kernels[i].name,
                                 kernels[i].smem_bytes, device->ordinal, device->name, device->smem_optin);
    if (!status)
        status = ASSAY_CUDA_CALL(cuKernelSetAttribute, MAX_DYNAMIC_SHARED_SIZE, (int)kernels[i].smem_bytes, kernel, handle);
    if (!status) status = ASSAY_CUDA_CALL(cuKernelGetFunction, &function, kernel); /* loads it into this context */
    if (!status) c->functions[i] = function;
    return status;
}

/* With the lock held: this context's record. */
static int enter(uint64_t id, context_state **c) {
    *c = find_context(id);
    if (*c) return ASSAY_OK;
    *c = calloc(1, sizeof **c);
    if (!*c) return assay_cuda_fail(ASSAY_CUDA_ENOMEM, "no memory on the host");
    (*c)->id = id;
    (*c)->next = contexts;
    contexts = *c;
    return ASSAY_OK;
}

/* The function of a kernel in the current context. stream: where it is to run, or where_not_asked. */
static char where_not_asked;
static int function_of(const char *name, void *stream, int *index, void **function) {
    const int i = index_of(name);
    if (i < 0) return assay_cuda_fail(ASSAY_EINVAL, "%s: no such kernel", name);
    *index = i;
    uint64_t id = 0;
    const assay_cuda_device *device = NULL;
    int status = assay_cuda_context(&id, &device);
    if (status) return status;
    context_state *c = find_context(id);
    if (c && (*function = c->functions[i])) return ASSAY_OK;
    status = fits(&kernels[i], device);
    if (status) return status;
    if (stream != &where_not_asked) {
        int capturing = 0;
        status = ASSAY_CUDA_CALL(cuStreamIsCapturing, stream, &capturing);
        if (status) return status;
        if (capturing)
            return assay_cuda_fail(ASSAY_CUDA_ECAPTURE, "%s is not loaded yet, and cannot be while a graph is captured: call the op once "
                                   "before the capture, or warm it up", name);
    }
    pthread_mutex_lock(&lock);
    status = enter(id, &c);
    if (!status) status = load_kernel(i, c, device);
    if (!status) *function = c->functions[i];
    pthread_mutex_unlock(&lock);
    return status;
}

int assay_cuda_ready(const char *kernel) {
    int index;
    void *function;
    return function_of(kernel, &where_not_asked, &index, &function);
}

int assay_cuda_warm(const char *prefix) {
    const size_t length = prefix ? strlen(prefix) : 0;
    uint64_t id = 0;
    const assay_cuda_device *device = NULL;
    context_state *c = NULL;
    pthread_once(&once, prepare);
    int status = assay_cuda_context(&id, &device);
    if (!status && device->major < 8) status = fits(&kernels[0], device);
    if (status) return status;
    pthread_mutex_lock(&lock);
    status = enter(id, &c);
    for (int i = 0; i < KERNELS && !status; i++) {
        const int wanted = only_for(kernels[i].unit);
        if (strncmp(kernels[i].name, prefix ? prefix : "", length)) continue;
        if (wanted && wanted != 10 * device->major + device->minor) continue;
        if (kernels[i].smem_bytes > (size_t)device->smem_optin) continue;
        status = load_kernel(i, c, device);
    }
    pthread_mutex_unlock(&lock);
    return status;
}

int assay_cuda_occupancy(const char *kernel, size_t smem, int *blocks) {
    int index;
    void *function = NULL;
    const int status = function_of(kernel, &where_not_asked, &index, &function);
    return status ? status : ASSAY_CUDA_CALL(cuOccupancyMaxActiveBlocksPerMultiprocessor, blocks, function, (int)kernels[index].threads, smem);
}

int assay_cuda_launch(const char *kernel, unsigned grid_x, unsigned grid_y, unsigned grid_z, size_t smem, void *stream,
                      const void *args, size_t args_bytes) {
    int index = 0;
    void *function = NULL;
    int status = function_of(kernel, stream, &index, &function);
    if (status) return status;
    const kernel_entry *entry = &kernels[index];
    if (args_bytes != entry->args_bytes || smem > entry->smem_bytes || grid_x > 0x7FFFFFFF || grid_y > 65535 || grid_z > 65535)
        return assay_cuda_fail(ASSAY_EINVAL, "%s: expected %zu bytes of arguments, at most %zu of shared memory, a grid of at most 2^31-1 x "
                               "65535 x 65535; got %zu, %zu, %u x %u x %u", kernel, entry->args_bytes, entry->smem_bytes, args_bytes,
                               smem, grid_x, grid_y, grid_z);
    if (!grid_x || !grid_y || !grid_z) return ASSAY_OK;
    void *parameters[] = {(void *)(uintptr_t)args};
    return ASSAY_CUDA_CALL(cuLaunchKernel, function, grid_x, grid_y, grid_z, entry->threads, 1, 1, (unsigned)smem, stream, parameters,
                           NULL);
}
